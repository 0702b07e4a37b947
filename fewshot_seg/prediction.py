"""Masks for people's own photos: remember the supports once, then segment any number of queries.

`predict_folder` streams: threads decode and resize photos ahead, others run the network, others write. On a CPU several
run the network side by side with one torch thread each: layers for one photo are too small to be divided among cores.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from episodes.augment import EpisodeTransform
from episodes.protocols import Fit
from episodes.types import DataError, UInt8Array
from fewshot_seg.episode_logits import segment_photo, to_original
from fewshot_seg.photos import output_names, read_photo
from fewshot_seg.pictures import FloatArray, overlay_mask, write_mask, write_picture
from fewshot_seg.pipeline import stream
from fewshot_seg.segmenter import FewShotSegmenter, SupportEncoding
from fewshot_seg.support_files import load_support, save_support

_LANES = 8
"""At most so many threads run the network side by side on a CPU; each needs memory for its activations."""
_GPU_BATCH = 8


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


class _Squares(threading.local):
    """The transform of each thread: albumentations' objects keep what they last did."""

    def __init__(self, resolution: int, fit: Fit) -> None:
        self.transform = EpisodeTransform("none", resolution, fit)


class Predictor:
    """Segments photos of any size by one remembered set of supports.

    Args:
        segmenter: the model; put into evaluation mode.
        resolution: side of the square that photos are fitted into, as in the model's training.
        fit: how, as in the model's training.
    """

    def __init__(self, segmenter: FewShotSegmenter, resolution: int, fit: Fit = "squash") -> None:
        self._segmenter = segmenter.eval()
        self._size, self._fit = resolution, fit
        self._squares = _Squares(resolution, fit)
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
                    f"mask of support {number} shows no object at {self._size} x {self._size} "
                    "pixels; mark the object with 1, choose a larger one, or raise --size"
                )
        device = self.device
        self._support = self._segmenter.encode_support(
            torch.stack([image for image, _ in squares])[None].to(device),
            torch.stack([mask for _, mask in squares])[None].to(device),
            torch.tensor([whole], device=device),
        )

    def _square(self, image: UInt8Array, marks: UInt8Array, is_mask: bool) -> tuple[Tensor, Tensor]:
        if is_mask:  # one that shows no object at this size is refused, not mended
            return self._squares.transform(image, marks, seed=0)
        return self._squares.transform.support(image, marks, is_mask=False)

    @torch.no_grad()
    def predict(self, image: UInt8Array) -> PhotoPrediction:
        """Segment one photo, uint8 (H, W, 3).

        Raises:
            DataError: nothing was remembered, or it is no such array.
        """
        square, size = self.square(image).to(self.device), (image.shape[0], image.shape[1])
        prediction = segment_photo(self._segmenter, self.support, square, size, self._fit)
        margin = prediction.logits[0] - prediction.threshold
        confidence = margin.sigmoid()
        return PhotoPrediction(
            mask=(margin > 0).cpu().numpy().astype(np.uint8),
            attention=prediction.attention[0].cpu().numpy(),
            confidence=confidence.cpu().numpy(),
        )

    def square(self, image: UInt8Array) -> Tensor:
        """A photo uint8 (H, W, 3) as the network reads it, float32 (3, S, S) on the CPU. From any thread."""
        return self._squares.transform.photo(image)

    @torch.no_grad()
    def coarse_margins(self, squares: Tensor) -> Tensor:
        """How far the decoder's logits are above the threshold, at its own grid. From any thread.

        Args:
            squares: float32 (B, 3, S, S), any device.

        Returns:
            float (B, h, w) on the CPU; `margin_of` brings one to its photo's size.

        Raises:
            DataError: nothing was remembered.
        """
        segmenter, support = self._segmenter, self.support.expand(len(squares))
        photos = segmenter.photo_maps(segmenter.backbone(squares.to(self.device)))
        logits: Tensor = segmenter.decoder(segmenter.priors_of(support, photos), photos.frozen, support.prototype)
        return (logits - segmenter.threshold).cpu()

    def margin_of(self, coarse: Tensor, shape: tuple[int, int]) -> Tensor:
        """One of `coarse_margins`, float (h, w), at its photo's size (H, W); the mask is where it exceeds 0."""
        if self._fit == "squash":
            return F.interpolate(coarse[None, None], shape, mode="bilinear", align_corners=False)[0, 0]
        side = (self._size, self._size)
        square = F.interpolate(coarse[None, None], side, mode="bilinear", align_corners=False)[0]
        return to_original(square, shape, self._fit)[0]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self._segmenter.backbone.parameters()).device

    @property
    def support(self) -> SupportEncoding:
        """What is remembered. Raises DataError when nothing is."""
        if self._support is None:
            raise DataError("no support to go by; call remember(images, masks) or load_support(path) first")
        return self._support

    def save_support(self, path: Path, names: Sequence[str] = ()) -> None:
        """Write what is remembered; `names` are noted. Raises DataError as `support_files.save_support`, or if nothing
        is remembered."""
        save_support(path, self.support, self._segmenter, resolution=self._size, fit=self._fit, names=names)

    def load_support(self, path: Path) -> tuple[str, ...]:
        """Remember what `save_support` wrote instead of encoding photos; returns the names that were noted.

        Raises:
            DataError: missing, damaged or foreign file, or one of another model, resolution or fit.
        """
        saved = load_support(path, self._segmenter, resolution=self._size, fit=self._fit)
        self._support = saved.encoding
        return saved.names


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
    predictor: Predictor,
    queries: Sequence[Path],
    folder: Path,
    *,
    batch_size: int | None = None,
    show_progress: bool = False,
) -> FolderPrediction:
    """Write ``masks/NAME.png`` (index PNG, 1 = object) and ``overlays/NAME.jpg`` for every query.

    A query that cannot be read is noted, and the rest is done all the same. Results are in the order of the queries.
    At most `pipeline.most_in_flight` photos are in memory, however many queries there are. Masks are those of
    `Predictor.predict` up to rounding: networks round the last digit differently in batches of another size, so that
    a pixel exactly on the threshold may fall on the other side.

    Args:
        predictor: with its supports remembered.
        queries: photo files.
        folder: created when missing.
        batch_size: photos that go through the network together; by default 1 on a CPU, where more gain nothing, and
            8 on a GPU.
        show_progress: bar on stderr.

    Raises:
        DataError: nothing was remembered, or the folder cannot be written.
    """
    _ = predictor.support
    named = list(zip(queries, output_names(queries), strict=True))
    outcomes = stream(
        named,
        read=lambda one: _read(predictor, one[0]),
        process=lambda opened: _segment(predictor, opened),
        write=lambda one, segmented: _write(predictor, one[0], folder, one[1], segmented),
        batch_size=batch_size or (1 if predictor.device.type == "cpu" else _GPU_BATCH),
        lanes=lane_count(predictor.device),
    )
    bar = tqdm(outcomes, total=len(named), desc="segmenting", unit="photo", disable=not show_progress)
    with contextlib.closing(outcomes):
        done = list(bar)
    return FolderPrediction(
        written=tuple(one for one in done if not isinstance(one, str)),
        failures=tuple(one for one in done if isinstance(one, str)),
    )


