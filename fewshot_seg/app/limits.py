"""What visitors of the page may take up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds of memory, disk and work.

    Attributes:
        supports: example photos of a session.
        queries: photos that are searched in a session.
        file_bytes: of one file.
        pixels: of one photo, upright; a file of some kilobytes can claim to be any size.
        sessions: pages open at a time; the one that was not used for longest makes room.
        idle_seconds: after which an unused session is put away, and after which temporary files are deleted.
        sweep_seconds: between two looks for unused sessions and old files.
        disk_bytes: of everybody's uploads and files to download together.
        waiting: events that wait in line; more are turned away.
    """

    supports: int = 5
    queries: int = 50
    file_bytes: int = 25_000_000
    pixels: int = 50_000_000
    sessions: int = 32
    idle_seconds: float = 3600.0
    sweep_seconds: float = 60.0
    disk_bytes: int = 8_000_000_000
    waiting: int = 64
