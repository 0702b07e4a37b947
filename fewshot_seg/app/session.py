"""One visitor's work: example photos, photos to search, what was found, and how it looks at any threshold."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from episodes.protocols import Fit
from episodes.types import DataError, UInt8Array
from fewshot_seg.app.drawings import Drawing, annotation_of
from fewshot_seg.app.limits import Limits
from fewshot_seg.competition import compete
from fewshot_seg.photos import Photo, open_photo
from fewshot_seg.pictures import overlay_map, overlay_mask, write_picture
from fewshot_seg.prediction import Predictor
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.support_photos import UNNAMED, Support

SUPPORT_SIDE = 1024
"""Examples are kept and drawn on at most at this size; the network sees them smaller."""
VIEW_SIDE = 800
"""Results are shown at most at this size; the files to download have the photo's own."""
_LONGEST_NAME = 60
_PATIENCE = 2.0
"""Seconds that a caller waits for another one's long work, before he is told of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """The model that all sessions share.

    Attributes:
        segmenter: in evaluation mode; nothing of it is changed.
        resolution, fit: how photos are made square.
        name: for people.
    """

    segmenter: FewShotSegmenter
    resolution: int
    fit: Fit
    name: str

    def predictor(self) -> Predictor:
        """One that remembers nothing yet."""
        return Predictor(self.segmenter, self.resolution, self.fit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A support photo: its number in the session, its file's name, uint8 (h, w, 3), and a drawing that it came with."""

    number: int
    name: str
    pixels: UInt8Array
    drawing: Drawing | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """What the network said of one query: enough to cut its mask anywhere without asking again.

    Attributes:
        query: its copy in the session's folder.
        view: a JPEG of at most `VIEW_SIDE`, to draw on.
        margins: float (V, 1, h, w), logit less the model's threshold, at the decoder's grid.
        attention: float (1, h', w').
    """

    query: Path
    view: Path
    margins: Tensor
    attention: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What a search gave: the object's name, the remembered supports, their files, and every query's answer."""

    name: str
    predictor: Predictor
    examples: tuple[str, ...]
    looked: tuple[Looked, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One query at one threshold, to look at.

    Attributes:
        name: of the photo.
        overlay: uint8 (h, w, 3), the photo with the mask.
        attention: uint8 (h, w, 3), the photo with the attention.
        share: part of the photo that is in the mask, in [0, 1].
        confidence: mean inside the mask, 0 where there is none.
    """

    name: str
    overlay: UInt8Array
    attention: UInt8Array
    share: float
    confidence: float


def clean_name(text: str) -> str:
    """A name of a class from what was typed.

    >>> clean_name("  black   cat "), clean_name("")
    ('black cat', 'object')
    """
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(printable.split())[:_LONGEST_NAME].strip() or UNNAMED


