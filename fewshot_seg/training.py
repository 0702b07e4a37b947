"""Episodic training of similarity network and decoder over a frozen backbone.

Everything random is a function of (seed, step), so a run that was killed and resumed ends with the same weights
as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from episodes.sampler import spec_to_json
from episodes.types import DataError
from fewshot_seg.checkpoint import load_trained_tensors, read_tensors, trained_tensors, write_tensors
from fewshot_seg.feature_episodes import FeatureBatch, FeatureEpisodes
from fewshot_seg.losses import balanced_map_loss, segmentation_loss
from fewshot_seg.runtime import atomic_path
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.similarity import cell_weights

Schedule = Literal["one-cycle", "cosine"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
CHECKPOINT_NAME = "checkpoint.safetensors"

_GRADIENT_NORM = 1.0
_LOSS_STRIDE = 4  # the mask loss looks at every 4th pixel: the logits live on a coarser grid anyway


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """Loss of every step taken in this call, its seconds, and the number of steps that the weights have seen."""

    losses: tuple[float, ...]
    seconds: float
    steps: int


def learning_rate_at(step: int, steps: int, peak: float, schedule: Schedule) -> float:
    """Learning rate of a step, 0-based.

    ``one-cycle``: cosine rise from peak/25 over the first tenth, then cosine fall to peak/25e4 (Smith and Topin,
    arXiv 1708.07120, as torch's OneCycleLR has it); ``cosine``: fall from peak to 0 without warm-up.
    """
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * step / steps)) / 2
    rise = max(1.0, 0.1 * steps - 1)
    if step <= rise:
        low, high, way = peak / 25, peak, step / rise
    else:
        low, high, way = peak / 25e4, peak, 1 - (step - rise) / max(1.0, steps - 1 - rise)
    return low + (high - low) * (1 - math.cos(math.pi * way)) / 2


def episode_losses(segmenter: FewShotSegmenter, batch: FeatureBatch, *, dice_weight: float) -> tuple[Tensor, Tensor]:
    """(mask loss, metric loss) of a batch, scalars.

    The metric loss (`balanced_map_loss` of the soft margin) trains the embedding itself: query cells of the object
    must be nearer the support's object than its background. It is zero where the similarity network is not used.
    """
    support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks)
    targets = batch.query_masks[:, _LOSS_STRIDE // 2 :: _LOSS_STRIDE, _LOSS_STRIDE // 2 :: _LOSS_STRIDE]
    prediction = segmenter.segment_levels(support, batch.query_levels, (targets.shape[1], targets.shape[2]))
    mask_loss = segmentation_loss(prediction.logits, targets, dice_weight=dice_weight)
    if segmenter.prior != "similarity":
        return mask_loss, torch.zeros_like(mask_loss)
    return mask_loss, _metric_loss(prediction.priors[:, 0], batch.query_masks)


def _metric_loss(margin: Tensor, query_masks: Tensor) -> Tensor:
    foreground, background = cell_weights(query_masks, (margin.shape[1], margin.shape[2]))
    return balanced_map_loss(margin.flatten(1), foreground.flatten(1), background.flatten(1))


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
        segmenter: its similarity network and decoder are trained; the backbone stays frozen.
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
    if checkpoint_every < 1 or log_every < 1:
        raise DataError(f"checkpoint_every and log_every must be at least 1, got {checkpoint_every} and {log_every}")
    if schedule not in SCHEDULES:
        raise DataError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
    if len(episodes) < steps * batch_size:
        raise DataError(f"{steps} steps of {batch_size} need {steps * batch_size} episodes, got {len(episodes)}")
    plan: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
    }
    plan |= {"metric_weight": metric_weight, "dice_weight": dice_weight, "schedule": schedule, "seed": seed}
    run = _Run(segmenter, plan, folder, resume=resume, log_every=log_every)
    began, losses = time.perf_counter(), list[float]()
    segmenter.train()
    batches = episodes.batches(batch_size, start=run.step * batch_size)
    bar = tqdm(initial=run.step, total=steps, desc="training", unit="step", disable=not show_progress)
    try:
        with bar:
            while run.step < steps:
                losses.append(run.take_step(next(batches)))
                bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
                bar.update()
                if run.step % checkpoint_every == 0 or run.step == steps:
                    run.save()
    except KeyboardInterrupt:
        if not run.updating:  # else the weights are between two steps; the last checkpoint is whole
            run.save()
        raise
    finally:
        run.close()
        segmenter.eval()
    return TrainingResult(losses=tuple(losses), seconds=time.perf_counter() - began, steps=run.step)


class _Run:
    """State of one training: optimiser, step, files."""

    def __init__(
        self,
        segmenter: FewShotSegmenter,
        plan: dict[str, Any],
        folder: Path | None,
        *,
        resume: bool,
        log_every: int,
    ) -> None:
        self.segmenter, self.plan, self.folder, self.log_every = segmenter, plan, folder, log_every
        self.parameters = segmenter.trainable_parameters()
        if not self.parameters:
            raise DataError("nothing to train: neither the prior nor the decoder of this model has parameters")
        self.optimiser = torch.optim.AdamW(self.parameters, weight_decay=plan["weight_decay"])
        self.device = self.parameters[0].device
        self.step, self.updating = 0, False
        if folder is not None and resume and (folder / CHECKPOINT_NAME).exists():
            self._load(folder / CHECKPOINT_NAME)
        self.writer = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._cut_log(folder / "training.jsonl")
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=self.step + 1)

    def take_step(self, batch: FeatureBatch) -> float:
        batch = batch.to(self.device)
        rate = learning_rate_at(self.step, self.plan["steps"], self.plan["learning_rate"], self.plan["schedule"])
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.plan["seed"] * 1_000_003 + self.step)  # dropout: a function of (seed, step)
            mask_loss, metric_loss = episode_losses(self.segmenter, batch, dice_weight=self.plan["dice_weight"])
        loss = mask_loss + self.plan["metric_weight"] * metric_loss
        if not torch.isfinite(loss):
            named = "; ".join(spec_to_json(spec) for spec in batch.specs)
            raise DataError(f"loss is {loss.item()} at step {self.step}; lower --learning-rate; episodes: {named}")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, _GRADIENT_NORM)
        self.updating = True
        self.optimiser.step()
        self.step += 1
        if self.step % self.log_every == 0:
            self._log(loss=loss.item(), mask_loss=mask_loss.item(), metric_loss=metric_loss.item(), rate=rate)
        self.updating = False
        return float(loss.detach())

    def save(self) -> None:
        if self.folder is None:
            return
        state = {
            f"optimiser.{number}.{name}": value
            for number, parameter in enumerate(self.parameters)
            for name, value in self.optimiser.state.get(parameter, {}).items()
        }
        description = {"format": 1, "step": self.step, "plan": self.plan}
        write_tensors(self.folder / CHECKPOINT_NAME, trained_tensors(self.segmenter) | state, description)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _load(self, path: Path) -> None:
        tensors, description = read_tensors(path)
        if description.get("plan") != self.plan:
            raise DataError(
                f"{path} belongs to a run with other settings ({description.get('plan')}, now {self.plan}); "
                "choose another --out, or leave out --resume to start again"
            )
        weights = {name: value for name, value in tensors.items() if not name.startswith("optimiser.")}
        load_trained_tensors(self.segmenter, weights, where=path)
        for number, parameter in enumerate(self.parameters):
            prefix = f"optimiser.{number}."
            state = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            if state:
                # the step counter stays on the CPU, as AdamW keeps it
                self.optimiser.state[parameter] = {
                    name: value if name == "step" else value.to(parameter.device) for name, value in state.items()
                }
        self.step = int(description["step"])

    def _cut_log(self, path: Path) -> None:
        """Drop lines beyond the checkpoint: a killed run may have logged steps that it then lost."""
        lines = path.read_text().splitlines() if path.exists() and self.step else []
        kept = [line for line in lines if _step_of(line) <= self.step]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))

    def _log(self, **values: float) -> None:
        if self.folder is None or self.writer is None:
            return
        with (self.folder / "training.jsonl").open("a") as log:
            log.write(json.dumps({"step": self.step, **values}) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(name, value, self.step)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a torn line
