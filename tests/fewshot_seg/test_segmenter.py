"""What every assembled model keeps, whatever its prior."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.types import IGNORE, DataError
from fewshot_seg.attention import ATTENTION_KINDS, AttentionKind, gradient_attention, scale_map, score_direction
from fewshot_seg.backbones import Backbone
from fewshot_seg.decoder import MaskDecoder, PriorReadout
from fewshot_seg.priors import PRIOR_CHANNELS, pfenet_prior, similarity_priors
from fewshot_seg.segmenter import (
    PRIOR_KINDS,
    FewShotSegmenter,
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


def disturbed(segmenter: FewShotSegmenter) -> FewShotSegmenter:
    """As after training: no parameter is zero or the identity any more."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in segmenter.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return segmenter.eval()


def assert_same(left: Any, right: Any, *, atol: float = 1e-4) -> None:
    for name in left.__slots__:
        one, other = getattr(left, name), getattr(right, name)
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=atol, msg=name)


@pytest.fixture(scope="class")
def segmenter(request: pytest.FixtureRequest, tiny_backbone: Backbone) -> FewShotSegmenter:
    """The model that the contract's subclass names."""
    options = request.cls.options
    return disturbed(build_segmenter(tiny_backbone, similarity_rank=4, decoder_width=8, decoder_blocks=1, **options))


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
        assert prediction.priors.shape == (2, prior_channels(segmenter.prior), 4, 4)
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


class TestExpand:
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
            ({"temperature": 0.0}, "temperature of the soft margin must be greater than 0, got 0.0"),
        ],
    )
    def test_refuses_parts_that_do_not_fit(
        self, tiny_backbone: Backbone, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(DataError, match=message):
            self.build(tiny_backbone, **arguments)

    @pytest.mark.parametrize("prior", PRIOR_KINDS)
    def test_seed_decides_and_global_randomness_is_untouched(self, tiny_backbone: Backbone, prior: PriorKind) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        first, same, other = (
            build_segmenter(tiny_backbone, prior=prior, appearance=2, decoder_width=8, seed=seed) for seed in (1, 1, 2)
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
