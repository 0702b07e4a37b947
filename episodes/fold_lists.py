"""The episode lists of one fold: data, protocol, indices and class split. Knows no network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from episodes.folds import ClassSplit, class_split, held_out_split
from episodes.ignored_classes import IgnoredClasses
from episodes.index import ClassIndex, build_index
from episodes.n_way import NWaySampler
from episodes.protocols import EpisodeProtocol, Pair, QueryDraw, evaluation_pairs, query_pairs, training_pairs
from episodes.sampler import EpisodeSampler, drop_small_classes, repeated
from episodes.sources import SyntheticSource
from episodes.types import DataError, EpisodeSpec, MaskSource, SplitByClasses


@dataclass(frozen=True, kw_only=True)
class FoldLists:
    """What a fold's episodes are drawn from.

    Attributes:
        source, protocol: as given; the protocol names its splits.
        training_index, evaluation_index: classes of the two splits.
        split: base and novel classes of the fold; base may be empty, then there is nothing to train on.
        held_out: the base classes split again, for choices; its novel side is never in the test fold. None if there
            are fewer than two base classes.
        fold: the test fold; None for a source without folds.
    """

    source: MaskSource
    protocol: EpisodeProtocol
    training_index: ClassIndex
    evaluation_index: ClassIndex
    split: ClassSplit
    held_out: ClassSplit | None
    fold: int | None

    @property
    def fingerprint(self) -> dict[str, str]:
        """Fingerprints of the two splits' files."""
        return {"training": self.training_index.fingerprint, "evaluation": self.evaluation_index.fingerprint}

    @property
    def training_source(self) -> MaskSource:
        """What trains: the source, with novel classes at 255 where the protocol ignores them."""
        ignoring = self.protocol.novel_in_training == "ignored"
        return IgnoredClasses(self.source, frozenset(self.split.novel)) if ignoring else self.source

    def check_base(self) -> None:
        """Raises DataError where there is nothing to train on: no base class, or no photo of one that is not scored."""
        self._check_named()
        of_base = training_pairs(self.protocol, self.training_index, self.split)
        if of_base and not self._without_scored(of_base):
            raise DataError(
                f"there is nothing to train on: every photo of {self.source.name} that shows {self.base_names} also "
                "shows a class to be scored, and what is scored must not train; list the photos to train on and those "
                "to score in splits of their own (docs/data.md)"
            )

    def _check_named(self) -> None:
        if not self.split.base:
            raise DataError(
                f"there is nothing to train on: all classes of {self.source.name} are to be scored; name those with "
                "--novel-classes and train on the others"
            )

    @property
    def base_names(self) -> str:
        """The base classes by name, for a message."""
        return ", ".join(self.source.class_names[class_id] for class_id in self.split.base)

    @property
    def choices(self) -> ClassSplit:
        """`held_out`. Raises DataError where no classes are held out."""
        self._check_named()
        if self.held_out is None:
            raise DataError(
                f"{self.source.name} has too few base classes to hold some out for choices: at least 2 are needed, "
                f"there is {self.base_names}; name fewer --novel-classes, or train with --no-select-threshold"
            )
        return self.held_out

    @property
    def evaluation_pairs(self) -> list[Pair]:
        """The (image, class) list of the evaluation."""
        return evaluation_pairs(self.protocol, self.evaluation_index, self.split)

    @property
    def photos_to_score(self) -> frozenset[str]:
        """Photos that the evaluation may draw, as query or as support; they train nothing and choose nothing."""
        return frozenset(image_id for image_id, _ in self.evaluation_pairs)

    @property
    def training_pairs(self) -> list[Pair]:
        """The (image, class) list of a training on all base classes."""
        return self.pairs_to_train(self.split)

    def pairs_to_train(self, classes: ClassSplit) -> list[Pair]:
        """The (image, class) list of a training on the base side of `classes`.

        By the protocol's rule, and without the photos that are to be scored, where both splits list them.
        """
        return self._without_scored(training_pairs(self.protocol, self.training_index, classes))

    @property
    def pairs_to_choose(self) -> list[Pair]:
        """The (image, class) list of the held-out base classes, for choices: of photos that could train as well.

        Raises DataError where no classes are held out.
        """
        held_out = set(self.choices.novel)
        return [pair for pair in self.training_pairs if pair[1] in held_out]

    def _without_scored(self, pairs: Sequence[Pair]) -> list[Pair]:
        scored = self.photos_to_score
        return [pair for pair in pairs if pair[0] not in scored]


