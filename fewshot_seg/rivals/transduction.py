"""RePRI (Boudiaf et al., CVPR 2021, arXiv 2012.06166): a linear classifier fitted to each episode, query included.

As the paper and its code have it: logits temperature * cos(cell, w) - b; w starts as the mean of the supports'
object cells, b as the query's mean logit; 50 steps of gradient descent (rate 0.025) on the supports' cross-entropy,
plus KL of the query's foreground proportion from pi, plus the entropy of the query's cells, weights 1, 1/K, 1/K; pi
starts as the first classifier's proportion and is computed once more at step 10, when the weight of KL rises by 1.
Nothing of it is trained on episodes: the features are, by ordinary classification of base classes.

Other than there: the backbone is frozen, and only a residual 1 x 1 embedding of the joined levels is trained to
classify base classes, cell by cell (rank 0: frozen features, nothing trained). Each photo's mask shows one class, so
the softmax over classes becomes one logistic regression a class. The code leaves the query's ignored pixels out of
entropy and proportion, for which it looks at the query's mask; here all cells count. Mask fractions weigh the
supports' cells, where the code takes the nearest pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.feature_episodes import FeatureBatch
from fewshot_seg.rivals.model import EpisodeModel, joined_maps, support_weights
from fewshot_seg.similarity import SimilarityNetwork, cell_weights

_TEMPERATURE = 20.0
_TINY = 1e-10


@dataclass(frozen=True, kw_only=True, slots=True)
class Adaptation:
    """How a classifier is fitted; the defaults are the paper's.

    Attributes:
        steps: of gradient descent.
        rate: its learning rate.
        update_at: step, from 1, before which the proportion is computed again; 0 never does.

    Raises:
        DataError: negative steps, or a rate that is not positive.
    """

    steps: int = 50
    rate: float = 0.025
    update_at: int = 10

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rate <= 0:
            raise DataError(f"adaptation needs steps >= 0 and a rate > 0, got {self.steps} and {self.rate}")


def classifier_logits(cells: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """temperature * cos(cell, w) - b (eq. 5). float (B, N, D), (B, D), (B,) -> (B, N)."""
    cosine = torch.einsum("bnd,bd->bn", F.normalize(cells, dim=2), F.normalize(weight, dim=1))
    return _TEMPERATURE * cosine - bias[:, None]


def support_cross_entropy(logits: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """Mean over the labelled area of the supports' cells (eq. 2). float (B, N) each -> (B,)."""
    wrong = foreground * F.softplus(-logits) + background * F.softplus(logits)
    return wrong.sum(dim=1) / (foreground + background).sum(dim=1).clamp_min(_TINY)


def mean_entropy(logits: Tensor) -> Tensor:
    """Mean Shannon entropy in nats of the query's cells (eq. 3). float (B, N) -> (B,)."""
    return (F.softplus(logits) - logits * logits.sigmoid()).mean(dim=1)


def proportion_divergence(logits: Tensor, proportion: Tensor) -> Tensor:
    """KL(p || pi) of the predicted foreground proportion p from pi (eq. 4). float (B, N), (B,) -> (B,)."""
    found = logits.sigmoid().mean(dim=1)
    one = found * ((found + _TINY) / (proportion + _TINY)).log()
    other = (1 - found) * ((1 - found + _TINY) / (1 - proportion + _TINY)).log()
    return one + other