def lane_count(device: torch.device) -> int:
    """How many threads run the network side by side: on a CPU as many as torch has threads, at most 8; else 1."""
    return min(torch.get_num_threads(), _LANES) if device.type == "cpu" else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    photo: UInt8Array
    square: Tensor


def _read(predictor: Predictor, query: Path) -> _Opened | str:
    try:
        photo = read_photo(query)
    except DataError as error:
        return str(error)
    return _Opened(photo=photo, square=predictor.square(photo))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Segmented:
    photo: UInt8Array
    coarse: Tensor


def _segment(predictor: Predictor, opened: list[_Opened | str]) -> list[_Segmented | str]:
    squares = [one.square for one in opened if isinstance(one, _Opened)]
    margins = iter(predictor.coarse_margins(torch.stack(squares)) if squares else ())
    return [one if isinstance(one, str) else _Segmented(photo=one.photo, coarse=next(margins)) for one in opened]


def _write(
    predictor: Predictor, query: Path, folder: Path, name: str, segmented: _Segmented | str
) -> WrittenPrediction | str:
    if isinstance(segmented, str):
        return segmented
    photo = segmented.photo
    margin = predictor.margin_of(segmented.coarse, (photo.shape[0], photo.shape[1]))
    inside = margin > 0
    mask = inside.numpy().astype(np.uint8)
    mask_path, overlay_path = folder / "masks" / f"{name}.png", folder / "overlays" / f"{name}.jpg"
    try:
        write_mask(mask_path, mask)
        write_picture(overlay_path, overlay_mask(photo, mask))
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write the prediction of {query} to {folder}: {reason}; make room there") from error
    return WrittenPrediction(
        query=query,
        mask=mask_path,
        overlay=overlay_path,
        share=float(mask.mean()),
        confidence=float(margin[inside].sigmoid().mean()) if mask.any() else 0.0,
    )
