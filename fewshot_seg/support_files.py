"""Encoded supports as files, so that they are encoded once: safetensors that say which model made them; no pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from episodes.files import is_file
from episodes.protocols import Fit
from episodes.sources.annotation_files import shown
from episodes.types import DataError
from fewshot_seg.checkpoint import read_tensors, trained_tensors, write_tensors
from fewshot_seg.encodings import SupportEncoding
from fewshot_seg.segmenter import FewShotSegmenter

_KIND = "support set"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedSupport:
    """A support set from a file.

    Attributes:
        encoding: one episode's supports, on the model's device.
        names: what they were made from, as the writer noted it.
    """

    encoding: SupportEncoding
    names: tuple[str, ...]


def model_digest(segmenter: FewShotSegmenter) -> str:
    """Hex digest of every tensor that training may change: similarity network, decoder and completion."""
    digest = hashlib.sha256()
    for name, tensor in sorted(trained_tensors(segmenter).items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_support(
    path: Path,
    encoding: SupportEncoding,
    segmenter: FewShotSegmenter,
    *,
    resolution: int,
    fit: Fit,
    names: Sequence[str] = (),
) -> None:
    """Write one episode's encoded supports; the tensors are stored as they are, nothing is rounded.

    Args:
        path: target, usually ``NAME.safetensors``.
        encoding: of `FewShotSegmenter.encode_support`, B = 1.
        segmenter: the model that made it.
        resolution, fit: how the support photos were made square.
        names: of the supports, for the reader.

    Raises:
        DataError: more than one episode, or the folder cannot be written.
    """
    if len(encoding.cells) != 1:
        raise DataError(f"a support file holds one set of supports, got {len(encoding.cells)}; save them one by one")
    description = {
        "format": _FORMAT,
        "kind": _KIND,
        "backbone": segmenter.backbone.name,
        "backbone_fingerprint": segmenter.backbone.fingerprint,
        "model": model_digest(segmenter),
        "resolution": resolution,
        "fit": fit,
        "names": list(names),
    }
    write_tensors(path, _tensors(encoding), description)


def load_support(path: Path, segmenter: FewShotSegmenter, *, resolution: int, fit: Fit) -> SavedSupport:
    """Read a file of `save_support`.

    Args:
        path: the file.
        segmenter: the model that is to use it: the same that made it, but for its threshold.
        resolution, fit: how the queries are made square: as the supports were.

    Raises:
        DataError: missing, damaged or foreign file, or one of another model, resolution or fit.
    """
    if not is_file(path):
        raise DataError(f"no support set at {path}; write one with `fewshot-seg predict --save-support {path}`")
    again = "save the supports again with --save-support"
    try:
        tensors, description = read_tensors(path)
    except DataError as error:
        raise DataError(f"{path} is damaged or no support set of this version of fewshot-seg; {again}") from error
    if description.get("kind") != _KIND:
        raise DataError(f"{path} holds a model, not a support set; give a file of --save-support")
    _check_origin(path, description, segmenter, resolution, fit)
    expected = _shapes(tensors, 0 if segmenter.base_learner is None else segmenter.base_learner.classes)
    if expected is None or not all(_is_sound(name, tensors[name], shape) for name, shape in expected.items()):
        raise DataError(f"{path} is damaged: its tensors are not those of a support set; {again}")
    device = next(segmenter.backbone.parameters()).device
    encoding = SupportEncoding(**{name: tensors[name].to(device) for name in expected})
    return SavedSupport(encoding=encoding, names=_names(description))


def _names(description: dict[str, Any]) -> tuple[str, ...]:
    names = description.get("names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _check_origin(
    path: Path, description: dict[str, Any], segmenter: FewShotSegmenter, resolution: int, fit: Fit
) -> None:
    backbone = segmenter.backbone
    made_by = description.get("backbone")
    if (made_by, description.get("backbone_fingerprint")) != (backbone.name, backbone.fingerprint):
        raise DataError(
            f"{path} was made with other weights or strides of a backbone ({shown(made_by, 60)}) than "
            f"{backbone.name} here; give the model that made it, or save the supports again"
        )
    if description.get("model") != model_digest(segmenter):
        raise DataError(f"{path} was made by another model; give the one that made it, or save the supports again")
    made = (description.get("resolution"), description.get("fit"))
    if made != (resolution, fit):
        raise DataError(
            f"{path} was made from photos fitted to {shown(made[0], 20)} pixels by {shown(made[1], 20)}, queries are "
            f"fitted to {resolution} by {fit!r}; use --size {shown(made[0], 20)}, or save the supports again"
        )


def _tensors(encoding: SupportEncoding) -> dict[str, Tensor]:
    return {field.name: getattr(encoding, field.name) for field in fields(encoding)}


def _is_sound(name: str, tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a file has its shape and type, and values that can be computed with."""
    if name == "photo":
        is_index = tensor.shape == shape and tensor.dtype == torch.int64
        return is_index and bool(((tensor >= 0) & (tensor < shape[1])).all())
    return tensor.shape == shape and tensor.dtype == torch.float32 and bool(tensor.isfinite().all())


def _shapes(tensors: dict[str, Tensor], classes: int) -> dict[str, tuple[int, ...]] | None:
    """The shapes that fit together with those of `frozen` and `cells`; None where these are not there or no such."""
    if tensors.keys() != {field.name for field in fields(SupportEncoding)}:
        return None
    if tensors["frozen"].dim() != 5 or tensors["cells"].dim() != 3:
        return None
    _, shots, width, height, breadth = tensors["frozen"].shape
    embedded, cells = tensors["cells"].shape[2], shots * height * breadth
    return {
        "cells": (1, cells, embedded),
        **dict.fromkeys(("foreground", "background", "open", "share", "photo"), (1, cells)),
        **dict.fromkeys(("foreground_embedding", "background_embedding"), (1, embedded)),
        "prototype": (1, width),
        "frozen": (1, shots, width, height, breadth),
        "profile": (1, classes),
    }
