from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.guided_upsampling import guided_margins


def photo(seed: int, height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def by_windows(margins: Tensor, guide: Tensor, radius: int, epsilon: float) -> Tensor:
    """He et al., eq. 14 to 16, window by window, by numpy's least squares."""
    answer, colours = margins[0].sigmoid().double().numpy(), guide[0].permute(1, 2, 0).double().numpy()
    height, width = answer.shape
    slopes, offsets = np.zeros((height, width, 3)), np.zeros((height, width))

    def window(row: int, column: int) -> tuple[slice, slice]:
        return slice(max(0, row - radius), row + radius + 1), slice(max(0, column - radius), column + radius + 1)

    for row in range(height):
        for column in range(width):
            seen, asked = colours[window(row, column)].reshape(-1, 3), answer[window(row, column)].ravel()
            centred = seen - seen.mean(0)
            variance = centred.T @ centred / len(seen) + epsilon * np.eye(3)
            slope = np.linalg.solve(variance, centred.T @ (asked - asked.mean()) / len(seen))
            slopes[row, column], offsets[row, column] = slope, asked.mean() - slope @ seen.mean(0)
    found = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            inside = window(row, column)
            found[row, column] = slopes[inside].reshape(-1, 3).mean(0) @ colours[row, column] + offsets[inside].mean()
    return torch.from_numpy(found).clamp(1e-3, 1 - 1e-3).logit()[None]


def test_equals_plain_windows() -> None:
    guide, margins = photo(0, 9, 11), 3 * torch.randn(1, 9, 11, generator=torch.Generator().manual_seed(1))
    found = guided_margins(margins, guide, (9, 11), radius=2, epsilon=0.01)
    torch.testing.assert_close(found.double(), by_windows(margins, guide, 2, 0.01), atol=1e-3, rtol=1e-3)


def test_moves_a_blurred_edge_to_that_of_the_photo() -> None:
    guide = torch.zeros(1, 3, 40, 40)
    guide[..., 20:] = 1
    margins = ((torch.arange(40) - 17.0) / 4).expand(1, 40, 40)  # three pixels beside it
    found = guided_margins(margins, guide, (40, 40)) > 0
    assert torch.equal(found[0, 20], torch.arange(40) >= 20)
    assert not torch.equal(margins[0, 20] > 0, torch.arange(40) >= 20)


def test_applies_coefficients_of_a_small_copy_to_the_photo_itself() -> None:
    guide = torch.zeros(1, 3, 80, 80)
    guide[..., 41:] = 1  # in the middle of a pixel of the small copy
    margins = ((torch.arange(80) - 36.0) / 8).expand(1, 80, 80)
    found = guided_margins(margins, guide, (40, 40)) > 0
    assert torch.equal(found[0, 40], torch.arange(80) >= 41)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), value=st.floats(-5, 5), height=st.integers(2, 20), width=st.integers(2, 20))
def test_a_constant_stays_whatever_the_photo(seed: int, value: float, height: int, width: int) -> None:
    found = guided_margins(torch.full((1, height, width), value), photo(seed, height, width), (8, 8))
    torch.testing.assert_close(found, torch.full_like(found, value), atol=1e-3, rtol=1e-3)


def test_a_flat_photo_smooths_and_stays_finite() -> None:
    margins = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    found = guided_margins(margins, torch.full((2, 3, 16, 16), 0.5), (16, 16))
    assert bool(found.isfinite().all())
    assert float(found.std()) < float(margins.std())


def test_photos_of_a_batch_do_not_touch_each_other() -> None:
    guide = torch.cat([photo(0, 12, 12), photo(1, 12, 12)])
    margins = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(0))
    both = guided_margins(margins, guide, (12, 12))
    alone = guided_margins(margins[1:], guide[1:], (12, 12))
    torch.testing.assert_close(both[1:], alone)


@pytest.mark.parametrize(
    ("margins", "guide", "options", "message"),
    [
        ((1, 4, 4), (1, 3, 4, 5), {}, r"expected margins \(B, H, W\) and photos \(B, 3, H, W\)"),
        ((4, 4), (1, 3, 4, 4), {}, r"expected margins \(B, H, W\)"),
        ((1, 4, 4), (1, 3, 4, 4), {"radius": 0}, "radius of at least 1"),
        ((1, 4, 4), (1, 3, 4, 4), {"epsilon": 0.0}, "epsilon above 0"),
    ],
)
def test_refuses(margins: tuple[int, ...], guide: tuple[int, ...], options: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        guided_margins(torch.zeros(margins), torch.zeros(guide), (4, 4), **options)  # type: ignore[arg-type]
