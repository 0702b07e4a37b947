"""What was prepared: digests of archives, counts of files, and `prepared.json` that keeps both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from episodes.files import read_text, require_file
from episodes.progress import tqdm
from episodes.types import DataError
from episodes.writing import atomic_path

RECORD_NAME = "prepared.json"
_CHUNK = 1 << 20

FolderCounts = Mapping[str, tuple[int, int]]
"""Folder relative to the target -> number of files directly in it, and their bytes."""


def digests_of(path: Path, *, show_progress: bool) -> dict[str, str]:
    """``md5`` and ``sha256`` of a file in one reading. Raises DataError when it cannot be read."""
    sums = {"md5": hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256()}
    try:
        require_file(path)
        with (
            path.open("rb") as file,
            tqdm(
                total=path.stat().st_size,
                desc=f"check {path.name}",
                unit="B",
                unit_scale=True,
                disable=not show_progress,
            ) as progress,
        ):
            while chunk := file.read(_CHUNK):
                for one in sums.values():
                    one.update(chunk)
                progress.update(len(chunk))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the file and its permissions") from error
    return {name: one.hexdigest() for name, one in sums.items()}


def count_files(root: Path) -> dict[str, tuple[int, int]]:
    """Counts of every folder below `root` that holds files, by path relative to `root`."""
    counts = {}
    for folder, _, names in os.walk(root):
        if names:
            sizes = [(Path(folder) / name).stat().st_size for name in names]
            counts[Path(folder).relative_to(root).as_posix()] = (len(names), sum(sizes))
    return dict(sorted(counts.items()))


def is_damaged(root: Path, recorded: FolderCounts) -> bool:
    """Whether a folder has fewer files or bytes than recorded; additions are no damage."""
    for folder, (files, size) in recorded.items():
        if not (root / folder).is_dir():
            return True
        sizes = [entry.stat().st_size for entry in os.scandir(root / folder) if entry.is_file()]
        if len(sizes) < files or sum(sizes) < size:
            return True
    return False


def read_record(target: Path) -> dict[str, Any]:
    """Archive name -> what `prepared.json` says of it; empty without that file. Raises DataError if it is damaged."""
    path = target / RECORD_NAME
    try:
        archives: dict[str, dict[str, Any]] = json.loads(read_text(path))["archives"]
        for entry in archives.values():
            sound = isinstance(entry["complete"], bool) and isinstance(entry["sha256"], str)
            for folder, (files, size) in entry["folders"].items():
                sound &= isinstance(files, int) and isinstance(size, int) and ".." not in Path(folder).parts
            if not sound:
                raise ValueError("not what was written")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; choose a folder you may read") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(
            f"{path} is not a record of `data prepare`; move it and the data beside it away, or choose another target"
        ) from None
    return dict(archives)


def write_record(target: Path, archives: Mapping[str, Any]) -> None:
    """`prepared.json`, written beside and renamed."""
    with atomic_path(target / RECORD_NAME) as temporary:
        temporary.write_text(json.dumps({"archives": archives}, indent=1) + "\n", encoding="utf-8")
