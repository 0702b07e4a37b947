"""Image and mask to tensors, resized and augmented together. The only module that knows albumentations."""

from __future__ import annotations

import os
import random
from typing import Any, Literal, get_args

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its import would ask the network for news

import albumentations as A
import cv2
import numpy as np
import torch
from torch import Tensor

from episodes.protocols import Fit
from episodes.types import IGNORE, OUTSIDE, DataError, UInt8Array

Preset = Literal["none", "flip", "standard", "pfenet", "colour", "strong"]

_ATTEMPTS = 6
_MIN_SIZE = 8
_HIDDEN = 2  # stands for 255 on its way through a transform, which fills with 255
_MEAN_COLOUR = (124, 116, 104)  # of ImageNet: what PFENet fills with, and about 0 after normalisation


def _resize(size: int) -> Any:
    return A.Resize(
        size,
        size,
        interpolation=cv2.INTER_LINEAR,
        mask_interpolation=cv2.INTER_NEAREST_EXACT,  # plain NEAREST sits half a pixel off the image
        area_for_downscale="image",  # bilinear alone aliases when it shrinks
    )


def _resize_long_side(sizes: int | list[int]) -> Any:
    """Aspect kept; of several sizes one is drawn."""
    return A.LongestMaxSize(
        sizes,
        interpolation=cv2.INTER_LINEAR,
        mask_interpolation=cv2.INTER_NEAREST_EXACT,
        area_for_downscale="image",
    )


def _pad(size: int) -> Any:
    return A.PadIfNeeded(size, size, position="top_left", border_mode=cv2.BORDER_CONSTANT, fill=0, fill_mask=IGNORE)


def _random_crop(size: int, smallest: float) -> Any:
    return A.RandomResizedCrop(
        (size, size),
        scale=(smallest, 1.0),
        ratio=(0.75, 1.3333),
        interpolation=cv2.INTER_LINEAR,
        mask_interpolation=cv2.INTER_NEAREST_EXACT,  # plain NEAREST sits half a pixel off the image
        area_for_downscale="image",
    )


def _pfenet_geometry(size: int, fit: Fit) -> list[Any]:
    """RandScale, RandRotate and Crop of PFENet's train.py, of photos brought to `size` before."""
    sizes = list(range(round(0.9 * size), round(1.1 * size) + 1))
    return [
        *([_resize(size)] if fit == "squash" else []),
        _resize_long_side(sizes),
        A.Rotate(limit=(-10, 10), fill=_MEAN_COLOUR, fill_mask=IGNORE, p=0.5),
        A.RandomCrop(size, size, pad_if_needed=True, fill=_MEAN_COLOUR, fill_mask=IGNORE),
    ]


def _strong_geometry(size: int) -> list[Any]:
    turned = A.Affine(scale=(0.7, 1.3), keep_ratio=True, rotate=(-25, 25), fill=_MEAN_COLOUR, fill_mask=IGNORE, p=0.7)
    return [turned, _random_crop(size, 0.2)]


def _colour(strength: float) -> Any:
    around = (1 - strength, 1 + strength)
    hue = 0.15 * strength
    return A.ColorJitter(brightness=around, contrast=around, saturation=around, hue=(-hue, hue), p=0.8)


def _photometry(preset: Preset) -> list[Any]:
    if preset in ("standard", "colour"):
        return [_colour(0.2)]
    if preset == "pfenet":  # OpenCV's 5 x 5 kernel, as RandomGaussianBlur of PFENet
        return [A.GaussianBlur(blur_limit=(5, 5), sigma_limit=(1.1, 1.1), p=0.5)]
    if preset == "strong":
        return [_colour(0.4), A.ToGray(p=0.15), A.GaussianBlur(sigma_limit=(0.5, 2.0), p=0.25)]
    return []


