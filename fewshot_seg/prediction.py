"""Masks for people's own photos: remember the supports once, then segment any number of queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from episodes.augment import EpisodeTransform
from episodes.protocols import Fit
from episodes.types import DataError, UInt8Array
from fewshot_seg.episode_logits import segment_photo
from fewshot_seg.photos import output_names, read_photo
from fewshot_seg.pictures import FloatArray, overlay_mask, write_mask, write_picture
from fewshot_seg.segmenter import FewShotSegmenter, SupportEncoding


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoPrediction:
    """Result for one photo, at its own size.

    Attributes:
        mask: uint8 (H, W), 1 = object.
        attention: float32 (H, W) in [0, 1], gradient attention of the similarity.
        confidence: float32 (H, W) in [0, 1], sigmoid of how far the logit is above the threshold: the mask is
            where it exceeds 0.5. A ranking of pixels, not a calibrated probability.
    """

    mask: UInt8Array
    attention: FloatArray
    confidence: FloatArray


class Predictor:
    """Segments photos of any size by one remembered set of supports.

    Args:
        segmenter: the model; put into evaluation mode.
        resolution: side of the square that photos are fitted into, as in the model's training.
        fit: how, as in the model's training.
    """

    def __init__(self, segmenter: FewShotSegmenter, resolution: int, fit: Fit = "squash") -> None:
        self._segmenter = segmenter.eval()
        self._transform = EpisodeTransform("none", resolution, fit)
        self._support: SupportEncoding | None = None

    @torch.no_grad()
    def remember(
        self, images: Sequence[UInt8Array], masks: Sequence[UInt8Array], dense: Sequence[bool] | None = None
    ) -> None:
        """Encode the supports; replaces earlier ones.

        Args:
            images: one or more uint8 (H, W, 3), sizes may differ.
            masks: uint8 (H, W) each, 1 = object, 0 = background, 255 = ignore, or not known in weaker marks.
            dense: which of them are masks; the others are boxes, points, scribbles or nothing, and get completed. All
                are masks by default.

        Raises:
            DataError: no support, a mask of another size, or one without the object.
        """
        if not images or len(images) != len(masks):
            raise DataError(f"expected one or more support photos with a mask each, got {len(images)} and {len(masks)}")
        whole = [True] * len(images) if dense is None else list(dense)
        squares = [self._square(*one) for one in zip(images, masks, whole, strict=True)]
        for number, ((_, mask), is_mask) in enumerate(zip(squares, whole, strict=True), 1):
            if is_mask and not bool((mask == 1).any()):
                raise DataError(
                    f"mask of support {number} shows no object at {self._transform.size} x {self._transform.size} "
                    "pixels; mark the object with 1, choose a larger one, or raise --size"
                )
        device = self._device()
        self._support = self._segmenter.encode_support(
            torch.stack([image for image, _ in squares])[None].to(device),
            torch.stack([mask for _, mask in squares])[None].to(device),
            torch.tensor([whole], device=device),
        )

    def _square(self, image: UInt8Array, marks: UInt8Array, is_mask: bool) -> tuple[Tensor, Tensor]:
        if is_mask:  # one that shows no object at this size is refused, not mended
            return self._transform(image, marks, seed=0)
        return self._transform.support(image, marks, is_mask=False)

    @torch.no_grad()
    def predict(self, image: UInt8Array) -> PhotoPrediction:
        """Segment one photo, uint8 (H, W, 3).

        Raises:
            DataError: nothing was remembered, or it is no such array.
        """
        if self._support is None:
            raise DataError("no support to go by; call remember(images, masks) first")
        square, size = self._transform.photo(image).to(self._device()), (image.shape[0], image.shape[1])
        prediction = segment_photo(self._segmenter, self._support, square, size, self._transform.fit)
        margin = prediction.logits[0] - prediction.threshold
        confidence = margin.sigmoid()
        return PhotoPrediction(
            mask=(margin > 0).cpu().numpy().astype(np.uint8),
            attention=prediction.attention[0].cpu().numpy(),
            confidence=confidence.cpu().numpy(),
        )

    def _device(self) -> torch.device:
        return next(self._segmenter.backbone.parameters()).device


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenPrediction:
    """Files of one query; `share` is the mask's part of the photo, `confidence` its mean inside the mask (or 0)."""

    query: Path
    mask: Path
    overlay: Path
    share: float
    confidence: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderPrediction:
    """What was written, and one line for every query that could not be read."""

    written: tuple[WrittenPrediction, ...]
    failures: tuple[str, ...]


def predict_folder(
    predictor: Predictor, queries: Sequence[Path], folder: Path, *, show_progress: bool = False
) -> FolderPrediction:
    """Write ``masks/NAME.png`` (index PNG, 1 = object) and ``overlays/NAME.jpg`` for every query.

    A query that cannot be read is noted, and the rest is done all the same.

    Args:
        predictor: with its supports remembered.
        queries: photo files.
        folder: created when missing.
        show_progress: bar on stderr.

    Raises:
        DataError: nothing was remembered, or the folder cannot be written.
    """
    written, failures = [], []
    named = list(zip(queries, output_names(queries), strict=True))
    for query, name in tqdm(named, desc="segmenting", unit="photo", disable=not show_progress):
        try:
            photo = read_photo(query)
        except DataError as error:
            failures.append(str(error))
            continue
        prediction = predictor.predict(photo)
        mask_path, overlay_path = folder / "masks" / f"{name}.png", folder / "overlays" / f"{name}.jpg"
        write_mask(mask_path, prediction.mask)
        write_picture(overlay_path, overlay_mask(photo, prediction.mask))
        inside = prediction.confidence[prediction.mask == 1]
        written.append(
            WrittenPrediction(
                query=query,
                mask=mask_path,
                overlay=overlay_path,
                share=float(prediction.mask.mean()),
                confidence=float(inside.mean()) if inside.size else 0.0,
            )
        )
    return FolderPrediction(written=tuple(written), failures=tuple(failures))
