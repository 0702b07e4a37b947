"""Fixtures shared by all tests. Real data is optional: tests that need it are marked and skip with a reason."""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image, ImageDraw

from episodes.types import EpisodeSpec
from fewshot_seg.reports import chosen_episodes
from fewshot_seg.runtime import write_json

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # how fast it is must not decide a test

_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
_VOC_DEFAULT = _DATA / "VOCdevkit" / "VOC2012"
_COCO_DEFAULT = _DATA / "coco"
_CUB_DEFAULT = _DATA / "cub_subset"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tensors are tiny here: threads would only wait for each other


class _ParsedError(Exception):
    """A script's arguments were understood; it goes no further."""


@pytest.fixture
def parse_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], None]:
    """Starts a script of ``python scripts/...`` up to its parser, which must take the arguments."""
    original = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        original(parser, *given, **named)
        raise _ParsedError

    def parse_script(words: Sequence[str]) -> None:
        script = Path(__file__).resolve().parents[1] / words[1]
        with monkeypatch.context() as patch, contextlib.suppress(_ParsedError):
            patch.setattr(sys, "argv", list(words[1:]))
            patch.syspath_prepend(str(script.parent))
            patch.setattr(argparse.ArgumentParser, "parse_args", parse)
            runpy.run_path(str(script), run_name="__main__")
            raise AssertionError(f"{words[1]} parses nothing")

    return parse_script


@pytest.fixture(scope="session")
def voc_root() -> Path:
    """Folder VOC2012 of the real data, or skip."""
    root = Path(os.environ.get("FEWSHOT_SEG_VOC", _VOC_DEFAULT))
    if not (root / "JPEGImages").is_dir():
        pytest.skip(f"no VOC data at {root}; set FEWSHOT_SEG_VOC to a VOC2012 folder")
    return root


@pytest.fixture(scope="session")
def coco_root() -> Path:
    """Folder of the COCO part, with annotations/, train2017/ and val2017/, or skip."""
    root = Path(os.environ.get("FEWSHOT_SEG_COCO", _COCO_DEFAULT))
    if not (root / "annotations").is_dir():
        pytest.skip(f"no COCO data at {root}; set FEWSHOT_SEG_COCO to a folder with annotations/ and photos")
    return root


@pytest.fixture(scope="session")
def cub_root() -> Path:
    """Folder of the CUB part, with train/ and test/, or skip."""
    root = Path(os.environ.get("FEWSHOT_SEG_CUB", _CUB_DEFAULT))
    if not (root / "train").is_dir():
        pytest.skip(f"no CUB data at {root}; set FEWSHOT_SEG_CUB to a folder with train/ and test/")
    return root


TINY_VOC_CLASSES = (1, 2, 6, 7, 11, 12, 16, 17)  # two of each fold of PASCAL-5i
TINY_VOC_PER_CLASS = 4


def write_tiny_voc(root: Path) -> Path:
    """A small, valid VOC2012 folder: splits ``train``, ``trainaug`` and ``val`` of 32 photos each.

    Photos are 72 x 56 or 56 x 72 pixels. Photo k of a class is ``{split}_{class:02d}_{k}``; every second one
    also shows the next class in a corner. Masks are palette PNGs with a ring of 255 around the main object;
    those of class 17 are grey.
    """
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split in ("trainaug", "val"):
        ids = []
        for position, class_id in enumerate(TINY_VOC_CLASSES):
            neighbour = TINY_VOC_CLASSES[(position + 1) % len(TINY_VOC_CLASSES)]
            for k in range(TINY_VOC_PER_CLASS):
                image_id = f"{split}_{class_id:02d}_{k}"
                _write_tiny_photo(root, image_id, class_id, neighbour if k % 2 else None)
                ids.append(image_id)
        lists = ("train", "trainaug") if split == "trainaug" else ("val",)
        for name in lists:
            (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(ids) + "\n")
    return root


def _write_tiny_photo(root: Path, image_id: str, class_id: int, corner_class: int | None) -> None:
    random = np.random.default_rng([ord(letter) for letter in image_id])
    size = (72, 56) if random.uniform() < 0.5 else (56, 72)
    x, y = (int(v) for v in random.integers(12, 18, 2))
    photo = Image.fromarray(random.integers(60, 120, (size[1], size[0], 3)).astype(np.uint8))
    mask = Image.new("L", size, 0)
    ink, label = ImageDraw.Draw(photo), ImageDraw.Draw(mask)
    label.rectangle((x - 1, y - 1, x + 31, y + 31), fill=255)
    label.rectangle((x, y, x + 30, y + 30), fill=class_id)
    ink.rectangle((x, y, x + 30, y + 30), fill=(12 * class_id, 250 - 12 * class_id, 80))
    if corner_class is not None:
        label.rectangle((0, 0, 9, 9), fill=corner_class)
        ink.rectangle((0, 0, 9, 9), fill=(12 * corner_class, 250 - 12 * corner_class, 80))
    photo.save(root / "JPEGImages" / f"{image_id}.jpg", quality=90)
    if class_id != 17:
        mask.putpalette(random.integers(0, 256, 768).astype(np.uint8).tobytes())
    mask.save(root / "SegmentationClassAug" / f"{image_id}.png")


