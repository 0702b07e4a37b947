"""Settings of the verbs of the command line, but for those of the similarity network alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast, get_args

from episodes.types import DataError
from fewshot_seg.config.data import CacheSettings, DataSettings, ShotRuleName, SupportName
from fewshot_seg.config.machinery import Config, setting, settings_of

PriorName = Literal["similarity", "pfenet", "none"]
AttentionName = Literal["siamese", "triplet", "cosine", "margin"]
PriorMapName = Literal[
    "soft margin",
    "prototype margin",
    "prototype similarity",
    "gradient attention",
    "nearest foreground",
    "nearest background",
]
Augmentation = Literal["mirror", "none", "flip", "standard", "pfenet", "colour", "strong"]


NO_MODEL = Path("none")
"""``--model none``: nothing trained, also where a shipped model would be taken otherwise."""


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(Config):
    device: str = setting("auto, cpu, cuda or cuda:N", "auto")


@dataclass(frozen=True, kw_only=True)
class SpeedSettings(DeviceSettings):
    precision: Literal["float32", "bfloat16", "auto"] = setting(
        "arithmetic of the backbone; 'auto' measures at the start, and takes bfloat16 only where it is faster",
        "float32",
    )
    compile: bool = setting("torch.compile the backbone; goes on without where that fails", False)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(SpeedSettings):
    """A trained model, or a training-free prior map."""

    model: Path | None = setting(
        "model.safetensors of a training, a shipped model by name (`fewshot-seg weights list`), or 'none' for nothing "
        "trained; without it, `predict`, `app`, `export` and `explain --query` take the shipped model 'general', the "
        "others nothing trained",
        None,
    )
    similarity: Path | None = setting(
        "without a model: similarity.safetensors of `similarity train`, which embeds the photos for the prior", None
    )
    prior_map: PriorMapName | None = setting(
        "without a model: the similarity map that is cut at a threshold (default: soft margin)", None
    )
    threshold: float | None = setting("logit above which a pixel is foreground, instead of the chosen one", None)
    backbone: str = setting(
        "without a model: timm or segmentation-models-pytorch encoder; several joined by + run side by side",
        "tf_efficientnet_lite0",
    )
    backbone_weights: str | None = setting(
        "'embedded', 'random', 'hub' (a download) or a file (default: as the model says, else embedded)", None
    )
    strides: tuple[int, ...] | None = setting(
        "without a model: strides of the features (default: 16 32; of a vision transformer its patch, once per level)",
        None,
        minimum=2,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model not in (None, NO_MODEL) and self.prior_map is not None:
            raise DataError("--model and --prior-map exclude each other: a model brings its own prior; give one")
        if self.model not in (None, NO_MODEL) and self.similarity is not None:
            raise DataError("--model and --similarity exclude each other: a model brings its own network; give one")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(DeviceSettings):
    """``fewshot-seg demo``."""

    fills: ClassVar[str | None] = "out"

    out: Path = setting("folder of report.html and its run", Path("runs/demo"))
    seed: int = setting("seed of pictures, weights and episodes", 0, minimum=0)
    steps: int = setting("training steps", 100, minimum=1)
    batch_size: int = setting("episodes per step", 8, minimum=1)
    episodes: int = setting("episodes of the evaluation on novel classes", 200, minimum=1)
    report_episodes: int = setting("episodes whose pictures go into report.html", 18, minimum=0)
    backbone: str = setting(
        "timm or segmentation-models-pytorch encoder; several joined by + run side by side", "tf_efficientnet_lite0"
    )
    backbone_weights: str = setting("'embedded', 'random', 'hub' (a download) or a file", "embedded")
    resolution: int = setting("side of the square pictures", 192, minimum=32)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataSettings, CacheSettings, SpeedSettings):
    """``fewshot-seg train``."""

    fills: ClassVar[str | None] = "out"

    out: Path = setting("folder of the run", Path("runs/train"))
    fold: int = setting("test fold; its classes are never trained on", 0, minimum=0, maximum=3)
    select_threshold: bool = setting(
        "first train without the validation fold's classes too, and choose the threshold on them", True
    )
    validation_fold: int | None = setting(
        "fold whose classes choose the threshold (default: the one after --fold)", None, minimum=0, maximum=3
    )
    validation_episodes: int = setting("episodes that choose the threshold", 200, minimum=1)
    training: Literal["cross-fit", "joint"] | None = setting(
        "'cross-fit': the decoder learns from classes that the rest of the model has not seen, and there is a base "
        "learner; 'joint': all at once (default: cross-fit where the similarity network is trained, else joint)",
        None,
    )
    shots: int = setting("supports per training episode (joint training)", 1, minimum=1)
    supports: tuple[SupportName, ...] = setting(
        "how supports are marked; of several, each support of an episode gets one at random", ("mask",)
    )
    steps: int = setting("optimiser steps; by cross-fitting, of each of four embeddings", 160, minimum=1)
    decoder_steps: int = setting("optimiser steps of the decoder (cross-fitting)", 800, minimum=1)
    decoder_episodes: int = setting(
        "1-shot episodes of each group of classes that the decoder learns from, and a sixth as many of 5 shots "
        "(cross-fitting)",
        500,
        minimum=1,
    )
    batch_size: int = setting("episodes per step", 8, minimum=1)
    learning_rate: float = setting("peak learning rate of AdamW", 1e-3, minimum=0.0)
    weight_decay: float = setting("weight decay of AdamW", 1e-2, minimum=0.0)
    metric_weight: float = setting("weight of the metric loss of the similarity network", 1.0, minimum=0.0)
    schedule: Literal["one-cycle", "cosine"] = setting("learning-rate schedule", "one-cycle")
    augment: Augmentation = setting(
        "'mirror' and 'none' use stored features; the others change the photos, and are slower", "mirror"
    )
    support_augment: Augmentation | None = setting("augmentation of supports alone (default: as --augment)", None)
    backbone: str = setting(
        "timm or segmentation-models-pytorch encoder, frozen; several joined by + run side by side",
        "tf_efficientnet_lite0",
    )
    backbone_weights: str = setting("'embedded', 'random', 'hub' (a download) or a file", "embedded")
    strides: tuple[int, ...] | None = setting(
        "strides of the features (default: 16 32; of a vision transformer its patch, once per level)", None, minimum=2
    )
    prior: PriorName = setting("what the decoder reads as prior", "similarity")
    attention: AttentionName = setting("score whose gradient is the attention", "margin")
    appearance: int = setting("channels of query features and prototype shown to the decoder", 0, minimum=0)
    similarity_rank: int = setting("rank of the trained similarity projection", 16, minimum=0)
    similarity: Path | None = setting(
        "similarity.safetensors of `similarity train`: taken as it is instead of training one with the decoder", None
    )
    decoder_width: int = setting("hidden channels of the decoder, a multiple of 8", 48, minimum=8)
    decoder_blocks: int = setting("residual blocks of the decoder", 4, minimum=0)
    resolution: int | None = setting("side of the square photos (default: the protocol's)", None, minimum=32)
    photo_size: int | None = setting(
        "side of the square photos that the trained model asks for when it is used (default: that of the training)",
        None,
        minimum=32,
    )
    seed: int = setting("seed of weights, episodes and dropout", 0, minimum=0)
    checkpoint_every: int = setting("steps between checkpoints", 100, minimum=1)
    resume: bool = setting("go on with an interrupted run in --out", False)
    workers: int = setting("processes that load photos, for augmentations that change them", 0, minimum=0)

    @property
    def cross_fits(self) -> bool:
        """Whether the training is by cross-fitting."""
        if self.training is None:
            return self.prior == "similarity" and self.similarity is None and self.similarity_rank > 0
        return self.training == "cross-fit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior == "none" and self.appearance == 0:
            raise DataError("--prior none leaves the decoder nothing to read; add --appearance 16")
        if self.training == "cross-fit" and (self.prior != "similarity" or self.similarity is not None):
            raise DataError(
                "--training cross-fit trains the similarity network: it needs --prior similarity, and no --similarity"
            )
        if self.training == "cross-fit" and self.similarity_rank == 0:
            raise DataError(
                "--training cross-fit trains the similarity network, and --similarity-rank 0 leaves nothing of it to "
                "train; give a rank of at least 1, or --training joint"
            )
        if self.similarity is not None and self.prior != "similarity":
            raise DataError(f"--similarity is the source of the prior 'similarity', but --prior is {self.prior!r}")
        if self.decoder_width % 8:
            raise DataError(f"--decoder-width must be a multiple of 8, got {self.decoder_width}")
        if self.validation_fold == self.fold and self.data in ("voc", "coco"):
            raise DataError(
                f"--validation-fold {self.fold} is the test fold; choose another, or the threshold sees test classes"
            )


@dataclass(frozen=True, kw_only=True)
class EpisodeSettings(ModelSettings, DataSettings, CacheSettings):
    fold: int | None = setting("test fold (default: the model's, else 0)", None, minimum=0, maximum=3)
    shots: int = setting("supports per episode", 1, minimum=1)
    support: SupportName = setting("how supports are marked: derived from the mask unless the data set has it", "mask")
    seed: int | None = setting("seed of the episodes (default: the protocol's)", None, minimum=0)
    resolution: int | None = setting("side of the square photos (default: the model's or protocol's)", None, minimum=32)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EpisodeSettings):
    """``fewshot-seg evaluate``."""

    fills: ClassVar[str | None] = "out"

    out: Path = setting("folder of report.html and evaluation.json", Path("runs/evaluate"))
    episodes: Path | None = setting(
        "file of `data episodes`: exactly these episodes, instead of drawing them (then fold, shots, ways are its own)",
        None,
    )
    count: int | None = setting("number of episodes (default: the protocol's)", None, minimum=1)
    ways: int = setting("classes per episode: argmax over one-way runs that share the query", 1, minimum=1)
    shot_rule: ShotRuleName = setting(
        "how several supports become one mask: 'pooled' is the model's own, 'protocol' that of the protocol's paper",
        "pooled",
    )
    support_cells: int | None = setting(
        "cells that the supports of an episode keep together, for speed: 640 makes 5 shots cost what one does, within "
        "some tenths of a point of mIoU (default: all)",
        None,
        minimum=2,
    )
    scoring: Literal["protocol", "original"] = setting("score at the protocol's or the label's own size", "protocol")
    batch_size: int = setting("episodes at a time", 10, minimum=1)
    report_episodes: int = setting(
        "episodes whose pictures go into report.html: the best, median and worst, and the worst of every class",
        24,
        minimum=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.episodes is None:
            return
        if self.episodes.name.isdecimal() and not self.episodes.exists():
            raise DataError(f"--episodes {self.episodes}: no such file; the number of episodes is --count")
        for name, default in (("count", None), ("seed", None), ("ways", 1), ("shots", 1)):
            if getattr(self, name) != default:
                raise DataError(f"--episodes FILE brings its own --{name}; leave --{name} out")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Config):
    """``fewshot-seg report``."""

    runs: tuple[Path, ...] = setting(
        "folders that `evaluate` or `demo` wrote; the first is compared with", positional=True
    )
    out: Path = setting("the HTML file", Path("runs/report.html"))


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(ModelSettings, DataSettings, CacheSettings):
    """``fewshot-seg explain``."""

    fills: ClassVar[str | None] = "out"

    fold: int | None = setting("test fold (default: the model's, else 0)", None, minimum=0, maximum=3)
    shots: int = setting("supports per episode", 1, minimum=1)
    support: tuple[str, ...] = setting(
        "of episodes: how supports are marked (mask, box, scribble, point or label); with --query: PHOTO:MASK pairs "
        "and what else `predict --support` takes",
        ("mask",),
    )
    query: tuple[str, ...] | None = setting(
        "explain your own photos instead of episodes: files, folders or quoted globs", None
    )
    seed: int | None = setting("seed of the episodes (default: the protocol's)", None, minimum=0)
    resolution: int | None = setting("side of the square photos (default: the model's or protocol's)", None, minimum=32)
    out: Path = setting("folder of the pictures and maps", Path("runs/explain"))
    count: int = setting("draw the first COUNT episodes of the evaluation", 8, minimum=1)
    numbers: tuple[int, ...] | None = setting("draw these episodes instead, by number", None, minimum=0)
    panel: int = setting("side of a panel of the pictures, in pixels", 512, minimum=64, maximum=2048)
    score: bool = setting("score explainers on the first episodes instead of drawing them", False)
    score_episodes: int = setting("episodes that --score takes", 50, minimum=1)
    explainers: tuple[str, ...] | None = setting("with --score: which explainers, by name (default: all)", None)
    score_steps: int = setting("with --score: steps of the deletion and insertion curves", 5, minimum=2)
    sanity_every: int = setting(
        "with --score: every so many episodes are also explained with random weights", 5, minimum=1
    )

    @property
    def needs_data(self) -> bool:
        """Not for one's own photos."""
        return self.query is None

    @property
    def episodes(self) -> EpisodeSettings:
        """The settings of its episodes."""
        names = [one.name for one in settings_of(EpisodeSettings) if one.name != "support"]
        support = cast(SupportName, self.support[0])  # checked below
        return EpisodeSettings(support=support, **{name: getattr(self, name) for name in names})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query is None:
            if len(self.support) != 1 or self.support[0] not in get_args(SupportName):
                raise DataError(
                    f"--support must be one of {', '.join(get_args(SupportName))} for episodes, got "
                    f"{' '.join(self.support)!r}; to explain your own photos give --query, too"
                )
        elif self.score:
            raise DataError("--score needs episodes, whose answers are known; leave --query out")
        elif self.support == ("mask",):
            raise DataError("missing --support: PHOTO:MASK pairs that show the object in --query's photos")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelSettings):
    """``fewshot-seg export``."""

    fills: ClassVar[str | None] = "out"

    out: Path = setting("new or empty folder for support.onnx, query.onnx and metadata.json", Path("runs/export"))
    size: int | None = setting(
        "side of the square that photos are fitted into, written to metadata.json (default: the model's)",
        None,
        minimum=32,
    )


