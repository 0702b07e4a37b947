"""The command line in process: the main paths on a tiny VOC folder, and every bad input with its one line."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fewshot_seg
import fewshot_seg.training
from episodes.sources import SyntheticSource
from episodes.types import DataError
from fewshot_seg import cli
from fewshot_seg.checkpoint import load_segmenter
from fewshot_seg.cli import main
from fewshot_seg.config import (
    Config,
    DemoConfig,
    EpisodesConfig,
    EvaluateConfig,
    ExplainConfig,
    PredictConfig,
    PrepareConfig,
    ReportConfig,
    ShowConfig,
    SimilarityEvaluateConfig,
    SimilarityExplainConfig,
    SimilarityTrainConfig,
    TrainConfig,
    VerifyConfig,
    WeightsListConfig,
    WeightsVerifyConfig,
    settings_of,
)

TINY = ("--backbone", "mobilenetv3_small_050", "--backbone-weights", "random")
SIZE = ("--resolution", "64")
SHORT = (
    "--steps",
    "4",
    "--batch-size",
    "2",
    "--checkpoint-every",
    "2",
    "--validation-episodes",
    "8",
    "--training",
    "joint",
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSHOT_SEG_CACHE", str(tmp_path / "cache"))


class FewPictures(SyntheticSource):
    """The command line's generated pictures, but few."""

    def __init__(self, **given: int) -> None:
        super().__init__(**{"base_classes": 6, "novel_classes": 2, "images_per_class": 4, **given})


@pytest.fixture
def _few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewshot_seg.runs.SyntheticSource", FewPictures)
    monkeypatch.setattr("fewshot_seg.demo.SyntheticSource", FewPictures)