def _compositions(preset: Preset, size: int, fit: Fit) -> tuple[Any, Any | None]:
    """The whole picture made square, and the random part of it for presets that crop."""
    changed = [*([] if preset in ("none", "colour") else [A.HorizontalFlip(p=0.5)]), *_photometry(preset)]
    # Padded last: then the photo stays at the top left when mirrored, and the padding stays black.
    whole = [_resize(size), *changed] if fit == "squash" else [_resize_long_side(size), *changed, _pad(size)]
    part: list[Any] = []
    if preset == "standard":
        part = [_random_crop(size, 0.4)]
    elif preset == "pfenet":
        part = _pfenet_geometry(size, fit)
    elif preset == "strong":
        part = _strong_geometry(size)
    return A.Compose(whole), A.Compose([*part, *changed]) if part else None


def fitted_size(height: int, width: int, size: int, fit: Fit) -> tuple[int, int]:
    """(h, w) of the part of a square that a photo of height x width covers, at its top left.

    >>> fitted_size(300, 500, 400, "pad"), fitted_size(300, 500, 400, "squash")
    ((240, 400), (400, 400))
    """
    if fit == "squash":
        return size, size
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def keep_object(original: UInt8Array, resized: Tensor, fit: Fit) -> Tensor:
    """The resized marks with one pixel of the object, about its middle, where resizing has lost all of it.

    Where no object is known, as of a box, one pixel of what is not known stays instead: the object may be there.

    Args:
        original: uint8 (H, W), 1 = object, 255 = not known.
        resized: uint8 (S, S), the same after the preset ``none``.
        fit: as in the transform.
    """
    value = 1 if (original == 1).any() else IGNORE
    rows, columns = np.nonzero(original == value)
    if not len(rows) or bool((resized == value).any()):
        return resized
    size = resized.shape[-1]
    height, width = fitted_size(original.shape[0], original.shape[1], size, fit)
    y, x = np.median(rows) * height / original.shape[0], np.median(columns) * width / original.shape[1]
    kept = resized.clone()
    kept[min(int(y), size - 1), min(int(x), size - 1)] = value
    return kept


