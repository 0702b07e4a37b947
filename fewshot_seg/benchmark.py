"""A data set with its protocol and class split: what is trained on, and what is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from episodes.folds import FOLDS, ClassSplit, class_split, held_out_split
from episodes.index import ClassIndex, build_index
from episodes.protocols import EpisodeProtocol, evaluation_pairs, get_protocol, list_pairs
from episodes.sampler import EpisodeSampler
from episodes.sources import SyntheticSource, VocSource
from episodes.types import DataError, MaskSource

SYNTHETIC = EpisodeProtocol(
    name="synthetic",
    description="The embedded synthetic pictures: base classes in train, novel ones in val; distinct supports.",
    training_split="train",
    evaluation_split="val",
    episodes=400,
    resolution=192,
    scoring_size=192,
    query_draw="random",
)
_VALIDATION_SEED = 1  # of the episodes on held-out base classes; apart from any evaluation's
_PASCAL_VAL_IMAGES = 1449


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Data, protocol and classes of one experiment.

    Attributes:
        source: images and masks.
        protocol: lists, numbers and sizes.
        fold: test fold, None where the data has no folds.
        classes: base classes and novel classes.
        cache: folder of stored indices, or None.
        show_progress: bars on stderr while masks are read.
    """

    source: MaskSource
    protocol: EpisodeProtocol
    fold: int | None
    classes: ClassSplit
    cache: Path | None = None
    show_progress: bool = False

    @cached_property
    def training_index(self) -> ClassIndex:
        """Classes of the training split's images."""
        return self._index(self.protocol.training_split)

    @cached_property
    def evaluation_index(self) -> ClassIndex:
        """Classes of the evaluation split's images."""
        return self._index(self.protocol.evaluation_split)

    def _index(self, split: str) -> ClassIndex:
        folder = None if self.cache is None else self.cache / "index"
        return build_index(self.source, split, cache_dir=folder, show_progress=self.show_progress)

    @property
    def name(self) -> str:
        """``PASCAL-5i`` for all 1449 validation images, ``PASCAL-5i/N`` for N others, or the source's name."""
        if self.source.name != "voc":
            return self.source.name
        images = len(self.evaluation_index.image_ids)
        return "PASCAL-5i" if images == _PASCAL_VAL_IMAGES else f"PASCAL-5i/{images}"

    def held_out(self, validation_fold: int | None = None) -> ClassSplit:
        """Base classes split once more, to choose on some (`novel`) what was trained on the others (`base`).

        Args:
            validation_fold: fold of the held-out classes, by default the one after the test fold. Data without
                folds holds out the last third of its base classes.
        """
        if self.fold is not None:
            fold = (self.fold + 1) % FOLDS if validation_fold is None else validation_fold
            return held_out_split(tuple(self.source.class_names), "pascal", self.fold, fold)
        base = self.classes.base
        kept = len(base) - len(base) // 3
        return ClassSplit(base=base[:kept], novel=base[kept:])

    def training_specs(self, classes: Sequence[int], *, shots: int, count: int, seed: int) -> EpisodeSampler:
        """Episodes of these classes from the training split, in random order."""
        pairs = list_pairs(self.protocol, self.training_index, classes)
        self._check(pairs, classes, self.protocol.training_split)
        return self._sampler(pairs, shots=shots, count=count, seed=seed, order="random")

    def validation_specs(self, classes: Sequence[int], *, shots: int, count: int) -> EpisodeSampler:
        """Episodes for choosing a threshold: classes that are not novel, from the training split."""
        novel = sorted(set(classes) & set(self.classes.novel))
        if novel:
            raise DataError(f"classes {novel} are novel; nothing may be chosen on them")
        return self.training_specs(classes, shots=shots, count=count, seed=_VALIDATION_SEED)

    def evaluation_specs(
        self, *, shots: int, count: int | None = None, seed: int | None = None
    ) -> EpisodeSampler:
        """Episodes of the novel classes from the evaluation split; the protocol's number and seed by default."""
        pairs = evaluation_pairs(self.protocol, self.evaluation_index, self.classes)
        self._check(pairs, self.classes.novel, self.protocol.evaluation_split)
        return self._sampler(
            pairs,
            shots=shots,
            count=self.protocol.episodes if count is None else count,
            seed=self.protocol.seed if seed is None else seed,
            order=self.protocol.query_draw,
        )

    def _sampler(
        self,
        pairs: Sequence[tuple[str, int]],
        *,
        shots: int,
        count: int,
        seed: int,
        order: Literal["list", "random"],
    ) -> EpisodeSampler:
        return EpisodeSampler(
            pairs,
            shots=shots,
            seed=seed,
            length=count,
            order=order,
            repeat_supports=self.protocol.repeat_supports,
        )

    def _check(self, pairs: Sequence[tuple[str, int]], classes: Sequence[int], split: str) -> None:
        if not pairs:
            names = ", ".join(self.source.class_names[class_id] for class_id in classes)
            fold = "" if self.fold is None else f" (test fold {self.fold})"
            raise DataError(
                f"no episodes{fold}: split {split!r} of {self.source.name} shows none of the classes {names} as "
                f"protocol {self.protocol.name} asks; add images of them or choose another fold"
            )

    def record(self) -> dict[str, Any]:
        """JSON-able facts about the data."""
        return {
            "name": self.name,
            "fold": self.fold,
            "base_classes": list(self.classes.base),
            "novel_classes": list(self.classes.novel),
            "evaluation_images": len(self.evaluation_index.image_ids),
            "evaluation_fingerprint": self.evaluation_index.fingerprint,
        }


def open_source(data: Literal["voc", "synthetic"], root: Path | None) -> MaskSource:
    """The data set of a name.

    Raises:
        DataError: no VOC layout at `root`, or no root for voc.
    """
    if data == "synthetic":
        return SyntheticSource()
    if root is None:
        raise DataError("data set voc needs a root folder: give --root DIR")
    return VocSource(root)


def open_benchmark(
    data: Literal["voc", "synthetic"],
    root: Path | None,
    *,
    fold: int,
    protocol: str = "hsnet",
    cache: Path | None = None,
    show_progress: bool = False,
) -> Benchmark:
    """The benchmark of a data set: PASCAL-5i's folds on VOC; the synthetic data has one fixed split."""
    source = open_source(data, root)
    if isinstance(source, SyntheticSource):
        return synthetic_benchmark(source, cache=cache)
    return Benchmark(
        source=source,
        protocol=get_protocol(protocol),
        fold=fold,
        classes=class_split(tuple(source.class_names), "pascal", fold),
        cache=cache,
        show_progress=show_progress,
    )


def synthetic_benchmark(source: SyntheticSource, *, cache: Path | None = None) -> Benchmark:
    """Base and novel classes of a synthetic source; without folds."""
    return Benchmark(
        source=source,
        protocol=SYNTHETIC,
        fold=None,
        classes=ClassSplit(base=source.base_class_ids, novel=source.novel_class_ids),
        cache=cache,
    )
