from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from episodes.class_batches import BalancedBatches
from episodes.types import DataError

LABELS = [int(label) for label in np.random.default_rng(0).permutation(np.repeat([3, -1, 40, 7, 12], [6, 1, 4, 9, 5]))]
COUNTS = Counter(LABELS)


def make(**changes: object) -> BalancedBatches:
    arguments = {"classes": 3, "images": 4, "batches": 40, "seed": 0} | changes
    return BalancedBatches(LABELS, **arguments)  # type: ignore[arg-type]


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**40), st.integers(0, 39))
def test_balanced_and_grouped_by_class(classes: int, images: int, seed: int, n: int) -> None:
    batch = make(classes=classes, images=images, seed=seed)[n]
    assert batch.dtype == np.int64
    drawn = np.array(LABELS)[batch].reshape(classes, images)
    assert (drawn == drawn[:, :1]).all()
    assert len(set(drawn[:, 0].tolist())) == classes  # no class twice
    for label, group in zip(drawn[:, 0].tolist(), batch.reshape(classes, images).tolist(), strict=True):
        times = Counter(group).values()
        assert len(times) == min(images, COUNTS[label])  # repeats only when every photo has been drawn
        assert max(times) - min(times) <= 1


@given(st.integers(0, 2**40), st.permutations(range(20)))
def test_depends_on_seed_and_number_alone(seed: int, order_of_access: list[int]) -> None:
    sampler = make(seed=seed)
    shuffled = {n: sampler[n].tolist() for n in order_of_access}
    np.random.seed(len(shuffled))  # noqa: NPY002  the global state must not matter
    longer = make(seed=seed, batches=1000)
    assert [shuffled[n] for n in range(20)] == [batch.tolist() for batch in longer[:20]]


@given(st.integers(0, 2**40))
def test_numbers_and_seeds_differ(seed: int) -> None:
    drawn = {tuple(batch.tolist()) for batch in (*make(seed=seed), *make(seed=seed + 1))}
    assert len(drawn) > 70  # of 80; a few may coincide, hardly many


def test_every_class_and_photo_has_its_turn() -> None:
    drawn = Counter(int(i) for batch in make(images=2, batches=200) for i in batch)
    assert set(drawn) == set(range(len(LABELS)))
    per_class = {label: sum(drawn[i] for i, other in enumerate(LABELS) if other == label) for label in COUNTS}
    # 200 batches of 3 of 5 classes, 2 photos each: 240 expected per class, whatever its size
    assert all(200 < times < 280 for times in per_class.values())


def test_it_is_a_sequence() -> None:
    sampler = make()
    assert len(sampler) == len(list(sampler)) == 40
    assert sampler[-1].tolist() == sampler[39].tolist()
    assert [batch.tolist() for batch in sampler[3:9:2]] == [sampler[n].tolist() for n in (3, 5, 7)]
    for n in (40, -41):
        with pytest.raises(IndexError, match=f"batch {n} of 40"):
            sampler[n]


def test_arrays_and_lists_agree() -> None:
    array = BalancedBatches(np.array(LABELS), classes=3, images=4, batches=40, seed=0)
    assert [batch.tolist() for batch in array] == [batch.tolist() for batch in make()]


def test_a_data_loader_takes_it() -> None:
    loaded = DataLoader(LABELS, batch_sampler=make(batches=3))  # type: ignore[arg-type, var-annotated]
    assert [batch.tolist() for batch in loaded] == [[LABELS[i] for i in batch] for batch in make(batches=3)]


class TestErrors:
    @pytest.mark.parametrize("name", ["classes", "images", "batches"])
    def test_numbers_below_one(self, name: str) -> None:
        with pytest.raises(DataError, match=f"{name} of balanced batches must be at least 1, got 0"):
            make(**{name: 0})

    def test_negative_seed(self) -> None:
        with pytest.raises(DataError, match="seed must not be negative, got -1"):
            make(seed=-1)

    def test_too_few_classes(self) -> None:
        with pytest.raises(DataError, match="batches of 6 classes need at least as many, but the labels name 5"):
            make(classes=6)

    @pytest.mark.parametrize("labels", [[], [[1, 2]], [0.5, 1.0], ["cat", "dog"]])
    def test_labels_that_are_none(self, labels: list[object]) -> None:
        with pytest.raises(DataError, match="labels must be one integer per photo"):
            BalancedBatches(labels, classes=1, images=1, batches=1, seed=0)  # type: ignore[arg-type]
