"""Rivals that change the photo and look at the score: many passes, nothing known of the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_seg.explainers.comparison import Comparison

OCCLUSION_GRID = 7
"""Occluders are two of these parts wide and high, and move by one: 36 of them."""
SHAPLEY_GRID = 5
"""Players are the squares of a grid of so many a side."""
SHAPLEY_PAIRS = 1
"""Orders of the players, and as many reversed."""


def occlusion(comparison: Comparison, place: int) -> Tensor:
    """SBSM: how much the score falls where a sliding square hides the photo (Dong et al., CVPR-W 2019).

    Dong, Collins, Hoogs, "Explainability for Content-Based Image Retrieval". A part's value is the mean over the
    squares that cover it. What is hidden shows the blurred photo.
    """
    side, device = OCCLUSION_GRID, comparison.photos.device
    starts = [(row, column) for row in range(side - 1) for column in range(side - 1)]
    hidden = torch.zeros(len(starts), side, side, device=device)
    for number, (row, column) in enumerate(starts):
        hidden[number, row : row + 2, column : column + 2] = 1
    falls = comparison.margin - comparison.changed(place, _mixed(comparison, place, hidden))
    return torch.einsum("n,nhw->hw", falls, hidden) / hidden.sum(dim=0)


def shapley_sampling(comparison: Comparison, place: int) -> Tensor:
    """Shapley values of the squares of a grid, by sampled orders (after Hamilton et al., arXiv 2103.00370).

    Hamilton, Lundberg, Zhang, Fu, Freeman, "Axiomatic Explanations for Visual Search, Retrieval, and Similarity
    Learning", ICLR 2022. Squares enter the blurred photo one by one; each gets what it adds, the mean over orders,
    every order also reversed (Castro et al. 2009; Mitchell et al. 2022). Values sum to the difference between the
    scores of the photo and of the blurred one, whatever the orders.
    """
    players, device = SHAPLEY_GRID**2, comparison.photos.device
    generator = torch.Generator().manual_seed(comparison.seed)
    drawn = [torch.randperm(players, generator=generator) for _ in range(SHAPLEY_PAIRS)]
    orders = torch.stack([order for one in drawn for order in (one, one.flip(0))]).to(device)
    places = orders.argsort(dim=1)  # of every player in every order
    present = places[:, None, :] < torch.arange(1, players, device=device)[None, :, None]
    hidden = 1 - present.flatten(0, 1).float().reshape(-1, SHAPLEY_GRID, SHAPLEY_GRID)
    hidden = torch.cat([torch.ones_like(hidden[:1]), hidden])  # nobody present: the same for all orders
    scores = comparison.changed(place, _mixed(comparison, place, hidden))
    first = scores[:1].expand(len(orders), 1)
    last = torch.full_like(first, comparison.margin)
    added = torch.cat([first, scores[1:].reshape(len(orders), -1), last], dim=1).diff(dim=1)
    return added.gather(1, places).mean(dim=0).reshape(SHAPLEY_GRID, SHAPLEY_GRID)


def chance(comparison: Comparison, place: int) -> Tensor:
    """A random value for every part of the occluder's grid: what an explanation must beat."""
    generator = torch.Generator().manual_seed(2 * comparison.seed + bool(place))
    return torch.rand(OCCLUSION_GRID, OCCLUSION_GRID, generator=generator).to(comparison.photos.device)


def _mixed(comparison: Comparison, place: int, hidden: Tensor) -> Tensor:
    """Photos float (N, 3, H, W) with parts replaced by the blurred photo; `hidden` is float (N, g, g) of 0 and 1."""
    masks = F.interpolate(hidden[:, None], comparison.size, mode="nearest-exact")
    return torch.where(masks > 0, comparison.baselines[place], comparison.photos[place])
