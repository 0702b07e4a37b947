"""The script of the explainers' table: records as docs/results.json has them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("reproduce_explainers")


def test_records_say_how_many_episodes_they_are_of(script: ModuleType) -> None:
    scores = {
        "attention": {"query: energy inside": (3.0, 2.0, 4.0), "query: sanity": (5.0, 1.0, 9.0), "forward": (1.0,) * 3}
    }
    episodes = [
        {"explainers": {"attention": {"query": {"sanity": 0.5} if number % 5 == 4 else {}}}} for number in range(10)
    ]
    energy, sanity, forward = script.records_of(scores, episodes)
    assert energy == {
        "task": "explainers",
        "fold": "mean",
        "method": "attention",
        "metric": "query: energy inside",
        "value": 3.0,
        "low": 2.0,
        "high": 4.0,
        "episodes": 10,
    }
    assert sanity["episodes"] == 2
    assert "low" not in forward
