"""Contact sheets of episodes: what a network sees, after augmentation and as the supports are marked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from episodes.progress import tqdm
from episodes.types import DataError, EpisodeBatch, SupportKind, UInt8Array
from fewshot_seg.pictures import (
    BACKGROUND,
    OBJECT,
    TRUTH,
    Colour,
    Panel,
    overlay_annotation,
    overlay_mask,
    panel_sheet,
    write_picture,
)

_PANELS_IN_ROW = 7  # a page stays below 2000 pixels
_LEGEND_HEIGHT = 30
_LEGEND: tuple[tuple[Colour, str], ...] = (
    (OBJECT, "object in a support"),
    (TRUTH, "object in a query"),
    (BACKGROUND, "known background"),
    ((128, 128, 128), "ignored"),
    ((45, 45, 45), "not known"),
)


def draw_episodes(batch: EpisodeBatch, captions: Sequence[str]) -> UInt8Array:
    """Episodes below each other, uint8 (H, W, 3): caption, K supports as they are marked, query with its mask.

    Supports marked by a mask show the object tinted and ignored pixels greyed; others are drawn by
    `overlay_annotation`. More than six supports go on in a second row. W stays below 2000.

    Args:
        batch: B episodes of K shots.
        captions: B lines; what does not fit is cut off.

    Raises:
        DataError: not one caption per episode.
    """
    if len(captions) != len(batch):
        raise DataError(f"expected one caption per episode, got {len(captions)} for {len(batch)} episodes")
    return np.concatenate([_draw_episode(batch, b, caption) for b, caption in enumerate(captions)])


def _draw_episode(batch: EpisodeBatch, b: int, caption: str) -> UInt8Array:
    spec = batch.specs[b]
    panels = []
    for k, image_id in enumerate(spec.support_ids):
        image, marked = _as_picture(batch.support_images[b, k]), batch.support_masks[b, k].cpu().numpy()
        overlay = overlay_mask if bool(batch.support_dense[b, k]) else overlay_annotation
        panels.append(Panel(picture=overlay(image, marked), label=image_id))
    query, mask = _as_picture(batch.query_images[b]), batch.query_masks[b].cpu().numpy()
    panels.append(Panel(picture=overlay_mask(query, mask, TRUTH), label=f"query {spec.query_id}"))
    rows = [panels[first : first + _PANELS_IN_ROW] for first in range(0, len(panels), _PANELS_IN_ROW)]
    return panel_sheet(rows, caption)


def _as_picture(image: Tensor) -> UInt8Array:
    picture: UInt8Array = image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    return picture


def write_contact_sheets(
    folder: Path,
    batches: Iterable[EpisodeBatch],
    *,
    class_names: Mapping[int, str],
    kinds: Sequence[tuple[SupportKind, ...]],
    rows_per_page: int = 6,
    show_progress: bool = False,
) -> list[Path]:
    """Write episodes in order to ``page-001.png``, ``page-002.png`` and so on.

    Args:
        folder: created when missing.
        batches: of one or more episodes each; loaded one by one, so that only a page is held at a time.
        class_names: class id -> name.
        kinds: per episode, how each of its supports is marked.
        rows_per_page: episodes on a page.
        show_progress: bar on stderr.

    Returns:
        The pages, in order.

    Raises:
        DataError: rows_per_page below 1, a class without a name, or kinds that do not belong to the episodes.
    """
    if rows_per_page < 1:
        raise DataError(f"rows per page must be at least 1, got {rows_per_page}")
    pages: list[Path] = []
    rows: list[UInt8Array] = []
    number = 0
    with tqdm(total=len(kinds), desc="drawing", unit="episode", disable=not show_progress) as progress:
        for batch in batches:
            captions = _captions(batch, number, class_names, kinds)
            for b, caption in enumerate(captions):
                rows.append(_draw_episode(batch, b, caption))
                if len(rows) == rows_per_page:
                    pages.append(_write_page(folder, len(pages) + 1, rows))
                    rows = []
            number += len(batch)
            progress.update(len(batch))
    if rows:
        pages.append(_write_page(folder, len(pages) + 1, rows))
    if number != len(kinds):
        raise DataError(f"expected the kinds of supports of {number} episodes, got those of {len(kinds)}")
    return pages


def _captions(
    batch: EpisodeBatch, first: int, class_names: Mapping[int, str], kinds: Sequence[tuple[SupportKind, ...]]
) -> list[str]:
    if first + len(batch) > len(kinds):
        raise DataError(f"expected the kinds of supports of every episode, got those of {len(kinds)} only")
    captions = []
    for number, spec in enumerate(batch.specs, first):
        if spec.class_id not in class_names:
            raise DataError(f"class {spec.class_id} of episode {number} has no name among {sorted(class_names)}")
        if len(kinds[number]) != spec.shots:
            raise DataError(f"expected {spec.shots} kinds of supports for episode {number}, got {len(kinds[number])}")
        shown = kinds[number][:1] if len(set(kinds[number])) == 1 else kinds[number]
        captions.append(f"{number}: {class_names[spec.class_id]}, marked by {', '.join(shown)}")
    return captions


def _write_page(folder: Path, number: int, rows: Sequence[UInt8Array]) -> Path:
    width = max(row.shape[1] for row in rows)
    legend = _legend(width)
    page = [legend, *rows]
    width = max(width, legend.shape[1])
    filled = [np.pad(part, ((0, 0), (0, width - part.shape[1]), (0, 0)), constant_values=255) for part in page]
    path = folder / f"page-{number:03d}.png"
    write_picture(path, np.concatenate(filled))
    return path


def _legend(width: int) -> UInt8Array:
    """One line that names the colours, at least `width` wide."""
    font = ImageFont.load_default(14)
    room = [round(font.getlength(words)) + 40 for _, words in _LEGEND]
    strip = Image.new("RGB", (max(width, sum(room) + 10), _LEGEND_HEIGHT), "white")
    ink, left = ImageDraw.Draw(strip), 10
    for (colour, words), step in zip(_LEGEND, room, strict=True):
        ink.rectangle((left, 9, left + 13, 22), fill=colour)
        ink.text((left + 19, 7), words, fill=(20, 20, 20), font=font)
        left += step
    return np.asarray(strip)
