"""Data sets as `MaskSource`: PASCAL VOC's folder layout and an embedded synthetic one."""

from episodes.sources.errors import ProblemKind, SourceError
from episodes.sources.synthetic import SyntheticSource
from episodes.sources.voc import VocSource

__all__ = ["ProblemKind", "SourceError", "SyntheticSource", "VocSource"]
