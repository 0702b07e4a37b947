"""Models and training states as safetensors files that describe themselves; no pickle.

A model file holds the similarity network, the decoder, the completion of weak supports and their decoder if they were
trained, and the base learner if there is one. The backbone is frozen and is not stored: its name, strides and
fingerprint are, and loading fails when the weights at hand are others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from episodes.files import is_file
from episodes.sources.annotation_files import shown
from episodes.types import DataError
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.base_learner import BaseLearner
from fewshot_seg.completion import SupportCompletion
from fewshot_seg.decoder import ContextDecoder, Decoder, MaskDecoder, PriorReadout
from fewshot_seg.runtime import write_safetensors
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.similarity import SimilarityNetwork

_KEY = "fewshot_seg"
_FORMAT = 1
_MOST = 1_000_000
_LARGEST = 1e6
_USUAL_SIZE = 4096  # of a layer; larger ones only if a tensor has that side
_MOST_RESOLUTION = 4096
_FURTHER: Mapping[str, type[nn.Module]] = MappingProxyType(
    {"completion": SupportCompletion, "weak_decoder": ContextDecoder, "base_learner": BaseLearner}
)
"""Parts that a model may have beside similarity network and decoder."""
_DECODERS: dict[str, type[Decoder]] = {"context": ContextDecoder, "mask": MaskDecoder, "readout": PriorReadout}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedSegmenter:
    """A model from a file.

    Attributes:
        segmenter: in evaluation mode.
        resolution: side of the square that photos are fitted into.
        notes: what the writer noted: data, protocol, fold, scores.
    """

    segmenter: FewShotSegmenter
    resolution: int
    notes: dict[str, Any]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Tensors and a JSON description in one file, written beside and renamed."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_safetensors(path, plain, {_KEY: json.dumps(description)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reverse of `write_tensors`. Raises DataError naming the file when missing, damaged or not ours."""
    if not is_file(path):
        raise DataError(f"no model file at {path}; train one with `fewshot-seg train` or `similarity train`")
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # of safetensors, of the file system, of JSON, of types that torch lacks
        raise DataError(
            f"{path} is damaged or was not written by fewshot-seg ({error!r:.300}); train it again"
        ) from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise DataError(f"{path} has another file format than {_FORMAT}; use the version of fewshot-seg that wrote it")
    return tensors, description


def trained_tensors(segmenter: FewShotSegmenter) -> dict[str, Tensor]:
    """Tensors of the similarity network, the decoder and what else there is, by qualified name."""
    return {
        f"{part}.{name}": tensor
        for part in _parts(segmenter)
        for name, tensor in getattr(segmenter, part).state_dict().items()
    }


def _parts(segmenter: FewShotSegmenter) -> tuple[str, ...]:
    return ("similarity", "decoder", *(part for part in _FURTHER if getattr(segmenter, part) is not None))


def load_trained_tensors(segmenter: FewShotSegmenter, tensors: Mapping[str, Tensor], *, where: Path) -> None:
    """Put `trained_tensors` back. Raises DataError naming the file when names or shapes differ."""
    _check_fit(trained_tensors(segmenter), tensors, where)
    for part in _parts(segmenter):
        load_part(getattr(segmenter, part), tensors, prefix=f"{part}.", where=where)


def load_part(part: nn.Module, tensors: Mapping[str, Tensor], *, prefix: str, where: Path, finite: bool = True) -> None:
    """Put the tensors whose names begin with `prefix` into a module.

    Raises:
        DataError: names, shapes or types differ, or numbers are not finite (unless `finite` is False); `where` is the
            file that is named.
    """
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    _check_fit(part.state_dict(), state, where, finite)
    part.load_state_dict(state)


def _check_names(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path) -> None:
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if wrong:
        raise DataError(f"{where} does not fit this model: {len(wrong)} tensors differ, first {', '.join(wrong[:3])}")


def _check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path, finite: bool = True) -> None:
    _check_names(own, tensors, where)
    for name, tensor in tensors.items():
        if tensor.dtype != own[name].dtype:
            raise DataError(
                f"{where} does not fit this model: {name} is {tensor.dtype}, expected {own[name].dtype}; train it again"
            )
        if finite and not bool(tensor.isfinite().all()):
            raise DataError(f"{where} holds numbers in {name} that are not finite; train it again")


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
        resolution: side of the square that photos are fitted into where the user names no other.
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
        "weak_decoder": None if segmenter.weak_decoder is None else segmenter.weak_decoder.description(),
        "base_learner": None if segmenter.base_learner is None else segmenter.base_learner.description(),
        "guided": segmenter.guided,
        "prior": segmenter.prior,
        "attention": segmenter.attention,
        "threshold": segmenter.threshold,
        "temperature": segmenter.temperature,
    }


