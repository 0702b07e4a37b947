"""Training by cross-fitting: the decoder learns from priors as they are for classes that nobody was trained on.

Similarity network, completion and base learner look better on the classes that they were trained on than on others. A
decoder trained together with them learns to trust them too much, and finds thresholds that do not hold for novel
classes. So the base classes are dealt into groups; for each group the embedding is trained on the others, and gives
priors of episodes of that group (stacked generalisation, Wolpert 1992; cross-fitting, Chernozhukov et al. 2018). The
decoder is trained on these, and works on top of an embedding that is trained on all base classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.bad_steps import Account, account_of_episodes, model_facts
from fewshot_seg.base_learner import BaseLearner, base_class_loss
from fewshot_seg.checkpoint import read_tensors, write_tensors
from fewshot_seg.decoder import ContextDecoder
from fewshot_seg.encoded_photos import EncodedPhotos
from fewshot_seg.encodings import PhotoMaps
from fewshot_seg.episode_logits import batches_with_progress
from fewshot_seg.feature_episodes import FeatureBatch, FeatureEpisodes
from fewshot_seg.optimisation import Plan, TrainingResult, optimise
from fewshot_seg.priors import log_density_ratio
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.similarity import cell_weights, join_levels
from fewshot_seg.trainee import NamedModules
from fewshot_seg.training import metric_loss, weak_support_loss


def embedding_losses(segmenter: FewShotSegmenter, batch: FeatureBatch) -> dict[str, Tensor]:
    """Metric loss of the similarity network and loss of the completion; the decoder takes no part.

    The metric loss compares with the supports' masks, also with those behind weak marks: what an embedding learns from
    guesses does not help it to complete them, and costs what it knows of masks.

    Returns:
        ``loss``, their sum, and each of them.
    """
    shots = batch.support_masks.shape[1]
    supports, queries = join_levels(batch.support_levels), join_levels(batch.query_levels)
    height, width = queries.shape[2:]
    cosine = segmenter.similarity.cosines(
        queries.flatten(2).transpose(1, 2),
        supports.reshape(-1, shots, *supports.shape[1:]).movedim(2, -1).flatten(1, 3),
    )
    sides = (
        side.reshape(len(queries), -1) for side in cell_weights(batch.support_truth.flatten(0, 1), (height, width))
    )
    margin = log_density_ratio(cosine, *sides, temperature=segmenter.temperature).reshape(-1, height, width)
    metric = metric_loss(margin, batch.query_masks)
    completion = torch.zeros_like(metric)
    if segmenter.completion is not None:
        with torch.no_grad():  # the similarity network learns through `cosines`
            turned, turned_queries = segmenter.similarity.turn(supports), segmenter.similarity.turn(queries)
        encoded = segmenter.encode_support_photos(
            PhotoMaps(cells=turned, frozen=supports), batch.support_masks, batch.support_dense
        )
        objectness = segmenter.objectness(turned_queries, queries)
        completion = weak_support_loss(batch, encoded, objectness, int((~batch.support_dense).sum()))
    return {"loss": metric + completion, "metric_loss": metric.detach(), "completion_loss": completion.detach()}


def train_embedding(
    segmenter: FewShotSegmenter,
    episodes: FeatureEpisodes,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    seed: int = 0,
    **run: Any,
) -> TrainingResult:
    """Train similarity network and completion in place, by `embedding_losses`.

    Args:
        segmenter: with the prior ``similarity``.
        episodes: at least steps * batch_size.
        steps, batch_size, learning_rate, weight_decay, seed: of AdamW with a one-cycle schedule.
        run: folder, checkpoint_every, resume, show_progress of `optimise`.
    """
    if len(episodes) < steps * batch_size:
        raise DataError(f"{steps} steps of {batch_size} need {steps * batch_size} episodes, got {len(episodes)}")
    device = next(segmenter.backbone.parameters()).device
    return optimise(
        NamedModules(similarity=segmenter.similarity, completion=segmenter.completion),
        lambda step: episodes.batches(batch_size, start=step * batch_size),
        lambda batch: embedding_losses(segmenter, batch.to(device)),
        plan=_plan(steps, learning_rate, weight_decay, seed, {"part": "embedding", "batch_size": batch_size}),
        describe=lambda batch: account_of_episodes(batch, losses="embedding", **model_facts(segmenter)),
        **run,
    )


def train_base_learner(
    learner: BaseLearner,
    cells: Tensor,
    shares: Tensor,
    *,
    steps: int = 300,
    batch_size: int = 2048,
    learning_rate: float = 5e-3,
    weight_decay: float = 1e-2,
    seed: int = 0,
) -> None:
    """Train in place on cells drawn from training photos; takes seconds, and is not interrupted.

    Args:
        learner: of C classes.
        cells: unit-length frozen cells, float (N, D), half precision will do.
        shares: float (N, C + 1), fractions of each cell, background last.
        steps, batch_size, learning_rate, weight_decay, seed: of AdamW with a one-cycle schedule.
    """
    device = learner.weight.device
    draws = torch.Generator().manual_seed(seed)
    optimise(
        NamedModules(base_learner=learner),
        lambda step: (  # noqa: ARG005 - nothing is resumed here
            torch.randint(len(cells), (batch_size,), generator=draws) for _ in range(steps)
        ),
        lambda rows: {
            "loss": base_class_loss(learner.logits(cells[rows].float().to(device)), shares[rows].float().to(device))
        },
        plan=_plan(steps, learning_rate, weight_decay, seed, {"part": "base learner"}),
        describe=lambda rows: Account(
            what="cells", names=tuple(map(str, rows.tolist())), tensors={"cells": cells[rows], "shares": shares[rows]}
        ),
    )


@torch.no_grad()
def priors_of_episodes(
    segmenter: FewShotSegmenter, episodes: FeatureEpisodes, *, batch_size: int = 10, show_progress: bool = False
) -> dict[str, Tensor]:
    """What the decoder reads of every episode at first sight, and what it should answer.

    Returns:
        ``priors`` float16 (N, P, h, w); ``foreground`` and ``background`` float16 (N, h, w), shares of the query's
        cells; ``class_ids`` int64 (N,).
    """
    segmenter.eval()
    encoded = EncodedPhotos(segmenter)
    found: dict[str, list[Tensor]] = {"priors": [], "foreground": [], "background": [], "class_ids": []}
    for batch in batches_with_progress(episodes, batch_size, show_progress, "priors"):
        photos = encoded.queries(batch)
        priors = segmenter.priors_of(encoded.supports(batch), photos, look_again=False)
        sides = cell_weights(batch.query_masks, (priors.shape[2], priors.shape[3]))
        for name, maps in zip(("priors", "foreground", "background"), (priors, *sides), strict=True):
            found[name].append(maps.half().cpu())
        found["class_ids"].append(torch.tensor(batch.class_ids))
    return {name: torch.cat(parts) for name, parts in found.items()}


def are_priors(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors of a file have the names, shapes and types of `priors_of_episodes`, and finite numbers."""
    if tensors.keys() != {"priors", "foreground", "background", "class_ids"} or tensors["priors"].dim() != 4:
        return False
    count, _, height, width = tensors["priors"].shape
    shapes = {"foreground": (count, height, width), "background": (count, height, width), "class_ids": (count,)}
    types = {name: torch.int64 if name == "class_ids" else torch.float16 for name in tensors}
    return (
        count > 0
        and all(tensors[name].shape == shape for name, shape in shapes.items())
        and all(one.dtype == types[name] and bool(one.isfinite().all()) for name, one in tensors.items())
    )


