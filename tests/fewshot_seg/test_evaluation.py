"""Evaluation against plain loops over single episodes."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.index import build_index
from episodes.protocols import Fit, ShotRule
from episodes.sampler import EpisodeSampler
from episodes.sources import SyntheticSource
from episodes.types import IGNORE, DataError, EpisodeSpec, UInt8Array
from fewshot_seg.attention import ATTENTION_KINDS
from fewshot_seg.backbones import Backbone
from fewshot_seg.decoder import PriorReadout
from fewshot_seg.evaluation import (
    Evaluation,
    choose_threshold,
    choose_thresholds,
    evaluate,
    evaluate_heads,
)
from fewshot_seg.feature_episodes import CachedEpisodes, FeatureBatch
from fewshot_seg.features import FeatureStore, MaskStore
from fewshot_seg.metrics import mean_result
from fewshot_seg.prior_evaluation import evaluate_priors, prior_scores
from fewshot_seg.priors import PRIOR_CHANNELS
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter, training_free
from fewshot_seg.similarity import cell_weights

SIZE, LENGTH = 64, 9


class WideMasks(SyntheticSource):
    """Labels at an original size of their own, with an ignored border."""

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        wide = super().mask(image_id, class_id).repeat(2, axis=1)[: 40 + 2 * int(image_id[-1])]
        wide[:3] = IGNORE
        return wide


SOURCE = WideMasks(base_classes=3, novel_classes=2, images_per_class=4, size=SIZE)
SQUARE = SyntheticSource(base_classes=3, novel_classes=2, images_per_class=4, size=SIZE)


def draw_specs(*, shots: int, length: int, seed: int = 3) -> tuple[EpisodeSpec, ...]:
    pairs = build_index(SQUARE, "train").pairs(SQUARE.base_class_ids)
    return EpisodeSampler(pairs, shots=shots, seed=seed, length=length, order="random", repeat_supports=False)[:]


def cached(backbone: Backbone, specs: Sequence[EpisodeSpec]) -> CachedEpisodes:
    store = FeatureStore(backbone, SQUARE, size=SIZE, directory=None)
    return CachedEpisodes(store, MaskStore(SQUARE, size=SIZE), specs)


def draw(backbone: Backbone, *, shots: int, length: int, seed: int = 3) -> CachedEpisodes:
    return cached(backbone, draw_specs(shots=shots, length=length, seed=seed))


@pytest.fixture(scope="module")
def episodes(tiny_backbone: Backbone) -> CachedEpisodes:
    return draw(tiny_backbone, shots=2, length=LENGTH)


@pytest.fixture(scope="module")
def draw_one(tiny_backbone: Backbone) -> CachedEpisodes:
    return draw(tiny_backbone, shots=1, length=1, seed=0)


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
def loop_logits(segmenter: FewShotSegmenter, episodes: CachedEpisodes, side: int) -> Iterator[tuple[EpisodeSpec, Any]]:
    """Logits (side, side) of one episode at a time."""
    for batch in episodes.batches(1):
        support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks)
        logits = segmenter.segment_levels(support, batch.query_levels, (side, side)).logits[0]
        yield batch.specs[0], logits


def filled_rows(target: UInt8Array) -> int:
    """Rows of the square that a padded wide photo fills."""
    assert target.shape[1] > target.shape[0]
    return SIZE * target.shape[0] // target.shape[1]  # even heights, twice the square's width: exact


def count(prediction: Tensor, target: UInt8Array, value: int) -> tuple[int, int]:
    """Intersection and union of one side, pixel by pixel."""
    intersection = union = 0
    for found, actual in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True):
        if actual != IGNORE:
            intersection += found == value and actual == value
            union += found == value or actual == value
    return intersection, union


def assert_equals_loop(
    evaluation: Evaluation, counts: list[tuple[EpisodeSpec, tuple[int, int], tuple[int, int]]]
) -> None:
    """counts: spec, foreground and background intersection and union of every episode."""
    assert evaluation.specs == tuple(spec for spec, _, _ in counts)
    assert evaluation.episode_iou.tolist() == pytest.approx([100 * i / u for _, (i, u), _ in counts])
    per_class = {}
    for class_id in {spec.class_id for spec, _, _ in counts}:
        own = [foreground for spec, foreground, _ in counts if spec.class_id == class_id]
        per_class[class_id] = 100 * sum(i for i, _ in own) / sum(u for _, u in own)
    result = evaluation.result
    assert result.per_class == pytest.approx(per_class)
    assert result.miou == pytest.approx(statistics.mean(per_class.values()))
    both = ([foreground for _, foreground, _ in counts], [background for _, _, background in counts])
    sides = [100 * sum(i for i, _ in side) / sum(u for _, u in side) for side in both]
    assert result.fb_iou == pytest.approx(statistics.mean(sides))
    assert result.episodes == len(counts)
    assert result.miou_low <= result.miou <= result.miou_high
    assert 1 < result.miou < 99  # or the comparison would say nothing


class TestEvaluate:
    @pytest.mark.parametrize("side", [SIZE, 40])
    def test_equals_a_plain_loop(self, segmenter: FewShotSegmenter, episodes: CachedEpisodes, side: int) -> None:
        counts = []
        for spec, logits in loop_logits(segmenter, episodes, side):
            mask = SQUARE.mask(spec.query_id, spec.class_id)
            rows = [math.floor((y + 0.5) * SIZE / side) for y in range(side)]  # nearest pixel
            target, found = mask[np.ix_(rows, rows)], (logits > 0.3).int()
            counts.append((spec, count(found, target, 1), count(found, target, 0)))
        evaluation = evaluate(segmenter, episodes, scoring_size=side, source=SQUARE, batch_size=4)
        assert_equals_loop(evaluation, counts)
        assert evaluation.seconds > 0

    def test_at_the_original_sizes_equals_a_plain_loop(
        self, segmenter: FewShotSegmenter, episodes: CachedEpisodes
    ) -> None:
        counts = []
        for spec, logits in loop_logits(segmenter, episodes, SIZE):
            target = SOURCE.mask(spec.query_id, spec.class_id)
            assert target.shape[0] != target.shape[1]
            original = F.interpolate(logits[None, None], target.shape, mode="bilinear", align_corners=False)[0, 0]
            found = (original > 0.3).int()
            counts.append((spec, count(found, target, 1), count(found, target, 0)))
        assert_equals_loop(evaluate(segmenter, episodes, scoring_size=None, source=SOURCE, batch_size=4), counts)

    @pytest.mark.parametrize("scoring_size", [SIZE, None])
    def test_batch_size_does_not_matter(
        self, segmenter: FewShotSegmenter, episodes: CachedEpisodes, scoring_size: int | None
    ) -> None:
        one, many = (
            evaluate(segmenter, episodes, scoring_size=scoring_size, source=SOURCE, batch_size=size)
            for size in (1, LENGTH)
        )
        assert one.specs == many.specs
        # a batch rounds differently: a pixel on the border may change sides
        np.testing.assert_allclose(one.episode_iou, many.episode_iou, atol=0.2)
        assert one.result.miou == pytest.approx(many.result.miou, abs=0.1)

    def test_several_heads_in_one_pass(self, segmenter: FewShotSegmenter, episodes: CachedEpisodes) -> None:
        heads = {"ours": (segmenter.decoder, 0.3), "prior": (PriorReadout(1), -0.5), "same": (PriorReadout(1), 4.0)}
        together = evaluate_heads(segmenter, heads, episodes, scoring_size=SIZE, source=SQUARE)
        alone = evaluate(segmenter, episodes, scoring_size=SIZE, source=SQUARE)
        assert together["ours"].result == alone.result
        assert together["prior"].result.miou != together["same"].result.miou
        for name in ("prior", "same"):
            readout = FewShotSegmenter(
                backbone=segmenter.backbone,
                similarity=segmenter.similarity,
                decoder=PriorReadout(1),
                threshold=heads[name][1],
            )
            assert together[name].result == evaluate(readout, episodes, scoring_size=SIZE, source=SQUARE).result

    def test_changes_neither_model_nor_randomness(self, segmenter: FewShotSegmenter, episodes: CachedEpisodes) -> None:
        before = {name: tensor.clone() for name, tensor in segmenter.state_dict().items()}
        state = torch.get_rng_state()
        evaluate(segmenter, episodes, scoring_size=SIZE, source=SQUARE)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(tensor, before[name]) for name, tensor in segmenter.state_dict().items())
        assert all(parameter.grad is None for parameter in segmenter.parameters())

    def test_progress_goes_to_stderr(
        self, segmenter: FewShotSegmenter, episodes: CachedEpisodes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        evaluate(segmenter, episodes, scoring_size=SIZE, source=SQUARE)
        assert capsys.readouterr().err == ""
        evaluate(segmenter, episodes, scoring_size=SIZE, source=SQUARE, show_progress=True)
        captured = capsys.readouterr()
        assert "evaluating" in captured.err
        assert f"{LENGTH}/{LENGTH}" in captured.err
        assert captured.out == ""


@torch.no_grad()
def one_shot_logits(segmenter: FewShotSegmenter, batch: FeatureBatch, side: int) -> Tensor:
    """Logits (K, side, side) of a single episode's supports, each as if it were the only one."""
    found = []
    for k in range(batch.support_masks.shape[1]):
        support = segmenter.encode_support_levels(
            tuple(level[k : k + 1] for level in batch.support_levels), batch.support_masks[:, k : k + 1]
        )
        found.append(segmenter.segment_levels(support, batch.query_levels, (side, side)).logits[0])
    return torch.stack(found)