class EpisodeTransform:
    """Square tensors from an image and its mask, both moved alike; random only through `seed`.

    The presets:

    - ``none``: the whole picture, by area or bilinear; its mask by nearest, so that mask values stay exact.
    - ``flip``: mirrored left-right half of the time.
    - ``colour``: brightness, contrast, saturation and hue changed mildly; the geometry of ``none``.
    - ``standard``: a crop of 40 to 100 % of the picture, stretched to the square; mirror and colours as above.
    - ``pfenet``: scaled by 0.9 to 1.1, turned by up to 10 degrees half of the time, blurred half of the time, mirrored,
      and cropped to `size` at random, with padding around what is smaller. This is the training transform of
      dvlab-research/PFENet (train.py, util/transform.py) but for two differences: the picture is fitted to `size`
      first, and a crop is drawn again by the rule below instead of below 85 % of the foreground's pixels.
    - ``strong``: mostly scaled by 0.7 to 1.3 and turned by up to 25 degrees, then a crop of 20 to 100 %, mirrored;
      colours changed twice as much, sometimes grey, sometimes blurred.

    Where turning, scaling or cropping leaves nothing to show, the image has ImageNet's mean colour and the mask 255.
    A crop that would lose more than half of the foreground's share is drawn again, and after six draws the whole
    picture is taken, unturned.

    Args:
        preset: one of these.
        size: side of the square in pixels, at least 8.
        fit: how a whole picture becomes square: ``squash`` stretches it; ``pad`` keeps its aspect, its long side
            becomes `size`, it lies at the top left, mirrored or not, and the rest is black, 255 in the mask.

    Raises:
        DataError: unknown preset or fit, or size too small.
    """

    def __init__(self, preset: Preset, size: int, fit: Fit = "squash") -> None:
        if preset not in get_args(Preset):
            raise DataError(f"no augmentation {preset!r}; known are: {', '.join(get_args(Preset))}")
        if size < _MIN_SIZE:
            raise DataError(f"image size must be at least {_MIN_SIZE} pixels, got {size}")
        if fit not in get_args(Fit):
            raise DataError(f"no fit {fit!r}; known are: {', '.join(get_args(Fit))}")
        self.preset: Preset = preset
        self.size = size
        self.fit: Fit = fit
        self._whole, self._cropped = _compositions(preset, size, fit)

    def __call__(self, image: UInt8Array, mask: UInt8Array, *, seed: int) -> tuple[Tensor, Tensor]:
        """Transform one image and its mask.

        Args:
            image: uint8 (H, W, 3), RGB.
            mask: uint8 (H, W) of 0, 1 and 255.
            seed: not negative; equal seeds give equal results, in any worker and order.

        Returns:
            float32 (3, S, S) in [0, 1] and uint8 (S, S) with values of the mask.

        Raises:
            DataError: shapes or types that do not fit.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(f"expected a uint8 image (H, W, 3), got {image.dtype} {image.shape}")
        if mask.dtype != np.uint8 or mask.shape != image.shape[:2]:
            raise DataError(f"expected a uint8 mask of {image.shape[:2]}, got {mask.dtype} {mask.shape}")
        moved, label = self._apply(image, mask, seed)
        tensor = torch.from_numpy(np.ascontiguousarray(moved.transpose(2, 0, 1))).float().div_(255)
        return tensor, torch.from_numpy(np.ascontiguousarray(label))

    def marks(self, image: UInt8Array, marks: UInt8Array, *, seed: int) -> tuple[Tensor, Tensor]:
        """As `__call__` for marks in which 255 is not known: what lies beside the photo afterwards is `OUTSIDE`."""
        tensor, moved = self(image, np.where(marks == IGNORE, np.uint8(_HIDDEN), marks), seed=seed)
        filled = moved == IGNORE
        return tensor, moved.masked_fill(moved == _HIDDEN, IGNORE).masked_fill(filled, OUTSIDE)

    def support(self, image: UInt8Array, marks: UInt8Array, *, is_mask: bool) -> tuple[Tensor, Tensor]:
        """A support with seed 0: as `__call__` for a mask, as `marks` for less, and `keep_object` for both."""
        tensor, moved = (self if is_mask else self.marks)(image, marks, seed=0)
        return tensor, keep_object(marks, moved, self.fit)

    def photo(self, image: UInt8Array) -> Tensor:
        """A photo that has no mask, with seed 0: uint8 (H, W, 3) -> float32 (3, S, S) in [0, 1]."""
        return self(image, np.zeros(image.shape[:2], np.uint8), seed=0)[0]

    def _apply(self, image: UInt8Array, mask: UInt8Array, seed: int) -> tuple[UInt8Array, UInt8Array]:
        if self._cropped is not None:
            wanted = self._expected_share(mask) / 2
            for attempt in range(_ATTEMPTS):
                moved, label = _run(self._cropped, image, mask, [seed, attempt])
                share = float((label == 1).mean())
                if share >= wanted and (share > 0 or wanted == 0):
                    return moved, label
        return _run(self._whole, image, mask, [seed, _ATTEMPTS])

    def _expected_share(self, mask: UInt8Array) -> float:
        share = float((mask == 1).mean())
        if self.preset == "pfenet" and self.fit == "pad":  # its crops keep the padding, in which no object is
            height, width = fitted_size(mask.shape[0], mask.shape[1], self.size, "pad")
            share *= height * width / self.size**2
        return share


def _run(composition: Any, image: UInt8Array, mask: UInt8Array, entropy: list[int]) -> tuple[UInt8Array, UInt8Array]:
    # One stream for all steps. `set_random_seed` would start every step at the same seed, and then
    # the mirrored pictures would all be cropped alike.
    generator = np.random.default_rng(entropy)
    composition.set_random_state(generator, random.Random(int(generator.integers(2**63))))
    result = composition(image=image, mask=mask)
    return result["image"], result["mask"]
