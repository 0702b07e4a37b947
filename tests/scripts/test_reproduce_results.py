"""The one command for all results: its steps' arguments are their scripts' own, and the first that fails ends it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDERS = ["--voc", "voc", "--coco", "coco", "--cub", "cub"]


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("reproduce_results")


def test_every_step_is_one_that_its_script_takes(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    parse_script: Callable[[Sequence[str]], None],
) -> None:
    monkeypatch.setattr("subprocess.run", None)
    assert script.main([*FOLDERS, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(script.commands(Path("voc"), Path("coco"), Path("cub"))) > 10
    for line in lines:
        parse_script(shlex.split(line))


def test_the_first_that_fails_ends_it(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = list[str]()

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        started.append(command[1])
        return subprocess.CompletedProcess(command, 3 if len(started) == 2 else 0)

    monkeypatch.setattr("subprocess.run", run)
    assert script.main(FOLDERS) == 3
    assert started == ["scripts/train_weights.py", "scripts/reproduce_sizes.py"]
    captured = capsys.readouterr()
    assert "[2/12] python scripts/reproduce_sizes.py --root voc" in captured.out
    assert captured.err == "reproduce_sizes.py stopped with 3; run the same command again to go on there\n"


def test_all_of_them(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda command, **_: subprocess.CompletedProcess(command, 0))
    assert script.main(FOLDERS) == 0
