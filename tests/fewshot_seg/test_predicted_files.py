"""Predictions of many photos in a folder: what is written, in which order, and with how much memory."""

from __future__ import annotations

import errno
import json
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from episodes.protocols import Fit
from episodes.types import DataError, UInt8Array
from fewshot_seg import photos, predicted_files
from fewshot_seg.backbones import Backbone
from fewshot_seg.photos import Photo, read_photo
from fewshot_seg.pictures import class_colour, write_mask
from fewshot_seg.pipeline import most_in_flight
from fewshot_seg.predicted_files import predict_folder
from fewshot_seg.prediction import Predictor
from fewshot_seg.segmenter import training_free

SIZE = 64


def photo(seed: int, height: int = 50, width: int = 80) -> tuple[UInt8Array, UInt8Array]:
    """A red square on grey noise, and its mask."""
    random = np.random.default_rng(seed)
    image = random.integers(90, 130, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[10:40, 20:60] = 1
    image[mask == 1] = (220, 30, 30)
    return image, mask


def pixels_of(path: Path) -> UInt8Array:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.fixture
def predictor(tiny_backbone: Backbone) -> Predictor:
    ready = Predictor(training_free(tiny_backbone, threshold=0.3), SIZE)
    images, masks = zip(photo(0), photo(1, 64, 64), strict=True)
    ready.remember(images, masks)
    return ready


@pytest.fixture
def two(tiny_backbone: Backbone) -> Predictor:
    """The object and what is around it, at a threshold that leaves something to the background."""
    ready, (image, mask) = Predictor(training_free(tiny_backbone, threshold=0.1), SIZE), photo(0)
    ready.remember([image], [mask], name="square")
    ready.remember([image], [1 - mask], name="noise")
    return ready


class TestPredictFolder:
    def test_writes_masks_and_overlays_and_goes_on_after_broken_files(
        self, predictor: Predictor, tmp_path: Path
    ) -> None:
        query = photo(7, 55, 66)[0]
        Image.fromarray(query).save(tmp_path / "a.png")
        Image.fromarray(query[:30]).save(tmp_path / "a.bmp")
        (tmp_path / "b.jpg").write_bytes(b"broken")
        queries = [tmp_path / "b.jpg", tmp_path / "a.png", tmp_path / "a.bmp"]
        result = predict_folder(predictor, queries, tmp_path / "out")
        assert len(result.failures) == 1
        assert "b.jpg: photo cannot be decoded" in result.failures[0]
        assert [one.mask.name for one in result.written] == ["a_png.png", "a_bmp.png"]
        expected = predictor.predict(query)
        with Image.open(tmp_path / "out" / "masks" / "a_png.png") as stored:
            assert np.array_equal(np.asarray(stored), expected.mask)
        with Image.open(tmp_path / "out" / "overlays" / "a_bmp.jpg") as overlay:
            assert overlay.size == (66, 30)
        first = result.written[0]
        assert first.share == pytest.approx(float(expected.mask.mean()))
        assert first.confidence == pytest.approx(float(expected.confidence[expected.mask == 1].mean()))
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["masks", "overlays"]

    @pytest.mark.parametrize("fit", ["squash", "pad"])
    @pytest.mark.parametrize("batch_size", [None, 3])
    def test_many_photos_in_order_as_one_at_a_time(
        self, tiny_backbone: Backbone, tmp_path: Path, fit: Fit, batch_size: int | None
    ) -> None:
        predictor = Predictor(training_free(tiny_backbone, threshold=0.3), SIZE, fit)
        predictor.remember(*zip(photo(0), photo(1), strict=True))
        queries = []
        for number in range(20, 9, -1):
            queries.append(tmp_path / f"{number}.png")
            if number != 15:
                Image.fromarray(photo(number, 40 + number, 90 - number)[0]).save(queries[-1])
        result = predict_folder(predictor, queries, tmp_path / "out", batch_size=batch_size)
        assert [one.query for one in result.written] == [query for query in queries if query.stem != "15"]
        assert len(result.failures) == 1
        assert "15.png: no such file" in result.failures[0]
        for one in result.written:
            expected = predictor.predict(read_photo(one.query))
            with Image.open(one.mask) as stored:
                differ = np.asarray(stored) != expected.mask
            assert np.abs(expected.confidence[differ] - 0.5).max(initial=0) < 1e-5  # only what is on the threshold
            assert one.confidence == pytest.approx(float(expected.confidence[expected.mask == 1].mean()), rel=1e-4)

    def test_never_more_photos_in_memory_than_stated(
        self, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock, alive, most = threading.Lock(), 0, 0

        def dropped() -> None:
            nonlocal alive
            with lock:
                alive -= 1

        def read(path: Path) -> Photo:
            nonlocal alive, most
            pixels = photo(int(path.stem))[0]
            weakref.finalize(pixels, dropped)
            with lock:
                alive += 1
                most = max(most, alive)
            return Photo(pixels=pixels, shape=(50, 80))

        monkeypatch.setattr(predicted_files, "open_photo", read)
        queries = [tmp_path / f"{number}.jpg" for number in range(60)]
        lanes = predicted_files.lane_count(predictor.device)
        assert len(predict_folder(predictor, queries, tmp_path / "out").written) == 60
        assert 1 <= most <= most_in_flight(1, lanes) < 60

    def test_a_full_disk_is_one_clear_line(
        self, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        Image.fromarray(photo(1)[0]).save(tmp_path / "a.png")
        monkeypatch.setattr(Image.Image, "save", full)
        with pytest.raises(DataError, match=r"cannot write .*out/masks/a\.png: No space left on device; make room"):
            predict_folder(predictor, [tmp_path / "a.png"], tmp_path / "out")

    def test_interrupted_leaves_whole_files_only(
        self, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(12):
            Image.fromarray(photo(number)[0]).save(tmp_path / f"{number:02d}.png")
        wrote: list[Path] = []

        def interrupted(path: Path, mask: UInt8Array, classes: int) -> None:
            wrote.append(path)
            if len(wrote) == 4:
                raise KeyboardInterrupt
            write_mask(path, mask, classes)

        monkeypatch.setattr(predicted_files, "write_mask", interrupted)
        with pytest.raises(KeyboardInterrupt):
            predict_folder(predictor, sorted(tmp_path.glob("*.png")), tmp_path / "out")
        left = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
        assert not [path for path in left if path.name.startswith(".")]
        for path in left:
            with Image.open(path) as picture:
                picture.load()

    def test_no_queries_and_nothing_remembered(
        self, predictor: Predictor, tiny_backbone: Backbone, tmp_path: Path
    ) -> None:
        assert predict_folder(predictor, [], tmp_path / "out").written == ()
        with pytest.raises(DataError, match="no support to go by"):
            predict_folder(Predictor(training_free(tiny_backbone), SIZE), [], tmp_path / "out")


class TestSeveralClasses:
    def queries(self, folder: Path) -> list[Path]:
        names = ["b/one.png", "b/two.png", "c/one.jpg"]
        for number, name in enumerate(names):
            (folder / name).parent.mkdir(exist_ok=True)
            Image.fromarray(photo(number, 60, 90 + number)[0]).save(folder / name)
        return [folder / name for name in names]

    def test_index_masks_overlays_and_shares(self, two: Predictor, tmp_path: Path) -> None:
        query = self.queries(tmp_path)[0]
        (written,) = predict_folder(two, [query], tmp_path / "out").written
        expected = two.predict(read_photo(query))
        assert np.array_equal(pixels_of(written.mask), expected.mask)
        assert {0, 1, 2} == set(np.unique(expected.mask))
        with Image.open(written.mask) as stored:
            palette = stored.getpalette()
        assert palette == [0, 0, 0, *class_colour(1), *class_colour(2)]
        assert [one.name for one in written.found] == ["square", "noise"]
        for number, one in enumerate(written.found, 1):
            inside = expected.mask == number
            assert one.share == pytest.approx(inside.mean())
            assert one.confidence == pytest.approx(float(expected.confidence[inside].mean()), abs=1e-5)
        assert written.share == pytest.approx(float((expected.mask > 0).mean()))
        assert written.confidence == pytest.approx(float(expected.confidence[expected.mask > 0].mean()), abs=1e-5)
        assert pixels_of(written.overlay).shape == (60, 90, 3)

    def test_pycocotools_reads_the_masks_back(self, two: Predictor, tmp_path: Path) -> None:
        queries = self.queries(tmp_path)
        (tmp_path / "b" / "broken.png").write_bytes(b"broken")
        result = predict_folder(
            two, [queries[0], tmp_path / "b" / "broken.png", *queries[1:]], tmp_path / "out", coco=True
        )
        coco = COCO(str(tmp_path / "out" / "instances.json"))
        assert [coco.imgs[number]["file_name"] for number in (1, 2, 3)] == ["b/one.png", "b/two.png", "c/one.jpg"]
        assert [one["name"] for one in coco.loadCats([1, 2])] == ["square", "noise"]
        for number, written in enumerate(result.written, 1):
            labels = pixels_of(written.mask)
            assert (coco.imgs[number]["height"], coco.imgs[number]["width"]) == labels.shape
            annotations = coco.loadAnns(coco.getAnnIds(imgIds=[number]))
            assert [one["category_id"] for one in annotations] == [k for k in (1, 2) if (labels == k).any()]
            for one in annotations:
                inside = labels == one["category_id"]
                rows, columns = np.nonzero(inside)
                assert np.array_equal(coco.annToMask(one), inside)
                assert one["area"] == inside.sum()
                assert one["bbox"] == [
                    columns.min(),
                    rows.min(),
                    columns.max() - columns.min() + 1,
                    rows.max() - rows.min() + 1,
                ]
                assert one["score"] == written.found[one["category_id"] - 1].confidence
                assert one["iscrowd"] == 0
        stored = json.loads((tmp_path / "out" / "instances.json").read_text())
        assert len(coco.loadRes(stored["annotations"]).anns) == len(stored["annotations"]) >= 4

    def test_coco_of_no_photo_and_of_no_object(self, two: Predictor, tiny_backbone: Backbone, tmp_path: Path) -> None:
        assert predict_folder(two, [], tmp_path / "none", coco=True).written == ()
        assert json.loads((tmp_path / "none" / "instances.json").read_text())["images"] == []
        never = Predictor(training_free(tiny_backbone, threshold=1e6), SIZE)
        never.remember(*([one] for one in photo(0)))
        (written,) = predict_folder(never, self.queries(tmp_path)[:1], tmp_path / "out", coco=True).written
        assert (written.share, written.confidence) == (0, 0)
        assert json.loads((tmp_path / "out" / "instances.json").read_text())["annotations"] == []

    @pytest.mark.parametrize("classes", ["predictor", "two"])
    def test_confidence_is_128_and_more_in_the_mask(
        self, classes: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        predictor = request.getfixturevalue(classes)
        query = self.queries(tmp_path)[0]
        (written,) = predict_folder(predictor, [query], tmp_path / "out", confidence=True).written
        assert written.confidence_map == tmp_path / "out" / "confidence" / "one.png"
        grey, sure = pixels_of(written.confidence_map), predictor.predict(read_photo(query)).confidence
        assert grey.dtype == np.uint8
        assert np.abs(grey / 255 - sure).max() <= 0.51 / 255
        assert np.array_equal(grey >= 128, pixels_of(written.mask) > 0)

    @pytest.mark.parametrize(("tile", "flip"), [(None, True), (40, False), (40, True)])
    def test_tiles_and_mirrored_photos_as_one_at_a_time(
        self, tiny_backbone: Backbone, tmp_path: Path, tile: int | None, flip: bool
    ) -> None:
        predictor = Predictor(training_free(tiny_backbone, threshold=0.3), SIZE, tile=tile, flip=flip)
        predictor.remember(*([one] for one in photo(0)))
        result = predict_folder(predictor, self.queries(tmp_path), tmp_path / "out", batch_size=2)
        for one in result.written:
            expected = predictor.predict(read_photo(one.query))
            differ = pixels_of(one.mask) != expected.mask
            assert np.abs(expected.confidence[differ] - 0.5).max(initial=0) < 1e-5


def test_a_reduced_photo_has_files_of_its_own_size(
    two: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "WORKING_PIXELS", 15_000)
    Image.fromarray(photo(3, 200, 300)[0]).save(tmp_path / "a.png")
    (written,) = predict_folder(two, [tmp_path / "a.png"], tmp_path / "out", coco=True, confidence=True).written
    assert written.reduced
    assert (written.shape, written.worked_on) == ((200, 300), (100, 150))
    expected, labels = two.predict_file(tmp_path / "a.png"), pixels_of(written.mask)
    assert np.array_equal(labels, expected.mask)
    assert written.confidence_map is not None
    assert np.abs(pixels_of(written.confidence_map) / 255 - expected.confidence).max() < 2 / 255
    assert pixels_of(written.overlay).shape == (100, 150, 3)
    coco = COCO(str(tmp_path / "out" / "instances.json"))
    assert coco.imgs[1]["width"] == 300
    assert all(np.array_equal(coco.annToMask(one), labels == one["category_id"]) for one in coco.anns.values())


def test_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert predicted_files.lane_count(torch.device("cpu")) == 3
    assert predicted_files.lane_count(torch.device("cuda")) == 1
