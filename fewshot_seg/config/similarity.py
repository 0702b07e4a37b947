"""Settings of ``fewshot-seg similarity train|evaluate|explain``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from episodes.types import DataError
from fewshot_seg.config.data import CacheSettings, DataSettings
from fewshot_seg.config.machinery import Config, setting
from fewshot_seg.config.verbs import DeviceSettings

SimilarityDataName = Literal["folders", "cub", "cars", "sop", "market1501", "dukemtmc", "cuhk03-np", "voc", "synthetic"]
MetricName = Literal["contrastive", "triplet", "quadruplet", "multi-similarity"]
MapName = Literal["soft margin", "soft margin gradient", "siamese", "triplet", "quadruplet", "cosine", "margin"]
FormName = Literal["siamese", "triplet", "quadruplet", "cosine", "margin"]
EPISODIC: tuple[str, ...] = ("voc", "synthetic")


@dataclass(frozen=True, kw_only=True)
class SimilaritySettings(CacheSettings, DeviceSettings):
    """Data of a similarity task; ``voc`` and ``synthetic`` come as episodes, all others as photos with one label."""

    data: SimilarityDataName = setting(
        "photos with labels: folders (train/CLASS, test/CLASS), retrieval or re-identification layouts; or episodes",
        "folders",
    )
    root: Path | None = setting("folder of the data set", None)
    protocol: Literal["hsnet"] = setting("episodes: evaluation protocol", "hsnet")
    resolution: int | None = setting(
        "side of the square photos (default: the model's; else the protocol's for episodes, 224 for photos)",
        None,
        minimum=32,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data != "synthetic" and self.root is None:
            raise DataError(f"--data {self.data} needs --root DIR, the folder of the data set")

    @property
    def episodic(self) -> bool:
        """Whether the data come as episodes."""
        return self.data in EPISODIC

    def data_settings(self) -> DataSettings:
        """The same data as the other verbs name them; for episodes."""
        return DataSettings(
            data="synthetic" if self.data == "synthetic" else "voc", root=self.root, protocol=self.protocol
        )


@dataclass(frozen=True, kw_only=True)
class SimilarityTrainConfig(SimilaritySettings):
    """``fewshot-seg similarity train``."""

    fills: ClassVar[str | None] = "out"

    out: Path = setting("folder of the run", Path("runs/similarity"))
    fold: int = setting("episodes: test fold; its classes are never trained on", 0, minimum=0, maximum=3)
    held_out: bool = setting("leave a third of the training classes out, for choices (evaluate --part held-out)", False)
    loss: MetricName = setting("metric loss of photos, and of episodes' objects and backgrounds", "multi-similarity")
    metric_weight: float | None = setting(
        "weight of the metric loss (default: 1 for photos, 0 for episodes, whose maps are trained)", None, minimum=0.0
    )
    margin: float | None = setting("margin of the metric loss (default: that of its paper)", None)
    mine: bool = setting("mine pairs in the batch, instead of taking all", True)
    maps: tuple[MapName, ...] = setting(
        "episodes: maps trained to fall on the object",
        ("soft margin", "siamese", "triplet", "quadruplet", "cosine", "margin"),
    )
    map_weight: float = setting("episodes: weight of the maps' loss", 1.0, minimum=0.0)
    constraint: float = setting("gamma of the similarity mining loss; 0 leaves it out", 0.0, minimum=0.0)
    constraint_form: Literal["siamese", "triplet", "cosine", "margin"] = setting(
        "score whose attention the constraint masks", "margin"
    )
    constraint_domain: Literal["features", "photos"] = setting(
        "mask pooled features, or photos, which are then embedded anew (slow)", "features"
    )
    constraint_triples: int | None = setting("anchors of the constraint per step (default: all)", None, minimum=1)
    sharpness: float = setting("a of the soft mask sigmoid(a (M - b))", 10.0)
    mask_threshold: float = setting("b of the soft mask", 0.5)
    learn_mask: bool = setting("train a and b along", False)
    steps: int = setting("optimiser steps", 160, minimum=1)
    batch_size: int = setting("episodes per step", 8, minimum=1)
    shots: int = setting("supports per training episode", 1, minimum=1)
    classes: int = setting("photos: classes in a batch", 8, minimum=2)
    photos: int = setting("photos: photos of each class in a batch", 4, minimum=2)
    mirror: bool = setting("mirror half of the photos", True)
    rank: int | None = setting(
        "rank of the trained projection (default: 64 for photos, 16 for episodes)", None, minimum=1
    )
    learning_rate: float = setting("peak learning rate of AdamW", 1e-3, minimum=0.0)
    weight_decay: float = setting("weight decay of AdamW", 1e-2, minimum=0.0)
    schedule: Literal["one-cycle", "cosine"] = setting("learning-rate schedule", "one-cycle")
    backbone: str = setting(
        "timm or segmentation-models-pytorch encoder, frozen; several joined by + run side by side",
        "tf_efficientnet_lite0",
    )
    backbone_weights: str = setting("'embedded', 'random', 'hub' (a download) or a file", "embedded")
    strides: tuple[int, ...] | None = setting(
        "strides of the features (default: 16 32; of a vision transformer its patch, once per level)", None, minimum=2
    )
    seed: int = setting("seed of weights and batches", 0, minimum=0)
    checkpoint_every: int = setting("steps between checkpoints", 100, minimum=1)
    resume: bool = setting("go on with an interrupted run in --out", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.episodic and self.constraint and self.constraint_domain == "photos":
            raise DataError(f"--data {self.data} gives stored features; use --constraint-domain features")
        if self.episodic and not (self.map_weight or self.metric_weight or self.constraint):
            raise DataError(
                "--map-weight 0 without --metric-weight or --constraint leaves nothing to train; raise one of them"
            )
        if not self.episodic and self.metric_weight == 0 and not self.constraint:
            raise DataError("--metric-weight 0 without --constraint leaves nothing to train; raise one of them")


@dataclass(frozen=True, kw_only=True)
class SimilarityModelSettings(SimilaritySettings):
    """A trained similarity network, or the frozen features as they are."""

    model: Path | None = setting(
        "similarity.safetensors or model.safetensors, or a shipped model by name; without it nothing trained is used",
        None,
    )
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
    fold: int | None = setting("episodes: test fold (default: the model's, else 0)", None, minimum=0, maximum=3)
    part: Literal["test", "held-out"] = setting(
        "score the test classes, or the held-out third of training classes", "test"
    )
    seed: int | None = setting(
        "seed of drawn comparisons and episodes (default: 0; for episodes of the test classes the protocol's)",
        None,
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True)
class SimilarityEvaluateConfig(SimilarityModelSettings):
    """``fewshot-seg similarity evaluate``."""

    fills: ClassVar[str | None] = "out"

    out: Path = setting("folder of evaluation.json", Path("runs/similarity-evaluate"))
    ks: tuple[int, ...] = setting("retrieval: k of recall@k", (1, 2, 4, 8), minimum=1)
    ranks: tuple[int, ...] = setting("re-identification: ranks of the CMC", (1, 5, 10), minimum=1)
    faithfulness: int = setting("photos: pairs whose attention is scored by deletion and insertion", 0, minimum=0)
    form: FormName = setting("score whose attention is scored by --faithfulness", "margin")
    episodes: int | None = setting("episodes: their number (default: the protocol's)", None, minimum=1)
    shots: int = setting("episodes: supports per episode", 1, minimum=1)


@dataclass(frozen=True, kw_only=True)
class SimilarityExplainConfig(SimilarityModelSettings):
    """``fewshot-seg similarity explain``."""

    fills: ClassVar[str | None] = "out"

    data: SimilarityDataName = setting("photos with labels to draw comparisons from", "folders")
    images: tuple[Path, ...] | None = setting(
        "your own photos instead of a data set: anchor, a similar one, and one or two dissimilar ones", None
    )
    out: Path = setting("folder of the pictures", Path("runs/similarity-explain"))
    count: int = setting("comparisons to draw", 8, minimum=1)
    form: FormName = setting("score whose gradient is shown", "margin")

    def __post_init__(self) -> None:
        if self.images is None:
            super().__post_init__()
            if self.episodic:
                raise DataError(f"--data {self.data}: episodes are drawn by `fewshot-seg explain --similarity FILE`")
            return
        Config.__post_init__(self)
        needed = 2 + {"triplet": 1, "margin": 1, "quadruplet": 2}.get(self.form, 0)
        if len(self.images) < needed:
            raise DataError(
                f"--form {self.form} compares {needed} photos, --images names {len(self.images)}; add photos, or "
                "choose another --form (cosine and siamese compare two)"
            )
