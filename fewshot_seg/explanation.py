"""One picture per episode or photo: what was found, and both sides of why; and the raw maps beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.progress import tqdm
from episodes.protocols import Fit
from episodes.types import EpisodeSpec, MaskSource, SupportKind, UInt8Array
from fewshot_seg.attention import scale_map
from fewshot_seg.decoder import PriorReadout
from fewshot_seg.episode_logits import segment_photo, to_original
from fewshot_seg.explainers import Comparison, background_evidence, prior, soft_attention
from fewshot_seg.explainers.episode import ShownPhotos, compare_photos, episode_photos
from fewshot_seg.metrics import intersection_union
from fewshot_seg.pictures import (
    TRUTH,
    FloatArray,
    Panel,
    colour_map,
    overlay_annotation,
    overlay_map,
    overlay_mask,
    panel_sheet,
    write_picture,
)
from fewshot_seg.priors import PRIOR_CHANNELS
from fewshot_seg.runtime import atomic_path
from fewshot_seg.segmenter import FewShotSegmenter


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainedPhotos:
    """What is shown of a query and its supports, at the photos' own sizes.

    Attributes:
        support_images: uint8 (H_k, W_k, 3) each.
        support_masks: uint8 (H_k, W_k) each, 1 = object, 255 = ignore, or not known in weaker marks.
        dense: which of them are masks.
        query_image: uint8 (H, W, 3).
        attention: float32 (H, W) in [0, 1], gradient attention of the similarity.
        background: float32 (H, W) in [0, 1], dissimilar evidence: where the query looks like the supports' background.
        support_attention: float32 (H_k, W_k) in [0, 1] each, which of the support's pixels made it so
            (`explainers.soft_attention`).
        support_background: float32 (H_k, W_k) in [0, 1] each, which pixels of its background spoke against.
        prior: float32 (H, W), the map that the decoder starts from; None for a model without prior.
        prior_name: its name.
        prediction: uint8 (H, W) of 0 and 1.
        raw: maps as they were computed, by the keys of `write_maps`.
    """

    support_images: tuple[UInt8Array, ...]
    support_masks: tuple[UInt8Array, ...]
    dense: tuple[bool, ...]
    query_image: UInt8Array
    attention: FloatArray
    background: FloatArray
    support_attention: tuple[FloatArray, ...]
    support_background: tuple[FloatArray, ...]
    prior: FloatArray | None
    prior_name: str
    prediction: UInt8Array
    raw: Mapping[str, FloatArray]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainedEpisode(ExplainedPhotos):
    """The same of an episode whose answer is known.

    Attributes:
        support: by what the supports are marked.
        target: uint8 (H, W), 255 = ignore.
        iou: foreground IoU in percent.
    """

    support: SupportKind
    target: UInt8Array
    iou: float


@torch.no_grad()
def explain_photos(comparison: Comparison, photos: ShownPhotos, *, fit: Fit = "squash") -> ExplainedPhotos:
    """Run the model on a query and keep what it saw on both sides.

    Args:
        comparison: of the photos, made square by `fit`.
        photos: at their own sizes.
        fit: how photos became square.
    """
    segmenter, query = comparison.segmenter, photos.query
    size, side = (query.shape[0], query.shape[1]), comparison.size
    prediction = segment_photo(
        segmenter, comparison.support, [level[:1] for level in comparison.levels], comparison.photos[0], size, fit
    )
    channel = segmenter.decoder.channel if isinstance(segmenter.decoder, PriorReadout) else 0
    shown_prior = prediction.priors[:, channel] if prediction.priors.shape[1] else None
    if shown_prior is not None and fit == "pad":  # cells are too coarse to tell where the photo ends
        shown_prior = F.interpolate(shown_prior[:, None], side, mode="bilinear", align_corners=False)[:, 0]
    places = range(1, comparison.shots + 1)
    attended = [soft_attention(comparison, place) for place in places]
    against = [background_evidence(comparison, 0), *(-one for one in attended)]  # of supports it is the same, turned
    shapes = [(image.shape[0], image.shape[1]) for image in photos.supports]
    return ExplainedPhotos(
        support_images=photos.supports,
        support_masks=photos.marks,
        dense=photos.dense,
        query_image=query,
        attention=prediction.attention[0].cpu().numpy(),
        background=_shown(against[0], size, side, fit),
        support_attention=tuple(_shown(one, shape, side, fit) for one, shape in zip(attended, shapes, strict=True)),
        support_background=tuple(_shown(one, shape, side, fit) for one, shape in zip(against[1:], shapes, strict=True)),
        prior=None if shown_prior is None else to_original(shown_prior, size, fit)[0].cpu().numpy(),
        prior_name=PRIOR_CHANNELS[channel] if segmenter.prior == "similarity" else segmenter.prior,
        prediction=prediction.masks[0].cpu().numpy().astype(np.uint8),
        raw=_raw_maps(comparison, attended, against),
    )


def _shown(values: Tensor, shape: tuple[int, int], side: tuple[int, int], fit: Fit) -> FloatArray:
    """A map float (h, w) of the square as it is looked at: rectified, in [0, 1], at the photo's own size."""
    rectified = values.relu()[None]
    if fit == "squash":
        return scale_map(rectified, shape)[0].cpu().numpy()
    return to_original(scale_map(rectified, side), shape, fit)[0].cpu().numpy()


