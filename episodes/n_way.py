"""N-way episodes: N classes compete for the pixels of one query."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from episodes.protocols import Pair, QueryDraw
from episodes.sampler import DrawnSpecs, EpisodeSampler, images_by_class
from episodes.types import DataError, EpisodeSpec


class NWaySampler(DrawnSpecs):
    """N-way K-shot episodes as specs of one way each: spec n * ways + w is way w of episode n.

    The ways of an episode share the query and the seed (whatever happens to the query happens to it in every way)
    and have distinct classes with supports of their own. Way 0 is the episode that an `EpisodeSampler` with the
    same arguments draws: the query shows its class. The other classes are drawn from all classes of `pairs`, each
    equally likely, whether the query shows them or not. The query is nobody's support. Episode n depends on
    (seed, n) and the lists of pairs, on nothing else.

    Args:
        pairs: (image id, class id) pairs that supports come from, and the classes of the ways.
        ways: classes per episode, N; 1 gives the `EpisodeSampler`'s specs.
        shots: supports per way, K.
        seed: seed of all episodes, not negative.
        length: number of episodes; the sequence has ways * length specs.
        order: what query n is, see `EpisodeSampler`.
        repeat_supports: whether one way may draw the same support twice.
        queries: pairs that may be queries of way 0, see `EpisodeSampler`; by default `pairs`.

    Raises:
        DataError: fewer ways than 1, more ways than classes, or what `EpisodeSampler` refuses.

    Example:
        >>> pairs = [(f"{name}{k}", class_id) for class_id, name in ((1, "cat"), (2, "dog"), (3, "cow")) for k in "ab"]
        >>> specs = NWaySampler(pairs, ways=2, shots=1, seed=0, length=5, order="list", repeat_supports=False)
        >>> len(specs), specs[0].query_id == specs[1].query_id == "cata", specs[0].class_id, specs[1].class_id != 1
        (10, True, 1, True)
    """

    _what = "spec"

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        ways: int,
        shots: int,
        seed: int,
        length: int,
        order: QueryDraw,
        repeat_supports: bool,
        queries: Sequence[Pair] | None = None,
    ) -> None:
        if ways < 1:
            raise DataError(f"the number of ways must be at least 1, got {ways}")
        self._first = EpisodeSampler(
            pairs,
            shots=shots,
            seed=seed,
            length=length,
            order=order,
            repeat_supports=repeat_supports,
            queries=queries,
        )
        self._images = dict(sorted(images_by_class(pairs).items()))
        if ways > len(self._images):
            raise DataError(
                f"{ways}-way episodes need {ways} classes, the pairs have {len(self._images)}; "
                "use fewer ways or more classes"
            )
        self._ways, self._repeat = ways, repeat_supports
        self._last: tuple[int, tuple[EpisodeSpec, ...]] | None = None

    @property
    def ways(self) -> int:
        """Classes per episode, N."""
        return self._ways

    @property
    def seed(self) -> int:
        """Seed of all episodes."""
        return self._first.seed

    def with_seed(self, seed: int) -> NWaySampler:
        """The same lists and rules under another seed."""
        other = copy.copy(self)
        other._first, other._last = self._first.with_seed(seed), None
        return other

    @property
    def shots(self) -> int:
        """Supports per way, K."""
        return self._first.shots

    def __len__(self) -> int:
        return len(self._first) * self._ways

    def _draw(self, n: int) -> EpisodeSpec:
        episode, way = divmod(n, self._ways)
        if self._last is None or self._last[0] != episode:  # only saves time
            self._last = (episode, self._draw_ways(episode))
        return self._last[1][way]

    def _draw_ways(self, n: int) -> tuple[EpisodeSpec, ...]:
        first = self._first[n]
        random = np.random.default_rng([self._first.seed, 2, n])  # EpisodeSampler draws from [seed, 0] and [seed, 1]
        others = [class_id for class_id in self._images if class_id != first.class_id]
        chosen = random.choice(len(others), size=self._ways - 1, replace=False).tolist()
        return first, *(self._way(others[i], first, random) for i in chosen)

    def _way(self, class_id: int, first: EpisodeSpec, random: np.random.Generator) -> EpisodeSpec:
        return EpisodeSpec(
            class_id=class_id,
            support_ids=self._images[class_id].draw(
                first.query_id, shots=first.shots, repeat_supports=self._repeat, random=random
            ),
            query_id=first.query_id,
            seed=first.seed,
        )
