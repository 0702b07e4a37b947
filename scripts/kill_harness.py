"""Kill long runs with SIGKILL at random moments, start them again, and compare the end with an undisturbed run's.

    python scripts/kill_harness.py                                   # 30 kills of each verb, some minutes
    python scripts/kill_harness.py --kills 3 --verbs predict evaluate

Every verb runs on tiny generated data. It is killed at a moment drawn by the seed: half of the kills come when it
opens, renames or removes its n-th file and up to 20 ms later, the others after a part of an undisturbed run's time.
Then it is started again in the same folder, and perhaps killed again, until it ends. After every kill all files with
final names must be whole, and no lock may be left; at the end all files must say what those of the undisturbed run say,
to the bit, and no temporary file may be left. Exit code 1 if any of this does not hold.

All runs are forked from this process, which has imported everything.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kill_cases import Case, cases, contents, make_shelf, patched_pictures, serve

from episodes.writing import lock_file
from fewshot_seg.folder_lock import LOCK_NAME
from fewshot_seg.report import Table, text_table

_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
_MOST_KILLS_IN_A_ROW = 6
_PATIENCE = 300.0  # seconds without a word or an end, after which a run counts as hung


@dataclasses.dataclass
class Count:
    """What a verb went through."""

    kills: int = 0
    ended: int = 0
    identical: int = 0
    damaged: int = 0
    stale_locks: int = 0
    left_over: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing was lost."""
        return self.identical == self.ended and not (self.damaged or self.stale_locks or self.left_over)


