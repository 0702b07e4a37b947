"""Scores of a similarity network on photos against embeddings and curves computed photo by photo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from episodes.labelled import LabelledImages
from episodes.reidentification import open_reidentification
from episodes.retrieval import open_retrieval
from episodes.types import DataError
from fewshot_seg.attention import ATTENTION_KINDS, AttentionKind, image_directions, similarity_attention
from fewshot_seg.backbones import Backbone
from fewshot_seg.embedding import ImageEmbedder, explain_comparisons
from fewshot_seg.faithfulness import PerturbationMode, blurred, curve_area, perturbation_curve
from fewshot_seg.features import FeatureStore
from fewshot_seg.retrieval_metrics import reidentification_scores, retrieval_scores
from fewshot_seg.similarity import SimilarityNetwork
from fewshot_seg.similarity_evaluation import (
    Comparison,
    PairFaithfulness,
    draw_comparisons,
    evaluate_reidentification,
    evaluate_retrieval,
    pair_faithfulness,
    read_squares,
)

SIZE = 64


@pytest.fixture(scope="module")
def images(photo_folders: Path) -> LabelledImages:
    return open_retrieval("folders", photo_folders).test


@pytest.fixture(scope="module")
def similarity(tiny_backbone: Backbone) -> SimilarityNetwork:
    """As after a training: the untrained network would be the identity."""
    network = SimilarityNetwork(tiny_backbone.channels, rank=4, seed=1)
    with torch.no_grad():
        network.up.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
    return network.eval()


@pytest.fixture(scope="module")
def embedder(tiny_backbone: Backbone, similarity: SimilarityNetwork) -> ImageEmbedder:
    return ImageEmbedder(tiny_backbone, similarity)


@torch.no_grad()
def embedded(embedder: ImageEmbedder, images: LabelledImages) -> Tensor:
    """Embeddings photo by photo, through features in half precision as they are stored."""
    rows = []
    for number in range(len(images)):
        levels = embedder.backbone(read_squares(images, [number], size=SIZE))
        rows.append(embedder.similarity.embed(embedder.similarity([level.half().float() for level in levels]))[0])
    return torch.stack(rows)


def labelled(labels: list[str]) -> LabelledImages:
    """Photos that are never read."""
    files = tuple(f"{number}.jpg" for number in range(len(labels)))
    return LabelledImages(name="drawn", root=Path(), files=files, labels=tuple(labels))


class TestScores:
    def test_retrieval_equals_embeddings_by_hand(self, embedder: ImageEmbedder, images: LabelledImages) -> None:
        store = FeatureStore(embedder.backbone, images, size=SIZE, directory=None)
        found = evaluate_retrieval(embedder.similarity, store, images, ks=(1, 3))
        embeddings = embedded(embedder, images)
        names = sorted(set(images.labels))
        labels = torch.tensor([names.index(label) for label in images.labels])
        assert found == retrieval_scores(embeddings, labels, ks=(1, 3))
        cosine = (embeddings @ embeddings.T).numpy()
        np.fill_diagonal(cosine, -2)
        nearest = [images.labels[n] == images.labels[int(row.argmax())] for n, row in enumerate(cosine)]
        assert found.recall[1][0] == pytest.approx(100 * np.mean(nearest))
        assert 0 < found.map_at_r[0] < 100  # or the comparison would say nothing
        assert (found.queries, found.skipped) == (16, 0)

    def test_reidentification_equals_embeddings_by_hand(self, embedder: ImageEmbedder, photo_persons: Path) -> None:
        data = open_reidentification("market1501", photo_persons)
        store = FeatureStore(embedder.backbone, data.gallery, size=SIZE, directory=None)
        found = evaluate_reidentification(embedder.similarity, store, data, ranks=(1, 2, 20))
        sides = []
        for side in (data.query, data.gallery):
            assert side.cameras is not None
            persons, cameras = torch.tensor([int(label) for label in side.labels]), torch.tensor(side.cameras)
            sides += [embedded(embedder, side), persons, cameras]
        assert found == reidentification_scores(*sides, ranks=(1, 2, 20))
        assert (found.queries, found.skipped) == (3, 1)  # one camera alone saw person 5
        assert 0 < found.mean_ap[0] < 100
        assert found.rank[20][0] == 100

    def test_progress_goes_to_stderr(
        self, embedder: ImageEmbedder, images: LabelledImages, capsys: pytest.CaptureFixture[str]
    ) -> None:
        store = FeatureStore(embedder.backbone, images, size=SIZE, directory=None)
        evaluate_retrieval(embedder.similarity, store, images)
        assert capsys.readouterr() == ("", "")
        evaluate_retrieval(embedder.similarity, store, images, show_progress=True)
        assert "16/16" in capsys.readouterr().err


class TestDrawComparisons:
    @settings(max_examples=30, deadline=None)
    @given(
        counts=st.lists(st.integers(1, 4), min_size=3, max_size=6).filter(lambda counts: max(counts) > 1),
        seed=st.integers(0, 99),
    )
    def test_classes_are_as_promised(self, counts: list[int], seed: int) -> None:
        labels = [f"class {number}" for number, count in enumerate(counts) for _ in range(count)]
        for one in draw_comparisons(labelled(labels), count=8, seed=seed):
            anchor, positive, negative, second = (labels[position] for position in one)
            assert one.anchor != one.positive
            assert anchor == positive
            assert len({anchor, negative, second}) == 3

    def test_each_is_a_function_of_seed_and_number(self, images: LabelledImages) -> None:
        drawn = draw_comparisons(images, count=12, seed=3)
        assert draw_comparisons(images, count=5, seed=3) == drawn[:5]
        assert draw_comparisons(images, count=12, seed=4) != drawn
        assert len(set(drawn)) > 8

    def test_every_photo_is_drawn(self) -> None:
        labels = ["a", "a", "a", "b", "c", "c", "d"]
        drawn = draw_comparisons(labelled(labels), count=200, seed=0)
        assert {one.anchor for one in drawn} == {one.positive for one in drawn} == {0, 1, 2, 4, 5}
        assert {one.negative for one in drawn} == {one.second_negative for one in drawn} == set(range(7))

    @pytest.mark.parametrize("labels", [["a", "a", "b", "b"], ["a", "b", "c"]])
    def test_too_little_to_compare(self, labels: list[str]) -> None:
        count = len(set(labels))
        with pytest.raises(DataError, match=f"drawn: .* at least 3 classes, one .* 2 photos; got {count} classes"):
            draw_comparisons(labelled(labels), count=1, seed=0)


def test_read_squares(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    for number, photo in enumerate(pixels):
        Image.fromarray(photo).save(tmp_path / f"{number}.png")
    images = LabelledImages(name="two", root=tmp_path, files=("0.png", "1.png"), labels=("a", "b"))
    squares = read_squares(images, [1, 0, 1], size=32)
    expected = torch.from_numpy(pixels[[1, 0, 1]]).permute(0, 3, 1, 2) / 255
    assert torch.equal(squares, expected)
    halves = read_squares(images, [0], size=16)[0]  # area: every pixel is the mean of four
    assert torch.allclose(halves, torch.nn.functional.avg_pool2d(expected[1], 2), atol=0.5 / 255 + 1e-6)


@torch.no_grad()
def by_closed_form(embedder: ImageEmbedder, photos: list[Tensor], kind: AttentionKind) -> list[Tensor]:
    """Attention of every photo of one comparison, from the formula for global average pooling."""
    maps = [embedder.similarity(embedder.backbone(photo)) for photo in photos]
    anchor, positive, *negatives = (embedder.similarity.embed(one) for one in maps)
    directions = image_directions(kind, anchor, positive, negatives)
    return [similarity_attention(one, direction) for one, direction in zip(maps, directions, strict=True)]


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_explained_comparisons_equal_the_closed_form(
    embedder: ImageEmbedder, images: LabelledImages, kind: AttentionKind
) -> None:
    drawn = draw_comparisons(images, count=3, seed=1)
    photos = [read_squares(images, positions, size=SIZE) for positions in zip(*drawn, strict=True)]
    found = explain_comparisons(embedder, photos, kind=kind)
    shown = [found.anchor, found.positive, *found.negatives]
    compared = {"siamese": 2, "cosine": 2, "triplet": 3, "margin": 3, "quadruplet": 4}[kind]
    assert len(shown) == compared
    for number in range(3):
        expected = by_closed_form(embedder, [side[[number]] for side in photos[:compared]], kind)
        for (layer,), one in zip(shown, expected, strict=True):
            assert layer.shape == (3, 4, 4)
            torch.testing.assert_close(layer[[number]], one, rtol=1e-4, atol=1e-6)
    assert not embedder.similarity._forward_hooks


@pytest.fixture(scope="module")
def drawn(images: LabelledImages) -> list[Comparison]:
    return draw_comparisons(images, count=5, seed=0)


class TestPairFaithfulness:
    @pytest.mark.parametrize("kind", ["margin", "random"])
    def test_batch_size_does_not_matter(
        self, embedder: ImageEmbedder, images: LabelledImages, drawn: list[Comparison], kind: AttentionKind
    ) -> None:
        one, two, all_ = (
            pair_faithfulness(embedder, images, drawn, size=SIZE, kind=kind, steps=4, batch_size=batch)
            for batch in (1, 2, 8)
        )
        for name in ("deletion", "insertion", "whole", "blank"):
            assert getattr(one, name).shape == (5, 2)
            # a batch rounds differently, and pixels that are attended almost alike may change places
            np.testing.assert_allclose(getattr(two, name), getattr(one, name), atol=2e-4)
            np.testing.assert_allclose(getattr(all_, name), getattr(one, name), atol=2e-4)
        assert one.deletion.std() > 0.01

    @pytest.mark.parametrize("kind", ["margin", "quadruplet", "cosine"])
    @torch.no_grad()
    def test_one_pair_by_hand(
        self, embedder: ImageEmbedder, images: LabelledImages, drawn: list[Comparison], kind: AttentionKind
    ) -> None:
        comparison = drawn[2]
        found = pair_faithfulness(embedder, images, [comparison], size=SIZE, kind=kind, steps=5)
        photos = [read_squares(images, [position], size=SIZE) for position in comparison]
        compared = {"cosine": 2, "margin": 3, "quadruplet": 4}[kind]
        attention = by_closed_form(embedder, photos[:compared], kind)
        for direction, (masked, other) in enumerate(((0, 1), (1, 0))):
            partner = embedder(photos[other])[0]
            baseline = blurred(photos[masked], sigma=SIZE / 16)
            for mode in ("deletion", "insertion"):
                curve = perturbation_curve(
                    lambda changed, partner=partner: embedder(changed) @ partner,  # type: ignore[misc]
                    photos[masked],
                    attention[masked],
                    mode=mode,
                    baseline=baseline,
                    steps=5,
                )
                area = getattr(found, mode)[0, direction]
                assert area == pytest.approx(float(curve_area(curve)), abs=5e-5)
            whole, blank = (float(embedder(one)[0] @ partner) for one in (photos[masked], baseline))
            assert found.whole[0, direction] == pytest.approx(whole, abs=1e-5)
            assert found.blank[0, direction] == pytest.approx(blank, abs=1e-5)
        assert found.whole[0, 0] == pytest.approx(found.whole[0, 1], abs=1e-5)
        assert abs(found.deletion[0, 0] - found.deletion[0, 1]) > 1.5e-4  # the two directions differ

    def test_random_cells_are_no_attention(
        self, embedder: ImageEmbedder, images: LabelledImages, drawn: list[Comparison]
    ) -> None:
        attended, chance = (
            pair_faithfulness(embedder, images, drawn, size=SIZE, kind=kind, steps=4) for kind in ("cosine", "random")
        )
        np.testing.assert_allclose(chance.whole, attended.whole, atol=1e-6)
        np.testing.assert_allclose(chance.blank, attended.blank, atol=1e-6)
        assert np.abs(chance.deletion - attended.deletion).max() > 1e-3

    def test_changes_neither_randomness_nor_model(
        self, embedder: ImageEmbedder, images: LabelledImages, drawn: list[Comparison]
    ) -> None:
        state = torch.get_rng_state()
        pair_faithfulness(embedder, images, drawn[:1], size=SIZE, kind="random", steps=2)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in embedder.parameters())

    def test_progress_counts_pairs(
        self,
        embedder: ImageEmbedder,
        images: LabelledImages,
        drawn: list[Comparison],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        pair_faithfulness(embedder, images, drawn[:3], size=SIZE, steps=1, batch_size=2, show_progress=True)
        assert "3/3" in capsys.readouterr().err

    @pytest.mark.parametrize(("name", "expected"), [("deletion", 25.0), ("insertion", 75.0)])
    def test_normalised_is_the_ratio_of_means(self, name: PerturbationMode, expected: float) -> None:
        # whole 0.9 and 0.7, blank 0.5 and 0.3 on average: the way is 0.4; the mean of the pairs' ratios would differ
        found = PairFaithfulness(
            whole=np.array([[0.9, 0.9], [0.7, 0.7]]),
            blank=np.array([[0.2, 0.2], [0.6, 0.6]]),
            deletion=np.array([[0.3, 0.5], [0.5, 0.7]]),
            insertion=np.array([[0.7, 0.7], [0.7, 0.7]]),
        )
        assert found.normalised(name) == pytest.approx(expected)
