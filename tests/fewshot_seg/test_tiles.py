"""Tiles that cover a photo, and their blend, against plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewshot_seg.tiles import Tile, blend_tiles, cut_tiles

SHAPES = st.tuples(st.integers(1, 50), st.integers(1, 50))
SIDES = st.integers(1, 30)


@settings(deadline=None)
@given(SHAPES, SIDES)
def test_every_pixel_is_in_a_tile_of_the_size_asked_for(shape: tuple[int, int], side: int) -> None:
    tiles, covered = cut_tiles(shape, side), np.zeros(shape, int)
    if max(shape) <= side:
        assert tiles == ()
        return
    for tile in tiles:
        assert (tile.height, tile.width) == (min(side, shape[0]), min(side, shape[1]))
        assert 0 <= tile.top <= shape[0] - tile.height
        assert 0 <= tile.left <= shape[1] - tile.width
        covered[tile.rows, tile.columns] += 1
    assert covered.min() >= 1
    assert len(set(tiles)) == len(tiles)


@given(st.integers(8, 300), st.integers(8, 60))
def test_neighbours_overlap_by_a_quarter_and_no_more_tiles_than_needed(length: int, side: int) -> None:
    tops = [tile.top for tile in cut_tiles((length, side), side)]
    assert all(after - before <= side * 0.75 + 1 for before, after in itertools.pairwise(tops))
    if len(tops) > 1:  # one tile less would leave too little overlap
        assert (length - side) / int(side * 0.75) > len(tops) - 2


@settings(deadline=None)
@given(SHAPES, SIDES, st.floats(-5, 5, width=32))
def test_what_all_tiles_say_the_blend_says(shape: tuple[int, int], side: int, value: float) -> None:
    tiles = cut_tiles(shape, side)
    if tiles:
        maps = (torch.full((tile.height, tile.width), value) for tile in tiles)
        torch.testing.assert_close(blend_tiles(maps, tiles, shape), torch.full(shape, value))


@pytest.mark.parametrize(("shape", "side"), [((13, 31), 10), ((20, 9), 9), ((5, 12), 7)])
def test_blend_equals_a_plain_loop(shape: tuple[int, int], side: int) -> None:
    tiles = cut_tiles(shape, side)
    assert len(tiles) > 1
    maps = torch.randn(len(tiles), tiles[0].height, tiles[0].width, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(shape)
    for y in range(shape[0]):
        for x in range(shape[1]):
            total = weights = 0.0
            for tile, values in zip(tiles, maps, strict=True):
                row, column = y - tile.top, x - tile.left
                if 0 <= row < tile.height and 0 <= column < tile.width:
                    weight = min(row + 1, tile.height - row) * min(column + 1, tile.width - column)
                    total, weights = total + weight * float(values[row, column]), weights + weight
            expected[y, x] = total / weights
    torch.testing.assert_close(blend_tiles(maps, tiles, shape), expected)


def test_tiles_are_spaced_evenly() -> None:
    assert [tile.left for tile in cut_tiles((10, 250), 100)] == [0, 75, 150]
    assert cut_tiles((10, 250), 100)[0] == Tile(top=0, left=0, height=10, width=100)
