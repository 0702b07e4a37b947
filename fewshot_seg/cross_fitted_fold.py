"""A fold trained by cross-fitting: an embedding per group of base classes, one on all of them, and the decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from episodes.folds import ClassSplit
from episodes.protocols import list_pairs
from episodes.sampler import drop_small_classes
from episodes.types import DataError, SupportKind
from fewshot_seg.cross_fitting import (
    keep_tensors,
    priors_of_episodes,
    train_base_learner,
    train_decoder,
    train_embedding,
)
from fewshot_seg.decoder import ContextDecoder
from fewshot_seg.distributed import current_ranks, said_once
from fewshot_seg.experiment import TrainedFold
from fewshot_seg.fold_data import Augment, ClassCells, FoldData, class_cells, group_episodes, training_episodes
from fewshot_seg.metrics import EpisodeIoU
from fewshot_seg.segmenter import FewShotSegmenter


def class_groups(data: FoldData) -> tuple[tuple[int, ...], ...]:
    """The base classes in three groups: those held out for choices, and the others in two halves.

    For PASCAL-5i these are the other folds, and as many classes for COCO-20i. Without folds the halves are dealt in
    turn: classes that follow each other often come from one place and look alike.

    Raises:
        DataError: too few base classes to hold some out.
    """
    held_out = data.choices.novel
    rest = [class_id for class_id in data.split.base if class_id not in held_out]
    half = -(-len(rest) // 2)
    halves = (rest[::2], rest[1::2]) if data.fold is None else (rest[:half], rest[half:])
    return tuple(group for group in (held_out, *map(tuple, halves)) if group)


def train_cross_fitted(
    build: Callable[[int], FewShotSegmenter],
    data: FoldData,
    *,
    steps: int = 160,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    decoder_steps: int = 800,
    decoder_episodes: Sequence[tuple[int, int]] = ((1, 700), (5, 150)),
    known_episodes: Sequence[tuple[int, int]] = (),
    supports: Sequence[SupportKind] = ("mask",),
    augment: Augment = "mirror",
    support_augment: Augment | None = None,
    seed: int = 0,
    checkpoint_every: int = 100,
    workers: int = 0,
    folder: Path | None = None,
    resume: bool = False,
    show_progress: bool = False,
) -> TrainedFold:
    """Train on all base classes, the decoder on priors of classes that the embedding had not seen.

    Args:
        build: makes a new, untrained model with a base learner of so many classes; called once per group and once more.
        data: from `open_fold`.
        steps, batch_size, learning_rate, weight_decay: of every embedding.
        decoder_steps: of the decoder.
        decoder_episodes: (shots, number of episodes per group) that the decoder is trained on.
        known_episodes: (shots, number of episodes) of all base classes, by the embedding trained on them, that the
            decoder is trained on as well: for a model that will be asked for known classes, too.
        supports, augment, support_augment, workers: see `training_episodes`.
        seed: of everything drawn.
        checkpoint_every: steps between checkpoints.
        folder: embeddings go to its subfolders ``group0`` ... and ``all``, the decoder to ``decoder``.
        resume: go on from checkpoints.
        show_progress: bars on stderr.

    Returns:
        The model; its threshold is 0. `held_out_miou` is the decoder's, over the cells of the episodes it was trained
        on, none of whose classes its embedding had seen. There is no selection model.

    Raises:
        DataError: as `training_episodes`; a model without base learner; too few base classes.
    """
    if current_ranks().size > 1:
        raise said_once(
            "cross-fitting runs in one process; train folds side by side without torchrun, or add --training joint"
        )
    run: dict[str, Any] = {
        "checkpoint_every": checkpoint_every,
        "resume": resume,
        "show_progress": show_progress,
    }
    cells = class_cells(data, seed=seed, show_progress=show_progress)

    def embedded(base: tuple[int, ...], novel: tuple[int, ...], name: str) -> FewShotSegmenter:
        segmenter = build(len(base))
        drawn = training_episodes(
            data,
            ClassSplit(base=base, novel=novel),
            shots=1,
            count=steps * batch_size,
            seed=seed,
            augment=augment,
            support_augment=support_augment,
            supports=supports,
            workers=workers,
            show_progress=show_progress,
        )
        train_embedding(
            segmenter,
            drawn,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            seed=seed,
            folder=None if folder is None else folder / name,
            **run,
        )
        _fit_base_learner(segmenter, cells, base, seed)
        return segmenter

    def priors_of(number: int, group: tuple[int, ...]) -> dict[str, Tensor]:
        others = tuple(class_id for class_id in data.split.base if class_id not in group)
        return shown(embedded(others, (*group, *data.split.novel), f"group{number}"), group, decoder_episodes)

    def shown(
        segmenter: FewShotSegmenter, classes: tuple[int, ...], counts: Sequence[tuple[int, int]]
    ) -> dict[str, Tensor]:
        parts = []
        for shots, count in _drawable(data, classes, counts):
            drawn = group_episodes(data, classes, shots=shots, count=count, seed=seed + 1, supports=supports)
            parts.append(priors_of_episodes(segmenter, drawn, show_progress=show_progress))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    groups, found = class_groups(data), list[dict[str, Tensor]]()
    if len(groups) < 2:
        raise DataError("cross-fitting needs base classes in at least two groups; name fewer --novel-classes")
    for number, group in enumerate(groups):
        kept = None if folder is None else folder / f"group{number}" / "priors.safetensors"
        if kept is not None and not resume:
            kept.unlink(missing_ok=True)
        found.append(keep_tensors(kept, partial(priors_of, number, group)))
    segmenter = embedded(data.split.base, data.split.novel, "all")
    if known_episodes:
        found.append(shown(segmenter, data.split.base, known_episodes))
    stored = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    if not isinstance(segmenter.decoder, ContextDecoder):
        raise DataError("cross-fitting trains a model with a base learner and a ContextDecoder")
    result = train_decoder(
        segmenter.decoder,
        stored,
        steps=decoder_steps,
        seed=seed,
        folder=None if folder is None else folder / "decoder",
        **run,
    )
    segmenter.threshold = 0.0
    miou = _cell_miou(segmenter.eval().decoder, stored)
    return TrainedFold(segmenter=segmenter, selection=None, held_out_miou=miou, result=result)


def _drawable(data: FoldData, group: Sequence[int], wanted: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """What of (shots, number of episodes) a group has photos enough for; the first is asked for in any case."""
    pairs = list_pairs(data.protocol, data.training_index, group)
    repeat = data.protocol.repeat_supports
    return [
        one for one in wanted if one == wanted[0] or drop_small_classes(pairs, shots=one[0], repeat_supports=repeat)[0]
    ]


def _fit_base_learner(segmenter: FewShotSegmenter, cells: ClassCells, base: tuple[int, ...], seed: int) -> None:
    if segmenter.base_learner is None:
        raise DataError("cross-fitting trains a model with a base learner and a ContextDecoder")
    train_base_learner(segmenter.base_learner, *cells.of(base), seed=seed)


@torch.no_grad()
def _cell_miou(decoder: torch.nn.Module, stored: dict[str, Tensor]) -> float:
    metric = EpisodeIoU()
    device = next(decoder.parameters()).device
    for first in range(0, len(stored["priors"]), 50):
        rows = slice(first, first + 50)
        maps = stored["priors"][rows].float().to(device)
        foreground, background = (stored[name][rows].float() for name in ("foreground", "background"))
        target = (foreground > background).byte().masked_fill(foreground + background < 0.5, 255)
        metric.update((decoder(maps, maps, maps) > 0).cpu(), target, stored["class_ids"][rows].tolist())
    return metric.compute().miou
