"""Masks for photos of any size from remembered supports."""

from __future__ import annotations

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
from fewshot_seg import photos
from fewshot_seg.backbones import Backbone
from fewshot_seg.completion import SupportCompletion
from fewshot_seg.n_way import n_way_masks
from fewshot_seg.photos import read_photo
from fewshot_seg.prediction import Predictor
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter, training_free

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


def green(seed: int, height: int = 50, width: int = 80) -> tuple[UInt8Array, UInt8Array]:
    """A green disc on grey noise, and its mask."""
    random = np.random.default_rng(seed)
    image = random.integers(90, 130, (height, width, 3)).astype(np.uint8)
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    mask = ((rows - height // 2) ** 2 + (columns - width // 3) ** 2 < (height // 3) ** 2).astype(np.uint8)
    image[mask == 1] = (30, 200, 60)
    return image, mask


def both(seed: int) -> UInt8Array:
    """A photo of 60 x 140 with the red square to the left and the green disc to the right."""
    return np.concatenate([photo(seed, 60, 70)[0], green(seed + 1, 60, 70)[0]], axis=1)


def remember_both(predictor: Predictor) -> Predictor:
    for name, (image, mask) in (("red", photo(0)), ("green", green(1))):
        predictor.remember([image], [mask], name=name)
    return predictor


@pytest.fixture
def decoded(tiny_backbone: Backbone) -> FewShotSegmenter:
    """With a decoder, untrained, whose logits go either way."""
    segmenter = build_segmenter(tiny_backbone, decoder_width=8, decoder_blocks=1, seed=3).eval()
    alone = Predictor(segmenter, SIZE)
    alone.remember(*([one] for one in photo(0)))
    segmenter.threshold = float(alone.coarse_margins(alone.squares(both(3))).median())
    return segmenter


class TestSeveralClasses:
    @pytest.mark.parametrize("fit", ["squash", "pad"])
    def test_masks_are_those_of_the_n_way_evaluation(self, decoded: FewShotSegmenter, fit: Fit) -> None:
        predictor, query = remember_both(Predictor(decoded, SIZE, fit)), both(7)
        alone = []
        for image, mask in (photo(0), green(1)):
            one = Predictor(decoded, SIZE, fit)
            one.remember([image], [mask])
            alone.append(one.predict(query))
        margins = torch.stack([torch.from_numpy(one.confidence).double().logit() for one in alone])[None]
        expected = n_way_masks(margins, margins, torch.tensor([[1, 2]]))[0].numpy()
        result = predictor.predict(query)
        assert predictor.classes == ("red", "green")
        apart = np.abs(alone[0].confidence - alone[1].confidence) > 1e-6
        assert np.array_equal(result.mask[apart], expected[apart])
        assert apart.mean() > 0.95
        assert len(np.unique(result.mask)) > 1
        assert np.array_equal(result.confidence, np.maximum(alone[0].confidence, alone[1].confidence))
        assert np.array_equal(result.attention, np.maximum(alone[0].attention, alone[1].attention))

    def test_the_backbone_runs_once_for_a_photo(self, tiny_backbone: Backbone) -> None:
        predictor, calls = remember_both(Predictor(training_free(tiny_backbone), SIZE)), list[int]()
        hook = tiny_backbone.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
        try:
            predictor.coarse_margins(predictor.squares(both(1)))
            predictor.predict(both(1))
        finally:
            hook.remove()
        assert calls == [1, 1]

    def test_remembering_a_class_again_keeps_its_number(self, tiny_backbone: Backbone) -> None:
        predictor = remember_both(Predictor(training_free(tiny_backbone), SIZE))
        predictor.remember(*([one] for one in photo(9)), name="red")
        assert predictor.classes == ("red", "green")

    def test_each_from_its_file(self, tiny_backbone: Backbone, tmp_path: Path) -> None:
        expected = remember_both(Predictor(training_free(tiny_backbone), SIZE))
        with pytest.raises(DataError, match=r"holds one class, and these are remembered: red, green; save each by"):
            expected.save_support(tmp_path / "both.safetensors")
        loaded = Predictor(training_free(tiny_backbone), SIZE)
        for name, (image, mask) in (("red", photo(0)), ("green", green(1))):
            alone = Predictor(training_free(tiny_backbone), SIZE)
            alone.remember([image], [mask], name=name)
            alone.save_support(tmp_path / f"{name}.safetensors")
            loaded.load_support(tmp_path / f"{name}.safetensors", name=name)
        found = [one.predict(both(4)) for one in (expected, loaded)]
        assert np.array_equal(found[0].mask, found[1].mask)
        assert np.array_equal(found[0].confidence, found[1].confidence)

    def test_more_classes_than_a_mask_has_room_for(self, tiny_backbone: Backbone) -> None:
        predictor, (image, mask) = Predictor(training_free(tiny_backbone), 32), photo(0)
        for number in range(254):
            predictor.remember([image], [mask], name=str(number))
        with pytest.raises(DataError, match="a mask has room for 254 classes; leave 'one more' out"):
            predictor.remember([image], [mask], name="one more")


class TestViews:
    def margin(self, predictor: Predictor, image: UInt8Array) -> UInt8Array:
        confidence = predictor.predict(image).confidence.astype(np.float64)
        return np.asarray(np.log(confidence / (1 - confidence)))

    @pytest.mark.parametrize("fit", ["squash", "pad"])
    def test_flip_is_the_mean_of_both(self, decoded: FewShotSegmenter, fit: Fit) -> None:
        plain, flipped = Predictor(decoded, SIZE, fit), Predictor(decoded, SIZE, fit, flip=True)
        for one in (plain, flipped):
            one.remember(*([each] for each in photo(0)))
        query = both(5)
        mirrored = self.margin(plain, np.ascontiguousarray(query[:, ::-1]))[:, ::-1]
        assert np.abs(mirrored - self.margin(plain, query)).max() > 1e-3
        np.testing.assert_allclose(
            self.margin(flipped, query), (self.margin(plain, query) + mirrored) / 2, rtol=0, atol=1e-4
        )
        np.testing.assert_allclose(
            self.margin(flipped, np.ascontiguousarray(query[:, ::-1]))[:, ::-1],
            self.margin(flipped, query),
            rtol=0,
            atol=1e-4,
        )
        assert np.array_equal(flipped.predict(query).attention, plain.predict(query).attention)

    @pytest.mark.parametrize("flip", [False, True])
    def test_tiles_are_segmented_like_photos_and_averaged_with_the_whole(
        self, decoded: FewShotSegmenter, flip: bool
    ) -> None:
        plain, tiled = Predictor(decoded, SIZE, flip=flip), Predictor(decoded, SIZE, tile=60, flip=flip)
        for one in (plain, tiled):
            one.remember(*([each] for each in photo(0)))
        query, lefts = both(6), (0, 40, 80)  # 60 x 140
        total, weights = np.zeros((60, 140)), np.zeros((60, 140))
        for left in lefts:
            margin = self.margin(plain, np.ascontiguousarray(query[:, left : left + 60]))
            for y in range(60):
                for x in range(60):
                    weight = min(y + 1, 60 - y) * min(x + 1, 60 - x)
                    total[y, left + x] += weight * margin[y, x]
                    weights[y, left + x] += weight
        expected = (self.margin(plain, query) + total / weights) / 2
        np.testing.assert_allclose(self.margin(tiled, query), expected, rtol=0, atol=1e-4)

    def test_photos_no_larger_than_a_tile_stay_whole(self, decoded: FewShotSegmenter) -> None:
        plain, tiled = Predictor(decoded, SIZE), Predictor(decoded, SIZE, tile=140)
        for one in (plain, tiled):
            one.remember(*([each] for each in photo(0)))
        assert np.array_equal(plain.predict(both(6)).confidence, tiled.predict(both(6)).confidence)

    def test_no_tile(self, decoded: FewShotSegmenter) -> None:
        with pytest.raises(DataError, match="side of a tile must be at least 1 pixel, got 0"):
            Predictor(decoded, SIZE, tile=0)

    @pytest.mark.parametrize("image", [np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3), np.float32)])
    def test_no_photo(self, predictor: Predictor, image: UInt8Array) -> None:
        with pytest.raises(DataError, match=r"expected a uint8 image \(H, W, 3\), got"):
            predictor.predict(image)


