"""Files that are whole or not there, and what killed writers leave."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from episodes import writing
from episodes.types import DataError
from episodes.writing import atomic_path, lock_file, reason_of


def write(path: Path, text: str = "new") -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def killed_while_writing(path: Path) -> Path:
    """What a process leaves that is killed with SIGKILL in the middle of writing `path`."""
    process = os.fork()
    if process == 0:
        try:
            with atomic_path(path) as temporary:
                temporary.write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    (left,) = [one for one in path.parent.iterdir() if one != path]
    return left


@pytest.fixture(autouse=True)
def _as_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_cleared", set())


def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    left = killed_while_writing(path)
    assert left.name.startswith(".model-")
    assert left.name.endswith(".writing.safetensors")
    assert path.read_text() == "old"
    write(tmp_path / "another.json")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["another.json", path.name]


def test_what_another_is_writing_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("a")
        monkeypatch.setattr(writing, "_cleared", set())  # as another process would begin
        write(tmp_path / "b.txt")
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"a.txt": "a", "b.txt": "new"}


@pytest.mark.parametrize("name", [".bashrc", ".model-abcdefgh.safetensors", "a-abcdefgh.writing.json", ".x.writing"])
def test_other_files_are_nobodys_to_clear(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    write(tmp_path / "file.json")
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_taken_away_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, taken = writing.lock_file, list[Path]()

    def late(handle: int) -> bool | None:
        if not taken:  # another process clears in this very moment
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        return lock(handle)

    monkeypatch.setattr(writing, "lock_file", late)
    write(tmp_path / "file.json")
    assert [one.read_text() for one in tmp_path.iterdir()] == ["new"]
    assert len(taken) == 1


def test_errors_that_are_not_of_writing_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file.json"):
        (tmp_path / "nowhere").read_text()
    with pytest.raises(ValueError, match="other"), atomic_path(tmp_path / "file.json"):
        raise ValueError("other")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.json"

    def vanishes() -> None:
        with atomic_path(path) as temporary:
            temporary.unlink()
            path.parent.rmdir()

    with pytest.raises(DataError, match=r"cannot write .*file\.json: No such file .* something else removed it"):
        vanishes()


def test_reasons() -> None:
    assert reason_of(OSError(errno.ENOSPC, "No space left on device")).endswith(
        "make room there, or choose another place"
    )
    assert reason_of(OSError("encoder error -2")) == "encoder error -2; choose a folder you may write to"


def test_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cleared then: it could be somebody's."""
    left = killed_while_writing(tmp_path / "file.json")
    monkeypatch.setattr(writing, "fcntl", None)
    write(tmp_path / "file.json")
    assert left.exists()
    with left.open() as file:
        assert lock_file(file.fileno()) is None
