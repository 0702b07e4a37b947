"""The comparison with the rivals, in small: every method is trained, scored on the same episodes, timed and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from episodes.types import DataError
from fewshot_seg.backbones import build_backbone
from fewshot_seg.checkpoint import save_segmenter
from fewshot_seg.segmenter import build_segmenter

_BACKBONE = "mobilenetv3_small_050"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, load_script: Callable[[str], ModuleType]) -> ModuleType:
    module = load_script("reproduce_rivals")
    monkeypatch.setattr(module, "_TIMED_EPISODES", 2)
    monkeypatch.setattr(module, "_ROUNDS", 1)
    return module


@pytest.fixture
def small(shared_voc: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run of a few steps and episodes, with a small model as ours."""
    backbone = build_backbone(_BACKBONE, weights="random")
    ours = build_segmenter(backbone, similarity_rank=2, decoder_width=8, decoder_blocks=1)
    for fold in range(4):
        save_segmenter(tmp_path / f"fold{fold}.safetensors", ours, backbone_weights="random", resolution=64)
    given = {"root": shared_voc, "ours": tmp_path / "fold{fold}.safetensors", "out": tmp_path / "runs"}
    given |= {"cache": tmp_path / "cache", "results": tmp_path / "results.json"}
    given["methods"] = "repri-frozen"
    counts = {"resolution": 64, "steps": 2, "batch-size": 2, "episodes": 4, "validation-episodes": 4, "shots": 1}
    return [part for name, value in {**given, **counts}.items() for part in (f"--{name}", str(value))]


def test_a_small_run(script: ModuleType, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.main([*small, "--record"])
    records = json.loads((tmp_path / "results.json").read_text())
    compared = (script.OURS, script.TITLES["repri-frozen"])
    for fold in (0, 1, 2, 3, "mean"):
        of_fold = {(one["method"], one["metric"]): one for one in records if one["fold"] == fold}
        for method in compared:
            assert of_fold[method, "mIoU"]["low"] <= of_fold[method, "mIoU"]["value"]
            assert of_fold[method, script.SECONDS]["value"] > 0
            if fold != "mean":
                same = of_fold[script.OURS, "mIoU"]["episodes_fingerprint"]
                assert of_fold[method, "mIoU"]["episodes_fingerprint"] == same
        assert of_fold[script.OURS, script.SECONDS]["value"] == 1
        assert of_fold[script.TITLES["repri-frozen"], script.PARAMETERS]["value"] == 0
        assert (script.OURS, script.AT_ZERO) not in of_fold
    page = (tmp_path / "results.md").read_text()
    assert "### Rivals" in page
    header = next(line for line in page.splitlines() if line.startswith("| method | mIoU, 1-shot |"))
    assert {f"{metric}, 1-shot" for metric in (script.GUIDED, script.AT_ZERO)} < set(header.split(" | "))
    assert " | seconds" in header
    capsys.readouterr()
    script.main(small)  # finished cells are not computed again
    assert "done" not in capsys.readouterr().out
    with pytest.raises(DataError, match="choose another --out"):
        script.main([*small, "--episodes", "3"])


def test_every_method_is_trained_without_ours_too(script: ModuleType, small: list[str], tmp_path: Path) -> None:
    where, methods = small.index("--ours"), tuple(script.RIVALS)
    alone = small[:where] + small[where + 2 :]
    backbone = ["--backbone", _BACKBONE, "--backbone-weights", "random"]
    script.main([*alone, *backbone, "--folds", "1", "--methods", *methods])
    folder = tmp_path / "runs" / "fold1"
    assert {path.name for path in folder.glob("*.json")} == {f"{name}.json" for name in methods}
    for name in methods:
        records = json.loads((folder / f"{name}.json").read_text())["records"]
        assert [one["metric"] for one in records] == [script.PARAMETERS, "mIoU", script.GUIDED, script.AT_ZERO]


def test_folds_may_be_recorded_one_after_another(script: ModuleType, small: list[str], tmp_path: Path) -> None:
    def values(path: Path) -> dict[tuple[str, ...], float]:
        records = json.loads(path.read_text())
        found = {(str(one["fold"]), one["method"], one["metric"]): one["value"] for one in records}
        return {place: value for place, value in found.items() if place[2] != script.SECONDS}  # of the machine

    page = tmp_path / "results.md"
    script.main([*small, "--record", "--folds", "2"])
    script.main([*small, "--record", "--folds", "0", "3"])
    assert not any(fold == "mean" for fold, *_ in values(tmp_path / "results.json"))
    assert [f"Fold {fold} alone" in page.read_text() for fold in (0, 1, 2, 3)] == [True, False, True, True]
    script.main([*small, "--record", "--folds", "1"])
    assert "Means over folds" in page.read_text()
    once = [*small[: small.index("--results")], "--results", str(tmp_path / "once.json")]
    script.main([*once, *small[small.index("--results") + 2 :], "--record"])
    assert values(tmp_path / "results.json") == values(tmp_path / "once.json")


def test_nothing_is_recorded_without_ours(
    script: ModuleType, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    where = small.index("--ours")
    with pytest.raises(SystemExit):
        script.main([*small[:where], *small[where + 2 :], "--record"])
    assert "--record needs --ours" in capsys.readouterr().err
