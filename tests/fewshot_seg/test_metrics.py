"""Scores against hand-worked values, plain loops, torchmetrics and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score, roc_auc_score
from torch import Tensor
from torchmetrics.classification import BinaryJaccardIndex, MulticlassJaccardIndex

from fewshot_seg.metrics import EpisodeIoU, IoUResult, intersection_union, mean_result
from fewshot_seg.prior_evaluation import prior_scores


def episodes(count: int, *, seed: int, side: int = 7) -> tuple[Tensor, Tensor, list[int]]:
    """Random predictions, targets with ignored pixels, class ids of three classes."""
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.rand(count, side, side, generator=generator) < 0.4
    values = torch.tensor([0, 0, 1, 1, 255], dtype=torch.uint8)
    targets = values[torch.randint(0, 5, (count, side, side), generator=generator)]
    return predictions, targets, [3 + i % 3 for i in range(count)]


def score(predictions: Tensor, targets: Tensor, class_ids: list[int]) -> EpisodeIoU:
    metric = EpisodeIoU()
    metric.update(predictions, targets, class_ids)
    return metric


class TestIntersectionUnion:
    @pytest.mark.parametrize("seed", range(3))
    def test_plain_loop(self, seed: int) -> None:
        predictions, targets, _ = episodes(4, seed=seed)
        expected = np.zeros((4, 2, 2), np.int64)
        for b in range(4):
            for y in range(7):
                for x in range(7):
                    truth, guess = int(targets[b, y, x]), int(predictions[b, y, x])
                    if truth == 255:
                        continue
                    for side in (0, 1):
                        expected[b, side, 0] += truth == side and guess == side
                        expected[b, side, 1] += truth == side or guess == side
        counts = intersection_union(predictions, targets)
        assert counts.dtype == torch.int64
        assert counts.tolist() == expected.tolist()
        assert intersection_union(predictions.to(torch.uint8), targets).tolist() == expected.tolist()

    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 2**16))
    def test_ignored_pixels_never_count(self, seed: int) -> None:
        predictions, targets, _ = episodes(3, seed=seed)
        elsewhere = torch.where(targets == 255, ~predictions, predictions)
        assert torch.equal(intersection_union(predictions, targets), intersection_union(elsewhere, targets))

    def test_shapes_must_agree(self) -> None:
        with pytest.raises(ValueError, match=r"\(1, 2, 2\) and targets \(1, 2, 3\) differ"):
            intersection_union(torch.zeros(1, 2, 2), torch.zeros(1, 2, 3))


class TestEpisodeIoU:
    def test_pools_before_it_divides(self) -> None:
        """A big episode at 5/6 and a small one at 0: pooled 5/7, mean of per-image IoU 5/12."""
        targets = torch.zeros(2, 1, 8, dtype=torch.uint8)
        targets[0, 0, :6], targets[1, 0, 0] = 1, 1
        predictions = torch.zeros(2, 1, 8)
        predictions[0, 0, :5] = 1
        result = score(predictions, targets, [4, 4]).compute()
        assert result.miou == pytest.approx(100 * 5 / 7)
        assert result.per_class == {4: pytest.approx(100 * 5 / 7)}
        background = (2 + 7) / (3 + 8)
        assert result.fb_iou == pytest.approx(100 * (5 / 7 + background) / 2)
        assert result.episodes == 2

    def test_the_two_means_can_be_a_third_apart(self) -> None:
        """Ten object pixels found out of ten, two missed out of two: pooled 10/12 = 0.83, mean per image 0.50."""
        targets = torch.zeros(2, 1, 12, dtype=torch.uint8)
        targets[0, 0, :10], targets[1, 0, :2] = 1, 1
        predictions = torch.zeros(2, 1, 12)
        predictions[0, 0, :10] = 1
        metric = score(predictions, targets, [1, 1])
        assert metric.compute().miou == pytest.approx(100 * 10 / 12)
        assert metric.episode_iou().mean() == 50.0

    def test_nothing_to_find_and_nothing_found_is_perfect(self) -> None:
        nothing = torch.zeros(1, 2, 2, dtype=torch.uint8)
        metric = score(nothing, nothing, [1])
        result = metric.compute()
        assert (result.miou, result.fb_iou, result.per_class) == (100.0, 100.0, {1: 100.0})
        assert metric.episode_iou().tolist() == [100.0]
        missed = score(1 - nothing, nothing, [1])  # something found where nothing is
        assert missed.compute().miou == 0
        assert missed.episode_iou().tolist() == [0.0]
        ignored = score(nothing, nothing + 255, [1])
        assert ignored.compute().miou == 100.0

    def test_identical_episodes_have_an_interval_of_no_width(self) -> None:
        predictions, targets, _ = episodes(1, seed=4)
        result = score(predictions.repeat(6, 1, 1), targets.repeat(6, 1, 1), [1, 1, 1, 2, 2, 2]).compute()
        assert result.miou_low == pytest.approx(result.miou, rel=1e-12)
        assert result.miou_high == pytest.approx(result.miou, rel=1e-12)
        assert result.fb_iou_low == pytest.approx(result.fb_iou_high, rel=1e-12)

    def test_mean_over_classes_not_over_episodes(self) -> None:
        targets = torch.ones(3, 1, 4, dtype=torch.uint8)
        predictions = torch.tensor([[[1, 1, 1, 1]], [[1, 1, 1, 1]], [[1, 0, 0, 0]]])
        result = score(predictions, targets, [1, 1, 2]).compute()
        assert result.per_class == {1: 100.0, 2: 25.0}
        assert result.miou == 62.5
        assert result.miou_low <= result.miou <= result.miou_high

    def test_torchmetrics_on_the_pooled_pixels(self) -> None:
        predictions, targets, class_ids = episodes(9, seed=5)
        result = score(predictions, targets, class_ids).compute()
        ids = torch.tensor(class_ids)
        for class_id in (3, 4, 5):
            index = BinaryJaccardIndex(ignore_index=255)
            index.update(predictions[ids == class_id].long(), targets[ids == class_id].long())
            assert result.per_class[class_id] == pytest.approx(100 * index.compute().item(), abs=1e-4)
        valid = targets != 255
        truth, guess = (targets[valid] == 1).numpy(), predictions[valid].numpy()
        expected = (jaccard_score(truth, guess) + jaccard_score(~truth, ~guess)) / 2
        assert result.fb_iou == pytest.approx(100 * expected)
        assert result.miou == pytest.approx(np.mean(list(result.per_class.values())))

    @settings(deadline=None, max_examples=25)
    @given(st.integers(0, 2**16), st.integers(1, 5), st.randoms(use_true_random=False))
    def test_batching_and_order_do_not_matter(self, seed: int, batch: int, shuffler: object) -> None:
        predictions, targets, class_ids = episodes(8, seed=seed)
        expected = score(predictions, targets, class_ids).compute(resamples=2)
        order = list(range(8))
        shuffler.shuffle(order)  # type: ignore[attr-defined]
        metric = EpisodeIoU()
        for start in range(0, 8, batch):
            rows = order[start : start + batch]
            metric.update(predictions[rows], targets[rows], torch.tensor(class_ids)[rows])
        result = metric.compute(resamples=2)
        assert result == expected  # the bounds too
        assert len(metric) == 8

    def test_bootstrap_equals_a_plain_loop(self) -> None:
        predictions, targets, class_ids = episodes(7, seed=8)
        metric = score(predictions, targets, class_ids)
        result = metric.compute(resamples=4000, seed=3)
        generator = np.random.default_rng(0)  # other draws than those inside, hence the tolerance
        miou, fb_iou = [], []
        for _ in range(4000):
            rows = generator.integers(0, 7, 7).tolist()
            per_class = []
            for class_id in sorted({class_ids[row] for row in rows}):  # an absent class is left out
                pooled = sum(metric.counts[row][1] for row in rows if class_ids[row] == class_id)
                per_class.append(pooled[0] / pooled[1])
            both = sum(metric.counts[row] for row in rows)
            miou.append(100 * np.mean(per_class))
            fb_iou.append(100 * np.mean(both[:, 0] / both[:, 1]))
        assert (result.miou_low, result.miou_high) == pytest.approx(tuple(np.percentile(miou, (2.5, 97.5))), abs=0.6)
        fb_bounds = tuple(np.percentile(fb_iou, (2.5, 97.5)))
        assert (result.fb_iou_low, result.fb_iou_high) == pytest.approx(fb_bounds, abs=0.6)
        assert result.miou_low < result.miou < result.miou_high

    def test_bootstrap_interval_covers_a_known_spread(self) -> None:
        """Equal unions make mIoU of one class a mean, whose standard error is known."""
        generator = np.random.default_rng(0)
        hits = generator.integers(0, 101, 400)
        targets = torch.ones(400, 1, 100, dtype=torch.uint8)
        predictions = torch.from_numpy(np.arange(100)[None, None] < hits[:, None, None])
        result = score(predictions, targets, [1] * 400).compute(resamples=2000)
        half_width = 1.96 * hits.std() / math.sqrt(400)
        assert result.miou == pytest.approx(hits.mean())
        assert result.miou_low == pytest.approx(hits.mean() - half_width, abs=0.2 * half_width)
        assert result.miou_high == pytest.approx(hits.mean() + half_width, abs=0.2 * half_width)

    def test_interval_is_reproducible(self) -> None:
        metric = score(*episodes(9, seed=1))
        assert metric.compute(seed=1) == metric.compute(seed=1)
        assert metric.compute(seed=1).miou_low != metric.compute(seed=2).miou_low

    def test_iou_per_episode(self) -> None:
        metric = score(torch.tensor([[[1, 1, 0]], [[0, 0, 0]]]), torch.tensor([[[1, 0, 0]], [[0, 1, 1]]]), [1, 2])
        assert metric.episode_iou().tolist() == [50.0, 0.0]

    def test_bad_requests(self) -> None:
        with pytest.raises(ValueError, match="at least one episode"):
            EpisodeIoU().compute()
        with pytest.raises(ValueError, match="2 episodes and 1 class ids"):
            score(torch.zeros(2, 1, 1), torch.zeros(2, 1, 1), [1])


def way_episodes(count: int, *, seed: int, side: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Random three-way predictions and targets with ignored pixels, and class ids out of five classes."""
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randint(0, 4, (count, side, side), generator=generator)
    values = torch.tensor([0, 0, 1, 2, 3, 255], dtype=torch.uint8)
    targets = values[torch.randint(0, 6, (count, side, side), generator=generator)]
    targets[0][targets[0] == 2] = 0  # a way that the query does not show
    class_ids = torch.stack([torch.randperm(5, generator=generator)[:3] + 4 for _ in range(count)])
    return predictions, targets, class_ids


