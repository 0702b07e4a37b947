"""From a coarse margin to the photo's own edges: a guided filter whose guide is the photo.

The decoder answers on a grid of cells of 16 pixels, and a bilinear enlargement has round edges. The guided filter (He,
Sun, Tang, "Guided Image Filtering", TPAMI 2013, eq. 14 to 16) fits, around every pixel, the answer as a linear function
of the photo's colours, so that it changes where they do. Its fast form (He and Sun, arXiv 1505.00996) fits on a small
copy and applies the enlarged coefficients to the photo itself, whatever its size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.types import DataError

PIXELS_PER_CELL = 4
"""Of the small copy, per cell of the decoder's grid."""

_LEAST_PROBABILITY = 1e-3


def guided_margins(
    margins: Tensor, photos: Tensor, working: tuple[int, int], *, radius: int = 6, epsilon: float = 1e-4
) -> Tensor:
    """Margins that follow the photo's edges.

    What is filtered is the probability: a margin far from 0 says no more than that it is sure.

    Args:
        margins: float (B, H, W), enlarged bilinearly; foreground where greater than 0.
        photos: float (B, 3, H, W), RGB in [0, 1].
        working: (h, w) of the small copy that coefficients are fitted on; sides of photos that are smaller stay as they
            are. `PIXELS_PER_CELL` per cell is enough for margins that are smooth at that scale.
        radius: of the window, in pixels of the small copy.
        epsilon: variance of colours below which a window counts as flat.

    Returns:
        float (B, H, W), within [-6.9, 6.9].

    Raises:
        DataError: shapes that do not fit, a radius below 1, or an epsilon that is not positive.
    """
    if margins.dim() != 3 or photos.shape != (len(margins), 3, *margins.shape[1:]):
        raise DataError(
            f"expected margins (B, H, W) and photos (B, 3, H, W), got {tuple(margins.shape)} and {tuple(photos.shape)}"
        )
    if radius < 1 or epsilon <= 0:
        raise DataError(f"guided filter needs a radius of at least 1 and an epsilon above 0, got {radius}, {epsilon}")
    height, width = margins.shape[1:]
    size = (min(working[0], height), min(working[1], width))
    answers = F.interpolate(margins.sigmoid()[:, None], size, mode="bilinear", align_corners=False)
    guide = photos if size == (height, width) else F.interpolate(photos, size, mode="area")
    # windows of equal colours leave differences of nearly equal numbers: float32 has too few digits for these
    slope, offset = (one.to(margins.dtype) for one in _coefficients(answers.double(), guide.double(), radius, epsilon))
    slope, offset = (
        F.interpolate(one, (height, width), mode="bilinear", align_corners=False) for one in (slope, offset)
    )
    found = ((slope * photos).sum(dim=1) + offset[:, 0]).clamp(_LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
    return found.logit()


def _coefficients(answers: Tensor, guide: Tensor, radius: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Mean slope (B, 3, h, w) and offset (B, 1, h, w) of the windows that a pixel is in (He et al., eq. 14 to 16)."""
    red, green, blue = guide[:, :1], guide[:, 1:2], guide[:, 2:]
    products = torch.cat([red * red, red * green, red * blue, green * green, green * blue, blue * blue], dim=1)
    means = _window_mean(torch.cat([guide, answers, guide * answers, products], dim=1), radius)
    mean, answer, with_answer, products = means[:, :3], means[:, 3:4], means[:, 4:7], means[:, 7:]
    first, second, third = mean[:, :1], mean[:, 1:2], mean[:, 2:]
    own = torch.cat([first * first, first * second, first * third, second * second, second * third, third * third], 1)
    slope = _solve_symmetric(products - own, with_answer - mean * answer, epsilon)
    offset = answer - (slope * mean).sum(dim=1, keepdim=True)
    both = _window_mean(torch.cat([slope, offset], dim=1), radius)
    return both[:, :3], both[:, 3:]


def _solve_symmetric(upper: Tensor, right: Tensor, epsilon: float) -> Tensor:
    """x of (A + epsilon 1) x = b for a 3 x 3 matrix per pixel, by its adjugate: much faster than a general solver.

    Args:
        upper: (B, 6, h, w), A's entries 00, 01, 02, 11, 12, 22.
        right: (B, 3, h, w), b.
        epsilon: > 0.
    """
    a, b, c, d, e, f = upper.unbind(dim=1)
    a, d, f = a + epsilon, d + epsilon, f + epsilon
    rows = (
        (d * f - e * e, c * e - b * f, b * e - c * d),
        (c * e - b * f, a * f - c * c, b * c - a * e),
        (b * e - c * d, b * c - a * e, a * d - b * b),
    )
    determinant = a * rows[0][0] + b * rows[0][1] + c * rows[0][2]
    x, y, z = right.unbind(dim=1)
    return torch.stack([(row[0] * x + row[1] * y + row[2] * z) / determinant for row in rows], dim=1)


def _window_mean(maps: Tensor, radius: int) -> Tensor:
    """Mean over windows of 2 radius + 1 pixels a side, cut at the border: float (B, C, h, w), same shape."""
    side = 2 * radius + 1
    rows = F.avg_pool2d(maps, (side, 1), stride=1, padding=(radius, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, side), stride=1, padding=(0, radius), count_include_pad=False)
