"""HSNet-style correlations and 4D convolutions against plain loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from episodes.types import DataError
from fewshot_seg.feature_episodes import FeatureBatch
from fewshot_seg.rivals import correlation
from fewshot_seg.rivals.correlation import (
    CentrePivotConvolution,
    CorrelationNetwork,
    masked_correlation,
    squeezing_steps,
)

MakeBatch = Callable[..., FeatureBatch]


def test_correlations_by_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    query, support = torch.randn(1, 3, 2, 3, generator=generator), torch.randn(1, 3, 3, 2, generator=generator)
    foreground = torch.tensor([[[1.0, 0.0], [0.2, 0.0], [0.0, 0.7]]])
    found = masked_correlation(query, support, foreground)
    for y, x, a, b in itertools.product(range(2), range(3), range(3), range(2)):
        cosine = F.cosine_similarity(query[0, :, y, x], support[0, :, a, b], dim=0)
        expected = max(0.0, float(cosine)) if foreground[0, a, b] > 0 else 0.0
        assert found[0, y, x, a, b].item() == pytest.approx(expected, abs=1e-4)


def dense_convolution(
    tensor: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor, *, stride: int, reach: int
) -> torch.Tensor:
    """4D convolution of (C, h, w, a, b) with (O, C, k, k, k, k), strided over the last two, by loops."""
    _, height, width, rows, columns = tensor.shape
    padded = F.pad(tensor, [reach] * 8)
    shape = (height, width, -(-rows // stride), -(-columns // stride))
    out = torch.zeros(len(kernel), *shape, dtype=tensor.dtype)
    side = 2 * reach + 1
    for y, x, a, b in itertools.product(*map(range, shape)):
        window = padded[:, y : y + side, x : x + side, a * stride : a * stride + side, b * stride : b * stride + side]
        out[:, y, x, a, b] = torch.einsum("ocpqrs,cpqrs->o", kernel, window) + bias
    return out


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 4)])
def test_centre_pivot_is_a_dense_convolution_with_a_sparse_kernel(kernel: int, stride: int) -> None:
    layer, reach = CentrePivotConvolution(2, 3, kernel, stride).double(), kernel // 2
    dense = torch.zeros(3, 2, *[kernel] * 4, dtype=torch.float64)
    dense[:, :, :, :, reach, reach] += layer.over_query.weight.detach()
    dense[:, :, reach, reach] += layer.over_support.weight.detach()
    bias = layer.over_query.bias.detach() + layer.over_support.bias.detach()
    tensor = torch.randn(1, 2, 3, 2, 5, 4, dtype=torch.float64)
    expected = dense_convolution(tensor[0], dense, bias, stride=stride, reach=reach)
    torch.testing.assert_close(layer(tensor)[0].detach(), expected)


def test_gradients() -> None:
    layer = CentrePivotConvolution(1, 2, 3, 2).double()
    tensor = torch.rand(1, 1, 2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (tensor,))
    maps = [torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weights = torch.tensor([[[1.0, 0.5], [0.0, 0.3]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda query, support: masked_correlation(query, support, weights), maps)


@pytest.mark.parametrize("side", [13, 25, 50])
def test_the_grids_of_the_paper_end_at_two(side: int) -> None:
    for _, stride in squeezing_steps(side):
        side = -(-side // stride)
    assert side == 2


@pytest.mark.parametrize("sides", [(14, 7), (8, 4), (5, 5), (6, 3, 2)])
def test_any_grids(sides: tuple[int, ...], make_batch: MakeBatch) -> None:
    batch = make_batch(1, shots=2)
    generator = torch.Generator().manual_seed(0)
    query, support = (
        tuple(torch.randn(count, 3, side, side, generator=generator) for side in sides) for count in (1, 2)
    )
    network = CorrelationNetwork(sides, widths=(4, 4, 4)).eval()
    logits = network(replace(batch, query_levels=query, support_levels=support))
    assert logits.shape == (1, 2, 2 * sides[0], 2 * sides[0])


def test_fine_grids_are_pooled_over_the_object(make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correlation, "SUPPORT_SIDE", 4)
    network, batch = CorrelationNetwork((8, 4), widths=(4, 4, 4)), make_batch(2)
    found = network._correlation(batch, 0, 1)
    assert found.shape == (2, 8, 8, 4, 4)
    weights = F.adaptive_avg_pool2d((batch.support_masks[:, 0] == 1).float()[:, None], 8)
    support = F.avg_pool2d(batch.support_levels[0] * weights, 2)
    cosines = F.cosine_similarity(batch.query_levels[0][..., None, None], support[:, :, None, None], dim=1)
    torch.testing.assert_close(found, cosines.relu(), atol=1e-4, rtol=1e-3)


def test_what_does_not_fit(make_batch: MakeBatch) -> None:
    with pytest.raises(DataError, match="at least one level"):
        CorrelationNetwork(())
    with pytest.raises(DataError, match="three multiples of 4"):
        CorrelationNetwork((8,), widths=(4, 6, 8))
    with pytest.raises(DataError, match="reads 3 levels, the features have 2"):
        CorrelationNetwork((8, 4, 2), widths=(4, 4, 4))(make_batch())
