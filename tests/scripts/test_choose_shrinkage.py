"""The choice of the shrinkage, in small: base classes of photos for training alone, and a table of all methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def script(load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script("choose_shrinkage")
    monkeypatch.setattr(module, "BACKBONE", {"name": "mobilenetv3_small_050", "weights": "random"})
    return module


def test_a_small_run(script: ModuleType, shared_voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--root", str(shared_voc), "--cache", str(tmp_path / "cache")]
    script.main([*folders, "--folds", "0", "2", "--episodes", "4", "--shrinkages", "1", "3", "--steps", "1"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "method"
    assert [name in head for name in ("without fold 0", "without fold 2", "mean")] == [True] * 3
    assert [row.split("  ")[0].strip() for row in rows] == ["shrinkage 1", "shrinkage 3", script.NETWORK]
    for row in rows:
        first, second, mean = map(float, row.split()[-3:])
        assert mean == pytest.approx((first + second) / 2, abs=0.11)
        assert 0 < first <= 100


def test_only_held_out_classes_are_scored(
    script: ModuleType, shared_voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the next fold, in photos for training; what is fitted knows the other two folds alone."""
    scored, fitted = set[int](), list[tuple[int, ...]]()

    def choose(read: object, episodes: object, **_: object) -> dict[str, tuple[float, float]]:  # noqa: ARG001
        for batch in episodes.batches(8):  # type: ignore[attr-defined]
            scored.update(batch.class_ids)
        return {"shrinkage 1": (0.0, 50.0)}

    original = script.class_cells

    def watched(data: object, **named: object) -> object:
        fitted.append(data.choices.base)  # type: ignore[attr-defined]
        return original(data, **named)

    monkeypatch.setattr(script, "choose_logit_thresholds", choose)
    monkeypatch.setattr(script, "class_cells", watched)
    folders = ["--root", str(shared_voc), "--cache", str(tmp_path / "cache")]
    script.main([*folders, "--folds", "0", "--episodes", "20", "--shrinkages", "1", "--steps", "0"])
    assert scored
    assert scored <= {6, 7, 8, 9, 10}
    assert fitted == [tuple(range(11, 21))]
