from __future__ import annotations

import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from episodes.augment import EpisodeTransform
from episodes.index import build_index
from episodes.loader import EpisodeDataset, episode_loader
from episodes.sampler import EpisodeSampler, drop_small_classes, repeated, shard, spec_from_json, spec_to_json
from episodes.sources import SyntheticSource
from episodes.types import DataError, EpisodeSpec

ORDERS = ("list", "random", "image", "class")

PAIRS = [(f"image{k}", class_id) for k in range(9) for class_id in (1, 2, 3) if (k + class_id) % 3 or k < 4]


def make(**changes: object) -> EpisodeSampler:
    arguments = {"shots": 2, "seed": 0, "length": 50, "order": "list", "repeat_supports": False} | changes
    return EpisodeSampler(PAIRS, **arguments)  # type: ignore[arg-type]


orders = st.sampled_from(ORDERS)
samplers = st.builds(
    make,
    shots=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    order=orders,
    repeat_supports=st.booleans(),
)


@given(samplers, st.integers(0, 49))
def test_query_is_never_its_own_support(sampler: EpisodeSampler, n: int) -> None:
    spec = sampler[n]
    assert spec.query_id not in spec.support_ids
    assert len(spec.support_ids) == sampler.shots
    assert all((image_id, spec.class_id) in PAIRS for image_id in (spec.query_id, *spec.support_ids))


@settings(deadline=None)
@given(st.integers(0, 2**40), st.permutations(range(50)), orders)
def test_spec_depends_on_seed_and_number_alone(seed: int, order_of_access: list[int], order: str) -> None:
    sampler = make(seed=seed, order=order)
    shuffled = {n: sampler[n] for n in order_of_access}
    np.random.seed(len(shuffled))  # noqa: NPY002  the global state must not matter
    longer = make(seed=seed, order=order, length=1000)
    assert [shuffled[n] for n in range(50)] == list(longer[:50])


@given(st.integers(0, 1000), orders)
def test_supports_are_distinct_unless_they_may_repeat(seed: int, order: str) -> None:
    assert all(len(set(spec.support_ids)) == 4 for spec in make(seed=seed, shots=4, order=order)[:10])


@pytest.mark.parametrize("order", ORDERS)
def test_supports_repeat_where_allowed(order: str) -> None:
    repeating = make(shots=4, repeat_supports=True, order=order)
    assert any(len(set(spec.support_ids)) < 4 for spec in repeating)


def test_list_and_random_draw_what_they_always_drew() -> None:
    # As drawn by the first version of the sampler: results of earlier runs must stay comparable.
    listed = make(seed=5, length=200, order="list", repeat_supports=False)
    assert [(s.class_id, s.support_ids, s.query_id, s.seed) for s in listed[30:32]] == LISTED
    shuffled = make(seed=5, length=200, order="random", repeat_supports=True)
    assert [(s.class_id, s.support_ids, s.query_id, s.seed) for s in shuffled[30:32]] == SHUFFLED


LISTED = [
    (3, ("image0", "image8"), "image2", 3699708011305006438),
    (1, ("image6", "image7"), "image3", 286249892519666512),
]
SHUFFLED = [
    (3, ("image0", "image8"), "image5", 3200368887173751741),
    (2, ("image6", "image6"), "image1", 4424628321965123480),
]


def test_list_order_is_the_list_modulo_its_length() -> None:
    sampler = make(length=3 * len(PAIRS))
    assert [(spec.query_id, spec.class_id) for spec in sampler] == PAIRS * 3


