"""What trains the similarity network: metric losses of photos and regions, attention maps, and the constraint.

L = L_metric + map_weight L_map + gamma L_sm    (arXiv 2008.06035; L_map, where masks are known, is ours)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.attention import image_directions, similarity_attention
from fewshot_seg.constraint import SimilarityMining, mask_features, mask_images
from fewshot_seg.embedding import ImageEmbedder
from fewshot_seg.encodings import SupportEncoding
from fewshot_seg.losses import attention_map_loss, balanced_map_loss
from fewshot_seg.priors import soft_margin, soft_margin_attention
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.similarity import SimilarityNetwork, cell_weights

MapKind = Literal["soft margin", "soft margin gradient", "siamese", "triplet", "quadruplet", "cosine", "margin"]
MAP_KINDS: tuple[MapKind, ...] = get_args(MapKind)
ConstraintKind = Literal["siamese", "triplet", "cosine", "margin"]
Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """The similarity mining loss as it is applied to a batch.

    Attributes:
        mining: soft mask and loss.
        weight: gamma > 0.
        kind: form of the score whose attention is masked.
        triples: anchors per batch; None takes every photo.
        embedder: masks photos and embeds them anew; None masks the cells that the embedding pools, which costs no
            pass through the backbone.

    Raises:
        DataError: a weight or a number of triples that is not positive.
    """

    mining: SimilarityMining
    weight: float
    kind: ConstraintKind = "margin"
    triples: int | None = None
    embedder: ImageEmbedder | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0 or (self.triples is not None and self.triples < 1):
            raise DataError(
                f"the constraint needs a weight above 0 and at least 1 triple, got {self.weight} and {self.triples}"
            )


def choose_triples(embeddings: Tensor, labels: Tensor, count: int | None = None) -> Triple:
    """Anchor, positive and negative photos of a batch, by index.

    The positive is the next photo of the anchor's class in the batch; the negative is the most similar photo of
    another class. Anchors without either are left out; with `count`, that many are taken at even distances.

    Args:
        embeddings: unit-length float (N, D).
        labels: int64 (N,).
        count: anchors at most.

    Returns:
        Three int64 (T,), T may be 0.

    Example:
        >>> places = torch.tensor([0.0, 0.1, 1.0, 1.3])
        >>> embeddings = torch.stack([places.cos(), places.sin()], dim=1)
        >>> choose_triples(embeddings, torch.tensor([7, 7, 8, 8]))
        (tensor([0, 1, 2, 3]), tensor([1, 0, 3, 2]), tensor([2, 2, 1, 1]))
    """
    similarity = (embeddings @ embeddings.T).detach()
    same = labels[:, None] == labels
    number = torch.arange(len(labels), device=labels.device)
    steps = (number[None] - number[:, None]) % len(labels)  # how far ahead each photo is, round the batch
    positive = steps.masked_fill(~same | (steps == 0), len(labels)).argmin(dim=1)
    negative = similarity.masked_fill(same, -2.0).argmax(dim=1)
    anchors = number[(same.sum(dim=1) > 1) & ~same.all(dim=1)]
    if count is not None and count < len(anchors):
        anchors = anchors[torch.arange(count, device=labels.device) * len(anchors) // count]
    return anchors, positive[anchors], negative[anchors]


def mining_loss(constraint: Constraint, maps: Triple, photos: Triple | None = None) -> Tensor:
    """L_sm of triples of maps whose mean is the embedding.

    Args:
        constraint: how.
        maps: anchor, positive, negative, float (T, D, h, w) each. Regions are maps that are zero outside.
        photos: float (T, 3, H, W) each, RGB in [0, 1], for a constraint with an embedder. The masked part becomes
            the backbone's mean colour, which is the 0 of its input.

    Raises:
        DataError: a constraint in the photos without photos.
    """
    embeddings = [SimilarityNetwork.embed(one) for one in maps]
    directions = image_directions(constraint.kind, embeddings[0], embeddings[1], [embeddings[2]])
    attention = [similarity_attention(one, direction) for one, direction in zip(maps, directions, strict=True)]
    triple = (attention[0], attention[1], attention[2])
    if constraint.embedder is None:
        levels = ((maps[0],), (maps[1],), (maps[2],))
        in_features: Tensor = constraint.mining(
            lambda one: SimilarityNetwork.embed(one[0]), mask_features, levels, triple
        )
        return in_features
    if photos is None:
        raise DataError("a constraint that masks photos needs them")
    fill = photos[0].new_tensor(constraint.embedder.backbone.mean)
    in_photos: Tensor = constraint.mining(
        constraint.embedder, lambda images, mask: mask_images(images, mask, fill), photos, triple
    )
    return in_photos


def map_loss(
    segmenter: FewShotSegmenter,
    support: SupportEncoding,
    maps: Tensor,
    query_masks: Tensor,
    kinds: Sequence[MapKind],
) -> Tensor:
    """Mean over kinds of the class-balanced loss of that map on queries whose masks are known.

    Args:
        segmenter: its similarity network is trained.
        support: B encoded supports.
        maps: float (B, D, h, w), the network's output for the queries.
        query_masks: uint8 (B, H, W), 255 = ignore.
        kinds: forms of gradient attention (`attention_map_loss`; ``soft margin gradient`` is
            `priors.soft_margin_attention`), or ``soft margin`` itself (`balanced_map_loss`). The
            second negative of ``quadruplet`` is the object of the episode before it in the batch.
    """
    foreground, background = (side.flatten(1) for side in cell_weights(query_masks, (maps.shape[2], maps.shape[3])))
    second = support.foreground_embedding.roll(1, 0)
    cells, sides = maps.flatten(2).transpose(1, 2), (support.foreground, support.background)
    losses = []
    for kind in kinds:
        if kind == "soft margin":
            margin = soft_margin(cells, support.cells, *sides, temperature=segmenter.temperature)
            losses.append(balanced_map_loss(margin, foreground, background))
        elif kind == "soft margin gradient":
            gradient = soft_margin_attention(cells, support.cells, *sides, temperature=segmenter.temperature)
            losses.append(attention_map_loss(gradient, foreground, background))
        else:
            attention = segmenter.attention_maps(support, maps, kind, second_negative=second, rectify=False)
            losses.append(attention_map_loss(attention.flatten(1), foreground, background))
    return torch.stack(losses).mean()


def region_embeddings(
    support: SupportEncoding, maps: Tensor, query_masks: Tensor, class_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Embeddings of the episodes' objects and backgrounds with labels, for a metric loss.

    Objects bear their class; every background is a class of its own, because nobody knows what two of them share.
    Queries whose object covers no cell are left out.

    Args:
        support: B encoded supports.
        maps: float (B, D, h, w) of the queries.
        query_masks: uint8 (B, H, W).
        class_ids: B label values, above 0.

    Returns:
        Unit-length float (N, D), and int64 (N,): class ids, and negative numbers for backgrounds.
    """
    foreground, background = cell_weights(query_masks, (maps.shape[2], maps.shape[3]))
    queries, surroundings = (SimilarityNetwork.embed(maps, weights) for weights in (foreground, background))
    classes = torch.as_tensor(class_ids, device=maps.device)
    numbers = -1 - torch.arange(2 * len(classes), device=maps.device)
    embeddings = torch.cat([support.foreground_embedding, queries, support.background_embedding, surroundings])
    labels = torch.cat([classes, classes, numbers])
    present = embeddings.detach().norm(dim=1) > 0.5  # an absent region pools to the zero vector
    return embeddings[present], labels[present]


def region_triples(query_maps: Tensor, support_maps: Tensor, support_masks: Tensor) -> Triple:
    """The episodes as triples of maps: query, support's object, support's background.

    Args:
        query_maps: float (B, D, h, w) of the queries.
        support_maps: float (B*K, D, h, w), episode by episode.
        support_masks: uint8 (B, K, H, W).

    Returns:
        Maps float (B, D, h, w) and twice (B, D, K*h, w): shots stacked, cells outside the region set to 0.
    """
    batch, shots = support_masks.shape[:2]
    _, channels, height, width = support_maps.shape
    regions = []
    for weights in cell_weights(support_masks.flatten(0, 1), (height, width)):
        inside = (support_maps * weights[:, None]).reshape(batch, shots, channels, height, width)
        regions.append(inside.transpose(1, 2).reshape(batch, channels, shots * height, width))
    return query_maps, regions[0], regions[1]
