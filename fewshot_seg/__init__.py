"""Low-shot segmentation with similarity attention: from one to five labelled examples to masks, and why.

Example:
    >>> import torch
    >>> from fewshot_seg import build_backbone, training_free
    >>> segmenter = training_free(build_backbone("mobilenetv3_small_050", weights="random"))
    >>> images, masks = torch.rand(1, 2, 3, 64, 64), torch.zeros(1, 2, 64, 64, dtype=torch.uint8)
    >>> masks[:, :, 16:48, 16:48] = 1
    >>> support = segmenter.encode_support(images, masks)  # one episode of two shots
    >>> segmenter.segment(support, torch.rand(5, 3, 64, 64)).masks.shape
    torch.Size([5, 64, 64])

Every name is loaded when it is first asked for: torch and the libraries of the backbones take seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fewshot_seg.attention import gradient_attention, similarity_attention
    from fewshot_seg.backbones import Backbone, build_backbone
    from fewshot_seg.checkpoint import load_segmenter, load_similarity, save_segmenter, save_similarity
    from fewshot_seg.embedding import ImageEmbedder
    from fewshot_seg.embedding_attention import GradientAttention
    from fewshot_seg.encodings import Prediction, SupportEncoding
    from fewshot_seg.prediction import PhotoPrediction, Predictor
    from fewshot_seg.predictors import open_predictor
    from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter, training_free
    from fewshot_seg.similarity import SimilarityNetwork

__all__ = [
    "Backbone",
    "FewShotSegmenter",
    "GradientAttention",
    "ImageEmbedder",
    "PhotoPrediction",
    "Prediction",
    "Predictor",
    "SimilarityNetwork",
    "SupportEncoding",
    "build_backbone",
    "build_segmenter",
    "gradient_attention",
    "load_segmenter",
    "load_similarity",
    "open_predictor",
    "save_segmenter",
    "save_similarity",
    "similarity_attention",
    "training_free",
]

_MODULES = {
    "Backbone": "fewshot_seg.backbones",
    "FewShotSegmenter": "fewshot_seg.segmenter",
    "GradientAttention": "fewshot_seg.embedding_attention",
    "ImageEmbedder": "fewshot_seg.embedding",
    "PhotoPrediction": "fewshot_seg.prediction",
    "Prediction": "fewshot_seg.encodings",
    "Predictor": "fewshot_seg.prediction",
    "SimilarityNetwork": "fewshot_seg.similarity",
    "SupportEncoding": "fewshot_seg.encodings",
    "build_backbone": "fewshot_seg.backbones",
    "build_segmenter": "fewshot_seg.segmenter",
    "gradient_attention": "fewshot_seg.attention",
    "load_segmenter": "fewshot_seg.checkpoint",
    "load_similarity": "fewshot_seg.checkpoint",
    "open_predictor": "fewshot_seg.predictors",
    "save_segmenter": "fewshot_seg.checkpoint",
    "save_similarity": "fewshot_seg.checkpoint",
    "similarity_attention": "fewshot_seg.attention",
    "training_free": "fewshot_seg.segmenter",
}


def __getattr__(name: str) -> object:
    """A public name, from its module (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
