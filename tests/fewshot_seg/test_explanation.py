"""Pictures of episodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from episodes.sources import SyntheticSource
from episodes.types import EpisodeSpec
from fewshot_seg.backbones import Backbone
from fewshot_seg.explanation import episode_picture, explain_episode, write_explanations
from fewshot_seg.prediction import Predictor
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter, training_free

SPEC = EpisodeSpec(class_id=4, support_ids=("val-004-0001",), query_id="val-004-0000", seed=0)
TWO = EpisodeSpec(class_id=4, support_ids=("val-004-0001", "val-004-0002"), query_id="val-004-0000", seed=0)


@pytest.fixture
def segmenter(tiny_backbone: Backbone) -> FewShotSegmenter:
    return training_free(tiny_backbone, channel="prototype margin")


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


class TestPictures:
    def test_one_row_for_one_shot_two_for_more(self, segmenter: FewShotSegmenter, tiny_source: SyntheticSource) -> None:
        one, two = (
            episode_picture(explain_episode(segmenter, tiny_source, spec, resolution=48), title="star")
            for spec in (SPEC, TWO)
        )
        assert one.shape[1] > 6 * 256
        assert one.shape[0] < 2 * 256 < two.shape[0]
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
