"""A fold trained by cross-fitting: an embedding per group of base classes, one on all of them, and the decoder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from episodes.episode_files import fingerprint_pairs
from episodes.folds import ClassSplit
from episodes.sampler import drop_small_classes, spec_to_json
from episodes.types import DataError, EpisodeSpec, SupportKind
from fewshot_seg.cross_fitting import (
    are_priors,
    keep_tensors,
    priors_of_episodes,
    train_base_learner,
    train_decoder,
    train_embedding,
)
from fewshot_seg.decoder import ContextDecoder
from fewshot_seg.distributed import current_ranks, said_once
from fewshot_seg.experiment import TrainedFold
from fewshot_seg.feature_episodes import FeatureEpisodes
from fewshot_seg.fold_data import (
    Augment,
    ClassCells,
    FoldData,
    class_cells,
    group_episodes,
    group_specs,
    training_episodes,
)
from fewshot_seg.metrics import EpisodeIoU
from fewshot_seg.optimisation import TrainingResult
from fewshot_seg.segmenter import FewShotSegmenter

_Asked = tuple[tuple[int, ...], Sequence[tuple[int, int]]]
"""Episodes whose priors are stored: of which classes, and (shots, number of episodes)."""


def class_groups(data: FoldData) -> tuple[tuple[int, ...], ...]:
    """The base classes in three groups: those held out for choices, and the others in two halves.

    For PASCAL-5i these are the other folds, and as many classes for COCO-20i. Without folds the halves are dealt in
    turn: classes that follow each other often come from one place and look alike.

    Raises:
        DataError: base classes for fewer than two groups.
    """
    data.check_base()
    held_out = () if data.held_out is None else data.held_out.novel
    rest = [class_id for class_id in data.split.base if class_id not in held_out]
    half = -(-len(rest) // 2)
    halves = (rest[::2], rest[1::2]) if data.fold is None else (rest[:half], rest[half:])
    groups = tuple(group for group in (held_out, *map(tuple, halves)) if group)
    if len(groups) < 2:
        raise DataError(
            f"cross-fitting needs base classes in at least two groups, {data.source.name} has {len(data.split.base)} "
            f"({data.base_names}) in one; name fewer --novel-classes, or train with "
            "--training joint --no-select-threshold"
        )
    return groups


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
        decoder_episodes: (shots, number of episodes per group) that the decoder is trained on, marked by masks. If
            `supports` names other marks, as many of these are drawn, and a second decoder learns from all of them.
        known_episodes: (shots, number of episodes) of all base classes, by the embedding trained on them, that the
            decoder is trained on as well: for a model that will be asked for known classes, too.
        supports, augment, support_augment, workers: see `training_episodes`.
        seed: of everything drawn.
        checkpoint_every: steps between checkpoints.
        folder: embeddings go to its subfolders ``group0`` ... and ``all``, decoders to ``decoder``, ``weak_decoder``.
        resume: go on from checkpoints.
        show_progress: bars on stderr.

    Returns:
        The model; its threshold is 0. `held_out_miou` is the decoder's, over the cells of those episodes it was trained
        on whose classes the embedding had not seen: `known_episodes` do not count. There is no selection model.

    Raises:
        DataError: as `training_episodes`; a model without base learner; too few base classes; a folder with priors of
            other settings, where it is to be resumed.
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
    groups = class_groups(data)
    cells = class_cells(data, seed=seed, show_progress=show_progress)
    settings = _data_settings(data) | {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "supports": supports,
        "augment": augment,
        "support_augment": support_augment,
        "seed": seed,
    }

    # Episodes are drawn in every run, also where what comes of them is there already: the guard looks at them as they
    # are drawn, and its record tells of all of them.

    def embedding_of(segmenter: FewShotSegmenter, base: tuple[int, ...], name: str) -> Callable[[], FewShotSegmenter]:
        """Trains the embedding of the untrained model on `base`, and returns the model."""
        novel = tuple(class_id for class_id in data.split.base if class_id not in base) + data.split.novel
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

        def embedded() -> FewShotSegmenter:
            _fit_to_cells(segmenter, cells, base, seed)
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
            return segmenter

        return embedded

    weak = tuple(kind for kind in supports if kind != "mask")
    marks: dict[str, tuple[SupportKind, ...]] = {"priors": ("mask",)}
    if weak:
        marks["weak_priors"] = weak

    def priors_of(
        file: str, embedding: Callable[[], FewShotSegmenter], described: dict[str, Any], asked: _Asked
    ) -> dict[str, dict[str, Tensor]]:
        """Priors of the episodes asked for, by each set of `marks`, from files if they are there."""
        trained, (classes, counts) = functools.cache(embedding), asked
        found = {}
        for name, kinds in marks.items():
            drawn = [
                group_episodes(data, classes, shots=shots, count=count, seed=seed + 1, supports=kinds)
                for shots, count in _drawable(data, classes, counts)
            ]
            kept = None if folder is None else folder / file.format(name)
            if kept is not None and not resume:
                kept.unlink(missing_ok=True)
            found[name] = keep_tensors(
                kept,
                functools.partial(_priors_by, trained, drawn, show_progress=show_progress),
                settings | described | ({"marks": kinds} if weak else {}) | {"asked": classes, "episodes": counts},
                is_sound=are_priors,
            )
        return found

    found = list[dict[str, dict[str, Tensor]]]()
    for number, group in enumerate(groups):
        others = tuple(class_id for class_id in data.split.base if class_id not in group)
        untrained, name = build(len(others)), f"group{number}"
        embedding = embedding_of(untrained, others, name)
        described = _model_settings(untrained, others)
        found.append(priors_of(f"{name}/{{}}.safetensors", embedding, described, (group, decoder_episodes)))
    unseen = _joined([one["priors"] for one in found])
    segmenter = embedding_of(build(len(data.split.base)), data.split.base, "all")()
    if known_episodes:
        described = _model_settings(segmenter, data.split.base)
        file = "all/known_{}.safetensors"
        found.append(priors_of(file, lambda: segmenter, described, (data.split.base, known_episodes)))
    asked: list[_Asked] = [(group, decoder_episodes) for group in groups] + [(data.split.base, known_episodes)]

    def trained_decoder(part: str, names: Sequence[str]) -> TrainingResult:
        """Trains one of the model's decoders on some sets of priors."""
        decoder = getattr(segmenter, part)
        if not isinstance(decoder, ContextDecoder):
            raise DataError("cross-fitting trains a model with a base learner and a ContextDecoder")
        return train_decoder(
            decoder,
            _joined([one[name] for name in names for one in found]),
            steps=decoder_steps,
            seed=seed,
            name=lambda number: spec_to_json(_stored_spec(data, asked * len(names), seed + 1, number)),
            folder=None if folder is None else folder / part,
            **run,
        )

    result = trained_decoder("decoder", ["priors"])
    if weak and segmenter.weak_decoder is not None:
        trained_decoder("weak_decoder", list(marks))
    segmenter.threshold = 0.0
    miou = _cell_miou(segmenter.eval().decoder, unseen)
    return TrainedFold(segmenter=segmenter, selection=None, held_out_miou=miou, result=result)


