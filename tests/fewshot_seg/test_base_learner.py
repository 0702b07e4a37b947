"""The base learner against plain loops: probabilities, profiles of supports, evidence of queries, its loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.base_learner import (
    EVIDENCE_CHANNELS,
    BaseLearner,
    base_class_loss,
    class_profile,
    commonness,
    photo_evidence,
)

FEATURES, CLASSES = 9, 3
LEAST = 1e-4


def unit(*shape: int, seed: int, dim: int = 1) -> Tensor:
    """Unit-length cells, float64."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=dim)


def chances(*shape: int, seed: int, dim: int = 1) -> Tensor:
    """Probabilities, float64."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * drawn).softmax(dim=dim)


def shares(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learned(seed: int = 0) -> BaseLearner:
    """With random values where a new one has zeros."""
    learner, generator = BaseLearner(feature_channels=FEATURES, classes=CLASSES).double(), torch.Generator()
    generator.manual_seed(seed)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return learner


class TestBaseLearner:
    def test_untrained_it_knows_nothing(self) -> None:
        probabilities = BaseLearner(feature_channels=FEATURES, classes=CLASSES)(unit(2, FEATURES, 3, 4, seed=0).float())
        assert probabilities.shape == (2, CLASSES + 1, 3, 4)
        assert torch.equal(probabilities, torch.full_like(probabilities, 1 / (CLASSES + 1)))

    def test_equals_a_softmax_per_cell(self) -> None:
        learner, features = learned(), unit(2, FEATURES, 3, 4, seed=1)
        probabilities = learner(features)
        for photo in range(2):
            for y in range(3):
                for x in range(4):
                    cell = features[photo, :, y, x].tolist()
                    scores = []
                    for row, shift in zip(learner.weight.tolist(), learner.bias.tolist(), strict=True):
                        product = sum(a * b for a, b in zip(row, cell, strict=True))
                        scores.append(0.1 * math.sqrt(FEATURES) * product + shift)
                    total = sum(math.exp(score) for score in scores)
                    expected = [math.exp(score) / total for score in scores]
                    assert probabilities[photo, :, y, x].tolist() == pytest.approx(expected, rel=1e-9)

    def test_logits_of_any_leading_axes(self) -> None:
        learner, cells = learned(), unit(5, 4, FEATURES, seed=2, dim=2)
        logits = learner.logits(cells)
        assert logits.shape == (5, 4, CLASSES + 1)
        torch.testing.assert_close(logits[3], learner.logits(cells[3]))
        torch.testing.assert_close(logits.softmax(2).movedim(2, 0)[None], learner(cells.movedim(2, 0)[None]))

    def test_description_builds_it_again(self) -> None:
        learner = learned()
        twin = BaseLearner(**learner.description()).double()
        twin.load_state_dict(learner.state_dict())
        assert (twin.feature_channels, twin.classes) == (FEATURES, CLASSES)
        assert torch.equal(twin(unit(1, FEATURES, 2, 2, seed=0)), learner(unit(1, FEATURES, 2, 2, seed=0)))

    @pytest.mark.parametrize(("features", "classes"), [(0, 3), (9, 0), (-1, 2)])
    def test_refuses(self, features: int, classes: int) -> None:
        message = f"at least one feature channel and one class, got {features} and {classes}"
        with pytest.raises(DataError, match=message):
            BaseLearner(feature_channels=features, classes=classes)


class TestClassProfile:
    def test_equals_plain_loops(self) -> None:
        probabilities, foreground = chances(2, CLASSES + 1, 5, seed=0), shares(2, 5, seed=1)
        profile = class_profile(probabilities, foreground)
        for episode in range(2):
            seen = [
                sum(probabilities[episode, n, m].item() * foreground[episode, m].item() for m in range(5))
                for n in range(CLASSES)
            ]
            assert profile[episode].tolist() == pytest.approx([one / max(seen) for one in seen], rel=1e-12)

    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 1000), scale=st.floats(0.01, 1))
    def test_the_class_seen_most_is_one_whatever_the_area(self, seed: int, scale: float) -> None:
        probabilities, foreground = chances(1, CLASSES + 1, 6, seed=seed), shares(1, 6, seed=seed + 1)
        profile = class_profile(probabilities, foreground)
        assert profile.min() >= 0
        assert profile.max().item() == pytest.approx(1)
        torch.testing.assert_close(class_profile(probabilities, foreground * scale), profile)

    def test_supports_of_which_nothing_is_object(self) -> None:
        profile = class_profile(chances(1, CLASSES + 1, 4, seed=0), torch.zeros(1, 4, dtype=torch.float64))
        assert torch.equal(profile, torch.zeros(1, CLASSES, dtype=torch.float64))


class TestPhotoEvidence:
    def test_equals_plain_loops(self) -> None:
        probabilities, profile = chances(2, CLASSES + 1, 3, 2, seed=0), shares(2, CLASSES, seed=1)
        features = unit(2, FEATURES, 3, 2, seed=2)
        maps = photo_evidence(probabilities, profile, features)
        assert maps.shape == (2, len(EVIDENCE_CHANNELS), 3, 2)
        for photo in range(2):
            mean = [features[photo, channel].mean().item() for channel in range(FEATURES)]
            length = math.sqrt(sum(one**2 for one in mean))
            for y in range(3):
                for x in range(2):
                    *classes, background = probabilities[photo, :, y, x].tolist()
                    told = zip(classes, profile[photo].tolist(), strict=True)
                    other = sum(chance * (1 - shown) for chance, shown in told)
                    cosine = sum(a * b for a, b in zip(mean, features[photo, :, y, x].tolist(), strict=True)) / length
                    expected = [
                        math.log(other + LEAST),
                        math.log((1 - background) / background),
                        cosine / 0.1,
                    ]
                    assert maps[photo, :, y, x].tolist() == pytest.approx(expected, rel=1e-9)

    def test_what_the_supports_show_is_not_suppressed(self) -> None:
        """A class that was trained on can still be asked for; the others speak against a cell."""
        probabilities = torch.full((1, CLASSES + 1, 1, 2), 0.01)
        probabilities[0, 0, 0, 0] = probabilities[0, 1, 0, 1] = 0.97  # a cell of class 0 beside one of class 1
        other = photo_evidence(probabilities, torch.tensor([[1.0, 0, 0]]), torch.ones(1, 1, 1, 2))[0, 0, 0]
        assert other.tolist() == pytest.approx([math.log(0.02 + LEAST), math.log(0.98 + LEAST)], rel=1e-5)

    def test_certainty_gives_no_infinity(self) -> None:
        probabilities = torch.zeros(1, CLASSES + 1, 1, 2)
        probabilities[0, 0, 0, 0] = probabilities[0, -1, 0, 1] = 1
        maps = photo_evidence(probabilities, torch.tensor([[1.0, 0, 0]]), torch.ones(1, 1, 1, 2))
        assert maps[0, 0, 0].tolist() == pytest.approx([math.log(LEAST)] * 2)
        bound = math.log((1 - LEAST) / LEAST)
        assert maps[0, 1, 0].tolist() == pytest.approx([bound, -bound], rel=1e-3)

    def test_a_photo_does_not_depend_on_the_others(self) -> None:
        given_maps = chances(3, CLASSES + 1, 3, 2, seed=0), shares(3, CLASSES, seed=1), unit(3, FEATURES, 3, 2, seed=2)
        together = photo_evidence(*given_maps)
        for n in range(3):
            torch.testing.assert_close(photo_evidence(*(one[n : n + 1] for one in given_maps))[0], together[n])

    def test_gradcheck(self) -> None:
        arguments = (
            chances(1, CLASSES + 1, 2, 2, seed=0).requires_grad_(),
            shares(1, CLASSES, seed=1).requires_grad_(),
            unit(1, FEATURES, 2, 2, seed=2).requires_grad_(),
        )
        assert torch.autograd.gradcheck(photo_evidence, arguments)


class TestCommonness:
    def test_a_photo_of_one_colour_is_all_common(self) -> None:
        features = unit(1, FEATURES, 1, 1, seed=0).expand(1, FEATURES, 3, 4)
        torch.testing.assert_close(commonness(features), torch.full((1, 3, 4), 10.0, dtype=torch.float64))

    def test_what_is_rare_stands_out(self) -> None:
        features = torch.zeros(1, 2, 1, 4)
        features[0, 0, 0, :3] = features[0, 1, 0, 3] = 1  # three cells of a kind, one of another
        common = commonness(features)[0, 0].tolist()
        assert common == pytest.approx([30 / math.sqrt(10)] * 3 + [10 / math.sqrt(10)])


class TestBaseClassLoss:
    def loop(self, logits: list[list[float]], told: list[list[float]]) -> float:
        areas = [max(1.0, sum(column)) for column in zip(*told, strict=True)]
        weights = [area**-0.5 for area in areas]
        weights = [one / (sum(weights) / len(weights)) for one in weights]
        loss = 0.0
        for scores, row in zip(logits, told, strict=True):
            total = math.log(sum(math.exp(score) for score in scores))
            for score, share, weight in zip(scores, row, weights, strict=True):
                loss -= share * weight * (score - total)
        return loss / sum(map(sum, told))

    def told(self, seed: int = 1) -> Tensor:
        drawn = 4 * shares(12, CLASSES + 1, seed=seed)
        drawn[:, 0] /= 8  # a rare class
        return drawn / drawn.sum(dim=1, keepdim=True)

    def test_equals_plain_loops(self) -> None:
        logits = torch.randn(12, CLASSES + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        told = self.told()
        assert base_class_loss(logits, told).item() == pytest.approx(self.loop(logits.tolist(), told.tolist()))

    def test_rare_classes_weigh_more(self) -> None:
        """Of two classes with 16 cells and one, a cell of the second counts four times."""
        told = torch.zeros(17, 2)
        told[:16, 0] = told[16, 1] = 1
        logits = torch.zeros(17, 2, requires_grad=True)
        base_class_loss(logits, told).backward()
        assert logits.grad is not None
        assert (logits.grad[16, 1] / logits.grad[0, 0]).item() == pytest.approx(4)

    def test_ignored_shares_count_nowhere(self) -> None:
        logits = torch.randn(12, CLASSES + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        told = self.told()
        told[5] = 0
        told[7] *= 0.5
        kept = [n for n in range(12) if n != 5]
        loss = base_class_loss(logits, told)
        torch.testing.assert_close(loss, base_class_loss(logits[kept], told[kept]))
        assert loss.item() == pytest.approx(self.loop(logits.tolist(), told.tolist()))

    def test_nothing_but_ignored_is_no_loss(self) -> None:
        assert base_class_loss(torch.randn(3, 4), torch.zeros(3, 4)).item() == 0

    def test_gradcheck(self) -> None:
        logits = torch.randn(12, CLASSES + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda one: base_class_loss(one, self.told()), (logits.requires_grad_(),))

    def test_gradients_reach_the_learner(self) -> None:
        learner = learned()
        cells: Any = unit(12, FEATURES, seed=3)
        base_class_loss(learner.logits(cells), self.told()).backward()
        assert all(one.grad is not None and bool(one.grad.any()) for one in learner.parameters())
