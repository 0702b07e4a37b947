"""Weights that come with the package: found by name, checked by digest, and taken by `predict` by itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from episodes.types import DataError
from fewshot_seg.backbones import Backbone
from fewshot_seg.checkpoint import save_segmenter
from fewshot_seg.cli import main
from fewshot_seg.config import ExplainConfig, PredictConfig
from fewshot_seg.method import open_method
from fewshot_seg.segmenter import build_segmenter
from fewshot_seg.shipped import (
    GENERAL,
    ShippedModel,
    file_digest,
    general_model,
    model_file,
    shipped_model,
    shipped_models,
    verify_shipped,
    weights_folder,
    write_manifest,
)

NAMES = ("pascal-fold1", GENERAL)
NOTES = {"source": "joint", "members": {"voc": [1, 2]}, "base_class_names": ["airplane", "bus"]}
SCORE = {"metric": "mIoU", "value": 51.26, "shots": 1, "data": "PASCAL-5i/792"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSHOT_SEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of weights in place of the package's."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr("fewshot_seg.shipped.weights_folder", lambda: folder)
    return folder


@pytest.fixture
def weights(no_weights: Path, tiny_backbone: Backbone) -> Path:
    """A folder of two tiny models: of fold 1, and general, which has seen the classes 1 and 2 of VOC."""
    entries = []
    for name, fold in zip(NAMES, (1, None), strict=True):
        path = no_weights / f"{name}.safetensors"
        save_segmenter(
            path,
            build_segmenter(tiny_backbone, decoder_width=8, decoder_blocks=0),
            backbone_weights="random",
            resolution=64,
            notes={
                "fold": fold,
                "source": "joint",
                "members": {"voc": [1, 2]},
                "base_class_names": ["airplane", "bus"],
            },
        )
        (no_weights / f"{name}.md").write_text(f"# {name}\n")
        entries.append(
            ShippedModel(
                name=name,
                sha256=file_digest(path),
                bytes=path.stat().st_size,
                backbone=tiny_backbone.name,
                summary="A model.",
                data="2 classes",
                protocol="hsnet",
                fold=fold,
                resolution=64,
                parameters=1,
                commit=None,
                command="none",
                licence="Apache-2.0",
                scores=[] if name == GENERAL else [SCORE],
            )
        )
    write_manifest(no_weights, entries)
    return no_weights


class TestNames:
    def test_models_come_back_from_the_manifest(self, weights: Path) -> None:
        models = shipped_models()
        assert [model.name for model in models] == list(NAMES)
        assert [model.headline for model in models] == ["mIoU 51.3, 1-shot, PASCAL-5i/792", "-"]
        assert shipped_model(GENERAL) == general_model() == weights / "general.safetensors"

    @pytest.mark.usefixtures("weights")
    def test_unknown_name(self) -> None:
        message = "no shipped model 'pascal-fold2'; did you mean pascal-fold1? shipped are: pascal-fold1, general"
        with pytest.raises(DataError, match=message.replace("?", r"\?")):
            shipped_model("pascal-fold2")

    def test_missing_file(self, weights: Path) -> None:
        (weights / "general.safetensors").unlink()
        with pytest.raises(DataError, match="file of the shipped model 'general' is missing"):
            general_model()

    @pytest.mark.usefixtures("no_weights")
    def test_no_weights_at_all(self) -> None:
        assert shipped_models() == ()
        assert general_model() is None
        assert verify_shipped() == []
        with pytest.raises(DataError, match="'general'; this copy of fewshot-seg comes without weights"):
            shipped_model(GENERAL)

    def test_a_file_of_that_name_wins(self, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert model_file(Path(GENERAL)) == weights / "general.safetensors"
        Path(GENERAL).mkdir()  # a run folder is no model
        assert model_file(Path(GENERAL)) == weights / "general.safetensors"
        Path(GENERAL).rmdir()
        Path(GENERAL).touch()
        assert model_file(Path(GENERAL)) == Path(GENERAL)

    @pytest.mark.parametrize("given", ["general.safetensors", "runs/general"])
    @pytest.mark.usefixtures("weights")
    def test_paths_are_left_alone(self, given: str) -> None:
        assert model_file(Path(given)) == Path(given)

    def test_the_packages_own_folder(self) -> None:
        assert (weights_folder() / "README.md").is_file()
        assert verify_shipped() == []  # what lies in this checkout is whole

    def test_manifest_of_another_version(self, weights: Path) -> None:
        content = json.loads((weights / "manifest.json").read_text())
        for changed, message in (
            (content | {"format": 7}, "format 7, expected 1"),
            ({"format": 1, "models": [{"name": "x"}]}, "missing 13 required keyword-only arguments"),
        ):
            (weights / "manifest.json").write_text(json.dumps(changed))
            with pytest.raises(DataError, match=f"manifest.json is no manifest of this version .*{message}"):
                shipped_models()
            assert len(verify_shipped()) == 1


class TestVerify:
    @pytest.mark.usefixtures("weights")
    def test_all_is_well(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert verify_shipped() == []
        assert main(["weights", "verify"]) == 0
        assert "2 models, all of them as they were shipped and loadable" in capsys.readouterr().out

    def test_each_problem_has_its_line(self, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = weights / "pascal-fold1.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        (weights / "general.safetensors").unlink()
        (weights / "general.md").unlink()
        (weights / "stray.safetensors").touch()
        assert main(["weights", "verify"]) == 1
        printed = capsys.readouterr().err.splitlines()
        assert [line.split(": ")[1] for line in printed] == [
            "pascal-fold1.safetensors",
            "general.md",
            "general.safetensors",
            "stray.safetensors",
        ]
        for line, word in zip(
            printed, ("SHA-256 is not", "card is missing", "missing from", "not listed"), strict=True
        ):
            assert word in line

    def test_cut_off_file(self, weights: Path) -> None:
        path = weights / "general.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        assert "general.safetensors: 100 bytes, expected" in verify_shipped()[0]

    def test_file_that_cannot_be_loaded(self, weights: Path) -> None:
        models = list(shipped_models())
        path = weights / models[1].file
        path.write_bytes(b"\0" * 32)
        models[1] = dataclasses.replace(models[1], sha256=file_digest(path), bytes=32)
        write_manifest(weights, models)
        (problem,) = verify_shipped()
        assert problem.startswith("general.safetensors: ")
        assert "is damaged or was not written by fewshot-seg" in problem

    def test_manifest_that_says_otherwise(self, weights: Path) -> None:
        models = [dataclasses.replace(model, resolution=65) for model in shipped_models()]
        write_manifest(weights, models)
        assert "its resolution is 64, the manifest says 65" in verify_shipped()[0]


class TestCommandLine:
    @pytest.mark.usefixtures("weights")
    def test_list(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["weights", "list"]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].split() == ["name", "MB", "trained", "on", "score"]
        assert printed[2].endswith("2 classes  mIoU 51.3, 1-shot, PASCAL-5i/792")
        assert main(["weights", "list", "--format", "json"]) == 0
        assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == list(NAMES)

    @pytest.mark.usefixtures("no_weights")
    def test_list_of_none(self, capsys: pytest.CaptureFixture[str]) -> None:
        for verb in ("list", "verify"):
            assert main(["weights", verb]) == 0
            assert "comes without weights" in capsys.readouterr().out

    @pytest.mark.usefixtures("weights")
    def test_predict_by_name_and_by_itself(self, tiny_voc: Path, tmp_path: Path) -> None:
        methods = {}
        for name in (None, "pascal-fold1", "none"):
            out = tmp_path / str(name)
            model = [] if name is None else ["--model", name]
            assert main([*_predict(tiny_voc), "--out", str(out), *model]) == 0
            methods[name] = json.loads((out / "run.json").read_text())["results"]["method"]
        assert methods[None] == "general (shipped)"
        assert methods["pascal-fold1"] == "pascal-fold1 (shipped)"
        assert methods["none"] == "soft margin, training-free"

    @pytest.mark.usefixtures("weights")
    def test_wrong_name(self, tiny_voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*_predict(tiny_voc), "--model", "generl"]) == 2
        message = "--model generl: no such file and no shipped model; did you mean general? shipped are:"
        assert message in capsys.readouterr().err

    @pytest.mark.usefixtures("weights")
    def test_general_is_refused_on_classes_that_it_has_seen(
        self, tiny_voc: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = ["--root", str(tiny_voc), "--model", GENERAL]
        assert main(["evaluate", *data, "--fold", "0"]) == 2
        message = "general (shipped) was trained on aeroplane, bicycle, which fold 0 scores as novel"
        assert message in capsys.readouterr().err

    @pytest.mark.usefixtures("weights")
    def test_classes_of_other_data_are_told_by_name(
        self, tiny_voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        data = ["--root", str(tiny_voc), "--model", GENERAL, "--fold", "1", "--count", "4", "--out", str(out)]
        assert main(["evaluate", *data]) == 0
        assert "trained on classes of these names from other data: bus" in capsys.readouterr().out
        assert json.loads((out / "evaluation.json").read_text())["known_by_name"] == ["bus"]


class TestChoice:
    @pytest.fixture
    def name_of(self, weights: Path, monkeypatch: pytest.MonkeyPatch, tiny_backbone: Backbone) -> Callable[..., str]:
        """The method's name by the settings of `predict`, without loading the default backbone."""
        del weights
        monkeypatch.setattr("fewshot_seg.method.build_backbone", lambda *_, **__: tiny_backbone)

        def name(**settings: object) -> str:
            return open_method(PredictConfig(support=("a:b",), query=("q",), **settings), own_photos=True).name

        return name

    def test_general_gives_way_to_whatever_is_asked_for(self, name_of: Callable[..., str]) -> None:
        free = "soft margin, training-free"
        assert name_of() == name_of(threshold=0.1) == "general (shipped)"
        assert name_of(model=Path("none")) == name_of(backbone="mobilenetv3_small_050") == free
        assert name_of(backbone_weights="random") == name_of(strides=(16,)) == name_of(prior_map="soft margin") == free
        assert name_of(model=Path("none"), prior_map="prototype margin") == "prototype margin, training-free"

    def test_without_weights_nothing_trained(self, name_of: Callable[..., str], weights: Path) -> None:
        (weights / "manifest.json").unlink()
        assert name_of() == "soft margin, training-free"

    def test_explain_takes_no_model_by_itself(self, name_of: Callable[..., str]) -> None:
        del name_of
        assert open_method(ExplainConfig(data="synthetic")).name == "soft margin, training-free"


def _predict(voc: Path) -> list[str]:
    photo = voc / "JPEGImages" / "val_01_0.jpg"
    pair = f"{photo}:{voc / 'SegmentationClassAug' / 'val_01_0.png'}"
    return ["predict", "--support", pair, "--query", str(voc / "JPEGImages" / "val_01_1.jpg"), "--size", "64"]
