"""A small page of tables and pictures: one HTML file, no scripts, pictures beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from fewshot_seg.runtime import atomic_path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1660px; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid #ddd; text-align: left; }
td:not(:first-child), th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; border: 1px solid #ddd; }
figcaption { color: #555; }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Header and rows of text; the first column is a name, the others are figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A picture file and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading, paragraphs, at most one table, and figures."""

    heading: str
    paragraphs: Sequence[str] = ()
    table: Table | None = None
    figures: Sequence[Figure] = ()


def text_table(table: Table) -> str:
    """The table for a terminal: first column flush left, the others flush right.

    >>> print(text_table(Table(header=["method", "mIoU"], rows=[["ours", "50.0"]])))
    method  mIoU
    ------  ----
    ours    50.0
    """
    columns = list(zip(table.header, *table.rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = [table.header, ["-" * width for width in widths], *table.rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write_page(path: Path, *, title: str, sections: Sequence[Section]) -> None:
    """Write the page; figures are linked relative to it, all text is escaped."""
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(_section(section, path.parent) for section in sections),
        "</body></html>",
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _section(section: Section, folder: Path) -> str:
    parts = [f"<h2>{escape(section.heading)}</h2>"]
    parts += [f"<p>{escape(paragraph)}</p>" for paragraph in section.paragraphs]
    if section.table is not None:
        parts.append(f"<table><thead>{_row(section.table.header, 'th')}</thead><tbody>")
        parts += [_row(row, "td") for row in section.table.rows]
        parts.append("</tbody></table>")
    for figure in section.figures:
        link = quote(Path(os.path.relpath(figure.path, folder)).as_posix())
        caption = escape(figure.caption)
        parts.append(
            f'<figure><img src="{link}" alt="{caption}" loading="lazy"><figcaption>{caption}</figcaption></figure>'
        )
    return "\n".join(parts)


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
