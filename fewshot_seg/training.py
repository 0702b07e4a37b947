"""Episodic training of similarity network and decoder over a frozen backbone.

Under torchrun a batch is split over the ranks, rank after rank: every loss is a mean over what the whole batch holds,
dropout is drawn for the whole batch, and DistributedDataParallel averages the gradients. The weights are those of one
process, within rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from episodes.types import DataError
from fewshot_seg.bad_steps import account_of_episodes, model_facts
from fewshot_seg.checkpoint import load_trained_tensors, trained_tensors
from fewshot_seg.completion import completion_loss
from fewshot_seg.distributed import current_ranks, dealt, raise_if_lost, rows_of_ranks, said_once, split_rows
from fewshot_seg.encodings import SupportEncoding
from fewshot_seg.feature_episodes import FeatureBatch, FeatureEpisodes
from fewshot_seg.losses import balanced_map_loss, segmentation_loss
from fewshot_seg.optimisation import Plan, Schedule, TrainingResult, optimise
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.similarity import cell_weights

_LOSS_STRIDE = 4  # the mask loss looks at every 4th pixel: the logits live on a coarser grid anyway


def episode_losses(
    segmenter: FewShotSegmenter, batch: FeatureBatch, *, dice_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(mask loss, metric loss, completion loss) of a batch, scalars.

    The metric loss (`balanced_map_loss` of the soft margin) trains the embedding itself: query cells of the object
    must be nearer the support's object than its background. It is zero where the similarity network is not used.
    The completion loss trains what fills in weak supports; zero where nothing is trained to do so. Of several ranks,
    which all must call this at once, the mean over the ranks is the loss of all their episodes.
    """
    weak_rows, query_rows = rows_of_ranks(int((~batch.support_dense).sum()), len(batch.query_masks))
    split = current_ranks().size > 1
    with split_rows(weak_rows) if split else nullcontext():
        support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks, batch.support_dense)
        if segmenter.completion is not None and weak_rows.total and bool(batch.support_dense.all()):
            segmenter.completion.pass_over(weak_rows.total, support.cells)
    targets = batch.query_masks[:, _LOSS_STRIDE // 2 :: _LOSS_STRIDE, _LOSS_STRIDE // 2 :: _LOSS_STRIDE]
    with split_rows(query_rows) if split else nullcontext():
        prediction = segmenter.segment_levels(support, batch.query_levels, (targets.shape[1], targets.shape[2]))
    mask_loss = segmentation_loss(prediction.logits, targets, dice_weight=dice_weight)
    nothing = torch.zeros_like(mask_loss)
    completion = nothing
    if segmenter.completion is not None:
        reads = segmenter.prior == "similarity"  # the objectness of the query, which is the last map
        objectness = prediction.priors[:, -1] if reads else None
        completion = weak_support_loss(batch, support, objectness, weak_rows.total)
    if segmenter.prior != "similarity":
        return mask_loss, nothing, completion
    return mask_loss, metric_loss(prediction.priors[:, 0], batch.query_masks), completion


def weak_support_loss(
    batch: FeatureBatch, support: SupportEncoding, objectness: Tensor | None, weak_of_all: int
) -> Tensor:
    """Loss of what was filled in: of weak supports, and of the queries, of which the completion knows nothing.

    Args:
        batch, support: the episodes and their encoded supports.
        objectness: float (B, h, w), logits of the completion for the queries, if it was asked.
        weak_of_all: weak supports of all ranks.

    Ranks differ in how many weak supports they have: the mean is over those of all, `weak_of_all`.
    """
    size = (support.frozen.shape[3], support.frozen.shape[4])
    completed, truths, weights = list[tuple[Tensor, Tensor]](), list[Tensor](), list[float]()
    weak = ~batch.support_dense.flatten()
    if bool(weak.any()):
        foreground, background = (side.reshape(-1, *size)[weak] for side in (support.foreground, support.background))
        completed.append((foreground, background))
        truths.append(batch.support_truth.flatten(0, 1)[weak])
        weights.append(int(weak.sum()) * current_ranks().size / weak_of_all)
    if objectness is not None:
        completed.append((objectness.sigmoid(), (-objectness).sigmoid()))
        truths.append(batch.query_masks)
        weights.append(1.0)
    losses = [
        weight * completion_loss(foreground, background, *cell_weights(truth, size))
        for (foreground, background), truth, weight in zip(completed, truths, weights, strict=True)
    ]
    return torch.stack(losses).sum() if losses else support.cells.new_zeros(())


def metric_loss(margin: Tensor, query_masks: Tensor) -> Tensor:
    """`balanced_map_loss` of margins float (B, h, w) against masks uint8 (B, H, W)."""
    foreground, background = cell_weights(query_masks, (margin.shape[1], margin.shape[2]))
    return balanced_map_loss(margin.flatten(1), foreground.flatten(1), background.flatten(1))


class _Segmenter:
    """The segmenter as a trainee."""

    def __init__(self, segmenter: FewShotSegmenter) -> None:
        self._segmenter = segmenter

    def parameters(self) -> Sequence[nn.Parameter]:
        return self._segmenter.trainable_parameters()

    def tensors(self) -> dict[str, Tensor]:
        return trained_tensors(self._segmenter)

    def restore(self, tensors: Mapping[str, Tensor], where: Path) -> None:
        load_trained_tensors(self._segmenter, tensors, where=where)

    def set_training(self, training: bool) -> None:
        self._segmenter.train(training)


class TrainingLosses(nn.Module):
    """Named losses of a batch, the one to minimise as ``loss``; what DistributedDataParallel wraps."""

    def __init__(self, segmenter: FewShotSegmenter, *, metric_weight: float, dice_weight: float) -> None:
        super().__init__()
        self.segmenter, self.metric_weight, self.dice_weight = segmenter, metric_weight, dice_weight

    def forward(self, batch: FeatureBatch) -> dict[str, Tensor]:
        batch = batch.to(next(self.segmenter.parameters()).device)
        mask_loss, metric_loss, completion = episode_losses(self.segmenter, batch, dice_weight=self.dice_weight)
        return {
            "loss": mask_loss + self.metric_weight * metric_loss + completion,
            "mask_loss": mask_loss.detach(),
            "metric_loss": metric_loss.detach(),
            "completion_loss": completion.detach(),
        }


def _over_ranks(losses: TrainingLosses) -> nn.Module:
    """The losses with gradients averaged over the ranks."""
    if current_ranks().size == 1 or not losses.segmenter.trainable_parameters():
        return losses
    # Other priors leave the similarity network unused, and the completion where a rank has no weak support.
    unused = losses.segmenter.prior != "similarity"
    try:
        return DistributedDataParallel(losses, broadcast_buffers=False, find_unused_parameters=unused)
    except RuntimeError as error:
        raise_if_lost(error)
        raise


def train(
    segmenter: FewShotSegmenter,
    episodes: FeatureEpisodes,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    metric_weight: float = 1.0,
    dice_weight: float = 1.0,
    schedule: Schedule = "one-cycle",
    seed: int = 0,
    folder: Path | None = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    show_progress: bool = False,
    log_every: int = 10,
) -> TrainingResult:
    """Train in place with AdamW.

    Args:
        segmenter: its similarity network, decoder and completion (if any) are trained; the backbone stays frozen.
        episodes: at least steps * batch_size of them; step s takes episodes s*batch_size and following.
        steps, batch_size: optimiser steps and episodes per step, of all ranks together.
        learning_rate, weight_decay, schedule: of AdamW; see `learning_rate_at`.
        metric_weight, dice_weight: weights of the loss terms next to the cross-entropy.
        seed: of dropout.
        folder: for training.jsonl, tensorboard/ and checkpoint.safetensors; None writes nothing.
        checkpoint_every: steps between checkpoints.
        resume: go on from the folder's checkpoint, if there is one.
        show_progress: progress bar with time left on stderr.
        log_every: steps between log lines.

    Raises:
        DataError: an argument outside its range, too few episodes, nothing to train, a checkpoint of another run,
            a loss that is not finite (the message names the episodes), or more ranks than divide the batch.
        LostRankError, TerminatedError: see `optimise`.
    """
    if steps < 1 or batch_size < 1:
        raise DataError(f"steps and batch size must be at least 1, got {steps} and {batch_size}")
    details = {"batch_size": batch_size, "metric_weight": metric_weight, "dice_weight": dice_weight}
    plan = Plan(
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule=schedule,
        seed=seed,
        details=details,
    )
    if len(episodes) < steps * batch_size:
        raise DataError(f"{steps} steps of {batch_size} need {steps * batch_size} episodes, got {len(episodes)}")
    size = current_ranks().size
    if batch_size % size:
        raise said_once(
            f"--batch-size {batch_size} cannot be split evenly over {size} processes; choose a multiple of {size}"
        )
    losses = TrainingLosses(segmenter, metric_weight=metric_weight, dice_weight=dice_weight)
    return optimise(
        _Segmenter(segmenter),
        lambda step: dealt(episodes, batch_size // size, start=step * batch_size),
        _over_ranks(losses),
        plan=plan,
        describe=lambda batch: account_of_episodes(
            batch, losses="joint", metric_weight=metric_weight, dice_weight=dice_weight, **model_facts(segmenter)
        ),
        folder=folder,
        checkpoint_every=checkpoint_every,
        resume=resume,
        show_progress=show_progress,
        log_every=log_every,
    )
