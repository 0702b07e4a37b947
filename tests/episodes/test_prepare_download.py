"""Downloads from a local HTTP server that also breaks off, corrupts, changes its mind and hangs."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from episodes.prepare import Archive, Patience
from episodes.prepare import download as download_module
from episodes.prepare.download import download
from episodes.types import DataError

CONTENT = np.random.default_rng(0).bytes(600_000)
QUICK = Patience(attempts=3, timeout=60.0, pause=0.0)
NAME = "photos.zip"


@dataclass
class Behaviour:
    """What the server does; lists are used up request by request."""

    content: bytes = CONTENT
    etag: str | None = '"first"'
    modified: str | None = None
    statuses: list[int] = field(default_factory=list)  # answered instead of the file
    breaks_after: list[int] = field(default_factory=list)  # bytes of the body after which the connection is cut
    corrupts: list[bool] = field(default_factory=list)
    honours_range: bool = True
    honours_if_range: bool = True
    content_range: str | None = None
    declared: int | None = None  # wrong Content-Length
    most: int | None = None  # bytes of one ranged answer at most
    content_type: str = "application/zip"
    redirect: str | None = None
    hangs: threading.Event | None = None
    requests: list[dict[str, str]] = field(default_factory=list)
    sent: int = 0


class Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        it = self.behaviour
        it.requests.append({"path": self.path, **{key.lower(): value for key, value in self.headers.items()}})
        if it.redirect:
            self.send_response(302)
            self.send_header("Location", it.redirect)
            self.end_headers()
            return
        if it.statuses:
            self.send_error(it.statuses.pop(0))
            return
        if self.path != f"/{NAME}":
            self.send_error(404)
            return
        body = it.content
        if it.corrupts and it.corrupts.pop(0):
            body = body[:1000] + bytes([body[1000] ^ 1]) + body[1001:]
        self._send(body)

    def _send(self, body: bytes) -> None:
        it = self.behaviour
        start = 0
        wanted = self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, it.etag, it.modified) or not it.honours_if_range
        if wanted and it.honours_range and same:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            end = len(body) if it.most is None else min(len(body), start + it.most)
            self.send_response(206)
            self.send_header("Content-Range", it.content_range or f"bytes {start}-{end - 1}/{len(body)}")
            body = body[start:end]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) if it.declared is None else it.declared))
        self.send_header("Content-Type", it.content_type)
        for key, value in (("ETag", it.etag), ("Last-Modified", it.modified)):
            if value:
                self.send_header(key, value)
        self.end_headers()
        if it.hangs is not None:
            it.hangs.wait(120)
            return
        if it.declared is not None:
            body = body[: it.declared]
        if it.breaks_after:
            body = body[: it.breaks_after.pop(0)]
        it.sent += len(body)  # before the last byte is out: then the client may already look at it
        try:
            self.wfile.write(body)
        except OSError:
            it.sent -= len(body)
            raise


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients that hang up are part of the tests."""


@pytest.fixture
def behaviour() -> Behaviour:
    return Behaviour()


@pytest.fixture
def address(behaviour: Behaviour) -> Iterator[str]:
    handler = type("BoundHandler", (Handler,), {"behaviour": behaviour})
    server = QuietServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/{NAME}"
    server.shutdown()
    server.server_close()


def official(content: bytes = CONTENT, *, size: bool = True, digest: bool = True) -> Archive:
    return Archive(
        name=NAME,
        addresses=(),
        places=("photos",),
        unpacked=1_000_000,
        size=len(content) if size else None,
        sha256=hashlib.sha256(content).hexdigest() if digest else None,
    )


def fetch(folder: Path, *addresses: str, archive: Archive | None = None, patience: Patience = QUICK) -> dict[str, str]:
    return download(archive or official(), folder, addresses=addresses, patience=patience, show_progress=False)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_plain_download(tmp_path: Path, address: str, behaviour: Behaviour) -> None:
    digests = fetch(tmp_path, address)
    assert digests == {"md5": hashlib.md5(CONTENT).hexdigest(), "sha256": hashlib.sha256(CONTENT).hexdigest()}
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert left(tmp_path) == [NAME]
    assert "range" not in behaviour.requests[0]


@pytest.mark.parametrize(
    ("etag", "modified", "named"),
    [
        ('"first"', "Mon, 23 Nov 2015 06:00:00 GMT", '"first"'),
        (None, "Mon, 23 Nov 2015 06:00:00 GMT", "Mon, 23 Nov 2015 06:00:00 GMT"),
        ('W/"weak"', "Mon, 23 Nov 2015 06:00:00 GMT", "Mon, 23 Nov 2015 06:00:00 GMT"),
    ],
)
def test_a_broken_connection_is_taken_up_where_it_broke(
    tmp_path: Path, address: str, behaviour: Behaviour, etag: str | None, modified: str, named: str
) -> None:
    behaviour.etag, behaviour.modified = etag, modified
    behaviour.breaks_after = [200_000, 300_000]
    fetch(tmp_path, address)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert [request.get("range") for request in behaviour.requests] == [None, "bytes=200000-", "bytes=500000-"]
    assert [request.get("if-range") for request in behaviour.requests] == [None, named, named]
    assert behaviour.sent == len(CONTENT)  # not a byte came twice


