"""Scores over episodes: the model's masks, and the best threshold on base classes.

Under torchrun every rank scores whole batches, and all of them end with the scores of all episodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from episodes.progress import tqdm
from episodes.protocols import Fit, ShotRule
from episodes.types import DataError, EpisodeSpec, MaskSource
from fewshot_seg.decoder import Decoder
from fewshot_seg.distributed import current_ranks, dealt, gather_dealt
from fewshot_seg.encoded_photos import EncodedPhotos
from fewshot_seg.episode_logits import (
    ShotLogits,
    batches_with_progress,
    shot_logits,
    square_targets,
)
from fewshot_seg.feature_episodes import FeatureBatch, FeatureEpisodes
from fewshot_seg.findings import Finding, find, other_classes
from fewshot_seg.metrics import EpisodeIoU, Float64Array, IoUResult, intersection_union, mean_result
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.shot_rules import check_shot_rule

ReadLogits = Callable[[FeatureBatch, tuple[int, int]], ShotLogits]
"""Logits of a batch's queries at a size (H, W), by any method."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Pooled scores with intervals, and every episode.

    Attributes:
        result: mean of the repeats.
        repeats: result of every repeat, pooled over its own episodes; one unless asked for more.
        specs: episodes of all repeats.
        episode_iou: float64 (N,), percent, same order.
        seconds: of the whole evaluation.
        findings: one per episode, same order; empty unless asked for.
    """

    result: IoUResult
    repeats: tuple[IoUResult, ...]
    specs: tuple[EpisodeSpec, ...]
    episode_iou: Float64Array
    seconds: float
    findings: tuple[Finding, ...] = ()


def evaluate(
    segmenter: FewShotSegmenter,
    episodes: FeatureEpisodes,
    *,
    scoring_size: int | None,
    source: MaskSource,
    fit: Fit = "squash",
    shot_rule: ShotRule = "pooled",
    repeats: int = 1,
    support_cells: int | None = None,
    batch_size: int = 10,
    findings: bool = False,
    show_progress: bool = False,
) -> Evaluation:
    """mIoU and FB-IoU over all episodes.

    Args:
        segmenter: model, with its threshold.
        episodes: what is scored.
        scoring_size: side of the square at which masks are compared; None compares at the label's original size.
        source: original masks, read only when scoring_size is None, and for the findings.
        fit: how the photos were made square; read only then, too. At the square, padded pixels are 255 in the mask and
            do not count, but they can hold the image's largest number of votes.
        shot_rule: how K supports become one mask, see `fewshot_seg.shot_rules`.
        repeats: the episodes are so many equal parts one after another, each scored on its own; the result is their
            mean.
        support_cells: cells that the supports of an episode keep together, see `EncodedPhotos`; None keeps all.
        batch_size: episodes at a time; does not change the scores.
        findings: also say of every episode what was missed and what was marked wrongly.
        show_progress: bar with time left on stderr.

    Raises:
        DataError: an unknown rule, or episodes that are not so many equal parts.
    """
    return evaluate_heads(
        segmenter,
        {"decoder": (segmenter.decoder, segmenter.threshold)},
        episodes,
        scoring_size=scoring_size,
        source=source,
        fit=fit,
        shot_rule=shot_rule,
        repeats=repeats,
        support_cells=support_cells,
        batch_size=batch_size,
        findings=findings,
        show_progress=show_progress,
    )["decoder"]


def evaluate_heads(
    segmenter: FewShotSegmenter,
    heads: Mapping[str, tuple[Decoder, float]],
    episodes: FeatureEpisodes,
    *,
    scoring_size: int | None,
    source: MaskSource,
    fit: Fit = "squash",
    shot_rule: ShotRule = "pooled",
    repeats: int = 1,
    support_cells: int | None = None,
    batch_size: int = 10,
    findings: bool = False,
    show_progress: bool = False,
) -> dict[str, Evaluation]:
    """As `evaluate`, for several (decoder, threshold) that read the same priors, in one pass over the episodes."""
    check_shot_rule(shot_rule)
    decoders = {name: decoder for name, (decoder, _) in heads.items()}
    encoded = EncodedPhotos(segmenter, decoders.values(), support_cells=support_cells)
    return evaluate_logits(
        lambda batch, size: shot_logits(segmenter, decoders, batch, size, rule=shot_rule, encoded=encoded),
        {name: (name, threshold) for name, (_, threshold) in heads.items()},
        episodes,
        scoring_size=scoring_size,
        source=source,
        fit=fit,
        repeats=repeats,
        batch_size=batch_size,
        findings=findings,
        show_progress=show_progress,
    )


def evaluate_logits(
    read: ReadLogits,
    cuts: Mapping[str, tuple[str, float]],
    episodes: FeatureEpisodes,
    *,
    scoring_size: int | None,
    source: MaskSource,
    fit: Fit = "squash",
    repeats: int = 1,
    batch_size: int = 10,
    findings: bool = False,
    show_progress: bool = False,
) -> dict[str, Evaluation]:
    """As `evaluate`, for any method that gives logits; by name, (head of the logits, threshold) to score it at."""
    check_repeats(len(episodes), repeats)
    parts, began = (
        list[tuple[dict[str, EpisodeIoU], dict[str, list[Finding]], tuple[EpisodeSpec, ...]]](),
        time.perf_counter(),
    )
    for batch in batches_of_rank(episodes, batch_size, show_progress, "evaluating"):
        side, metrics = scoring_size or batch.query_masks.shape[-1], {name: EpisodeIoU() for name in cuts}
        logits = read(batch, (side, side))
        found: dict[str, list[Finding]] = {name: [] for name in cuts}
        shown = [(spec.query_id, spec.class_id) for spec in batch.specs] if findings else []
        others = [other_classes(source, *one, side=scoring_size, fit=fit) for one in shown]  # read once for all cuts
        for name, (head, threshold) in cuts.items():
            scored = _scored(logits, head, threshold, batch, scoring_size, source, fit)
            for row, (margins, target) in enumerate(scored):
                metrics[name].update(margins[None] > 0, target[None], [batch.specs[row].class_id])
                if findings:
                    found[name].append(find(margins, target, others[row], ranked=logits.rule != "vote"))
        parts.append((metrics, found, batch.specs))
    parts = gather_dealt(parts)
    specs = tuple(spec for *_, of_batch in parts for spec in of_batch)
    seconds, evaluations = time.perf_counter() - began, {}
    for name in cuts:
        metric = EpisodeIoU.joined([metrics[name] for metrics, _, _ in parts])
        results = tuple(part.compute() for part in metric.split(repeats))
        evaluations[name] = Evaluation(
            result=mean_result(results),
            repeats=results,
            specs=specs,
            episode_iou=metric.episode_iou(),
            seconds=seconds,
            findings=tuple(one for _, found, _ in parts for one in found[name]),
        )
    return evaluations


def batches_of_rank(
    episodes: FeatureEpisodes, batch_size: int, show_progress: bool, title: str, *, ways: int = 1
) -> Iterator[FeatureBatch]:
    """As `batches_with_progress`; of several ranks, the batches that are dealt to this one, to gather afterwards."""
    ranks, step = current_ranks(), batch_size * ways
    if ranks.size == 1:
        yield from batches_with_progress(episodes, batch_size, show_progress, title, ways=ways)
        return
    starts = range(ranks.rank * step, len(episodes), ranks.size * step)
    own = sum(min(step, len(episodes) - start) for start in starts)
    title = f"{title}, rank {ranks.rank} of {ranks.size}"
    with tqdm(total=own // ways, desc=title, unit="episode", disable=not (show_progress and ranks.first)) as bar:
        for batch in dealt(episodes, step):
            yield batch
            bar.update(len(batch.specs) // ways)


def _scored(
    logits: ShotLogits,
    head: str,
    threshold: float,
    batch: FeatureBatch,
    scoring_size: int | None,
    originals: MaskSource,
    fit: Fit,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Margins float (H, W) and target uint8 (H, W) of every query: at the square, or at its label's own size."""
    if scoring_size is not None:
        yield from zip(logits.margins(head, threshold), square_targets(batch, scoring_size), strict=True)
        return
    for row, spec in enumerate(batch.specs):
        target = torch.from_numpy(originals.mask(spec.query_id, spec.class_id))
        yield logits.resized_margins(head, threshold, row, (target.shape[0], target.shape[1]), fit), target