@dataclass
class Session:
    """From any thread; two callers take turns, and long work is not waited for.

    Args:
        engine: the model.
        limits: bounds.
        parent: where the session's own folder is made; what lies in it counts against `Limits.disk_bytes`.
        outbox: where the folder of files to download is made, the session's own by default.
    """

    engine: Engine
    limits: Limits
    parent: Path
    outbox: Path | None = None
    examples: tuple[Example, ...] = ()
    queries: tuple[Path, ...] = ()
    findings: Findings | None = None
    folder: Path = field(init=False)
    files: Path = field(init=False)
    _numbers: int = field(default=0, init=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)
    _long: str = field(default="", init=False)
    _closed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="session-", dir=self.parent))
        self.files = Path(tempfile.mkdtemp(prefix="files-", dir=self.outbox or self.folder))

    def close(self) -> None:
        """Forget everything, and delete the folders; work that goes on ends at its next photo."""
        self._closed = True
        with self._lock:
            self.examples, self.queries, self.findings = (), (), None
            for folder in (self.folder, self.files):
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def turn(self, long: str = "") -> Iterator[None]:
        """The session for one caller alone; no message of an error tells where its files lie.

        Args:
            long: what is done, of work that others shall not wait for, for example ``searching``.

        Raises:
            DataError: the session is closed, or long work of another caller goes on.
        """
        while not self._lock.acquire(timeout=_PATIENCE):
            if self._long:
                raise DataError(f"still {self._long}: wait until that is done, then try again")
        before = self._long
        try:
            self.check_open()
            self._long = long or before
            yield
        except (DataError, OSError) as error:
            raise DataError(self._without_folders(str(error))) from error
        finally:
            self._long = before
            self._lock.release()

    def check_open(self) -> None:
        """Raises DataError where the session is closed: between the photos of long work, too."""
        if self._closed:
            raise DataError("this page was put away, and its photos are deleted: reload it and start again")

    def _without_folders(self, text: str) -> str:
        for folder in (self.folder, self.files):
            text = re.sub(rf"{re.escape(str(folder))}/(?:[\w.-]+/)*", "", text)
        return text

    def add_examples(self, files: Iterable[Path]) -> list[str]:
        """Read support photos; returns a line for each that was not taken."""
        with self.turn():
            return _each(files, self._add_example)

    def _add_example(self, file: Path) -> None:
        if len(self.examples) >= self.limits.supports:
            raise DataError(f"{file}: left out, {self.limits.supports} examples are enough; remove one first")
        pixels = _reduced(self._open(file).pixels, SUPPORT_SIDE)
        self.add_example(file.name, pixels)

    def add_example(self, name: str, pixels: UInt8Array, drawing: Drawing | None = None) -> None:
        """A support photo uint8 (h, w, 3) that is at hand."""
        with self.turn():
            self._numbers += 1
            self.examples = (*self.examples, Example(number=self._numbers, name=name, pixels=pixels, drawing=drawing))

    def remove_example(self, number: int) -> None:
        """Take a support photo away; one that is not there stays away."""
        with self.turn():
            self.examples = tuple(one for one in self.examples if one.number != number)

    def add_queries(self, files: Iterable[Path]) -> list[str]:
        """Check photos and copy them to the session's folder; returns a line for each that was not taken."""
        with self.turn():
            return _each(files, self._add_query)

    def _add_query(self, file: Path) -> None:
        if len(self.queries) >= self.limits.queries:
            raise DataError(f"{file}: left out, {self.limits.queries} photos at a time; search these first")
        self._open(file)
        target, number = self.folder / "queries" / file.name, 1
        target.parent.mkdir(exist_ok=True)
        while target.exists():
            number += 1
            target = target.with_name(f"{file.stem}-{number}{file.suffix}")
        shutil.copyfile(file, target)
        self.queries = (*self.queries, target)

    def _open(self, file: Path) -> Photo:
        size = file.stat().st_size if file.is_file() else 0
        if size > self.limits.file_bytes:
            raise DataError(
                f"{file}: {size / 1e6:.0f} MB, and files of at most {self.limits.file_bytes / 1e6:g} MB are taken; "
                "save it smaller"
            )
        return open_photo(file, most_pixels=self.limits.pixels)

    def start_again(self) -> None:
        """Forget examples, queries and findings."""
        with self.turn():
            self.examples, self.findings = (), None
            self.clear_queries()

    def clear_queries(self) -> None:
        """Forget the queries, and what was found in them."""
        with self.turn():
            self.queries, self.findings = (), None
            for folder in (self.folder / "queries", self.folder / "views", *self.files.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)

    def find(
        self,
        drawings: Mapping[int, Drawing],
        name: str = "",
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Findings:
        """Search all queries by all examples. What was found before stays until all is done.

        Args:
            drawings: by the examples' numbers; one without has the drawing that it came with.
            name: of the object.
            progress: called with the number of queries that are done, and of all.

        Raises:
            DataError: no example, no query, an example that shows nothing; as `turn`.
        """
        with self.turn("searching"):
            if not self.examples:
                raise DataError("add an example photo first: one that shows the object")
            if not self.queries:
                raise DataError("add photos to search: those in which the object is to be found")
            class_name = clean_name(name)
            predictor = self.engine.predictor()
            predictor.remember_supports([self._support(one, drawings) for one in self.examples], name=class_name)
            looked = []
            for number, query in enumerate(self.queries):
                self.check_open()
                if progress is not None:
                    progress(number, len(self.queries))
                looked.append(self._look(predictor, query))
            self.findings = Findings(
                name=class_name,
                predictor=predictor,
                examples=tuple(one.name for one in self.examples),
                looked=tuple(looked),
            )
            return self.findings

    def _support(self, example: Example, drawings: Mapping[int, Drawing]) -> Support:
        drawing = drawings.get(example.number) or example.drawing or Drawing()
        try:
            marks = annotation_of(drawing, (example.pixels.shape[0], example.pixels.shape[1]))
        except DataError as error:
            raise DataError(f"{example.name}: {error}") from error
        return Support(photo=example.pixels, marks=marks, kind=drawing.kind)

    def _look(self, predictor: Predictor, query: Path) -> Looked:
        pixels = self._open(query).pixels
        margins, attention = predictor.coarse_maps(predictor.squares(pixels))
        view = self.folder / "views" / f"{query.name}.jpg"
        write_picture(view, _reduced(pixels, VIEW_SIDE))
        return Looked(query=query, view=view, margins=margins, attention=attention)

    def views(self, threshold: float, numbers: Sequence[int]) -> list[View]:
        """Queries as they look with masks cut at a threshold; the network is not asked again.

        Args:
            threshold: logit above which a pixel is the object.
            numbers: of the queries, from 0.

        Raises:
            DataError: nothing was searched yet.
        """
        with self.turn():
            found = self.found()
            return [self._view(found, found.looked[number], threshold) for number in numbers]

    def found(self) -> Findings:
        """What the last search gave.

        Raises:
            DataError: nothing was searched yet.
        """
        if self.findings is None:
            raise DataError("nothing was searched yet: add an example and photos, then press Find")
        return self.findings

    def _view(self, found: Findings, looked: Looked, threshold: float) -> View:
        photo = open_photo(looked.view)
        shape = (photo.pixels.shape[0], photo.pixels.shape[1])
        coarse = found.predictor.with_tiles(photo, self.margins_at(looked, threshold))
        labels, best = compete(found.predictor.margins_of(coarse, shape))
        sure = best[labels == 1]
        return View(
            name=looked.query.name,
            overlay=overlay_mask(photo.pixels, labels.numpy()),
            attention=overlay_map(photo.pixels, found.predictor.attention_of(looked.attention, shape)),
            share=len(sure) / labels.numel(),
            confidence=float(sure.sigmoid().mean()) if len(sure) else 0.0,
        )

    def margins_at(self, looked: Looked, threshold: float) -> Tensor:
        """The margins of a query had the model another threshold."""
        return looked.margins + (self.engine.segmenter.threshold - threshold)


def _each(files: Iterable[Path], take: Callable[[Path], None]) -> list[str]:
    refused = []
    for file in files:
        try:
            take(file)
        except DataError as error:
            refused.append(str(error).replace(str(file), file.name))  # where we keep it is nobody's business
    return refused


def _reduced(pixels: UInt8Array, side: int) -> UInt8Array:
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
