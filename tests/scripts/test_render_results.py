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


def explained(method: str, metric: str, value: float, **more: Any) -> dict[str, Any]:
    """A record of the explainers' table."""
    record = {"task": "explainers", "data": "PASCAL-5i/792", "protocol": "hsnet", "fold": "mean", "shots": 1}
    record |= {"support": "mask", "method": method, "metric": metric, "value": value, "episodes": 500, "seeds": [0]}
    return record | {"resolution": 192, "command": "python x.py", "commit": "abc", **more}


def test_explainers_have_a_table_a_side(script: ModuleType, tmp_path: Path) -> None:
    records = []
    for method, low, high in (("attention", 10.0, 80.0), ("chance", 20.0, 30.0)):
        for side in ("query", "support"):
            records.append(explained(method, f"{side}: deletion, mIoU", low, low=low - 1, high=low + 1))
            records.append(explained(method, f"{side}: pointing game", high, low=high - 1, high=high + 1))
            records.append(explained(method, f"{side}: sanity", low, low=0.0, high=30.0, episodes=100))
        records += [explained(method, one, 1.0) for one in ("forward", "backward")]
    (tmp_path / "results.json").write_text(json.dumps(records))
    script.render(tmp_path / "results.json", tmp_path / "results.md")
    page = (tmp_path / "results.md").read_text()
    assert "500 one-shot episodes" in page
    assert "on 100 episodes" in page
    assert page.count("| explainer | deletion, mIoU | pointing game | sanity | passes forward | backward |") == 2
    best = "| attention | **10.0 [9.0, 11.0]** | **80.0 [79.0, 81.0]** | **10.0 [0.0, 30.0]** | 1 | 1 |"
    assert page.count(best) == 2
    assert page.count("| chance | 20.0 [19.0, 21.0] | 30.0 [29.0, 31.0] | 20.0 [0.0, 30.0] | 1 | 1 |") == 2
