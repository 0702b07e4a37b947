"""Device, environment record, files that are never half-written."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from episodes.files import read_text
from episodes.types import DataError

_RECORDED = ("fewshot-seg", "torch", "torchvision", "timm", "segmentation-models-pytorch", "albumentations", "numpy")


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` takes a GPU if one is there.

    Raises:
        DataError: a device that torch does not know or have, or that holds no data (``meta``).
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:  # built without CUDA; a backend's missing plug-in
        raise DataError(f"device {name!r} is not available here; use 'auto' or 'cpu'") from error
    return device


def environment() -> dict[str, Any]:
    """Versions, platform and commit, for run.json."""
    versions = {}
    for package in _RECORDED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "commit": git_commit(),
        "threads": torch.get_num_threads(),
    }


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with ``-dirty`` if changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", str(Path(__file__).resolve())],
            capture_output=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    # an installed copy inside somebody else's repository is not that repository's commit
    return described.stdout.strip() if tracked.returncode == 0 else None


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block succeeds, removed when it fails.

    Raises:
        DataError: the folder cannot be written, or `path` is itself a folder.
    """
    if path.is_dir():
        raise DataError(f"cannot write {path}: it is a folder; give the path of a file, in that folder or elsewhere")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=path.suffix)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; choose a folder you may write to") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """JSON with a final newline, written beside and renamed. What is no UTF-8 in names of files is escaped."""
    with atomic_path(path) as temporary:
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path, *, what: str) -> Any:
    """Parsed JSON. Raises DataError naming the file when it is missing or damaged; `what` says what it should be."""
    try:
        return json.loads(read_text(path))
    except OSError as error:
        raise DataError(f"cannot read {what} {path}: {error.strerror}; check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} {path} is not valid JSON ({error}); delete it or restore it") from error
