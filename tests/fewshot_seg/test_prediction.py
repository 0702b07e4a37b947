"""Masks for photos of any size from remembered supports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from episodes.augment import EpisodeTransform
from episodes.types import DataError, UInt8Array
from fewshot_seg.backbones import Backbone
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
    def test_same_as_the_segmenter_at_the_photos_own_size(self, predictor: Predictor, tiny_backbone: Backbone) -> None:
        segmenter = training_free(tiny_backbone, threshold=0.3)
        transform = EpisodeTransform("none", SIZE)
        squares = [transform(*photo(0), seed=0), transform(*photo(1, 64, 64), seed=0)]
        support = segmenter.encode_support(
            torch.stack([image for image, _ in squares])[None], torch.stack([mask for _, mask in squares])[None]
        )
        query = photo(2, 70, 90)[0]
        square = transform(query, np.zeros((70, 90), np.uint8), seed=0)[0]
        expected = segmenter.segment_levels(support, tiny_backbone(square[None]), (70, 90))
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
