"""Pictures of comparisons: the right photos, captions and maps, in a picture that is not empty."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from episodes.augment import EpisodeTransform
from episodes.types import DataError, UInt8Array
from fewshot_seg import similarity_pictures
from fewshot_seg.attention import ATTENTION_KINDS, AttentionKind
from fewshot_seg.backbones import Backbone
from fewshot_seg.embedding import ImageEmbedder, explain_comparisons
from fewshot_seg.pictures import Panel, colour_map, overlay_map, panel_sheet
from fewshot_seg.similarity import SimilarityNetwork
from fewshot_seg.similarity_pictures import comparison_picture

SIZE = 64
COMPARED: dict[AttentionKind, int] = {"siamese": 2, "cosine": 2, "triplet": 3, "margin": 3, "quadruplet": 4}


@pytest.fixture(scope="module")
def embedder(tiny_backbone: Backbone) -> ImageEmbedder:
    return ImageEmbedder(tiny_backbone, SimilarityNetwork(tiny_backbone.channels, rank=0)).eval()


@pytest.fixture(scope="module")
def photos() -> list[UInt8Array]:
    """Four photos of four sizes, none of them square."""
    random = np.random.default_rng(0)
    sizes = ((40, 60), (70, 50), (33, 90), (80, 64))
    return [random.integers(0, 256, (height, width, 3), np.uint8) for height, width in sizes]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sequence[Sequence[Panel]], str]]:
    """What is laid out, call by call."""
    calls: list[tuple[Sequence[Sequence[Panel]], str]] = []

    def sheet(rows: Sequence[Sequence[Panel]], title: str) -> UInt8Array:
        calls.append((rows, title))
        return panel_sheet(rows, title)

    monkeypatch.setattr(similarity_pictures, "panel_sheet", sheet)
    return calls


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_panels(
    embedder: ImageEmbedder,
    photos: list[UInt8Array],
    drawn: list[tuple[Sequence[Sequence[Panel]], str]],
    kind: AttentionKind,
) -> None:
    count, names = COMPARED[kind], ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    picture = comparison_picture(embedder, photos, kind=kind, size=SIZE, title="alike?", labels=names)
    (above, below), title = drawn[0]
    assert title == "alike?"
    roles = ("anchor", "similar", "dissimilar", "second dissimilar")
    assert [panel.label for panel in above] == [f"{role}: {name}" for role, name in zip(roles, names, strict=True)][
        :count
    ]
    transform = EpisodeTransform("none", SIZE)
    squares = [transform(photo, np.zeros(photo.shape[:2], np.uint8), seed=0)[0][None] for photo in photos]
    found = explain_comparisons(embedder, squares, kind=kind)
    with torch.no_grad():
        embeddings = [embedder(square)[0] for square in squares]
    maps = [found.anchor, found.positive, *found.negatives]
    for number, (photo, panel) in enumerate(zip(photos[:count], above, strict=True)):
        assert np.array_equal(panel.picture, photo)
        assert not panel.scale
        shown = below[number]
        assert shown.scale
        none = "" if bool((maps[number][0] > 0).any()) else " (none)"
        cosine = f", cosine {float(embeddings[0] @ embeddings[number]):.2f}" if number else ""
        assert shown.label == f"attention{cosine}{none}"
        enlarged = torch.nn.functional.interpolate(
            maps[number][0][:, None], photo.shape[:2], mode="bilinear", align_corners=False
        )[0, 0]
        spread = enlarged.max() - enlarged.min()
        scaled = (enlarged - enlarged.min()) / spread if spread > 0 else torch.zeros_like(enlarged)
        expected = overlay_map(photo, scaled.numpy())
        assert np.abs(shown.picture.astype(int) - expected).max() <= 1
    assert picture.dtype == np.uint8
    assert picture.shape == panel_sheet([above, below], title).shape
    assert picture.std() > 10
    assert not embedder.similarity._forward_hooks


def test_one_column_for_each_photo(embedder: ImageEmbedder, photos: list[UInt8Array]) -> None:
    pair, triplet, quadruplet = (
        comparison_picture(embedder, photos, kind=kind, size=SIZE, title="").shape
        for kind in ("cosine", "triplet", "quadruplet")
    )
    assert pair[0] == triplet[0] == quadruplet[0]
    assert triplet[1] - pair[1] == quadruplet[1] - triplet[1] > 200


def test_photos_beyond_the_form_are_left_out(embedder: ImageEmbedder, photos: list[UInt8Array]) -> None:
    two, four = (comparison_picture(embedder, photos[:count], kind="cosine", size=SIZE, title="x") for count in (2, 4))
    assert np.array_equal(two, four)


def test_captions_without_labels(
    embedder: ImageEmbedder, photos: list[UInt8Array], drawn: list[tuple[Sequence[Sequence[Panel]], str]]
) -> None:
    comparison_picture(embedder, photos, kind="margin", size=SIZE, title="x")
    assert [panel.label for panel in drawn[0][0][0]] == ["anchor", "similar", "dissimilar"]


def test_no_attention_is_said(
    embedder: ImageEmbedder, photos: list[UInt8Array], drawn: list[tuple[Sequence[Sequence[Panel]], str]]
) -> None:
    anchor, other = photos[:2]
    comparison_picture(embedder, [anchor, other, other], kind="margin", size=SIZE, title="x")  # the margin is 0
    (_, below), _ = drawn[0]
    assert below[0].label == "attention (none)"
    grey = overlay_map(anchor, np.zeros(anchor.shape[:2]))
    assert np.array_equal(below[0].picture, grey)
    assert not below[1].label.endswith("(none)")
    assert not np.array_equal(below[1].picture, overlay_map(other, np.zeros(other.shape[:2])))


@pytest.mark.parametrize(("kind", "count"), [("cosine", 1), ("margin", 2), ("triplet", 2), ("quadruplet", 3)])
def test_too_few_photos(embedder: ImageEmbedder, photos: list[UInt8Array], kind: AttentionKind, count: int) -> None:
    with pytest.raises(DataError, match=f"attention kind '{kind}' compares {COMPARED[kind]} photos, got {count}"):
        comparison_picture(embedder, photos[:count], kind=kind, size=SIZE, title="")


def test_the_scale_of_the_map_is_in_the_picture(embedder: ImageEmbedder, photos: list[UInt8Array]) -> None:
    picture = comparison_picture(embedder, photos[:2], kind="cosine", size=SIZE, title="")
    present = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
    assert {tuple(pixel) for pixel in colour_map(np.array([[0.0, 1.0]]))[0].tolist()} <= present