def loop_merge(rule: ShotRule, logits: Tensor, batch: FeatureBatch, threshold: float) -> Tensor:
    """bool (H, W) of one episode by the words of the rule."""
    if rule == "vote":
        votes = sum((one > threshold).float() for one in logits)
        assert isinstance(votes, Tensor)
        return votes / max(1.0, votes.max().item()) >= 0.5
    weights = torch.full((len(logits),), 1 / len(logits))
    if rule == "reweighted":
        query = F.normalize(batch.query_levels[0][0].flatten(1), dim=1)
        supports = [F.normalize(one.flatten(1), dim=1) for one in batch.support_levels[0]]
        distances = torch.stack([(query @ query.T - one @ one.T).square().sum().sqrt() for one in supports])
        weights = (-distances / distances.mean()).exp()
        weights /= weights.sum()
    return sum(weight * one for weight, one in zip(weights, logits, strict=True)) > threshold  # type: ignore[operator]


ONE_BY_ONE: tuple[ShotRule, ...] = ("vote", "mean", "reweighted")


class TestShotRules:
    @pytest.mark.parametrize("rule", ONE_BY_ONE)
    def test_at_the_square_equals_a_plain_loop(
        self, segmenter: FewShotSegmenter, episodes: CachedEpisodes, rule: ShotRule
    ) -> None:
        counts = []
        for batch in episodes.batches(1):
            spec = batch.specs[0]
            found = loop_merge(rule, one_shot_logits(segmenter, batch, SIZE), batch, 0.3).int()
            target = SQUARE.mask(spec.query_id, spec.class_id)
            counts.append((spec, count(found, target, 1), count(found, target, 0)))
        evaluation = evaluate(segmenter, episodes, scoring_size=SIZE, source=SQUARE, shot_rule=rule, batch_size=4)
        assert_equals_loop(evaluation, counts)
        pooled = evaluate(segmenter, episodes, scoring_size=SIZE, source=SQUARE)
        assert evaluation.result.miou != pooled.result.miou

    @pytest.mark.parametrize("fit", ["squash", "pad"])
    @pytest.mark.parametrize("rule", ONE_BY_ONE)
    def test_at_the_original_sizes_equals_a_plain_loop(
        self, segmenter: FewShotSegmenter, episodes: CachedEpisodes, rule: ShotRule, fit: Fit
    ) -> None:
        counts = []
        for batch in episodes.batches(1):
            spec = batch.specs[0]
            target = SOURCE.mask(spec.query_id, spec.class_id)
            logits = one_shot_logits(segmenter, batch, SIZE)[:, : filled_rows(target) if fit == "pad" else SIZE]
            logits = F.interpolate(logits[None], target.shape, mode="bilinear", align_corners=False)[0]
            found = loop_merge(rule, logits, batch, 0.3).int()
            counts.append((spec, count(found, target, 1), count(found, target, 0)))
        evaluation = evaluate(
            segmenter, episodes, scoring_size=None, source=SOURCE, fit=fit, shot_rule=rule, batch_size=4
        )
        assert_equals_loop(evaluation, counts)

    @pytest.mark.parametrize("scoring_size", [SIZE, None])
    def test_one_shot_gives_the_same_by_all_rules(
        self, segmenter: FewShotSegmenter, tiny_backbone: Backbone, scoring_size: int | None
    ) -> None:
        episodes = draw(tiny_backbone, shots=1, length=6)
        expected = evaluate(segmenter, episodes, scoring_size=scoring_size, source=SOURCE)
        for rule in ONE_BY_ONE:
            found = evaluate(segmenter, episodes, scoring_size=scoring_size, source=SOURCE, shot_rule=rule)
            assert found.result == expected.result

    @pytest.mark.parametrize("rule", ONE_BY_ONE)
    def test_several_heads_in_one_pass(
        self, segmenter: FewShotSegmenter, episodes: CachedEpisodes, rule: ShotRule
    ) -> None:
        heads = {"ours": (segmenter.decoder, 0.3), "prior": (PriorReadout(1), -0.5)}
        together = evaluate_heads(segmenter, heads, episodes, scoring_size=SIZE, source=SQUARE, shot_rule=rule)
        alone = evaluate(segmenter, episodes, scoring_size=SIZE, source=SQUARE, shot_rule=rule)
        assert together["ours"].result == alone.result != together["prior"].result

    def test_unknown_rule(self, segmenter: FewShotSegmenter, episodes: CachedEpisodes) -> None:
        with pytest.raises(DataError, match="no K-shot rule 'median'"):
            evaluate(segmenter, episodes, scoring_size=SIZE, source=SQUARE, shot_rule="median")  # type: ignore[arg-type]
        with pytest.raises(DataError, match="no K-shot rule 'median'"):
            choose_threshold(segmenter, episodes, shot_rule="median")  # type: ignore[arg-type]


