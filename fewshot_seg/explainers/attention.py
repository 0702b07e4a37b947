"""Ours: gradient attention of the margin on both sides, its dissimilar evidence, and the model's prior itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fewshot_seg.attention import attention_weights, similarity_attention
from fewshot_seg.explainers.comparison import Comparison
from fewshot_seg.priors import blockwise_soft_margin, log_density_ratio


def gradient_attention(comparison: Comparison, place: int) -> Tensor:
    """Gradient times activation of the margin at every cell (arXiv 2008.06035, in closed form), with its sign.

    Of the query, the gradient is the same at every cell, and M = sum_k alpha_k A_k, without the ReLU that pictures
    apply. Of a support, it is not: object and background are pooled apart, and every cell is weighted by its own gradient (`attention.weigh_maps`).
    """
    comparison.passes.backward += 1
    if place == 0:
        return similarity_attention(comparison.cells[:1], comparison.direction[None], rectify=False)[0]
    of_object, of_other = support_gradients(comparison, place)
    return of_object - of_other


def background_evidence(comparison: Comparison, place: int) -> Tensor:
    """Dissimilar evidence: the cells of a photo that make it alike to the supports' *background*.

    Gradient attention of f_q . f_bg, which the margin loses by (`attention.image_directions`). On a support these are
    cells of its background that the query resembles.
    """
    comparison.passes.backward += 1
    if place == 0:
        return similarity_attention(comparison.cells[:1], comparison.support.background_embedding, rectify=False)[0]
    return support_gradients(comparison, place)[1]


def support_gradients(comparison: Comparison, place: int) -> tuple[Tensor, Tensor]:
    """Gradient times activation of f_q . f_fg, and of f_q . f_bg, at the cells of a support: float (h, w) each.

    With F = sum_y w(y) A(y) over all supports and f = F / |F|, it is w(x) (f_q - (f_q . f) f) . A(x) / |F|.
    """
    cells, found = comparison.cells[1:], []
    for side in comparison.sides:
        total = torch.einsum("kdhw,khw->d", cells, side)
        length = total.norm().clamp_min(1e-12)
        weights = attention_weights((total / length)[None], comparison.embedding[None])[0] / length
        found.append(side[place - 1] * torch.einsum("d,dhw->hw", weights, cells[place - 1]))
    return found[0], found[1]


def prior(comparison: Comparison, place: int) -> Tensor:
    """The soft margin, with its sign: the map that the decoder starts from. No gradient.

    Of a support, it is that of its cells to what was found in the query: the same comparison from the other side, as in
    the model's second look at weakly marked supports.
    """
    margin = _soft_margin(comparison)
    if place == 0:
        return margin.reshape(comparison.grid)
    found = margin.sigmoid()
    cosine = cells_of(comparison, place) @ cells_of(comparison, 0).T
    likeness = log_density_ratio(cosine, found, 1 - found, temperature=comparison.segmenter.temperature)
    return likeness.reshape(comparison.grid)


def _soft_margin(comparison: Comparison) -> Tensor:
    support = comparison.support
    return blockwise_soft_margin(
        cells_of(comparison, 0)[None],
        support.cells,
        support.foreground,
        support.background,
        temperature=comparison.segmenter.temperature,
    )[0]


def cells_of(comparison: Comparison, place: int) -> Tensor:
    """Cells of a photo, unit-length float (h*w, D)."""
    return comparison.cells[place].flatten(1).T


def soft_attention(comparison: Comparison, place: int) -> Tensor:
    """Gradient times activation of the soft margin at the cells where the query was found alike.

    S = sum_x p(x) m(x) with m the soft margin, t times its log-ratio, and p = sigmoid of the log-ratio, detached and
    summing to 1. Element-wise gradient attention as above, but the score does not go through global pooling, so that
    the gradient differs from cell to cell: object and background compete at every cell of both photos.
    """
    comparison.passes.backward += 1
    temperature, support = comparison.segmenter.temperature, comparison.support
    chosen = _soft_margin(comparison).sigmoid()
    cosine = cells_of(comparison, 0) @ support.cells[0].T
    kernel = ((cosine - 1) / temperature).exp()
    pairs = torch.zeros_like(cosine)
    for side, sign in ((support.foreground[0], 1.0), (support.background[0], -1.0)):
        weights = kernel * side
        pairs += sign * weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-30) * cosine
    pairs *= (chosen / chosen.sum().clamp_min(1e-12))[:, None]
    if place == 0:
        return pairs.sum(dim=1).reshape(comparison.grid)
    return pairs.sum(dim=0).reshape(comparison.shots, *comparison.grid)[place - 1]
