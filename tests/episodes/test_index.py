from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from episodes.index import ClassIndex, build_index, count_grid_points
from episodes.sources import SyntheticSource, VocSource
from episodes.types import DataError, UInt8Array


class CountingSource(SyntheticSource):
    reads: list[str] = []  # noqa: RUF012  appended to by several threads, emptied by the fixture

    def class_masks(self, image_id: str) -> Mapping[int, UInt8Array]:
        self.reads.append(image_id)
        return super().class_masks(image_id)


@pytest.fixture
def counting() -> CountingSource:
    CountingSource.reads.clear()
    return CountingSource(base_classes=3, novel_classes=2, images_per_class=2, size=48)


def test_index_agrees_with_the_masks(tiny_voc: Path) -> None:
    source = VocSource(tiny_voc)
    index = build_index(source, "val")
    assert index.image_ids == source.ids("val")
    assert index.class_ids == (1, 2, 6, 7, 11, 12, 16, 17)
    for class_id in index.class_ids:
        expected = tuple(i for i in source.ids("val") if (source.mask(i, class_id) == 1).any())
        assert index.images_of(class_id) == expected
    assert index.images_of(20) == ()


def test_areas_are_those_of_the_source(tiny_voc: Path) -> None:
    source = VocSource(tiny_voc)
    index = build_index(source, "val")
    assert index.areas == {image_id: source.class_areas(image_id) for image_id in source.ids("val")}