def segmenter_of(
    description: Mapping[str, Any], backbone: Backbone, tensors: Mapping[str, Tensor], *, where: Path
) -> FewShotSegmenter:
    """An untrained model of `describe_segmenter`, as large as the tensors that it will take.

    Of parts that have no tensors at all, sizes are only held against the largest tensor.

    Raises:
        DataError: a part has other sizes than its tensors; `where` is named.
        KeyError, TypeError, ValueError: a description that is damaged.
    """
    return FewShotSegmenter(
        backbone=backbone,
        prior=description["prior"],
        attention=description["attention"],
        threshold=_number(description, "threshold"),
        temperature=_number(description, "temperature"),
        guided=bool(description.get("guided", False)),
        **_parts_of(description, backbone.channels, tensors, where),
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
    with _described(path):
        backbone = _backbone_of(description, backbone_weights, path)
        segmenter = segmenter_of(description, backbone, tensors, where=path)
        resolution, notes = _resolution(description), _notes(description)
    load_trained_tensors(segmenter, tensors, where=path)
    return LoadedSegmenter(segmenter=segmenter.to(device or "cpu").eval(), resolution=resolution, notes=notes)


@contextmanager
def _described(path: Path) -> Iterator[None]:
    """Whatever a description leads to that is none of ours becomes a DataError that names the file."""
    try:
        yield
    except DataError as error:
        if str(path) in str(error):
            raise
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # its values go into constructors, of torch and timm too
        raise DataError(f"{path} lacks a part of its description ({error!r:.300}); train it again") from error


def _parts_of(
    description: Mapping[str, Any], channels: Sequence[int], tensors: Mapping[str, Tensor], path: Path
) -> dict[str, Any]:
    """Similarity network, decoder and what else there is, untrained."""
    rank = _whole(description, "similarity_rank")
    makers: dict[str, Callable[[], nn.Module]] = {
        "similarity": lambda: SimilarityNetwork(channels, rank=rank),
        "decoder": lambda: _decoder_of(description["decoder"]),
    }
    for part, kind in _FURTHER.items():
        if description.get(part) is not None:
            makers[part] = partial(kind, **description[part])
    _check_sizes([description["decoder"], *(description.get(part) for part in _FURTHER)], tensors)
    return _sized_as_stored(makers, tensors, path)


def _sized_as_stored(
    makers: Mapping[str, Callable[[], nn.Module]], tensors: Mapping[str, Tensor], path: Path
) -> dict[str, nn.Module]:
    """What the makers make, once it is known to be as large as the tensors: a file's word alone takes no memory."""
    stored = {name.partition(".")[0] for name in tensors}
    with torch.device("meta"):
        sketches = {part: make().state_dict() for part, make in makers.items() if part in stored}
    _check_names({f"{part}.{key}": one for part, own in sketches.items() for key, one in own.items()}, tensors, path)
    return {part: make() for part, make in makers.items()}


def _check_sizes(descriptions: Sequence[Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for layers and sizes that nothing in the file could fill: even a sketch of them takes time."""
    largest = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    for description in descriptions:
        for name, value in (description or {}).items():
            most = len(tensors) if name == "blocks" else max(largest, _USUAL_SIZE)
            if isinstance(value, int) and not 0 <= value <= most:
                raise ValueError(f"{name} is {shown(value, 20)}, expected 0 to {most}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}")


def _whole(description: Mapping[str, Any], name: str) -> int:
    value = description[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST:
        raise ValueError(f"{name} must be a whole number, at most {_MOST}; it is {shown(value, 40)}")
    return value


def _number(description: Mapping[str, Any], name: str) -> float:
    value = description[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _LARGEST:
        raise ValueError(f"{name} must be a finite number; it is {shown(value, 40)}")
    return value


def _resolution(description: Mapping[str, Any]) -> int:
    resolution = _whole(description, "resolution")
    if not 1 <= resolution <= _MOST_RESOLUTION:
        raise ValueError(f"resolution must be 1 to {_MOST_RESOLUTION} pixels; it is {resolution}")
    return resolution


def _notes(description: Mapping[str, Any]) -> dict[str, Any]:
    """The notes, of which those that decide something are what their readers take them for."""
    notes = dict(description["notes"])
    for name, is_sound in _NOTES.items():
        if name in notes and not is_sound(notes[name]):
            raise ValueError(f"note {name!r} is {shown(notes[name], 40)}")
    return notes


def _all_are(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(one, kind) for one in value)


_NOTES: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        "source": lambda value: value is None or isinstance(value, str),
        "fold": lambda value: value is None or (isinstance(value, int) and 0 <= value < 1000),
        "base_classes": _all_are(int),
        "base_class_names": _all_are(str),
        "labels": _all_are(str),
        "members": lambda value: isinstance(value, dict) and all(map(_all_are(int), value.values())),
    }
)


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
    with _described(path):
        backbone = _backbone_of(description, backbone_weights, path)
        rank = _whole(description, "similarity_rank")
        own = {name: tensor for name, tensor in tensors.items() if name.startswith("similarity.")}
        _sized_as_stored({"similarity": lambda: SimilarityNetwork(backbone.channels, rank=rank)}, own, path)
        similarity = SimilarityNetwork(backbone.channels, rank=rank)
        resolution, notes = _resolution(description), _notes(description)
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
    name, strides = description["backbone"], tuple(description["strides"])  # None would be the backbone's own choice
    weights = weights or description["backbone_weights"]
    flat = [side for one in strides for side in (one if isinstance(one, list) else [one])]
    if not isinstance(name, str) or not isinstance(weights, str) or not all(type(side) is int for side in flat):
        raise TypeError(f"backbone {shown(name, 40)}, weights {shown(weights, 40)}, strides {shown(strides, 40)}")
    backbone = build_backbone(name, strides=strides, weights=weights)
    if backbone.fingerprint != description["backbone_fingerprint"]:
        raise DataError(
            f"{path} was trained on other weights of {backbone.name}; name the right file with --backbone-weights"
        )
    return backbone
