"""From support embeddings to maps over the query: where is what the supports show?

All maps are computed from cells: unit-length embeddings of the feature grid. The heart is `similarity_priors`
(gradient attention, prototype similarities, nearest and soft-nearest cells); `pfenet_prior` is the usual rival.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_seg.attention import attention_weights, scale_map, score_direction

PRIOR_CHANNELS = (
    "soft margin",
    "prototype margin",
    "prototype similarity",
    "gradient attention",
    "nearest foreground",
    "nearest background",
)
"""Names of the maps of `similarity_priors`, in order."""

TEMPERATURE = 0.05
"""Temperature of the soft margin, in cosine units; `scripts/choose_temperature.py` compares others on base classes."""

COSINE_UNIT = 0.1
"""Cosines vary by about this much inside a photo; maps in this unit suit a small decoder."""

_BLOCK = 2**19
"""Cosines at a time: 2 MB, which a processor's cache holds. All of a batch at once take two to three times as long."""


def soft_margin(
    query_cells: Tensor, support_cells: Tensor, foreground: Tensor, background: Tensor, *, temperature: float
) -> Tensor:
    """How much nearer a query cell is to the supports' object than to their background.

    log mean_fg exp(cos / t) - log mean_bg exp(cos / t): the log-ratio of two kernel densities over the support's
    cells. Times t, it tends to the difference of the mean cosines for large t (prototype margin), and for small t
    to the difference of the nearest cells (PFENet's maximum, for both sides). Object and background weigh the same
    whatever their areas. float32 sets the lower end: below t = 0.03, cells further than 69 t from a cosine of 1
    all count alike.

    Args:
        query_cells: unit-length float (B, M, D).
        support_cells: unit-length float (B, N, D), all shots together.
        foreground, background: float (B, N), weights of the support cells.
        temperature: t > 0 in cosine units.

    Returns:
        float (B, M) within [-2/t, 2/t]. A side that no support shows counts as opposite (cosine -1).
    """
    cosine = torch.einsum("bmd,bnd->bmn", query_cells, support_cells)
    return log_density_ratio(cosine, foreground, background, temperature=temperature)