def _raw_maps(comparison: Comparison, attended: Sequence[Tensor], against: Sequence[Tensor]) -> dict[str, FloatArray]:
    own = comparison.segmenter.attention_maps(comparison.support, comparison.cells[:1], rectify=False)[0]
    maps = {
        "query_attention": own,
        "query_background": against[0],
        "query_prior": prior(comparison, 0),
        "support_attention": torch.stack(list(attended)),
        "support_background": torch.stack(list(against[1:])),
        "support_prior": torch.stack([prior(comparison, place) for place in range(1, comparison.shots + 1)]),
    }
    return {name: one.float().cpu().numpy() for name, one in maps.items()}


def explain_episode(
    segmenter: FewShotSegmenter,
    source: MaskSource,
    spec: EpisodeSpec,
    *,
    resolution: int,
    support: SupportKind = "mask",
    fit: Fit = "squash",
) -> ExplainedEpisode:
    """Run the model on one episode and keep what it saw.

    Args:
        segmenter: the model, in evaluation mode.
        source: photos and masks.
        spec: the episode.
        resolution: side of the square that photos are fitted into.
        support: how supports are marked.
        fit: how photos become square.
    """
    photos = episode_photos(source, spec, support)
    comparison = compare_photos(segmenter, photos, resolution=resolution, fit=fit)
    explained, target = explain_photos(comparison, photos, fit=fit), source.mask(spec.query_id, spec.class_id)
    found = torch.from_numpy(explained.prediction)[None] > 0
    intersection, union = intersection_union(found, torch.from_numpy(target)[None])[0, 1].tolist()
    known = {name: getattr(explained, name) for name in ExplainedPhotos.__slots__}
    return ExplainedEpisode(**known, support=support, target=target, iou=100 * intersection / max(union, 1))


def episode_panels(episode: ExplainedPhotos) -> dict[str, Panel]:
    """What is shown of supports and query, at the photos' own sizes.

    In this order: ``support`` (or ``support 1``...), ``query``, ``attention``, ``background``, ``prior`` where there is
    one, ``prediction``, and ``truth`` of an episode.
    """
    panels = {panel.label: panel for panel in map(_shown_support, range(len(episode.support_images)), repeat(episode))}
    query = episode.query_image
    panels["query"] = Panel(picture=query, label="query")
    panels["attention"] = Panel(picture=overlay_map(query, episode.attention), label="attention", scale=True)
    panels["background"] = Panel(picture=overlay_map(query, episode.background), label="like background", scale=True)
    if episode.prior is not None:
        low, high = np.percentile(episode.prior, (1, 99)).tolist()  # single extremes would hide the rest
        spread = high - low if high > low else 1.0
        label = f"prior: {episode.prior_name}"
        panels["prior"] = Panel(picture=colour_map((episode.prior - low) / spread), label=label, scale=True)
    found = f"prediction, IoU {episode.iou:.0f}%" if isinstance(episode, ExplainedEpisode) else "prediction"
    panels["prediction"] = Panel(picture=overlay_mask(query, episode.prediction), label=found)
    if isinstance(episode, ExplainedEpisode):
        panels["truth"] = Panel(picture=overlay_mask(query, episode.target, TRUTH), label="ground truth")
    return panels