class TestPadding:
    def test_only_the_filled_part_is_enlarged(self, segmenter: FewShotSegmenter, episodes: CachedEpisodes) -> None:
        counts = []
        for spec, logits in loop_logits(segmenter, episodes, SIZE):
            target = SOURCE.mask(spec.query_id, spec.class_id)
            filled = logits[None, None, : filled_rows(target)]
            found = (F.interpolate(filled, target.shape, mode="bilinear", align_corners=False)[0, 0] > 0.3).int()
            counts.append((spec, count(found, target, 1), count(found, target, 0)))
        evaluation = evaluate(segmenter, episodes, scoring_size=None, source=SOURCE, fit="pad", batch_size=4)
        assert_equals_loop(evaluation, counts)
        squashed = evaluate(segmenter, episodes, scoring_size=None, source=SOURCE)
        assert squashed.result.miou != evaluation.result.miou

    @pytest.mark.parametrize("tall", [False, True])
    def test_an_object_found_in_the_square_is_found_in_the_photo(self, tiny_backbone: Backbone, tall: bool) -> None:
        """Cells of the object are known exactly; the photo fills the upper or the left half of the square."""

        class Originals(SyntheticSource):
            def mask(self, image_id: str, class_id: int) -> UInt8Array:
                del image_id, class_id
                cells = np.zeros((4, 4), np.uint8)
                cells[1:3, :2] = 1
                half = cells[:, :2] if tall else cells[:2]
                return half.repeat(50, axis=0).repeat(50, axis=1)

        class OneObject(Planted):
            def __len__(self) -> int:
                return 1

            def batch(self, numbers: range) -> FeatureBatch:
                del numbers
                return super().batch(range(1, 2))  # cells (1, 0) to (2, 1)

        planted = OneObject(tiny_backbone)
        segmenter = training_free(tiny_backbone, channel="prototype similarity").eval()
        batch = next(planted.batches(1))
        support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks)
        values = segmenter.segment_levels(support, batch.query_levels, (4, 4)).logits
        segmenter.threshold = float(values.min() + values.max()) / 2
        score = evaluate(segmenter, planted, scoring_size=None, source=Originals(), fit="pad")
        squashed = evaluate(segmenter, planted, scoring_size=None, source=Originals())
        assert score.result.miou > 85 > 60 > squashed.result.miou  # not 100: few cells, enlarged


