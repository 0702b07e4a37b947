"""Gradient attention: closed form = autograd = finite differences = captum, in every form of the score."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam, LayerGradientXActivation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fewshot_seg.attention import (
    ATTENTION_KINDS,
    AttentionKind,
    dissimilar_weight,
    gradient_attention,
    image_directions,
    scale_map,
    score_direction,
    similar_weight,
    similarity_attention,
    weigh_maps,
)

BATCH, CHANNELS, HEIGHT, WIDTH = 3, 5, 4, 3
NEGATIVES = {"siamese": 0, "triplet": 1, "quadruplet": 2, "cosine": 0, "margin": 1}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def embed(maps: Tensor) -> Tensor:
    """f = L2norm(GAP(A)), written without the library's closed form in mind."""
    return F.normalize(maps.mean(dim=(2, 3)), dim=1)


def embed_by_place(maps: Tensor) -> Tensor:
    """A smooth embedding in which every cell counts differently, so that the gradient varies from cell to cell."""
    mixing = normal(CHANNELS, CHANNELS * HEIGHT * WIDTH, seed=50) / 4
    return F.normalize(torch.tanh(maps.flatten(1) @ mixing.T), dim=1)


def unit(seed: int) -> Tensor:
    return F.normalize(normal(BATCH, CHANNELS, seed=seed), dim=1)


def others(kind: str) -> tuple[Tensor, list[Tensor]]:
    return unit(20), [unit(21 + i) for i in range(NEGATIVES[kind])]