def check_repeats(episodes: int, repeats: int) -> None:
    """Raises DataError when so many episodes are not so many equal parts."""
    if repeats < 1 or episodes < repeats or episodes % repeats:
        raise DataError(
            f"{episodes} episodes cannot be scored as {repeats} equal repeats; "
            "ask for a number of episodes that the number of repeats divides"
        )


def choose_threshold(
    segmenter: FewShotSegmenter,
    episodes: FeatureEpisodes,
    *,
    shot_rule: ShotRule = "pooled",
    batch_size: int = 10,
    candidates: int = 41,
    show_progress: bool = False,
) -> tuple[float, float]:
    """The single threshold with the best mIoU on these episodes, which must not be of the test fold.

    Candidates are spaced evenly between the 2nd and the 98th percentile of all logits.

    Returns:
        (threshold, its mIoU in percent).
    """
    return choose_thresholds(
        segmenter,
        {"decoder": segmenter.decoder},
        episodes,
        shot_rule=shot_rule,
        batch_size=batch_size,
        candidates=candidates,
        show_progress=show_progress,
    )["decoder"]


def choose_thresholds(
    segmenter: FewShotSegmenter,
    decoders: Mapping[str, Decoder],
    episodes: FeatureEpisodes,
    *,
    shot_rule: ShotRule = "pooled",
    batch_size: int = 10,
    candidates: int = 41,
    show_progress: bool = False,
) -> dict[str, tuple[float, float]]:
    """As `choose_threshold`, for several decoders that read the same priors."""
    check_shot_rule(shot_rule)
    encoded = EncodedPhotos(segmenter, decoders.values())
    return choose_logit_thresholds(
        lambda batch, size: shot_logits(segmenter, decoders, batch, size, rule=shot_rule, encoded=encoded),
        episodes,
        batch_size=batch_size,
        candidates=candidates,
        show_progress=show_progress,
    )


