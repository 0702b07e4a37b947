"""Models and training states as safetensors files that describe themselves; no pickle.

A model file holds the similarity network, the decoder, the completion of weak supports if it was trained, and the base
learner if there is one. The backbone is frozen and is not stored: its name, strides and fingerprint are, and loading
fails when the weights at hand are others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.base_learner import BaseLearner
from fewshot_seg.completion import SupportCompletion
from fewshot_seg.decoder import ContextDecoder, Decoder, MaskDecoder, PriorReadout
from fewshot_seg.runtime import atomic_path
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.similarity import SimilarityNetwork

_KEY = "fewshot_seg"
_FORMAT = 1
_DECODERS: dict[str, type[Decoder]] = {"context": ContextDecoder, "mask": MaskDecoder, "readout": PriorReadout}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedSegmenter:
    """A model from a file.

    Attributes:
        segmenter: in evaluation mode.
        resolution: side of the square that it was trained at.
        notes: what the writer noted: data, protocol, fold, scores.
    """

    segmenter: FewShotSegmenter
    resolution: int
    notes: dict[str, Any]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Tensors and a JSON description in one file, written beside and renamed."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={_KEY: json.dumps(description)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reverse of `write_tensors`. Raises DataError naming the file when missing, damaged or not ours."""
    if not path.is_file():
        raise DataError(f"no model file at {path}; train one with `fewshot-seg train` or `similarity train`")
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is damaged or was not written by fewshot-seg ({error!r}); train it again") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise DataError(f"{path} has another file format than {_FORMAT}; use the version of fewshot-seg that wrote it")
    return tensors, description


def trained_tensors(segmenter: FewShotSegmenter) -> dict[str, Tensor]:
    """Tensors of the similarity network, the decoder, completion and base learner (if any), by qualified name."""
    return {
        f"{part}.{name}": tensor
        for part in _parts(segmenter)
        for name, tensor in getattr(segmenter, part).state_dict().items()
    }


def _parts(segmenter: FewShotSegmenter) -> tuple[str, ...]:
    further = ("completion", "base_learner")
    return ("similarity", "decoder", *(part for part in further if getattr(segmenter, part) is not None))


def load_trained_tensors(segmenter: FewShotSegmenter, tensors: Mapping[str, Tensor], *, where: Path) -> None:
    """Put `trained_tensors` back. Raises DataError naming the file when names or shapes differ."""
    _check_fit(trained_tensors(segmenter), tensors, where)
    for part in _parts(segmenter):
        load_part(getattr(segmenter, part), tensors, prefix=f"{part}.", where=where)


def load_part(part: nn.Module, tensors: Mapping[str, Tensor], *, prefix: str, where: Path) -> None:
    """Put the tensors whose names begin with `prefix` into a module.

    Raises:
        DataError: names or shapes differ; `where` is the file that is named.
    """
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    _check_fit(part.state_dict(), state, where)
    part.load_state_dict(state)


def _check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path) -> None:
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if wrong:
        raise DataError(f"{where} does not fit this model: {len(wrong)} tensors differ, first {', '.join(wrong[:3])}")


