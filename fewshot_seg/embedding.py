"""Whole photos as embeddings: backbone and similarity network as one model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from episodes.progress import tqdm
from fewshot_seg.attention import NEGATIVES_NEEDED, AttentionKind
from fewshot_seg.backbones import Backbone
from fewshot_seg.embedding_attention import GradientAttention, SimilarityExplanation
from fewshot_seg.features import FeatureStore
from fewshot_seg.similarity import SimilarityNetwork


class ImageEmbedder(nn.Module):
    """Photos -> unit-length embeddings, differentiable with respect to the photos.

    Its layer ``similarity`` gives the maps whose mean is the embedding: the layer to explain.

    Args:
        backbone: frozen.
        similarity: over the backbone's levels.
    """

    def __init__(self, backbone: Backbone, similarity: SimilarityNetwork) -> None:
        super().__init__()
        self.backbone, self.similarity = backbone, similarity

    def forward(self, images: Tensor) -> Tensor:
        """float32 (B, 3, H, W), RGB in [0, 1] -> float32 (B, D)."""
        return self.similarity.embed(self.similarity(self.backbone.differentiable(images)))


@torch.no_grad()
def embed_photos(
    similarity: SimilarityNetwork,
    store: FeatureStore,
    image_ids: Sequence[str],
    *,
    batch_size: int = 64,
    show_progress: bool = False,
) -> Tensor:
    """Embeddings of photos from their stored features, unit-length float32 (N, D) on the CPU.

    Args:
        similarity: the network.
        store: features; what is missing is computed.
        image_ids: photos of the store.
        batch_size: photos at a time; does not change the embeddings.
        show_progress: bar on stderr.
    """
    store.ensure(image_ids, show_progress=show_progress)
    device = next((parameter.device for parameter in similarity.parameters()), torch.device("cpu"))
    embeddings = []
    with tqdm(total=len(image_ids), desc="embedding", unit="image", disable=not show_progress) as bar:
        for start in range(0, len(image_ids), batch_size):
            levels = [level.to(device) for level in store.get(image_ids[start : start + batch_size])]
            embeddings.append(similarity.embed(similarity(levels)).cpu())
            bar.update(len(embeddings[-1]))
    return torch.cat(embeddings)


def explain_comparisons(
    embedder: ImageEmbedder, photos: Sequence[Tensor], *, kind: AttentionKind
) -> SimilarityExplanation:
    """Attention of every photo of B comparisons at the network's last maps.

    Args:
        embedder: the model.
        photos: anchor, positive and the negatives, float32 (B, 3, S, S) each; more negatives than `kind` compares
            with are left out.
        kind: form of the score.
    """
    anchor, positive, *negatives = photos
    with GradientAttention(embedder, "similarity") as explain:
        return explain(anchor, positive, negatives[: NEGATIVES_NEEDED[kind]], kind=kind)