def literal_score(kind: str, anchor: Tensor, positive: Tensor, negatives: list[Tensor], i: int) -> Tensor:
    """The score of image i as its paper prints it, one channel at a time."""
    total = anchor.new_zeros(())
    for k in range(CHANNELS):
        f = anchor[i, k]
        w_p = 1 - abs(f.item() - positive[i, k])  # .item(): the weights are constants
        if kind in ("siamese", "triplet", "quadruplet"):
            weight = w_p
            for negative in negatives:
                weight = weight * abs(f.item() - negative[i, k])
            total = total + weight * f
        elif kind == "cosine":
            total = total + positive[i, k] * f
        else:
            total = total + positive[i, k] * f - negatives[0][i, k] * f
    return total


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
class TestEveryKind:
    def test_direction_gives_the_literal_score(self, kind: AttentionKind) -> None:
        anchor = embed(normal(BATCH, CHANNELS, HEIGHT, WIDTH, seed=1))
        positive, negatives = others(kind)
        scores = (score_direction(kind, anchor, positive, negatives) * anchor).sum(1)
        expected = torch.stack([literal_score(kind, anchor, positive, negatives, i) for i in range(BATCH)])
        torch.testing.assert_close(scores, expected)

    @pytest.mark.parametrize("rectify", [True, False])
    def test_closed_form_equals_autograd(self, kind: AttentionKind, rectify: bool) -> None:
        maps = normal(BATCH, CHANNELS, HEIGHT, WIDTH, seed=2).requires_grad_()
        positive, negatives = others(kind)
        embedding = embed(maps)
        scores = torch.stack([literal_score(kind, embedding, positive, negatives, i) for i in range(BATCH)])
        (expected,) = gradient_attention(scores, [maps], rectify=rectify)
        direction = score_direction(kind, embedding, positive, negatives)
        actual = similarity_attention(maps, direction, rectify=rectify)
        assert actual.shape == (BATCH, HEIGHT, WIDTH)
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)

    def test_closed_form_equals_finite_differences_in_plain_loops(self, kind: AttentionKind) -> None:
        maps = normal(BATCH, CHANNELS, HEIGHT, WIDTH, seed=3)
        positive, negatives = others(kind)
        direction = score_direction(kind, embed(maps), positive, negatives)  # constant: weights are detached
        step, expected = 1e-6, torch.zeros(BATCH, HEIGHT, WIDTH, dtype=torch.float64)
        for i in range(BATCH):
            for k in range(CHANNELS):
                alpha = 0.0
                for y in range(HEIGHT):
                    for x in range(WIDTH):
                        up, down = maps.clone(), maps.clone()
                        up[i, k, y, x] += step
                        down[i, k, y, x] -= step
                        rise = (direction[i] * (embed(up)[i] - embed(down)[i])).sum().item()
                        alpha += rise / (2 * step) / (HEIGHT * WIDTH)
                expected[i] += alpha * maps[i, k]
        actual = similarity_attention(maps, direction)
        torch.testing.assert_close(actual, expected.clamp_min(0), rtol=1e-5, atol=1e-9)

    def test_equals_captum_grad_cam(self, kind: AttentionKind) -> None:
        positive, negatives = others(kind)
        network = nn.Conv2d(3, CHANNELS, 3, padding=1, dtype=torch.float64)
        images = normal(BATCH, 3, HEIGHT, WIDTH, seed=4)
        direction = score_direction(kind, embed(network(images)), positive, negatives).detach()

        class Score(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(self, pictures: Tensor) -> Tensor:
                return (direction * embed(self.network(pictures))).sum(1)

        model = Score()
        expected = LayerGradCam(model, model.network).attribute(images, relu_attributions=True)
        actual = similarity_attention(network(images), direction)
        torch.testing.assert_close(actual, expected[:, 0].detach(), rtol=1e-9, atol=1e-13, check_stride=False)

    def test_images_of_a_batch_do_not_meet(self, kind: AttentionKind) -> None:
        maps = normal(BATCH, CHANNELS, HEIGHT, WIDTH, seed=5)
        positive, negatives = others(kind)

        def attend(rows: slice) -> Tensor:
            leaf = maps[rows].clone().requires_grad_()
            direction = score_direction(kind, embed(leaf), positive[rows], [n[rows] for n in negatives])
            return gradient_attention((direction * embed(leaf)).sum(1), [leaf])[0]

        together = attend(slice(None))
        for i in range(BATCH):
            torch.testing.assert_close(attend(slice(i, i + 1)), together[i : i + 1])

    def test_gradcheck(self, kind: AttentionKind) -> None:
        maps = normal(2, 3, 2, 3, seed=6).requires_grad_()
        direction = normal(2, 3, seed=7).requires_grad_()
        # without the kink of the ReLU, where finite differences are wrong
        assert torch.autograd.gradcheck(lambda a, v: similarity_attention(a, v, rectify=False), (maps, direction))
        positive = normal(BATCH, CHANNELS, seed=8).requires_grad_(kind in ("cosine", "margin"))
        negatives = [
            normal(BATCH, CHANNELS, seed=9 + i).requires_grad_(kind == "margin") for i in range(NEGATIVES[kind])
        ]
        if kind in ("cosine", "margin"):
            anchor = unit(12)
            assert torch.autograd.gradcheck(lambda p, *n: score_direction(kind, anchor, p, n), (positive, *negatives))

    def test_attention_can_train_the_layer_that_made_the_maps(self, kind: AttentionKind) -> None:
        """Second order: d loss(attention) / d convolution, against finite differences of the whole thing."""
        positive, negatives = others(kind)
        images = normal(BATCH, 3, HEIGHT, WIDTH, seed=13)
        target = normal(BATCH, HEIGHT, WIDTH, seed=14)
        weight = normal(CHANNELS, 3, 1, 1, seed=15)
        # the difference weights are constants of the method, so the finite differences keep them as they were
        direction = score_direction(kind, embed(F.conv2d(images, weight)), positive, negatives).detach()

        def loss(kernel: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
            return (attend(F.conv2d(images, kernel)) * target).sum()

        def by_autograd(maps: Tensor) -> Tensor:
            scores = (direction * embed(maps)).sum(1)
            return gradient_attention(scores, [maps], create_graph=True, rectify=False)[0]

        leaf = weight.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf, by_autograd), leaf)
        leaf = weight.clone().requires_grad_()
        (second,) = torch.autograd.grad(
            loss(leaf, lambda maps: similarity_attention(maps, direction, rectify=False)), leaf
        )
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)
        step = 1e-6
        for position in ((0, 0), (2, 1), (4, 2)):
            up, down = weight.clone(), weight.clone()
            up[position] += step
            down[position] -= step
            values = [loss(kernel.requires_grad_(), by_autograd).item() for kernel in (up, down)]
            assert first[position].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-8)

    @pytest.mark.parametrize("elementwise", [False, True])
    def test_autograd_equals_finite_differences_in_plain_loops(self, kind: AttentionKind, elementwise: bool) -> None:
        maps = normal(BATCH, CHANNELS, HEIGHT, WIDTH, seed=16)
        positive, negatives = others(kind)
        direction = score_direction(kind, embed_by_place(maps), positive, negatives)
        step, expected = 1e-6, torch.zeros(BATCH, HEIGHT, WIDTH, dtype=torch.float64)
        for i in range(BATCH):
            for k in range(CHANNELS):
                slopes = torch.zeros(HEIGHT, WIDTH, dtype=torch.float64)
                for y in range(HEIGHT):
                    for x in range(WIDTH):
                        up, down = maps[i : i + 1].clone(), maps[i : i + 1].clone()
                        up[0, k, y, x] += step
                        down[0, k, y, x] -= step
                        rise = (direction[i] * (embed_by_place(up)[0] - embed_by_place(down)[0])).sum().item()
                        slopes[y, x] = rise / (2 * step)
                alpha = slopes.sum().item() / (HEIGHT * WIDTH)
                for y in range(HEIGHT):
                    for x in range(WIDTH):
                        expected[i, y, x] += (slopes[y, x].item() if elementwise else alpha) * maps[i, k, y, x]
        leaf = maps.clone().requires_grad_()
        scores = (direction * embed_by_place(leaf)).sum(1)
        (signed,) = gradient_attention(scores, [leaf], elementwise=elementwise, rectify=False)
        torch.testing.assert_close(signed, expected, rtol=1e-5, atol=1e-9)
        (rectified,) = gradient_attention(scores, [leaf], elementwise=elementwise)
        torch.testing.assert_close(rectified, expected.clamp_min(0), rtol=1e-5, atol=1e-9)
        assert (signed < 0).any()

    @pytest.mark.parametrize("elementwise", [False, True])
    @pytest.mark.parametrize("rectify", [False, True])
    def test_gradcheck_of_autograd(self, kind: AttentionKind, elementwise: bool, rectify: bool) -> None:
        """Double backward into the maps' own maker and, for cosine and margin, into the support embeddings."""
        images = normal(1, 3, HEIGHT, WIDTH, seed=17)
        weight = normal(CHANNELS, 3, 1, 1, seed=18).requires_grad_()
        positive, negatives = unit(20)[:1], [unit(21 + i)[:1] for i in range(NEGATIVES[kind])]
        direction = score_direction(kind, embed_by_place(F.conv2d(images, weight)), positive, negatives).detach()

        def attend(kernel: Tensor, vector: Tensor, *, with_sign: bool) -> Tensor:
            maps = F.softplus(F.conv2d(images, kernel))
            scores = (vector * embed_by_place(maps)).sum(1)
            keep = {"create_graph": True, "elementwise": elementwise, "rectify": not with_sign}
            return gradient_attention(scores, [maps], **keep)[0]

        # away from the kink of the ReLU, where finite differences are wrong
        signed = attend(weight, direction, with_sign=True)
        assert signed.abs().min() > 1e-5
        assert (signed > 0).any()
        vector = direction.requires_grad_()
        assert torch.autograd.gradcheck(lambda w, v: attend(w, v, with_sign=not rectify), (weight, vector), eps=1e-7)

    def test_elementwise_equals_captum(self, kind: AttentionKind) -> None:
        positive, negatives = others(kind)
        network = nn.Conv2d(3, CHANNELS, 3, padding=1, dtype=torch.float64)
        images = normal(BATCH, 3, HEIGHT, WIDTH, seed=4)
        direction = score_direction(kind, embed_by_place(network(images)), positive, negatives).detach()

        class Score(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(self, pictures: Tensor) -> Tensor:
                return (direction * embed_by_place(self.network(pictures))).sum(1)

        model = Score()
        expected = LayerGradientXActivation(model, model.network).attribute(images).sum(1)
        maps = network(images)
        scores = (direction * embed_by_place(maps)).sum(1)
        (actual,) = gradient_attention(scores, [maps], elementwise=True, rectify=False)
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-9, atol=1e-13)

    def test_elementwise_changes_nothing_behind_global_pooling(self, kind: AttentionKind) -> None:
        maps = normal(BATCH, CHANNELS, HEIGHT, WIDTH, seed=2).requires_grad_()
        positive, negatives = others(kind)
        direction = score_direction(kind, embed(maps), positive, negatives)
        (actual,) = gradient_attention((direction * embed(maps)).sum(1), [maps], elementwise=True)
        torch.testing.assert_close(actual, similarity_attention(maps, direction).detach())

    def test_wrong_number_of_negatives(self, kind: AttentionKind) -> None:
        positive, negatives = others(kind)
        if negatives:
            with pytest.raises(ValueError, match=f"'{kind}' needs {len(negatives)} negative"):
                score_direction(kind, unit(1), positive, negatives[:-1])


