"""What stands between the network and the page: bounds on requests, and a policy that keeps the browser at home."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_Application = Callable[[_Message, _Receive, _Send], Awaitable[None]]

_HEADERS = (
    # gradio's scripts are inline and made at run time; nothing may come from, or go to, anywhere else
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
        b"object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
_ROOM_FOR_FORM = 1_000_000
_UPLOAD = "/gradio_api/upload"


class Guard:
    """ASGI: refuses requests that are too large, and uploads that the disk's share has no room for; adds headers.

    Args:
        application: what is guarded.
        request_bytes: most of an upload; other requests may have `event_bytes`.
        event_bytes: most of any other request: drawings are sent with these.
        folder: of everything that is uploaded and written.
        disk_bytes: that it may hold.
    """

    def __init__(
        self, app: _Application, *, request_bytes: int, event_bytes: int, folder: Path, disk_bytes: int
    ) -> None:
        self._application, self._folder, self._disk = app, folder, disk_bytes
        self._request_bytes, self._event_bytes = request_bytes + _ROOM_FOR_FORM, event_bytes
        self._coming = 0

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        uploads = scope["path"].endswith(_UPLOAD)
        most = self._request_bytes if uploads else self._event_bytes
        declared = _declared(scope)
        if declared is not None and declared > most:
            await _refuse(send, 413, _too_long(most))
            return
        if not (uploads and scope["method"] == "POST"):
            await self._pass_on(scope, receive, send, most)
            return
        length = most if declared is None else declared
        if held_bytes(self._folder) + self._coming + length > self._disk:
            await _refuse(send, 507, "no room for more uploads now; try again later")
            return
        self._coming += length  # others may come before this one lies on disk
        try:
            await self._pass_on(scope, receive, send, most)
        finally:
            self._coming -= length

    async def _pass_on(self, scope: _Message, receive: _Receive, send: _Send, most: int) -> None:
        """Whatever the application makes of a request that goes on for too long, the answer is 413."""
        came, answered = 0, False

        async def counted() -> _Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > most:
                raise TooLongError(_too_long(most))
            return message

        async def noted(message: _Message) -> None:
            nonlocal answered
            if came > most and not answered:
                return
            answered = True
            await send(message)

        try:
            await self._application(scope, counted, _with_headers(noted))
        except Exception:
            if came <= most:
                raise
        if came > most and not answered:
            await _refuse(send, 413, _too_long(most))


def _declared(scope: _Message) -> int | None:
    """Content-Length; of one that is no number what no request may have."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 19 else 2**63
    return None


def _too_long(most: int) -> str:
    return f"at most {most} bytes are taken at a time"


class TooLongError(Exception):
    """A request goes on for longer than it may: it said nothing, or lied, of its length."""


def _with_headers(send: _Send) -> _Send:
    async def added(message: _Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
        await send(message)

    return added


async def _refuse(send: _Send, status: int, reason: str) -> None:
    body = reason.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def held_bytes(folder: Path) -> int:
    """Of all files below a folder; files and folders that vanish meanwhile count for nothing."""
    total = 0
    for parent, _, names in os.walk(folder):  # passes over a folder that is gone; Path.rglob raises
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(f"{parent}/{name}").st_size
    return total
