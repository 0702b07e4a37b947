"""Classes that compete for the pixels of one photo."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def compete(margins: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Which class has each pixel: the one that is furthest above its threshold, if any is.

    As `n_way.n_way_masks` decides in episodes of several ways; of equal classes the first has the pixel. Margins are
    read one at a time, so that two maps are in memory however many classes there are.

    Args:
        margins: float (H, W), logit less threshold, of each class; one or more.

    Returns:
        uint8 (H, W), 0 = background, n = class n, from 1; and the largest margin of each pixel, float (H, W).

    Example:
        >>> labels, best = compete([torch.tensor([[-1.0, 2.0, 1.0]]), torch.tensor([[-2.0, 3.0, 1.0]])])
        >>> labels.tolist(), best.tolist()
        ([[0, 2, 1]], [[-1.0, 3.0, 1.0]])
    """
    each = iter(margins)
    best = next(each)
    labels = (best > 0).to(torch.uint8)
    for number, margin in enumerate(each, 2):
        ahead = margin > best
        best = torch.where(ahead, margin, best)
        labels = torch.where(ahead & (margin > 0), torch.tensor(number, dtype=torch.uint8), labels)
    return labels, best
