"""Pictures of compared photos with their attention: what makes two alike, and what a dissimilar one shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from episodes.augment import EpisodeTransform
from episodes.types import DataError, UInt8Array
from fewshot_seg.attention import NEGATIVES_NEEDED, AttentionKind
from fewshot_seg.embedding import ImageEmbedder, explain_comparisons
from fewshot_seg.pictures import Panel, overlay_map, panel_sheet

_ROLES = ("anchor", "similar", "dissimilar", "second dissimilar")


@torch.no_grad()
def comparison_picture(
    embedder: ImageEmbedder,
    photos: Sequence[UInt8Array],
    *,
    kind: AttentionKind,
    size: int,
    title: str,
    labels: Sequence[str] | None = None,
) -> UInt8Array:
    """Photos in one row, their attention below, uint8 (H, W, 3).

    Args:
        embedder: the model.
        photos: uint8 (H, W, 3) of any size: anchor, a similar one, and one dissimilar one for each negative that
            `kind` compares with; more are left out.
        kind: form of the score.
        size: side of the square that photos are squashed to for the network.
        title: line above.
        labels: names of the photos for their captions; without, the roles alone.

    Raises:
        DataError: fewer photos than the kind compares.
    """
    needed = 2 + NEGATIVES_NEEDED[kind]
    if len(photos) < needed:
        raise DataError(f"attention kind {kind!r} compares {needed} photos, got {len(photos)}; add some")
    photos, transform = photos[:needed], EpisodeTransform("none", size)
    device = next(embedder.backbone.parameters()).device
    found = explain_comparisons(embedder, [transform.photo(photo)[None].to(device) for photo in photos], kind=kind)
    first, *others = found.embeddings
    maps = [found.anchor, found.positive, *found.negatives]
    names = [""] * len(photos) if labels is None else [f": {label}" for label in labels]
    above, below = [], []
    for number, (photo, layers) in enumerate(zip(photos, maps, strict=False)):
        shown = found.scaled((photo.shape[0], photo.shape[1]))
        attention = [shown.anchor, shown.positive, *shown.negatives][number]
        assert attention is not None
        above.append(Panel(picture=photo, label=f"{_ROLES[number]}{names[number]}"))
        cosine = "" if number == 0 else f", cosine {float((others[number - 1] * first).sum()):.2f}"
        empty = not bool((layers[0] > 0).any())
        label = f"attention{cosine}" + (" (none)" if empty else "")
        below.append(Panel(picture=overlay_map(photo, attention[0].cpu().numpy()), label=label, scale=True))
    return panel_sheet([above, below], title)