@dataclasses.dataclass(frozen=True)
class Moment:
    """When to kill: at a file event by its number, or without one after the start, and so many seconds later."""

    event: int | None
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="of each verb")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", nargs="+", metavar="NAME", help="as they are called in the table; all by default")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    counts: dict[str, Count] = {}
    with tempfile.TemporaryDirectory(prefix="kill-") as name, contextlib.ExitStack() as stack:
        for patch in patched_pictures():
            stack.enter_context(patch)
        shelf = Path(name) / "shelf"
        make_shelf(shelf)
        server, mirror = serve(shelf)
        try:
            known = cases(shelf, mirror)
            unknown = set(options.verbs or ()) - known.keys()
            if unknown:
                parser.error(f"no such verb: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
            chosen = [known[name] for name in options.verbs or known]
            if "evaluate" in [case.name for case in chosen]:
                _train_model(known["train, joint"], Path(name) / "trained", shelf)
            for case in chosen:
                began = time.perf_counter()
                draw = random.Random(f"{options.seed} {case.name}")
                counts[case.name] = torture(case, Path(name) / "run", kills=options.kills, draw=draw)
                print(f"{case.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        finally:
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
    print(text_table(_table(counts)))
    return 0 if all(count.clean for count in counts.values()) else 1


def _table(counts: dict[str, Count]) -> Table:
    header = ["verb", "kills", "runs compared", "identical", "damaged files", "stale locks", "left-over files"]
    return Table(header=header, rows=[[name, *map(str, dataclasses.astuple(one))] for name, one in counts.items()])


def _train_model(case: Case, folder: Path, shelf: Path) -> None:
    _start(case, folder, again=False).wait_for_end()
    shutil.copy(folder / "out" / "model.safetensors", shelf)


class FailedError(Exception):
    """A run ended by itself, but not well."""


def torture(case: Case, folder: Path, *, kills: int, draw: random.Random) -> Count:
    """Kill a case so many times in all, in as many sequences of kills as it takes.

    Args:
        case: what to run.
        folder: its folder, the same for all runs: records name it.
        kills: in all.
        draw: of the moments.
    """
    count = Count()
    shutil.rmtree(folder, ignore_errors=True)
    first = _start(case, folder, again=False)
    first.wait_for_end()
    whole, events, seconds = contents(folder), first.events(), first.seconds()
    while count.kills < kills:
        shutil.rmtree(folder)
        in_a_row, ended = 0, False
        while not ended:
            moment = None
            if count.kills < kills and in_a_row < _MOST_KILLS_IN_A_ROW and (not in_a_row or draw.random() < 0.75):
                at_event = draw.random() < 0.5
                event = draw.randint(1, events) if at_event else None
                moment = Moment(event, draw.uniform(0, 0.02) if at_event else draw.uniform(0, seconds))
            try:
                ended = _start(case, folder, again=in_a_row > 0, moment=moment).wait_for_end()
            except FailedError as error:
                print(error, file=sys.stderr)
                break
            if not ended:
                in_a_row, count.kills = in_a_row + 1, count.kills + 1
                _inspect(case, folder, count)
        count.ended += 1
        if ended:
            count.identical += _same(contents(folder), whole)
            count.left_over += len(_temporary_files(folder))
    return count


def _inspect(case: Case, folder: Path, count: Count) -> None:
    damaged = case.damage(folder)
    if damaged:
        print(f"{case.name}: damaged: {', '.join(damaged)}", file=sys.stderr)
    count.damaged += len(damaged)
    for path in [*folder.rglob(LOCK_NAME), *_temporary_files(folder)]:
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            count.stale_locks += not lock_file(handle)
            os.close(handle)


def _temporary_files(folder: Path) -> list[Path]:
    """Hidden files and unfinished downloads, but for the lock, which a killed run may leave: it locks nobody out."""
    hidden = [path for path in folder.rglob(".*") if path.name != LOCK_NAME]
    return hidden + list(folder.rglob("*.part")) + list(folder.rglob("*.part.json"))


def _same(found: dict[str, Any], whole: dict[str, Any]) -> bool:
    wrong = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
    if wrong:
        print(f"differ: {', '.join(wrong)}", file=sys.stderr)
    return not wrong


class _start:  # noqa: N801 - read as a verb: it starts a process
    """A case in a process of its own, to be killed at a moment."""

    def __init__(self, case: Case, folder: Path, *, again: bool, moment: Moment | None = None) -> None:
        self._case, self._moment, self._log = case, moment, folder.with_name("log.txt")
        self._heard, said = os.pipe()
        self._began = time.perf_counter()
        sys.stdout.flush()
        self._process = os.fork()
        if self._process == 0:
            code = 70
            try:
                code = _run_child(case, folder, again, moment, said, self._log)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(said)

    def wait_for_end(self) -> bool:
        """Whether it ended by itself; raises FailedError if it did so with another exit code than 0."""
        if self._moment is not None and (self._moment.event is None or self._hear(1) == b"!"):
            select.select([self._heard], [], [], self._moment.seconds)
            os.kill(self._process, signal.SIGKILL)  # it has not been waited for: this is its id, alive or not
        self._counted = b"".join(iter(lambda: self._hear(100), b""))
        os.close(self._heard)
        _, status = os.waitpid(self._process, 0)
        self._ended = time.perf_counter()
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and self._moment is not None:
            return False
        if status != 0:
            said = self._log.read_text(errors="replace")[-2000:]
            raise FailedError(f"{self._case.name} ended with status {status}: {said}")
        return True

    def _hear(self, most: int) -> bytes:
        """What it says next, nothing at its end; raises FailedError if it is silent for too long."""
        if not select.select([self._heard], [], [], _PATIENCE)[0]:
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
            os.close(self._heard)
            said = self._log.read_text(errors="replace")[-2000:]
            raise FailedError(f"{self._case.name} hangs: silent for {_PATIENCE:g} seconds: {said}")
        return os.read(self._heard, most)

    def events(self) -> int:
        """How many file events there were."""
        return int(self._counted)

    def seconds(self) -> float:
        """How long it took."""
        return self._ended - self._began


def _run_child(case: Case, folder: Path, again: bool, moment: Moment | None, said: int, log: Path) -> int:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    seen = 0

    def note(event: str, _: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _EVENTS:
            seen += 1
            if moment is not None and seen == moment.event:
                os.write(said, b"!")

    sys.addaudithook(note)
    code = case.run(folder, again)
    if moment is None:
        os.write(said, str(seen).encode())
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
