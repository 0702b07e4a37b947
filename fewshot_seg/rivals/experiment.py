"""One rival on one fold, as `fewshot_seg.experiment` does it for ours: the same steps, episodes and threshold rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from episodes.folds import ClassSplit
from episodes.types import DataError
from fewshot_seg.bad_steps import account_of_episodes
from fewshot_seg.evaluation import choose_logit_thresholds
from fewshot_seg.feature_episodes import FeatureBatch, FeatureEpisodes
from fewshot_seg.fold_data import FoldData, held_out_episodes, training_episodes
from fewshot_seg.optimisation import Plan, TrainingResult, optimise
from fewshot_seg.rivals.correlation import CorrelationNetwork
from fewshot_seg.rivals.enrichment import EnrichmentNetwork
from fewshot_seg.rivals.model import HEAD, EpisodeModel, rival_logits
from fewshot_seg.rivals.prototypes import PrototypeNetwork
from fewshot_seg.rivals.transduction import TransductiveClassifier
from fewshot_seg.trainee import NamedModules


def _grid_sides(data: FoldData) -> tuple[int, ...]:
    return tuple(-(-data.resolution // stride) for stride in data.backbone.strides)


RIVALS: dict[str, Callable[[FoldData], EpisodeModel]] = {
    "panet": lambda data: PrototypeNetwork(data.backbone.channels),
    "pfenet": lambda data: EnrichmentNetwork(data.backbone.channels),
    "hsnet": lambda data: CorrelationNetwork(_grid_sides(data)),
    "repri": lambda data: TransductiveClassifier(data.backbone.channels, data.split.base),
    "repri-frozen": lambda data: TransductiveClassifier(data.backbone.channels, data.split.base, rank=0),
}
"""Makes a new, untrained model for a fold, by the method's short name."""

TITLES = {
    "panet": "PANet-style: prototypes",
    "pfenet": "PFENet-style: prior and feature enrichment",
    "hsnet": "HSNet-style: 4D correlations",
    "repri": "RePRI-style: transduction, features trained on base classes",
    "repri-frozen": "RePRI-style: transduction, frozen features",
}
"""What each is called in a table."""


@dataclass(frozen=True, kw_only=True)
class TrainedRival:
    """Outcome of `train_rival_fold`.

    Attributes:
        model: trained on all base classes, in evaluation mode.
        threshold: chosen on held-out base classes; the method's own is 0.
        held_out_miou: of the model that was trained without them, in percent, at the threshold.
    """

    model: EpisodeModel
    threshold: float
    held_out_miou: float


def trainable_parameters(model: EpisodeModel) -> list[nn.Parameter]:
    """Parameters that training changes, those that only its losses read included."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train_rival(
    model: EpisodeModel,
    episodes: FeatureEpisodes,
    *,
    steps: int = 160,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    seed: int = 0,
    folder: Path | None = None,
    resume: bool = False,
    show_progress: bool = False,
) -> TrainingResult:
    """Train in place, in one process, with AdamW; arguments and defaults are those of `fewshot_seg.training.train`.

    Raises:
        DataError: an argument outside its range, too few episodes, nothing to train, a checkpoint of another run, or
            a loss that is not finite.
    """
    if steps < 1 or batch_size < 1:
        raise DataError(f"steps and batch size must be at least 1, got {steps} and {batch_size}")
    if len(episodes) < steps * batch_size:
        raise DataError(f"{steps} steps of {batch_size} need {steps * batch_size} episodes, got {len(episodes)}")
    plan = Plan(
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule="one-cycle",
        seed=seed,
        details={"batch_size": batch_size, "model": type(model).__name__, **model.description()},
    )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def batches(step: int) -> Iterator[FeatureBatch]:
        return episodes.batches(batch_size, start=step * batch_size)

    return optimise(
        NamedModules(rival=model),
        batches,
        lambda batch: model.losses(batch.to(device)),
        plan=plan,
        describe=account_of_episodes,
        folder=folder,
        resume=resume,
        show_progress=show_progress,
    )


def train_rival_fold(
    build: Callable[[], EpisodeModel],
    data: FoldData,
    *,
    shots: int = 1,
    steps: int = 160,
    batch_size: int = 8,
    seed: int = 0,
    validation_episodes: int = 200,
    folder: Path | None = None,
    resume: bool = False,
    show_progress: bool = False,
) -> TrainedRival:
    """As `fewshot_seg.experiment.train_fold`: threshold on held-out base classes, then training on all base classes.

    A method with nothing to train only has its threshold chosen.

    Args:
        build: makes a new, untrained model; called once per run.
        data: from `open_fold`.
        shots, steps, batch_size, seed: of the training episodes, which are those of ours.
        validation_episodes: episodes the threshold is chosen on.
        folder: of the final run; the selection run goes to its subfolder ``selection``.
        resume: go on from checkpoints.
        show_progress: bars on stderr.
    """

    def run(classes: ClassSplit, where: Path | None) -> EpisodeModel:
        model = build()
        if trainable_parameters(model):
            drawn = training_episodes(
                data, classes, shots=shots, count=steps * batch_size, seed=seed, show_progress=show_progress
            )
            train_rival(
                model,
                drawn,
                steps=steps,
                batch_size=batch_size,
                seed=seed,
                folder=where,
                resume=resume,
                show_progress=show_progress,
            )
        return model.eval()

    selection = run(data.choices, None if folder is None else folder / "selection")
    drawn = held_out_episodes(data, shots=shots, count=validation_episodes, seed=seed)
    chosen = choose_logit_thresholds(partial(rival_logits, selection), drawn, show_progress=show_progress)
    threshold, held_out_miou = chosen[HEAD]
    return TrainedRival(model=run(data.split, folder), threshold=threshold, held_out_miou=held_out_miou)
