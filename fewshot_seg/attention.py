"""Gradient attention of a similarity: which cells of a photo make it similar to the support.

Source: Zheng, Karanam, Chen, Radke, Wu, "Towards Visually Explaining Similarity Models" (arXiv 2008.06035) and
"Visual Similarity Attention" (arXiv 1911.07381). No classifier is involved, so it works for classes that no
network was trained on.

`gradient_attention` is the general form by automatic differentiation. `similarity_attention` is its closed form
for the embedding of this package, f = GAP(A) / |GAP(A)|, and a score that is linear in f, s = v . f:

    ds/dA_k(x) = (v_k - (v . f) f_k) / (|GAP(A)| h w)   for every cell x,
    alpha_k    = GAP(ds/dA_k) = the same number,        M = ReLU(sum_k alpha_k A_k).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionKind = Literal["siamese", "triplet", "quadruplet", "cosine", "margin"]
ATTENTION_KINDS: tuple[AttentionKind, ...] = get_args(AttentionKind)

_NEGATIVES: dict[AttentionKind, int] = {"siamese": 0, "triplet": 1, "quadruplet": 2, "cosine": 0, "margin": 1}


def gradient_attention(
    scores: Tensor, maps: Sequence[Tensor], *, create_graph: bool = False, rectify: bool = True
) -> tuple[Tensor, ...]:
    """Attention of each level of convolutional maps for one scalar score per image (arXiv 2008.06035).

    Args:
        scores: float (B,), score i depends on image i only.
        maps: one or more float (B, C, h, w) that the scores were computed from; one backward pass serves all.
        create_graph: keep the graph, so that a loss on the attention can train the network.
        rectify: False leaves out the ReLU, so that dissimilar evidence stays visible as negative values.

    Returns:
        One float (B, h, w) per level, unscaled (see `scale_map`).

    Raises:
        ValueError: the scores or a map carry no gradient, or the scores do not depend on one of the maps.
    """
    if isinstance(maps, Tensor):
        raise ValueError("gradient_attention expects a sequence of maps, one per level; got a tensor: pass [maps]")
    if torch.is_inference_mode_enabled() or not scores.requires_grad:
        raise ValueError(
            "gradient_attention needs scores that carry a gradient; got none: compute them from maps that require "
            "grad, outside torch.inference_mode() (torch.no_grad() around it is fine with torch.enable_grad() inside)"
        )
    for level, level_maps in enumerate(maps):
        if not level_maps.requires_grad:
            raise ValueError(f"maps[{level}] do not require grad; call requires_grad_() before computing the scores")
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            scores.sum(), list(maps), create_graph=create_graph, retain_graph=True, allow_unused=True
        )
        attention = []
        for level, (gradient, level_maps) in enumerate(zip(gradients, maps, strict=True)):
            if gradient is None:
                raise ValueError(f"the scores do not depend on maps[{level}]; pass the maps they were computed from")
            weighted = (gradient.mean(dim=(2, 3), keepdim=True) * level_maps).sum(dim=1)
            attention.append(weighted.relu() if rectify else weighted)
    if create_graph:
        return tuple(attention)
    return tuple(level_attention.detach() for level_attention in attention)


def similarity_attention(maps: Tensor, direction: Tensor, *, rectify: bool = True) -> Tensor:
    """Closed form of `gradient_attention` for f = GAP(maps) / |GAP(maps)| and s = direction . f.

    Args:
        maps: float (B, C, h, w).
        direction: float (B, C), the v of the score; see `score_direction`.
        rectify: as in `gradient_attention`.

    Returns:
        float (B, h, w), equal to automatic differentiation up to rounding.

    Example:
        >>> maps = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # cell 0 is feature 0, cell 1 is feature 1
        >>> similarity_attention(maps, torch.tensor([[1.0, 0.0]]))  # look for feature 0
        tensor([[[0.3536, 0.0000]]])
    """
    pooled = maps.mean(dim=(2, 3))
    length = pooled.norm(dim=1, keepdim=True).clamp_min(1e-12)
    embedding = pooled / length
    along = (direction * embedding).sum(dim=1, keepdim=True)
    channel_weights = (direction - along * embedding) / (length * maps.shape[2] * maps.shape[3])
    attention = torch.einsum("bc,bchw->bhw", channel_weights, maps)
    return attention.relu() if rectify else attention


def similar_weight(anchor: Tensor, other: Tensor) -> Tensor:
    """Weights w_p = 1 - |f_a - f_p| of a similar pair, detached. float (B, D) -> (B, D)."""
    return (1 - (anchor - other).abs()).detach()


def dissimilar_weight(anchor: Tensor, other: Tensor) -> Tensor:
    """Weights w_n = |f_a - f_n| of a dissimilar pair, detached. float (B, D) -> (B, D)."""
    return (anchor - other).abs().detach()


def score_direction(kind: AttentionKind, anchor: Tensor, positive: Tensor, negatives: Sequence[Tensor]) -> Tensor:
    """The vector v of the score s = v . f_anchor, one per image.

    siamese w_p; triplet w_p w_n; quadruplet w_p w_n1 w_n2 (arXiv 2008.06035, all detached, element-wise);
    cosine f_p; margin f_p - f_n (unit length each; these may carry gradient to the embedding network).

    Args:
        kind: form of the score.
        anchor: float (B, D), L2-normalised embedding of the query.
        positive: float (B, D), embedding of the support's foreground.
        negatives: embeddings float (B, D): the support's background, then one of another class or image.

    Raises:
        ValueError: unknown kind, or fewer negatives than it needs.
    """
    if kind not in _NEGATIVES:
        raise ValueError(f"unknown attention kind {kind!r}; known: {', '.join(ATTENTION_KINDS)}")
    if len(negatives) < _NEGATIVES[kind]:
        raise ValueError(f"attention kind {kind!r} needs {_NEGATIVES[kind]} negative(s), got {len(negatives)}")
    if kind == "cosine":
        return F.normalize(positive, dim=1)
    if kind == "margin":
        return F.normalize(positive, dim=1) - F.normalize(negatives[0], dim=1)
    direction = similar_weight(anchor, F.normalize(positive, dim=1))
    for negative in negatives[: _NEGATIVES[kind]]:
        direction = direction * dissimilar_weight(anchor, F.normalize(negative, dim=1))
    return direction


def scale_map(maps: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Resize bilinearly to `size` (if given) and scale each image's map to [0, 1]; a constant map becomes 0.

    float (B, h, w) -> float (B, H, W).

    Example:
        >>> scale_map(torch.tensor([[[1.0, 3.0]], [[5.0, 5.0]]]))
        tensor([[[0., 1.]],
        <BLANKLINE>
                [[0., 0.]]])
    """
    constant = maps.amax(dim=(1, 2), keepdim=True) == maps.amin(dim=(1, 2), keepdim=True)
    if size is not None:  # interpolation leaves rounding noise in a constant map, hence the test before it
        maps = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    low = maps.amin(dim=(1, 2), keepdim=True)
    spread = maps.amax(dim=(1, 2), keepdim=True) - low
    return torch.where((spread > 0) & ~constant, (maps - low) / spread.clamp_min(torch.finfo(maps.dtype).tiny), 0.0)
