"""Feed every reader of the project with damaged and hostile files, and count what comes of it.

    python scripts/fuzz_readers.py [--inputs 10000] [--seed 0] [--only NAME] [--keep DIR]
    python scripts/fuzz_readers.py --replay DIR/NAME.bin

Every outcome must be a correct result (the readers of `fuzz_corpus` check it), or an error of ours of one printable
line. Anything else is a crash: another exception, more than 10 seconds of CPU, more than 1.5 GB, a process that dies,
code that runs, a file written elsewhere. Crashes are kept in --keep with what is needed to replay them, and the exit
code is 1.

Half of the inputs are structures drawn by hypothesis (JSON trees, headers of safetensors files, chunks of PNG, values
of TOML), the others are valid files whose bytes are changed. Inputs are decided by the seed. They are read in forked
processes whose memory is bounded.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fuzz_corpus import Target, targets
from fuzz_inputs import inputs_of

from episodes.types import DataError

SECONDS = 10.0
"""That one input may take, of CPU: what other programs take does not count."""
_WAITING = 80.0  # seconds by the clock, for readers that wait for something
OUTCOMES = ("correct", "SourceError", "DataError", "refused for memory", "crash")
_SILENCE = 120.0  # after which a process that does not even heed its alarm is killed
HANGS = "crash: hangs"
_MOST_HUNG = 3  # after which a target's other inputs are left: each hang takes so long
_ROOM = 3 * 2**30  # address space beyond what is taken at first
_MOST_RESIDENT = 1_500_000  # kB
_LONGEST = 3000  # characters of a message
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = frozenset(
    {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pty.spawn"}
)
_CHANGING = frozenset(
    {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
)


class TooLongError(BaseException):
    """An input takes too long. No Exception: a reader that catches all of them must not catch this."""


@dataclass
class Tally:
    """What came of the inputs of one reader."""

    outcomes: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    hung: int = 0


class Watch:
    """Sees, through Python's audit events, what is written where, and what is started."""

    def __init__(self, home: Path) -> None:
        self.home, self.seen = str(home), list[str]()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.100}")
        elif (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING) or event in _CHANGING:
            place = arguments[0]
            if isinstance(place, str | bytes) and not self._allowed(os.fsdecode(place)):
                self.seen.append(f"{event} {place!r:.200}")

    def _allowed(self, place: str) -> bool:
        plain = os.path.normpath(place)
        return plain == "/dev/null" or not plain.startswith("/") or plain.startswith(self.home)


def lay_out(target: Target, name: str, content: bytes, folder: Path) -> Path:
    """The file in a folder of its own, with what lies beside it."""
    path = folder / (target.place or name)
    for place, other in {**target.beside, str(path.relative_to(folder)): content}.items():
        file = folder / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(other)
    return path


def outcome_of(target: Target, path: Path, watch: Watch) -> str:
    """``correct``, the class of a typed error, or ``crash: ...``."""
    watch.seen.clear()  # of hypothesis, which keeps things for itself
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, _WAITING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(path)
        said = "correct"
    except DataError as error:
        text = str(error)
        said = (
            type(error).__name__ if text.isprintable() and 0 < len(text) < _LONGEST else f"crash: message {text!r:.300}"
        )
        if said == type(error).__name__ and _for_memory(error):
            said = "refused for memory"
    except TooLongError:
        said = f"crash: more than {SECONDS:g} seconds of CPU, or {_WAITING:g} of waiting"
    except BaseException as error:
        said = f"crash: {type(error).__name__}: {' '.join(str(error).split())[:200]} ({_place_of(error)})"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    if watch.seen:
        said = f"crash: escaped by {watch.seen[0]}"
        watch.seen.clear()
    return said


def _for_memory(error: BaseException) -> bool:
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, MemoryError) or "allocate memory" in str(one) or "MemoryError" in str(one):
            return True
        one = one.__cause__ or one.__context__
    return False


def _place_of(error: BaseException) -> str:
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(ours[-3:]))


def _too_long(*_: Any) -> None:
    raise TooLongError


