"""One run of an optimiser that can be killed and resumed: steps, schedule, checkpoints, logs.

Everything random is a function of (seed, step), so a run that was killed and resumed ends with the same weights
as one that was not. Under torchrun every rank takes its part of each batch; the first alone reads and writes files.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from episodes.files import read_text
from episodes.progress import tqdm
from episodes.sources.annotation_files import shown
from episodes.types import DataError
from fewshot_seg.bad_steps import Account, examine, keep_bad_step
from fewshot_seg.checkpoint import read_tensors, write_tensors
from fewshot_seg.distributed import (
    current_ranks,
    gather_dealt,
    mean_over_ranks,
    on_first,
    raise_if_lost,
    said_once,
)
from fewshot_seg.ranks import LostRankError, TerminatedError
from fewshot_seg.runtime import atomic_path
from fewshot_seg.trainee import Trainee

Schedule = Literal["one-cycle", "cosine"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
CHECKPOINT_NAME = "checkpoint.safetensors"

_GRADIENT_NORM = 1.0
_AGAIN = "leave out --resume to start again, in another --out"

Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a checkpoint must agree on to be resumed.

    Attributes:
        steps: optimiser steps in all.
        learning_rate, weight_decay, schedule: of AdamW; see `learning_rate_at`.
        seed: of dropout.
        details: whatever else decides the weights, JSON-able.

    Raises:
        DataError: fewer than one step, or an unknown schedule.
    """

    steps: int
    learning_rate: float
    weight_decay: float
    schedule: Schedule
    seed: int
    details: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise DataError(f"steps must be at least 1, got {self.steps}")
        if self.schedule not in SCHEDULES:
            raise DataError(f"unknown schedule {self.schedule!r}; known: {', '.join(SCHEDULES)}")

    def as_json(self) -> dict[str, Any]:
        """All of it, flat."""
        own = {name: getattr(self, name) for name in ("steps", "learning_rate", "weight_decay", "schedule", "seed")}
        return {**own, **self.details}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """Outcome of `optimise`.

    Attributes:
        losses: of every step taken in this call.
        seconds: of this call.
        steps: that the weights have seen.
        last_loss: of the last of them, whichever call took it; None in what an earlier version left off.
    """

    losses: tuple[float, ...]
    seconds: float
    steps: int
    last_loss: float | None = None


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


def optimise(
    trainee: Trainee,
    batches: Callable[[int], Iterator[Batch]],
    losses: Callable[[Batch], Mapping[str, Tensor]],
    *,
    plan: Plan,
    describe: Callable[[Batch], Account[Batch]],
    folder: Path | None = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    show_progress: bool = False,
    log_every: int = 10,
) -> TrainingResult:
    """Train in place with AdamW.

    Args:
        trainee: what is trained.
        batches: batches(n) gives the batches of steps n, n + 1, ...; of several ranks, this rank's part of them.
        losses: named scalars of a batch; ``loss`` is the one that is minimised, the others are logged. Of several
            ranks, its gradient must be the mean over the ranks (DistributedDataParallel's is).
        plan: schedule and length.
        describe: a batch by its examples, for the message and the file of a step whose numbers are not finite.
        folder: for training.jsonl, tensorboard/ and checkpoint.safetensors, and bad_step.safetensors; None writes
            nothing.
        checkpoint_every: steps between checkpoints.
        resume: go on from the folder's checkpoint, if there is one.
        show_progress: progress bar with time left on stderr.
        log_every: steps between log lines.

    Raises:
        DataError: an argument outside its range, nothing to train, a checkpoint of another run, or a loss or gradient
            that is not finite: the message names the examples, their batch is kept, and so are the weights before it.
        LostRankError, TerminatedError: of several ranks, another is gone, or SIGTERM came; a checkpoint of the last
            step is written first, unless the weights were just being changed.
    """
    if checkpoint_every < 1 or log_every < 1:
        raise DataError(f"checkpoint_every and log_every must be at least 1, got {checkpoint_every} and {log_every}")
    run = _Run(trainee, plan, folder, resume=resume, log_every=log_every)
    began, taken = time.perf_counter(), list[float]()
    trainee.set_training(True)
    following = batches(run.step)
    bar = tqdm(
        initial=run.step,
        total=plan.steps,
        desc="training",
        unit="step",
        disable=not (show_progress and current_ranks().first),
    )
    try:
        with bar:
            while run.step < plan.steps:
                taken.append(run.take_step(next(following), losses, describe))
                bar.set_postfix(loss=f"{sum(taken[-50:]) / len(taken[-50:]):.3f}", refresh=False)
                bar.update()
                if run.step % checkpoint_every == 0 or run.step == plan.steps:
                    run.save()
    except KeyboardInterrupt:
        if not run.updating:  # else the weights are between two steps; the last checkpoint is whole
            run.save()
        raise
    except (LostRankError, TerminatedError) as error:
        raise type(error)(f"{error}; {run.save_last()}") from error
    finally:
        run.close()
        trainee.set_training(False)
    return TrainingResult(
        losses=tuple(taken), seconds=time.perf_counter() - began, steps=run.step, last_loss=run.last_loss
    )