class TestWeighMaps:
    def test_hand_worked(self) -> None:
        maps = torch.tensor([[[[1.0, 2.0]], [[4.0, 0.0]]]])
        gradients = torch.tensor([[[[3.0, 1.0]], [[-2.0, 0.0]]]])  # means 2 and -1
        assert weigh_maps(maps, gradients).tolist() == [[[0.0, 4.0]]]
        assert weigh_maps(maps, gradients, rectify=False).tolist() == [[[-2.0, 4.0]]]
        assert weigh_maps(maps, gradients, elementwise=True).tolist() == [[[0.0, 2.0]]]
        assert weigh_maps(maps, gradients, elementwise=True, rectify=False).tolist() == [[[-5.0, 2.0]]]


class TestGradientAttention:
    def test_hand_worked(self) -> None:
        maps = torch.tensor([[[[1.0, 2.0]], [[4.0, 0.0]]]], requires_grad=True)
        scores = 2 * maps[:, 0].sum((1, 2)) - maps[:, 1].sum((1, 2))  # alpha = 2, -1
        (attention,) = gradient_attention(scores, [maps])
        assert attention.tolist() == [[[0.0, 4.0]]]  # 2*1 - 4 = -2 is rectified
        (signed,) = gradient_attention(scores, [maps], rectify=False)
        assert signed.tolist() == [[[-2.0, 4.0]]]

    def test_several_levels_in_one_pass(self) -> None:
        low = normal(2, 4, 6, 6, seed=1).requires_grad_()
        layer = nn.Conv2d(4, 5, 3, stride=2, padding=1, dtype=torch.float64)
        high = layer(low)
        scores = embed(high).sum(1) + low.square().mean((1, 2, 3))
        both = gradient_attention(scores, (low, high))
        assert [tuple(level.shape) for level in both] == [(2, 6, 6), (2, 3, 3)]
        for level, alone in zip((low, high), both, strict=True):
            torch.testing.assert_close(gradient_attention(scores, [level])[0], alone)

    def test_graph_only_on_request(self) -> None:
        maps = normal(1, 2, 3, 3, seed=1).requires_grad_()
        scores = embed(maps).sum(1)
        assert not gradient_attention(scores, [maps])[0].requires_grad
        assert gradient_attention(scores, [maps], create_graph=True)[0].requires_grad

    def test_leaves_gradients_and_inputs_alone(self) -> None:
        maps = normal(1, 2, 3, 3, seed=1).requires_grad_()
        copy = maps.detach().clone()
        gradient_attention(embed(maps).sum(1), [maps])
        assert maps.grad is None
        assert torch.equal(maps, copy)

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_works_inside_no_grad(self, create_graph: bool) -> None:
        maps = normal(2, 3, 4, 4, seed=1).requires_grad_()
        scores = embed(maps).sum(1)
        expected = gradient_attention(scores, [maps])[0]
        with torch.no_grad():
            actual = gradient_attention(scores, [maps], create_graph=create_graph)[0]
        torch.testing.assert_close(actual.detach(), expected)
        assert actual.requires_grad == create_graph

    def test_inference_mode_gets_a_clear_error(self) -> None:
        maps = normal(2, 3, 4, 4, seed=1).requires_grad_()
        scores = embed(maps).sum(1)
        with torch.inference_mode(), pytest.raises(ValueError, match=r"outside torch\.inference_mode"):
            gradient_attention(scores, [maps])
        with torch.inference_mode():
            born_there = normal(2, 3, 4, 4, seed=1)
            scores = embed(born_there).sum(1)
        with pytest.raises(ValueError, match="need"):
            gradient_attention(scores, [born_there])

    def test_scores_without_gradient(self) -> None:
        with pytest.raises(ValueError, match="needs scores that carry a gradient"):
            gradient_attention(torch.zeros(2), [torch.zeros(2, 3, 4, 4)])

    def test_unrelated_maps(self) -> None:
        related, unrelated = (normal(2, 3, 4, 4, seed=s).requires_grad_() for s in (1, 2))
        scores = embed(related).sum(1)
        with pytest.raises(ValueError, match=r"do not depend on maps\[1\]"):
            gradient_attention(scores, [related, unrelated])
        with pytest.raises(ValueError, match=r"maps\[1\] do not require grad"):
            gradient_attention(scores, [related, related.detach()])

    def test_a_bare_tensor_is_refused(self) -> None:
        maps = normal(2, 3, 4, 4, seed=1).requires_grad_()
        with pytest.raises(ValueError, match=r"pass \[maps\]"):
            gradient_attention(embed(maps).sum(1), maps)


