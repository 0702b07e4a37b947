"""Retrieval and re-identification scores against plain loops, pytorch-metric-learning and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.metrics import average_precision_score
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.retrieval_metrics import (
    Float64Array,
    bootstrap_means,
    per_query_reidentification,
    per_query_retrieval,
    reidentification_scores,
    retrieval_scores,
)

SEEDS = st.integers(0, 2**16)
Gallery = tuple[Tensor, Tensor, Tensor]


def photos(count: int, classes: int, *, seed: int, tied: bool = False) -> tuple[Tensor, Tensor]:
    """Embeddings (count, 3) and labels; `tied` draws them from few directions, with copies and zero vectors."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    if tied:
        return torch.randint(-1, 2, (count, 3), generator=generator).double(), labels
    return torch.randn(count, 3, generator=generator), labels


def people(count: int, *, seed: int, tied: bool = False) -> Gallery:
    embeddings, labels = photos(count, 4, seed=seed, tied=tied)
    return embeddings, labels, torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed + 1))


def cosine(first: Tensor, second: Tensor) -> float:
    """Written out; rounded as the module promises, so that ties are ties."""
    pairs = list(zip(first.double().tolist(), second.double().tolist(), strict=True))
    lengths = math.sqrt(sum(a * a for a, _ in pairs)) * math.sqrt(sum(b * b for _, b in pairs))
    return round(sum(a * b for a, b in pairs) / lengths * 2**40) if lengths else 0.0


def ranking(query: Tensor, gallery: Tensor, left_out: set[int]) -> list[int]:
    kept = [j for j in range(len(gallery)) if j not in left_out]
    return sorted(kept, key=lambda j: (-cosine(query, gallery[j]), j))


