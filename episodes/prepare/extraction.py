"""Archives unpacked without trusting them: no member leaves the folder, no link, no device, no bomb."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, cast

from episodes.files import require_file
from episodes.progress import tqdm
from episodes.sources.decoding import reason_of
from episodes.types import DataError

_LEAST = 512  # what an entry takes at least: a million empty files are a bomb too
_LONGEST_HEADER = 1 << 20  # what a tar may say of one member: its long name, its comments


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
        require_file(path)
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
    with path.open("rb") as file, _unpacked(file) as plain, tarfile.open(fileobj=plain, mode="r:") as archive:
        place = -1
        for member in archive:
            budget.admit(member.name, member.size, is_file=member.isfile())
            if member.size < 0 or member.offset <= place:  # the same members again, without end
                raise _refusal(path, member.name, "leads back to what was read before")
            place = member.offset
            tarfile.data_filter(member, str(folder))  # refuses devices and links that point outside
            if member.islnk() and _is_wanted(member.name, wanted) and not os.path.isfile(folder / member.linkname):  # noqa: PTH113 - never raises
                raise _refusal(path, member.name, "is a link to a file that is not unpacked")
            if not member.issym() and _is_wanted(member.name, wanted):
                archive.extract(member, folder, filter="data")
            progress.update(file.tell() - progress.n)


@contextmanager
def _unpacked(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """The plain tar of a file that may be compressed; a header that asks for too much memory is an error."""
    magic = file.read(6)
    file.seek(0)
    readers: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
        b"\x1f\x8b": lambda one: gzip.GzipFile(fileobj=one),
        b"BZh": bz2.BZ2File,
        b"\xfd7zXZ\0": lzma.LZMAFile,
    }
    reader = next((one for start, one in readers.items() if magic.startswith(start)), None)
    plain = file if reader is None else reader(file)
    try:
        yield cast(IO[bytes], _InSmallParts(plain))
    finally:
        if plain is not file:
            plain.close()


class _InSmallParts:
    """What `tarfile` needs of a file. It copies contents in small parts, but reads what a header says in one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


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
    except OSError as error:
        if error.errno is None:  # of the decompressors: damaged data
            raise _unsound(path, error) from None
        raise DataError(f"{path}: cannot unpack: {error.strerror or error}; make space or check permissions") from error
    except Exception as error:  # the readers of the standard library raise whatever damaged bytes lead them to
        raise _unsound(path, error) from None


def _unsound(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a sound archive ({reason_of(error)}); fetch it again")


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
