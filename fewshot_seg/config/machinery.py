"""How settings are declared, checked, and resolved: flag over TOML file over default."""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import tomllib
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from episodes.files import read_text, user_path
from episodes.types import DataError

_NONE_TYPE = type(None)


def setting(
    explanation: str,
    default: Any = MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    positional: bool = False,
) -> Any:
    metadata = {"help": explanation, "minimum": minimum, "maximum": maximum, "positional": positional}
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
        positional: whether the command line takes it without a flag.
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
    positional: bool

    @property
    def flag(self) -> str:
        """``--learning-rate`` for ``learning_rate``; ``DATA_SET`` for a positional ``data_set``."""
        return self.name.upper() if self.positional else "--" + self.name.replace("_", "-")

    def check(self, value: Any) -> None:
        """Raises DataError for a value outside choices or bounds."""
        if value is None:
            return
        for one in value if self.many else (value,):
            if isinstance(one, float) and not math.isfinite(one):
                raise DataError(f"{self.flag} must be a finite number, got {one}")
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
        positional=field.metadata["positional"],
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configurations.

    Raises:
        DataError: a value outside its choices or bounds.
    """

    fills: ClassVar[str | None] = None
    """The setting that names the folder which the verb fills, and which is of one run at a time."""

    @property
    def filled(self) -> Path | None:
        """The folder that the verb fills; None where it writes single files, or none."""
        folder: Path | None = None if self.fills is None else getattr(self, self.fills)
        return folder

    def __post_init__(self) -> None:
        for one in settings_of(type(self)):
            one.check(getattr(self, one.name))

    def as_json(self) -> dict[str, Any]:
        """Values as JSON has them."""
        return {setting.name: _plain(getattr(self, setting.name)) for setting in settings_of(type(self))}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Values of all settings that have a default, as JSON has them."""
        return {setting.name: _plain(setting.default) for setting in settings_of(cls) if not setting.required}

    def replace(self, **changes: Any) -> Self:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


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
        content = tomllib.loads(read_text(file))
    except OSError as error:
        raise DataError(f"cannot read configuration file {file}: {error.strerror}; check --config") from error
    except (ValueError, RecursionError) as error:  # no text, no TOML, a number of thousands of digits, deep nesting
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
        raise DataError(f"{where} must be a list, got {reprlib.repr(value)}")
    return tuple(_convert_one(setting.kind, one, where) for one in value)


def _convert_one(kind: type, value: Any, where: str) -> Any:
    if kind is Path and isinstance(value, str):
        return user_path(value)
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise DataError(f"{where} is a larger number than any of use: {str(value)[:20]}...") from None
    if type(value) is not kind:  # exact: True is no integer here
        expected = "str" if kind is Path else kind.__name__
        raise DataError(f"{where} must be of type {expected}, got {reprlib.repr(value)} ({type(value).__name__})")
    return value
