"""The decoder starts as its first prior, stays small, and can be built again from its description."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.attention import scale_map
from fewshot_seg.decoder import ContextDecoder, ConvolutionBlock, MaskDecoder, PriorReadout, map_statistics

FEATURES = 12


def inputs(batch: int = 2, priors: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        3 * torch.randn(batch, priors, 5, 4, generator=generator),
        F.normalize(torch.randn(batch, FEATURES, 5, 4, generator=generator), dim=1),
        F.normalize(torch.randn(batch, FEATURES, generator=generator), dim=1),
    )


def build(**arguments: Any) -> MaskDecoder:
    return MaskDecoder(**({"prior_channels": 6, "feature_channels": FEATURES, "width": 8} | arguments))


def disturbed(decoder: MaskDecoder, seed: int = 0) -> MaskDecoder:
    """As after training: no parameter is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return decoder.eval()


class TestConvolutionBlock:
    @pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (3, 2), (3, 4)])
    def test_keeps_the_size_and_sees_as_far_as_its_dilation(self, kernel: int, dilation: int) -> None:
        block = ConvolutionBlock(2, 8, kernel, dilation)
        maps = torch.zeros(1, 2, 13, 11)
        maps[0, :, 6, 5] = 1
        reached = block.convolution(maps) - block.convolution(torch.zeros_like(maps))
        offsets = {(y - 6, x - 5) for y, x in reached[0].abs().sum(0).nonzero().tolist()}
        steps = range(-(kernel // 2) * dilation, kernel // 2 * dilation + 1, dilation)
        assert offsets == {(y, x) for y in steps for x in steps}
        result = block(maps)
        assert result.shape == (1, 8, 13, 11)
        torch.testing.assert_close(result, F.relu(F.group_norm(block.convolution(maps), 8)))


class TestMaskDecoder:
    @pytest.mark.parametrize("appearance", [0, 3])
    def test_untrained_it_is_the_first_prior_upsampled(self, appearance: int) -> None:
        priors, maps, prototype = inputs()
        logits = build(appearance=appearance)(priors, maps, prototype)
        expected = F.interpolate(priors[:, :1], scale_factor=2, mode="bilinear", align_corners=False)[:, 0]
        assert logits.shape == (2, 10, 8)
        assert torch.equal(logits, expected)

    def test_without_prior_it_starts_undecided(self) -> None:
        priors, maps, prototype = inputs(priors=0)
        logits = build(prior_channels=0, appearance=3)(priors, maps, prototype)
        assert torch.equal(logits, torch.zeros(2, 10, 8))

    @pytest.mark.parametrize("options", [{"width": 32}, {"width": 48, "blocks": 4, "appearance": 32}])
    def test_is_small(self, options: dict[str, int]) -> None:
        decoder = build(**(options | {"feature_channels": 112 + 320}))  # of the default backbone
        assert sum(parameter.numel() for parameter in decoder.parameters()) < 2_000_000

    def test_description_builds_it_again(self) -> None:
        decoder = disturbed(build(appearance=3, width=16, blocks=1, dropout=0.3))
        twin = MaskDecoder(**decoder.description()).eval()
        twin.load_state_dict(decoder.state_dict())
        assert torch.equal(twin(*inputs()), decoder(*inputs()))
        assert twin.description() == decoder.description()
        assert twin.dropout.p == 0.3

    def test_description_cannot_be_changed_from_outside(self) -> None:
        decoder = build()
        decoder.description()["width"] = 0
        assert decoder.description()["width"] == 8

    def test_seed_decides_the_values_and_global_randomness_is_untouched(self) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        first, same, other = (build(seed=seed) for seed in (1, 1, 2))
        assert torch.equal(torch.rand(3), expected)
        assert torch.equal(first.entry.convolution.weight, same.entry.convolution.weight)
        assert not torch.equal(first.entry.convolution.weight, other.entry.convolution.weight)

    def test_dropout_only_in_training(self) -> None:
        decoder = disturbed(build(dropout=0.5))
        assert torch.equal(decoder(*inputs()), decoder(*inputs()))
        decoder.train()
        torch.manual_seed(0)
        first = decoder(*inputs())
        assert not torch.equal(first, decoder(*inputs()))
        torch.manual_seed(0)
        assert torch.equal(first, decoder(*inputs()))

    @pytest.mark.parametrize("mode", [True, False])
    def test_episodes_of_a_batch_do_not_mix(self, mode: bool) -> None:
        decoder = disturbed(build(appearance=3, dropout=0.0)).train(mode)
        priors, maps, prototype = inputs(3)
        together = decoder(priors, maps, prototype)
        for n in range(3):
            alone = decoder(priors[n : n + 1], maps[n : n + 1], prototype[n : n + 1])
            torch.testing.assert_close(together[n : n + 1], alone)

    def test_sees_features_only_if_asked(self) -> None:
        priors, maps, prototype = inputs()
        _, other_maps, other_prototype = inputs(seed=1)
        blind, seeing = disturbed(build()), disturbed(build(appearance=3))
        assert torch.equal(blind(priors, maps, prototype), blind(priors, other_maps, other_prototype))
        assert not torch.equal(seeing(priors, maps, prototype), seeing(priors, other_maps, prototype))
        assert not torch.equal(seeing(priors, maps, prototype), seeing(priors, maps, other_prototype))

    def test_gradients_reach_every_parameter(self) -> None:
        decoder = disturbed(build(appearance=3))
        decoder(*inputs()).square().sum().backward()
        silent = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == []

    def test_does_not_change_its_arguments(self) -> None:
        arguments = inputs()
        disturbed(build(appearance=3))(*arguments)
        assert all(torch.equal(left, right) for left, right in zip(arguments, inputs(), strict=True))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prior_channels": 0}, "nothing to read: give it a prior, or appearance channels"),
            ({"width": 12}, "width must be a multiple of 8, got 12"),
            ({"width": 0}, "width must be a multiple of 8, got 0"),
            ({"appearance": -1}, "must not be negative, got 6 prior maps, -1 appearance channels, 2 blocks"),
            ({"blocks": -2}, "must not be negative, got .* -2 blocks"),
        ],
    )
    def test_refuses(self, options: dict[str, int], message: str) -> None:
        with pytest.raises(DataError, match=message):
            build(**options)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def loop_statistics(maps: list[list[float]]) -> list[float]:
    """Of P maps of one photo, a list of cells each: statistic by statistic, map by map."""
    regions = [
        [sigmoid(2 * value) for value in maps[0]],
        [sigmoid(2 * value - 2) for value in maps[0]],
        [1 - sigmoid(2 * value) for value in maps[0]],
    ]
    means = [sum(one) / len(one) for one in maps]
    found = [
        means,
        [statistics.pstdev(one) for one in maps],
        [max(one) for one in maps],
        [min(one) for one in maps],
        *([sum(v * w for v, w in zip(one, region, strict=True)) / sum(region) for one in maps] for region in regions),
        [sum(max(0.0, v - mean) for v in one) / len(one) for one, mean in zip(maps, means, strict=True)],
    ]
    return [value for row in found for value in row]


