"""The weights script in process, with tiny settings: models, cards and manifest, and runs that go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from episodes.sources import JointSource, SyntheticSource
from episodes.types import DataError
from fewshot_seg.checkpoint import load_segmenter
from fewshot_seg.cross_fitting import train_base_learner
from fewshot_seg.runtime import read_json
from fewshot_seg.shipped import GENERAL, shipped_models, verify_shipped

_CATEGORIES = {
    1: "person",
    16: "bird",
    18: "dog",
    22: "elephant",
    24: "zebra",
    52: "banana",
    53: "apple",
    90: "toothbrush",
}
_SHORT = {"steps": 2, "batch_size": 2, "decoder_steps": 2, "decoder_episodes": ((1, 3),)}


def _write_coco(root: Path) -> Path:
    """Eight categories, three photos each in both splits, one box of 24 x 24 pixels in each photo."""
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(3 * len(_CATEGORIES)):
            category = list(_CATEGORIES)[number % len(_CATEGORIES)]
            pixels = np.random.default_rng(number).integers(0, 120, (48, 64, 3)).astype(np.uint8)
            pixels[10:34, 8:32] = (2 * category, 250 - 2 * category, 100)
            Image.fromarray(pixels).save(root / split / f"{number}.jpg")
            images.append({"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48})
            outline = [[8, 10, 32, 10, 32, 34, 8, 34]]
            thing = {"segmentation": outline, "bbox": [8, 10, 24, 24], "area": 576, "iscrowd": 0}
            annotations.append({"id": number + 1, "image_id": number, "category_id": category, **thing})
        categories = [{"id": key, "name": name} for key, name in _CATEGORIES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


class FewPictures(SyntheticSource):
    """Generated pictures, but few and small."""

    def __init__(self) -> None:
        super().__init__(base_classes=4, novel_classes=2, images_per_class=3, size=64)


@pytest.fixture
def script(load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script with tiny recipes."""
    runs, general, module = map(load_script, ("weight_runs", "general_model", "train_weights"))
    monkeypatch.setenv("FEWSHOT_SEG_CACHE", str(tmp_path / "cache"))
    quick = partial(train_base_learner, steps=5, batch_size=64)
    monkeypatch.setattr("fewshot_seg.cross_fitted_fold.train_base_learner", quick)
    monkeypatch.setattr(runs, "BACKBONE", {"name": "mobilenetv3_small_050", "weights": "random"})
    for recipes in (module, general):
        monkeypatch.setattr(recipes, "MODEL", recipes.MODEL | {"decoder_width": 8, "decoder_blocks": 0})
        monkeypatch.setattr(recipes, "TRAINING", recipes.TRAINING | _SHORT)
        monkeypatch.setattr(recipes, "SHOTS", (1,))
    monkeypatch.setattr(module, "RESOLUTION", 64)
    monkeypatch.setattr(module, "PHOTO_SIZE", 96)
    monkeypatch.setattr(general, "PROTOCOL", {"resolution": 64, "scoring_size": 64, "min_area": 40})
    monkeypatch.setattr(general, "CHECK_EPISODES", 6)
    monkeypatch.setattr(general, "SyntheticSource", FewPictures)
    return module


@pytest.fixture
def arguments(shared_voc: Path, tmp_path: Path) -> list[str]:
    folders = {"--voc": shared_voc, "--coco": _write_coco(tmp_path / "coco"), "--device": "cpu"}
    folders |= {"--out": tmp_path / "weights", "--runs": tmp_path / "runs", "--cache": tmp_path / "cache"}
    return [str(word) for pair in folders.items() for word in pair]


