"""Losses against plain loops, torch and segmentation-models-pytorch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentation_models_pytorch.losses import DiceLoss
from torch import Tensor

from episodes.types import IGNORE
from fewshot_seg.losses import attention_map_loss, balanced_map_loss, segmentation_loss


def softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


@pytest.fixture
def logits() -> Tensor:
    return 2 * torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def targets() -> Tensor:
    values = torch.tensor([0, 1, IGNORE], dtype=torch.uint8)
    return values[torch.randint(0, 3, (3, 5, 4), generator=torch.Generator().manual_seed(1))]


def loop_segmentation_loss(logits: Tensor, targets: Tensor, dice_weight: float) -> float:
    total = 0.0
    for episode_logits, episode_targets in zip(logits.tolist(), targets.tolist(), strict=True):
        entropy, pixels, overlap, predicted, actual = 0.0, 0, 0.0, 0.0, 0
        for logit_row, target_row in zip(episode_logits, episode_targets, strict=True):
            for logit, target in zip(logit_row, target_row, strict=True):
                if target == IGNORE:
                    continue
                probability = 1 / (1 + math.exp(-logit))
                entropy += -math.log(probability if target == 1 else 1 - probability)
                pixels += 1
                overlap += probability * target
                predicted += probability
                actual += target
        total += entropy / max(pixels, 1)
        total += dice_weight * (1 - (2 * overlap + 1) / (predicted + actual + 1))
    return total / len(logits)


class TestSegmentationLoss:
    @pytest.mark.parametrize("dice_weight", [0.0, 0.5, 1.0])
    def test_equals_plain_loops(self, logits: Tensor, targets: Tensor, dice_weight: float) -> None:
        loss = segmentation_loss(logits, targets, dice_weight=dice_weight)
        assert loss.item() == pytest.approx(loop_segmentation_loss(logits, targets, dice_weight), rel=1e-12)

    def test_without_dice_and_ignored_pixels_it_is_cross_entropy(self, logits: Tensor, targets: Tensor) -> None:
        targets = (targets == 1).to(torch.uint8)
        expected = F.binary_cross_entropy_with_logits(logits, targets.double())
        torch.testing.assert_close(segmentation_loss(logits, targets, dice_weight=0), expected)

    def test_the_dice_term_equals_the_library_per_episode(self, logits: Tensor, targets: Tensor) -> None:
        # its smoothing counts twice: (2 I + 2 s) / (P + T + 2 s)
        library = DiceLoss("binary", smooth=0.5, ignore_index=IGNORE)
        expected = torch.stack(
            [
                library(one_logits[None, None], one_target[None, None].double())
                for one_logits, one_target in zip(logits, targets, strict=True)
            ]
        ).mean()
        dice = segmentation_loss(logits, targets) - segmentation_loss(logits, targets, dice_weight=0)
        torch.testing.assert_close(dice, expected)

    def test_gradcheck(self, logits: Tensor, targets: Tensor) -> None:
        assert torch.autograd.gradcheck(lambda x: segmentation_loss(x, targets), (logits.requires_grad_(),))

    def test_ignored_pixels_have_no_gradient_and_no_say(self, logits: Tensor, targets: Tensor) -> None:
        ignored = targets == IGNORE
        assert 0 < ignored.sum() < ignored.numel()
        loss = segmentation_loss(logits.requires_grad_(), targets)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.equal(gradient == 0, ignored)
        shifted = torch.where(ignored, logits + 7, logits)
        torch.testing.assert_close(segmentation_loss(shifted, targets), loss)

    def test_an_episode_without_valid_pixels_adds_nothing(self, logits: Tensor, targets: Tensor) -> None:
        targets[1] = IGNORE
        logits.requires_grad_()
        loss = segmentation_loss(logits, targets)
        kept = segmentation_loss(logits[[0, 2]], targets[[0, 2]])
        torch.testing.assert_close(loss, kept * 2 / 3)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()
        assert segmentation_loss(logits[1:2], targets[1:2]).item() == 0

    def test_an_empty_answer_to_an_empty_mask_costs_nothing(self) -> None:
        logits = torch.full((1, 4, 4), -60.0)
        assert segmentation_loss(logits, torch.zeros(1, 4, 4, dtype=torch.uint8)).item() == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_does_not_overflow_on_a_large_mask(self, dtype: torch.dtype) -> None:
        logits, targets = torch.zeros(1, 300, 300, dtype=dtype), torch.ones(1, 300, 300, dtype=torch.uint8)
        loss = segmentation_loss(logits, targets)
        area = 300 * 300
        dice = 1 - (area + 1) / (1.5 * area + 1)
        assert loss.item() == pytest.approx(math.log(2) + dice, rel=1e-4)


class TestBalancedMapLoss:
    @pytest.fixture
    def episode(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(2)
        margin = 3 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
        shares = torch.rand(3, 6, 3, generator=generator, dtype=torch.float64).softmax(-1)
        return margin, shares[..., 0], shares[..., 1]

    def test_equals_plain_loops(self, episode: tuple[Tensor, Tensor, Tensor]) -> None:
        expected = 0.0
        for margins, objects, grounds in zip(*(part.tolist() for part in episode), strict=True):
            cells = list(zip(margins, objects, grounds, strict=True))
            expected += sum(softplus(-m) * o for m, o, _ in cells) / sum(objects)
            expected += sum(softplus(m) * g for m, _, g in cells) / sum(grounds)
        assert balanced_map_loss(*episode).item() == pytest.approx(expected / 3, rel=1e-12)

    def test_object_and_background_weigh_the_same_whatever_their_areas(self) -> None:
        margin = torch.tensor([[2.0, -1.0, -1.0, -1.0, -1.0]])
        small = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])
        expected = softplus(-2.0) + softplus(-1.0)
        assert balanced_map_loss(margin, small, 1 - small).item() == pytest.approx(expected, rel=1e-6)

    def test_gradcheck(self, episode: tuple[Tensor, Tensor, Tensor]) -> None:
        margin, foreground, background = episode
        assert torch.autograd.gradcheck(
            lambda m: balanced_map_loss(m, foreground, background), (margin.requires_grad_(),)
        )

    def test_ignored_cells_have_no_gradient(self, episode: tuple[Tensor, Tensor, Tensor]) -> None:
        margin, foreground, background = episode
        foreground[:, 2] = background[:, 2] = 0
        margin.requires_grad_()
        (gradient,) = torch.autograd.grad(balanced_map_loss(margin, foreground, background), margin)
        assert (gradient[:, 2] == 0).all()
        assert (gradient[:, [0, 1, 3, 4, 5]] != 0).all()

    def test_a_side_that_is_absent_adds_nothing(self) -> None:
        margin = torch.tensor([[1.0, -2.0]], requires_grad=True)
        none, every = torch.zeros(1, 2), torch.ones(1, 2)
        assert balanced_map_loss(margin, none, every).item() == pytest.approx((softplus(1) + softplus(-2)) / 2)
        assert balanced_map_loss(margin, every, none).item() == pytest.approx((softplus(-1) + softplus(2)) / 2)
        nothing = balanced_map_loss(margin, none, none)
        assert nothing.item() == 0
        assert torch.autograd.grad(nothing, margin)[0].tolist() == [[0.0, 0.0]]


def random_attention(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Maps of 3 photos of 6 cells, and how much of each cell is object and background; the rest is ignored."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    shares = torch.rand(3, 6, 3, generator=generator, dtype=torch.float64).softmax(-1)
    return attention, shares[..., 0], shares[..., 1]


def loop_attention_map_loss(attention: Tensor, foreground: Tensor, background: Tensor, sharpness: float) -> float:
    total = 0.0
    for values, objects, grounds in zip(attention.tolist(), foreground.tolist(), background.tolist(), strict=True):
        of_object = sum(v * o for v, o in zip(values, objects, strict=True)) / sum(objects)
        of_background = sum(v * g for v, g in zip(values, grounds, strict=True)) / sum(grounds)
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        logits = [sharpness * (v - (of_object + of_background) / 2) / spread for v in values]
        total += sum(softplus(-m) * o for m, o in zip(logits, objects, strict=True)) / sum(objects)
        total += sum(softplus(m) * g for m, g in zip(logits, grounds, strict=True)) / sum(grounds)
    return total / len(attention)


class TestAttentionMapLoss:
    @pytest.mark.parametrize("sharpness", [0.5, 2.0, 7.0])
    def test_equals_plain_loops(self, sharpness: float) -> None:
        loss = attention_map_loss(*random_attention(), sharpness=sharpness)
        assert loss.item() == pytest.approx(loop_attention_map_loss(*random_attention(), sharpness), rel=1e-12)

    @settings(max_examples=50, deadline=None)
    @given(seed=st.integers(0, 10**6), scale=st.floats(1e-9, 1e6), shift=st.floats(-10, 10))
    def test_scale_and_shift_of_each_map_do_not_matter(self, seed: int, scale: float, shift: float) -> None:
        attention, foreground, background = random_attention(seed)
        foreground[0], background[1] = 0, 0  # absent sides, too
        scales = torch.tensor([[scale], [1.0], [1 / scale]], dtype=torch.float64)
        changed = scales * (attention + shift)
        torch.testing.assert_close(
            attention_map_loss(changed, foreground, background),
            attention_map_loss(attention, foreground, background),
            rtol=1e-6,
            atol=1e-9,
        )

    def test_tells_a_map_from_its_opposite(self) -> None:
        attention = torch.tensor([[3.0, 2.0, -1.0, 0.0]])
        objects = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
        right = attention_map_loss(attention, objects, 1 - objects)
        assert right < 2 * math.log(2) < attention_map_loss(-attention, objects, 1 - objects)

    @pytest.mark.parametrize("unit", [1e-6, 1.0, 1e4])
    def test_gradcheck(self, unit: float) -> None:
        attention, foreground, background = random_attention()

        def loss(values: Tensor) -> Tensor:
            return attention_map_loss(unit * values, foreground, background)

        assert torch.autograd.gradcheck(loss, (attention.requires_grad_(),))

    @pytest.mark.parametrize("absent", ["object", "background", "both"])
    def test_an_episode_that_lacks_a_side_adds_nothing(self, absent: str) -> None:
        attention, foreground, background = random_attention()
        if absent != "background":
            foreground[1] = 0
        if absent != "object":
            background[1] = 0
        attention.requires_grad_()
        loss = attention_map_loss(attention, foreground, background)
        kept = attention_map_loss(attention[[0, 2]], foreground[[0, 2]], background[[0, 2]])
        torch.testing.assert_close(loss, kept * 2 / 3)
        (gradient,) = torch.autograd.grad(loss, attention)
        assert (gradient[1] == 0).all()
        assert (gradient[[0, 2]] != 0).all()

    @pytest.mark.parametrize("value", [0.0, 0.3])
    def test_a_constant_map_is_finite_and_undecided(self, value: float) -> None:
        attention = torch.full((1, 4), value, requires_grad=True)
        objects = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        loss = attention_map_loss(attention, objects, 1 - objects)
        assert loss.item() == pytest.approx(2 * math.log(2))
        assert torch.autograd.grad(loss, attention)[0].isfinite().all()

    def test_a_grid_of_one_cell_is_finite(self) -> None:
        cell = torch.tensor([[3.0]], requires_grad=True)
        loss = attention_map_loss(cell, torch.tensor([[0.25]]), torch.tensor([[0.75]]))
        assert loss.item() == pytest.approx(2 * math.log(2))
        assert torch.isfinite(torch.autograd.grad(loss, cell)[0]).all()
