"""Prior maps against plain float64 loops and automatic differentiation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewshot_seg.attention import gradient_attention, scale_map
from fewshot_seg.priors import (
    PRIOR_CHANNELS,
    blockwise_soft_margin,
    nearest_similarity,
    pfenet_prior,
    similarity_priors,
    soft_margin,
    soft_margin_attention,
)

WIDTH = 7


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def share(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(left: Tensor, right: Tensor) -> float:
    return float(sum(a * b for a, b in zip(left.tolist(), right.tolist(), strict=True)))


def loop_soft_margin(
    query: Tensor, support: Tensor, foreground: Tensor, background: Tensor, temperature: float
) -> list[list[float]]:
    def log_density(cell: Tensor, cells: Tensor, weights: Tensor) -> float:
        total = sum(
            weight * math.exp(cosine(cell, other) / temperature)
            for other, weight in zip(cells, weights.tolist(), strict=True)
        )
        return math.log(total / sum(weights.tolist()))

    return [
        [log_density(cell, support[b], foreground[b]) - log_density(cell, support[b], background[b]) for cell in cells]
        for b, cells in enumerate(query)
    ]


class TestSoftMargin:
    @pytest.mark.parametrize("temperature", [0.05, 0.3, 2.0])
    def test_equals_plain_loops(self, temperature: float) -> None:
        query, support = unit(2, 5, WIDTH, seed=0), unit(2, 6, WIDTH, seed=1)
        foreground, background = share(2, 6, seed=2), share(2, 6, seed=3)
        margin = soft_margin(query, support, foreground, background, temperature=temperature)
        expected = loop_soft_margin(query, support, foreground, background, temperature)
        torch.testing.assert_close(margin, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("block", [1, 13, 2**19])
    def test_block_by_block_it_is_the_same(self, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fewshot_seg.priors._BLOCK", block)  # of 6 cosines a row: 1, 2 and all rows at a time
        query, support = unit(3, 5, WIDTH, seed=0), unit(3, 6, WIDTH, seed=1)
        sides = share(3, 6, seed=2), share(3, 6, seed=3)
        sides[1][1] = 0  # a side that no support shows
        found = blockwise_soft_margin(query, support, *sides, temperature=0.1)
        expected = soft_margin(query, support, *sides, temperature=0.1)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert expected[1].min() > 5

    def test_large_temperature_is_the_prototype_margin(self) -> None:
        query, support = unit(1, 5, WIDTH, seed=0), unit(1, 6, WIDTH, seed=1)
        foreground, background = share(1, 6, seed=2), share(1, 6, seed=3)
        margin = soft_margin(query, support, foreground, background, temperature=1e4) * 1e4
        prototypes = [
            torch.einsum("bnd,bn->bd", support, weights / weights.sum()) for weights in (foreground, background)
        ]
        expected = torch.einsum("bmd,bd->bm", query, prototypes[0] - prototypes[1])
        torch.testing.assert_close(margin, expected, rtol=1e-3, atol=1e-4)

    def test_small_temperature_is_the_margin_of_the_nearest_cells(self) -> None:
        support = F.normalize(unit(1, 8, WIDTH, seed=1) + 2, dim=-1)  # all in one half: cosines near 1
        query = F.normalize(unit(1, 5, WIDTH, seed=0) + 2, dim=-1)
        foreground = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 0]], dtype=torch.float64)
        background = 1 - foreground
        margin = soft_margin(query, support, foreground, background, temperature=0.002) * 0.002
        similar = query @ support.transpose(1, 2)
        expected = similar[..., :3].amax(-1) - similar[..., 3:].amax(-1)
        torch.testing.assert_close(margin, expected, rtol=0, atol=0.002 * math.log(5) + 1e-9)

    @pytest.mark.parametrize("temperature", [0.05, 0.5])
    def test_an_absent_side_counts_as_opposite(self, temperature: float) -> None:
        query, support = unit(1, 5, WIDTH, seed=0), unit(1, 6, WIDTH, seed=1)
        weights, none = share(1, 6, seed=2), torch.zeros(1, 6, dtype=torch.float64)
        without_background = soft_margin(query, support, weights, none, temperature=temperature)
        opposite = soft_margin(
            query,
            torch.cat([support, -query[:, :1]], dim=1),
            F.pad(weights, (0, 1)),
            F.pad(none, (0, 1), value=1.0),
            temperature=temperature,
        )
        torch.testing.assert_close(without_background[:, 0], opposite[:, 0])
        without_foreground = soft_margin(query, support, none, weights, temperature=temperature)
        torch.testing.assert_close(without_foreground, -without_background)
        assert without_background.max() <= 2 / temperature
        assert without_background.min() > 0

    def test_stays_within_its_bounds(self) -> None:
        cells = torch.eye(2, dtype=torch.float32)[None, :1]
        support = torch.cat([cells, -cells], dim=1)
        weights = torch.eye(2)[None]
        margin = soft_margin(cells, support, weights[:, 0], weights[:, 1], temperature=0.05)
        torch.testing.assert_close(margin, torch.tensor([[40.0]]))

    def test_gradients(self) -> None:
        query, support = unit(1, 3, 4, seed=0), unit(1, 5, 4, seed=1)
        foreground, background = share(1, 5, seed=2), share(1, 5, seed=3)
        inputs = [tensor.requires_grad_() for tensor in (query, support, foreground, background)]
        assert torch.autograd.gradcheck(lambda *tensors: soft_margin(*tensors, temperature=0.3), inputs)

    def test_does_not_change_its_arguments(self) -> None:
        arguments = [unit(1, 3, 4, seed=0), unit(1, 5, 4, seed=1), share(1, 5, seed=2), share(1, 5, seed=3)]
        copies = [tensor.clone() for tensor in arguments]
        soft_margin(*arguments, temperature=0.1)
        assert all(torch.equal(left, right) for left, right in zip(arguments, copies, strict=True))

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 10**6), factor=st.floats(0.01, 100), temperature=st.floats(0.05, 5))
    def test_order_of_cells_and_scale_of_weights_do_not_matter(
        self, seed: int, factor: float, temperature: float
    ) -> None:
        query, support = unit(1, 4, WIDTH, seed=seed), unit(1, 6, WIDTH, seed=seed + 1)
        foreground, background = share(1, 6, seed=seed + 2) + 0.01, share(1, 6, seed=seed + 3) + 0.01
        margin = soft_margin(query, support, foreground, background, temperature=temperature)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        changed = soft_margin(
            query,
            support[:, order],
            factor * foreground[:, order],
            background[:, order] / factor,
            temperature=temperature,
        )
        torch.testing.assert_close(changed, margin)
        swapped = soft_margin(query, support, background, foreground, temperature=temperature)
        torch.testing.assert_close(swapped, -margin)


class TestSoftMarginAttention:
    @pytest.mark.parametrize("temperature", [0.05, 0.3, 2.0])
    def test_is_the_elementwise_gradient_of_the_soft_margin_by_autograd(self, temperature: float) -> None:
        query, support = unit(2, 5, WIDTH, seed=0), unit(2, 6, WIDTH, seed=1)
        foreground, background = share(2, 6, seed=2), share(2, 6, seed=3)
        attention = soft_margin_attention(query, support, foreground, background, temperature=temperature)
        query.requires_grad_()
        margin = soft_margin(query, support, foreground, background, temperature=temperature)
        for x in range(5):  # the score of every cell by itself
            (gradient,) = torch.autograd.grad(margin[:, x].sum(), query, retain_graph=True)
            assert (gradient[:, [other for other in range(5) if other != x]] == 0).all()
            expected = temperature * (gradient[:, x] * query[:, x]).sum(-1)
            torch.testing.assert_close(attention[:, x], expected.detach(), rtol=1e-9, atol=1e-12)

    def test_equals_plain_loops(self) -> None:
        query, support = unit(2, 3, WIDTH, seed=0), unit(2, 4, WIDTH, seed=1)
        foreground, background = share(2, 4, seed=2), share(2, 4, seed=3)
        found = soft_margin_attention(query, support, foreground, background, temperature=0.2)
        for b in range(2):
            for x in range(3):
                cosines = [cosine(query[b, x], cell) for cell in support[b]]
                means = []
                for side in (foreground, background):
                    weights = [w * math.exp(c / 0.2) for w, c in zip(side[b].tolist(), cosines, strict=True)]
                    means.append(sum(w * c for w, c in zip(weights, cosines, strict=True)) / sum(weights))
                assert found[b, x].item() == pytest.approx(means[0] - means[1], abs=1e-12)

    @pytest.mark.parametrize("temperature", [0.05, 0.5])
    def test_an_absent_side_counts_as_opposite(self, temperature: float) -> None:
        query, support = unit(1, 5, WIDTH, seed=0), unit(1, 6, WIDTH, seed=1)
        weights, none = share(1, 6, seed=2), torch.zeros(1, 6, dtype=torch.float64)
        without_background = soft_margin_attention(query, support, weights, none, temperature=temperature)
        opposite = soft_margin_attention(
            query,
            torch.cat([support, -query[:, :1]], dim=1),
            F.pad(weights, (0, 1)),
            F.pad(none, (0, 1), value=1.0),
            temperature=temperature,
        )
        torch.testing.assert_close(without_background[:, 0], opposite[:, 0])
        without_foreground = soft_margin_attention(query, support, none, weights, temperature=temperature)
        torch.testing.assert_close(without_foreground, -without_background)
        assert soft_margin_attention(query, support, none, none, temperature=temperature).tolist() == [[0.0] * 5]

    def test_gradients(self) -> None:
        query, support = unit(1, 3, 4, seed=0), unit(1, 5, 4, seed=1)
        foreground, background = share(1, 5, seed=2), share(1, 5, seed=3)
        inputs = [tensor.requires_grad_() for tensor in (query, support, foreground, background)]
        assert torch.autograd.gradcheck(lambda *tensors: soft_margin_attention(*tensors, temperature=0.3), inputs)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_an_absent_side_has_a_finite_gradient(self, dtype: torch.dtype) -> None:
        query, support = unit(1, 3, 4, seed=0, dtype=dtype).requires_grad_(), unit(1, 5, 4, seed=1, dtype=dtype)
        sides = torch.ones(1, 5, dtype=dtype), torch.zeros(1, 5, dtype=dtype)
        attention = soft_margin_attention(query, support, *sides, temperature=0.05)
        (gradient,) = torch.autograd.grad(attention.sum(), query)
        assert gradient.isfinite().all()
        assert gradient.any()

    @settings(max_examples=50, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        temperature=st.floats(0.01, 5),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )
    def test_stays_within_its_bounds(self, seed: int, temperature: float, dtype: torch.dtype) -> None:
        query, support = unit(2, 5, 3, seed=seed, dtype=dtype), unit(2, 6, 3, seed=seed + 1, dtype=dtype)
        foreground = share(2, 6, seed=seed + 2).to(dtype)
        attention = soft_margin_attention(query, support, foreground, 1 - foreground, temperature=temperature)
        assert attention.isfinite().all()
        assert attention.abs().max() <= 2 + 1e-5

    def test_reaches_its_bounds(self) -> None:
        cells = torch.eye(2)[None, :1]
        support, weights = torch.cat([cells, -cells], dim=1), torch.eye(2)[None]
        attention = soft_margin_attention(cells, support, weights[:, 0], weights[:, 1], temperature=0.05)
        torch.testing.assert_close(attention, torch.tensor([[2.0]]))

    def test_does_not_change_its_arguments(self) -> None:
        arguments = [unit(1, 3, 4, seed=0), unit(1, 5, 4, seed=1), share(1, 5, seed=2), share(1, 5, seed=3)]
        copies = [tensor.clone() for tensor in arguments]
        soft_margin_attention(*arguments, temperature=0.1)
        assert all(torch.equal(left, right) for left, right in zip(arguments, copies, strict=True))


class TestNearestSimilarity:
    def test_equals_plain_loops(self) -> None:
        similar = share(2, 4, 6, seed=0) * 2 - 1
        weights = share(2, 6, seed=1)
        nearest = nearest_similarity(similar, weights)
        for b in range(2):
            for m in range(4):
                inside = [similar[b, m, n].item() for n in range(6) if weights[b, n] >= 0.5]
                assert nearest[b, m].item() == max(inside)

    def test_no_cell_inside(self) -> None:
        similar = share(1, 3, 5, seed=0)
        assert torch.equal(
            nearest_similarity(similar, torch.full((1, 5), 0.49)), torch.full((1, 3), -1.0, dtype=torch.float64)
        )

    def test_does_not_change_its_arguments(self) -> None:
        similar = share(1, 3, 5, seed=0)
        copy = similar.clone()
        nearest_similarity(similar, share(1, 5, seed=1))
        assert torch.equal(similar, copy)


class Episode:
    """Two episodes of 6 support cells and 3 x 4 query cells, float64."""

    def __init__(self, seed: int = 0) -> None:
        self.maps = unit(2, 3, 4, WIDTH, seed=seed).permute(0, 3, 1, 2)
        self.support = unit(2, 6, WIDTH, seed=seed + 1)
        self.foreground = share(2, 6, seed=seed + 2)
        self.foreground[:, 0] = 0.9
        self.background = 1 - self.foreground
        self.positive = self.pool(self.foreground)
        self.negative = self.pool(self.background)

    def pool(self, weights: Tensor) -> Tensor:
        return F.normalize((self.support * weights[..., None]).sum(1), dim=1)

    def priors(self, rows: slice = slice(None)) -> Tensor:
        return similarity_priors(
            self.maps[rows],
            self.support[rows],
            self.foreground[rows],
            self.background[rows],
            self.positive[rows],
            self.negative[rows],
        )

    def channel(self, name: str) -> Tensor:
        return self.priors()[:, PRIOR_CHANNELS.index(name)]


@pytest.fixture
def episode() -> Episode:
    return Episode()


class TestSimilarityPriors:
    def test_shape(self, episode: Episode) -> None:
        assert episode.priors().shape == (2, len(PRIOR_CHANNELS), 3, 4)

    def test_soft_margin(self, episode: Episode) -> None:
        cells = episode.maps.permute(0, 2, 3, 1).reshape(2, 12, WIDTH)
        expected = loop_soft_margin(cells, episode.support, episode.foreground, episode.background, 0.05)
        torch.testing.assert_close(
            episode.channel("soft margin").flatten(1), torch.tensor(expected, dtype=torch.float64)
        )

    @pytest.mark.parametrize(("name", "minus"), [("prototype margin", True), ("prototype similarity", False)])
    def test_prototypes(self, episode: Episode, name: str, minus: bool) -> None:
        found = episode.channel(name)
        for b in range(2):
            for y in range(3):
                for x in range(4):
                    cell = episode.maps[b, :, y, x]
                    expected = cosine(cell, episode.positive[b])
                    expected -= cosine(cell, episode.negative[b]) if minus else 0
                    assert found[b, y, x].item() == pytest.approx(10 * expected, abs=1e-9)

    def test_gradient_attention_is_that_of_the_margin_by_autograd(self, episode: Episode) -> None:
        maps = episode.maps.clone().requires_grad_()
        pooled = maps.mean(dim=(2, 3))
        score = ((episode.positive - episode.negative) * F.normalize(pooled, dim=1)).sum(1)
        (attention,) = gradient_attention(score, [maps], rectify=False)
        expected = attention * pooled.detach().norm(dim=1)[:, None, None] * (3 * 4) / 0.1
        torch.testing.assert_close(episode.channel("gradient attention"), expected)

    @pytest.mark.parametrize("side", ["foreground", "background"])
    def test_nearest(self, episode: Episode, side: str) -> None:
        found, weights = episode.channel(f"nearest {side}"), getattr(episode, side)
        for b in range(2):
            cells = [cell for n, cell in enumerate(episode.support[b]) if weights[b, n] >= 0.5]
            for y in range(3):
                for x in range(4):
                    best = max((cosine(episode.maps[b, :, y, x], cell) for cell in cells), default=-1.0)
                    assert found[b, y, x].item() == pytest.approx(10 * best, abs=1e-9)

    def test_episodes_of_a_batch_do_not_mix(self, episode: Episode) -> None:
        alone = torch.cat([episode.priors(slice(0, 1)), episode.priors(slice(1, 2))])
        torch.testing.assert_close(alone, episode.priors())

    def test_supports_without_background_give_finite_maps(self, episode: Episode) -> None:
        nothing = torch.zeros_like(episode.background)
        priors = similarity_priors(
            episode.maps,
            episode.support,
            episode.foreground,
            nothing,
            episode.positive,
            torch.zeros_like(episode.negative),
        )
        assert priors.isfinite().all()
        assert (priors[:, PRIOR_CHANNELS.index("nearest background")] == -10).all()

    @pytest.mark.parametrize("name", [name for name in PRIOR_CHANNELS if name != "nearest background"])
    def test_finds_a_planted_object(self, name: str) -> None:
        # two textures: object and background; the query holds the support's own cells, shuffled
        centres = F.normalize(torch.eye(WIDTH, dtype=torch.float64)[:2] + 0.3, dim=1)
        truth = torch.arange(12) % 3 == 0
        noise = 0.2 * unit(12, WIDTH, seed=5)
        support = F.normalize(centres[(~truth).long()] + noise, dim=1)[None]
        order = torch.randperm(12, generator=torch.Generator().manual_seed(6))
        maps = support[:, order].transpose(1, 2).reshape(1, WIDTH, 3, 4)
        foreground = truth.double()[None]
        pooled = [F.normalize((support * weights[..., None]).sum(1), dim=1) for weights in (foreground, 1 - foreground)]
        priors = similarity_priors(maps, support, foreground, 1 - foreground, pooled[0], pooled[1])
        found = priors[0, PRIOR_CHANNELS.index(name)].flatten()
        assert found[truth[order]].min() > found[~truth[order]].max()


def loop_pfenet(query: Tensor, support: Tensor, foreground: Tensor) -> Tensor:
    """PFENet eq. 3-6 for one episode: query (C, h, w), support (K, C, h, w), foreground (K, h, w)."""
    _, height, width = query.shape
    total = torch.zeros(height, width, dtype=query.dtype)
    for shot in range(len(support)):
        best = torch.full((height, width), -2.0, dtype=query.dtype)
        for y in range(height):
            for x in range(width):
                for v in range(height):
                    for u in range(width):
                        masked = support[shot, :, v, u] * foreground[shot, v, u]
                        length = query[:, y, x].norm() * masked.norm()
                        value = (query[:, y, x] @ masked) / length if length > 0 else torch.zeros(())
                        best[y, x] = max(best[y, x].item(), value.item())
        total += (best - best.min()) / (best.max() - best.min())
    return total / len(support)


class TestPFENetPrior:
    def test_equals_plain_loops(self) -> None:
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(2, 5, 3, 3, generator=generator, dtype=torch.float64)
        support = torch.randn(2, 2, 5, 3, 3, generator=generator, dtype=torch.float64)
        foreground = torch.rand(2, 2, 3, 3, generator=generator, dtype=torch.float64).round(decimals=1)
        foreground[:, :, 0] = 0
        prior = pfenet_prior(query, support, foreground)
        for b in range(2):
            torch.testing.assert_close(prior[b], loop_pfenet(query[b], support[b], foreground[b]))

    def test_is_scaled_per_shot_and_image(self) -> None:
        generator = torch.Generator().manual_seed(1)
        query, support = torch.randn(2, 5, 3, 3, generator=generator), torch.randn(2, 1, 5, 3, 3, generator=generator)
        prior = pfenet_prior(query, support, torch.ones(2, 1, 3, 3))
        assert prior.amin(dim=(1, 2)).tolist() == [0, 0]
        assert prior.amax(dim=(1, 2)).tolist() == [1, 1]
        torch.testing.assert_close(prior, scale_map(prior))
        torch.testing.assert_close(prior, pfenet_prior(7 * query, 0.1 * support, torch.ones(2, 1, 3, 3)))

    def test_finds_a_planted_object(self) -> None:
        generator = torch.Generator().manual_seed(2)
        support = torch.rand(1, 1, 8, 3, 3, generator=generator)
        foreground = torch.zeros(1, 1, 3, 3)
        foreground[0, 0, 1, 1:] = 1
        query = torch.rand(1, 8, 3, 3, generator=generator)
        query[0, :, 2, 0] = 3 * support[0, 0, :, 1, 2]
        prior = pfenet_prior(query, support, foreground)
        assert prior.flatten().argmax() == 6
        assert prior[0, 2, 0] == 1
