"""What surrounds the page; the page itself is tested in tests/browser."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest

from episodes.types import DataError
from fewshot_seg import app_commands
from fewshot_seg.app.guard import Guard, TooLongError
from fewshot_seg.app.markup import problems, query_list
from fewshot_seg.app.serving import Served, check_package
from fewshot_seg.backbones import Backbone
from fewshot_seg.config import AppConfig, ModelSettings
from fewshot_seg.method import Method
from fewshot_seg.segmenter import training_free


class TestCommand:
    def test_without_gradio(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "gradio", None)
        with pytest.raises(DataError, match=r"pip install 'fewshot-seg\[app\]'"):
            check_package()

    @pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
    def test_a_warning_where_others_get_in(
        self,
        tiny_backbone: Backbone,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        host: str,
    ) -> None:
        asked: dict[str, Any] = {}

        def method(settings: ModelSettings) -> Method:
            segmenter = training_free(tiny_backbone, threshold=settings.threshold or 0.0)
            return Method(
                segmenter=segmenter, model=None, name="bare", resolution=None, notes={}, threshold_origin="given"
            )

        @contextlib.contextmanager
        def listen(engine: Any, **arguments: Any) -> Iterator[Served]:
            asked.update(arguments, engine=engine)
            yield Served(address="http://here/", sessions=None, folder=tmp_path)  # type: ignore[arg-type]
            raise AssertionError("left without an interrupt")

        class Interrupted:
            def wait(self) -> None:
                raise KeyboardInterrupt

        monkeypatch.setattr(app_commands, "check_package", lambda: None)
        monkeypatch.setattr(app_commands, "method_for_photos", method)
        monkeypatch.setattr(app_commands, "serve", listen)
        monkeypatch.setattr(app_commands.threading, "Event", Interrupted)
        assert app_commands.app(AppConfig(host=host, port=8000, threshold=0.4)) == 0
        said = capsys.readouterr()
        assert "open http://here/" in said.out
        assert ("no password" in said.err) == (host == "0.0.0.0")
        assert (asked["host"], asked["port"], asked["reach"]) == (host, 8000, 1.0)
        assert asked["engine"].segmenter.threshold == 0.4

    def test_port_out_of_range(self) -> None:
        with pytest.raises(DataError, match="--port must be at most 65535"):
            AppConfig(port=70_000)


def answer(guard: Guard, *chunks: bytes, path: str = "/x", length: str | None = None) -> int:
    """Status of a POST to the guard."""
    waiting, sent = list(chunks), list[MutableMapping[str, Any]]()

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    headers = [] if length is None else [(b"content-length", length.encode())]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(guard(scope, receive, send))
    assert sent[0]["status"] != 200 or (b"referrer-policy", b"no-referrer") in sent[0]["headers"]
    return int(sent[0]["status"])


class TestGuard:
    @pytest.fixture
    def guard(self, tmp_path: Path) -> Guard:
        async def application(_scope: Any, receive: Any, send: Any) -> None:
            while (await receive()).get("more_body"):
                pass
            await send({"type": "http.response.start", "status": 200, "headers": []})

        return Guard(application, request_bytes=2_000_000, event_bytes=100, folder=tmp_path, disk_bytes=1000)

    def test_length_that_is_declared(self, guard: Guard) -> None:
        assert answer(guard, b"a" * 100, length="100") == 200
        assert answer(guard, b"", length="101") == 413
        assert answer(guard, b"", length="many") == 413
        assert answer(guard, b"", path="/gradio_api/upload", length="2000000") == 200

    def test_length_that_is_not(self, guard: Guard) -> None:
        with pytest.raises(TooLongError):
            answer(guard, b"a" * 60, b"a" * 60)

    def test_disk_that_is_full(self, guard: Guard, tmp_path: Path) -> None:
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "photo").write_bytes(b"0" * 1001)
        assert answer(guard, b"", path="/gradio_api/upload", length="0") == 507
        assert answer(guard, b"") == 200


class TestMarkup:
    def test_names_are_text(self) -> None:
        assert "<script" not in problems(["<script>alert(1)</script>"])
        assert "<img" not in query_list(["<img src=x onerror=alert(1)>.png"])
