"""A stream of work in three overlapping steps: read, process in batches, write. In order, and with bounded memory.

Made for steps that let go of Python's lock while they work, as Pillow, OpenCV and torch do: they run in threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Read = TypeVar("Read")
Processed = TypeVar("Processed")
Outcome = TypeVar("Outcome")


def most_in_flight(batch_size: int, lanes: int) -> int:
    """How many items `stream` holds at most: being read, waiting, being processed, being written."""
    return (2 * lanes + 1) * batch_size + 2 * lanes


def stream(
    items: Sequence[Item],
    *,
    read: Callable[[Item], Read],
    process: Callable[[list[Read]], Sequence[Processed]],
    write: Callable[[Item, Processed], Outcome],
    batch_size: int = 1,
    lanes: int = 1,
) -> Generator[Outcome, None, None]:
    """Results of `write` in the order of the items.

    Reading and writing have `lanes` + 1 threads together, processing has `lanes`, which share out torch's threads; the
    others have one torch thread each, or every one of them would start a pool of its own that waits by spinning. An
    error in any step ends the stream and is raised here. Then, and when the caller stops early or is interrupted, what
    waits is dropped and what runs is finished, so that no write is cut short.

    Args:
        items: what `read` takes.
        read: one item at a time.
        process: a batch; as many results, in its order.
        write: one item and its result at a time.
        batch_size: items that are processed together; the last batch may be smaller.
        lanes: batches that are processed side by side.
    """
    processing: deque[tuple[Sequence[Item], Future[Sequence[Processed]]]] = deque()
    writing: deque[Future[Outcome]] = deque()
    with _pools(lanes) as (files, processors):

        def write_oldest_batch() -> None:
            batch, done = processing.popleft()
            for item, result in zip(batch, done.result(), strict=True):
                writing.append(files.submit(write, item, result))

        for start in range(0, len(items), batch_size):
            while len(writing) > 2 * lanes:
                yield writing.popleft().result()
            if len(processing) == 2 * lanes:
                write_oldest_batch()
            batch = items[start : start + batch_size]
            # Reads come before the batch that waits for them, and nothing in `files` waits: no deadlock.
            reading = [files.submit(read, item) for item in batch]
            processing.append((batch, processors.submit(_process, process, reading)))
        while processing:
            write_oldest_batch()
            while len(writing) > 2 * lanes:
                yield writing.popleft().result()
        while writing:
            yield writing.popleft().result()


def _process(
    process: Callable[[list[Read]], Sequence[Processed]], reading: Sequence[Future[Read]]
) -> Sequence[Processed]:
    return process([one.result() for one in reading])


@contextmanager
def _pools(lanes: int) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    threads = torch.get_num_threads()
    files = ThreadPoolExecutor(lanes + 1, "files", initializer=torch.set_num_threads, initargs=(1,))
    share = max(1, threads // lanes)
    processors = ThreadPoolExecutor(lanes, "process", initializer=torch.set_num_threads, initargs=(share,))
    try:
        yield files, processors
    finally:
        files.shutdown(wait=False, cancel_futures=True)
        processors.shutdown(cancel_futures=True)
        files.shutdown()
        torch.set_num_threads(threads)  # the lanes have set it for threads that are still to come
