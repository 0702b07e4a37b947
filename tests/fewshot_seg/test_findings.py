"""Findings of an episode against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from episodes.sources import SyntheticSource
from episodes.types import IGNORE, UInt8Array
from fewshot_seg.findings import best_cut, find, other_classes


def drawn(seed: int, shape: tuple[int, int] = (7, 9)) -> tuple[torch.Tensor, torch.Tensor, UInt8Array]:
    """Margins with many equal values, a target with ignored pixels, and another class."""
    random = np.random.default_rng(seed)
    target = random.choice([0, 1, IGNORE], shape, p=[0.5, 0.4, 0.1]).astype(np.uint8)
    other = random.choice([0, 1, IGNORE], shape).astype(np.uint8)
    return torch.from_numpy(random.integers(-3, 4, shape) / 2.0), torch.from_numpy(target), other


def loop_best(margins: torch.Tensor, target: torch.Tensor) -> float:
    pixels = [(m, t) for m, t in zip(margins.flatten().tolist(), target.flatten().tolist(), strict=True) if t != IGNORE]
    if not any(t for _, t in pixels):
        return 100.0
    best = 0.0
    for threshold in {m for m, _ in pixels}:
        both = sum(m >= threshold and t == 1 for m, t in pixels)
        either = sum(m >= threshold or t == 1 for m, t in pixels)
        best = max(best, 100 * both / either)
    return best


@given(st.integers(0, 10_000))
def test_find_equals_a_loop(seed: int) -> None:
    margins, target, other = drawn(seed)
    found = find(margins, target, {4: other, 2: np.zeros_like(other), 5: other})
    rows = list(zip(margins.flatten().tolist(), target.flatten().tolist(), other.flatten().tolist(), strict=True))
    rows = [row for row in rows if row[1] != IGNORE]
    assert found.scored == len(rows)
    assert found.target == sum(t == 1 for _, t, _ in rows)
    assert found.found == sum(m > 0 for m, _, _ in rows)
    assert found.both == sum(m > 0 and t == 1 for m, t, _ in rows)
    on_other = sum(m > 0 and t == 0 and o == 1 for m, t, o in rows)
    assert found.on_others == ({4: on_other, 5: on_other} if on_other else {})
    assert found.on_any_other == on_other  # labels overlap, pixels count once
    iou = 100 * found.both / found.union if found.union else 100.0
    assert found.best_iou == pytest.approx(max(loop_best(margins, target), iou))


def test_best_cut_of_a_large_map_is_that_of_a_grid_of_it() -> None:
    margins, target, _ = drawn(3, (300, 520))
    assert best_cut(margins, target) == pytest.approx(loop_best(margins[::4, ::4], target[::4, ::4]))
    assert best_cut(margins, torch.zeros_like(target)) == 100


def test_best_cut_of_an_object_between_the_grid() -> None:
    margins, target, _ = drawn(3, (300, 520))
    target[target == 1] = 0
    target[101:104, 201:203] = 1  # the grid takes every fourth pixel
    assert not bool((target[::4, ::4] == 1).any())
    assert best_cut(margins, target) == pytest.approx(loop_best(margins, target))
    assert best_cut(margins, target) < 1


def test_votes_have_no_best_cut() -> None:
    margins, target, _ = drawn(1)
    assert find(margins, target, {}, ranked=False).best_iou is None


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_other_classes_are_where_the_square_shows_them(fit: str, tiny_source: SyntheticSource) -> None:
    shown = {image_id: tiny_source.class_masks(image_id) for image_id in tiny_source.ids("train")}
    image_id, masks = next(item for item in shown.items() if len(item[1]) > 1)
    own, other = list(masks)[:2]
    assert other_classes(tiny_source, image_id, own).keys() == masks.keys() - {own}
    squared = other_classes(tiny_source, image_id, own, side=32, fit=fit)[other]
    assert squared.shape == (32, 32)  # the photos are square: nothing is padded
    assert abs((squared == 1).mean() - (masks[other] == 1).mean()) < 0.02


def test_padding_is_no_other_class() -> None:
    class Wide(SyntheticSource):
        def class_masks(self, image_id: str) -> dict[int, UInt8Array]:
            del image_id
            return {1: np.ones((10, 40), np.uint8), 2: np.ones((10, 40), np.uint8)}

    square = other_classes(Wide(), "any", 1, side=20, fit="pad")[2]
    assert (square[:5] == 1).all()
    assert (square[5:] == IGNORE).all()
