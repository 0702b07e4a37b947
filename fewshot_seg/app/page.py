"""The page, built with gradio: controls, and what they ask of a `Session`. Nothing is decided here."""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Awaitable, Callable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from episodes.types import DataError
from fewshot_seg.app import markup
from fewshot_seg.app.downloads import write_downloads
from fewshot_seg.app.drawings import Drawing, read_drawing
from fewshot_seg.app.limits import Limits
from fewshot_seg.app.session import Session
from fewshot_seg.app.sessions import Sessions
from fewshot_seg.app.synthetic_example import synthetic_example
from fewshot_seg.photos import PHOTO_SUFFIXES
from fewshot_seg.pictures import write_picture

RESULTS_A_PAGE = 6
"""Queries that are shown, and cut anew when the threshold moves, at a time."""

_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def theme() -> gr.themes.Base:
    """Fonts of the system: others would have to be fetched."""
    plain = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
    made = gr.themes.Default(primary_hue="blue", font=plain, font_mono=["ui-monospace", "monospace"])
    return made.set(  # readable by everybody: at least 4.5 to 1
        button_primary_background_fill="#0b5cad",
        button_primary_background_fill_hover="#084a8c",
        button_primary_background_fill_dark="#1d6fc4",
        button_primary_background_fill_hover_dark="#0b5cad",
        body_text_color_subdued="#4b5563",
        body_text_color_subdued_dark="#c0c6d0",
        block_label_text_color="#374151",
        block_label_text_color_dark="#d1d5db",
        block_title_text_color="#374151",
        block_title_text_color_dark="#d1d5db",
    )


def text_of(name: str) -> str:
    """A file of this package."""
    return (files("fewshot_seg.app") / name).read_text("utf-8")


def drawings_of(value: Any) -> dict[int, Drawing]:
    """What ``marking.js`` sends, by the examples' numbers.

    Raises:
        DataError: it is something else.
    """
    sent = value.get("drawings") if isinstance(value, dict) else None
    if not isinstance(sent, dict) or not all(str(key).isdecimal() and len(key) < 10 for key in sent):
        return {}
    return {int(key): read_drawing(one) for key, one in list(sent.items())[:100]}


def _said(listener: Callable[..., Any]) -> Callable[..., Any]:
    """What cannot be done now is told in a corner of the page, and nothing else of it changes."""

    @functools.wraps(listener)
    def told(*arguments: Any) -> Any:
        try:
            return listener(*arguments)
        except DataError as error:
            gr.Warning(escape(str(error)), title="Not now")
            return gr.skip()

    return told


