"""Batches of photos balanced over classes, by number: batch n depends on (seed, n) and the labels, on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from episodes.types import DataError

IntArray = npt.NDArray[np.int64]


class BalancedBatches(Sequence[IntArray]):
    """`classes` different classes and `images` photos of each, as pair-based metric losses need them.

    A class with at least `images` photos gives different ones; a smaller class gives each of its photos once before
    any comes again, so a batch may hold copies of one photo. A copy is a positive pair at distance 0 that teaches
    nothing: keep classes with a single photo out of `labels`.

    It fits ``DataLoader(batch_sampler=...)``. `MPerClassSampler` of pytorch-metric-learning draws from numpy's global
    random state, so its batches depend on whatever ran before; here any worker and any rank agree on batch n, and a
    run that was interrupted goes on at the batch where it stopped.

    Args:
        labels: class of every photo, integers (N,); any values.
        classes: different classes per batch.
        images: photos per class.
        batches: number of batches; iterating again gives the same ones, so count those of all epochs.
        seed: seed of all batches, not negative.

    Raises:
        DataError: labels that are no list of integers, fewer classes than asked for, or a number below its minimum.

    Example:
        >>> labels = [7, 7, 8, 8, 9, 9]
        >>> batch = BalancedBatches(labels, classes=2, images=2, batches=10, seed=0)[3]
        >>> [labels[i] for i in batch]
        [7, 7, 8, 8]
    """

    def __init__(self, labels: Sequence[int] | IntArray, *, classes: int, images: int, batches: int, seed: int) -> None:
        for name, value in (("classes", classes), ("images", images), ("batches", batches)):
            if value < 1:
                raise DataError(f"{name} of balanced batches must be at least 1, got {value}")
        if seed < 0:
            raise DataError(f"seed must not be negative, got {seed}")
        values = np.asarray(labels)
        if values.ndim != 1 or not len(values) or not np.issubdtype(values.dtype, np.integer):
            raise DataError(
                f"labels must be one integer per photo, at least one; got {values.dtype} of shape {values.shape}"
            )
        self._members = [np.flatnonzero(values == label).astype(np.int64) for label in np.unique(values)]
        if len(self._members) < classes:
            raise DataError(
                f"batches of {classes} classes need at least as many, but the labels name {len(self._members)}; "
                f"ask for fewer classes per batch or add classes"
            )
        self._classes, self._images, self._batches, self._seed = classes, images, batches, seed

    def __len__(self) -> int:
        return self._batches

    @overload
    def __getitem__(self, n: int) -> IntArray: ...
    @overload
    def __getitem__(self, n: slice) -> tuple[IntArray, ...]: ...
    def __getitem__(self, n: int | slice) -> IntArray | tuple[IntArray, ...]:
        """Indices into the labels, int64 (classes * images,), the photos of a class side by side."""
        if isinstance(n, slice):
            return tuple(self[i] for i in range(*n.indices(self._batches)))
        if not -self._batches <= n < self._batches:
            raise IndexError(f"batch {n} of {self._batches}")
        # 0 and 1 in the second place are the streams of EpisodeSampler
        random = np.random.default_rng([self._seed, 2, n % self._batches])
        chosen = random.choice(len(self._members), size=self._classes, replace=False)
        return np.concatenate([self._draw(self._members[c], random) for c in chosen.tolist()])

    def _draw(self, members: IntArray, random: np.random.Generator) -> IntArray:
        rounds = -(-self._images // len(members))
        return np.concatenate([random.permutation(members) for _ in range(rounds)])[: self._images]
