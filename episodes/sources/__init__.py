"""Data sets as `MaskSource`: VOC with SBD, COCO, FSS-1000, one's own folder, COCO JSON or LabelMe JSON, synthetic;
several of them as one, and photos composed of cut-out objects.
"""

from episodes.sources.coco import CocoJsonSource, CocoSource
from episodes.sources.composites import CompositeSource
from episodes.sources.errors import ProblemKind, SourceError
from episodes.sources.folder import FolderSource
from episodes.sources.fss import FssSource
from episodes.sources.joint import COMMON_NAMES, JointSource, common_name
from episodes.sources.labelme import LabelmeSource
from episodes.sources.synthetic import SyntheticSource
from episodes.sources.voc import VocSource

__all__ = [
    "COMMON_NAMES",
    "CocoJsonSource",
    "CocoSource",
    "CompositeSource",
    "FolderSource",
    "FssSource",
    "JointSource",
    "LabelmeSource",
    "ProblemKind",
    "SourceError",
    "SyntheticSource",
    "VocSource",
    "common_name",
]
