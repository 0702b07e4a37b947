"""Scores of a similarity network on labelled photos: retrieval, re-identification, faithfulness of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from episodes.augment import EpisodeTransform
from episodes.labelled import LabelledImages
from episodes.progress import tqdm
from episodes.reidentification import ReidentificationData
from episodes.types import DataError
from fewshot_seg.attention import AttentionKind
from fewshot_seg.embedding import ImageEmbedder, embed_photos, explain_comparisons
from fewshot_seg.faithfulness import PerturbationMode, blurred, curve_area, perturbation_curve
from fewshot_seg.features import FeatureStore
from fewshot_seg.retrieval_metrics import (
    ReidentificationResult,
    RetrievalResult,
    reidentification_scores,
    retrieval_scores,
)
from fewshot_seg.similarity import SimilarityNetwork

Float64Array = npt.NDArray[np.float64]


def evaluate_retrieval(
    similarity: SimilarityNetwork,
    store: FeatureStore,
    images: LabelledImages,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    show_progress: bool = False,
) -> RetrievalResult:
    """recall@k and MAP@R with every photo as a query against all others; see `retrieval_metrics.retrieval_scores`."""
    embeddings = embed_photos(similarity, store, images.files, show_progress=show_progress)
    return retrieval_scores(embeddings, torch.from_numpy(images.codes), ks=ks)


def evaluate_reidentification(
    similarity: SimilarityNetwork,
    store: FeatureStore,
    data: ReidentificationData,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    show_progress: bool = False,
) -> ReidentificationResult:
    """CMC and mAP of the queries against the gallery; see `retrieval_metrics.reidentification_scores`."""
    names = sorted({*data.query.labels, *data.gallery.labels})
    number = {name: code for code, name in enumerate(names)}
    sides = [
        (
            embed_photos(similarity, store, side.files, show_progress=show_progress),
            torch.tensor([number[label] for label in side.labels]),
            torch.tensor(side.cameras),
        )
        for side in (data.query, data.gallery)
    ]
    return reidentification_scores(*sides[0], *sides[1], ranks=ranks)


class Comparison(NamedTuple):
    """Photos that are compared, by position: anchor, one of its class, and two of two other classes."""

    anchor: int
    positive: int
    negative: int
    second_negative: int


def draw_comparisons(images: LabelledImages, *, count: int, seed: int) -> list[Comparison]:
    """Comparison n is a pure function of (seed, n): a class, two of its photos, and one of each of two other classes.

    Raises:
        DataError: fewer than three classes, or no class with two photos.
    """
    codes = images.codes
    members = [np.flatnonzero(codes == code) for code in range(len(images.class_names))]
    able = [code for code, photos in enumerate(members) if len(photos) > 1]
    if len(members) < 3 or not able:
        raise DataError(
            f"{images.name}: comparisons need at least 3 classes, one of them with 2 photos; got {len(members)} classes"
        )
    drawn = []
    for number in range(count):
        random = np.random.default_rng([seed, number])
        code = able[random.integers(len(able))]
        pair = random.choice(members[code], 2, replace=False)
        others = random.choice([other for other in range(len(members)) if other != code], 2, replace=False)
        drawn.append(Comparison(*(int(n) for n in pair), *(int(random.choice(members[other])) for other in others)))
    return drawn


def read_squares(images: LabelledImages, positions: Sequence[int], *, size: int) -> Tensor:
    """Photos squashed to squares as the network sees them, float32 (N, 3, size, size), RGB in [0, 1]."""
    transform = EpisodeTransform("none", size)
    return torch.stack([transform.photo(images.image(images.files[position])) for position in positions])


@dataclass(frozen=True, kw_only=True, slots=True)
class PairFaithfulness:
    """Deletion and insertion on the cosine similarity of P pairs, float64 (P, 2): anchor masked, positive masked.

    Attributes:
        deletion: area under the similarity while the most attended pixels go first; low is faithful.
        insertion: area while they come first; high is faithful.
        whole, blank: similarity of the whole photo, and of its blurred version, to the other photo.
    """

    deletion: Float64Array
    insertion: Float64Array
    whole: Float64Array
    blank: Float64Array

    def normalised(self, name: PerturbationMode) -> float:
        """Mean area in percent of the way from blank (0) to whole (100): comparable between networks.

        The ratio of means, not the mean of ratios: pairs whose similarity hardly changes would outweigh all others.
        """
        low, high = self.blank.mean(), self.whole.mean()
        areas = self.deletion if name == "deletion" else self.insertion
        return 100 * float((areas.mean() - low) / (high - low))


@torch.no_grad()
def pair_faithfulness(
    embedder: ImageEmbedder,
    images: LabelledImages,
    comparisons: Sequence[Comparison],
    *,
    size: int,
    kind: AttentionKind | Literal["random"] = "margin",
    steps: int = 10,
    batch_size: int = 8,
    show_progress: bool = False,
) -> PairFaithfulness:
    """How faithful the attention of similar pairs is, in both directions (Petsiuk et al., RISE, arXiv 1806.07421).

    Args:
        embedder: the model.
        images: photos.
        comparisons: of `draw_comparisons`; the negatives serve the attention of triplet-like kinds.
        size: side of the square photos.
        kind: form of the score; ``random`` takes a random value per cell of the map instead of attention, which is what
            attention must beat (single pixels in random order would blur everything at once).
        steps: of the curves.
        batch_size: pairs at a time.
        show_progress: bar on stderr.
    """
    rows, device = [], next(embedder.backbone.parameters()).device
    with tqdm(total=len(comparisons), desc="faithfulness", unit="pair", disable=not show_progress) as bar:
        for start in range(0, len(comparisons), batch_size):
            part = comparisons[start : start + batch_size]
            photos = [read_squares(images, positions, size=size).to(device) for positions in zip(*part, strict=True)]
            rows.append(_batch_faithfulness(embedder, photos, kind, steps))
            bar.update(len(part))
    values = np.concatenate(rows)
    deletion, insertion, whole, blank = (values[:, number] for number in range(4))
    return PairFaithfulness(deletion=deletion, insertion=insertion, whole=whole, blank=blank)


def _batch_faithfulness(
    embedder: ImageEmbedder, photos: Sequence[Tensor], kind: AttentionKind | Literal["random"], steps: int
) -> Float64Array:
    """float64 (B, 4, 2): deletion, insertion, whole, blank; anchor and positive."""
    explanation = explain_comparisons(embedder, photos, kind="cosine" if kind == "random" else kind)
    directions = []
    for masked, other, attention in (
        (photos[0], explanation.embeddings[1], explanation.anchor[0]),
        (photos[1], explanation.embeddings[0], explanation.positive[0]),
    ):
        saliency = _random_map(attention) if kind == "random" else attention
        baseline = blurred(masked, sigma=masked.shape[-1] / 16)

        def similarity(changed: Tensor, other: Tensor = other) -> Tensor:
            embeddings: Tensor = embedder(changed)
            return (embeddings * other).sum(1)

        curves = {
            mode: perturbation_curve(similarity, masked, saliency, mode=mode, baseline=baseline, steps=steps)
            for mode in ("deletion", "insertion")
        }
        areas = [curve_area(curve) for curve in curves.values()]
        directions.append(torch.stack([*areas, curves["deletion"][:, 0], curves["insertion"][:, 0]], dim=1))
    return torch.stack(directions, dim=2).cpu().double().numpy()


def _random_map(attention: Tensor) -> Tensor:
    """One random map for all photos, so that it does not depend on the batch. float (B, h, w) -> (B, h, w)."""
    values = torch.rand(attention.shape[1:], generator=torch.Generator().manual_seed(0))
    return values.to(attention).expand_as(attention)
