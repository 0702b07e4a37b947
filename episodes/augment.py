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
from episodes.types import IGNORE, DataError, UInt8Array

Preset = Literal["none", "flip", "standard", "pfenet", "colour", "strong"]

_ATTEMPTS = 6
_MIN_SIZE = 8
_MEAN = (124, 116, 104)  # of ImageNet: what lies beyond a turned photo is zero after the backbone's normalisation
_PFENET_SIDE = 500 / 473  # PFENet crops squares of 473 pixels from VOC's photos, whose long side is 500
_RESIZED: dict[str, Any] = {
    "interpolation": cv2.INTER_LINEAR,
    "mask_interpolation": cv2.INTER_NEAREST_EXACT,  # plain NEAREST sits half a pixel off the image
    "area_for_downscale": "image",  # bilinear alone aliases when it shrinks
}
_TURNED: dict[str, Any] = {
    "interpolation": cv2.INTER_LINEAR,
    "mask_interpolation": cv2.INTER_NEAREST,
    "border_mode": cv2.BORDER_CONSTANT,
    "fill": _MEAN,
    "fill_mask": IGNORE,
}


def fitted_size(height: int, width: int, size: int, fit: Fit) -> tuple[int, int]:
    """(h, w) of the part of a square that a photo of height x width covers, at its top left.

    >>> fitted_size(300, 500, 400, "pad"), fitted_size(300, 500, 400, "squash")
    ((240, 400), (400, 400))
    """
    if fit == "squash":
        return size, size
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _crop(preset: Preset, size: int) -> list[Any] | None:
    """Steps that take a random part of the photo, size x size; None if the preset shows whole photos."""
    if preset == "standard":
        return [A.RandomResizedCrop((size, size), scale=(0.4, 1.0), ratio=(0.75, 1.3333), **_RESIZED)]
    if preset == "strong":
        return [
            A.Affine(scale=(0.75, 1.25), rotate=(-20, 20), keep_ratio=True, p=0.8, **_TURNED),
            A.RandomResizedCrop((size, size), scale=(0.25, 1.0), ratio=(0.6, 1.6667), **_RESIZED),
        ]
    if preset == "pfenet":
        sides = range(round(0.9 * _PFENET_SIDE * size), round(1.1 * _PFENET_SIDE * size) + 1)
        return [
            A.LongestMaxSize(list(sides), **_RESIZED),
            A.Rotate((-10, 10), p=0.5, **_TURNED),
            A.RandomCrop(size, size, pad_if_needed=True, fill=_MEAN, fill_mask=IGNORE),
        ]
    return None


def _changes(preset: Preset) -> list[Any]:
    """Steps that keep the size: mirroring, colours and blur."""
    mirrored = A.HorizontalFlip(p=0.5)
    mild = A.ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=(-0.03, 0.03), p=0.8)
    vivid = A.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.5, 1.5), hue=(-0.06, 0.06), p=0.8)
    photometric = [vivid, A.ToGray(p=0.1), A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 1.5), p=0.3)]
    steps: dict[Preset, list[Any]] = {
        "none": [],
        "flip": [mirrored],
        "standard": [mirrored, mild],
        # OpenCV's own width for the kernel of five pixels that PFENet blurs with is 1.1.
        "pfenet": [A.GaussianBlur(blur_limit=(5, 5), sigma_limit=(1.1, 1.1), p=0.5), mirrored],
        "colour": photometric,
        "strong": [mirrored, *photometric],
    }
    return steps[preset]


class EpisodeTransform:
    """Square tensors from an image and its mask, both moved alike; random only through `seed`.

    ======== ========================================================================================
    preset   what happens
    ======== ========================================================================================
    none     the whole picture, fitted into the square
    flip     the same, mirrored left-right half of the time
    standard 40 to 100 % of the picture, stretched to the square; mirrored; mild changes of colours
    pfenet   PFENet's training: long side 0.9 to 1.1 times 500/473 of the square's, half of the time
             turned by up to 10 degrees, half of the time blurred, mirrored, cropped to the square
    colour   the whole picture; strong changes of colours, sometimes grey, sometimes blurred
    strong   scaled by 0.75 to 1.25 and turned by up to 20 degrees, then 25 to 100 % of the picture;
             mirrored; colours as in ``colour``. Meant for supports
    ======== ========================================================================================

    A crop that would lose more than half of the foreground's share is drawn again, and after six draws the whole
    picture is taken. The image is resized by area or bilinearly and the mask by nearest neighbour: its values stay
    exact, and an annotation (see `episodes.annotations`) passes as a mask does. Beyond the edges of a turned or
    shrunk picture the image has ImageNet's mean colour and the mask 255.

    Args:
        preset: as above.
        size: side of the square in pixels, at least 8.
        fit: how a whole picture becomes square: ``squash`` stretches it; ``pad`` keeps its aspect: its long side
            becomes `size`, and right of it or below the image is black and the mask 255, as PFENet and RePRI do in
            testing (they round the sides down to multiples of 8 besides; see `fitted_size`).

    Raises:
        DataError: unknown preset or fit, or size too small.
    """

    def __init__(self, preset: Preset, size: int, fit: Fit = "squash") -> None:
        if preset not in get_args(Preset):
            raise DataError(f"no augmentation {preset!r}; known are: {', '.join(get_args(Preset))}")
        if fit not in get_args(Fit):
            raise DataError(f"no way {fit!r} to fit a photo into a square; known are: {', '.join(get_args(Fit))}")
        if size < _MIN_SIZE:
            raise DataError(f"image size must be at least {_MIN_SIZE} pixels, got {size}")
        self.preset: Preset = preset
        self.size = size
        if fit == "squash":
            self._whole = A.Compose([A.Resize(size, size, **_RESIZED), *_changes(preset)])
        else:  # padded last: mirrored photos stay at the left, and colours leave the padding black
            padding = A.PadIfNeeded(size, size, position="top_left", fill=0, fill_mask=IGNORE)
            self._whole = A.Compose([A.LongestMaxSize(size, **_RESIZED), *_changes(preset), padding])
        crop = _crop(preset, size)
        self._cropped = None if crop is None else A.Compose([*crop, *_changes(preset)])
        self._keeps_aspect = preset == "pfenet"

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
