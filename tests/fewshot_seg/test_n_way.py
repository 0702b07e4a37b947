"""N-way scores against plain loops over pixels, torchmetrics, and the one-way evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from episodes.index import build_index
from episodes.n_way import NWaySampler
from episodes.protocols import Fit, ShotRule
from episodes.sampler import EpisodeSampler
from episodes.sources import SyntheticSource
from episodes.types import IGNORE, DataError, EpisodeSpec, UInt8Array
from fewshot_seg.backbones import Backbone
from fewshot_seg.evaluation import evaluate
from fewshot_seg.feature_episodes import CachedEpisodes
from fewshot_seg.features import FeatureStore, MaskStore
from fewshot_seg.metrics import mean_result
from fewshot_seg.n_way import NWayEvaluation, evaluate_n_way, n_way_masks, n_way_targets
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter
from fewshot_seg.shot_rules import SHOT_RULES

SIZE, WAYS, LENGTH = 64, 3, 5


class TwoClasses(SyntheticSource):
    """Every mask also shows the next class, in a corner, and has an ignored border; at an original size of its own."""

    scale = 1

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        shown = next(iter(super().class_areas(image_id)))
        mask = super().mask(image_id, class_id).copy()
        mask[-20:, -20:] = class_id == shown % 3 + 1
        mask[:3] = IGNORE
        return mask.repeat(self.scale, axis=1)[: SIZE if self.scale == 1 else 40 + 2 * int(image_id[-1])]


class Wide(TwoClasses):
    """The same, larger and not square."""

    scale = 2


SQUARE = TwoClasses(base_classes=3, novel_classes=2, images_per_class=5, size=SIZE)
ORIGINAL = Wide(base_classes=3, novel_classes=2, images_per_class=5, size=SIZE)
PAIRS = build_index(SyntheticSource(base_classes=3, novel_classes=2, images_per_class=5, size=SIZE), "train").pairs(
    SQUARE.base_class_ids
)


def draw(*, ways: int = WAYS, shots: int = 2, length: int = LENGTH, seed: int = 3) -> tuple[EpisodeSpec, ...]:
    return NWaySampler(PAIRS, ways=ways, shots=shots, seed=seed, length=length, order="random", repeat_supports=False)[
        :
    ]


def cached(backbone: Backbone, specs: Sequence[EpisodeSpec]) -> CachedEpisodes:
    return CachedEpisodes(*stores(backbone), specs)


@cache
def stores(backbone: Backbone) -> tuple[FeatureStore, MaskStore]:
    return FeatureStore(backbone, SQUARE, size=SIZE, directory=None), MaskStore(SQUARE, size=SIZE)


@pytest.fixture(scope="module")
def segmenter(tiny_backbone: Backbone) -> FewShotSegmenter:
    """As after a training that did not go far."""
    made = build_segmenter(tiny_backbone, similarity_rank=4, decoder_width=8, decoder_blocks=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.trainable_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    made.threshold = 0.3
    return made.eval()


@torch.no_grad()
def way_logits(segmenter: FewShotSegmenter, backbone: Backbone, specs: Sequence[EpisodeSpec]) -> Tensor:
    """float (N, SIZE, SIZE), all supports of a way together, one way at a time."""
    found = []
    for batch in cached(backbone, specs).batches(1):
        support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks)
        found.append(segmenter.segment_levels(support, batch.query_levels, (SIZE, SIZE)).logits[0])
    return torch.stack(found)


def loop_labels(logits: Tensor, masks: Sequence[UInt8Array], threshold: float) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Predicted and true way of every pixel of one episode."""
    height, width = masks[0].shape
    predicted, actual = np.zeros((height, width), np.int64), np.zeros((height, width), np.int64)
    for y in range(height):
        for x in range(width):
            scores = [0.0, *(float(one[y, x]) - threshold for one in logits)]
            predicted[y, x] = scores.index(max(scores))
            shown = [way for way, mask in enumerate(masks, start=1) if mask[y, x] == 1]
            ignored = any(mask[y, x] == IGNORE for mask in masks)
            actual[y, x] = IGNORE if ignored or len(shown) > 1 else sum(shown)
    return predicted, actual


