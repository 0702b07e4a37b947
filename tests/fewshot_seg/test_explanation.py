"""Pictures of episodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from episodes.annotations import annotation_of
from episodes.augment import EpisodeTransform
from episodes.sources import SyntheticSource
from episodes.types import EpisodeSpec, SupportKind, UInt8Array
from fewshot_seg.attention import scale_map
from fewshot_seg.backbones import Backbone
from fewshot_seg.explainers import background_evidence, soft_attention
from fewshot_seg.explainers.episode import compare_photos, episode_photos
from fewshot_seg.explanation import episode_picture, explain_episode, write_explanations
from fewshot_seg.prediction import Predictor
from fewshot_seg.priors import PRIOR_CHANNELS
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter, training_free

SPEC = EpisodeSpec(class_id=4, support_ids=("val-004-0001",), query_id="val-004-0000", seed=0)
NAME = "prototype margin"
TWO = EpisodeSpec(class_id=4, support_ids=("val-004-0001", "val-004-0002"), query_id="val-004-0000", seed=0)


@pytest.fixture
def segmenter(tiny_backbone: Backbone) -> FewShotSegmenter:
    return training_free(tiny_backbone, channel=NAME)


class WidePhotos(SyntheticSource):
    """The upper 40 of 64 rows: padded to 48 x 48, a photo fills the upper 30 rows."""

    def image(self, image_id: str) -> UInt8Array:
        return super().image(image_id)[:40]

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        return super().mask(image_id, class_id)[:40]


@pytest.fixture
def wide() -> WidePhotos:
    source = WidePhotos(base_classes=3, novel_classes=2, images_per_class=6, size=64)
    assert all((source.mask(image_id, 4) == 1).any() for image_id in (TWO.query_id, *TWO.support_ids))
    return source


class TestExplainEpisode:
    def test_shows_what_the_model_says(self, segmenter: FewShotSegmenter, tiny_source: SyntheticSource) -> None:
        episode = explain_episode(segmenter, tiny_source, TWO, resolution=48)
        predictor = Predictor(segmenter, 48)
        predictor.remember(episode.support_images, episode.support_masks)
        expected = predictor.predict(tiny_source.image(TWO.query_id))
        assert np.array_equal(episode.prediction, expected.mask)
        assert np.array_equal(episode.attention, expected.attention)
        target = tiny_source.mask(TWO.query_id, 4)
        both, either = (expected.mask & target).sum(), (expected.mask | target).sum()
        assert episode.iou == pytest.approx(100 * both / either)
        assert episode.prior_name == "prototype margin"
        assert episode.prior is not None
        # the readout's logits are this map
        assert np.array_equal(episode.prior > 0, expected.mask == 1)

    def test_without_prior(self, tiny_backbone: Backbone, tiny_source: SyntheticSource) -> None:
        bare = build_segmenter(tiny_backbone, prior="none", appearance=8).eval()
        episode = explain_episode(bare, tiny_source, SPEC, resolution=48)
        assert episode.prior is None
        full = explain_episode(training_free(tiny_backbone), tiny_source, SPEC, resolution=48)
        narrower = episode_picture(episode, title="t").shape[1]
        assert narrower < episode_picture(full, title="t").shape[1]

    def test_pfenet_is_named(self, tiny_backbone: Backbone, tiny_source: SyntheticSource) -> None:
        rival = build_segmenter(tiny_backbone, prior="pfenet").eval()
        assert explain_episode(rival, tiny_source, SPEC, resolution=48).prior_name == "pfenet"


class TestPaddedPhotos:
    def test_prior_covers_the_photo_alone(self, segmenter: FewShotSegmenter, wide: WidePhotos) -> None:
        episode = explain_episode(segmenter, wide, TWO, resolution=48, fit="pad")
        transform = EpisodeTransform("none", 48, "pad")
        squares = [transform(wide.image(one), wide.mask(one, 4), seed=0) for one in TWO.support_ids]
        with torch.no_grad():
            encoded = segmenter.encode_support(
                torch.stack([image for image, _ in squares])[None], torch.stack([mask for _, mask in squares])[None]
            )
            levels = segmenter.backbone(transform.photo(wide.image(TWO.query_id))[None])
            cells = segmenter.segment_levels(encoded, levels, (48, 48)).priors[:, PRIOR_CHANNELS.index(NAME)][:, None]
        square = F.interpolate(cells, (48, 48), mode="bilinear", align_corners=False)
        by_hand, whole = (
            F.interpolate(part, (40, 64), mode="bilinear", align_corners=False)[0, 0].numpy()
            for part in (square[:, :, :30], square)
        )
        assert episode.prior is not None
        assert episode.query_image.shape == (40, 64, 3)
        assert np.allclose(episode.prior, by_hand, atol=1e-6)
        assert not np.allclose(episode.prior, whole, atol=1e-3)
        assert np.array_equal(episode.prior > 0, episode.prediction == 1)  # the readout's logits are this map

    @pytest.mark.parametrize("support", ["mask", "box", "scribble", "point", "label"])
    def test_shows_what_the_model_says(self, tiny_backbone: Backbone, wide: WidePhotos, support: SupportKind) -> None:
        segmenter = training_free(tiny_backbone).eval()
        episode = explain_episode(segmenter, wide, TWO, resolution=48, support=support, fit="pad")
        predictor = Predictor(segmenter, 48, "pad")
        marks = [annotation_of(wide, image_id, 4, support) for image_id in TWO.support_ids]
        predictor.remember([wide.image(image_id) for image_id in TWO.support_ids], marks, [support == "mask"] * 2)
        expected = predictor.predict(wide.image(TWO.query_id))
        assert np.array_equal(episode.attention, expected.attention)
        assert np.array_equal(episode.prediction, expected.mask)

    def test_point_between_the_pixels_of_the_square(self, tiny_backbone: Backbone, wide: WidePhotos) -> None:
        segmenter = training_free(tiny_backbone).eval()
        points, nothing = (
            explain_episode(segmenter, wide, SPEC, resolution=8, support=kind) for kind in ("point", "label")
        )
        assert points.prior is not None
        assert nothing.prior is not None
        assert not np.array_equal(points.prior, nothing.prior)


class TestPictures:
    def test_one_row_for_the_query_and_one_for_each_support(
        self, segmenter: FewShotSegmenter, tiny_source: SyntheticSource
    ) -> None:
        one, two = (
            episode_picture(explain_episode(segmenter, tiny_source, spec, resolution=48), title="star")
            for spec in (SPEC, TWO)
        )
        assert one.shape[1] == two.shape[1] > 6 * 256
        assert 2 * 256 < one.shape[0] < 3 * 256 < two.shape[0]  # the query's row, and one for each support
        assert one.dtype == np.uint8

    def test_files_are_named_by_episode(
        self, segmenter: FewShotSegmenter, tiny_source: SyntheticSource, tmp_path: Path
    ) -> None:
        written = write_explanations(
            segmenter, tiny_source, [SPEC, TWO], numbers=[1], resolution=48, folder=tmp_path / "why"
        )
        assert [one.path for one in written] == [tmp_path / "why" / "episode-0001.png"]
        assert written[0].title.startswith(f"{tiny_source.class_names[4]}: find it in val-004-0000")
        expected = episode_picture(explain_episode(segmenter, tiny_source, TWO, resolution=48), title=written[0].title)
        with Image.open(written[0].path) as stored:
            assert np.array_equal(np.asarray(stored), expected)

    def test_panels_for_print(self, segmenter: FewShotSegmenter, tiny_source: SyntheticSource) -> None:
        episode = explain_episode(segmenter, tiny_source, SPEC, resolution=48)
        small, large = (episode_picture(episode, title="star", scale=scale) for scale in (1, 2))
        assert large.shape == (2 * small.shape[0], 2 * small.shape[1], 3)


class TestBothSides:
    def test_shown_maps_are_the_explainers(self, tiny_backbone: Backbone, wide: WidePhotos) -> None:
        segmenter = training_free(tiny_backbone).eval()
        episode = explain_episode(segmenter, wide, TWO, resolution=64)
        comparison = compare_photos(segmenter, episode_photos(wide, TWO), resolution=64)
        for place, shown in enumerate(episode.support_attention, 1):
            found = soft_attention(comparison, place)
            assert np.array_equal(episode.raw["support_attention"][place - 1], found.numpy())
            assert np.array_equal(episode.raw["support_background"][place - 1], -found.numpy())
            expected = scale_map(found.relu()[None], (40, 64))[0].numpy()
            assert np.allclose(shown, expected, atol=1e-6)
        against = background_evidence(comparison, 0)
        assert np.allclose(episode.background, scale_map(against.relu()[None], (40, 64))[0].numpy(), atol=1e-6)
        assert np.allclose(
            scale_map(torch.from_numpy(episode.raw["query_attention"]).relu()[None], (40, 64))[0].numpy(),
            episode.attention,
            atol=1e-6,
        )

    def test_padding_is_cut_off(self, tiny_backbone: Backbone, wide: WidePhotos) -> None:
        segmenter = training_free(tiny_backbone).eval()
        episode = explain_episode(segmenter, wide, TWO, resolution=64, fit="pad")
        assert [one.shape for one in episode.support_attention] == [(40, 64)] * 2
        assert episode.background.shape == (40, 64)

    def test_maps_file(self, segmenter: FewShotSegmenter, tiny_source: SyntheticSource, tmp_path: Path) -> None:
        written = write_explanations(
            segmenter, tiny_source, [TWO], numbers=[0], resolution=48, folder=tmp_path, maps=True
        )
        episode = explain_episode(segmenter, tiny_source, TWO, resolution=48)
        with np.load(written[0].path.with_suffix(".npz")) as stored:
            assert set(stored) == {
                *(f"{side}_{name}" for side in ("query", "support") for name in ("attention", "background", "prior")),
                "mask",
                "target",
            }
            assert stored["query_attention"].shape == (3, 3)
            assert stored["support_prior"].shape == (2, 3, 3)
            assert stored["query_background"].dtype == np.float32
            assert np.array_equal(stored["mask"], episode.prediction)
            assert np.array_equal(stored["target"], episode.target)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["episode-0000.npz", "episode-0000.png"]
