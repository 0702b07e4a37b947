"""RePRI-style transduction: its terms against values worked by hand, its fit against torch's own optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from episodes.types import DataError
from fewshot_seg.feature_episodes import FeatureBatch
from fewshot_seg.rivals.transduction import (
    Adaptation,
    TransductiveClassifier,
    classifier_logits,
    fit_classifier,
    mean_entropy,
    proportion_divergence,
    support_cross_entropy,
)

MakeBatch = Callable[..., FeatureBatch]


def log_odds(*probabilities: float) -> torch.Tensor:
    return torch.tensor([[math.log(p / (1 - p)) for p in probabilities]])


class TestTerms:
    def test_logits(self) -> None:
        cells = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]]])
        found = classifier_logits(cells, torch.tensor([[5.0, 0.0]]), torch.tensor([4.0]))
        torch.testing.assert_close(found, torch.tensor([[16.0, -4.0, 20 / math.sqrt(2) - 4]]))

    def test_cross_entropy(self) -> None:
        # half of the second cell is object, half is ignored
        found = support_cross_entropy(log_odds(0.8, 0.4), torch.tensor([[0.0, 0.5]]), torch.tensor([[1.0, 0.0]]))
        assert found.item() == pytest.approx((-math.log(0.2) - 0.5 * math.log(0.4)) / 1.5)

    def test_entropy(self) -> None:
        found = mean_entropy(log_odds(0.5, 0.9))
        of_second = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
        assert found.item() == pytest.approx((math.log(2) + of_second) / 2)
        assert mean_entropy(torch.tensor([[80.0, -80.0]])).item() == pytest.approx(0, abs=1e-12)

    def test_divergence(self) -> None:
        found = proportion_divergence(log_odds(0.2, 0.6), torch.tensor([0.25]))
        assert found.item() == pytest.approx(0.4 * math.log(0.4 / 0.25) + 0.6 * math.log(0.6 / 0.75))
        assert proportion_divergence(log_odds(0.2, 0.6), torch.tensor([0.4])).item() == pytest.approx(0, abs=1e-6)

    def test_gradients(self) -> None:
        torch.manual_seed(0)
        cells = torch.randn(2, 5, 3, dtype=torch.float64)
        sides = torch.rand(2, 2, 5, dtype=torch.float64)
        proportion = torch.tensor([0.3, 0.6], dtype=torch.float64)

        def losses(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = classifier_logits(cells, weight, bias) / 10  # away from where the sigmoid is flat
            terms = support_cross_entropy(logits, *sides), mean_entropy(logits)
            return (*terms, proportion_divergence(logits, proportion))

        inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3), (2,))]
        assert torch.autograd.gradcheck(losses, inputs)


@pytest.mark.parametrize("shots", [1, 5])
def test_the_fit_is_gradient_descent_on_the_papers_loss(shots: int) -> None:
    torch.manual_seed(0)
    query, supports = (F.normalize(torch.randn(2, n, 4, dtype=torch.float64), dim=2) for n in (6, 7))
    foreground = torch.rand(2, 7, dtype=torch.float64)
    how = Adaptation(steps=6, update_at=3)
    weight, bias = fit_classifier(query, supports, foreground, 1 - foreground, shots=shots, how=how)
    for row in range(2):  # the paper's own terms, one episode at a time, with torch's optimiser
        own = (supports[row] * foreground[row][:, None]).sum(0) / foreground[row].sum()

        def probability(cells: torch.Tensor, own: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
            return (20 * F.cosine_similarity(cells, own[None], dim=1) - shift).sigmoid()

        shift = (20 * F.cosine_similarity(query[row], own[None], dim=1)).mean()
        size = probability(query[row], own, shift).mean()
        own, shift = own.requires_grad_(), shift.requires_grad_()
        optimiser = torch.optim.SGD([own, shift], lr=0.025)
        of_size = 1 / shots
        for step in range(1, 7):
            of_query, of_support = probability(query[row], own, shift), probability(supports[row], own, shift)
            if step == 3:
                size, of_size = of_query.mean().detach(), of_size + 1
            wrong = F.binary_cross_entropy(of_support, foreground[row])
            found = of_query.mean()
            divergence = found * (found / size).log() + (1 - found) * ((1 - found) / (1 - size)).log()
            entropy = F.binary_cross_entropy(of_query, of_query)
            optimiser.zero_grad()
            (wrong + of_size * divergence + entropy / shots).backward()
            optimiser.step()
        torch.testing.assert_close(weight[row], own.detach())
        torch.testing.assert_close(bias[row], shift.detach())


def test_it_fits_the_query_without_gradients_being_asked_for(make_batch: MakeBatch) -> None:
    model, batch = TransductiveClassifier((5, 7), (1, 2), rank=0), make_batch()
    with torch.no_grad():
        fitted = model(batch)
    unfitted = TransductiveClassifier((5, 7), (1, 2), rank=0, adaptation=Adaptation(steps=0))(batch)
    assert not fitted.requires_grad
    assert (fitted - unfitted).abs().max() > 0.1


def test_nothing_is_trained_over_frozen_features() -> None:
    assert list(TransductiveClassifier((5, 7), (1, 2), rank=0).parameters()) == []


def test_the_training_loss_is_the_cross_entropy_of_all_photos(make_batch: MakeBatch) -> None:
    model, batch = TransductiveClassifier((5, 7), (2, 1), rank=3), make_batch(2, shots=2)
    with torch.no_grad():
        model.class_biases.copy_(torch.tensor([0.5, -0.5]))
    cells = model.embedding(
        tuple(torch.cat(pair) for pair in zip(batch.query_levels, batch.support_levels, strict=True))
    )
    masks = torch.cat([batch.query_masks, batch.support_masks.flatten(0, 1)])
    expected = []
    for photo, class_id in enumerate([1, 2, 1, 1, 2, 2]):
        row = {2: 0, 1: 1}[class_id]
        cosine = torch.einsum("dhw,d->hw", cells[photo], F.normalize(model.class_weights[row], dim=0))
        probability = (20 * cosine - model.class_biases[row]).sigmoid()
        sides = [F.avg_pool2d((masks[photo] == side).float()[None], 4)[0] for side in (0, 1)]
        wrong = -sides[1] * probability.log() - sides[0] * (1 - probability).log()
        expected.append(wrong.sum() / (sides[0] + sides[1]).sum())
    torch.testing.assert_close(model.losses(batch)["loss"], torch.stack(expected).mean())


def test_bad_input(make_batch: MakeBatch) -> None:
    with pytest.raises(DataError, match="steps >= 0 and a rate > 0"):
        Adaptation(steps=-1)
    with pytest.raises(DataError, match=r"class 2 is none of the base classes \[1\]"):
        TransductiveClassifier((5, 7), (1,)).losses(make_batch())
