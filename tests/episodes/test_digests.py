"""Digests of contents: against hashlib, and that only changed files are read again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from episodes import digests
from episodes.digests import content_digests
from episodes.sources import SourceError
from episodes.sources.fingerprints import fingerprint_files


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / "data" / f"{number}.png" for number in range(1200)]  # more than one question holds
    found[0].parent.mkdir()
    for number, file in enumerate(found):
        file.write_bytes(b"picture %d" % (number % 7))
    return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that are read; nothing is small enough to do without the memory."""
    seen: list[str] = []
    read = digests._digest
    monkeypatch.setattr(digests, "_FEW_BYTES", 0)
    monkeypatch.setattr(digests, "_digest", lambda path: (seen.append(path), read(path))[1])
    return seen


def entries(files: list[Path]) -> dict[str, os.stat_result]:
    return {str(file): file.stat() for file in files}


def expected(files: list[Path]) -> dict[str, str]:
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_few_files_are_read_without_a_memory(files: list[Path], tmp_path: Path) -> None:
    memory = tmp_path / "memory.sqlite"
    assert content_digests(entries(files), memory=memory) == expected(files)
    assert not memory.exists()


def test_only_what_has_changed_is_read_again(files: list[Path], tmp_path: Path, reads: list[str]) -> None:
    memory = tmp_path / "deep" / "memory.sqlite"
    assert content_digests(entries(files), memory=memory) == expected(files)
    assert sorted(reads) == sorted(map(str, files))
    reads.clear()
    assert content_digests(entries(files), memory=memory) == expected(files)
    assert reads == []
    before = files[3].stat()
    files[3].write_bytes(b"Picture 3")  # as long as before
    os.utime(files[3], ns=(before.st_atime_ns, before.st_mtime_ns))  # and as old: the time of the change tells
    assert content_digests(entries(files), memory=memory) == expected(files)
    assert reads == [str(files[3])]


def test_a_relative_path_is_the_same_file(
    files: list[Path], tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content_digests(entries(files), memory=tmp_path / "memory.sqlite")
    reads.clear()
    monkeypatch.chdir(files[0].parent)
    found = content_digests({"5.png": files[5].stat()}, memory=tmp_path / "memory.sqlite")
    assert found == {"5.png": expected(files)[str(files[5])]}
    assert reads == []


@pytest.mark.parametrize("damage", ["not a database", "directory", "locked folder", "other table"])
def test_a_memory_that_cannot_be_used_is_done_without(
    files: list[Path], tmp_path: Path, reads: list[str], damage: str
) -> None:
    memory = tmp_path / "memory.sqlite"
    if damage == "not a database":
        memory.write_bytes(b"x" * 5000)
    elif damage == "directory":
        memory.mkdir()
    elif damage == "locked folder":
        (tmp_path / "file").write_text("")
        memory = tmp_path / "file" / "memory.sqlite"
    else:
        import sqlite3

        with sqlite3.connect(memory) as kept:
            kept.execute("CREATE TABLE digests (something INTEGER)")
    assert content_digests(entries(files), memory=memory) == expected(files)
    assert len(reads) == len(files)


def test_fingerprint_does_not_know_where_the_data_lie(files: list[Path], tmp_path: Path) -> None:
    moved = files[0].parent.rename(tmp_path / "elsewhere")
    there = fingerprint_files((name, [str(moved / name)]) for name in ("0.png", "1.png"))
    text = "".join(f"{name}\0{expected([moved / name])[str(moved / name)]}\n" for name in ("0.png", "1.png"))
    assert there == hashlib.sha256(text.encode()).hexdigest()
    assert there == fingerprint_files((f"{n}.png", [str(moved / "nowhere"), str(moved / f"{n}.png")]) for n in range(2))


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    for name, said in (("pipe.png", "not a regular file"), ("gone.png", "no such file")):
        with pytest.raises(SourceError, match=rf"{name}: .*{said}"):
            fingerprint_files([(name, [str(tmp_path / name)])])
