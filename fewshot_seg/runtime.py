"""Device, environment record, files that are never half-written."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from episodes.files import read_text
from episodes.types import DataError
from episodes.writing import atomic_path as atomic_path

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


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, written beside and renamed.

    safetensors' own `save_file` writes beside under a name of its own, and a killed run would leave that for ever.

    Raises:
        DataError: see `atomic_path`.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(dict(tensors), metadata=dict(metadata)))


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
