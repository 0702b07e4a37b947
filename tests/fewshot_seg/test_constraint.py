"""The trainable constraint against plain loops, finite differences and hand-worked cases, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.attention import gradient_attention, scale_map
from fewshot_seg.constraint import SimilarityMining, mask_features, mask_images, similarity_mining_loss, soft_mask
from fewshot_seg.similarity import SimilarityNetwork


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop_resize(rows: list[list[float]], size: tuple[int, int]) -> list[list[float]]:
    """Bilinear at pixel centres: the place of output pixel i is (i + 1/2) scale - 1/2, clamped to the grid."""

    def places(old: int, new: int) -> list[tuple[int, int, float]]:
        spots = [min(max((i + 0.5) * old / new - 0.5, 0.0), old - 1.0) for i in range(new)]
        return [(int(spot), min(int(spot) + 1, old - 1), spot - int(spot)) for spot in spots]

    def blend(one: float, other: float, share: float) -> float:
        return one * (1 - share) + other * share

    return [
        [blend(blend(rows[y0][x0], rows[y0][x1], x), blend(rows[y1][x0], rows[y1][x1], x), y)
         for x0, x1, x in places(len(rows[0]), size[1])]
        for y0, y1, y in places(len(rows), size[0])
    ]  # fmt: skip


class TestSoftMask:
    def test_equals_plain_loops(self) -> None:
        attention = uniform(2, 3, 4, seed=0)
        expected = [
            [[1 / (1 + math.exp(-7.5 * (m - 0.3))) for m in row] for row in rows] for rows in attention.tolist()
        ]
        actual = soft_mask(attention, sharpness=7.5, threshold=0.3)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))

    def test_large_sharpness_is_a_hard_mask(self) -> None:
        attention = uniform(2, 5, 5, seed=1)
        hard = soft_mask(attention, sharpness=1e6, threshold=0.4)
        torch.testing.assert_close(hard, (attention > 0.4).double())

    def test_gradcheck_in_everything(self) -> None:
        inputs = (uniform(2, 3, 3, seed=2).requires_grad_(), torch.tensor(6.0, dtype=torch.float64, requires_grad=True),
                  torch.tensor(0.4, dtype=torch.float64, requires_grad=True))  # fmt: skip
        assert torch.autograd.gradcheck(lambda m, a, b: soft_mask(m, sharpness=a, threshold=b), inputs)

    @pytest.mark.parametrize("sharpness", [0.0, -3.0, math.inf, math.nan])
    def test_sharpness_out_of_range(self, sharpness: float) -> None:
        with pytest.raises(DataError, match=f"sharpness of the soft mask must be a number above 0, got {sharpness}"):
            soft_mask(torch.zeros(1, 2, 2), sharpness=sharpness, threshold=torch.tensor(0.5))
        with pytest.raises(DataError, match="sharpness of the soft mask"):
            SimilarityMining(sharpness=sharpness)

    @pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, 1.5, math.nan])
    def test_threshold_out_of_range(self, threshold: float) -> None:
        with pytest.raises(DataError, match=f"between 0 and 1, both excluded, got {threshold}"):
            soft_mask(torch.zeros(1, 2, 2), sharpness=torch.tensor(10.0), threshold=threshold)
        with pytest.raises(DataError, match="threshold of the soft mask"):
            SimilarityMining(threshold=threshold)


class TestMaskImages:
    @pytest.mark.parametrize("size", [(6, 9), (3, 4), (7, 5)])
    def test_equals_plain_loops(self, size: tuple[int, int]) -> None:
        images, mask = uniform(2, 3, *size, seed=0), uniform(2, 3, 4, seed=1)
        actual = mask_images(images, mask)
        for n in range(2):
            sigma = torch.tensor(loop_resize(mask[n].tolist(), size), dtype=torch.float64)
            torch.testing.assert_close(actual[n], images[n] * (1 - sigma))

    def test_fill_per_channel_and_per_pixel(self) -> None:
        images, mask, mean = uniform(2, 3, 4, 4, seed=0), uniform(2, 4, 4, seed=1), uniform(3, seed=2)
        expected = images.clone()
        for n in range(2):
            for c in range(3):
                expected[n, c] = images[n, c] * (1 - mask[n]) + mean[c] * mask[n]
        torch.testing.assert_close(mask_images(images, mask, mean), expected)
        pictures = mean[None, :, None, None].expand_as(images)
        torch.testing.assert_close(mask_images(images, mask, pictures), expected)

    def test_zero_mask_keeps_and_full_mask_removes(self) -> None:
        images, mean = uniform(1, 3, 4, 6, seed=0), uniform(3, seed=1)
        assert torch.equal(mask_images(images, torch.zeros(1, 2, 3, dtype=torch.float64), mean), images)
        removed = mask_images(images, torch.ones(1, 2, 3, dtype=torch.float64), mean)
        torch.testing.assert_close(removed, mean[None, :, None, None].expand_as(images))

    def test_gradcheck(self) -> None:
        inputs = (uniform(1, 3, 5, 4, seed=0).requires_grad_(), uniform(1, 2, 3, seed=1).requires_grad_())
        assert torch.autograd.gradcheck(lambda i, m: mask_images(i, m, torch.full((3,), 0.4)), inputs)

    def test_shapes_that_do_not_fit(self) -> None:
        images = torch.zeros(2, 3, 4, 4)
        with pytest.raises(DataError, match=r"expected images \(B, 3, H, W\), got shape \(3, 4, 4\)"):
            mask_images(images[0], torch.zeros(2, 2, 2))
        for shape in ((1, 2, 2), (2, 1, 2, 2)):
            with pytest.raises(DataError, match=r"one mask \(h, w\) per image, shape \(2, h, w\), got \("):
                mask_images(images, torch.zeros(shape))
        with pytest.raises(DataError, match=r"expected float images or features to mask, got torch\.uint8"):
            mask_images(images.to(torch.uint8), torch.zeros(2, 2, 2))
        with pytest.raises(DataError, match=r"fill must be one value per channel .* got shape \(4, 1, 1\)"):
            mask_images(images, torch.zeros(2, 2, 2), torch.zeros(4))


class TestMaskFeatures:
    def test_finer_and_coarser_levels(self) -> None:
        mask = uniform(2, 4, 4, seed=0)
        levels = (uniform(2, 3, 8, 8, seed=1), uniform(2, 5, 4, 4, seed=2))
        masked = mask_features(levels, mask)
        assert isinstance(masked, tuple)
        sigma = torch.tensor([loop_resize(rows, (8, 8)) for rows in mask.tolist()], dtype=torch.float64)
        torch.testing.assert_close(masked[0], levels[0] * (1 - sigma[:, None]))
        torch.testing.assert_close(masked[1], levels[1] * (1 - mask[:, None]))

    def test_a_much_coarser_level_sees_every_cell_of_the_mask(self) -> None:
        """Without antialiasing, one of eight cells could be masked and a coarse level would not know."""
        for cell in range(8):
            mask = torch.zeros(1, 8, 8)
            mask[0, :, cell] = 1
            (masked,) = mask_features((torch.ones(1, 1, 2, 2),), mask)
            assert masked.min() < 1

    def test_gradcheck(self) -> None:
        inputs = (uniform(1, 2, 4, 4, seed=0).requires_grad_(), uniform(1, 3, 2, 2, seed=1).requires_grad_(),
                  uniform(1, 5, 5, seed=2).requires_grad_())  # fmt: skip
        assert torch.autograd.gradcheck(lambda one, two, m: mask_features((one, two), m), inputs)

    def test_a_bare_tensor_is_refused(self) -> None:
        with pytest.raises(DataError, match=r"pass \(maps,\)"):
            mask_features(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3))  # type: ignore[arg-type]
        with pytest.raises(DataError, match="one mask"):
            mask_features((torch.zeros(1, 2, 3, 3),), torch.zeros(2, 3, 3))

    def test_cells_normalised_afterwards_undo_the_mask(self) -> None:
        """As its docstring warns: mask the maps that are pooled, not those that join_levels normalises."""
        network, levels, mask = SimilarityNetwork([6], rank=0), (normal(1, 6, 4, 4, seed=0),), uniform(1, 4, 4, seed=1)
        torch.testing.assert_close(network(mask_features(levels, mask)), network(levels))
        maps = network(levels)
        (masked,) = mask_features((maps,), mask)
        torch.testing.assert_close(network.embed(masked), network.embed(maps, 1 - mask))


class TestSimilarityMiningLoss:
    def test_equals_plain_loops(self) -> None:
        triple = [normal(4, 5, seed=seed) for seed in range(3)]
        total = 0.0
        for rows in zip(*(points.tolist() for points in triple), strict=True):
            a, p, n = ([x / math.hypot(*row) for x in row] for row in rows)
            total += abs(math.dist(a, p) - math.dist(a, n))
        assert similarity_mining_loss(*triple).item() == pytest.approx(total / 4, rel=1e-9)

    def test_gradcheck(self) -> None:
        triple = tuple(normal(3, 4, seed=seed).requires_grad_() for seed in range(3))
        assert torch.autograd.gradcheck(similarity_mining_loss, triple)

    def test_coinciding_embeddings_give_finite_gradients(self) -> None:
        anchor = normal(2, 4, seed=0).requires_grad_()
        positive, negative = anchor.detach().clone().requires_grad_(), normal(2, 4, seed=1).requires_grad_()
        similarity_mining_loss(anchor, positive, negative).backward()
        for points in (anchor, positive, negative):
            assert points.grad is not None
            assert torch.isfinite(points.grad).all()

    def test_zero_where_nothing_tells_them_apart(self) -> None:
        anchor, other = normal(2, 4, seed=0), normal(2, 4, seed=1)
        assert similarity_mining_loss(anchor, other, 3 * other).item() == pytest.approx(0, abs=1e-12)

    def test_half_precision_is_computed_in_float32(self) -> None:
        triple = [normal(3, 4, seed=seed).half() for seed in range(3)]
        assert similarity_mining_loss(*triple).dtype == torch.float32

    def test_shapes_that_differ(self) -> None:
        with pytest.raises(DataError, match=r"one shape \(B, D\), got \(2, 4\), \(2, 4\), \(3, 4\)"):
            similarity_mining_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3, 4))
        with pytest.raises(DataError, match="three embeddings"):
            similarity_mining_loss(*[torch.zeros(4)] * 3)


def test_scale_map_passes_gradients() -> None:
    assert torch.autograd.gradcheck(scale_map, normal(2, 3, 4, seed=0).requires_grad_())
    rectified = normal(2, 3, 4, seed=1).requires_grad_()  # many ties at the minimum, 0
    assert torch.autograd.gradcheck(lambda maps: scale_map(maps.relu()), rectified)


class TinyModel:
    """Photos -> smooth convolution maps -> embedding, with weights given from outside."""

    def __init__(self, *weights: Tensor) -> None:
        self.first, self.last = weights

    def maps(self, photos: Tensor) -> Tensor:
        return F.softplus(F.conv2d(F.softplus(F.conv2d(photos, self.first, padding=1)), self.last, stride=2))

    def embed(self, photos: Tensor) -> Tensor:
        return F.normalize(self.maps(photos).mean((2, 3)), dim=1)

    def attention(self, photos: Tensor, direction: Tensor) -> Tensor:
        maps = self.maps(photos)
        scores = (direction * F.normalize(maps.mean((2, 3)), dim=1)).sum(1)
        return gradient_attention(scores, [maps], create_graph=True)[0]


def new_weights() -> tuple[Tensor, Tensor]:
    return normal(4, 3, 3, 3, seed=20).requires_grad_(), normal(5, 4, 2, 2, seed=21).requires_grad_()


PHOTOS = tuple(uniform(2, 3, 8, 8, seed=seed) for seed in (10, 11, 12))
DIRECTIONS = tuple(normal(2, 5, seed=seed) for seed in (13, 14, 15))  # the formulas detach them: constants


def constraint_of(mining: SimilarityMining, *weights: Tensor, detached: bool = False, domain: str = "image") -> Tensor:
    model = TinyModel(*weights)
    attention = tuple(model.attention(photos, direction) for photos, direction in zip(PHOTOS, DIRECTIONS, strict=True))
    if detached:
        attention = tuple(a.detach() for a in attention)
    one, two, three = attention
    if domain == "image":
        return mining(model.embed, mask_images, PHOTOS, (one, two, three))

    def pool(levels: tuple[Tensor, ...]) -> Tensor:
        return F.normalize(levels[0].mean((2, 3)), dim=1)

    a, p, n = ((model.maps(photos),) for photos in PHOTOS)
    return mining(pool, mask_features, (a, p, n), (one, two, three))


class TestSimilarityMining:
    def test_equals_its_parts(self) -> None:
        weights = new_weights()
        model, mining = TinyModel(*weights), SimilarityMining(sharpness=8, threshold=0.4)
        masked = []
        for photos, direction in zip(PHOTOS, DIRECTIONS, strict=True):
            attention = model.attention(photos, direction)
            low, high = attention.amin((1, 2), keepdim=True), attention.amax((1, 2), keepdim=True)
            sigma = torch.sigmoid(8 * ((attention - low) / (high - low) - 0.4))
            sigma = torch.tensor([loop_resize(rows, (8, 8)) for rows in sigma.tolist()], dtype=torch.float64)
            masked.append(model.embed(photos * (1 - sigma[:, None])))
        actual = constraint_of(mining, *weights)
        torch.testing.assert_close(actual, similarity_mining_loss(*masked), rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("domain", ["image", "feature"])
    @pytest.mark.parametrize("learnable", [False, True])
    def test_gradcheck_through_the_attention(self, domain: str, learnable: bool) -> None:
        """Gradients with respect to the weights of the network, mask and all, against finite differences."""
        mining = SimilarityMining(learnable=learnable).double()
        weights = new_weights()
        assert torch.autograd.gradcheck(lambda *w: constraint_of(mining, *w, domain=domain), weights)

    @pytest.mark.parametrize("domain", ["image", "feature"])
    def test_gradient_reaches_the_network_through_the_attention(self, domain: str) -> None:
        weights = new_weights()
        full = constraint_of(SimilarityMining(), *weights, domain=domain)
        constant_mask = constraint_of(SimilarityMining(), *weights, detached=True, domain=domain)
        assert torch.equal(full, constant_mask)
        for one, other in zip(
            torch.autograd.grad(full, weights), torch.autograd.grad(constant_mask, weights), strict=True
        ):
            assert (one - other).abs().max() > 1e-3 * one.abs().max()

    def test_training_with_it_lowers_it(self) -> None:
        weights = new_weights()
        optimiser = torch.optim.Adam(weights, lr=0.01)
        before = constraint_of(SimilarityMining(), *weights).item()
        for _ in range(30):
            optimiser.zero_grad()
            constraint_of(SimilarityMining(), *weights).backward()
            optimiser.step()
        assert constraint_of(SimilarityMining(), *weights).item() < 0.5 * before

    def test_learned_values_receive_gradients_and_stay_in_range(self) -> None:
        mining = SimilarityMining(sharpness=4, threshold=0.3, learnable=True).double()
        assert mining.sharpness.item() == pytest.approx(4, rel=1e-6)
        assert mining.threshold.item() == pytest.approx(0.3, rel=1e-6)
        parameters = dict(mining.named_parameters())
        assert set(parameters) == {"log_sharpness", "logit_threshold"}
        constraint_of(mining, *new_weights()).backward()
        for parameter in parameters.values():
            assert parameter.grad is not None
            assert parameter.grad.abs() > 0
        with torch.no_grad():
            mining.log_sharpness -= 20
            mining.logit_threshold -= 20
        assert mining.sharpness > 0
        assert 0 < mining.threshold < 1

    def test_gradcheck_in_the_learned_values(self) -> None:
        mining = SimilarityMining(learnable=True).double()
        weights = new_weights()

        def value(log_sharpness: Tensor, logit_threshold: Tensor) -> Tensor:
            changed = {"log_sharpness": log_sharpness, "logit_threshold": logit_threshold}
            model = TinyModel(*weights)
            one, two, three = (model.attention(*pair).detach() for pair in zip(PHOTOS, DIRECTIONS, strict=True))
            arguments = (model.embed, mask_images, PHOTOS, (one, two, three))
            return torch.func.functional_call(mining, changed, arguments)  # type: ignore[no-any-return]

        assert torch.autograd.gradcheck(value, tuple(p.detach().requires_grad_() for p in mining.parameters()))

    def test_fixed_values_are_no_parameters_and_are_saved(self) -> None:
        mining = SimilarityMining(sharpness=25, threshold=0.7)
        assert not list(mining.parameters())
        restored = SimilarityMining()
        restored.load_state_dict(mining.state_dict())
        assert restored.sharpness.item() == pytest.approx(25, rel=1e-6)
        assert repr(restored) == "SimilarityMining(sharpness=25, threshold=0.7)"

    def test_what_is_masked_has_no_influence(self) -> None:
        """Attention on the left half, a hard mask: whatever the left half shows, the loss is the same."""
        attention = torch.zeros(2, 8, 8, dtype=torch.float64)
        attention[:, :, :4] = 1
        mining, model = SimilarityMining(sharpness=1e4), TinyModel(*new_weights())
        other_left = tuple(photos.clone() for photos in PHOTOS)
        for seed, photos in enumerate(other_left):
            photos[..., :4] = uniform(2, 3, 8, 4, seed=seed)
        one = mining(model.embed, mask_images, PHOTOS, (attention,) * 3)
        other = mining(model.embed, mask_images, (other_left[0], other_left[1], other_left[2]), (attention,) * 3)
        assert torch.equal(one, other)
        unmasked = [model.embed(photos) for photos in other_left]
        assert (similarity_mining_loss(*unmasked) - one).abs() > 1e-4

    def test_domains_agree_where_features_are_the_photos(self) -> None:
        """Masking before or after a network that does nothing is the same; so is a 1 x 1 convolution without bias."""
        attention = tuple(uniform(2, 4, 4, seed=seed) for seed in range(3))
        one, two, three = attention
        mining, weight = SimilarityMining(), normal(5, 3, 1, 1, seed=5)

        def pool(maps: Tensor) -> Tensor:
            return maps.mean((2, 3))

        image = mining(lambda photos: pool(F.conv2d(photos, weight)), mask_images, PHOTOS, (one, two, three))
        a, p, n = ((F.conv2d(photos, weight),) for photos in PHOTOS)
        feature = mining(lambda levels: pool(levels[0]), mask_features, (a, p, n), (one, two, three))
        torch.testing.assert_close(image, feature)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        """As under autocast: the mask is computed in float32 and takes the photos' dtype."""
        attention, photos = uniform(2, 4, 4, seed=0).to(dtype).requires_grad_(), PHOTOS[0].to(dtype)
        masked = mask_images(photos, SimilarityMining().mask(attention))
        assert masked.dtype == dtype
        masked.sum().backward()
        assert attention.grad is not None
        assert torch.isfinite(attention.grad).all()
        expected = mask_images(PHOTOS[0], SimilarityMining().mask(attention.detach().double()))
        torch.testing.assert_close(masked.double(), expected, rtol=0.02, atol=0.01)

    def test_attention_that_is_zero_everywhere(self) -> None:
        attention = torch.zeros(1, 3, 3, requires_grad=True)
        mask = SimilarityMining().mask(attention)
        torch.testing.assert_close(mask.detach(), torch.full((1, 3, 3), 1 / (1 + math.exp(5))))
        mask.sum().backward()
        assert attention.grad is not None
        assert torch.isfinite(attention.grad).all()
