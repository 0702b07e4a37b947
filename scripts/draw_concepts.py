"""Draw the pictures of docs/concepts from the project's own generated photos, never from real ones.

    python scripts/draw_concepts.py --out docs/pictures

One episode of a generated novel class goes through the parts of the model: its marks, its cells, the maps that are the
prior, and what the decoder of the shipped model of fold 0 (trained on real photos, on none of these) makes of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from episodes.annotations import annotation_of
from episodes.augment import EpisodeTransform
from episodes.sources import SyntheticSource
from episodes.types import SUPPORT_KINDS, EpisodeSpec, UInt8Array
from fewshot_seg.attention import scale_map
from fewshot_seg.checkpoint import load_segmenter
from fewshot_seg.encodings import SupportEncoding
from fewshot_seg.pictures import TRUTH, Panel, colour_map, overlay_annotation, overlay_map, overlay_mask, panel_sheet
from fewshot_seg.priors import PRIOR_CHANNELS, pfenet_prior
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.shipped import shipped_model
from fewshot_seg.similarity import cell_weights

SIDE = 400
MODEL = "pascal-fold0"


class Drawn:
    """One episode with its support encoded, and the maps of its query."""

    def __init__(self, segmenter: FewShotSegmenter, source: SyntheticSource, spec: EpisodeSpec) -> None:
        self.segmenter, self.source, self.spec = segmenter, source, spec
        self.name = source.class_names[spec.class_id]
        self.support_photo, self.query_photo = source.image(spec.support_ids[0]), source.image(spec.query_id)
        self.support_mask = source.mask(spec.support_ids[0], spec.class_id)
        self.query_mask = source.mask(spec.query_id, spec.class_id)
        transform = EpisodeTransform("none", SIDE, "squash")
        pairs = ((self.support_photo, self.support_mask), (self.query_photo, self.query_mask))
        self.support_image, self.query_image = (transform(*pair, seed=0)[0][None] for pair in pairs)

    @torch.no_grad()
    def encoded(self) -> SupportEncoding:
        mask = torch.as_tensor(self.support_mask)[None, None]
        return self.segmenter.encode_support(self.support_image[None], mask)


def over(photo: UInt8Array, values: Tensor) -> UInt8Array:
    """A map float (h, w) over its photo."""
    return overlay_map(photo, scale_map(values[None], photo.shape[:2])[0].numpy())


def draw_episode(drawn: Drawn) -> UInt8Array:
    """What an episode is: support, its mask, query, and what is to be found."""
    supports = [
        Panel(picture=drawn.support_photo, label="support"),
        Panel(picture=overlay_mask(drawn.support_photo, drawn.support_mask), label="its mask"),
        Panel(picture=drawn.query_photo, label="query"),
        Panel(picture=overlay_mask(drawn.query_photo, drawn.query_mask, TRUTH), label="to be found"),
    ]
    return panel_sheet([supports], f'A 1-shot episode of the class "{drawn.name}"')


def draw_marks(drawn: Drawn) -> UInt8Array:
    """The five ways to mark a support."""
    image_id, class_id = drawn.spec.support_ids[0], drawn.spec.class_id
    panels = []
    for kind in SUPPORT_KINDS:
        marks = annotation_of(drawn.source, image_id, class_id, kind)
        panels.append(Panel(picture=overlay_annotation(drawn.support_photo, marks), label=kind))
    return panel_sheet([panels], "Orange: known object; pink: known background; dark: not known")


@torch.no_grad()
def draw_cells(drawn: Drawn) -> UInt8Array:
    """The grid that similarities are computed on, and one cell compared with all others."""
    segmenter = drawn.segmenter
    support, query = (
        segmenter.photo_maps(segmenter.backbone(image)) for image in (drawn.support_image, drawn.query_image)
    )
    height, width = support.cells.shape[2:]
    foreground, _ = cell_weights(torch.as_tensor(drawn.support_mask)[None], (height, width))
    whole = (foreground[0] == foreground.max()).nonzero()
    row, column = whole[len(whole) // 2].tolist()
    grid = np.repeat(np.repeat(colour_map(foreground[0].numpy()), SIDE // height, 0), SIDE // width, 1)
    chosen = np.zeros((height, width), np.uint8)
    chosen[row, column] = 1
    marked = np.asarray(Image.fromarray(chosen).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    cell = support.cells[0, :, row, column]
    likeness = [torch.einsum("d,dhw->hw", cell, maps.cells[0]) for maps in (support, query)]
    panels = [
        Panel(picture=grid, label=f"part of each of {height} x {width} cells", scale=True),
        Panel(picture=overlay_mask(drawn.support_photo, marked, TRUTH, alpha=1), label="one cell of the object"),
        Panel(picture=over(drawn.support_photo, likeness[0]), label="cosine with the support", scale=True),
        Panel(picture=over(drawn.query_photo, likeness[1]), label="cosine with the query", scale=True),
    ]
    return panel_sheet([panels], "Cells: the mask becomes weights, and cells are compared by their cosine")


@torch.no_grad()
def draw_prior(drawn: Drawn) -> UInt8Array:
    """The maps that the decoder reads, and PFENet's beside them."""
    encoded = drawn.encoded()
    photos = drawn.segmenter.photo_maps(drawn.segmenter.backbone(drawn.query_image))
    priors = drawn.segmenter.priors_of(encoded, photos)[0]
    shown = [(name, priors[number]) for number, name in enumerate(PRIOR_CHANNELS)]
    shown.append(("frozen soft margin", priors[len(PRIOR_CHANNELS)]))
    shown.append(("PFENet's prior", pfenet_prior(photos.frozen, encoded.frozen, encoded.frozen_foreground)[0]))
    panels = [Panel(picture=over(drawn.query_photo, one), label=name, scale=True) for name, one in shown]
    return panel_sheet([panels[:4], panels[4:]], f'Maps over the query: where is the "{drawn.name}"?')