class TestRepeats:
    def test_parts_are_scored_on_their_own(self, segmenter: FewShotSegmenter, tiny_backbone: Backbone) -> None:
        specs = draw_specs(shots=2, length=9)
        parts = [
            evaluate(segmenter, cached(tiny_backbone, specs[k : k + 3]), scoring_size=SIZE, source=SQUARE)
            for k in (0, 3, 6)
        ]
        found = evaluate(
            segmenter, cached(tiny_backbone, specs), scoring_size=SIZE, source=SQUARE, repeats=3, batch_size=3
        )
        assert found.repeats == tuple(part.result for part in parts)
        assert found.result == mean_result(found.repeats)
        assert found.specs == specs
        assert found.episode_iou.tolist() == [iou for part in parts for iou in part.episode_iou]
        # batches that reach over the border of two parts
        crossing = evaluate(
            segmenter, cached(tiny_backbone, specs), scoring_size=SIZE, source=SQUARE, repeats=3, batch_size=4
        )
        assert crossing.result.miou == pytest.approx(found.result.miou, abs=0.1)
        assert [part.episodes for part in crossing.repeats] == [3, 3, 3]

    def test_a_single_one_is_the_result(self, segmenter: FewShotSegmenter, episodes: CachedEpisodes) -> None:
        evaluation = evaluate(segmenter, episodes, scoring_size=SIZE, source=SQUARE)
        assert evaluation.repeats == (evaluation.result,)

    @pytest.mark.parametrize("repeats", [0, 2, 18])
    def test_must_be_equal_parts(self, segmenter: FewShotSegmenter, episodes: CachedEpisodes, repeats: int) -> None:
        with pytest.raises(DataError, match=f"9 episodes cannot be scored as {repeats} equal repeats"):
            evaluate(segmenter, episodes, scoring_size=SIZE, source=SQUARE, repeats=repeats)


