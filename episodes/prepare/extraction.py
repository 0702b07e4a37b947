"""Archives unpacked without trusting them: no member leaves the folder, no link, no device, no bomb."""

from __future__ import annotations

import gzip
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from episodes.progress import tqdm
from episodes.types import DataError

_LEAST = 512  # what an entry takes at least: a million empty files are a bomb too
# What the readers of the standard library raise on damaged archives, by experience; OSError is told apart.
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


def extract(path: Path, folder: Path, *, wanted: Sequence[str], limit: int, show_progress: bool) -> None:
    """Unpack the wanted members of a ``.zip``, ``.tar``, ``.tar.gz`` or ``.tgz``.

    Every member is checked, also those that stay inside. Symbolic links that stay inside the folder are left
    out: none of the data sets needs one, and without any on disk no later member can be written through one.

    Args:
        path: the archive.
        folder: where to; made when missing. Half-filled when an error comes: the caller removes it.
        wanted: folders and files of the archive to unpack.
        limit: bytes that the members may declare in all.
        show_progress: a bar on stderr.

    Raises:
        DataError: damaged archive, a member that is not to be trusted (named), or no space.
    """
    with _as_data_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        budget = _Budget(path, limit, shutil.disk_usage(folder).free)
        bar = tqdm(
            total=path.stat().st_size,
            desc=f"unpack {path.name}",
            unit="B",
            unit_scale=True,
            disable=not show_progress,
        )
        unpack = _extract_zip if path.suffix.lower() == ".zip" else _extract_tar
        with bar as progress:
            unpack(path, folder, wanted, budget, progress)


class _Budget:
    """Counts what the members declare, and their names."""

    def __init__(self, path: Path, limit: int, free: int) -> None:
        self._path = path
        self._limit = limit
        self._free = free
        self._spent = 0
        self._names: set[str] = set()

    def admit(self, name: str, size: int, *, is_file: bool) -> None:
        """Raises DataError for an untrusted or repeated name, or one member too many."""
        windows = PureWindowsPath(name)  # knows both separators and drive letters
        if windows.drive or windows.root:
            raise _refusal(self._path, name, "has an absolute path")
        if ".." in windows.parts or "\0" in name:
            raise _refusal(self._path, name, "leaves the target folder")
        plain = str(PurePosixPath(name))  # "./a" and "a" are one file
        if is_file and plain in self._names:
            raise _refusal(self._path, name, "is there twice")
        self._names.add(plain)
        self._spent += max(size, _LEAST)
        if self._spent > self._limit:
            raise _refusal(
                self._path, name, f"brings the contents above {_gigabytes(self._limit)}, far above the usual"
            )
        if self._spent > self._free:
            raise DataError(
                f"{self._path}: unpacking needs more than the {_gigabytes(self._free)} that are free; "
                "make space or choose a target on another disk"
            )


def _extract_tar(path: Path, folder: Path, wanted: Sequence[str], budget: _Budget, progress: tqdm) -> None:
    with path.open("rb") as file, tarfile.open(fileobj=file) as archive:
        for member in archive:
            budget.admit(member.name, member.size, is_file=member.isfile())
            tarfile.data_filter(member, str(folder))  # refuses devices and links that point outside
            if not member.issym() and _is_wanted(member.name, wanted):
                archive.extract(member, folder, filter="data")
            progress.update(file.tell() - progress.n)


def _extract_zip(path: Path, folder: Path, wanted: Sequence[str], budget: _Budget, progress: tqdm) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:  # a zip lists its members at once: refused before anything is written
            budget.admit(member.filename, member.file_size, is_file=not member.is_dir())
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refusal(path, member.filename, "is a link" if kind == stat.S_IFLNK else "is a special file")
        for member in members:
            if _is_wanted(member.filename, wanted):
                archive.extract(member, folder)
            progress.update(member.compress_size)


def _is_wanted(name: str, wanted: Sequence[str]) -> bool:
    path = PurePosixPath(name)
    return any(path.is_relative_to(one) for one in wanted)


@contextmanager
def _as_data_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except tarfile.FilterError as error:
        raise _refusal(path, error.tarinfo.name, _why(error)) from None
    except _DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a sound archive ({reason}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot unpack: {error.strerror or error}; make space or check permissions") from error


def _why(error: tarfile.FilterError) -> str:
    if isinstance(error, tarfile.SpecialFileError):
        return "is a special file"
    if isinstance(error, tarfile.AbsoluteLinkError | tarfile.LinkOutsideDestinationError):
        return "is a link that leaves the target folder"
    return "leaves the target folder"


def _refusal(path: Path, name: str, why: str) -> DataError:
    return DataError(f"{path}: refused, member {name!r} {why}; get the archive from its official address")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