@torch.no_grad()
def draw_decoder(drawn: Drawn) -> UInt8Array:
    """From the prior to the mask."""
    prediction = drawn.segmenter.segment(drawn.encoded(), drawn.query_image)
    prior = torch.nn.functional.interpolate(prediction.priors[:, :1], (SIDE, SIDE), mode="bilinear")[0, 0]
    cut, mask = ((one > 0).numpy().astype(np.uint8) for one in (prior, prediction.masks[0]))
    panels = [
        Panel(picture=over(drawn.query_photo, prior), label="soft margin", scale=True),
        Panel(picture=overlay_mask(drawn.query_photo, cut), label="soft margin, cut at 0"),
        Panel(picture=over(drawn.query_photo, prediction.logits[0]), label="the decoder's logits", scale=True),
        Panel(picture=overlay_mask(drawn.query_photo, mask), label="mask: logits above 0"),
        Panel(picture=overlay_mask(drawn.query_photo, drawn.query_mask, TRUTH), label="truth"),
    ]
    return panel_sheet([panels], "The decoder reads all maps in the light of the whole photo")


PICTURES = {
    "concept-episode": draw_episode,
    "concept-marks": draw_marks,
    "concept-cells": draw_cells,
    "concept-prior": draw_prior,
    "concept-decoder": draw_decoder,
}


def main() -> None:
    """Write the five pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder of the pictures")
    parser.add_argument("--support", default="val-026-0003", help="generated picture of the support")
    parser.add_argument("--query", default="val-026-0007", help="generated picture of the query")
    given = parser.parse_args()
    source = SyntheticSource(size=SIDE)
    areas = source.class_areas(given.support)
    class_id = max(areas, key=lambda one: areas[one])
    spec = EpisodeSpec(class_id=class_id, support_ids=(given.support,), query_id=given.query, seed=0)
    segmenter = load_segmenter(shipped_model(MODEL)).segmenter.eval()
    drawn = Drawn(segmenter, source, spec)
    given.out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        picture = Image.fromarray(draw(drawn))
        # as in draw_gallery.py: k-means, or the few bright yellow pixels of a map turn brown
        reduced = picture.quantize(256, kmeans=3, dither=Image.Dither.NONE)
        reduced.save(given.out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
