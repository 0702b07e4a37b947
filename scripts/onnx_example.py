"""Segment photos with an exported model: numpy, Pillow and onnxruntime, no torch.

    fewshot-seg export --out exported
    python scripts/onnx_example.py --model exported --support dog.jpg dog_mask.png --query a.jpg b.jpg --out masks

Masks of supports: 1 is the object and 255 is ignored; in a black and white mask white is the object. Written masks
are white where the object is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image, ImageOps

Array = npt.NDArray[Any]


def linear_weights(old: int, new: int) -> Array:
    """The matrix (new, old) of linear interpolation between pixel centres."""
    place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.asarray(np.maximum(0, 1 - np.abs(place[:, None] - np.arange(old))), np.float32)


def area_weights(old: int, new: int) -> Array:
    """The matrix (new, old) of the mean over the area that a pixel covers, for a smaller picture."""
    edges, pixels = np.arange(new + 1)[:, None] * old / new, np.arange(old)[None]
    covered = np.clip(np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels), 0, None)
    return np.asarray(covered * new / old, np.float32)


def near_area_weights(old: int, new: int) -> Array:
    """The matrix (new, old) that OpenCV takes for areas when one side of the picture grows and the other shrinks."""
    first = np.floor(np.arange(new) * old / new)
    share = np.arange(1, new + 1) - (first + 1) * new / old
    share = np.where(share <= 0, 0, share - np.floor(share))
    weights = np.zeros((new, old), np.float32)
    rows = np.arange(new)
    np.add.at(weights, (rows, np.minimum(first, old - 1).astype(int)), 1 - share)
    np.add.at(weights, (rows, np.minimum(first + 1, old - 1).astype(int)), share)
    return weights


def resize(picture: Array, height: int, width: int) -> Array:
    """uint8 (H, W, 3) at another size, as the model's photos were resized in its training."""
    old_height, old_width = picture.shape[:2]
    if (height, width) == (old_height, old_width):
        return picture
    if height <= old_height and width <= old_width:
        weights = area_weights
    elif height < old_height or width < old_width:
        weights = near_area_weights
    else:
        weights = linear_weights
    rows, columns = weights(old_height, height), weights(old_width, width)
    resized = np.einsum("hy,yxc,wx->hwc", rows, picture.astype(np.float32), columns, optimize=True)
    return np.asarray(np.clip(np.rint(resized), 0, 255), np.uint8)


def fitted(height: int, width: int, size: int, fit: str) -> tuple[int, int]:
    """(h, w) of the part of the square that a photo covers, at its top left."""
    if fit == "squash":
        return size, size
    return max(1, round(height * (size / max(height, width)))), max(1, round(width * (size / max(height, width))))


def square(photo: Array, size: int, fit: str) -> Array:
    """uint8 (H, W, 3) -> float32 (3, S, S) in [0, 1]; beside a photo that is padded lies black."""
    height, width = fitted(photo.shape[0], photo.shape[1], size, fit)
    whole = np.zeros((size, size, 3), np.uint8)
    whole[:height, :width] = resize(photo, height, width)
    return np.ascontiguousarray(whole.transpose(2, 0, 1)).astype(np.float32) / 255


def square_mask(mask: Array, size: int, fit: str) -> Array:
    """uint8 (H, W) -> uint8 (S, S), the nearest pixels; 255, ignored, beside a photo that is padded."""
    height, width = fitted(mask.shape[0], mask.shape[1], size, fit)
    rows = ((np.arange(height) + 0.5) * mask.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * mask.shape[1] / width).astype(int)
    whole = np.full((size, size), 255, np.uint8)
    whole[:height, :width] = mask[rows][:, columns]
    return whole


def enlarge(logits: Array, height: int, width: int) -> Array:
    """float (h, w) -> float (H, W)."""
    return linear_weights(logits.shape[0], height) @ logits @ linear_weights(logits.shape[1], width).T


def read_photo(path: Path) -> Array:
    """uint8 (H, W, 3), upright."""
    with Image.open(path) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


def read_mask(path: Path) -> Array:
    """uint8 (H, W) of 0, 1 and 255 (ignored)."""
    with Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture)
        values = np.asarray(upright if upright.mode == "P" else upright.convert("L"))
    if set(np.unique(values).tolist()) <= {0, 255}:
        return np.asarray(values == 255, np.uint8)
    return np.where(values == 255, 255, values > 0).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of `fewshot-seg export`")
    parser.add_argument(
        "--support",
        type=Path,
        nargs=2,
        action="append",
        required=True,
        metavar=("PHOTO", "MASK"),
        help="may be repeated",
    )
    parser.add_argument("--query", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the masks")
    arguments = parser.parse_args()
    model = json.loads((arguments.model / "metadata.json").read_text(encoding="utf-8"))
    size, fit = model["size"], model["fit"]
    graphs = {
        name: onnxruntime.InferenceSession(arguments.model / graph["file"], providers=["CPUExecutionProvider"])
        for name, graph in model["graphs"].items()
    }

    images, masks = [], []
    for photo, mask in arguments.support:
        images.append(square(read_photo(photo), size, fit))
        masks.append(square_mask(read_mask(mask), size, fit))
        if not (masks[-1] == 1).any():
            sys.exit(f"{mask}: the mask shows no object at {size} x {size} pixels; mark it with 1 or white")
    names = list(model["graphs"]["support"]["outputs"])
    found = graphs["support"].run(names, {"images": np.stack(images), "masks": np.stack(masks)})
    embedding = dict(zip(names, found, strict=True))  # made once, for any number of queries

    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in arguments.query:
        picture = read_photo(path)
        height, width = picture.shape[:2]
        logits, coarse = graphs["query"].run(
            ["logits", "coarse_logits"], {"images": square(picture, size, fit)[None], **embedding}
        )
        if fit == "squash":
            own = enlarge(coarse[0], height, width)
        else:  # without the padding
            rows, columns = fitted(height, width, size, fit)
            own = enlarge(logits[0, :rows, :columns], height, width)
        written = arguments.out / f"{path.stem}.png"
        Image.fromarray(np.where(own > model["threshold"], 255, 0).astype(np.uint8)).save(written)
        print(written)


if __name__ == "__main__":
    main()
