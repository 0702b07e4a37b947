"""Episodes as features: batching never changes one, and the cached ones equal the live ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from episodes.annotations import derive_annotation
from episodes.augment import EpisodeTransform
from episodes.index import ClassIndex
from episodes.loader import EpisodeDataset, episode_loader, support_kinds
from episodes.sampler import EpisodeSampler
from episodes.sources import SyntheticSource
from episodes.types import IGNORE, OUTSIDE, SUPPORT_KINDS, DataError, EpisodeSpec, SupportKind, UInt8Array
from fewshot_seg.backbones import Backbone
from fewshot_seg.completion import SupportCompletion
from fewshot_seg.feature_episodes import CachedEpisodes, FeatureBatch, FeatureEpisodes, LiveEpisodes
from fewshot_seg.features import FeatureStore, MaskStore
from fewshot_seg.segmenter import FewShotSegmenter, training_free

LENGTH, SHOTS = 7, 2


@pytest.fixture(scope="module")
def specs(tiny_index: ClassIndex) -> EpisodeSampler:
    return EpisodeSampler(
        tiny_index.pairs((1, 2, 3)), shots=SHOTS, seed=4, length=LENGTH, order="random", repeat_supports=False
    )


@pytest.fixture(scope="module")
def plain(tiny_store: FeatureStore, tiny_masks: MaskStore, specs: EpisodeSampler) -> CachedEpisodes:
    return CachedEpisodes(tiny_store, tiny_masks, specs)


@pytest.fixture(scope="module")
def mirrored(tiny_store: FeatureStore, tiny_masks: MaskStore, specs: EpisodeSampler) -> CachedEpisodes:
    return CachedEpisodes(tiny_store, tiny_masks, specs, mirror=True)


@pytest.fixture(scope="module")
def marked(tiny_store: FeatureStore, tiny_masks: MaskStore, specs: EpisodeSampler) -> CachedEpisodes:
    """Supports of all kinds, mixed; mirrored."""
    return CachedEpisodes(tiny_store, tiny_masks, specs, mirror=True, supports=SUPPORT_KINDS)


def tensors(batch: FeatureBatch) -> tuple[Tensor, ...]:
    """All tensors with episodes in front."""
    count = len(batch.specs)
    supports = [level.reshape(count, -1, *level.shape[1:]) for level in batch.support_levels]
    marks = (batch.support_masks, batch.support_dense, batch.support_truth)
    return (*supports, *marks, *batch.query_levels, batch.query_masks)


def assert_batching_does_not_matter(episodes: FeatureEpisodes, batch_size: int, start: int) -> None:
    single = list(episodes.batches(1))[start:]
    batches = list(episodes.batches(batch_size, start=start))
    assert [spec for batch in batches for spec in batch.specs] == [batch.specs[0] for batch in single]
    assert all(len(batch.specs) == batch_size for batch in batches[:-1])
    if single:
        together = [torch.cat(parts) for parts in zip(*map(tensors, batches), strict=True)]
        expected = [torch.cat(parts) for parts in zip(*map(tensors, single), strict=True)]
        assert all(torch.equal(left, right) for left, right in zip(together, expected, strict=True))


class TestCachedEpisodes:
    def test_shapes_and_types(self, plain: CachedEpisodes, tiny_backbone: Backbone) -> None:
        first, *_, last = plain.batches(3)
        assert len(plain) == LENGTH
        assert [tuple(level.shape) for level in first.support_levels] == [
            (3 * SHOTS, channels, side, side) for channels, side in zip(tiny_backbone.channels, (4, 2), strict=True)
        ]
        assert first.support_masks.shape == (3, SHOTS, 64, 64)
        assert first.query_masks.shape == (3, 64, 64)
        assert first.support_masks.dtype == first.query_masks.dtype == torch.uint8
        assert first.query_levels[0].dtype == torch.float32
        assert len(last.specs) == LENGTH % 3

    @settings(max_examples=15, deadline=None)
    @given(batch_size=st.integers(1, LENGTH + 2), start=st.integers(0, LENGTH))
    def test_batching_does_not_matter(
        self, plain: CachedEpisodes, mirrored: CachedEpisodes, marked: CachedEpisodes, batch_size: int, start: int
    ) -> None:
        assert_batching_does_not_matter(plain, batch_size, start)
        assert_batching_does_not_matter(mirrored, batch_size, start)
        assert_batching_does_not_matter(marked, batch_size, start)

    def test_values_are_those_of_the_stores(
        self, plain: CachedEpisodes, specs: EpisodeSampler, tiny_store: FeatureStore, tiny_source: SyntheticSource
    ) -> None:
        for batch, spec in zip(plain.batches(1), specs, strict=True):
            assert batch.class_ids == (spec.class_id,)
            for level, expected in zip(batch.query_levels, tiny_store.get([spec.query_id]), strict=True):
                assert torch.equal(level, expected)
            assert torch.equal(batch.query_masks[0], torch.from_numpy(tiny_source.mask(spec.query_id, spec.class_id)))
            for shot, image_id in enumerate(spec.support_ids):
                for level, expected in zip(batch.support_levels, tiny_store.get([image_id]), strict=True):
                    assert torch.equal(level[shot], expected[0])
                assert torch.equal(
                    batch.support_masks[0, shot], torch.from_numpy(tiny_source.mask(image_id, spec.class_id))
                )

    def test_mirrors_photo_and_mask_together_about_half_of_the_time(
        self, plain: CachedEpisodes, mirrored: CachedEpisodes
    ) -> None:
        flips = []
        for before, after in zip(plain.batches(1), mirrored.batches(1), strict=True):
            photos = [
                ((before.query_levels, before.query_masks), (after.query_levels, after.query_masks)),
                *(
                    (
                        (tuple(level[[k]] for level in before.support_levels), before.support_masks[:, k]),
                        (tuple(level[[k]] for level in after.support_levels), after.support_masks[:, k]),
                    )
                    for k in range(SHOTS)
                ),
            ]
            for (levels, mask), (new_levels, new_mask) in photos:
                flipped = not torch.equal(mask, new_mask)
                flips.append(flipped)
                assert torch.equal(new_mask, mask.flip(2) if flipped else mask)
                for level, new_level in zip(levels, new_levels, strict=True):
                    assert torch.equal(new_level, level.flip(3) if flipped else level)
        assert len(flips) == LENGTH * (1 + SHOTS)
        assert 0.25 < sum(flips) / len(flips) < 0.75

    def test_the_episodes_seed_decides_the_mirroring(self, tiny_store: FeatureStore, tiny_masks: MaskStore) -> None:
        spec = EpisodeSpec(class_id=1, support_ids=("train-001-0000",), query_id="train-001-0001", seed=0)
        variants = [dataclasses.replace(spec, seed=seed) for seed in (*range(8), *range(8))]
        batch = next(CachedEpisodes(tiny_store, tiny_masks, variants, mirror=True).batches(16))
        for tensor in tensors(batch):
            assert torch.equal(tensor[:8], tensor[8:])
        assert len({mask.numpy().tobytes() for mask in batch.query_masks}) == 2
        pairs = zip(batch.query_masks, batch.support_masks, strict=True)
        looks = {(query.numpy().tobytes(), support.numpy().tobytes()) for query, support in pairs}
        assert len(looks) > 2  # support and query are not mirrored in step

    def test_mirroring_leaves_the_store_alone(self, mirrored: CachedEpisodes, plain: CachedEpisodes) -> None:
        before = tensors(next(plain.batches(LENGTH)))
        list(mirrored.batches(3))
        after = tensors(next(plain.batches(LENGTH)))
        assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))

    @pytest.mark.parametrize(
        ("batch_size", "start", "message"),
        [
            (0, 0, "batch size must be at least 1, got 0"),
            (1, LENGTH + 1, rf"first episode must be in 0\.\.{LENGTH}, got {LENGTH + 1}"),
            (1, -1, rf"first episode must be in 0\.\.{LENGTH}, got -1"),
        ],
    )
    def test_refuses(self, plain: CachedEpisodes, batch_size: int, start: int, message: str) -> None:
        with pytest.raises(DataError, match=message):
            next(plain.batches(batch_size, start=start))


class TestWeakSupports:
    def test_masks_alone_are_the_default(self, plain: CachedEpisodes) -> None:
        for batch in plain.batches(3):
            assert batch.support_dense.dtype == torch.bool
            assert batch.support_dense.shape == batch.support_masks.shape[:2]
            assert batch.support_dense.all()
            assert torch.equal(batch.support_truth, batch.support_masks)

    @pytest.mark.parametrize("kind", SUPPORT_KINDS)
    def test_of_one_kind(
        self, tiny_store: FeatureStore, tiny_masks: MaskStore, specs: EpisodeSampler, plain: CachedEpisodes, kind: Any
    ) -> None:
        episodes = CachedEpisodes(tiny_store, tiny_masks, specs, supports=(kind,))
        for batch, masks in zip(episodes.batches(3), plain.batches(3), strict=True):
            assert batch.support_dense.tolist() == [[kind == "mask"] * SHOTS] * len(batch.specs)
            assert torch.equal(batch.support_truth, masks.support_masks)
            for row, truth in zip(batch.support_masks, batch.support_truth, strict=True):
                for known, mask in zip(row, truth, strict=True):
                    assert torch.equal(known, torch.from_numpy(derive_annotation(mask.numpy(), kind)))
            for name in ("query_masks", "query_levels", "support_levels"):
                assert all(map(torch.equal, getattr(batch, name), getattr(masks, name)))

    def test_of_several_kinds_each_support_gets_one_by_the_episodes_seed(
        self, tiny_store: FeatureStore, tiny_masks: MaskStore, specs: EpisodeSampler
    ) -> None:
        episodes = CachedEpisodes(tiny_store, tiny_masks, specs, supports=SUPPORT_KINDS)
        drawn = []
        for batch, spec in zip(episodes.batches(1), specs, strict=True):
            kinds = support_kinds(spec, SUPPORT_KINDS)
            drawn += kinds
            assert batch.support_dense.tolist() == [[kind == "mask" for kind in kinds]]
            pairs = zip(batch.support_masks[0], batch.support_truth[0], kinds, strict=True)
            for known, mask, kind in pairs:
                assert torch.equal(known, torch.from_numpy(derive_annotation(mask.numpy(), kind)))
        assert len(set(drawn)) > 2
        reordered = CachedEpisodes(tiny_store, tiny_masks, list(specs)[::-1], supports=SUPPORT_KINDS)
        for one, other in zip(episodes.batches(1), list(reordered.batches(1))[::-1], strict=True):
            assert all(map(torch.equal, tensors(one), tensors(other)))  # whatever episodes lie beside

    def test_mirrors_mark_and_truth_alike(
        self, marked: CachedEpisodes, tiny_store: FeatureStore, tiny_masks: MaskStore, specs: EpisodeSampler
    ) -> None:
        still = CachedEpisodes(tiny_store, tiny_masks, specs, supports=SUPPORT_KINDS)
        flips = []
        for before, after in zip(still.batches(1), marked.batches(1), strict=True):
            assert torch.equal(after.support_dense, before.support_dense)
            for k in range(SHOTS):
                flipped = not torch.equal(after.support_truth[0, k], before.support_truth[0, k])
                flips.append(flipped)
                for name in ("support_truth", "support_masks"):
                    one, other = getattr(before, name)[0, k], getattr(after, name)[0, k]
                    assert torch.equal(other, one.flip(1) if flipped else one)
                level, moved = before.support_levels[0][k], after.support_levels[0][k]
                assert torch.equal(moved, level.flip(2) if flipped else level)
        assert 0 < sum(flips) < len(flips)

    def test_live_ones_are_marked_as_the_cached(
        self, tiny_backbone: Backbone, tiny_source: SyntheticSource, specs: EpisodeSampler, marked: CachedEpisodes
    ) -> None:
        transform = EpisodeTransform("none", 64)
        dataset = EpisodeDataset(tiny_source, specs, transform, transform, supports=SUPPORT_KINDS)
        loaded = episode_loader(dataset, batch_size=3)
        live = LiveEpisodes(tiny_backbone, dataset).batches(3)
        for batch, expected, cached in zip(live, loaded, marked.batches(3), strict=True):
            for name in ("support_masks", "support_dense", "support_truth"):
                assert torch.equal(getattr(batch, name), getattr(expected, name))
            assert torch.equal(batch.support_dense, cached.support_dense)
            # the same kinds, mirrored or not: as much of every photo is known
            known = [(one.support_masks == 255).sum((2, 3)) for one in (batch, cached)]
            assert torch.equal(*known)

    def test_no_kind(self, tiny_store: FeatureStore, tiny_masks: MaskStore, specs: EpisodeSampler) -> None:
        with pytest.raises(DataError, match="supports are marked by one or more of mask, box"):
            CachedEpisodes(tiny_store, tiny_masks, specs, supports=())


@pytest.fixture(scope="module")
def dataset(tiny_source: SyntheticSource, specs: EpisodeSampler) -> EpisodeDataset:
    transform = EpisodeTransform("none", 64)
    return EpisodeDataset(tiny_source, specs, transform, transform)


class TestLiveEpisodes:
    def test_equals_the_backbone_on_the_loaders_images(self, tiny_backbone: Backbone, dataset: EpisodeDataset) -> None:
        episodes = LiveEpisodes(tiny_backbone, dataset)
        assert len(episodes) == LENGTH
        loaded = episode_loader(dataset, batch_size=3, start=2)
        for found, batch in zip(episodes.batches(3, start=2), loaded, strict=True):
            assert found.specs == batch.specs
            assert torch.equal(found.support_masks, batch.support_masks)
            assert torch.equal(found.query_masks, batch.query_masks)
            for level, expected in zip(found.query_levels, tiny_backbone(batch.query_images), strict=True):
                assert torch.equal(level, expected)
            supports = tiny_backbone(batch.support_images.flatten(0, 1))
            for level, expected in zip(found.support_levels, supports, strict=True):
                assert torch.equal(level, expected)

    def test_agrees_with_the_cache_up_to_half_precision(
        self, tiny_backbone: Backbone, dataset: EpisodeDataset, plain: CachedEpisodes
    ) -> None:
        for live, cached in zip(LiveEpisodes(tiny_backbone, dataset).batches(3), plain.batches(3), strict=True):
            assert live.specs == cached.specs
            for left, right in zip(tensors(live), tensors(cached), strict=True):
                scale = 1e-3 * right.float().abs().max().item()
                torch.testing.assert_close(left, right, rtol=2e-3, atol=scale if right.is_floating_point() else 0)


class WideSource(SyntheticSource):
    """Photos twice as wide as high: padded, the lower half of a square is no photo."""

    def image(self, image_id: str) -> UInt8Array:
        return super().image(image_id).repeat(2, axis=1)

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        return super().mask(image_id, class_id).repeat(2, axis=1)


class TestPaddedPhotos:
    """From source to support: what lies beside a weak support is neither object nor background, nor open."""

    @pytest.fixture(params=[False, True], ids=["estimate", "completion"])
    def segmenter(self, request: pytest.FixtureRequest, tiny_backbone: Backbone) -> FewShotSegmenter:
        if not request.param:
            return training_free(tiny_backbone).eval()
        completion, generator = (
            SupportCompletion(feature_channels=sum(tiny_backbone.channels), width=8),
            torch.Generator().manual_seed(3),
        )
        with torch.no_grad():
            for parameter in completion.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return training_free(tiny_backbone, completion=completion).eval()

    def encoded(self, segmenter: FewShotSegmenter, batch: FeatureBatch) -> tuple[Tensor, Tensor]:
        """What is object or background, and what is open: per cell, (B, K, 4, 4)."""
        support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks, batch.support_dense)
        shape = (*batch.support_dense.shape, 4, 4)
        return (support.foreground + support.background).reshape(shape), support.open.reshape(shape)

    @pytest.mark.parametrize("kind", SUPPORT_KINDS)
    @pytest.mark.parametrize("mirror", [False, True])
    def test_cached(
        self,
        segmenter: FewShotSegmenter,
        tiny_backbone: Backbone,
        specs: EpisodeSampler,
        kind: SupportKind,
        mirror: bool,
    ) -> None:
        source = WideSource(base_classes=3, novel_classes=2, images_per_class=6, size=64)
        store = FeatureStore(tiny_backbone, source, size=64, directory=None, fit="pad")
        masks = MaskStore(source, size=64, fit="pad")
        batch = next(CachedEpisodes(store, masks, list(specs)[:2], mirror=mirror, supports=(kind,)).batches(2))
        beside = IGNORE if kind == "mask" else OUTSIDE
        assert (batch.support_masks[..., 32:, :] == beside).all()
        assert (batch.support_masks[..., :32, :] != OUTSIDE).all()
        for whole in (batch.support_truth, batch.query_masks):
            assert (whole[..., 32:, :] == IGNORE).all()
            assert (whole[..., :32, :] <= 1).all()
        covered, still_open = self.encoded(segmenter, batch)
        torch.testing.assert_close(covered[:, :, :2], torch.ones(2, SHOTS, 2, 4))
        assert not covered[:, :, 2:].any()
        assert not still_open[:, :, 2:].any()
        assert bool(still_open.any()) == (kind != "mask")

    @pytest.mark.parametrize("kind", ["box", "label"])
    def test_live(
        self, segmenter: FewShotSegmenter, tiny_backbone: Backbone, specs: EpisodeSampler, kind: SupportKind
    ) -> None:
        source = WideSource(base_classes=3, novel_classes=2, images_per_class=6, size=64)
        transform = EpisodeTransform("pfenet", 64, "pad")
        dataset = EpisodeDataset(source, list(specs)[:3], transform, transform, supports=(kind,))
        batch = next(LiveEpisodes(tiny_backbone, dataset).batches(3))
        photo = batch.support_truth != IGNORE  # of this source nothing is ignored
        assert 0.3 < photo.float().mean() < 0.6
        covered, still_open = self.encoded(segmenter, batch)
        expected = torch.nn.functional.avg_pool2d(photo.float(), 16)
        torch.testing.assert_close(covered, expected)
        assert (still_open <= expected + 1e-6).all()
        assert still_open.any()


def test_to_moves_every_tensor(plain: CachedEpisodes) -> None:
    batch = next(plain.batches(2))
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}
    assert moved.specs == batch.specs
    assert batch.query_masks.device.type == "cpu"
