"""Whole photos as embeddings: from pixels, from stored features, and explained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from episodes.augment import EpisodeTransform
from episodes.sources import SyntheticSource
from fewshot_seg.attention import AttentionKind, image_directions, similarity_attention
from fewshot_seg.backbones import Backbone
from fewshot_seg.embedding import ImageEmbedder, embed_photos
from fewshot_seg.embedding_attention import GradientAttention
from fewshot_seg.features import FeatureStore
from fewshot_seg.similarity import SimilarityNetwork

SIZE = 64


@pytest.fixture
def similarity(tiny_backbone: Backbone) -> SimilarityNetwork:
    network = SimilarityNetwork(tiny_backbone.channels, rank=3)
    nn.init.normal_(network.up.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    return network


@pytest.fixture
def embedder(tiny_backbone: Backbone, similarity: SimilarityNetwork) -> ImageEmbedder:
    return ImageEmbedder(tiny_backbone, similarity)


@pytest.fixture
def image_ids(tiny_source: SyntheticSource) -> list[str]:
    return list(tiny_source.ids("train"))[:7]


@pytest.fixture
def photos(tiny_source: SyntheticSource, image_ids: list[str]) -> Tensor:
    """The photos as the store's backbone sees them."""
    transform = EpisodeTransform("none", SIZE)
    return torch.stack([transform(tiny_source.image(i), tiny_source.image(i)[..., 0], seed=0)[0] for i in image_ids])


class TestImageEmbedder:
    def test_is_the_network_on_stored_features(
        self, embedder: ImageEmbedder, tiny_store: FeatureStore, image_ids: list[str], photos: Tensor
    ) -> None:
        embeddings = embedder(photos)
        assert embeddings.shape == (7, embedder.similarity.width)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(7))
        stored = embed_photos(embedder.similarity, tiny_store, image_ids)
        torch.testing.assert_close(embeddings, stored, rtol=0, atol=2e-3)  # features are kept in half precision
        assert torch.equal((embeddings @ stored.T).argmax(1), torch.arange(7))

    def test_equals_the_mean_of_the_maps(self, embedder: ImageEmbedder, photos: Tensor) -> None:
        maps = embedder.similarity(embedder.backbone(photos))
        pooled = torch.stack([maps[:, :, y, x] for y in range(4) for x in range(4)]).sum(0)
        torch.testing.assert_close(embedder(photos), pooled / pooled.norm(dim=1, keepdim=True))

    def test_gradients_reach_photo_and_network_but_not_the_backbone(
        self, embedder: ImageEmbedder, photos: Tensor
    ) -> None:
        images = photos[:2].clone().requires_grad_()
        one, other = embedder(images)
        torch.autograd.backward((one * other).sum())
        assert images.grad is not None
        assert images.grad.isfinite().all()
        assert all(gradient.any() for gradient in images.grad)
        assert all(p.grad is not None and p.grad.any() for p in embedder.similarity.parameters())
        assert all(parameter.grad is None for parameter in embedder.backbone.parameters())

    def test_the_backbone_stays_frozen_through_train(self, embedder: ImageEmbedder, photos: Tensor) -> None:
        before = embedder.eval()(photos)
        assert torch.equal(embedder.train()(photos), before)
        assert not embedder.backbone.training

    @pytest.mark.parametrize("kind", ["siamese", "triplet", "cosine", "margin"])
    def test_its_attention_is_the_closed_form(
        self, embedder: ImageEmbedder, photos: Tensor, kind: AttentionKind
    ) -> None:
        triple = photos[0:2], photos[2:4], photos[4:6]
        needs_negative = kind in ("triplet", "margin")
        with GradientAttention(embedder, "similarity") as explain:
            found = explain(triple[0], triple[1], triple[2] if needs_negative else (), kind=kind, rectify=False)
        with torch.no_grad():
            maps = [embedder.similarity(embedder.backbone(one)) for one in triple]
            embeddings = [embedder.similarity.embed(one) for one in maps]
            directions = image_directions(kind, embeddings[0], embeddings[1], [embeddings[2]] if needs_negative else [])
        explained = [found.anchor[0], found.positive[0], *(negative[0] for negative in found.negatives)]
        assert len(explained) == len(directions)
        for attention, one, direction in zip(explained, maps, directions, strict=False):
            expected = similarity_attention(one, direction, rectify=False)
            torch.testing.assert_close(attention, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        assert embedder.similarity.up.weight.grad is None


class TestEmbedPhotos:
    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_batch_size_does_not_matter(
        self, similarity: SimilarityNetwork, tiny_store: FeatureStore, image_ids: list[str], batch_size: int
    ) -> None:
        embeddings = embed_photos(similarity, tiny_store, image_ids, batch_size=batch_size)
        assert embeddings.shape == (7, similarity.width)
        assert embeddings.dtype == torch.float32
        assert not embeddings.requires_grad
        expected = torch.cat([similarity.embed(similarity(tiny_store.get([one]))) for one in image_ids])
        torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-6)

    def test_keeps_the_order_and_repeats(
        self, similarity: SimilarityNetwork, tiny_store: FeatureStore, image_ids: list[str]
    ) -> None:
        embeddings = embed_photos(similarity, tiny_store, image_ids)
        order = [3, 0, 3, 6]
        again = embed_photos(similarity, tiny_store, [image_ids[n] for n in order], batch_size=2)
        torch.testing.assert_close(again, embeddings[order])

    def test_a_network_of_rank_0_has_no_parameters_and_works(
        self, tiny_backbone: Backbone, tiny_store: FeatureStore, image_ids: list[str]
    ) -> None:
        frozen = embed_photos(SimilarityNetwork(tiny_backbone.channels, rank=0), tiny_store, image_ids)
        untrained = embed_photos(SimilarityNetwork(tiny_backbone.channels, rank=3), tiny_store, image_ids)
        torch.testing.assert_close(frozen, untrained)

    def test_computes_missing_features_with_progress(
        self,
        tiny_backbone: Backbone,
        tiny_source: SyntheticSource,
        tiny_store: FeatureStore,
        similarity: SimilarityNetwork,
        image_ids: list[str],
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        store = FeatureStore(tiny_backbone, tiny_source, size=SIZE, directory=None)
        embeddings = embed_photos(similarity, store, image_ids, show_progress=True)
        torch.testing.assert_close(embeddings, embed_photos(similarity, tiny_store, image_ids), rtol=0, atol=2e-3)
        told = capfd.readouterr().err
        assert "features: 100%" in told
        assert "embedding: 100%" in told
        embed_photos(similarity, store, image_ids)
        assert capfd.readouterr().err == ""
