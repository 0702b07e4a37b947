"""Trained models that come with the package: which there are, where their files are, whether they are whole.

They lie in the folder ``weights`` of the package, as ``NAME.safetensors`` with a model card ``NAME.md``, and are
listed in ``manifest.json`` there; ``scripts/train_weights.py`` writes all three. Without a manifest there are none, and
whoever wants the general model goes without one.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from episodes.types import DataError
from fewshot_seg.checkpoint import load_segmenter
from fewshot_seg.runtime import read_json, write_json

GENERAL = "general"
"""Name of the model for people's own photos."""
MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ShippedModel:
    """A model of the package, by its entry in the manifest.

    Attributes:
        name: what `--model` takes.
        sha256, bytes: of its file.
        backbone: frozen encoder that it stands on.
        summary: what it is, one sentence.
        data: what it was trained on.
        protocol: rules of its episodes.
        fold: the fold whose classes it has not seen; None if there is none.
        resolution: side of the square that photos are fitted into.
        parameters: number of trained parameters.
        commit, command: what trained it.
        licence: of the weights, and what is to be known of the photos behind them.
        scores: records as in docs/results.json; the first one is the headline.
    """

    name: str
    sha256: str
    bytes: int
    backbone: str
    summary: str
    data: str
    protocol: str
    fold: int | None
    resolution: int
    parameters: int
    commit: str | None
    command: str
    licence: str
    scores: Sequence[Mapping[str, Any]]

    @property
    def file(self) -> str:
        """Name of its file in the folder of weights."""
        return f"{self.name}.safetensors"

    @property
    def card(self) -> str:
        """Name of its model card."""
        return f"{self.name}.md"

    @property
    def headline(self) -> str:
        """The first score in words; a dash where there is none."""
        if not self.scores:
            return "-"
        score = self.scores[0]
        return f"{score['metric']} {score['value']:.1f}, {score['shots']}-shot, {score['data']}"


def weights_folder() -> Path:
    """The package's folder of weights; it may be empty."""
    return Path(str(importlib.resources.files("fewshot_seg") / "weights"))


def shipped_models(folder: Path | None = None) -> tuple[ShippedModel, ...]:
    """All models of the manifest, in its order; none where there is no manifest.

    Args:
        folder: of weights and manifest; that of the package by default.

    Raises:
        DataError: a manifest that is damaged or of another format.
    """
    path = (folder or weights_folder()) / MANIFEST
    if not path.is_file():
        return ()
    content = read_json(path, what="manifest of the weights")
    try:
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}, expected {_FORMAT}")
        models = tuple(ShippedModel(**entry) for entry in content["models"])
        for model in models:
            _check_entry(model)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no manifest of this version ({error!r}); install fewshot-seg again") from error
    return models


def _check_entry(model: ShippedModel) -> None:
    """Raises TypeError or ValueError for an entry that its readers would stumble over."""
    texts = (model.name, model.sha256, model.backbone, model.summary, model.data, model.protocol, model.licence)
    numbers = (model.bytes, model.resolution, model.parameters)
    if not all(isinstance(one, str) for one in texts) or not all(isinstance(one, int) for one in numbers):
        raise TypeError(f"entry of {model.name!r:.60}")
    if Path(model.name).name != model.name:
        raise ValueError(f"name {model.name!r:.60} leads to another folder")
    _ = model.headline


def write_manifest(folder: Path, models: Sequence[ShippedModel]) -> None:
    """Write the manifest of a folder of weights."""
    write_json(folder / MANIFEST, {"format": _FORMAT, "models": [dataclasses.asdict(model) for model in models]})


def shipped_model(name: str) -> Path:
    """File of a shipped model.

    Raises:
        DataError: no such model (the message names those that there are), or its file is missing.
    """
    names = [model.name for model in shipped_models()]
    if name not in names:
        raise DataError(f"no shipped model {name!r}; {_known(name, names)}")
    path = weights_folder() / f"{name}.safetensors"
    if not path.is_file():
        raise DataError(f"the file of the shipped model {name!r} is missing: {path}; install fewshot-seg again")
    return path


def model_file(given: Path) -> Path:
    """What `--model` means: a file, or the name of a shipped model. A file of that name wins.

    Raises:
        DataError: a bare name that is neither; a path that is no file is left to whoever reads it.
    """
    if given.is_file() or given.suffix or len(given.parts) != 1:
        return given
    names = [model.name for model in shipped_models()]
    if given.name not in names:
        raise DataError(f"--model {given}: no such file and no shipped model; {_known(given.name, names)}")
    return shipped_model(given.name)


def general_model() -> Path | None:
    """File of the model for people's own photos, or None where this copy of the package comes without it."""
    return shipped_model(GENERAL) if any(model.name == GENERAL for model in shipped_models()) else None


def is_shipped(path: Path) -> bool:
    """Whether a file lies in the package's folder of weights."""
    return path.parent == weights_folder()


def _known(name: str, names: Sequence[str]) -> str:
    if not names:
        return "this copy of fewshot-seg comes without weights: name a file of `fewshot-seg train`"
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}shipped are: {', '.join(names)}"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_shipped() -> list[str]:
    """Every problem of the shipped weights, one line each; an empty list means that all of them work.

    Checked are: file and card are there, size and digest are those of the manifest, the model loads (names and shapes
    of its tensors, backbone at hand), and nothing lies in the folder that the manifest does not know.
    """
    folder = weights_folder()
    try:
        models = shipped_models()
    except DataError as error:
        return [str(error)]
    problems = [problem for model in models for problem in _problems(model, folder)]
    known = {model.file for model in models}
    stray = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in known)
    return problems + [
        f"{name}: not listed in {MANIFEST}; write it anew with scripts/train_weights.py" for name in stray
    ]


def _problems(model: ShippedModel, folder: Path) -> list[str]:
    path, mend = folder / model.file, "install fewshot-seg again"
    found = [] if (folder / model.card).is_file() else [f"{model.card}: model card is missing; {mend}"]
    if not path.is_file():
        return [*found, f"{model.file}: missing from {folder}; {mend}"]
    size = path.stat().st_size
    if size != model.bytes:
        return [*found, f"{model.file}: {size} bytes, expected {model.bytes}; {mend}"]
    if file_digest(path) != model.sha256:
        return [*found, f"{model.file}: its SHA-256 is not that of the manifest; {mend}"]
    try:
        loaded = load_segmenter(path)
    except DataError as error:
        return [*found, f"{model.file}: {error}"]
    facts = {
        "backbone": (loaded.segmenter.backbone.name, model.backbone),
        "resolution": (loaded.resolution, model.resolution),
        "fold": (loaded.notes.get("fold"), model.fold),
    }
    return found + [
        f"{model.file}: its {what} is {came}, the manifest says {expected}; {mend}"
        for what, (came, expected) in facts.items()
        if came != expected
    ]
