"""Things against their surroundings: a linear classifier of cells that holds for classes that it was not fitted to.

Of a photo that comes without any mark, a model must guess what somebody would mark. A network that learns it from some
base classes takes objects of other classes for background, as which it has seen them. A linear discriminant whose
covariance is shrunk far towards a multiple of the identity (Friedman 1989, "Regularized discriminant analysis") knows
less, little more than the difference of two means, and so is right about more classes (docs/method.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.types import DataError

SHRINKAGE = 3.0
"""Of the covariance, in units of its mean variance; chosen on held-out base classes."""
_NOT_APART, _MEND = "objects cannot be told from their surroundings", "check the masks, or train with --training joint"
_ROWS = 8192  # of cells that are taken to double precision at once


def shrunk_discriminant(
    cells: Tensor, foreground: Tensor, background: Tensor, *, shrinkage: float = SHRINKAGE
) -> tuple[Tensor, Tensor]:
    """Fisher's linear discriminant of object and background with a shrunk covariance, in closed form.

    w = (S + shrinkage * mean(diag S) * I)^-1 (m_o - m_b), where S is the mean of both sides' covariances. The logit is
    that of two normal distributions of w's scores with the means of either side and their common variance, both sides
    being equally probable beforehand.

    Args:
        cells: float (N, D), half precision will do.
        foreground, background: float (N,), shares of every cell: the weights of the cells on either side.
        shrinkage: in units of the mean variance.

    Returns:
        Weight float32 (D,) and bias float32 (): the logit is cells @ weight + bias.

    Raises:
        DataError: one of the sides has no cell, or the two cannot be told apart.
    """
    if min(float(foreground.sum()), float(background.sum())) <= 0:
        raise DataError(f"{_NOT_APART}: the photos show only one of both; {_MEND}")
    means, covariances = zip(*(_moments(cells, side) for side in (foreground, background)), strict=True)
    within = (covariances[0] + covariances[1]) / 2
    apart = means[0] - means[1]
    shrunk = within + shrinkage * within.diagonal().mean() * torch.eye(len(apart), dtype=within.dtype)
    if not bool(apart.any()) or not float(shrunk.diagonal().mean()) > 0:
        raise DataError(f"{_NOT_APART}: all cells are alike; {_MEND}")
    weight = torch.linalg.solve(shrunk, apart)
    weight = weight * (weight @ apart) / (weight @ within @ weight).clamp_min(torch.finfo(torch.float32).tiny)
    return weight.float(), -(weight @ (means[0] + means[1]) / 2).float()


def _moments(cells: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean float64 (D,) and covariance float64 (D, D), on the CPU."""
    width = cells.shape[1]
    total, mean, square = 0.0, torch.zeros(width).double(), torch.zeros(width, width).double()
    for first in range(0, len(cells), _ROWS):
        rows, share = (part[first : first + _ROWS].cpu().double() for part in (cells, weights))
        total += float(share.sum())
        mean += share @ rows
        square += rows.T @ (rows * share[:, None])
    mean = mean / total
    return mean, square / total - torch.outer(mean, mean)


class ObjectClassifier(nn.Module):
    """`shrunk_discriminant` of a photo's cells: how likely each is part of what somebody would mark.

    Nothing of it is trained by gradients: `fit` sets it.

    Args:
        feature_channels: channels D of the frozen features.

    Raises:
        DataError: fewer than one.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, *, feature_channels: int) -> None:
        super().__init__()
        if feature_channels < 1:
            raise DataError(f"a classifier of objects needs at least one feature channel, got {feature_channels}")
        self.register_buffer("weight", torch.zeros(feature_channels))
        self.register_buffer("bias", torch.zeros(()))

    def fit(self, cells: Tensor, shares: Tensor, *, shrinkage: float = SHRINKAGE) -> None:
        """Set it, in place.

        Args:
            cells: unit-length frozen cells, float (N, D), half precision will do.
            shares: float (N, C + 1), what each cell shows of C classes of objects, background last.
            shrinkage: see `shrunk_discriminant`.

        Raises:
            DataError: see `shrunk_discriminant`.
        """
        foreground, background = shares[:, :-1].float().sum(dim=1), shares[:, -1].float()
        weight, bias = shrunk_discriminant(cells, foreground, background, shrinkage=shrinkage)
        self.weight.copy_(weight)
        self.bias.copy_(bias)

    def forward(self, features: Tensor) -> Tensor:
        """Unit-length cells float (N, D, h, w) -> logits float (N, h, w)."""
        return F.conv2d(features, self.weight[None, :, None, None], self.bias[None])[:, 0]