def assert_equals_loop(
    evaluation: NWayEvaluation,
    specs: Sequence[EpisodeSpec],
    labels: Sequence[tuple[np.ndarray, np.ndarray]],  # type: ignore[type-arg]
) -> None:
    sums: dict[int, list[int]] = {}
    objects, ground = [0, 0], [0, 0]
    for n, (predicted, actual) in enumerate(labels):
        valid = actual != IGNORE
        for way, spec in enumerate(specs[n * WAYS : (n + 1) * WAYS], start=1):
            total = sums.setdefault(spec.class_id, [0, 0])
            both = int(((predicted == way) & (actual == way) & valid).sum())
            either = int((((predicted == way) | (actual == way)) & valid).sum())
            total[0], total[1] = total[0] + both, total[1] + either
            assert evaluation.way_iou[n, way - 1] == pytest.approx(100 * both / either if either else 100)
        for pair, found, true in ((objects, predicted > 0, actual > 0), (ground, predicted == 0, actual == 0)):
            pair[0] += int((found & true & valid).sum())
            pair[1] += int(((found | true) & valid).sum())
    result = evaluation.result
    assert result.per_class == pytest.approx({class_id: 100 * i / u for class_id, (i, u) in sums.items()})
    assert result.miou == pytest.approx(np.mean(list(result.per_class.values())))
    assert result.fb_iou == pytest.approx(50 * (objects[0] / objects[1] + ground[0] / ground[1]))
    assert result.miou_low <= result.miou <= result.miou_high
    assert result.episodes == LENGTH
    assert evaluation.specs == tuple(tuple(specs[n * WAYS : (n + 1) * WAYS]) for n in range(LENGTH))
    assert 1 < result.miou < 99  # or the comparison would say nothing


