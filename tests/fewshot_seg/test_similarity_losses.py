"""What trains the similarity network, against plain loops: triples, maps, regions and the constraint."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from episodes.types import IGNORE, DataError
from fewshot_seg.attention import image_directions, similarity_attention
from fewshot_seg.backbones import Backbone
from fewshot_seg.constraint import SimilarityMining, mask_features
from fewshot_seg.embedding import ImageEmbedder
from fewshot_seg.encodings import SupportEncoding
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter
from fewshot_seg.similarity import SimilarityNetwork, cell_weights, masked_average_pool
from fewshot_seg.similarity_losses import (
    MAP_KINDS,
    Constraint,
    ConstraintKind,
    MapKind,
    Triple,
    choose_triples,
    map_loss,
    mining_loss,
    region_embeddings,
    region_triples,
)

CHANNELS = (4, 3)
KINDS: tuple[ConstraintKind, ...] = ("siamese", "triplet", "cosine", "margin")
SIZE = 64


def random_levels(count: int, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (CHANNELS[0], 3, 4), (CHANNELS[1], 2, 2)
    return [torch.randn(count, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def disturbed(similarity: SimilarityNetwork) -> SimilarityNetwork:
    """As after training: the projection is no longer the identity."""
    assert similarity.up.weight is not None
    nn.init.normal_(similarity.up.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    return similarity


@pytest.fixture
def network() -> SimilarityNetwork:
    return disturbed(SimilarityNetwork(CHANNELS, rank=2)).double()


def maps_of(network: SimilarityNetwork, count: int = 2) -> Triple:
    maps = network(random_levels(3 * count))
    return maps[:count], maps[count : 2 * count], maps[2 * count :]


def fixed(sharpness: float = 6.0, threshold: float = 0.4, **options: Any) -> Constraint:
    mining = SimilarityMining(sharpness=sharpness, threshold=threshold, **options).double()
    return Constraint(mining=mining, weight=1.0)


def of_kind(constraint: Constraint, kind: ConstraintKind, embedder: ImageEmbedder | None = None) -> Constraint:
    return Constraint(mining=constraint.mining, weight=constraint.weight, kind=kind, embedder=embedder)


class TestConstraint:
    @pytest.mark.parametrize(("weight", "triples"), [(0.0, None), (-1.0, None), (math.nan, None), (1.0, 0), (1.0, -2)])
    def test_refuses(self, weight: float, triples: int | None) -> None:
        expected = f"needs a weight above 0 and at least 1 triple, got {weight} and {triples}"
        with pytest.raises(DataError, match=expected):
            Constraint(mining=SimilarityMining(), weight=weight, triples=triples)


def loop_triples(embeddings: Tensor, labels: list[int], count: int | None) -> list[tuple[int, int, int]]:
    found, number = [], len(labels)
    for anchor in range(number):
        ahead = [(anchor + step) % number for step in range(1, number)]
        positives = [other for other in ahead if labels[other] == labels[anchor]]
        negatives = [other for other in range(number) if labels[other] != labels[anchor]]
        if positives and negatives:
            nearest = max(negatives, key=lambda other, a=anchor: float(embeddings[a] @ embeddings[other]))  # type: ignore[misc]
            found.append((anchor, positives[0], nearest))
    if count is not None and count < len(found):
        found = [found[position * len(found) // count] for position in range(count)]
    return found


class TestChooseTriples:
    @settings(max_examples=100, deadline=None)
    @given(
        labels=st.lists(st.integers(-2, 2), min_size=1, max_size=10),
        count=st.none() | st.integers(1, 12),
        seed=st.integers(0, 10**6),
    )
    def test_equals_plain_loops(self, labels: list[int], count: int | None, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        embeddings = F.normalize(torch.randn(len(labels), 4, generator=generator, dtype=torch.float64), dim=1)
        triples = choose_triples(embeddings, torch.tensor(labels), count)
        assert {index.dtype for index in triples} == {torch.int64}
        expected = loop_triples(embeddings, labels, count)
        assert list(zip(*(index.tolist() for index in triples), strict=True)) == expected

    @pytest.mark.parametrize("labels", [[5, 5, 5], [1, 2, 3], [7]])
    def test_none_without_a_positive_or_a_negative(self, labels: list[int]) -> None:
        triples = choose_triples(F.normalize(torch.rand(len(labels), 3), dim=1), torch.tensor(labels))
        assert [index.tolist() for index in triples] == [[], [], []]

    def test_singletons_are_negatives_but_no_anchors(self) -> None:
        embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
        triples = choose_triples(embeddings, torch.tensor([4, 4, 9]))
        assert [index.tolist() for index in triples] == [[0, 1], [1, 0], [2, 2]]

    def test_opposite_embeddings_are_still_negatives(self) -> None:
        embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
        _, _, negative = choose_triples(embeddings, torch.tensor([0, 0, 1, 1]))
        assert negative.tolist() == [2, 2, 0, 0]

    def test_carries_no_graph(self) -> None:
        embeddings = F.normalize(torch.rand(4, 3), dim=1).requires_grad_()
        assert not any(index.requires_grad for index in choose_triples(embeddings, torch.tensor([0, 0, 1, 1])))


def hand_directions(kind: str, anchor: Tensor, positive: Tensor, negative: Tensor) -> list[Tensor]:
    """Vectors v of the scores v . f of anchor, positive and negative, from the table of the papers."""
    similar, dissimilar = 1 - (anchor - positive).abs(), (anchor - negative).abs()
    return {
        "siamese": [similar] * 3,
        "triplet": [similar * dissimilar] * 3,
        "cosine": [positive, anchor, anchor],
        "margin": [positive - negative, anchor, anchor],
    }[kind]


def gradient_map(maps: Tensor, direction: Tensor) -> Tensor:
    """sum_k GAP(ds/dA_k) A_k with its sign for s = v . GAP(A)/|GAP(A)|, by automatic differentiation; (D, h, w)."""
    leaf = maps.detach().clone().requires_grad_()
    pooled = leaf.mean(dim=(1, 2))
    (gradient,) = torch.autograd.grad((direction * pooled / pooled.norm()).sum(), leaf)
    return (gradient.mean(dim=(1, 2))[:, None, None] * maps.detach()).sum(0)


def hand_mask(attention: Tensor, sharpness: float, threshold: float) -> Tensor:
    attention = attention.clamp_min(0)
    scaled = (attention - attention.min()) / (attention.max() - attention.min())
    return torch.exp(-sharpness * (scaled - threshold)).add(1).reciprocal()


def unit(vector: Tensor) -> Tensor:
    return vector.div(vector.norm())


def hand_masks(kind: str, triple: list[Tensor], sharpness: float, threshold: float) -> list[Tensor]:
    directions = hand_directions(kind, *(unit(maps.mean(dim=(1, 2))) for maps in triple))
    return [
        hand_mask(gradient_map(maps, direction), sharpness, threshold)
        for maps, direction in zip(triple, directions, strict=True)
    ]


def distance_gap(embeddings: list[Tensor]) -> float:
    anchor, positive, negative = embeddings
    return abs(math.dist(anchor.tolist(), positive.tolist()) - math.dist(anchor.tolist(), negative.tolist()))


class TestMiningLossInFeatures:
    @pytest.mark.parametrize("kind", KINDS)
    def test_equals_plain_loops(self, network: SimilarityNetwork, kind: ConstraintKind) -> None:
        maps = maps_of(network, 3)
        expected = []
        for number in range(3):
            triple = [one[number].detach() for one in maps]
            masks = hand_masks(kind, triple, 6.0, 0.4)
            expected.append(
                distance_gap([unit((a * (1 - m)).mean(dim=(1, 2))) for a, m in zip(triple, masks, strict=True)])
            )
        found = mining_loss(of_kind(fixed(), kind), maps)
        assert found.shape == ()
        assert found.item() == pytest.approx(sum(expected) / 3, abs=1e-6)  # the root of the distance adds 1e-6

    @pytest.mark.parametrize("kind", ["cosine", "margin"])
    def test_gradcheck_through_a_similarity_network(self, network: SimilarityNetwork, kind: ConstraintKind) -> None:
        # siamese and triplet detach the vector of their score, so that finite differences see more than the gradient
        constraint = of_kind(fixed(learnable=True), kind)
        both = nn.ModuleDict({"network": network, "mining": constraint.mining})
        names = [name for name, _ in both.named_parameters()]
        assert names == ["network.down.weight", "network.up.weight", "mining.log_sharpness", "mining.logit_threshold"]

        class Loss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.both = both

            def forward(self) -> Tensor:
                return mining_loss(constraint, maps_of(network))

        def loss(*values: Tensor) -> Tensor:
            found: Tensor = functional_call(
                Loss(), {f"both.{name}": value for name, value in zip(names, values, strict=True)}, ()
            )
            return found

        assert torch.autograd.gradcheck(loss, tuple(both.parameters()))

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_gradient_reaches_the_network_through_the_attention_as_well(
        self, network: SimilarityNetwork, kind: ConstraintKind
    ) -> None:
        constraint = of_kind(fixed(), kind)

        def gradient(*, through_maps: bool, through_attention: bool) -> list[Tensor]:
            maps = maps_of(network)
            embeddings = [SimilarityNetwork.embed(one) for one in maps]
            directions = image_directions(kind, embeddings[0], embeddings[1], [embeddings[2]])
            found = [similarity_attention(one, direction) for one, direction in zip(maps, directions, strict=True)]
            attention = [one if through_attention else one.detach() for one in found]
            levels = [(one if through_maps else one.detach(),) for one in maps]
            loss = constraint.mining(
                lambda one: SimilarityNetwork.embed(one[0]), mask_features, tuple(levels), tuple(attention)
            )
            return list(torch.autograd.grad(loss, list(network.parameters())))

        whole = torch.autograd.grad(mining_loss(constraint, maps_of(network)), list(network.parameters()))
        of_maps = gradient(through_maps=True, through_attention=False)
        of_attention = gradient(through_maps=False, through_attention=True)
        for total, left, right in zip(whole, of_maps, of_attention, strict=True):
            assert right.norm() > 1e-3 * left.norm() > 0
            torch.testing.assert_close(total, left + right)

    def test_learned_sharpness_and_threshold_get_a_gradient(self, network: SimilarityNetwork) -> None:
        constraint = fixed(learnable=True)
        gradients = torch.autograd.grad(mining_loss(constraint, maps_of(network)), list(constraint.mining.parameters()))
        assert all(gradient.isfinite() and gradient != 0 for gradient in gradients)

    def test_regions_of_different_heights(self, network: SimilarityNetwork) -> None:
        """Supports of several shots are taller than the query; cells outside of the region are 0."""
        query, positive, negative = maps_of(network)
        tall = torch.cat([positive, 0 * positive], dim=2)
        for kind in KINDS:
            loss = mining_loss(of_kind(fixed(), kind), (query, tall, negative))
            assert loss.item() == pytest.approx(
                mining_loss(of_kind(fixed(), kind), (query, positive, negative)).item(), abs=1e-2
            )

    def test_an_absent_region_has_a_finite_gradient(self, network: SimilarityNetwork) -> None:
        for kind in KINDS:
            query, positive, negative = (one.float() for one in maps_of(network))
            constraint = Constraint(mining=SimilarityMining(), weight=1.0, kind=kind)
            loss = mining_loss(constraint, (query, positive, 0 * negative))
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            assert loss.isfinite()
            assert all(gradient.isfinite().all() for gradient in gradients)


class TestMiningLossInPhotos:
    @pytest.fixture
    def embedder(self, tiny_backbone: Backbone) -> ImageEmbedder:
        return ImageEmbedder(tiny_backbone, disturbed(SimilarityNetwork(tiny_backbone.channels, rank=2)))

    @pytest.fixture
    def photos(self) -> Triple:
        patches = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        images = F.interpolate(patches, (SIZE, SIZE))
        return images[:2], images[2:4], images[4:]

    def maps(self, embedder: ImageEmbedder, photos: Triple) -> Triple:
        anchor, positive, negative = (embedder.similarity(embedder.backbone(one)) for one in photos)
        return anchor, positive, negative

    @pytest.mark.parametrize("kind", ["triplet", "margin"])
    def test_equals_masking_by_hand_and_embedding_anew(
        self, embedder: ImageEmbedder, photos: Triple, kind: ConstraintKind
    ) -> None:
        constraint = Constraint(
            mining=SimilarityMining(sharpness=6.0, threshold=0.4), weight=1.0, kind=kind, embedder=embedder
        )
        maps = self.maps(embedder, photos)
        colour = torch.tensor(embedder.backbone.mean)[:, None, None]
        expected = []
        with torch.no_grad():
            for number in range(2):
                with torch.enable_grad():
                    masks = hand_masks(kind, [one[number].detach() for one in maps], 6.0, 0.4)
                embeddings = []
                for images, mask in zip(photos, masks, strict=True):
                    sigma = F.interpolate(mask[None, None], (SIZE, SIZE), mode="bilinear", align_corners=False)[0]
                    masked = images[number] * (1 - sigma) + colour * sigma
                    embeddings.append(embedder(masked[None])[0])
                expected.append(distance_gap(embeddings))
        found = mining_loss(constraint, maps, photos)
        assert sum(expected) > 1e-3
        assert found.item() == pytest.approx(sum(expected) / 2, rel=1e-2, abs=1e-5)

    def test_gradients_reach_network_and_mask_but_not_the_backbone(
        self, embedder: ImageEmbedder, photos: Triple
    ) -> None:
        constraint = Constraint(mining=SimilarityMining(learnable=True), weight=1.0, embedder=embedder)
        one = (photos[0][:1], photos[1][:1], photos[2][:1])
        torch.autograd.backward(mining_loss(constraint, self.maps(embedder, one), one))
        for parameter in (*embedder.similarity.parameters(), *constraint.mining.parameters()):
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any()
        assert all(parameter.grad is None for parameter in embedder.backbone.parameters())

    def test_needs_photos(self, embedder: ImageEmbedder, photos: Triple) -> None:
        constraint = Constraint(mining=SimilarityMining(), weight=1.0, embedder=embedder)
        with pytest.raises(DataError, match="a constraint that masks photos needs them"):
            mining_loss(constraint, self.maps(embedder, photos))


def outlines(*shape: int, seed: int = 0) -> Tensor:
    """Rectangles with an ignored border below."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(*shape, SIZE, SIZE, dtype=torch.uint8)
    for mask in masks.view(-1, SIZE, SIZE):
        top, left = torch.randint(0, SIZE // 2, (2,), generator=generator).tolist()
        mask[top : top + SIZE // 3, left : left + SIZE // 2] = 1
        mask[top + SIZE // 3 : top + SIZE // 3 + 3, left : left + SIZE // 2] = IGNORE
    return masks


class Episodes:
    """Three episodes of two shots of random features, as the losses see them."""

    def __init__(self, backbone: Backbone, support_masks: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(4)

        def levels(count: int) -> list[Tensor]:
            sides = (SIZE // stride for stride in backbone.strides)
            return [
                torch.randn(count, channels, side, side, generator=generator)
                for channels, side in zip(backbone.channels, sides, strict=True)
            ]

        self.segmenter: FewShotSegmenter = build_segmenter(backbone, similarity_rank=3, decoder_width=8)
        disturbed(self.segmenter.similarity)
        self.support_levels, query_levels = levels(6), levels(3)
        self.support_masks = outlines(3, 2) if support_masks is None else support_masks
        self.query_masks = outlines(3, seed=5)
        self.support_maps = self.segmenter.similarity(self.support_levels)
        self.query_maps = self.segmenter.similarity(query_levels)

    @property
    def support(self) -> SupportEncoding:
        return self.segmenter.encode_support_maps(self.support_maps, self.support_levels, self.support_masks)


@pytest.fixture
def episodes(tiny_backbone: Backbone) -> Episodes:
    return Episodes(tiny_backbone)


def softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def loop_balanced(margins: list[float], objects: list[float], grounds: list[float]) -> float:
    similar = sum(softplus(-m) * o for m, o in zip(margins, objects, strict=True)) / sum(objects)
    return similar + sum(softplus(m) * g for m, g in zip(margins, grounds, strict=True)) / sum(grounds)


def loop_shape(values: list[float], objects: list[float], grounds: list[float]) -> list[float]:
    """The map between the means of its sides, its standard deviation worth two logits."""
    of_object = sum(v * o for v, o in zip(values, objects, strict=True)) / sum(objects)
    of_ground = sum(v * g for v, g in zip(values, grounds, strict=True)) / sum(grounds)
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return [2 * (v - (of_object + of_ground) / 2) / spread for v in values]


def loop_soft_margin(query: Tensor, cells: Tensor, sides: list[list[float]], temperature: float) -> list[float]:
    margins = []
    for x in range(query.shape[0]):
        cosines = [float(query[x] @ cell) for cell in cells]
        log_means = [
            math.log(sum(w * math.exp(c / temperature) for w, c in zip(weights, cosines, strict=True)) / sum(weights))
            for weights in sides
        ]
        margins.append(log_means[0] - log_means[1])
    return margins


def soft_margin_gradient(query: Tensor, cells: Tensor, sides: list[list[float]], temperature: float) -> list[float]:
    """Element-wise gradient x activation of every cell's own soft margin, by automatic differentiation."""
    leaf = query.clone().requires_grad_()
    kernel = (leaf @ cells.T / temperature).exp()
    log_sums = [(kernel @ kernel.new_tensor(weights)).log() for weights in sides]
    (gradient,) = torch.autograd.grad((log_sums[0] - log_sums[1]).sum(), leaf)
    return [float(value) for value in (gradient * query).sum(1)]


def loop_map_loss(episodes: Episodes, kinds: list[MapKind]) -> float:
    support, total = episodes.support, 0.0
    objects, grounds = (side.flatten(1).tolist() for side in cell_weights(episodes.query_masks, (4, 4)))
    for kind in kinds:
        for number in range(3):
            maps = episodes.query_maps[number].detach().double()
            embedding = unit(maps.mean(dim=(1, 2)))
            positive, negative = (
                embeddings[number].detach().double()
                for embeddings in (support.foreground_embedding, support.background_embedding)
            )
            sides = [support.foreground[number].tolist(), support.background[number].tolist()]
            cells, temperature = support.cells[number].detach().double(), episodes.segmenter.temperature
            if kind == "soft margin":
                shape = loop_soft_margin(maps.flatten(1).T, cells, sides, temperature)
            elif kind == "soft margin gradient":
                values = soft_margin_gradient(maps.flatten(1).T, cells, sides, temperature)
                shape = loop_shape(values, objects[number], grounds[number])
            else:
                before = support.foreground_embedding[(number - 1) % 3].detach().double()
                if kind == "quadruplet":
                    weights = (1 - (embedding - positive).abs()) * (embedding - negative).abs()
                    direction = weights * (embedding - before).abs()
                else:
                    direction = hand_directions(kind, embedding, positive, negative)[0]
                values = gradient_map(maps, direction).flatten().tolist()
                shape = loop_shape(values, objects[number], grounds[number])
            total += loop_balanced(shape, objects[number], grounds[number])
    return total / (3 * len(kinds))


class TestMapLoss:
    @pytest.mark.parametrize("kind", MAP_KINDS)
    def test_equals_plain_loops(self, episodes: Episodes, kind: MapKind) -> None:
        loss = map_loss(episodes.segmenter, episodes.support, episodes.query_maps, episodes.query_masks, [kind])
        assert loss.item() == pytest.approx(loop_map_loss(episodes, [kind]), rel=1e-3)

    def test_is_the_mean_over_kinds(self, episodes: Episodes) -> None:
        kinds: list[MapKind] = ["soft margin", "quadruplet", "cosine"]
        loss = map_loss(episodes.segmenter, episodes.support, episodes.query_maps, episodes.query_masks, kinds)
        assert loss.item() == pytest.approx(loop_map_loss(episodes, kinds), rel=1e-3)

    @pytest.mark.parametrize("kind", MAP_KINDS)
    def test_trains_the_similarity_network_alone(self, episodes: Episodes, kind: MapKind) -> None:
        loss = map_loss(episodes.segmenter, episodes.support, episodes.query_maps, episodes.query_masks, [kind])
        torch.autograd.backward(loss)
        assert {name.split(".")[0] for name, p in episodes.segmenter.named_parameters() if p.grad is not None} == {
            "similarity"
        }
        assert all(p.grad is not None and p.grad.any() for p in episodes.segmenter.similarity.parameters())

    def test_unknown_kind(self, episodes: Episodes) -> None:
        with pytest.raises(ValueError, match="unknown attention kind 'magic'"):
            map_loss(
                episodes.segmenter,
                episodes.support,
                episodes.query_maps,
                episodes.query_masks,
                ["magic"],  # type: ignore[list-item]
            )


class TestRegionEmbeddings:
    def test_objects_share_their_class_and_backgrounds_share_nothing(self, episodes: Episodes) -> None:
        embeddings, labels = region_embeddings(episodes.support, episodes.query_maps, episodes.query_masks, [4, 9, 4])
        assert labels.tolist()[:6] == [4, 9, 4, 4, 9, 4]
        assert len(labels) == 12
        assert len(set(labels.tolist()[6:])) == 6
        assert max(labels.tolist()[6:]) < 0
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(12))

    def test_equal_pooling_cell_by_cell(self, episodes: Episodes) -> None:
        def pooled(maps: list[Tensor], weights: list[Tensor]) -> Tensor:
            total = torch.zeros(len(maps[0]))
            for one, weight in zip(maps, weights, strict=True):
                for y in range(4):
                    for x in range(4):
                        total = total + weight[y, x] * one[:, y, x]
            return unit(total)

        expected = []
        of_support = cell_weights(episodes.support_masks.flatten(0, 1), (4, 4))
        of_query = cell_weights(episodes.query_masks, (4, 4))
        for side in (0, 1):
            for b in range(3):
                shots = [2 * b, 2 * b + 1]
                expected.append(pooled([episodes.support_maps[n] for n in shots], [of_support[side][n] for n in shots]))
            expected += [pooled([episodes.query_maps[b]], [of_query[side][b]]) for b in range(3)]
        embeddings, _ = region_embeddings(episodes.support, episodes.query_maps, episodes.query_masks, [1, 2, 3])
        torch.testing.assert_close(embeddings, torch.stack(expected), rtol=1e-4, atol=1e-5)

    def test_absent_regions_are_left_out(self, tiny_backbone: Backbone) -> None:
        support_masks = outlines(3, 2)
        support_masks[0] = 1  # the first support is all object
        episodes = Episodes(tiny_backbone, support_masks)
        episodes.query_masks[1] = 0  # the second query is all background
        episodes.query_masks[2] = torch.where(episodes.query_masks[2] == 1, 1, IGNORE)  # the third has none
        embeddings, labels = region_embeddings(episodes.support, episodes.query_maps, episodes.query_masks, [4, 9, 5])
        objects, backgrounds = labels[labels > 0].tolist(), labels[labels < 0].tolist()
        assert objects == [4, 9, 5, 4, 5]
        assert len(backgrounds) == len(set(backgrounds)) == 4
        assert len(embeddings) == 9
        (gradient,) = torch.autograd.grad(embeddings[:, 0].sum(), episodes.segmenter.similarity.up.weight)
        assert gradient.isfinite().all()

    def test_labels_are_where_the_maps_are(self, episodes: Episodes) -> None:
        _, labels = region_embeddings(episodes.support, episodes.query_maps, episodes.query_masks, (4, 9, 4))
        assert labels.dtype == torch.int64
        assert labels.device == episodes.query_maps.device


class TestRegionTriples:
    def test_pooled_globally_they_are_the_masked_pooling_of_all_shots(self, episodes: Episodes) -> None:
        query, objects, backgrounds = region_triples(episodes.query_maps, episodes.support_maps, episodes.support_masks)
        assert query is episodes.query_maps
        assert objects.shape == backgrounds.shape == (3, episodes.query_maps.shape[1], 2 * 4, 4)
        sides = cell_weights(episodes.support_masks.flatten(0, 1), (4, 4))
        for maps, weights in zip((objects, backgrounds), sides, strict=True):
            one, other = episodes.support_maps[::2], episodes.support_maps[1::2]  # the shots of each episode
            stacked, tall = torch.cat([one, other], dim=2), torch.cat([weights[::2], weights[1::2]], dim=1)
            expected = F.normalize(masked_average_pool(stacked, tall), dim=1)
            torch.testing.assert_close(SimilarityNetwork.embed(maps), expected, rtol=1e-4, atol=1e-5)

    def test_pooled_globally_they_are_the_supports_embeddings(self, episodes: Episodes) -> None:
        _, objects, backgrounds = region_triples(episodes.query_maps, episodes.support_maps, episodes.support_masks)
        support = episodes.support
        torch.testing.assert_close(SimilarityNetwork.embed(objects), support.foreground_embedding)
        torch.testing.assert_close(SimilarityNetwork.embed(backgrounds), support.background_embedding)

    def test_cells_outside_of_the_region_are_zero(self, episodes: Episodes) -> None:
        _, objects, backgrounds = region_triples(episodes.query_maps, episodes.support_maps, episodes.support_masks)
        for maps, weights in zip(
            (objects, backgrounds), cell_weights(episodes.support_masks.flatten(0, 1), (4, 4)), strict=True
        ):
            outside = (weights == 0).reshape(3, 8, 4)
            assert 0 < outside.sum() < outside.numel()
            assert torch.equal(maps.abs().sum(1) == 0, outside)

    def test_serve_the_constraint(self, tiny_backbone: Backbone) -> None:
        support_masks = outlines(3, 2)
        support_masks[0] = 1  # no background at all
        episodes = Episodes(tiny_backbone, support_masks)
        triples = region_triples(episodes.query_maps, episodes.support_maps, episodes.support_masks)
        loss = mining_loss(Constraint(mining=SimilarityMining(), weight=1.0), triples)
        gradients = torch.autograd.grad(loss, list(episodes.segmenter.similarity.parameters()))
        assert loss.isfinite()
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
