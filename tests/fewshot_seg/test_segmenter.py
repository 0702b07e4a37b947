"""What every assembled model keeps, whatever its prior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.annotations import derive_annotation
from episodes.types import IGNORE, OUTSIDE, SUPPORT_KINDS, DataError, SupportKind
from fewshot_seg.attention import ATTENTION_KINDS, AttentionKind, gradient_attention, scale_map, score_direction
from fewshot_seg.backbones import Backbone
from fewshot_seg.base_learner import BaseLearner, class_profile, photo_evidence
from fewshot_seg.completion import SupportCompletion, estimate_object, open_part
from fewshot_seg.decoder import ContextDecoder, MaskDecoder, PriorReadout
from fewshot_seg.priors import PRIOR_CHANNELS, TEMPERATURE, pfenet_prior, similarity_priors, soft_margin
from fewshot_seg.segmenter import (
    EVIDENCE_MAPS,
    PRIOR_KINDS,
    FewShotSegmenter,
    PhotoMaps,
    PriorKind,
    SupportEncoding,
    build_segmenter,
    prior_channels,
    training_free,
)
from fewshot_seg.similarity import SimilarityNetwork, cell_weights, join_levels, masked_average_pool

SIZE = 64


def photos(*shape: int, seed: int = 0, size: int = SIZE) -> Tensor:
    """Coarse colour patches, so that the cells of a random backbone differ."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape).prod())
    patches = F.interpolate(torch.rand(count, 3, 8, 8, generator=generator), (size, size))
    return patches.reshape(*shape, 3, size, size)


def outlines(*shape: int, seed: int = 0, size: int = SIZE) -> Tensor:
    """Rectangles with an ignored border on one side."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(*shape, size, size, dtype=torch.uint8)
    for mask in masks.view(-1, size, size):
        top, left = torch.randint(0, size // 2, (2,), generator=generator).tolist()
        mask[top : top + size // 3, left : left + size // 2] = 1
        mask[top + size // 3 : top + size // 3 + 3, left : left + size // 2] = IGNORE
    return masks


def marked(batch: int, kinds: Sequence[SupportKind], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Annotations (B, K, H, W), one kind per shot, and which of them are masks (B, K)."""
    masks = outlines(batch, len(kinds), seed=seed)
    for supports in masks:
        for mask, kind in zip(supports, kinds, strict=True):
            mask.copy_(torch.from_numpy(derive_annotation(mask.numpy(), kind)))
    return masks, torch.tensor([[kind == "mask" for kind in kinds]] * batch)


def disturbed(segmenter: FewShotSegmenter) -> FewShotSegmenter:
    """As after training: no parameter is zero or the identity any more."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in segmenter.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        if segmenter.completion is not None and segmenter.completion.objects is not None:
            segmenter.completion.objects.weight.normal_(generator=generator)
    return segmenter.eval()


def assert_same(left: Any, right: Any, *, atol: float = 1e-4) -> None:
    for name in left.__slots__:
        one, other = getattr(left, name), getattr(right, name)
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=atol, msg=name)


def assert_equal(left: Any, right: Any) -> None:
    for name in left.__slots__:
        assert torch.equal(torch.as_tensor(getattr(left, name)), torch.as_tensor(getattr(right, name))), name


@pytest.fixture(scope="class")
def segmenter(request: pytest.FixtureRequest, tiny_backbone: Backbone) -> FewShotSegmenter:
    """The model that the contract's subclass names."""
    options = request.cls.options
    built = build_segmenter(tiny_backbone, similarity_rank=4, decoder_width=8, decoder_blocks=1, **options)
    built.guided = False  # edges of photos are another matter
    return disturbed(built)