class TestEvaluateNWay:
    def test_at_the_square_equals_a_plain_loop(self, segmenter: FewShotSegmenter, tiny_backbone: Backbone) -> None:
        specs, labels = draw(), []
        for n in range(LENGTH):
            own = specs[n * WAYS : (n + 1) * WAYS]
            masks = [SQUARE.mask(spec.query_id, spec.class_id) for spec in own]
            labels.append(loop_labels(way_logits(segmenter, tiny_backbone, own), masks, 0.3))
        evaluation = evaluate_n_way(
            segmenter, cached(tiny_backbone, specs), ways=WAYS, scoring_size=SIZE, source=SQUARE, batch_size=2
        )
        assert_equals_loop(evaluation, specs, labels)
        assert len({label for _, actual in labels for label in np.unique(actual)}) == WAYS + 2
        assert evaluation.seconds > 0

    @pytest.mark.parametrize("fit", ["squash", "pad"])
    def test_at_the_original_sizes_equals_a_plain_loop(
        self, segmenter: FewShotSegmenter, tiny_backbone: Backbone, fit: Fit
    ) -> None:
        specs, labels = draw(), []
        for n in range(LENGTH):
            own = specs[n * WAYS : (n + 1) * WAYS]
            masks = [ORIGINAL.mask(spec.query_id, spec.class_id) for spec in own]
            height, width = masks[0].shape
            assert width == 2 * SIZE > height
            logits = way_logits(segmenter, tiny_backbone, own)[:, : height // 2 if fit == "pad" else SIZE]
            resized = F.interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)[0]
            labels.append(loop_labels(resized, masks, 0.3))
        evaluation = evaluate_n_way(
            segmenter,
            cached(tiny_backbone, specs),
            ways=WAYS,
            scoring_size=None,
            source=ORIGINAL,
            fit=fit,
            batch_size=2,
        )
        assert_equals_loop(evaluation, specs, labels)

    def test_torchmetrics_confusion_matrix(self, segmenter: FewShotSegmenter, tiny_backbone: Backbone) -> None:
        """Every episode has all three classes as ways: one confusion matrix of classes holds everything."""
        specs = draw()
        matrix = MulticlassConfusionMatrix(num_classes=4, ignore_index=IGNORE)
        for n in range(LENGTH):
            own = sorted(specs[n * WAYS : (n + 1) * WAYS], key=lambda spec: spec.class_id)  # way = class id
            logits = way_logits(segmenter, tiny_backbone, own) - 0.3
            scores = torch.cat([torch.zeros(1, SIZE, SIZE), logits])
            masks = torch.stack([torch.from_numpy(SQUARE.mask(spec.query_id, spec.class_id)) for spec in own])
            target = (masks == 1).long().mul(torch.arange(1, 4)[:, None, None]).sum(0)
            target[(masks == IGNORE).any(0) | ((masks == 1).sum(0) > 1)] = IGNORE
            matrix.update(scores.argmax(0), target)
        counts = matrix.compute().double()
        iou = 100 * counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
        result = evaluate_n_way(
            segmenter, cached(tiny_backbone, specs), ways=WAYS, scoring_size=SIZE, source=SQUARE
        ).result
        assert result.per_class == pytest.approx({c: float(iou[c]) for c in (1, 2, 3)}, abs=0.1)
        objects, total = counts[1:, 1:].sum(), counts.sum()
        expected = 50 * (objects / (total - counts[0, 0]) + counts[0, 0] / (total - objects))
        assert result.fb_iou == pytest.approx(float(expected), abs=0.1)

    @pytest.mark.parametrize("scoring_size", [SIZE, 40, None])
    @pytest.mark.parametrize("rule", SHOT_RULES)
    def test_one_way_is_the_one_way_evaluation(
        self, segmenter: FewShotSegmenter, tiny_backbone: Backbone, rule: ShotRule, scoring_size: int | None
    ) -> None:
        alone = EpisodeSampler(PAIRS, shots=2, seed=1, length=6, order="random", repeat_supports=False)
        episodes = cached(tiny_backbone, alone)
        expected = evaluate(
            segmenter, episodes, scoring_size=scoring_size, source=ORIGINAL, shot_rule=rule, repeats=2, fit="pad"
        )
        found = evaluate_n_way(
            segmenter,
            episodes,
            ways=1,
            scoring_size=scoring_size,
            source=ORIGINAL,
            shot_rule=rule,
            repeats=2,
            fit="pad",
        )
        assert (found.result, found.repeats) == (expected.result, expected.repeats)
        assert found.way_iou[:, 0].tolist() == expected.episode_iou.tolist()
        assert found.specs == tuple((spec,) for spec in expected.specs)

    @pytest.mark.parametrize("scoring_size", [SIZE, None])
    def test_one_shot_gives_the_same_by_all_rules(
        self, segmenter: FewShotSegmenter, tiny_backbone: Backbone, scoring_size: int | None
    ) -> None:
        """Also by votes, where ways that both say yes are told apart by their logits."""
        episodes = cached(tiny_backbone, draw(shots=1))
        results = [
            evaluate_n_way(
                segmenter, episodes, ways=WAYS, scoring_size=scoring_size, source=ORIGINAL, shot_rule=rule
            ).result
            for rule in SHOT_RULES
        ]
        assert results[1:] == results[:-1]

    @pytest.mark.parametrize("rule", SHOT_RULES)
    def test_the_place_of_a_way_does_not_matter(
        self, segmenter: FewShotSegmenter, tiny_backbone: Backbone, rule: ShotRule
    ) -> None:
        specs = draw()
        turned = [specs[n * WAYS + way] for n in range(LENGTH) for way in (2, 0, 1)]
        one, two = (
            evaluate_n_way(
                segmenter, cached(tiny_backbone, own), ways=WAYS, scoring_size=SIZE, source=SQUARE, shot_rule=rule
            )
            for own in (specs, turned)
        )
        assert two.result.per_class == pytest.approx(one.result.per_class, abs=0.1)  # a batch rounds by place
        np.testing.assert_allclose(two.way_iou, one.way_iou[:, [2, 0, 1]], atol=0.2)

    @pytest.mark.parametrize("scoring_size", [SIZE, None])
    def test_batch_size_does_not_matter(
        self, segmenter: FewShotSegmenter, tiny_backbone: Backbone, scoring_size: int | None
    ) -> None:
        episodes = cached(tiny_backbone, draw())
        one, many = (
            evaluate_n_way(
                segmenter, episodes, ways=WAYS, scoring_size=scoring_size, source=ORIGINAL, batch_size=batch_size
            )
            for batch_size in (1, LENGTH)
        )
        assert one.specs == many.specs
        np.testing.assert_allclose(one.way_iou, many.way_iou, atol=0.2)

    def test_repeats(self, segmenter: FewShotSegmenter, tiny_backbone: Backbone) -> None:
        specs = draw(length=4)
        halves = [
            evaluate_n_way(segmenter, cached(tiny_backbone, own), ways=WAYS, scoring_size=SIZE, source=SQUARE).result
            for own in (specs[: 2 * WAYS], specs[2 * WAYS :])
        ]
        found = evaluate_n_way(
            segmenter,
            cached(tiny_backbone, specs),
            ways=WAYS,
            scoring_size=SIZE,
            source=SQUARE,
            repeats=2,
            batch_size=2,
        )
        assert found.repeats == tuple(halves)
        assert found.result == mean_result(halves)

    def test_progress_counts_episodes(
        self, segmenter: FewShotSegmenter, tiny_backbone: Backbone, capsys: pytest.CaptureFixture[str]
    ) -> None:
        evaluate_n_way(
            segmenter, cached(tiny_backbone, draw()), ways=WAYS, scoring_size=16, source=SQUARE, show_progress=True
        )
        assert f"{LENGTH}/{LENGTH}" in capsys.readouterr().err

    def test_bad_requests(self, segmenter: FewShotSegmenter, tiny_backbone: Backbone) -> None:
        specs = draw(length=4)

        def refused(message: str, own: Sequence[EpisodeSpec] = specs, **changes: object) -> None:
            arguments = {"ways": WAYS, "scoring_size": SIZE, "source": SQUARE} | changes
            with pytest.raises(DataError, match=message):
                evaluate_n_way(segmenter, cached(tiny_backbone, own), **arguments)  # type: ignore[arg-type]

        refused(r"number of ways must be in 1\.\.254, got 0", ways=0)
        refused("12 one-way episodes are no whole number of 5-way episodes", ways=5)
        refused("4 episodes cannot be scored as 3 equal repeats", repeats=3)
        refused("no K-shot rule 'median'", shot_rule="median")
        refused("share the query and have distinct classes; got queries .* draw the episodes with NWaySampler", ways=4)
        refused(r"got queries \['\S+'\] and classes \[(\d), \1, \1\]", [specs[0]] * WAYS)


