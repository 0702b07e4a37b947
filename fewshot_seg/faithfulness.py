"""How faithful attention is: does the similarity fall when the attended pixels go, and rise when they come first?

Deletion and insertion of Petsiuk, Das, Saenko, "RISE" (arXiv 1806.07421), on the similarity of a pair instead of
the score of a class; and the share of the attention that lies on the object (the energy-based pointing game of
Wang et al., "Score-CAM", arXiv 1910.01279).

Chance is the curve of a constant map, whose pixels go in random order. A low deletion area and a high insertion
area are good; both also depend on the baseline, so compare only what was measured with the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur  # type: ignore[import-untyped]

from episodes.types import IGNORE, DataError

PerturbationMode = Literal["deletion", "insertion"]
PERTURBATION_MODES: tuple[PerturbationMode, ...] = get_args(PerturbationMode)


def perturbation_order(saliency: Tensor, size: tuple[int, int], *, seed: int = 0) -> Tensor:
    """Rank of every pixel of an image, 0 = most salient = goes first.

    The maps are resized bilinearly in float64 and rounded to float32, so that a plateau stays one in spite of the
    rounding noise of the interpolation. Equal pixels follow one random permutation of the image, the same for
    every map: no side of the photo is preferred, and a map's ranks do not depend on its batch.

    Args:
        saliency: float (B, h, w), any scale; negative values rank last.
        size: (H, W) of the image.
        seed: seed of the permutation.

    Returns:
        int64 (B, H, W), each a permutation of 0 .. H * W - 1.

    Raises:
        DataError: wrong shape, or values that are not finite.

    Example:
        >>> perturbation_order(torch.tensor([[[0.1, 0.9], [0.5, -1.0]]]), (2, 2))
        tensor([[[2, 0],
                 [1, 3]]])
    """
    if saliency.ndim != 3 or not saliency.is_floating_point():
        raise DataError(f"saliency must be float (B, h, w); got {saliency.dtype} {tuple(saliency.shape)}")
    if not saliency.isfinite().all():
        raise DataError("saliency must be finite to be ranked; got NaN or infinite values")
    maps = saliency.detach()
    if maps.device.type == "mps":
        maps = maps.cpu()  # Apple's GPU has no float64
    maps = F.interpolate(maps.double()[:, None], size, mode="bilinear", align_corners=False)
    pixels = maps.flatten(1).float()
    shuffled = torch.randperm(pixels.shape[1], generator=torch.Generator().manual_seed(seed)).to(pixels.device)
    first_to_last = shuffled[pixels[:, shuffled].argsort(dim=1, descending=True, stable=True)]
    ranks = torch.empty_like(first_to_last)
    ranks.scatter_(1, first_to_last, torch.arange(pixels.shape[1], device=pixels.device).expand_as(first_to_last))
    return ranks.view(-1, *size).to(saliency.device)


@torch.no_grad()
def perturbation_curve(
    similarity: Callable[[Tensor], Tensor],
    images: Tensor,
    saliency: Tensor,
    *,
    mode: PerturbationMode,
    baseline: Tensor,
    steps: int = 16,
    seed: int = 0,
) -> Tensor:
    """Similarity of every image to its partner while pixels are replaced, the most salient first.

    ``deletion`` starts from the photo and puts the baseline's pixels in; ``insertion`` starts from the baseline
    and puts the photo's pixels back. The values are as `similarity` gives them: divided by the difference between
    photo and baseline, a pair that hardly differs would outweigh all others.

    Args:
        similarity: float (B, 3, H, W) -> float (B,), score i is that of image i and its partner, which stays as
            it is; called steps + 1 times without gradients. For the other photo of a pair call this function again.
        images: float (B, 3, H, W), in the scale that `similarity` expects.
        saliency: float (B, h, w), see `perturbation_order`.
        mode: ``deletion`` or ``insertion``.
        baseline: float (B, 3, H, W), for example `blurred` photos or their mean colour.
        steps: point s of the curve has the first round(s H W / steps) pixels replaced.
        seed: seed of the order of equally salient pixels.

    Returns:
        (B, steps + 1), dtype as `similarity` gives it; see `curve_area`.

    Raises:
        DataError: unknown mode, shapes that do not fit, steps below 1 or above the number of pixels, or a
            similarity that does not give one score per image.
    """
    _check_request(images, saliency, mode, baseline, steps)
    order = perturbation_order(saliency, (images.shape[2], images.shape[3]), seed=seed)[:, None]
    start, end = (images, baseline) if mode == "deletion" else (baseline, images)
    pixels = images.shape[2] * images.shape[3]
    scores = []
    for step in range(steps + 1):
        score = similarity(torch.where(order < round(step * pixels / steps), end, start))
        if score.shape != images.shape[:1]:
            raise DataError(f"similarity must give one score per image, ({len(images)},); got {tuple(score.shape)}")
        scores.append(score)
    return torch.stack(scores, dim=1)


def curve_area(curve: Tensor) -> Tensor:
    """Area under curves over x in [0, 1] by the trapezoid rule. float (B, steps + 1) -> (B,).

    Raises:
        DataError: not two-dimensional, or fewer than two points.

    Example:
        >>> curve_area(torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]]))
        tensor([0.5000, 0.2500])
    """
    if curve.ndim != 2 or curve.shape[1] < 2:
        raise DataError(f"an area needs curves (B, points) of two points or more; got {tuple(curve.shape)}")
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1), dim=1)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur out to three sigmas, reflected at the border: a baseline without edges.

    Args:
        images: float (B, 3, H, W).
        sigma: standard deviation in pixels.

    Raises:
        DataError: wrong shape or type, sigma not positive, or too large for the images.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise DataError(f"images must be float (B, 3, H, W); got {images.dtype} {tuple(images.shape)}")
    shorter = min(images.shape[2:])
    if not 0 < sigma <= (shorter - 1) / 3:
        raise DataError(
            f"sigma must be above 0 and at most a third of the shorter side less one pixel, "
            f"{(shorter - 1) / 3:.3g} for {images.shape[2]} x {images.shape[3]}; got {sigma}"
        )
    width = 2 * math.ceil(3 * sigma) + 1
    for kernel_size in ([width, 1], [1, width]):  # one side after the other: the same blur, far cheaper
        images = gaussian_blur(images, kernel_size, [sigma, sigma])
    return images


def energy_inside(saliency: Tensor, mask: Tensor) -> Tensor:
    """Share of the attention that lies on the object (arXiv 1910.01279), in [0, 1].

    Args:
        saliency: float (B, H, W); negative values count as none.
        mask: bool or uint8 (B, H, W), 1 = object, 255 = ignored (in neither part of the share).

    Returns:
        float64 (B,), NaN where nothing is salient.

    Raises:
        DataError: shapes differ.

    Example:
        >>> energy_inside(torch.tensor([[[3.0, 1.0, -2.0]]]), torch.tensor([[[1, 0, 0]]]))
        tensor([0.7500], dtype=torch.float64)
    """
    if saliency.ndim != 3 or saliency.shape != mask.shape:
        raise DataError(
            f"saliency and mask must share one shape (B, H, W); got {tuple(saliency.shape)} and "
            f"{tuple(mask.shape)}: resize the saliency first"
        )
    energy = saliency.detach().double().clamp_min(0) * (mask != IGNORE)
    return (energy * (mask == 1)).sum((1, 2)) / energy.sum((1, 2))


def _check_request(images: Tensor, saliency: Tensor, mode: str, baseline: Tensor, steps: int) -> None:
    if mode not in PERTURBATION_MODES:
        raise DataError(f"mode must be one of {', '.join(PERTURBATION_MODES)}; got {mode!r}")
    if images.ndim != 4:
        raise DataError(f"images must be (B, 3, H, W); got {tuple(images.shape)}")
    if baseline.shape != images.shape:
        raise DataError(f"baseline must be shaped like the images, {tuple(images.shape)}; got {tuple(baseline.shape)}")
    if len(saliency) != len(images):
        raise DataError(f"saliency must hold one map per image, {len(images)}; got {len(saliency)}")
    pixels = images.shape[2] * images.shape[3]
    if not 1 <= steps <= pixels:
        raise DataError(f"steps must be between 1 and the {pixels} pixels of an image; got {steps}")
