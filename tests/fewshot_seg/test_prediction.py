"""Masks for photos of any size from remembered supports."""

from __future__ import annotations

import errno
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from episodes.augment import EpisodeTransform
from episodes.protocols import Fit
from episodes.types import IGNORE, OUTSIDE, DataError, UInt8Array
from fewshot_seg import prediction
from fewshot_seg.backbones import Backbone
from fewshot_seg.completion import SupportCompletion
from fewshot_seg.photos import read_photo
from fewshot_seg.pictures import write_mask
from fewshot_seg.pipeline import most_in_flight
from fewshot_seg.prediction import Predictor, predict_folder
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


@pytest.fixture
def predictor(tiny_backbone: Backbone) -> Predictor:
    ready = Predictor(training_free(tiny_backbone, threshold=0.3), SIZE)
    images, masks = zip(photo(0), photo(1, 64, 64), strict=True)
    ready.remember(images, masks)
    return ready


class TestPredictor:
    @pytest.mark.parametrize(("height", "width"), [(70, 90), (90, 70)])
    def test_same_as_the_segmenter_at_the_photos_own_size(
        self, predictor: Predictor, tiny_backbone: Backbone, height: int, width: int
    ) -> None:
        segmenter = training_free(tiny_backbone, threshold=0.3)
        transform = EpisodeTransform("none", SIZE)
        squares = [transform(*photo(0), seed=0), transform(*photo(1, 64, 64), seed=0)]
        support = segmenter.encode_support(
            torch.stack([image for image, _ in squares])[None], torch.stack([mask for _, mask in squares])[None]
        )
        query = photo(2, height, width)[0]
        square = transform(query, np.zeros((height, width), np.uint8), seed=0)[0]
        expected = segmenter.segment_levels(support, tiny_backbone(square[None]), (height, width))
        result = predictor.predict(query)
        assert np.array_equal(result.mask, expected.masks[0].numpy())
        assert np.array_equal(result.attention, expected.attention[0].numpy())
        assert result.mask.dtype == np.uint8

    def test_mask_is_where_confidence_exceeds_a_half(self, predictor: Predictor) -> None:
        result = predictor.predict(photo(3)[0])
        clear = np.abs(result.confidence - 0.5) > 1e-6
        assert np.array_equal(result.mask[clear] == 1, result.confidence[clear] > 0.5)
        assert 0 < result.mask.mean() < 1

    def test_remembering_again_replaces(self, predictor: Predictor, tiny_backbone: Backbone) -> None:
        image, mask = photo(5)
        predictor.remember([image], [1 - mask])
        fresh = Predictor(training_free(tiny_backbone, threshold=0.3), SIZE)
        fresh.remember([image], [1 - mask])
        query = photo(6)[0]
        assert np.array_equal(predictor.predict(query).confidence, fresh.predict(query).confidence)

    def test_nothing_remembered(self, tiny_backbone: Backbone) -> None:
        with pytest.raises(DataError, match=r"no support to go by; call remember"):
            Predictor(training_free(tiny_backbone), SIZE).predict(photo(0)[0])

    def test_no_supports(self, predictor: Predictor) -> None:
        with pytest.raises(DataError, match="one or more support photos with a mask each, got 0 and 0"):
            predictor.remember([], [])

    def test_object_too_small_for_the_square(self, predictor: Predictor) -> None:
        image = np.zeros((900, 900, 3), np.uint8)
        mask = np.zeros((900, 900), np.uint8)
        mask[1, 1] = 1
        with pytest.raises(DataError, match=r"mask of support 1 shows no object at 64 x 64 pixels.*--size"):
            predictor.remember([image], [mask])


def box_of(mask: UInt8Array) -> UInt8Array:
    return (mask * IGNORE).astype(np.uint8)  # the object of `photo` is a rectangle


