"""Settings of ``fewshot-seg weights list|verify``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewshot_seg.config.machinery import Config, setting


@dataclass(frozen=True, kw_only=True)
class WeightsListConfig(Config):
    """``fewshot-seg weights list``."""

    format: Literal["text", "json"] = setting("what is printed: a table, or the manifest as JSON", "text")


@dataclass(frozen=True, kw_only=True)
class WeightsVerifyConfig(Config):
    """``fewshot-seg weights verify``."""