def retrieval_loop(embeddings: Tensor, labels: Tensor, ks: tuple[int, ...]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {name: [] for name in (*(f"recall@{k}" for k in ks), "MAP@R")}
    for i in range(len(labels)):
        right = [bool(labels[j] == labels[i]) for j in ranking(embeddings[i], embeddings, {i})]
        others = sum(right)
        for k in ks:
            values[f"recall@{k}"].append(100.0 * any(right[:k]) if others else math.nan)
        precisions = [sum(right[: n + 1]) / (n + 1) if right[n] else 0.0 for n in range(others)]
        values["MAP@R"].append(100 * sum(precisions) / others if others else math.nan)
    return values


def reidentification_loop(query: Gallery, gallery: Gallery, ranks: tuple[int, ...]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {name: [] for name in (*(f"rank-{k}" for k in ranks), "mAP")}
    for embedding, person, camera in zip(*query, strict=True):
        junk = {j for j in range(len(gallery[0])) if gallery[1][j] == person and gallery[2][j] == camera}
        right = [bool(gallery[1][j] == person) for j in ranking(embedding, gallery[0], junk)]
        for k in ranks:
            values[f"rank-{k}"].append(100.0 * any(right[:k]) if any(right) else math.nan)
        precisions = [sum(right[: n + 1]) / (n + 1) for n in range(len(right)) if right[n]]
        values["mAP"].append(100 * sum(precisions) / len(precisions) if precisions else math.nan)
    return values


def assert_same(actual: dict[str, Float64Array], expected: dict[str, list[float]]) -> None:
    assert list(actual) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(actual[name], values, rtol=1e-12, err_msg=name)


def angles(*degrees: float) -> Tensor:
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


class TestRetrieval:
    def test_hand_worked(self) -> None:
        # neighbours, nearest first: 0 -> 1 2 3 4, 1 -> 0 2 3 4, 2 -> 1 0 3 4, 3 -> 2 1 0 4, 4 -> 3 2 1 0
        embeddings, labels = angles(0, 10, 21, 33, 80), torch.tensor([7, 7, 9, 7, 9])
        values = per_query_retrieval(embeddings, labels, (1, 2))
        assert values["recall@1"].tolist() == [100, 100, 0, 0, 0]
        assert values["recall@2"].tolist() == [100, 100, 0, 100, 100]
        # class 7: R = 2; 0: right, wrong -> (1 + 0) / 2; 1: the same; 3: wrong, right -> (0 + 1/2) / 2
        # class 9: R = 1; the nearest is wrong for both
        assert values["MAP@R"].tolist() == [50, 50, 0, 25, 0]
        result = retrieval_scores(embeddings, labels, ks=(1, 2))
        assert (result.recall[1][0], result.recall[2][0]) == (40, 80)
        assert result.map_at_r[0] == 25
        assert (result.queries, result.skipped) == (5, 0)

    def test_a_photo_alone_in_its_class_is_skipped_but_stays_a_wrong_answer(self) -> None:
        embeddings, labels = angles(0, 10, 21), torch.tensor([1, 2, 1])
        result = retrieval_scores(embeddings, labels, ks=(1, 2))
        assert (result.queries, result.skipped) == (2, 1)
        assert (result.recall[1][0], result.recall[2][0], result.map_at_r[0]) == (0, 100, 0)

    def test_copies_are_found_by_each_other_and_not_by_themselves(self) -> None:
        embeddings = angles(0, 0, 50)
        assert per_query_retrieval(embeddings, torch.tensor([1, 1, 2]), [1])["recall@1"].tolist()[:2] == [100, 100]
        assert per_query_retrieval(embeddings, torch.tensor([1, 2, 1]), [1])["recall@1"].tolist()[0] == 0

    def test_a_collapsed_network_scores_the_first_class_only(self) -> None:
        """All ties: everybody's neighbours are the first photos, whatever the order of the classes in the file."""
        values = per_query_retrieval(torch.ones(6, 4), torch.tensor([0, 0, 1, 1, 2, 2]), [1])
        assert values["recall@1"].tolist() == [100, 100, 0, 0, 0, 0]

    @settings(deadline=None, max_examples=60)
    @given(SEEDS, st.integers(2, 24), st.integers(1, 8), st.booleans(), st.sampled_from([(1, 2, 4, 8), (3,), (50, 1)]))
    def test_equals_a_plain_loop(self, seed: int, count: int, classes: int, tied: bool, ks: tuple[int, ...]) -> None:
        embeddings, labels = photos(count, classes, seed=seed, tied=tied)
        assert_same(per_query_retrieval(embeddings, labels, ks), retrieval_loop(embeddings, labels, ks))

    @pytest.mark.parametrize("classes", [2, 9, 40])
    def test_equals_pytorch_metric_learning(self, classes: int) -> None:
        embeddings, labels = photos(60, classes, seed=classes)
        calculator = AccuracyCalculator(
            include=("precision_at_1", "mean_average_precision_at_r"),
            k="max_bin_count",
            device=torch.device("cpu"),
            knn_func=CustomKNN(CosineSimilarity()),
        )
        expected = calculator.get_accuracy(embeddings, labels)
        result = retrieval_scores(embeddings, labels, resamples=2)
        assert result.recall[1][0] == pytest.approx(100 * expected["precision_at_1"])
        assert result.map_at_r[0] == pytest.approx(100 * expected["mean_average_precision_at_r"])
        assert result.queries + result.skipped == 60

    @settings(deadline=None, max_examples=30)
    @given(SEEDS, st.integers(1, 30), st.booleans())
    def test_chunks_do_not_matter(self, seed: int, chunk: int, tied: bool) -> None:
        embeddings, labels = photos(25, 5, seed=seed, tied=tied)
        whole, parts = per_query_retrieval(embeddings, labels), per_query_retrieval(embeddings, labels, chunk=chunk)
        for name, values in whole.items():
            np.testing.assert_array_equal(parts[name], values)

    @settings(deadline=None, max_examples=30)
    @given(SEEDS)
    def test_order_and_length_do_not_matter(self, seed: int) -> None:
        embeddings, labels = photos(20, 5, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(20, generator=generator)
        lengths = torch.rand(20, 1, generator=generator).double() + 0.01
        expected = retrieval_scores(embeddings, labels, resamples=5)
        assert retrieval_scores(embeddings[order], labels[order], resamples=5) == expected  # the bounds too
        assert retrieval_scores(lengths * embeddings, 3 * labels - 7, resamples=5) == expected

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_any_precision_and_gradients(self, dtype: torch.dtype) -> None:
        embeddings = angles(0, 10, 60, 75).to(dtype).requires_grad_()
        result = retrieval_scores(embeddings, torch.tensor([1, 1, 2, 2], dtype=torch.int32), ks=[1])
        assert result.recall == {1: (100, 100, 100)}
        assert embeddings.grad is None

    def test_bad_inputs(self) -> None:
        embeddings, labels = photos(4, 2, seed=0)
        broken = embeddings.clone()
        broken[2, 1] = math.nan
        with pytest.raises(DataError, match=r"embeddings must be finite; 1 of 4 rows are not, the first is row 2"):
            retrieval_scores(broken, labels)
        with pytest.raises(
            DataError, match=r"labels must be integers \(4,\), one per embedding; got torch.int64 \(3,\)"
        ):
            retrieval_scores(embeddings, labels[:3])
        with pytest.raises(DataError, match=r"labels must be integers \(4,\).* got torch.float32"):
            retrieval_scores(embeddings, labels.float())
        with pytest.raises(DataError, match=r"embeddings must be float \(N, D\); got torch.float32 \(4, 3, 1\)"):
            retrieval_scores(embeddings[..., None], labels)
        with pytest.raises(DataError, match=r"embeddings must be float \(N, D\); got torch.int64"):
            retrieval_scores(embeddings.long(), labels)
        for ks in ((1, 0), (-1,), ()):
            with pytest.raises(DataError, match="ks must be one or more numbers >= 1"):
                retrieval_scores(embeddings, labels, ks=ks)
        with pytest.raises(DataError, match="resamples >= 1"):
            retrieval_scores(embeddings, labels, resamples=0)

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_nobody_to_be_found(self, count: int) -> None:
        embeddings, labels = torch.ones(count, 2), torch.arange(count)
        values = per_query_retrieval(embeddings, labels, [1])
        assert all(value.shape == (count,) and np.isnan(value).all() for value in values.values())
        with pytest.raises(DataError, match=f"none of the {count} queries can be found: .* two photos of one class"):
            retrieval_scores(embeddings, labels)


class TestReidentification:
    QUERY: Gallery = (angles(0, 0, 0), torch.tensor([1, 2, 3]), torch.tensor([1, 1, 1]))
    GALLERY: Gallery = (
        angles(5, 10, 20, 30, 40, 50),
        torch.tensor([1, 2, 1, 0, 1, 2]),  # 0 is a distractor
        torch.tensor([1, 2, 2, 1, 3, 1]),
    )

    def test_hand_worked(self) -> None:
        # person 1: its photo at 5 degrees is by the same camera: junk; then wrong, right, wrong, right, wrong
        # person 2: 5 wrong, 10 right, the others wrong, 50 is junk. Person 3 is in no photo.
        values = per_query_reidentification(*self.QUERY, *self.GALLERY, (1, 2))
        np.testing.assert_array_equal(values["rank-1"], [0, 0, math.nan])
        np.testing.assert_array_equal(values["rank-2"], [100, 100, math.nan])
        np.testing.assert_allclose(values["mAP"], [100 * (1 / 2 + 2 / 4) / 2, 50, math.nan])
        result = reidentification_scores(*self.QUERY, *self.GALLERY, ranks=(1, 2))
        assert (result.rank[1][0], result.rank[2][0], result.mean_ap[0]) == (0, 100, 50)
        assert (result.queries, result.skipped) == (2, 1)

    def test_wrong_people_of_the_same_camera_stay_in_the_ranking(self) -> None:
        query = (angles(0), torch.tensor([1]), torch.tensor([1]))
        gallery = (angles(5, 10), torch.tensor([2, 1]), torch.tensor([1, 2]))
        assert per_query_reidentification(*query, *gallery)["rank-1"].tolist() == [0]

    def test_a_person_seen_by_one_camera_only_is_skipped(self) -> None:
        query = (angles(0, 0), torch.tensor([1, 2]), torch.tensor([1, 1]))
        gallery = (angles(5, 10), torch.tensor([1, 2]), torch.tensor([1, 2]))
        values = per_query_reidentification(*query, *gallery, [2])
        np.testing.assert_array_equal(values["rank-2"], [math.nan, 100])

    @settings(deadline=None, max_examples=60)
    @given(SEEDS, st.integers(1, 8), st.integers(1, 20), st.booleans())
    def test_equals_a_plain_loop(self, seed: int, queries: int, count: int, tied: bool) -> None:
        query, gallery = people(queries, seed=seed, tied=tied), people(count, seed=seed + 2, tied=tied)
        for ranks in ((1, 5, 10), (2,)):
            expected = reidentification_loop(query, gallery, ranks)
            assert_same(per_query_reidentification(*query, *gallery, ranks), expected)

    def test_average_precision_equals_scikit_learn(self) -> None:
        query, gallery = people(12, seed=3), people(80, seed=5)
        actual = per_query_reidentification(*query, *gallery)["mAP"]
        for i, (embedding, person, camera) in enumerate(zip(*query, strict=True)):
            kept = ~((gallery[1] == person) & (gallery[2] == camera))
            similarity = torch.cosine_similarity(embedding[None].double(), gallery[0][kept].double())
            expected = average_precision_score((gallery[1][kept] == person).numpy(), similarity.numpy())
            assert actual[i] == pytest.approx(100 * expected)

    @settings(deadline=None, max_examples=30)
    @given(SEEDS, st.integers(1, 12))
    def test_chunks_order_and_length_do_not_matter(self, seed: int, chunk: int) -> None:
        query, gallery = people(9, seed=seed), people(30, seed=seed + 2)
        expected = reidentification_scores(*query, *gallery, resamples=5)
        generator = torch.Generator().manual_seed(seed)
        turned, mixed = torch.randperm(9, generator=generator), torch.randperm(30, generator=generator)
        query, gallery = tuple(t[turned] for t in query), tuple(t[mixed] for t in gallery)  # type: ignore[assignment]
        again = reidentification_scores(4 * query[0], *query[1:], 0.3 * gallery[0], *gallery[1:], resamples=5)
        assert again == expected
        parts = per_query_reidentification(*query, *gallery, chunk=chunk)
        for name, values in per_query_reidentification(*query, *gallery).items():
            np.testing.assert_array_equal(parts[name], values)

    def test_bad_inputs(self) -> None:
        query, gallery = people(3, seed=0), people(5, seed=2)

        def score(**changed: Tensor) -> object:
            names = [f"{side}_{part}" for side in ("query", "gallery") for part in ("embeddings", "labels", "cameras")]
            return reidentification_scores(**(dict(zip(names, query + gallery, strict=True)) | changed))

        with pytest.raises(DataError, match=r"gallery_cameras must be integers \(5,\)"):
            score(gallery_cameras=gallery[2][:2])
        with pytest.raises(DataError, match=r"query_labels must be integers \(3,\)"):
            score(query_labels=query[1].float())
        with pytest.raises(DataError, match=r"gallery_labels must not be negative, got -1: leave junk"):
            score(gallery_labels=torch.tensor([0, 1, -1, 2, 3]))
        with pytest.raises(DataError, match="query embeddings have width 3, gallery embeddings 2"):
            score(gallery_embeddings=gallery[0][:, :2])
        with pytest.raises(DataError, match="query_embeddings must be finite; 3 of 3"):
            score(query_embeddings=query[0] / 0)
        with pytest.raises(DataError, match=r"none of the 3 queries can be found: .* different cameras"):
            score(query_labels=torch.full((3,), 99))
        with pytest.raises(DataError, match=r"none of the 3 queries can be found"):
            reidentification_scores(*query, *(tensor[:0] for tensor in gallery))
        with pytest.raises(DataError, match=r"ranks must be one or more numbers >= 1, got \(0,\)"):
            reidentification_scores(*query, *gallery, ranks=(0,))


class TestBootstrapMeans:
    def test_interval_of_a_mean_is_that_of_its_standard_error(self) -> None:
        values = np.random.default_rng(0).normal([[10.0, -3.0]], [[5.0, 1.0]], size=(400, 2))
        for column, (value, low, high) in zip(values.T, bootstrap_means(values, resamples=2000), strict=True):
            half_width = 1.96 * column.std() / math.sqrt(400)
            assert value == pytest.approx(column.mean())
            assert low == pytest.approx(value - half_width, abs=0.15 * half_width)
            assert high == pytest.approx(value + half_width, abs=0.15 * half_width)

    def test_equals_a_plain_loop(self) -> None:
        values = np.array([[3.0], [0.0], [7.0], [1.0]])
        generator = np.random.default_rng(9)
        means = [np.mean([sorted(values[:, 0])[row] for row in generator.integers(4, size=4)]) for _ in range(50)]
        ((value, low, high),) = bootstrap_means(values, resamples=50, seed=9)
        assert (value, low, high) == pytest.approx((2.75, *np.percentile(means, (2.5, 97.5))))

    def test_seed(self) -> None:
        values = np.random.default_rng(0).random((30, 1))
        assert bootstrap_means(values, seed=1) == bootstrap_means(values[::-1], seed=1)
        assert bootstrap_means(values, seed=1) != bootstrap_means(values, seed=2)

    def test_bad_inputs(self) -> None:
        with pytest.raises(DataError, match=r"resamples >= 1; got \(0, 2\)"):
            bootstrap_means(np.zeros((0, 2)))
        with pytest.raises(DataError, match=r"values \(N, M\)"):
            bootstrap_means(np.zeros(3))