def test_a_fold_and_the_general_model(
    script: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "weights"
    monkeypatch.setattr("fewshot_seg.shipped.weights_folder", lambda: out)
    script.main([*arguments, "--only", GENERAL, "--composites", "6"])
    script.main([*arguments, "--only", "pascal-fold1", "--episodes", "6"])
    fold, general = shipped_models()
    assert (fold.name, general.name) == ("pascal-fold1", GENERAL)
    assert verify_shipped() == []
    assert fold.scores[0]["episodes"] == 6
    for model in (fold, general):  # trained on small photos, scored and used on larger ones
        assert model.resolution == 96
        assert load_segmenter(out / model.file).notes["trained_at"] == 64
    assert fold.command.endswith("--only pascal-fold1")
    assert {score["data"] for score in general.scores} == {
        f"{member}, classes left out, photos at 96" for member in ("voc", "coco", "synthetic")
    }
    assert {score["support"] for score in general.scores} == {"mask", "box", "scribble", "point", "label"}
    for model in (fold, general):
        card = (out / model.card).read_text()
        for word in (
            model.sha256,
            model.command,
            "Flickr",
            "## Limits",
            "95% interval",
            f"{model.scores[0]['value']:.1f}",
        ):
            assert word in card
    assert "not comparable with published PASCAL-5i" in (out / fold.card).read_text()
    assert "bus" in fold.summary
    loaded = load_segmenter(out / general.file)
    assert loaded.segmenter.completion is not None
    assert loaded.notes["members"]["coco"] == list(_CATEGORIES)
    assert loaded.notes["members"]["voc"] == list(range(1, 21))
    assert loaded.notes["members"]["synthetic"] == [1, 2, 3, 4]
    _goes_on(script, arguments, tmp_path, monkeypatch)


def _goes_on(script: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run is not trained again, one of another recipe is refused, and the manifest is mended."""
    before = (tmp_path / "weights" / "manifest.json").read_text()
    with monkeypatch.context() as patched:
        patched.setattr("weight_runs.train_cross_fitted", None)
        script.main([*arguments, "--only", "pascal-fold1", "--episodes", "6"])
    assert (tmp_path / "weights" / "manifest.json").read_text() == before
    with pytest.raises(DataError, match="pascal-fold1 holds a run of another recipe or other data; delete it"):
        script.main([*arguments, "--only", "pascal-fold1", "--steps", "3"])
    record = read_json(tmp_path / "runs" / "pascal-fold1" / "run.json", what="record")
    assert record["recipe"]["training"]["steps"] == 2


@pytest.mark.usefixtures("script")
def test_classes_are_dealt_to_training_choice_and_check(
    load_script: Callable[[str], ModuleType], arguments: list[str], tmp_path: Path
) -> None:
    general = load_script("general_model")
    voc, coco = (Path(arguments[arguments.index(flag) + 1]) for flag in ("--voc", "--coco"))
    source: JointSource = general.joint_source(voc, coco)
    backbone = load_script("weight_runs").open_backbone("cpu")
    whole = general.general_data(source, backbone, tmp_path / "cache")
    names = source.class_names
    generated = {names[class_id] for class_id in source.own_classes("synthetic")}
    assert {names[class_id] for class_id in whole.split.novel} < generated
    assert len(whole.split.novel) == 2
    assert any(image_id.startswith("voc/val_") for image_id in whole.training_index.image_ids)
    left_out = set()
    for part in range(general.PARTS):
        data = general.general_data(source, backbone, tmp_path / "cache", left_out=part)
        assert data.held_out is not None
        assert not set(data.held_out.novel) & (set(data.held_out.base) | set(data.split.novel))
        assert set(data.held_out.base) | set(data.held_out.novel) == set(data.split.base)
        assert not any("/val" in image_id for image_id in data.training_index.image_ids)
        seen = general.members_seen(source, data.split.base)
        novel = {names[class_id] for class_id in data.split.novel}
        assert not novel & {_CATEGORIES[own] for own in seen["coco"]}
        left_out |= set(data.split.novel)
    assert left_out == set(names) - set(whole.source.own_classes("synthetic")) | set(whole.split.novel)


def test_the_general_model_needs_coco(script: ModuleType, shared_voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--voc", str(shared_voc)])
    assert "the general model needs --coco" in capsys.readouterr().err
