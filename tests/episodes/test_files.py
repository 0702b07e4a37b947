"""Files that are none: pipes, devices, folders, names that can be no file's, links in circles."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from episodes.files import is_file, read_bytes, read_text, real_path, require_file, user_path
from episodes.types import DataError, printable


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("read", [read_bytes, read_text, require_file])
class TestNoFile:
    def test_a_pipe_is_not_waited_for(self, pipe: Path, read: Callable[[Path], object]) -> None:
        with pytest.raises(OSError, match="a named pipe, no file"):
            read(pipe)

    def test_a_device_is_not_read_without_end(self, read: Callable[[Path], object]) -> None:
        with pytest.raises(OSError, match="a device, no file"):
            read(Path("/dev/zero"))

    def test_a_folder(self, tmp_path: Path, read: Callable[[Path], object]) -> None:
        with pytest.raises(IsADirectoryError):
            read(tmp_path)

    @pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000])
    def test_names_that_no_file_has(self, tmp_path: Path, read: Callable[[Path], object], name: str) -> None:
        with pytest.raises(OSError, match=r"no file can have this name|File name too long"):
            read(tmp_path / name)
        assert not is_file(tmp_path / name)

    def test_links_in_a_circle(self, tmp_path: Path, read: Callable[[Path], object]) -> None:
        (tmp_path / "one").symlink_to(tmp_path / "two")
        (tmp_path / "two").symlink_to(tmp_path / "one")
        with pytest.raises(OSError, match="symbolic links"):
            read(tmp_path / "one")
        assert real_path(tmp_path / "one").parent == tmp_path.resolve()


def test_a_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    for name in ("with space", "über", "line\nend", os.fsdecode(b"\xff\xfe")):
        (tmp_path / name).write_text("inhalt é", encoding="utf-8")
        assert read_text(tmp_path / name) == "inhalt é"
        assert is_file(tmp_path / name)


def test_home_folders_of_nobody() -> None:
    assert user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert user_path("~") == Path.home()
    assert real_path("a\0b") == Path("a\0b")


def test_messages_are_one_printable_line() -> None:
    error = DataError("a\nb\x1b[2J\udcff: über; mend it")
    assert str(error) == "a\\nb\\x1b[2J\\udcff: über; mend it"
    assert printable("plain é") == "plain é"
    long = str(DataError(f"file.txt: no class {'x' * 10_000!r}; correct the list"))
    assert len(long) < 2000
    assert long.startswith("file.txt: no class 'xxx")
    assert long.endswith("xxx'; correct the list")
