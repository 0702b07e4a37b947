"""What an episode costs, as ratios: stored features against the un-cached loop, K shots against one, growth, processes.

    python scripts/bench_evaluation.py --root ../shared/data/VOCdevkit/VOC2012
    python scripts/bench_evaluation.py --root ... --device cuda --sections loop,growth
    python scripts/bench_evaluation.py --synthetic --episodes 60 --images 200   # a quick try without data

The un-cached loop is what research code does: per episode it decodes photos and masks, resizes, runs the backbone on
supports and query, compares and decodes. It goes through the same functions and ends with the same masks. Both sides
take turns in one run, so that the machine's mood strikes both; the ratio is that of the medians. Everything runs in
this process but the last two sections, which start their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from render_results import merge_records, provenance, render
from torch import Tensor, nn

from episodes.augment import EpisodeTransform
from episodes.loader import EpisodeDataset
from episodes.protocols import get_protocol
from episodes.sources import SyntheticSource, VocSource
from episodes.types import MaskSource
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.encoded_photos import EncodedPhotos
from fewshot_seg.episode_logits import shot_logits, square_targets
from fewshot_seg.feature_episodes import FeatureEpisodes, LiveEpisodes
from fewshot_seg.features import FeatureStore
from fewshot_seg.fold_data import FoldData, evaluation_episodes, open_fold
from fewshot_seg.metrics import EpisodeIoU
from fewshot_seg.runs import benchmark_name
from fewshot_seg.runtime import pick_device
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter

SECTIONS = ("limit", "loop", "shots", "growth", "images", "processes", "memory")
_SPEED = "speed of 1-shot evaluation, times the un-cached loop's"
_SHOTS = "cost of an episode, times that of 1-shot with all cells"
_GROWTH = "cost, times linear growth from the smallest"
_PROCESSES = "episodes per second, times one process"
_RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results.json"
_BATCH = 10
_ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--root", type=Path, help="VOC2012 folder; fold 0 of PASCAL-5i is evaluated")
    where.add_argument("--synthetic", action="store_true", help="generated photos instead")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/fewshot-seg").expanduser())
    parser.add_argument("--episodes", type=int, default=200, help="episodes a measurement")
    parser.add_argument("--images", type=int, default=10_000, help="largest number of images in section images")
    parser.add_argument("--support-cells", type=int, default=640, help="of the condensed rows")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which, separated by commas")
    parser.add_argument("--record", action="store_true", help="put the ratios into docs/results.json and its page")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(_child(arguments, **json.loads(arguments.child))))
        return
    unknown = set(arguments.sections.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown section {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    figures: dict[str, Any] = {}
    bench = Bench(arguments)
    for section in arguments.sections.split(","):
        print(f"\n{section}")
        figures[section] = getattr(bench, section)()
    if arguments.record:
        record(figures, benchmark_name(bench.data))


def record(figures: dict[str, Any], benchmark: str, results: Path = _RESULTS) -> None:
    """Ratios into the results, each with what it is a ratio of."""
    rows: list[tuple[str, str, float]] = []
    for name, value in figures.get("loop", {}).items():
        if name != "un-cached":
            rows.append((_SPEED, name, figures["loop"]["un-cached"] / value))
    rows += [(_SHOTS, name, value / figures["shots"]["1-shot"]) for name, value in figures.get("shots", {}).items()]
    growth = figures.get("growth", {})
    for size, value in growth.items():
        least = min(growth)
        rows.append((_GROWTH, f"{size} episodes", value / growth[least] / (size / least)))
    images = figures.get("images", {})
    for size, values in images.items():
        least = min(images)
        for what, value, first in zip(("written", "found again", "read"), values, images[least], strict=True):
            rows.append((_GROWTH, f"{size} images, {what}", value / first / (size / least)))
    rates = figures.get("processes", {})
    rows += [(_PROCESSES, f"{size} processes of one thread", rate / rates[1]) for size, rate in rates.items()]
    if "memory" in figures:
        rows.append(("peak memory in MB", "evaluation of 1000 episodes, 1-shot", figures["memory"]["megabytes"]))
    machine = f"{os.cpu_count()} CPU cores" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    shared = {"task": "speed", "data": f"Speed: {benchmark}, fold 0, {machine}", "protocol": "hsnet", "fold": 0}
    shared |= {"shots": 1, "support": "mask", "seeds": [0], "episodes": 1000, **provenance()}
    merge_records(results, [shared | {"metric": m, "method": name, "value": value} for m, name, value in rows])
    render(results, results.with_suffix(".md"))


class Bench:
    """One fold with a new model: speed does not depend on what was learned."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, pick_device(arguments.device)
        self.segmenter = new_model(build_backbone().to(self.device))
        self.data = open_data(arguments, self.segmenter.backbone)

    def episodes(self, shots: int, count: int) -> FeatureEpisodes:
        """The first of the evaluation, with stored features."""
        return evaluation_episodes(self.data, shots=shots, count=count, show_progress=True)

    def uncached(self, shots: int, count: int) -> LiveEpisodes:
        """The same, from photos."""
        specs = getattr(self.episodes(shots, count), "_specs")  # noqa: B009  the very same episodes
        transform = EpisodeTransform("none", self.data.resolution, self.data.protocol.fit)
        return LiveEpisodes(self.segmenter.backbone, EpisodeDataset(self.data.source, specs, transform, transform))

    def score(self, episodes: FeatureEpisodes, batch: int, encoded: EncodedPhotos | None) -> float:
        """mIoU."""
        metric, decoders = EpisodeIoU(), {"decoder": self.segmenter.decoder}
        for one in episodes.batches(batch):
            side = one.query_masks.shape[-1]
            logits = shot_logits(self.segmenter, decoders, one, (side, side), encoded=encoded)
            metric.update(logits.margins("decoder", 0.0) > 0, square_targets(one, side), one.class_ids)
        return metric.compute().miou

    def limit(self) -> dict[str, float]:
        """The bare backbone against all of an un-cached episode's work, per image."""
        photos = torch.rand(8, 3, self.data.resolution, self.data.resolution, device=self.device)
        few = self.uncached(1, 8)
        seconds = turns(
            {
                "backbone, 1 image": lambda: [self.segmenter.backbone(photo[None]) for photo in photos],
                "backbone, 8 images": lambda: [self.segmenter.backbone(photos)],
                "un-cached loop": lambda: [self.score(few, 1, None)],
            },
            self.device,
        )
        per_image = {name: 1e3 * value / (16 if "loop" in name else 8) for name, value in seconds.items()}
        for name, value in per_image.items():
            ratio = value / per_image["backbone, 8 images"]
            print(f"  {ratio:6.2f} times the backbone's forward pass in batches of 8: {name}, {value:.1f} ms an image")
        return per_image

    def loop(self) -> dict[str, float]:
        """Warm evaluation against the un-cached loop, 1-shot."""
        count = self.arguments.episodes
        few, many, encoded = self.uncached(1, 10), self.episodes(1, count), EncodedPhotos(self.segmenter)
        first = seconds_of(lambda: self.score(many, _BATCH, encoded), self.device)
        found = turns(
            {
                "un-cached": lambda: self.score(few, 1, None),
                "warm": lambda: self.score(many, _BATCH, encoded),
                "warm, nothing shared": lambda: self.score(self.episodes(1, 20), _BATCH, None),
            },
            self.device,
        )
        per_episode = {
            "un-cached": found["un-cached"] / 10,
            "warm": found["warm"] / count,
            "warm, photos not yet encoded": first / count,
            "warm, nothing shared": found["warm, nothing shared"] / 20,
        }
        for name, value in per_episode.items():
            print(f"  {per_episode['un-cached'] / value:6.1f} times as fast: {name}, {1e3 * value:.2f} ms an episode")
        return per_episode

    def shots(self) -> dict[str, float]:
        """K shots against one, all cells and condensed; and what condensing does to the logits' score."""
        count, work = self.arguments.episodes // 2, dict[str, Callable[[], Any]]()
        scores: dict[str, float] = {}
        for cells in (None, self.arguments.support_cells, self.arguments.support_cells // 4):
            for shots in (1, 5, 10):
                name = f"{shots}-shot" + ("" if cells is None else f", {cells} support cells")
                episodes, encoded = self.episodes(shots, count), EncodedPhotos(self.segmenter, support_cells=cells)
                work[name] = partial(self.score, episodes, _BATCH, encoded)
                scores[name] = work[name]()
        found = {name: value / count for name, value in turns(work, self.device).items()}
        for name, value in found.items():
            print(
                f"  {value / found['1-shot']:5.2f} times 1-shot: {name}, {1e3 * value:.2f} ms an episode, "
                f"mIoU of the untrained model {scores[name]:.2f}"
            )
        return found

    def growth(self) -> dict[int, float]:
        """Cost of more episodes, warm."""
        count, encoded = self.arguments.episodes, EncodedPhotos(self.segmenter)
        sizes = [count, 2 * count, 4 * count, 8 * count]
        self.score(self.episodes(1, sizes[-1]), _BATCH, encoded)
        drawn = {str(size): self.episodes(1, size) for size in sizes}
        work = {name: partial(self.score, one, _BATCH, encoded) for name, one in drawn.items()}
        found = {int(name): value for name, value in turns(work, self.device, rounds=2).items()}
        for size, value in found.items():
            print(f"  {size:6d} episodes {value:7.2f} s, {value / found[count] / (size / count):5.2f} times linear")
        return found

    def images(self) -> dict[int, list[float]]:
        """Cost of more images in the store: to write, to find again, to read."""
        sizes = [size for size in (1_000, 10_000, 100_000) if size <= self.arguments.images] or [self.arguments.images]
        found: dict[int, list[float]] = {}
        for size in sizes:
            with tempfile.TemporaryDirectory(prefix="bench-images-") as folder:
                found[size] = _store_times(size, Path(folder))
        base = found[sizes[0]]
        for size, values in found.items():
            growth = ", ".join(
                f"{what} {value:.2f} s ({value / first / (size / sizes[0]):.2f} times linear)"
                for what, value, first in zip(("written", "found", "read"), values, base, strict=True)
            )
            print(f"  {size:6d} images: {growth}")
        return found

    def processes(self) -> dict[int, float]:
        """Episodes a second of 1, 2, 4 processes with one thread each, as many as there are cores."""
        found: dict[int, float] = {}
        for size in [size for size in (1, 2, 4) if size <= max(2, os.cpu_count() or 1)]:
            tasks = [_start(self.arguments, what="rate", threads=1) for _ in range(size)]
            found[size] = sum(_answer(task)["rate"] for task in tasks)
            print(f"  {size} processes: {found[size] / found[1]:.2f} times one ({found[size]:.0f} episodes/s)")
        print(f"  cores here: {os.cpu_count()}")
        return found

    def memory(self) -> dict[str, float]:
        """Peak memory of a whole evaluation in its own process."""
        peak = _answer(_start(self.arguments, what="memory", threads=torch.get_num_threads()))
        print(f"  {peak['megabytes']:.0f} MB at most, 1000 episodes, 1-shot")
        return dict(peak)


def new_model(backbone: Backbone) -> FewShotSegmenter:
    """Untrained, but with values where a new model has zeros."""
    segmenter = build_segmenter(backbone, decoder_width=48, decoder_blocks=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in segmenter.trainable_parameters():
            if not parameter.any():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return segmenter.to(next(backbone.parameters()).device).eval()


def open_data(arguments: argparse.Namespace, backbone: Backbone) -> FoldData:
    """Fold 0 by hsnet's protocol."""
    source: MaskSource = SyntheticSource(size=256) if arguments.synthetic else VocSource(arguments.root)
    protocol = get_protocol("hsnet", "pascal")
    if arguments.synthetic:
        protocol = dataclasses.replace(protocol, training_split="train", evaluation_split="val", listed=frozenset())
    return open_fold(source, backbone, protocol, fold=0, cache=arguments.cache)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Of one call, the device's own work included."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def turns(work: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int = _ROUNDS) -> dict[str, float]:
    """Median seconds of each, taking turns; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, one in work.items():
            seconds = seconds_of(one, device)
            if number:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


class _Encoder(nn.Module):
    """Costs next to nothing: what remains is the store."""

    out_channels = (3, 0, 0, 0, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 16, stride=16)

    def forward(self, images: Tensor) -> list[Tensor]:
        empty = images[:, :0]
        return [images, empty, empty, empty, self.first(images)]


class _Photos:
    """Any number of photos."""

    def image(self, image_id: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.full((32, 32, 3), int(image_id) % 251, np.uint8)

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        return " ".join(image_ids)


def _store_times(count: int, folder: Path) -> list[float]:
    backbone = Backbone(_Encoder(), name="bench", strides=(16,), mean=(0.5,) * 3, std=(0.5,) * 3)
    names, times = [str(number) for number in range(count)], []

    def store() -> FeatureStore:
        return FeatureStore(backbone, _Photos(), size=32, directory=folder, batch_size=64)

    def read() -> None:
        kept = store()
        for start in range(0, count, 64):
            kept.get(names[start : start + 64])

    for work in (lambda: store().ensure(names), lambda: store().ensure(names), read):
        times.append(seconds_of(work, torch.device("cpu")))
    return times


def _start(arguments: argparse.Namespace, *, what: str, threads: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--cache", str(arguments.cache), "--episodes", str(arguments.episodes)]
    command += ["--synthetic"] if arguments.synthetic else ["--root", str(arguments.root)]
    command += ["--device", arguments.device, "--child", json.dumps({"what": what, "threads": threads})]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def _answer(task: subprocess.Popen[str]) -> dict[str, float]:
    printed = task.communicate()[0]
    if task.returncode:
        raise SystemExit(f"a child process ended with {task.returncode}")
    answer: dict[str, float] = json.loads(printed.splitlines()[-1])
    return answer


def _child(arguments: argparse.Namespace, what: str, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    bench = Bench(arguments)
    if what == "memory":
        bench.score(bench.episodes(1, 1000), _BATCH, EncodedPhotos(bench.segmenter))
        unit = 1 if sys.platform == "darwin" else 1024
        return {"megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6}
    encoded, episodes = EncodedPhotos(bench.segmenter), bench.episodes(1, arguments.episodes)
    bench.score(episodes, _BATCH, encoded)
    _wait_for_the_others()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < 15:
        bench.score(episodes, _BATCH, encoded)
        done += arguments.episodes
    return {"rate": done / (time.perf_counter() - began)}


def _wait_for_the_others() -> None:
    """Until the next full 20 seconds: children that were started together measure together."""
    time.sleep(20 - time.time() % 20)


if __name__ == "__main__":
    main()
