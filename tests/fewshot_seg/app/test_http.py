"""The page as those meet it who do not use a browser: files of the machine, names, bounds."""

from __future__ import annotations

import http.client
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewshot_seg.app.limits import Limits
from fewshot_seg.app.serving import Served, serve
from fewshot_seg.app.session import Engine
from fewshot_seg.backbones import Backbone
from fewshot_seg.segmenter import training_free

pytest.importorskip("gradio", reason="gradio is not installed")

FILE_BYTES = 100_000
SESSION = "visitor"


class Visitor:
    """Requests as they are written, without a library that tidies paths."""

    def __init__(self, served: Served) -> None:
        self.served, self.host = served, served.address.split("//")[1].strip("/")

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, timeout=120)
        connection.putrequest(method, path, skip_host="Host" in (headers or {}))
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        found = response.status, response.read()
        connection.close()
        return found

    def get(self, path: str) -> tuple[int, bytes]:
        return self.ask("GET", path)

    def upload(self, name: str, content: bytes) -> tuple[int, Any]:
        mark = uuid.uuid4().hex
        head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + f"\r\n--{mark}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        status, answer = self.ask("POST", "/gradio_api/upload", body, kind)
        return status, json.loads(answer) if status == 200 else answer

    def call(self, name: str, *values: Any, session: str = SESSION) -> dict[str, Any]:
        """What a listener answers, as a browser would ask it."""
        numbers = {one["api_name"]: one["id"] for one in json.loads(self.get("/config")[1])["dependencies"]}
        asked = {"data": list(values), "fn_index": numbers[name], "session_hash": session}
        status, said = self.ask(
            "POST", "/gradio_api/queue/join", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        assert status == 200, said
        connection = http.client.HTTPConnection(self.host, timeout=120)
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        response = connection.getresponse()
        while line := response.readline():
            if line.startswith(b"data:"):
                message: dict[str, Any] = json.loads(line[5:])
                if message["msg"] == "process_completed":
                    connection.close()
                    return message
        raise AssertionError("no answer")


def file_data(path: object, **more: Any) -> dict[str, Any]:
    return {"path": str(path), "orig_name": "photo.png", "meta": {"_type": "gradio.FileData"}, **more}


@pytest.fixture(scope="module")
def visitor(tiny_backbone: Backbone) -> Iterator[Visitor]:
    engine = Engine(segmenter=training_free(tiny_backbone).eval(), resolution=64, fit="squash", name="tiny")
    with serve(engine, limits=Limits(file_bytes=FILE_BYTES, queries=3, pixels=10_000)) as served:
        yield Visitor(served)


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo of the machine that nobody uploaded."""
    path = tmp_path_factory.mktemp("private") / "secret.png"
    Image.fromarray(np.full((20, 24, 3), 7, np.uint8)).save(path)
    return path


PATHS = (
    *("/gradio_api/file={}", "/gradio_api/file{}", "/gradio_api/file=file://{}", "/gradio_api/file=/proc/self/root{}"),
    *("/gradio_api/file={uploads}/../../../../../..{}", "/gradio_api/file=../../../../../../..{}"),
    *("/gradio_api/file=%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e{}", "/gradio_api/file=~{}", "/gradio_api/proxy=file://{}"),
    *("/static/../../../../../../../../../..{}", "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e{}"),
    *("/assets/../../../../../../../../../..{}", "/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..{}"),
    *(
        "/svelte/../../../../../../../../../..{}",
        "/gradio_api/stream/a/0/0/..%2f..%2f..%2f..{}",
        "/..%2f..%2f..{}",
        "/{}",
    ),
)


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_no_file_of_the_machine_is_served(visitor: Visitor, secret: Path, path: str, encoded: bool) -> None:
    for wanted in (secret, Path("/etc/passwd")):
        named = str(wanted).replace("/", "%2f") if encoded else str(wanted)
        status, answer = visitor.get(path.format(named, uploads=visitor.served.folder / "uploads"))
        assert status in (400, 403, 404)
        assert wanted.read_bytes() not in answer


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/proxy=https://example.org/"),
        *("/gradio_api/file=https://example.org/", "/gradio_api/file=//example.org/"),
        *(
            "/monitoring",
            "/monitoring/summary",
            "/gradio_api/runs",
            "/docs",
            "/gradio_api/custom_component/a/client/b/c",
        ),
    ],
)
def test_nothing_is_passed_on_or_told(visitor: Visitor, path: str) -> None:
    assert visitor.get(path)[0] in (400, 403, 404)


def test_requests_under_the_name_of_another_host(visitor: Visitor) -> None:
    assert visitor.ask("GET", "/", headers={"Host": "photos.example.org"})[0] == 400
    assert visitor.get("/")[0] == 200


class TestUploads:
    @pytest.mark.parametrize(
        "name",
        ["../../../evil.png", "/tmp/evil.png", "..%2f..%2fevil.png", "a/b/evil.png", "..\\..\\evil.png", "..", ".",
         "x" * 400 + ".png", "nul\x00.png", "C:evil.png", "\u202egnp.exe.png", "évil ü.png"],
    )  # fmt: skip
    def test_no_name_leads_out(self, visitor: Visitor, secret: Path, name: str) -> None:
        uploads = visitor.served.folder / "uploads"
        status, answer = visitor.upload(name, secret.read_bytes())
        assert status in (200, 400)
        if status == 200:
            (path,) = answer
            assert Path(path).resolve().is_relative_to(uploads.resolve())
            assert ".." not in Path(path).parts
        assert not Path("/tmp/evil.png").exists()
        assert {one.name for one in visitor.served.folder.iterdir() if not one.name.startswith("session-")} == {
            "uploads"
        }

    def test_too_large(self, visitor: Visitor) -> None:
        assert visitor.upload("large.png", b"0" * (FILE_BYTES + 1))[0] == 413

    def test_too_many_and_too_many_pixels(self, visitor: Visitor, tmp_path: Path) -> None:
        contents = []
        for number, side in enumerate((20, 101, 21, 22, 23)):
            file = tmp_path / f"{number}.png"
            Image.fromarray(np.full((side, side, 3), number, np.uint8)).save(file)
            contents.append(file.read_bytes())
        paths = [visitor.upload(f"{number}.png", content)[1][0] for number, content in enumerate(contents)]
        answer = visitor.call("add_queries", [file_data(path) for path in paths], session="many")
        shown = answer["output"]["data"][1]
        assert "3 photos to search:" in shown
        assert "1.png" in shown
        assert "10000" in shown or "0.01" in shown  # more pixels than are taken
        assert "4.png: left out, 3 photos at a time" in shown
        assert not any(Path(path).exists() for path in paths)  # copied or refused, none stays

    def test_a_session_s_photos_are_its_own(self, visitor: Visitor, secret: Path) -> None:
        (path,) = visitor.upload("own.png", secret.read_bytes())[1]
        visitor.call("add_queries", [file_data(path)], session="own")
        session = visitor.served.sessions.get("own")
        assert [one.name for one in session.queries] == ["own.png"]
        assert visitor.get(f"/gradio_api/file={session.queries[0]}")[0] == 403
        assert visitor.get(f"/gradio_api/file={path}")[0] in (403, 404)


class TestWhatAVisitorNames:
    """Listeners take files by their path: only of what was uploaded."""

    @pytest.mark.parametrize("listener", ["add_queries", "add_examples"])
    def test_a_file_that_was_not_uploaded(self, visitor: Visitor, secret: Path, listener: str) -> None:
        uploads = visitor.served.folder / "uploads"
        for path in (secret, f"{uploads}/../../{secret.parent.name}/secret.png", f"{uploads}/../../../{secret}"):
            answer = visitor.call(listener, [file_data(path)], session="thief")
            assert not answer["success"]
            assert not answer["output"].get("error")  # no reason is told
        session = visitor.served.sessions.get("thief")
        assert (session.queries, session.examples) == ((), ())
        assert secret.exists()

    @pytest.mark.parametrize(
        "address", ["http://example.org/a.png", "HTTPS://example.org/a.png", "http://127.0.0.1:1/"]
    )
    def test_addresses_are_not_fetched(self, visitor: Visitor, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
        from gradio import processing_utils

        fetched = list[str]()

        async def fetch(url: str, **_more: Any) -> str:
            fetched.append(url)
            raise ValueError("no network here")

        monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetch)
        for more in ({}, {"url": address}):
            assert not visitor.call("add_queries", [file_data(address, **more)])["success"]
        assert not visitor.call("find", {"drawings": {"1": file_data(address)}}, "object", 0.0)["success"]
        visitor.call("add_queries", [file_data(address, is_stream=True)])
        assert fetched == []
        assert visitor.served.sessions.get(SESSION).queries == ()

    @pytest.mark.parametrize("values", [["no list"], [[{"path": 3}]], [None], [[[]]], [{"a": 1}]])
    def test_something_else_ends_that_request_alone(self, visitor: Visitor, values: list[Any]) -> None:
        visitor.call("add_queries", *values, session="odd")
        assert visitor.get("/")[0] == 200
