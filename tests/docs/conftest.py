"""Small stand-ins for the data and photos that the documentation names."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as run_length
from scipy.io import savemat

from episodes.sources import SyntheticSource
from fewshot_seg.backbones import Backbone, families

_SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
_SIDES = (120, 96)
_PER_CLASS = 2


@pytest.fixture(scope="session")
def documented() -> ModuleType:
    """scripts/documented_commands.py, which finds the commands and says how they are checked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(_SCRIPTS))
        return importlib.import_module("documented_commands")


def draw(seed: int, size: tuple[int, int] = _SIDES, part: float = 0.6) -> tuple[Image.Image, np.ndarray[Any, Any]]:
    """A noisy photo with a rectangle in a colour that follows from `seed`, and its mask of 0 and 1."""
    random, colour = np.random.default_rng(seed), np.random.default_rng(seed // 10).integers(0, 256, 3)
    width, height = size
    photo = random.integers(60, 120, (height, width, 3))
    mask = np.zeros((height, width), np.uint8)
    top, left = (int(random.integers(2, side - side * part - 2)) for side in (height, width))
    mask[top : top + int(height * part), left : left + int(width * part)] = 1
    photo[mask == 1] = colour
    return Image.fromarray(photo.astype(np.uint8)), mask


def save(photo: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo.save(path)
    return path


def write_list(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_voc(root: Path) -> None:
    """VOC2012 with all 20 classes, two photos of each in ``trainaug`` and in ``val``; and SBD's files beside it."""
    ids: dict[str, list[str]] = {"trainaug": [], "val": []}
    for position, split in enumerate(ids):
        for class_id in range(1, 21):
            for k in range(_PER_CLASS):
                name = f"2007_{position}{class_id:02d}{k:03d}"
                photo, mask = draw(10 * class_id + k + 3 * position)
                save(photo, root / "VOC2012" / "JPEGImages" / f"{name}.jpg")
                save(Image.fromarray(mask * class_id), root / "VOC2012" / "SegmentationClassAug" / f"{name}.png")
                ids[split].append(name)
    for split, names in {**ids, "train": ids["trainaug"]}.items():
        write_list(root / "VOC2012" / "ImageSets" / "Segmentation" / f"{split}.txt", names)
    sbd = root / "benchmark_RELEASE" / "dataset"
    for number in range(2):
        photo, mask = draw(number)
        save(photo, sbd / "img" / f"2008_{number:06d}.jpg")
        (sbd / "cls").mkdir(exist_ok=True)
        savemat(sbd / "cls" / f"2008_{number:06d}.mat", {"GTcls": {"Segmentation": mask * 3}})
        write_list(sbd / f"{('train', 'val')[number]}.txt", [f"2008_{number:06d}"])


def coco_content(split: str, categories: dict[int, str], file_name: Callable[[int], str]) -> dict[str, Any]:
    """Objects as run lengths, two photos of each category; `file_name` of photo n."""
    images, annotations = [], []
    for position, category in enumerate(categories):
        for k in range(2):
            number = 10 * position + k + (5 if split.startswith("val") else 0)
            _, mask = draw(number)
            lengths = run_length.encode(np.asfortranarray(mask))
            segmentation = {"size": list(lengths["size"]), "counts": lengths["counts"].decode()}
            width, height = _SIDES
            images.append({"id": number + 1, "file_name": file_name(number), "width": width, "height": height})
            fields = {"id": number + 1, "image_id": number + 1, "category_id": category, "iscrowd": 0}
            annotations.append({**fields, "bbox": [0, 0, 9, 9], "area": 81, "segmentation": segmentation})
    named = [{"id": number, "name": name} for number, name in categories.items()]
    return {"images": images, "annotations": annotations, "categories": named}


def write_coco(root: Path) -> None:
    """COCO's layout, 2014 and 2017, with two categories of each fold."""
    names = ["person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck"]
    for split in ("train2017", "val2017", "train2014", "val2014"):
        content = coco_content(split, dict(enumerate(names, start=1)), lambda n: f"{n:012d}.jpg")
        # 80 categories are COCO's, and have folds; most of them show up in no photo here
        content["categories"] += [{"id": number, "name": f"other {number}"} for number in range(9, 81)]
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        for image in content["images"]:
            save(draw(image["id"] - 1)[0], root / split / image["file_name"])


def write_own(root: Path) -> None:
    """One's own pictures: a folder of images and masks, LabelMe's files, a COCO JSON; FSS-1000; birds; photos."""
    for class_id, name in enumerate(("cat", "dog", "zebra")):
        for k in range(6):
            photo, mask = draw(10 * class_id + k)
            white = Image.fromarray(mask * 255)
            save(photo, root / "my_pictures" / "images" / f"{name}{k}.jpg")
            save(white, root / "my_pictures" / "masks" / name / f"{name}{k}.png")
            save(photo, root / "my_labelme" / f"{name}{k}.jpg")
            (root / "my_labelme" / f"{name}{k}.json").write_text(
                json.dumps(labelme_sheet(f"{name}{k}.jpg", name, mask))
            )
            save(photo, root / "fewshot_data" / name / f"{k + 1}.jpg")
            save(white, root / "fewshot_data" / name / f"{k + 1}.png")
    for split, name in (("trn", "cat"), ("val", "dog"), ("test", "zebra")):
        write_list(root / "fewshot_data" / f"{split}.txt", [name])
    export = root / "my_export"
    content = coco_content("train", {1: "cat", 2: "dog"}, lambda n: f"{n}.jpg")
    for image in content["images"]:
        save(draw(image["id"] - 1)[0], export / "images" / image["file_name"])
    (export / "annotations.json").write_text(json.dumps(content))


def labelme_sheet(file_name: str, name: str, mask: np.ndarray[Any, Any]) -> dict[str, Any]:
    """One LabelMe file with a polygon round the object."""
    rows, columns = (np.flatnonzero(mask.any(axis=1 - axis)) for axis in (0, 1))
    top, bottom, left, right = (int(v) for v in (rows[0], rows[-1], columns[0], columns[-1]))
    outline = [[left, top], [right, top], [right, bottom], [left, bottom]]
    shape = {"label": name, "shape_type": "polygon", "points": outline, "group_id": None, "flags": {}}
    sides = {"imagePath": file_name, "imageHeight": mask.shape[0], "imageWidth": mask.shape[1], "imageData": None}
    return {"version": "5.5.0", "flags": {}, "shapes": [shape], **sides}


def write_birds(root: Path) -> None:
    """Photos with labels: train/CLASS and test/CLASS, and CUB-200-2011's own files."""
    lines: dict[str, list[str]] = {"classes": [], "images": [], "image_class_labels": []}
    for number in range(12):
        split, name = ("train", "test")[number >= 8], f"bird{number:02d}"
        label = number + 1 if number < 8 else number + 93  # 1 to 100 train, 101 to 200 are tested
        for k in range(4):
            photo = draw(10 * number + k)[0]
            save(photo, root / "birds" / split / name / f"{k}.jpg")
            save(photo, root / "CUB_200_2011" / "images" / f"{label:03d}.{name}" / f"{k}.jpg")
            lines["images"].append(f"{len(lines['images']) + 1} {label:03d}.{name}/{k}.jpg")
            lines["image_class_labels"].append(f"{len(lines['images'])} {label}")
        lines["classes"].append(f"{label} {label:03d}.{name}")
    for name, content in lines.items():
        write_list(root / "CUB_200_2011" / f"{name}.txt", content)


def write_photos(root: Path) -> None:
    """Loose photos with masks, as the pages name them, and a folder of photos to search."""
    for number, name in enumerate(("cat", "cat2", "dog", "a", "b", "c")):
        photo, mask = draw(number, size=(400, 300), part=0.5)
        save(photo, root / f"{name}.jpg")
        save(Image.fromarray(mask * 255), root / f"{name}_mask.png")
    strokes = np.zeros((300, 400), np.uint8)
    strokes[140:150, 150:250] = 255
    save(Image.fromarray(strokes), root / "strokes.png")
    for number, name in enumerate(("photo", "other")):
        save(draw(number, size=(200, 150))[0], root / "photos" / f"{name}.jpg")
    save(draw(0, size=(200, 150))[0], root / "photo.jpg")


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets that commands only read, once for all pages."""
    root = tmp_path_factory.mktemp("stand-ins")
    write_voc(root)
    write_coco(root / "coco")
    write_own(root)
    write_birds(root)
    return root


class FewPictures(SyntheticSource):
    """The command line's generated pictures, but few."""

    def __init__(self, **given: int) -> None:
        super().__init__(**{"base_classes": 6, "novel_classes": 2, "images_per_class": 4, **given})


@pytest.fixture(scope="session", autouse=True)
def _backbones_once() -> Iterator[None]:
    """Encoders are frozen: each is built once, whatever commands ask for it."""
    built: dict[str, Backbone] = {}
    build = families._build_member

    def remembered(name: str, strides: Sequence[int] | None, weights: str | Path, *, seed: int) -> Backbone:
        key = repr((name, strides, str(weights), seed))
        if key not in built:
            built[key] = build(name, strides, weights, seed=seed)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "_build_member", remembered)
        yield


@pytest.fixture
def checkout(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a page's commands run in: everything is where the pages say, and stays small."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    links = {
        "VOCdevkit/VOC2012": "VOC2012",
        "VOC2012": "VOC2012",
        "benchmark_RELEASE": "benchmark_RELEASE",
        "data/VOCdevkit/VOC2012": "VOC2012",
        "data/benchmark_RELEASE": "benchmark_RELEASE",
        "data/annotations": "coco/annotations",
        **{f"data/{split}{year}": f"coco/{split}{year}" for split in ("train", "val") for year in (2014, 2017)},
        "data/fewshot_data": "fewshot_data",
        "../shared/data/VOCdevkit/VOC2012": "VOC2012",
        "../shared/data/coco": "coco",
        "../shared/data/cub_subset": "birds",
        **{name: name for name in ("coco", "my_pictures", "my_labelme", "my_export", "birds", "CUB_200_2011")},
    }
    for link, target in links.items():
        path = folder.joinpath(*link.split("/")) if not link.startswith("..") else tmp_path / link[3:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(stand_ins / target)
    write_photos(folder)
    (folder / "scripts").symlink_to(_SCRIPTS)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FEWSHOT_SEG_CACHE", str(stand_ins / "cache"))
    monkeypatch.setattr("fewshot_seg.runs.SyntheticSource", FewPictures)
    monkeypatch.setattr("fewshot_seg.demo.SyntheticSource", FewPictures)
    return folder