class TestSeveralWays:
    def test_plain_loop(self) -> None:
        predictions, targets, class_ids = way_episodes(6, seed=0)
        metric = EpisodeIoU(ways=3)
        metric.update(predictions[:2], targets[:2], class_ids[:2])
        metric.update(predictions[2:], targets[2:], class_ids[2:].tolist())
        sums: dict[int, list[int]] = {}
        objects, ground, each = [0, 0], [0, 0], np.zeros((6, 3))
        for b in range(6):
            for way in (1, 2, 3):
                intersection = union = 0
                for guess, truth in zip(predictions[b].flatten().tolist(), targets[b].flatten().tolist(), strict=True):
                    if truth != 255:
                        intersection += guess == way == truth
                        union += way in (guess, truth)
                each[b, way - 1] = 100 * intersection / union
                total = sums.setdefault(int(class_ids[b, way - 1]), [0, 0])
                total[0], total[1] = total[0] + intersection, total[1] + union
            for guess, truth in zip(predictions[b].flatten().tolist(), targets[b].flatten().tolist(), strict=True):
                if truth != 255:
                    objects[0] += guess > 0 and truth > 0
                    objects[1] += guess > 0 or truth > 0
                    ground[0] += guess == 0 and truth == 0
                    ground[1] += guess == 0 or truth == 0
        result = metric.compute()
        assert result.per_class == pytest.approx({c: 100 * i / u for c, (i, u) in sums.items()})
        assert result.miou == pytest.approx(np.mean([100 * i / u for i, u in sums.values()]))
        assert result.fb_iou == pytest.approx(50 * (objects[0] / objects[1] + ground[0] / ground[1]))
        assert result.episodes == len(metric) == 6
        assert metric.way_iou() == pytest.approx(each)

    def test_torchmetrics_on_the_pooled_pixels(self) -> None:
        predictions, targets, _ = way_episodes(5, seed=1)
        metric = EpisodeIoU(ways=3)
        metric.update(predictions, targets, [(9, 2, 5)] * 5)
        index = MulticlassJaccardIndex(num_classes=4, average=None, ignore_index=255)
        expected = index(predictions, targets.long())[1:].tolist()
        assert metric.compute().per_class == pytest.approx(
            {c: 100 * v for c, v in zip((9, 2, 5), expected, strict=True)}, abs=1e-4
        )

    def test_one_way_is_the_binary_score(self) -> None:
        predictions, targets, class_ids = episodes(6, seed=3)
        one = EpisodeIoU(ways=1)
        one.update(predictions.long(), targets, torch.tensor(class_ids)[:, None])
        expected = score(predictions, targets, class_ids)
        assert one.compute() == expected.compute()
        assert one.way_iou()[:, 0].tolist() == one.episode_iou().tolist() == expected.episode_iou().tolist()

    def test_the_place_of_a_way_does_not_matter(self) -> None:
        predictions, targets, class_ids = way_episodes(5, seed=2)
        turned_targets = targets.clone()
        turned_predictions = predictions.clone()
        for new, old in enumerate((3, 1, 2), start=1):
            turned_targets[targets == old] = new
            turned_predictions[predictions == old] = new
        metric, turned = EpisodeIoU(ways=3), EpisodeIoU(ways=3)
        metric.update(predictions, targets, class_ids)
        turned.update(turned_predictions, turned_targets, class_ids[:, [2, 0, 1]])
        found, expected = turned.compute(resamples=2), metric.compute(resamples=2)
        assert (found.miou, found.per_class, found.fb_iou) == (expected.miou, expected.per_class, expected.fb_iou)

    def test_the_bootstrap_draws_episodes_not_ways(self) -> None:
        """Two ways that are equally good in every episode: drawn singly, the interval would be narrower by 2 ** 0.5."""
        hits = np.random.default_rng(0).integers(0, 101, 400)
        line = torch.from_numpy(np.arange(100) < hits[:, None])
        predictions = torch.cat([line, 2 * line], dim=1)[:, None]
        targets = torch.cat([torch.ones(400, 100), torch.full((400, 100), 2)], dim=1).to(torch.uint8)[:, None]
        metric = EpisodeIoU(ways=2)
        metric.update(predictions, targets, [(1, 2)] * 400)
        result = metric.compute(resamples=2000)
        half_width = 1.96 * hits.std() / math.sqrt(400)
        assert result.miou == pytest.approx(hits.mean())
        assert result.miou_low == pytest.approx(hits.mean() - half_width, abs=0.15 * half_width)
        assert result.miou_high == pytest.approx(hits.mean() + half_width, abs=0.15 * half_width)

    def test_bad_requests(self) -> None:
        with pytest.raises(ValueError, match="at least 1 way, got 0"):
            EpisodeIoU(ways=0)
        metric = EpisodeIoU(ways=3)
        with pytest.raises(ValueError, match=r"class ids of 3-way episodes have shape \(B, 3\), got \(2, 2\)"):
            metric.update(torch.zeros(2, 1, 1), torch.zeros(2, 1, 1), [[1, 2], [1, 2]])


