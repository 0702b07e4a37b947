"""Masks for people's own photos: remember the supports once, then segment any number of queries."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.augment import EpisodeTransform
from episodes.files import user_path
from episodes.protocols import Fit
from episodes.types import IGNORE, DataError, UInt8Array
from fewshot_seg.attention import scale_map
from fewshot_seg.competition import compete
from fewshot_seg.encodings import PhotoMaps, SupportEncoding
from fewshot_seg.episode_logits import to_original
from fewshot_seg.guided_upsampling import PIXELS_PER_CELL, guided_margins
from fewshot_seg.photos import Photo, open_photo
from fewshot_seg.pictures import FloatArray
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.support_files import load_support, save_support
from fewshot_seg.support_photos import UNNAMED, Support, read_supports
from fewshot_seg.tiles import Tile, blend_tiles, cut_tiles

_GPU_TILES = 8
"""Tiles that go through the network together on a GPU; on a CPU it is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoPrediction:
    """Result for one photo, at its own size.

    Attributes:
        mask: uint8 (H, W), 0 = background, n = class n of `Predictor.classes`, from 1.
        attention: float32 (H, W) in [0, 1], gradient attention of the similarity; of several classes the largest.
        confidence: float32 (H, W) in [0, 1], sigmoid of how far the logit is above the threshold, of the class that is
            furthest: the mask is where it exceeds 0.5. A ranking of pixels, not a calibrated probability.
    """

    mask: UInt8Array
    attention: FloatArray
    confidence: FloatArray


@dataclass(frozen=True, kw_only=True, slots=True)
class CoarseMargins:
    """What the network says of one photo, at the decoder's grid: logit less threshold of N classes.

    Attributes:
        whole: float (V, N, h, w) of the whole photo; V is 2 where the second one is of the mirrored photo, else 1.
        parts: float (V, N, h, w) of each tile.
        tiles: where they lie in the photo; none where it is looked at as a whole only.
        guide: the photo whose edges the margins are to follow, float (1, 3, h', w') in [0, 1]; None for a bilinear
            enlargement alone.
    """

    whole: Tensor
    parts: tuple[Tensor, ...] = ()
    tiles: tuple[Tile, ...] = ()
    guide: Tensor | None = None


class _Squares(threading.local):
    """The transform of each thread: albumentations' objects keep what they last did."""

    def __init__(self, resolution: int, fit: Fit) -> None:
        self.transform = EpisodeTransform("none", resolution, fit)


