"""The PFENet-style decoder against one written out scale by scale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from episodes.types import DataError
from fewshot_seg.feature_episodes import FeatureBatch
from fewshot_seg.priors import pfenet_prior
from fewshot_seg.rivals.enrichment import EnrichmentNetwork
from fewshot_seg.rivals.model import joined_maps, query_loss, support_weights

MakeBatch = Callable[..., FeatureBatch]


@pytest.fixture
def network() -> EnrichmentNetwork:
    return EnrichmentNetwork((5, 7), width=6).eval()


def stretch(maps: torch.Tensor, side: int) -> torch.Tensor:
    return F.interpolate(maps, (side, side), mode="bilinear", align_corners=True)


def test_the_module_by_hand(network: EnrichmentNetwork) -> None:
    generator = torch.Generator().manual_seed(0)
    query, prototype = torch.randn(2, 6, 8, 8, generator=generator), torch.randn(2, 6, generator=generator)
    prior = torch.rand(2, 1, 8, 8, generator=generator)
    found, scales = network.enriched(query, prototype, prior)
    finer, whole = None, []
    for number, side in enumerate((8, 4, 2, 1)):
        pooled = F.avg_pool2d(query, 8 // side)
        seen = prototype.reshape(2, 6, 1, 1).repeat(1, 1, side, side)
        merged = network.merge[number](torch.cat([pooled, seen, stretch(prior, side)], 1))
        if finer is not None:
            merged = network.inherit[number - 1](torch.cat([merged, stretch(finer, side)], 1)) + merged
        merged = network.enrich[number](merged) + merged
        torch.testing.assert_close(scales[number], merged)
        finer = stretch(merged, 8)
        whole.append(finer)
    joined = network.join(torch.cat(whole, 1))
    torch.testing.assert_close(found, network.refine(joined) + joined)


def test_what_it_reads_of_a_batch(network: EnrichmentNetwork, make_batch: MakeBatch) -> None:
    batch = make_batch(2, shots=3)
    query, supports = joined_maps(batch)
    foreground, _ = support_weights(batch, (8, 8))
    scale = 12**0.5
    prototypes = []
    for shot in range(3):
        reduced = network.reduce_support(supports[:, shot] * scale)
        area = foreground[:, shot].sum((1, 2)) + 0.0005
        prototypes.append((reduced * foreground[:, shot, None]).sum((2, 3)) / area[:, None])
    prior = pfenet_prior(query, supports, foreground)[:, None]
    enriched, scales = network.enriched(network.reduce_query(query * scale), sum(prototypes) / 3, prior)
    torch.testing.assert_close(network(batch), network.head(enriched))
    losses = network.losses(batch)
    inner = [query_loss(network.inner_heads[n](scales[n]), batch) for n in range(4)]
    torch.testing.assert_close(losses["loss"], query_loss(network.head(enriched), batch) + sum(inner) / 4)


def test_gradients() -> None:
    network = EnrichmentNetwork((2,), width=2).double().eval()
    inputs = [torch.randn(1, *shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4, 4), (2,), (1, 4, 4))]
    assert torch.autograd.gradcheck(lambda *given: network.enriched(*given)[0], inputs)


def test_bad_sizes() -> None:
    with pytest.raises(DataError, match="at least one level"):
        EnrichmentNetwork(())
    with pytest.raises(DataError, match=r"width of 1, got \(3,\) and 0"):
        EnrichmentNetwork((3,), width=0)
