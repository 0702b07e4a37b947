"""One picture per episode: support with its mask, query, attention, prior, prediction, ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from episodes.annotations import annotation_of
from episodes.augment import EpisodeTransform
from episodes.protocols import Fit
from episodes.types import EpisodeSpec, MaskSource, SupportKind, UInt8Array
from fewshot_seg.decoder import PriorReadout
from fewshot_seg.episode_logits import segment_photo, to_original
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
from fewshot_seg.segmenter import FewShotSegmenter


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainedEpisode:
    """What is shown of one episode, at the query photo's own size.

    Attributes:
        support_images: uint8 (H_k, W_k, 3) each.
        support_masks: uint8 (H_k, W_k) each, 1 = object, 255 = ignore, or not known in weaker marks.
        support: by what the supports are marked.
        query_image: uint8 (H, W, 3).
        attention: float32 (H, W) in [0, 1], gradient attention of the similarity.
        prior: float32 (H, W), the map that the decoder starts from; None for a model without prior.
        prior_name: its name.
        prediction: uint8 (H, W) of 0 and 1.
        target: uint8 (H, W), 255 = ignore.
        iou: foreground IoU in percent.
    """

    support_images: tuple[UInt8Array, ...]
    support_masks: tuple[UInt8Array, ...]
    support: SupportKind
    query_image: UInt8Array
    attention: FloatArray
    prior: FloatArray | None
    prior_name: str
    prediction: UInt8Array
    target: UInt8Array
    iou: float


@torch.no_grad()
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
    transform = EpisodeTransform("none", resolution, fit)
    device = next(segmenter.backbone.parameters()).device
    images = tuple(source.image(image_id) for image_id in spec.support_ids)
    masks = tuple(annotation_of(source, image_id, spec.class_id, support) for image_id in spec.support_ids)
    is_mask = support == "mask"
    squares = [transform.support(image, mask, is_mask=is_mask) for image, mask in zip(images, masks, strict=True)]
    encoded = segmenter.encode_support(
        torch.stack([image for image, _ in squares])[None].to(device),
        torch.stack([mask for _, mask in squares])[None].to(device),
        torch.full((1, len(squares)), is_mask, device=device),
    )
    query, target = source.image(spec.query_id), source.mask(spec.query_id, spec.class_id)
    size = (query.shape[0], query.shape[1])
    prediction = segment_photo(segmenter, encoded, transform.photo(query).to(device), size, fit)
    mask = prediction.masks.cpu()
    intersection, union = intersection_union(mask, torch.from_numpy(target)[None])[0, 1].tolist()
    channel = segmenter.decoder.channel if isinstance(segmenter.decoder, PriorReadout) else 0
    prior = prediction.priors[:, channel] if prediction.priors.shape[1] else None
    if prior is not None and fit == "pad":  # cells are too coarse to tell where the photo ends
        square = (resolution, resolution)
        prior = F.interpolate(prior[:, None], square, mode="bilinear", align_corners=False)[:, 0]
    return ExplainedEpisode(
        support_images=images,
        support_masks=masks,
        support=support,
        query_image=query,
        attention=prediction.attention[0].cpu().numpy(),
        prior=None if prior is None else to_original(prior, size, fit)[0].cpu().numpy(),
        prior_name=PRIOR_CHANNELS[channel] if segmenter.prior == "similarity" else segmenter.prior,
        prediction=mask[0].numpy().astype(np.uint8),
        target=target,
        iou=100 * intersection / max(union, 1),
    )


def episode_panels(episode: ExplainedEpisode) -> dict[str, Panel]:
    """What is shown of an episode, at the photos' own sizes.

    In this order: ``support`` (or ``support 1``...), ``query``, ``attention``, ``prior`` where there is one,
    ``prediction`` and ``truth``.
    """
    overlay = overlay_mask if episode.support == "mask" else overlay_annotation
    panels = dict[str, Panel]()
    for number, (image, mask) in enumerate(zip(episode.support_images, episode.support_masks, strict=True), 1):
        label = f"support {number}" if len(episode.support_masks) > 1 else "support"
        panels[label] = Panel(picture=overlay(image, mask), label=label)
    query = episode.query_image
    panels["query"] = Panel(picture=query, label="query")
    panels["attention"] = Panel(picture=overlay_map(query, episode.attention), label="attention", scale=True)
    if episode.prior is not None:
        low, high = np.percentile(episode.prior, (1, 99)).tolist()  # single extremes would hide the rest
        spread = high - low if high > low else 1.0
        label = f"prior: {episode.prior_name}"
        panels["prior"] = Panel(picture=colour_map((episode.prior - low) / spread), label=label, scale=True)
    label = f"prediction, IoU {episode.iou:.0f}%"
    panels["prediction"] = Panel(picture=overlay_mask(query, episode.prediction), label=label)
    panels["truth"] = Panel(picture=overlay_mask(query, episode.target, TRUTH), label="ground truth")
    return panels


def episode_picture(episode: ExplainedEpisode, *, title: str) -> UInt8Array:
    """All panels of an episode as one picture, uint8 (H, W, 3).

    Args:
        episode: of `explain_episode`.
        title: line above the panels.
    """
    panels, shots = list(episode_panels(episode).values()), len(episode.support_masks)
    rows = [panels] if shots == 1 else [panels[:shots], panels[shots:]]
    return panel_sheet(rows, title)


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
        show_progress: bar on stderr.
    """
    written = []
    for number in tqdm(numbers, desc="explaining", unit="episode", disable=not show_progress):
        spec = specs[number]
        episode = explain_episode(segmenter, source, spec, resolution=resolution, support=support, fit=fit)
        shown = ", ".join(spec.support_ids)
        title = f"{source.class_names[spec.class_id]}: find it in {spec.query_id}, as shown in {shown}"
        path = folder / f"episode-{number:04d}.png"
        write_picture(path, episode_picture(episode, title=title))
        written.append(WrittenExplanation(number=number, path=path, title=title, iou=episode.iou))
    return written