class TestRepeats:
    def test_parts_are_the_episodes_in_order(self) -> None:
        predictions, targets, class_ids = episodes(6, seed=9)
        parts = score(predictions, targets, class_ids).split(3)
        assert len(parts) == 3
        for k, part in enumerate(parts):
            rows = slice(2 * k, 2 * k + 2)
            assert part.compute() == score(predictions[rows], targets[rows], class_ids[rows]).compute()

    @pytest.mark.parametrize("parts", [0, 4])
    def test_parts_must_be_equal(self, parts: int) -> None:
        with pytest.raises(ValueError, match=f"6 episodes cannot be divided into {parts} equal parts"):
            score(*episodes(6, seed=9)).split(parts)

    def test_mean_of_results_by_hand(self) -> None:
        one = IoUResult(
            miou=60, miou_low=57, miou_high=63, fb_iou=70, fb_iou_low=69, fb_iou_high=73, per_class={1: 50}, episodes=5
        )
        two = IoUResult(
            miou=50,
            miou_low=46,
            miou_high=54,
            fb_iou=80,
            fb_iou_low=80,
            fb_iou_high=80,
            episodes=7,
            per_class={1: 40, 2: 60},
        )
        mean = mean_result([one, two])
        assert (mean.miou, mean.fb_iou, mean.episodes) == (55, 75, 12)
        assert mean.per_class == {1: 45, 2: 60}
        assert (mean.miou_low, mean.miou_high) == pytest.approx((52.5, 57.5))  # half of (3, 4, 5)
        assert (mean.fb_iou_low, mean.fb_iou_high) == pytest.approx((74, 76))

    def test_independent_repeats_agree_with_one_long_run(self) -> None:
        """Four parts of one class with equal unions: the mean's interval is that of all episodes together."""
        hits = np.random.default_rng(1).integers(0, 101, 800)
        targets = torch.ones(800, 1, 100, dtype=torch.uint8)
        metric = score(torch.from_numpy(np.arange(100)[None, None] < hits[:, None, None]), targets, [1] * 800)
        mean, whole = mean_result([part.compute() for part in metric.split(4)]), metric.compute()
        assert mean.miou == pytest.approx(whole.miou)
        assert mean.miou_high - mean.miou_low == pytest.approx(whole.miou_high - whole.miou_low, rel=0.1)

    def test_a_single_result_stays_as_it_is(self) -> None:
        result = score(*episodes(4, seed=2)).compute()
        assert mean_result([result]) is result

    def test_nothing_to_average(self) -> None:
        with pytest.raises(ValueError, match="at least one result"):
            mean_result([])


