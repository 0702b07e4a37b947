"""Settings of every verb of the command line: frozen dataclasses, and flag over TOML file over default.

Only the rooms that assemble an experiment read these classes; components take plain arguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from episodes.types import DataError

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

_NONE_TYPE = type(None)


def default_cache() -> Path:
    """``$FEWSHOT_SEG_CACHE``, else ``~/.cache/fewshot-seg``."""
    return Path(os.environ.get("FEWSHOT_SEG_CACHE") or "~/.cache/fewshot-seg").expanduser()


def setting(
    explanation: str,
    default: Any = MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    metadata = {"help": explanation, "minimum": minimum, "maximum": maximum}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One field of a configuration, as the command line and the file reader need it.

    Attributes:
        name: field name; the flag is the same with hyphens.
        help: one sentence.
        kind: int, float, str, bool or Path.
        choices: allowed values, empty when any will do.
        optional: whether None is a value.
        many: whether it is a tuple of `kind`.
        required: it has no default.
        default: the default, None when required.
        minimum, maximum: inclusive bounds of numbers.
    """

    name: str
    help: str
    kind: type
    choices: tuple[str, ...]
    optional: bool
    many: bool
    required: bool
    default: Any
    minimum: float | None
    maximum: float | None

    @property
    def flag(self) -> str:
        """``--learning-rate`` for ``learning_rate``."""
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any) -> None:
        """Raises DataError for a value outside choices or bounds."""
        if value is None:
            return
        for one in value if self.many else (value,):
            if self.choices and one not in self.choices:
                raise DataError(f"{self.flag} must be one of {', '.join(self.choices)}; got {one!r}")
            if self.minimum is not None and not one >= self.minimum:
                raise DataError(f"{self.flag} must be at least {self.minimum:g}, got {one}")
            if self.maximum is not None and not one <= self.maximum:
                raise DataError(f"{self.flag} must be at most {self.maximum:g}, got {one}")
        if self.many and not value:
            raise DataError(f"{self.flag} needs at least one value")


def settings_of(config_class: type[Config]) -> tuple[Setting, ...]:
    """All settings of a configuration class, in order of declaration."""
    hints = get_type_hints(config_class)
    return tuple(_describe(field, hints[field.name]) for field in dataclasses.fields(config_class))


def _describe(field: dataclasses.Field[Any], hint: Any) -> Setting:
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    base = next(part for part in parts if part is not _NONE_TYPE)
    many = get_origin(base) is tuple
    if many:
        base = get_args(base)[0]
    choices = get_args(base) if get_origin(base) is Literal else ()
    has_factory = field.default_factory is not MISSING
    required = field.default is MISSING and not has_factory
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return Setting(
        name=field.name,
        help=field.metadata["help"],
        kind=str if choices else base,
        choices=choices,
        optional=_NONE_TYPE in parts,
        many=many,
        required=required,
        default=None if required else default,
        minimum=field.metadata["minimum"],
        maximum=field.metadata["maximum"],
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configurations.

    Raises:
        DataError: a value outside its choices or bounds.
    """

    def __post_init__(self) -> None:
        for one in settings_of(type(self)):
            one.check(getattr(self, one.name))

    def as_json(self) -> dict[str, Any]:
        """Values as JSON has them."""
        return {setting.name: _plain(getattr(self, setting.name)) for setting in settings_of(type(self))}

    def replace(self, **changes: Any) -> Self:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


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


ConfigType = TypeVar("ConfigType", bound=Config)


def resolve(config_class: type[ConfigType], flags: Mapping[str, Any], file: Path | None = None) -> ConfigType:
    """Flag over TOML file over default.

    Args:
        config_class: which configuration.
        flags: field name -> value of right type, only those given.
        file: TOML file of keys as the flags, with hyphens or underscores; paths are relative to the working folder.

    Raises:
        DataError: unreadable file, unknown key, wrong type, missing or out-of-range value.
    """
    settings = {setting.name: setting for setting in settings_of(config_class)}
    values = {**(_read_file(settings, file) if file is not None else {}), **flags}
    for setting in settings.values():
        if setting.required and setting.name not in values:
            raise DataError(f"missing {setting.flag}: {setting.help}")
    return config_class(**values)


def _read_file(settings: Mapping[str, Setting], file: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read configuration file {file}: {error.strerror}; check --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"configuration file {file} is not valid TOML: {error}") from error
    values = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in settings:
            close = difflib.get_close_matches(name, settings, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else f"known are: {', '.join(settings)}"
            raise DataError(f"{file}: unknown key {key!r}; {hint}")
        values[name] = _convert(settings[name], value, f"{file}: {key}")
    return values


def _convert(setting: Setting, value: Any, where: str) -> Any:
    if not setting.many:
        return _convert_one(setting.kind, value, where)
    if not isinstance(value, list):
        raise DataError(f"{where} must be a list, got {value!r}")
    return tuple(_convert_one(setting.kind, one, where) for one in value)


def _convert_one(kind: type, value: Any, where: str) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value).expanduser()
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # exact: True is no integer here
        expected = "str" if kind is Path else kind.__name__
        raise DataError(f"{where} must be of type {expected}, got {value!r} ({type(value).__name__})")
    return value
