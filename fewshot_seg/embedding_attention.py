"""Gradient attention of any model that turns images into embeddings: what makes these images alike, or not?

Source: Zheng, Karanam, Chen, Radke, Wu, arXiv 2008.06035 and arXiv 1911.07381. Embeddings f are L2-normalised; every
image i of the pair, triplet or quadruplet has a score s_i = v_i . f_i, its channel weights are the mean of ds_i/dA
over cells, and M_i = ReLU(sum_k alpha_k A_k). `fewshot_seg.attention.image_directions` lists the v_i of every kind.

Example, with your own model in the first line:
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> anchor, positive, negative = torch.rand(3, 2, 3, 32, 32)  # two triplets of 32 x 32 pixels
    >>> with GradientAttention(model, "1") as explain:  # a layer by name or by module, or a list of layers
    ...     found = explain(anchor, positive, negative, kind="triplet")
    >>> found.anchor[0].shape  # of the first layer; likewise found.positive and found.negatives[0]
    torch.Size([2, 8, 8])
    >>> found.scaled().anchor.shape  # at the images' size, each map scaled to [0, 1]
    torch.Size([2, 32, 32])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.attention import (
    ATTENTION_KINDS,
    NEGATIVES_NEEDED,
    AttentionKind,
    image_directions,
    scale_map,
    weigh_maps,
)
from fewshot_seg.layer_outputs import LayerOutputs, full_precision, twice_differentiable


@dataclass(frozen=True)
class ScaledExplanation:
    """Maps as a reader looks at them: float (B, H, W) in [0, 1] for every image of the comparison."""

    anchor: Tensor
    positive: Tensor | None
    negatives: tuple[Tensor, ...]


@dataclass(frozen=True)
class SimilarityExplanation:
    """What `GradientAttention` found.

    Attributes:
        anchor: one float (B, h, w) per layer, unscaled, in the order of the layers.
        positive: likewise; empty where no positive was given.
        negatives: likewise for every negative.
        embeddings: L2-normalised float (B, D) of the anchor, the positive (if any) and the negatives, from the same
            forward pass; with `create_graph` they serve the metric loss, too.
        image_size: (H, W) of the images.
    """

    anchor: tuple[Tensor, ...]
    positive: tuple[Tensor, ...]
    negatives: tuple[tuple[Tensor, ...], ...]
    embeddings: tuple[Tensor, ...]
    image_size: tuple[int, int]

    def scaled(self, size: tuple[int, int] | None = None) -> ScaledExplanation:
        """Every map resized bilinearly to `size` (default: the images') and scaled to [0, 1]; mean over layers.

        A constant map becomes 0. Scaling is per image and layer, so that no layer drowns another; it moves the zero
        of maps that were found with `rectify=False`. Differentiable.
        """
        wanted = self.image_size if size is None else size

        def picture(layers: tuple[Tensor, ...]) -> Tensor:
            return torch.stack([scale_map(layer, wanted) for layer in layers]).mean(dim=0)

        return ScaledExplanation(
            anchor=picture(self.anchor),
            positive=picture(self.positive) if self.positive else None,
            negatives=tuple(picture(negative) for negative in self.negatives),
        )


class GradientAttention:
    """Attention over the images of a pair, triplet or quadruplet, for any model and any of its layers.

    Inside `with`, the layers carry a forward hook, which sleeps while you run the model yourself; afterwards the model
    is as it was: no hook, no `.grad`, no changed `requires_grad`. The model may be frozen, and torch.no_grad() around
    it does no harm (torch.inference_mode() does). One forward pass over all images together and one backward pass
    serve all layers. A model whose parameters require no gradient needs less memory: nothing before the first layer
    is kept.

    A model in eval() treats images one by one, and so does this class. Batch normalisation in train() mixes the
    images of a pass and updates its running statistics, as in any other forward pass of training.

    Args:
        model: maps images float (B, C, H, W) to embeddings float (B, D).
        layers: name (as in `model.named_modules()`) or module, or a list of them. A layer may feed another. Outputs:
            (B, C, h, w); tokens (B, N, C), whose prefix tokens are left out; or (B, h, w, C).
        embed: what turns images into embeddings if not `model` itself, for example `clip.encode_image` or
            `lambda images: encoder(images)[-1].mean((2, 3))`; it must run the layers of `model`.
        token_grid: (h, w) of the patch tokens; None infers it, see `infer_token_grid`.
        channels_last: outputs of four dimensions are (B, h, w, C), as in Swin. None means no, and refuses an output
            whose shape says otherwise.

    Raises:
        DataError: a layer that the model does not have, or none.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | nn.Module | Sequence[str | nn.Module],
        *,
        embed: Callable[[Tensor], Tensor] | None = None,
        token_grid: tuple[int, int] | None = None,
        channels_last: bool | None = None,
    ) -> None:
        several = [layers] if isinstance(layers, str | nn.Module) else layers
        self._outputs = LayerOutputs(model, several, token_grid, channels_last)
        self._embed = model if embed is None else embed

    def __enter__(self) -> Self:
        if self._outputs.attached:
            raise RuntimeError("this GradientAttention is already entered; make a second one to nest them")
        self._outputs.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outputs.remove()

    def __call__(
        self,
        anchor: Tensor,
        positive: Tensor | None = None,
        negatives: Tensor | Sequence[Tensor] = (),
        *,
        kind: AttentionKind = "cosine",
        create_graph: bool = False,
        elementwise: bool = False,
        rectify: bool = True,
    ) -> SimilarityExplanation:
        """Explain B comparisons at once.

        Args:
            anchor, positive: float (B, C, H, W), as the model wants them (normalised).
            negatives: one tensor or several, of the same shape. A pair is `(anchor, positive)`; a dissimilar pair of
                kind "siamese" is `(anchor, negatives=other)`; "triplet" and "margin" take one negative, "quadruplet"
                takes two.
            kind: form of the score; see `fewshot_seg.attention.image_directions`.
            create_graph: keep the graph, so that a loss on the maps trains the model; else all results are detached.
            elementwise: weight cells by their own gradients; see `fewshot_seg.attention.weigh_maps`.
            rectify: False leaves out the ReLU, so that evidence against the score stays visible as negative values.

        Returns:
            Maps of every image. An embedding of length zero has a map of zeros.

        Raises:
            RuntimeError: called outside `with`.
            DataError: images or layers that do not fit, embeddings that are not finite (B, D) or do not depend on a
                layer, inference mode.
        """
        images = _check_images(kind, anchor, positive, [negatives] if isinstance(negatives, Tensor) else negatives)
        if not self._outputs.attached:
            raise RuntimeError("GradientAttention works inside `with GradientAttention(model, layer) as explain:`")
        if torch.is_inference_mode_enabled():
            raise DataError("attention needs gradients, which torch.inference_mode() forbids; use torch.no_grad()")
        size, first_negative = (anchor.shape[-2], anchor.shape[-1]), 1 if positive is None else 2
        with torch.enable_grad():
            with twice_differentiable() if create_graph else nullcontext():
                embeddings, outputs = self._outputs.record(self._embed, torch.cat(images))
            unit = F.normalize(_check_embeddings(embeddings, len(images) * len(anchor)), dim=1)
            parts = unit.chunk(len(images))
            directions = image_directions(
                kind, parts[0], None if positive is None else parts[1], parts[first_negative:]
            )
            gradients = _gradients(unit, torch.cat(directions), outputs, create_graph=create_graph)
            by_layer = []
            for name, gradient in gradients.items():
                maps = weigh_maps(
                    *self._outputs.as_maps(name, outputs[name], gradient, size),
                    elementwise=elementwise,
                    rectify=rectify,
                )
                by_layer.append((maps if create_graph else maps.detach()).chunk(len(images)))
        by_image = list(zip(*by_layer, strict=True))
        return SimilarityExplanation(
            anchor=by_image[0],
            positive=() if positive is None else by_image[1],
            negatives=tuple(by_image[first_negative:]),
            embeddings=tuple(part if create_graph else part.detach() for part in parts),
            image_size=size,
        )