class TestFiles:
    def write(self, folder: Path) -> tuple[str, Path]:
        image, mask = photo(0)
        for name, values in (("shown.png", image), ("mask.png", 255 * mask), ("query.png", photo(4, 200, 300)[0])):
            Image.fromarray(values).save(folder / name)
        return f"{folder / 'shown.png'}:{folder / 'mask.png'}", folder / "query.png"

    def test_three_lines(self, tiny_backbone: Backbone, tmp_path: Path) -> None:
        support, query = self.write(tmp_path)
        predictor = Predictor(training_free(tiny_backbone, threshold=0.3), SIZE)
        predictor.remember_files(support)
        result = predictor.predict_file(str(query))
        expected = Predictor(training_free(tiny_backbone, threshold=0.3), SIZE)
        expected.remember(*([one] for one in photo(0)))
        assert np.array_equal(result.confidence, expected.predict(read_photo(query)).confidence)
        assert predictor.classes == ("object",)

    def test_weak_supports_by_class(self, tiny_backbone: Backbone, tmp_path: Path) -> None:
        support, _ = self.write(tmp_path)
        shown = support.split(":")[0]
        predictor, expected = (Predictor(training_free(tiny_backbone), SIZE) for _ in range(2))
        predictor.remember_files(f"a={shown}:box=20,10,60,40", f"b={shown}")
        expected.remember([photo(0)[0]], [box_of(photo(0)[1])], [False], name="a")
        expected.remember([photo(0)[0]], [np.full((50, 80), IGNORE, np.uint8)], [False], name="b")
        assert predictor.classes == ("a", "b")
        found = (one.predict(both(4)).confidence for one in (predictor, expected))
        assert np.array_equal(*found)
        with pytest.raises(DataError, match="expected one or more supports"):
            predictor.remember_files()

    def test_a_reduced_photo_has_masks_of_its_own_size(
        self, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, query = self.write(tmp_path)
        whole = predictor.predict_file(query)
        monkeypatch.setattr(photos, "WORKING_PIXELS", 15_000)
        reduced = predictor.predict_file(query)
        for one in (reduced.mask, reduced.confidence, reduced.attention):
            assert one.shape == (200, 300)
        assert np.abs(reduced.confidence - whole.confidence).mean() < 0.02
        assert np.abs(whole.confidence[reduced.mask != whole.mask] - 0.5).max(initial=0) < 0.1
        assert reduced.mask.dtype == np.uint8

    def test_tiles_are_of_the_photos_own_pixels(
        self, decoded: FewShotSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(photos, "WORKING_PIXELS", 15_000)  # 100 x 150
        _, query = self.write(tmp_path)
        tiled = Predictor(decoded, SIZE, tile=100)
        tiled.remember(*([each] for each in photo(0)))
        opened = photos.open_photo(query)
        coarse = tiled.with_tiles(opened, tiled.coarse_margins(tiled.squares(opened.pixels)))
        assert {(tile.height, tile.width) for tile in coarse.tiles} == {(50, 50)}
        assert len(coarse.parts) == len(coarse.tiles) == 3 * 4


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