def test_each_mask_is_opened_once_and_no_photo(tiny_voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    original = Image.open

    def recording(path: Path, *arguments: Any, **options: Any) -> Image.Image:
        opened.append(Path(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(Image, "open", recording)
    source = VocSource(tiny_voc)
    build_index(source, "val")
    assert sorted(opened) == sorted(source.mask_file(image_id) for image_id in source.ids("val"))


@pytest.mark.parametrize("workers", [2, 3, 40])
def test_any_number_of_workers_gives_the_same_index(
    tiny_voc: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("episodes.index._CHUNK", 3)  # several chunks for each, and a short last one
    source = VocSource(tiny_voc)
    alone = build_index(source, "val", workers=1)
    together = build_index(source, "val", workers=workers)
    assert together == alone
    assert list(together.areas) == list(alone.areas) == list(source.ids("val"))


def test_workers_read_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two readers wait for each other: with one worker this would break the barrier.
    monkeypatch.setattr("episodes.index._CHUNK", 1)
    meeting = threading.Barrier(2, timeout=120)

    class Meeting(SyntheticSource):
        def class_masks(self, image_id: str) -> Mapping[int, UInt8Array]:
            meeting.wait()
            return super().class_masks(image_id)

    source = Meeting(base_classes=3, novel_classes=2, images_per_class=2, size=48)
    assert len(build_index(source, "train", workers=2).areas) == 6


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_damaged_file_is_named(tiny_voc: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("episodes.index._CHUNK", 2)
    source = VocSource(tiny_voc)
    for image_id in ("val_16_1", "val_06_2"):
        source.mask_file(image_id).write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"val_06_2\.png"):
        build_index(source, "val", workers=workers, cache_dir=tiny_voc / "cache")
    assert not (tiny_voc / "cache").exists()


def test_no_workers(counting: CountingSource) -> None:
    with pytest.raises(DataError, match="workers that read masks must be at least 1, got 0"):
        build_index(counting, "train", workers=0)


def test_progress_counts_images(counting: CountingSource, capsys: pytest.CaptureFixture[str]) -> None:
    build_index(counting, "train", show_progress=True)
    assert "6/6" in capsys.readouterr().err
    build_index(counting, "train")
    assert capsys.readouterr().err == ""


def test_pairs_are_in_image_order_then_by_class(tiny_voc: Path) -> None:
    index = build_index(VocSource(tiny_voc), "val")
    pairs = index.pairs([2, 1])
    assert pairs[:5] == [("val_01_0", 1), ("val_01_1", 1), ("val_01_1", 2), ("val_01_2", 1), ("val_01_3", 1)]
    assert all(class_id in (1, 2) for _, class_id in pairs)


def test_stored_index_is_reused_without_reading_masks(counting: CountingSource, tmp_path: Path) -> None:
    first = build_index(counting, "train", cache_dir=tmp_path / "new" / "cache")
    assert sorted(CountingSource.reads) == sorted(counting.ids("train"))
    second = build_index(counting, "train", cache_dir=tmp_path / "new" / "cache")
    assert sorted(CountingSource.reads) == sorted(counting.ids("train"))
    assert second == first
    assert [path.suffix for path in (tmp_path / "new" / "cache").iterdir()] == [".json"]


def test_splits_and_sources_are_stored_apart(counting: CountingSource, tmp_path: Path) -> None:
    other = CountingSource(seed=1, base_classes=3, novel_classes=2, images_per_class=2, size=48)
    stored = {
        build_index(source, split, cache_dir=tmp_path).fingerprint
        for source in (counting, other)
        for split in ("train", "val")
    }
    assert len(stored) == len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1}', '{"format": 0, "fingerprint": "x"}'])
def test_damaged_store_is_rebuilt(counting: CountingSource, tmp_path: Path, damage: str) -> None:
    index = build_index(counting, "train", cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(damage)
    assert build_index(counting, "train", cache_dir=tmp_path) == index
    assert len(CountingSource.reads) == 12
    assert json.loads(path.read_text())["fingerprint"] == index.fingerprint


def test_truncated_images_in_the_store_are_rebuilt(counting: CountingSource, tmp_path: Path) -> None:
    index = build_index(counting, "train", cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    content["images"].pop()
    path.write_text(json.dumps(content))
    assert build_index(counting, "train", cache_dir=tmp_path) == index


def test_changed_data_are_read_again(tiny_voc: Path, tmp_path: Path) -> None:
    source = VocSource(tiny_voc)
    before = build_index(source, "val", cache_dir=tmp_path / "cache")
    path = source.mask_file("val_01_0")
    size = Image.open(path).size
    Image.new("L", size, 9).save(path)
    os.utime(path, ns=(10**18, 10**18))
    after = build_index(source, "val", cache_dir=tmp_path / "cache")
    assert before.images_of(9) == ()
    assert after.images_of(9) == ("val_01_0",)
    assert before.fingerprint != after.fingerprint


def test_failed_write_leaves_nothing(counting: CountingSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("episodes.index.json.dumps", fail)
    with pytest.raises(KeyboardInterrupt):
        build_index(counting, "train", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("in_the_way", "reason"), [("cache", "Not a directory"), ("cache/index", "File exists")], ids=["above", "there"]
)
def test_folder_that_cannot_be_made(counting: CountingSource, tmp_path: Path, in_the_way: str, reason: str) -> None:
    file = tmp_path / in_the_way
    file.parent.mkdir(exist_ok=True)
    file.write_text("a file")
    folder = tmp_path / "cache" / "index"
    with pytest.raises(DataError) as caught:
        build_index(counting, "train", cache_dir=folder)
    assert str(caught.value) == f"cannot keep the index in {folder}: {reason}; name another --cache"
    assert file.read_text() == "a file"


def test_empty_split(tiny_voc: Path) -> None:
    (tiny_voc / "ImageSets" / "Segmentation" / "none.txt").write_text("\n")
    with pytest.raises(DataError, match="split 'none' of voc lists no images"):
        build_index(VocSource(tiny_voc), "none")


def test_index_can_be_pickled(counting: CountingSource) -> None:
    index = build_index(counting, "train")
    copy = pickle.loads(pickle.dumps(index))
    assert copy == index
    assert copy.images_of(1) == index.images_of(1)


@given(
    height=st.integers(1, 130),
    width=st.integers(1, 130),
    seed=st.integers(0, 99),
)
def test_grid_points_match_a_plain_loop(height: int, width: int, seed: int) -> None:
    mask = np.random.default_rng(seed).choice(np.array([0, 1, 255], dtype=np.uint8), (height, width))
    loop = sum(
        mask[row, column] == 1 for row in range(height) for column in range(width) if row % 32 == 1 and column % 32 == 1
    )
    assert count_grid_points(mask) == loop


@given(st.integers(33, 200), st.integers(33, 200), st.sampled_from([0.5, 0.768, 0.384]))
def test_grid_of_a_reduced_copy_has_the_originals_points(height: int, width: int, scale: float) -> None:
    small = np.ones((max(2, round(height * scale)), max(2, round(width * scale))), dtype=np.uint8)
    original = np.ones((int(np.ceil(small.shape[0] / scale)), int(np.ceil(small.shape[1] / scale))), np.uint8)
    assert count_grid_points(small, scale) == count_grid_points(original)


def test_reduced_data_set_counts_its_grid_at_full_size() -> None:
    # Longest side 64 of all pictures stands for VOC's 500 pixels: a step of 32 becomes 4.1.
    index = build_index(SyntheticSource(base_classes=3, novel_classes=2, images_per_class=2, size=64), "train")
    image_id = index.image_ids[0]
    area, points = index.areas[image_id][1], index.grid_points[image_id][1]
    assert points == pytest.approx(area / (32 * 64 / 500) ** 2, rel=0.25)


def test_class_index_is_built_by_hand() -> None:
    index = ClassIndex(("a", "b"), {"a": {2: 5}, "b": {1: 4, 2: 3}}, {"a": {2: 0}, "b": {1: 0, 2: 0}}, "f")
    assert index.images_of(2) == ("a", "b")
    assert index.pairs([1, 2]) == [("a", 2), ("b", 1), ("b", 2)]
