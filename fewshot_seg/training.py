"""Episodic training of similarity network and decoder over a frozen backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from episodes.sampler import spec_to_json
from episodes.types import DataError
from fewshot_seg.checkpoint import load_trained_tensors, trained_tensors
from fewshot_seg.completion import completion_loss
from fewshot_seg.feature_episodes import FeatureBatch, FeatureEpisodes
from fewshot_seg.losses import balanced_map_loss, segmentation_loss
from fewshot_seg.optimisation import Plan, Schedule, TrainingResult, optimise
from fewshot_seg.priors import PRIOR_CHANNELS
from fewshot_seg.segmenter import FewShotSegmenter, SupportEncoding
from fewshot_seg.similarity import cell_weights

_LOSS_STRIDE = 4  # the mask loss looks at every 4th pixel: the logits live on a coarser grid anyway


def episode_losses(
    segmenter: FewShotSegmenter, batch: FeatureBatch, *, dice_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(mask loss, metric loss, completion loss) of a batch, scalars.

    The metric loss (`balanced_map_loss` of the soft margin) trains the embedding itself: query cells of the object
    must be nearer the support's object than its background. It is zero where the similarity network is not used.
    The completion loss trains what fills in weak supports; zero where nothing is trained to do so.
    """
    support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks, batch.support_dense)
    targets = batch.query_masks[:, _LOSS_STRIDE // 2 :: _LOSS_STRIDE, _LOSS_STRIDE // 2 :: _LOSS_STRIDE]
    prediction = segmenter.segment_levels(support, batch.query_levels, (targets.shape[1], targets.shape[2]))
    mask_loss = segmentation_loss(prediction.logits, targets, dice_weight=dice_weight)
    nothing = torch.zeros_like(mask_loss)
    completion = nothing if segmenter.completion is None else _completion_loss(batch, support, prediction.priors)
    if segmenter.prior != "similarity":
        return mask_loss, nothing, completion
    return mask_loss, _metric_loss(prediction.priors[:, 0], batch.query_masks), completion


def _completion_loss(batch: FeatureBatch, support: SupportEncoding, priors: Tensor) -> Tensor:
    """Loss of what was filled in: of weak supports, and of the queries, of which the completion knows nothing."""
    size = (support.frozen.shape[3], support.frozen.shape[4])
    completed, truths = list[tuple[Tensor, Tensor]](), list[Tensor]()
    weak = ~batch.support_dense.flatten()
    if bool(weak.any()):
        foreground, background = (side.reshape(-1, *size)[weak] for side in (support.foreground, support.background))
        completed.append((foreground, background))
        truths.append(batch.support_truth.flatten(0, 1)[weak])
    if priors.shape[1] > len(PRIOR_CHANNELS):  # the objectness of the queries comes last
        completed.append((priors[:, -1].sigmoid(), (-priors[:, -1]).sigmoid()))
        truths.append(batch.query_masks)
    losses = [
        completion_loss(foreground, background, *cell_weights(truth, size))
        for (foreground, background), truth in zip(completed, truths, strict=True)
    ]
    return torch.stack(losses).sum() if losses else support.cells.new_zeros(())


def _metric_loss(margin: Tensor, query_masks: Tensor) -> Tensor:
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


def describe_episodes(batch: FeatureBatch) -> str:
    """The specs of a batch, for a message; `episodes.sampler.spec_from_json` reads them back."""
    return "episodes: " + "; ".join(spec_to_json(spec) for spec in batch.specs)


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
        steps, batch_size: optimiser steps and episodes per step.
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
            or a loss that is not finite (the message names the episodes).
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
    device = next(segmenter.parameters()).device

    def losses(batch: FeatureBatch) -> dict[str, Tensor]:
        mask_loss, metric_loss, completion = episode_losses(segmenter, batch.to(device), dice_weight=dice_weight)
        return {
            "loss": mask_loss + metric_weight * metric_loss + completion,
            "mask_loss": mask_loss,
            "metric_loss": metric_loss,
            "completion_loss": completion,
        }

    return optimise(
        _Segmenter(segmenter),
        lambda step: episodes.batches(batch_size, start=step * batch_size),
        losses,
        plan=plan,
        describe=describe_episodes,
        folder=folder,
        checkpoint_every=checkpoint_every,
        resume=resume,
        show_progress=show_progress,
        log_every=log_every,
    )
