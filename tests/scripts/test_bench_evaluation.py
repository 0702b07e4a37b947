"""The benchmark of evaluation: its ratios are what it says, and it refuses what it does not know."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_evaluation.py"


@pytest.fixture
def bench(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("bench_evaluation")


def test_records_are_ratios(bench: ModuleType, tmp_path: Path) -> None:
    figures = {
        "loop": {"un-cached": 0.3, "warm": 0.02},
        "shots": {"1-shot": 0.01, "5-shot": 0.035},
        "growth": {100: 1.0, 200: 2.2},
        "images": {10: [1.0, 0.1, 0.2], 20: [3.0, 0.2, 0.4]},
        "processes": {1: 50.0, 2: 90.0},
        "memory": {"megabytes": 900.0},
    }
    results = tmp_path / "results.json"
    bench.record(figures, "PASCAL-5i/3", results)
    found = {(one["metric"], one["method"]): one["value"] for one in json.loads(results.read_text())}
    assert found[bench._SPEED, "warm"] == pytest.approx(15)
    assert found[bench._SHOTS, "5-shot"] == pytest.approx(3.5)
    assert found[bench._GROWTH, "200 episodes"] == pytest.approx(1.1)
    assert found[bench._GROWTH, "20 images, written"] == pytest.approx(1.5)
    assert found[bench._PROCESSES, "2 processes of one thread"] == pytest.approx(1.8)
    assert "PASCAL-5i/3" in results.with_suffix(".md").read_text()


def test_the_store_is_written_found_and_read(bench: ModuleType, tmp_path: Path) -> None:
    assert len(bench._store_times(5, tmp_path)) == 3
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5


def test_an_unknown_section() -> None:
    command = [sys.executable, str(_SCRIPT), "--synthetic", "--sections", "loop,speed"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown section speed; known: limit, loop" in done.stderr
