"""Faults of the environment, injected into every verb that writes: one line, exit code 2, earlier results whole."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fewshot_seg.checkpoint
import fewshot_seg.commands
from episodes.labelled import LabelledImages
from episodes.prepare import archives_of, preparation
from episodes.sources import SyntheticSource
from episodes.types import DataError
from fewshot_seg.backbones import build_backbone
from fewshot_seg.cli import main
from fewshot_seg.features import FeatureStore
from fewshot_seg.folder_lock import LOCK_NAME, folder_of_one_run

TINY = ["--backbone", "mobilenetv3_small_050", "--backbone-weights", "random"]
SIZE = ["--resolution", "64"]
DATA = ["--data", "synthetic"]
SHORT = ["--steps", "2", "--batch-size", "2", "--checkpoint-every", "1"]
JOINT = [*SHORT, "--training", "joint", "--validation-episodes", "4"]


class FewPictures(SyntheticSource):
    """The command line's generated pictures, but few."""

    def __init__(self, **given: int) -> None:
        super().__init__(**{"base_classes": 6, "novel_classes": 2, "images_per_class": 4, "size": 64, **given})


@dataclasses.dataclass(frozen=True)
class World:
    """Good runs of all verbs, made once."""

    root: Path

    @property
    def model(self) -> str:
        return str(self.root / "train" / "model.safetensors")

    def command(self, verb: str, out: Path | None = None) -> list[str]:
        """Arguments of a verb that writes to `out`, by default to the place of its good run."""
        root, to = self.root, str(out or self.root / verb.replace(" ", "-"))
        photos = ["--support", f"{root}/photos/0.png:{root}/mask.png", "--query", f"{root}/photos"]
        bare, few = [*DATA, *TINY, *SIZE], [*DATA, "--model", self.model, "--count"]
        commands = {
            "train": ["train", *bare, *JOINT],
            "similarity train": ["similarity", "train", *bare, *SHORT],
            "evaluate": ["evaluate", *few, "4", "--report-episodes", "2"],
            "similarity evaluate": ["similarity", "evaluate", *bare, "--episodes", "4"],
            "explain": ["explain", *few, "1", "--panel", "64"],
            "explain photos": ["explain", "--model", self.model, "--panel", "64", *photos],
            "explain score": [
                *("explain", *few[:-1], "--score", "--score-episodes", "2", "--explainers", "chance"),
                *("--score-steps", "2"),
            ],
            "predict": ["predict", "--model", self.model, "--coco", "--confidence", *photos],
            "data show": ["data", "show", *DATA, *SIZE, "--count", "2"],
            "demo": ["demo", *TINY, *SIZE, *SHORT[:4], "--episodes", "4", "--report-episodes", "2"],
            "export": ["export", "--model", self.model],
        }
        if verb == "data prepare":
            return ["data", "prepare", "voc", "--no-sbd", "--archives", str(root / "shelf"), "--target", to]
        return [*commands[verb], "--out", to]


