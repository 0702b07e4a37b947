"""The decoder starts as its first prior, stays small, and can be built again from its description."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.attention import scale_map
from fewshot_seg.decoder import ConvolutionBlock, MaskDecoder, PriorReadout

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
