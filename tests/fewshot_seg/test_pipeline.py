"""Reading, processing and writing side by side: order, bounds, errors."""

from __future__ import annotations

import threading

import pytest
import torch

from fewshot_seg.pipeline import most_in_flight, stream


class Counter:
    """Counts items that are read but not yet written."""

    def __init__(self) -> None:
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def read(self, item: int) -> int:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        return item

    def write(self, item: int, result: int) -> tuple[int, int]:
        with self.lock:
            self.now -= 1
        return item, result


def squared(batch: list[int]) -> list[int]:
    return [one**2 for one in batch]


@pytest.mark.parametrize(("batch_size", "lanes"), [(1, 1), (1, 3), (4, 1), (3, 2)])
@pytest.mark.parametrize("count", [0, 1, 7, 200])
def test_in_order_and_never_more_than_the_bound(count: int, batch_size: int, lanes: int) -> None:
    counter = Counter()
    steps = stream(
        range(count), read=counter.read, process=squared, write=counter.write, batch_size=batch_size, lanes=lanes
    )
    assert list(steps) == [(item, item**2) for item in range(count)]
    assert counter.now == 0
    assert counter.most <= most_in_flight(batch_size, lanes)


def test_a_reader_who_dawdles_is_not_run_away_from() -> None:
    counter = Counter()
    for _ in stream(range(100), read=counter.read, process=squared, write=counter.write, batch_size=2, lanes=2):
        threading.Event().wait(0.002)
        assert counter.most <= most_in_flight(2, 2) < 100


def test_batches_keep_their_order_and_the_last_may_be_smaller() -> None:
    seen: list[list[int]] = []

    def process(batch: list[int]) -> list[int]:
        seen.append(list(batch))
        return batch

    list(stream(range(7), read=lambda one: one, process=process, write=lambda _, one: one, batch_size=3))
    assert seen == [[0, 1, 2], [3, 4, 5], [6]]


def test_steps_overlap() -> None:
    """Item 1 is read while item 0 is in the network, and item 0's write waits until then."""
    second_read = threading.Event()

    def read(item: int) -> int:
        if item == 1:
            second_read.set()
        return item

    def process(batch: list[int]) -> list[int]:
        assert second_read.wait(120)
        return batch

    assert list(stream(range(2), read=read, process=process, write=lambda _, one: one)) == [0, 1]


@pytest.mark.parametrize("step", ["read", "process", "write"])
def test_an_error_of_any_step_ends_the_stream(step: str) -> None:
    written: list[int] = []

    def fail(item: int) -> None:
        if item == 20:
            raise OSError(f"{step} failed")

    def read(item: int) -> int:
        if step == "read":
            fail(item)
        return item

    def process(batch: list[int]) -> list[int]:
        if step == "process":
            fail(batch[0])
        return batch

    def write(item: int, _: int) -> int:
        if step == "write":
            fail(item)
        written.append(item)
        return item

    with pytest.raises(OSError, match=f"{step} failed"):
        list(stream(range(1000), read=read, process=process, write=write, lanes=2))
    assert set(range(16)) <= set(written)
    assert max(written) < 40
    assert not [one for one in threading.enumerate() if one.name.startswith(("files", "process"))]


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
def test_interrupted_between_two_items_everything_stops(error: type[BaseException]) -> None:
    counter = Counter()
    steps = stream(range(1000), read=counter.read, process=squared, write=counter.write, lanes=2)
    assert next(steps) == (0, 0)
    with pytest.raises(error):
        steps.throw(error())
    assert counter.most <= most_in_flight(1, 2)
    assert not [one for one in threading.enumerate() if one.name.startswith(("files", "process"))]


def test_torchs_threads_are_shared_out_and_given_back() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        seen: list[int] = []
        for _ in stream(
            range(4),
            read=lambda one: one,
            process=lambda batch: seen.append(torch.get_num_threads()) or batch,  # type: ignore[func-returns-value]
            write=lambda _, one: one,
            lanes=2,
        ):
            pass
        assert seen == [2, 2, 2, 2]
        assert torch.get_num_threads() == 4
        fresh: list[int] = []
        thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert fresh == [4]
    finally:
        torch.set_num_threads(before)
