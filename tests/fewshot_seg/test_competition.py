"""Competing classes, against the rule of the N-way evaluation and a plain loop."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewshot_seg.competition import compete
from fewshot_seg.n_way import n_way_masks


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000))
def test_as_in_episodes_of_several_ways(classes: int, seed: int) -> None:
    # few values, so that classes are often equal, and often 0
    margins = torch.randint(-2, 3, (classes, 6, 7), generator=torch.Generator().manual_seed(seed)).float()
    labels, best = compete(iter(margins))
    expected = n_way_masks(margins[None], margins[None], torch.arange(classes)[None])[0]
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), expected)
    assert torch.equal(best, margins.amax(dim=0))


def test_plain_loop() -> None:
    margins = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    labels, _ = compete(margins)
    for y in range(5):
        for x in range(4):
            values = [0.0, *margins[:, y, x].tolist()]
            assert int(labels[y, x]) == values.index(max(values))