class TestMapStatistics:
    def test_equals_plain_loops(self) -> None:
        maps = inputs(3, 4)[0].double()
        found = map_statistics(maps)
        assert found.shape == (3, 8 * 4)
        for n in range(3):
            assert found[n].tolist() == pytest.approx(loop_statistics(maps[n].flatten(1).tolist()), rel=1e-9)

    def test_of_a_photo_without_any_contrast(self) -> None:
        maps = torch.full((1, 2, 3, 3), -40.0, requires_grad=True)  # nothing is inside: no weight to divide by
        found = map_statistics(maps)
        assert found.isfinite().all()
        (gradient,) = torch.autograd.grad(found.sum(), maps)
        assert gradient.isfinite().all()

    def test_gradcheck(self) -> None:
        assert torch.autograd.gradcheck(map_statistics, (inputs(1, 2)[0].double().requires_grad_(),))


def build_context(**arguments: Any) -> ContextDecoder:
    return ContextDecoder(**({"prior_channels": 6, "width": 8, "context": 5} | arguments))


def worked(decoder: ContextDecoder, seed: int = 0) -> ContextDecoder:
    """As after training: no parameter is zero any more, and the scales are those of some priors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    decoder.fit_scales(inputs(9, decoder.prior_channels, seed=7)[0] + 0.5)
    return decoder.eval()


class TestContextDecoder:
    @pytest.mark.parametrize("mode", [True, False])
    def test_untrained_it_is_the_first_prior_times_the_gain(self, mode: bool) -> None:
        decoder = build_context().train(mode)
        assert torch.equal(decoder(*inputs()), inputs()[0][:, 0])
        decoder.fit_scales(5 * inputs(9, seed=3)[0])
        with torch.no_grad():
            decoder.gain.fill_(1.5)
        torch.testing.assert_close(decoder(*inputs()), 1.5 * inputs()[0][:, 0])

    def test_fit_scales(self) -> None:
        decoder, priors = build_context(prior_channels=3), inputs(7, 3)[0] * torch.tensor([2.0, 0.1, 30])[:, None, None]
        decoder.fit_scales(priors.half())
        priors = priors.half().double()
        spread = [1, *(statistics.stdev(priors[:, n].flatten().tolist()) for n in (1, 2))]
        assert decoder.scale.tolist() == pytest.approx(spread, rel=1e-5)  # the first map keeps its unit
        maps = priors / torch.tensor(spread, dtype=torch.float64)[:, None, None]
        columns = list(zip(*(loop_statistics(one.flatten(1).tolist()) for one in maps), strict=True))
        assert decoder.statistics_mean.tolist() == pytest.approx([statistics.mean(one) for one in columns], abs=1e-4)
        deviations = [statistics.stdev(one) + 1e-3 for one in columns]
        assert decoder.statistics_scale.tolist() == pytest.approx(deviations, rel=1e-3)

    def test_a_map_that_never_varies_has_a_scale_nevertheless(self) -> None:
        decoder, priors = worked(build_context()), inputs(4)[0]
        priors[:, 2] = 3
        decoder.fit_scales(priors)
        assert decoder.scale.min() >= 1e-3
        assert decoder(priors, *inputs(4)[1:]).isfinite().all()

    @pytest.mark.parametrize("size", [(5, 4), (1, 1)])
    def test_scales_of_one_episode(self, size: tuple[int, int]) -> None:
        """It shows how maps vary within a photo (if it has several cells), but not how photos differ."""
        decoder = worked(build_context(prior_channels=3))
        priors = 4 * torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        decoder.fit_scales(priors)
        spread = [1, *(priors[0, n].std().item() if priors[0, n].numel() > 1 else 1 for n in (1, 2))]
        assert decoder.scale.tolist() == pytest.approx(spread)
        seen = map_statistics(priors / torch.tensor(spread)[:, None, None])[0]
        torch.testing.assert_close(decoder.statistics_mean, seen)
        assert torch.equal(decoder.statistics_scale, torch.ones_like(seen))

    def test_scales_of_no_episode(self) -> None:
        with pytest.raises(DataError, match="from at least one episode, got none"):
            build_context(prior_channels=3).fit_scales(torch.zeros(0, 3, 5, 4))

    def test_equals_a_small_network_at_every_cell(self) -> None:
        """Shifted by what the statistics of the whole photo say."""
        decoder, (priors, *others) = worked(build_context()), inputs()
        found = decoder(priors, *others)
        for n in range(2):
            maps = priors[n] / decoder.scale[:, None, None]
            seen = torch.tensor(loop_statistics(maps.flatten(1).tolist()))
            seen = (seen - decoder.statistics_mean) / decoder.statistics_scale
            first_layer, last_layer = decoder.context[1], decoder.context[4]
            shifts = last_layer.weight @ (first_layer.weight @ seen + first_layer.bias).relu() + last_layer.bias
            for y in range(5):
                for x in range(4):
                    cell = maps[:, y, x]
                    hidden = (decoder.entry.weight @ cell + decoder.entry.bias + shifts[:8]).relu()
                    inner = decoder.hidden.weight @ hidden + decoder.hidden.bias
                    hidden = (hidden + inner + shifts[8:16]).relu()
                    expected = decoder.exit.weight[0] @ hidden + decoder.exit.bias[0] + shifts[16]
                    torch.testing.assert_close(found[n, y, x], expected + decoder.gain * cell[0], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("mode", [True, False])
    def test_episodes_of_a_batch_do_not_mix(self, mode: bool) -> None:
        decoder = worked(build_context(dropout=0.0)).train(mode)
        priors, maps, prototype = inputs(3)
        together = decoder(priors, maps, prototype)
        for n in range(3):
            alone = decoder(priors[n : n + 1], maps[n : n + 1], prototype[n : n + 1])
            torch.testing.assert_close(together[n : n + 1], alone)

    def test_the_rest_of_the_photo_has_a_say(self) -> None:
        decoder, (priors, *others) = worked(build_context()), inputs()
        changed = priors.clone()
        changed[:, :, 3:] += 2
        before, after = decoder(priors, *others), decoder(changed, *others)
        assert (after[:, :3] - before[:, :3]).abs().max() > 1e-3

    def test_places_do_not_matter(self) -> None:
        decoder, (priors, *others) = worked(build_context()), inputs()
        order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
        shuffled = priors.flatten(2)[:, :, order].reshape(priors.shape)
        expected = decoder(priors, *others).flatten(1)[:, order]
        torch.testing.assert_close(decoder(shuffled, *others).flatten(1), expected)

    def test_dropout_only_in_training(self) -> None:
        decoder = worked(build_context(dropout=0.5))
        assert torch.equal(decoder(*inputs()), decoder(*inputs()))
        decoder.train()
        torch.manual_seed(0)
        first = decoder(*inputs())
        assert not torch.equal(first, decoder(*inputs()))
        torch.manual_seed(0)
        assert torch.equal(first, decoder(*inputs()))

    def test_description_builds_it_again(self) -> None:
        decoder = worked(build_context(dropout=0.3))
        twin = ContextDecoder(**decoder.description())
        twin.load_state_dict(decoder.state_dict())
        assert torch.equal(twin.eval()(*inputs()), decoder(*inputs()))
        assert twin.description() == decoder.description()
        assert [part.p for part in twin.context if isinstance(part, torch.nn.Dropout)] == [0.3, 0.3]

    def test_description_cannot_be_changed_from_outside(self) -> None:
        decoder = build_context()
        decoder.description()["width"] = 0
        assert decoder.description()["width"] == 8

    def test_seed_decides_the_values_and_global_randomness_is_untouched(self) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        first, same, other = (build_context(seed=seed) for seed in (1, 1, 2))
        assert torch.equal(torch.rand(3), expected)
        assert torch.equal(first.entry.weight, same.entry.weight)
        assert not torch.equal(first.entry.weight, other.entry.weight)

    def test_gradients_reach_every_parameter(self) -> None:
        decoder = worked(build_context())
        decoder(*inputs()).square().sum().backward()
        silent = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == []

    def test_the_first_step_trains_it(self) -> None:
        decoder = build_context()
        decoder(*inputs()).square().sum().backward()
        assert decoder.exit.weight.grad is not None
        assert decoder.exit.weight.grad.abs().sum() > 0

    def test_gradcheck(self) -> None:
        decoder, priors = worked(build_context(prior_channels=2)).double(), inputs(2, 2)[0].double()
        assert torch.autograd.gradcheck(lambda maps: decoder(maps, maps, maps), (priors.requires_grad_(),))

    def test_does_not_change_its_arguments(self) -> None:
        arguments, decoder = inputs(), worked(build_context())
        decoder(*arguments)
        decoder.fit_scales(arguments[0])
        assert all(torch.equal(left, right) for left, right in zip(arguments, inputs(), strict=True))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prior_channels": 0}, "sizes of at least 1, got 0 prior maps, width 8, context 5"),
            ({"width": 0}, "got 6 prior maps, width 0, context 5"),
            ({"context": -1}, "width 8, context -1"),
        ],
    )
    def test_refuses(self, options: dict[str, int], message: str) -> None:
        with pytest.raises(DataError, match=message):
            build_context(**options)


class TestPriorReadout:
    def test_raw(self) -> None:
        priors, maps, prototype = inputs()
        assert torch.equal(PriorReadout(2)(priors, maps, prototype), priors[:, 2])

    def test_scaled_as_an_attention_map_is_shown(self) -> None:
        priors, maps, prototype = inputs()
        shown = PriorReadout(2, scaled=True)(priors, maps, prototype)
        assert torch.equal(shown, scale_map(priors[:, 2].clamp_min(0)))
        assert shown.amin(dim=(1, 2)).tolist() == [0, 0]
        assert shown.amax(dim=(1, 2)).tolist() == [1, 1]

    @pytest.mark.parametrize("scaled", [True, False])
    def test_description_builds_it_again(self, scaled: bool) -> None:
        readout = PriorReadout(3, scaled=scaled)
        assert torch.equal(PriorReadout(**readout.description())(*inputs()), readout(*inputs()))
        assert list(readout.parameters()) == []
