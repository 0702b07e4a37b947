"""Condensing support cells: fewer of them, the same weight, about the same densities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.condensation import condense_cells
from fewshot_seg.priors import soft_margin


def groups(count: int, size: int, *, spread: float, seed: int) -> Tensor:
    """Unit-length cells (count * size, 24) around `count` directions."""
    random = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(count, 1, 24, generator=random), dim=2)
    return F.normalize(centres + spread * torch.randn(count, size, 24, generator=random), dim=2).flatten(0, 1)


def weights(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Shares of both sides, some cells wholly of one."""
    random = torch.Generator().manual_seed(seed)
    foreground = (torch.rand(count, generator=random) * 2 - 0.5).clamp(0, 1)
    return foreground, 1 - foreground


@settings(max_examples=40, deadline=None)
@given(count=st.integers(3, 60), limit=st.integers(2, 70), seed=st.integers(0, 1000))
def test_at_most_the_limit_and_the_whole_weight_of_both_sides(count: int, limit: int, seed: int) -> None:
    cells, (foreground, background) = groups(count, 1, spread=0.1, seed=seed), weights(count, seed=seed)
    found = condense_cells(cells, foreground, background, limit=limit)
    assert len(found[0]) == len(found[1]) == len(found[2]) <= max(limit, 2)
    torch.testing.assert_close(found[1].sum(), foreground.sum())
    torch.testing.assert_close(found[2].sum(), background.sum())
    if count > limit:
        assert not bool(((found[1] > 0) & (found[2] > 0)).any())


def test_what_is_few_stays_as_it_is() -> None:
    cells, sides = groups(5, 2, spread=0.1, seed=0), weights(10, seed=0)
    found = condense_cells(cells, *sides, limit=10)
    assert all(torch.equal(one, other) for one, other in zip(found, (cells, *sides), strict=True))


def test_a_side_with_few_cells_leaves_its_share_to_the_other() -> None:
    cells = groups(40, 1, spread=0.1, seed=1)
    foreground = torch.zeros(40)
    foreground[:3] = 1.0
    condensed, of_object, of_other = condense_cells(cells, foreground, 1 - foreground, limit=20)
    assert torch.equal(condensed[:3], cells[:3])
    assert int((of_object > 0).sum()) == 3
    assert 10 < int((of_other > 0).sum()) <= 17
    everything = condense_cells(cells, torch.ones(40), torch.zeros(40), limit=20)
    assert 10 < len(everything[0]) <= 20


def test_a_single_group_is_its_weighted_mean_between_both_lengths() -> None:
    cells, share = groups(1, 6, spread=0.3, seed=2), torch.tensor([1.0, 1, 1, 0.5, 0, 0])
    condensed, of_object, _ = condense_cells(cells, share, torch.tensor([0.0, 0, 0, 0, 1, 1]), limit=2)
    mean = (cells * share[:, None]).sum(dim=0) / 3.5
    torch.testing.assert_close(condensed[0], mean / mean.norm().sqrt())
    assert mean.norm() < condensed[0].norm() < 1
    assert of_object[0] == 3.5


@pytest.mark.parametrize("spread", [0.02, 0.05])
def test_the_soft_margin_hardly_changes(spread: float) -> None:
    """20 groups of 12 cells by 60: within a twentieth."""
    cells = groups(20, 12, spread=spread, seed=3)
    foreground = torch.cat([torch.ones(120), torch.zeros(120)])
    queries = groups(20, 4, spread=spread, seed=3)[None]
    condensed, *sides = condense_cells(cells, foreground, 1 - foreground, limit=60)
    exact = soft_margin(queries, cells[None], foreground[None], 1 - foreground[None], temperature=0.05)
    found = soft_margin(queries, condensed[None], sides[0][None], sides[1][None], temperature=0.05)
    assert exact.abs().max() > 5
    assert (found - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_is_the_same_every_time_and_leaves_the_global_state_alone() -> None:
    cells, sides = groups(30, 2, spread=0.1, seed=4), weights(60, seed=4)
    before = torch.random.get_rng_state()
    first, second = (condense_cells(cells, *sides, limit=11) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_limit_that_leaves_no_room() -> None:
    with pytest.raises(DataError, match="support cells must be at least 2, one of each side; got 1"):
        condense_cells(groups(3, 1, spread=0.1, seed=0), *weights(3, seed=0), limit=1)
