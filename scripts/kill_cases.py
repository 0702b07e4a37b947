"""What `kill_harness.py` kills: small runs of the verbs that take long in earnest, and how to judge their files."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image, ImageDraw
from safetensors import safe_open

from episodes.prepare import preparation
from episodes.prepare.archives import archives_of
from episodes.sources import SyntheticSource
from fewshot_seg import cross_fitted_fold, cross_fitting
from fewshot_seg.backbones import build_backbone
from fewshot_seg.cli import main as fewshot_seg
from fewshot_seg.features import FeatureStore

SIDE = 64
_BACKBONE = ("--backbone", "mobilenetv3_small_050", "--backbone-weights", "random")
_PICTURES = ("--data", "synthetic")
_SHORT = ("--batch-size", "2", "--checkpoint-every", "2", *_PICTURES, *_BACKBONE, "--resolution", str(SIDE))
_VOLATILE = {"seconds", "environment", "resume"}
"""Keys of records that differ between runs with the same outcome."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A run that is killed.

    Attributes:
        name: in the table.
        run: the run in this process, exit code; it is told its folder, and whether to go on with an earlier run.
        damage: names of files that are not what they should be, though they have their final names.
    """

    name: str
    run: Callable[[Path, bool], int]
    damage: Callable[[Path], list[str]]


class FewPictures(SyntheticSource):
    """The command line's generated pictures, but few and small."""

    def __init__(self, **given: int) -> None:
        super().__init__(**{"base_classes": 6, "novel_classes": 2, "images_per_class": 4, "size": SIDE, **given})


def patched_pictures() -> Any:
    """While it is entered, ``--data synthetic`` has few pictures, and a base learner takes a moment."""
    quick = partial(cross_fitting.train_base_learner, steps=5, batch_size=32)
    return mock.patch.multiple("fewshot_seg.runs", SyntheticSource=FewPictures), mock.patch.object(
        cross_fitted_fold, "train_base_learner", quick
    )


def cases(shelf: Path, mirror: str) -> dict[str, Case]:
    """All cases by name.

    Args:
        shelf: of `make_shelf`.
        mirror: address where `serve` offers the shelf's archives.
    """
    joint = ("train", "--training", "joint", "--steps", "6", "--validation-episodes", "8", *_SHORT)
    crossed = ("train", "--steps", "4", "--decoder-steps", "6", "--decoder-episodes", "4", *_SHORT)
    alone = ("similarity", "train", "--steps", "6", *_SHORT)
    scored = ("evaluate", *_PICTURES, "--model", str(shelf / "model.safetensors"), "--count", "8")
    photos = ("--support", f"{shelf}/photos/0.png:{shelf}/mask.png", "--query", str(shelf / "photos"))
    given = ("predict", *_BACKBONE, "--size", str(SIDE), "--threshold", "0.1", "--model", "none", "--coco")
    found = [
        Case(name="train, joint", run=partial(_verb, joint, True), damage=unsound),
        Case(name="train, cross-fit", run=partial(_verb, crossed, True), damage=unsound),
        Case(name="similarity train", run=partial(_verb, alone, True), damage=unsound),
        Case(name="feature store", run=_fill_store, damage=unsound),
        Case(name="evaluate", run=partial(_verb, (*scored, "--report-episodes", "3"), False), damage=unsound),
        Case(name="data prepare", run=partial(_prepare, shelf, mirror), damage=partial(_unlike, shelf)),
        Case(name="predict", run=partial(_verb, (*given, "--confidence", *photos), False), damage=unsound),
    ]
    return {case.name: case for case in found}


def _verb(arguments: tuple[str, ...], resumes: bool, folder: Path, again: bool) -> int:
    os.environ["FEWSHOT_SEG_CACHE"] = str(folder / "cache")
    return fewshot_seg([*arguments, "--out", str(folder / "out"), *(["--resume"] if again and resumes else [])])


def _fill_store(folder: Path, again: bool) -> int:
    del again
    source = FewPictures(images_per_class=8)
    backbone = build_backbone("mobilenetv3_small_050", weights="random")
    store = FeatureStore(backbone, source, size=SIDE, directory=folder / "cache")
    store.ensure(source.ids("train"))
    return 0


def _prepare(shelf: Path, mirror: str, folder: Path, again: bool) -> int:
    del again
    with mock.patch.object(preparation, "archives_of", partial(_tiny_archives, shelf)):
        return fewshot_seg(["data", "prepare", "voc", "--target", str(folder / "data"), "--mirror", mirror])


def _tiny_archives(shelf: Path, *given: Any, **named: Any) -> Any:
    """The official table with the sizes and digests of the shelf's archives."""
    found = []
    for archive in archives_of(*given, **named):
        content = (shelf / "archives" / archive.name).read_bytes()
        digests = {name: hashlib.new(name, content).hexdigest() for name in ("md5", "sha256")}
        facts: dict[str, Any] = {"size": len(content), **digests} if archive.is_vouched_for else {}
        found.append(dataclasses.replace(archive, unpacked=10_000_000, **facts))
    return tuple(found)


