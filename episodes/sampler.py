"""Episodes by number: episode n depends on (seed, n) and the list of pairs, on nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, overload

import numpy as np

from episodes.types import DataError, EpisodeSpec


class EpisodeSampler(Sequence[EpisodeSpec]):
    """A sequence of `EpisodeSpec`; nothing is loaded, spec n is computed when asked for.

    Args:
        pairs: (image id, class id) pairs that may be queries; supports come from the same pairs.
        shots: supports per episode, K.
        seed: seed of all episodes, not negative.
        length: number of episodes; larger than the list is fine.
        order: ``list``: query n is pair n modulo the list's length (evaluation); ``random``: every pass
            through the list takes each pair once, in an order of its own (training).
        repeat_supports: whether one episode may draw the same support twice.

    Raises:
        DataError: shots or length < 1, no pairs, or a class with too few images for an episode.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, int]],
        *,
        shots: int,
        seed: int,
        length: int,
        order: Literal["list", "random"],
        repeat_supports: bool,
    ) -> None:
        if shots < 1:
            raise DataError(f"shots must be at least 1, got {shots}")
        if length < 1:
            raise DataError(f"the number of episodes must be at least 1, got {length}")
        if seed < 0:
            raise DataError(f"seed must not be negative, got {seed}")
        if order not in ("list", "random"):
            raise DataError(f"order of queries must be 'list' or 'random', got {order!r}")
        if not pairs:
            raise DataError("no (image, class) pairs to draw from: the split shows none of the classes")
        self._pairs = tuple(pairs)
        self._shots, self._seed, self._length = shots, seed, length
        self._order, self._repeat = order, repeat_supports
        members: dict[int, dict[str, int]] = {}
        for image_id, class_id in self._pairs:
            positions = members.setdefault(class_id, {})
            positions.setdefault(image_id, len(positions))
        self._positions = members
        self._images = {class_id: tuple(positions) for class_id, positions in members.items()}
        self._check_counts()
        self._pass: tuple[int, tuple[int, ...]] | None = None

    def _check_counts(self) -> None:
        needed = 2 if self._repeat else self._shots + 1
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

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, n: int) -> EpisodeSpec: ...
    @overload
    def __getitem__(self, n: slice) -> tuple[EpisodeSpec, ...]: ...
    def __getitem__(self, n: int | slice) -> EpisodeSpec | tuple[EpisodeSpec, ...]:
        if isinstance(n, slice):
            return tuple(self[i] for i in range(*n.indices(self._length)))
        if not -self._length <= n < self._length:
            raise IndexError(f"episode {n} of {self._length}")
        return self._draw(n % self._length)

    def _draw(self, n: int) -> EpisodeSpec:
        query_id, class_id = self._pairs[self._query(n)]
        images, skipped = self._images[class_id], self._positions[class_id][query_id]
        random = np.random.default_rng([self._seed, 0, n])
        drawn = random.choice(len(images) - 1, size=self._shots, replace=self._repeat)
        return EpisodeSpec(
            class_id=class_id,
            support_ids=tuple(images[i + (i >= skipped)] for i in drawn.tolist()),
            query_id=query_id,
            seed=int(random.integers(2**62)),
        )

    def _query(self, n: int) -> int:
        turn, place = divmod(n, len(self._pairs))
        if self._order == "list":
            return place
        if self._pass is None or self._pass[0] != turn:  # only saves time
            order = np.random.default_rng([self._seed, 1, turn]).permutation(len(self._pairs))
            self._pass = (turn, tuple(order.tolist()))
        return self._pass[1][place]


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
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"not an episode: expected JSON with class_id, support_ids, query_id and seed, "
            f"got {text[:80]!r} ({error!r})"
        ) from None
