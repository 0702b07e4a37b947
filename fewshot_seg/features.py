"""Frozen features and masks of images, computed once and reused by every epoch and episode.

The backbone is frozen, so the only unavoidable cost is one forward pass per image. Features are kept in half
precision, one memory-mapped safetensors file per image, under a byte budget (least recently used goes first). Files
are named by the photo's content, so that copied or touched photos keep their features; each carries a checksum. They
are written beside and renamed: any number of processes may share a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from episodes.annotations import annotation_of
from episodes.augment import EpisodeTransform
from episodes.files import read_bytes, require_file
from episodes.progress import tqdm
from episodes.protocols import Fit
from episodes.sources import JointSource
from episodes.types import DataError, MaskSource, PhotoFiles, PhotoSource, SupportKind
from fewshot_seg.backbones import Backbone
from fewshot_seg.runtime import write_safetensors

DEFAULT_BYTE_BUDGET = 4 * 2**30

_CHECKSUM = "crc32"
_RECOUNT_SHARE = 0.05
"""After writing this share of the budget a store counts the folder again: others may have written to it, too."""

_RECENT_BYTES = 64 * 2**20
"""Of masks that a `MaskStore` keeps uncompressed."""

_FEATURE_FILE = re.compile(r"[0-9a-f]{16}-\d+(-bfloat16)?(-pad)?/[0-9a-f]{32}\.safetensors")


class FeatureStore:
    """Features of a source's images from one backbone at one square size.

    Args:
        backbone: frozen; its fingerprint names the folder, so that other weights never share features.
        source: images.
        size: side in pixels of the square that images are fitted into.
        fit: how, see `EpisodeTransform`.
        directory: where files go, in a folder per backbone and size; None keeps everything in memory.
        byte_budget: bytes to keep at most in the directory, features of other backbones and sizes included. Stores
            that run at the same time see each other's files now and then: each may go over by a twentieth of it.
        batch_size: images per forward pass, kept as an attribute; by default 8 on a GPU, and 1 on a CPU, where larger
            batches leave its cache and take twice as long an image (scripts/bench_evaluation.py, section limit).

    Raises:
        DataError: the budget is smaller than one image's features.
    """

    def __init__(
        self,
        backbone: Backbone,
        source: PhotoSource,
        *,
        size: int,
        directory: Path | None,
        fit: Fit = "squash",
        byte_budget: int = DEFAULT_BYTE_BUDGET,
        batch_size: int | None = None,
    ) -> None:
        self._backbone, self._source = backbone, source
        on_cpu = next(backbone.parameters()).device.type == "cpu"
        self.batch_size = batch_size or (1 if on_cpu else 8)
        self._transform = EpisodeTransform("none", size, fit)
        self._shapes = [(c, *grid) for c, grid in zip(backbone.channels, backbone.grids(size, size), strict=True)]
        empty = {f"level{i}": torch.zeros(shape).half() for i, shape in enumerate(self._shapes)}
        one_file = save(empty, metadata={_CHECKSUM: "0" * 8})
        self._bytes_per_image, self._byte_budget = len(one_file), byte_budget
        if byte_budget < self._bytes_per_image:
            raise DataError(
                f"feature cache of {byte_budget} bytes cannot hold one image ({self._bytes_per_image} bytes); "
                "raise --cache-gigabytes"
            )
        rounded = "" if backbone.precision == torch.float32 else f"-{backbone.precision}".replace("torch.", "")
        name = f"{backbone.fingerprint[:16]}-{size}{rounded}" + ("" if fit == "squash" else f"-{fit}")
        self._folder = None if directory is None else directory / name
        self._memory: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()
        self._names: dict[str, str] = {}
        self._checked: set[str] = set()
        self._directory = directory
        self._count_files()

    @property
    def on_disk(self) -> bool:
        """Whether others may share what is kept."""
        return self._directory is not None

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self._shapes)

    def get(self, image_ids: Sequence[str]) -> tuple[Tensor, ...]:
        """One float32 (N, C, h, w) per level; computes what is missing. Equal from cache and freshly computed."""
        unique = list(dict.fromkeys(image_ids))
        found = {image_id: levels for image_id in unique if (levels := self._load(image_id)) is not None}
        missing = [i for i in unique if i not in found]
        for start in range(0, len(missing), self.batch_size):
            found.update(self._compute(missing[start : start + self.batch_size]))
        per_image = [found[image_id] for image_id in image_ids]
        return tuple(torch.stack(level).float() for level in zip(*per_image, strict=True))

    def ensure(self, image_ids: Sequence[str], *, show_progress: bool = False) -> None:
        """Compute and keep what is missing, with progress and time left; can be interrupted and repeated."""
        missing = [i for i in dict.fromkeys(image_ids) if not self._has(i)]
        bar = tqdm(total=len(missing), desc="features", unit="image", disable=not show_progress or not missing)
        with bar:
            for start in range(0, len(missing), self.batch_size):
                bar.update(len(self._compute(missing[start : start + self.batch_size])))

    def _name(self, image_id: str) -> str:
        if image_id not in self._names:  # one look at the file system per image and run
            self._names[image_id] = content_name(self._source, image_id)
        return self._names[image_id]

    def _path(self, image_id: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{self._name(image_id)}.safetensors"

    def _has(self, image_id: str) -> bool:
        path = self._path(image_id)
        return self._name(image_id) in self._memory if path is None else path.is_file()

    def _load(self, image_id: str) -> tuple[Tensor, ...] | None:
        path = self._path(image_id)
        if path is None:
            name = self._name(image_id)
            if name in self._memory:
                self._memory.move_to_end(name)
            return self._memory.get(name)
        try:
            levels = self._read(path)
        except FileNotFoundError:
            return None
        except Exception as error:  # of safetensors, of the file system, of types that torch lacks
            warnings.warn(f"damaged feature file {path} ({error}); computing it anew", stacklevel=3)
            return None
        self._touch(path)
        return levels

    def _read(self, path: Path) -> tuple[Tensor, ...]:
        """Memory-mapped levels. Raises ValueError when they are not what was written."""
        require_file(path)
        with safe_open(path, "pt") as file:
            if set(file.keys()) != {f"level{i}" for i in range(len(self._shapes))}:
                raise ValueError("it holds other tensors")
            levels = tuple(file.get_tensor(f"level{i}") for i in range(len(self._shapes)))
            written = (file.metadata() or {}).get(_CHECKSUM)
        if [tuple(level.shape) for level in levels] != self._shapes or any(
            level.dtype != torch.float16 for level in levels
        ):
            raise ValueError("it holds other shapes or types")
        if path.name not in self._checked:  # once per run: reading every byte costs as much as using them
            if written != _checksum(levels):
                raise ValueError("its checksum is wrong")
            if not all(bool(level.isfinite().all()) for level in levels):
                raise ValueError("it holds numbers that are not finite")
            self._checked.add(path.name)
        return levels

    @torch.no_grad()
    def _compute(self, image_ids: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
        images = []
        for image_id in image_ids:
            name = self._name(image_id)
            images.append(self._transform.photo(self._source.image(image_id)))
            if content_name(self._source, image_id) != name:  # else its features would go by another photo's name
                raise DataError(f"photo {image_id} was changed while it was read; leave it as it is and run again")
        device = next(self._backbone.parameters()).device
        levels = [level.half().cpu() for level in self._backbone(torch.stack(images).to(device))]
        # clone: a view would keep the whole batch in memory
        computed = {i: tuple(level[n].clone() for level in levels) for n, i in enumerate(image_ids)}
        for image_id, maps in computed.items():
            if not all(bool(level.isfinite().all()) for level in maps):
                raise DataError(
                    f"backbone {self._backbone.name} gives features of {image_id!r} that are not finite in half "
                    "precision; choose another backbone, or other weights"
                )
            self._keep(image_id, maps)
        return computed

    def _keep(self, image_id: str, maps: tuple[Tensor, ...]) -> None:
        path = self._path(image_id)
        if path is None:
            self._memory[self._name(image_id)] = maps
            while len(self._memory) * self._bytes_per_image > self._byte_budget:
                self._memory.popitem(last=False)
            return
        tensors = {f"level{i}": level.contiguous() for i, level in enumerate(maps)}
        write_safetensors(path, tensors, {_CHECKSUM: _checksum(maps)})
        self._touch(path)
        self._bytes_written += self._bytes_per_image
        if self._bytes_written > _RECOUNT_SHARE * self._byte_budget:
            self._count_files()
        while self._bytes_kept > self._byte_budget:
            oldest, size = self._kept.popitem(last=False)
            self._bytes_kept -= size
            oldest.unlink(missing_ok=True)

    def _count_files(self) -> None:
        """What lies in the directory now, least recently used first."""
        self._kept: OrderedDict[Path, int] = OrderedDict()
        if self._directory is not None:
            self._kept = _feature_files(self._directory)
        self._bytes_kept, self._bytes_written = sum(self._kept.values()), 0

    def _touch(self, path: Path) -> None:
        self._bytes_kept += self._bytes_per_image - self._kept.pop(path, 0)
        self._kept[path] = self._bytes_per_image  # now the most recently used
        if self._bytes_kept * 10 > self._byte_budget * 9:  # near the budget, other runs need to see what is in use
            with contextlib.suppress(OSError):  # another run has just evicted it
                os.utime(path)


def content_name(source: PhotoSource, image_id: str) -> str:
    """32 hex digits that change when the photo changes: of its file's bytes, or of what the source says of it.

    A photo of a joint source goes by the name that it has in its own data set: both share its features.

    Raises:
        SourceError: no such photo.
    """
    if isinstance(source, JointSource):
        return content_name(*source.origin(image_id))
    digest = hashlib.sha256(f"{type(source).__name__}\0".encode())  # sources may turn a photo differently
    content = None
    if isinstance(source, PhotoFiles):
        with contextlib.suppress(OSError):
            content = read_bytes(source.image_file(image_id))
    if content is None:
        content = f"{image_id}\0{source.fingerprint([image_id])}".encode()
    digest.update(content)
    return digest.hexdigest()[:32]


def _checksum(levels: Sequence[Tensor]) -> str:
    value = 0
    for level in levels:
        value = zlib.crc32(level.contiguous().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _feature_files(directory: Path) -> OrderedDict[Path, int]:
    """Feature files and their bytes, least recently used first; nothing else that lies in the directory."""
    found = []
    with contextlib.suppress(FileNotFoundError):  # somebody is deleting the cache
        for file in directory.glob("*/*.safetensors"):
            if _FEATURE_FILE.fullmatch(file.relative_to(directory).as_posix()):
                with contextlib.suppress(OSError):  # another run has just evicted it
                    status = file.stat()
                    found.append((status.st_mtime_ns, file, status.st_size))
    return OrderedDict((file, size) for _, file, size in sorted(found))


class MaskStore:
    """Masks and weaker annotations of (image, class) pairs at one square size, kept compressed (about 1 kB each).

    Those used last are kept as they are, too (64 MB).

    Args:
        source: masks, and drawn annotations if it has any; kept as an attribute.
        size, fit: as of the `FeatureStore`.
    """

    def __init__(self, source: MaskSource, *, size: int, fit: Fit = "squash") -> None:
        self.source, self._size = source, size
        self._transform = EpisodeTransform("none", size, fit)
        self._kept: dict[tuple[str, int, SupportKind], bytes] = {}
        self._recent: OrderedDict[tuple[str, int, SupportKind], Tensor] = OrderedDict()

    def get(
        self, image_ids: Sequence[str], class_ids: Sequence[int], kinds: Sequence[SupportKind] | None = None
    ) -> Tensor:
        """uint8 (N, S, S): masks, or the annotations of `kinds` (see `episodes.annotations`), 254 beside the photo.

        What is smaller than a pixel of the square keeps one.
        """
        masks: Sequence[SupportKind] = ["mask"] * len(image_ids)
        chosen = masks if kinds is None else kinds
        return torch.stack([self._one(*key) for key in zip(image_ids, class_ids, chosen, strict=True)])

    def _one(self, image_id: str, class_id: int, kind: SupportKind) -> Tensor:
        key = (image_id, class_id, kind)
        if key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key]
        if key not in self._kept:
            mask = annotation_of(self.source, image_id, class_id, kind)
            placeholder = np.zeros((*mask.shape, 3), np.uint8)  # the transform moves image and mask together
            resized = self._transform.support(placeholder, mask, is_mask=kind == "mask")[1]
            self._kept[key] = zlib.compress(resized.numpy().tobytes(), level=1)
        values = np.frombuffer(bytearray(zlib.decompress(self._kept[key])), np.uint8)
        self._recent[key] = torch.from_numpy(values.reshape(self._size, self._size))
        while len(self._recent) * self._size**2 > _RECENT_BYTES and len(self._recent) > 1:
            self._recent.popitem(last=False)
        return self._recent[key]
