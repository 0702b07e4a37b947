"""Weak supports completed by the query's answer: as if the query were their support."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.types import SupportKind
from fewshot_seg.backbones import Backbone
from fewshot_seg.base_learner import class_profile
from fewshot_seg.encodings import SupportEncoding
from fewshot_seg.look_back import look_back, of_bare_photos, with_share
from fewshot_seg.priors import cell_cosines
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter
from tests.fewshot_seg.test_segmenter import SIZE, disturbed, marked, outlines, photos

CELLS = 4


@pytest.fixture(scope="module")
def segmenter(tiny_backbone: Backbone) -> FewShotSegmenter:
    """With a base learner and a decoder for weak supports, whose maps have other units than 1."""
    built = disturbed(build_segmenter(tiny_backbone, similarity_rank=4, base_classes=3, completion=True))
    assert built.weak_decoder is not None
    for number, decoder in enumerate((built.decoder, built.weak_decoder)):
        drawn = torch.randn(6, decoder.prior_channels, CELLS, CELLS, generator=torch.Generator().manual_seed(number))
        decoder.fit_scales(2 * drawn)
    built.guided = False
    return built


def query_masks(count: int) -> Tensor:
    """uint8 (N, 1, H, W), whole cells of the grid."""
    chosen = torch.rand(count, CELLS, CELLS, generator=torch.Generator().manual_seed(4)) < 0.4
    chosen[:, 1, 1] = True
    return chosen.byte().repeat_interleave(SIZE // CELLS, 1).repeat_interleave(SIZE // CELLS, 2)[:, None]


def looked_back(
    segmenter: FewShotSegmenter, support: SupportEncoding, queries: Tensor, logits: Tensor
) -> SupportEncoding:
    maps = segmenter.photo_maps(segmenter.backbone(queries))
    return look_back(
        support,
        maps,
        logits,
        cell_cosines(maps.cells, support.cells),
        answer=segmenter._answer,  # as the model calls it
        base_learner=segmenter.base_learner,
    )


def certain(masks: Tensor) -> Tensor:
    """Logits float (N, h, w) that leave no doubt about masks uint8 (N, 1, H, W) of whole cells."""
    return 60.0 * (2.0 * masks[:, 0, :: SIZE // CELLS, :: SIZE // CELLS].float() - 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "kinds", [("label",), ("label", "label"), ("box", "label"), ("point", "mask", "label", "scribble")]
)
def test_bare_photos_are_segmented_as_if_the_query_were_their_support(
    segmenter: FewShotSegmenter, kinds: tuple[SupportKind, ...]
) -> None:
    images, (masks, dense), queries = photos(2, len(kinds)), marked(2, kinds), photos(2, seed=1)
    support = segmenter.encode_support(images, masks, dense)
    answers = query_masks(2)
    found = looked_back(segmenter, support, queries, certain(answers))
    assert segmenter.weak_decoder is not None
    for row in range(2):
        shown = segmenter.encode_support(queries[row : row + 1, None], answers[row : row + 1])
        for number, kind in enumerate(kinds):
            cells = slice(number * CELLS**2, (number + 1) * CELLS**2)
            if kind != "label":
                assert torch.equal(found.foreground[row, cells], support.foreground[row, cells])
                continue
            seen = segmenter.photo_maps(segmenter.backbone(images[row, number : number + 1]))
            first = support.share[row, cells].reshape(1, CELLS, CELLS).logit(eps=1e-3)
            priors = segmenter.priors_of(shown, replace(seen, objectness=first))
            logits = segmenter.weak_decoder(priors, seen.frozen, shown.prototype)
            expected = ((logits + first) / 2).sigmoid().flatten()
            torch.testing.assert_close(found.share[row, cells], expected, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(found.share[row, cells], support.share[row, cells], atol=1e-3)


@torch.no_grad()
def test_which_are_bare_photos(segmenter: FewShotSegmenter) -> None:
    kinds: tuple[SupportKind, ...] = ("label", "box", "mask", "label")
    support = segmenter.encode_support(photos(1, 4), *marked(1, kinds))
    expected = [kind == "label" for kind in kinds for _ in range(CELLS**2)]
    assert of_bare_photos(support)[0].tolist() == expected
    nothing = torch.zeros_like(support.open)
    filled = {
        name: torch.cat([getattr(support, name), nothing], dim=1) for name in ("foreground", "background", "open")
    }
    longer = replace(support, photo=torch.cat([support.photo, nothing.long() - 1], dim=1), **filled)
    assert of_bare_photos(longer)[0].tolist() == [*expected, *[False] * len(expected)]


@torch.no_grad()
def test_what_follows_from_the_share(segmenter: FewShotSegmenter) -> None:
    """Against plain loops over cells."""
    images, (masks, dense) = photos(1, 2), marked(1, ("box", "mask"))
    support = segmenter.encode_support(images, masks, dense)
    share = torch.rand(support.share.shape, generator=torch.Generator().manual_seed(2))
    found = with_share(support, share, base_learner=segmenter.base_learner)
    sums = [torch.zeros(support.cells.shape[2]) for _ in range(2)]
    for cell in range(support.cells.shape[1]):
        known = float(support.foreground[0, cell] - support.open[0, cell] * support.share[0, cell])
        inside = known + float(support.open[0, cell] * share[0, cell])
        whole = float(support.foreground[0, cell] + support.background[0, cell])
        assert float(found.foreground[0, cell]) == pytest.approx(inside, abs=1e-5)
        assert float(found.background[0, cell]) == pytest.approx(whole - inside, abs=1e-5)
        for total, weight in zip(sums, (inside, whole - inside), strict=True):
            total += weight * support.cells[0, cell]
    for total, name in zip(sums, ("foreground_embedding", "background_embedding"), strict=True):
        torch.testing.assert_close(getattr(found, name)[0], total / total.norm(), rtol=1e-4, atol=1e-5)
    assert segmenter.base_learner is not None
    probabilities = segmenter.base_learner(support.frozen[0]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.profile, class_profile(probabilities[None], found.foreground))


@torch.no_grad()
def test_the_model_looks_back_by_its_first_answer(segmenter: FewShotSegmenter) -> None:
    support = segmenter.encode_support(photos(2, 2), *marked(2, ("label", "mask")))
    queries = photos(2, seed=1)
    maps = segmenter.photo_maps(segmenter.backbone(queries))
    assert segmenter.weak_decoder is not None
    first = segmenter.priors_of(support, maps, look_again=False)
    again = looked_back(segmenter, support, queries, segmenter.weak_decoder(first, maps.frozen, support.prototype))
    plain = replace(again, open=torch.zeros_like(again.open))  # nothing to look for any more
    priors = segmenter.priors_of(support, maps)
    torch.testing.assert_close(priors, segmenter.priors_of(plain, maps), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(priors, first, atol=1e-2)


@torch.no_grad()
def test_an_episode_gets_what_it_gets_alone(segmenter: FewShotSegmenter) -> None:
    """A mask, a bare photo and a point in one batch."""
    images, queries = photos(3, 1), photos(3, seed=1)
    masks, dense = outlines(3, 1), torch.tensor([[True], [False], [False]])
    for row, kind in ((1, "label"), (2, "point")):
        masks[row] = marked(1, (kind,))[0][0]  # type: ignore[arg-type]
    together = segmenter.segment(segmenter.encode_support(images, masks, dense), queries).logits
    for row in range(3):
        rows = slice(row, row + 1)
        alone = segmenter.segment(segmenter.encode_support(images[rows], masks[rows], dense[rows]), queries[rows])
        torch.testing.assert_close(together[rows], alone.logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_decoder_has_the_last_word(segmenter: FewShotSegmenter) -> None:
    """The one for weak supports only gives the first answer; without it, nothing is looked back at."""
    support, queries = segmenter.encode_support(photos(2, 1), *marked(2, ("label",))), photos(2, seed=1)
    found = segmenter.segment(support, queries)
    maps = segmenter.photo_maps(segmenter.backbone(queries))
    logits = segmenter.decoder(found.priors, maps.frozen, support.prototype)
    expected = F.interpolate(logits[:, None], (SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    weak, segmenter.weak_decoder = segmenter.weak_decoder, None
    try:
        first = segmenter.priors_of(support, maps, look_again=False)
        assert torch.equal(segmenter.priors_of(support, maps), first)
    finally:
        segmenter.weak_decoder = weak
    assert not torch.allclose(first, found.priors, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mask", "box", "scribble", "point"])
def test_others_are_not_looked_back_at(segmenter: FewShotSegmenter, kind: SupportKind) -> None:
    support = segmenter.encode_support(photos(2, 1), *marked(2, (kind,)))
    maps = segmenter.backbone(photos(2, seed=1))
    photo_maps = segmenter.photo_maps(maps)
    first = segmenter.priors_of(support, photo_maps, look_again=False)
    assert torch.equal(segmenter.priors_of(support, photo_maps), first)
