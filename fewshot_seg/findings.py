"""What an episode's score hides: what was missed, what was marked wrongly and on which other class, and the cut.

Counts of pixels, not shares: sums over episodes then weigh a pixel as mIoU does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from episodes.augment import fitted_size
from episodes.protocols import Fit
from episodes.types import IGNORE, MaskSource, UInt8Array
from fewshot_seg.metrics import intersection_union

_GRID = 128
"""Points a side at which the best cut is looked for: enough for a percent, and a tenth of the time of all pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Pixels of one scored query.

    Attributes:
        scored: all that are not ignored.
        target: of the object.
        found: marked as object.
        both: marked rightly.
        best_iou: IoU in percent at the threshold that suits this query best; None where the method gives no ranking.
        on_others: class id -> pixels marked wrongly that carry the label of this other class.
        on_any_other: pixels marked wrongly that carry the label of some other class, each once: labels may overlap.
            None in runs of earlier versions.
    """

    scored: int
    target: int
    found: int
    both: int
    best_iou: float | None
    on_others: Mapping[int, int]
    on_any_other: int | None = None

    @property
    def union(self) -> int:
        """Of object and marked pixels."""
        return self.target + self.found - self.both


def find(margins: Tensor, target: Tensor, others: Mapping[int, UInt8Array], *, ranked: bool = True) -> Finding:
    """Count one query.

    Args:
        margins: float (H, W), object where greater than 0.
        target: uint8 (H, W), 1 = object, 0 = background, 255 = ignored.
        others: class id -> uint8 (H, W), 1 where the photo shows this other class.
        ranked: whether other thresholds than 0 mean anything.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> target = torch.tensor([[1, 1, 0, 0]], dtype=torch.uint8)
        >>> cow = np.array([[0, 0, 0, 1]], np.uint8)
        >>> find(torch.tensor([[3.0, -1.0, -2.0, 1.0]]), target, {7: cow}, ranked=False)
        Finding(scored=4, target=2, found=2, both=1, best_iou=None, on_others={7: 1}, on_any_other=1)
    """
    both, union = intersection_union(margins[None] > 0, target[None])[0, 1].tolist()
    actual, valid = (target == 1).numpy(), (target != IGNORE).numpy()
    found = (margins > 0).numpy() & valid
    wrong = found & ~actual
    claims = {class_id: wrong & (mask == 1) for class_id, mask in others.items()}
    claimed = {class_id: int(np.count_nonzero(pixels)) for class_id, pixels in claims.items()}
    anywhere = np.logical_or.reduce(list(claims.values())) if claims else np.zeros_like(wrong)
    best = None
    if ranked:
        best = max(best_cut(margins, target), 100 * both / union if union else 100.0)
    return Finding(
        scored=int(np.count_nonzero(valid)),
        target=int(np.count_nonzero(actual)),
        found=int(np.count_nonzero(found)),
        both=both,
        best_iou=best,
        on_others={class_id: pixels for class_id, pixels in sorted(claimed.items()) if pixels},
        on_any_other=int(np.count_nonzero(anywhere)),
    )


def best_cut(margins: Tensor, target: Tensor) -> float:
    """IoU in percent at the best of all thresholds, on a regular grid of at most 255 x 255 pixels.

    All pixels count where the grid misses a small object. 100 without an object: no mark is then perfect.
    """
    step = max(1, max(margins.shape) // _GRID)
    if not bool((target[::step, ::step] == 1).any()):
        step = 1
    values, labels = margins[::step, ::step].flatten(), target[::step, ::step].flatten()
    values, labels = values[labels != IGNORE], labels[labels != IGNORE]
    size = int((labels == 1).sum())
    if size == 0:
        return 100.0
    order = values.argsort(descending=True)
    values, hits = values[order], (labels[order] == 1).cumsum(0).to(torch.float64)
    taken = torch.arange(1, len(values) + 1, dtype=torch.float64)
    iou = hits / (taken + size - hits)
    ends = torch.ones(len(values), dtype=torch.bool)
    ends[:-1] = values[:-1] != values[1:]  # no threshold divides equal values
    return 100 * float(iou[ends].max())


def other_classes(
    source: MaskSource, image_id: str, class_id: int, *, side: int | None = None, fit: Fit = "squash"
) -> dict[int, UInt8Array]:
    """Masks of the other classes that a photo shows, at the labels' own size or as in a square of `side`."""
    masks = {other: mask for other, mask in source.class_masks(image_id).items() if other != class_id}
    if side is None:
        return masks
    return {other: _in_square(mask, side, fit) for other, mask in masks.items()}


def _in_square(mask: UInt8Array, side: int, fit: Fit) -> UInt8Array:
    height, width = fitted_size(mask.shape[0], mask.shape[1], side, fit)
    square = np.full((side, side), IGNORE, np.uint8)
    square[:height, :width] = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return square