def _shown_support(number: int, episode: ExplainedPhotos) -> Panel:
    overlay = overlay_mask if episode.dense[number] else overlay_annotation
    name = f"support {number + 1}" if len(episode.support_images) > 1 else "support"
    return Panel(picture=overlay(episode.support_images[number], episode.support_masks[number]), label=name)


def episode_picture(episode: ExplainedPhotos, *, title: str, scale: float = 1) -> UInt8Array:
    """All panels of an episode as one picture, uint8 (H, W, 3): the query's row, then one for each support.

    Args:
        episode: of `explain_episode` or `explain_photos`.
        title: line above the panels.
        scale: of `pictures.panel_sheet`.
    """
    panels, rows = list(episode_panels(episode).values()), []
    shots = len(episode.support_images)
    maps = zip(episode.support_images, episode.support_attention, episode.support_background, strict=True)
    for shown, (image, attention, background) in zip(panels[:shots], maps, strict=True):
        attended = Panel(picture=overlay_map(image, attention), label="attention", scale=True)
        rows.append([shown, attended, Panel(picture=overlay_map(image, background), label="like query", scale=True)])
    return panel_sheet([panels[shots:], *rows], title, scale=scale)


def write_maps(path: Path, explained: ExplainedPhotos) -> None:
    """Raw maps as .npz, written beside and renamed; float32 on the grid of cells unless said otherwise.

    ============================  =========================================================================
    ``query_attention`` (h, w)    gradient attention of the similarity, with its sign
    ``query_background`` (h, w)   gradient attention of the likeness to the supports' background
    ``query_prior`` (h, w)        soft margin, log-ratio of densities; above 0 is nearer the object
    ``support_attention``         (K, h, w), which cells of each support made the query similar (above 0)
    ``support_background``        (K, h, w), which cells of its background the query resembles
    ``support_prior``             (K, h, w), soft margin of its cells to what was found in the query
    ``mask`` (H, W)               uint8 at the query's own size, 1 = found
    ``target`` (H, W)             uint8, 255 = ignored; only of episodes
    ============================  =========================================================================
    """
    arrays: dict[str, Any] = {**explained.raw, "mask": explained.prediction}
    if isinstance(explained, ExplainedEpisode):
        arrays["target"] = explained.target
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenExplanation:
    """A picture file of one episode: number, path, title and foreground IoU in percent."""

    number: int
    path: Path
    title: str
    iou: float


def write_explanations(
    segmenter: FewShotSegmenter,
    source: MaskSource,
    specs: Sequence[EpisodeSpec],
    *,
    numbers: Sequence[int],
    resolution: int,
    folder: Path,
    support: SupportKind = "mask",
    fit: Fit = "squash",
    scale: float = 1,
    maps: bool = False,
    show_progress: bool = False,
) -> list[WrittenExplanation]:
    """Write ``episode-0003.png`` for episode number 3 and so on.

    Args:
        segmenter: the model, in evaluation mode.
        source: photos and masks.
        specs: the episodes of an evaluation.
        numbers: which of them.
        resolution, support, fit: see `explain_episode`.
        folder: created when missing.
        scale: of `pictures.panel_sheet`.
        maps: write ``episode-0003.npz``, too; see `write_maps`.
        show_progress: bar on stderr.
    """
    written = []
    for number in tqdm(numbers, desc="explaining", unit="episode", disable=not show_progress):
        spec = specs[number]
        episode = explain_episode(segmenter, source, spec, resolution=resolution, support=support, fit=fit)
        shown = ", ".join(spec.support_ids)
        title = f"{source.class_names[spec.class_id]}: find it in {spec.query_id}, as shown in {shown}"
        path = folder / f"episode-{number:04d}.png"
        write_picture(path, episode_picture(episode, title=title, scale=scale))
        if maps:
            write_maps(path.with_suffix(".npz"), episode)
        written.append(WrittenExplanation(number=number, path=path, title=title, iou=episode.iou))
    return written
