"""Settings of the verbs of the command line, but for those of the similarity network alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from episodes.types import DataError
from fewshot_seg.config.machinery import Config, setting

DataName = Literal["voc", "synthetic"]
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
Augmentation = Literal["none", "mirror", "standard"]


def default_cache() -> Path:
    """``$FEWSHOT_SEG_CACHE``, else ``~/.cache/fewshot-seg``."""
    return Path(os.environ.get("FEWSHOT_SEG_CACHE") or "~/.cache/fewshot-seg").expanduser()


@dataclass(frozen=True, kw_only=True)
class DataSettings(Config):
    data: DataName = setting("data set: PASCAL VOC 2012's folder layout, or generated pictures", "voc")
    root: Path | None = setting("VOC2012 folder (JPEGImages/, ImageSets/, SegmentationClass[Aug]/)", None)
    protocol: Literal["hsnet"] = setting("evaluation protocol of the literature, for VOC", "hsnet")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data == "voc" and self.root is None:
            raise DataError(
                "--data voc needs --root DIR, the VOC2012 folder that holds JPEGImages/ and ImageSets/; "
                "--data synthetic needs no files"
            )


@dataclass(frozen=True, kw_only=True)
class CacheSettings(Config):
    cache: Path = setting(
        "folder of the feature cache (or set FEWSHOT_SEG_CACHE)",
        factory=default_cache,
    )
    cache_gigabytes: float = setting("size of the feature cache at most", 4.0, minimum=0.0)


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(Config):
    device: str = setting("auto, cpu, cuda or cuda:N", "auto")


@dataclass(frozen=True, kw_only=True)
class ModelSettings(DeviceSettings):
    """A trained model, or a training-free prior map."""

    model: Path | None = setting("model.safetensors of a training; without it nothing trained is used", None)
    similarity: Path | None = setting(
        "without a model: similarity.safetensors of `similarity train`, which embeds the photos for the prior", None
    )
    prior_map: PriorMapName | None = setting(
        "without a model: the similarity map that is cut at a threshold (default: soft margin)", None
    )
    threshold: float | None = setting("logit above which a pixel is foreground, instead of the chosen one", None)
    backbone: str = setting("without a model: timm or segmentation-models-pytorch encoder", "tf_efficientnet_lite0")
    backbone_weights: str | None = setting(
        "'embedded', 'random' or a file (default: as the model says, else embedded)", None
    )
    strides: tuple[int, ...] = setting("without a model: strides of the features", (16, 32), minimum=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None and self.prior_map is not None:
            raise DataError("--model and --prior-map exclude each other: a model brings its own prior; give one")
        if self.model is not None and self.similarity is not None:
            raise DataError("--model and --similarity exclude each other: a model brings its own network; give one")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(DeviceSettings):
    """``fewshot-seg demo``."""

    out: Path = setting("folder for pictures and page", Path("runs/demo"))
    seed: int = setting("seed of pictures, weights and episodes", 0, minimum=0)
    steps: int = setting("training steps", 100, minimum=1)
    batch_size: int = setting("episodes per step", 8, minimum=1)
    episodes: int = setting("episodes of the evaluation on novel classes", 200, minimum=1)
    pictures: int = setting("episodes to draw", 6, minimum=1)
    backbone: str = setting("timm or segmentation-models-pytorch encoder", "tf_efficientnet_lite0")
    backbone_weights: str = setting("'embedded', 'random' or a file", "embedded")
    resolution: int = setting("side of the square pictures", 192, minimum=32)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(DataSettings):
    """``fewshot-seg data verify``."""

    splits: tuple[str, ...] | None = setting("splits to check (default: those of the protocol)", None)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataSettings, CacheSettings, DeviceSettings):
    """``fewshot-seg train``."""

    out: Path = setting("folder of the run", Path("runs/train"))
    fold: int = setting("test fold; its classes are never trained on", 0, minimum=0, maximum=3)
    select_threshold: bool = setting(
        "first train without the validation fold's classes too, and choose the threshold on them", True
    )
    validation_fold: int | None = setting(
        "fold whose classes choose the threshold (default: the one after --fold)", None, minimum=0, maximum=3
    )
    validation_episodes: int = setting("episodes that choose the threshold", 200, minimum=1)
    shots: int = setting("supports per training episode", 1, minimum=1)
    steps: int = setting("optimiser steps", 160, minimum=1)
    batch_size: int = setting("episodes per step", 8, minimum=1)
    learning_rate: float = setting("peak learning rate of AdamW", 1e-3, minimum=0.0)
    weight_decay: float = setting("weight decay of AdamW", 1e-2, minimum=0.0)
    metric_weight: float = setting("weight of the metric loss of the similarity network", 1.0, minimum=0.0)
    schedule: Literal["one-cycle", "cosine"] = setting("learning-rate schedule", "one-cycle")
    augment: Augmentation = setting(
        "'mirror' and 'none' use stored features; 'standard' crops and recolours photos, and is slower", "mirror"
    )
    backbone: str = setting("timm or segmentation-models-pytorch encoder, frozen", "tf_efficientnet_lite0")
    backbone_weights: str = setting("'embedded', 'random' or a file", "embedded")
    strides: tuple[int, ...] = setting("strides of the features", (16, 32), minimum=2)
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
    seed: int = setting("seed of weights, episodes and dropout", 0, minimum=0)
    checkpoint_every: int = setting("steps between checkpoints", 100, minimum=1)
    resume: bool = setting("go on with an interrupted run in --out", False)
    workers: int = setting("processes that load photos, for --augment standard", 0, minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior == "none" and self.appearance == 0:
            raise DataError("--prior none leaves the decoder nothing to read; add --appearance 16")
        if self.similarity is not None and self.prior != "similarity":
            raise DataError(f"--similarity is the source of the prior 'similarity', but --prior is {self.prior!r}")
        if self.decoder_width % 8:
            raise DataError(f"--decoder-width must be a multiple of 8, got {self.decoder_width}")
        if self.validation_fold == self.fold and self.data == "voc":
            raise DataError(
                f"--validation-fold {self.fold} is the test fold; choose another, or the threshold sees test classes"
            )


@dataclass(frozen=True, kw_only=True)
class EpisodeSettings(ModelSettings, DataSettings, CacheSettings):
    fold: int | None = setting("test fold (default: the model's, else 0)", None, minimum=0, maximum=3)
    shots: int = setting("supports per episode", 1, minimum=1)
    seed: int | None = setting("seed of the episodes (default: the protocol's)", None, minimum=0)
    resolution: int | None = setting("side of the square photos (default: the model's or protocol's)", None, minimum=32)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EpisodeSettings):
    """``fewshot-seg evaluate``."""

    out: Path = setting("folder of evaluation.json", Path("runs/evaluate"))
    episodes: int | None = setting("number of episodes (default: the protocol's)", None, minimum=1)
    scoring: Literal["protocol", "original"] = setting("score at the protocol's or the label's own size", "protocol")
    batch_size: int = setting("episodes at a time", 10, minimum=1)


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(EpisodeSettings):
    """``fewshot-seg explain``."""

    out: Path = setting("folder of the pictures", Path("runs/explain"))
    count: int = setting("draw the first COUNT episodes of the evaluation", 8, minimum=1)
    numbers: tuple[int, ...] | None = setting("draw these episodes instead, by number", None, minimum=0)


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ModelSettings):
    """``fewshot-seg predict``."""

    support: tuple[str, ...] = setting(
        "PHOTO:MASK pairs that show the object; in a mask nonzero is object, and 255 is ignored where it comes "
        "with other labels (a plain black and white mask means 255 = object)"
    )
    query: tuple[str, ...] = setting("photos to segment: files, folders or quoted globs")
    out: Path = setting("folder for masks/ and overlays/", Path("runs/predict"))
    size: int | None = setting(
        "side of the square that photos are squashed to (default: the model's)", None, minimum=32
    )
