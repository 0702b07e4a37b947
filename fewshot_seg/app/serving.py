"""Serves the page until it is stopped, from a temporary folder that is removed at the end."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from episodes.types import DataError
from fewshot_seg.app.limits import Limits
from fewshot_seg.app.session import Engine, Session
from fewshot_seg.app.sessions import Sessions

INSTALL = "pip install 'fewshot-seg[app]'"
_EVENT_BYTES = 4_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A page that is listened for: its address, and the sessions of those who have it open."""

    address: str
    sessions: Sessions
    folder: Path


def check_package() -> None:
    """Raises DataError where gradio is not installed."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise DataError(f"the page needs gradio: {INSTALL}") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def serve(
    engine: Engine,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    threshold: float | None = None,
    reach: float = 4.0,
    limits: Limits | None = None,
) -> Iterator[Served]:
    """Listen, in threads of their own, for as long as the block lasts; then nothing of it is left on disk.

    Args:
        engine: the model.
        host: address to listen at.
        port: None for the first that is free from 7860.
        threshold: logit that masks are cut at first, instead of the model's.
        reach: how far the page's control goes to either side of it.
        limits: bounds.

    Raises:
        DataError: gradio is not installed, or nobody can listen at that address.
    """
    check_package()
    bounds = limits or Limits()
    first = engine.segmenter.threshold if threshold is None else threshold
    with tempfile.TemporaryDirectory(prefix="fewshot-seg-app-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        uploads, work = folder / "uploads", folder / "sessions"
        uploads.mkdir()
        work.mkdir()
        sessions = Sessions(
            lambda: Session(engine, bounds, work), capacity=bounds.sessions, idle_seconds=bounds.idle_seconds
        )
        with _gradios_environment(uploads):
            from fewshot_seg.app.page import build_page

            page = build_page(sessions, bounds, threshold=first, reach=reach, model=engine.name)
            try:
                address = _listen(page, host, port, bounds, folder)
                yield Served(address=address, sessions=sessions, folder=folder)
            finally:
                page.close(verbose=False)
                sessions.close()


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
    except OSError as error:
        where = f"{host}:{port}" if port else host
        raise DataError(f"cannot listen at {where}: {error}; choose another --port or --host") from error
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
    if host not in ("127.0.0.1", "localhost"):
        return [guard]
    # a page of somebody else's, whose name is made to point here, is not let in
    return [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]), guard]


@contextlib.contextmanager
def _gradios_environment(uploads: Path) -> Iterator[None]:
    """The user's variables ``GRADIO_...`` are not heeded: no shared page, no open folder. Uploads go to `uploads`."""
    before = dict(os.environ)
    for name in [one for one in before if one.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False"}
    try:
        yield
    finally:
        for name in [one for one in os.environ if one.startswith("GRADIO_")]:
            del os.environ[name]
        os.environ |= {name: value for name, value in before.items() if name.startswith("GRADIO_")}
