"""Generated pictures to try the page with, for those who have no photo at hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from episodes.sources import SyntheticSource
from episodes.types import UInt8Array
from fewshot_seg.app.drawings import Drawing, Shape

_SIDE, _SEED, _QUERIES = 384, 0, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticExample:
    """What the object is called, a picture uint8 (S, S, 3) of it with an outline, and pictures to search by name."""

    name: str
    support: UInt8Array
    drawing: Drawing
    queries: dict[str, UInt8Array]


@cache
def synthetic_example() -> SyntheticExample:
    """The same at any time."""
    source = SyntheticSource(seed=_SEED, size=_SIDE, images_per_class=_QUERIES + 1)
    by_class: dict[int, list[str]] = {}
    for image_id in source.ids("val"):
        areas = source.class_areas(image_id)
        by_class.setdefault(max(areas, key=lambda one: areas[one]), []).append(image_id)
    class_id, images = next((one, ids) for one, ids in by_class.items() if len(ids) > _QUERIES)
    return SyntheticExample(
        name=source.class_names[class_id],
        support=source.image(images[0]),
        drawing=outlined(source.mask(images[0], class_id)),
        queries={f"picture-{number}.jpg": source.image(one) for number, one in enumerate(images[1 : _QUERIES + 1], 1)},
    )


def outlined(mask: UInt8Array) -> Drawing:
    """A mask uint8 (H, W), 1 = object, as outlines of its regions, as if it had been drawn in the page."""
    contours, _ = cv2.findContours((mask == 1).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    shapes = [Shape("outline", tuple((float(x), float(y)) for x, y in one[:, 0])) for one in contours if len(one) > 2]
    return Drawing(kind="mask", shapes=tuple(shapes))