def fit_classifier(
    query: Tensor, supports: Tensor, foreground: Tensor, background: Tensor, *, shots: int, how: Adaptation
) -> tuple[Tensor, Tensor]:
    """The classifier of each episode, fitted to its supports and its query.

    Args:
        query: float (B, M, D), cells.
        supports: float (B, N, D), of all shots.
        foreground, background: float (B, N), fraction of each support cell.
        shots: K.
        how: steps and rate.

    Returns:
        Weight float (B, D) and bias float (B,), detached. Episodes of a batch do not see each other.
    """
    query, supports = F.normalize(query, dim=2).detach(), F.normalize(supports, dim=2).detach()
    weight = torch.einsum("bnd,bn->bd", supports, foreground) / foreground.sum(dim=1, keepdim=True).clamp_min(_TINY)
    bias = classifier_logits(query, weight, weight.new_zeros(len(weight))).mean(dim=1)
    proportion = classifier_logits(query, weight, bias).sigmoid().mean(dim=1)
    of_divergence = of_entropy = 1 / shots
    for step in range(1, how.steps + 1):
        with torch.enable_grad():
            weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
            of_query = classifier_logits(query, weight, bias)
            if step == how.update_at:
                proportion, of_divergence = of_query.detach().sigmoid().mean(dim=1), of_divergence + 1
            loss = (
                support_cross_entropy(classifier_logits(supports, weight, bias), foreground, background)
                + of_divergence * proportion_divergence(of_query, proportion)
                + of_entropy * mean_entropy(of_query)
            )
            of_weight, of_bias = torch.autograd.grad(loss.sum(), (weight, bias))
        weight, bias = weight - how.rate * of_weight, bias - how.rate * of_bias
    return weight.detach(), bias.detach()


class TransductiveClassifier(EpisodeModel):
    """RePRI-style transduction over frozen features, or over an embedding that was trained on base classes.

    Args:
        channels: of the backbone's levels.
        classes: ids of the base classes that `losses` may meet.
        rank: rank of the embedding's residual; 0 trains nothing.
        adaptation: how the classifier of an episode is fitted.
        seed: of the initial values.
    """

    def __init__(
        self,
        channels: Sequence[int],
        classes: Sequence[int],
        *,
        rank: int = 64,
        adaptation: Adaptation | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.adaptation = adaptation or Adaptation()
        self.embedding = SimilarityNetwork(channels, rank=rank, seed=seed)
        self.classes = {class_id: row for row, class_id in enumerate(classes)}
        if rank:
            generator = torch.Generator().manual_seed(seed)
            started = torch.randn(len(self.classes), self.embedding.width, generator=generator)
            self.class_weights = nn.Parameter(started * self.embedding.width**-0.5)
            self.class_biases = nn.Parameter(torch.zeros(len(self.classes)))

    def description(self) -> dict[str, Any]:
        """See `EpisodeModel.description`."""
        how = self.adaptation
        return {"rank": self.embedding.rank, "steps": how.steps, "rate": how.rate, "update_at": how.update_at}

    def forward(self, batch: FeatureBatch) -> Tensor:
        """See `EpisodeModel.forward`; one map. No gradient flows back."""
        query, supports = joined_maps(batch)
        size = (query.shape[2], query.shape[3])
        foreground, background = (side.flatten(1) for side in support_weights(batch, size))
        with torch.no_grad():
            cells = _cells(self.embedding.turn(query))
            turned = _cells(self.embedding.turn(supports.flatten(0, 1))).reshape(len(query), -1, cells.shape[2])
        weight, bias = fit_classifier(
            cells, turned, foreground, background, shots=supports.shape[1], how=self.adaptation
        )
        return classifier_logits(cells, weight, bias).reshape(-1, 1, *size)

    def losses(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """Cross-entropy of the class shown, over all cells of all photos of the episodes: no episodes, only photos.

        Raises:
            DataError: a class that is none of the base classes.
        """
        unknown = sorted(set(batch.class_ids) - self.classes.keys())
        if unknown:
            raise DataError(f"class {unknown[0]} is none of the base classes {sorted(self.classes)}")
        query, supports = joined_maps(batch)
        photos = self.embedding.turn(torch.cat([query, supports.flatten(0, 1)]))
        masks = torch.cat([batch.query_masks, batch.support_masks.flatten(0, 1)])
        rows = torch.tensor([self.classes[class_id] for class_id in batch.class_ids], device=photos.device)
        rows = torch.cat([rows, rows.repeat_interleave(supports.shape[1])])
        foreground, background = cell_weights(masks, (photos.shape[2], photos.shape[3]))
        logits = classifier_logits(_cells(photos), self.class_weights[rows], self.class_biases[rows])
        loss = support_cross_entropy(logits, foreground.flatten(1), background.flatten(1)).mean()
        return {"loss": loss}


def _cells(maps: Tensor) -> Tensor:
    """float (N, D, h, w) -> (N, h*w, D)."""
    return maps.flatten(2).transpose(1, 2)
