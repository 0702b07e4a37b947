"""Settings of data sets, and of the verbs that look after them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from episodes.digests import default_cache as default_cache  # of every verb that caches
from episodes.types import DataError
from fewshot_seg.config.machinery import Config, setting

DataName = Literal["voc", "coco", "fss", "folder", "coco-json", "labelme", "synthetic"]
ProtocolName = Literal["hsnet", "pfenet", "bam", "repri", "custom"]
SupportName = Literal["mask", "box", "scribble", "point", "label"]
ShotRuleName = Literal["pooled", "vote", "mean", "reweighted", "protocol"]
AugmentName = Literal["none", "flip", "standard", "pfenet", "colour", "strong"]


_ROOTS = {
    "voc": "the VOC2012 folder that holds JPEGImages/ and ImageSets/",
    "coco": "the folder that holds annotations/ and the folders of photos",
    "fss": "the folder that holds one folder per class",
    "folder": "the folder that holds images/ and masks/",
    "coco-json": "the JSON file of annotations, or the folder that holds it",
    "labelme": "the folder of LabelMe's JSON files",
}


@dataclass(frozen=True, kw_only=True)
class DataSettings(Config):
    data: DataName = setting(
        "data set: VOC 2012 (with SBD), COCO, FSS-1000, a folder of images/ and masks/, one's own COCO JSON, LabelMe "
        "files, or generated pictures",
        "voc",
    )
    root: Path | None = setting("where the data set is; for coco-json the file", None)
    sbd: Path | None = setting("for voc: folder of SBD (benchmark_RELEASE), whose .mat files are read directly", None)
    images: Path | None = setting("for coco-json: folder of the photos (default: beside the JSON)", None)
    protocol: ProtocolName | None = setting(
        "evaluation protocol of the literature (default: hsnet where the data set has folds, else custom)", None
    )
    protocol_file: Path | None = setting("for --protocol custom: TOML file of what differs from the defaults", None)
    training_split: str | None = setting("split whose images train (default: the data set's)", None)
    evaluation_split: str | None = setting("split whose images are scored (default: the data set's)", None)
    novel_classes: tuple[str, ...] | None = setting(
        "classes to be scored, by name, where the data set has no folds (default: all, and nothing to train on)", None
    )

    @property
    def needs_data(self) -> bool:
        """Whether a data set is read at all."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.needs_data:
            return
        if self.root is None and self.data != "synthetic":
            raise DataError(f"--data {self.data} needs --root, {_ROOTS[self.data]}; --data synthetic needs no files")
        for name, needed in (("sbd", "voc"), ("images", "coco-json")):
            if getattr(self, name) is not None and self.data != needed:
                raise DataError(f"--{name} is for --data {needed}, not for --data {self.data}; leave it out")
        if self.protocol_file is not None and self.protocol not in (None, "custom"):
            raise DataError(f"--protocol-file describes a custom protocol, but --protocol is {self.protocol}; drop one")


@dataclass(frozen=True, kw_only=True)
class CacheSettings(Config):
    cache: Path = setting(
        "folder of the feature cache (or set FEWSHOT_SEG_CACHE)",
        factory=default_cache,
    )
    cache_gigabytes: float = setting("size of the feature cache at most", 4.0, minimum=0.0)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(DataSettings):
    """``fewshot-seg data verify``."""

    splits: tuple[str, ...] | None = setting("splits to check (default: those of training and evaluation)", None)
    format: Literal["text", "json"] = setting("what is printed: lines for people, or one JSON object", "text")
    out: Path | None = setting("JSON file of the report, whatever is printed", None)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Config):
    """``fewshot-seg data prepare``."""

    fills: ClassVar[str | None] = "target"

    data_set: Literal["voc", "coco", "fss"] = setting("which data set", positional=True)
    target: Path = setting("folder that the data set goes to")
    archives: Path | None = setting("folder of archives that are on disk already (default: they are fetched)", None)
    mirror: str | None = setting("address to fetch the archives from instead of the official ones", None)
    sbd: bool = setting("for voc: SBD as well, which most protocols train on", True)
    year: Literal["2014", "2017"] = setting("for coco: which release; published COCO-20i figures use 2014", "2014")


@dataclass(frozen=True, kw_only=True)
class EpisodesConfig(DataSettings, CacheSettings):
    """``fewshot-seg data episodes``."""

    fold: int = setting("test fold", 0, minimum=0, maximum=3)
    shots: int = setting("supports per episode", 1, minimum=1)
    ways: int = setting("classes per episode", 1, minimum=1)
    count: int | None = setting("number of episodes (default: the protocol's)", None, minimum=1)
    seed: int | None = setting("seed of the episodes (default: the protocol's)", None, minimum=0)
    out: Path | None = setting("file to write (default: JSON on stdout)", None)


@dataclass(frozen=True, kw_only=True)
class ShowConfig(DataSettings, CacheSettings):
    """``fewshot-seg data show``."""

    fills: ClassVar[str | None] = "out"

    fold: int = setting("test fold", 0, minimum=0, maximum=3)
    part: Literal["training", "evaluation"] = setting("which episodes", "training")
    shots: int = setting("supports per episode", 1, minimum=1)
    supports: tuple[SupportName, ...] = setting("how supports are marked, as in training", ("mask",))
    support_augment: AugmentName = setting("augmentation of supports", "standard")
    query_augment: AugmentName = setting("augmentation of queries", "standard")
    count: int = setting("episodes to draw", 12, minimum=1)
    seed: int = setting("seed of the episodes", 0, minimum=0)
    resolution: int | None = setting("side of the square pictures (default: the protocol's)", None, minimum=32)
    out: Path = setting("folder of the pictures", Path("runs/show"))