def _check_images(
    kind: AttentionKind, anchor: Tensor, positive: Tensor | None, negatives: Sequence[Tensor]
) -> list[Tensor]:
    """All images in order, or one line that says what does not fit."""
    if kind not in NEGATIVES_NEEDED:
        raise DataError(f"unknown attention kind {kind!r}; known: {', '.join(ATTENTION_KINDS)}")
    dissimilar_pair = kind == "siamese" and positive is None
    needed = 1 if dissimilar_pair else NEGATIVES_NEEDED[kind]
    if len(negatives) != needed or (positive is None and not dissimilar_pair):
        got = f"{'no' if positive is None else 'a'} positive and {len(negatives)} negative(s)"
        also = " (or no positive and 1 negative)" if kind == "siamese" else ""
        raise DataError(
            f"attention kind {kind!r} needs a positive and {NEGATIVES_NEEDED[kind]} negative(s){also}, got {got}"
        )
    images = {"anchor": anchor} if positive is None else {"anchor": anchor, "positive": positive}
    images |= {f"negatives[{position}]": negative for position, negative in enumerate(negatives)}
    for name, tensor in images.items():
        if tensor.dim() != 4 or not tensor.numel() or not tensor.is_floating_point():
            raise DataError(f"{name} must be float (B, C, H, W), got {tensor.dtype} {tuple(tensor.shape)}")
        if (tensor.shape, tensor.dtype, tensor.device) != (anchor.shape, anchor.dtype, anchor.device):
            raise DataError(
                f"all images of a comparison must be alike: anchor is {tuple(anchor.shape)} {anchor.dtype} on "
                f"{anchor.device}, {name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; resize or move it"
            )
    return list(images.values())


def _check_embeddings(embeddings: Any, count: int) -> Tensor:
    """Float (count, D) in at least single precision."""
    if not isinstance(embeddings, Tensor):
        raise DataError(f"the model must give one tensor (B, D) of embeddings, got {type(embeddings).__name__}")
    if embeddings.dim() != 2 or len(embeddings) != count:
        raise DataError(
            f"the model must give embeddings ({count}, D) for {count} images, got {tuple(embeddings.shape)}; "
            "pool or flatten them, or pass embed=..."
        )
    if not torch.isfinite(embeddings).all():
        raise DataError("the model gave embeddings that are not finite; check its weights and the images")
    return full_precision(embeddings)


def _gradients(
    unit: Tensor, directions: Tensor, outputs: dict[str, Tensor], *, create_graph: bool
) -> dict[str, Tensor]:
    """ds_i/d(output) of every layer, in one backward pass.

    A vector-Jacobian product, not the gradient of the summed scores: where directions are embeddings themselves, the
    score of one image must not be differentiated through the others. With `create_graph` they stay differentiable.
    """
    if not unit.requires_grad:
        raise DataError(
            f"the embeddings do not depend on {', '.join(map(repr, outputs))}, or the model cuts the gradient on the "
            "way (torch.no_grad() or detach() inside)"
        )
    gradients = torch.autograd.grad(
        unit, list(outputs.values()), grad_outputs=directions, create_graph=create_graph, allow_unused=True
    )
    found = {}
    for name, gradient in zip(outputs, gradients, strict=True):
        if gradient is None:
            raise DataError(f"the embeddings do not depend on layer {name!r}; choose one on the way to them")
        found[name] = gradient
    return found
