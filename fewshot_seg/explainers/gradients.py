"""Rivals that take the gradient of the score with respect to the backbone's features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_seg.attention import weigh_maps
from fewshot_seg.explainers.comparison import Comparison

STEPS = 8
"""Points of the path of the integrated methods."""


def grad_cam(comparison: Comparison, place: int) -> Tensor:
    """Grad-CAM of the score at the backbone's deepest level (Selvaraju et al., arXiv 1610.02391).

    With its sign, as captum has it by default: rectified, it says nothing about the order of all other cells.
    """
    own = [level[place : place + 1] for level in comparison.levels]
    gradient = comparison.level_gradients(place, own)[-1]
    return weigh_maps(own[-1], gradient, rectify=False)[0]


def integrated_gradients(comparison: Comparison, place: int) -> Tensor:
    """Integrated gradients on the features (Sundararajan et al., arXiv 1703.01365), from those of the blurred photo.

    The path is straight from the blurred photo's features to the photo's own. Values sum to the difference between the
    scores of both, up to the error of `STEPS` points. (From features of zero the path has no gradient: cells are
    normalised. From black pixels the maps are as noisy as is known, and cost as many full passes.)
    """
    return _integrated(comparison, place, None)


def integrated_jacobians(comparison: Comparison, place: int) -> Tensor:
    """Feature-pair attribution by integrated Jacobians, summed over the partner's features.

    Moeller, Nikolaev, Pado, "An Attribution Method for Siamese Encoders" (arXiv 2310.05703) and "Approximate
    Attributions for Off-the-Shelf Siamese Transformers" (arXiv 2402.02883). With integrated Jacobians J_a and J_b of
    the two embeddings, the pair of features i and j gets (a - r_a)_i (J_a^T J_b)_ij (b - r_b)_j, and all pairs sum to
    s(a, b) - s(r_a, b) - s(a, r_b) + s(r_a, r_b). Summed over j, J_b (b - r_b) is by completeness the difference of the
    partner's embeddings, so that a map costs no more than integrated gradients. References: blurred photos' features.
    """
    with torch.no_grad():
        reference = comparison.segmenter.similarity(comparison.baseline_levels)
        if place == 0:
            direction = comparison.direction - _direction(comparison, reference[1:])

            def score(cells: Tensor) -> Tensor:
                return F.normalize(cells.mean(dim=(2, 3)), dim=1) @ direction
        else:
            change = comparison.embedding - F.normalize(reference[0].mean(dim=(1, 2)), dim=0)

            def score(cells: Tensor) -> Tensor:
                of_object, of_other = comparison.pooled(place, cells)
                return (of_object - of_other) @ change

    comparison.passes.forward += 1 if place else comparison.shots  # of the partners' references
    return _integrated(comparison, place, score)


def _direction(comparison: Comparison, cells: Tensor) -> Tensor:
    """f_fg - f_bg, float (D,), of other cells of the supports, float (K, D, h, w)."""
    pooled = [F.normalize(torch.einsum("kdhw,khw->d", cells, side), dim=0) for side in comparison.sides]
    return pooled[0] - pooled[1]


def _integrated(comparison: Comparison, place: int, score: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Middle-point rule over the path between the features of the blurred photo and of the photo."""
    comparison.passes.forward += 1
    own = [level[place : place + 1] for level in comparison.levels]
    start = [level[place : place + 1] for level in comparison.baseline_levels]
    along = (torch.arange(STEPS, device=own[0].device, dtype=own[0].dtype) + 0.5)[:, None, None, None] / STEPS
    path = [low + along * (high - low) for low, high in zip(start, own, strict=True)]
    gradients = comparison.level_gradients(place, path, score)
    parts = [
        ((high - low) * gradient.mean(dim=0, keepdim=True)).sum(dim=1)
        for low, high, gradient in zip(start, own, gradients, strict=True)
    ]
    return sum_of_levels(parts, comparison.grid)


def sum_of_levels(parts: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Maps float (1, h_l, w_l) on one grid, float (h, w): enlarged, each with the sum that it had."""
    total = torch.zeros(grid, device=parts[0].device)
    for part in parts:
        spread = F.interpolate(part[None], grid, mode="bilinear", align_corners=False)[0, 0]
        # what the enlargement adds or loses at the border is given back to all cells alike
        share = part.shape[1] * part.shape[2] / spread.numel()
        spread = spread * share
        total += spread + (part.sum() - spread.sum()) / spread.numel()
    return total
