"""Photos encoded once and shared: the same logits, whatever is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from episodes.index import ClassIndex
from episodes.protocols import ShotRule
from episodes.sampler import EpisodeSampler
from episodes.sources import SyntheticSource
from episodes.types import DataError, SupportKind
from fewshot_seg.backbones import Backbone
from fewshot_seg.encoded_photos import EncodedPhotos
from fewshot_seg.episode_logits import shot_logits
from fewshot_seg.feature_episodes import CachedEpisodes, FeatureBatch
from fewshot_seg.features import FeatureStore, MaskStore
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter

SIZE = 64
KINDS: tuple[SupportKind, ...] = ("mask", "box", "scribble", "point", "label")


def shaken(segmenter: FewShotSegmenter) -> FewShotSegmenter:
    """With random values where a new model has zeros."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in segmenter.trainable_parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        if segmenter.completion is not None and segmenter.completion.objects is not None:
            segmenter.completion.objects.weight.normal_(generator=generator)
    return segmenter.eval()


@pytest.fixture
def segmenter(tiny_backbone: Backbone) -> FewShotSegmenter:
    return shaken(build_segmenter(tiny_backbone, decoder_width=8, decoder_blocks=1))


def episodes_of(
    index: ClassIndex,
    store: FeatureStore,
    masks: MaskStore,
    *,
    shots: int = 2,
    supports: Sequence[SupportKind] = ("mask",),
    mirror: bool = False,
) -> CachedEpisodes:
    specs = EpisodeSampler(
        index.pairs((1, 2, 3)), shots=shots, seed=3, length=10, order="random", repeat_supports=False
    )
    return CachedEpisodes(store, masks, specs, supports=supports, mirror=mirror)


Episodes = tuple[ClassIndex, FeatureStore, MaskStore]


@pytest.fixture
def parts(tiny_index: ClassIndex, tiny_store: FeatureStore, tiny_masks: MaskStore) -> Episodes:
    return tiny_index, tiny_store, tiny_masks


def logits(
    segmenter: FewShotSegmenter,
    batches: Sequence[FeatureBatch],
    encoded: EncodedPhotos | None,
    rule: ShotRule = "pooled",
) -> Tensor:
    decoders = {"decoder": segmenter.decoder}
    found = [shot_logits(segmenter, decoders, batch, (SIZE, SIZE), rule=rule, encoded=encoded) for batch in batches]
    return torch.cat([one.heads["decoder"] for one in found])


@pytest.mark.parametrize("rule", ["pooled", "vote", "reweighted"])
@pytest.mark.parametrize("supports", [("mask",), KINDS])
@pytest.mark.parametrize("model", ["plain", "appearance", "completion", "no prior", "base learner", "all"])
def test_equals_encoding_every_episode_anew(
    tiny_backbone: Backbone, parts: Episodes, model: str, supports: tuple[SupportKind, ...], rule: ShotRule
) -> None:
    built = {
        "plain": {},
        "appearance": {"appearance": 4},
        "completion": {"completion": True},
        "no prior": {"prior": "none", "appearance": 4},
        "base learner": {"base_classes": 3},
        "all": {"base_classes": 3, "completion": True},
    }
    segmenter = shaken(build_segmenter(tiny_backbone, decoder_width=8, decoder_blocks=1, **built[model]))  # type: ignore[arg-type]
    batches = list(episodes_of(*parts, supports=supports).batches(4))
    expected = logits(segmenter, batches, None, rule)
    found = logits(segmenter, batches, EncodedPhotos(segmenter), rule)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01


def priors(
    segmenter: FewShotSegmenter, batch: FeatureBatch, encoded: EncodedPhotos | None, alone: int | None
) -> Tensor:
    if encoded is not None:
        return segmenter.priors_of(encoded.supports(batch, alone), encoded.queries(batch))
    which = slice(None) if alone is None else slice(alone, alone + 1)
    shots = batch.support_masks.shape[1]
    levels = [level.reshape(-1, shots, *level.shape[1:])[:, which].flatten(0, 1) for level in batch.support_levels[:]]
    support = segmenter.encode_support_levels(levels, batch.support_masks[:, which], batch.support_dense[:, which])
    return segmenter.priors_of(support, segmenter.photo_maps(batch.query_levels))