def test_the_next_run_continues(tmp_path: Path, address: str, behaviour: Behaviour) -> None:
    behaviour.breaks_after = [250_000, 0]
    with pytest.raises(DataError, match=r"connection broke after 0 of 350000 bytes, 1 times in a row.*run again later"):
        fetch(tmp_path, address, patience=Patience(attempts=1, timeout=60.0, pause=0.0))
    assert left(tmp_path) == [f"{NAME}.part", f"{NAME}.part.json"]
    fetch(tmp_path, address)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert behaviour.sent == len(CONTENT)


def test_an_interruption_leaves_the_part_for_the_next_run(
    tmp_path: Path, address: str, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    behaviour.breaks_after = [250_000]

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(download_module.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(tmp_path, address)
    assert (tmp_path / f"{NAME}.part").stat().st_size == 250_000
    fetch(tmp_path, address)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert behaviour.sent == len(CONTENT)


def test_a_complete_part_is_only_checked(tmp_path: Path, address: str, behaviour: Behaviour) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT)
    (tmp_path / f"{NAME}.part.json").write_text(json.dumps({"validator": '"first"', "total": len(CONTENT)}))
    fetch(tmp_path, address)
    assert behaviour.requests == []
    assert left(tmp_path) == [NAME]


@pytest.mark.parametrize("record", [None, "no json", "[]", '{"validator": ""}'])
def test_a_part_of_unknown_origin_is_not_used(
    tmp_path: Path, address: str, behaviour: Behaviour, record: str | None
) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * 1000)
    if record is not None:
        (tmp_path / f"{NAME}.part.json").write_text(record)
    fetch(tmp_path, address)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert "range" not in behaviour.requests[0]


def test_a_server_that_ignores_ranges_starts_over(tmp_path: Path, address: str, behaviour: Behaviour) -> None:
    behaviour.honours_range = False
    behaviour.breaks_after = [200_000]
    fetch(tmp_path, address)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert behaviour.sent == 200_000 + len(CONTENT)


def test_a_server_that_names_no_version_starts_over(tmp_path: Path, address: str, behaviour: Behaviour) -> None:
    behaviour.etag = None
    behaviour.breaks_after = [200_000]
    fetch(tmp_path, address)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert [request.get("range") for request in behaviour.requests] == [None, None]


def test_a_file_that_changed_is_not_glued(tmp_path: Path, address: str, behaviour: Behaviour) -> None:
    """Without any digest: only If-Range tells the two files apart."""
    archive = official(size=False, digest=False)
    behaviour.content, behaviour.breaks_after = bytes(600_000), [200_000, 0, 0, 0]
    with pytest.raises(DataError, match="connection broke"):
        fetch(tmp_path, address, archive=archive)
    behaviour.content, behaviour.etag, behaviour.breaks_after = CONTENT, '"second"', []
    fetch(tmp_path, address, archive=archive)
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_a_changed_file_of_a_server_that_ignores_if_range(tmp_path: Path, address: str, behaviour: Behaviour) -> None:
    archive = official(size=False, digest=False)
    behaviour.content, behaviour.breaks_after = bytes(600_000), [200_000, 0, 0, 0]
    with pytest.raises(DataError, match="connection broke"):
        fetch(tmp_path, address, archive=archive)
    behaviour.content, behaviour.etag, behaviour.breaks_after = CONTENT, '"second"', []
    behaviour.honours_if_range = False
    fetch(tmp_path, address, archive=archive)
    assert (tmp_path / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "content_range", ["bytes 0-599999/600000", "bytes 200000-599999/700000", "bytes */600000", "nonsense"]
)
def test_an_odd_range_is_not_glued(tmp_path: Path, address: str, behaviour: Behaviour, content_range: str) -> None:
    behaviour.breaks_after = [200_000]
    behaviour.content_range = content_range
    fetch(tmp_path, address)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert [request.get("range") for request in behaviour.requests] == [None, "bytes=200000-", None]


def test_a_server_that_sends_small_pieces(tmp_path: Path, address: str, behaviour: Behaviour) -> None:
    behaviour.breaks_after, behaviour.most = [200_000], 150_000
    fetch(tmp_path, address, archive=official(digest=False))
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert behaviour.sent == len(CONTENT)


def test_a_corrupt_file_is_deleted_and_fetched_once_more(tmp_path: Path, address: str, behaviour: Behaviour) -> None:
    behaviour.corrupts = [True, False]
    fetch(tmp_path, address)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert [request.get("range") for request in behaviour.requests] == [None, None]


