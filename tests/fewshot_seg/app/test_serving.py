"""What surrounds the page; the page itself is tested in tests/browser."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest

from episodes.types import DataError
from fewshot_seg import app_commands
from fewshot_seg.app import serving
from fewshot_seg.app.guard import Guard, TooLongError, held_bytes
from fewshot_seg.app.limits import Limits
from fewshot_seg.app.markup import problems, query_list
from fewshot_seg.app.serving import Served, check_address, check_package
from fewshot_seg.app.session import Session
from fewshot_seg.app.sessions import Sessions
from fewshot_seg.backbones import Backbone
from fewshot_seg.config import AppConfig, ModelSettings
from fewshot_seg.method import Method
from fewshot_seg.segmenter import training_free


class TestCommand:
    def test_without_gradio(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "gradio", None)
        with pytest.raises(DataError, match=r"pip install 'fewshot-seg\[app\]'"):
            check_package()

    def test_gradio_is_not_imported_before_its_variables_are_cleaned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("gradio", reason="gradio is not installed")
        monkeypatch.delitem(sys.modules, "gradio")
        check_package()
        assert "gradio" not in sys.modules

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
        assert app_commands.app(AppConfig(host=host, port=8000, threshold=0.4, strides=(16, 32), size=64)) == 0
        said = capsys.readouterr()
        assert "open http://here/" in said.out
        assert ("no password" in said.err) == (host == "0.0.0.0")
        assert (asked["host"], asked["port"], asked["reach"]) == (host, 8000, 1.0)
        assert asked["model_flags"] == ["--strides", "16", "32", "--size", "64"]
        assert asked["engine"].segmenter.threshold == 0.4

    def test_port_out_of_range(self) -> None:
        with pytest.raises(DataError, match="--port must be at most 65535"):
            AppConfig(port=70_000)


class TestAddress:
    @pytest.mark.parametrize("host", ["::1", "[::1]", "::", ""])
    def test_not_of_version_4(self, host: str) -> None:
        with pytest.raises(DataError, match=r"is not served: give an address of IPv4"):
            check_address(host, None)

    @pytest.mark.parametrize("host", ["192.0.2.1", "a..b", "no such host"])
    def test_not_of_this_machine(self, host: str) -> None:
        with pytest.raises(DataError, match=r"cannot listen at .*choose another --port or --host"):
            check_address(host, None)

    def test_taken_and_free(self) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            with pytest.raises(DataError, match=f"cannot listen at 127.0.0.1:{port}"):
                check_address("127.0.0.1", port)
        check_address("127.0.0.1", port)

    @pytest.mark.parametrize(("host", "own"), [("127.0.0.1", True), ("127.0.0.2", True), ("0.0.0.0", False)])
    def test_names_of_others_are_refused_on_every_own_address(self, tmp_path: Path, host: str, own: bool) -> None:
        pytest.importorskip("starlette", reason="gradio is not installed")
        kinds = [one.cls.__name__ for one in serving._middleware(host, Limits(), tmp_path)]
        assert ("TrustedHostMiddleware" in kinds) == own
        assert "Guard" in kinds

    @pytest.mark.parametrize(
        ("addresses", "own"),
        [(["127.0.0.1"], True), (["127.0.1.1", "127.0.0.2"], True), (["127.0.0.1", "192.0.2.7"], False), ([], False)],
    )
    def test_a_name_is_what_it_stands_for(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, addresses: list[str], own: bool
    ) -> None:
        """A machine's own name often stands for 127.0.1.1: no warning, and no other host's name is let in."""

        def resolve(host: str, *_: Any) -> list[Any]:
            assert host == "my-laptop"
            if not addresses:
                raise socket.gaierror("not known")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        assert serving.is_loopback("my-laptop") == own
        if own:
            pytest.importorskip("starlette", reason="gradio is not installed")
            hosts = serving._middleware("my-laptop", Limits(), tmp_path)[0].kwargs["allowed_hosts"]
            assert hosts == ["127.0.0.1", "localhost", "my-laptop"]

    def test_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRADIO_SHARE", "true")
        monkeypatch.setenv("no_proxy", "example.org")
        monkeypatch.delenv("NO_PROXY", raising=False)
        before = dict(os.environ)
        with serving._gradios_environment(tmp_path):
            assert "GRADIO_SHARE" not in os.environ
            assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "*"
        assert dict(os.environ) == before

    def test_any_failure_of_launch_is_one_line(self, tmp_path: Path) -> None:
        pytest.importorskip("gradio", reason="gradio is not installed")

        class Page:
            def launch(self, **_arguments: Any) -> None:
                raise RuntimeError("proxy says no")

        with pytest.raises(DataError, match=r"cannot listen at 127\.0\.0\.1: proxy says no"):
            serving._listen(Page(), "127.0.0.1", None, Limits(), tmp_path)


def test_unused_sessions_are_closed_while_nobody_asks(tmp_path: Path) -> None:
    sessions = Sessions(
        lambda: Session(None, Limits(), tmp_path),  # type: ignore[arg-type]
        capacity=2,
        idle_seconds=0.0,
    )
    with serving._swept(sessions, 0.01):
        folder = sessions.get("a").folder
        for _ in range(1000):
            if not folder.exists():
                break
            time.sleep(0.01)
    assert len(sessions) == 0
    assert not folder.exists()


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

        return Guard(application, request_bytes=2_000_000, event_bytes=100, folder=tmp_path, disk_bytes=3_000_000)

    def test_length_that_is_declared(self, guard: Guard) -> None:
        assert answer(guard, b"a" * 100, length="100") == 200
        assert answer(guard, b"", length="101") == 413
        assert answer(guard, b"", length="many") == 413
        assert answer(guard, b"", path="/gradio_api/upload", length="2000000") == 200

    def test_length_that_is_not(self, guard: Guard) -> None:
        assert answer(guard, b"a" * 60, b"a" * 60) == 413
        assert answer(guard, b"a" * 60, b"a" * 40) == 200

    def test_length_that_is_not_told_to_an_application_that_hides_it(self, tmp_path: Path) -> None:
        async def application(_scope: Any, receive: Any, send: Any) -> None:
            with contextlib.suppress(TooLongError):
                await receive()
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"broken"})

        guard = Guard(application, request_bytes=100, event_bytes=100, folder=tmp_path, disk_bytes=3_000_000)
        assert answer(guard, b"a" * 101) == 413
        assert answer(guard, b"a" * 100) == 500

    def test_disk_that_is_full(self, guard: Guard, tmp_path: Path) -> None:
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "photo").write_bytes(b"0" * 2_000_000)
        assert answer(guard, b"", path="/gradio_api/upload", length="900000") == 200
        assert answer(guard, b"", path="/gradio_api/upload", length="1000001") == 507
        assert answer(guard, b"", path="/gradio_api/upload") == 507  # it may have 3 000 000
        assert answer(guard, b"") == 200

    def test_uploads_on_their_way_count(self, tmp_path: Path) -> None:
        nested: list[int] = []

        async def application(_scope: Any, _receive: Any, send: Any) -> None:
            if not nested:
                nested.append(0)
                sent = list[MutableMapping[str, Any]]()

                async def keep(message: MutableMapping[str, Any]) -> None:
                    sent.append(message)

                await guard(upload, _receive, keep)
                nested[0] = sent[0]["status"]
            await send({"type": "http.response.start", "status": 200, "headers": []})

        guard = Guard(application, request_bytes=1000, event_bytes=100, folder=tmp_path, disk_bytes=1000)
        headers = [(b"content-length", b"600")]
        upload = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}
        assert answer(guard, b"", path="/gradio_api/upload", length="600") == 200
        assert nested == [507]
        assert answer(guard, b"", path="/gradio_api/upload", length="600") == 200


class TestHeldBytes:
    def test_files_below(self, tmp_path: Path) -> None:
        (tmp_path / "deep" / "er").mkdir(parents=True)
        (tmp_path / "deep" / "er" / "a").write_bytes(b"0" * 30)
        (tmp_path / "b").write_bytes(b"0" * 4)
        assert held_bytes(tmp_path) == 34
        assert held_bytes(tmp_path / "gone") == 0

    def test_sessions_that_are_closed_meanwhile(self, tmp_path: Path) -> None:
        """Counting while folders come and go: an upload of one visitor must not fail because another one leaves."""
        ended, failed = threading.Event(), list[OSError]()

        def come_and_go() -> None:
            while not ended.is_set():
                for number in range(20):
                    (tmp_path / str(number) / "files").mkdir(parents=True)
                    (tmp_path / str(number) / "files" / "a").write_bytes(b"0")
                for number in range(20):
                    shutil.rmtree(tmp_path / str(number))

        thread = threading.Thread(target=come_and_go)
        thread.start()
        try:
            for _ in range(300):
                try:
                    held_bytes(tmp_path)
                except OSError as error:
                    failed.append(error)
        finally:
            ended.set()
            thread.join()
        assert failed == []


class TestMarkup:
    def test_names_are_text(self) -> None:
        assert "<script" not in problems(["<script>alert(1)</script>"])
        assert "<img" not in query_list(["<img src=x onerror=alert(1)>.png"])