class TestWithBaseLearner:
    @pytest.fixture
    def learned(self, tiny_backbone: Backbone) -> FewShotSegmenter:
        return shaken(build_segmenter(tiny_backbone, base_classes=3, completion=True))

    @pytest.mark.parametrize(("shots", "alone"), [(1, None), (2, None), (2, 0), (2, 1)])
    @pytest.mark.parametrize("supports", [("mask",), ("box", "label")])
    @torch.no_grad()
    def test_the_decoder_reads_the_same(
        self,
        learned: FewShotSegmenter,
        parts: Episodes,
        supports: tuple[SupportKind, ...],
        shots: int,
        alone: int | None,
    ) -> None:
        encoded = EncodedPhotos(learned)
        for batch in episodes_of(*parts, shots=shots, supports=supports).batches(4):
            expected = priors(learned, batch, None, alone)
            assert expected.shape[1] == 11
            torch.testing.assert_close(priors(learned, batch, encoded, alone), expected, rtol=1e-4, atol=1e-4)
            margins_and_evidence = expected[:, [0, 6, 7, 8, 9, 10]]
            assert (margins_and_evidence.flatten(2).std(dim=2) > 1e-4).all()

    @torch.no_grad()
    def test_enough_support_cells_change_nothing(self, learned: FewShotSegmenter, parts: Episodes) -> None:
        batch = next(episodes_of(*parts, shots=2).batches(10))
        expected = priors(learned, batch, EncodedPhotos(learned), None)
        found = priors(learned, batch, EncodedPhotos(learned, support_cells=32), None)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_fewer_support_cells_come_close(self, learned: FewShotSegmenter, parts: Episodes) -> None:
        """Cells and frozen cells are condensed together: the same groups of the same weight."""
        batch = next(episodes_of(*parts, shots=2).batches(10))
        encoded = EncodedPhotos(learned, support_cells=20)
        support, exact = encoded.supports(batch), EncodedPhotos(learned).supports(batch)
        assert support.cells.shape[1] == support.frozen_cells.shape[1] <= 20 < exact.cells.shape[1]
        torch.testing.assert_close(support.foreground.sum(dim=1), exact.foreground.sum(dim=1))
        torch.testing.assert_close(support.profile, exact.profile)
        held = support.foreground + support.background > 0
        lengths = support.frozen_cells.norm(dim=2)[held]
        assert 0.8 < lengths.min() <= lengths.max() < 1.2
        found, expected = (priors(learned, batch, one, None) for one in (encoded, EncodedPhotos(learned)))
        for channel in (0, 6):  # both soft margins
            difference = (found[:, channel] - expected[:, channel]).abs().mean()
            assert 0 < difference < 0.5 * expected[:, channel].std()
        torch.testing.assert_close(found[:, 7:], expected[:, 7:])  # nothing of these is compared cell by cell

    def test_frozen_cells_are_counted(self, learned: FewShotSegmenter, parts: Episodes) -> None:
        batch = next(episodes_of(*parts, shots=1).batches(1))
        bytes_of = []
        for limit in (None, 6):
            encoded = EncodedPhotos(learned, support_cells=limit)
            encoded.queries(batch)
            before = encoded._bytes
            support = encoded.supports(batch)
            photo = encoded._photo(batch.stored, batch.specs[0].support_ids[0])  # type: ignore[arg-type]
            bytes_of.append(encoded._bytes - before - photo.nbytes)
        assert bytes_of[1] >= 2 * support.cells.nbytes > 0  # condensed cells are a copy of both kinds
        assert bytes_of[0] < 2 * support.cells.nbytes


