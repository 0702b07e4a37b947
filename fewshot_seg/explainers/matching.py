"""Rivals that read the explanation off the matching itself: no gradient, no further pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_seg.attention import scale_map
from fewshot_seg.explainers.comparison import Comparison


def pairwise_decomposition(comparison: Comparison, place: int) -> Tensor:
    """Pairwise activation decomposition: what each cell adds to the score (arXiv 1909.12977, 1901.00536).

    Stylianou, Souvenir, Pless, "Visualizing Deep Similarity Networks", WACV 2019, and Zhu, Yang, Chen, "Visual
    Explanation for Deep Metric Learning", 2019. The score is a sum over pairs of cells,
    s = sum_x sum_y A(x) . A(y) (w_fg(y) / |F_fg| - w_bg(y) / |F_bg|) / |sum_x A(x)|; a cell's value is its part of it.
    The query's map sums to s, and so do those of all supports together.
    """
    cells = comparison.cells
    if place == 0:
        length = cells[0].sum(dim=(1, 2)).norm().clamp_min(1e-12)
        return torch.einsum("d,dhw->hw", comparison.direction / length, cells[0])
    likeness = torch.einsum("d,dhw->hw", comparison.embedding, cells[place])
    of_object, of_other = (
        side[place - 1] / torch.einsum("kdhw,khw->d", cells[1:], side).norm().clamp_min(1e-12)
        for side in comparison.sides
    )
    found: Tensor = likeness * (of_object - of_other)
    return found


def support_affinity(comparison: Comparison, place: int) -> Tensor:
    """How strongly the found object matches a support's cells, level by level (after arXiv 2511.18163, AffEx).

    De Marinis, Kaymak, Brussee, Vessio, Castellano, "Matching-Based Few-Shot Semantic Segmentation Models Are
    Interpretable by Design", 2025, in its signed form: cosines between the support's cells and the query's cells inside
    the predicted mask, scaled to [0, 1] per level, positive on the object and negative on the background, summed with
    weights by ablation: softmax over how much the score falls without the level. The paper explains supports only; the
    query's map is the mirror image, from the object's cells less that from the background's.
    """
    region = _found(comparison)
    total = torch.zeros(comparison.grid, device=comparison.cells.device)
    for weight, level in zip(_level_weights(comparison), comparison.levels, strict=True):
        cells = F.normalize(F.interpolate(level, comparison.grid, mode="bilinear", align_corners=False), dim=1)
        sides = comparison.sides
        if place == 0:
            maps = [
                torch.einsum(
                    "dhw,d->hw", cells[0], torch.einsum("kdhw,khw->d", cells[1:], side) / side.sum().clamp_min(1e-6)
                )
                for side in sides
            ]
            total += weight * (scale_map(maps[0][None])[0] - scale_map(maps[1][None])[0])
            continue
        looked_for = torch.einsum("dhw,hw->d", cells[0], region) / region.sum().clamp_min(1e-6)
        affinity = scale_map(torch.einsum("dhw,d->hw", cells[place], looked_for)[None])[0]
        total += weight * affinity * (sides[0][place - 1] - sides[1][place - 1])
    return total


@torch.no_grad()
def _found(comparison: Comparison) -> Tensor:
    """Share of each query cell inside the predicted mask, float (h, w); everywhere where nothing was found."""
    levels = [level[:1] for level in comparison.levels]
    masks = comparison.segmenter.segment_levels(comparison.support, levels, comparison.size).masks
    shares = F.adaptive_avg_pool2d(masks[:, None].float(), comparison.grid)[0, 0]
    return shares if float(shares.sum()) > 0 else torch.ones_like(shares)


@torch.no_grad()
def _level_weights(comparison: Comparison) -> Tensor:
    """float (L,): softmax of the score's fall, in tenths of a cosine, where one level of the query is set to zero."""
    falls = []
    for number in range(len(comparison.levels)):
        kept = [level[:1] * float(other != number) for other, level in enumerate(comparison.levels)]
        falls.append(comparison.margin - comparison.margins(0, comparison.segmenter.similarity(kept))[0])
    return (10 * torch.stack(falls)).softmax(dim=0)
