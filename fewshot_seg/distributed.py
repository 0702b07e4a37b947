"""Several processes, one run: who this process is, what it takes of the work, and what it tells the others.

`torchrun` starts the processes and names them in the environment; torch.distributed carries what they tell each other
(gloo between CPUs, nccl between GPUs). Without torchrun there is one rank of one, and nothing here does anything.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.ranks import LostRankError, Ranks, SaidByFirstError, TerminatedError, launched_ranks
from fewshot_seg.runtime import pick_device

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: longer than any part of the work that one does alone."""

_TRANSPORT = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


def said_once(message: str) -> DataError:
    """The error to raise where every rank is about to raise the same."""
    return DataError(message) if current_ranks().first else SaidByFirstError(message)


def current_ranks() -> Ranks:
    """This process in the group that `process_group` has joined; one of one outside."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


@contextlib.contextmanager
def process_group(device: str = "auto", *, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Join the processes that torchrun started, and leave them at the end, also after an error.

    On GPUs each process of a machine takes the one of its LOCAL_RANK as torch's current device, so that ``cuda`` means
    that one. Gradients go by nccl there; the rest goes by gloo, which notices a lost process at once. SIGTERM raises
    `TerminatedError` inside.

    Args:
        device: as of `runtime.pick_device`; names no single GPU where several processes run.
        timeout: how long to wait for another process before it counts as lost.

    Raises:
        DataError: variables or a device that do not fit, or more processes than GPUs.
        LostRankError: the others did not come.
    """
    ranks = launched_ranks()
    if ranks.size == 1:
        yield ranks
        return
    on_gpu = _take_gpu(device)
    with _collective():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)
    lost = False
    try:
        with _sigterm_raises():
            yield ranks
    except (LostRankError, TerminatedError):
        lost = True
        raise
    finally:
        if not (lost and on_gpu):  # nccl would wait for the one that is gone; the end of the process frees it, too
            dist.destroy_process_group()


def _take_gpu(device: str) -> bool:
    """Make the GPU of LOCAL_RANK the current one, unless the run is on the CPU."""
    chosen = pick_device(device)
    if chosen.type != "cuda":
        return False
    if chosen.index is not None:
        raise DataError(f"--device {device} names one GPU for all processes; leave it out, or say cuda or cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise DataError(
            f"process {local} of this machine has no GPU of its own: {torch.cuda.device_count()} are here; start fewer "
            "by --nproc-per-node, or say --device cpu"
        )
    torch.cuda.set_device(local)
    return True


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """The first SIGTERM raises `TerminatedError`; later ones do not disturb what is being saved."""
    seen, process = False, os.getpid()

    def terminate(number: int, frame: object) -> None:  # noqa: ARG001
        nonlocal seen
        if os.getpid() != process:  # a worker that loads photos has inherited this
            os._exit(128 + number)
        if not seen and not _leaving.get():
            seen = True
            raise TerminatedError("stopped by SIGTERM")

    before, token = signal.signal(signal.SIGTERM, terminate), _leaving.set(False)
    try:
        yield
    finally:
        _leaving.reset(token)
        signal.signal(signal.SIGTERM, before)


_leaving: ContextVar[bool] = ContextVar("leaving", default=False)
"""Whether a lost process has been noticed: torchrun's SIGTERM then comes late and must not disturb the saving."""


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise_if_lost(error)
        raise


def raise_if_lost(error: RuntimeError) -> None:
    """Raises LostRankError from an error of torch's if that is what the error means.

    gloo has no error class of its own: it is told by its words.
    """
    if isinstance(error, torch.OutOfMemoryError) or not (dist.is_available() and dist.is_initialized()):
        return
    if isinstance(error, dist.DistError) or _TRANSPORT.search(str(error)):
        _leaving.set(True)
        reason = re.sub(r"^\[\S*\] ", "", str(error).strip().splitlines()[0]).split(". ")[0]
        raise LostRankError(f"another process of this run is gone or does not answer ({reason})") from error


