"""Model cards of the shipped weights: what a reader must know before trusting a model, from the records of its run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewshot_seg.runtime import atomic_path
from fewshot_seg.shipped import GENERAL, ShippedModel

_SOURCES = {
    "voc": "PASCAL VOC 2012 with the masks of SBD (part of it)",
    "coco": "COCO 2017 (part of it)",
    "synthetic": "generated pictures of this package",
    "voc-composites": "photos composed of cut-out objects of the VOC part",
}
_LICENCES = {
    "voc": "The photos of PASCAL VOC come from Flickr, whose terms of use apply to them; SBD added masks to them.",
    "coco": "The photos of COCO come from Flickr, whose terms of use apply to them; its annotations are CC BY 4.0.",
}
_WEIGHTS_LICENCE = (
    "The weights are under Apache-2.0 as the package is. No photo and no mask comes with them, only numbers that were "
    "derived from them."
)
_BACKBONE_LICENCE = (
    "The frozen backbone is not in this file; the default one is EfficientNet-Lite0 (Apache-2.0, trained on ImageNet)."
)
_SUPPORT_ORDER = ("mask", "box", "scribble", "point", "label")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card is made from.

    Attributes:
        name: of the model.
        photos: data set -> number of training photos.
        novel: names of the fold's novel classes; none for the general model.
        command: makes the model again.
        record: of its run folder.
        scores: records as in docs/results.json.
    """

    name: str
    photos: Mapping[str, int]
    novel: Sequence[str]
    command: str
    record: Mapping[str, Any]
    scores: Sequence[Mapping[str, Any]]

    @property
    def general(self) -> bool:
        """Whether this is the model for people's own photos."""
        return self.name == GENERAL

    @property
    def classes(self) -> int:
        """Number of classes trained on."""
        return len(self.record["recipe"]["base_classes"])

    @property
    def summary(self) -> str:
        """What it is, one sentence."""
        if self.general:
            return "For people's own photos: trained on every class at hand, and what `predict` takes by itself."
        return f"For reproduction of PASCAL-5i fold {self.name[-1]}: it has not seen {', '.join(self.novel)}."

    @property
    def data(self) -> str:
        """What it was trained on, in a few words."""
        photos = " + ".join(f"{count} {member}" for member, count in self.photos.items() if count)
        return f"{self.classes} classes, photos: {photos}"

    @property
    def licence(self) -> str:
        """Of the weights, the photos and the backbone."""
        photos = [_LICENCES[member] for member in self.photos if member in _LICENCES]
        return " ".join([_WEIGHTS_LICENCE, *photos, _BACKBONE_LICENCE])


def write_card(path: Path, entry: ShippedModel, facts: Facts) -> None:
    """Write the model card of a manifest entry."""
    parts = [
        f"# {entry.name}",
        entry.summary,
        _section("Use", _use(entry)),
        _section("Trained on", _trained_on(entry, facts)),
        _section("Scores", _scores(facts)),
        _section("Limits", _limits(facts)),
        _section("Training", _training(entry, facts)),
        _section("Licence", entry.licence),
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _section(heading: str, text: str) -> str:
    return f"## {heading}\n\n{text}"


def _use(entry: ShippedModel) -> str:
    return (
        f"    fewshot-seg predict --model {entry.name} --support photo.jpg:mask.png --query photos/ --out found/\n\n"
        f"{entry.parameters:,} trained parameters ({entry.bytes / 1e6:.2f} MB) over the frozen backbone "
        f"`{entry.backbone}`; photos are fitted into {entry.resolution} x {entry.resolution} pixels.\n"
        f"SHA-256: `{entry.sha256}`"
    )


def _trained_on(entry: ShippedModel, facts: Facts) -> str:
    lines = [f"- {_SOURCES.get(member, member)}: {count} photos" for member, count in facts.photos.items() if count]
    side = facts.record["results"]["trained_at"]
    lines.append(
        f"- {facts.classes} classes; episodes by protocol `{entry.protocol}`, photos of {side} x {side} pixels"
    )
    if facts.general:
        lines.append(
            "- Classes of one concept in VOC and COCO are one class (tvmonitor = tv and so on); the photos that the "
            "data sets keep for evaluation were trained on as well"
        )
    else:
        lines.append(f"- Never asked for in training: {', '.join(facts.novel)} (as background they may be in photos)")
    return "\n".join(lines)


def _scores(facts: Facts) -> str:
    if not facts.scores:
        return "None were taken."
    about = (
        "Not of this file, which has seen all classes, but of models trained in the same way on training photos alone "
        "with part of the classes left out; scored on those classes in photos for evaluation. In the generated "
        "pictures these are classes that no model here has seen. They say what to expect of a new kind of object in "
        "photos of this kind."
        if facts.general
        else "On the novel classes of the fold, never used for a choice."
    )
    header = "| data | shots | support | mIoU % | 95% interval | FB-IoU % | classes | episodes |"
    rows = [
        f"| {one['data']} | {one['shots']} | {one['support']} | {one['value']:.1f} "
        f"| {one['low']:.1f} - {one['high']:.1f} | {one['fb_iou']:.1f} | {len(one['per_class'])} | {one['episodes']} |"
        for one in sorted(facts.scores, key=_order)
    ]
    table = "\n".join([header, "|---|---|---|---|---|---|---|---|", *rows])
    return f"{about}\n\n{table}" + ("" if facts.general else f"\n\n{_per_class(facts.scores[0])}")


def _order(score: Mapping[str, Any]) -> tuple[str, int, int]:
    return str(score["data"]), _SUPPORT_ORDER.index(score["support"]), int(score["shots"])


def _per_class(score: Mapping[str, Any]) -> str:
    classes = ", ".join(f"{name} {iou:.1f}" for name, iou in score["per_class"].items())
    return f"Per class, {score['shots']}-shot: {classes}."


def _limits(facts: Facts) -> str:
    common = [
        "- It finds what looks like the object of the supports. Objects of a few pixels, thin parts, and objects that "
        "differ from their surroundings by little are missed or cut coarsely.",
        "- The confidence ranks pixels; it is no calibrated probability. Every training query showed its object: a "
        "photo without it may get a mask all the same.",
        "- Photos like those of VOC and COCO, of everyday things, are what it was made for. Medical, aerial or "
        "microscope pictures are untested.",
    ]
    own = (
        [
            "- It was trained on every class of VOC and COCO at hand: no score of it on PASCAL-5i or COCO-20i says "
            "anything about novel classes, and `evaluate` refuses them.",
        ]
        if facts.general
        else [
            "- PASCAL-5i/792 is a part of PASCAL-5i (792 of 1449 photos, with animals over-represented): its scores "
            "are not comparable with published PASCAL-5i figures.",
            "- For one's own photos take `general`, which has seen more.",
        ]
    )
    return "\n".join([*own, *common])


def _training(entry: ShippedModel, facts: Facts) -> str:
    recipe, results = facts.record["recipe"], facts.record["results"]
    held_out = results["held_out_miou"]
    environment = facts.record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        f"    {entry.command}",
        "",
        f"- Commit `{entry.commit}`; Python {environment['python']}, {versions}",
        f"- Cut at {results['threshold']:.3f}"
        + ("" if held_out is None else f": mIoU {held_out:.1f} over the cells of those of the decoder's training ")
        + ("" if held_out is None else "episodes whose classes the embedding had not seen"),
    ]
    lines += [f"- `{part}`: `{json.dumps(recipe[part])}`" for part in ("backbone", "model", "training")]
    return "\n".join(lines)
