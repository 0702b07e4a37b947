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

from episodes.types import IGNORE, OUTSIDE, DataError
from fewshot_seg.completion import SupportCompletion, completion_loss, estimate_object, open_part
from fewshot_seg.similarity import cell_weights

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


def with_open(sides: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Foreground, background and, as nothing lies beside the photo, all else as open."""
    return *sides, 1 - sides[0] - sides[1]


def beside(inside: Tensor, rows: int = 2, columns: int = 3) -> Tensor:
    """Something (..., h, w) of a photo at the top left of a larger square: nothing lies beside it."""
    return F.pad(inside, (0, columns, 0, rows))


def first_guess_by_loop(maps: Tensor, foreground: Tensor, background: Tensor, inside: list[Any]) -> dict[Any, float]:
    """One support: (D, h, w), (h, w), (h, w), and the cells (y, x) of the photo, which lies at the top left."""
    if any(foreground[cell] > 0 for cell in inside):
        prototype = [sum(float(channel[cell] * foreground[cell]) for cell in inside) for channel in maps]
        length = math.sqrt(sum(value**2 for value in prototype))
        likeness = {c: sum(float(maps[d][c]) * p / length for d, p in enumerate(prototype)) for c in inside}
        low, high = min(likeness.values()), max(likeness.values())
        return {cell: (value - low) / (high - low) for cell, value in likeness.items()}
    if any(background[cell] > 0 for cell in inside):
        return dict.fromkeys(inside, 1.0)
    bottom, right = inside[-1]
    return {(y, x): math.exp(-2 * ((-1 + 2 * y / bottom) ** 2 + (-1 + 2 * x / right) ** 2)) for y, x in inside}


def estimate_by_loop(maps: Tensor, foreground: Tensor, background: Tensor, still_open: Tensor) -> Tensor:
    _, height, width = maps.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    inside = [cell for cell in cells if foreground[cell] + background[cell] + still_open[cell] > 0]
    guess = first_guess_by_loop(maps, foreground, background, inside)
    sides = (
        {cell: float(foreground[cell] + still_open[cell] * guess[cell]) for cell in inside},
        {cell: float(background[cell] + still_open[cell] * (1 - guess[cell])) for cell in inside},
    )
    result = torch.zeros(height, width, dtype=torch.float64)
    for y, x in cells:
        means = []
        for side in sides:
            kernels = {c: math.exp((float(maps[:, y, x] @ maps[:, c[0], c[1]]) - 1) / TEMPERATURE) for c in side}
            weight = sum(side.values())
            mean = sum(share * kernels[c] for c, share in side.items()) / weight if weight else 0.0
            means.append(max(mean, math.exp(-2 / TEMPERATURE)))
        result[y, x] = math.log(means[0]) - math.log(means[1])
    return result


class TestOpenPart:
    def test_is_what_is_not_known(self) -> None:
        marks = torch.tensor([[[0, IGNORE, 1, IGNORE, OUTSIDE, OUTSIDE], [1, 0, 1, IGNORE, OUTSIDE, IGNORE]]])
        shares = open_part(marks.to(torch.uint8), (1, 3))
        assert shares.dtype == torch.float32
        assert shares.tolist() == [[[0.25, 0.5, 0.25]]]

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
    def test_object_background_open_and_beside_make_one(
        self, height: int, width: int, rows: int, columns: int, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        values = torch.tensor([0, 1, OUTSIDE, IGNORE], dtype=torch.uint8)
        marks = values[torch.randint(0, 4, (2, height, width), generator=generator)]
        beside_it = F.adaptive_avg_pool2d((marks == OUTSIDE).float()[:, None], (rows, columns))[:, 0]
        shares = (*cell_weights(marks, (rows, columns)), open_part(marks, (rows, columns)), beside_it)
        torch.testing.assert_close(sum(shares), torch.ones(2, rows, columns))


class TestEstimate:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("seed", [0, 1])
    def test_equals_the_plain_loop(self, kind: str, seed: int) -> None:
        maps, parts = unit(1, CELLS, 4, 5, seed=seed), with_open(known(kind))
        expected = estimate_by_loop(maps[0], *(part[0] for part in parts))
        torch.testing.assert_close(estimate_object(maps, *parts)[0], expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("kind", KINDS)
    def test_equals_the_plain_loop_beside_a_photo(self, kind: str) -> None:
        maps, parts = unit(1, CELLS, 6, 8), [beside(part) for part in with_open(known(kind))]
        expected = estimate_by_loop(maps[0], *(part[0] for part in parts))
        torch.testing.assert_close(estimate_object(maps, *parts)[0], expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("seed", [0, 1])
    def test_what_lies_beside_the_photo_changes_nothing_in_it(self, kind: str, seed: int) -> None:
        """The middle of the photo stays its middle, and black padding does not become what is least like the object."""
        maps, parts = unit(1, CELLS, 6, 8, seed=seed), with_open(known(kind))
        alone = estimate_object(maps[:, :, :4, :5], *parts)
        together = estimate_object(maps, *(beside(part) for part in parts))
        torch.testing.assert_close(together[:, :4, :5], alone)

    def test_where_nothing_is_a_photo_it_is_finite(self) -> None:
        nothing = torch.zeros(1, 4, 5, dtype=torch.float64)
        assert estimate_object(unit(1, CELLS, 4, 5), nothing, nothing, nothing).isfinite().all()

    def test_supports_of_all_kinds_in_one_batch_are_estimated_alone(self) -> None:
        maps, marks = unit(len(KINDS), CELLS, 4, 5), [with_open(known(kind)) for kind in KINDS]
        together = estimate_object(maps, *(torch.cat(part) for part in zip(*marks, strict=True)))
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
        logits = estimate_object(maps, torch.zeros(1, 4, 4), background, 1 - background)
        expected = torch.zeros(1, 4, 4, dtype=torch.bool)
        expected[0, 1, 1:3] = True
        assert torch.equal(logits > 0, expected)

    def test_finds_what_looks_like_the_point(self) -> None:
        maps = torch.zeros(1, 2, 3, 6)
        maps[0, 0, :, :3], maps[0, 1, :, 3:] = 1, 1
        foreground = torch.zeros(1, 3, 6)
        foreground[0, 1, 4] = 0.1
        logits = estimate_object(maps, foreground, torch.zeros(1, 3, 6), 1 - foreground)
        assert torch.equal(logits > 0, maps[:, 1] == 1)

    def test_of_a_label_takes_what_is_in_the_middle(self) -> None:
        maps = torch.zeros(1, 2, 5, 5)
        maps[0, 0] = 1
        maps[0, :, 1:4, 1:4] = torch.tensor([0.0, 1.0])[:, None, None]
        nothing = torch.zeros(1, 5, 5)
        assert torch.equal(estimate_object(maps, nothing, nothing, 1 - nothing) > 0, maps[:, 1] == 1)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_mirrored_support_is_estimated_mirrored(self, kind: str) -> None:
        maps, parts = unit(1, CELLS, 4, 5), with_open(known(kind))
        mirrored = estimate_object(maps.flip(3), *(part.flip(2) for part in parts))
        torch.testing.assert_close(mirrored, estimate_object(maps, *parts).flip(2))

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 10**6), alike=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]))
    def test_is_finite_and_bounded(self, seed: int, alike: bool, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        maps = unit(2, 3, 1 + seed % 3, 4, seed=seed, dtype=dtype)
        maps = maps[:, :, :1, :1].expand_as(maps) if alike else maps  # a photo of one colour has no likeness to scale
        shares = torch.rand(4, 2, *maps.shape[2:], generator=generator, dtype=dtype)  # the last is beside the photo
        shares = (shares * (torch.rand(4, 2, 1, 1, generator=generator) < 0.5)).to(dtype)
        logits = estimate_object(maps, *(shares[:3] / shares.sum(0).clamp_min(1)).unbind())
        assert logits.dtype == dtype
        assert logits.abs().max() <= 2 / TEMPERATURE + 1e-3

    def test_leaves_its_arguments_alone(self) -> None:
        maps, parts = unit(1, CELLS, 4, 5), with_open(known("mixed"))
        estimate_object(maps, *parts)
        assert torch.equal(maps, unit(1, CELLS, 4, 5))
        assert all(torch.equal(*pair) for pair in zip(parts, with_open(known("mixed")), strict=True))


def new(**arguments: Any) -> SupportCompletion:
    return SupportCompletion(**({"feature_channels": FEATURES, "appearance": 4, "width": 8} | arguments))


def disturbed(completion: SupportCompletion) -> SupportCompletion:
    """As after training: no parameter is zero any more."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in completion.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return completion.eval()


def inputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return (
        unit(batch, CELLS, 4, 5, dtype=dtype),
        unit(batch, FEATURES, 4, 5, seed=1, dtype=dtype),
        *(torch.cat([part] * batch) for part in with_open(known("mixed", dtype=dtype))),
    )


class TestSupportCompletion:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("training", [False, True])
    def test_untrained_it_is_the_estimate(self, kind: str, training: bool) -> None:
        maps, features, *_ = inputs(1)
        parts = with_open(known(kind, dtype=torch.float32))
        assert torch.equal(new().train(training)(maps, features, *parts), estimate_object(maps, *parts))

    def test_trained_it_corrects_the_estimate_by_what_it_sees(self) -> None:
        completion, (maps, features, *sides) = disturbed(new()), inputs()
        logits, estimate = completion(maps, features, *sides), estimate_object(maps, *sides)
        assert logits.shape == (2, 4, 5)
        correction = logits - completion.gain * estimate
        assert correction.std() > 1e-3
        other = completion(maps, features.roll(1, 1), *sides) - completion.gain * estimate
        assert (other - correction).abs().max() > 1e-3

    @pytest.mark.parametrize("moved", range(5))
    def test_the_correction_depends_on_all_that_is_read(self, moved: int) -> None:
        completion, before = disturbed(new()), list(inputs())
        after = [tensor.flip(-2) if number == moved else tensor for number, tensor in enumerate(before)]

        def correction(maps: Tensor, features: Tensor, *parts: Tensor) -> Tensor:
            corrected: Tensor = completion(maps, features, *parts) - completion.gain * estimate_object(maps, *parts)
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
                1 - nothing,
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

    def test_objects_answer_for_bare_photos_alone(self) -> None:
        """Photos with a mark, also in the same batch, are completed by the network as before."""
        completion, maps, features = disturbed(new(objects=True)), unit(4, CELLS, 4, 5), unit(4, FEATURES, 4, 5, seed=1)
        maps, features = maps.float(), features.float()
        parts = [
            torch.cat(part)
            for part in zip(*(with_open(known(kind, dtype=torch.float32)) for kind in KINDS), strict=True)
        ]
        assert completion.objects is not None
        completion.objects.weight.copy_(torch.linspace(-1, 1, FEATURES))
        found = completion(maps, features, *parts)
        bare = [kind == "label" for kind in KINDS]
        plain = new()
        plain.load_state_dict({name: one for name, one in completion.state_dict().items() if "objects" not in name})
        expected = plain.eval()(maps, features, *parts)
        assert torch.equal(found[bare], completion.objects(features)[bare])
        assert torch.equal(found[[not one for one in bare]], expected[[not one for one in bare]])
        assert (found[bare] - expected[bare]).abs().max() > 1e-2
        assert torch.equal(completion.objectness(maps, features)[bare], found[bare])
        torch.testing.assert_close(plain.objectness(maps, features)[bare], expected[bare], rtol=1e-4, atol=1e-4)

    def test_can_be_built_again(self) -> None:
        completion = disturbed(new(appearance=3, width=16, dropout=0.3, objects=True))
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