def barrier() -> None:
    """Wait for all ranks."""
    _sum(torch.zeros(1))


def _sum(values: Tensor) -> Tensor:
    """Sum over ranks; `values`, on the CPU, is left as it is."""
    if current_ranks().size == 1:
        return values
    total = values.clone()
    with _collective():
        dist.all_reduce(total)
    return total


def _gather(item: T) -> list[T]:
    """Every rank's item, on every rank."""
    ranks = current_ranks()
    if ranks.size == 1:
        return [item]
    found: list[Any] = [None] * ranks.size
    with _collective():
        dist.all_gather_object(found, item)
    return found


def mean_over_ranks(named: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Mean of each scalar over the ranks, without gradient, on the CPU; as it is where there is one rank."""
    size = current_ranks().size
    if size == 1:
        return named
    mean = _sum(torch.stack([value.detach().double().cpu() for value in named.values()])) / size
    return dict(zip(named, mean.unbind(), strict=True))


def on_first(function: Callable[[], T]) -> T:
    """Result of a function that the first rank alone runs; its DataError is raised on all ranks.

    What a run finds in its folder must be asked so: another rank would look earlier or later, or on another disk.
    """
    ranks = current_ranks()
    if ranks.size == 1:
        return function()
    answer: list[Any] = [None, None]
    failure: DataError | None = None
    if ranks.first:
        try:
            answer[0] = function()
        except DataError as error:
            failure = error
            answer[1] = str(error)
    with _collective():
        dist.broadcast_object_list(answer, src=0)
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise SaidByFirstError(answer[1])
    result: T = answer[0]
    return result


class Batched(Protocol[T_co]):
    """Episodes in batches, see `feature_episodes.FeatureEpisodes`."""

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[T_co]:
        """From episode `start` on."""
        ...


def dealt(episodes: Batched[T], batch_size: int, *, start: int = 0) -> Iterator[T]:
    """This rank's batches: the b-th from `start` goes to rank b modulo size. Others are not loaded.

    What is in a batch does not depend on the number of ranks, and so no result does.
    """
    ranks = current_ranks()
    if ranks.size == 1:
        yield from episodes.batches(batch_size, start=start)
        return
    for first in range(start + ranks.rank * batch_size, len(episodes), ranks.size * batch_size):
        yield next(episodes.batches(batch_size, start=first))


def gather_dealt(items: Sequence[T]) -> list[T]:
    """One item per batch of `dealt`, of all ranks, in the order of the batches; the same on every rank."""
    each = _gather(list(items))
    return [each[number % len(each)][number // len(each)] for number in range(sum(map(len, each)))]


def share_of(items: Sequence[T], *, block: int = 1) -> list[T]:
    """This rank's part of some items, dealt out by blocks of so many."""
    ranks = current_ranks()
    starts = range(ranks.rank * block, len(items), ranks.size * block)
    return [item for start in starts for item in items[start : start + block]]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where this rank's rows of a batch lie in the batch of all ranks: from `before` on, of `total`."""

    before: int
    total: int


def rows_of_ranks(*counts: int) -> tuple[Rows, ...]:
    """Of each number of rows on this rank: its place among the rows of all ranks, rank after rank."""
    rank, each = current_ranks().rank, _gather(counts)
    return tuple(Rows(sum(of_one[:rank]), sum(of_one)) for of_one in zip(*each, strict=True))


_rows: ContextVar[Rows | None] = ContextVar("rows", default=None)


def current_rows() -> Rows | None:
    """See `split_rows`; None outside."""
    return _rows.get()


@contextlib.contextmanager
def split_rows(rows: Rows) -> Iterator[None]:
    """Inside, what is drawn per row is drawn for the rows of all ranks, of which this rank uses its own.

    Then dropout does not depend on the number of ranks, if their random states agree.
    """
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)