def test_every_photo_is_read_and_encoded_once(
    segmenter: FewShotSegmenter, parts: Episodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    episodes, encoded, read = episodes_of(*parts), EncodedPhotos(segmenter), list[str]()
    stored = parts[1].get

    def counted(image_ids: Sequence[str]) -> tuple[Tensor, ...]:
        read.extend(image_ids)
        return stored(image_ids)

    monkeypatch.setattr(parts[1], "get", counted)
    for size in (3, 4):
        logits(segmenter, list(episodes.batches(size)), encoded)
    shown = {
        name for batch in episodes.batches(10) for spec in batch.specs for name in (*spec.support_ids, spec.query_id)
    }
    assert sorted(read) == sorted(shown)


def test_neither_the_batch_nor_what_was_dropped_changes_a_bit(segmenter: FewShotSegmenter, parts: Episodes) -> None:
    episodes = episodes_of(*parts)
    roomy, tight = EncodedPhotos(segmenter), EncodedPhotos(segmenter, byte_budget=1)
    together = next(episodes.batches(10))
    whole, queries = roomy.supports(together), roomy.queries(together)
    for row, batch in enumerate(episodes.batches(1)):
        one = tight.supports(batch)
        assert torch.equal(one.cells[0], whole.cells[row])
        assert torch.equal(one.foreground_embedding[0], whole.foreground_embedding[row])
        assert torch.equal(tight.queries(batch).cells[0], queries.cells[row])


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_support_cells_are_a_budget_for_all_shots_together(
    segmenter: FewShotSegmenter, parts: Episodes, shots: int
) -> None:
    batches = list(episodes_of(*parts, shots=shots).batches(5))
    condensed = EncodedPhotos(segmenter, support_cells=10)
    for batch in batches:
        support = condensed.supports(batch)
        exact = EncodedPhotos(segmenter).supports(batch)
        assert support.cells.shape[1] <= max(10, 2 * shots) < exact.cells.shape[1]
        torch.testing.assert_close(support.foreground.sum(dim=1), exact.foreground.sum(dim=1))
        torch.testing.assert_close(support.foreground_embedding, exact.foreground_embedding)
    exact_logits, found = logits(segmenter, batches, None), logits(segmenter, batches, condensed)
    assert 0 < (found - exact_logits).abs().mean() < 2 * exact_logits.std()


def test_supports_that_leave_something_open_are_not_condensed(segmenter: FewShotSegmenter, parts: Episodes) -> None:
    batch = next(episodes_of(*parts, supports=("label",)).batches(4))
    whole = EncodedPhotos(segmenter).supports(batch)
    assert torch.equal(EncodedPhotos(segmenter, support_cells=4).supports(batch).cells, whole.cells)


def test_what_it_cannot_serve(tiny_backbone: Backbone, segmenter: FewShotSegmenter, parts: Episodes) -> None:
    batch = next(episodes_of(*parts).batches(2))
    assert EncodedPhotos(segmenter).serves(batch)
    assert not EncodedPhotos(segmenter).serves(next(episodes_of(*parts, mirror=True).batches(2)))
    assert not EncodedPhotos(segmenter).serves(replace(batch, stored=None))
    rival = build_segmenter(tiny_backbone, prior="pfenet", decoder_width=8, decoder_blocks=1)
    assert not EncodedPhotos(rival).serves(batch)


def test_a_support_without_the_object(
    segmenter: FewShotSegmenter, tiny_store: FeatureStore, tiny_source: SyntheticSource, tiny_index: ClassIndex
) -> None:
    class Empty(MaskStore):
        def get(
            self, image_ids: Sequence[str], class_ids: Sequence[int], kinds: Sequence[SupportKind] | None = None
        ) -> Tensor:
            return torch.zeros_like(super().get(image_ids, class_ids, kinds))

    batch = next(episodes_of(tiny_index, tiny_store, Empty(tiny_source, size=SIZE)).batches(1))
    with pytest.raises(DataError, match="no foreground"):
        EncodedPhotos(segmenter).supports(batch)


def test_too_few_cells(segmenter: FewShotSegmenter) -> None:
    with pytest.raises(DataError, match="at least 2 cells, one of each side; got 1"):
        EncodedPhotos(segmenter, support_cells=1)