class TestMasks:
    @settings(deadline=None, max_examples=60)
    @given(st.integers(1, 4), st.integers(0, 2**16))
    def test_plain_loop(self, ways: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        margins, means = (torch.randint(-2, 3, (2, ways, 3, 4), generator=generator) / 2 for _ in range(2))
        class_ids = torch.stack([torch.randperm(9, generator=generator)[:ways] for _ in range(2)])
        found = n_way_masks(margins, means, class_ids)
        assert found.shape == (2, 3, 4)
        for b in range(2):
            for y in range(3):
                for x in range(4):
                    ranked = sorted(
                        range(ways),
                        key=lambda way: (-margins[b, way, y, x], -means[b, way, y, x], class_ids[b, way]),
                    )
                    best = ranked[0]
                    assert found[b, y, x] == (best + 1 if margins[b, best, y, x] > 0 else 0)

    def test_the_background_wins_ties(self) -> None:
        zeros = torch.zeros(1, 2, 1, 1)
        assert n_way_masks(zeros, zeros + 5, torch.tensor([[1, 2]])).item() == 0


class TestTargets:
    @settings(deadline=None, max_examples=60)
    @given(st.integers(1, 5), st.integers(0, 2**16))
    def test_plain_loop(self, ways: int, seed: int) -> None:
        values = torch.tensor([0, 0, 0, 1, 255], dtype=torch.uint8)
        masks = values[torch.randint(0, 5, (2, ways, 3, 4), generator=torch.Generator().manual_seed(seed))]
        found = n_way_targets(masks)
        assert found.dtype == torch.uint8
        for b in range(2):
            for y in range(3):
                for x in range(4):
                    pixel = masks[b, :, y, x].tolist()
                    expected = pixel.index(1) + 1 if 1 in pixel else 0
                    assert found[b, y, x] == (IGNORE if IGNORE in pixel or pixel.count(1) > 1 else expected)

    def test_one_way_is_the_mask(self) -> None:
        mask = torch.tensor([[0, 1, 255]], dtype=torch.uint8)
        assert torch.equal(n_way_targets(mask[None, None])[0], mask)