def choose_logit_thresholds(
    read: ReadLogits,
    episodes: FeatureEpisodes,
    *,
    batch_size: int = 10,
    candidates: int = 41,
    show_progress: bool = False,
) -> dict[str, tuple[float, float]]:
    """As `choose_threshold`, for every head of any method that gives logits."""
    if candidates < 2:
        raise DataError(f"choosing a threshold needs at least 2 candidates, got {candidates}")
    kept = list[tuple[ShotLogits, Tensor, tuple[int, ...]]]()
    for batch in batches_of_rank(episodes, batch_size, show_progress, "choosing threshold"):
        # a quarter of the side is enough to place one threshold, and keeps all logits in memory
        side = -(-batch.query_masks.shape[-1] // 4)
        logits = read(batch, (side, side))
        kept.append((logits, square_targets(batch, side), batch.class_ids))
    kept = gather_dealt(kept)
    weights = torch.cat([one.weights for one, _, _ in kept])
    together = {name: torch.cat([one.heads[name] for one, _, _ in kept]) for name in kept[0][0].heads}
    whole = ShotLogits(heads=together, weights=weights, rule=kept[0][0].rule)
    target = torch.cat([targets for _, targets, _ in kept])
    class_ids = [class_id for _, _, of_batch in kept for class_id in of_batch]
    return {name: _best_threshold(whole, name, target, class_ids, candidates) for name in together}


def _best_threshold(
    logits: ShotLogits, head: str, targets: Tensor, class_ids: Sequence[int], candidates: int
) -> tuple[float, float]:
    low, high = np.percentile(logits.heads[head].numpy(), (2, 98))
    scored = []
    for threshold in np.linspace(low, high, candidates).tolist():
        sums: dict[int, Float64Array] = {}
        counts = intersection_union(logits.margins(head, threshold) > 0, targets)[:, 1].numpy()
        for class_id, count in zip(class_ids, counts, strict=True):
            sums[class_id] = sums.get(class_id, np.zeros(2)) + count
        scored.append((100 * float(np.mean([i / max(u, 1) for i, u in sums.values()])), threshold))
    miou, threshold = max(scored)
    return threshold, miou
