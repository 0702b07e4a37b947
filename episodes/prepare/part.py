"""A file that is still arriving: ``NAME.part``, and ``NAME.part.json`` that says of which version it is a part."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from episodes.files import read_text


@dataclass(frozen=True, slots=True)
class Origin:
    """Which version of a file at a server.

    Attributes:
        validator: strong ETag or date of change, what a later request may name in If-Range; never empty when read.
        total: bytes of the whole file, None when the server did not say.
    """

    validator: str
    total: int | None


@dataclass(frozen=True, slots=True)
class Part:
    """What has arrived of ``folder / name``."""

    folder: Path
    name: str

    @property
    def path(self) -> Path:
        """Where the bytes are."""
        return self.folder / f"{self.name}.part"

    @property
    def _record(self) -> Path:
        return self.folder / f"{self.name}.part.json"

    def size(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def origin(self) -> Origin | None:
        """None when nothing is recorded to recognise the file by: then it is to be fetched from its first byte."""
        try:
            record = json.loads(read_text(self._record))
            validator, total = record["validator"], record["total"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        sendable = isinstance(validator, str) and validator.isascii() and validator.isprintable()  # it becomes a header
        known = total is None or (isinstance(total, int) and not isinstance(total, bool) and total >= 0)
        return Origin(validator, total) if sendable and validator and known else None

    def record(self, origin: Origin) -> None:
        """Note the version; to be called when the bytes of another version are gone."""
        self._record.write_text(json.dumps(asdict(origin)) + "\n", encoding="utf-8")

    def discard(self) -> None:
        """Forget what has arrived."""
        self.path.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the complete and checked file its name."""
        self.path.replace(self.folder / self.name)
        self._record.unlink(missing_ok=True)
