"""Episodes by number: episode n depends on (seed, n) and the lists of pairs, on nothing else."""

from __future__ import annotations

import copy
import json
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol, overload

import numpy as np

from episodes.protocols import Pair, QueryDraw
from episodes.types import DataError, EpisodeSpec

_ORDERS: tuple[QueryDraw, ...] = ("list", "random", "image", "class")


class DrawnSpecs(Sequence[EpisodeSpec]):
    """Manners of a sequence over `_draw`, which gets 0 <= n < len."""

    _what = "episode"

    @abstractmethod
    def _draw(self, n: int) -> EpisodeSpec: ...

    @overload
    def __getitem__(self, n: int) -> EpisodeSpec: ...
    @overload
    def __getitem__(self, n: slice) -> tuple[EpisodeSpec, ...]: ...
    def __getitem__(self, n: int | slice) -> EpisodeSpec | tuple[EpisodeSpec, ...]:
        if isinstance(n, slice):
            return tuple(self[i] for i in range(*n.indices(len(self))))
        if not -len(self) <= n < len(self):
            raise IndexError(f"{self._what} {n} of {len(self)}")
        return self._draw(n % len(self))


class ClassImages:
    """Images of one class, each once, that supports are drawn from."""

    def __init__(self, image_ids: Iterable[str]) -> None:
        self._ids = tuple(dict.fromkeys(image_ids))
        self._positions = {image_id: position for position, image_id in enumerate(self._ids)}

    def __len__(self) -> int:
        return len(self._ids)

    def draw(self, query_id: str, *, shots: int, repeat_supports: bool, random: np.random.Generator) -> tuple[str, ...]:
        """Supports of a query, which is skipped where it is one of the images (it need not be)."""
        skipped = self._positions.get(query_id, len(self))
        drawn = random.choice(len(self) - (skipped < len(self)), size=shots, replace=repeat_supports)
        return tuple(self._ids[i + (i >= skipped)] for i in drawn.tolist())


def images_by_class(pairs: Iterable[Pair]) -> dict[int, ClassImages]:
    """Images of every class of some pairs, in their order."""
    members: dict[int, list[str]] = {}
    for image_id, class_id in pairs:
        members.setdefault(class_id, []).append(image_id)
    return {class_id: ClassImages(image_ids) for class_id, image_ids in members.items()}


class EpisodeSampler(DrawnSpecs):
    """A sequence of `EpisodeSpec`; nothing is loaded, spec n is computed when asked for.

    Args:
        pairs: (image id, class id) pairs that supports come from.
        shots: supports per episode, K.
        seed: seed of all episodes, not negative.
        length: number of episodes; larger than the list is fine.
        order: what query n is. ``list``: pair n of `queries`, modulo their number (HSNet's evaluation);
            ``random``: every pass through the list takes each pair once, in an order of its own (training);
            ``image``: image n of `queries`, modulo the number of images, with one of its classes there at random
            (PFENet); ``class``: a class at random, then one of its images at random (HSNet on COCO).
        repeat_supports: whether one episode may draw the same support twice.
        queries: pairs that may be queries, of classes that `pairs` has too; by default `pairs`
            (see `episodes.protocols.query_pairs`).

    Raises:
        DataError: shots or length < 1, no pairs, or a class with too few images for an episode.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        shots: int,
        seed: int,
        length: int,
        order: QueryDraw,
        repeat_supports: bool,
        queries: Sequence[Pair] | None = None,
    ) -> None:
        if shots < 1:
            raise DataError(f"shots must be at least 1, got {shots}")
        if length < 1:
            raise DataError(f"the number of episodes must be at least 1, got {length}")
        if order not in _ORDERS:
            raise DataError(f"order of queries must be one of {', '.join(_ORDERS)}; got {order!r}")
        if not pairs or (queries is not None and not queries):
            raise DataError("no (image, class) pairs to draw from: the split shows none of the classes")
        self._pairs = tuple(pairs if queries is None else queries)
        self._shots, self._seed, self._length = shots, _checked_seed(seed), length
        self._order, self._repeat = order, repeat_supports
        self._images = images_by_class(pairs)
        self._check_counts()
        # of the draws by image and by class: the pairs of each, by position
        groups: dict[str | int, list[int]] = {}
        if order in ("image", "class"):
            for position, (image_id, class_id) in enumerate(self._pairs):
                groups.setdefault(image_id if order == "image" else class_id, []).append(position)
        self._groups = tuple(tuple(positions) for positions in groups.values())
        self._pass: tuple[int, tuple[int, ...]] | None = None

    def _check_counts(self) -> None:
        strange = sorted({class_id for _, class_id in self._pairs} - set(self._images))
        if strange:
            raise DataError(f"queries of classes {strange[:5]} have no image to be supported by; leave them out")
        needed = _needed(self._shots, self._repeat)
        for class_id, images in sorted(self._images.items()):
            if len(images) < needed:
                rule = "supports may repeat" if self._repeat else "supports are distinct"
                raise DataError(
                    f"class {class_id} has {len(images)} image(s), but {self._shots}-shot episodes need "
                    f"at least {needed} ({rule}, the query is not among them); use fewer shots or add images"
                )

    @property
    def shots(self) -> int:
        """Supports per episode."""
        return self._shots

    @property
    def seed(self) -> int:
        """Seed of all episodes."""
        return self._seed

    def with_seed(self, seed: int) -> EpisodeSampler:
        """The same lists and rules under another seed."""
        other = copy.copy(self)
        other._seed, other._pass = _checked_seed(seed), None
        return other

    def __len__(self) -> int:
        return self._length

    def _draw(self, n: int) -> EpisodeSpec:
        random = np.random.default_rng([self._seed, 0, n])
        query_id, class_id = self._pairs[self._query(n, random)]
        support_ids = self._images[class_id].draw(
            query_id, shots=self._shots, repeat_supports=self._repeat, random=random
        )
        return EpisodeSpec(
            class_id=class_id,
            support_ids=support_ids,
            query_id=query_id,
            seed=int(random.integers(2**62)),
        )

    def _query(self, n: int, random: np.random.Generator) -> int:
        """Position of the query's pair; only the draws by image and by class take from `random`."""
        if self._groups:
            group = self._groups[n % len(self._groups) if self._order == "image" else _pick(len(self._groups), random)]
            return group[_pick(len(group), random)]
        turn, place = divmod(n, len(self._pairs))
        if self._order == "list":
            return place
        if self._pass is None or self._pass[0] != turn:  # only saves time
            order = np.random.default_rng([self._seed, 1, turn]).permutation(len(self._pairs))
            self._pass = (turn, tuple(order.tolist()))
        return self._pass[1][place]


