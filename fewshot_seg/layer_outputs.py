"""What layers of any model give on the way to its embeddings, as maps (B, C, h, w): hooks, tokens, memory layouts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from episodes.types import DataError

_MOST_PREFIX_TOKENS = 8
"""Class, distillation and register tokens before the patches; DINOv2 with registers has five."""


def infer_token_grid(tokens: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the patches among the tokens of a vision transformer; the tokens before them are prefix tokens.

    Looks for a square patch of p pixels with (H // p) (W // p) patches and 0 to 8 prefix tokens: first among the p
    that divide both sides, then among all, each time with the fewest prefix tokens.

    Raises:
        DataError: nothing fits.

    Example:
        >>> infer_token_grid(197, (224, 224)), infer_token_grid(1 + 4 + 16 * 24, (256, 384))
        ((14, 14), (16, 24))
    """
    height, width = image_size
    patches = range(1, min(image_size) + 1)
    dividing = [patch for patch in patches if height % patch == 0 and width % patch == 0]
    for candidates in (dividing, patches):
        for prefix in range(_MOST_PREFIX_TOKENS + 1):
            for patch in candidates:
                if (height // patch) * (width // patch) == tokens - prefix:
                    return height // patch, width // patch
    raise DataError(
        f"{tokens} tokens do not form a grid over images of {height} x {width} pixels (square patches, at most "
        f"{_MOST_PREFIX_TOKENS} prefix tokens); say it with token_grid=(h, w)"
    )


class LayerOutputs:
    """Outputs of some layers of a model as maps (B, C, h, w); its hooks live from `attach` to `remove`."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str | nn.Module],
        token_grid: tuple[int, int] | None,
        channels_last: bool | None,
    ) -> None:
        self._layers = _find_layers(model, layers)
        self._token_grid, self._channels_last = token_grid, channels_last
        self._handles: list[RemovableHandle] = []
        self._captured: dict[str, Tensor] | None = None  # None: the hooks sleep

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> None:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._capturing_hook(name)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def record(self, embed: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """What `embed` returns, and what the layers gave on the way, in the order they were asked for."""
        captured: dict[str, Tensor] = {}
        self._captured = captured
        try:
            embeddings = embed(images)
        finally:
            self._captured = None
        for name in self._layers:
            if name not in captured:
                raise DataError(
                    f"layer {name!r} never ran in the forward pass; a container such as ModuleList does not run itself "
                    "(name one of its parts), and a compiled or scripted model skips hooks (pass the original)"
                )
            shape = tuple(captured[name].shape)
            if len(shape) not in (3, 4) or shape[0] != len(images):
                raise DataError(
                    f"layer {name!r} must give ({len(images)}, C, h, w) or tokens ({len(images)}, N, C) for "
                    f"{len(images)} images, got {shape}; choose another layer"
                )
        return embeddings, {name: captured[name] for name in self._layers}

    def _capturing_hook(self, name: str) -> Callable[[nn.Module, Any, Any], Tensor | None]:
        def capture(_module: nn.Module, _inputs: Any, output: Any) -> Tensor | None:
            if self._captured is None:
                return None
            if name in self._captured:
                raise DataError(f"layer {name!r} runs more than once in a forward pass; choose one that runs once")
            if not isinstance(output, Tensor) or not output.is_floating_point():
                got = f"a tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
                raise DataError(f"layer {name!r} must give one tensor of floats, got {got}; choose a layer inside it")
            # Copies on both sides: what follows may change its input in place (ReLU, +=), and an identity hands on
            # the very tensor that a shortcut around it uses as well.
            kept = output.clone() if output.requires_grad else output.detach().clone().requires_grad_()
            self._captured[name] = kept
            return kept.clone()

        return capture

    def as_maps(
        self, name: str, output: Tensor, gradient: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Output of a layer and its gradient, both (B, C, h, w) without prefix tokens, in at least single precision."""
        output, gradient = full_precision(output), full_precision(gradient)
        if output.dim() == 4:
            if _is_channels_last(name, tuple(output.shape), image_size, self._channels_last):
                return output.permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2)
            return output, gradient
        height, width = self._grid(name, output.shape[1], image_size)
        prefix = output.shape[1] - height * width  # prefix tokens come first
        if not gradient[:, prefix:].any() and gradient[:, :prefix].any():
            raise DataError(
                f"the embeddings depend on the class token of layer {name!r} alone, not on its patches; choose a "
                "layer before the last attention, for example the first norm of the last block"
            )
        grid = (len(output), output.shape[2], height, width)
        return output[:, prefix:].transpose(1, 2).reshape(grid), gradient[:, prefix:].transpose(1, 2).reshape(grid)

    def _grid(self, name: str, tokens: int, image_size: tuple[int, int]) -> tuple[int, int]:
        if self._token_grid is None:
            try:
                return infer_token_grid(tokens, image_size)
            except DataError as error:
                raise DataError(f"layer {name!r}: {error}") from None
        if math.prod(self._token_grid) > tokens:
            raise DataError(f"token_grid={self._token_grid} does not fit the {tokens} tokens of layer {name!r}")
        return self._token_grid


def _find_layers(model: nn.Module, wanted: Sequence[str | nn.Module]) -> dict[str, nn.Module]:
    known = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    for layer in wanted:
        if isinstance(layer, str):
            if layer not in known:
                close = difflib.get_close_matches(layer, known, n=3, cutoff=0.4)
                hint = "did you mean" if close else "its first parts are"
                parts = close or [name for name, _ in model.named_children()]
                raise DataError(f"the model has no layer {layer!r}; {hint} {', '.join(map(repr, parts))}")
            name = layer
        else:
            names = [known_name for known_name, module in known.items() if module is layer]
            if not names:
                raise DataError(f"the layer {type(layer).__name__} given as a module is no part of the model")
            name = names[0]
        if known[name] in found.values():
            raise DataError(f"layer {name!r} is given twice")
        found[name] = known[name]
    if not found:
        raise DataError("GradientAttention needs at least one layer")
    return found


def _is_channels_last(
    name: str, shape: tuple[int, ...], image_size: tuple[int, int], channels_last: bool | None
) -> bool:
    if channels_last is not None:
        return channels_last

    def fits(height: int, width: int) -> bool:
        aspect = (height / width) / (image_size[0] / image_size[1])
        return 1 / 1.3 < aspect < 1.3  # room for the rounding of small grids

    if fits(shape[1], shape[2]) and not fits(shape[2], shape[3]):
        raise DataError(
            f"the output {shape} of layer {name!r} looks like (B, h, w, C) over images of {image_size[0]} x "
            f"{image_size[1]} pixels; say channels_last=True, or False if it is (B, C, h, w)"
        )
    return False


class _HardSigmoidByParts(TorchFunctionMode):
    """PyTorch has no second derivative of F.hardsigmoid (MobileNetV3's gates), but of the functions it is made of."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if function is F.hardsigmoid:
            return F.relu6((arguments[0] if arguments else options["input"]) + 3) / 6
        return function(*arguments, **options)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Forward passes in here can be differentiated twice where fast kernels cannot, as in dot-product attention."""
    with sdpa_kernel(SDPBackend.MATH), _HardSigmoidByParts():
        yield


def full_precision(tensor: Tensor) -> Tensor:
    """Half precision (autocast) is too coarse for unit lengths and sums over channels."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