class Predictor:
    """Segments photos of any size by remembered supports of one class or of several.

    Classes are numbered from 1 in the order in which they were remembered. Each is looked for by itself, with the
    photo's features computed once; then they compete: a pixel belongs to the class whose logit is furthest above the
    threshold, or to the background where none is above it.

    Args:
        segmenter: the model; put into evaluation mode.
        resolution: side of the square that photos are fitted into; the model's file says which.
        fit: how, as in the model's training.
        tile: for small objects in large photos: photos are also cut into overlapping tiles of so many pixels a side,
            and each is segmented like a photo. The logit is the mean of that of the whole photo and that of the tiles,
            blended where they overlap. So what a tile finds must not be denied by the whole photo, nor the reverse.
        flip: photos and tiles are also segmented mirrored, and the logits averaged. Twice the time.

    Raises:
        DataError: a tile of less than one pixel.
    """

    def __init__(
        self,
        segmenter: FewShotSegmenter,
        resolution: int,
        fit: Fit = "squash",
        *,
        tile: int | None = None,
        flip: bool = False,
    ) -> None:
        if tile is not None and tile < 1:
            raise DataError(f"the side of a tile must be at least 1 pixel, got {tile}")
        self._segmenter = segmenter.eval()
        self._size, self._fit, self._tile, self._flip = resolution, fit, tile, flip
        self._squares = _Squares(resolution, fit)
        self._supports: dict[str, SupportEncoding] = {}

    @torch.no_grad()
    def remember(
        self,
        images: Sequence[UInt8Array],
        masks: Sequence[UInt8Array],
        dense: Sequence[bool] | None = None,
        *,
        name: str = UNNAMED,
    ) -> None:
        """Encode the supports of a class; replaces earlier ones of the same name.

        Args:
            images: one or more uint8 (H, W, 3), sizes may differ.
            masks: uint8 (H, W) each, 1 = object, 0 = background, 255 = ignore, or not known in weaker marks.
            dense: which of them are masks; the others are boxes, points, scribbles or nothing, and get completed. All
                are masks by default.
            name: of the class.

        Raises:
            DataError: no support, a mask of another size, one without the object, or more than 254 classes.
        """
        if not images or len(images) != len(masks):
            raise DataError(f"expected one or more support photos with a mask each, got {len(images)} and {len(masks)}")
        whole = [True] * len(images) if dense is None else list(dense)
        squares = [self._support_square(*one) for one in zip(images, masks, whole, strict=True)]
        for number, ((_, mask), is_mask) in enumerate(zip(squares, whole, strict=True), 1):
            if is_mask and not bool((mask == 1).any()):
                raise DataError(
                    f"mask of support {number} shows no object at {self._size} x {self._size} "
                    "pixels; mark the object with 1, choose a larger one, or raise --size"
                )
        device = self.device
        encoding = self._segmenter.encode_support(
            torch.stack([image for image, _ in squares])[None].to(device),
            torch.stack([mask for _, mask in squares])[None].to(device),
            torch.tensor([whole], device=device),
        )
        self._keep(name, encoding)

    def _support_square(self, image: UInt8Array, marks: UInt8Array, is_mask: bool) -> tuple[Tensor, Tensor]:
        if is_mask:  # one that shows no object at this size is refused, not mended
            return self._squares.transform(image, marks, seed=0)
        return self._squares.transform.support(image, marks, is_mask=False)

    def _keep(self, name: str, encoding: SupportEncoding) -> None:
        if len(self._supports.keys() | {name}) >= IGNORE:
            raise DataError(f"a mask has room for {IGNORE - 1} classes; leave {name!r} out")
        self._supports[name] = encoding

    def remember_files(self, *supports: str) -> None:
        """Encode supports as `fewshot-seg predict --support` takes them; replaces earlier ones of the same classes.

        Args:
            supports: each ``PHOTO:MASK``, ``PHOTO:box=X0,Y0,X1,Y1``, ``PHOTO:point=X,Y``, ``PHOTO:scribble=FILE`` or
                ``PHOTO``, with ``NAME=`` of its class before it where there are several (else it is ``object``).

        Raises:
            DataError: none given, or as `support_photos.read_support` and `remember`.
        """
        if not supports:
            raise DataError("expected one or more supports, for example 'dog.jpg:dog_mask.png'")
        for name, shown in read_supports(supports).items():
            self.remember_supports(shown, name=name)

    def remember_supports(self, supports: Sequence[Support], *, name: str = UNNAMED) -> None:
        """As `remember`, of supports that were read from files."""
        self.remember(
            [one.photo for one in supports],
            [one.marks for one in supports],
            [one.kind == "mask" for one in supports],
            name=name,
        )

    def predict_file(self, path: str | Path) -> PhotoPrediction:
        """Segment a photo's file; one of more than `photos.WORKING_PIXELS` is worked on in a reduced copy.

        Raises:
            DataError: nothing was remembered; missing, undecodable or too large file.
        """
        photo = open_photo(user_path(path))
        found = self._predict(photo)
        if not photo.reduced:
            return found
        return PhotoPrediction(
            mask=enlarge_labels(found.mask, photo.shape),
            attention=_enlarge(found.attention, photo.shape),
            confidence=_enlarge(found.confidence, photo.shape),
        )

    def predict(self, image: UInt8Array) -> PhotoPrediction:
        """Segment one photo, uint8 (H, W, 3).

        Raises:
            DataError: nothing was remembered, or it is no such array.
        """
        if image.ndim != 3:
            raise DataError(f"expected a uint8 image (H, W, 3), got {image.dtype} {image.shape}")
        return self._predict(Photo(pixels=image, shape=(image.shape[0], image.shape[1])))

    @torch.no_grad()
    def _predict(self, photo: Photo) -> PhotoPrediction:
        shape = (photo.pixels.shape[0], photo.pixels.shape[1])
        margins, attention = self.coarse_maps(self.squares(photo.pixels))
        labels, best = compete(self.margins_of(self.with_tiles(photo, margins), shape))
        return PhotoPrediction(
            mask=labels.numpy(),
            attention=self.attention_of(attention, shape),
            confidence=best.sigmoid().numpy(),
        )

    @torch.no_grad()
    def coarse_maps(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        """All that the network says of one photo, before it is brought to the photo's size. From any thread.

        Args:
            squares: float32 (V, 3, S, S) of `squares`.

        Returns:
            Margins float (V, N, h, w) for `with_tiles`, and attention float (N, h', w') for `attention_of`, on the CPU.

        Raises:
            DataError: nothing was remembered.
        """
        maps = self._photo_maps(squares)
        first = maps.cells[:1]
        looked = [self._segmenter.attention_maps(one, first) for one in self._encodings()]
        return self._margins(maps), torch.cat(looked).cpu()

    def attention_of(self, maps: Tensor, shape: tuple[int, int]) -> FloatArray:
        """Attention of `coarse_maps` at a photo's size, float32 (H, W) in [0, 1]: the largest of all classes."""
        return np.asarray(torch.stack([self._attention(one[None], shape) for one in maps]).amax(dim=0).numpy())

    def _attention(self, maps: Tensor, shape: tuple[int, int]) -> Tensor:
        if self._fit == "squash":
            return scale_map(maps, shape)[0]
        return to_original(scale_map(maps, (self._size, self._size)), shape, self._fit)[0]

    def square(self, image: UInt8Array) -> Tensor:
        """A photo uint8 (H, W, 3) as the network reads it, float32 (3, S, S) on the CPU. From any thread."""
        return self._squares.transform.photo(image)

    def squares(self, image: UInt8Array) -> Tensor:
        """A photo in all its V views, float32 (V, 3, S, S) on the CPU: as it is, and mirrored if wanted."""
        views = [image, np.ascontiguousarray(image[:, ::-1])] if self._flip else [image]
        return torch.stack([self.square(view) for view in views])

    def _photo_maps(self, squares: Tensor) -> PhotoMaps:
        return self._segmenter.photo_maps(self._segmenter.backbone(squares.to(self.device)))

    def _margins(self, photos: PhotoMaps) -> Tensor:
        segmenter, margins = self._segmenter, []
        for encoding in self._encodings():
            support = encoding.expand(len(photos.cells))
            logits = segmenter.decoder(segmenter.priors_of(support, photos), photos.frozen, support.prototype)
            margins.append(logits - segmenter.threshold)
        return torch.stack(margins, dim=1).cpu()

    @torch.no_grad()
    def coarse_margins(self, squares: Tensor) -> Tensor:
        """How far the decoder's logits are above the threshold, at its own grid. From any thread.

        Args:
            squares: float32 (B, 3, S, S), any device; their features are computed once for all N classes.

        Returns:
            float (B, N, h, w) on the CPU; `margins_of` brings them to a photo's size.

        Raises:
            DataError: nothing was remembered.
        """
        return self._margins(self._photo_maps(squares))

    def with_tiles(self, photo: Photo, whole: Tensor) -> CoarseMargins:
        """The margins of a photo, float (V, N, h, w), with those of its tiles if wanted, which are computed here.

        A tile has as many pixels of the photo itself as asked for: less where a reduced copy is worked on.
        """
        guide = _guide(photo.pixels) if self._segmenter.guided else None
        if self._tile is None:
            return CoarseMargins(whole=whole, guide=guide)
        shape = (photo.pixels.shape[0], photo.pixels.shape[1])
        tiles, views = cut_tiles(shape, max(1, round(self._tile * photo.scale))), len(whole)
        together, parts = 1 if self.device.type == "cpu" else _GPU_TILES, list[Tensor]()
        for start in range(0, len(tiles), together):
            cut = [photo.pixels[tile.rows, tile.columns] for tile in tiles[start : start + together]]
            squares = torch.cat([self.squares(np.ascontiguousarray(pixels)) for pixels in cut])
            margins = self.coarse_margins(squares)
            parts.extend(margins.reshape(len(cut), views, *margins.shape[1:]))
        return CoarseMargins(whole=whole, parts=tuple(parts), tiles=tiles, guide=guide)

    def margins_of(self, coarse: CoarseMargins, shape: tuple[int, int]) -> Iterator[Tensor]:
        """Margins at a photo's size (H, W), float (H, W) of one class after another; see the class for the rule."""
        for number in range(coarse.whole.shape[1]):
            margin = self._mean_of_views(coarse.whole[:, number], shape)
            if coarse.tiles:
                each = (
                    self._mean_of_views(part[:, number], (tile.height, tile.width))
                    for part, tile in zip(coarse.parts, coarse.tiles, strict=True)
                )
                margin = (margin + blend_tiles(each, coarse.tiles, shape)) / 2
            yield margin if coarse.guide is None else _led(margin, coarse)

    def _mean_of_views(self, views: Tensor, shape: tuple[int, int]) -> Tensor:
        margin = self._enlarged(views[0], shape)
        return margin if len(views) == 1 else (margin + self._enlarged(views[1], shape).flip(-1)) / 2

    def _enlarged(self, coarse: Tensor, shape: tuple[int, int]) -> Tensor:
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
    def classes(self) -> tuple[str, ...]:
        """Names of what is remembered; the first one is 1 in masks."""
        return tuple(self._supports)

    def _encodings(self) -> tuple[SupportEncoding, ...]:
        if not self._supports:
            raise DataError("no support to go by; call remember(images, masks) or load_support(path) first")
        return tuple(self._supports.values())

    def save_support(self, path: Path, names: Sequence[str] = ()) -> None:
        """Write what is remembered of one class; `names` of its photos are noted.

        Raises:
            DataError: as `support_files.save_support`; nothing, or more than one class, is remembered.
        """
        encodings = self._encodings()
        if len(encodings) > 1:
            raise DataError(
                f"a support file holds one class, and these are remembered: {', '.join(self.classes)}; save each by "
                "itself, then give NAME=FILE of all to --support-set"
            )
        save_support(path, encodings[0], self._segmenter, resolution=self._size, fit=self._fit, names=names)

    def load_support(self, path: Path, *, name: str = UNNAMED) -> tuple[str, ...]:
        """Remember for a class what `save_support` wrote instead of encoding photos; returns the names that were noted.

        Raises:
            DataError: missing, damaged or foreign file, or one of another model, resolution or fit.
        """
        saved = load_support(path, self._segmenter, resolution=self._size, fit=self._fit)
        self._keep(name, saved.encoding)
        return saved.names


_GUIDE_SIDE = 2048
"""Edges are followed at most at this size: coefficients and photo need 30 bytes a pixel."""


def _guide(pixels: UInt8Array) -> Tensor:
    """uint8 (H, W, 3) -> float (1, 3, h, w) in [0, 1], reduced where it is very large."""
    height, width = pixels.shape[:2]
    scale = min(1.0, _GUIDE_SIDE / max(height, width))
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]