def save_segmenter(
    path: Path,
    segmenter: FewShotSegmenter,
    *,
    backbone_weights: str,
    resolution: int,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a model file.

    Args:
        path: target, usually ``model.safetensors``.
        segmenter: the model.
        backbone_weights: ``embedded``, ``random`` or a path: where loading finds the backbone's weights.
        resolution: side of the square it was trained at.
        notes: JSON-able facts for the reader.
    """
    description = {
        **_describe_backbone(segmenter.backbone, backbone_weights),
        **describe_segmenter(segmenter),
        "resolution": resolution,
        "notes": dict(notes or {}),
    }
    write_tensors(path, trained_tensors(segmenter), description)


def describe_segmenter(segmenter: FewShotSegmenter) -> dict[str, Any]:
    """What it takes, besides backbone and tensors, to build it again by `segmenter_of`; JSON-able."""
    return {
        "similarity_rank": segmenter.similarity.rank,
        "decoder": {"kind": _kind_of(segmenter.decoder), **segmenter.decoder.description()},
        "completion": None if segmenter.completion is None else segmenter.completion.description(),
        "base_learner": None if segmenter.base_learner is None else segmenter.base_learner.description(),
        "guided": segmenter.guided,
        "prior": segmenter.prior,
        "attention": segmenter.attention,
        "threshold": segmenter.threshold,
        "temperature": segmenter.temperature,
    }


def segmenter_of(description: Mapping[str, Any], backbone: Backbone) -> FewShotSegmenter:
    """An untrained model of `describe_segmenter`. Raises KeyError, TypeError or ValueError where it is damaged."""
    completion, base_learner = description.get("completion"), description.get("base_learner")
    return FewShotSegmenter(
        backbone=backbone,
        similarity=SimilarityNetwork(backbone.channels, rank=description["similarity_rank"]),
        decoder=_decoder_of(description["decoder"]),
        prior=description["prior"],
        attention=description["attention"],
        threshold=description["threshold"],
        temperature=description["temperature"],
        completion=None if completion is None else SupportCompletion(**completion),
        base_learner=None if base_learner is None else BaseLearner(**base_learner),
        guided=bool(description.get("guided", False)),
    )


def load_segmenter(
    path: Path, *, backbone_weights: str | None = None, device: torch.device | None = None
) -> LoadedSegmenter:
    """Read a model file.

    Args:
        path: file of `save_segmenter`.
        backbone_weights: overrides where the backbone's weights are found.
        device: where the model goes; CPU by default.

    Raises:
        DataError: missing, damaged or foreign file, or a backbone with other weights than in training.
    """
    tensors, description = read_tensors(path)
    if description.get("kind") == "similarity":
        raise DataError(f"{path} holds a similarity network alone, without a decoder; give it with --similarity")
    try:
        backbone = _backbone_of(description, backbone_weights, path)
        segmenter = segmenter_of(description, backbone)
        resolution, notes = int(description["resolution"]), dict(description["notes"])
    except DataError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} lacks a part of its description ({error!r}); train it again") from error
    load_trained_tensors(segmenter, tensors, where=path)
    return LoadedSegmenter(segmenter=segmenter.to(device or "cpu").eval(), resolution=resolution, notes=notes)


def _kind_of(decoder: Decoder) -> str:
    return next(kind for kind, one in _DECODERS.items() if isinstance(decoder, one))


def _decoder_of(description: Mapping[str, Any]) -> Decoder:
    arguments = dict(description)
    older = "readout" if "channel" in arguments else "mask"  # earlier files name the kind of a ContextDecoder alone
    return _DECODERS[arguments.pop("kind", older)](**arguments)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedSimilarity:
    """A similarity network from a file, over its backbone; attributes as in `LoadedSegmenter`."""

    backbone: Backbone
    similarity: SimilarityNetwork
    resolution: int
    notes: dict[str, Any]


def save_similarity(
    path: Path,
    similarity: SimilarityNetwork,
    backbone: Backbone,
    *,
    backbone_weights: str,
    resolution: int,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a similarity network alone; arguments as in `save_segmenter`."""
    description = {
        **_describe_backbone(backbone, backbone_weights),
        "kind": "similarity",
        "similarity_rank": similarity.rank,
        "resolution": resolution,
        "notes": dict(notes or {}),
    }
    tensors = {f"similarity.{name}": tensor for name, tensor in similarity.state_dict().items()}
    write_tensors(path, tensors, description)


def load_similarity(
    path: Path, *, backbone_weights: str | None = None, device: torch.device | None = None
) -> LoadedSimilarity:
    """Read a similarity network from its own file, or out of a whole model; otherwise as `load_segmenter`."""
    tensors, description = read_tensors(path)
    try:
        backbone = _backbone_of(description, backbone_weights, path)
        similarity = SimilarityNetwork(backbone.channels, rank=description["similarity_rank"])
        resolution, notes = int(description["resolution"]), dict(description["notes"])
    except DataError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} lacks a part of its description ({error!r}); train it again") from error
    load_part(similarity, tensors, prefix="similarity.", where=path)
    where = device or torch.device("cpu")
    return LoadedSimilarity(
        backbone=backbone.to(where), similarity=similarity.to(where).eval(), resolution=resolution, notes=notes
    )


def _describe_backbone(backbone: Backbone, weights: str) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "backbone": backbone.name,
        "strides": backbone.plan,
        "backbone_fingerprint": backbone.fingerprint,
        "backbone_weights": weights,
    }


def _backbone_of(description: Mapping[str, Any], weights: str | None, path: Path) -> Backbone:
    """The backbone that a file was trained on. Raises DataError when the weights at hand are others."""
    strides = tuple(description["strides"])  # None would be the backbone's own choice
    backbone = build_backbone(
        description["backbone"], strides=strides, weights=weights or description["backbone_weights"]
    )
    if backbone.fingerprint != description["backbone_fingerprint"]:
        raise DataError(
            f"{path} was trained on other weights of {backbone.name}; name the right file with --backbone-weights"
        )
    return backbone
