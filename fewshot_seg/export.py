"""A segmenter as a folder of two ONNX files that run without torch, and how to use them."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from episodes.protocols import Fit
from episodes.types import DataError
from fewshot_seg.onnx_graphs import EMBEDDING, EVIDENCE_EMBEDDING, PhotoGraph, QueryGraph, SupportGraph
from fewshot_seg.runtime import atomic_path, write_json
from fewshot_seg.segmenter import FewShotSegmenter

OPSET = 20
"""Version of ONNX's operators, of onnx 1.15; any later runtime reads it."""

SUPPORT_NAME, QUERY_NAME, METADATA_NAME = "support.onnx", "query.onnx", "metadata.json"

LEAST_SIDE = 64
"""Two cells of the coarsest stride: torch.export takes an axis of length 1 for a constant."""

_COMMAND = 'pip install "fewshot-seg[export]"'


def export_segmenter(
    segmenter: FewShotSegmenter, folder: Path, *, size: int, fit: Fit = "squash", name: str = ""
) -> dict[str, Any]:
    """Write ``support.onnx``, ``query.onnx`` and ``metadata.json``, which says how to use them.

    Photos of a batch share one size, otherwise sizes, batches and shots are free: see `size_multiple` and `least_side`
    of the metadata. Everything is float32.

    Args:
        segmenter: with the prior ``similarity``; supports are masks.
        folder: created when missing; an earlier export in it is replaced.
        size: side of the square that photos are fitted into, for the metadata.
        fit: how, as in the model's training.
        name: of the method, for people.

    Returns:
        The metadata.

    Raises:
        DataError: onnx or onnxscript is missing, a model that has no graph, a size that it does not take, or a folder
            that holds something else.
    """
    check_packages()
    _check_folder(folder)
    if segmenter.prior != "similarity":
        raise DataError(f"models with the prior {segmenter.prior!r} cannot be exported; train one with 'similarity'")
    multiple = segmenter.backbone.multiple
    least = -(-LEAST_SIDE // multiple) * multiple
    if size < least or size % multiple:
        raise DataError(f"--size {size}: this model's graphs take sides of {least} pixels or more{_of(multiple)}")
    width, side = segmenter.similarity.width, least * 2
    wide = side + least
    images, masks = torch.rand(3, 3, side, wide), torch.ones(3, side, wide).byte()
    classes = None if segmenter.base_learner is None else segmenter.base_learner.classes
    signatures = _signatures(width, classes)
    embedding = signatures["support"]["outputs"]
    encoded = [torch.rand([7 if axis == "cells" else axis for axis in one["shape"]]) for one in embedding.values()]
    dim = torch.export.Dim
    height_width = {axis: multiple * dim(of, min=least // multiple) for axis, of in ((2, "height"), (3, "width"))}
    mask_sides = {axis - 1: of for axis, of in height_width.items()}
    shots, batch, cells = dim("shots", min=1), dim("batch", min=1), dim("cells", min=2)
    support = _program(SupportGraph(segmenter), (images, masks), ({0: shots} | height_width, {0: shots} | mask_sides))
    query = _program(
        QueryGraph(segmenter),
        (images, *encoded),
        ({0: batch} | height_width, *({0: cells} if "cells" in one["shape"] else {} for one in embedding.values())),
    )
    metadata: dict[str, Any] = {
        "format": 1,
        "method": name,
        "backbone": segmenter.backbone.name,
        "threshold": segmenter.threshold,
        "size": size,
        "fit": fit,
        "size_multiple": multiple,
        "least_side": least,
        "opset": OPSET,
        "versions": {one: importlib.metadata.version(one) for one in ("torch", "onnx", "onnxscript", "timm")},
        "graphs": signatures,
    }
    (folder / METADATA_NAME).unlink(missing_ok=True)  # written last: without it the folder is no export
    for name, program in (("support", support), ("query", query)):
        _write_graph(program, metadata["graphs"][name], folder)
    write_json(folder / METADATA_NAME, metadata)
    return metadata


def _signatures(width: int, classes: int | None) -> dict[str, Any]:
    embedding: dict[str, list[str | int]] = {
        "cells": ["cells", width],
        "foreground": ["cells"],
        "background": ["cells"],
        **{name: [width] for name in EMBEDDING[3:]},
    }
    if classes is not None:
        embedding |= dict(zip(EVIDENCE_EMBEDDING[len(EMBEDDING) :], (["cells", width], [classes]), strict=True))
    described = {name: {"type": "float32", "shape": shape} for name, shape in embedding.items()}
    return {
        "support": {
            "file": SUPPORT_NAME,
            "inputs": {
                "images": {"type": "float32", "shape": ["shots", 3, "height", "width"]},
                "masks": {"type": "uint8", "shape": ["shots", "height", "width"]},
            },
            "outputs": described,
        },
        "query": {
            "file": QUERY_NAME,
            "inputs": {"images": {"type": "float32", "shape": ["batch", 3, "height", "width"]}, **described},
            "outputs": {
                "logits": {"type": "float32", "shape": ["batch", "height", "width"]},
                "coarse_logits": {"type": "float32", "shape": ["batch", "coarse height", "coarse width"]},
            },
        },
    }


def check_packages() -> None:
    """Raises DataError where something that an export needs is not installed."""
    missing = []
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise DataError(f"export needs {' and '.join(missing)}: {_COMMAND}")
    if not hasattr(torch.onnx, "ops"):
        raise DataError(f"export needs torch 2.8 or later, this is {torch.__version__}: {_COMMAND}")


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out {folder} is a file; choose a folder")
    names = {file.name for file in folder.iterdir()} if folder.exists() else set[str]()
    foreign = {name for name in names if not name.startswith(".")}  # hidden: the lock, and what a killed run left
    foreign -= {SUPPORT_NAME, QUERY_NAME, METADATA_NAME}
    if foreign:
        raise DataError(f"--out {folder} holds something else ({min(foreign)}); choose a new or empty folder")


def _of(multiple: int) -> str:
    return "" if multiple == 1 else f" that are multiples of {multiple}"


def _program(graph: PhotoGraph, inputs: tuple[Tensor, ...], dynamic: tuple[Any, ...]) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(graph, inputs, dynamic_shapes=dynamic)
    except Exception as error:  # torch.export has a family of its own; the user needs one line
        backbone = graph.segmenter.backbone.name
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(f"backbone {backbone!r} cannot be exported for photos of any size: {reason}") from error


def _write_graph(program: torch.export.ExportedProgram, description: dict[str, Any], folder: Path) -> None:
    logger, before = logging.getLogger("onnxscript"), logging.getLogger("onnxscript").level
    logger.setLevel(logging.ERROR)
    inputs = description["inputs"]
    axes = [{n: name for n, name in enumerate(one["shape"]) if isinstance(name, str)} for one in inputs.values()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            converted = torch.onnx.export(
                program,
                input_names=list(inputs),
                output_names=list(description["outputs"]),
                dynamic_shapes=tuple(axes),  # only their names: the program has them already
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(before)
    assert converted is not None
    with atomic_path(folder / description["file"]) as temporary:
        converted.save(temporary)
