"""The benchmark's photos are photos and its measurements run; the figures themselves are nobody's promise here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("bench_predict")


@pytest.fixture(scope="module")
def photos(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("bench") / "photos"
    script.write_photos(folder, 5)
    return folder


def test_photos(photos: Path) -> None:
    found = sorted(photos.iterdir())
    assert len({path.read_bytes() for path in found}) == 5
    with Image.open(found[0]) as picture:
        assert picture.size == (500, 375)


def test_ratio_measures_both_sides_in_turn(script: ModuleType, photos: Path, tmp_path: Path) -> None:
    task = {"photos": str(photos), "out": str(tmp_path / "out"), "size": 64}
    found = script.measure(what="ratio", count=3, repeats=2, **task)
    assert found["count"] == 3
    assert {name: len(values) for name, values in found.items() if name != "count"} == {
        "bare": 2,
        "bare_cpu": 2,
        "predict": 2,
        "predict_cpu": 2,
    }
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 3


def test_folder_and_start(script: ModuleType, photos: Path, tmp_path: Path) -> None:
    task = {"photos": str(photos), "out": str(tmp_path / "out"), "size": 64}
    assert script.measure(what="folder", count=4, **task)["megabytes"] > 50
    assert script.measure(what="start", count=5, **task)["count"] == 5
