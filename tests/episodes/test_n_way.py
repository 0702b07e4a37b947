from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from episodes.n_way import NWaySampler
from episodes.sampler import EpisodeSampler
from episodes.types import DataError

PAIRS = [(f"image{k}", class_id) for k in range(12) for class_id in (1, 2, 3, 4) if (k + class_id) % 3 or k < 4]
SHOWN = {image_id: {c for i, c in PAIRS if i == image_id} for image_id, _ in PAIRS}


def make(pairs: list[tuple[str, int]] = PAIRS, **changes: object) -> NWaySampler:
    arguments = {
        "ways": 3,
        "shots": 2,
        "seed": 0,
        "length": 20,
        "order": "list",
        "repeat_supports": False,
    } | changes
    return NWaySampler(pairs, **arguments)  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2**40),
    st.sampled_from(["list", "random", "image", "class"]),
    st.booleans(),
    st.integers(0, 19),
)
def test_ways_share_the_query_and_have_classes_and_supports_of_their_own(
    ways: int, shots: int, seed: int, order: str, repeat: bool, n: int
) -> None:
    sampler = make(ways=ways, shots=shots, seed=seed, order=order, repeat_supports=repeat)
    assert (len(sampler), sampler.ways, sampler.shots) == (20 * ways, ways, shots)
    episode = sampler[n * ways : (n + 1) * ways]
    assert len({(spec.query_id, spec.seed) for spec in episode}) == 1
    assert len({spec.class_id for spec in episode}) == ways
    assert episode[0].class_id in SHOWN[episode[0].query_id]
    for spec in episode:
        assert spec.shots == shots
        assert spec.query_id not in spec.support_ids
        assert all(spec.class_id in SHOWN[image_id] for image_id in spec.support_ids)
        assert repeat or len(set(spec.support_ids)) == shots


@pytest.mark.parametrize("order", ["list", "random", "image", "class"])
def test_the_first_way_is_the_one_way_episode(order: str) -> None:
    arguments = {"shots": 2, "seed": 5, "length": 20, "order": order, "repeat_supports": False}
    alone = EpisodeSampler(PAIRS, **arguments)  # type: ignore[arg-type]
    assert make(**arguments)[::3] == alone[:]
    assert make(**arguments, ways=1)[:] == alone[:]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**40), st.permutations(range(60)))
def test_a_spec_depends_on_seed_and_number_alone(seed: int, order_of_access: list[int]) -> None:
    sampler = make(seed=seed, order="random")
    shuffled = {n: sampler[n] for n in order_of_access}
    np.random.seed(len(shuffled))  # noqa: NPY002  the global state must not matter
    longer = make(seed=seed, order="random", length=1000)
    assert [shuffled[n] for n in range(60)] == list(longer[:60])
    assert sampler[-1] == longer[59]


def test_another_seed_is_another_draw_of_the_same_lists() -> None:
    sampler = make(order="random")
    other = sampler.with_seed(7)
    assert (sampler.seed, other.seed) == (0, 7)
    assert other[:] == make(order="random", seed=7)[:] != sampler[:]
    assert sampler[:] == make(order="random")[:]  # unchanged


def test_other_classes_and_their_supports_are_uniform() -> None:
    # 3000 episodes: fair counts stay within five standard deviations.
    pairs = [(f"{class_id}-{k}", class_id) for class_id in range(1, 7) for k in range(5)]
    specs = make(pairs, ways=3, shots=1, length=3000)[:]
    others = [(specs[3 * n].class_id, spec) for n in range(3000) for spec in specs[3 * n + 1 : 3 * n + 3]]
    of_one = Counter(spec.class_id for first, spec in others if first == 1)
    total = sum(of_one.values())
    assert set(of_one) == {2, 3, 4, 5, 6}
    assert all(abs(count - total / 5) < 5 * np.sqrt(total / 5) for count in of_one.values())
    supports = Counter(spec.support_ids[0] for _, spec in others)
    assert all(abs(supports[image_id] - 200) < 5 * np.sqrt(200) for image_id, _ in pairs)


def test_a_query_that_shows_the_other_class_never_supports_it() -> None:
    pairs = [("both", 1), ("both", 2), ("one", 1), ("two", 2)]
    specs = make(pairs, ways=2, shots=1, length=40, order="list")[:]
    shared = [specs[2 * n + 1] for n in range(40) if specs[2 * n].query_id == "both"]
    assert {(spec.class_id, spec.support_ids) for spec in shared} == {(1, ("one",)), (2, ("two",))}


def test_queries_may_be_a_list_of_their_own() -> None:
    specs = make(queries=[("image0", 2)])[:]
    assert {(spec.query_id, spec.class_id) for spec in specs[::3]} == {("image0", 2)}
    assert {spec.class_id for spec in specs} == {1, 2, 3, 4}


def test_bad_requests() -> None:
    with pytest.raises(DataError, match="number of ways must be at least 1, got 0"):
        make(ways=0)
    with pytest.raises(DataError, match="5-way episodes need 5 classes, the pairs have 4; use fewer ways"):
        make(ways=5)
    with pytest.raises(DataError, match=r"class 9 has 2 image\(s\), but 2-shot episodes need at least 3"):
        make([*PAIRS, ("image0", 9), ("image1", 9)])
    with pytest.raises(DataError, match="shots must be at least 1, got 0"):
        make(shots=0)
    with pytest.raises(IndexError, match="spec 60 of 60"):
        make()[60]