def test_random_order_takes_each_pair_once_per_pass() -> None:
    size = len(PAIRS)
    sampler = make(order="random", length=3 * size)
    passes = [[(s.query_id, s.class_id) for s in sampler[k * size : (k + 1) * size]] for k in range(3)]
    assert all(sorted(one) == sorted(PAIRS) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_image_draw_visits_the_images_in_order() -> None:
    images = list(dict.fromkeys(image_id for image_id, _ in PAIRS))
    sampler = make(order="image", length=3 * len(images))
    assert [spec.query_id for spec in sampler] == images * 3
    assert all((spec.query_id, spec.class_id) in PAIRS for spec in sampler)


def test_image_draw_is_uniform_over_the_classes_of_the_image() -> None:
    images = list(dict.fromkeys(image_id for image_id, _ in PAIRS))
    counts = Counter((spec.query_id, spec.class_id) for spec in make(order="image", length=300 * len(images)))
    for image_id in images:
        shown = [class_id for other, class_id in PAIRS if other == image_id]
        expected = 300 / len(shown)
        assert all(abs(counts[image_id, class_id] - expected) < 5 * np.sqrt(300) / 2 for class_id in shown)


def test_class_draw_is_uniform_over_classes_whatever_their_size() -> None:
    pairs = [("a0", 1), ("a1", 1), *((f"b{k}", 2) for k in range(20))]
    sampler = EpisodeSampler(pairs, shots=1, seed=1, length=4000, order="class", repeat_supports=True)
    queries = Counter((spec.class_id, spec.query_id) for spec in sampler)
    assert abs(sum(queries[1, f"a{k}"] for k in range(2)) - 2000) < 5 * np.sqrt(1000)
    assert all(abs(queries[1, f"a{k}"] - 1000) < 5 * np.sqrt(750) for k in range(2))
    assert all(abs(queries[2, f"b{k}"] - 100) < 5 * np.sqrt(100) for k in range(20))


@pytest.mark.parametrize("order", ORDERS)
def test_supports_are_uniform_over_the_other_images(order: str) -> None:
    # 3000 draws from 5 others: a fair count stays within five standard deviations.
    pairs = [(f"image{k}", 1) for k in range(6)]
    sampler = EpisodeSampler(pairs, shots=1, seed=4, length=3000, order=order, repeat_supports=False)  # type: ignore[arg-type]
    counts = Counter(spec.support_ids[0] for spec in sampler)
    assert all(abs(counts[image] - 500) < 5 * np.sqrt(500) for image, _ in pairs)


class TestQueriesBesideTheSupports:
    """Queries whose object the size filter leaves out as a support."""

    QUERIES = (*PAIRS, ("small", 1), ("image0", 3), ("small", 3))

    @settings(max_examples=40, deadline=None)
    @given(orders, st.integers(0, 2**40), st.integers(1, 4))
    def test_queries_come_from_their_list_and_supports_from_theirs(self, order: str, seed: int, shots: int) -> None:
        for spec in make(order=order, seed=seed, shots=shots, queries=self.QUERIES, length=40):
            assert (spec.query_id, spec.class_id) in self.QUERIES
            assert all((image_id, spec.class_id) in PAIRS for image_id in spec.support_ids)
            assert spec.query_id not in spec.support_ids

    @pytest.mark.parametrize("order", ORDERS)
    def test_a_query_that_is_no_support_is_supported_by_every_image(self, order: str) -> None:
        sampler = make(order=order, shots=1, length=500, queries=[("small", 1)])
        images = {image_id for image_id, class_id in PAIRS if class_id == 1}
        assert {spec.query_id for spec in sampler} == {"small"}
        assert {spec.support_ids[0] for spec in sampler} == images

    def test_the_pairs_themselves_change_nothing(self) -> None:
        for order in ORDERS:
            assert list(make(order=order, queries=PAIRS)) == list(make(order=order))

    def test_bad_queries(self) -> None:
        with pytest.raises(DataError, match=r"queries of classes \[9\] have no image to be supported by"):
            make(queries=[("a", 9)])
        with pytest.raises(DataError, match="pairs to draw from"):
            make(queries=[])


class TestDropSmallClasses:
    @given(
        st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 5)), max_size=30),
        st.integers(1, 4),
        st.booleans(),
    )
    def test_what_is_left_can_be_drawn_from(self, pairs: list[tuple[str, int]], shots: int, repeat: bool) -> None:
        kept, dropped = drop_small_classes(pairs, shots=shots, repeat_supports=repeat)
        assert kept == [pair for pair in pairs if pair[1] not in dropped]
        for class_id in {class_id for _, class_id in pairs}:
            images = {image_id for image_id, other in pairs if other == class_id}
            assert (class_id in dropped) == (len(images) < (2 if repeat else shots + 1))
        assert list(dropped) == sorted(dropped)
        if kept:
            EpisodeSampler(kept, shots=shots, seed=0, length=1, order="list", repeat_supports=repeat)