class TestPaddedPhotos:
    def cropped_by_hand(self, maps: Tensor) -> UInt8Array:
        """Over a square of 64, of a photo of 70 x 90: 70 * 64 / 90 = 49.8 rows of it are the photo."""
        enlarged = F.interpolate(maps[:, None, :50], (70, 90), mode="bilinear", align_corners=False)
        return np.asarray(enlarged[0, 0].numpy())

    def square(self, image: UInt8Array, marks: UInt8Array) -> tuple[Tensor, Tensor]:
        return EpisodeTransform("none", SIZE, "pad")(image, marks, seed=0)

    def test_masks_are_of_the_photos_size_and_equal_cropping_by_hand(self, tiny_backbone: Backbone) -> None:
        segmenter, query = training_free(tiny_backbone, threshold=0.3), photo(2, 70, 90)[0]
        supports = (photo(0), photo(1, 90, 70))
        predictor = Predictor(segmenter, SIZE, fit="pad")
        predictor.remember(*zip(*supports, strict=True))
        squares = [self.square(*support) for support in supports]
        assert (squares[0][1][40:] == IGNORE).all()
        images, masks = (torch.stack(side)[None] for side in zip(*squares, strict=True))
        levels = tiny_backbone(self.square(query, np.zeros((70, 90), np.uint8))[0][None])
        expected = segmenter.segment_levels(segmenter.encode_support(images, masks), levels, (SIZE, SIZE))
        margin = self.cropped_by_hand(expected.logits.detach()) - 0.3
        result = predictor.predict(query)
        assert result.mask.shape == result.confidence.shape == result.attention.shape == (70, 90)
        assert np.array_equal(result.mask, margin > 0)
        np.testing.assert_allclose(result.confidence, 1 / (1 + np.exp(-margin)), atol=1e-5)
        np.testing.assert_allclose(result.attention, self.cropped_by_hand(expected.attention), atol=1e-5)
        assert 0 < result.mask.mean() < 1

    @pytest.mark.parametrize("completed", [False, True])
    def test_what_lies_beside_a_box_is_nothing(self, tiny_backbone: Backbone, completed: bool) -> None:
        completion = SupportCompletion(feature_channels=sum(tiny_backbone.channels), width=8) if completed else None
        segmenter = training_free(tiny_backbone, completion=completion)
        (image, mask), query = photo(0), photo(2, 70, 90)[0]
        predictor = Predictor(segmenter, SIZE, fit="pad")
        predictor.remember([image], [box_of(mask)], dense=[False])
        result = predictor.predict(query)
        levels = tiny_backbone(self.square(query, np.zeros((70, 90), np.uint8))[0][None])
        confidences = []
        for beside in (OUTSIDE, IGNORE):
            tensor, marks = self.square(image, box_of(mask))
            marks[40:] = beside  # a photo of 50 x 80 fills 40 rows
            support = segmenter.encode_support(tensor[None, None], marks[None, None], torch.tensor([[False]]))
            prediction = segmenter.segment_levels(support, levels, (SIZE, SIZE))
            confidences.append(self.cropped_by_hand(prediction.logits.detach().sigmoid()))
            rows = (support.foreground + support.background).reshape(4, 4)
            torch.testing.assert_close(rows[:2], torch.ones(2, 4))
            torch.testing.assert_close(
                rows[2:], torch.tensor([[0.5], [0.0]] if beside == OUTSIDE else [[1.0]] * 2).expand(2, 4)
            )
        assert np.array_equal(result.mask, confidences[0] > 0.5)
        assert np.abs(confidences[0] - confidences[1]).max() > 1e-3  # open padding would be seen

    @pytest.mark.parametrize("fit", ["squash", "pad"])
    @pytest.mark.parametrize(("value", "around"), [(1, IGNORE), (IGNORE, 0)], ids=["point", "box"])
    def test_weak_marks_smaller_than_a_pixel_are_kept(
        self, tiny_backbone: Backbone, fit: Fit, value: int, around: int
    ) -> None:
        marks = np.full((900, 1200), around, np.uint8)
        marks[601, 305] = value
        image = np.random.default_rng(0).integers(0, 256, (900, 1200, 3)).astype(np.uint8)
        predictor, without = (Predictor(training_free(tiny_backbone), SIZE, fit) for _ in range(2))
        predictor.remember([image], [marks], dense=[False])
        if value == 1:  # not as if nothing had been marked
            without.remember([image], [np.full_like(marks, IGNORE)], dense=[False])
            found = (one.predict(photo(2)[0]).confidence for one in (predictor, without))
            assert not np.array_equal(*found)
        assert predictor.predict(photo(2)[0]).mask.shape == (50, 80)


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

        def read(path: Path) -> UInt8Array:
            nonlocal alive, most
            pixels = photo(int(path.stem))[0]
            weakref.finalize(pixels, dropped)
            with lock:
                alive += 1
                most = max(most, alive)
            return pixels

        monkeypatch.setattr(prediction, "read_photo", read)
        queries = [tmp_path / f"{number}.jpg" for number in range(60)]
        lanes = prediction.lane_count(predictor.device)
        assert len(predict_folder(predictor, queries, tmp_path / "out").written) == 60
        assert 1 <= most <= most_in_flight(1, lanes) < 60

    def test_a_full_disk_is_one_clear_line(
        self, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        Image.fromarray(photo(1)[0]).save(tmp_path / "a.png")
        monkeypatch.setattr(prediction, "write_picture", full)
        with pytest.raises(DataError, match=r"cannot write the prediction of .*a\.png to .*out: No space.*make room"):
            predict_folder(predictor, [tmp_path / "a.png"], tmp_path / "out")

    def test_interrupted_leaves_whole_files_only(
        self, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(12):
            Image.fromarray(photo(number)[0]).save(tmp_path / f"{number:02d}.png")
        wrote: list[Path] = []

        def interrupted(path: Path, mask: UInt8Array) -> None:
            wrote.append(path)
            if len(wrote) == 4:
                raise KeyboardInterrupt
            write_mask(path, mask)

        monkeypatch.setattr(prediction, "write_mask", interrupted)
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


class TestSavedSupports:
    def test_results_equal_those_from_the_photos(
        self, predictor: Predictor, tiny_backbone: Backbone, tmp_path: Path
    ) -> None:
        path, query = tmp_path / "set.safetensors", photo(9)[0]
        predictor.save_support(path, ["a.jpg", "b.jpg"])
        fresh = Predictor(training_free(tiny_backbone, threshold=0.3), SIZE)
        assert fresh.load_support(path) == ("a.jpg", "b.jpg")
        expected, result = predictor.predict(query), fresh.predict(query)
        assert np.array_equal(result.confidence, expected.confidence)
        assert np.array_equal(result.attention, expected.attention)

    def test_of_another_size_is_refused(self, predictor: Predictor, tiny_backbone: Backbone, tmp_path: Path) -> None:
        predictor.save_support(tmp_path / "set.safetensors")
        with pytest.raises(DataError, match="use --size 64"):
            Predictor(training_free(tiny_backbone), 96).load_support(tmp_path / "set.safetensors")

    def test_nothing_to_save(self, tiny_backbone: Backbone, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no support to go by"):
            Predictor(training_free(tiny_backbone), SIZE).save_support(tmp_path / "set.safetensors")
