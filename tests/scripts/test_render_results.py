"""docs/results.md is made from docs/results.json and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("render_results")


def _record(**changes: Any) -> dict[str, Any]:
    return {
        "task": "segmentation",
        "data": "toy",
        "protocol": "hsnet",
        "fold": 0,
        "shots": 1,
        "support": "mask",
        "method": "a",
        "metric": "mIoU",
        "value": 12.34,
        "low": 10.0,
        "high": 14.0,
        "episodes": 5,
        "seeds": [0],
        "command": "python x.py",
        "commit": "abc",
    } | changes


def test_the_committed_page_is_what_the_records_give(script: ModuleType, tmp_path: Path) -> None:
    source = _ROOT / "docs" / "results.json"
    # the page names its source, so the copy keeps the name
    copy = tmp_path / "results.json"
    copy.write_bytes(source.read_bytes())
    script.render(copy, tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text() == (_ROOT / "docs" / "results.md").read_text()


def test_committed_records_are_complete() -> None:
    records = json.loads((_ROOT / "docs" / "results.json").read_text())
    assert records
    for record in records:
        assert {"task", "data", "protocol", "fold", "shots", "support", "method", "metric", "value"} <= set(record)
        assert {"episodes", "seeds", "command", "commit"} <= set(record)
        if record["metric"] in ("mIoU", "AUC", "best-IoU"):
            assert record["low"] <= record["value"] <= record["high"]
            assert 0 <= record["value"] <= 100


def test_merging_replaces_the_same_and_keeps_the_rest(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    script.merge_records(path, [_record(), _record(method="b", value=1.0)])
    script.merge_records(path, [_record(value=50.0), _record(fold="mean", value=7.0)])
    values = {(one["method"], one["fold"]): one["value"] for one in json.loads(path.read_text())}
    assert values == {("a", 0): 50.0, ("b", 0): 1.0, ("a", "mean"): 7.0}


def test_tables_hold_the_numbers_with_their_intervals(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    records = [_record(), _record(fold="mean", value=20.0, low=19.0, high=21.0), _record(metric="IoU: cat", value=77.7)]
    script.merge_records(path, records)
    script.render(path, tmp_path / "results.md")
    page = (tmp_path / "results.md").read_text()
    assert "| a | 12.3 [10.0, 14.0] | 20.0 [19.0, 21.0] |" in page
    assert "| 0 | cat | 77.7 |" in page
    assert "`python x.py` (protocol hsnet, commit abc)" in page
