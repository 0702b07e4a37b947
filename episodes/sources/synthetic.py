"""A data set without files: textured shapes on cluttered backgrounds, drawn from a seed on request."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from episodes.sources.shapes import OUTLINES, Outline, coverage
from episodes.sources.textures import TEXTURES, cloth, colour
from episodes.types import DataError, UInt8Array

_VERSION = 1  # of the drawing: raise it when pictures change, so that caches notice
_ID = re.compile(r"(train|val)-(\d{3})-(\d{4})")
_LOOKS = [(shape, texture) for texture in TEXTURES for shape in OUTLINES]
_GOLDEN = 0.618034


@dataclass(frozen=True, slots=True)
class _Thing:
    """One object of a scene: what it is and where; colours and texture follow from `seed`."""

    class_id: int
    outline: Outline
    matrix: npt.NDArray[np.float64]
    centre: npt.NDArray[np.float64]
    radius: float
    seed: int


@dataclass(frozen=True)
class SyntheticSource:
    """Textured shapes composed on cluttered textured backgrounds, generated from a seed.

    A class is a pair of shape and texture with its own two colours ("striped star"); colours, size, rotation,
    stretch and place vary from image to image. Every image shows its main object on 6 to 22 % of the picture
    and one or two objects of other classes *of the same split*. Split ``train`` holds the base classes (ids
    1..base_classes), split ``val`` the novel ones (the ids that follow): no novel class is ever seen in
    ``train``.

    Args:
        seed: everything follows from it.
        base_classes: number of classes in ``train``.
        novel_classes: number of classes in ``val``.
        images_per_class: images per class in which it is the main object.
        size: side of the square pictures in pixels, at least 32.

    Raises:
        DataError: a count below its minimum, or more classes than there are looks.
    """

    seed: int = 0
    base_classes: int = 24
    novel_classes: int = 8
    images_per_class: int = 24
    size: int = 192

    def __post_init__(self) -> None:
        for field, low in (
            ("seed", 0),
            ("base_classes", 2),
            ("novel_classes", 2),
            ("images_per_class", 2),
            ("size", 32),
        ):
            if getattr(self, field) < low:
                raise DataError(f"synthetic source: {field} must be at least {low}, got {getattr(self, field)}")
        if self.base_classes + self.novel_classes > len(_LOOKS):
            raise DataError(
                f"synthetic source: at most {len(_LOOKS)} classes can be told apart, got "
                f"{self.base_classes} base + {self.novel_classes} novel; ask for fewer"
            )

    @property
    def name(self) -> str:
        """``synthetic``."""
        return "synthetic"

    @property
    def default_splits(self) -> tuple[str, str]:
        """``train`` and ``val``."""
        return "train", "val"

    @property
    def folds(self) -> None:
        """None: each split has classes of its own."""
        return None

    @property
    def class_names(self) -> Mapping[int, str]:
        """Class id -> texture and shape, for example ``striped star``; base classes first."""
        order = np.random.default_rng([self.seed, 1]).permutation(len(_LOOKS))
        count = self.base_classes + self.novel_classes
        return {class_id: " ".join(reversed(_LOOKS[look])) for class_id, look in enumerate(order[:count], start=1)}

    @property
    def base_class_ids(self) -> tuple[int, ...]:
        """Classes of split ``train``."""
        return tuple(range(1, self.base_classes + 1))

    @property
    def novel_class_ids(self) -> tuple[int, ...]:
        """Classes of split ``val``."""
        return tuple(range(self.base_classes + 1, self.base_classes + self.novel_classes + 1))

    def split_classes(self, split: str) -> tuple[int, ...]:
        """Classes that a split shows. Raises DataError for an unknown split."""
        if split not in ("train", "val"):
            raise DataError(f"synthetic source: no split {split!r}; it has train (base) and val (novel)")
        return self.base_class_ids if split == "train" else self.novel_class_ids

    def ids(self, split: str) -> tuple[str, ...]:
        """Ids like ``train-003-0012``: split, main class, number."""
        return tuple(
            f"{split}-{class_id:03d}-{number:04d}"
            for number in range(self.images_per_class)
            for class_id in self.split_classes(split)
        )

    def image(self, image_id: str) -> UInt8Array:
        """RGB image, uint8 (size, size, 3)."""
        things, background_seed = self._scene(image_id)
        random = np.random.default_rng(background_seed)
        picture = _scatter(cloth(self.size, random), random)
        for thing in things:
            self._paint(picture, thing)
        return np.asarray(np.clip(picture, 0, 255), dtype=np.uint8)

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        """uint8 (size, size): 1 where the class is seen, 0 elsewhere; nothing is ignored."""
        if class_id not in self.class_names:
            raise DataError(f"synthetic source: no class {class_id}; it has 1..{len(self.class_names)}")
        return np.asarray(self._labels(image_id) == class_id, dtype=np.uint8)

    def class_areas(self, image_id: str) -> Mapping[int, int]:
        """Class id -> pixels seen, ascending."""
        labels, counts = np.unique(self._labels(image_id), return_counts=True)
        return {int(label): int(count) for label, count in zip(labels, counts, strict=True) if label}

    def class_masks(self, image_id: str) -> Mapping[int, UInt8Array]:
        """Class id -> mask of what is seen of it, ascending."""
        labels = self._labels(image_id)
        return {int(label): np.asarray(labels == label, dtype=np.uint8) for label in np.unique(labels) if label}

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        """Hex digest of the parameters and ids: equal parameters give equal pictures."""
        return hashlib.sha256("\n".join([f"{_VERSION} {self!r}", *image_ids]).encode()).hexdigest()

    def _labels(self, image_id: str) -> UInt8Array:
        labels = np.zeros((self.size, self.size), dtype=np.uint8)
        for thing in self._scene(image_id)[0]:
            window, covered = coverage(thing.outline, thing.matrix, thing.centre, self.size)
            labels[window][covered >= 128] = thing.class_id
        return labels

    def _scene(self, image_id: str) -> tuple[list[_Thing], int]:
        """Objects from back to front, the main one last, and the seed of the background."""
        match = _ID.fullmatch(image_id)
        split, main, number = (match[1], int(match[2]), int(match[3])) if match else ("train", 0, 0)
        classes = self.split_classes(split)
        if main not in classes or number >= self.images_per_class:
            raise DataError(f"synthetic source: no image {image_id!r}; ids look like {self.ids(split)[0]}")
        random = np.random.default_rng([self.seed, 2, main, number])
        names = self.class_names
        things = [self._place(main, names, random.uniform(0.06, 0.22), random)]
        others = [class_id for class_id in classes if class_id != main]
        count = min(int(random.integers(1, 3)), len(others))
        for other in random.choice(others, size=count, replace=False):
            for _ in range(12):  # look for room; a scene too full goes without
                thing = self._place(int(other), names, random.uniform(0.04, 0.11), random)
                if all(_apart(thing, placed) for placed in things):
                    things.append(thing)
                    break
        return things[::-1], int(random.integers(2**31))

    def _place(self, class_id: int, names: Mapping[int, str], share: float, random: np.random.Generator) -> _Thing:
        outline = OUTLINES[names[class_id].split()[1]]
        radius = float(np.sqrt(share * self.size**2 / outline.area))
        angle = random.uniform(-np.pi, np.pi) if random.uniform() < 0.3 else random.normal(0, 0.35)
        stretch = np.exp(random.normal(0, 0.1))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        margin = min(0.9 * radius, 0.5 * self.size)
        return _Thing(
            class_id=class_id,
            outline=outline,
            matrix=radius * turn @ np.diag([stretch, 1 / stretch]),
            centre=random.uniform(margin, self.size - margin, 2),
            radius=radius,
            seed=int(random.integers(2**31)),
        )

    def _paint(self, picture: npt.NDArray[np.float32], thing: _Thing) -> None:
        """Draw an object with its shadow into `picture`, float32 (size, size, 3), in place."""
        room = self.size // 16  # for the shadow
        window, covered = coverage(thing.outline, thing.matrix, thing.centre, self.size, room)
        behind = Image.fromarray(np.roll(covered, (self.size // 48, self.size // 64), axis=(0, 1)))
        shadow = np.asarray(behind.filter(ImageFilter.GaussianBlur(self.size / 64)), dtype=np.float32) / 255
        alpha = (covered.astype(np.float32) / 255)[..., None]
        left, top = window[1].start + 0.5 - thing.centre[0], window[0].start + 0.5 - thing.centre[1]
        x = np.arange(covered.shape[1], dtype=np.float32)[None, :] + np.float32(left)
        y = np.arange(covered.shape[0], dtype=np.float32)[:, None] + np.float32(top)
        under = picture[window] * (1 - 0.45 * shadow[..., None])
        picture[window] = under + alpha * (self._surface(thing, x, y) - under)

    def _surface(
        self, thing: _Thing, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Textured, lit colours at offsets x (1, w) and y (h, 1) from the object's centre: (h, w, 3)."""
        random = np.random.default_rng(thing.seed)
        inverse = np.linalg.inv(thing.matrix).astype(np.float32)
        u, v = inverse[0, 0] * x + inverse[0, 1] * y, inverse[1, 0] * x + inverse[1, 1] * y
        mix = TEXTURES[self.class_names[thing.class_id].split()[0]](u, v, random)[..., None]
        hue = _GOLDEN * thing.class_id + random.normal(0, 0.025)
        first = colour(hue, random.uniform(0.65, 0.95), random.uniform(0.75, 1.0))
        second = colour(hue + 0.4, random.uniform(0.4, 0.8), random.uniform(0.2, 0.45))
        light = (1.0 - 0.16 * (x + y) / np.float32(thing.radius)).clip(0.6, 1.25)[..., None]
        lit: npt.NDArray[np.float32] = (second + (first - second) * mix) * light
        return lit


def _apart(one: _Thing, other: _Thing) -> bool:
    """Whether two objects overlap little at most (their circles share under a quarter of the radii)."""
    return float(np.hypot(*(one.centre - other.centre))) > 0.8 * (one.radius + other.radius)


def _scatter(picture: npt.NDArray[np.float32], random: np.random.Generator) -> npt.NDArray[np.float32]:
    """Clutter: pale lines and blots that belong to no class."""
    size = picture.shape[0]
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(int(random.integers(10, 24))):
        red, green, blue = (int(c) for c in colour(random.uniform(), 0.35, random.uniform(0.2, 0.95)))
        x0, y0 = random.uniform(-0.1, 1.0, 2) * size
        x1, y1 = np.array([x0, y0]) + random.uniform(0.02, 0.22, 2) * size
        ink = (red, green, blue, int(random.integers(50, 140)))
        if random.uniform() < 0.5:
            draw.ellipse((x0, y0, x1, y1), fill=ink)
        else:
            draw.line((x0, y1 if random.uniform() < 0.5 else y0, x1, y0), fill=ink, width=max(1, size // 64))
    return np.array(image, dtype=np.float32)
