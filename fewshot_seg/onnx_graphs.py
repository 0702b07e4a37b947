"""A segmenter as two modules that ONNX can hold: support photos to embedding, embedding and queries to logits.

They reuse the segmenter's parts. What differs is what a graph cannot have: checks of values, loops over blocks, and
operations whose shape follows from a photo's size in ways that torch.export cannot follow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from episodes.types import DataError
from fewshot_seg.attention import attention_weights, score_direction
from fewshot_seg.base_learner import class_profile, photo_evidence
from fewshot_seg.priors import COSINE_UNIT, log_density_ratio
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.similarity import SimilarityNetwork, join_levels

EMBEDDING = ("cells", "foreground", "background", "foreground_embedding", "background_embedding", "prototype")
"""The encoded support: outputs of the support graph, inputs of the query graph."""

EVIDENCE_EMBEDDING = (*EMBEDDING, "frozen_cells", "profile")
"""The same of a model with a base learner."""


class SameConvolution(nn.Module):
    """TensorFlow's "same" convolution: how much is padded depends on the photo's size.

    torch.export drowns in the formulas of timm's padding; ONNX has this convolution as an operator of its own.

    Args:
        convolution: timm's, which runs outside of an export.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, maps: Tensor) -> Tensor:
        """float (B, C, h, w) -> float (B, C', ceil(h/s), ceil(w/s))."""
        own = self.convolution
        if not torch.compiler.is_exporting():
            unpadded: Tensor = own(maps)
            return unpadded
        height, width = ((side - 1) // stride + 1 for side, stride in zip(maps.shape[2:], own.stride, strict=True))
        converted: Tensor = torch.onnx.ops.symbolic(
            "Conv",
            [maps, own.weight, *([] if own.bias is None else [own.bias])],
            {
                "auto_pad": "SAME_UPPER",
                "kernel_shape": list(own.kernel_size),
                "strides": list(own.stride),
                "dilations": list(own.dilation),
                "group": own.groups,
            },
            dtype=maps.dtype,
            shape=(maps.shape[0], own.out_channels, height, width),
        )
        return converted


class _DynamicLinspace(TorchFunctionMode):
    """torch.linspace from operations that keep its length dynamic: itself it is exported at one length."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.linspace:
            return func(*args, **(kwargs or {}))
        start, end, steps = args
        return start + torch.arange(steps, **(kwargs or {})) * ((end - start) / (steps - 1))


class PhotoGraph(nn.Module):
    """What both graphs share: photos to cells."""

    def __init__(self, segmenter: FewShotSegmenter) -> None:
        super().__init__()
        copied = copy.deepcopy(segmenter).cpu().float().eval()
        _replace_same_convolutions(copied.backbone.encoder, copied.backbone.name)
        self.segmenter = copied.requires_grad_(False)

    def embed(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The similarity network's cells float (B, D, h, w), and the frozen levels, all at its grid."""
        backbone = self.segmenter.backbone
        finest, *others = backbone.levels(images)
        # here, not in join_levels: it asks which levels have the grid's size, which a dynamic size cannot answer
        resized = [
            level
            if stride == backbone.strides[0]
            else F.interpolate(level, finest.shape[2:], mode="bilinear", align_corners=False)
            for level, stride in zip(others, backbone.strides[1:], strict=True)
        ]
        levels = [finest, *resized]
        maps: Tensor = self.segmenter.similarity(levels)
        return maps, levels


class SupportGraph(PhotoGraph):
    """`FewShotSegmenter.encode_support` of one episode's masks, as plain tensors."""

    def forward(self, images: Tensor, masks: Tensor) -> tuple[Tensor, ...]:
        """Encode K supports.

        Args:
            images: float32 (K, 3, H, W), RGB in [0, 1].
            masks: uint8 (K, H, W), 1 = object, 0 = background, 255 = ignored. One of them must show the object.

        Returns:
            As named in `EMBEDDING`: float (N, D) for N = K*h*w cells, (N,), (N,), (D,), (D,), (D,); with a base learner
            also the rest of `EVIDENCE_EMBEDDING`: (N, D), (C,).
        """
        maps, levels = self.embed(images)
        rows = bin_means(masks.shape[1], maps.shape[2])
        columns = bin_means(masks.shape[2], maps.shape[3]).T
        foreground, background = ((rows @ (masks == value).float() @ columns).flatten() for value in (1, 0))
        joined = join_levels(levels)
        cells, frozen = (_as_cells(one) for one in (maps, joined))
        further: tuple[Tensor, ...] = ()
        if self.segmenter.base_learner is not None:
            seen = self.segmenter.base_learner.logits(frozen).softmax(dim=1)
            further = (frozen, class_profile(seen.T[None], foreground[None])[0])
        return (
            cells,
            foreground,
            background,
            _pool(cells, foreground),
            _pool(cells, background),
            _pool(frozen, foreground),
            *further,
        )


class QueryGraph(PhotoGraph):
    """`FewShotSegmenter.segment` of B queries by one encoded support of masks."""

    def forward(
        self,
        images: Tensor,
        cells: Tensor,
        foreground: Tensor,
        background: Tensor,
        foreground_embedding: Tensor,
        background_embedding: Tensor,
        prototype: Tensor,
        frozen_cells: Tensor | None = None,
        profile: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Segment B queries, float32 (B, 3, H, W); the rest is the output of the `SupportGraph`.

        Returns:
            Logits float (B, H, W), and the coarse ones that they were enlarged from, as the decoder gives them.
        """
        maps, levels = self.embed(images)
        frozen = join_levels(levels)
        sides, pooled = (foreground, background), (foreground_embedding, background_embedding)
        priors = whole_priors(maps, cells, sides, pooled, temperature=self.segmenter.temperature)
        if self.segmenter.base_learner is not None:
            assert frozen_cells is not None
            assert profile is not None
            base = self.segmenter.base_learner(frozen)
            cosine = frozen.flatten(2).transpose(1, 2) @ frozen_cells.T
            of_each = [side[None].expand(images.shape[0], side.shape[0]) for side in sides]
            margin = log_density_ratio(cosine, of_each[0], of_each[1], temperature=self.segmenter.temperature)
            evidence = photo_evidence(base, profile[None], frozen)
            priors = torch.cat([priors, margin.reshape(maps[:, :1].shape), evidence], dim=1)
        if self.segmenter.completion is not None:  # it looks at the query as at a photo of which nothing is known
            with _DynamicLinspace():
                object_logits = self.segmenter.objectness(maps, frozen)
            priors = torch.cat([priors, object_logits[:, None]], dim=1)
        coarse = self.segmenter.decoder(priors, frozen, prototype[None].expand(images.shape[0], prototype.shape[0]))
        logits = F.interpolate(coarse[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
        return logits, coarse


def whole_priors(
    query_maps: Tensor,
    support_cells: Tensor,
    sides: tuple[Tensor, Tensor],
    embeddings: tuple[Tensor, Tensor],
    *,
    temperature: float,
) -> Tensor:
    """`similarity_priors` of one support for B queries in one piece: a graph has no loop over blocks.

    Args:
        query_maps: unit-length cells float (B, D, h, w).
        support_cells: unit-length float (N, D).
        sides: foreground and background, float (N,) each.
        embeddings: of foreground and background, unit-length float (D,) each.
        temperature: of the soft margin.

    Returns:
        float (B, 6, h, w), the maps of `fewshot_seg.priors.PRIOR_CHANNELS`.
    """
    batch, _, height, width = query_maps.shape
    query_cells = query_maps.flatten(2).transpose(1, 2)
    cosine = query_cells @ support_cells.T
    of_each = [side[None].expand(batch, side.shape[0]) for side in sides]
    # a matrix: torch 2.15 exports the product with a vector, (B, M, D) @ (D,), as a wrong one without a word
    to_foreground, to_background = (query_cells @ torch.stack(embeddings, dim=1)).unbind(dim=2)
    embedding = F.normalize(query_cells.mean(dim=1), dim=1)
    direction = score_direction("margin", embedding, embeddings[0][None], [embeddings[1][None]])
    attention = (query_cells @ attention_weights(embedding, direction)[:, :, None])[:, :, 0]
    nearest = [cosine.masked_fill((side < 0.5)[None, None], -1.0).amax(dim=2) for side in sides]
    in_cosines = [to_foreground - to_background, to_foreground, attention, *nearest]
    margin = log_density_ratio(cosine, of_each[0], of_each[1], temperature=temperature)
    maps = [margin, *(one / COSINE_UNIT for one in in_cosines)]
    return torch.stack(maps, dim=1).reshape(batch, len(maps), height, width)


def bin_means(pixels: int, bins: int) -> Tensor:
    """The matrix float (bins, pixels) of `torch.nn.functional.adaptive_avg_pool1d`, which has no dynamic ONNX form.

    >>> bin_means(5, 2)
    tensor([[0.3333, 0.3333, 0.3333, 0.0000, 0.0000],
            [0.0000, 0.0000, 0.3333, 0.3333, 0.3333]])
    """
    number, place = torch.arange(bins)[:, None], torch.arange(pixels)[None]
    first, last = number * pixels // bins, ((number + 1) * pixels + bins - 1) // bins
    return ((place >= first) & (place < last)).float() / (last - first)


def _as_cells(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2).reshape(-1, maps.shape[1])


def _pool(cells: Tensor, weights: Tensor) -> Tensor:
    return SimilarityNetwork.embed(cells.T[None, :, :, None], weights[None, :, None])[0]


def _replace_same_convolutions(encoder: nn.Module, name: str) -> None:
    for module in list(encoder.modules()):
        for key, child in list(module.named_children()):
            if type(child) is Conv2dSame:
                setattr(module, key, SameConvolution(child))
            elif type(child).__name__.endswith("Same"):
                raise DataError(
                    f"backbone {name!r} cannot be exported: its {type(child).__name__} pads by the photo's size; "
                    "choose another"
                )
