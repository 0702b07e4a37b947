"""The benchmark's data are sound and its measurements run; the figures themselves are nobody's promise here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from episodes.index import build_index
from episodes.sources import VocSource


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("bench_episodes")


@pytest.fixture(scope="module")
def root(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench") / "VOC2012"
    script.write_masks(root, 100)
    return root


def test_masks_are_like_those_of_voc(root: Path) -> None:
    source = VocSource(root)
    index = build_index(source, "trainaug")
    assert len(index.image_ids) == 100
    assert min(len(index.images_of(class_id)) for class_id in range(1, 21)) >= 2
    masks = source.class_masks(index.image_ids[0])
    assert {mask.shape for mask in masks.values()} == {(375, 500)}
    assert all((mask == 255).any() for mask in masks.values())
    assert np.mean([len(areas) for areas in index.areas.values()]) < 3


@pytest.mark.parametrize("task", [{"what": "index", "workers": 2}, {"what": "draw", "draw": "image", "count": 50}])
def test_measurements_run(script: ModuleType, root: Path, tmp_path: Path, task: dict[str, object]) -> None:
    found = script.measure(root=str(root), cache=str(tmp_path), **task)
    assert found["count"] == (100 if task["what"] == "index" else 50)
    assert found["seconds"] > 0
