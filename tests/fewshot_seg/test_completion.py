"""What weak supports leave open: the estimate by plain loops, the network that starts as it, and its loss."""

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
from fewshot_seg.completion import SupportCompletion, completion_loss, estimate_object, open_part

CELLS, FEATURES = 6, 10
TEMPERATURE = 0.05
KINDS = ("box", "scribble", "label", "mixed")


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Unit-length cells that do not all point the same way."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=1)


def known(kind: str, height: int = 4, width: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Foreground and background shares (1, h, w) of a support of this kind, with cells that are known in part."""
    foreground, background = torch.zeros(2, 1, height, width, dtype=dtype)
    if kind in ("box", "mixed"):
        background[0] = 1
        background[0, 1:3, 1:4] = 0
        background[0, 1, 1:4] = 0.25
    if kind in ("scribble", "mixed"):
        foreground[0, 2, 2] = 0.5
        foreground[0, 2, 3] = 0.125
    return foreground, background


def first_guess_by_loop(maps: Tensor, foreground: Tensor, background: Tensor) -> list[list[float]]:
    """One support: (D, h, w), (h, w), (h, w)."""
    channels, height, width = maps.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    if any(foreground[cell] > 0 for cell in cells):
        prototype = [sum(float(maps[d][c] * foreground[c]) for c in cells) for d in range(channels)]
        length = math.sqrt(sum(value**2 for value in prototype))
        likeness = {c: sum(float(maps[d][c]) * prototype[d] / length for d in range(channels)) for c in cells}
        low, high = min(likeness.values()), max(likeness.values())
        return [[(likeness[y, x] - low) / (high - low) for x in range(width)] for y in range(height)]
    if any(background[cell] > 0 for cell in cells):
        return [[1.0] * width for _ in range(height)]
    ys = [-1 + 2 * y / (height - 1) for y in range(height)]
    xs = [-1 + 2 * x / (width - 1) for x in range(width)]
    return [[math.exp(-2 * (y * y + x * x)) for x in xs] for y in ys]


def estimate_by_loop(maps: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    _, height, width = maps.shape
    guess = first_guess_by_loop(maps, foreground, background)
    sides: tuple[dict[tuple[int, int], float], ...] = ({}, {})
    for y in range(height):
        for x in range(width):
            still_open = 1 - float(foreground[y, x]) - float(background[y, x])
            sides[0][y, x] = float(foreground[y, x]) + still_open * guess[y][x]
            sides[1][y, x] = float(background[y, x]) + still_open * (1 - guess[y][x])
    result = torch.zeros(height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            means = []
            for side in sides:
                kernels = {c: math.exp((float(maps[:, y, x] @ maps[:, c[0], c[1]]) - 1) / TEMPERATURE) for c in side}
                weight = sum(side.values())
                mean = sum(share * kernels[c] for c, share in side.items()) / weight if weight else 0.0
                means.append(max(mean, math.exp(-2 / TEMPERATURE)))
            result[y, x] = math.log(means[0]) - math.log(means[1])
    return result


class TestOpenPart:
    def test_is_what_is_neither_object_nor_background(self) -> None:
        foreground, background = torch.tensor([[[0.0, 0.25, 1.0]]]), torch.tensor([[[0.0, 0.5, 0.0]]])
        assert open_part(foreground, background).tolist() == [[[1.0, 0.25, 0.0]]]

    def test_is_never_negative(self) -> None:
        assert open_part(torch.tensor([[[0.7]]]), torch.tensor([[[0.3000001]]])).item() == 0


class TestEstimate:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("seed", [0, 1])
    def test_equals_the_plain_loop(self, kind: str, seed: int) -> None:
        maps, (foreground, background) = unit(1, CELLS, 4, 5, seed=seed), known(kind)
        expected = estimate_by_loop(maps[0], foreground[0], background[0])
        torch.testing.assert_close(estimate_object(maps, foreground, background)[0], expected, rtol=1e-6, atol=1e-6)

    def test_supports_of_all_kinds_in_one_batch_are_estimated_alone(self) -> None:
        maps, marks = unit(len(KINDS), CELLS, 4, 5), [known(kind) for kind in KINDS]
        foreground, background = (torch.cat(side) for side in zip(*marks, strict=True))
        together = estimate_object(maps, foreground, background)
        assert together.shape == (len(KINDS), 4, 5)
        for n, sides in enumerate(marks):
            torch.testing.assert_close(together[n], estimate_object(maps[n : n + 1], *sides)[0])

    def test_finds_the_object_within_a_box(self) -> None:
        """A box of two rows whose lower one looks like what lies outside."""
        maps = torch.zeros(1, 2, 4, 4)
        maps[0, 0] = 1
        maps[0, :, 1, 1:3] = torch.tensor([0.0, 1.0])[:, None]
        background = torch.ones(1, 4, 4)
        background[0, 1:3, 1:3] = 0
        logits = estimate_object(maps, torch.zeros(1, 4, 4), background)
        expected = torch.zeros(1, 4, 4, dtype=torch.bool)
        expected[0, 1, 1:3] = True
        assert torch.equal(logits > 0, expected)

    def test_finds_what_looks_like_the_point(self) -> None:
        maps = torch.zeros(1, 2, 3, 6)
        maps[0, 0, :, :3], maps[0, 1, :, 3:] = 1, 1
        foreground = torch.zeros(1, 3, 6)
        foreground[0, 1, 4] = 0.1
        logits = estimate_object(maps, foreground, torch.zeros(1, 3, 6))
        assert torch.equal(logits > 0, maps[:, 1] == 1)

    def test_of_a_label_takes_what_is_in_the_middle(self) -> None:
        maps = torch.zeros(1, 2, 5, 5)
        maps[0, 0] = 1
        maps[0, :, 1:4, 1:4] = torch.tensor([0.0, 1.0])[:, None, None]
        nothing = torch.zeros(1, 5, 5)
        assert torch.equal(estimate_object(maps, nothing, nothing) > 0, maps[:, 1] == 1)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_mirrored_support_is_estimated_mirrored(self, kind: str) -> None:
        maps, (foreground, background) = unit(1, CELLS, 4, 5), known(kind)
        mirrored = estimate_object(maps.flip(3), foreground.flip(2), background.flip(2))
        torch.testing.assert_close(mirrored, estimate_object(maps, foreground, background).flip(2))

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 10**6), alike=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]))
    def test_is_finite_and_bounded(self, seed: int, alike: bool, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        maps = unit(2, 3, 1 + seed % 3, 4, seed=seed, dtype=dtype)
        maps = maps[:, :, :1, :1].expand_as(maps) if alike else maps  # a photo of one colour has no likeness to scale
        shares = torch.rand(3, 2, *maps.shape[2:], generator=generator, dtype=dtype)
        shares = (shares * (torch.rand(3, 2, 1, 1, generator=generator) < 0.5)).to(dtype)
        foreground, background = (shares[:2] / shares.sum(0).clamp_min(1)).unbind()
        logits = estimate_object(maps, foreground, background)
        assert logits.dtype == dtype
        assert logits.abs().max() <= 2 / TEMPERATURE + 1e-3

    def test_leaves_its_arguments_alone(self) -> None:
        maps, (foreground, background) = unit(1, CELLS, 4, 5), known("mixed")
        estimate_object(maps, foreground, background)
        assert torch.equal(maps, unit(1, CELLS, 4, 5))
        assert all(torch.equal(*pair) for pair in zip((foreground, background), known("mixed"), strict=True))


def new(**arguments: Any) -> SupportCompletion:
    return SupportCompletion(**({"feature_channels": FEATURES, "appearance": 4, "width": 8} | arguments))


def disturbed(completion: SupportCompletion) -> SupportCompletion:
    """As after training: no parameter is zero any more."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in completion.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return completion.eval()


def inputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    foreground, background = (torch.cat([side] * batch) for side in known("mixed", dtype=dtype))
    return (
        unit(batch, CELLS, 4, 5, dtype=dtype),
        unit(batch, FEATURES, 4, 5, seed=1, dtype=dtype),
        foreground,
        background,
    )


class TestSupportCompletion:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("training", [False, True])
    def test_untrained_it_is_the_estimate(self, kind: str, training: bool) -> None:
        maps, features, _, _ = inputs(1)
        sides = known(kind, dtype=torch.float32)
        assert torch.equal(new().train(training)(maps, features, *sides), estimate_object(maps, *sides))

    def test_trained_it_corrects_the_estimate_by_what_it_sees(self) -> None:
        completion, (maps, features, *sides) = disturbed(new()), inputs()
        logits, estimate = completion(maps, features, *sides), estimate_object(maps, *sides)
        assert logits.shape == (2, 4, 5)
        correction = logits - completion.gain * estimate
        assert correction.std() > 1e-3
        other = completion(maps, features.roll(1, 1), *sides) - completion.gain * estimate
        assert (other - correction).abs().max() > 1e-3

    @pytest.mark.parametrize("moved", range(4))
    def test_the_correction_depends_on_all_that_is_read(self, moved: int) -> None:
        completion, before = disturbed(new()), list(inputs())
        after = [tensor.flip(-2) if number == moved else tensor for number, tensor in enumerate(before)]

        def correction(maps: Tensor, features: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
            estimate = estimate_object(maps, foreground, background)
            corrected: Tensor = completion(maps, features, foreground, background) - completion.gain * estimate
            return corrected

        assert (correction(*after) - correction(*before)).abs().max() > 1e-3

    def test_a_batch_equals_its_supports_one_by_one(self) -> None:
        completion, (maps, features, *sides) = disturbed(new()), inputs()
        together = completion(maps, features, *sides)
        for n in range(2):
            alone = completion(maps[[n]], features[[n]], *(side[[n]] for side in sides))
            torch.testing.assert_close(together[[n]], alone, rtol=1e-4, atol=1e-4)

    def test_has_no_fixed_size(self) -> None:
        completion = disturbed(new())
        for height, width in ((2, 2), (7, 3)):
            nothing = torch.zeros(1, height, width)
            logits = completion(
                unit(1, CELLS, height, width, dtype=torch.float32),
                unit(1, FEATURES, height, width, dtype=torch.float32),
                nothing,
                nothing,
            )
            assert logits.shape == (1, height, width)
            assert logits.isfinite().all()

    def test_double_precision(self) -> None:
        completion, single = disturbed(new()), inputs()
        expected = completion(*single)
        double = completion.double()(*(tensor.double() for tensor in single))
        assert (expected.dtype, double.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(double.float(), expected, rtol=1e-3, atol=1e-3)

    def test_gradients_reach_every_parameter(self) -> None:
        completion = disturbed(new())
        torch.autograd.backward(completion(*inputs()).square().mean())
        assert [n for n, p in completion.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_can_be_built_again(self) -> None:
        completion = disturbed(new(appearance=3, width=16, dropout=0.3))
        again = SupportCompletion(**completion.description(), seed=9)
        again.load_state_dict(completion.state_dict())
        assert again.description() == completion.description()
        assert again.feature_channels == FEATURES
        assert torch.equal(again.eval()(*inputs()), completion(*inputs()))

    def test_the_description_is_a_copy(self) -> None:
        completion = new()
        completion.description()["width"] = 99
        assert completion.description()["width"] == 8

    def test_the_seed_decides_and_global_randomness_is_untouched(self) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        first, same, other = (new(seed=seed).state_dict() for seed in (1, 1, 2))
        assert torch.equal(torch.rand(3), expected)
        assert all(torch.equal(first[name], same[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"feature_channels": 0}, "got 0 features, 4 appearance channels, width 8"),
            ({"appearance": 0}, "got 10 features, 0 appearance channels, width 8"),
            ({"width": 0}, "width 0"),
            ({"width": 12}, "a width that is a multiple of 8, got 10 features, 4 appearance channels, width 12"),
        ],
    )
    def test_refuses_sizes(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message) as caught:
            new(**arguments)
        assert "\n" not in str(caught.value)


def loss_by_loop(completed: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    losses = []
    for n in range(len(truth[0])):
        sums = dict.fromkeys(("entropy", "valid", "overlap", "sizes"), 0.0)
        for y in range(truth[0].shape[1]):
            for x in range(truth[0].shape[2]):
                said, true = ([float(side[n, y, x]) for side in pair] for pair in (completed, truth))
                sums["valid"] += sum(true)
                sums["entropy"] -= sum(t * math.log(max(s, 1e-4)) for s, t in zip(said, true, strict=True))
                sums["overlap"] += said[0] * true[0]
                sums["sizes"] += said[0] * sum(true) + true[0]
        entropy = sums["entropy"] / sums["valid"] if sums["valid"] else 0.0
        losses.append(entropy + 1 - (2 * sums["overlap"] + 1) / (sums["sizes"] + 1))
    return sum(losses) / len(losses)


def shares(count: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sides float64 (N, 2, 3) that add up to at most 1; a part of each cell is ignored."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(3, count, 2, 3, generator=generator, dtype=torch.float64) + 0.01
    drawn = drawn / drawn.sum(0)
    return drawn[0], drawn[1]


class TestCompletionLoss:
    def test_hand_worked(self) -> None:
        half, one, none = torch.tensor([[[0.5]]]), torch.tensor([[[1.0]]]), torch.tensor([[[0.0]]])
        # entropy ln 2; Dice 1 - (2 * 0.5 + 1) / (0.5 + 1 + 1) = 0.2
        assert completion_loss(half, half, one, none).item() == pytest.approx(math.log(2) + 0.2)
        # the same for background: Dice 1 - 1 / (0.5 + 1) = 1/3
        assert completion_loss(half, half, none, one).item() == pytest.approx(math.log(2) + 1 / 3)
        assert completion_loss(one, none, one, none).item() == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("seed", range(3))
    def test_equals_the_plain_loop(self, seed: int) -> None:
        completed, truth = shares(seed=seed), shares(seed=seed + 10)
        for side in truth:
            side[1] = 0  # without any valid area
        assert completion_loss(*completed, *truth).item() == pytest.approx(loss_by_loop(completed, truth), rel=1e-9)

    def test_gradient(self) -> None:
        completed = [side.requires_grad_() for side in shares()]
        truth = shares(seed=7)
        assert torch.autograd.gradcheck(lambda *said: completion_loss(*said, *truth), completed)

    @pytest.mark.parametrize("said", [0.0, 1.0])
    def test_gradient_is_finite_where_there_is_no_doubt(self, said: float) -> None:
        foreground = torch.full((1, 2, 2), said, requires_grad=True)
        background = torch.full((1, 2, 2), 1 - said, requires_grad=True)
        truth = torch.tensor([[[1.0, 0.0], [0.5, 0.0]]])
        loss = completion_loss(foreground, background, truth, 1 - truth)
        torch.autograd.backward(loss)
        assert loss.isfinite()
        for side in (foreground, background):
            assert side.grad is not None
            assert side.grad.isfinite().all()

    def test_what_is_ignored_counts_nothing(self) -> None:
        completed, truth = shares(), shares(seed=7)
        for side in truth:
            side[:, 0, 1] = 0
        changed = [side.clone() for side in completed]
        changed[0][:, 0, 1], changed[1][:, 0, 1] = 0.9, 0.1
        assert completion_loss(*changed, *truth) == completion_loss(*completed, *truth)

    def test_a_support_without_valid_area_adds_nothing(self) -> None:
        completed, truth = shares(2), shares(2, seed=7)
        for side in truth:
            side[1] = 0
        alone = completion_loss(*(side[:1] for side in completed), *(side[:1] for side in truth))
        torch.testing.assert_close(completion_loss(*completed, *truth), alone / 2)

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 10**6))
    def test_the_truth_is_best(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        object_cells = (torch.rand(2, 3, 3, generator=generator) < 0.5).double()
        said = torch.rand(2, 3, 3, generator=generator, dtype=torch.float64)
        right = completion_loss(object_cells, 1 - object_cells, object_cells, 1 - object_cells)
        assert right.item() == pytest.approx(0, abs=1e-12)
        assert completion_loss(said, 1 - said, object_cells, 1 - object_cells) > right