class SegmenterContract:
    """What every model keeps; subclasses name a prior."""

    options: dict[str, Any]

    def test_shapes_and_ranges(self, segmenter: FewShotSegmenter) -> None:
        support = segmenter.encode_support(photos(2, 3), outlines(2, 3))
        width = segmenter.similarity.width
        assert support.cells.shape == (2, 3 * 16, width)
        assert support.foreground.shape == support.background.shape == (2, 3 * 16)
        assert support.prototype.shape == support.foreground_embedding.shape == (2, width)
        assert support.frozen_foreground.shape == support.frozen.shape[:2] + support.frozen.shape[3:]
        prediction = segmenter.segment(support, photos(2, seed=1))
        assert prediction.logits.shape == prediction.attention.shape == prediction.masks.shape == (2, SIZE, SIZE)
        maps = prior_channels(
            segmenter.prior,
            completion=segmenter.completion is not None,
            base_learner=segmenter.base_learner is not None,
        )
        assert prediction.priors.shape == (2, maps, 4, 4)
        assert prediction.logits.dtype == torch.float32
        assert prediction.masks.dtype == torch.bool
        assert prediction.logits.isfinite().all()
        assert prediction.attention.amin() >= 0
        assert prediction.attention.amax() <= 1
        assert not prediction.attention.requires_grad

    def test_queries_may_have_another_size(self, segmenter: FewShotSegmenter) -> None:
        support = segmenter.encode_support(photos(1, 1), outlines(1, 1))
        prediction = segmenter.segment(support, photos(1, size=96)[:, :, :80])
        assert prediction.logits.shape == prediction.attention.shape == (1, 80, 96)
        assert prediction.priors.shape[2:] == (5, 6)

    def test_masks_are_cut_at_the_threshold(self, segmenter: FewShotSegmenter) -> None:
        prediction = segmenter.segment(segmenter.encode_support(photos(1, 1), outlines(1, 1)), photos(1, seed=1))
        cut = prediction.logits.median().item()
        try:
            segmenter.threshold = cut
            again = segmenter.segment(segmenter.encode_support(photos(1, 1), outlines(1, 1)), photos(1, seed=1))
        finally:
            segmenter.threshold = 0.0
        assert again.threshold == cut
        assert torch.equal(again.masks, prediction.logits > cut)
        assert 0.3 < again.masks.float().mean() < 0.7

    def test_one_support_serves_many_queries(self, segmenter: FewShotSegmenter) -> None:
        images, masks, queries = photos(1, 2), outlines(1, 2), photos(3, seed=1)
        shared = segmenter.segment(segmenter.encode_support(images, masks), queries)
        repeated = segmenter.encode_support(images.expand(3, -1, -1, -1, -1), masks.expand(3, -1, -1, -1))
        assert_same(shared, segmenter.segment(repeated, queries))

    def test_a_batch_equals_its_episodes_one_by_one(self, segmenter: FewShotSegmenter) -> None:
        images, masks, queries = photos(3, 2), outlines(3, 2), photos(3, seed=1)
        together = segmenter.segment(segmenter.encode_support(images, masks), queries)
        for n in range(3):
            alone = segmenter.segment(segmenter.encode_support(images[n : n + 1], masks[n : n + 1]), queries[n : n + 1])
            torch.testing.assert_close(alone.logits[0], together.logits[n], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(alone.attention[0], together.attention[n], rtol=1e-2, atol=1e-3)

    def test_order_of_the_shots_does_not_matter(self, segmenter: FewShotSegmenter) -> None:
        images, masks, queries = photos(1, 3), outlines(1, 3), photos(1, seed=1)
        order = [2, 0, 1]
        forward = segmenter.segment(segmenter.encode_support(images, masks), queries)
        permuted = segmenter.segment(segmenter.encode_support(images[:, order], masks[:, order]), queries)
        assert_same(permuted, forward)

    def test_the_same_support_twice_is_one_shot(self, segmenter: FewShotSegmenter) -> None:
        images, masks, queries = photos(1, 1), outlines(1, 1), photos(1, seed=1)
        once = segmenter.segment(segmenter.encode_support(images, masks), queries)
        support = segmenter.encode_support(images.repeat(1, 2, 1, 1, 1), masks.repeat(1, 2, 1, 1))
        assert_same(segmenter.segment(support, queries), once)

    def test_images_or_their_features(self, segmenter: FewShotSegmenter) -> None:
        images, masks, queries = photos(2, 2), outlines(2, 2), photos(2, seed=1)
        support = segmenter.encode_support(images, masks)
        levels = segmenter.backbone(images.flatten(0, 1))
        assert_same(support, segmenter.encode_support_levels(levels, masks), atol=0)
        assert_same(support, segmenter.encode_support_maps(segmenter.similarity(levels), levels, masks), atol=0)
        prediction = segmenter.segment(support, queries)
        levels = segmenter.backbone(queries)
        assert_same(prediction, segmenter.segment_levels(support, levels, (SIZE, SIZE)), atol=0)

    def test_gradients_reach_what_is_trained_and_not_the_backbone(self, segmenter: FewShotSegmenter) -> None:
        segmenter.zero_grad(set_to_none=True)
        prediction = segmenter.segment(segmenter.encode_support(photos(2, 1), outlines(2, 1)), photos(2, seed=1))
        torch.autograd.backward(prediction.logits.square().mean())
        assert all(parameter.grad is None for parameter in segmenter.backbone.parameters())
        silent = [name for name, p in segmenter.decoder.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == (["gain"] if segmenter.prior == "none" else [])  # the gain is that of the first prior
        reached = [p.grad is not None and bool(p.grad.any()) for p in segmenter.similarity.parameters()]
        assert reached == [segmenter.prior == "similarity"] * 2  # the other priors read frozen features
        trained = {id(parameter) for parameter in segmenter.trainable_parameters()}
        assert trained >= {id(p) for p in segmenter.parameters() if p.grad is not None}
        assert trained.isdisjoint({id(parameter) for parameter in segmenter.backbone.parameters()})

    def test_no_grad_gives_the_same(self, segmenter: FewShotSegmenter) -> None:
        support = segmenter.encode_support(photos(1, 1), outlines(1, 1))
        expected = segmenter.segment(support, photos(1, seed=1))
        with torch.inference_mode():
            support = segmenter.encode_support(photos(1, 1), outlines(1, 1))
            assert_same(segmenter.segment(support, photos(1, seed=1)), expected)

    def test_does_not_change_its_arguments(self, segmenter: FewShotSegmenter) -> None:
        images, masks, queries = photos(1, 1), outlines(1, 1), photos(1, seed=1)
        segmenter.segment(segmenter.encode_support(images, masks), queries)
        assert torch.equal(images, photos(1, 1))
        assert torch.equal(masks, outlines(1, 1))
        assert torch.equal(queries, photos(1, seed=1))

    def test_a_support_that_is_all_object(self, segmenter: FewShotSegmenter) -> None:
        support = segmenter.encode_support(photos(1, 1), torch.ones(1, 1, SIZE, SIZE, dtype=torch.uint8))
        prediction = segmenter.segment(support, photos(1, seed=1))
        assert prediction.logits.isfinite().all()
        assert prediction.attention.isfinite().all()

    def test_a_support_smaller_than_a_cell(self, segmenter: FewShotSegmenter) -> None:
        masks = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.uint8)
        masks[0, 0, 20, 20] = 1
        assert segmenter.segment(segmenter.encode_support(photos(1, 1), masks), photos(1)).logits.isfinite().all()

    @pytest.mark.parametrize(
        ("images", "masks"),
        [
            ((2, 3, SIZE, SIZE), (2, SIZE, SIZE)),
            ((1, 2, 3, SIZE, SIZE), (1, 1, SIZE, SIZE)),
            ((1, 1, 3, SIZE, SIZE), (1, 1, SIZE, SIZE // 2)),
            ((1, 1, 4, SIZE, SIZE), (1, 1, SIZE, SIZE)),
        ],
    )
    def test_refuses_supports_of_other_shapes(
        self, segmenter: FewShotSegmenter, images: tuple[int, ...], masks: tuple[int, ...]
    ) -> None:
        expected = r"expected support images \(B, K, 3, H, W\) and masks \(B, K, H, W\), got \(.*\) and \(.*\)"
        with pytest.raises(DataError, match=expected):
            segmenter.encode_support(torch.zeros(images), torch.ones(masks, dtype=torch.uint8))

    @pytest.mark.parametrize("shape", [(3, SIZE, SIZE), (1, 1, SIZE, SIZE)])
    def test_refuses_queries_of_other_shapes(self, segmenter: FewShotSegmenter, shape: tuple[int, ...]) -> None:
        support = segmenter.encode_support(photos(1, 1), outlines(1, 1))
        with pytest.raises(DataError, match=r"expected query images \(B, 3, H, W\), got \("):
            segmenter.segment(support, torch.zeros(shape))

    def test_refuses_an_episode_without_foreground(self, segmenter: FewShotSegmenter) -> None:
        masks = outlines(2, 2)
        masks[1] = torch.where(masks[1] == 1, 0, masks[1])
        with pytest.raises(DataError, match="a support mask has no foreground: expected at least one pixel"):
            segmenter.encode_support(photos(2, 2), masks)
        masks[1, 0, 5, 5] = 1  # one shot with the object is enough
        segmenter.encode_support(photos(2, 2), masks)

    def test_all_dense_is_the_default(self, segmenter: FewShotSegmenter) -> None:
        images, masks, queries = photos(2, 2), outlines(2, 2), photos(2, seed=1)
        plain = segmenter.encode_support(images, masks)
        dense = segmenter.encode_support(images, masks, torch.ones(2, 2, dtype=torch.bool))
        assert_equal(dense, plain)
        assert_equal(segmenter.segment(dense, queries), segmenter.segment(plain, queries))
        assert not plain.open.any()
        assert not plain.share.any()

    def test_weak_supports_of_every_kind(self, segmenter: FewShotSegmenter) -> None:
        images, queries = photos(2, len(SUPPORT_KINDS)), photos(2, seed=1)
        support = segmenter.encode_support(images, *marked(2, SUPPORT_KINDS))
        prediction = segmenter.segment(support, queries)
        assert prediction.logits.isfinite().all()
        assert prediction.priors.isfinite().all()
        assert prediction.attention.isfinite().all()
        for n in range(2):
            masks, dense = marked(2, SUPPORT_KINDS)
            alone = segmenter.encode_support(images[n : n + 1], masks[n : n + 1], dense[n : n + 1])
            one = segmenter.segment(alone, queries[n : n + 1])
            torch.testing.assert_close(one.logits[0], prediction.logits[n], rtol=1e-3, atol=1e-3)

    def test_a_label_alone_is_a_support(self, segmenter: FewShotSegmenter) -> None:
        masks, dense = marked(1, ("label",))
        assert (masks == IGNORE).all()
        support = segmenter.encode_support(photos(1, 1), masks, dense)
        assert torch.equal(support.open, torch.ones(1, 16))
        prediction = segmenter.segment(support, photos(1, seed=1))
        assert prediction.logits.isfinite().all()
        assert prediction.logits.std() > 0

    def test_refuses_another_number_of_queries(self, segmenter: FewShotSegmenter) -> None:
        support = segmenter.encode_support(photos(2, 1), outlines(2, 1))
        with pytest.raises(ValueError, match="2 encoded supports for 3 queries; expected 1 or 3"):
            segmenter.segment(support, photos(3))


class TestSimilarityPrior(SegmenterContract):
    options = {"prior": "similarity"}  # noqa: RUF012 - read only

    def test_priors_are_those_of_the_embedded_cells(self, segmenter: FewShotSegmenter) -> None:
        images, masks = photos(1, 2), outlines(1, 2)
        support = segmenter.encode_support(images, masks)
        supports = segmenter.similarity(segmenter.backbone(images[0]))
        foreground, background = cell_weights(masks[0], (4, 4))
        cells = torch.stack([supports[k, :, y, x] for k in range(2) for y in range(4) for x in range(4)])[None]
        torch.testing.assert_close(support.cells, cells)
        pooled = [
            F.normalize((cells[0] * weights.reshape(-1, 1)).sum(0, keepdim=True), dim=1)
            for weights in (foreground, background)
        ]
        torch.testing.assert_close(support.foreground_embedding, pooled[0])
        torch.testing.assert_close(support.background_embedding, pooled[1])
        maps = segmenter.similarity(segmenter.backbone(photos(1, seed=1)))
        expected = similarity_priors(maps, cells, foreground.reshape(1, -1), background.reshape(1, -1), *pooled)
        torch.testing.assert_close(segmenter.segment(support, photos(1, seed=1)).priors, expected)

    def test_prototype_is_of_frozen_features(self, segmenter: FewShotSegmenter) -> None:
        images, masks = photos(1, 1), outlines(1, 1)
        frozen = join_levels(segmenter.backbone(images[0]))
        expected = F.normalize(masked_average_pool(frozen, cell_weights(masks[0], (4, 4))[0]), dim=1)
        torch.testing.assert_close(segmenter.encode_support(images, masks).prototype, expected)

    @pytest.mark.parametrize("kind", ATTENTION_KINDS)
    def test_attention_is_the_gradient_of_the_score(self, segmenter: FewShotSegmenter, kind: AttentionKind) -> None:
        support = segmenter.encode_support(photos(2, 1), outlines(2, 1))
        second = support.foreground_embedding.roll(1, 0).detach()
        maps = segmenter.similarity(segmenter.backbone(photos(2, seed=1))).detach().requires_grad_()
        embedding = F.normalize(maps.mean(dim=(2, 3)), dim=1)
        negatives = [support.background_embedding.detach(), second]
        direction = score_direction(kind, embedding, support.foreground_embedding.detach(), negatives)
        (expected,) = gradient_attention((direction.detach() * embedding).sum(1), [maps])
        found = segmenter.attention_maps(support, maps, kind, second_negative=second)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)

    def test_the_attention_shown_is_scaled(self, segmenter: FewShotSegmenter) -> None:
        support = segmenter.encode_support(photos(1, 1), outlines(1, 1))
        levels = segmenter.backbone(photos(1, seed=1))
        expected = scale_map(segmenter.attention_maps(support, segmenter.similarity(levels)), (SIZE, SIZE))
        torch.testing.assert_close(segmenter.segment(support, photos(1, seed=1)).attention, expected)

    def test_quadruplet_needs_a_second_negative(self, segmenter: FewShotSegmenter) -> None:
        support = segmenter.encode_support(photos(1, 1), outlines(1, 1))
        maps = segmenter.similarity(segmenter.backbone(photos(1)))
        with pytest.raises(ValueError, match=r"'quadruplet' needs 2 negative\(s\), got 1"):
            segmenter.attention_maps(support, maps, "quadruplet")


class TestSimilarityPriorWithAppearance(SegmenterContract):
    options = {"prior": "similarity", "appearance": 4}  # noqa: RUF012 - read only


class TestPFENetPrior(SegmenterContract):
    options = {"prior": "pfenet"}  # noqa: RUF012 - read only

    def test_prior_is_pfenets_from_the_joined_frozen_levels(self, segmenter: FewShotSegmenter) -> None:
        images, masks = photos(1, 2), outlines(1, 2)
        support = segmenter.encode_support(images, masks)
        frozen, query = join_levels(segmenter.backbone(images[0])), join_levels(segmenter.backbone(photos(1, seed=1)))
        expected = pfenet_prior(query, frozen[None], cell_weights(masks[0], (4, 4))[0][None])[:, None]
        torch.testing.assert_close(segmenter.segment(support, photos(1, seed=1)).priors, expected)


class TestNoPrior(SegmenterContract):
    options = {"prior": "none", "appearance": 4}  # noqa: RUF012 - read only


class TestSimilarityPriorWithCompletion(SegmenterContract):
    options = {"prior": "similarity", "appearance": 4, "completion": True}  # noqa: RUF012 - read only

    def test_reads_the_objectness_of_the_query_beside_the_similarity(self, segmenter: FewShotSegmenter) -> None:
        support, queries = segmenter.encode_support(photos(2, 1), outlines(2, 1)), photos(2, seed=1)
        priors = segmenter.segment(support, queries).priors
        levels = segmenter.backbone(queries)
        maps, nothing = segmenter.similarity(levels), torch.zeros(2, 4, 4)
        assert segmenter.completion is not None
        expected = segmenter.completion(maps, join_levels(levels), nothing, nothing, 1 - nothing)
        assert torch.equal(priors[:, -1], expected)
        similarity = similarity_priors(
            maps,
            support.cells,
            support.foreground,
            support.background,
            support.foreground_embedding,
            support.background_embedding,
        )
        assert torch.equal(priors[:, :-1], similarity)

    def test_the_objectness_is_that_of_the_same_photo_as_labelled_support(self, segmenter: FewShotSegmenter) -> None:
        images = photos(2, 1)
        as_support = segmenter.encode_support(images, *marked(2, ("label",))).share.reshape(2, 4, 4)
        mask_support = segmenter.encode_support(photos(2, 1), outlines(2, 1))
        as_query = segmenter.segment(mask_support, images[:, 0]).priors[:, -1].sigmoid()
        torch.testing.assert_close(as_query, as_support, rtol=1e-4, atol=1e-5)

    def test_it_fills_in_weak_supports(self, segmenter: FewShotSegmenter) -> None:
        images, (masks, dense) = photos(1, 2), marked(1, ("box", "scribble"))
        support = segmenter.encode_support(images, masks, dense)
        levels = segmenter.backbone(images[0])
        parts = (*cell_weights(masks[0], (4, 4)), open_part(masks[0], (4, 4)))
        assert segmenter.completion is not None
        expected = segmenter.completion(segmenter.similarity(levels), join_levels(levels), *parts).sigmoid()
        torch.testing.assert_close(support.share.reshape(2, 4, 4), expected)

    @pytest.mark.parametrize("training", [False, True])
    def test_the_mask_loss_reaches_the_completion(self, segmenter: FewShotSegmenter, training: bool) -> None:
        segmenter.zero_grad(set_to_none=True)
        try:
            segmenter.train(training)
            support = segmenter.encode_support(photos(2, 1), *marked(2, ("box",)))
            logits = segmenter.segment(support, photos(2, seed=1)).logits
            torch.autograd.backward(logits.square().mean())
        finally:
            segmenter.eval()
        assert segmenter.completion is not None
        named = list(segmenter.completion.named_parameters())
        assert [name for name, p in named if p.grad is None or not p.grad.any()] == []

    def test_the_similarity_network_is_not_moved_by_what_was_filled_in(self, segmenter: FewShotSegmenter) -> None:
        segmenter.zero_grad(set_to_none=True)
        support = segmenter.encode_support(photos(2, 2), *marked(2, ("box", "label")))
        torch.autograd.backward(support.share.sum() + support.foreground.square().sum(), retain_graph=True)
        assert all(parameter.grad is None for parameter in segmenter.similarity.parameters())
        assert segmenter.completion is not None
        assert all(p.grad is not None and p.grad.any() for p in segmenter.completion.parameters())
        objectness = segmenter.segment(support, photos(2, seed=1)).priors[:, -1]
        torch.autograd.backward(objectness.square().sum())
        # zeros at most: the maps that the objectness is joined to do depend on the network
        assert not any(p.grad is not None and p.grad.any() for p in segmenter.similarity.parameters())


class TestPFENetPriorWithCompletion(SegmenterContract):
    options = {"prior": "pfenet", "completion": True}  # noqa: RUF012 - read only

    def test_reads_no_objectness(self, segmenter: FewShotSegmenter) -> None:
        support = segmenter.encode_support(photos(1, 1), *marked(1, ("box",)))
        assert segmenter.segment(support, photos(1, seed=1)).priors.shape[1] == 1


class TestNoPriorWithCompletion(SegmenterContract):
    options = {"prior": "none", "appearance": 4, "completion": True}  # noqa: RUF012 - read only


class BaseLearnerContract(SegmenterContract):
    """What a model with a base learner keeps beside."""

    def test_reads_evidence_beside_the_similarity(self, segmenter: FewShotSegmenter) -> None:
        images, masks, queries = photos(2, 2), outlines(2, 2), photos(2, seed=1)
        support = segmenter.encode_support(images, masks)
        priors, learner = segmenter.segment(support, queries).priors, segmenter.base_learner
        assert learner is not None
        plain = segmenter.similarity(segmenter.backbone(queries))
        sides = support.foreground, support.background
        pooled = support.foreground_embedding, support.background_embedding
        torch.testing.assert_close(priors[:, :6], similarity_priors(plain, support.cells, *sides, *pooled))
        frozen = join_levels(segmenter.backbone(images.flatten(0, 1)))
        of_supports = torch.stack([frozen[2 * n : 2 * n + 2].movedim(1, -1).flatten(0, 2) for n in range(2)])
        torch.testing.assert_close(support.frozen_cells, of_supports)
        seen = torch.stack([learner(frozen[2 * n : 2 * n + 2]).movedim(1, 0).flatten(1) for n in range(2)])
        torch.testing.assert_close(support.profile, class_profile(seen, support.foreground))
        own = join_levels(segmenter.backbone(queries))
        margin = soft_margin(own.flatten(2).transpose(1, 2), of_supports, *sides, temperature=TEMPERATURE)
        torch.testing.assert_close(priors[:, 6], margin.reshape(2, 4, 4), rtol=1e-3, atol=1e-4)
        evidence = photo_evidence(learner(own), support.profile, own)
        torch.testing.assert_close(priors[:, 7:10], evidence)
        assert priors.shape[1] == 10 + (segmenter.completion is not None)
        assert len(EVIDENCE_MAPS) == 4

    def test_probabilities_at_hand_are_used(self, segmenter: FewShotSegmenter) -> None:
        levels, masks = segmenter.backbone(photos(2)), outlines(1, 2)
        whole = segmenter.photo_maps(levels)
        bare = PhotoMaps(cells=whole.cells, frozen=whole.frozen)
        assert whole.base is not None
        expected = segmenter.encode_support_photos(bare, masks)
        assert_same(segmenter.encode_support_photos(whole, masks), expected, atol=1e-6)
        other = segmenter.encode_support_photos(replace(whole, base=whole.base.flip(1)), masks)
        assert not torch.allclose(other.profile, expected.profile)

    def test_gradients_reach_the_base_learner(self, segmenter: FewShotSegmenter) -> None:
        segmenter.zero_grad(set_to_none=True)
        prediction = segmenter.segment(segmenter.encode_support(photos(2, 1), outlines(2, 1)), photos(2, seed=1))
        torch.autograd.backward(prediction.logits.square().mean())
        assert segmenter.base_learner is not None
        assert all(p.grad is not None and bool(p.grad.any()) for p in segmenter.base_learner.parameters())

    def test_photo_maps_know_their_bytes(self, segmenter: FewShotSegmenter) -> None:
        maps = segmenter.photo_maps(segmenter.backbone(photos(3)))
        held = [one for one in (maps.cells, maps.frozen, maps.objectness, maps.base) if one is not None]
        assert maps.nbytes == 4 * sum(one.numel() for one in held)
        assert len(held) == 3 + (segmenter.completion is not None)

    def test_photo_maps_one_by_one(self, segmenter: FewShotSegmenter) -> None:
        levels = segmenter.backbone(photos(3))
        each = [segmenter.photo_maps([level[n : n + 1] for level in levels]).by_cells() for n in range(3)]
        assert_same(PhotoMaps.stack(each), segmenter.photo_maps(levels))


class TestBaseLearner(BaseLearnerContract):
    options = {"prior": "similarity", "base_classes": 3}  # noqa: RUF012 - read only


class TestBaseLearnerAndCompletion(BaseLearnerContract):
    options = {"prior": "similarity", "base_classes": 3, "completion": True}  # noqa: RUF012 - read only

    def test_objectness_comes_last(self, segmenter: FewShotSegmenter) -> None:
        """Training takes it from there."""
        support, queries = segmenter.encode_support(photos(2, 1), outlines(2, 1)), photos(2, seed=1)
        levels = segmenter.backbone(queries)
        expected = segmenter.objectness(segmenter.similarity(levels), join_levels(levels))
        assert torch.equal(segmenter.segment(support, queries).priors[:, -1], expected)

    def test_the_profile_is_that_of_what_was_filled_in(self, segmenter: FewShotSegmenter) -> None:
        images, (masks, dense) = photos(1, 2), marked(1, ("box", "label"))
        support = segmenter.encode_support(images, masks, dense)
        assert segmenter.base_learner is not None
        seen = segmenter.base_learner(join_levels(segmenter.backbone(images[0]))).movedim(1, 0).flatten(1)
        torch.testing.assert_close(support.profile, class_profile(seen[None], support.foreground))
        assert support.open.any()


WEAK_MIX: tuple[SupportKind, ...] = ("mask", "box", "scribble", "point", "label")


class TestWeakSupports:
    @pytest.fixture(params=[False, True], ids=["estimate", "completion"])
    def either(self, request: pytest.FixtureRequest, tiny_backbone: Backbone) -> FewShotSegmenter:
        return disturbed(build_segmenter(tiny_backbone, similarity_rank=4, decoder_width=8, completion=request.param))

    def test_one_of_which_all_is_known_is_a_mask(self, either: FewShotSegmenter) -> None:
        images, queries = photos(2, 2), photos(2, seed=1)
        masks = (outlines(2, 2) == 1).to(torch.uint8)  # nothing ignored
        mask = either.encode_support(images, masks)
        weak = either.encode_support(images, masks, torch.tensor([[False, True], [False, False]]))
        torch.testing.assert_close(weak.foreground, mask.foreground)
        torch.testing.assert_close(weak.background, mask.background)
        torch.testing.assert_close(weak.open, torch.zeros_like(weak.open), rtol=0, atol=1e-6)
        assert_same(either.segment(weak, queries), either.segment(mask, queries))

    def test_without_completion_they_are_filled_in_by_the_estimate(self, tiny_backbone: Backbone) -> None:
        segmenter = disturbed(build_segmenter(tiny_backbone, similarity_rank=4))
        images, (masks, dense) = photos(1, 5), marked(1, WEAK_MIX)
        support = segmenter.encode_support(images, masks, dense)
        parts = (*cell_weights(masks[0], (4, 4)), open_part(masks[0], (4, 4)))
        expected = estimate_object(segmenter.similarity(segmenter.backbone(images[0])), *parts).sigmoid()
        found = support.share.reshape(5, 4, 4)
        assert not found[0].any()  # the mask
        torch.testing.assert_close(found[1:], expected[1:])

    def test_every_cell_is_shared_out(self, either: FewShotSegmenter) -> None:
        masks, dense = marked(2, WEAK_MIX)
        support = either.encode_support(photos(2, 5), masks, dense)
        known = [side.reshape(2, 5, 16) for side in cell_weights(masks.flatten(0, 1), (4, 4))]
        foreground, background, still_open, share = (
            side.reshape(2, 5, 16) for side in (support.foreground, support.background, support.open, support.share)
        )
        torch.testing.assert_close(still_open[:, 1:], 1 - known[0][:, 1:] - known[1][:, 1:])
        torch.testing.assert_close(foreground, known[0] + still_open * share)
        torch.testing.assert_close(background, known[1] + still_open * (1 - share))
        torch.testing.assert_close((foreground + background)[:, 1:], torch.ones(2, 4, 16))
        assert torch.equal(foreground[:, 0], known[0][:, 0])  # masks stay what they are, ignored area in neither
        assert torch.equal(background[:, 0], known[1][:, 0])
        assert (foreground + background)[:, 0].min() < 1
        assert not still_open[:, 0].any()
        assert 0 <= share.amin() <= share.amax() <= 1

    def test_what_is_known_of_a_weak_support_stays(self, either: FewShotSegmenter) -> None:
        masks, dense = marked(2, ("box",))
        support = either.encode_support(photos(2, 1), masks, dense)
        outside = cell_weights(masks[:, 0], (4, 4))[1].reshape(2, 16) == 1
        assert outside.any()
        assert not support.foreground[outside].any()
        assert torch.equal(support.background[outside], torch.ones(int(outside.sum())))

    @pytest.mark.parametrize("kind", ["box", "scribble", "point", "label"])
    def test_what_lies_beside_the_photo_is_nothing(self, either: FewShotSegmenter, kind: SupportKind) -> None:
        masks, dense = marked(2, (kind,))
        masks[:, :, 40:] = OUTSIDE  # 40 rows of photo: half of the third row of cells, nothing of the fourth
        support = either.encode_support(photos(2, 1), masks, dense)
        foreground, background, still_open = (
            side.reshape(2, 4, 4) for side in (support.foreground, support.background, support.open)
        )
        covered = torch.tensor([1.0, 1.0, 0.5, 0.0])[:, None].expand(2, 4, 4)
        torch.testing.assert_close(foreground + background, covered)
        assert (still_open <= covered).all()
        assert still_open[:, :3].any()
        if kind == "label":
            assert torch.equal(still_open, covered)

    @pytest.mark.parametrize("kind", ["box", "label"])
    def test_the_query_is_not_compared_with_what_lies_beside_the_photo(
        self, either: FewShotSegmenter, kind: SupportKind
    ) -> None:
        """Cells of the padding weigh nothing, neither in the first look nor in the second, whatever they look like."""
        masks, dense = marked(1, (kind,))
        masks[:, :, 32:] = OUTSIDE
        query = photos(1, seed=1)
        support = either.encode_support(photos(1, 1), masks, dense)
        cells = support.cells.clone()
        cells[:, 8:] = F.normalize(cells[:, 8:].flip(2) + 1, dim=2)
        assert not torch.equal(cells, support.cells)
        before, after = (either.segment(one, query) for one in (support, replace(support, cells=cells)))
        torch.testing.assert_close(after.priors, before.priors, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-4)

    def test_a_weak_support_that_is_all_padding_is_refused(self, either: FewShotSegmenter) -> None:
        nothing = torch.full((1, 1, SIZE, SIZE), OUTSIDE, dtype=torch.uint8)
        with pytest.raises(DataError, match="a support mask has no foreground"):
            either.encode_support(photos(1, 1), nothing, torch.tensor([[False]]))

    def test_a_mask_in_the_same_batch_is_not_changed(self, either: FewShotSegmenter) -> None:
        """Nor by the second look, which the episode with the box gets."""
        images, queries, (boxes, _) = photos(2, 1), photos(2, seed=1), marked(2, ("box",))
        masks = torch.stack([outlines(2, 1)[0], boxes[1]])
        mixed = either.segment(either.encode_support(images, masks, torch.tensor([[True], [False]])), queries)
        alone = either.segment(either.encode_support(images[:1], masks[:1]), queries[:1])
        torch.testing.assert_close(mixed.priors[0], alone.priors[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mixed.logits[0], alone.logits[0], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("value", [0, IGNORE])
    def test_a_mask_without_foreground_is_refused_as_ever(self, either: FewShotSegmenter, value: int) -> None:
        masks = torch.full((2, 1, SIZE, SIZE), value, dtype=torch.uint8)
        masks[0, 0, 5, 5] = 1
        with pytest.raises(DataError, match="a support mask has no foreground"):
            either.encode_support(photos(2, 1), masks, torch.tensor([[False], [True]]))

    def test_a_weak_support_in_which_no_object_can_be_is_refused(self, either: FewShotSegmenter) -> None:
        nowhere = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.uint8)
        with pytest.raises(DataError, match="a support mask has no foreground"):
            either.encode_support(photos(1, 1), nowhere, torch.tensor([[False]]))

    @pytest.mark.parametrize(
        "dense", [torch.ones(2, 1, dtype=torch.uint8), torch.ones(2, dtype=torch.bool), torch.ones(1, 2).bool()]
    )
    def test_refuses_another_form_of_dense(self, either: FewShotSegmenter, dense: Tensor) -> None:
        expected = r"expected bool \(B, K\) = \(2, 1\) to say which supports are masks, got torch\.\w+ \("
        with pytest.raises(DataError, match=expected):
            either.encode_support(photos(2, 1), outlines(2, 1), dense)

    def test_prototypes_are_pooled_over_what_was_filled_in(self, either: FewShotSegmenter) -> None:
        images = photos(1, 2)
        support = either.encode_support(images, *marked(1, ("box", "label")))
        frozen = join_levels(either.backbone(images[0])).permute(0, 2, 3, 1).reshape(32, -1)
        expected = F.normalize((frozen * support.foreground[0, :, None]).sum(0), dim=0)
        torch.testing.assert_close(support.prototype[0], expected)

    @pytest.mark.parametrize("kind", ["box", "point", "label"])
    def test_training_free_needs_no_training_for_them(self, tiny_backbone: Backbone, kind: SupportKind) -> None:
        segmenter = training_free(tiny_backbone)
        images = photos(3, 1)
        support = segmenter.encode_support(images, *marked(3, (kind,)))
        assert 0 < support.share.mean() < 1
        assert segmenter.trainable_parameters() == []
        prediction = segmenter.segment(support, images[:, 0])
        priors = prediction.priors[:, 0].reshape(3, 16)
        likely = support.foreground > support.foreground.median()
        assert priors[likely].mean() > priors[~likely].mean()

    def test_pfenets_prior_leaves_out_cells_that_are_likely_background(self, tiny_backbone: Backbone) -> None:
        """It normalises cells after masking: every cell that weighs anything at all would count in full."""
        segmenter = build_segmenter(tiny_backbone, prior="pfenet").eval()
        images, (masks, dense) = photos(2, 2), marked(2, ("mask", "label"))
        support = segmenter.encode_support(images, masks, dense)
        label, mask = support.frozen_foreground[:, 1].reshape(2, 16), support.frozen_foreground[:, 0].reshape(2, 16)
        share = support.share.reshape(2, 2, 16)[:, 1]
        assert torch.equal(label > 0, share >= 0.5)
        assert (share >= 0.5).any()
        assert (share < 0.5).any()
        assert torch.equal(mask, support.foreground.reshape(2, 2, 16)[:, 0])
        levels = segmenter.backbone(photos(2, seed=1))
        chosen = torch.where(share < 0.5, 0.0, share).reshape(2, 4, 4)
        expected = pfenet_prior(join_levels(levels), support.frozen, torch.stack([mask.reshape(2, 4, 4), chosen], 1))
        found = segmenter.priors_of(support, segmenter.photo_maps(levels))
        torch.testing.assert_close(found[:, 0], expected)


class TestSecondLook:
    def look_again(self, segmenter: FewShotSegmenter, support: SupportEncoding, query: Tensor) -> Tensor:
        """Priors of one query by plain loops: cells of the support that are like what was found are the object."""
        maps = segmenter.similarity(segmenter.backbone(query))
        cells, own = support.cells[0], maps[0].flatten(1).T
        arguments = (support.foreground_embedding, support.background_embedding)
        first = similarity_priors(maps, support.cells, support.foreground, support.background, *arguments)
        found = first[0, 0].flatten().sigmoid()
        foreground, background = support.foreground[0].clone(), support.background[0].clone()
        for n, cell in enumerate(cells):
            kernel = ((own @ cell - 1) / 0.05).exp()
            likeness = (kernel @ found / found.sum()).log() - (kernel @ (1 - found) / (1 - found).sum()).log()
            share = support.share[0, n].clamp(1e-3, 1 - 1e-3)
            again = ((share / (1 - share)).log() + likeness).sigmoid()
            foreground[n] += support.open[0, n] * (again - support.share[0, n])
            background[n] -= support.open[0, n] * (again - support.share[0, n])
        pooled = [F.normalize((cells * side[:, None]).sum(0, keepdim=True), dim=1) for side in (foreground, background)]
        return similarity_priors(maps, support.cells, foreground[None], background[None], *pooled)

    @pytest.mark.parametrize("kinds", [("box",), ("label", "scribble"), ("mask", "point")])
    def test_equals_the_plain_loop(self, tiny_backbone: Backbone, kinds: tuple[SupportKind, ...]) -> None:
        segmenter, query = disturbed(build_segmenter(tiny_backbone, similarity_rank=4)), photos(1, seed=1)
        support = segmenter.encode_support(photos(1, len(kinds)), *marked(1, kinds))
        expected = self.look_again(segmenter, support, query)
        torch.testing.assert_close(segmenter.segment(support, query).priors, expected, rtol=1e-3, atol=1e-3)

    def test_is_taken_in_evaluation_and_of_open_parts_only(self, tiny_backbone: Backbone) -> None:
        segmenter = disturbed(build_segmenter(tiny_backbone, similarity_rank=4, dropout=0.0))
        levels = segmenter.backbone(photos(1, seed=1))
        for kind, looks_again in (("mask", False), ("box", True), ("label", True)):
            support = segmenter.encode_support(photos(1, 1), *marked(1, (kind,)))
            once = segmenter.train().priors_of(support, segmenter.photo_maps(levels))
            twice = segmenter.eval().priors_of(support, segmenter.photo_maps(levels))
            assert torch.equal(once, twice) != looks_again, kind

    def test_leaves_the_encoding_as_it_is(self, tiny_backbone: Backbone) -> None:
        segmenter = build_segmenter(tiny_backbone).eval()
        support = segmenter.encode_support(photos(1, 1), *marked(1, ("label",)))
        first = segmenter.segment(support, photos(2, seed=1))
        again = segmenter.encode_support(photos(1, 1), *marked(1, ("label",)))
        assert_equal(support, again)
        assert_equal(segmenter.segment(support, photos(2, seed=1)), first)


class TestExpand:
    def test_weak_supports_serve_many_queries(self, tiny_backbone: Backbone) -> None:
        segmenter = build_segmenter(tiny_backbone, completion=True).eval()
        images, (masks, dense), queries = photos(1, 2), marked(1, ("box", "label")), photos(3, seed=1)
        support = segmenter.encode_support(images, masks, dense)
        shared = support.expand(3)
        assert shared.open.shape == shared.share.shape == (3, 32)
        assert shared.share.data_ptr() == support.share.data_ptr()
        repeated = segmenter.encode_support(
            images.expand(3, -1, -1, -1, -1), masks.repeat(3, 1, 1, 1), dense.repeat(3, 1)
        )
        assert_same(segmenter.segment(support, queries), segmenter.segment(repeated, queries))

    def test_shares_memory(self, tiny_backbone: Backbone) -> None:
        support = build_segmenter(tiny_backbone).encode_support(photos(1, 2), outlines(1, 2))
        shared = support.expand(4)
        assert len(shared.cells) == len(shared.frozen) == 4
        assert shared.cells.data_ptr() == support.cells.data_ptr()
        assert support.expand(1) is support


class TestConstruction:
    def build(self, backbone: Backbone, **arguments: Any) -> FewShotSegmenter:
        parts: dict[str, Any] = {
            "backbone": backbone,
            "similarity": SimilarityNetwork(backbone.channels, rank=0),
            "decoder": MaskDecoder(prior_channels=6, feature_channels=sum(backbone.channels)),
        }
        return FewShotSegmenter(**(parts | arguments))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"prior": "magic"}, "unknown prior 'magic'; known: similarity, pfenet, none"),
            ({"attention": "magic"}, "attention 'magic' cannot be shown for one episode; choose siamese, "),
            ({"attention": "quadruplet"}, "attention 'quadruplet' cannot be shown for one episode"),
            ({"prior": "pfenet"}, "prior 'pfenet' has 1 maps, the decoder reads 6"),
            ({"prior": "pfenet", "decoder": PriorReadout(1)}, r"'pfenet' has 1 maps, the readout wants map 1 "),
            ({"prior": "none", "decoder": PriorReadout(0)}, r"'none' has 0 maps, the readout wants map 0 "),
            ({"similarity": SimilarityNetwork((3, 4))}, r"similarity network reads \(3, 4\), backbone gives \("),
            (
                {"decoder": MaskDecoder(prior_channels=6, feature_channels=7, appearance=2)},
                r"the backbone gives \d+ feature channels, the decoder reads 7",
            ),
            (
                {"completion": SupportCompletion(feature_channels=7, width=8)},
                r"the backbone gives \d+ feature channels, the completion reads 7",
            ),
            ({"prior": "pfenet", "completion": True}, "prior 'pfenet' has 1 maps, the decoder reads 6"),
            ({"completion": True}, "prior 'similarity' has 7 maps, the decoder reads 6"),
            (
                {"base_learner": BaseLearner(feature_channels=7, classes=2)},
                r"a base learner of 7 channels does not fit prior 'similarity' over a backbone of \d+",
            ),
            ({"prior": "pfenet", "base_learner": True}, r"does not fit prior 'pfenet' .*; it goes with the prior 'sim"),
            ({"base_learner": True}, "prior 'similarity' has 10 maps, the decoder reads 6"),
            ({"base_learner": True, "completion": True}, "prior 'similarity' has 11 maps, the decoder reads 6"),
            ({"decoder": ContextDecoder(prior_channels=10)}, "'similarity' has 6 maps, the decoder reads 10"),
            ({"temperature": 0.0}, "temperature of the soft margin must be greater than 0, got 0.0"),
        ],
    )
    def test_refuses_parts_that_do_not_fit(
        self, tiny_backbone: Backbone, arguments: dict[str, Any], message: str
    ) -> None:
        if arguments.get("completion") is True:
            fitting = SupportCompletion(feature_channels=sum(tiny_backbone.channels), width=8)
            arguments = arguments | {"completion": fitting}
        if arguments.get("base_learner") is True:
            learner = BaseLearner(feature_channels=sum(tiny_backbone.channels), classes=2)
            arguments = arguments | {"base_learner": learner}
        with pytest.raises(DataError, match=message):
            self.build(tiny_backbone, **arguments)

    def test_a_readout_with_a_completion(self, tiny_backbone: Backbone) -> None:
        completion = SupportCompletion(feature_channels=sum(tiny_backbone.channels), width=8)
        segmenter = training_free(tiny_backbone, completion=completion).eval()
        assert [id(p) for p in segmenter.trainable_parameters()] == [id(p) for p in completion.parameters()]
        support = segmenter.encode_support(photos(1, 1), *marked(1, ("box",)))
        plain = training_free(tiny_backbone).eval()
        expected = plain.segment(plain.encode_support(photos(1, 1), *marked(1, ("box",))), photos(1, seed=1))
        # an untrained completion is the estimate
        torch.testing.assert_close(segmenter.segment(support, photos(1, seed=1)).logits, expected.logits)

    @pytest.mark.parametrize("prior", ["pfenet", "none"])
    def test_base_classes_go_with_the_prior_similarity(self, tiny_backbone: Backbone, prior: PriorKind) -> None:
        with pytest.raises(DataError, match=f"does not fit prior '{prior}'|needs sizes of at least 1, got 0 prior"):
            build_segmenter(tiny_backbone, prior=prior, appearance=2, base_classes=3)

    def test_base_classes_bring_base_learner_and_context(self, tiny_backbone: Backbone) -> None:
        segmenter = build_segmenter(tiny_backbone, base_classes=3, completion=True)
        assert isinstance(segmenter.decoder, ContextDecoder)
        assert segmenter.base_learner is not None
        assert segmenter.base_learner.classes == 3
        assert (
            segmenter.decoder.prior_channels == prior_channels("similarity", completion=True, base_learner=True) == 11
        )
        trained = {id(parameter) for parameter in segmenter.trainable_parameters()}
        assert {id(parameter) for parameter in segmenter.base_learner.parameters()} < trained

    def test_a_readout_with_a_base_learner(self, tiny_backbone: Backbone) -> None:
        learner = BaseLearner(feature_channels=sum(tiny_backbone.channels), classes=2)
        segmenter = self.build(tiny_backbone, decoder=PriorReadout(6), base_learner=learner).eval()
        prediction = segmenter.segment(segmenter.encode_support(photos(1, 1), outlines(1, 1)), photos(1, seed=1))
        # the similarity network turns nothing here: the soft margin of frozen cells is that of all cells
        torch.testing.assert_close(prediction.priors[:, 6], prediction.priors[:, 0], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("prior", PRIOR_KINDS)
    def test_seed_decides_and_global_randomness_is_untouched(self, tiny_backbone: Backbone, prior: PriorKind) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        first, same, other = (
            build_segmenter(tiny_backbone, prior=prior, appearance=2, decoder_width=8, completion=True, seed=seed)
            for seed in (1, 1, 2)
        )
        assert torch.equal(torch.rand(3), expected)
        pairs = list(zip(first.trainable_parameters(), same.trainable_parameters(), strict=True))
        assert all(torch.equal(left, right) for left, right in pairs)
        differing = zip(first.trainable_parameters(), other.trainable_parameters(), strict=True)
        assert any(not torch.equal(left, right) for left, right in differing)


def trained_similarity(backbone: Backbone, *, rank: int = 3) -> SimilarityNetwork:
    similarity = SimilarityNetwork(backbone.channels, rank=rank, seed=8)
    torch.nn.init.normal_(similarity.up.weight, generator=torch.Generator().manual_seed(9))
    return similarity


class TestGivenSimilarity:
    def test_takes_the_place_of_a_new_one(self, tiny_backbone: Backbone) -> None:
        similarity = trained_similarity(tiny_backbone)
        for segmenter in (
            build_segmenter(tiny_backbone, similarity=similarity, similarity_rank=7),
            training_free(tiny_backbone, similarity=similarity),
        ):
            assert segmenter.similarity is similarity
            images, masks = photos(2, 1), outlines(2, 1)
            maps = similarity(tiny_backbone(images[:, 0]))
            support = segmenter.encode_support(images, masks)
            torch.testing.assert_close(support.cells, maps.flatten(2).transpose(1, 2))
            untrained = build_segmenter(tiny_backbone).encode_support(images, masks)
            assert (support.cells - untrained.cells).abs().max() > 0.1

    def test_a_trained_one_changes_the_prior(self, tiny_backbone: Backbone) -> None:
        def logits(similarity: SimilarityNetwork | None) -> Tensor:
            segmenter = training_free(tiny_backbone, similarity=similarity)
            return segmenter.segment(segmenter.encode_support(photos(1, 1), outlines(1, 1)), photos(1, seed=1)).logits

        assert not torch.allclose(logits(trained_similarity(tiny_backbone)), logits(None), rtol=0.1)
        identity = SimilarityNetwork(tiny_backbone.channels, rank=3)  # its projection starts at zero
        torch.testing.assert_close(logits(identity), logits(None), rtol=1e-3, atol=1e-3)

    def test_training_goes_on_with_it_unless_it_is_frozen(self, tiny_backbone: Backbone) -> None:
        similarity = trained_similarity(tiny_backbone)
        segmenter = build_segmenter(tiny_backbone, similarity=similarity)
        inside = {id(parameter) for parameter in similarity.parameters()}
        assert inside < {id(parameter) for parameter in segmenter.trainable_parameters()}
        similarity.requires_grad_(False)
        remaining = segmenter.trainable_parameters()
        assert inside.isdisjoint({id(parameter) for parameter in remaining})
        assert [id(p) for p in remaining] == [id(p) for p in segmenter.decoder.parameters()]
        assert training_free(tiny_backbone, similarity=similarity).trainable_parameters() == []

    def test_of_another_backbone_is_refused(self, tiny_backbone: Backbone) -> None:
        with pytest.raises(DataError, match=r"similarity network reads \(3, 4\), backbone gives \("):
            build_segmenter(tiny_backbone, similarity=SimilarityNetwork((3, 4)))
        with pytest.raises(DataError, match=r"similarity network reads \(3, 4\), backbone gives \("):
            training_free(tiny_backbone, similarity=SimilarityNetwork((3, 4)))


class TestTrainingFree:
    @pytest.mark.parametrize("channel", PRIOR_CHANNELS)
    def test_is_the_named_map_cut_at_the_threshold(self, tiny_backbone: Backbone, channel: str) -> None:
        segmenter = training_free(tiny_backbone, channel=channel, threshold=1.5)
        support = segmenter.encode_support(photos(2, 1), outlines(2, 1))
        prediction = segmenter.segment(support, photos(2, seed=1))
        chosen = prediction.priors[:, PRIOR_CHANNELS.index(channel)]
        if isinstance(segmenter.decoder, PriorReadout) and segmenter.decoder.scaled:
            chosen = scale_map(chosen.clamp_min(0))
        expected = F.interpolate(chosen[:, None], (SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0]
        assert torch.equal(prediction.logits, expected)
        assert torch.equal(prediction.masks, expected > 1.5)
        assert segmenter.trainable_parameters() == []

    def test_untrained_model_says_the_same(self, tiny_backbone: Backbone) -> None:
        def masks(segmenter: FewShotSegmenter) -> Tensor:
            support = segmenter.encode_support(photos(2, 1), outlines(2, 1))
            return segmenter.segment(support, photos(2, seed=1)).logits

        # the decoder upsamples in two steps, the readout in one
        free, untrained = masks(training_free(tiny_backbone)), masks(build_segmenter(tiny_backbone).eval())
        assert F.cosine_similarity(free.flatten(1), untrained.flatten(1)).min() > 0.99

    def test_knows_its_own_support(self, tiny_backbone: Backbone) -> None:
        segmenter = training_free(tiny_backbone)
        images, masks = photos(4, 1), outlines(4, 1)
        foreground, background = cell_weights(masks[:, 0], (4, 4))
        priors = segmenter.segment(segmenter.encode_support(images, masks), images[:, 0]).priors[:, 0]
        assert priors[foreground == 1].min() > priors[background == 1].max()

    def test_unknown_map(self, tiny_backbone: Backbone) -> None:
        with pytest.raises(DataError, match="unknown prior map 'magic'; known: soft margin, prototype margin, "):
            training_free(tiny_backbone, channel="magic")


def test_encoding_holds_tensors_only(tiny_backbone: Backbone) -> None:
    support = build_segmenter(tiny_backbone).encode_support(photos(1, 1), outlines(1, 1))
    assert isinstance(support, SupportEncoding)
    assert all(isinstance(getattr(support, name), Tensor) for name in support.__slots__)
