"""Fixtures shared by all tests. Real data is optional: tests that need it are marked and skip with a reason."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
_VOC_DEFAULT = _DATA / "VOCdevkit" / "VOC2012"
_COCO_DEFAULT = _DATA / "coco"
_CUB_DEFAULT = _DATA / "cub_subset"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tensors are tiny here: threads would only wait for each other


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
