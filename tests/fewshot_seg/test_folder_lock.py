"""One run at a time in a folder, by a lock that ends with its owner."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from episodes.types import DataError
from fewshot_seg import folder_lock
from fewshot_seg.folder_lock import LOCK_NAME, folder_of_one_run


def hold(folder: Path) -> int:
    """Another process that holds the folder, until it is killed."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with folder_of_one_run(folder):
                os.write(write, b"!")
                signal.pause()
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"!"
    os.close(read)
    return process


def end(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_another_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    process = hold(folder)
    try:
        expected = rf"{folder} is in use by another run \(process {process}\); wait until"
        with pytest.raises(DataError, match=expected), folder_of_one_run(folder):
            pass
    finally:
        end(process)
    assert (folder / LOCK_NAME).exists()  # left, and of no effect
    with folder_of_one_run(folder):
        assert (folder / LOCK_NAME).read_text() == f"{os.getpid()}\n"
    assert list(folder.iterdir()) == []


def test_it_leaves_no_trace(tmp_path: Path) -> None:
    with folder_of_one_run(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with folder_of_one_run(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").write_text("kept")
    assert [one.name for one in tmp_path.rglob("*")] == ["a", "file"]


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with folder_of_one_run(tmp_path / "run"):
        pass
    assert (tmp_path / "run").is_dir()


def test_children_do_not_keep_it(tmp_path: Path) -> None:
    """A process that loads photos may outlive a killed run for some seconds."""
    with folder_of_one_run(tmp_path):
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(1)
    try:
        with folder_of_one_run(tmp_path):
            pass
    finally:
        end(child)


def test_a_lock_that_its_owner_removes_in_that_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, calls = folder_lock.lock_file, list[int]()

    def late(handle: int) -> bool | None:
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / LOCK_NAME).unlink()
        return lock(handle)

    monkeypatch.setattr(folder_lock, "lock_file", late)
    with folder_of_one_run(tmp_path):
        assert (tmp_path / LOCK_NAME).exists()
    assert len(calls) == 2


def test_without_locks_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "lock_file", lambda _: None)
    with folder_of_one_run(tmp_path), folder_of_one_run(tmp_path):
        pass


def test_a_file_in_the_way_is_left_to_the_verb(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with folder_of_one_run(tmp_path / "file"):
        pass
    below = folder_of_one_run(tmp_path / "file" / "below")
    with pytest.raises(DataError, match=r"cannot write .*below: Not a directory"), below:
        pass
