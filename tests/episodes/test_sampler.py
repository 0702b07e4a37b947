from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from episodes.sampler import EpisodeSampler, spec_from_json, spec_to_json
from episodes.types import DataError, EpisodeSpec

PAIRS = [(f"image{k}", class_id) for k in range(9) for class_id in (1, 2, 3) if (k + class_id) % 3 or k < 4]


def make(**changes: object) -> EpisodeSampler:
    arguments = {"shots": 2, "seed": 0, "length": 50, "order": "list", "repeat_supports": False} | changes
    return EpisodeSampler(PAIRS, **arguments)  # type: ignore[arg-type]


samplers = st.builds(
    make,
    shots=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    order=st.sampled_from(["list", "random"]),
    repeat_supports=st.booleans(),
)


@given(samplers, st.integers(0, 49))
def test_query_is_never_its_own_support(sampler: EpisodeSampler, n: int) -> None:
    spec = sampler[n]
    assert spec.query_id not in spec.support_ids
    assert len(spec.support_ids) == sampler.shots
    assert all((image_id, spec.class_id) in PAIRS for image_id in (spec.query_id, *spec.support_ids))


@given(st.integers(0, 2**40), st.permutations(range(50)), st.sampled_from(["list", "random"]))
def test_spec_depends_on_seed_and_number_alone(seed: int, order_of_access: list[int], order: str) -> None:
    sampler = make(seed=seed, order=order)
    shuffled = {n: sampler[n] for n in order_of_access}
    np.random.seed(len(shuffled))  # noqa: NPY002  the global state must not matter
    longer = make(seed=seed, order=order, length=1000)
    assert [shuffled[n] for n in range(50)] == list(longer[:50])


@given(st.integers(0, 1000))
def test_supports_are_distinct_unless_they_may_repeat(seed: int) -> None:
    assert all(len(set(spec.support_ids)) == 4 for spec in make(seed=seed, shots=4)[:10])


def test_supports_repeat_where_allowed() -> None:
    repeating = make(shots=4, repeat_supports=True)
    assert any(len(set(spec.support_ids)) < 4 for spec in repeating)


def test_list_order_is_the_list_modulo_its_length() -> None:
    sampler = make(length=3 * len(PAIRS))
    assert [(spec.query_id, spec.class_id) for spec in sampler] == PAIRS * 3


def test_random_order_takes_each_pair_once_per_pass() -> None:
    size = len(PAIRS)
    sampler = make(order="random", length=3 * size)
    passes = [[(s.query_id, s.class_id) for s in sampler[k * size : (k + 1) * size]] for k in range(3)]
    assert all(sorted(one) == sorted(PAIRS) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_supports_are_uniform_over_the_other_images() -> None:
    # 3000 draws from 5 or more others: a fair count stays within five standard deviations.
    pairs = [(f"image{k}", 1) for k in range(6)]
    sampler = EpisodeSampler(pairs, shots=1, seed=4, length=3000, order="list", repeat_supports=False)
    counts = Counter(spec.support_ids[0] for spec in sampler)
    assert all(abs(counts[image] - 500) < 5 * np.sqrt(500) for image, _ in pairs)


def test_seeds_differ_between_episodes_and_runs() -> None:
    seeds = [spec.seed for seed in (0, 1) for spec in make(seed=seed)]
    assert len(set(seeds)) == 100


def test_sequence_manners() -> None:
    sampler = make()
    assert len(sampler) == 50
    assert sampler[-1] == sampler[49]
    assert sampler[10:13] == (sampler[10], sampler[11], sampler[12])
    with pytest.raises(IndexError, match="episode 50 of 50"):
        sampler[50]


def test_far_episodes_cost_nothing() -> None:
    assert make(length=10**9, order="random")[10**9 - 1].shots == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"length": 0}, "number of episodes must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative"),
        ({"order": "sorted"}, "order of queries must be 'list' or 'random', got 'sorted'"),
        (
            {"shots": 9},
            r"class 1 has 7 image\(s\), but 9-shot episodes need at least 10 \(supports are distinct",
        ),
    ],
)
def test_bad_arguments(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(**changes)


def test_lists_too_short() -> None:
    with pytest.raises(DataError, match=r"no .image, class. pairs to draw from"):
        EpisodeSampler([], shots=1, seed=0, length=1, order="list", repeat_supports=True)
    with pytest.raises(DataError, match=r"class 4 has 1 image\(s\), but 5-shot episodes need at least 2"):
        EpisodeSampler([("a", 4)], shots=5, seed=0, length=1, order="list", repeat_supports=True)


@given(samplers, st.integers(0, 49))
def test_spec_survives_json(sampler: EpisodeSampler, n: int) -> None:
    assert spec_from_json(spec_to_json(sampler[n])) == sampler[n]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"class_id": 1, "support_ids": "ab", "query_id": "c", "seed": 0}'])
def test_json_that_is_no_spec(text: str) -> None:
    with pytest.raises(DataError, match="not an episode: expected JSON with class_id"):
        spec_from_json(text)


def test_json_with_query_among_supports() -> None:
    with pytest.raises(DataError, match="among its own supports"):
        spec_from_json('{"class_id": 1, "support_ids": ["a"], "query_id": "a", "seed": 0}')
    assert EpisodeSpec(class_id=1, support_ids=("a",), query_id="b", seed=0).shots == 1