def _data_settings(data: FoldData) -> dict[str, Any]:
    """What of the data decides the priors."""
    protocol = {name: value for name, value in dataclasses.asdict(data.protocol).items() if name != "listed"}
    return {
        "data": data.fingerprint["training"],
        "pairs": fingerprint_pairs(data.training_pairs),
        "protocol": protocol,
        "backbone": data.backbone.fingerprint,
        "side": data.resolution,
    }


def _model_settings(segmenter: FewShotSegmenter, base: Sequence[int]) -> dict[str, Any]:
    """What of the model decides the priors, trained or not."""
    return {
        "trained_on": base,
        "similarity_rank": segmenter.similarity.rank,
        "completion": None if segmenter.completion is None else segmenter.completion.description(),
        "base_learner": None if segmenter.base_learner is None else segmenter.base_learner.description(),
        "temperature": segmenter.temperature,
    }


def _priors_by(
    embedding: Callable[[], FewShotSegmenter], episodes: Sequence[FeatureEpisodes], *, show_progress: bool
) -> dict[str, Tensor]:
    segmenter = embedding()
    return _joined([priors_of_episodes(segmenter, one, show_progress=show_progress) for one in episodes])


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _drawable(data: FoldData, group: Sequence[int], wanted: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """What of (shots, number of episodes) a group has photos enough for; the first is asked for in any case."""
    pairs = [pair for pair in data.training_pairs if pair[1] in group]
    repeat = data.protocol.repeat_supports
    return [
        one for one in wanted if one == wanted[0] or drop_small_classes(pairs, shots=one[0], repeat_supports=repeat)[0]
    ]


def _stored_spec(data: FoldData, asked: Sequence[_Asked], seed: int, number: int) -> EpisodeSpec:
    """The spec of an episode whose priors are stored, from all that were asked for, in order."""
    for classes, counts in asked:
        for shots, count in _drawable(data, classes, counts) if counts else ():
            specs = group_specs(data, classes, shots=shots, count=count, seed=seed)
            if number < len(specs):
                return specs[number]
            number -= len(specs)
    raise IndexError(number)


def _fit_to_cells(segmenter: FewShotSegmenter, cells: ClassCells, base: tuple[int, ...], seed: int) -> None:
    """The parts that no episode trains: base learner, and the completion's classifier of objects."""
    if segmenter.base_learner is None:
        raise DataError("cross-fitting trains a model with a base learner and a ContextDecoder")
    of_base = cells.of(base)
    train_base_learner(segmenter.base_learner, *of_base, seed=seed)
    if segmenter.completion is not None and segmenter.completion.objects is not None:
        segmenter.completion.objects.fit(*of_base)


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