def open_lists(
    source: MaskSource,
    protocol: EpisodeProtocol,
    *,
    fold: int,
    validation_fold: int | None = None,
    novel_classes: Sequence[str] | None = None,
    index_cache: Path | None = None,
    show_progress: bool = False,
) -> FoldLists:
    """Index the data and split its classes.

    Args:
        source: any data set.
        protocol: splits that it leaves open are the source's own.
        fold: the test fold; does not matter for a source without folds.
        validation_fold: fold whose classes are held out for choices; the next one by default.
        novel_classes: names of the classes to be scored, for a source without folds; all by default.
        index_cache: folder of stored indices; None stores nothing.
        show_progress: bars on stderr.

    Raises:
        DataError: whatever is wrong with the data; see `class_splits`.
    """
    protocol = protocol_for(source, protocol)
    training_split, evaluation_split = splits_of(protocol, source)
    training_index = build_index(source, training_split, cache_dir=index_cache, show_progress=show_progress)
    evaluation_index = (
        training_index
        if evaluation_split == training_split
        else build_index(source, evaluation_split, cache_dir=index_cache, show_progress=show_progress)
    )
    split, held_out = class_splits(
        source, protocol, fold=fold, validation_fold=validation_fold, novel_classes=novel_classes
    )
    return FoldLists(
        source=source,
        protocol=protocol,
        training_index=training_index,
        evaluation_index=evaluation_index,
        split=split,
        held_out=held_out,
        fold=None if source.folds is None else fold,
    )


def protocol_for(source: MaskSource, protocol: EpisodeProtocol) -> EpisodeProtocol:
    """The protocol with its splits named, and as far as it applies to a source.

    The synthetic source keeps its own size. A source without folds has none of the published lists, and no grid rule.
    """
    training_split, evaluation_split = splits_of(protocol, source)
    protocol = dataclasses.replace(protocol, training_split=training_split, evaluation_split=evaluation_split)
    if source.folds is not None:
        return protocol
    protocol = dataclasses.replace(protocol, min_grid_points=0, listed=frozenset())
    if not isinstance(source, SyntheticSource) or protocol.name.endswith("(synthetic)"):
        return protocol
    return dataclasses.replace(
        protocol,
        name=f"{protocol.name} (synthetic)",
        description="Lists and draws of the protocol over the generated pictures, at their own size.",
        resolution=source.size,
        scoring_size=source.size,
    )


def splits_of(protocol: EpisodeProtocol, source: MaskSource) -> tuple[str, str]:
    """(training split, evaluation split): the protocol's, else the source's own."""
    training, evaluation = source.default_splits
    return protocol.training_split or training, protocol.evaluation_split or evaluation


def class_splits(
    source: MaskSource,
    protocol: EpisodeProtocol,
    *,
    fold: int,
    validation_fold: int | None = None,
    novel_classes: Sequence[str] | None = None,
) -> tuple[ClassSplit, ClassSplit | None]:
    """(base | novel, the base classes split again for choices) of a fold, of splits with own classes, or by name.

    Raises:
        DataError: names where the data set has folds, or a name that is no class.
    """
    class_ids = tuple(source.class_names)
    if source.folds is not None:
        if novel_classes is not None:
            raise DataError(f"the classes of {source.name} are divided by --fold; leave --novel-classes out")
        other = (fold + 1) % 4 if validation_fold is None else validation_fold
        return class_split(class_ids, source.folds, fold), held_out_split(class_ids, source.folds, fold, other)
    base: tuple[int, ...] = ()
    if novel_classes is not None:
        novel = _by_name(source, novel_classes)
        base = tuple(class_id for class_id in class_ids if class_id not in novel)
    elif isinstance(source, SplitByClasses):
        training, evaluation = splits_of(protocol, source)
        novel = source.split_classes(evaluation)
        base = tuple(class_id for class_id in source.split_classes(training) if class_id not in novel)
    else:
        novel = class_ids
    return ClassSplit(base=base, novel=novel), _held_out(base)


