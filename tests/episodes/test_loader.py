from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from episodes.annotations import derive_annotation
from episodes.augment import EpisodeTransform
from episodes.index import build_index
from episodes.loader import EpisodeDataset, episode_loader, support_kinds
from episodes.sampler import EpisodeSampler
from episodes.sources import SyntheticSource
from episodes.types import (
    IGNORE,
    OUTSIDE,
    SUPPORT_KINDS,
    DataError,
    EpisodeBatch,
    EpisodeSpec,
    SupportKind,
    UInt8Array,
)

SOURCE = SyntheticSource(base_classes=4, novel_classes=2, images_per_class=4, size=48)


def make_dataset(shots: int = 2, length: int = 7, supports: Sequence[SupportKind] = ("mask",)) -> EpisodeDataset:
    pairs = build_index(SOURCE, "train").pairs(SOURCE.base_class_ids)
    sampler = EpisodeSampler(pairs, shots=shots, seed=1, length=length, order="random", repeat_supports=False)
    standard = EpisodeTransform("standard", 32)
    return EpisodeDataset(SOURCE, sampler, standard, standard, supports=supports)


def same(one: EpisodeBatch, two: EpisodeBatch) -> bool:
    fields = [field.name for field in dataclasses.fields(EpisodeBatch) if field.name != "specs"]
    return one.specs == two.specs and all(torch.equal(getattr(one, f), getattr(two, f)) for f in fields)