@dataclass(frozen=True, kw_only=True)
class AppConfig(ModelSettings):
    """``fewshot-seg app``."""

    host: str = setting("address to listen at; any other than this machine's own lets others in", "127.0.0.1")
    port: int | None = setting(
        "port to listen at (default: the first free one from 7860)", None, minimum=1, maximum=65535
    )
    size: int | None = setting(
        "side of the square that photos are fitted into (default: the model's)", None, minimum=32
    )


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ModelSettings):
    """``fewshot-seg predict``."""

    fills: ClassVar[str | None] = "out"

    support: tuple[str, ...] | None = setting(
        "PHOTO:MASK pairs that show the object (nonzero is object, and 255 is ignored where it comes with other "
        "labels; a plain black and white mask means 255 = object), or less: PHOTO:box=X0,Y0,X1,Y1, PHOTO:point=X,Y, "
        "PHOTO:scribble=FILE, or a PHOTO alone that shows the object somewhere; for several classes NAME= before each",
        None,
    )
    support_set: tuple[str, ...] | None = setting(
        "instead of --support: a file of --save-support, of the same model; NAME=FILE for each of several classes, "
        "which come after those of --support",
        None,
    )
    save_support: Path | None = setting(
        "file (.safetensors) for the encoded supports of one class; then --query may be left out", None
    )
    query: tuple[str, ...] | None = setting("photos to segment: files, folders or quoted globs", None)
    out: Path = setting("folder for masks/ and overlays/", Path("runs/predict"))
    confidence: bool = setting("also write confidence/: grey pictures, 255 where the object is sure", False)
    coco: bool = setting("also write instances.json: COCO's format with run lengths (RLE)", False)
    size: int | None = setting(
        "side of the square that photos are squashed to (default: the model's)", None, minimum=32
    )
    tile: int | None = setting(
        "for small objects in large photos: segment overlapping tiles of N pixels a side, too, each like a photo, and "
        "take the mean of both",
        None,
        minimum=64,
    )
    flip: bool = setting("segment the mirrored photo, too, and take the mean: twice the time", False)

    @property
    def filled(self) -> Path | None:
        """Nothing where supports are saved, and no photo is segmented."""
        return None if self.save_support is not None and self.query is None else super().filled

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.support is None and self.support_set is None:
            raise DataError(
                "missing --support: PHOTO:MASK pairs that show the object (or less: PHOTO:box=X0,Y0,X1,Y1, "
                "PHOTO:point=X,Y, PHOTO:scribble=FILE, PHOTO), or --support-set with a file of --save-support"
            )
        if self.support_set is not None and self.save_support is not None:
            raise DataError("--save-support keeps what --support shows; leave --support-set out")
        if self.query is None and self.save_support is None:
            raise DataError("missing --query: photos to segment: files, folders or quoted globs")
