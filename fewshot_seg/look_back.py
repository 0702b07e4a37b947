"""Bare photos as supports, seen in the light of the query's answer: each is segmented as if the query were its support.

A photo that comes without any mark shows many things, and so does a query; what is asked for is in both. The first
answer for the query, however rough, is a mask of the query, and a mask is what the model knows best to compare with: it
segments the photos by it, and they, now with masks of their own, segment the query again. (Co-segmentation by turns;
the query's image is all that is used, never its label.) Supports with boxes, strokes or points are left alone: their
marks say more than a rough answer does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fewshot_seg.base_learner import BaseLearner, class_profile
from fewshot_seg.encodings import PhotoMaps, SupportEncoding, pool_cells

LEAST_SHARE = 1e-3
"""A completed cell is never beyond doubt when it is looked at again."""

Answer = Callable[[SupportEncoding, PhotoMaps, Tensor], Tensor]
"""Gives logits float (B, h, w) of encoded supports, photos, and the cosines of the photos' cells with the supports'."""


def look_back(
    support: SupportEncoding,
    photos: PhotoMaps,
    logits: Tensor,
    cosine: Tensor,
    *,
    answer: Answer,
    base_learner: BaseLearner | None,
) -> SupportEncoding:
    """Supports of which nothing was known are filled in by what the query's answer finds in them.

    Args:
        support: B encoded supports, as they were completed without the query.
        photos: of B queries.
        logits: float (B, h, w), the first answer for the queries.
        cosine: float (B, h*w, N), of the queries' cells with the supports'.
        answer: segments photos by encoded supports.
        base_learner: of the model, if it has one.

    Returns:
        The same supports with another `share`, and what follows from it: the mean, in logits, of the first completion
        and of what the answer finds, since a wrong answer that is believed comes back as a wrong support. Masks, and
        what is known of others, stay.
    """
    share, bare = support.share.clone(), of_bare_photos(support)
    for row in range(len(share)):
        shown = _query_as_support(photos, row, logits[row].sigmoid())
        for number in sorted(set(support.photo[row, bare[row]].tolist())):
            of_photo = support.photo[row] == number
            seen = _support_as_photo(support, row, of_photo, base_learner)
            assert seen.objectness is not None
            both = answer(shown, seen, cosine[row][:, of_photo].T[None]) + seen.objectness
            share[row, of_photo] = (both / 2).sigmoid().flatten()
    return with_share(support, share, base_learner=base_learner)


def of_bare_photos(support: SupportEncoding) -> Tensor:
    """bool (B, N): cells of supports of which neither object nor background was known, and something is open."""
    known, still_open = support.foreground + support.background - support.open > LEAST_SHARE, support.open > 0
    number = support.photo.clamp_min(0)  # what fills up is neither known nor open
    told, asked = (
        torch.zeros_like(support.open).scatter_add_(1, number, one.to(support.open.dtype)).gather(1, number)
        for one in (known, still_open)
    )
    return (told == 0) & (asked > 0) & (support.photo >= 0)


def with_share(support: SupportEncoding, share: Tensor, *, base_learner: BaseLearner | None) -> SupportEncoding:
    """Supports whose open part is object by `share`, float (B, N) in [0, 1], and what follows from it."""
    change = support.open * (share - support.share)
    foreground, background = support.foreground + change, support.background - change
    profile = support.profile
    if base_learner is not None:
        probabilities = base_learner.logits(support.frozen_cells).softmax(dim=-1).transpose(1, 2)
        profile = class_profile(probabilities, foreground)
    return replace(
        support,
        foreground=foreground,
        background=background,
        share=share,
        foreground_embedding=pool_cells(support.cells, foreground),
        background_embedding=pool_cells(support.cells, background),
        profile=profile,
    )


def _query_as_support(photos: PhotoMaps, row: int, foreground: Tensor) -> SupportEncoding:
    """The encoding of a query as the one support of an episode, its object being float (h, w) in [0, 1]."""
    cells, frozen = (maps[row : row + 1].flatten(2).transpose(1, 2) for maps in (photos.cells, photos.frozen))
    inside = foreground.flatten()[None]
    nothing = torch.zeros_like(inside)
    base = None if photos.base is None else photos.base[row : row + 1].flatten(2)
    return SupportEncoding(
        cells=cells,
        foreground=inside,
        background=1 - inside,
        open=nothing,
        share=nothing,
        photo=torch.zeros_like(inside, dtype=torch.int64),
        foreground_embedding=pool_cells(cells, inside),
        background_embedding=pool_cells(cells, 1 - inside),
        prototype=pool_cells(frozen, inside),
        frozen=photos.frozen[row : row + 1, None],
        profile=inside.new_zeros(1, 0) if base is None else class_profile(base, inside),
    )


def _support_as_photo(
    support: SupportEncoding, row: int, of_photo: Tensor, base_learner: BaseLearner | None
) -> PhotoMaps:
    """Maps of one support photo, its M cells in one row: nothing that reads them asks which cells are neighbours."""
    of_row = support.frozen[row].movedim(1, -1).flatten(0, 2)
    cells, frozen = (maps[of_photo].T[None, :, None] for maps in (support.cells[row], of_row))
    return PhotoMaps(
        cells=cells,
        frozen=frozen,
        objectness=support.share[row, of_photo].logit(eps=LEAST_SHARE)[None, None],
        base=None if base_learner is None else base_learner(frozen),
    )
