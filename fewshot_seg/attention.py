"""Gradient attention of a similarity: which cells of a photo make it similar to the support.

Source: Zheng, Karanam, Chen, Radke, Wu, "Towards Visually Explaining Similarity Models" (arXiv 2008.06035) and
"Visual Similarity Attention" (arXiv 1911.07381). No classifier is involved, so it works for classes that no
network was trained on.

`gradient_attention` is the general form by automatic differentiation. `similarity_attention` is its closed form
for the embedding of this package, f = GAP(A) / |GAP(A)|, and a score that is linear in f, s = v . f:

    ds/dA_k(x) = (v_k - (v . f) f_k) / (|GAP(A)| h w)   for every cell x,
    alpha_k    = GAP(ds/dA_k) = the same number,        M = ReLU(sum_k alpha_k A_k).

`fewshot_seg.embedding_attention` runs it on any model that turns images into embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionKind = Literal["siamese", "triplet", "quadruplet", "cosine", "margin"]
ATTENTION_KINDS: tuple[AttentionKind, ...] = get_args(AttentionKind)

NEGATIVES_NEEDED: dict[AttentionKind, int] = {"siamese": 0, "triplet": 1, "quadruplet": 2, "cosine": 0, "margin": 1}
"""How many negatives each kind compares with, beside the anchor and the positive."""


def weigh_maps(maps: Tensor, gradients: Tensor, *, elementwise: bool = False, rectify: bool = True) -> Tensor:
    """Maps weighted by the gradient of a score and summed over channels: the last step of gradient attention.

    Args:
        maps: float (B, C, h, w), the A_k.
        gradients: float (B, C, h, w), ds/dA_k(x) for every cell x.
        elementwise: False is arXiv 2008.06035, alpha_k = GAP(ds/dA_k) and M = ReLU(sum_k alpha_k A_k). True weights
            every cell by its own gradient, M(x) = ReLU(sum_k ds/dA_k(x) A_k(x)) (HiResCAM, arXiv 2011.08891). The two
            are the same where the gradient does not change from cell to cell, as behind global average pooling.
        rectify: False leaves out the ReLU.

    Returns:
        float (B, h, w).
    """
    weights = gradients if elementwise else gradients.mean(dim=(2, 3), keepdim=True)
    weighted = (weights * maps).sum(dim=1)
    return weighted.relu() if rectify else weighted


def gradient_attention(
    scores: Tensor,
    maps: Sequence[Tensor],
    *,
    create_graph: bool = False,
    elementwise: bool = False,
    rectify: bool = True,
) -> tuple[Tensor, ...]:
    """Attention of each level of convolutional maps for one scalar score per image (arXiv 2008.06035).

    Args:
        scores: float (B,), score i depends on image i only.
        maps: one or more float (B, C, h, w) that the scores were computed from; one backward pass serves all.
        create_graph: keep the graph, so that a loss on the attention can train the network.
        elementwise: weight every cell by its own gradient instead of the mean over cells; see `weigh_maps`.
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
            attention.append(weigh_maps(level_maps, gradient, elementwise=elementwise, rectify=rectify))
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
    channel_weights = attention_weights(embedding, direction) / (length * maps.shape[2] * maps.shape[3])
    attention = torch.einsum("bc,bchw->bhw", channel_weights, maps)
    return attention.relu() if rectify else attention


def attention_weights(embedding: Tensor, direction: Tensor) -> Tensor:
    """v - (v . f) f, the alpha_k of the closed form but for their common factor 1 / (|GAP(A)| h w).

    Args:
        embedding: unit-length float (B, C), the f.
        direction: float (B, C), the v.
    """
    return direction - (direction * embedding).sum(dim=1, keepdim=True) * embedding


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
    if kind not in NEGATIVES_NEEDED:
        raise ValueError(f"unknown attention kind {kind!r}; known: {', '.join(ATTENTION_KINDS)}")
    if len(negatives) < NEGATIVES_NEEDED[kind]:
        raise ValueError(f"attention kind {kind!r} needs {NEGATIVES_NEEDED[kind]} negative(s), got {len(negatives)}")
    if kind == "cosine":
        return F.normalize(positive, dim=1)
    if kind == "margin":
        return F.normalize(positive, dim=1) - F.normalize(negatives[0], dim=1)
    direction = similar_weight(anchor, F.normalize(positive, dim=1))
    for negative in negatives[: NEGATIVES_NEEDED[kind]]:
        direction = direction * dissimilar_weight(anchor, F.normalize(negative, dim=1))
    return direction


def image_directions(
    kind: AttentionKind, anchor: Tensor, positive: Tensor | None, negatives: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The vector v_i of every image's score s_i = v_i . f_i, in the order anchor, positive, negatives.

    | kind | anchor | positive | each negative |
    |---|---|---|---|
    | siamese, triplet, quadruplet | w of `score_direction`, detached | w | w |
    | siamese without positive (dissimilar pair) | w_n = abs(f_a - f_n), detached | - | w_n |
    | cosine, s = f_a . f_p | f_p | f_a | - |
    | margin, s = f_a . f_p - f_a . f_n | f_p - f_n | f_a | f_a |

    The margin falls with the negative's resemblance to the anchor: its own gradient would be along -f_a, and the ReLU
    would leave what the negative does *not* share. The negative is therefore explained by f_a . f_n: where it
    resembles the anchor, which is what the margin suffers from.

    Args:
        kind: form of the score.
        anchor, positive: L2-normalised float (B, D); positive None is a dissimilar pair.
        negatives: as many as the kind needs, L2-normalised float (B, D).

    Returns:
        One float (B, D) per image. Those of cosine and margin carry the gradient of the embeddings.

    Raises:
        ValueError: unknown kind, too few negatives, or no positive where the kind needs one.
    """
    if positive is None:
        if kind != "siamese" or len(negatives) != 1:
            raise ValueError(
                f"only kind 'siamese' with one negative goes without a positive, got {kind!r} and {len(negatives)}"
            )
        weight = dissimilar_weight(anchor, negatives[0])
        return weight, weight
    direction = score_direction(kind, anchor, positive, negatives)
    other = anchor if kind in ("cosine", "margin") else direction
    return direction, other, *(other for _ in negatives)


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
