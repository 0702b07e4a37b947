"""The fuzz harness: a smaller run of it, and that it sees what it is there to see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from episodes.types import DataError


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("fuzz_readers")


def test_no_reader_crashes(run_script: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    done = run_script("fuzz_readers", "--inputs", "300", "--seed", "2", "--keep", str(tmp_path / "crashes"))
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, total = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:] if line.startswith("|")]
    assert int(total[1]) >= 300
    assert len(rows) > 20
    for name, inputs, correct, source_error, data_error, for_memory, crashes, _ in rows:
        assert int(correct) + int(source_error) + int(data_error) > 0, name
        assert int(inputs) == int(correct) + int(source_error) + int(data_error) + int(for_memory), name
        assert crashes == "0"


def raises(_: Path) -> None:
    raise KeyError("oops")


def dies(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def spins(_: Path) -> None:
    while True:
        pass


def hangs(_: Path) -> None:
    try:
        time.sleep(60)
    except Exception as error:
        raise DataError("swallowed") from error


def grows(_: Path) -> None:
    assert len(bytearray(400_000_000))


def writes(_: Path) -> None:
    (Path.home() / ".fuzz-readers-test").mkdir(exist_ok=True)


def starts(_: Path) -> None:
    os.system("true")


def rambles(_: Path) -> None:
    raise KeyboardInterrupt


def is_fine(path: Path) -> None:
    if path.read_bytes():
        raise DataError("a\nline")


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (raises, "KeyError: 'oops'"),
        (dies, "the process ended with -11"),
        (spins, "more than 0.2 seconds of CPU, or 60 of waiting"),
        (hangs, "more than 10 seconds of CPU, or 0.4 of waiting"),
        (grows, "GB of memory"),
        (writes, "escaped by os.mkdir"),
        (starts, "escaped by os.system"),
        (rambles, "KeyboardInterrupt"),
        (is_fine, None),
    ],
)
def test_what_it_sees(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[Path], None],
    said: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "SECONDS", 0.2 if read is spins else 10.0)
    monkeypatch.setattr(script, "_WAITING", 0.4 if read is hangs else 60.0)
    monkeypatch.setattr(script, "_MOST_RESIDENT", 200_000)
    target = script.Target(name="tried", seeds={"a.bin": b"content"}, read=read)
    monkeypatch.setattr(script, "targets", lambda: [target])
    code = script.main(["--inputs", "3", "--keep", str(tmp_path / "kept")])
    printed = capsys.readouterr().out
    if said is None:
        assert code == 0
        assert "3 inputs, seed 0, 0 crashes" in printed
        return
    assert code == 1
    assert said in printed
    if read is raises:
        assert "3 crashes" in printed
        kept = sorted((tmp_path / "kept").glob("*.bin"))
        assert len(kept) == 3
        assert json.loads(kept[0].with_suffix(".json").read_text())["reader"] == "tried"
        with pytest.raises(KeyError, match="oops"):
            script.main(["--replay", str(kept[0])])


def test_inputs_are_decided_by_the_seed(script: ModuleType, load_script: Callable[[str], ModuleType]) -> None:
    inputs_of = load_script("fuzz_inputs").inputs_of
    for target in script.targets()[:60:7]:
        some, again, fewer = (list(inputs_of(target, 3, 5, count)) for count in (40, 40, 25))
        assert some == again
        assert some[:25] == fewer
        assert some != list(inputs_of(target, 3, 6, 40))