def unsound(folder: Path) -> list[str]:
    """Files with final names that cannot be read whole."""
    return [str(path.relative_to(folder)) for path in _final_files(folder) if not _is_sound(path)]


def _final_files(folder: Path) -> Iterator[Path]:
    """Hidden files are temporary, and TensorBoard's are streams that it reads as far as they go."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and not path.name.startswith("events.out.tfevents"):
            yield path


def _is_sound(path: Path) -> bool:
    try:
        content_of(path)
    except Exception:  # whatever a reader says of a damaged file
        return False
    return True


def content_of(path: Path) -> Any:
    """What a file says, less what differs between equal runs; raises what its reader raises on damaged files."""
    if path.suffix == ".json":
        return _plain(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".jsonl":  # a log: the last line may be cut off, which its reader drops
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
            metadata = {
                name: _plain(json.loads(text)) for name, text in (file.metadata() or {}).items() if text[0] == "{"
            }
        return tensors, metadata
    content = path.read_bytes()
    if path.suffix in (".png", ".jpg", ".webp"):
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
    if path.suffix == ".html":
        if not content.rstrip().endswith(b"</html>"):
            raise ValueError("a page that ends early")
        return b""  # it names times
    return content


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items() if name not in _VOLATILE}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, Any]:
    """`content_of` of all files with final names."""
    return {str(path.relative_to(folder)): content_of(path) for path in _final_files(folder)}


def _unlike(shelf: Path, folder: Path) -> list[str]:
    """Files of a prepared data set that are not those of the archives, or lack though the record says complete."""
    expected, wrong = {f"data/{name}": content for name, content in _members().items()}, []
    found = {str(path.relative_to(folder)): path for path in _final_files(folder)}
    for name, path in found.items():
        if name.startswith("data/downloads/") and not name.endswith((".part", ".part.json")):
            expected[name] = (shelf / "archives" / path.name).read_bytes()
        if name in expected and path.read_bytes() != expected[name]:
            wrong.append(name)
    record = folder / "data" / "prepared.json"
    archives = json.loads(record.read_text())["archives"] if record.exists() else {}
    for name, entry in archives.items():
        if entry["complete"]:
            top = "benchmark" if name.startswith("benchmark") else "VOCdevkit"
            wrong += [one for one in expected if one.startswith(f"data/{top}") and one not in found]
    return wrong


def make_shelf(shelf: Path) -> None:
    """Photos, a mask and archives; ``model.safetensors`` is put there by a first training."""
    random = np.random.default_rng(0)
    (shelf / "photos").mkdir(parents=True)
    (shelf / "archives").mkdir()
    for number in range(12):
        picture = Image.fromarray(random.integers(90, 130, (60, 80, 3)).astype(np.uint8))
        ImageDraw.Draw(picture).rectangle((20, 10, 50, 40), fill=(220, 30, 30))
        picture.save(shelf / "photos" / f"{number}.png")
    mask = Image.new("L", (80, 60))
    ImageDraw.Draw(mask).rectangle((20, 10, 50, 40), fill=255)
    mask.save(shelf / "mask.png")
    for name, top in (("VOCtrainval_11-May-2012.tar", "VOCdevkit"), ("benchmark.tgz", "benchmark")):
        with tarfile.open(shelf / "archives" / name, "w:gz" if name.endswith("tgz") else "w") as archive:
            for inner, content in _members().items():
                if inner.startswith(top):
                    member = tarfile.TarInfo(inner)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def _members() -> Mapping[str, bytes]:
    random = np.random.default_rng(1)
    voc = {f"VOCdevkit/VOC2012/JPEGImages/{n}.bin": random.bytes(8000) for n in range(120)}
    lists = {"VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt": b"1\n2\n"}
    sbd = {f"benchmark_RELEASE/dataset/cls/{n}.mat": random.bytes(2000) for n in range(60)}
    return voc | lists | sbd


class _Shelf(BaseHTTPRequestHandler):
    """Files of a folder, slowly, with the ranges that let a download go on."""

    folder: Path

    def do_GET(self) -> None:
        content = (self.folder / Path(self.path).name).read_bytes()
        tag, asked = f'"{hashlib.md5(content).hexdigest()}"', self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        try:
            for first in range(start, len(content), 1 << 15):
                self.wfile.write(content[first : first + (1 << 15)])
                time.sleep(0.005)
        except OSError:  # killed
            pass

    def log_message(self, *_: Any) -> None:
        pass


def serve(shelf: Path) -> tuple[int, str]:
    """Offer the shelf's archives from another process: its id and address."""
    handler = type("_Handler", (_Shelf,), {"folder": shelf / "archives"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    address, process = f"http://127.0.0.1:{server.server_port}", os.fork()
    if process == 0:
        try:
            server.serve_forever()
        finally:
            os._exit(0)
    server.server_close()
    return process, address