def read_all(target: Target, number: int, seed: int, count: int, start: int, home: Path, answers: int) -> None:
    """In a process of its own: read inputs from `start` on, and write a line for each to `answers`."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.signal(signal.SIGPROF, _too_long)
    faulthandler.disable()  # a test runner's: a process that dies here is counted, and need not say it at length
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _ROOM, size + _ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # gigabytes, for each process that dies
    watch, tempfile.tempdir = Watch(home), str(home)
    sys.addaudithook(watch)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with _silence():
        for place, (name, content) in enumerate(inputs_of(target, number, seed, count)):
            if place < start:
                continue
            folder = home / f"{number}-{place}"
            path = lay_out(target, name, content, folder)
            (home / "current.bin").write_bytes(content)
            (home / "current.name").write_text(name)
            said = outcome_of(target, path, watch)
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if now - resident > _MOST_RESIDENT:
                said, resident = f"crash: {(now - resident) / 1e6:.1f} GB of memory", now
            shutil.rmtree(folder, ignore_errors=True)
            os.write(answers, (json.dumps([place, said]) + "\n").encode())


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Decoders write their complaints where no Python sees them."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)


def run_target(target: Target, number: int, seed: int, count: int, home: Path, keep: Path) -> Tally:
    """All inputs of a target, in as many processes as it takes."""
    tally, began, done = Tally(), time.monotonic(), 0
    while done < count and tally.hung < _MOST_HUNG:
        before = done
        for place, said in _process(target, number, seed, count, done, home):
            done = place + 1
            tally.outcomes["crash" if said.startswith("crash") else said] += 1
            tally.hung += said == HANGS
            if said.startswith("crash"):
                tally.crashes.append(_keep(target, number, seed, place, said, home, keep))
        if done == before:  # it had nothing more to say: hypothesis may draw fewer
            break
    tally.seconds = time.monotonic() - began
    return tally


def _process(target: Target, number: int, seed: int, count: int, start: int, home: Path) -> Iterator[tuple[int, str]]:
    """(number of the input, outcome) as they come; what kills the process is an outcome, too."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            read_all(target, number, seed, count, start, home, writing)
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        os._exit(code)
    os.close(writing)
    place, rest, hung = start, b"", False
    while True:
        if not select.select([reading], [], [], _SILENCE)[0]:
            os.kill(child, signal.SIGKILL)
            hung = True
        part = os.read(reading, 1 << 16)
        if not part:
            break
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            place = answer[0] + 1
            yield answer[0], answer[1]
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        yield place, HANGS if hung else f"crash: the process ended with {status}"


def _keep(target: Target, number: int, seed: int, place: int, said: str, home: Path, keep: Path) -> str:
    keep.mkdir(parents=True, exist_ok=True)
    stem = f"{number:02d}-{seed}-{place:05d}"
    name = (home / "current.name").read_text()
    content = next((one for n, one in enumerate(inputs_of(target, number, seed, place + 1)) if n == place), None)
    (keep / f"{stem}.bin").write_bytes(content[1] if content else (home / "current.bin").read_bytes())
    about = {"target": number, "reader": target.name, "name": content[0] if content else name, "seed": seed,
             "input": place, "outcome": said}  # fmt: skip
    (keep / f"{stem}.json").write_text(json.dumps(about, indent=1))
    return f"{target.name}: {said}  [--replay {keep / stem}.bin]"


def replay(file: Path) -> int:
    """Read one kept input again, and let whatever comes of it be seen."""
    about = json.loads(file.with_suffix(".json").read_text())
    target = targets()[about["target"]]
    print(f"{about['reader']}: {about['outcome']}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            target.read(lay_out(target, about["name"], file.read_bytes(), Path(folder)))
        except DataError as error:
            print(f"{type(error).__name__}: {error}")
        else:
            print("correct")
    return 0


def fuzz(count: int, seed: int, *, only: str | None = None, keep: Path) -> dict[str, Tally]:
    """Tallies by reader."""
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    every = targets()
    shares = sum(target.share for target in every)
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz ü \n ") as name:
        home = Path(name).resolve()
        for number, target in enumerate(every):
            if only is not None and only not in target.name:
                continue
            part = -(-count * target.share // shares)
            found = run_target(target, number, seed, part, home, keep)
            tally = tallies.setdefault(target.name, Tally())
            tally.outcomes.update(found.outcomes)
            tally.crashes += found.crashes
            tally.seconds += found.seconds
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    """Counts by reader."""
    lines = [
        "| reader | inputs | correct | SourceError | DataError | for memory | crashes | seconds |",
        "|---|" + "---:|" * 7,
    ]
    sums: Counter[str] = Counter()
    for name, tally in tallies.items():
        counts = tally.outcomes
        sums.update(counts)
        lines.append(_row(name, counts, OUTCOMES, tally.seconds))
    lines.append(_row("**all**", sums, OUTCOMES, sum(tally.seconds for tally in tallies.values())))
    return "\n".join(lines)


def _row(name: str, counts: Counter[str], columns: Sequence[str], seconds: float) -> str:
    return f"| {name} | {counts.total()} | " + " | ".join(str(counts[one]) for one in columns) + f" | {seconds:.0f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts; 1 when there was a crash."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="readers whose names have this in them")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-crashes"), help="folder for crashes")
    parser.add_argument("--replay", type=Path, help="a .bin of --keep")
    given = parser.parse_args(arguments)
    if given.replay is not None:
        return replay(given.replay)
    tallies = fuzz(given.inputs, given.seed, only=given.only, keep=given.keep)
    crashes = [one for tally in tallies.values() for one in tally.crashes]
    print(table(tallies))
    print(f"\n{sum(t.outcomes.total() for t in tallies.values())} inputs, seed {given.seed}, {len(crashes)} crashes")
    for one in crashes:
        print(f"  {one}")
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
