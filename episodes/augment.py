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

from episodes.types import DataError, UInt8Array

Preset = Literal["none", "flip", "standard"]

_ATTEMPTS = 6
_MIN_SIZE = 8


def _resize(size: int) -> Any:
    return A.Resize(
        size,
        size,
        interpolation=cv2.INTER_LINEAR,
        mask_interpolation=cv2.INTER_NEAREST_EXACT,  # plain NEAREST sits half a pixel off the image
        area_for_downscale="image",  # bilinear alone aliases when it shrinks
    )


def _random_crop(size: int) -> Any:
    return A.RandomResizedCrop(
        (size, size),
        scale=(0.4, 1.0),
        ratio=(0.75, 1.3333),
        interpolation=cv2.INTER_LINEAR,
        mask_interpolation=cv2.INTER_NEAREST_EXACT,  # plain NEAREST sits half a pixel off the image
        area_for_downscale="image",
    )


def _colour() -> Any:
    return A.ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=(-0.03, 0.03), p=0.8)


class EpisodeTransform:
    """Square tensors from an image and its mask, both moved alike; random only through `seed`.

    Args:
        preset: ``none`` squashes to the square (area or bilinear for the image, nearest for the mask, whose
            values stay exact); ``flip`` also mirrors left-right half of the time; ``standard`` crops 40 to
            100 % of the picture instead of squashing all of it, mirrors, and changes colours mildly. A crop
            that would lose more than half of the foreground's share is drawn again, and after six draws the
            whole picture is taken.
        size: side of the square in pixels, at least 8.

    Raises:
        DataError: unknown preset or size too small.
    """

    def __init__(self, preset: Preset, size: int) -> None:
        if preset not in get_args(Preset):
            raise DataError(f"no augmentation {preset!r}; known are: {', '.join(get_args(Preset))}")
        if size < _MIN_SIZE:
            raise DataError(f"image size must be at least {_MIN_SIZE} pixels, got {size}")
        self.preset: Preset = preset
        self.size = size
        flip = [] if preset == "none" else [A.HorizontalFlip(p=0.5)]
        colour = [_colour()] if preset == "standard" else []
        self._whole = A.Compose([_resize(size), *flip, *colour])
        self._cropped = A.Compose([_random_crop(size), *flip, *colour]) if preset == "standard" else None

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

    def photo(self, image: UInt8Array) -> Tensor:
        """A photo that has no mask, with seed 0: uint8 (H, W, 3) -> float32 (3, S, S) in [0, 1]."""
        return self(image, np.zeros(image.shape[:2], np.uint8), seed=0)[0]

    def _apply(self, image: UInt8Array, mask: UInt8Array, seed: int) -> tuple[UInt8Array, UInt8Array]:
        if self._cropped is not None:
            wanted = float((mask == 1).mean()) / 2
            for attempt in range(_ATTEMPTS):
                moved, label = _run(self._cropped, image, mask, [seed, attempt])
                share = float((label == 1).mean())
                if share >= wanted and (share > 0 or wanted == 0):
                    return moved, label
        return _run(self._whole, image, mask, [seed, _ATTEMPTS])


def _run(composition: Any, image: UInt8Array, mask: UInt8Array, entropy: list[int]) -> tuple[UInt8Array, UInt8Array]:
    # One stream for all steps. `set_random_seed` would start every step at the same seed, and then
    # the mirrored pictures would all be cropped alike.
    generator = np.random.default_rng(entropy)
    composition.set_random_state(generator, random.Random(int(generator.integers(2**63))))
    result = composition(image=image, mask=mask)
    return result["image"], result["mask"]
