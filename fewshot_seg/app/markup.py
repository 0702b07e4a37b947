"""Pieces of HTML for the page. All that people name is escaped; pictures are inside, so that no file is left behind."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from episodes.types import UInt8Array
from fewshot_seg.app.drawings import Drawing
from fewshot_seg.app.session import Example, View

NOTHING_FOUND_YET = '<div class="nothing">Masks and attention come here.</div>'


def data_uri(picture: UInt8Array) -> str:
    """uint8 (H, W, 3) as a JPEG in a ``data:`` address."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def photos_prop(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """The examples as ``marking.js`` reads them."""
    return [
        {
            "number": one.number,
            "name": one.name,
            "uri": data_uri(one.pixels),
            "drawing": None if one.drawing is None else drawing_json(one.drawing),
        }
        for one in examples
    ]


def drawing_json(drawing: Drawing) -> dict[str, Any]:
    """What `drawings.read_drawing` reads."""
    shapes = [
        {"tool": one.tool, "points": [list(point) for point in one.points], "radius": one.radius}
        for one in drawing.shapes
    ]
    return {"kind": drawing.kind, "shapes": shapes}


def problems(lines: Sequence[str]) -> str:
    """What was refused, one box for each."""
    return "".join(f'<div class="said problem" role="alert">{escape(line)}</div>' for line in lines)


def query_list(names: Sequence[str]) -> str:
    """The photos to search, by name."""
    if not names:
        return ""
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    count = f"{len(names)} photo{'s' * (len(names) > 1)} to search:"
    return f'<div class="said"><strong>{count}</strong> {escape(shown)}</div>'


def results(views: Sequence[View], name: str) -> str:
    """Cards: mask and attention of each photo side by side."""
    return f'<div class="results">{"".join(_card(one, name) for one in views)}</div>'


def _card(view: View, name: str) -> str:
    photo, what = escape(view.name), escape(name)
    found = f"{what}: {_percent(view.share)} of the photo, confidence {view.confidence:.2f}"
    return (
        f'<section class="result" aria-label="{photo}"><header><strong>{photo}</strong>'
        f"<span>{found if view.share else f'no {what} at this threshold'}</span></header>"
        f'<div class="pair"><figure><img src="{data_uri(view.overlay)}" alt="{photo} with the mask of {what}">'
        "<figcaption>Mask</figcaption></figure>"
        f'<figure><img src="{data_uri(view.attention)}" alt="{photo} with the attention">'
        '<figcaption>Attention: low<span class="scale"></span>high</figcaption></figure></div></section>'
    )


def _percent(share: float) -> str:
    return "less than 1%" if share < 0.01 else f"{100 * share:.0f}%"
