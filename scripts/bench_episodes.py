"""Time and memory of the index and of episode drawing, on masks made for the purpose.

    python scripts/bench_episodes.py
    python scripts/bench_episodes.py --masks 300 --specs 2000   # a quick try

Makes --masks palette PNGs of VOC's usual size (500 x 375, a few objects with a ring of 255) in VOC's layout in a
temporary folder; the photos are hard links of one tiny JPEG. Prints how long the index takes cold (no stored index;
the files have just been written, so the disk is not what is measured) with one worker and with two, how long warm,
how much memory each takes, and how long --specs episode specs take for each way of drawing queries, from a source
whose photos cannot be read. Every figure comes from a fresh process.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:  # see `measure`
    from episodes.protocols import QueryDraw

_WIDTH, _HEIGHT = 500, 375
_DIFFERENT = 400
"""Different masks that are drawn; further files repeat their bytes under another name."""
_DRAWS = ("list", "random", "image", "class")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=int, default=12_000, help="number of masks")
    parser.add_argument("--specs", type=int, default=1_000_000, help="episode specs for each way of drawing")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's place)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(measure(**json.loads(arguments.child))))
        return
    if arguments.masks < 100 or arguments.specs < 1:
        parser.error("--masks must be at least 100 (episodes need two images of each class), --specs at least 1")
    with tempfile.TemporaryDirectory(prefix="bench-episodes-", dir=arguments.folder) as folder:
        root = Path(folder) / "VOC2012"
        started = time.perf_counter()
        write_masks(root, arguments.masks)
        print(f"{arguments.masks} masks of {_WIDTH}x{_HEIGHT} made in {time.perf_counter() - started:.1f} s")
        report(root, Path(folder), arguments.specs)


def report(root: Path, folder: Path, specs: int) -> None:
    """Print one line per measurement."""
    one = in_child(what="index", root=str(root), cache=str(folder / "one"), workers=1)
    two = in_child(what="index", root=str(root), cache=str(folder / "two"), workers=2)
    warm = in_child(what="index", root=str(root), cache=str(folder / "two"), workers=2)
    for name, found in (("cold, 1 worker", one), ("cold, 2 workers", two), ("warm", warm)):
        print(f"index {name:<16} {found['seconds']:7.2f} s, memory +{found['megabytes']:.0f} MB")
    print(f"index cold, 2 workers instead of 1: {one['seconds'] / two['seconds']:.2f} times as fast")
    for draw in _DRAWS:
        found = in_child(what="draw", root=str(root), cache=str(folder / "two"), draw=draw, count=specs)
        print(
            f"{found['count']} specs, query draw {draw:<7} {found['seconds']:7.2f} s "
            f"({1e6 * found['seconds'] / found['count']:.1f} µs each), no photo read"
        )


def write_masks(root: Path, count: int) -> None:
    """`count` masks and photos as split ``trainaug`` of a VOC2012 folder."""
    photos, masks, lists = (root / name for name in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"))
    for folder in (photos, masks, lists):
        folder.mkdir(parents=True)
    contents = [mask_bytes(number) for number in range(min(count, _DIFFERENT))]
    names = [f"2012_{number:06d}" for number in range(count)]
    Image.new("RGB", (2, 2)).save(photos / f"{names[0]}.jpg")
    for number, name in enumerate(names):
        (masks / f"{name}.png").write_bytes(contents[number % len(contents)])
        if number:
            os.link(photos / f"{names[0]}.jpg", photos / f"{name}.jpg")
    (lists / "trainaug.txt").write_text("\n".join(names) + "\n")


def mask_bytes(number: int) -> bytes:
    """A palette PNG with one to four objects of one to three classes, each with a border of 255, as VOC's."""
    random = np.random.default_rng([0, number])
    mask = Image.new("P", (_WIDTH, _HEIGHT), 0)
    mask.putpalette(random.integers(0, 256, 768).astype(np.uint8).tobytes())
    ink = ImageDraw.Draw(mask)
    classes = [1 + number % 20, *random.integers(1, 21, int(random.integers(0, 3))).tolist()]
    for _ in range(int(random.integers(1, 5))):
        angles = np.sort(random.uniform(0, 2 * np.pi, 24))
        radius = random.uniform(25, 140) * random.uniform(0.7, 1.0, 24)
        middle = random.uniform(0.1, 0.9, 2) * (_WIDTH, _HEIGHT)
        outline = np.stack([middle[0] + radius * np.cos(angles), middle[1] + radius * np.sin(angles)], axis=1)
        corners = [(float(x), float(y)) for x, y in outline]
        ink.polygon(corners, fill=int(random.choice(classes)))
        ink.line([*corners, corners[0]], fill=255, width=5)
    encoded = io.BytesIO()
    mask.save(encoded, "PNG")
    return encoded.getvalue()


def in_child(**task: Any) -> dict[str, Any]:
    """`measure` in a fresh interpreter, so that no measurement finds what another left in memory."""
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(
    *, what: str, root: str, cache: str, workers: int = 1, draw: QueryDraw = "list", count: int = 1
) -> dict[str, Any]:
    """Seconds and growth of the peak memory of one task."""
    # Imported here: the parent stays small, for a child's peak starts at its parent's on some systems.
    from episodes.index import build_index
    from episodes.protocols import custom_protocol, list_pairs
    from episodes.sampler import EpisodeSampler
    from episodes.sources import VocSource

    class NoPhotos(VocSource):
        def image(self, image_id: str) -> Any:
            raise RuntimeError(f"photo {image_id} was read")

    source = NoPhotos(Path(root))
    if what == "index":
        before, started = _resident(), time.perf_counter()
        index = build_index(source, "trainaug", cache_dir=Path(cache), workers=workers)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
        return {"seconds": seconds, "megabytes": (peak - before) / 1e6, "count": len(index.image_ids)}
    index = build_index(source, "trainaug", cache_dir=Path(cache))
    pairs = list_pairs(custom_protocol(), index, index.class_ids)
    started = time.perf_counter()
    sampler = EpisodeSampler(pairs, shots=1, seed=0, length=count, order=draw, repeat_supports=False)
    drawn = sum(1 for _ in sampler)
    return {"seconds": time.perf_counter() - started, "count": drawn}


_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def _resident() -> int:
    """Bytes in memory now, where the system tells; else the peak so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
