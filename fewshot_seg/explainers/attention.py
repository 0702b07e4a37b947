"""Ours: gradient attention of the margin on both sides, its dissimilar evidence, and the model's prior itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fewshot_seg.attention import attention_weights, similarity_attention
from fewshot_seg.explainers.comparison import Comparison
from fewshot_seg.priors import log_density_ratio, soft_margin_attention


def gradient_attention(comparison: Comparison, place: int) -> Tensor:
    """Gradient times activation of the margin at every cell (arXiv 2008.06035, in closed form), with its sign.

    Of the query, the gradient is the same at every cell, and M = sum_k alpha_k A_k, without the ReLU that pictures
    apply. Of a support, it is not: object and background are pooled apart, and every cell is weighted by its own
    gradient (`attention.weigh_maps`). An embedding of unit length does not change along itself, so that within the
    object such a map sums to zero: it tells its cells apart, but not the object from its background. See
    `soft_attention`.
    """
    comparison.passes.backward += 1
    if place == 0:
        return similarity_attention(comparison.cells[:1], comparison.direction[None], rectify=False)[0]
    of_object, of_other = support_gradients(comparison, place)
    return of_object - of_other


def background_evidence(comparison: Comparison, place: int) -> Tensor:
    """Dissimilar evidence: the cells of a photo that make it alike to the supports' *background*.

    Of the query: gradient attention of f_q . f_bg, which the margin loses by (`attention.image_directions`). Of a
    support: `soft_attention` with the sign turned, cells of its background that resemble what was found.
    """
    if place == 0:
        comparison.passes.backward += 1
        return similarity_attention(comparison.cells[:1], comparison.support.background_embedding, rectify=False)[0]
    return -soft_attention(comparison, place)


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
    if place == 0:
        return comparison.soft_margin.reshape(comparison.grid)
    found = comparison.soft_margin.sigmoid()
    cosine = cells_of(comparison, place) @ cells_of(comparison, 0).T
    likeness = log_density_ratio(cosine, found, 1 - found, temperature=comparison.segmenter.temperature)
    return likeness.reshape(comparison.grid)


def cells_of(comparison: Comparison, place: int) -> Tensor:
    """Cells of a photo, unit-length float (h*w, D)."""
    return comparison.cells[place].flatten(1).T


def soft_attention(comparison: Comparison, place: int) -> Tensor:
    """Gradient times activation of the soft margin, which does not go through global pooling, with its sign.

    Object and background compete at every cell, and the gradient differs from cell to cell. Of the query, each cell's
    own margin is explained (`priors.soft_margin_attention`). Of a support, the mean margin of the query's cells,
    weighted by how likely they are found: S = sum_x p(x) t m(x) with m the log-ratio of the soft margin, t its
    temperature, and p the sigmoid of m, detached and scaled to sum to 1. Cells of the object count for, cells of the
    background against.
    """
    comparison.passes.backward += 1
    temperature, support = comparison.segmenter.temperature, comparison.support
    query = cells_of(comparison, 0)
    if place == 0:
        sides = support.foreground, support.background
        found = soft_margin_attention(query[None], support.cells, *sides, temperature=temperature)
        return found[0].reshape(comparison.grid)
    cosine, pairs = query @ support.cells[0].T, torch.zeros(len(query), support.cells.shape[1], device=query.device)
    for side, sign in ((support.foreground[0], 1.0), (support.background[0], -1.0)):
        weights = ((cosine - 1) / temperature).exp() * side
        pairs += sign * weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-30) * cosine
    of_supports = comparison.likely @ pairs
    return of_supports.reshape(comparison.shots, *comparison.grid)[place - 1]
