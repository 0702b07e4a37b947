"""Pooling and the similarity network against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from episodes.types import IGNORE, OUTSIDE, DataError
from fewshot_seg.similarity import SimilarityNetwork, cell_weights, join_levels, masked_average_pool

CHANNELS = (5, 9)


def random_masks(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    values = torch.tensor([0, 1, IGNORE], dtype=torch.uint8)
    return values[torch.randint(0, 3, (count, height, width), generator=torch.Generator().manual_seed(seed))]


def random_levels(count: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # the scales differ as those of real stages do
    return [
        3 * torch.randn(count, CHANNELS[0], 4, 6, generator=generator),
        0.1 * torch.randn(count, CHANNELS[1], 2, 3, generator=generator),
    ]


def loop_cell_weights(mask: list[list[int]], size: tuple[int, int], value: int) -> list[list[float]]:
    """Share of `value` in each cell; cell i covers rows floor(i H / h) to ceil((i + 1) H / h)."""
    height, width = len(mask), len(mask[0])
    shares = []
    for i in range(size[0]):
        row = []
        for j in range(size[1]):
            rows = range(i * height // size[0], -(-(i + 1) * height // size[0]))
            columns = range(j * width // size[1], -(-(j + 1) * width // size[1]))
            hits = [mask[y][x] == value for y in rows for x in columns]
            row.append(sum(hits) / len(hits))
        shares.append(row)
    return shares


class TestCellWeights:
    @pytest.mark.parametrize(
        ("shape", "size"), [((8, 12), (2, 3)), ((7, 11), (3, 4)), ((5, 5), (5, 5)), ((3, 2), (4, 5))]
    )
    def test_equals_plain_loops(self, shape: tuple[int, int], size: tuple[int, int]) -> None:
        masks = random_masks(2, *shape)
        foreground, background = cell_weights(masks, size)
        assert foreground.dtype == background.dtype == torch.float32
        for n, mask in enumerate(masks.tolist()):
            torch.testing.assert_close(foreground[n], torch.tensor(loop_cell_weights(mask, size, 1)))
            torch.testing.assert_close(background[n], torch.tensor(loop_cell_weights(mask, size, 0)))

    def test_what_lies_beside_the_photo_is_no_background(self) -> None:
        marks = torch.tensor([[[1, 0, OUTSIDE, OUTSIDE], [0, IGNORE, OUTSIDE, 0]]], dtype=torch.uint8)
        foreground, background = cell_weights(marks, (1, 2))
        assert foreground.tolist() == [[[0.25, 0.0]]]
        assert background.tolist() == [[[0.5, 0.25]]]

    @settings(max_examples=30, deadline=None)
    @given(
        height=st.integers(1, 12),
        width=st.integers(1, 12),
        rows=st.integers(1, 6),
        columns=st.integers(1, 6),
        seed=st.integers(0, 1000),
    )
    def test_with_the_ignored_share_they_make_one(
        self, height: int, width: int, rows: int, columns: int, seed: int
    ) -> None:
        masks = random_masks(1, height, width, seed)
        foreground, background = cell_weights(masks, (rows, columns))
        ignored = F.adaptive_avg_pool2d((masks == IGNORE).float()[:, None], (rows, columns))[:, 0]
        torch.testing.assert_close(foreground + background + ignored, torch.ones(1, rows, columns))
        assert min(foreground.min().item(), background.min().item()) >= 0


class TestMaskedAveragePool:
    def test_equals_plain_loops(self) -> None:
        generator = torch.Generator().manual_seed(1)
        maps = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
        weights = torch.rand(2, 4, 5, generator=generator, dtype=torch.float64)
        pooled = masked_average_pool(maps, weights)
        for n in range(2):
            for channel in range(3):
                total = sum(maps[n, channel, y, x].item() * weights[n, y, x].item() for y in range(4) for x in range(5))
                assert pooled[n, channel].item() == pytest.approx(total / weights[n].sum().item(), rel=1e-12)

    def test_no_weight_gives_zero(self) -> None:
        assert torch.equal(masked_average_pool(torch.randn(1, 3, 2, 2), torch.zeros(1, 2, 2)), torch.zeros(1, 3))

    def test_scale_of_the_weights_does_not_matter(self) -> None:
        maps, weights = torch.randn(1, 3, 4, 4), torch.rand(1, 4, 4)
        torch.testing.assert_close(masked_average_pool(maps, weights), masked_average_pool(maps, 7 * weights))


class TestJoinLevels:
    def test_cells_have_unit_length_and_levels_speak_equally_loudly(self) -> None:
        joined = join_levels(random_levels())
        assert joined.shape == (2, sum(CHANNELS), 4, 6)
        torch.testing.assert_close(joined.norm(dim=1), torch.ones(2, 4, 6))
        first, second = joined[:, : CHANNELS[0]], joined[:, CHANNELS[0] :]
        torch.testing.assert_close(first.norm(dim=1), second.norm(dim=1))

    def test_equals_cell_by_cell_normalisation_of_upsampled_levels(self) -> None:
        levels = random_levels(1)
        joined = join_levels(levels)
        upsampled = F.interpolate(levels[1], (4, 6), mode="bilinear", align_corners=False)
        for y in range(4):
            for x in range(6):
                parts = [level[0, :, y, x] for level in (levels[0], upsampled)]
                expected = torch.cat([part / part.norm() for part in parts]) / math.sqrt(2)
                torch.testing.assert_close(joined[0, :, y, x], expected)

    def test_cosine_is_the_mean_of_the_levels_cosines(self) -> None:
        level = [torch.randn(2, channels, 1, 1) for channels in CHANNELS]
        joined = join_levels(level)[:, :, 0, 0]
        expected = torch.stack([F.cosine_similarity(one[0], one[1], dim=0) for one in level]).mean()
        torch.testing.assert_close(joined[0] @ joined[1], expected)

    def test_scale_of_a_level_does_not_matter(self) -> None:
        first, second = random_levels()
        torch.testing.assert_close(join_levels([first, second]), join_levels([100 * first, second]))


class TestSimilarityNetwork:
    def test_rank_zero_is_the_frozen_features_exactly(self) -> None:
        network, levels = SimilarityNetwork(CHANNELS, rank=0), random_levels()
        assert torch.equal(network(levels), join_levels(levels))
        assert list(network.parameters()) == []

    def test_untrained_it_is_the_frozen_features(self) -> None:
        levels = random_levels()
        torch.testing.assert_close(SimilarityNetwork(CHANNELS, rank=3)(levels), join_levels(levels), rtol=0, atol=2e-7)

    def test_equals_a_matrix_product_per_cell(self) -> None:
        network, levels = SimilarityNetwork(CHANNELS, rank=3), random_levels(1)
        with torch.no_grad():
            network.up.weight.normal_(generator=torch.Generator().manual_seed(0))
        turned = network(levels)
        down, up = network.down.weight[:, :, 0, 0], network.up.weight[:, :, 0, 0]
        joined = join_levels(levels)
        for y in range(4):
            for x in range(6):
                cell = joined[0, :, y, x]
                expected = cell + up @ (down @ cell)
                torch.testing.assert_close(turned[0, :, y, x], expected / expected.norm())

    def test_seed_decides_the_values_and_global_randomness_is_untouched(self) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        first, same, other = (SimilarityNetwork(CHANNELS, rank=4, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(torch.rand(3), expected)
        assert torch.equal(first.down.weight, same.down.weight)
        assert not torch.equal(first.down.weight, other.down.weight)

    def test_the_first_step_trains_it(self) -> None:
        network = SimilarityNetwork(CHANNELS, rank=3)
        network(random_levels())[:, 0].sum().backward()
        assert network.up.weight.grad is not None
        assert network.up.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize("rank", [0, 1, 4])
    def test_cosines_are_those_of_turned_cells_and_so_are_their_gradients(self, rank: int) -> None:
        network, generator = SimilarityNetwork(CHANNELS, rank=rank).double(), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        width, sides = sum(CHANNELS), []
        for cells in (5, 7):
            drawn = torch.randn(2, cells, width, generator=generator, dtype=torch.float64)
            sides.append(F.normalize(drawn, dim=2))
        found = network.cosines(*sides)
        queries, supports = (network.turn(one.transpose(1, 2)[..., None])[..., 0] for one in sides)
        expected = torch.einsum("bcm,bcn->bmn", queries, supports)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        if not rank:
            assert not found.requires_grad
            return
        weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
        parameters = [network.down.weight, network.up.weight]
        gradients = [torch.autograd.grad((one * weights).sum(), parameters) for one in (found, expected)]
        for left, right in zip(*gradients, strict=True):
            assert right.abs().max() > 0.1
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)

    def test_embeddings_have_unit_length(self) -> None:
        network = SimilarityNetwork(CHANNELS, rank=2)
        maps, weights = network(random_levels()), torch.rand(2, 4, 6)
        whole, region = network.embed(maps), network.embed(maps, weights)
        torch.testing.assert_close(whole.norm(dim=1), torch.ones(2))
        torch.testing.assert_close(region.norm(dim=1), torch.ones(2))
        torch.testing.assert_close(whole, F.normalize(maps.mean(dim=(2, 3)), dim=1))
        torch.testing.assert_close(region, F.normalize(masked_average_pool(maps, weights), dim=1))
        torch.testing.assert_close(network.embed(maps, torch.ones(2, 4, 6)), whole)

    def test_the_image_that_is_all_zero_gives_no_nan(self) -> None:
        levels = [torch.zeros(1, channels, 2, 2) for channels in CHANNELS]
        network = SimilarityNetwork(CHANNELS, rank=2)
        assert torch.equal(network.embed(network(levels)), torch.zeros(1, sum(CHANNELS)))

    @pytest.mark.parametrize(("channels", "rank"), [((), 4), ((3, 4), -1)])
    def test_refuses_no_level_and_negative_rank(self, channels: tuple[int, ...], rank: int) -> None:
        with pytest.raises(DataError, match=r"at least one level and rank >= 0, got .* and "):
            SimilarityNetwork(channels, rank=rank)
