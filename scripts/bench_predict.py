"""Cold prediction on a folder against the least it could cost: decoding and the bare backbone forward.

    python scripts/bench_predict.py
    python scripts/bench_predict.py ../shared/data/VOCdevkit/VOC2012/JPEGImages --model runs/voc/model.safetensors
    python scripts/bench_predict.py --counts 8 16 --repeats 1 --size 128   # a quick try

Both sides run in one process, in turn, on the same photos, with the same threads and batch size:

- bare: read the photo, make it square, backbone forward; what comes out is dropped.
- predict: `predict_folder`, from files to written masks and overlays; the supports are encoded before.

Prints the ratio first: the median over repeats, and all of them, since a machine that does other things as well is
never quiet. Then seconds per photo and peak memory for growing numbers of photos, each in a fresh process, and what a
saved support set spares at the start.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

_WIDTH, _HEIGHT = 500, 375
_SHOTS = 5
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of photos (default: photos made for the purpose)")
    parser.add_argument("--model", help="model.safetensors (default: a decoder of the usual size, untrained)")
    parser.add_argument("--counts", type=int, nargs="+", default=[50, 100, 200], help="numbers of photos, ascending")
    parser.add_argument("--repeats", type=int, default=5, help="of the ratio, on the smallest number of photos")
    parser.add_argument("--size", type=int, help="side of the square (default: the model's, else 400)")
    parser.add_argument("--batch-size", type=int, default=1, help="photos at a time, for both sides")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(measure(**json.loads(arguments.child))))
        return
    if min(arguments.counts) < 1 or arguments.repeats < 1 or arguments.batch_size < 1:
        parser.error("--counts, --repeats and --batch-size must be at least 1")
    with tempfile.TemporaryDirectory(prefix="bench-predict-") as temporary:
        made = Path(temporary) / "photos"
        if arguments.folder is None:
            write_photos(made, max(arguments.counts))
        task = {
            "photos": str(arguments.folder or made),
            "out": str(Path(temporary) / "out"),
            "model": arguments.model,
            "size": arguments.size,
            "batch_size": arguments.batch_size,
        }
        report(task, sorted(arguments.counts), arguments.repeats)


def report(task: dict[str, Any], counts: list[int], repeats: int) -> None:
    """Print the ratios, then the table."""
    found = in_child(**task, what="ratio", count=counts[0], repeats=repeats)
    ratios = [whole / bare for whole, bare in zip(found["predict"], found["bare"], strict=True)]
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"predict costs {statistics.median(ratios):.2f} times the bare backbone and decoding (each: {each})")
    cpu = statistics.median(found["predict_cpu"]) / statistics.median(found["bare_cpu"])
    print(f"the same in processor time, whoever else uses the machine: {cpu:.2f} times")
    for side in ("bare", "predict"):
        each_ms, each_cpu = (1000 * statistics.median(found[name]) / found["count"] for name in (side, f"{side}_cpu"))
        print(f"  {side:<8} {each_ms:7.1f} ms per photo, {each_cpu:7.1f} ms of processor time")
    for count in counts:
        alone = in_child(**task, what="folder", count=count)
        print(
            f"{alone['count']:5d} photos {alone['seconds']:7.2f} s, {1000 * alone['seconds'] / alone['count']:6.1f} ms "
            f"each, peak memory {alone['megabytes']:.0f} MB",
            flush=True,
        )
    start = in_child(**task, what="start", count=_SHOTS)
    print(
        f"{start['count']} supports from a file {1000 * start['loaded']:.0f} ms, from photos "
        f"{1000 * start['encoded']:.0f} ms: {start['encoded'] / start['loaded']:.1f} times as long"
    )


def write_photos(folder: Path, count: int) -> None:
    """`count` JPEGs of noise and discs, about as large as photos of this size."""
    folder.mkdir(parents=True)
    for number in range(count):
        random = np.random.default_rng([0, number])
        coarse = random.integers(0, 256, (_HEIGHT // 8, _WIDTH // 8, 3)).astype(np.uint8)
        picture = Image.fromarray(coarse).resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC)
        ink = ImageDraw.Draw(picture)
        for _ in range(4):
            x, y, radius = (int(random.integers(20, most)) for most in (_WIDTH, _HEIGHT, 120))
            colour = tuple(random.integers(0, 256, 3).tolist())
            ink.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        picture.save(folder / f"{number:06d}.jpg", quality=90)


def in_child(**task: Any) -> dict[str, Any]:
    """`measure` in a fresh interpreter, so that no measurement finds what another left in memory."""
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(
    *,
    what: str,
    photos: str,
    out: str,
    count: int,
    batch_size: int = 1,
    repeats: int = 1,
    model: str | None = None,
    size: int | None = None,
) -> dict[str, Any]:
    """Seconds of each side (ratio), seconds and peak memory (folder), or seconds to get the supports (start)."""
    # Imported here: the parent stays small, for a child's peak starts at its parent's on some systems.
    from fewshot_seg.photos import find_queries, read_photo
    from fewshot_seg.predicted_files import predict_folder
    from fewshot_seg.prediction import Predictor

    files = find_queries([photos])[:count]
    segmenter, side = _segmenter(model, size)
    predictor = Predictor(segmenter, side)
    shown = [read_photo(file) for file in files[: _SHOTS if what == "start" else 1]]
    masks = [_middle(photo.shape[:2]) for photo in shown]
    if what == "start":
        return _start(predictor, files[:_SHOTS], masks, Path(out) / "support.safetensors")
    predictor.remember(shown, masks)

    def predict() -> None:
        predict_folder(predictor, files, Path(out), batch_size=batch_size)

    if what == "folder":
        seconds = _seconds(predict)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
        return {"seconds": seconds, "megabytes": peak / 1e6, "count": len(files)}
    sides = {"bare": lambda: _bare(predictor, segmenter.backbone, files, batch_size), "predict": predict}
    found: dict[str, Any] = {key: [] for name in sides for key in (name, f"{name}_cpu")}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            spent, seconds = time.process_time(), _seconds(run)
            if repeat:  # the first run of each pays for what is set up once
                found[name].append(seconds)
                found[f"{name}_cpu"].append(time.process_time() - spent)
    return found | {"count": len(files)}


def _bare(predictor: Any, backbone: Any, files: list[Path], batch_size: int) -> None:
    """Decode, resize, backbone forward, in the threads that prediction uses; nothing else."""
    import torch

    from fewshot_seg.photos import read_photo
    from fewshot_seg.pipeline import stream
    from fewshot_seg.predicted_files import lane_count

    def read(file: Path) -> Any:
        return predictor.square(read_photo(file))

    def forward(squares: list[Any]) -> list[None]:
        backbone(torch.stack(squares).to(predictor.device))
        return [None] * len(squares)

    lanes = lane_count(predictor.device)
    for _ in stream(files, read=read, process=forward, write=_drop, batch_size=batch_size, lanes=lanes):
        pass


def _drop(file: Path, result: None) -> None:
    """Write nothing."""


def _start(predictor: Any, files: list[Path], masks: list[Any], path: Path) -> dict[str, Any]:
    from fewshot_seg.photos import read_photo

    def encode() -> None:
        predictor.remember([read_photo(file) for file in files], masks)

    encode()
    predictor.save_support(path)
    loaded, encoded = _seconds(lambda: predictor.load_support(path)), _seconds(encode)
    return {"loaded": loaded, "encoded": encoded, "count": len(files)}


def _segmenter(model: str | None, size: int | None) -> tuple[Any, int]:
    from fewshot_seg.backbones import build_backbone
    from fewshot_seg.checkpoint import load_segmenter
    from fewshot_seg.segmenter import build_segmenter

    if model is not None:
        loaded = load_segmenter(Path(model))
        return loaded.segmenter, size or loaded.resolution
    return build_segmenter(build_backbone(), decoder_width=48, decoder_blocks=4), size or 400


def _middle(shape: tuple[int, int]) -> Any:
    """A mask uint8 (H, W) of the middle quarter."""
    mask = np.zeros(shape, np.uint8)
    mask[shape[0] // 4 : 3 * shape[0] // 4, shape[1] // 4 : 3 * shape[1] // 4] = 1
    return mask


def _seconds(run: Any) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
