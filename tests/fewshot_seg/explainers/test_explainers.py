"""All explainers by one contract, and each against an independent oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, LayerGradCam, Occlusion
from torch import Tensor, nn

from episodes.sources import SyntheticSource
from episodes.types import DataError, EpisodeSpec
from fewshot_seg.attention import weigh_maps
from fewshot_seg.backbones import Backbone
from fewshot_seg.explainers import EXPLAINERS, Comparison, background_evidence, perturbation, prior, run_explainer
from fewshot_seg.explainers import gradients as gradient_methods
from fewshot_seg.explainers.attention import soft_attention
from fewshot_seg.explainers.episode import compare_photos, episode_photos, randomised
from fewshot_seg.explainers.gradients import sum_of_levels
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter, training_free

TWO = EpisodeSpec(class_id=4, support_ids=("val-004-0001", "val-004-0002"), query_id="val-004-0000", seed=0)
SIZE = 96
"""Grids of 6 x 6 and 3 x 3 cells."""


@pytest.fixture(scope="module")
def segmenter(tiny_backbone: Backbone) -> FewShotSegmenter:
    return training_free(tiny_backbone).eval()


@pytest.fixture
def comparison(segmenter: FewShotSegmenter, tiny_source: SyntheticSource) -> Comparison:
    return compare_photos(segmenter, episode_photos(tiny_source, TWO), resolution=SIZE, seed=3)


def autograd_margin(comparison: Comparison, cells: Tensor, sides: tuple[float, float] = (1.0, -1.0)) -> Tensor:
    """The score by its definition, from cells (K + 1, D, h, w) of all photos."""
    embedding = F.normalize(cells[0].mean(dim=(1, 2)), dim=0)
    found = []
    for side in comparison.sides:
        total = sum(
            side[k, y, x] * cells[k + 1, :, y, x]
            for k in range(side.shape[0])
            for y in range(side.shape[1])
            for x in range(side.shape[2])
        )
        assert isinstance(total, Tensor)
        found.append(embedding @ F.normalize(total, dim=0))
    return sides[0] * found[0] + sides[1] * found[1]


@pytest.mark.parametrize("name", EXPLAINERS)
class TestContract:
    def test_finite_maps_of_every_photo(self, name: str, comparison: Comparison) -> None:
        found = run_explainer(EXPLAINERS[name], comparison)
        assert len(found.maps) == 3
        assert all(one.dim() == 2 and one.dtype == torch.float32 and one.isfinite().all() for one in found.maps)
        assert not any(one.requires_grad for one in found.maps)
        assert found.query.max() > found.query.min()
        assert found.forward >= 1
        assert found.backward >= 0

    def test_nothing_is_changed_and_every_call_says_the_same(
        self, name: str, segmenter: FewShotSegmenter, comparison: Comparison
    ) -> None:
        photos, masks = comparison.photos.clone(), comparison.masks.clone()
        state = {key: value.clone() for key, value in segmenter.state_dict().items()}
        levels = [level.clone() for level in comparison.levels]
        first, second = (run_explainer(EXPLAINERS[name], comparison) for _ in range(2))
        assert (first.forward, first.backward) == (second.forward, second.backward)
        assert all(torch.equal(one, other) for one, other in zip(first.maps, second.maps, strict=True))
        assert torch.equal(comparison.photos, photos)
        assert torch.equal(comparison.masks, masks)
        assert all(torch.equal(one, other) for one, other in zip(comparison.levels, levels, strict=True))
        assert all(torch.equal(value, state[key]) for key, value in segmenter.state_dict().items())
        assert all(parameter.grad is None for parameter in segmenter.parameters())
        assert not any(parameter.requires_grad for parameter in segmenter.backbone.parameters())

    def test_under_no_grad(self, name: str, comparison: Comparison) -> None:
        with torch.no_grad():
            found = EXPLAINERS[name](comparison, 1)
        assert torch.is_grad_enabled()
        assert torch.equal(found.detach(), EXPLAINERS[name](comparison, 1).detach())


class TestComparison:
    def test_margin_is_the_score_of_every_place(self, comparison: Comparison) -> None:
        expected = float(autograd_margin(comparison, comparison.cells))
        assert comparison.margin == pytest.approx(expected, abs=1e-6)
        for place in range(3):
            own = comparison.cells[place : place + 1]
            assert float(comparison.margins(place, own)[0]) == pytest.approx(expected, abs=1e-6)

    def test_changed_photos_are_whole_comparisons(self, segmenter: FewShotSegmenter, comparison: Comparison) -> None:
        noise = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        for place in range(3):
            changed = comparison.changed(place, noise)
            scores, matches, masks = comparison.outcomes(place, noise)
            assert torch.allclose(changed, scores, atol=1e-6)
            for number, photo in enumerate(noise):
                photos = comparison.photos.clone()
                photos[place] = photo
                whole = Comparison(segmenter, photos[1:], comparison.masks, photos[0])
                assert whole.margin == pytest.approx(float(changed[number]), abs=1e-5)
                levels = [level[:1] for level in whole.levels]
                margins = 0.05 * prior(whole, 0).flatten()
                weights = prior(comparison, 0).flatten().sigmoid()
                expected_match = float((margins * weights).sum() / weights.sum())
                assert float(matches[number]) == pytest.approx(expected_match, abs=1e-4)
                expected = segmenter.segment_levels(whole.support, levels, whole.size).masks[0]
                assert (expected != masks[number]).float().mean() < 0.01  # batches round differently

    def test_other_query_keeps_the_supports(self, comparison: Comparison) -> None:
        query = comparison.photos[1]
        other = comparison.with_query(query)
        fresh = Comparison(comparison.segmenter, comparison.photos[1:], comparison.masks, query)
        assert other.margin == pytest.approx(fresh.margin, abs=1e-6)

    def test_weak_supports(self, segmenter: FewShotSegmenter, tiny_source: SyntheticSource) -> None:
        weak = compare_photos(segmenter, episode_photos(tiny_source, TWO, "box"), resolution=SIZE)
        assert float(weak.support.open.max()) > 0
        assert weak.margin == pytest.approx(float(autograd_margin(weak, weak.cells)), abs=1e-6)

    def test_shapes_that_do_not_fit(self, segmenter: FewShotSegmenter) -> None:
        with pytest.raises(DataError, match=r"expected supports \(K, 3, H, W\)"):
            Comparison(
                segmenter, torch.rand(1, 3, 64, 64), torch.zeros(1, 32, 32, dtype=torch.uint8), torch.rand(3, 64, 64)
            )

    def test_random_weights_are_another_model(self, tiny_backbone: Backbone, comparison: Comparison) -> None:
        trained = build_segmenter(tiny_backbone).eval()
        other = randomised(trained, seed=5)
        assert other.backbone.strides == tiny_backbone.strides
        assert comparison.with_segmenter(other).margin != pytest.approx(comparison.margin, abs=1e-5)


class TestAttention:
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_equals_automatic_differentiation(self, comparison: Comparison, place: int) -> None:
        cells = comparison.cells.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(autograd_margin(comparison, cells), cells)
        own = slice(place, place + 1)
        expected = weigh_maps(comparison.cells[own], gradient[own], elementwise=True, rectify=False)[0]
        assert torch.allclose(EXPLAINERS["attention"](comparison, place), expected, atol=1e-6)

    def test_background_evidence_of_the_query(self, comparison: Comparison) -> None:
        cells = comparison.cells.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(autograd_margin(comparison, cells, (0.0, 1.0)), cells)
        expected = weigh_maps(comparison.cells[:1], gradient[:1], rectify=False)[0]
        assert torch.allclose(background_evidence(comparison, 0), expected, atol=1e-6)
        assert torch.equal(background_evidence(comparison, 1), -soft_attention(comparison, 1))

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_soft_attention_equals_automatic_differentiation(self, comparison: Comparison, place: int) -> None:
        cells = comparison.cells.clone().requires_grad_()
        temperature = comparison.segmenter.temperature
        query, supports = cells[0].flatten(1).T, cells[1:].flatten(2).transpose(1, 2).flatten(0, 1)
        cosine = query @ supports.T / temperature
        densities = [(cosine + side.flatten().log()).logsumexp(dim=1) - side.sum().log() for side in comparison.sides]
        margin = densities[0] - densities[1]
        weights = torch.ones_like(margin) if place == 0 else margin.detach().sigmoid()
        weights = weights if place == 0 else weights / weights.sum()
        (gradient,) = torch.autograd.grad(temperature * (margin * weights).sum(), cells)
        own = slice(place, place + 1)
        expected = weigh_maps(comparison.cells[own], gradient[own], elementwise=True, rectify=False)[0]
        assert torch.allclose(soft_attention(comparison, place), expected, atol=1e-5)

    def test_prior_is_what_the_decoder_reads(self, comparison: Comparison) -> None:
        photos = comparison.segmenter.photo_maps([level[:1] for level in comparison.levels])
        expected = comparison.segmenter.priors_of(comparison.support, photos)[0, 0]
        assert torch.allclose(prior(comparison, 0), expected, atol=1e-5)

    def test_likeness_of_a_support_is_found_where_its_object_is(self, comparison: Comparison) -> None:
        same = comparison.with_query(comparison.photos[1])
        likeness, (of_object, of_other) = prior(same, 1), same.sides
        assert likeness[of_object[0] > 0.5].mean() > likeness[of_other[0] > 0.5].mean()


class TestCompleteness:
    def test_pairwise_sums_to_the_score(self, comparison: Comparison) -> None:
        found = run_explainer(EXPLAINERS["pairwise"], comparison)
        assert float(found.query.sum()) == pytest.approx(comparison.margin, abs=1e-5)
        assert float(sum(one.sum() for one in found.supports)) == pytest.approx(comparison.margin, abs=1e-5)

    def test_pairwise_is_the_sum_over_pairs(self, comparison: Comparison) -> None:
        query = comparison.cells[0].flatten(1).T
        supports = comparison.cells[1:].flatten(2).transpose(1, 2).flatten(0, 1)
        lengths = [torch.einsum("nd,n->d", supports, side.flatten()).norm() for side in comparison.sides]
        weights = comparison.sides[0].flatten() / lengths[0] - comparison.sides[1].flatten() / lengths[1]
        pairs = (query @ supports.T) * weights / query.sum(dim=0).norm()
        explainer = EXPLAINERS["pairwise"]
        assert torch.allclose(explainer(comparison, 0).flatten(), pairs.sum(dim=1), atol=1e-6)
        cells = query.shape[0]
        assert torch.allclose(explainer(comparison, 2).flatten(), pairs.sum(dim=0)[cells:], atol=1e-6)

    @pytest.mark.parametrize("place", [0, 2])
    def test_integrated_gradients_sum_to_the_difference(
        self, comparison: Comparison, place: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gradient_methods, "STEPS", 100)
        blurred = comparison.segmenter.similarity(comparison.baseline_levels)[place : place + 1]
        difference = comparison.margin - float(comparison.margins(place, blurred)[0])
        found = EXPLAINERS["integrated-gradients"](comparison, place)
        assert float(found.sum()) == pytest.approx(difference, abs=2e-4)

    def test_integrated_jacobians_sum_to_the_four_scores(
        self, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gradient_methods, "STEPS", 100)
        own, blurred = comparison.cells, comparison.segmenter.similarity(comparison.baseline_levels)
        scores = {
            (query, supports): float(
                autograd_margin(comparison, torch.cat([(own, blurred)[query][:1], (own, blurred)[supports][1:]]))
            )
            for query in (0, 1)
            for supports in (0, 1)
        }
        expected = scores[0, 0] - scores[1, 0] - scores[0, 1] + scores[1, 1]
        assert float(EXPLAINERS["integrated-jacobians"](comparison, 0).sum()) == pytest.approx(expected, abs=2e-4)

    @pytest.mark.parametrize("place", [0, 1])
    def test_shapley_values_are_efficient(self, comparison: Comparison, place: int) -> None:
        blurred = comparison.changed(place, comparison.baselines[place : place + 1])
        found = EXPLAINERS["shapley"](comparison, place)
        assert float(found.sum()) == pytest.approx(comparison.margin - float(blurred[0]), abs=1e-5)

    def test_shapley_values_by_a_plain_loop(self, comparison: Comparison) -> None:
        side = perturbation.SHAPLEY_GRID
        order = torch.randperm(side * side, generator=torch.Generator().manual_seed(comparison.seed))
        values = torch.zeros(side * side)
        for one in (order, order.flip(0)):
            photo = comparison.baselines[0].clone()
            score = float(comparison.changed(0, photo[None])[0])
            for player in one.tolist():
                grid = torch.zeros(1, 1, side, side)
                grid.view(-1)[player] = 1
                shown = F.interpolate(grid, (SIZE, SIZE), mode="nearest-exact")[0] > 0
                photo = torch.where(shown, comparison.photos[0], photo)
                entered = float(comparison.changed(0, photo[None])[0])
                values[player] += (entered - score) / 2
                score = entered
        assert torch.allclose(EXPLAINERS["shapley"](comparison, 0).flatten(), values, atol=1e-5)

    def test_levels_on_one_grid_keep_their_sum(self) -> None:
        parts = [torch.rand(1, 7, 5), torch.rand(1, 4, 3)]
        total = sum_of_levels(parts, (7, 5))
        assert float(total.sum()) == pytest.approx(float(parts[0].sum() + parts[1].sum()), abs=1e-4)


class _Margin(nn.Module):
    """The score of one photo's levels, for captum."""

    def __init__(self, comparison: Comparison, place: int) -> None:
        super().__init__()
        self.deepest, self.comparison, self.place = nn.Identity(), comparison, place

    def forward(self, fine: Tensor, deep: Tensor) -> Tensor:
        cells = self.comparison.segmenter.similarity([fine, self.deepest(deep)])
        return self.comparison.margins(self.place, cells)