def train(root: Path, out: Path, *more: str) -> int:
    return main(["train", "--root", str(root), "--out", str(out), *TINY, *SIZE, *SHORT, *more])


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail: exit code 2 and exactly one line of error, which is returned."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        printed = capsys.readouterr().err.replace("\r", "\n").splitlines()
        lines = [line for line in printed if line.strip() and "it/s" not in line and "image" not in line[:40]]
        errors = [line for line in printed if line.startswith("fewshot-seg: error: ")]
        assert len(errors) == 1
        assert "Traceback" not in "".join(lines)
        return errors[0].removeprefix("fewshot-seg: error: ")

    return run


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_train_evaluate_explain_predict(tiny_voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, root = tmp_path / "run", ["--root", str(tiny_voc)]
    assert train(tiny_voc, run, "--photo-size", "96") == 0
    model = run / "model.safetensors"
    assert f"model: {model}" in capsys.readouterr().out
    loaded = load_segmenter(model)  # trained on small photos, to be used on larger ones
    assert (loaded.notes["trained_at"], loaded.resolution) == (64, 96)
    record = read(run / "run.json")
    assert record["configuration"]["steps"] == 4
    assert record["protocol"]["name"] == "hsnet"
    assert record["data"]["name"] == "PASCAL-5i/32"
    assert record["data"]["novel_classes"] == [1, 2, 3, 4, 5]
    assert set(record["data"]["fingerprint"]) == {"training", "evaluation"}
    assert "commit" in record["environment"]
    assert record["results"]["steps"] == 4
    assert (run / "selection" / "training.jsonl").exists()

    scored = tmp_path / "scored"
    assert main(["evaluate", *root, "--model", str(model), "--out", str(scored), "--count", "12", "--shots", "2"]) == 0
    printed = capsys.readouterr().out
    heading = "PASCAL-5i/32, fold 0, 2-shot, protocol hsnet, photos of 96 pixels (the protocol's: 400): "
    assert heading in printed
    evaluation = read(scored / "evaluation.json")
    assert list(evaluation["per_class"]) == ["aeroplane", "bicycle"]
    assert f"mIoU       {evaluation['miou'][0]:5.1f}".split() == next(
        line.split()[:2] for line in printed.splitlines() if line.startswith("mIoU")
    )
    assert evaluation["miou"][0] == pytest.approx(np.mean(list(evaluation["per_class"].values())))
    assert evaluation["threshold"] == record["results"]["threshold"]
    assert evaluation["resolution"] == 96
    assert len(evaluation["episodes"]) == 12
    assert all(len(episode["support_ids"]) == 2 for episode in evaluation["episodes"])
    assert read(scored / "run.json")["results"]["miou"] == evaluation["miou"]

    why = tmp_path / "why"
    assert main(["explain", *root, "--model", str(model), "--out", str(why), "--numbers", "3", "0"]) == 0
    assert sorted(path.name for path in why.glob("*.png")) == ["episode-0000.png", "episode-0003.png"]
    assert (why / "index.html").exists()

    mask = tmp_path / "mask.png"
    labels = np.asarray(Image.open(tiny_voc / "SegmentationClassAug" / "val_01_0.png"))
    Image.fromarray(np.where(labels == 1, 255, 0).astype(np.uint8)).save(mask)
    support = f"{tiny_voc / 'JPEGImages' / 'val_01_0.jpg'}:{mask}"
    query, found = tiny_voc / "JPEGImages" / "val_01_2.jpg", tmp_path / "found"
    assert (
        main(["predict", "--model", str(model), "--support", support, "--query", str(query), "--out", str(found)]) == 0
    )
    with Image.open(query) as photo, Image.open(found / "masks" / "val_01_2.png") as written:
        assert written.size == photo.size
    assert (found / "overlays" / "val_01_2.jpg").exists()
    assert read(found / "run.json")["results"]["photos"][0]["query"] == str(query)


@pytest.mark.parametrize("call", [2, 7])  # of four steps each: in the selection run, and in the final one
def test_resumed_training_ends_with_the_same_weights(
    tiny_voc: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: int,
) -> None:
    assert train(tiny_voc, tmp_path / "whole") == 0
    original, calls = fewshot_seg.training.episode_losses, 0

    def interrupted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(fewshot_seg.training, "episode_losses", interrupted)
        assert train(tiny_voc, tmp_path / "cut") == 130
    assert "interrupted; a training goes on with --resume" in capsys.readouterr().err
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert train(tiny_voc, tmp_path / "cut", "--resume") == 0
    models = [tmp_path / name / "model.safetensors" for name in ("whole", "cut")]
    assert same_weights(*models)
    thresholds = [read(tmp_path / name / "run.json")["results"]["threshold"] for name in ("whole", "cut")]
    assert thresholds[0] == thresholds[1]


def test_prior_alone_gets_its_threshold_from_base_classes(
    tiny_voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--root", str(tiny_voc), *TINY, *SIZE, "--count", "6", "--scoring", "original"]
    assert main([*arguments, "--out", str(tmp_path / "a"), "--prior-map", "gradient attention"]) == 0
    assert "gradient attention, training-free" in capsys.readouterr().out
    chosen = read(tmp_path / "a" / "evaluation.json")
    assert chosen["threshold_origin"] == "chosen on base classes"
    assert 0 <= chosen["threshold"] < 1  # the map is scaled to [0, 1]
    assert main([*arguments, "--out", str(tmp_path / "b"), "--threshold", "1.5", "--fold", "1"]) == 0
    given = read(tmp_path / "b" / "evaluation.json")
    assert (given["threshold"], given["fold"], given["threshold_origin"]) == (1.5, 1, "given by --threshold")


@pytest.mark.usefixtures("_few_pictures")
@pytest.mark.usefixtures("_few_pictures")
def test_train_by_cross_fitting_and_evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default training; killed with a group done, refused with other settings, resumed, evaluated."""
    out = tmp_path / "run"
    arguments = ["train", "--data", "synthetic", *TINY, *SIZE, "--out", str(out), "--batch-size", "2"]
    short = ["--steps", "2", "--decoder-steps", "3", "--decoder-episodes", "4"]

    def dies(*_: Any, **__: Any) -> None:
        raise DataError("disk gone")

    with monkeypatch.context() as patch:
        patch.setattr("fewshot_seg.cross_fitted_fold.train_decoder", dies)
        assert error_of(*arguments, *short) == "disk gone"
    assert "holds an earlier run (group0/checkpoint.safetensors); go on" in error_of(*arguments, *short)
    changed = [*short[:-1], "5"]
    assert "decoder_episodes was 4, now 5" in error_of(*arguments, *changed, "--resume")
    assert main([*arguments, *short, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"threshold 0.000: mIoU +\d+\.\d on base classes that the embedding had not seen", printed)
    assert f"model: {out / 'model.safetensors'}" in printed
    record = read(out / "run.json")
    assert record["configuration"]["training"] is None
    assert record["results"]["steps"] == 3
    assert record["results"]["threshold"] == 0
    assert {name.split(".")[0] for name in load_file(out / "model.safetensors")} == {
        "similarity",
        "decoder",
        "base_learner",
    }
    scored, model = tmp_path / "scored", str(out / "model.safetensors")
    data = ["--data", "synthetic", "--count", "6", "--shots", "2", "--support-cells", "20"]
    assert main(["evaluate", *data, "--model", model, "--out", str(scored)]) == 0
    evaluation = read(scored / "evaluation.json")
    assert evaluation["resolution"] == 64  # where nothing else is asked for, that of the training
    assert evaluation["threshold"] == 0
    assert 0 <= evaluation["miou"][0] <= 100
    assert len(evaluation["episodes"]) == 6


def test_synthetic_data_needs_no_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", "--data", "synthetic", *TINY, *SIZE, "--threshold", "0", "--count", "1"]
    assert main([*arguments, "--out", str(tmp_path / "why")]) == 0
    assert (tmp_path / "why" / "episode-0000.png").exists()
    assert "1 pictures" in capsys.readouterr().out


@pytest.mark.usefixtures("_few_pictures")
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    sizes = ["--steps", "2", "--batch-size", "2", "--episodes", "6", "--report-episodes", "4", "--resolution", "64"]
    assert main(["demo", "--out", str(out), *TINY, *sizes]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[4:7]] == [
        "gradient attention alone",
        "soft margin alone",
        "decoder on all prior maps",
    ]
    assert lines[-1].endswith(str(out / "report.html"))
    assert len(list((out / "gallery").glob("*.webp"))) == 4 * 7
    page = (out / "report.html").read_text()
    assert page.count("data:image/webp;base64,") == (4 + 3) * 7  # best, median and worst twice
    assert "synthetic, 1-shot: 3 runs side by side" in page
    shown = [path.parent.name for path in out.rglob("run.json")]
    assert sorted(shown) == ["demo", "gradient-attention-alone", "soft-margin-alone"]


@pytest.mark.usefixtures("_few_pictures")
def test_report_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], error_of: Callable[..., str]) -> None:
    given = ["evaluate", "--data", "synthetic", *TINY, *SIZE, "--count", "6"]
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    assert main([*given, "--threshold", "0", "--report-episodes", "2", "--out", one]) == 0
    assert capsys.readouterr().out.endswith(f"report: {one}/report.html\n")
    assert main([*given, "--threshold", "0.3", "--report-episodes", "0", "--out", other]) == 0
    assert not (tmp_path / "other" / "gallery").exists()
    episode = read(tmp_path / "one" / "evaluation.json")["episodes"][0]
    finding = episode["finding"]
    union = finding["target"] + finding["found"] - finding["both"]
    assert episode["iou"] == pytest.approx(100 * finding["both"] / union)

    page = tmp_path / "page.html"
    capsys.readouterr()
    assert main(["report", one, other, "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"report: {page}\n"
    text = page.read_text()
    assert "2 runs side by side" in text
    assert "threshold" in text[text.index("Settings that differ") :]
    assert "it is a folder" in error_of("report", one, "--out", str(tmp_path))
    own = tmp_path / "mine" / "gallery" / "photo.jpg"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert "holds 'photo.jpg'" in error_of(*given, "--out", str(tmp_path / "mine"))
    assert [path for path in own.parents[1].rglob("*") if path.is_file()] == [own]  # before anything is scored
    message = error_of("report", one, str(tmp_path))
    assert message == (
        f"{tmp_path} is no run of `evaluate` or `demo`: it has no run.json with evaluation.json beside it; give the "
        "--out of such a run"
    )
    assert "no such folder" in error_of("report", str(tmp_path / "nowhere"))
    assert "RUNS" in error_of("report")


class TestVerify:
    def test_good_data(self, tiny_voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
        # three classes a fold are missing from the tiny folder
        assert main(["data", "verify", "--root", str(tiny_voc)]) == 1
        printed = capsys.readouterr().out
        assert "val: 32 images, 8 of 20 classes, problems: 12" in printed
        assert "no image of the split shows class 3 (bird)" in printed

    @pytest.mark.usefixtures("_few_pictures")
    def test_synthetic(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["data", "verify", "--data", "synthetic", "--splits", "val"]) == 0
        assert "val: 8 images, 2 of 2 classes, problems: 0" in capsys.readouterr().out

    def test_lists_every_broken_file(self, tiny_voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tiny_voc / "JPEGImages" / "val_01_0.jpg").write_bytes(b"broken")
        (tiny_voc / "SegmentationClassAug" / "val_02_0.png").unlink()
        assert main(["data", "verify", "--root", str(tiny_voc), "--splits", "val"]) == 1
        printed = capsys.readouterr().out
        assert "val_01_0.jpg: photo cannot be decoded" in printed
        assert "val_02_0.png: no such file" in printed


class TestBadInput:
    def test_wrong_root(self, tmp_path: Path, error_of: Callable[..., str]) -> None:
        message = error_of("train", "--root", str(tmp_path / "none"), *TINY)
        assert "expected a VOC2012 folder with JPEGImages/" in message
        assert "does not exist" in message

    def test_no_root(self, error_of: Callable[..., str]) -> None:
        assert error_of("train").startswith("--data voc needs --root, the VOC2012 folder that holds JPEGImages/")

    def test_empty_fold(self, tiny_voc: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
        split = tiny_voc / "ImageSets" / "Segmentation" / "val.txt"
        kept = [line for line in split.read_text().split() if not line.startswith(("val_16", "val_17", "val_12"))]
        split.write_text("\n".join(kept))
        message = error_of(
            *("evaluate", "--root", str(tiny_voc), "--fold", "3", *TINY, *SIZE),
            *("--threshold", "0", "--out", str(tmp_path / "e")),
        )
        assert "no 1-shot episodes: protocol hsnet finds no image of the wanted classes" in message
        assert "pottedplant, sheep, sofa, train, tvmonitor" in message
        assert not (tmp_path / "e").exists()

    def test_mask_of_another_size(self, tiny_voc: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
        for mask in (tiny_voc / "SegmentationClassAug").glob("trainaug_*.png"):  # which are drawn is left to chance
            with Image.open(mask) as picture:
                cropped = picture.crop((0, 0, 50, 50))
            cropped.save(mask)
        message = error_of("train", "--root", str(tiny_voc), *TINY, *SIZE, *SHORT, "--out", str(tmp_path / "r"))
        assert re.search(r"(trainaug_\d+_\d)\.png: mask is 50x50, photo \1\.jpg is", message)

    def test_corrupt_photo(self, tiny_voc: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
        for photo in (tiny_voc / "JPEGImages").glob("trainaug_*_0.jpg"):
            photo.write_bytes(photo.read_bytes()[:300])
        message = error_of("train", "--root", str(tiny_voc), *TINY, *SIZE, *SHORT, "--out", str(tmp_path / "r"))
        assert "_0.jpg: photo cannot be decoded" in message

    def test_colour_coded_mask(self, tiny_voc: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
        mask = tiny_voc / "SegmentationClassAug" / "val_01_0.png"
        with Image.open(mask) as picture:
            coloured = picture.convert("RGB")
        coloured.save(mask)
        arguments = ("--root", str(tiny_voc), *TINY, *SIZE, "--threshold", "0", "--out", str(tmp_path / "e"))
        assert "val_01_0.png: mask is colour-coded (RGB)" in error_of("evaluate", *arguments)

    def test_no_shots(self, tiny_voc: Path, error_of: Callable[..., str]) -> None:
        assert error_of("evaluate", "--root", str(tiny_voc), "--shots", "0") == "--shots must be at least 1, got 0"

    def test_more_shots_than_images(self, tiny_voc: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
        split = tiny_voc / "ImageSets" / "Segmentation" / "val.txt"
        split.write_text("val_01_0\nval_02_0\n")
        arguments = ("--root", str(tiny_voc), *TINY, *SIZE, "--threshold", "0", "--out", str(tmp_path / "e"))
        message = error_of("evaluate", *arguments, "--shots", "5")
        assert "no 5-shot episodes: protocol hsnet has too few images of aeroplane, bicycle in voc" in message

    def test_unknown_key(self, tmp_path: Path, error_of: Callable[..., str]) -> None:
        file = tmp_path / "run.toml"
        file.write_text("stepz = 3")
        assert f"{file}: unknown key 'stepz'; did you mean steps" in error_of("train", "--config", str(file))

    def test_prior_map_without_threshold(self, tiny_voc: Path, error_of: Callable[..., str]) -> None:
        photo, mask = (tiny_voc / name for name in ("JPEGImages/val_01_0.jpg", "SegmentationClassAug/val_01_0.png"))
        arguments = ("--support", f"{photo}:{mask}", "--query", str(photo), *TINY)
        message = error_of("predict", *arguments, "--prior-map", "prototype margin")
        assert message == (
            "--prior-map 'prototype margin' has no threshold of its own, and there are no base classes to choose one "
            "on; give one with --threshold"
        )

    @pytest.mark.parametrize("verb", ["evaluate", "explain", "train"])
    def test_cache_that_cannot_be_made(
        self, tiny_voc: Path, tmp_path: Path, error_of: Callable[..., str], verb: str
    ) -> None:
        in_the_way, out = tmp_path / "file", tmp_path / "o"
        in_the_way.write_text("no folder")
        arguments = (verb, "--root", str(tiny_voc), *TINY, *SIZE, "--out", str(out))
        assert error_of(*arguments, "--cache", str(in_the_way / "deep")) == (
            f"cannot keep the index in {in_the_way / 'deep' / 'index'}: Not a directory; name another --cache"
        )
        assert not out.exists()

    def test_missing_model(self, tiny_voc: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
        message = error_of("evaluate", "--root", str(tiny_voc), "--model", str(tmp_path / "m.safetensors"))
        assert message.startswith(f"no model file at {tmp_path / 'm.safetensors'}")

    def test_damaged_model(self, tiny_voc: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
        model = tmp_path / "m.safetensors"
        model.write_bytes(b"\x10\0\0\0\0\0\0\0 damaged")
        message = error_of("evaluate", "--root", str(tiny_voc), "--model", str(model))
        assert f"{model} is damaged or was not written by fewshot-seg" in message

    def test_model_of_another_fold(self, tiny_voc: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
        assert train(tiny_voc, tmp_path / "run", "--no-select-threshold") == 0
        model = tmp_path / "run" / "model.safetensors"
        message = error_of("evaluate", "--root", str(tiny_voc), "--model", str(model), "--fold", "1")
        assert "was trained on bus, car, cat, chair, cow, which fold 1 scores as novel; use --fold 0" in message

    def test_earlier_run_is_kept(self, tiny_voc: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
        run = tmp_path / "run"
        assert train(tiny_voc, run, "--no-select-threshold") == 0
        again = ("train", "--root", str(tiny_voc), "--out", str(run), *TINY, *SIZE, *SHORT, "--no-select-threshold")
        assert "holds an earlier run (model.safetensors); go on with it by --resume" in error_of(*again)
        assert "cannot resume" in error_of(*again, "--resume", "--fold", "1")
        assert "fold was 0, now 1" in error_of(*again, "--resume", "--fold", "1")

    def test_a_run_is_older_than_a_setting(self, tiny_voc: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
        """What the run does not know it did as by default; but before there was --training, it was joint."""
        run, more = tmp_path / "run", ("--no-select-threshold", "--training", "joint")
        assert train(tiny_voc, run, *more) == 0
        record = json.loads((run / "run.json").read_text())
        for name in ("training", "decoder_steps", "support_augment", "precision"):
            del record["configuration"][name]
        (run / "run.json").write_text(json.dumps(record))
        assert train(tiny_voc, run, *more, "--resume") == 0
        (run / "run.json").write_text(json.dumps(record))
        again = ("train", "--root", str(tiny_voc), "--out", str(run), *TINY, *SIZE, *SHORT, *more, "--resume")
        assert "training was joint, now cross-fit" in error_of(*again, "--training", "cross-fit")
        assert "support_augment was None, now flip" in error_of(*again, "--support-augment", "flip")
        (run / "run.json").write_text("{}")
        assert "run.json does not say its settings; choose another --out" in error_of(*again)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["train", "--shotz", "1"], "unrecognized arguments: --shotz 1; see fewshot-seg --help"),
            (["train", "--steps", "x"], "argument --steps: invalid int value: 'x'; see fewshot-seg train --help"),
            ([], "the following arguments are required: VERB; see fewshot-seg --help"),
            (["predict"], "missing --support: PHOTO:MASK pairs"),
            (
                ["train", "--data", "ade"],
                "--data must be one of voc, coco, fss, folder, coco-json, labelme, synthetic; got 'ade'",
            ),
        ],
    )
    def test_wrong_flags(self, error_of: Callable[..., str], arguments: list[str], message: str) -> None:
        assert message in error_of(*arguments)


class TestPredict:
    @pytest.fixture
    def support(self, tiny_voc: Path, tmp_path: Path) -> str:
        mask = tmp_path / "mask.png"
        shutil.copy(tiny_voc / "SegmentationClassAug" / "val_01_0.png", mask)
        return f"{tiny_voc / 'JPEGImages' / 'val_01_0.jpg'}:{mask}"

    def test_broken_query_is_reported_and_the_rest_done(
        self, tiny_voc: Path, tmp_path: Path, support: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        queries = tmp_path / "queries"
        queries.mkdir()
        shutil.copy(tiny_voc / "JPEGImages" / "val_01_1.jpg", queries / "good.jpg")
        (queries / "bad.jpg").write_bytes(b"broken")
        arguments = ["predict", *TINY, "--size", "64", "--support", support, "--support", support]
        assert main([*arguments, "--query", str(queries), "--out", str(tmp_path / "found")]) == 1
        captured = capsys.readouterr()
        assert "1 of 2 photos" in captured.out
        assert captured.err.splitlines()[-1].startswith(f"fewshot-seg: skipped {queries / 'bad.jpg'}: photo cannot be")
        assert [path.name for path in (tmp_path / "found" / "masks").iterdir()] == ["good.png"]

    @pytest.mark.parametrize(
        ("marks", "kind"),
        [(":box=10,10,50,50", "box"), (":point=30,30", "point"), (":scribble={mask}", "scribble"), ("", "label")],
    )
    def test_supports_marked_by_less_than_a_mask(self, tiny_voc: Path, tmp_path: Path, marks: str, kind: str) -> None:
        photo, mask = tiny_voc / "JPEGImages" / "val_01_0.jpg", tiny_voc / "SegmentationClassAug" / "val_01_0.png"
        support = f"{photo}{marks.format(mask=mask)}"
        query = str(tiny_voc / "JPEGImages" / "val_01_2.jpg")
        arguments = ["predict", *TINY, "--size", "64", "--support", support, "--query", query]
        assert main([*arguments, "--out", str(tmp_path / kind)]) == 0
        with Image.open(tmp_path / kind / "masks" / "val_01_2.png") as written:
            assert set(np.unique(np.asarray(written))) <= {0, 1}
        assert read(tmp_path / kind / "run.json")["configuration"]["support"] == [support]

    def test_thirty_boxes(self, tiny_voc: Path, tmp_path: Path) -> None:
        boxes = "+".join(f"{k},{k},{k + 20},{k + 20}" for k in range(30))
        support = f"{tiny_voc / 'JPEGImages' / 'val_01_0.jpg'}:box={boxes}"
        assert len(Path(support).name) > 255  # no name that a file could have
        query, out = tiny_voc / "JPEGImages" / "val_01_2.jpg", tmp_path / "found"
        arguments = ["--support", support, "--query", str(query), "--out", str(out)]
        assert main(["predict", *TINY, "--size", "64", *arguments]) == 0
        assert (out / "masks" / "val_01_2.png").exists()
        assert read(out / "run.json")["configuration"]["support"] == [support]

    @pytest.mark.parametrize(
        ("marks", "message"),
        [
            (":box=10,10,50", "expected box=X0,Y0,X1,Y1 in pixels, got '10,10,50'"),
            (":point=500,3", "500,3 lies outside the photo, which is"),
            (":scribble=none.png", "none.png: no such file; expected a mask"),
            ("x", "no such photo; expected PHOTO:MASK, for example dog.jpg:dog_mask.png, or PHOTO:box="),
        ],
    )
    def test_bad_marks(
        self, tiny_voc: Path, tmp_path: Path, error_of: Callable[..., str], marks: str, message: str
    ) -> None:
        photo = tiny_voc / "JPEGImages" / "val_01_0.jpg"
        arguments = ("--query", str(photo), "--out", str(tmp_path / "found"))
        assert message in error_of("predict", *TINY, "--support", f"{photo}{marks}", *arguments)
        assert not (tmp_path / "found").exists()

    def test_no_queries(self, support: str, tmp_path: Path, error_of: Callable[..., str]) -> None:
        (tmp_path / "empty").mkdir()
        message = error_of("predict", "--support", support, "--query", str(tmp_path / "empty"))
        assert "folder holds no photos" in message


@pytest.mark.parametrize(
    ("verb", "config_class"),
    [
        ("demo", DemoConfig),
        ("train", TrainConfig),
        ("evaluate", EvaluateConfig),
        ("explain", ExplainConfig),
        ("predict", PredictConfig),
        ("report", ReportConfig),
        ("data prepare", PrepareConfig),
        ("data verify", VerifyConfig),
        ("data episodes", EpisodesConfig),
        ("data show", ShowConfig),
        ("similarity train", SimilarityTrainConfig),
        ("similarity evaluate", SimilarityEvaluateConfig),
        ("similarity explain", SimilarityExplainConfig),
        ("weights list", WeightsListConfig),
        ("weights verify", WeightsVerifyConfig),
    ],
)
def test_help_names_every_setting(verb: str, config_class: type[Config], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*verb.split(), "--help"])
    assert stopped.value.code == 0
    words = capsys.readouterr().out.split()
    assert words[: 2 + len(verb.split())] == ["usage:", "fewshot-seg", *verb.split()]
    flags = {one.flag for one in settings_of(config_class) if not one.positional}
    assert flags | {"--config"} <= {word.strip(",[]") for word in words}


def test_version_and_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    version = capsys.readouterr().out
    assert version.startswith("fewshot-seg ")
    monkeypatch.setattr(sys, "argv", ["fewshot_seg", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("fewshot_seg", run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == version


class TestStart:
    """The libraries of the backbones take seconds to import: what needs none of them must not wait for them."""

    @pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"], ["train", "--fold", "9"], ["--version"]])
    def test_help_and_refusals_load_no_torch(self, arguments: list[str]) -> None:
        program = (
            "import sys; from fewshot_seg.cli import main\n"
            f"try: code = main({arguments!r})\n"
            "except SystemExit as end: code = end.code\n"
            "print('loaded', sorted({'torch', 'timm', 'torchvision', 'cv2', 'scipy'} & set(sys.modules)), code)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == f"loaded [] {2 if '9' in arguments else 0}"

    def test_every_verb_has_its_function(self) -> None:
        verbs = {**cli._VERBS, **{f"{g} {v}": verb for g, (_, vs) in cli._GROUPS.items() for v, verb in vs.items()}}
        for config_class, command, _ in verbs.values():
            function = cli._load(command)
            (hint,) = (h for name, h in get_type_hints(function).items() if name != "return")
            assert hint is config_class

    def test_every_public_name_is_found_in_its_module(self) -> None:
        assert sorted(fewshot_seg._MODULES) == fewshot_seg.__all__
        for name in fewshot_seg.__all__:
            assert getattr(fewshot_seg, name).__module__.startswith(fewshot_seg._MODULES[name])
        assert set(fewshot_seg.__all__) <= set(dir(fewshot_seg))
        with pytest.raises(AttributeError, match="no attribute 'segmenters'"):
            fewshot_seg.segmenters  # noqa: B018