def test_batch_shapes_and_types() -> None:
    batches = list(episode_loader(make_dataset(), batch_size=3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    batch = batches[0]
    assert batch.support_images.shape == (3, 2, 3, 32, 32)
    assert batch.support_masks.shape == (3, 2, 32, 32)
    assert batch.query_images.shape == (3, 3, 32, 32)
    assert batch.query_masks.shape == (3, 32, 32)
    assert batch.support_images.dtype == batch.query_images.dtype == torch.float32
    assert batch.support_masks.dtype == batch.query_masks.dtype == torch.uint8
    assert batch.support_truth.shape == batch.support_masks.shape
    assert batch.support_truth.dtype == torch.uint8
    assert batch.support_dense.shape == (3, 2)
    assert batch.support_dense.dtype == torch.bool
    assert batch.class_ids.dtype == torch.int64
    assert batch.class_ids.tolist() == [spec.class_id for spec in batch.specs]


@pytest.mark.parametrize("workers", [1, 2])
def test_episodes_do_not_depend_on_workers(workers: int) -> None:
    alone = list(episode_loader(make_dataset(), batch_size=2))
    torch.manual_seed(workers)
    together = list(episode_loader(make_dataset(), batch_size=2, workers=workers))
    assert len(alone) == len(together) == 4
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_a_later_start_continues_the_same_episodes() -> None:
    whole = list(episode_loader(make_dataset(), batch_size=2))
    rest = list(episode_loader(make_dataset(), batch_size=2, start=4))
    assert all(same(a, b) for a, b in zip(whole[2:], rest, strict=True))
    assert list(episode_loader(make_dataset(), batch_size=2, start=7)) == []


def test_episode_is_what_the_source_shows() -> None:
    plain = EpisodeTransform("none", 48)
    sampler = EpisodeSampler(
        [("train-001-0000", 1), ("train-001-0001", 1)],
        shots=1,
        seed=0,
        length=1,
        order="list",
        repeat_supports=True,
    )
    batch = EpisodeDataset(SOURCE, sampler, plain, plain)[0]
    query = torch.from_numpy(SOURCE.image("train-001-0000").copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(batch.query_images[0], query)
    support_mask = torch.from_numpy(SOURCE.mask("train-001-0001", 1).copy())
    assert torch.equal(batch.support_masks[0, 0], support_mask)


def test_query_and_each_support_have_their_own_augmentation() -> None:
    # One source image behind all three: only their seeds can make them differ.
    class Same(SyntheticSource):
        def image(self, image_id: str) -> UInt8Array:  # noqa: ARG002
            return super().image("train-001-0000")

    source = Same(base_classes=4, novel_classes=2, images_per_class=4, size=48)
    pairs = [(f"train-001-000{k}", 1) for k in range(3)]
    sampler = EpisodeSampler(pairs, shots=2, seed=0, length=1, order="list", repeat_supports=False)
    standard = EpisodeTransform("standard", 32)
    batch = EpisodeDataset(source, sampler, standard, standard)[0]
    images = [batch.query_images[0], *batch.support_images[0]]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    list(episode_loader(make_dataset(), batch_size=4))
    assert torch.equal(before, torch.get_rng_state())


def test_bad_arguments() -> None:
    dataset = make_dataset()
    with pytest.raises(DataError, match="batch size must be at least 1, got 0"):
        episode_loader(dataset, batch_size=0)
    with pytest.raises(DataError, match="workers must not be negative"):
        episode_loader(dataset, batch_size=1, workers=-1)
    with pytest.raises(DataError, match=r"first episode must be in 0\.\.7, got 8"):
        episode_loader(dataset, batch_size=1, start=8)
    with pytest.raises(DataError, match="must have one size, got 32 and 64"):
        EpisodeDataset(SOURCE, [], EpisodeTransform("none", 32), EpisodeTransform("none", 64))


def spec_of(seed: int, shots: int) -> EpisodeSpec:
    return EpisodeSpec(class_id=1, support_ids=tuple(f"s{k}" for k in range(shots)), query_id="q", seed=seed)


@pytest.mark.parametrize("kind", SUPPORT_KINDS)
def test_one_kind_marks_every_support(kind: SupportKind) -> None:
    assert support_kinds(spec_of(7, 3), (kind,)) == (kind, kind, kind)


def test_of_several_kinds_the_seed_draws_one_for_each_support() -> None:
    offered: tuple[SupportKind, ...] = ("mask", "box", "point")
    drawn = [support_kinds(spec_of(seed, 5), offered) for seed in range(300)]
    assert drawn == [support_kinds(spec_of(seed, 5), offered) for seed in range(300)]
    assert all(len(kinds) == 5 for kinds in drawn)
    counts = Counter(kind for kinds in drawn for kind in kinds)
    assert set(counts) == set(offered)
    assert all(400 < count < 600 for count in counts.values())  # 500 each; the deviation is 18
    assert any(len(set(kinds)) > 1 for kinds in drawn)  # within an episode, too


def test_first_supports_are_marked_alike_for_any_number_of_shots() -> None:
    for seed in range(20):
        assert support_kinds(spec_of(seed, 5), SUPPORT_KINDS)[:2] == support_kinds(spec_of(seed, 2), SUPPORT_KINDS)


@pytest.mark.parametrize(("kinds", "came"), [((), "none was named"), (("mask", "blob"), "got 'blob'")])
def test_supports_must_be_marked_somehow(kinds: tuple[SupportKind, ...], came: str) -> None:
    expected = f"marked by one or more of mask, box, scribble, point, label; {came}"
    with pytest.raises(DataError, match=expected):
        support_kinds(spec_of(0, 1), kinds)
    with pytest.raises(DataError, match=expected):
        make_dataset(supports=kinds)


@pytest.mark.parametrize("kind", SUPPORT_KINDS)
def test_marks_are_derived_from_the_transformed_mask(kind: SupportKind) -> None:
    for marked, plain in zip(make_dataset(supports=(kind,)), make_dataset(), strict=True):
        assert marked.support_dense.tolist() == [[kind == "mask"] * 2]
        assert torch.equal(marked.support_truth, plain.support_masks)
        for known, mask in zip(marked.support_masks[0], plain.support_masks[0], strict=True):
            expected = torch.from_numpy(derive_annotation(mask.numpy(), kind))
            assert torch.equal(known, expected)
        for field in ("support_images", "query_images", "query_masks", "class_ids"):
            assert torch.equal(getattr(marked, field), getattr(plain, field))  # only the marks differ


def test_mixed_supports_are_marked_as_drawn_and_do_not_depend_on_workers() -> None:
    batches = list(episode_loader(make_dataset(shots=3, supports=SUPPORT_KINDS), batch_size=4))
    for batch in batches:
        kinds = [support_kinds(spec, SUPPORT_KINDS) for spec in batch.specs]
        assert batch.support_dense.tolist() == [[kind == "mask" for kind in one] for one in kinds]
        for row, one in enumerate(kinds):
            for shot, kind in enumerate(one):
                expected = derive_annotation(batch.support_truth[row, shot].numpy(), kind)
                assert torch.equal(batch.support_masks[row, shot], torch.from_numpy(expected))
    assert not all(batch.support_dense.all() for batch in batches)
    together = list(episode_loader(make_dataset(shots=3, supports=SUPPORT_KINDS), batch_size=4, workers=1))
    assert all(same(a, b) for a, b in zip(batches, together, strict=True))


@pytest.mark.parametrize("kind", [kind for kind in SUPPORT_KINDS if kind != "mask"])
def test_nothing_is_known_of_a_support_whose_object_is_lost(kind: SupportKind) -> None:
    class Lost(SyntheticSource):
        def mask(self, image_id: str, class_id: int) -> UInt8Array:
            return super().mask(image_id, class_id) * 0

    source = Lost(base_classes=4, novel_classes=2, images_per_class=4, size=48)
    plain = EpisodeTransform("none", 48)
    spec = EpisodeSpec(class_id=1, support_ids=("train-001-0001",), query_id="train-001-0000", seed=0)
    batch = EpisodeDataset(source, [spec], plain, plain, supports=(kind,))[0]
    assert (batch.support_masks == 255).all()
    assert (batch.support_truth == 0).all()


class WideSource(SyntheticSource):
    """Photos twice as wide as high: padded, the lower half of a square is no photo."""

    def image(self, image_id: str) -> UInt8Array:
        return super().image(image_id).repeat(2, axis=1)

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        return super().mask(image_id, class_id).repeat(2, axis=1)


class FramedSource(WideSource):
    """The upper quarter of what is not the object is ignored."""

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        mask = super().mask(image_id, class_id).copy()
        mask[:12][mask[:12] == 0] = IGNORE
        return mask


def padded_dataset(source: type[SyntheticSource], preset: str, kind: SupportKind) -> EpisodeDataset:
    opened = source(base_classes=4, novel_classes=2, images_per_class=4, size=48)
    pairs = build_index(opened, "train").pairs(opened.base_class_ids)
    specs = EpisodeSampler(pairs, shots=2, seed=1, length=6, order="random", repeat_supports=False)
    transform = EpisodeTransform(preset, 48, "pad")
    return EpisodeDataset(opened, specs, transform, transform, supports=(kind,))


@pytest.mark.parametrize("preset", ["none", "pfenet", "strong"])
@pytest.mark.parametrize("kind", SUPPORT_KINDS)
def test_padding_is_marked_as_outside_and_ignored_pixels_stay_open(preset: str, kind: SupportKind) -> None:
    ignored_inside = False
    framed, masks = (padded_dataset(FramedSource, preset, one) for one in (kind, "mask"))
    for weak, mask, whole in zip(framed, masks, padded_dataset(WideSource, preset, "mask"), strict=True):
        filled = whole.support_truth == IGNORE  # there, nothing is ignored in the photo
        assert filled.any()
        assert torch.equal(weak.support_images, mask.support_images)
        assert torch.equal(weak.support_truth, mask.support_masks)
        assert torch.equal(weak.query_masks, mask.query_masks)
        assert (weak.support_truth[filled] == IGNORE).all()
        assert not (weak.support_truth == OUTSIDE).any()
        ignored = (weak.support_truth == IGNORE) & ~filled
        ignored_inside |= bool(ignored.any())
        if kind == "mask":
            assert torch.equal(weak.support_masks, weak.support_truth)
            continue
        assert torch.equal(weak.support_masks == OUTSIDE, filled)
        assert (weak.support_masks[ignored] == IGNORE).all()
        for known, truth, beside in zip(weak.support_masks[0], weak.support_truth[0], filled[0], strict=True):
            derived = torch.from_numpy(derive_annotation(truth.numpy(), kind))
            assert torch.equal(known[~beside], derived[~beside])
    assert ignored_inside
    if preset == "none":
        assert (weak.support_masks[..., 24:, :] == (IGNORE if kind == "mask" else OUTSIDE)).all()


def test_of_a_padded_support_whose_object_is_lost_the_photo_is_open() -> None:
    class Lost(WideSource):
        def mask(self, image_id: str, class_id: int) -> UInt8Array:
            return np.zeros_like(super().mask(image_id, class_id))

    batch = padded_dataset(Lost, "none", "box")[0]
    assert (batch.support_masks[..., :24, :] == IGNORE).all()
    assert (batch.support_masks[..., 24:, :] == OUTSIDE).all()
