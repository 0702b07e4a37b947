"""Logits of batches of episodes, and what they are compared with: shared by all ways of scoring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.augment import fitted_size
from episodes.progress import tqdm
from episodes.protocols import Fit, ShotRule
from fewshot_seg.decoder import Decoder
from fewshot_seg.encoded_photos import EncodedPhotos
from fewshot_seg.encodings import Prediction, SupportEncoding
from fewshot_seg.feature_episodes import FeatureBatch, FeatureEpisodes
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.shot_rules import merge_shots, shot_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotLogits:
    """What the supports say of B queries, not yet merged.

    Attributes:
        heads: per decoder float (B, K, H, W), a map per support; K = 1 where the rule is ``pooled``.
        weights: float (B, K), see `shot_rules.shot_weights`.
        rule: how the K maps become one.
    """

    heads: Mapping[str, Tensor]
    weights: Tensor
    rule: ShotRule

    def margins(self, head: str, threshold: float) -> Tensor:
        """float (B, H, W), foreground where greater than 0."""
        return merge_shots(self.heads[head], self.weights, threshold, rule=self.rule)

    def resized_margins(self, head: str, threshold: float, row: int, shape: tuple[int, int], fit: Fit) -> Tensor:
        """float (H, W) of one query at its label's own size, foreground where greater than 0.

        Every support's map is cropped to the part of the square that the photo fills, and enlarged, before they are
        merged: votes are votes at the label's size, as in HSNet's code.
        """
        resized = to_original(self.heads[head][row], shape, fit)[None]
        return merge_shots(resized, self.weights[row : row + 1], threshold, rule=self.rule)[0]


def to_original(maps: Tensor, shape: tuple[int, int], fit: Fit) -> Tensor:
    """Maps over the square, float (N, S, S), at a photo's own size (H, W): the part it fills, enlarged.

    Raises:
        ValueError: maps that are no squares.
    """
    if maps.shape[-2] != maps.shape[-1]:
        raise ValueError(f"expected maps over the square, got {tuple(maps.shape)}")
    height, width = fitted_size(*shape, maps.shape[-1], fit)
    return F.interpolate(maps[:, None, :height, :width], shape, mode="bilinear", align_corners=False)[:, 0]


def segment_photo(
    segmenter: FewShotSegmenter,
    support: SupportEncoding,
    levels: Sequence[Tensor],
    square: Tensor,
    shape: tuple[int, int],
    fit: Fit,
) -> Prediction:
    """`FewShotSegmenter.segment` of one photo at its own size (H, W); its priors stay as the decoder read them.

    Args:
        segmenter, support: the model and one encoded support.
        levels: the photo's frozen features, float (1, C, h, w) each.
        square: float (3, S, S), the photo made square by `fit`.
        shape: (H, W) of the photo.
        fit: how it was made square.
    """
    photo = square[None]
    if fit == "squash":
        photo = F.interpolate(photo, shape, mode="bilinear", align_corners=False)
    prediction = segmenter.segment_levels(support, levels, (photo.shape[2], photo.shape[3]))
    cells = (prediction.priors.shape[2], prediction.priors.shape[3])
    logits, attention = segmenter.follow_edges(prediction.logits, photo, cells), prediction.attention
    if fit == "pad":
        logits, attention = (to_original(maps, shape, fit) for maps in (logits, attention))
    return replace(prediction, logits=logits, attention=attention)


@torch.no_grad()
def shot_logits(
    segmenter: FewShotSegmenter,
    decoders: Mapping[str, Decoder],
    batch: FeatureBatch,
    size: tuple[int, int],
    *,
    rule: ShotRule = "pooled",
    encoded: EncodedPhotos | None = None,
) -> ShotLogits:
    """Logits of size (H, W), on the CPU, of several decoders that read one segmenter's priors, computed once.

    With a rule other than ``pooled`` every support is encoded alone. `encoded` keeps what the model makes of stored
    photos from one batch to the next.
    """
    batch = batch.to(next(segmenter.backbone.parameters()).device)
    shots = batch.support_masks.shape[1]
    kept = encoded if encoded is not None and encoded.serves(batch) else None
    photos = segmenter.photo_maps(batch.query_levels) if kept is None else kept.queries(batch)
    found: dict[str, list[Tensor]] = {name: [] for name in decoders}
    for number in range(1 if rule == "pooled" else shots):
        alone = None if rule == "pooled" else number
        support = _encode(segmenter, batch, alone) if kept is None else kept.supports(batch, alone)
        priors = segmenter.priors_of(support, photos)
        for name, decoder in decoders.items():
            logits = decoder(priors, photos.frozen, support.prototype)[:, None]
            enlarged = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            found[name].append(_led(segmenter, enlarged, batch, priors).cpu())
    weights = photos.cells.new_ones(len(batch.specs), 1)
    if rule != "pooled":
        low_query, low_support = batch.query_levels[0], batch.support_levels[0]  # the finest level
        weights = shot_weights(low_query, low_support.reshape(-1, shots, *low_support.shape[1:]), rule=rule)
    return ShotLogits(
        heads={name: torch.cat(maps, 1) for name, maps in found.items()}, weights=weights.cpu(), rule=rule
    )


def _led(segmenter: FewShotSegmenter, logits: Tensor, batch: FeatureBatch, priors: Tensor) -> Tensor:
    """Logits float (B, 1, S, S), following the edges of the photos where model and batch have what it takes."""
    if not segmenter.guided or batch.query_photos is None or logits.shape[2] != logits.shape[3]:
        return logits
    photos = batch.query_photos(logits.shape[2]).to(logits.device)
    cells = (priors.shape[2], priors.shape[3])
    return segmenter.follow_edges(logits[:, 0], photos, cells)[:, None]


def _encode(segmenter: FewShotSegmenter, batch: FeatureBatch, alone: int | None) -> SupportEncoding:
    """All supports of each episode together, or only number `alone` of each."""
    shots = batch.support_masks.shape[1]
    chosen = slice(None) if alone is None else slice(alone, None, shots)  # levels hold episode after episode
    which = slice(None) if alone is None else slice(alone, alone + 1)
    levels = tuple(level[chosen] for level in batch.support_levels)
    return segmenter.encode_support_levels(levels, batch.support_masks[:, which], batch.support_dense[:, which])


def square_targets(batch: FeatureBatch, side: int) -> Tensor:
    """Query masks, uint8 (B, side, side): the nearest pixels."""
    masks = batch.query_masks
    if side == masks.shape[-1]:
        return masks
    return F.interpolate(masks[:, None], (side, side), mode="nearest-exact")[:, 0]


def batches_with_progress(
    episodes: FeatureEpisodes, batch_size: int, show_progress: bool, title: str, *, ways: int = 1
) -> Iterator[FeatureBatch]:
    """Batches of all episodes, with a bar on stderr if wanted; `ways` one-way episodes count as one."""
    with tqdm(total=len(episodes) // ways, desc=title, unit="episode", disable=not show_progress) as bar:
        for batch in episodes.batches(batch_size * ways):
            yield batch
            bar.update(len(batch.specs) // ways)