class TestRepeated:
    @pytest.mark.parametrize("order", ORDERS)
    def test_seeds_follow_one_another(self, order: str) -> None:
        whole = repeated(make(seed=7, order=order), 3)
        assert len(whole) == 150
        assert list(whole) == [spec for seed in (7, 8, 9) for spec in make(seed=seed, order=order)]
        assert whole[-1] == make(seed=9, order=order)[49]
        assert whole[49:51] == (make(seed=7, order=order)[49], make(seed=8, order=order)[0])

    def test_the_sampler_itself_is_left_alone(self) -> None:
        sampler = make(order="random")
        before = list(sampler)
        list(repeated(sampler, 2))
        assert (sampler.seed, list(sampler)) == (0, before)

    def test_bad_number(self) -> None:
        with pytest.raises(DataError, match="number of repeats must be at least 1, got 0"):
            repeated(make(), 0)


class TestShard:
    @settings(max_examples=40, deadline=None)
    @given(orders, st.integers(1, 70), st.integers(0, 100))
    def test_all_ranks_together_have_each_episode_once(self, order: str, ranks: int, seed: int) -> None:
        whole = make(order=order, seed=seed)
        specs = list(whole)
        parts = [shard(whole, rank, ranks) for rank in range(ranks)]
        assert [list(part) for part in parts] == [specs[rank::ranks] for rank in range(ranks)]
        assert sum(map(len, parts)) == len(whole)

    def test_of_repeated_episodes(self) -> None:
        whole = repeated(make(), 2)
        assert [shard(whole, n % 3, 3)[n // 3] for n in range(100)] == list(whole)

    @pytest.mark.parametrize(("rank", "ranks"), [(0, 0), (2, 2), (-1, 2)])
    def test_bad_ranks(self, rank: int, ranks: int) -> None:
        with pytest.raises(DataError, match=rf"rank must be in 0\.\.ranks - 1 .* got rank {rank} of {ranks}"):
            shard(make(), rank, ranks)

    def test_sequence_manners(self) -> None:
        part = shard(make(), 1, 4)
        assert part[-1] == make()[49]
        assert part[2:4] == (make()[9], make()[13])
        with pytest.raises(IndexError, match="episode 13 of 13"):
            part[13]
        assert list(pickle.loads(pickle.dumps(part))) == list(part)


class TestLoadedEpisodes:
    """Episode n is the same for any number of workers, of ranks, and after a resumption."""

    SOURCE = SyntheticSource(base_classes=3, novel_classes=2, images_per_class=3, size=48)

    def loaded(self, order: str, *, workers: int = 0, start: int = 0, rank: int = 0, ranks: int = 1) -> list[Any]:
        pairs = build_index(self.SOURCE, "train").pairs(self.SOURCE.base_class_ids)
        sampler = EpisodeSampler(pairs, shots=1, seed=2, length=4, order=order, repeat_supports=False)  # type: ignore[arg-type]
        standard = EpisodeTransform("standard", 32)
        specs = shard(repeated(sampler, 2), rank, ranks)
        loader = episode_loader(
            EpisodeDataset(self.SOURCE, specs, standard, standard), batch_size=1, workers=workers, start=start
        )
        return [
            (batch.specs[0], batch.query_images.numpy().tobytes(), batch.support_masks.numpy().tobytes())
            for batch in loader
        ]

    @pytest.mark.parametrize("workers", [1, 2])
    def test_workers(self, workers: int) -> None:
        assert self.loaded("image", workers=workers) == self.loaded("image")

    @pytest.mark.parametrize("order", ORDERS)
    def test_ranks_and_resumption(self, order: str) -> None:
        whole = self.loaded(order)
        assert len(whole) == 8
        assert self.loaded(order, start=5) == whole[5:]
        assert [self.loaded(order, rank=rank, ranks=3) for rank in range(3)] == [whole[rank::3] for rank in range(3)]
        assert self.loaded(order, rank=1, ranks=3, start=1) == whole[1::3][1:]


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


@pytest.mark.parametrize("order", ORDERS)
def test_far_episodes_cost_nothing(order: str) -> None:
    assert make(length=10**9, order=order)[10**9 - 1].shots == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"length": 0}, "number of episodes must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative"),
        ({"order": "sorted"}, "order of queries must be one of list, random, image, class; got 'sorted'"),
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
