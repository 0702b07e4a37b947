"""Device, environment record, atomic files."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from pathlib import Path

import pytest
import torch

from episodes.types import DataError
from fewshot_seg import runtime
from fewshot_seg.runtime import atomic_path, environment, git_commit, pick_device, read_json, write_json


class TestPickDevice:
    def test_auto_takes_a_gpu_where_there_is_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert pick_device() == torch.device("cpu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert pick_device("auto") == torch.device("cuda")

    def test_cpu_by_name(self) -> None:
        assert pick_device("cpu") == torch.device("cpu")

    @pytest.mark.parametrize("name", ["nonsense", "", "cuda:99", "meta", "hpu"])
    def test_a_device_that_is_not_here(self, name: str) -> None:
        with pytest.raises(DataError, match=f"device '{name}' is not available here; use 'auto' or 'cpu'"):
            pick_device(name)


class TestEnvironment:
    def test_names_the_versions_that_results_depend_on(self) -> None:
        record = environment()
        for package in ("torch", "timm", "segmentation-models-pytorch", "albumentations", "numpy"):
            assert record["versions"][package] == importlib.metadata.version(package)
        assert record["threads"] == torch.get_num_threads()
        assert json.loads(json.dumps(record)) == record

    def test_a_missing_package_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime, "_RECORDED", ("torch", "no-such-package"))
        assert list(environment()["versions"]) == ["torch"]

    def test_commit_of_the_checkout(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "fewshot_seg" / "runtime.py"
        package.parent.mkdir()
        package.write_text("content\n")
        monkeypatch.setattr(runtime, "__file__", str(package))
        assert git_commit() is None  # no repository at all

        def git(*arguments: str) -> str:
            identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
            command = ["git", "-C", str(tmp_path), *identity, *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

        git("init")
        (tmp_path / "other").write_text("other\n")
        git("add", "other")
        git("commit", "-m", "first")
        assert git_commit() is None  # somebody else's repository around an installed copy
        git("add", ".")
        git("commit", "-m", "second")
        commit = git("rev-parse", "--short=12", "HEAD")
        assert git_commit() == commit
        package.write_text("changed\n")
        assert git_commit() == f"{commit}-dirty"

    def test_no_git_program(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        assert git_commit() is None


class TestAtomicPath:
    def test_writes_and_makes_folders(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "folder" / "weights.bin"
        with atomic_path(path) as temporary:
            assert temporary.parent == path.parent  # a rename is atomic on one file system only
            assert temporary.suffix == ".bin"  # writers that choose a format by suffix
            temporary.write_bytes(b"new")
            assert not path.exists()
        assert path.read_bytes() == b"new"
        assert [file.name for file in path.parent.iterdir()] == ["weights.bin"]
        assert path.stat().st_mode & 0o777 == 0o644  # mkstemp's own 0600 would hide results from colleagues

    @pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
    def test_a_failing_block_keeps_the_old_file(self, tmp_path: Path, failure: type[BaseException]) -> None:
        path = tmp_path / "weights.bin"
        path.write_bytes(b"old")
        with pytest.raises(failure), atomic_path(path) as temporary:  # noqa: PT012 - the write comes first
            temporary.write_bytes(b"half")
            raise failure
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        blocked = tmp_path / "file"
        blocked.write_text("not a folder")
        expected = r"cannot write .*file/sub/out\.json: .*; choose a folder you may write to"
        with pytest.raises(DataError, match=expected), atomic_path(blocked / "sub" / "out.json"):
            pytest.fail("the block must not run")

    def test_a_folder_is_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "comparison").mkdir()
        expected = r"cannot write .*/comparison: it is a folder; give the path of a file"
        with pytest.raises(DataError, match=expected), atomic_path(tmp_path / "comparison"):
            pytest.fail("the block must not run")
        assert list(tmp_path.iterdir()) == [tmp_path / "comparison"]

    def test_long_names(self, tmp_path: Path) -> None:
        path = tmp_path / ("x" * 250 + ".json")
        write_json(path, 1)
        assert read_json(path, what="number") == 1


class TestJson:
    def test_round_trip(self, tmp_path: Path) -> None:
        value = {"mIoU": 45.5, "class": "Hände", "nested": [1, None, True]}
        path = tmp_path / "run.json"
        write_json(path, value)
        assert read_json(path, what="run record") == value
        assert path.read_text(encoding="utf-8").endswith("}\n")
        assert "Hände" in path.read_text(encoding="utf-8")

    def test_a_value_that_is_not_json_keeps_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "run.json"
        write_json(path, 1)
        with pytest.raises(TypeError):
            write_json(path, {"tensor": torch.zeros(1)})
        assert read_json(path, what="run record") == 1
        assert list(tmp_path.iterdir()) == [path]

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"cannot read run record .*run\.json: No such file"):
            read_json(tmp_path / "run.json", what="run record")

    @pytest.mark.parametrize("content", [b'{"half": ', b"\xff\xfe\x00", b""])
    def test_damaged(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "run.json"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"run record .*run\.json is not valid JSON .*delete it or restore it"):
            read_json(path, what="run record")