def _held_out(base: tuple[int, ...]) -> ClassSplit | None:
    if len(base) < 2:
        return None
    kept = min(-(-len(base) * 2 // 3), len(base) - 1)
    return ClassSplit(base=base[:kept], novel=base[kept:])


def _by_name(source: MaskSource, names: Sequence[str]) -> tuple[int, ...]:
    ids = {name: class_id for class_id, name in source.class_names.items()}
    unknown = [name for name in names if name not in ids]
    if unknown:
        known = ", ".join(list(ids)[:20]) + (", ..." if len(ids) > 20 else "")
        raise DataError(f"--novel-classes: {source.name} has no class {', '.join(unknown)}; it has: {known}")
    return tuple(sorted(ids[name] for name in dict.fromkeys(names)))


def draw(
    lists: FoldLists, index: ClassIndex, pairs: Sequence[Pair], *, shots: int, count: int, seed: int, order: QueryDraw
) -> EpisodeSampler:
    """Episode specs over a list of pairs, by the protocol's rules; classes with too few images are left out.

    Args:
        lists: the fold.
        index: the index that `pairs` comes from.
        pairs: what supports, and by the protocol's rule queries, are drawn from.
        shots, count, seed, order: see `EpisodeSampler`.

    Raises:
        DataError: an empty list (the fold's classes are not in the data), or too few images for the shots.
    """
    kept, queries = drawable(lists, index, pairs, shots=shots)
    return EpisodeSampler(
        kept,
        shots=shots,
        seed=seed,
        length=count,
        order=order,
        repeat_supports=lists.protocol.repeat_supports,
        queries=queries,
    )


def drawable(
    lists: FoldLists, index: ClassIndex, pairs: Sequence[Pair], *, shots: int
) -> tuple[list[Pair], list[Pair]]:
    """(pairs of supports, pairs of queries) without the classes that have too few images.

    Raises:
        DataError: nothing is left.
    """
    kept, left_out = drop_small_classes(pairs, shots=shots, repeat_supports=lists.protocol.repeat_supports)
    if not kept:
        names = _names(lists, left_out or lists.split.novel)
        found = f"has too few images of {names}" if left_out else f"finds no image of the wanted classes ({names})"
        if lists.protocol.min_area > 1:
            found += f", counting those with {lists.protocol.min_area} pixels of the class and more,"
        raise DataError(
            f"no {shots}-shot episodes: protocol {lists.protocol.name} {found} in {lists.source.name}; "
            "choose another --fold, fewer --shots, or add images"
        )
    return kept, query_pairs(lists.protocol, index, kept)


def _names(lists: FoldLists, class_ids: Sequence[int]) -> str:
    names = [lists.source.class_names[class_id] for class_id in class_ids]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def left_out_classes(lists: FoldLists, *, shots: int) -> tuple[int, ...]:
    """Novel classes that no episode can be drawn of: too few admissible images for the shots, or none at all."""
    pairs = lists.evaluation_pairs
    kept, _ = drop_small_classes(pairs, shots=shots, repeat_supports=lists.protocol.repeat_supports)
    drawn = {class_id for _, class_id in kept}
    return tuple(class_id for class_id in lists.split.novel if class_id not in drawn)


def evaluation_specs(
    lists: FoldLists, *, shots: int, count: int | None = None, seed: int | None = None, ways: int = 1
) -> Sequence[EpisodeSpec]:
    """Specs of the novel classes by the protocol; count and seed override the protocol's.

    Protocols of several runs have `count` episodes a run, one run after another. An episode of several ways is as many
    specs one after another (`NWaySampler`).
    """
    pairs = lists.evaluation_pairs
    count = count or lists.protocol.episodes
    seed = lists.protocol.seed if seed is None else seed
    index, protocol = lists.evaluation_index, lists.protocol
    if ways == 1:
        sampler = draw(lists, index, pairs, shots=shots, count=count, seed=seed, order=protocol.query_draw)
        return repeated(sampler, protocol.repeats)
    kept, queries = drawable(lists, index, pairs, shots=shots)
    of_several_ways = NWaySampler(
        kept,
        ways=ways,
        shots=shots,
        seed=seed,
        length=count,
        order=protocol.query_draw,
        repeat_supports=protocol.repeat_supports,
        queries=queries,
    )
    return repeated(of_several_ways, protocol.repeats)
