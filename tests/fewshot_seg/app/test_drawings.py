"""What is drawn in the page, as annotations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from episodes.types import IGNORE, DataError, SupportKind
from fewshot_seg.app.drawings import Drawing, Shape, Tool, annotation_of, read_drawing
from fewshot_seg.app.markup import drawing_json

SHAPE = (40, 60)


def drawn(kind: SupportKind, *shapes: Shape) -> Drawing:
    return Drawing(kind=kind, shapes=shapes)


class TestAnnotation:
    def test_outline_is_filled(self) -> None:
        outline = Shape("outline", ((10, 5), (30, 5), (30, 25), (10, 25)))
        expected = np.zeros(SHAPE, np.uint8)
        expected[5:26, 10:31] = 1
        assert np.array_equal(annotation_of(drawn("mask", outline), SHAPE), expected)

    def test_brush_is_all_that_is_near_the_line(self) -> None:
        marks = annotation_of(drawn("mask", Shape("brush", ((15, 20), (45, 20)), radius=6)), SHAPE)
        rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
        distance = np.hypot(columns - np.clip(columns, 15, 45), rows - 20)
        assert marks[distance < 5].all()
        assert not marks[distance > 7].any()

    def test_later_shapes_lie_on_earlier_ones(self) -> None:
        brush, eraser = Shape("brush", ((10, 20), (50, 20)), 8), Shape("eraser", ((10, 20), (30, 20)), 10)
        erased = annotation_of(drawn("mask", brush, eraser), SHAPE)
        assert not erased[20, 10:30].any()
        assert erased[20, 45] == 1
        assert annotation_of(drawn("mask", eraser, brush), SHAPE)[20, 20] == 1

    def test_scribble_knows_its_stroke_alone(self) -> None:
        marks = annotation_of(drawn("scribble", Shape("brush", ((10, 20), (50, 20)), 3)), SHAPE)
        assert set(np.unique(marks)) == {1, IGNORE}
        assert marks[20, 30] == 1

    def test_box_from_any_corner_and_beyond_the_border(self) -> None:
        expected = np.zeros(SHAPE, np.uint8)
        expected[10:40, 20:50] = IGNORE
        for points in (((20, 10), (50, 400)), ((50, 400), (20, 10)), ((50, 10), (20, 40))):
            assert np.array_equal(annotation_of(drawn("box", Shape("box", points)), SHAPE), expected)

    def test_point_and_label(self) -> None:
        marks = annotation_of(drawn("point", Shape("point", ((30, 20),))), SHAPE)
        assert marks[20, 30] == 1
        assert marks[20, 40] == IGNORE
        assert (annotation_of(drawn("label"), SHAPE) == IGNORE).all()

    @pytest.mark.parametrize("place", [(60, 20), (30, 40), (60, 40), (60, 0)])
    @pytest.mark.parametrize(("kind", "tool"), [("point", "point"), ("mask", "brush"), ("scribble", "brush")])
    def test_at_the_edge_as_the_page_sends_it(self, kind: SupportKind, tool: Tool, place: tuple[int, int]) -> None:
        marks = annotation_of(drawn(kind, Shape(tool, (place,), 0.5)), SHAPE)
        assert marks[min(place[1], 39), min(place[0], 59)] == 1

    @pytest.mark.parametrize(
        ("drawing", "message"),
        [
            (drawn("mask"), "nothing is painted yet"),
            (drawn("mask", Shape("box", ((1, 1), (9, 9)))), "nothing is painted yet"),
            (drawn("mask", Shape("brush", ((9, 9),), 3), Shape("eraser", ((9, 9),), 9)), "nothing is painted yet"),
            (drawn("scribble", Shape("brush", ((900, 900),), 3)), "no stroke"),
            (drawn("box", Shape("box", ((5, 5), (5, 30)))), "no box"),
            (drawn("point", Shape("point", ((61, 10),))), "no point"),
        ],
    )
    def test_nothing_drawn(self, drawing: Drawing, message: str) -> None:
        with pytest.raises(DataError, match=message):
            annotation_of(drawing, SHAPE)


numbers = st.floats(-1e6, 1e6) | st.integers(-(10**9), 10**9)
shapes = st.builds(
    lambda tool, points, radius: {"tool": tool, "points": points, "radius": radius},
    st.sampled_from(["outline", "brush", "eraser", "box", "point"]),
    st.lists(st.lists(numbers, min_size=2, max_size=2), min_size=3, max_size=6),
    numbers,
)


class TestReading:
    def test_what_the_page_sends_comes_back(self) -> None:
        tools: tuple[Tool, ...] = ("brush", "box")
        drawing = drawn("mask", *(Shape(tool, ((1.5, 2.0), (3.0, 4.0)), 5.0) for tool in tools))
        assert read_drawing(drawing_json(drawing)) == drawing

    @pytest.mark.parametrize(
        "value",
        [
            None,
            [],
            {"kind": "mask"},
            {"kind": "else", "shapes": []},
            {"kind": "mask", "shapes": [1]},
            {"kind": "mask", "shapes": [{"tool": "axe", "points": [[1, 2]]}]},
            {"kind": "mask", "shapes": [{"tool": "brush", "points": []}]},
            {"kind": "mask", "shapes": [{"tool": "brush", "points": [[1, 2, 3]]}]},
            {"kind": "mask", "shapes": [{"tool": "brush", "points": [[1, "2"]]}]},
            {"kind": "mask", "shapes": [{"tool": "brush", "points": [[1, True]]}]},
            {"kind": "mask", "shapes": [{"tool": "brush", "points": [[1, math.nan]]}]},
            {"kind": "mask", "shapes": [{"tool": "brush", "points": [[1, 10**400]]}]},
            {"kind": "mask", "shapes": [{"tool": "brush", "points": [[1, 1]], "radius": math.inf}]},
            {"kind": "mask", "shapes": [{"tool": "outline", "points": [[1, 1], [2, 2]]}]},
            {"kind": "mask", "shapes": [{"tool": "brush", "points": [[1, 1]]}] * 2001},
            {"kind": "mask", "shapes": [{"tool": "brush", "points": [[1, 1]] * 30_000}] * 2},
        ],
    )
    def test_anything_else_is_refused(self, value: Any) -> None:
        with pytest.raises(DataError, match="reload the page"):
            read_drawing(value)

    @given(st.sampled_from(["mask", "scribble", "box", "point", "label"]), st.lists(shapes, max_size=4))
    def test_any_numbers_give_an_annotation_or_a_message(self, kind: str, several: list[dict[str, Any]]) -> None:
        drawing = read_drawing({"kind": kind, "shapes": several})
        try:
            marks = annotation_of(drawing, SHAPE)
        except DataError:
            return
        assert marks.shape == SHAPE
        assert marks.dtype == np.uint8
        assert set(np.unique(marks)) <= {0, 1, IGNORE}