@pytest.mark.parametrize("place", [0, 1])
class TestAgainstCaptum:
    def test_grad_cam(self, comparison: Comparison, place: int) -> None:
        model = _Margin(comparison, place)
        own = tuple(level[place : place + 1].clone().requires_grad_() for level in comparison.levels)
        expected = LayerGradCam(model, model.deepest).attribute(own)[0, 0].detach()
        assert torch.allclose(EXPLAINERS["grad-cam"](comparison, place), expected, atol=1e-6)

    def test_integrated_gradients(self, comparison: Comparison, place: int) -> None:
        own, start = (
            tuple(level[place : place + 1] for level in levels)
            for levels in (comparison.levels, comparison.baseline_levels)
        )
        attributed = IntegratedGradients(_Margin(comparison, place)).attribute(
            own, start, n_steps=gradient_methods.STEPS, method="riemann_middle"
        )
        expected = sum_of_levels([one.sum(dim=1).detach() for one in attributed], comparison.grid)
        assert torch.allclose(EXPLAINERS["integrated-gradients"](comparison, place), expected, atol=1e-5)

    def test_occlusion(self, comparison: Comparison, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(perturbation, "OCCLUSION_GRID", 4)  # of 96 pixels; captum's windows are 48 wide
        score: Callable[[Tensor], Tensor] = lambda photos: comparison.changed(place, photos)  # noqa: E731
        attributed = Occlusion(score).attribute(
            comparison.photos[place : place + 1],
            sliding_window_shapes=(3, SIZE // 2, SIZE // 2),
            strides=(3, SIZE // 4, SIZE // 4),
            baselines=comparison.baselines[place : place + 1],
        )
        expected = F.avg_pool2d(attributed[:, :1], SIZE // 4)[0, 0]
        assert torch.allclose(EXPLAINERS["occlusion"](comparison, place), expected.float(), atol=1e-5)


class TestCost:
    def test_passes_are_counted(self, comparison: Comparison) -> None:
        costs = {name: run_explainer(explainer, comparison) for name, explainer in EXPLAINERS.items()}
        passes = {name: (one.forward, one.backward) for name, one in costs.items()}
        assert passes["attention"] == passes["grad-cam"] == (1, 1)
        assert passes["prior"] == passes["pairwise"] == passes["affinity"] == passes["chance"] == (1, 0)
        assert passes["integrated-gradients"] == (2, 8)
        assert passes["occlusion"] == (1 + 36, 0)
        assert passes["shapley"] == (1 + 2 * 24 + 1, 0)
