"""Serves the page until it is stopped, from a temporary folder that is removed at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from episodes.types import DataError
from fewshot_seg.app.limits import Limits
from fewshot_seg.app.session import Engine, Session
from fewshot_seg.app.sessions import Sessions

INSTALL = "pip install 'fewshot-seg[app]'"
_EVENT_BYTES = 4_000_000
_NO_PROXY = ("NO_PROXY", "no_proxy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A page that is listened for: its address, and the sessions of those who have it open."""

    address: str
    sessions: Sessions
    folder: Path


def check_package() -> None:
    """Raises DataError where gradio is not installed; it is not imported, which would read its variables."""
    if importlib.util.find_spec("gradio") is None:
        raise DataError(f"the page needs gradio: {INSTALL}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there: of a name, at all addresses that it stands for.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    if host == "localhost":
        return True
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)


def check_address(host: str, port: int | None) -> None:
    """Ask the machine once whether somebody can listen there.

    Raises:
        DataError: nobody can; or it is an address of IPv6.
    """
    if not host or ":" in host:
        raise DataError(f"--host {host!r} is not served: give an address of IPv4, such as 127.0.0.1, or a name")
    try:
        address = socket.getaddrinfo(host, port or 0, socket.AF_INET, socket.SOCK_STREAM)[0][4]
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int | None, error: Exception) -> DataError:
    where = f"{host}:{port}" if port else host
    return DataError(f"cannot listen at {where}: {error}; choose another --port or --host")


@contextlib.contextmanager
def serve(
    engine: Engine,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    reach: float = 4.0,
    limits: Limits | None = None,
    model_flags: Sequence[str] = (),
) -> Iterator[Served]:
    """Listen, in threads of their own, for as long as the block lasts; then nothing of it is left on disk.

    Args:
        engine: the model.
        host: address to listen at.
        port: None for the first that is free from 7860.
        reach: how far the page's control of the threshold goes to either side of the model's.
        limits: bounds.
        model_flags: with which ``fewshot-seg predict`` takes the same model, told to visitors.

    Raises:
        DataError: gradio is not installed, or nobody can listen at that address.
    """
    check_package()
    check_address(host, port)
    bounds = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="fewshot-seg-app-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        uploads = folder / "uploads"
        uploads.mkdir()
        sessions = Sessions(
            # gradio serves what lies among the uploads from there, and makes no copy of it that would stay
            lambda: Session(engine, bounds, folder, outbox=uploads),
            capacity=bounds.sessions,
            idle_seconds=bounds.idle_seconds,
        )
        with _gradios_environment(uploads):
            from fewshot_seg.app.page import build_page

            page = build_page(
                sessions,
                bounds,
                threshold=engine.segmenter.threshold,
                reach=reach,
                model=engine.name,
                model_flags=model_flags,
            )
            try:
                with _swept(sessions, bounds.sweep_seconds):
                    address = _listen(page, host, port, bounds, folder)
                    yield Served(address=address, sessions=sessions, folder=folder)
            finally:
                page.close(verbose=False)
                sessions.close()


@contextlib.contextmanager
def _swept(sessions: Sessions, seconds: float) -> Iterator[None]:
    """Sessions that nobody uses are closed also while no page asks."""
    ended = threading.Event()

    def sweep() -> None:
        while not ended.wait(seconds):
            sessions.sweep()

    thread = threading.Thread(target=sweep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _listen(page: Any, host: str, port: int | None, limits: Limits, folder: Path) -> str:
    from fewshot_seg.app.page import text_of, theme

    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            allowed_paths=[],
            blocked_paths=[],
            max_file_size=limits.file_bytes,
            state_session_capacity=limits.sessions,
            show_error=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            theme=theme(),
            css=text_of("page.css"),
            app_kwargs={"middleware": _middleware(host, limits, folder)},
        )
    except Exception as error:  # gradio asks its own page, and raises whatever comes of that
        raise _cannot_listen(host, port, error) from error
    return str(address)


def _middleware(host: str, limits: Limits, folder: Path) -> list[Any]:
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from fewshot_seg.app.guard import Guard

    guard = Middleware(
        Guard,
        request_bytes=limits.queries * limits.file_bytes,
        event_bytes=_EVENT_BYTES,
        folder=folder,
        disk_bytes=limits.disk_bytes,
    )
    if not is_loopback(host):
        return [guard]
    # a page of somebody else's, whose name is made to point here, is not let in
    return [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", host.lower()]), guard]


@contextlib.contextmanager
def _gradios_environment(uploads: Path) -> Iterator[None]:
    """The user's variables ``GRADIO_...`` are not heeded: no shared page, no open folder. Uploads go to `uploads`.

    Nor is a proxy: at its start gradio asks the page, which no proxy reaches, and afterwards nobody else.
    """
    before = _taken_out()
    os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False"}
    os.environ |= dict.fromkeys(_NO_PROXY, "*")
    try:
        yield
    finally:
        _taken_out()
        os.environ |= before


def _taken_out() -> dict[str, str]:
    return {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("GRADIO_") or name in _NO_PROXY}
