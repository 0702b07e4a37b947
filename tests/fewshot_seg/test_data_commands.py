"""``fewshot-seg data ...`` in process: stdout is what was asked for, every mistake one line on stderr."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from episodes.episode_files import read_episodes
from episodes.prepare import Archive, archives_of, preparation
from fewshot_seg.cli import main


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSHOT_SEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command: exit code, stdout, and the last line of stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(one) for one in arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out, (printed.err.splitlines() or [""])[-1]

    return run


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """Five photos of a cat, one of which shows a dog as well."""
    root = tmp_path / "own"
    for name in ("images", "masks/cat", "masks/dog"):
        (root / name).mkdir(parents=True)
    for k in range(5):
        photo = np.random.default_rng(k).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(photo).save(root / "images" / f"{k}.jpg")
        mask = np.zeros((40, 50), np.uint8)
        mask[5:30, 5 + k : 30] = 255
        Image.fromarray(mask).save(root / "masks" / "cat" / f"{k}.png")
    mask[:] = 0
    mask[33:38, 3:20] = 255
    Image.fromarray(mask).save(root / "masks" / "dog" / "4.png")
    return root


class TestEpisodes:
    def test_stdout_is_the_file(self, shared_voc: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
        arguments = ("data", "episodes", "--root", shared_voc, "--protocol", "hsnet", "--fold", "2", "--count", "5")
        code, out, last = call(*arguments)
        assert code == 0
        content = json.loads(out)
        assert (content["protocol"], content["fold"], content["shots"], len(content["episodes"])) == ("hsnet", 2, 1, 5)
        assert last == "left out, with too few images: horse, motorbike, person"
        code, said, _ = call(*arguments, "--out", tmp_path / "deep" / "e.json")
        assert code == 0
        assert said.startswith(f"5 episodes, fingerprint {content['episodes_fingerprint'][:12]}: ")
        assert (tmp_path / "deep" / "e.json").read_text() == out
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["e.json"]

    def test_several_ways_and_shots(self, shared_voc: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
        path = tmp_path / "e.json"
        ways = ("--ways", "2", "--shots", "2", "--count", "4", "--seed", "9")
        code, said, _ = call("data", "episodes", "--root", shared_voc, *ways, "--out", path)
        assert code == 0
        assert said.startswith("4 episodes, ")
        file = read_episodes(path)
        assert (file.ways, file.shots, file.seeds, len(file.specs)) == (2, 2, (9,), 8)
        assert all(file.specs[n].query_id == file.specs[n + 1].query_id for n in range(0, 8, 2))

    def test_bam_has_five_seeds(self, own_folder: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
        rules = tmp_path / "bam.toml"
        rules.write_text('name = "small bam"\nrepeats = 5\nseed = 3\nquery_draw = "image"\n')
        arguments = ("--data", "folder", "--root", own_folder, "--protocol-file", rules, "--count", "2")
        code, out, _ = call("data", "episodes", *arguments)
        assert code == 0
        content = json.loads(out)
        assert content["seeds"] == [3, 4, 5, 6, 7]
        assert (content["protocol"], content["fold"]) == ("small bam", None)
        assert content["class_names"] == {"1": "cat"}  # one dog alone is no episode
        assert len(content["episodes"]) == 10

    def test_small_objects_are_told(self, shared_voc: Path, call: Callable[..., Any]) -> None:
        code, out, last = call("data", "episodes", "--root", shared_voc, "--protocol", "bam")
        assert (code, out) == (2, "")
        assert "protocol bam finds no image of the wanted classes" in last
        assert "with 2048 pixels of the class and more" in last

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--fold", "4"], "--fold must be at most 3, got 4"),
            (["--protocol", "panet"], "--protocol must be one of hsnet, pfenet, bam, repri, custom; got 'panet'"),
            (["--ways", "3"], "3-way episodes need 3 classes, the pairs have 2"),
            (["--evaluation-split", "test"], "no split 'test'"),
            (["--novel-classes", "cow"], "the classes of voc are divided by --fold; leave --novel-classes out"),
            (["--protocol-file", "none.toml"], "cannot read protocol none.toml: No such file"),
        ],
    )
    def test_mistakes(
        self, shared_voc: Path, tmp_path: Path, call: Callable[..., Any], arguments: list[str], message: str
    ) -> None:
        path = tmp_path / "e.json"
        code, out, last = call("data", "episodes", "--root", shared_voc, *arguments, "--out", path)
        assert (code, out) == (2, "")
        assert last.startswith("fewshot-seg: error: ")
        assert message in last
        assert not path.exists()


class TestVerify:
    def test_json_on_stdout_and_in_a_file(self, own_folder: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
        (own_folder / "images" / "2.jpg").write_bytes(b"broken")
        arguments = ("data", "verify", "--data", "folder", "--root", own_folder, "--format", "json")
        code, out, _ = call(*arguments, "--out", tmp_path / "report.json")
        assert code == 1
        report = json.loads(out)
        assert report == read(tmp_path / "report.json")
        assert report["problems"] >= 1
        text = json.dumps(report)
        assert "2.jpg" in text
        assert "photo cannot be decoded" in text

    def test_good_folder(self, own_folder: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
        out = tmp_path / "report.json"
        (own_folder / "masks" / "dog" / "4.png").rename(own_folder / "masks" / "cat" / "4.png")
        (own_folder / "masks" / "dog").rmdir()
        code, said, _ = call("data", "verify", "--data", "folder", "--root", own_folder, "--out", out)
        assert (code, said) == (0, "all: 5 images, 1 of 1 classes, problems: 0\n")
        assert read(out)["problems"] == 0

    @pytest.mark.parametrize("content", ["{", "[]", '{"shapes": 3}'])
    def test_one_broken_file_of_labelme(self, tmp_path: Path, call: Callable[..., Any], content: str) -> None:
        root = tmp_path / "labelme"
        root.mkdir()
        for k in range(3):
            photo = np.random.default_rng(k).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(photo).save(root / f"{k}.jpg")
            shape = {"label": "cat", "shape_type": "rectangle", "points": [[5, 5], [20, 20]]}
            sheet = {"imagePath": f"{k}.jpg", "imageWidth": 50, "imageHeight": 40, "shapes": [shape]}
            (root / f"{k}.json").write_text(json.dumps(sheet))
        arguments = ("data", "verify", "--data", "labelme", "--root", root)
        assert call(*arguments)[:2] == (0, "all: 3 images, 1 of 1 classes, problems: 0\n")
        (root / "1.json").write_text(content)
        code, out, _ = call(*arguments, "--format", "json")
        assert code == 1
        report = json.loads(out)
        (problem,) = report["splits"][0]["problems"]
        assert (problem["file"], problem["kind"]) == (str(root / "1.json"), "bad-annotation")
        assert (report["problems"], report["splits"][0]["images"]) == (1, 3)
        code, out, _ = call(*arguments)
        assert (code, len(out.splitlines())) == (1, 2)
        assert out.splitlines()[0] == "all: 3 images, 0 of 0 classes, problems: 1 (1 bad-annotation)"

    def test_no_such_layout(self, tmp_path: Path, call: Callable[..., Any]) -> None:
        for data in ("voc", "coco", "fss", "folder", "coco-json", "labelme"):
            code, out, last = call("data", "verify", "--data", data, "--root", tmp_path / "none")
            assert (code, out) == (2, "")
            assert str(tmp_path / "none") in last
            assert last.startswith("fewshot-seg: error: ")


class TestPrepare:
    @pytest.fixture
    def shelf(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """VOC's archive in tiny, and its size and digests instead of the official ones."""
        voc = tmp_path / "content" / "VOCdevkit" / "VOC2012"
        for name, content in (
            ("JPEGImages/2007_1.jpg", b"jpg"),
            ("SegmentationClass/2007_1.png", b"png"),
            ("ImageSets/Segmentation/train.txt", b"2007_1"),
        ):
            (voc / name).parent.mkdir(parents=True, exist_ok=True)
            (voc / name).write_bytes(content)
        folder = tmp_path / "shelf"
        folder.mkdir()
        with tarfile.open(folder / "VOCtrainval_11-May-2012.tar", "w") as archive:
            archive.add(tmp_path / "content" / "VOCdevkit", "VOCdevkit")
        content = (folder / "VOCtrainval_11-May-2012.tar").read_bytes()

        def tiny(*given: Any, **named: Any) -> tuple[Archive, ...]:
            facts: dict[str, Any] = {"size": len(content), "unpacked": 100_000}
            facts |= {"md5": hashlib.md5(content).hexdigest(), "sha256": hashlib.sha256(content).hexdigest()}
            return tuple(dataclasses.replace(one, **facts) for one in archives_of(*given, **named))

        monkeypatch.setattr(preparation, "archives_of", tiny)
        return folder

    def test_voc_from_archives(self, shelf: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
        target = tmp_path / "data"
        arguments = ("data", "prepare", "voc", "--target", target, "--archives", shelf, "--no-sbd")
        code, out, _ = call(*arguments)
        assert code == 0
        assert out.splitlines()[0] == "VOCtrainval_11-May-2012.tar: unpacked"
        assert out.splitlines()[-1].startswith("check it with: fewshot-seg data verify --data voc --root ")
        assert (target / "VOCdevkit" / "VOC2012" / "JPEGImages" / "2007_1.jpg").read_bytes() == b"jpg"
        assert call(*arguments)[0] == 0  # again: nothing to do

    def test_damaged_archive(self, shelf: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
        archive = shelf / "VOCtrainval_11-May-2012.tar"
        content = bytearray(archive.read_bytes())
        content[600] ^= 1
        archive.write_bytes(content)
        arguments = ("--target", tmp_path / "data", "--archives", shelf, "--no-sbd")
        code, out, last = call("data", "prepare", "voc", *arguments)
        assert (code, out) == (2, "")
        assert "VOCtrainval_11-May-2012.tar" in last
        assert not (tmp_path / "data" / "VOCdevkit").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "missing DATA_SET: which data set"),
            (["voc"], "missing --target: folder that the data set goes to"),
            (["ade", "--target", "x"], "DATA_SET must be one of voc, coco, fss; got 'ade'"),
            (["coco", "--target", "x", "--year", "2015"], "--year must be one of 2014, 2017; got '2015'"),
            (["voc", "coco", "--target", "x"], "unrecognized arguments: coco"),
            (["voc", "--target", "x", "--archives", "nowhere"], "nowhere lacks VOCtrainval_11-May-2012.tar"),
        ],
    )
    def test_mistakes(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        call: Callable[..., Any],
        arguments: list[str],
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        code, out, last = call("data", "prepare", *arguments)
        assert (code, out) == (2, "")
        assert last.startswith(f"fewshot-seg: error: {message}")
        assert not (tmp_path / "x").exists() or not any((tmp_path / "x").iterdir())

    def test_data_set_from_a_file(self, shelf: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
        (tmp_path / "p.toml").write_text(f'data-set = "voc"\ntarget = "{tmp_path / "data"}"\nsbd = false\n')
        assert call("data", "prepare", "--config", tmp_path / "p.toml", "--archives", shelf)[0] == 0


class TestShow:
    def test_pages(self, shared_voc: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
        out = tmp_path / "show"
        arguments = ("--resolution", "64", "--count", "3", "--supports", "box", "label", "--shots", "2")
        code, said, _ = call("data", "show", "--root", shared_voc, *arguments, "--out", out)
        assert code == 0
        assert said == f"3 episodes: {out / 'index.html'}\n"
        assert [path.name for path in sorted(out.glob("*.png"))] == ["page-001.png"]
        assert "voc, training: supports standard, queries standard" in (out / "index.html").read_text()
        assert read(out / "run.json")["configuration"]["supports"] == ["box", "label"]

    def test_without_base_classes_it_is_the_evaluation(
        self, own_folder: Path, tmp_path: Path, call: Callable[..., Any]
    ) -> None:
        out = tmp_path / "show"
        arguments = ("--data", "folder", "--root", own_folder, "--resolution", "64", "--count", "2", "--out", out)
        assert call("data", "show", *arguments)[0] == 0
        assert "folder, evaluation: supports" in (out / "index.html").read_text()

    def test_mistakes_leave_nothing(self, own_folder: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
        out = tmp_path / "show"
        arguments = ("--data", "folder", "--root", own_folder, "--out", out)
        code, _, last = call("data", "show", *arguments, "--shots", "9")
        assert code == 2
        assert "no 9-shot episodes: protocol custom has too few images of cat, dog in folder" in last
        code, _, last = call("data", "show", *arguments, "--query-augment", "mirror")
        assert code == 2
        assert "--query-augment must be one of none, flip, standard" in last
        assert not out.exists()
