"""Deletion, insertion and the energy inside the object, against plain loops and hand-worked curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.faithfulness import (
    PERTURBATION_MODES,
    PerturbationMode,
    blurred,
    curve_area,
    energy_inside,
    perturbation_curve,
    perturbation_order,
)

SEEDS = st.integers(0, 2**16)


def uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(weights: Tensor) -> Callable[[Tensor], Tensor]:
    """Similarity sum(weights * pixels), weights (B, H, W), the same for the three colours."""
    return lambda images: (weights[:, None] * images).sum((1, 2, 3))


class TestPerturbationOrder:
    @settings(deadline=None, max_examples=40)
    @given(SEEDS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
    def test_the_more_salient_pixel_goes_first(self, seed: int, h: int, w: int, height: int, width: int) -> None:
        saliency = uniform(2, h, w, seed=seed) - 0.5
        ranks = perturbation_order(saliency, (height, width))
        resized = F.interpolate(saliency[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
        for one_ranks, one_map in zip(ranks, resized, strict=True):
            assert sorted(one_ranks.flatten().tolist()) == list(range(height * width))
            in_order = one_map.flatten()[one_ranks.flatten().argsort()]
            assert (in_order.diff() <= 1e-7).all()

    @pytest.mark.parametrize("value", [0.0, 0.7, -1 / 3, 1e6])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_constant_map_goes_in_random_order_whatever_its_value(self, value: float, dtype: torch.dtype) -> None:
        """The rounding noise of the interpolation must not become an order."""
        ranks = perturbation_order(torch.full((1, 7, 7), value, dtype=dtype), (40, 30), seed=5)
        assert torch.equal(ranks, perturbation_order(torch.zeros(1, 1, 1), (40, 30), seed=5))
        rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(30.0), indexing="ij")
        for place in (rows, columns, (rows - 19.5) ** 2 + (columns - 14.5) ** 2):  # no side, no centre
            assert abs(np.corrcoef(place.flatten(), ranks.flatten())[0, 1]) < 0.1

    def test_a_plateau_is_ranked_like_the_permutation(self) -> None:
        saliency = torch.zeros(1, 4, 4)
        saliency[0, 1, 2] = 1
        ranks, constant = perturbation_order(saliency, (4, 4)), perturbation_order(torch.zeros(1, 4, 4), (4, 4))
        assert ranks[0, 1, 2] == 0
        others = torch.arange(16) != 6
        assert torch.equal(ranks.flatten()[others].argsort(), constant.flatten()[others].argsort())

    def test_seed_and_batch(self) -> None:
        saliency = (4 * uniform(5, 3, 3, seed=1)).round()
        ranks = perturbation_order(saliency, (6, 6), seed=2)
        for i in range(5):
            assert torch.equal(perturbation_order(saliency[i : i + 1], (6, 6), seed=2), ranks[i : i + 1])
        assert not torch.equal(perturbation_order(saliency, (6, 6), seed=3), ranks)

    def test_scale_does_not_matter(self) -> None:
        saliency = uniform(2, 4, 5, seed=1)
        expected = perturbation_order(saliency, (9, 8))
        assert torch.equal(perturbation_order(1e-12 * saliency, (9, 8)), expected)

    def test_bad_inputs(self) -> None:
        with pytest.raises(DataError, match=r"saliency must be float \(B, h, w\); got torch.float32 \(4, 4\)"):
            perturbation_order(torch.zeros(4, 4), (8, 8))
        with pytest.raises(DataError, match=r"got torch\.uint8"):
            perturbation_order(torch.zeros(1, 4, 4, dtype=torch.uint8), (8, 8))
        with pytest.raises(DataError, match="saliency must be finite"):
            perturbation_order(torch.full((1, 2, 2), math.nan), (8, 8))


class TestPerturbationCurve:
    WEIGHTS = torch.tensor([[[4.0, 1.0], [3.0, 2.0]]])

    def test_hand_worked(self) -> None:
        photo, grey = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)

        def curve(mode: PerturbationMode, steps: int) -> list[list[float]]:
            return perturbation_curve(
                linear(self.WEIGHTS / 3), photo, self.WEIGHTS, mode=mode, baseline=grey, steps=steps
            ).tolist()

        assert curve("deletion", 4) == [pytest.approx([10, 6, 3, 1, 0])]  # 4, then 3, then 2, then 1 goes
        assert curve("insertion", 4) == [pytest.approx([0, 4, 7, 9, 10])]
        assert curve("deletion", 2) == [pytest.approx([10, 3, 0])]
        assert curve("deletion", 1) == [pytest.approx([10, 0])]

    @settings(deadline=None, max_examples=30)
    @given(SEEDS, st.sampled_from(PERTURBATION_MODES), st.integers(1, 20))
    def test_equals_a_plain_loop(self, seed: int, mode: PerturbationMode, steps: int) -> None:
        images, baseline = uniform(2, 3, 5, 4, seed=seed), uniform(2, 3, 5, 4, seed=seed + 1)
        saliency, partner = uniform(2, 2, 3, seed=seed + 2), uniform(2, 3, 5, 4, seed=seed + 3)

        def similarity(batch: Tensor) -> Tensor:
            return F.cosine_similarity(batch.flatten(1).tanh(), partner.flatten(1))

        actual = perturbation_curve(similarity, images, saliency, mode=mode, baseline=baseline, steps=steps)
        resized = F.interpolate(saliency[:, None], (5, 4), mode="bilinear", align_corners=False)[:, 0]
        assume(all(len(one_map.float().unique()) == 20 for one_map in resized))  # ties have a test of their own
        start, end = (images, baseline) if mode == "deletion" else (baseline, images)
        for i in range(2):
            places = sorted(np.ndindex(5, 4), key=lambda place: -resized[i][place].item())
            for step in range(steps + 1):
                picture = start.clone()
                for y, x in places[: round(step * 20 / steps)]:
                    picture[i, :, y, x] = end[i, :, y, x]
                assert actual[i, step].item() == pytest.approx(similarity(picture)[i].item())

    @pytest.mark.parametrize("steps", [1, 3, 16, 56])
    def test_ends_are_photo_and_baseline(self, steps: int) -> None:
        images, baseline = uniform(2, 3, 8, 7, seed=1), uniform(2, 3, 8, 7, seed=2)
        seen: list[Tensor] = []

        def similarity(batch: Tensor) -> Tensor:
            seen.append(batch)
            return batch.sum((1, 2, 3))

        for mode, first, last in (("deletion", images, baseline), ("insertion", baseline, images)):
            seen.clear()
            curve = perturbation_curve(
                similarity, images, uniform(2, 4, 4, seed=3), mode=mode, baseline=baseline, steps=steps
            )
            assert curve.shape == (2, steps + 1)
            assert torch.equal(seen[0], first)
            assert torch.equal(seen[-1], last)
            changed = [(batch != first).any(1).sum((1, 2)).tolist() for batch in seen]
            assert changed == [[round(step * 56 / steps)] * 2 for step in range(steps + 1)]

    def test_no_order_beats_the_ideal_one(self) -> None:
        """Linear and non-negative: the weights themselves are the best saliency, their opposite the worst."""
        orders = torch.tensor(list(permutations(range(6))), dtype=torch.float64).view(-1, 2, 3)
        weights = uniform(1, 2, 3, seed=4).expand(len(orders), -1, -1)
        photo, baseline = torch.ones(len(orders), 3, 2, 3).double(), torch.zeros(len(orders), 3, 2, 3).double()
        areas = {
            mode: curve_area(perturbation_curve(linear(weights), photo, orders, mode=mode, baseline=baseline, steps=6))
            for mode in PERTURBATION_MODES
        }
        ideal = torch.argsort(weights[0].flatten()).argsort().view(2, 3)
        best = int((orders == ideal).all((1, 2)).nonzero())
        worst = int((orders == 5 - ideal).all((1, 2)).nonzero())
        assert areas["deletion"].argmin() == areas["insertion"].argmax() == best
        assert areas["deletion"].argmax() == areas["insertion"].argmin() == worst

    def test_a_constant_map_is_chance(self) -> None:
        """Pixels in random order, averaged over seeds: a straight line between photo and baseline."""
        images, baseline = uniform(1, 3, 4, 4, seed=1), torch.zeros(1, 3, 4, 4).double()
        similarity = linear(uniform(1, 4, 4, seed=2))
        curves = [
            perturbation_curve(
                similarity, images, torch.ones(1, 2, 2), mode="deletion", baseline=baseline, steps=4, seed=seed
            )
            for seed in range(400)
        ]
        line = similarity(images) * torch.linspace(1, 0, 5)
        torch.testing.assert_close(torch.stack(curves).mean(0)[0], line.double(), rtol=0, atol=0.04 * line[0].item())

    def test_images_are_left_alone_and_no_graph_is_kept(self) -> None:
        images, baseline = uniform(2, 3, 4, 4, seed=1).requires_grad_(), uniform(2, 3, 4, 4, seed=2)
        saliency, weights = uniform(2, 2, 2, seed=3).requires_grad_(), uniform(2, 4, 4, seed=4).requires_grad_()
        copies = [tensor.detach().clone() for tensor in (images, baseline, saliency)]
        curve = perturbation_curve(linear(weights), images, saliency, mode="insertion", baseline=baseline)
        assert not curve.requires_grad
        for tensor, copy in zip((images, baseline, saliency), copies, strict=True):
            assert torch.equal(tensor, copy)

    def test_a_large_photo_and_a_small_baseline_share_the_area(self) -> None:
        """Linear similarity: what deletion loses by an order, insertion wins."""
        images, baseline = uniform(3, 3, 6, 6, seed=1), uniform(3, 3, 6, 6, seed=2)
        similarity, saliency = linear(uniform(3, 6, 6, seed=3)), uniform(3, 3, 3, seed=4)
        deletion, insertion = (
            perturbation_curve(similarity, images, saliency, mode=mode, baseline=baseline, steps=9)
            for mode in PERTURBATION_MODES
        )
        both = (similarity(images) + similarity(baseline))[:, None]
        torch.testing.assert_close(deletion + insertion, both.expand(-1, 10))

    def test_bad_inputs(self) -> None:
        images = torch.zeros(2, 3, 4, 4)

        def curve(**changed: object) -> Tensor:
            arguments = {
                "similarity": lambda batch: batch.sum((1, 2, 3)),
                "images": images,
                "saliency": torch.zeros(2, 2, 2),
                "mode": "deletion",
                "baseline": images,
            }
            return perturbation_curve(**(arguments | changed))  # type: ignore[arg-type]

        assert curve().shape == (2, 17)  # as it stands it is right
        with pytest.raises(DataError, match="mode must be one of deletion, insertion; got 'removal'"):
            curve(mode="removal")
        with pytest.raises(DataError, match=r"images must be \(B, 3, H, W\); got \(3, 4, 4\)"):
            curve(images=images[0])
        with pytest.raises(DataError, match=r"baseline must be shaped like the images, \(2, 3, 4, 4\); got \(3,\)"):
            curve(baseline=torch.zeros(3))
        with pytest.raises(DataError, match="saliency must hold one map per image, 2; got 1"):
            curve(saliency=torch.zeros(1, 2, 2))
        with pytest.raises(DataError, match=r"saliency must be float \(B, h, w\)"):
            curve(saliency=torch.zeros(2, 1, 2, 2))
        for steps in (0, 17):
            with pytest.raises(DataError, match=f"between 1 and the 16 pixels of an image; got {steps}"):
                curve(steps=steps)
        with pytest.raises(DataError, match=r"one score per image, \(2,\); got \(2, 3\)"):
            curve(similarity=lambda batch: batch.sum((2, 3)))


class TestCurveArea:
    @settings(deadline=None, max_examples=30)
    @given(SEEDS, st.integers(2, 30))
    def test_equals_numpy(self, seed: int, points: int) -> None:
        curves = uniform(3, points, seed=seed)
        expected = np.trapezoid(curves.numpy(), np.linspace(0, 1, points), axis=1)
        np.testing.assert_allclose(curve_area(curves).numpy(), expected)

    def test_a_constant_curve_is_its_value(self) -> None:
        assert curve_area(torch.full((2, 9), 0.25)).tolist() == [0.25, 0.25]

    @pytest.mark.parametrize("shape", [(5,), (2, 1), (2, 3, 4)])
    def test_bad_shapes(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(DataError, match="two points or more; got"):
            curve_area(torch.zeros(shape))


class TestBlurred:
    @pytest.mark.parametrize("sigma", [0.5, 1.3, 3.0])
    def test_equals_scipy(self, sigma: float) -> None:
        images = uniform(2, 3, 24, 31, seed=1)
        expected = gaussian_filter(
            images.numpy(), (0, 0, sigma, sigma), mode="mirror", radius=(0, 0, *[math.ceil(3 * sigma)] * 2)
        )
        np.testing.assert_allclose(blurred(images, sigma).numpy(), expected, rtol=1e-10)

    def test_plain_colour_stays_and_images_are_left_alone(self) -> None:
        images = torch.full((1, 3, 16, 16), 0.4)
        torch.testing.assert_close(blurred(images, 4.0), images)
        picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        copy = picture.clone()
        assert blurred(picture, 2.0).std() < 0.3 * copy.std()
        assert torch.equal(picture, copy)

    @pytest.mark.parametrize("sigma", [0.0, -1.0, 5.1, math.nan])
    def test_bad_sigma(self, sigma: float) -> None:
        with pytest.raises(DataError, match=r"at most .* 5 for 16 x 40; got"):
            blurred(torch.zeros(1, 3, 16, 40), sigma)

    def test_largest_sigma(self) -> None:
        assert blurred(torch.zeros(1, 3, 16, 40), 5.0).shape == (1, 3, 16, 40)

    def test_bad_images(self) -> None:
        with pytest.raises(DataError, match=r"images must be float \(B, 3, H, W\); got torch.uint8"):
            blurred(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), 1.0)
        with pytest.raises(DataError, match=r"got torch.float32 \(3, 16, 16\)"):
            blurred(torch.zeros(3, 16, 16), 1.0)


class TestEnergyInside:
    def test_hand_worked(self) -> None:
        saliency = torch.tensor([[[1.0, 3.0], [4.0, -5.0]], [[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, -1.0]]])
        mask = torch.tensor([[[1, 0], [255, 1]], [[1, 1], [0, 0]], [[1, 1], [1, 1]]], dtype=torch.uint8)
        shares = energy_inside(saliency, mask)
        assert shares[:2].tolist() == [0.25, 1.0]  # the 4 is ignored, the -5 counts as nothing
        assert shares[2].isnan()

    @settings(deadline=None, max_examples=40)
    @given(SEEDS)
    def test_equals_a_plain_loop(self, seed: int) -> None:
        saliency = uniform(2, 4, 3, seed=seed) - 0.3
        mask = torch.tensor([0, 1, 255], dtype=torch.uint8)[(3 * uniform(2, 4, 3, seed=seed + 1)).long()]
        for i, share in enumerate(energy_inside(saliency, mask).tolist()):
            inside = everywhere = 0.0
            for place in np.ndindex(4, 3):
                energy = max(saliency[i][place].item(), 0) if mask[i][place] != 255 else 0
                everywhere += energy
                inside += energy if mask[i][place] == 1 else 0
            assert share == pytest.approx(inside / everywhere if everywhere else math.nan, nan_ok=True)

    def test_even_attention_gives_the_share_of_the_area(self) -> None:
        mask = uniform(1, 20, 20, seed=1) < 0.3
        share = energy_inside(torch.full((1, 20, 20), 0.5, dtype=torch.float16), mask)
        assert share.item() == pytest.approx(mask.double().mean().item())

    def test_bad_shapes(self) -> None:
        with pytest.raises(DataError, match=r"one shape \(B, H, W\); got \(1, 2, 2\) and \(1, 4, 4\): resize"):
            energy_inside(torch.zeros(1, 2, 2), torch.zeros(1, 4, 4))
        with pytest.raises(DataError, match="must share one shape"):
            energy_inside(torch.zeros(2, 2), torch.zeros(2, 2))