def decoder_loss(logits: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """Cross-entropy and Dice of every episode, and Dice of all together, over cells.

    The benchmark's mIoU adds up intersections and unions over episodes, so that large objects decide; the Dice of each
    episode keeps the small ones.

    Args:
        logits: float (B, h, w).
        foreground, background: float (B, h, w), shares of every cell; ignored area is in neither.

    Returns:
        Scalar.
    """
    valid, probability = foreground + background, logits.sigmoid()
    entropy = nn.functional.softplus(-logits) * foreground + nn.functional.softplus(logits) * background
    overlap = (probability * foreground).sum((1, 2))
    size = (probability * valid).sum((1, 2)) + foreground.sum((1, 2))
    of_each = entropy.sum((1, 2)) / valid.sum((1, 2)).clamp_min(1) + 1 - (2 * overlap + 0.1) / (size + 0.1)
    return of_each.mean() + 1 - 2 * overlap.sum() / size.sum().clamp_min(1e-6)


_STORED = ("priors", "foreground", "background")


def stored_loss(decoder: ContextDecoder, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`decoder_loss` of episodes as `priors_of_episodes` stores them, as ``loss``."""
    maps, foreground, background = (stored[name].float() for name in _STORED)
    return {"loss": decoder_loss(decoder(maps, maps, maps), foreground, background)}


def train_decoder(
    decoder: ContextDecoder,
    stored: Mapping[str, Tensor],
    *,
    steps: int = 800,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    seed: int = 0,
    name: Callable[[int], str] | None = None,
    **run: Any,
) -> TrainingResult:
    """Train in place on the result of `priors_of_episodes`.

    Args:
        decoder: its scales are fitted first.
        stored: priors of N episodes and what they should become.
        steps, batch_size, learning_rate, weight_decay, seed: of AdamW with a one-cycle schedule. Every pass over the
            episodes has an order of its own.
        name: of a stored episode by its number, for the message of a loss that is not finite.
        run: folder, checkpoint_every, resume, show_progress of `optimise`.
    """
    priors, device = stored["priors"], decoder.gain.device
    decoder.fit_scales(priors.to(device))
    count = len(priors)
    passes = -(-steps * batch_size // count)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])

    def loss(rows: Tensor) -> dict[str, Tensor]:
        return stored_loss(decoder, {name: stored[name][rows].to(device) for name in _STORED})

    def account(rows: Tensor) -> Account[Tensor]:
        return Account(
            what="episodes",
            names=tuple(f"stored episode {number}" if name is None else name(number) for number in rows.tolist()),
            tensors={one: stored[one][rows] for one in _STORED},
            facts={"losses": "decoder", "decoder": decoder.description()},
            alone=lambda number: rows[number : number + 1],
        )

    return optimise(
        NamedModules(decoder=decoder),
        lambda step: (order[n * batch_size : (n + 1) * batch_size] for n in range(step, steps)),
        loss,
        plan=_plan(steps, learning_rate, weight_decay, seed, {"part": "decoder", "batch_size": batch_size}),
        describe=account,
        **run,
    )


def _plan(steps: int, learning_rate: float, weight_decay: float, seed: int, details: Mapping[str, Any]) -> Plan:
    return Plan(
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule="one-cycle",
        seed=seed,
        details=details,
    )


def keep_tensors(
    path: Path | None,
    compute: Callable[[], dict[str, Tensor]],
    settings: Mapping[str, Any],
    *,
    is_sound: Callable[[Mapping[str, Tensor]], bool] = bool,
) -> dict[str, Tensor]:
    """Tensors from a file, or computed and written there. A file that is there is whole: it is renamed when it is.

    Args:
        path: of the file; None keeps nothing.
        compute: makes the tensors.
        settings: whatever decides them, JSON-able; written into the file.
        is_sound: whether tensors may be what `compute` makes; asked of those of a file.

    Raises:
        DataError: the file is of other settings, or does not say of which.
    """
    if path is None:
        return compute()
    now = json.loads(json.dumps(settings))  # as it comes back from the file
    if path.exists():
        try:
            found, description = read_tensors(path)
            kept = description["settings"]
            if not isinstance(kept, dict) or not is_sound(found):
                raise DataError("not what was written")
        except (DataError, KeyError) as error:
            raise DataError(f"{path} is damaged, or of an earlier version; delete it to compute it anew") from error
        if kept != now:
            raise DataError(
                f"{path} belongs to a run with other settings ({_differences(kept, now)}); choose another --out, or "
                "leave out --resume to start again"
            )
        return found
    found = compute()
    write_tensors(path, found, {"format": 1, "settings": now})
    return found


def _differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} was {_short(kept.get(name))}, now {_short(now.get(name))}"
        for name in sorted(kept.keys() | now.keys())
        if kept.get(name) != now.get(name)
    )


def _short(value: Any) -> str:
    return text if len(text := str(value)) <= 60 else f"{text[:57]}..."