class _Run:
    """State of one training: optimiser, step, files."""

    def __init__(self, trainee: Trainee, plan: Plan, folder: Path | None, *, resume: bool, log_every: int) -> None:
        self.trainee, self.plan, self.log_every = trainee, plan, log_every
        self.given_folder = folder
        self.folder = folder if current_ranks().first else None  # where this process writes
        self.parameters = list(trainee.parameters())
        if not self.parameters:
            raise DataError("nothing to train: no part of this model has parameters")
        self.optimiser = torch.optim.AdamW(self.parameters, weight_decay=plan.weight_decay)
        self.step, self.updating = 0, False
        self.last_loss: float | None = None
        if folder is not None and resume:
            self._load(folder / CHECKPOINT_NAME)
        self.writer = None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._cut_log(self.folder / "training.jsonl")
            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)

    def take_step(
        self,
        batch: Batch,
        losses: Callable[[Batch], Mapping[str, Tensor]],
        describe: Callable[[Batch], Account[Batch]],
    ) -> float:
        plan, seed = self.plan, self.plan.seed * 1_000_003 + self.step
        rate = learning_rate_at(self.step, plan.steps, plan.learning_rate, plan.schedule)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # dropout: a function of (seed, step)
            named = losses(batch)
        loss, named = named["loss"], mean_over_ranks(named)
        if not torch.isfinite(named["loss"]):
            raise self._bad_step(
                "loss", named["loss"].item(), None if torch.isfinite(loss) else describe(batch), losses
            )
        self.optimiser.zero_grad(set_to_none=True)
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:  # of several ranks, gradients travel here
            raise_if_lost(error)
            raise
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, _GRADIENT_NORM)
        if not torch.isfinite(norm):  # else the weights would be lost, and checkpoints with them
            raise self._bad_step("gradient", norm.item(), describe(batch), losses)
        self.updating = True
        self.optimiser.step()
        self.step += 1
        if self.step % self.log_every == 0:
            self._log(**{name: value.item() for name, value in named.items()}, rate=rate)
        self.last_loss = float(named["loss"].detach())
        self.updating = False
        return self.last_loss

    def _bad_step(
        self,
        what: str,
        value: float,
        account: Account[Any] | None,
        losses: Callable[[Any], Mapping[str, Tensor]],
    ) -> DataError:
        """The error of a step that is not taken; the batch to blame, and the weights before it, are kept first."""
        ranks, seed, line = current_ranks(), self.plan.seed * 1_000_003 + self.step, ""
        if account is not None:
            bad = examine(account, losses, self.parameters, seed, one_by_one=ranks.size == 1)
            line = f"{bad.mend}; {bad.names}"
            if self.given_folder is not None:
                noted = {"step": self.step, "seed": seed, what: value, "plan": self.plan.as_json()}
                kept = keep_bad_step(self.given_folder, bad, self.trainee, noted, ranks.rank)
                line += f"; its batch is kept: python -m fewshot_seg.replay {kept}"
        lines = "; ".join(dict.fromkeys(filter(None, gather_dealt([line]))))
        if self.step and all(bool(torch.isfinite(one).all()) for one in self.parameters):
            self.save()
        return said_once(f"{what} is {value} at step {self.step}; {lines}")

    def save(self) -> None:
        if self.folder is None:
            return
        state = {
            f"optimiser.{number}.{name}": value
            for number, parameter in enumerate(self.parameters)
            for name, value in self.optimiser.state.get(parameter, {}).items()
        }
        description = {"format": 1, "step": self.step, "plan": self.plan.as_json(), "loss": self.last_loss}
        write_tensors(self.folder / CHECKPOINT_NAME, self.trainee.tensors() | state, description)

    def save_last(self) -> str:
        """Save, unless the weights are between two steps, and say what there is to go on from."""
        if self.updating or self.folder is None:
            return "go on with --resume from the last checkpoint"
        self.save()
        return f"{self.folder / CHECKPOINT_NAME} holds step {self.step}: go on with --resume"

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _load(self, path: Path) -> None:
        found = on_first(lambda: read_tensors(path) if path.exists() else None)
        if found is None:
            return
        tensors, description = found
        now = json.loads(json.dumps(self.plan.as_json()))  # as it comes back from the file
        if description.get("plan") != now:
            raise said_once(
                f"{path} belongs to a run with other settings ({description.get('plan')}, now {now}); "
                "choose another --out, or leave out --resume to start again"
            )
        self.trainee.restore(
            {name: value for name, value in tensors.items() if not name.startswith("optimiser.")}, path
        )
        for number, parameter in enumerate(self.parameters):
            prefix = f"optimiser.{number}."
            state = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            if state:
                _check_state(state, parameter, path)
                # the step counter stays on the CPU, as AdamW keeps it
                self.optimiser.state[parameter] = {
                    name: value if name == "step" else value.to(parameter.device) for name, value in state.items()
                }
        step = description.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= self.plan.steps:
            raise said_once(f"{path} is damaged: its step is {shown(step, 40)}, not 0 to {self.plan.steps}; {_AGAIN}")
        self.step, self.last_loss = step, description.get("loss")

    def _cut_log(self, path: Path) -> None:
        """Drop lines beyond the checkpoint: a killed run may have logged steps that it then lost."""
        try:
            lines = read_text(path).splitlines() if path.exists() and self.step else []
        except (OSError, ValueError) as error:
            raise DataError(f"cannot go on with the log {path} ({error}); delete it") from error
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


def _check_state(state: Mapping[str, Tensor], parameter: Tensor, path: Path) -> None:
    """Raises DataError where AdamW did not write this of the parameter."""
    shapes = {"step": torch.Size(()), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    if any(
        name not in state
        or state[name].shape != shape
        or state[name].dtype != torch.float32
        or not bool(state[name].isfinite().all())
        for name, shape in shapes.items()
    ) or len(state) > len(shapes):
        raise said_once(f"{path} is damaged: the optimiser's state does not fit the model; {_AGAIN}")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf  # a torn line
