"""The assembled model: support encoding -> prior -> decoder -> mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.types import IGNORE, DataError
from fewshot_seg.attention import (
    ATTENTION_KINDS,
    AttentionKind,
    scale_map,
    score_direction,
    similarity_attention,
)
from fewshot_seg.backbones import Backbone
from fewshot_seg.base_learner import EVIDENCE_CHANNELS, BaseLearner, class_profile, photo_evidence
from fewshot_seg.completion import SupportCompletion, estimate_object, open_part
from fewshot_seg.decoder import ContextDecoder, Decoder, MaskDecoder, PriorReadout
from fewshot_seg.encodings import PhotoMaps, Prediction, SupportEncoding, pool_cells
from fewshot_seg.guided_upsampling import PIXELS_PER_CELL, guided_margins
from fewshot_seg.look_back import LEAST_SHARE, look_back, of_bare_photos, with_share
from fewshot_seg.priors import (
    PRIOR_CHANNELS,
    TEMPERATURE,
    blockwise_soft_margin,
    cell_cosines,
    log_density_ratio,
    pfenet_prior,
    similarity_priors,
)
from fewshot_seg.similarity import SimilarityNetwork, cell_weights, join_levels

PriorKind = Literal["similarity", "pfenet", "none"]
PRIOR_KINDS: tuple[PriorKind, ...] = get_args(PriorKind)


class FewShotSegmenter(nn.Module):
    """Finds in a query what one or more supports show.

    Args:
        backbone: frozen feature extractor.
        similarity: embeds its levels; trained or as it is.
        decoder: `ContextDecoder`, `MaskDecoder`, or `PriorReadout` for a prior alone.
        prior: ``similarity`` (ours), ``pfenet`` (the rival, from frozen features) or ``none``.
        attention: form of the score whose gradient is shown, see `fewshot_seg.attention`.
        threshold: logit above which a pixel is foreground, chosen on base classes.
        temperature: of the soft margin.
        completion: fills in supports marked by less than a mask; None goes by `estimate_object`, nothing trained.
        weak_decoder: gives the first answer where bare photos are among the supports, whose priors are less sure, and
            looks back from the query to them (`look_back`), so that the decoder gets supports as good as masks. None
            does without.
        base_learner: knows the base classes; with it, the decoder reads `EVIDENCE_MAPS` beside the similarity's maps.
        guided: logits follow the edges of the photo, where there is one (`guided_upsampling`).

    Raises:
        DataError: decoder, prior, completion, similarity network and backbone do not fit together, a temperature that
            is not positive, or an unknown kind.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        similarity: SimilarityNetwork,
        decoder: Decoder,
        prior: PriorKind = "similarity",
        attention: AttentionKind = "margin",
        threshold: float = 0.0,
        temperature: float = TEMPERATURE,
        completion: SupportCompletion | None = None,
        weak_decoder: ContextDecoder | None = None,
        base_learner: BaseLearner | None = None,
        guided: bool = False,
    ) -> None:
        super().__init__()
        if prior not in PRIOR_KINDS:
            raise DataError(f"unknown prior {prior!r}; known: {', '.join(PRIOR_KINDS)}")
        if attention not in ATTENTION_KINDS or attention == "quadruplet":
            raise DataError(
                f"attention {attention!r} cannot be shown for one episode; choose siamese, triplet, cosine or margin"
            )
        if temperature <= 0:
            raise DataError(f"temperature of the soft margin must be greater than 0, got {temperature}")
        if tuple(similarity.channels) != backbone.channels:
            raise DataError(f"similarity network reads {similarity.channels}, backbone gives {backbone.channels}")
        if completion is not None and completion.feature_channels != similarity.width:
            raise DataError(
                f"the backbone gives {similarity.width} feature channels, the completion reads "
                f"{completion.feature_channels}"
            )
        if base_learner is not None and (prior != "similarity" or base_learner.feature_channels != similarity.width):
            raise DataError(
                f"a base learner of {base_learner.feature_channels} channels does not fit prior {prior!r} over a "
                f"backbone of {similarity.width}; it goes with the prior 'similarity'"
            )
        maps = prior_channels(prior, completion=completion is not None, base_learner=base_learner is not None)
        _check_decoder(decoder, maps, prior, similarity.width)
        if weak_decoder is not None:
            _check_decoder(weak_decoder, maps, prior, similarity.width)
        self.backbone, self.similarity, self.decoder = backbone, similarity, decoder
        self.completion, self.weak_decoder, self.base_learner = completion, weak_decoder, base_learner
        self.prior, self.attention = prior, attention
        self.threshold, self.temperature, self.guided = threshold, temperature, guided

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that training may change: similarity network (unless frozen), decoder, and what else there is."""
        modules: list[nn.Module] = [self.decoder] if self.prior == "pfenet" else [self.similarity, self.decoder]
        further = (self.completion, self.base_learner, self.weak_decoder)
        modules += [part for part in further if part is not None]
        return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]

    def encode_support(self, images: Tensor, masks: Tensor, dense: Tensor | None = None) -> SupportEncoding:
        """Encode B episodes of K supports.

        Args:
            images: float32 (B, K, 3, H, W), RGB in [0, 1].
            masks: uint8 (B, K, H, W), 1 = object, 0 = background, 255 = ignored, or not known in weak supports.
            dense: bool (B, K), which supports are marked by masks; the others are weak (`episodes.annotations`) and
                are completed. All are masks by default.

        Raises:
            DataError: shapes that do not fit, or an episode whose supports cannot show an object: no mask with
                foreground, and no weak support that leaves anything open.
        """
        if images.dim() != 5 or images.shape[2] != 3 or masks.shape != (*images.shape[:2], *images.shape[3:]):
            raise DataError(
                f"expected support images (B, K, 3, H, W) and masks (B, K, H, W), got {tuple(images.shape)} and "
                f"{tuple(masks.shape)}"
            )
        return self.encode_support_levels(self.backbone(images.flatten(0, 1)), masks, dense)

    def encode_support_levels(
        self, levels: Sequence[Tensor], masks: Tensor, dense: Tensor | None = None
    ) -> SupportEncoding:
        """As `encode_support`, from frozen features float (B*K, C, h, w) per level."""
        joined = join_levels(levels)
        return self.encode_support_photos(PhotoMaps(cells=self.similarity.turn(joined), frozen=joined), masks, dense)

    def encode_support_maps(
        self, maps: Tensor, levels: Sequence[Tensor], masks: Tensor, dense: Tensor | None = None
    ) -> SupportEncoding:
        """As `encode_support_levels`, with the similarity network's output for the levels at hand."""
        return self.encode_support_photos(PhotoMaps(cells=maps, frozen=join_levels(levels)), masks, dense)

    def encode_support_photos(self, photos: PhotoMaps, masks: Tensor, dense: Tensor | None = None) -> SupportEncoding:
        """As `encode_support`, from the B*K photos' maps."""
        maps, joined = photos.cells, photos.frozen
        batch, shots = masks.shape[:2]
        weak = _weak(masks, dense)
        possible = (masks == 1) | ((masks == IGNORE) & weak[:, :, None, None])
        if not bool(possible.flatten(1).any(dim=1).all()):
            raise DataError("a support mask has no foreground: expected at least one pixel of the object (value 1)")
        size = (maps.shape[2], maps.shape[3])
        foreground, background = cell_weights(masks.flatten(0, 1), size)
        still_open = open_part(masks.flatten(0, 1), size) * weak.flatten()[:, None, None]
        share = self._completed_share(weak.flatten(), maps, joined, (foreground, background, still_open))
        foreground, background = foreground + still_open * share, background + still_open * (1 - share)
        count = shots * size[0] * size[1]
        cells = maps.flatten(2).transpose(1, 2).reshape(batch, count, maps.shape[1])
        frozen_cells = joined.flatten(2).transpose(1, 2).reshape(batch, count, joined.shape[1])
        foreground, background = foreground.reshape(batch, -1), background.reshape(batch, -1)
        return SupportEncoding(
            cells=cells,
            foreground=foreground,
            background=background,
            open=still_open.reshape(batch, -1),
            share=share.reshape(batch, -1),
            photo=torch.arange(shots, device=maps.device).repeat_interleave(size[0] * size[1]).expand(batch, -1),
            foreground_embedding=pool_cells(cells, foreground),
            background_embedding=pool_cells(cells, background),
            prototype=pool_cells(frozen_cells, foreground),
            frozen=joined.reshape(batch, shots, *joined.shape[1:]),
            profile=self._profile(photos, foreground),
        )

    def _profile(self, photos: PhotoMaps, foreground: Tensor) -> Tensor:
        """float (B, C) of B episodes' supports, by the foreground of their cells, float (B, K*h*w)."""
        if self.base_learner is None:
            return foreground.new_zeros(len(foreground), 0)
        base = self.base_learner(photos.frozen) if photos.base is None else photos.base
        of_episodes = base.reshape(len(foreground), -1, *base.shape[1:]).transpose(1, 2).flatten(2)
        return class_profile(of_episodes, foreground)

    def _completed_share(
        self, weak: Tensor, maps: Tensor, joined: Tensor, parts: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """float (N, h, w): how much of the open part of each support is object; 0 for masks.

        Args:
            weak: bool (N,).
            maps, joined: float (N, D, h, w), cells of the similarity network and of the frozen features.
            parts: known object, known background, open part, float (N, h, w) each.
        """
        share = torch.zeros_like(parts[0])
        if not bool(weak.any()):
            return share
        chosen = weak.nonzero()[:, 0]
        # Detached: weak supports should not move the embedding towards what is easy to complete.
        cells, of_weak = maps[chosen].detach(), tuple(part[chosen] for part in parts)
        if self.completion is None:
            logits = estimate_object(cells, *of_weak)
        else:
            logits = self.completion(cells, joined[chosen], *of_weak)
        return share.index_copy(0, chosen, logits.sigmoid())

    def segment(self, support: SupportEncoding, images: Tensor) -> Prediction:
        """Segment B queries, float32 (B, 3, H, W), with B supports or with one for all.

        Raises:
            DataError: images of another shape.
            ValueError: neither one support nor B.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise DataError(f"expected query images (B, 3, H, W), got {tuple(images.shape)}")
        levels = self.backbone(images)
        prediction = self.segment_levels(support, levels, (images.shape[2], images.shape[3]))
        cells = (prediction.priors.shape[2], prediction.priors.shape[3])
        return replace(prediction, logits=self.follow_edges(prediction.logits, images, cells))

    def follow_edges(self, logits: Tensor, photos: Tensor, cells: tuple[int, int]) -> Tensor:
        """Logits float (B, H, W) that were enlarged bilinearly, led by their photos if the model is `guided`.

        Args:
            logits: of `segment_levels`.
            photos: float (B, 3, H, W), RGB in [0, 1].
            cells: (h, w) of the grid that the logits come from.
        """
        if not self.guided:
            return logits
        working = (cells[0] * PIXELS_PER_CELL, cells[1] * PIXELS_PER_CELL)
        return guided_margins(logits - self.threshold, photos, working) + self.threshold

    def segment_levels(self, support: SupportEncoding, levels: Sequence[Tensor], size: tuple[int, int]) -> Prediction:
        """As `segment`, from frozen features, which show no edges; `size` is (H, W) of the logits."""
        support = support.expand(len(levels[0]))
        photos = self.photo_maps(levels)
        maps, priors = photos.cells, self.priors_of(support, photos)
        logits = self.decoder(priors, photos.frozen, support.prototype)
        logits = F.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        with torch.no_grad():
            attention = scale_map(self.attention_maps(support, maps), size)
        return Prediction(logits=logits, priors=priors, attention=attention, threshold=self.threshold)

    def photo_maps(self, levels: Sequence[Tensor]) -> PhotoMaps:
        """Maps of N photos from frozen features float (N, C, h, w) per level."""
        joined = join_levels(levels)
        return self._photo_maps(self.similarity.turn(joined), joined)

    def _photo_maps(self, cells: Tensor, joined: Tensor) -> PhotoMaps:
        needed = self.completion is not None and self.prior == "similarity"
        return PhotoMaps(
            cells=cells,
            frozen=joined,
            objectness=self.objectness(cells, joined) if needed else None,
            base=None if self.base_learner is None else self.base_learner(joined),
        )

    def priors_of(self, support: SupportEncoding, photos: PhotoMaps, *, look_again: bool = True) -> Tensor:
        """What the decoder reads of B queries.

        Args:
            support, photos: B encoded supports and the queries' maps.
            look_again: whether bare photos among the supports are completed anew by the first answer (`look_back`),
                where the model has a decoder for that.

        Returns:
            float (B, P, h, w).
        """
        maps = photos.cells
        if self.prior == "none":
            return maps.new_zeros(len(maps), 0, *maps.shape[-2:])
        if self.prior == "pfenet":
            return pfenet_prior(photos.frozen, support.frozen, support.frozen_foreground)[:, None]
        if self.training or not bool((support.open > 0).any()):
            return self._joined(self._similarity_priors(support, maps, None), support, photos)
        cosine = cell_cosines(maps, support.cells)
        margin = self._similarity_priors(support, maps, cosine)[:, 0]
        priors = self._similarity_priors(self._second_look(support, cosine, margin), maps, cosine)
        priors = self._joined(priors, support, photos)
        bare = of_bare_photos(support).any(dim=1)
        if self.weak_decoder is None or not look_again or not bool(bare.any()):
            return priors
        logits = self.weak_decoder(priors, photos.frozen, support.prototype)
        support = look_back(support, photos, logits, cosine, answer=self._answer, base_learner=self.base_learner)
        again = self._joined(self._similarity_priors(support, maps, cosine), support, photos)
        return torch.where(bare[:, None, None, None], again, priors)

    def _joined(self, priors: Tensor, support: SupportEncoding, photos: PhotoMaps) -> Tensor:
        """The similarity's maps, and what is read beside them."""
        further = [] if photos.base is None else [self._evidence(support, photos.frozen, photos.base)]
        further += [] if photos.objectness is None else [photos.objectness[:, None]]
        return torch.cat([priors, *further], dim=1)

    def _answer(self, support: SupportEncoding, photos: PhotoMaps, cosine: Tensor) -> Tensor:
        """What the decoder of weak supports makes of masks that are guesses: logits float (B, h, w)."""
        assert self.weak_decoder is not None
        priors = self._joined(self._similarity_priors(support, photos.cells, cosine), support, photos)
        logits: Tensor = self.weak_decoder(priors, photos.frozen, support.prototype)
        return logits

    def _evidence(self, support: SupportEncoding, frozen: Tensor, base: Tensor) -> Tensor:
        """float (B, 4, h, w), as named in `EVIDENCE_MAPS`."""
        margin = blockwise_soft_margin(
            frozen.flatten(2).transpose(1, 2),
            support.frozen_cells,
            support.foreground,
            support.background,
            temperature=self.temperature,
        )
        maps = photo_evidence(base, support.profile, frozen)
        return torch.cat([margin.reshape(len(frozen), 1, *frozen.shape[2:]), maps], dim=1)

    def _similarity_priors(self, support: SupportEncoding, maps: Tensor, cosine: Tensor | None) -> Tensor:
        return similarity_priors(
            maps,
            support.cells,
            support.foreground,
            support.background,
            support.foreground_embedding,
            support.background_embedding,
            temperature=self.temperature,
            cosine=cosine,
        )

    def _second_look(self, support: SupportEncoding, cosine: Tensor, margin: Tensor) -> SupportEncoding:
        """Weak supports completed again, in the light of the query: what it seems to share with them is their object.

        Args:
            support: B encoded supports.
            cosine: float (B, h*w, K*h*w), of the query's cells with the supports'.
            margin: float (B, h, w), the query's soft margin by the supports as they were completed first.
        """
        found = margin.flatten(1).sigmoid()
        likeness = log_density_ratio(cosine.transpose(1, 2), found, 1 - found, temperature=self.temperature)
        share = (support.share.logit(eps=LEAST_SHARE) + likeness).sigmoid()
        return with_share(support, share, base_learner=None)

    def objectness(self, maps: Tensor, joined: Tensor) -> Tensor:
        """Logits float (B, h, w) of the query's object as the completion sees it: as a photo of which nothing is known.

        With image-level supports it carries much of the answer: a photo's main object is likely what is asked for.
        """
        assert self.completion is not None
        return self.completion.objectness(maps.detach(), joined)

    def attention_maps(
        self,
        support: SupportEncoding,
        maps: Tensor,
        kind: AttentionKind | None = None,
        *,
        second_negative: Tensor | None = None,
        rectify: bool = True,
    ) -> Tensor:
        """Gradient attention of the query's maps.

        Args:
            support: B encoded supports; the first negative is their background.
            maps: float (B, D, h, w), the similarity network's output for the queries.
            kind: form of the score; the model's own by default.
            second_negative: unit-length float (B, D), needed by ``quadruplet``: another class or image.
            rectify: False keeps the sign.

        Returns:
            float (B, h, w), unscaled.
        """
        negatives = [support.background_embedding, *([] if second_negative is None else [second_negative])]
        embedding = self.similarity.embed(maps)
        direction = score_direction(kind or self.attention, embedding, support.foreground_embedding, negatives)
        return similarity_attention(maps, direction, rectify=rectify)


EVIDENCE_MAPS = ("frozen soft margin", *EVIDENCE_CHANNELS)
"""What a model with a base learner reads beside `PRIOR_CHANNELS`: the soft margin of the frozen features, which no
training has turned towards base classes, and what the query alone shows."""


def prior_channels(prior: PriorKind, *, completion: bool = False, base_learner: bool = False) -> int:
    """Number of maps of a prior: of the similarity, a base learner's evidence, the objectness of a completion."""
    similarity = len(PRIOR_CHANNELS) + len(EVIDENCE_MAPS) * base_learner + completion
    return {"similarity": similarity, "pfenet": 1, "none": 0}[prior]


def _check_decoder(decoder: Decoder, maps: int, prior: PriorKind, features: int) -> None:
    if isinstance(decoder, PriorReadout):
        if not 0 <= decoder.channel < maps:
            raise DataError(f"prior {prior!r} has {maps} maps, the readout wants map {decoder.channel} (from 0)")
        return
    if decoder.prior_channels != maps:
        raise DataError(f"prior {prior!r} has {maps} maps, the decoder reads {decoder.prior_channels}")
    if isinstance(decoder, MaskDecoder) and decoder.appearance and decoder.feature_channels != features:
        raise DataError(f"the backbone gives {features} feature channels, the decoder reads {decoder.feature_channels}")


def _weak(masks: Tensor, dense: Tensor | None) -> Tensor:
    """bool (B, K), which supports are marked by less than a mask."""
    if dense is None:
        return torch.zeros(masks.shape[:2], dtype=torch.bool, device=masks.device)
    if dense.dtype != torch.bool or dense.shape != masks.shape[:2]:
        raise DataError(
            f"expected bool (B, K) = {tuple(masks.shape[:2])} to say which supports are masks, got {dense.dtype} "
            f"{tuple(dense.shape)}"
        )
    return ~dense


def build_segmenter(
    backbone: Backbone,
    *,
    prior: PriorKind = "similarity",
    appearance: int = 0,
    similarity_rank: int = 16,
    decoder_width: int = 32,
    decoder_blocks: int = 2,
    dropout: float = 0.1,
    attention: AttentionKind = "margin",
    seed: int = 0,
    similarity: SimilarityNetwork | None = None,
    completion: bool = False,
    base_classes: int = 0,
) -> FewShotSegmenter:
    """A new, untrained model over a backbone; arguments as in `SimilarityNetwork` and `MaskDecoder`.

    `completion` adds a `SupportCompletion`, for training with weak supports. With `base_classes`, the model has a
    `BaseLearner` of so many classes, a `ContextDecoder` (with `completion` a second one, for weak supports) and guided
    upsampling, for `fewshot_seg.cross_fitting`; the arguments of `MaskDecoder` are not used then.

    A `similarity` network that was trained before takes the place of a new one. Training goes on with it unless its
    parameters do not require gradients.
    """
    if similarity is None:
        similarity = SimilarityNetwork(backbone.channels, rank=similarity_rank, seed=seed)
    width = sum(backbone.channels)
    maps = prior_channels(prior, completion=completion, base_learner=base_classes > 0)
    decoder: Decoder
    if base_classes:
        decoder = ContextDecoder(prior_channels=maps, seed=seed)
    else:
        decoder = MaskDecoder(
            prior_channels=maps,
            feature_channels=width,
            appearance=appearance,
            width=decoder_width,
            blocks=decoder_blocks,
            dropout=dropout,
            seed=seed,
        )
    return FewShotSegmenter(
        backbone=backbone,
        similarity=similarity,
        decoder=decoder,
        prior=prior,
        attention=attention,
        completion=SupportCompletion(feature_channels=width, objects=base_classes > 0, seed=seed)
        if completion
        else None,
        weak_decoder=ContextDecoder(prior_channels=maps, seed=seed) if completion and base_classes else None,
        base_learner=BaseLearner(feature_channels=width, classes=base_classes) if base_classes else None,
        guided=base_classes > 0,
    )


def training_free(
    backbone: Backbone,
    *,
    channel: str = PRIOR_CHANNELS[0],
    threshold: float = 0.0,
    similarity: SimilarityNetwork | None = None,
    **arguments: Any,
) -> FewShotSegmenter:
    """No decoder: one prior map, named as in `PRIOR_CHANNELS`, cut at a threshold.

    Without a `similarity` network that was trained before, nothing in it is trained.
    """
    if channel not in PRIOR_CHANNELS:
        raise DataError(f"unknown prior map {channel!r}; known: {', '.join(PRIOR_CHANNELS)}")
    return FewShotSegmenter(
        backbone=backbone,
        similarity=SimilarityNetwork(backbone.channels, rank=0) if similarity is None else similarity,
        decoder=PriorReadout(PRIOR_CHANNELS.index(channel)),
        threshold=threshold,
        **arguments,
    )