class _Page:
    """The listeners: each takes what the controls hold and returns what they shall show."""

    def __init__(self, sessions: Sessions, model_flags: Sequence[str]) -> None:
        self._sessions, self._model_flags = sessions, model_flags

    def _session(self, request: gr.Request) -> Session:
        return self._sessions.get(str(request.session_hash))

    def add_examples(self, uploads: Sequence[str] | None, request: gr.Request) -> tuple[Any, ...]:
        session = self._session(request)
        refused = _take(uploads, session.add_examples)
        return None, _photos(session), markup.problems(refused)

    @_said
    def remove_example(self, event: gr.EventData, request: gr.Request) -> Any:
        session = self._session(request)
        number = event._data.get("number") if isinstance(event._data, dict) else None
        if isinstance(number, int):
            session.remove_example(number)
        return _photos(session)

    def add_queries(self, uploads: Sequence[str] | None, request: gr.Request) -> tuple[Any, ...]:
        session = self._session(request)
        refused = _take(uploads, session.add_queries)
        return None, _queries(session, refused)

    @_said
    def start_again(self, request: gr.Request) -> tuple[Any, ...]:
        session = self._session(request)
        session.start_again()
        return (_photos(session), "", "", "", markup.NOTHING_FOUND_YET, *_hidden())

    @_said
    def clear_queries(self, request: gr.Request) -> tuple[Any, ...]:
        session = self._session(request)
        session.clear_queries()
        return ("", markup.NOTHING_FOUND_YET, *_hidden())

    @_said
    def try_example(self, request: gr.Request) -> tuple[Any, ...]:
        session, example = self._session(request), synthetic_example()
        with session.turn():
            session.start_again()
            session.add_example("example.png", example.support, example.drawing)
            for name, picture in example.queries.items():
                write_picture(session.folder / "example" / name, picture)
            refused = session.add_queries(session.folder / "example" / name for name in example.queries)
        return _photos(session), example.name, "", _queries(session, refused)

    def find(
        self,
        drawn: Any,
        name: str,
        threshold: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - gradio looks for it here
    ) -> tuple[Any, ...]:
        session = self._session(request)
        try:
            found = session.find(
                drawings_of(drawn), name, progress=lambda done, count: progress((done, count), unit="photos")
            )
            cards = self._cards(session, threshold, 1)
        except DataError as error:
            return (gr.skip(), markup.problems([str(error)]), *(gr.skip() for _ in range(4)))
        pages = -(-len(found.looked) // RESULTS_A_PAGE)
        return (
            cards,
            "",
            gr.update(visible=True),
            gr.update(maximum=max(2, pages), value=1, visible=pages > 1),
            gr.update(visible=True),
            gr.update(visible=False, value=None),
        )

    @_said
    def cut(self, threshold: float, page: float, request: gr.Request) -> Any:
        session = self._session(request)
        if session.findings is None:
            return gr.skip()
        return self._cards(session, threshold, int(page))

    def _cards(self, session: Session, threshold: float, page: int) -> str:
        with session.turn():
            found = session.found()
            first = max(0, min((page - 1) * RESULTS_A_PAGE, len(found.looked) - 1))
            numbers = range(first, min(first + RESULTS_A_PAGE, len(found.looked)))
            return markup.results(session.views(threshold, numbers), found.name)

    def make_files(self, threshold: float, request: gr.Request) -> tuple[Any, ...]:
        session = self._session(request)
        try:
            made = write_downloads(session, threshold)
        except DataError as error:
            return gr.skip(), markup.problems([str(error)])
        flags = ["--support-set", made.support.name, "--threshold", f"{threshold:g}", *self._model_flags]
        command = f"`fewshot-seg predict {shlex.join(flags)} --query photos/` finds the same in a whole folder."
        return gr.update(visible=True, value=[str(made.masks), str(made.coco), str(made.support)]), command

    def leave(self, request: gr.Request) -> None:
        self._sessions.drop(str(request.session_hash))


def _take(uploads: Sequence[str] | None, add: Any) -> list[str]:
    """Uploads are copied or refused, then deleted: the upload's own folder keeps none."""
    paths = [Path(one) for one in uploads or ()]
    try:
        refused: list[str] = add(paths)
    except DataError as error:
        refused = [str(error)]
    finally:
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return refused


def _photos(session: Session) -> Any:
    return gr.update(photos=markup.photos_prop(session.examples))


def _queries(session: Session, refused: Sequence[str]) -> str:
    return markup.problems(refused) + markup.query_list([one.name for one in session.queries])


def _hidden() -> tuple[Any, ...]:
    return (*(gr.update(visible=False) for _ in range(3)), gr.update(visible=False, value=None))


def _uploads(label: str, name: str) -> gr.File:
    return gr.File(label=label, file_count="multiple", file_types=sorted(PHOTO_SUFFIXES), height=150, elem_id=name)


def build_page(
    sessions: Sessions, limits: Limits, *, threshold: float, reach: float, model: str, model_flags: Sequence[str] = ()
) -> gr.Blocks:
    """The page.

    Args:
        sessions: of its visitors.
        limits: told to them.
        threshold: logit that masks are cut at first.
        reach: how far the control goes to either side.
        model: what is told of it.
        model_flags: with which ``fewshot-seg predict`` takes the same one.
    """
    page = _Page(sessions, model_flags)
    megabytes = f"{limits.file_bytes / 1e6:g} MB"
    swept = (max(1, int(limits.sweep_seconds)), int(limits.idle_seconds))
    blocks: gr.Blocks = gr.Blocks(
        title="fewshot-seg",
        analytics_enabled=False,
        delete_cache=swept,
    )
    with blocks:
        gr.Markdown(
            "# fewshot-seg\nShow an object in one to five photos, and find it in others. Photos stay on the machine "
            f"that runs this page. Model: {model}.",
            elem_id="title",
        )
        with gr.Row(elem_id="beginning"):
            trial = gr.Button("Try an example", elem_id="try", min_width=170, size="md", scale=0)
            again = gr.Button("Start again", elem_id="again", min_width=120, size="md", scale=0)
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300, scale=5):
                gr.Markdown("## 1. Show the object", elem_classes="step")
                examples = _uploads(f"Example photos, 1 to {limits.supports}, up to {megabytes} each", "examples")
                example_notes = gr.HTML("", elem_classes="note", elem_id="example-notes")
                marking = gr.HTML(
                    value={"drawings": {}},
                    html_template='<div class="fss"></div>',
                    css_template=text_of("marking.css"),
                    js_on_load=text_of("marking.js"),
                    photos=[],
                    elem_id="marking",
                )
                name = gr.Textbox(label="Name of the object", placeholder="object", max_length=60, elem_id="name")
            with gr.Column(min_width=300, scale=7):
                gr.Markdown("## 2. Find it in other photos", elem_classes="step")
                queries = _uploads(f"Photos to search, up to {limits.queries}", "queries")
                query_notes = gr.HTML("", elem_classes="note", elem_id="query-notes")
                with gr.Row():
                    find = gr.Button("Find", variant="primary", elem_id="find", min_width=120)
                    clear = gr.Button("Remove photos", elem_id="clear", min_width=120)
                find_notes = gr.HTML("", elem_classes="note", elem_id="find-notes")
                cut = gr.Slider(
                    minimum=round(threshold - reach, 2),
                    maximum=round(threshold + reach, 2),
                    value=threshold,
                    step=0.01,
                    label="Threshold: left finds more, right finds less",
                    visible=False,
                    elem_id="threshold",
                )
                shown = gr.HTML(markup.NOTHING_FOUND_YET, elem_id="results")
                number = gr.Slider(1, 2, 1, step=1, label="Page of results", visible=False, elem_id="page-number")
                make = gr.Button("Make files to download", visible=False, elem_id="make")
                made = gr.File(
                    label="Masks, COCO JSON, support set", visible=False, interactive=False, elem_id="downloads"
                )
                made_notes = gr.Markdown("", elem_id="download-notes")

        later = [cut, number, make, made]
        light: dict[str, Any] = _PRIVATE | {"concurrency_limit": 4, "concurrency_id": "light"}
        heavy: dict[str, Any] = {
            "api_visibility": "private",
            "show_progress_on": [shown],
            "concurrency_limit": 1,
            "concurrency_id": "network",
        }
        searching: dict[str, Any] = {
            "fn": page.find,
            "inputs": [marking, name, cut],
            "outputs": [shown, find_notes, cut, number, make, made],
        }
        examples.upload(page.add_examples, examples, [examples, marking, example_notes], **light)
        marking.remove(page.remove_example, None, marking, **light)
        queries.upload(page.add_queries, queries, [queries, query_notes], **light)
        find.click(**searching, **heavy)
        trial.click(page.try_example, None, [marking, name, example_notes, query_notes], **light).then(
            **searching, **heavy
        )
        again.click(page.start_again, None, [marking, name, example_notes, query_notes, shown, *later], **light)
        clear.click(page.clear_queries, None, [query_notes, shown, *later], **light)
        gr.on([cut.input, number.input], page.cut, [cut, number], shown, trigger_mode="always_last", **light)
        make.click(page.make_files, cut, [made, made_notes], **light)
        blocks.unload(page.leave)
    blocks.queue(max_size=limits.waiting, default_concurrency_limit=4)
    _fetch_nothing(blocks)
    return blocks


def _fetch_nothing(blocks: gr.Blocks) -> None:
    """gradio downloads what a visitor names by its address, past all bounds of uploads; here, nothing is fetched."""

    def of_files(move: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        async def moved(file: Any) -> Any:
            if str(file).lower().startswith(("http:", "https:")):
                raise ValueError("addresses are not fetched: upload the file itself")
            return await move(file)

        return moved

    for block in blocks.blocks.values():
        block.async_move_resource_to_block_cache = of_files(block.async_move_resource_to_block_cache)  # type: ignore[method-assign, assignment]
