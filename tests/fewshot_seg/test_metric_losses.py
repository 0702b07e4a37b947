"""Metric losses against plain loops over pairs, triplets and quadruplets, in float64."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.metric_losses import METRIC_LOSSES, MetricLossKind, build_metric_loss, quadruplet_loss

LABELS = [4, 0, 4, 2, 0, 4, 2, 9, 2, 4]  # four classes, one with a single image


def embeddings(seed: int = 0, *, count: int = len(LABELS), width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)


def labels() -> Tensor:
    return torch.tensor(LABELS)


def mean_above_zero(values: list[float]) -> float:
    above = [value for value in values if value > 0]
    return sum(above) / len(above) if above else 0.0


def squared(one: list[float], other: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(one, other, strict=True))


def cosine(one: list[float], other: list[float]) -> float:
    return sum(x * y for x, y in zip(one, other, strict=True))


def loop_pairs(points: list[list[float]], classes: list[int], mine: bool) -> tuple[list[tuple[int, int]], ...]:
    """Positive and negative pairs, mined by the rule of arXiv 1904.06627 with epsilon 0.1."""
    positive, negative = [], []
    for a in range(len(points)):
        of_class = [i for i in range(len(points)) if i != a and classes[i] == classes[a]]
        of_others = [i for i in range(len(points)) if classes[i] != classes[a]]
        if not mine:
            positive += [(a, i) for i in of_class]
            negative += [(a, i) for i in of_others]
            continue
        lowest = min((cosine(points[a], points[i]) for i in of_class), default=math.inf)
        highest = max((cosine(points[a], points[i]) for i in of_others), default=-math.inf)
        positive += [(a, i) for i in of_class if cosine(points[a], points[i]) < highest + 0.1]
        negative += [(a, i) for i in of_others if cosine(points[a], points[i]) > lowest - 0.1]
    return positive, negative


def loop_contrastive(points: list[list[float]], classes: list[int], margin: float, mine: bool) -> float:
    positive, negative = loop_pairs(points, classes, mine)
    near = [math.sqrt(squared(points[a], points[p])) for a, p in positive]
    far = [margin - math.sqrt(squared(points[a], points[n])) for a, n in negative]
    return mean_above_zero(near) + mean_above_zero(far)


def loop_triplet(points: list[list[float]], classes: list[int], margin: float, mine: bool) -> float:
    values = []
    for a, p, n in product(range(len(points)), repeat=3):
        if a == p or classes[a] != classes[p] or classes[a] == classes[n]:
            continue
        near, far = squared(points[a], points[p]), squared(points[a], points[n])
        if not mine or near < far <= near + margin:
            values.append(near - far + margin)
    return mean_above_zero(values)


def loop_quadruplet(points: list[list[float]], classes: list[int], margin: float, mine: bool) -> float:
    everyone = range(len(points))
    first, second = [], []
    for a in everyone:
        positives = [i for i in everyone if i != a and classes[i] == classes[a]]
        negatives = [i for i in everyone if classes[i] != classes[a]]
        if not positives:
            continue
        if mine:
            p = max(positives, key=lambda i: squared(points[a], points[i]))
            n1 = min(negatives, key=lambda i: squared(points[a], points[i]))
            third = [i for i in negatives if classes[i] != classes[n1]]
            n2 = min(third, key=lambda i: squared(points[n1], points[i]))
            quadruplets = [(p, n1, n2)]
        else:
            quadruplets = [t for t in product(positives, negatives, negatives) if classes[t[1]] != classes[t[2]]]
        triplets = {(p, n1) for p, n1, _ in quadruplets}
        first += [squared(points[a], points[p]) - squared(points[a], points[n]) + margin for p, n in triplets]
        for p, n1, n2 in quadruplets:
            second.append(squared(points[a], points[p]) - squared(points[n1], points[n2]) + margin / 2)
    return mean_above_zero(first) + mean_above_zero(second)


def loop_multi_similarity(points: list[list[float]], classes: list[int], margin: float, mine: bool) -> float:
    positive, negative = loop_pairs(points, classes, mine)
    total = 0.0
    for anchor in range(len(points)):
        near = sum(math.exp(-2 * (cosine(points[a], points[p]) - margin)) for a, p in positive if a == anchor)
        far = sum(math.exp(50 * (cosine(points[a], points[n]) - margin)) for a, n in negative if a == anchor)
        total += math.log1p(near) / 2 + math.log1p(far) / 50
    return total / len(points)


ORACLES = {
    "contrastive": (loop_contrastive, 1.0),
    "triplet": (loop_triplet, 0.2),
    "quadruplet": (loop_quadruplet, 0.2),
    "multi-similarity": (loop_multi_similarity, 0.5),
}


def test_every_loss_has_an_oracle() -> None:
    assert set(METRIC_LOSSES) == set(ORACLES)


@pytest.mark.parametrize("mine", [True, False])
@pytest.mark.parametrize("kind", METRIC_LOSSES)
class TestEveryLoss:
    @pytest.mark.parametrize("margin", [None, 0.35])
    @pytest.mark.parametrize("seed", range(4))
    def test_equals_plain_loops(self, kind: MetricLossKind, mine: bool, margin: float | None, seed: int) -> None:
        oracle, default = ORACLES[kind]
        expected = oracle(embeddings(seed).tolist(), LABELS, margin or default, mine)
        assert expected > 0
        actual = build_metric_loss(kind, margin=margin, mine=mine)(embeddings(seed), labels())
        assert actual.shape == ()
        assert actual.item() == pytest.approx(expected, rel=1e-10)

    def test_gradcheck(self, kind: MetricLossKind, mine: bool) -> None:
        loss = build_metric_loss(kind, mine=mine)
        assert torch.autograd.gradcheck(lambda points: loss(points, labels()), embeddings(1).requires_grad_())

    @settings(deadline=None, max_examples=20)
    @given(order=st.permutations(range(len(LABELS))), seed=st.integers(0, 2**16))
    def test_order_of_the_batch_does_not_matter(
        self, kind: MetricLossKind, mine: bool, order: list[int], seed: int
    ) -> None:
        loss = build_metric_loss(kind, mine=mine)
        torch.testing.assert_close(
            loss(embeddings(seed)[order], labels()[order]), loss(embeddings(seed), labels()), rtol=1e-9, atol=1e-12
        )

    @pytest.mark.parametrize("classes", [[0], [0, 1, 2, 3, 4]])
    def test_nothing_to_compare_gives_zero_with_a_gradient(
        self, kind: MetricLossKind, mine: bool, classes: list[int]
    ) -> None:
        """No positive pair, and unmined pair losses would rightly push: hence far embeddings."""
        points = torch.eye(5, dtype=torch.float64)[: len(classes)].requires_grad_()
        loss = build_metric_loss(kind, mine=mine)(points, torch.tensor(classes))
        loss.backward()
        assert loss.item() == pytest.approx(0.0, abs=1e-9)
        assert points.grad is not None
        assert points.grad.abs().max() < 1e-9

    def test_coinciding_embeddings_give_finite_gradients(self, kind: MetricLossKind, mine: bool) -> None:
        points = embeddings(2)[[0, 0, 0, 3, 0, 0, 3, 7, 3, 0]].requires_grad_()
        build_metric_loss(kind, mine=mine)(points, labels()).backward()
        assert points.grad is not None
        assert torch.isfinite(points.grad).all()

    def test_global_random_states_are_left_alone(self, kind: MetricLossKind, mine: bool) -> None:
        torch_state = torch.random.get_rng_state()
        numpy_state = np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
        first = build_metric_loss(kind, mine=mine)(embeddings(), labels())
        torch.manual_seed(123)
        assert torch.equal(build_metric_loss(kind, mine=mine)(embeddings(), labels()), first)
        torch.random.set_rng_state(torch_state)
        build_metric_loss(kind, mine=mine)(embeddings(), labels())
        assert torch.equal(torch.random.get_rng_state(), torch_state)
        assert (np.random.get_state()[1] == numpy_state).all()  # type: ignore[index]  # noqa: NPY002

    def test_half_precision_is_computed_in_float32(self, kind: MetricLossKind, mine: bool) -> None:
        halves = embeddings(3).half().requires_grad_()
        loss = build_metric_loss(kind, mine=mine)(halves, labels())
        assert loss.dtype == torch.float32
        loss.backward()
        assert halves.grad is not None
        assert torch.isfinite(halves.grad).all()

    def test_training_separates_the_classes(self, kind: MetricLossKind, mine: bool) -> None:
        points = embeddings(4, count=12).requires_grad_()
        classes = torch.arange(3).repeat_interleave(4)
        loss = build_metric_loss(kind, mine=mine)
        optimiser = torch.optim.Adam([points], lr=0.05)
        for _ in range(80):
            optimiser.zero_grad()
            loss(F.normalize(points, dim=1), classes).backward()
            optimiser.step()
        similarity = F.normalize(points.detach(), dim=1) @ F.normalize(points.detach(), dim=1).T
        same = classes[:, None] == classes
        assert similarity[same].min() > similarity[~same].max()

    def test_has_no_state(self, kind: MetricLossKind, mine: bool) -> None:
        assert not build_metric_loss(kind, mine=mine).state_dict()


@pytest.mark.parametrize("mine", [True, False])
@pytest.mark.parametrize("kind", ["contrastive", "triplet", "quadruplet"])
def test_perfectly_separated_is_zero(kind: MetricLossKind, mine: bool) -> None:
    """Multi-similarity alone never reaches zero unmined: it keeps pulling."""
    points = torch.eye(3, dtype=torch.float64).repeat_interleave(3, dim=0)
    classes = torch.arange(3).repeat_interleave(3)
    assert build_metric_loss(kind, mine=mine)(points, classes).item() == 0


def test_mined_multi_similarity_of_perfectly_separated_is_zero() -> None:
    points = torch.eye(3, dtype=torch.float64).repeat_interleave(3, dim=0)
    assert build_metric_loss("multi-similarity")(points, torch.arange(3).repeat_interleave(3)).item() == 0


class TestQuadruplet:
    def test_hand_worked(self) -> None:
        a, p, n1, n2 = (torch.tensor([[x], [y]]) for x, y in ((0.0, 0.0), (1.0, 0.0), (2.0, 9.0), (3.0, 0.0)))
        # row 0: [1 - 4 + 3.5] + [1 - 1 + 0.25]; row 1 violates nothing and counts for nothing
        loss = quadruplet_loss(a, p, n1, n2, margin=3.5, second_margin=0.25)
        assert loss.item() == 0.75

    def test_equals_plain_loops(self) -> None:
        a, p, n1, n2 = (embeddings(seed, count=7) for seed in range(4))
        rows = list(zip(a.tolist(), p.tolist(), n1.tolist(), n2.tolist(), strict=True))
        first = mean_above_zero([squared(r[0], r[1]) - squared(r[0], r[2]) + 0.4 for r in rows])
        second = mean_above_zero([squared(r[0], r[1]) - squared(r[2], r[3]) + 0.1 for r in rows])
        actual = quadruplet_loss(a, p, n1, n2, margin=0.4, second_margin=0.1)
        assert actual.item() == pytest.approx(first + second, rel=1e-12)

    def test_gradcheck(self) -> None:
        inputs = tuple(embeddings(seed, count=4).requires_grad_() for seed in range(4))
        assert torch.autograd.gradcheck(lambda *q: quadruplet_loss(*q, margin=0.4, second_margin=0.2), inputs)

    @pytest.mark.parametrize("mine", [True, False])
    def test_two_classes_hold_no_quadruplet(self, mine: bool) -> None:
        points = embeddings(5, count=4).requires_grad_()
        loss = build_metric_loss("quadruplet", mine=mine)(points, torch.tensor([0, 0, 1, 1]))
        loss.backward()
        assert loss.item() == 0
        assert points.grad is not None
        assert not points.grad.any()


class TestErrors:
    def test_unknown_kind(self) -> None:
        with pytest.raises(DataError, match="unknown metric loss 'pairs'; known: contrastive, triplet, quadruplet, mu"):
            build_metric_loss("pairs")  # type: ignore[arg-type]

    @pytest.mark.parametrize("margin", [0.0, -1.0, math.inf, math.nan])
    def test_margin(self, margin: float) -> None:
        with pytest.raises(DataError, match=f"margin of the metric loss must be a number above 0, got {margin}"):
            build_metric_loss("triplet", margin=margin)

    @pytest.mark.parametrize("shape", [(9,), (10, 1), ()])
    def test_shape_of_labels(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(DataError, match=r"one label per embedding, shape \(10,\), got shape"):
            build_metric_loss("triplet")(embeddings(), torch.zeros(shape, dtype=torch.long))

    @pytest.mark.parametrize("shape", [(0, 3), (10,), (10, 3, 1)])
    def test_shape_of_embeddings(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(DataError, match=r"embeddings \(N, D\) with N >= 1, got shape"):
            build_metric_loss("triplet")(torch.zeros(shape), torch.zeros(10, dtype=torch.long))

    def test_kind_of_labels(self) -> None:
        with pytest.raises(DataError, match=r"integer labels, got torch\.float32"):
            build_metric_loss("triplet")(embeddings(), torch.zeros(10))
