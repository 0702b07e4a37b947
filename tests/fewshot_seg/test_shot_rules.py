"""K-shot rules against plain loops and worked examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from episodes.protocols import ShotRule
from episodes.types import DataError
from fewshot_seg.shot_rules import (
    SHOT_RULES,
    check_shot_rule,
    distance_weights,
    gram_distances,
    gram_matrices,
    merge_shots,
    shot_weights,
    vote_margins,
    weighted_margins,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hsnet_vote(logits: Tensor, threshold: float) -> Tensor:
    """The rule as HSNet's code has it, for one episode (K, H, W)."""
    votes = torch.zeros(logits.shape[1:])
    for one in logits:
        votes += (one > threshold).float()
    share = votes / max(float(votes.max()), 1.0)
    share[share < 0.5] = 0
    share[share >= 0.5] = 1
    return share.bool()


class TestGramDistances:
    def test_plain_loop(self) -> None:
        query, supports = normal(2, 3, 2, 4), normal(2, 5, 3, 2, 4, seed=1)

        def gram(features: Tensor) -> list[list[float]]:
            rows = features.double().flatten(1).tolist()
            norms = [math.sqrt(sum(v * v for v in row)) for row in rows]
            return [
                [sum(a * b for a, b in zip(x, y, strict=True)) / (n * m) for y, m in zip(rows, norms, strict=True)]
                for x, n in zip(rows, norms, strict=True)
            ]

        found = gram_distances(query, supports)
        assert found.shape == (2, 5)
        for b in range(2):
            own = gram(query[b])
            for k in range(5):
                other = gram(supports[b, k])
                squares = sum((own[i][j] - other[i][j]) ** 2 for i in range(3) for j in range(3))
                assert found[b, k].item() == pytest.approx(math.sqrt(squares), rel=1e-5)

    def test_the_gram_matrix_is_of_cosines(self) -> None:
        gram = gram_matrices(normal(4, 3, 5, 6))
        assert gram.shape == (4, 3, 3)
        torch.testing.assert_close(gram.diagonal(dim1=1, dim2=2), torch.ones(4, 3))
        torch.testing.assert_close(gram, gram.mT)
        flat = normal(4, 3, 5, 6)[0].flatten(1)
        expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=2)
        torch.testing.assert_close(gram[0], expected)

    def test_zero_for_the_image_itself_whatever_its_contrast_and_layout(self) -> None:
        query = normal(1, 3, 4, 4)
        moved = torch.stack([query, 7 * query, query.flip(3)], dim=1)
        torch.testing.assert_close(gram_distances(query, moved), torch.zeros(1, 3), atol=1e-5, rtol=0)

    def test_a_silent_channel_and_other_sizes(self) -> None:
        query, supports = normal(1, 3, 4, 4), normal(1, 2, 3, 2, 5, seed=2)
        query[:, 1] = 0
        distances = gram_distances(query, supports)
        assert distances.isfinite().all()
        assert (distances > 0).all()


class TestWeights:
    def test_hand_worked(self) -> None:
        found = distance_weights(torch.tensor([[1.0, 3.0]]))  # mean 2: softmax of -0.5 and -1.5
        expected = math.exp(-0.5) / (math.exp(-0.5) + math.exp(-1.5))
        assert found.tolist()[0] == pytest.approx([expected, 1 - expected])

    @settings(deadline=None)
    @given(st.lists(st.floats(0, 50, width=32), min_size=1, max_size=8))
    def test_nearer_weighs_more(self, distances: list[float]) -> None:
        weights = distance_weights(torch.tensor([distances], dtype=torch.float64))[0]
        assert weights.sum().item() == pytest.approx(1)
        assert (weights > 0).all()
        order = np.argsort(distances, kind="stable")
        assert (np.diff(weights.numpy()[order]) <= 1e-12).all()

    def test_no_distance_at_all(self) -> None:
        assert distance_weights(torch.zeros(1, 4)).tolist() == [[0.25] * 4]

    def test_only_the_reweighted_rule_looks_at_the_features(self) -> None:
        query, supports = normal(2, 3, 4, 4), normal(2, 3, 3, 4, 4, seed=1)
        supports[0, 1] = query[0]
        weights = shot_weights(query, supports, rule="reweighted")
        assert weights[0].argmax() == 1
        torch.testing.assert_close(weights, distance_weights(gram_distances(query, supports)))
        for rule in ("vote", "mean"):
            assert shot_weights(query, supports, rule=rule).tolist() == [[pytest.approx(1 / 3)] * 3] * 2


