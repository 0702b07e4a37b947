"""The small page."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from fewshot_seg.report import Figure, Section, Table, text_table, write_page

TABLE = Table(header=["method", "mIoU"], rows=[["a <b> & c", "50.0"], ["d", "7.1"]])


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.links.append(dict(attrs)["src"] or "")
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_page_is_well_formed_escaped_and_links_relative(tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "a b#1.png"
    picture.parent.mkdir()
    picture.touch()
    page = tmp_path / "index.html"
    section = Section(
        heading="x < y", paragraphs=["<script>"], table=TABLE, figures=[Figure(path=picture, caption='"quoted"')]
    )
    write_page(page, title="T & T", sections=[section])
    text = page.read_text(encoding="utf-8")
    reader = _Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.cells == ["method", "mIoU", "a <b> & c", "50.0", "d", "7.1"]
    assert [(page.parent / unquote(link)).exists() for link in reader.links] == [True]
    assert "<script>" not in text
    assert "http" not in text  # nothing is fetched from elsewhere


def test_text_table_aligns_figures_right() -> None:
    assert text_table(TABLE).splitlines() == [
        "method     mIoU",
        "---------  ----",
        "a <b> & c  50.0",
        "d           7.1",
    ]
