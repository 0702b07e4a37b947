"""Disk space, asked for before the work starts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from episodes.prepare.archives import Archive
from episodes.types import DataError


def bytes_needed(archives: Sequence[Archive], *, downloads: Path | None, keep_archives: bool) -> int:
    """Space that is missing at the worst moment: all unpacked so far, the archive in hand and its contents.

    Args:
        archives: in the order in which they are fetched and unpacked, about sizes where exact ones are not known.
        downloads: folder they are fetched into, where some of it may be already; None when they are on disk.
        keep_archives: whether archives stay after unpacking.
    """
    used = needed = 0
    for archive in archives:
        if downloads is not None:
            files = (downloads / archive.name, downloads / f"{archive.name}.part")
            present = sum(file.stat().st_size for file in files if file.exists())
            missing = max((archive.size or archive.unpacked) - present, 0)
        else:
            present = missing = 0
        needed = max(needed, used + missing + archive.unpacked)
        used += archive.unpacked + (missing if keep_archives else -present)
    return needed


def check_space(target: Path, needed: int) -> None:
    """Raises DataError when fewer than `needed` bytes are free in `target`."""
    free = shutil.disk_usage(target).free
    if needed > free:
        raise DataError(
            f"{target}: needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "make space or choose a target on another disk"
        )