class TestSimilarityAttention:
    def test_does_not_depend_on_the_length_of_the_maps(self) -> None:
        """f does not change with |A|, and the gradient shrinks as A grows: their product stays."""
        maps, direction = normal(2, 3, 4, 4, seed=1), normal(2, 3, seed=2)
        torch.testing.assert_close(similarity_attention(7.5 * maps, direction), similarity_attention(maps, direction))

    def test_looking_for_itself_finds_nothing(self) -> None:
        """The cosine with itself is at its maximum, so its gradient is zero."""
        maps = normal(2, 3, 4, 4, seed=1)
        assert similarity_attention(maps, embed(maps)).abs().max() < 1e-14

    def test_zero_maps_give_zero(self) -> None:
        maps = torch.zeros(1, 3, 2, 2, requires_grad=True)
        attention = similarity_attention(maps, torch.ones(1, 3))
        assert attention.tolist() == [[[0.0, 0.0], [0.0, 0.0]]]


class TestDirections:
    def test_weights_hand_worked(self) -> None:
        anchor, other = torch.tensor([[0.5, -0.25]]), torch.tensor([[0.25, 0.5]])
        assert similar_weight(anchor, other).tolist() == [[0.75, 0.25]]
        assert dissimilar_weight(anchor, other).tolist() == [[0.25, 0.75]]

    @pytest.mark.parametrize("kind", ["siamese", "triplet", "quadruplet"])
    def test_difference_weights_are_detached(self, kind: AttentionKind) -> None:
        anchor, positive = unit(1).requires_grad_(), unit(2).requires_grad_()
        negatives = [unit(3 + i).requires_grad_() for i in range(NEGATIVES[kind])]
        assert not score_direction(kind, anchor, positive, negatives).requires_grad

    @pytest.mark.parametrize("kind", ["cosine", "margin"])
    def test_support_embeddings_of_cosine_and_margin_can_be_trained(self, kind: AttentionKind) -> None:
        anchor, positive = unit(1).requires_grad_(), unit(2).requires_grad_()
        negatives = [unit(3 + i).requires_grad_() for i in range(NEGATIVES[kind])]
        direction = score_direction(kind, anchor, positive, negatives)
        gradients = torch.autograd.grad(
            direction.square().sum() + direction.sum(), [anchor, positive, *negatives], allow_unused=True
        )
        assert gradients[0] is None  # the score is linear in the query's embedding
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[1:])

    @pytest.mark.parametrize("kind", ATTENTION_KINDS)
    def test_length_of_support_embeddings_does_not_matter(self, kind: AttentionKind) -> None:
        positive, negatives = others(kind)
        expected = score_direction(kind, unit(1), positive, negatives)
        torch.testing.assert_close(score_direction(kind, unit(1), 3 * positive, [5 * n for n in negatives]), expected)

    def test_unknown_kind(self) -> None:
        with pytest.raises(ValueError, match="unknown attention kind 'pair'; known: siamese, triplet"):
            score_direction("pair", unit(1), unit(2), [])  # type: ignore[arg-type]


