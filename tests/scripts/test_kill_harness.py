"""Killing a few times, and cases that are damaged by it: who finds nothing must be able to find something."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("kill_harness")


def test_three_kills(run_script: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    verbs = ["train, joint", "feature store", "data prepare", "predict"]
    done = run_script("kill_harness", "--kills", "3", "--verbs", *verbs)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(maxsplit=6) for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == verbs
    for _, kills, compared, identical, *faults in rows:
        assert kills == "3"
        assert compared == identical != "0"
        assert faults == ["0", "0", "0"]


def _slowly_in_place(folder: Path, again: bool) -> int:
    """Writes in place, byte by byte, does its work twice when it goes on, and leaves what it needs no more."""
    folder.mkdir(exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        log.write("line\n")
    with (folder / "scores.json").open("w", buffering=1) as file:
        for part in ("[1,\n", "2,\n", "3]\n"):
            file.write(part)
            time.sleep(0.05)
    if again:
        (folder / ".rest").write_text("x")
    return 0


def test_what_is_not_safe_is_found(script: ModuleType, tmp_path: Path) -> None:
    cases = script.sys.modules["kill_cases"]
    case = cases.Case(name="unsafe", run=_slowly_in_place, damage=cases.unsound)
    count = script.torture(case, tmp_path / "run", kills=8, draw=random.Random(0))
    assert count.kills == 8
    assert count.damaged > 0
    assert count.identical < count.ended
    assert count.left_over > 0
    assert not count.clean


def test_a_run_that_cannot_go_on(script: ModuleType, tmp_path: Path) -> None:
    def refuses(folder: Path, again: bool) -> int:
        folder.mkdir(exist_ok=True)
        time.sleep(0.05)
        return 2 if again else 0

    case = script.Case(name="refuses", run=refuses, damage=lambda _: [])
    count = script.torture(case, tmp_path / "run", kills=3, draw=random.Random(1))
    assert count.identical < count.ended


def test_a_run_that_hangs(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hangs(folder: Path, again: bool) -> int:
        folder.mkdir(exist_ok=True)
        time.sleep(60 if again else 0.05)
        return 0

    monkeypatch.setattr(script, "_PATIENCE", 5.0)  # far more than the first run takes
    case = script.Case(name="hangs", run=hangs, damage=lambda _: [])
    count = script.torture(case, tmp_path / "run", kills=1, draw=random.Random(1))
    assert (count.kills, count.ended, count.identical) == (1, 1, 0)
    assert "hangs: silent for 5 seconds" in capsys.readouterr().err