class TestMerging:
    @settings(deadline=None, max_examples=60)
    @given(st.integers(1, 9), st.integers(0, 2**16), st.floats(-1, 2))
    def test_votes_as_in_hsnets_code(self, shots: int, seed: int, threshold: float) -> None:
        logits = normal(3, shots, 4, 5, seed=seed)
        found = vote_margins(logits, threshold) > 0
        for b in range(3):
            assert torch.equal(found[b], hsnet_vote(logits[b], threshold))

    def test_votes_are_relative_to_the_largest_number(self) -> None:
        said = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
        # 1, 2, 0 and 1 votes of five: two is the largest number, so one is half
        assert (vote_margins(said[None, :, None] - 0.5, 0.0) > 0).tolist() == [[[True, True, False, True]]]
        assert not (vote_margins(-normal(1, 3, 2, 2).abs(), 0.0) > 0).any()  # no vote: divided by 1, not by 0

    def test_weighted_sum(self) -> None:
        logits, weights = normal(2, 3, 4, 5), normal(2, 3, seed=1).softmax(1)
        expected = torch.zeros(2, 4, 5)
        for b in range(2):
            for k in range(3):
                expected[b] += weights[b, k] * logits[b, k]
        torch.testing.assert_close(weighted_margins(logits, weights, 0.4), expected - 0.4)

    def test_mean(self) -> None:
        logits, features = normal(2, 5, 3, 3), normal(2, 5, 1, 1, 1)
        weights = shot_weights(features[:, 0], features, rule="mean")
        torch.testing.assert_close(merge_shots(logits, weights, 0.2, rule="mean"), logits.mean(1) - 0.2)

    @pytest.mark.parametrize("rule", SHOT_RULES)
    def test_one_shot_is_the_mask_itself(self, rule: ShotRule) -> None:
        logits, features = normal(3, 1, 6, 6), normal(3, 1, 2, 4, 4)
        weights = shot_weights(features[:, 0] + 1, features, rule=rule)
        assert torch.equal(merge_shots(logits, weights, 0.3, rule=rule) > 0, logits[:, 0] > 0.3)

    @pytest.mark.parametrize("rule", ["vote", "mean", "reweighted"])
    def test_the_order_of_the_supports_does_not_matter(self, rule: ShotRule) -> None:
        logits, query, supports = normal(2, 4, 5, 5), normal(2, 3, 4, 4), normal(2, 4, 3, 4, 4, seed=3)
        order = torch.tensor([2, 0, 3, 1])
        merged = merge_shots(logits, shot_weights(query, supports, rule=rule), 0.1, rule=rule)
        turned = shot_weights(query, supports[:, order], rule=rule)
        torch.testing.assert_close(merge_shots(logits[:, order], turned, 0.1, rule=rule), merged)

    def test_rules_differ(self) -> None:
        logits = torch.tensor([3.0, -1.0, -1.0, -0.5])[None, :, None, None].expand(1, 4, 1, 2).clone()
        logits[..., 1] = 1.0  # a pixel that all four say
        weights = torch.full((1, 4), 0.25)
        assert (merge_shots(logits, weights, 0.0, rule="mean") > 0).tolist() == [[[True, True]]]
        assert (merge_shots(logits, weights, 0.0, rule="vote") > 0).tolist() == [[[False, True]]]
        far = torch.tensor([[0.01, 0.33, 0.33, 0.33]])
        assert (merge_shots(logits, far, 0.0, rule="reweighted") > 0).tolist() == [[[False, True]]]


def test_names() -> None:
    for rule in SHOT_RULES:
        check_shot_rule(rule)
    with pytest.raises(DataError, match="no K-shot rule 'median'; known are: pooled, vote, mean, reweighted"):
        check_shot_rule("median")