def _led(margin: Tensor, coarse: CoarseMargins) -> Tensor:
    """A margin float (H, W) that follows the edges of its photo."""
    assert coarse.guide is not None
    size, cells = (coarse.guide.shape[2], coarse.guide.shape[3]), coarse.whole.shape[2:]
    # with tiles the margin is as fine as those are: their part of the photo takes as many cells as the whole photo does
    finer = min(margin.shape[0] / tile.height for tile in coarse.tiles) if coarse.tiles else 1.0
    working = (round(cells[0] * PIXELS_PER_CELL * finer), round(cells[1] * PIXELS_PER_CELL * finer))
    reduced = margin[None, None]
    if margin.shape != size:
        reduced = F.interpolate(reduced, size, mode="bilinear", align_corners=False)
    led = guided_margins(reduced[0], coarse.guide, working)[None]
    if margin.shape != size:
        led = F.interpolate(led, margin.shape, mode="bilinear", align_corners=False)
    return led[0, 0]


def enlarge_labels(labels: UInt8Array, shape: tuple[int, int]) -> UInt8Array:
    """A label map uint8 (h, w) of a reduced copy at the photo's own (H, W): the nearest pixels."""
    return np.asarray(cv2.resize(labels, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)


def _enlarge(values: FloatArray, shape: tuple[int, int]) -> FloatArray:
    return np.asarray(cv2.resize(values, shape[::-1], interpolation=cv2.INTER_LINEAR))
