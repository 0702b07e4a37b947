"""``fewshot-seg predict`` in process, and the predictor of three lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

import fewshot_seg
from episodes.types import DataError, UInt8Array
from fewshot_seg import photos
from fewshot_seg.backbones import build_backbone
from fewshot_seg.checkpoint import save_segmenter
from fewshot_seg.cli import main
from fewshot_seg.prediction import Predictor
from fewshot_seg.predictors import open_predictor
from fewshot_seg.segmenter import build_segmenter, training_free

TINY = ("--backbone", "mobilenetv3_small_050", "--backbone-weights", "random", "--size", "64", "--threshold", "0.1")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """red.png and green.png with masks, and a folder of queries that show both."""
    folder = tmp_path / "pictures"
    (folder / "queries").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, colour in (("red", (220, 30, 30)), ("green", (30, 200, 60))):
        picture = Image.fromarray(random.integers(90, 130, (60, 80, 3)).astype(np.uint8))
        ImageDraw.Draw(picture).rectangle((20, 10, 50, 40), fill=colour)
        picture.save(folder / f"{name}.png")
        mask = Image.new("L", picture.size)
        ImageDraw.Draw(mask).rectangle((20, 10, 50, 40), fill=255)
        mask.save(folder / f"{name}_mask.png")
    for name in ("one.png", "two.jpg"):
        picture = Image.fromarray(random.integers(90, 130, (70, 150, 3)).astype(np.uint8))
        ImageDraw.Draw(picture).rectangle((10, 20, 60, 50), fill=(220, 30, 30))
        ImageDraw.Draw(picture).ellipse((80, 10, 130, 60), fill=(30, 200, 60))
        picture.save(folder / "queries" / name)
    return folder


def supports(folder: Path) -> list[str]:
    return [f"{name}={folder / name}.png:{folder / name}_mask.png" for name in ("red", "green")]


def pixels_of(path: Path) -> UInt8Array:
    with Image.open(path) as picture:
        return np.asarray(picture)


def predict(*arguments: object) -> int:
    return main(["predict", *TINY, *map(str, arguments)])


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())["results"]
    return found


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def failing(*arguments: object) -> str:
        assert predict(*arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    return failing


def test_everything_at_once(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = ("--coco", "--confidence", "--flip", "--tile", "64")
    assert predict("--support", *supports(pictures), "--query", pictures / "queries", "--out", out, *flags) == 0
    assert "2 of 2 photos" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "confidence",
        "instances.json",
        "masks",
        "overlays",
        "run.json",
    ]
    found, coco = results(out), COCO(str(out / "instances.json"))
    assert found["classes"] == ["red", "green"]
    assert found["supports"] == supports(pictures)
    assert [coco.imgs[number]["file_name"] for number in (1, 2)] == ["one.png", "two.jpg"]
    expected = open_tiny(pictures, tile=64, flip=True)
    for number, photo in enumerate(found["photos"], 1):
        labels = pixels_of(out / photo["mask"])
        assert labels.shape == (70, 150)
        prediction = expected.predict_file(photo["query"])
        differ = prediction.mask != labels
        assert np.abs(prediction.confidence[differ] - 0.5).max(initial=0) < 1e-5
        shown = {name: float((labels == k).mean()) for k, name in ((1, "red"), (2, "green")) if (labels == k).any()}
        assert {name: one["share"] for name, one in photo["classes"].items()} == pytest.approx(shown)
        assert len(coco.getAnnIds(imgIds=[number])) == len(shown)
        assert np.array_equal(pixels_of(out / "confidence" / f"{Path(photo['mask']).stem}.png") >= 128, labels > 0)


def open_tiny(folder: Path, **options: Any) -> Predictor:
    """A training-free predictor as of the flags above, by its parts."""
    backbone = build_backbone("mobilenetv3_small_050", weights="random")
    predictor = Predictor(training_free(backbone, threshold=0.1), 64, **options)
    predictor.remember_files(*supports(folder))
    return predictor


def test_one_class_is_called_object(pictures: Path, tmp_path: Path) -> None:
    support, out = supports(pictures)[0].removeprefix("red="), tmp_path / "out"
    assert predict("--support", support, "--query", pictures / "queries", "--out", out, "--coco") == 0
    assert results(out)["classes"] == ["object"]
    assert "classes" not in results(out)["photos"][0]
    assert json.loads((out / "instances.json").read_text())["categories"] == [{"id": 1, "name": "object"}]
    assert not (out / "confidence").exists()


def test_support_sets_of_several_classes(pictures: Path, tmp_path: Path) -> None:
    red, green = supports(pictures)
    sets = [tmp_path / "red.safetensors", tmp_path / "green.safetensors"]
    for support, path in zip((red, green), sets, strict=True):
        assert predict("--support", support, "--save-support", path) == 0
    query = ("--query", pictures / "queries")
    given: dict[str, tuple[object, ...]] = {
        "photos": ("--support", red, green),
        "sets": ("--support-set", f"red={sets[0]}", f"green={sets[1]}"),
        "mixed": ("--support", red, "--support-set", f"green={sets[1]}"),
    }
    for name, flags in given.items():
        assert predict(*flags, *query, "--out", tmp_path / name) == 0
        assert results(tmp_path / name)["classes"] == ["red", "green"]
        assert results(tmp_path / name)["supports"] == [red, green]
    for name in ("sets", "mixed"):
        for query_name in ("one.png", "two.png"):
            expected = pixels_of(tmp_path / "photos" / "masks" / query_name)
            assert np.array_equal(pixels_of(tmp_path / name / "masks" / query_name), expected)


def test_reduced_photos_are_reported(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(photos, "WORKING_PIXELS", 5000)  # queries have 10500, supports 4800
    out = tmp_path / "out"
    assert predict("--support", *supports(pictures), "--query", pictures / "queries", "--out", out) == 0
    assert "fewshot-seg: 2 photo(s) of more than" in capsys.readouterr().err
    for photo in results(out)["photos"]:
        assert (photo["size"], photo["worked_on"]) == ([150, 70], [104, 48])
        assert pixels_of(out / photo["mask"]).shape == (70, 150)


class TestOneClearLine:
    def test_two_classes_in_one_set(self, pictures: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
        message = error_of("--support", *supports(pictures), "--save-support", tmp_path / "s.safetensors")
        assert message.endswith("--save-support keeps one class, got red, green; save them one by one")

    @pytest.mark.parametrize("sets", [("a=x", "a=y"), ("x", "y"), ("red=x",)])
    def test_a_name_twice(self, pictures: Path, error_of: Callable[..., str], sets: tuple[str, ...]) -> None:
        support, query = supports(pictures)[0], pictures / "queries"
        message = error_of("--support", support, "--support-set", *sets, "--query", query)
        assert "each support set is a class of its own, got red, " in message

    def test_missing_support_set(self, pictures: Path, error_of: Callable[..., str]) -> None:
        message = error_of("--support-set", "cat=none.safetensors", "--query", pictures / "queries")
        assert "no support set at none.safetensors" in message

    def test_misspelt_photo_of_a_class(self, pictures: Path, error_of: Callable[..., str]) -> None:
        message = error_of("--support", "cat=none.jpg", "--query", pictures / "queries")
        assert "--support 'none.jpg': no such photo; expected PHOTO:MASK" in message

    def test_tile_too_small(self, pictures: Path, error_of: Callable[..., str]) -> None:
        message = error_of("--support", *supports(pictures), "--query", pictures / "queries", "--tile", 10)
        assert "--tile must be at least 64, got 10" in message


class TestOpenPredictor:
    def test_three_lines_with_a_model(self, pictures: Path, tmp_path: Path) -> None:
        backbone = build_backbone("mobilenetv3_small_050", weights="random")
        segmenter = build_segmenter(backbone, decoder_width=8, decoder_blocks=1)
        model = tmp_path / "model.safetensors"
        save_segmenter(model, segmenter, backbone_weights="random", resolution=64)
        predictor = fewshot_seg.open_predictor(model)
        predictor.remember_files(*supports(pictures))
        mask = predictor.predict_file(pictures / "queries" / "one.png").mask

        expected = Predictor(segmenter, 64)
        expected.remember_files(*supports(pictures))
        assert np.array_equal(mask, expected.predict_file(pictures / "queries" / "one.png").mask)
        for size, threshold in ((96, None), (None, -3.0)):
            other = open_predictor(model, size=size, threshold=threshold)
            other.remember_files(*supports(pictures))
            found = other.predict_file(pictures / "queries" / "one.png").confidence
            before = expected.predict_file(pictures / "queries" / "one.png").confidence
            assert not np.array_equal(found, before)

    def test_what_it_is_by_default_is_what_predict_takes(self, pictures: Path, tmp_path: Path) -> None:
        predictor = open_predictor(size=64)
        predictor.remember_files(*supports(pictures))
        out, query = tmp_path / "out", pictures / "queries" / "one.png"
        arguments = ["--support", *supports(pictures), "--query", str(query), "--out", str(out), "--size", "64"]
        assert main(["predict", *arguments]) == 0
        found = predictor.predict_file(query)
        differ = pixels_of(out / "masks" / "one.png") != found.mask
        assert np.abs(found.confidence[differ] - 0.5).max(initial=0) < 1e-5

    def test_missing_model(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"none\.safetensors"):
            open_predictor(tmp_path / "none.safetensors")
