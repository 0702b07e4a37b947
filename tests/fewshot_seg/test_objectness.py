"""Object or surroundings: the shrunk discriminant against numpy, and the classifier of cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.objectness import SHRINKAGE, ObjectClassifier, shrunk_discriminant


def drawn(count: int = 60, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Cells, and shares of object and background; some area is in neither."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randn(count, width, generator=generator)
    foreground = torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) < 0.5)
    cells = cells + 2 * foreground[:, None] * torch.linspace(-1, 1, width)
    return cells, foreground, (1 - foreground) * torch.rand(count, generator=generator)


def by_numpy(cells: Tensor, foreground: Tensor, background: Tensor, shrinkage: float) -> tuple[np.ndarray, float]:
    """Means and covariances by `numpy.average` and `numpy.cov`, which take weights."""
    rows = cells.double().numpy()
    sides = [side.double().numpy() for side in (foreground, background)]
    means = [np.average(rows, axis=0, weights=side) for side in sides]
    within = sum(np.cov(rows.T, aweights=side, ddof=0) for side in sides) / 2
    shrunk = within + shrinkage * np.diag(within).mean() * np.eye(len(within))
    direction = np.linalg.inv(shrunk) @ (means[0] - means[1])
    scores = [float(direction @ mean) for mean in means]
    variance = float(direction @ within @ direction)
    scale = (scores[0] - scores[1]) / variance
    return scale * direction, -scale * (scores[0] + scores[1]) / 2


class TestShrunkDiscriminant:
    @pytest.mark.parametrize("shrinkage", [0.0, 0.1, SHRINKAGE, 100.0])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_equals_numpy(self, shrinkage: float, seed: int) -> None:
        cells, foreground, background = drawn(seed=seed)
        weight, bias = shrunk_discriminant(cells, foreground, background, shrinkage=shrinkage)
        expected_weight, expected_bias = by_numpy(cells, foreground, background, shrinkage)
        assert (weight.dtype, bias.dtype, bias.shape) == (torch.float32, torch.float32, ())
        torch.testing.assert_close(weight.double(), torch.from_numpy(expected_weight), rtol=1e-4, atol=1e-5)
        assert bias.item() == pytest.approx(expected_bias, rel=1e-4)

    def test_many_cells_are_taken_in_parts(self) -> None:
        few = drawn(20)
        many = [part.repeat(1000, *[1] * (part.dim() - 1)) for part in few]
        for one, other in zip(shrunk_discriminant(*few), shrunk_discriminant(*many), strict=True):
            torch.testing.assert_close(one, other)

    def test_the_logit_is_that_of_two_normal_distributions(self) -> None:
        """Of one channel, by hand: means 3 and -1, variance 1; log N(x; 3, 1) - log N(x; -1, 1) = 4 x - 4."""
        cells = torch.tensor([[2.0], [4.0], [-2.0], [0.0]])
        foreground = torch.tensor([1.0, 1.0, 0.0, 0.0])
        weight, bias = shrunk_discriminant(cells, foreground, 1 - foreground)
        assert (weight.item(), bias.item()) == pytest.approx((4.0, -4.0))

    def test_shrunk_far_it_is_the_difference_of_the_means(self) -> None:
        cells, foreground, background = drawn()
        weight, _ = shrunk_discriminant(cells, foreground, background, shrinkage=1e6)
        apart = foreground @ cells / foreground.sum() - background @ cells / background.sum()
        assert torch.nn.functional.cosine_similarity(weight, apart, dim=0) > 0.99999

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10**6), st.floats(0.1, 10))
    def test_shares_are_weights(self, seed: int, factor: float) -> None:
        """Twice the object's area says the same of the object; a cell of nothing says nothing."""
        cells, foreground, background = drawn(seed=seed)
        expected = shrunk_discriminant(cells, foreground, background)
        more = torch.cat([cells, torch.full((1, cells.shape[1]), 50.0)])
        sides = (torch.cat([side, torch.zeros(1)]) for side in (factor * foreground, background))
        for one, other in zip(shrunk_discriminant(more, *sides), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    def test_takes_half_precision_and_leaves_its_arguments_alone(self) -> None:
        cells, foreground, background = drawn()
        kept = [part.clone() for part in (cells, foreground, background)]
        weight, _ = shrunk_discriminant(cells.half(), foreground, background)
        torch.testing.assert_close(weight, shrunk_discriminant(cells, foreground, background)[0], rtol=1e-2, atol=1e-2)
        assert all(map(torch.equal, kept, (cells, foreground, background)))

    @pytest.mark.parametrize("side", [0, 1])
    def test_one_side_alone(self, side: int) -> None:
        cells, *sides = drawn()
        sides[side] = torch.zeros_like(sides[side])
        with pytest.raises(DataError, match="show only one of both; check the masks, or train with --training joint"):
            shrunk_discriminant(cells, *sides)

    def test_cells_that_are_all_alike(self) -> None:
        _, foreground, background = drawn()
        with pytest.raises(DataError, match="all cells are alike; check the masks"):
            shrunk_discriminant(torch.ones(len(foreground), 4), foreground, background)


class TestObjectClassifier:
    def test_of_cells_in_a_photo(self) -> None:
        cells, foreground, background = drawn(width=4)
        shares = torch.stack([foreground / 4, 3 * foreground / 4, background], dim=1)
        classifier = ObjectClassifier(feature_channels=4)
        classifier.fit(cells, shares)
        weight, bias = shrunk_discriminant(cells, foreground, background)
        torch.testing.assert_close(classifier.weight, weight)
        maps = cells[:24].T.reshape(1, 4, 4, 6)
        found = classifier(maps)
        assert found.shape == (1, 4, 6)
        torch.testing.assert_close(found.flatten(), cells[:24] @ weight + bias)

    def test_has_nothing_that_training_changes(self) -> None:
        assert list(ObjectClassifier(feature_channels=3).parameters()) == []
        assert set(ObjectClassifier(feature_channels=3).state_dict()) == {"weight", "bias"}

    def test_refuses_no_channels(self) -> None:
        with pytest.raises(DataError, match="at least one feature channel, got 0"):
            ObjectClassifier(feature_channels=0)
