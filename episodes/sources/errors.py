"""The error of a single file, in parts, so that a report can list many of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from episodes.types import DataError

ProblemKind = Literal[
    "missing",
    "undecodable",
    "size-mismatch",
    "unknown-label",
    "rgb-mask",
    "empty-class",
    "empty-split",
    "bad-annotation",
    "unsafe-name",
    "duplicate",
    "too-few",
]


class SourceError(DataError):
    """A `DataError` of one file. Its text is ``FILE: MESSAGE; MEND``.

    Attributes:
        file: the file that is wrong.
        kind: what is wrong, one word of `ProblemKind`.
        message: what was expected and what came.
        mend: what the user can do.
    """

    def __init__(self, file: Path | str, kind: ProblemKind, message: str, mend: str) -> None:
        super().__init__(f"{file}: {message}; {mend}")
        self.file = str(file)
        self.kind: ProblemKind = kind
        self.message = message
        self.mend = mend

    def __reduce__(self) -> tuple[type[SourceError], tuple[str, str, str, str]]:
        # Raised inside DataLoader workers: the default of exceptions would lose the four parts.
        return type(self), (self.file, self.kind, self.message, self.mend)