class TestImageDirections:
    @pytest.mark.parametrize("kind", ["siamese", "triplet", "quadruplet"])
    def test_images_of_the_literal_forms_share_one_weight(self, kind: AttentionKind) -> None:
        positive, negatives = others(kind)
        directions = image_directions(kind, unit(1), positive, negatives)
        assert len(directions) == 2 + len(negatives)
        for direction in directions:
            torch.testing.assert_close(direction, score_direction(kind, unit(1), positive, negatives))

    def test_dissimilar_pair(self) -> None:
        anchor, negative = torch.tensor([[0.5, -0.25]], requires_grad=True), torch.tensor([[0.25, 0.5]])
        directions = image_directions("siamese", anchor, None, [negative])
        assert [direction.tolist() for direction in directions] == [[[0.25, 0.75]], [[0.25, 0.75]]]
        assert not any(direction.requires_grad for direction in directions)

    def test_cosine_and_margin_are_the_gradients_of_their_scores(self) -> None:
        anchor, positive, negative = (unit(seed).requires_grad_() for seed in (1, 2, 3))
        cosine = torch.autograd.grad((anchor * positive).sum(), [anchor, positive])
        torch.testing.assert_close(image_directions("cosine", anchor, positive, []), cosine)
        margin = torch.autograd.grad((anchor * positive - anchor * negative).sum(), [anchor, positive, negative])
        directions = image_directions("margin", anchor, positive, [negative])
        torch.testing.assert_close(directions[:2], margin[:2])
        torch.testing.assert_close(directions[2], -margin[2])  # the negative shows its likeness to the anchor
        assert all(direction.requires_grad for direction in directions)

    def test_a_missing_positive(self) -> None:
        with pytest.raises(ValueError, match="only kind 'siamese' with one negative goes without"):
            image_directions("triplet", unit(1), None, [unit(2)])