def test_a_file_that_stays_corrupt_is_an_error(tmp_path: Path, address: str, behaviour: Behaviour) -> None:
    behaviour.corrupts = [True, True, False]
    with pytest.raises(DataError, match=r"cannot download photos.zip: .*not the official file \(sha256 .*--archives"):
        fetch(tmp_path, address)
    assert left(tmp_path) == []
    assert len(behaviour.requests) == 2


@pytest.mark.parametrize("code", [403, 404])
def test_a_file_that_is_not_there_is_not_asked_for_again(
    tmp_path: Path, address: str, behaviour: Behaviour, code: int
) -> None:
    behaviour.statuses = [code] * 9
    with pytest.raises(DataError, match=rf"photos.zip: http://127.*: answered {code}") as caught:
        fetch(tmp_path, address)
    assert "\n" not in str(caught.value)
    assert len(behaviour.requests) == 1
    assert left(tmp_path) == []


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(tmp_path: Path, address: str, behaviour: Behaviour, code: int) -> None:
    behaviour.statuses = [code, code]
    fetch(tmp_path, address)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    behaviour.statuses = [code] * 9
    with pytest.raises(DataError, match=rf"answered {code} .*, 3 times in a row"):
        fetch(tmp_path, address)


def test_pauses_grow_and_are_bounded(
    tmp_path: Path, address: str, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(download_module.time, "sleep", pauses.append)
    behaviour.statuses = [500] * 20
    with pytest.raises(DataError, match="9 times in a row"):
        fetch(tmp_path, address, patience=Patience(attempts=9, timeout=60.0, pause=1.0))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_range_beyond_the_end_starts_over(tmp_path: Path, address: str, behaviour: Behaviour) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * 1000)
    (tmp_path / f"{NAME}.part.json").write_text(json.dumps({"validator": '"first"', "total": None}))
    behaviour.statuses = [416]
    fetch(tmp_path, address)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert "range" not in behaviour.requests[1]


def test_a_short_content_length(tmp_path: Path, address: str, behaviour: Behaviour) -> None:
    behaviour.declared = 1000
    with pytest.raises(DataError, match="offers 1000 bytes, expected 600000"):
        fetch(tmp_path, address)
    assert behaviour.sent < len(CONTENT)
    with pytest.raises(DataError, match="not the official file"):
        fetch(tmp_path, address, archive=official(size=False))
    assert left(tmp_path) == []


def test_a_server_that_hangs(tmp_path: Path, address: str, behaviour: Behaviour) -> None:
    behaviour.hangs = threading.Event()
    try:
        with pytest.raises(DataError, match=r"timed out\), 2 times in a row"):
            fetch(tmp_path, address, patience=Patience(attempts=2, timeout=0.05, pause=0.0))
    finally:
        behaviour.hangs.set()


def test_a_web_page_instead_of_the_file(tmp_path: Path, address: str, behaviour: Behaviour) -> None:
    behaviour.content_type = "text/html; charset=utf-8"
    archive = Archive(name=NAME, addresses=(), places=("photos",), unpacked=1, by_hand="https://example.org/view")
    with pytest.raises(
        DataError, match=r"a web page instead .*from https://example.org/view in a browser .*--archives"
    ):
        fetch(tmp_path, address, archive=archive)
    assert left(tmp_path) == []


def test_the_next_address_is_tried(tmp_path: Path, address: str, behaviour: Behaviour) -> None:
    fetch(tmp_path, address.replace(NAME, "elsewhere.zip"), address)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert [request["path"] for request in behaviour.requests] == ["/elsewhere.zip", f"/{NAME}"]


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no connection .*3 times in a row"):
        fetch(tmp_path, f"http://127.0.0.1:1/{NAME}")


@pytest.mark.parametrize("odd", ["file:///etc/passwd", "ftp://example.org/a.zip", "a.zip", "http:///a.zip"])
def test_only_the_web(tmp_path: Path, odd: str) -> None:
    with pytest.raises(DataError, match="is no http or https address"):
        fetch(tmp_path, odd)


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/a.zip"])
def test_redirections_stay_on_the_web(tmp_path: Path, address: str, behaviour: Behaviour, to: str) -> None:
    behaviour.redirect = to
    with pytest.raises(DataError, match="cannot download"):
        fetch(tmp_path, address)
    assert left(tmp_path) == []
    assert len(behaviour.requests) == 1


def test_no_space_for_what_the_server_offers(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    with pytest.raises(DataError, match=r"needs about 0\.0 GB, 0\.0 GB are free; make space"):
        fetch(tmp_path, address)


def test_a_folder_that_cannot_be_written(tmp_path: Path, address: str) -> None:
    (tmp_path / f"{NAME}.part").mkdir()
    with pytest.raises(DataError, match=r"cannot write .*photos.zip.part: "):
        fetch(tmp_path, address)