def _pick(count: int, random: np.random.Generator) -> int:
    return int(random.integers(count))


def _checked_seed(seed: int) -> int:
    if seed < 0:
        raise DataError(f"seed must not be negative, got {seed}")
    return seed


def _needed(shots: int, repeat_supports: bool) -> int:
    """Images that a class needs: the query and its supports."""
    return 2 if repeat_supports else shots + 1


def drop_small_classes(
    pairs: Iterable[Pair], *, shots: int, repeat_supports: bool
) -> tuple[list[Pair], tuple[int, ...]]:
    """Pairs without the classes that have too few images for an episode, and those classes, ascending.

    >>> drop_small_classes([("a", 1), ("b", 1), ("b", 2)], shots=1, repeat_supports=False)
    ([('a', 1), ('b', 1)], (2,))
    """
    unique: dict[int, set[str]] = {}
    kept = list(pairs)
    for image_id, class_id in kept:
        unique.setdefault(class_id, set()).add(image_id)
    needed = _needed(shots, repeat_supports)
    small = tuple(sorted(class_id for class_id, images in unique.items() if len(images) < needed))
    return [pair for pair in kept if pair[1] not in small], small


class SeededSpecs(Protocol):
    """Specs that follow from a seed: `EpisodeSampler`, `episodes.n_way.NWaySampler`."""

    @property
    def seed(self) -> int: ...

    def with_seed(self, seed: int) -> Sequence[EpisodeSpec]: ...


class _Repeated(DrawnSpecs):
    def __init__(self, samplers: Sequence[Sequence[EpisodeSpec]]) -> None:
        self._samplers = tuple(samplers)

    def __len__(self) -> int:
        return len(self._samplers) * len(self._samplers[0])

    def _draw(self, n: int) -> EpisodeSpec:
        which, place = divmod(n, len(self._samplers[0]))
        return self._samplers[which][place]


def repeated(sampler: SeededSpecs, repeats: int) -> Sequence[EpisodeSpec]:
    """The sampler's episodes under its seed, then under seed + 1, and so on: repeats x len(sampler) episodes.

    Raises:
        DataError: repeats < 1.
    """
    if repeats < 1:
        raise DataError(f"the number of repeats must be at least 1, got {repeats}")
    return _Repeated([sampler.with_seed(sampler.seed + k) for k in range(repeats)])


class _Shard(DrawnSpecs):
    def __init__(self, specs: Sequence[EpisodeSpec], numbers: range) -> None:
        self._specs, self._numbers = specs, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def _draw(self, n: int) -> EpisodeSpec:
        return self._specs[self._numbers[n]]


def shard(specs: Sequence[EpisodeSpec], rank: int, ranks: int) -> Sequence[EpisodeSpec]:
    """One machine's part of the episodes: numbers rank, rank + ranks, ...; all ranks together have each once.

    Raises:
        DataError: ranks < 1, or rank outside 0..ranks - 1.
    """
    if ranks < 1 or not 0 <= rank < ranks:
        raise DataError(f"rank must be in 0..ranks - 1 and ranks at least 1; got rank {rank} of {ranks}")
    return _Shard(specs, range(rank, len(specs), ranks))


def spec_to_json(spec: EpisodeSpec) -> str:
    """One line of JSON that `spec_from_json` reads back."""
    return json.dumps(
        {
            "class_id": spec.class_id,
            "support_ids": list(spec.support_ids),
            "query_id": spec.query_id,
            "seed": spec.seed,
        }
    )


def spec_from_json(text: str) -> EpisodeSpec:
    """The spec of one line of JSON. Raises DataError when the line is no spec."""
    try:
        fields = json.loads(text)
        supports = fields["support_ids"]
        if not isinstance(supports, list):
            raise TypeError("support_ids is no list")
        return EpisodeSpec(
            class_id=int(fields["class_id"]),
            support_ids=tuple(str(image_id) for image_id in supports),
            query_id=str(fields["query_id"]),
            seed=int(fields["seed"]),
        )
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"not an episode: expected JSON with class_id, support_ids, query_id and seed, "
            f"got {text[:80]!r} ({error!r:.200})"
        ) from None
