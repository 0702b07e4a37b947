"""Comparisons of a data set's episodes and of people's own photos; and a model whose weights are random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from episodes.annotations import annotation_of
from episodes.augment import EpisodeTransform
from episodes.protocols import Fit
from episodes.types import EpisodeSpec, MaskSource, SupportKind, UInt8Array
from fewshot_seg.backbones import build_backbone
from fewshot_seg.explainers.comparison import Comparison
from fewshot_seg.segmenter import FewShotSegmenter, training_free


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownPhotos:
    """Photos of an episode at their own sizes.

    Attributes:
        supports: uint8 (H_k, W_k, 3) each.
        marks: uint8 (H_k, W_k) each, 1 = object, 255 = ignore, or not known in weaker marks.
        dense: which of them are masks.
        query: uint8 (H, W, 3).
    """

    supports: tuple[UInt8Array, ...]
    marks: tuple[UInt8Array, ...]
    dense: tuple[bool, ...]
    query: UInt8Array


def episode_photos(source: MaskSource, spec: EpisodeSpec, support: SupportKind = "mask") -> ShownPhotos:
    """The photos of an episode, its supports marked by `support`."""
    return ShownPhotos(
        supports=tuple(source.image(image_id) for image_id in spec.support_ids),
        marks=tuple(annotation_of(source, image_id, spec.class_id, support) for image_id in spec.support_ids),
        dense=(support == "mask",) * len(spec.support_ids),
        query=source.image(spec.query_id),
    )


def compare_photos(
    segmenter: FewShotSegmenter, photos: ShownPhotos, *, resolution: int, fit: Fit = "squash", seed: int = 0
) -> Comparison:
    """The comparison of photos, fitted into squares.

    Args:
        segmenter: the model, in evaluation mode.
        photos: of `episode_photos`, or one's own.
        resolution: side of the square.
        fit: how photos become square.
        seed: of explainers that draw.
    """
    transform = EpisodeTransform("none", resolution, fit)
    shown = zip(photos.supports, photos.marks, photos.dense, strict=True)
    squares = [transform.support(image, marks, is_mask=is_mask) for image, marks, is_mask in shown]
    device = next(segmenter.backbone.parameters()).device
    supports, masks = _stacked([image for image, _ in squares]), _stacked([mask for _, mask in squares])
    return Comparison(
        segmenter,
        supports.to(device),
        masks.to(device),
        transform.photo(photos.query).to(device),
        dense=torch.tensor(photos.dense, device=device),
        seed=seed,
    )


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors))


def randomised(segmenter: FewShotSegmenter, *, seed: int = 0) -> FewShotSegmenter:
    """The soft margin of the same backbone with random weights, with nothing trained (Adebayo et al., 1810.03292)."""
    backbone = build_backbone(segmenter.backbone.name, strides=segmenter.backbone.plan, weights="random", seed=seed)
    device = next(segmenter.backbone.parameters()).device
    return training_free(backbone, temperature=segmenter.temperature).to(device).eval()