class Planted:
    """Episodes whose cells are one of two directions, by the mask: any map separates them, above no known value."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def __len__(self) -> int:
        return 4

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[FeatureBatch]:
        for first in range(start, len(self), batch_size):
            yield self.batch(range(first, min(first + batch_size, len(self))))

    def batch(self, numbers: range) -> FeatureBatch:
        cells = torch.zeros(len(numbers), 4, 4, dtype=torch.uint8)
        for row, number in enumerate(numbers):
            cells[row, 1:3, : number + 1] = 1
        levels = []
        for channels in self.backbone.channels:
            level = torch.ones(len(numbers), channels, 4, 4)
            level[:, 0] += 5 * cells
            levels.append(level)
        masks = cells.repeat_interleave(4, 1).repeat_interleave(4, 2)  # 16 x 16, a quarter of it is the grid
        specs = tuple(EpisodeSpec(class_id=1 + n % 2, support_ids=("s",), query_id="q", seed=n) for n in numbers)
        return FeatureBatch(
            support_levels=tuple(levels),
            support_masks=masks[:, None],
            support_dense=torch.ones(len(numbers), 1, dtype=torch.bool),
            support_truth=masks[:, None],
            query_levels=tuple(levels),
            query_masks=masks,
            specs=specs,
        )


class TestChooseThreshold:
    def test_equals_a_plain_loop_over_its_candidates(
        self, segmenter: FewShotSegmenter, episodes: CachedEpisodes
    ) -> None:
        side = SIZE // 4
        logits = dict(enumerate(loop_logits(segmenter, episodes, side)))
        values = np.sort(np.concatenate([one.numpy().ravel() for _, one in logits.values()]))
        low, high = np.percentile(values, 2), np.percentile(values, 98)
        scores = []
        for k in range(11):
            threshold, sums = low + (high - low) * k / 10, dict[int, list[int]]()
            for spec, one in logits.values():
                target = SQUARE.mask(spec.query_id, spec.class_id)[2::4, 2::4]
                i, u = count((one > threshold).int(), target, 1)
                total = sums.setdefault(spec.class_id, [0, 0])
                total[0], total[1] = total[0] + i, total[1] + u
            scores.append((100 * statistics.mean(i / u for i, u in sums.values()), threshold))
        threshold, miou = choose_threshold(segmenter, episodes, candidates=11, batch_size=1)
        assert miou == pytest.approx(max(scores)[0], rel=1e-6)
        assert threshold == pytest.approx(max(scores)[1], rel=1e-5)
        assert min(scores)[0] < miou

    @pytest.mark.parametrize("channel", ["prototype similarity", "soft margin"])
    def test_finds_the_planted_optimum(self, tiny_backbone: Backbone, channel: str) -> None:
        planted = Planted(tiny_backbone)
        segmenter = training_free(tiny_backbone, channel=channel).eval()
        threshold, miou = choose_threshold(segmenter, planted)
        assert miou == 100
        batch = next(planted.batches(4))
        support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks)
        values = segmenter.segment_levels(support, batch.query_levels, (4, 4)).logits
        inside = batch.query_masks[:, ::4, ::4] == 1
        assert values[~inside].max() <= threshold < values[inside].min()

    def test_the_default_threshold_would_not_do(self, tiny_backbone: Backbone) -> None:
        planted = Planted(tiny_backbone)
        segmenter = training_free(tiny_backbone, channel="prototype similarity").eval()
        before = evaluate(segmenter, planted, scoring_size=4, source=SQUARE).result.miou
        segmenter.threshold = choose_threshold(segmenter, planted)[0]
        assert before < 60
        assert evaluate(segmenter, planted, scoring_size=4, source=SQUARE).result.miou == 100

    def test_several_decoders_in_one_pass(self, segmenter: FewShotSegmenter, episodes: CachedEpisodes) -> None:
        chosen = choose_thresholds(segmenter, {"ours": segmenter.decoder, "prior": PriorReadout(1)}, episodes)
        assert chosen["ours"] == choose_threshold(segmenter, episodes)
        assert chosen["prior"] != chosen["ours"]

    @pytest.mark.parametrize("rule", ONE_BY_ONE)
    def test_is_the_best_one_for_a_shot_rule(
        self, segmenter: FewShotSegmenter, episodes: CachedEpisodes, rule: ShotRule
    ) -> None:
        threshold, miou = choose_threshold(segmenter, episodes, shot_rule=rule, batch_size=4)

        def at(value: float) -> float:
            heads = {"ours": (segmenter.decoder, value)}
            arguments: dict[str, Any] = {
                "scoring_size": SIZE // 4,
                "source": SQUARE,
                "shot_rule": rule,
                "batch_size": 4,
            }
            return evaluate_heads(segmenter, heads, episodes, **arguments)["ours"].result.miou

        assert at(threshold) == pytest.approx(miou)
        assert at(threshold - 0.1) <= miou + 0.5
        assert at(threshold + 0.1) <= miou + 0.5
        assert at(-100.0) < miou

    def test_refuses_a_single_candidate(self, segmenter: FewShotSegmenter, episodes: CachedEpisodes) -> None:
        with pytest.raises(DataError, match="needs at least 2 candidates, got 1"):
            choose_threshold(segmenter, episodes, candidates=1)


class TestEvaluatePriors:
    def test_names_every_map(self, segmenter: FewShotSegmenter, episodes: CachedEpisodes) -> None:
        scores = evaluate_priors(segmenter, episodes, kinds=ATTENTION_KINDS)
        shown = {name for name in PRIOR_CHANNELS if name != "gradient attention"} | {"nothing"}
        shown |= {"gradient attention: margin, signed", "gradient attention: soft margin, element-wise"}
        assert scores.keys() == shown | {f"gradient attention: {kind}" for kind in ATTENTION_KINDS} | {"PFENet"}
        assert scores["nothing"].auc == (0.5, 0.5, 0.5)
        for name, score in scores.items():
            assert score.episodes == LENGTH
            if name == "nothing":
                continue
            for mean, low, high in (score.auc, score.best_iou):
                assert 0 < mean < 1
                assert low < mean < high

    def test_equals_prior_scores_of_every_episode(self, segmenter: FewShotSegmenter, episodes: CachedEpisodes) -> None:
        aucs, ious = [], []
        for batch in episodes.batches(1):
            with torch.no_grad():
                support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks)
                prior = segmenter.segment_levels(support, batch.query_levels, (SIZE, SIZE)).priors[:, [2]]
            enlarged = F.interpolate(prior, (16, 16), mode="bilinear", align_corners=False)[0, 0]
            auc, iou = prior_scores(enlarged, batch.query_masks[0, 2::4, 2::4])
            aucs.append(auc)
            ious.append(iou)
        score = evaluate_priors(segmenter, episodes, kinds=(), batch_size=1)[PRIOR_CHANNELS[2]]
        for (mean, low, high), values in ((score.auc, aucs), (score.best_iou, ious)):
            assert mean == pytest.approx(statistics.mean(values))
            error = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
            assert (low, high) == pytest.approx((mean - error, mean + error))

    def test_element_wise_soft_margin_equals_plain_sums(
        self, segmenter: FewShotSegmenter, episodes: CachedEpisodes
    ) -> None:
        aucs, ious = [], []
        for batch in episodes.batches(1):
            with torch.no_grad():
                query = segmenter.similarity(batch.query_levels)[0].double().flatten(1).T.numpy()
                support = segmenter.similarity(batch.support_levels).double().permute(0, 2, 3, 1).flatten(0, 2).numpy()
            shares = [share.double().flatten().numpy() for share in cell_weights(batch.support_masks[0], (4, 4))]
            values = []
            for cell in query:
                cosines = support @ cell
                kernel = np.exp(cosines / segmenter.temperature)
                near, far = (float((share * kernel * cosines).sum() / (share * kernel).sum()) for share in shares)
                values.append(near - far)
            shown = torch.tensor(values, dtype=torch.float32).reshape(1, 1, 4, 4)
            enlarged = F.interpolate(shown, (16, 16), mode="bilinear", align_corners=False)[0, 0]
            auc, iou = prior_scores(enlarged, batch.query_masks[0, 2::4, 2::4])
            aucs.append(auc)
            ious.append(iou)
        score = evaluate_priors(segmenter, episodes, kinds=(), batch_size=3)[
            "gradient attention: soft margin, element-wise"
        ]
        assert score.auc[0] == pytest.approx(statistics.mean(aucs), abs=1e-3)
        assert score.best_iou[0] == pytest.approx(statistics.mean(ious), abs=1e-3)

    def test_signed_margin_equals_automatic_differentiation(
        self, segmenter: FewShotSegmenter, episodes: CachedEpisodes
    ) -> None:
        signed, rectified = list[tuple[float, float]](), list[tuple[float, float]]()
        for batch in episodes.batches(1):
            with torch.no_grad():
                support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks)
            maps = segmenter.similarity(batch.query_levels).detach().requires_grad_()
            embedding = F.normalize(maps.mean((2, 3)), dim=1)
            margin = (embedding * (support.foreground_embedding - support.background_embedding)).sum()
            (gradient,) = torch.autograd.grad(margin, maps)
            attention = (gradient.mean((2, 3), keepdim=True) * maps).sum(1).detach()
            for found, shown in ((signed, attention), (rectified, attention.relu())):
                enlarged = F.interpolate(shown[:, None], (16, 16), mode="bilinear", align_corners=False)[0, 0]
                found.append(prior_scores(enlarged, batch.query_masks[0, 2::4, 2::4]))
        scores = evaluate_priors(segmenter, episodes, kinds=("margin",), batch_size=4)
        for name, expected in (("margin, signed", signed), ("margin", rectified)):
            score = scores[f"gradient attention: {name}"]
            assert score.auc[0] == pytest.approx(statistics.mean(auc for auc, _ in expected), abs=1e-3)
            assert score.best_iou[0] == pytest.approx(statistics.mean(iou for _, iou in expected), abs=1e-3)
        assert signed != rectified  # ranks below zero are lost

    def test_nothing_is_the_share_of_the_object(self, segmenter: FewShotSegmenter, episodes: CachedEpisodes) -> None:
        score = evaluate_priors(segmenter, episodes, kinds=())["nothing"]
        shares = []
        for batch in episodes.batches(1):
            target = batch.query_masks[0, 2::4, 2::4]
            shares.append(float((target == 1).sum() / (target != IGNORE).sum()))
        assert score.auc == (0.5, 0.5, 0.5)
        assert score.best_iou[0] == pytest.approx(statistics.mean(shares))  # of a map whose every threshold is "all"

    def test_one_episode_has_the_widest_interval(self, segmenter: FewShotSegmenter, draw_one: CachedEpisodes) -> None:
        score = evaluate_priors(segmenter, draw_one, kinds=())["soft margin"]
        assert score.episodes == 1
        assert score.auc[1:] == score.best_iou[1:] == (0, 1)
        assert 0 <= score.auc[0] <= 1

    def test_no_episode_to_score(self, tiny_backbone: Backbone) -> None:
        class Empty(Planted):
            def batch(self, numbers: range) -> FeatureBatch:
                batch = super().batch(numbers)
                return dataclasses.replace(batch, query_masks=torch.zeros_like(batch.query_masks))

        with pytest.raises(DataError, match="no query mask shows both object and background at a quarter of its side"):
            evaluate_priors(training_free(tiny_backbone), Empty(tiny_backbone), kinds=())

    def test_second_negative_is_the_neighbours_object(
        self, segmenter: FewShotSegmenter, episodes: CachedEpisodes
    ) -> None:
        batch = next(episodes.batches(LENGTH))
        with torch.no_grad():
            support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks)
            maps = segmenter.similarity(batch.query_levels)
        ious = []
        for n in range(LENGTH):
            one = segmenter.encode_support_levels(
                tuple(level[2 * n : 2 * n + 2] for level in batch.support_levels), batch.support_masks[n : n + 1]
            )
            attention = segmenter.attention_maps(
                one, maps[n : n + 1], "quadruplet", second_negative=support.foreground_embedding[[n - 1]]
            )
            enlarged = F.interpolate(attention[:, None], (16, 16), mode="bilinear", align_corners=False)[0, 0]
            ious.append(prior_scores(enlarged, batch.query_masks[n, 2::4, 2::4])[1])
        score = evaluate_priors(segmenter, episodes, kinds=("quadruplet",), batch_size=LENGTH)
        assert score["gradient attention: quadruplet"].best_iou[0] == pytest.approx(statistics.mean(ious), abs=1e-3)

    def test_planted_objects_are_found(self, tiny_backbone: Backbone) -> None:
        scores = evaluate_priors(training_free(tiny_backbone), Planted(tiny_backbone), kinds=("margin", "cosine"))
        for name in (*PRIOR_CHANNELS[:3], "gradient attention: margin", "PFENet"):
            assert scores[name].auc[0] == pytest.approx(1), name
            assert scores[name].best_iou[0] == pytest.approx(1), name

    def test_refuses_another_prior(self, tiny_backbone: Backbone, episodes: CachedEpisodes) -> None:
        with pytest.raises(DataError, match="needs a model with prior 'similarity', got 'pfenet'"):
            evaluate_priors(build_segmenter(tiny_backbone, prior="pfenet"), episodes, kinds=())
