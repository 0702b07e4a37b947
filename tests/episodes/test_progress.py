"""Time left, whatever is done to the clock of the day."""

from __future__ import annotations

import io
import time

import pytest

from episodes.progress import tqdm


def test_a_clock_that_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = time.time(), iter(range(10**6))
    monkeypatch.setattr("tqdm.std.time", lambda: now - 1000 * next(calls))
    shown = io.StringIO()
    with tqdm(total=10, file=shown, mininterval=0) as bar:
        for _ in range(7):
            bar.update()
            assert 0 <= bar.format_dict["elapsed"] < 100
    assert "70%" in shown.getvalue()
    assert "-" not in shown.getvalue()


def test_disabled_bars_cost_nothing() -> None:
    assert list(tqdm([1, 2], disable=True)) == [1, 2]
