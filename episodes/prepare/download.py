"""Large files over HTTP: broken connections are taken up where they broke, and nothing unchecked gets its name."""

from __future__ import annotations

import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from episodes.prepare.archives import Archive
from episodes.prepare.part import Origin, Part
from episodes.prepare.records import digests_of
from episodes.prepare.space import check_space
from episodes.progress import tqdm
from episodes.types import DataError

_CHUNK = 1 << 18
_LONGEST_PAUSE = 60.0
_WORTH_ANOTHER_TRY = (408, 416, 425, 429)


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a download is tried.

    Attributes:
        attempts: connections in a row that bring nothing new before an address is given up.
        timeout: seconds without a byte after which a connection counts as broken.
        pause: seconds before the second attempt; doubled for each further one, a minute at most.
    """

    attempts: int = 5
    timeout: float = 60.0
    pause: float = 1.0


class _BrokenError(Exception):
    """The connection broke or the server is busy: worth another attempt."""


class _UnusableError(Exception):
    """The address does not have the file."""


def download(
    archive: Archive, folder: Path, *, addresses: Sequence[str], patience: Patience, show_progress: bool
) -> dict[str, str]:
    """Fetch an archive into ``folder / archive.name``, from the first address that has it.

    What arrived is kept in ``NAME.part`` and continued by the next attempt or the next run, as long as the server
    says that the file is still the same. The name is given after size and digest agree; a file that does not agree
    is deleted and fetched once more from nothing.

    Args:
        archive: what to fetch.
        folder: where to; exists.
        addresses: http or https addresses, best first.
        patience: how long to try.
        show_progress: a bar on stderr.

    Returns:
        The file's ``md5`` and ``sha256``.

    Raises:
        DataError: no address has the file, it is not the official one twice, no space, or an odd address.
    """
    for address in addresses:
        _check_address(address)
    part = Part(folder, archive.name)
    troubles: list[str] = []
    waiting, faults = list(addresses), 0
    while waiting and faults < 2:
        address = waiting.pop(0)
        try:
            _fetch(address, part, archive, patience, show_progress)
        except _UnusableError as trouble:
            troubles.append(f"{address}: {trouble}")
            continue
        digests = digests_of(part.path, show_progress=show_progress)
        fault = archive.fault(part.size(), digests)
        if fault is None:
            part.finish()
            return digests
        part.discard()
        faults += 1
        troubles.append(f"{address}: not the official file ({fault}), deleted")
        waiting.append(address)
    hand = f"from {archive.by_hand} in a browser" if archive.by_hand else "by other means"
    raise DataError(
        f"cannot download {archive.name}: {' | '.join(troubles)}; run again later, or fetch that file {hand} "
        "and name its folder with --archives"
    )


def _check_address(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DataError(f"{address!r} is no http or https address; give one, or archives on disk with --archives")


def _fetch(address: str, part: Part, archive: Archive, patience: Patience, show_progress: bool) -> None:
    failures = 0
    with tqdm(desc=archive.name, unit="B", unit_scale=True, disable=not show_progress) as progress:
        while True:
            before = part.size()
            try:
                return _fetch_rest(address, part, archive, patience.timeout, progress)
            except _BrokenError as trouble:
                failures = 0 if part.size() > before else failures + 1
                if failures >= patience.attempts:
                    raise _UnusableError(f"{trouble}, {failures} times in a row") from None
                time.sleep(min(patience.pause * 2 ** max(failures - 1, 0), _LONGEST_PAUSE))


def _fetch_rest(address: str, part: Part, archive: Archive, timeout: float, progress: tqdm) -> None:
    """One connection: all of the file that is not in `part` yet."""
    origin = part.origin()
    start = part.size() if origin else 0
    if origin and start and origin.total == start:
        return  # stopped between the last byte and the check
    with _open(address, start, origin, timeout, part) as response:
        start, total, length = _range_of(response, start, origin, part)
        if None not in (total, archive.size) and total != archive.size:
            raise _UnusableError(f"offers {total} bytes, expected {archive.size}")
        try:
            check_space(part.folder, length or 0)
            with part.path.open("ab" if start else "wb") as file:
                if not start:
                    part.record(Origin(_validator(response), total))
                progress.total = total
                progress.n = start
                progress.refresh()
                _copy(response, file, length, progress)
        except OSError as error:
            raise DataError(
                f"cannot write {part.path}: {error.strerror}; make space or choose another target"
            ) from error
    if total is not None and part.size() < total:
        raise _BrokenError(f"only {part.size()} of {total} bytes came")


def _copy(response: http.client.HTTPResponse, file: IO[bytes], length: int | None, progress: tqdm) -> None:
    received = 0
    while length is None or received < length:
        try:
            chunk = response.read1(_CHUNK if length is None else min(_CHUNK, length - received))
        except (OSError, http.client.HTTPException) as error:
            raise _BrokenError(f"connection broke ({_reason(error)})") from None
        if not chunk:
            break
        file.write(chunk)
        received += len(chunk)
        progress.update(len(chunk))
    if length is not None and received < length:
        raise _BrokenError(f"connection broke after {received} of {length} bytes")


def _open(address: str, start: int, origin: Origin | None, timeout: float, part: Part) -> http.client.HTTPResponse:
    headers = {"User-Agent": "fewshot-seg", "Accept-Encoding": "identity"}
    if origin and start:
        headers |= {"Range": f"bytes={start}-", "If-Range": origin.validator}
    request = urllib.request.Request(address, headers=headers)
    try:
        response: http.client.HTTPResponse = _OPENER.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # less there than we have: another file
            part.discard()
        text = f"answered {error.code} {error.reason}"
        if error.code >= 500 or error.code in _WORTH_ANOTHER_TRY:
            raise _BrokenError(text) from None
        raise _UnusableError(text) from None
    except (OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", error), ssl.SSLCertVerificationError):
            raise _UnusableError(f"its certificate is not valid ({_reason(error)})") from None
        raise _BrokenError(f"no connection ({_reason(error)})") from None
    if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        response.close()
        raise _UnusableError("answered with a web page instead of the file")
    return response


def _range_of(
    response: http.client.HTTPResponse, start: int, origin: Origin | None, part: Part
) -> tuple[int, int | None, int | None]:
    """First byte that comes, bytes of the whole file, bytes that come; None for what the server does not say.

    A server that ignores the range, or whose file has changed, sends all of it: then the first byte is 0.
    """
    given = response.headers.get("Content-Length", "")
    length = int(given) if given.isdecimal() and len(given) < 20 else None
    if response.status != 206:
        return 0, length, length
    match = re.fullmatch(
        r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", response.headers.get("Content-Range", "").strip()
    )
    if origin and match and int(match[1]) == start:
        total = origin.total if match[3] == "*" else int(match[3])
        if total == origin.total and _validator(response) in ("", origin.validator):
            return start, total, int(match[2]) + 1 - start
    part.discard()
    raise _BrokenError("answered with a part of another file")


def _validator(response: http.client.HTTPResponse) -> str:
    """What If-Range may name (RFC 9110, 13.1.5): a strong ETag, else the date; empty when there is neither."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _reason(error: Exception) -> str:
    cause: Any = getattr(error, "reason", None) or error
    return " ".join(str(cause).split()) or type(error).__name__


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Redirections stay on the web: urllib itself would follow one to ftp."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise _UnusableError(f"leads to {newurl!r}, which is no http or https address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_WebOnly)
