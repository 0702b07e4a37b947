"""The comparison of sizes, in small: base classes for the choice, novel ones for the scores, finished cells kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fewshot_seg.backbones import build_backbone
from fewshot_seg.checkpoint import save_segmenter
from fewshot_seg.segmenter import build_segmenter
from fewshot_seg.shipped import ShippedModel, file_digest, write_manifest


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("reproduce_sizes")


@pytest.fixture
def small(shared_voc: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run over a few episodes with small models."""
    backbone = build_backbone("mobilenetv3_small_050", weights="random")
    for fold in range(4):
        model = build_segmenter(backbone, similarity_rank=2, decoder_width=8, decoder_blocks=1, seed=fold)
        save_segmenter(tmp_path / f"pascal-fold{fold}.safetensors", model, backbone_weights="random", resolution=64)
    folders = {"root": shared_voc, "weights": tmp_path, "out": tmp_path / "runs", "cache": tmp_path / "cache"}
    counts = {"results": tmp_path / "results.json", "episodes": 5, "base-episodes": 3, "shots": 1}
    words = [word for name, value in {**folders, **counts}.items() for word in (f"--{name}", str(value))]
    return [*words, "--sizes", "64", "96", "--score-at", "96"]


def test_a_small_run(
    script: ModuleType,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script.main(small)
    records = json.loads((tmp_path / "results.json").read_text())
    by_task = {task: [one for one in records if one["task"] == task] for task in (script.CHOICE, "segmentation")}
    assert {one["method"] for one in by_task[script.CHOICE]} == {"photos at 64", "photos at 96"}
    assert {one["method"] for one in by_task["segmentation"]} == {"ours, cross-fitted, photos at 96"}
    assert script.method_at(400, 400) == "ours, cross-fitted"
    for task, count in ((script.CHOICE, 3), ("segmentation", 5)):
        of_folds = [one for one in by_task[task] if one["metric"] == "mIoU" and one["fold"] != "mean"]
        assert {one["fold"] for one in of_folds} == {0, 1, 2, 3}
        assert {one["episodes"] for one in of_folds} == {count}
    seen = {one["metric"] for one in by_task["segmentation"] if one["fold"] == 0}
    assert "IoU: aeroplane" in seen, "novel classes of fold 0 are what is scored"
    page = (tmp_path / "results.md").read_text()
    assert "### Size of the photos: mIoU on base classes, 1-shot" in page
    assert "| ours, cross-fitted, photos at 96 |" in page

    capsys.readouterr()
    with monkeypatch.context() as patch:  # finished cells are not computed again
        patch.setattr(script, "evaluate", None)
        script.main(small)
    assert "fold mean, segmentation, 1-shot, ours, cross-fitted, photos at 96: " in capsys.readouterr().out
    replaced = tmp_path / "pascal-fold2.safetensors"
    replaced.write_bytes((tmp_path / "pascal-fold3.safetensors").read_bytes())
    with monkeypatch.context() as patch:  # those of another model are
        patch.setattr(script, "evaluate", None)
        with pytest.raises(TypeError):
            script.main(small)


def test_scores_of_the_manifest_are_taken(
    script: ModuleType, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the very file, size, episodes and shots; nothing is evaluated for them unless asked for."""
    script.main(small)
    found = [one for one in json.loads((tmp_path / "results.json").read_text()) if one["task"] == "segmentation"]
    models = []
    for fold in range(4):
        values = {one["metric"]: one for one in found if one["fold"] == fold}
        per_class = {name[5:]: one["value"] for name, one in values.items() if name.startswith("IoU: ")}
        score = values["mIoU"] | {"fb_iou": values["FB-IoU"]["value"], "per_class": per_class}
        models.append(shipped(tmp_path / f"pascal-fold{fold}.safetensors", [score], resolution=96))
    write_manifest(tmp_path, models)
    given = [*small[: small.index("--sizes")], "--sizes", "--score-at", "96", "--out", str(tmp_path / "other")]
    with monkeypatch.context() as patch:
        patch.setattr(script, "evaluate", None)
        script.main(given)
        for changed in (["--again"], ["--episodes", "4"], ["--score-at", "64"], ["--shots", "5"]):
            with pytest.raises(TypeError):
                script.main([*given, *changed])
    again = [one for one in json.loads((tmp_path / "results.json").read_text()) if one["task"] == "segmentation"]
    assert {one["command"] for one in again} == {script.provenance()["command"]}  # not the training
    key = ("fold", "metric")
    assert {(*(one[name] for name in key), one["value"]) for one in again} == {
        (*(one[name] for name in key), one["value"]) for one in found
    }


def shipped(file: Path, scores: list[dict[str, Any]], *, resolution: int) -> ShippedModel:
    return ShippedModel(
        name=file.stem,
        sha256=file_digest(file),
        bytes=file.stat().st_size,
        backbone="mobilenetv3_small_050",
        summary="",
        data="",
        protocol="hsnet",
        fold=int(file.stem[-1]),
        resolution=resolution,
        parameters=1,
        commit="abc",
        command="the command",
        licence="",
        scores=scores,
    )
