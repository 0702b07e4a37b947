"""Weights of encoders from files, in their own names or in those that their authors published them with."""

from __future__ import annotations

import contextlib
import io
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from episodes.files import is_file
from episodes.types import DataError


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a .safetensors or PyTorch file; nothing in it is executed.

    Raises:
        DataError: no such file, a damaged one, or one that holds something else.
    """
    if not is_file(path):
        raise DataError(f"no weight file at {path}: expected a .safetensors or PyTorch state-dict file")
    try:
        _refuse_bomb(path)
        weights = load_state_dict(str(path), device="cpu", weights_only=True)
    except AttributeError as error:  # a list or a tensor has no items()
        raise DataError(f"{path} holds no state dict: expected a mapping of names to tensors") from error
    except Exception as error:  # each reader has its own exceptions; the user needs one line that names the file
        if "weights_only" in str(error):  # its text goes on to say how to run it all the same
            raise DataError(
                f"cannot read weights from {path}: it holds code or objects beside tensors, and none of that is run; "
                "save its state dict alone, or get the weights as .safetensors"
            ) from error
        raise DataError(f"cannot read weights from {path}: {first_line(error)}") from error
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise DataError(f"{path} holds no state dict: expected a mapping of names to tensors")
    return weights


def _refuse_bomb(path: Path) -> None:
    """Raises ValueError for a PyTorch file, which is a zip, with compressed members: PyTorch itself stores them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed, which PyTorch's own files are not")


def download_weights(name: str) -> dict[str, Tensor]:
    """Weights that timm has for a model, from the Hugging Face hub or its cache on this machine.

    Raises:
        DataError: timm has none, or they cannot be had, with the way to fetch them elsewhere.
    """
    configuration = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if configuration is None or not configuration.has_weights:
        raise DataError(f"timm has no weights for backbone {name!r}; give a file with --backbone-weights")
    try:
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # of the network, of the hub, of the file system
        file = f"{name}.pth"
        raise DataError(
            f"cannot get the weights of {name} from the Hugging Face hub ({first_line(error)}); where there is a "
            f"network, run python -c \"import timm, torch; torch.save(timm.create_model('{name}', pretrained=True)"
            f".state_dict(), '{file}')\" and give --backbone-weights {file}"
        ) from error
    return dict(model.state_dict())


def first_line(error: Exception) -> str:
    """What an error says, cut to a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def fit_weights(encoder: nn.Module, weights: Mapping[str, Tensor], *, name: str, where: str) -> dict[str, Tensor]:
    """Select the encoder's own tensors; a ``model.`` prefix may be there or not, classifier keys are surplus.

    Weights under the names of their authors (DINOv2, DINOv3, ConvNeXt, Swin ...) go through the conversion that timm
    has for the model.

    Raises:
        DataError: naming `where`, when tensors are missing or of another shape.
    """
    own = encoder.state_dict()
    bare = {_bare(key): value for key, value in weights.items()}
    if _unfit(own, bare):
        converted = _converted(name, weights)
        if converted is not None:
            bare = {_bare(key): value for key, value in converted.items()}
    wrong = _unfit(own, bare)
    if wrong:
        raise DataError(
            f"{where} does not fit: {len(wrong)} of {len(own)} tensors are missing or of another shape, "
            f"first {', '.join(wrong[:3])}; expected the encoder's own state dict"
        )
    chosen = {key: bare[_bare(key)] for key in own}
    odd = [key for key, value in chosen.items() if not _is_plain(value, own[key])]
    if odd:
        raise DataError(
            f"{where} does not fit: {len(odd)} of {len(own)} tensors are not finite numbers of the encoder's kind, "
            f"first {', '.join(odd[:3])}; fetch the weights again"
        )
    return chosen


def _is_plain(value: Tensor, own: Tensor) -> bool:
    """Whether a tensor is dense and finite, and floating where the encoder's is; precisions may differ."""
    return (
        value.layout == torch.strided
        and not value.is_quantized
        and value.device.type == "cpu"
        and value.is_floating_point() == own.is_floating_point()
        and not value.is_complex()
        and bool(value.isfinite().all())
    )


def _unfit(own: Mapping[str, Tensor], bare: Mapping[str, Tensor]) -> list[str]:
    return [key for key, value in own.items() if _bare(key) not in bare or bare[_bare(key)].shape != value.shape]


def _bare(key: str) -> str:
    # timm's feature extractors flatten "stages.0." of the classifier to "stages_0."
    return key.removeprefix("model.").replace("_", ".")


def _converted(name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What timm's own conversion for the model makes of foreign weights; None where it has none or fails."""
    if not timm.is_model(name):
        return None
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(name, pretrained=False, num_classes=0)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some of them print
            return dict(convert(dict(weights), model))
    except Exception:  # written for the files of its own model; of others the missing tensors say more
        return None