class TestPriorScores:
    def test_hand_worked(self) -> None:
        target = torch.tensor([[1, 0, 1, 0, 255]], dtype=torch.uint8)
        prior = torch.tensor([[0.9, 0.8, 0.3, 0.3, 1.0]])
        # pairs: 0.9 beats both; 0.3 loses to 0.8, ties with 0.3: (1 + 1 + 0 + 0.5) / 4
        # thresholds: 0.9 -> 1/2, 0.8 -> 1/3, 0.3 -> 2/4
        assert prior_scores(prior, target) == (0.625, 0.5)

    @settings(deadline=None, max_examples=50)
    @given(st.integers(0, 2**16), st.integers(1, 12))
    def test_scikit_learn_and_a_plain_loop_over_thresholds(self, seed: int, levels: int) -> None:
        _, targets, _ = episodes(1, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        prior = torch.randint(0, levels, (7, 7), generator=generator) / levels  # many ties
        valid = targets[0] != 255
        truth, values = (targets[0][valid] == 1).numpy(), prior[valid].numpy()
        if truth.all() or not truth.any():
            return
        best = max((truth & (values >= t)).sum() / (truth | (values >= t)).sum() for t in set(values))
        auc, best_iou = prior_scores(prior, targets[0])
        assert auc == pytest.approx(roc_auc_score(truth, values), abs=1e-12)
        assert best_iou == pytest.approx(best, abs=1e-12)

    def test_only_the_order_matters(self) -> None:
        _, targets, _ = episodes(1, seed=2)
        prior = torch.rand(7, 7, generator=torch.Generator().manual_seed(2))
        assert prior_scores(prior, targets[0]) == pytest.approx(prior_scores(prior.mul(9).exp() - 7, targets[0]))

    @pytest.mark.parametrize("value", [0, 1, 255])
    def test_one_sided_targets_have_no_score(self, value: int) -> None:
        auc, best_iou = prior_scores(torch.rand(2, 2), torch.full((2, 2), value, dtype=torch.uint8))
        assert math.isnan(auc)
        assert math.isnan(best_iou)

    def test_bad_requests(self) -> None:
        with pytest.raises(ValueError, match="differ in shape"):
            prior_scores(torch.rand(2, 2), torch.zeros(4, 4))
        with pytest.raises(ValueError, match="prior holds NaN"):
            prior_scores(torch.full((1, 2), math.nan), torch.tensor([[0, 1]]))