RUNS = (
    *("train", "similarity train", "evaluate", "similarity evaluate", "explain", "explain photos", "explain score"),
    *("predict", "data show", "data prepare"),
)
FOLDERS = (*RUNS, "demo", "export")
"""Verbs that fill a folder; the last two take too long to be run here."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    made = World(root)
    (root / "photos").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{number}.png")
    mask = np.zeros((40, 50), np.uint8)
    mask[10:30, 10:30] = 255
    Image.fromarray(mask).save(root / "mask.png")
    archives = _write_shelf(root / "shelf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSHOT_SEG_CACHE", str(root / "cache"))
        patch.setattr("fewshot_seg.runs.SyntheticSource", FewPictures)
        patch.setattr(preparation, "archives_of", lambda *_, **__: archives)
        for verb in RUNS:
            assert main(made.command(verb)) == 0, verb
        yield made


def _write_shelf(folder: Path) -> Any:
    folder.mkdir()
    archive = archives_of("voc", with_sbd=False)[0]
    with tarfile.open(folder / archive.name, "w") as tar:
        for number in range(4):
            member = tarfile.TarInfo(f"VOCdevkit/VOC2012/JPEGImages/{number}.jpg")
            member.size = 1000
            tar.addfile(member, io.BytesIO(bytes([number]) * 1000))
    content = (folder / archive.name).read_bytes()
    digests = {name: hashlib.new(name, content).hexdigest() for name in ("md5", "sha256")}
    return (dataclasses.replace(archive, size=len(content), unpacked=100_000, **digests),)


Fail = Callable[..., str]


@pytest.fixture
def line_of(capsys: pytest.CaptureFixture[str]) -> Fail:
    """Runs a command that must fail: exit code 2, no traceback, one line of error, which is returned."""

    def run(arguments: list[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        printed = capsys.readouterr().err.replace("\r", "\n")
        assert "Traceback" not in printed
        (line,) = [line for line in printed.splitlines() if line.startswith("fewshot-seg: ")]
        return line.removeprefix("fewshot-seg: error: ")

    return run


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too, but for TensorBoard's streams."""
    files = (path for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def refuse(patch: pytest.MonkeyPatch, code: int, *, below: Path, after: int = 0) -> None:
    """From then on, the system renames nothing below a folder, as a full disk or one that fails would not."""
    calls, replace = iter(range(10**6)), os.replace

    def refusing(source: Any, target: Any, **options: Any) -> None:
        if Path(target).is_relative_to(below) and next(calls) >= after:
            raise OSError(code, os.strerror(code))
        replace(source, target, **options)

    patch.setattr(os, "replace", refusing)


def again(world: World, verb: str, out: Path) -> list[str]:
    """The command over a copy of its good run; what refuses an earlier run gets a new folder."""
    if verb in ("train", "similarity train", "data prepare"):
        return world.command(verb, out)
    shutil.copytree(world.root / verb.replace(" ", "-"), out)
    if verb == "explain score":
        (out / "episodes.jsonl").unlink()
    return world.command(verb, out)


class TestDiskFull:
    @pytest.mark.parametrize("verb", RUNS)
    def test_the_first_file(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_of: Fail, verb: str
    ) -> None:
        out = tmp_path / "out"
        command = again(world, verb, out)
        before = tree(out)
        with monkeypatch.context() as patch:
            refuse(patch, errno.ENOSPC, below=out)
            line = line_of(command)
        assert line.startswith(f"cannot write {out}")
        assert line.endswith("No space left on device; make room there, or choose another place")
        assert tree(out) == before

    @pytest.mark.parametrize("after", [2, 5])
    def test_a_training_goes_on_when_there_is_room(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_of: Fail, after: int
    ) -> None:
        with monkeypatch.context() as patch:
            refuse(patch, errno.ENOSPC, below=tmp_path, after=after)
            assert "No space left on device" in line_of(world.command("train", tmp_path / "run"))
        assert not (tmp_path / "run" / "model.safetensors").exists()
        assert main([*world.command("train", tmp_path / "run"), "--resume"]) == 0
        assert same_weights(tmp_path / "run" / "model.safetensors", Path(world.model))

    @pytest.mark.parametrize("name", ["training.jsonl", "episodes.jsonl"])
    def test_a_log(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_of: Fail, name: str
    ) -> None:
        """Lines are added to logs in place: what did not fit is dropped by the next run."""
        verb = "train" if name == "training.jsonl" else "explain score"
        command, open_file = world.command(verb, tmp_path / "out"), Path.open
        command += ["--steps", "10"] if verb == "train" else []  # every tenth is logged

        class Full(io.StringIO):
            def write(self, text: str) -> int:
                with open_file(tmp_path / "out" / name, "a") as file:
                    file.write(text[: len(text) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def opened(path: Path, mode: str = "r", *given: Any, **named: Any) -> Any:
            return Full() if path == tmp_path / "out" / name and mode == "a" else open_file(path, mode, *given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", opened)
            assert line_of(command).startswith("No space left on device; make room there")
        assert main([*command, *(["--resume"] if verb == "train" else [])]) == 0
        lines = (tmp_path / "out" / name).read_text().splitlines()
        assert [json.loads(line) for line in lines]
        if verb == "explain score":
            assert tree(tmp_path / "out")["scores.json"] == tree(world.root / "explain-score")["scores.json"]

    def test_of_the_feature_cache(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_of: Fail
    ) -> None:
        monkeypatch.setenv("FEWSHOT_SEG_CACHE", str(tmp_path / "cache"))
        with monkeypatch.context() as patch:
            refuse(patch, errno.ENOSPC, below=tmp_path / "cache", after=3)
            line = line_of(world.command("evaluate", tmp_path / "out"))
        assert line.startswith(f"cannot write {tmp_path / 'cache' / 'features'}")
        assert not (tmp_path / "out").exists()  # made for this run, and empty
        assert main(world.command("evaluate", tmp_path / "out")) == 0
        found, whole = (json.loads(tree(one)["evaluation.json"]) for one in (tmp_path / "out", world.root / "evaluate"))
        assert found | {"seconds": 0} == whole | {"seconds": 0}

    @pytest.mark.parametrize("verb", ["report", "data episodes", "data verify", "predict --save-support"])
    def test_single_files(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_of: Fail, verb: str
    ) -> None:
        file = tmp_path / "file.safetensors"
        file.write_text("earlier")
        support = ["--support", f"{world.root}/photos/0.png:{world.root}/mask.png", "--save-support", str(file)]
        commands = {
            "report": ["report", str(world.root / "evaluate"), "--out", str(file)],
            "data episodes": ["data", "episodes", *DATA, "--count", "2", "--out", str(file)],
            "data verify": ["data", "verify", *DATA, "--splits", "val", "--out", str(file)],
            "predict --save-support": ["predict", "--model", world.model, *support],
        }
        with monkeypatch.context() as patch:
            refuse(patch, errno.ENOSPC, below=tmp_path)
            assert line_of(commands[verb]).startswith(f"cannot write {file}: No space left on device; make room")
        assert tree(tmp_path) == {file.name: b"earlier"}

    def test_of_standard_output(self, monkeypatch: pytest.MonkeyPatch, line_of: Fail) -> None:
        full = Path("/dev/full").open("w")  # noqa: SIM115 - closing it would fail
        monkeypatch.setattr("sys.stdout", full)
        assert line_of(["weights", "list"]).startswith("No space left on device; make room there")
        monkeypatch.undo()
        full.close()  # /dev/null by now, where everything fits

    def test_nobody_reads_standard_output(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read, write = os.pipe()
        os.close(read)
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", os.fdopen(write, "w"))
            assert main(["weights", "list"]) == 141


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EDQUOT])
def test_other_refusals(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_of: Fail, code: int
) -> None:
    refuse(monkeypatch, code, below=tmp_path)
    line = line_of(world.command("predict", tmp_path / "out"))
    assert f"cannot write {tmp_path / 'out' / 'masks'}" in line
    assert os.strerror(code) in line
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize("verb", FOLDERS)
def test_a_read_only_folder(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_of: Fail, verb: str
) -> None:
    """Said before any work is done."""
    out, opened = tmp_path / "out", os.open
    if verb in RUNS:
        shutil.copytree(world.root / verb.replace(" ", "-"), out)
    before = tree(out)

    def read_only(path: Any, flags: int, *given: Any, **named: Any) -> int:
        if Path(path).is_relative_to(tmp_path) and flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        line = line_of(world.command(verb, out))
    assert line == f"cannot write {out}: Read-only file system; choose a folder you may write to"
    assert tree(out) == before
    assert out.exists() == bool(before)


class TestTwoRunsInOneFolder:
    @pytest.mark.parametrize("verb", FOLDERS)
    def test_the_second_is_refused(self, world: World, tmp_path: Path, line_of: Fail, verb: str) -> None:
        out = tmp_path / "out"
        with folder_of_one_run(out):
            line = line_of(world.command(verb, out))
            assert set(tree(out)) == {LOCK_NAME}
        assert line == (
            f"{out} is in use by another run (process {os.getpid()}); wait until it has ended, or choose another folder"
        )
        assert not out.exists()

    def test_the_lock_of_a_killed_run_locks_nobody_out(self, world: World, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / LOCK_NAME).write_text("1\n")  # process 1 lives, but does not hold it
        assert main(world.command("predict", out)) == 0
        assert LOCK_NAME not in tree(out)

    def test_saving_supports_fills_no_folder(self, world: World, tmp_path: Path) -> None:
        support = ["--support", f"{world.root}/photos/0.png:{world.root}/mask.png"]
        save = ["--save-support", str(tmp_path / "s.safetensors")]
        with folder_of_one_run(tmp_path / "out"):
            command = ["predict", "--model", world.model, *support, *save, "--out", str(tmp_path / "out")]
            assert main(command) == 0


class TestVanishedData:
    """Gone after the lists were made, before it is read."""

    @pytest.fixture
    def voc(self, tiny_voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("FEWSHOT_SEG_CACHE", str(tmp_path / "cache"))
        return tiny_voc

    @pytest.mark.parametrize("verb", ["train", "evaluate", "similarity train", "explain"])
    @pytest.mark.parametrize("folder", ["JPEGImages", "SegmentationClassAug"])
    def test_photos_and_masks(
        self, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_of: Fail, verb: str, folder: str
    ) -> None:
        given = {
            "train": JOINT,
            "evaluate": ["--threshold", "0", "--count", "4"],
            "similarity train": ["--data", "voc", *SHORT],
        }
        command = [*verb.split(), "--root", str(voc), *TINY, *SIZE, *given.get(verb, ["--threshold", "0"])]
        opened = FeatureStore.__init__

        def vanishing(store: FeatureStore, *arguments: Any, **named: Any) -> None:
            opened(store, *arguments, **named)  # the last thing before anything is drawn and read
            shutil.rmtree(voc / folder)

        monkeypatch.setattr(FeatureStore, "__init__", vanishing)
        line = line_of([*command, "--out", str(tmp_path / "out")])
        assert str(voc / folder) in line
        assert "no such file" in line

    def test_in_a_process_that_loads(
        self, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_of: Fail
    ) -> None:
        live = ["--augment", "flip", "--workers", "1", "--no-select-threshold"]
        opened = FeatureStore.__init__

        def vanishing(store: FeatureStore, *arguments: Any, **named: Any) -> None:
            opened(store, *arguments, **named)
            shutil.rmtree(voc / "JPEGImages")

        monkeypatch.setattr(FeatureStore, "__init__", vanishing)
        command = ["train", "--root", str(voc), *TINY, *SIZE, *JOINT, *live]
        assert "no such file" in line_of([*command, "--out", str(tmp_path / "out")])

    def test_a_process_that_loads_is_killed(self, world: World, monkeypatch: pytest.MonkeyPatch, line_of: Fail) -> None:
        def lost(*_: Any, **__: Any) -> None:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

        monkeypatch.setattr("fewshot_seg.runs.train_configured", lost)
        line = line_of(world.command("train", world.root / "lost"))
        assert line.startswith("a process that loads photos was lost (DataLoader worker (pid 7) is killed by signal")

    def test_a_run_is_not_resumed_with_other_photos(
        self, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_of: Fail
    ) -> None:
        command = ["train", "--root", str(voc), *TINY, *SIZE, *JOINT, "--out", str(tmp_path / "out")]
        with monkeypatch.context() as patch:
            refuse(patch, errno.ENOSPC, below=tmp_path / "out", after=4)
            line_of(command)
        lists = voc / "ImageSets" / "Segmentation" / "trainaug.txt"
        lists.write_text("".join(lists.read_text().splitlines(keepends=True)[:-1]))
        before = tree(tmp_path / "out")
        assert "the training photos or their classes have changed since it began" in line_of([*command, "--resume"])
        assert tree(tmp_path / "out") == before

    def test_a_query(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The others are segmented all the same."""
        shutil.copytree(world.root / "photos", tmp_path / "photos")
        opened = fewshot_seg.commands.predict_folder

        def vanishing(*arguments: Any, **named: Any) -> Any:
            (tmp_path / "photos" / "1.png").unlink()
            return opened(*arguments, **named)

        monkeypatch.setattr(fewshot_seg.commands, "predict_folder", vanishing)
        command = world.command("predict", tmp_path / "out")
        command[command.index("--query") + 1] = str(tmp_path / "photos")
        assert main(command) == 1
        assert f"skipped {tmp_path / 'photos' / '1.png'}: no such file" in capsys.readouterr().err
        assert {"masks/0.png", "masks/2.png", "run.json"} <= set(tree(tmp_path / "out"))

    def test_the_feature_store(self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Computed again, to the same scores."""
        monkeypatch.setenv("FEWSHOT_SEG_CACHE", str(tmp_path / "cache"))
        ensure, gone = FeatureStore.ensure, []

        def vanishing(store: FeatureStore, *arguments: Any, **named: Any) -> None:
            ensure(store, *arguments, **named)
            shutil.rmtree(tmp_path / "cache" / "features")
            gone.append(store)

        monkeypatch.setattr(FeatureStore, "ensure", vanishing)
        assert main(world.command("evaluate", tmp_path / "out")) == 0
        assert gone
        found, whole = (json.loads(tree(one)["evaluation.json"]) for one in (tmp_path / "out", world.root / "evaluate"))
        assert found["episodes"] == whole["episodes"]

    def test_an_archive(self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_of: Fail) -> None:
        """Nothing is fetched into somebody's folder of archives instead."""
        shutil.copytree(world.root / "shelf", tmp_path / "shelf")
        command = world.command("data prepare", tmp_path / "out")
        command[command.index("--archives") + 1] = str(tmp_path / "shelf")
        monkeypatch.setattr(preparation, "check_space", lambda *_: shutil.rmtree(tmp_path / "shelf"))
        assert line_of(command).startswith(f"{tmp_path / 'shelf'} lacks VOCtrainval")


class TestClockJumps:
    @pytest.mark.parametrize("jump", [-(10**8), 10**8])
    def test_weights_and_scores_do_not_look_at_the_clock(
        self,
        world: World,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        jump: int,
    ) -> None:
        """Set while the run lasts, and all files of the cache are from then."""
        shutil.copytree(world.root / "cache", tmp_path / "cache")
        for number, path in enumerate(sorted(tmp_path.rglob("*.safetensors"))):
            os.utime(path, (time.time() + (number % 3 - 1) * jump,) * 2)
        monkeypatch.setenv("FEWSHOT_SEG_CACHE", str(tmp_path / "cache"))
        now, calls = time.time, iter(range(10**9))
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: now() + (jump if next(calls) > 20 else 0))
            assert main(world.command("train", tmp_path / "run")) == 0
        assert same_weights(tmp_path / "run" / "model.safetensors", Path(world.model))
        bars = capsys.readouterr().err
        assert "step" in bars
        assert "<-" not in bars  # a time left that is negative
        assert "[-" not in bars

    def test_the_budget_of_features_holds(self, world: World, tmp_path: Path) -> None:
        source = FewPictures()
        ids = source.ids("train")
        backbone = fewshot_seg.checkpoint.load_segmenter(Path(world.model)).segmenter.backbone
        whole = FeatureStore(backbone, source, size=64, directory=None).get(ids)
        first = FeatureStore(backbone, source, size=64, directory=tmp_path)
        first.ensure(ids[:6])
        files = sorted(tmp_path.rglob("*.safetensors"))
        for path in files:
            os.utime(path, (time.time() + 10**8,) * 2)
        budget = 8 * files[0].stat().st_size
        later = FeatureStore(backbone, source, size=64, directory=tmp_path, byte_budget=budget)
        for one, other in zip(later.get(ids), whole, strict=True):
            assert torch.equal(one, other)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= budget


def test_a_photo_that_changes_while_it_is_read_gets_no_others_name(tmp_path: Path) -> None:
    """Its features would be those of another photo for every later run."""

    class Changing(LabelledImages):
        def image(self, image_id: str) -> Any:
            Image.new("RGB", (32, 32), "red").save(self.root / image_id)
            return super().image(image_id)

    Image.new("RGB", (32, 32), "blue").save(tmp_path / "a.png")
    source = Changing(name="x", root=tmp_path, files=("a.png",), labels=("a",))
    backbone = build_backbone("mobilenetv3_small_050", weights="random")
    store = FeatureStore(backbone, source, size=64, directory=tmp_path / "cache")
    with pytest.raises(DataError, match=r"photo a\.png was changed while it was read; leave it"):
        store.get(["a.png"])
    assert list(tmp_path.rglob("*.safetensors")) == []
