"""The method that a command scores, shows or applies: a trained model, or one prior map with nothing trained.

A model is a file, or a shipped one by its name. Verbs for people's own photos take the shipped model ``general`` where
nothing else is asked for; verbs that work on a data set's episodes do not, because it has seen the classes of every
fold.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from episodes.protocols import PROTOCOL_NAMES, Fit
from episodes.types import DataError
from fewshot_seg.acceleration import accelerate
from fewshot_seg.backbones import EMBEDDED, build_backbone
from fewshot_seg.checkpoint import load_segmenter, load_similarity
from fewshot_seg.config import NO_MODEL, EpisodeSettings, ModelSettings, settings_of
from fewshot_seg.decoder import PriorReadout
from fewshot_seg.evaluation import choose_threshold
from fewshot_seg.fold_data import FoldData, held_out_episodes
from fewshot_seg.priors import PRIOR_CHANNELS
from fewshot_seg.runs import check_classes, open_data
from fewshot_seg.runtime import pick_device
from fewshot_seg.segmenter import FewShotSegmenter, training_free
from fewshot_seg.shipped import general_model, is_shipped, model_file

SOFT_MARGIN_THRESHOLD = 0.5
"""Of the bare soft margin: best on held-out base classes of PASCAL-5i (scripts/choose_temperature.py)."""

_THRESHOLD_EPISODES = 200
_SIZE = 400
"""At which a backbone without a model of its own is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A segmenter and where it comes from.

    Attributes:
        segmenter: in evaluation mode, on its device.
        model: file of a trained model; None for a bare prior.
        name: for people, for example ``soft margin, training-free``, the model's path, or ``general (shipped)``.
        resolution: side of the square that its file asks for; None for a bare prior.
        notes: of the model file.
        threshold_origin: who chose the threshold; empty as long as nobody did.
    """

    segmenter: FewShotSegmenter
    model: Path | None
    name: str
    resolution: int | None
    notes: dict[str, Any]
    threshold_origin: str

    @property
    def fit(self) -> Fit:
        """How photos were made square in its training; stretched, unless the model's file says otherwise."""
        return "pad" if self.notes.get("fit") == "pad" else "squash"


def open_method(settings: ModelSettings, *, own_photos: bool = False) -> Method:
    """The model of the settings, or a bare prior map.

    Args:
        settings: of the verb.
        own_photos: take the shipped model ``general``, if there is one, where the settings ask for nothing else.

    Raises:
        DataError: missing, damaged or foreign model file, or no shipped model of that name; unknown backbone or device.
    """
    model = _chosen_model(settings, own_photos)
    device = pick_device(settings.device)
    resolution: int | None
    if model is not None:
        loaded = load_segmenter(model, backbone_weights=settings.backbone_weights, device=device)
        segmenter, origin = loaded.segmenter, "of the model"
        name = f"{model.stem} (shipped)" if is_shipped(model) else str(model)
        resolution, notes = loaded.resolution, loaded.notes
    else:
        channel = settings.prior_map or PRIOR_CHANNELS[0]
        segmenter, name, resolution, notes = _bare_prior(settings, channel)
        segmenter, origin = segmenter.to(device).eval(), ""
        if channel == "gradient attention":  # rectified and scaled to [0, 1], as it is shown
            segmenter.decoder = PriorReadout(PRIOR_CHANNELS.index(channel), scaled=True)
    accelerate(segmenter.backbone, size=resolution or _SIZE, precision=settings.precision, compiled=settings.compile)
    if settings.threshold is not None:
        segmenter.threshold, origin = settings.threshold, "given by --threshold"
    return Method(
        segmenter=segmenter,
        model=model,
        name=name,
        resolution=resolution,
        notes=dict(notes),
        threshold_origin=origin,
    )


def _chosen_model(settings: ModelSettings, own_photos: bool) -> Path | None:
    """File of the trained model that the settings name, or that is taken where they leave the choice."""
    if settings.model == NO_MODEL:
        return None
    if settings.model is not None:
        return model_file(settings.model)
    names = ("similarity", "prior_map", "backbone", "backbone_weights", "strides")
    usual = {one.name: one.default for one in settings_of(type(settings))}
    asked = any(getattr(settings, name) != usual[name] for name in names)
    return general_model() if own_photos and not asked else None


def _bare_prior(settings: ModelSettings, channel: str) -> tuple[FewShotSegmenter, str, int | None, dict[str, Any]]:
    """A prior map of the frozen features or of a trained similarity network, its name, resolution and notes."""
    if settings.similarity is not None:
        loaded = load_similarity(settings.similarity, backbone_weights=settings.backbone_weights)
        segmenter = training_free(loaded.backbone, channel=channel, similarity=loaded.similarity)
        # a network of labelled photos saw them small, which says nothing about the size for segmentation
        resolution = None if "labels" in loaded.notes else loaded.resolution
        return segmenter, f"{channel}, similarity {settings.similarity}", resolution, loaded.notes
    weights = settings.backbone_weights or EMBEDDED
    backbone = build_backbone(settings.backbone, strides=settings.strides, weights=weights)
    return training_free(backbone, channel=channel), f"{channel}, training-free", None, {}


def open_on_data(settings: EpisodeSettings, *, show_progress: bool = False) -> tuple[Method, FoldData]:
    """The method and the data it is scored on; a bare prior gets its threshold from held-out base classes.

    Raises:
        DataError: as `open_method` and `open_data`; a model that was trained on classes to be scored.
    """
    method = open_method(settings)
    noted, trained_by = method.notes.get("fold"), str(method.notes.get("protocol")).removesuffix(" (synthetic)")
    if settings.protocol is None and settings.protocol_file is None and trained_by in PROTOCOL_NAMES:
        settings = settings.replace(protocol=trained_by)
    data = open_data(
        settings,
        settings,
        method.segmenter.backbone,
        fold=settings.fold if settings.fold is not None else int(noted or 0),
        resolution=settings.resolution or method.resolution,
        show_progress=show_progress,
    )
    check_classes(method.name, method.notes, data)
    if method.model is not None and method.fit != data.protocol.fit:
        raise DataError(
            f"{method.name} was trained on photos made square by {method.fit!r}, protocol {data.protocol.name} does it "
            f"by {data.protocol.fit!r}; give --protocol or --protocol-file as in its training"
        )
    if method.threshold_origin:
        return method, data
    # a data set of one's own, all of whose classes are scored, or whose photos all show one that is
    if data.held_out is None or not data.pairs_to_choose:
        return take_usual_threshold(method, settings), data
    episodes = held_out_episodes(data, shots=1, count=_THRESHOLD_EPISODES, seed=0, supports=(settings.support,))
    threshold, _ = choose_threshold(method.segmenter, episodes, show_progress=show_progress)
    method.segmenter.threshold = threshold
    return dataclasses.replace(method, threshold_origin="chosen on base classes"), data


def take_usual_threshold(method: Method, settings: ModelSettings) -> Method:
    """The method with the threshold of a bare soft margin, for photos without base classes to choose one on.

    Raises:
        DataError: another prior map, which has no threshold of its own.
    """
    if settings.prior_map not in (None, PRIOR_CHANNELS[0]):
        raise DataError(
            f"--prior-map {settings.prior_map!r} has no threshold of its own, and there are no base classes to choose "
            "one on; give one with --threshold"
        )
    method.segmenter.threshold = SOFT_MARGIN_THRESHOLD
    return dataclasses.replace(method, threshold_origin="usual for the soft margin")