def blockwise_soft_margin(
    query_cells: Tensor, support_cells: Tensor, foreground: Tensor, background: Tensor, *, temperature: float
) -> Tensor:
    """`soft_margin`, some query cells at a time: as fast as a processor's cache allows."""
    rows, margins = max(1, _BLOCK // max(1, support_cells.shape[1])), list[Tensor]()
    for queries, supports, *sides in zip(query_cells, support_cells, foreground, background, strict=True):
        of_episode = [
            log_density_ratio(block @ supports.T, sides[0], sides[1], temperature=temperature)
            for block in queries.split(rows)
        ]
        margins.append(torch.cat(of_episode))
    return torch.stack(margins)


def log_density_ratio(cosine: Tensor, foreground: Tensor, background: Tensor, *, temperature: float) -> Tensor:
    """`soft_margin` of cells whose cosines, float (B, M, N), are at hand; of one episode also without B."""
    kernel = cosine.sub(1).div_(temperature).exp_()  # in place on the difference: the largest tensor here
    least = max(math.exp(-2 / temperature), 1e-30)  # the kernel at cosine -1
    density_of_object, density_of_other = (
        _weighted_sum(kernel, side / side.sum(dim=-1, keepdim=True).clamp_min(1e-6)).clamp_min(least).log()
        for side in (foreground, background)
    )
    return density_of_object - density_of_other


def _weighted_sum(kernel: Tensor, shares: Tensor) -> Tensor:
    """float (..., M, N), (..., N) -> (..., M)."""
    if kernel.dim() == 2:
        return kernel @ shares  # several times faster than a product of matrices of which one is a single column
    return torch.bmm(kernel, shares[:, :, None])[:, :, 0]


def soft_margin_attention(
    query_cells: Tensor, support_cells: Tensor, foreground: Tensor, background: Tensor, *, temperature: float
) -> Tensor:
    """Element-wise gradient attention of the soft margin itself: sum_k t ds(x)/dA_k(x) A_k(x), with its sign.

    s(x) is `soft_margin` at cell x, A(x) the cell. The gradient of a log mean exp is a softmax, so that the sum is the
    mean cosine to the support's object minus that to its background, each weighted towards the cells most like x. It
    does not go through global pooling: unlike the gradient of a pooled score, it differs from cell to cell.

    Args:
        query_cells, support_cells, foreground, background, temperature: as in `soft_margin`.

    Returns:
        float (B, M) within [-2, 2]. A side that no support shows counts as opposite (cosine -1).
    """
    cosine = torch.einsum("bmd,bnd->bmn", query_cells, support_cells)
    kernel = ((cosine - 1) / temperature).exp()
    means = []
    for side in (foreground, background):
        weights = side[:, None] * kernel
        total = weights.sum(dim=2)
        mean = (weights * cosine).sum(dim=2) / total.clamp_min(1e-30)
        means.append(torch.where(total > 1e-30, mean, -1.0))
    return means[0] - means[1]


def nearest_similarity(cosine: Tensor, weights: Tensor) -> Tensor:
    """Largest cosine to a support cell that lies mostly inside the region; -1 where there is no such cell.

    float (B, M, N), float (B, N) -> float (B, M).
    """
    return cosine.masked_fill((weights < 0.5)[:, None], -1.0).amax(dim=2)


def cell_cosines(query_maps: Tensor, support_cells: Tensor) -> Tensor:
    """Cosines of query cells with support cells, all of unit length: (B, D, h, w) and (B, N, D) -> (B, h*w, N)."""
    return torch.einsum("bmd,bnd->bmn", query_maps.flatten(2).transpose(1, 2), support_cells)


def similarity_priors(
    query_maps: Tensor,
    support_cells: Tensor,
    foreground: Tensor,
    background: Tensor,
    foreground_embedding: Tensor,
    background_embedding: Tensor,
    *,
    temperature: float = TEMPERATURE,
    cosine: Tensor | None = None,
) -> Tensor:
    """The maps named in `PRIOR_CHANNELS`, in comparable units (log-ratio, or a tenth of a cosine).

    Args:
        query_maps: unit-length cells float (B, D, h, w).
        support_cells: unit-length float (B, N, D), all shots together.
        foreground, background: float (B, N).
        foreground_embedding, background_embedding: unit-length float (B, D), pooled over the supports.
        temperature: see `soft_margin`.
        cosine: `cell_cosines` of the first two, if they are at hand.

    Returns:
        float (B, 6, h, w). The gradient attention is that of the margin, with its sign.
    """
    batch, _, height, width = query_maps.shape
    query_cells = query_maps.flatten(2).transpose(1, 2)
    pooled = query_cells.mean(dim=1)
    embedding = F.normalize(pooled, dim=1)
    direction = score_direction("margin", embedding, foreground_embedding, [background_embedding])
    # Without the constant factor 1 / (|GAP| h w) of the gradient: what remains is a difference of cosines.
    weights = attention_weights(embedding, direction)
    looked_for = torch.stack([foreground_embedding, background_embedding, weights], dim=2)
    to_foreground, to_background, attention = torch.bmm(query_cells, looked_for).unbind(dim=2)
    margin, nearest_foreground, nearest_background = _compare_cells(
        query_cells, support_cells, foreground, background, cosine, temperature
    )
    maps = [
        margin,
        (to_foreground - to_background) / COSINE_UNIT,
        to_foreground / COSINE_UNIT,
        attention / COSINE_UNIT,
        nearest_foreground / COSINE_UNIT,
        nearest_background / COSINE_UNIT,
    ]
    return torch.stack(maps, dim=1).reshape(batch, len(maps), height, width)


def _compare_cells(
    query_cells: Tensor,
    support_cells: Tensor,
    foreground: Tensor,
    background: Tensor,
    cosine: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft margin, and `nearest_similarity` of both sides, float (B, M) each, block by block."""
    batch, cells = query_cells.shape[:2]
    rows = max(1, _BLOCK // max(1, support_cells.shape[1]))
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for episode in range(batch):
        order, of_object, of_other = _by_side(foreground[episode], background[episode])
        sides = foreground[episode, order], background[episode, order]
        compared = support_cells[episode, order] if cosine is None else cosine[episode][:, order]
        for first in range(0, cells, rows):
            block = compared[first : first + rows]
            if cosine is None:
                block = query_cells[episode, first : first + rows] @ compared.T
            found[0].append(log_density_ratio(block, *sides, temperature=temperature))
            found[1].append(_largest(block[:, of_object]))
            found[2].append(_largest(block[:, of_other]))
    margin, nearest_foreground, nearest_background = (torch.cat(maps).reshape(batch, cells) for maps in found)
    return margin, nearest_foreground, nearest_background


def _by_side(foreground: Tensor, background: Tensor) -> tuple[Tensor, slice, slice]:
    """An order of the cells (N,) in which those mostly foreground, and those mostly background, stand together.

    To take the largest of neighbours is several times faster than to mask all others first.
    """
    of_object, of_other = foreground >= 0.5, background >= 0.5
    rank = of_object.int() + (of_object & of_other).int() + 3 * (of_other & ~of_object).int()  # 0 neither, 1, 2 both, 3
    order = rank.argsort(stable=True)
    neither, objects = int((~of_object & ~of_other).sum()), int(of_object.sum())
    both = int((of_object & of_other).sum())
    return order, slice(neither, neither + objects), slice(neither + objects - both, len(order))


def _largest(cosine: Tensor) -> Tensor:
    """(M, n) -> (M,); -1 where there is nothing to compare with."""
    return cosine.amax(dim=1) if cosine.shape[1] else cosine.new_full((len(cosine),), -1.0)


def pfenet_prior(query_level: Tensor, support_level: Tensor, foreground: Tensor) -> Tensor:
    """PFENet's training-free prior (Tian et al., arXiv 2008.01449, eq. 3-6).

    Cosine of every query cell with every foreground cell of the support, maximum over support cells, min-max scaled
    per image, mean over shots. PFENet takes the last block alone; the segmenter passes all levels joined, because
    with our default backbone the level at 1/32 alone is far weaker, and a rival deserves its best form.

    Args:
        query_level: float (B, C, h, w), frozen features.
        support_level: float (B, K, C, h, w).
        foreground: float (B, K, h, w), fraction of the cell that is foreground.

    Returns:
        float (B, h, w) in [0, 1].
    """
    query = F.normalize(query_level, dim=1).flatten(2)
    per_shot = []
    for shot in range(support_level.shape[1]):
        # PFENet multiplies the support's features by its mask before the cosine.
        masked = support_level[:, shot] * foreground[:, shot, None]
        support = F.normalize(masked, dim=1).flatten(2)
        best = torch.einsum("bcm,bcn->bmn", query, support).amax(dim=2)
        per_shot.append(scale_map(best.reshape(query_level.shape[0], *query_level.shape[-2:])))
    return torch.stack(per_shot).mean(dim=0)
