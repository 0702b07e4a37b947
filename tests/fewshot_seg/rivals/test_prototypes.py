"""PANet-style prototypes against plain loops over cells."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fewshot_seg.rivals.prototypes import alignment_loss, pooled_prototype, prototype_logits


@pytest.fixture
def maps() -> torch.Tensor:
    return torch.randn(2, 3, 4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def weights() -> torch.Tensor:
    return torch.rand(2, 3, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_prototypes_are_means_of_masked_means(maps: torch.Tensor, weights: torch.Tensor) -> None:
    found = pooled_prototype(maps, weights)
    for row in range(2):
        per_shot = []
        for shot in range(3):
            total = sum(weights[row, shot, y, x] * maps[row, shot, :, y, x] for y in range(3) for x in range(2))
            per_shot.append(total / weights[row, shot].sum())
        torch.testing.assert_close(found[row], sum(per_shot) / 3)


def test_logits_are_the_log_odds_of_a_softmax_over_scaled_cosines(maps: torch.Tensor) -> None:
    of_object, of_other = maps[:, 0, :, 0, 0], maps[:, 1, :, 0, 0]
    found = prototype_logits(maps, of_object, of_other)
    for row in range(2):
        for shot in range(3):
            for y in range(3):
                for x in range(2):
                    cell = maps[row, shot, :, y, x]
                    scores = [20 * F.cosine_similarity(cell, side[row], dim=0) for side in (of_other, of_object)]
                    probability = torch.stack(scores).softmax(0)[1]
                    torch.testing.assert_close(found[row, shot, y, x].sigmoid(), probability)


def test_alignment_swaps_the_roles() -> None:
    # two cells a photo; the query's first is predicted object, so its cells are the prototypes
    query = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    supports = torch.tensor([[[[[1.0, 0.0]], [[0.0, 1.0]]]]])
    logits = torch.tensor([[[5.0, -5.0]]])
    right = torch.tensor([[[[1.0, 0.0]]]])
    assert alignment_loss(query, logits, supports, right, 1 - right).item() == pytest.approx(math.log1p(math.exp(-20)))
    wrong = alignment_loss(query, logits, supports, 1 - right, right)
    assert wrong.item() == pytest.approx(20 + math.log1p(math.exp(-20)))


def test_nothing_predicted_adds_nothing(maps: torch.Tensor, weights: torch.Tensor) -> None:
    logits = torch.stack([torch.full((3, 2), -1.0), torch.ones(3, 2)]).double()
    both = alignment_loss(maps[:, 0], logits, maps, weights, 1 - weights)
    second = alignment_loss(maps[1:, 0], logits[1:], maps[1:], weights[1:], 1 - weights[1:])
    torch.testing.assert_close(both, second / 2)


def test_gradients(maps: torch.Tensor, weights: torch.Tensor) -> None:
    def losses(supports: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sides = (pooled_prototype(supports, weights), pooled_prototype(supports, 1 - weights))
        logits = prototype_logits(query[:, None], *sides)[:, 0]
        mask = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 3, 2)
        return logits, alignment_loss(query, mask, supports, weights, 1 - weights)

    inputs = maps.requires_grad_(), maps[:, 1].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(losses, inputs)