class TestScaleMap:
    def test_hand_worked(self) -> None:
        maps = torch.tensor([[[-2.0, 0.0], [2.0, 6.0]], [[1.0, 1.0], [1.0, 3.0]]])
        assert scale_map(maps).tolist() == [[[0.0, 0.25], [0.5, 1.0]], [[0.0, 0.0], [0.0, 1.0]]]

    def test_resizes_bilinearly_then_scales(self) -> None:
        # align_corners=False from 2 to 4 cells: 0, 1/4, 3/4, 1 of the way
        scaled = scale_map(torch.tensor([[[2.0, 6.0]]]), (1, 4))
        torch.testing.assert_close(scaled, torch.tensor([[[0.0, 0.25, 0.75, 1.0]]]))

    @settings(deadline=None, max_examples=40)
    @given(st.floats(-1e3, 1e3, width=32), st.integers(2, 13), st.integers(3, 40))
    def test_a_constant_map_is_zero_at_any_size(self, value: float, side: int, size: int) -> None:
        scaled = scale_map(torch.full((1, side, side), value), (size, size + 1))
        assert torch.count_nonzero(scaled) == 0

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 2**16), st.floats(0.01, 100), st.floats(-10, 10))
    def test_affine_changes_of_the_map_do_not_matter(self, seed: int, factor: float, offset: float) -> None:
        maps = normal(2, 4, 5, seed=seed)
        scaled = scale_map(maps, (9, 8))
        assert scaled.amin((1, 2)).tolist() == [0, 0]
        assert scaled.amax((1, 2)).tolist() == [1, 1]
        torch.testing.assert_close(scale_map(factor * maps + offset, (9, 8)), scaled, rtol=1e-6, atol=1e-8)

    def test_gradients_stay_finite_at_a_constant_map(self) -> None:
        maps = torch.full((1, 3, 3), 0.7, requires_grad=True)
        scale_map(maps, (6, 6)).sum().backward()
        assert maps.grad is not None
        assert torch.isfinite(maps.grad).all()
