"""The script of the explainers' table: records as docs/results.json has them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

_SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(_SCRIPTS))
    spec = importlib.util.spec_from_file_location("reproduce_explainers", _SCRIPTS / "reproduce_explainers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "reproduce_explainers", module)
    spec.loader.exec_module(module)
    return module


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
