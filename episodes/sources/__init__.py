"""Data sets as `MaskSource`: VOC with SBD, COCO, FSS-1000, one's own folder, COCO JSON or LabelMe JSON, synthetic."""

from episodes.sources.coco import CocoJsonSource, CocoSource
from episodes.sources.errors import ProblemKind, SourceError
from episodes.sources.folder import FolderSource
from episodes.sources.fss import FssSource
from episodes.sources.labelme import LabelmeSource
from episodes.sources.synthetic import SyntheticSource
from episodes.sources.voc import VocSource

__all__ = [
    "CocoJsonSource",
    "CocoSource",
    "FolderSource",
    "FssSource",
    "LabelmeSource",
    "ProblemKind",
    "SourceError",
    "SyntheticSource",
    "VocSource",
]