@pytest.fixture
def tiny_voc(tmp_path: Path) -> Path:
    """Root of a small, valid VOC2012 folder that the test may damage; see `write_tiny_voc`."""
    return write_tiny_voc(tmp_path / "VOC2012")


@pytest.fixture(scope="session")
def shared_voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_voc`, once for all tests that leave it as it is."""
    return write_tiny_voc(tmp_path_factory.mktemp("voc") / "VOC2012")


def write_run(
    folder: Path,
    *,
    episodes: int = 30,
    names: tuple[str, ...] = ("cat", "dog", "person"),
    seed: int = 0,
    drawn: int = 0,
    noise: float = 0.0,
    picture_side: int = 24,
    **changed: Any,
) -> Path:
    """A run of `episodes`, class after class; the first class misses, the second marks the third, the third is good."""
    random, other = np.random.default_rng(seed), np.random.default_rng(99)
    stored, sums = [], {name: np.zeros(2) for name in names}
    for number in range(episodes):
        kind = number % len(names)
        target = int(random.integers(400, 6000))
        both = round(target * (0.2, 0.9, 0.95)[min(kind, 2)] * (1 - noise * other.uniform()))
        wrong = (10, target, 30)[min(kind, 2)]
        iou = 100 * both / (target + wrong)
        sums[names[kind]] += (both, target + wrong)
        stored.append(
            {
                "class_id": kind + 1,
                "support_ids": [f"s{number}"],
                "query_id": f"q{number}",
                "seed": number,
                "iou": iou,
                "finding": {
                    "scored": 10_000,
                    "target": target,
                    "found": both + wrong,
                    "both": both,
                    "best_iou": min(100.0, iou + (30 if kind == 0 else 1)),
                    "on_others": {"3": wrong // 2} if kind == 1 else {},
                    "on_any_other": wrong // 2 if kind == 1 else 0,
                },
            }
        )
    per_class = {name: float(100 * both / union) for name, (both, union) in sums.items()}
    miou = float(np.mean(list(per_class.values())))
    results = {
        "benchmark": "zoo/30", "protocol": "hsnet", "scoring": "protocol", "fold": 1, "shots": 1, "ways": 1,
        "support": "mask", "shot_rule": "pooled", "method": "tiny", "threshold": 0.25,
        "threshold_origin": "of the model",
        "episodes_fingerprint": f"episodes-{seed}-{episodes}", "left_out": [], "known_by_name": [], "seconds": 3.0,
        "miou": [miou, miou - 2, miou + 2], "fb_iou": [70.0, 68.0, 72.0], "per_class": per_class, "repeats": [miou],
        **changed,
    }  # fmt: skip
    class_names = {str(n): name for n, name in enumerate(names, 1)}
    write_json(folder / "evaluation.json", results | {"class_names": class_names, "episodes": stored})
    record = {
        "verb": "evaluate",
        "configuration": {"seed": None, "threshold": 0.25, "out": str(folder)},
        "protocol": {"seed": 7, "reports_fb_iou": True},
        "data": {"name": "zoo/30", "fingerprint": {"training": "aaaa", "evaluation": "bbbb"}},
        "environment": {"versions": {"fewshot-seg": "0.1.0"}, "commit": "c0ffee", "python": "3.11", "platform": "x"},
        "results": results,
    }
    write_json(folder / "run.json", record)
    specs = [
        EpisodeSpec(class_id=one["class_id"], support_ids=tuple(one["support_ids"]), query_id=one["query_id"], seed=0)
        for one in stored
    ]
    numbers = chosen_episodes(specs, [one["iou"] for one in stored], drawn)
    _draw(folder, numbers, results["episodes_fingerprint"], picture_side)
    return folder


def _draw(folder: Path, numbers: Sequence[int], fingerprint: str, side: int) -> None:
    labels = ("support", "query", "attention", "prior: soft margin", "mask found", "truth", "errors")
    random, listed = np.random.default_rng(1), []
    for number in numbers:
        panels = []
        for place, label in enumerate(labels):
            name = f"episode-{number:05d}-{place}.webp"
            (folder / "gallery").mkdir(exist_ok=True)
            picture = random.integers(0, 256, (side, side, 3)).astype(np.uint8)
            Image.fromarray(picture).save(folder / "gallery" / name, quality=80)
            panels.append({"file": name, "label": label})
        listed.append({"number": number, "panels": panels})
    if numbers:
        write_json(folder / "gallery" / "gallery.json", {"episodes_fingerprint": fingerprint, "episodes": listed})


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """Writes a run folder that nobody evaluated: make_run(folder, episodes=30, drawn=0, ...); see `write_run`."""
    return write_run
