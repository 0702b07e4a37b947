"""Models, weights, features, checkpoints, run folders and configurations that are damaged or made to harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from episodes.files import is_file
from episodes.sources import SyntheticSource
from episodes.types import DataError
from fewshot_seg import cli
from fewshot_seg.backbones import Backbone
from fewshot_seg.backbones.weight_files import fit_weights, read_weights
from fewshot_seg.checkpoint import load_segmenter, load_similarity, read_tensors, save_segmenter, write_tensors
from fewshot_seg.config import EvaluateConfig, TrainConfig, resolve
from fewshot_seg.cross_fitting import are_priors, keep_tensors
from fewshot_seg.features import FeatureStore
from fewshot_seg.optimisation import CHECKPOINT_NAME, Plan, optimise
from fewshot_seg.photos import find_queries, open_photo, read_object_mask
from fewshot_seg.runs import check_folder
from fewshot_seg.runtime import read_json, write_json
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter
from fewshot_seg.support_files import load_support, save_support
from fewshot_seg.trainee import NamedModules

Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]


def refused(action: Callable[[], object], file: Path, match: str | None = None) -> None:
    with pytest.raises(DataError, match=match) as caught:
        action()
    assert str(file) in str(caught.value)
    assert str(caught.value).isprintable()


def rewrite(path: Path, change: Change) -> None:
    tensors, description = read_tensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors, description)
    write_tensors(path, tensors, description)


@pytest.fixture(scope="module")
def segmenter(tiny_backbone: Backbone) -> FewShotSegmenter:
    return build_segmenter(tiny_backbone, similarity_rank=2, base_classes=2).eval()


@pytest.fixture
def model(tmp_path: Path, segmenter: FewShotSegmenter) -> Path:
    path = tmp_path / "model.safetensors"
    save_segmenter(path, segmenter, backbone_weights="random", resolution=64, notes={"source": "voc", "fold": 0})
    return path


def put(name: str, value: Any) -> Change:
    return lambda tensors, _: tensors.update({name: value(tensors[name])})


def tell(**values: Any) -> Change:
    return lambda _, told: told.update(values)


WRONG_MODELS: dict[str, Change] = {
    "NaN": put("decoder.gain", lambda one: one * float("nan")),
    "infinity": put("similarity.up.weight", lambda one: one + float("inf")),
    "whole numbers": put("decoder.gain", lambda one: one.long()),
    "half precision": put("decoder.gain", lambda one: one.half()),
    "another shape": put("decoder.gain", lambda one: one[None]),
    "a rank that takes a terabyte": tell(similarity_rank=10**9),
    "a rank that takes 4 GB": tell(similarity_rank=1_000_000),
    "a decoder that takes 16 GB": tell(decoder={"kind": "context", "prior_channels": 4, "width": 65_000}),
    "a billion layers": tell(decoder={"kind": "mask", "prior_channels": 1, "feature_channels": 8, "blocks": 10**9}),
    "a billion classes": tell(base_learner={"feature_channels": 8, "classes": 10**9}),
    "a threshold that is none": tell(threshold=float("nan")),
    "a temperature without end": tell(temperature=10**400),
    "a resolution without end": tell(resolution=float("inf")),
    "a resolution that takes a terabyte": tell(resolution=10**6),
    "a backbone that is a list": tell(backbone=["x"]),
    "a backbone of numbers": tell(backbone=5),
    "weights that are a number": tell(backbone_weights=5),
    "strides of halves": tell(strides=[16, 32.0]),
    "strides of texts": tell(strides=["16"]),
    "a decoder that is a list": tell(decoder=["mask"]),
    "a decoder of no kind": tell(decoder={"kind": ["mask"]}),
    "notes of classes that are none": tell(notes={"source": "voc", "base_classes": 5}),
    "notes of members that are none": tell(notes={"members": ["voc"]}),
    "notes of a fold that is none": tell(notes={"fold": "zero"}),
}


class TestModels:
    def test_the_sound_one(self, model: Path) -> None:
        assert load_segmenter(model).resolution == 64

    @pytest.mark.parametrize("what", WRONG_MODELS)
    def test_wrong_ones_are_refused_and_take_no_memory(self, model: Path, what: str) -> None:
        rewrite(model, WRONG_MODELS[what])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refused(lambda: load_segmenter(model), model)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB

    def test_a_similarity_network_takes_no_memory_on_its_word(self, model: Path) -> None:
        rewrite(model, tell(similarity_rank=1_000_000))
        refused(lambda: load_similarity(model), model, "2 tensors differ")

    def test_deep_descriptions(self, model: Path) -> None:
        deep = "[" * 100_000 + "]" * 100_000
        save_file({"x": torch.zeros(1)}, model, metadata={"fewshot_seg": deep})
        refused(lambda: load_segmenter(model), model, "is damaged or was not written by fewshot-seg")

    def test_a_pickle_is_no_model(self, tmp_path: Path) -> None:
        mark = tmp_path / "executed"
        path = tmp_path / "model.safetensors"
        path.write_bytes(pickle.dumps(RunsCode(mark)))
        refused(lambda: load_segmenter(path), path, "is damaged or was not written")
        assert not mark.exists()

    def test_a_pipe_and_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", tmp_path / ("x" * 300), tmp_path):
            refused(lambda path=path: load_segmenter(path), path, "no model file")


class RunsCode:
    """Its pickle makes a folder where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def tiny_encoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def fit(state: dict[str, Any], path: Path) -> dict[str, Tensor]:
    torch.save(state, path)
    return fit_weights(tiny_encoder(), read_weights(path), name="tiny", where=str(path))


class TestWeights:
    @pytest.mark.parametrize("new", [True, False])
    @pytest.mark.parametrize("nested", [True, False])
    def test_code_is_never_run(self, tmp_path: Path, new: bool, nested: bool) -> None:
        path, mark = tmp_path / "weights.pth", tmp_path / "executed"
        code = RunsCode(mark)
        torch.save({"state_dict": {"x": code}} if nested else code, path, _use_new_zipfile_serialization=new)
        refused(lambda: read_weights(path), path, "it holds code or objects beside tensors, and none of that is run")
        assert not mark.exists()

    def test_a_bare_pickle_with_code(self, tmp_path: Path) -> None:
        path, mark = tmp_path / "weights.pkl", tmp_path / "executed"
        path.write_bytes(pickle.dumps(RunsCode(mark)))
        refused(lambda: read_weights(path), path)
        assert not mark.exists()

    @pytest.mark.parametrize(
        "change",
        [
            lambda one: one * float("nan"),
            lambda one: one.to(torch.complex64),
            lambda one: one.long(),
            lambda one: one.to_sparse(),
            lambda one: one.bool(),
            lambda one: one.reshape(-1),
        ],
    )
    def test_tensors_that_are_no_weights(self, tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
        state = tiny_encoder().state_dict()
        state["0.weight"] = change(state["0.weight"])
        path = tmp_path / "weights.pth"
        refused(lambda: fit(state, path), path, r"does not fit: 1 of \d+ tensors .* first 0.weight")

    def test_half_precision_is_welcome(self, tmp_path: Path) -> None:
        state = {
            name: one.half() if one.is_floating_point() else one for name, one in tiny_encoder().state_dict().items()
        }
        assert fit(state, tmp_path / "weights.pth").keys() == state.keys()

    @pytest.mark.parametrize("state", [{1: torch.zeros(1)}, {"a": 3}, [torch.zeros(1)], torch.zeros(1), None, {}])
    def test_wrong_keys_and_values(self, tmp_path: Path, state: Any) -> None:
        refused(lambda: fit(state, tmp_path / "weights.pth"), tmp_path / "weights.pth")

    def test_a_compressed_one_is_a_bomb(self, tmp_path: Path) -> None:
        buffer, path = io.BytesIO(), tmp_path / "weights.pth"
        torch.save({"x": torch.zeros(3_000_000)}, buffer)
        with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for member in plain.infolist():
                packed.writestr(member.filename, plain.read(member))
        assert path.stat().st_size < 50_000
        refused(lambda: read_weights(path), path, "it is compressed, which PyTorch's own files are not")


class TestSupportSets:
    @pytest.mark.parametrize(
        "change",
        [
            put("cells", lambda one: one.half()),
            put("cells", lambda one: one.double()),
            put("frozen", lambda one: one * float("inf")),
            put("frozen", lambda one: one[..., None]),
            put("open", lambda one: one.bool()),
            lambda tensors, _: tensors.pop("profile"),
            lambda tensors, _: tensors.clear(),
        ],
    )
    def test_wrong_tensors(self, tmp_path: Path, segmenter: FewShotSegmenter, change: Change) -> None:
        path = tmp_path / "set.safetensors"
        masks = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
        encoding = segmenter.encode_support(torch.rand(1, 1, 3, 64, 64), masks)
        save_support(path, encoding, segmenter, resolution=64, fit="squash", names=["a"])
        rewrite(path, tell(names=5))  # is for people alone
        assert load_support(path, segmenter, resolution=64, fit="squash").names == ()
        rewrite(path, change)
        refused(lambda: load_support(path, segmenter, resolution=64, fit="squash"), path, "is damaged")


class TestFeatures:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_none_are_computed_anew(
        self, tmp_path: Path, tiny_backbone: Backbone, tiny_source: SyntheticSource, value: float
    ) -> None:
        ids = tiny_source.ids("train")[:1]
        expected = FeatureStore(tiny_backbone, tiny_source, size=64, directory=tmp_path).get(ids)
        (file,) = tmp_path.glob("*/*.safetensors")
        tensors = load_file(file)
        tensors["level0"][0, 0, 0] = value
        import fewshot_seg.features

        checksum = fewshot_seg.features._checksum([tensors[f"level{n}"] for n in range(len(tensors))])
        save_file(tensors, file, metadata={"crc32": checksum})  # as whoever wrote it meant it
        with pytest.warns(UserWarning, match="not finite"):
            found = FeatureStore(tiny_backbone, tiny_source, size=64, directory=tmp_path).get(ids)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    def test_a_pipe_in_place_of_a_file(
        self, tmp_path: Path, tiny_backbone: Backbone, tiny_source: SyntheticSource
    ) -> None:
        ids = tiny_source.ids("train")[:1]
        expected = FeatureStore(tiny_backbone, tiny_source, size=64, directory=tmp_path).get(ids)
        (file,) = tmp_path.glob("*/*.safetensors")
        file.unlink()
        os.mkfifo(file)
        with pytest.warns(UserWarning, match="named pipe"):
            found = FeatureStore(tiny_backbone, tiny_source, size=64, directory=tmp_path).get(ids)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    def test_a_backbone_that_gives_no_numbers(self, tmp_path: Path, tiny_source: SyntheticSource) -> None:
        from fewshot_seg.backbones import build_backbone

        broken = build_backbone("mobilenetv3_small_050", weights="random")
        with torch.no_grad():
            next(broken.encoder.parameters()).fill_(float("nan"))
        store = FeatureStore(broken, tiny_source, size=64, directory=tmp_path)
        with pytest.raises(DataError, match=r"features of '.*' that are not finite"):
            store.get(tiny_source.ids("train")[:1])
        assert not list(tmp_path.glob("*/*.safetensors"))


def train(folder: Path, *, resume: bool = False) -> None:
    module = nn.Linear(3, 1)
    optimise(
        NamedModules(part=module),
        lambda step: (torch.ones(1, 3) for _ in range(step, 2)),
        lambda batch: {"loss": module(batch).square().mean()},
        plan=Plan(steps=2, learning_rate=1e-3, weight_decay=0.0, schedule="cosine", seed=0, details={}),
        describe=str,
        folder=folder,
        resume=resume,
    )


class TestTrainings:
    @pytest.mark.parametrize(
        "change",
        [
            put("optimiser.0.exp_avg", lambda one: one[..., None]),
            put("optimiser.0.exp_avg", lambda one: one * float("nan")),
            put("optimiser.0.exp_avg", lambda one: one.half()),
            put("part.weight", lambda one: one * float("nan")),
            lambda tensors, _: tensors.pop("optimiser.0.step"),
            lambda tensors, _: tensors.update({"optimiser.0.surplus": torch.zeros(1)}),
            tell(step=-1),
            tell(step="one"),
            tell(step=10**9),
            lambda _, told: told.pop("step"),
        ],
    )
    def test_checkpoints(self, tmp_path: Path, change: Change) -> None:
        train(tmp_path)
        train(tmp_path, resume=True)
        rewrite(tmp_path / CHECKPOINT_NAME, change)
        refused(lambda: train(tmp_path, resume=True), tmp_path / CHECKPOINT_NAME)

    def test_a_log_that_is_no_text(self, tmp_path: Path) -> None:
        train(tmp_path)
        (tmp_path / "training.jsonl").write_bytes(b"\xff\xff")
        refused(lambda: train(tmp_path, resume=True), tmp_path / "training.jsonl")
        (tmp_path / "training.jsonl").write_text('{"step": 1e999}\n' + "[" * 100_000 + '\n{"step": 1}\n[]\n')
        train(tmp_path, resume=True)
        assert (tmp_path / "training.jsonl").read_text() == '{"step": 1}\n'

    @pytest.mark.parametrize(
        "change",
        [
            lambda tensors, _: tensors.pop("priors"),
            put("priors", lambda one: one * float("nan")),
            put("foreground", lambda one: one[:1]),
            put("class_ids", lambda one: one.float()),
            tell(settings=["a"]),
        ],
    )
    def test_stored_priors(self, tmp_path: Path, change: Change) -> None:
        path = tmp_path / "priors.safetensors"

        def compute() -> dict[str, Tensor]:
            half = {name: torch.rand(2, 3, 4, 4).half() for name in ("priors", "foreground", "background")}
            return {name: one if name == "priors" else one[:, 0] for name, one in half.items()} | {
                "class_ids": torch.arange(2)
            }

        keep_tensors(path, compute, {"a": 1}, is_sound=are_priors)
        rewrite(path, change)
        refused(lambda: keep_tensors(path, compute, {"a": 1}, is_sound=are_priors), path, "is damaged")

    @pytest.mark.parametrize(
        "record", ["[]", "3", '{"configuration": 3}', "{}", "[" * 100_000, "", '{"configuration": []}']
    )
    def test_run_records(self, tmp_path: Path, record: str) -> None:
        (tmp_path / "run.json").write_text(record)
        config = TrainConfig(data="synthetic", out=tmp_path, resume=True)
        refused(lambda: check_folder(config, ("run.json",)), tmp_path)


class TestConfiguration:
    @pytest.mark.parametrize(
        "text",
        ["learning_rate = nan", "learning_rate = inf", f"learning_rate = {'9' * 400}", f"steps = {'9' * 5000}",
         "a = " + "[" * 5000, "steps = true", 'out = 3', "\0", "steps = 3\nsteps = 4", "decoder_steps = 1e999"],
    )  # fmt: skip
    def test_values_that_are_none(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "c.toml"
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            resolve(TrainConfig, {"data": "synthetic", "out": tmp_path}, path)
        assert str(caught.value).isprintable()

    def test_a_threshold_is_a_number(self) -> None:
        with pytest.raises(DataError, match="--threshold must be a finite number, got nan"):
            EvaluateConfig(data="synthetic", threshold=float("nan"))

    def test_a_home_of_nobody_is_a_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["report", "~nobody-of-this-name/run"]) == 2
        assert "~nobody-of-this-name/run: no such folder" in capsys.readouterr().err

    def test_a_file_in_a_name_does_not_break_the_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["report", "a\nb\x1b[31mc"]) == 2
        assert "a\\nb\\x1b[31mc: no such folder" in capsys.readouterr().err


class TestPhotos:
    def test_links_in_circles_are_not_followed(self, tmp_path: Path) -> None:
        """Two links to their own folder are 2^40 ways to the same photos."""
        (tmp_path / "in").mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / "in" / "a.png")
        for name in ("one", "two", "three"):
            (tmp_path / name).symlink_to(tmp_path)
            (tmp_path / "in" / name).symlink_to("..")
        (tmp_path / "self.png").symlink_to("self.png")
        assert find_queries([str(tmp_path / "**" / "*.png")]) == [tmp_path / "in" / "a.png"]
        assert find_queries([str(tmp_path / "**")]) == [tmp_path / "in" / "a.png"]

    def test_globs_as_ever(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("a.png", "b.png", ".hidden.png", "sub/c.png", ".cache/d.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (4, 4)).save(tmp_path / name)
        monkeypatch.chdir(tmp_path)
        assert find_queries(["*.png"]) == [Path("a.png"), Path("b.png")]
        assert find_queries(["**/*.png"]) == [Path("a.png"), Path("b.png"), Path("sub/c.png")]
        assert find_queries([".h*.png"]) == [Path(".hidden.png")]
        assert find_queries(["./*.png", "sub/../[a]*"]) == [Path("a.png"), Path("b.png"), Path("sub/../a.png")]
        assert find_queries([f"{tmp_path}/[ab].png"]) == [tmp_path / "a.png", tmp_path / "b.png"]
        for pattern in ("[", "a**b", "x*"):
            with pytest.raises(DataError, match="no such file, folder or match"):
                find_queries([pattern])

    @pytest.mark.parametrize(
        "content", [b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\x89PNG\r\n\x1a\n"]
    )
    def test_what_is_no_picture(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(content)
        refused(lambda: open_photo(path), path, "photo cannot be decoded")
        refused(lambda: read_object_mask(path), path, "mask cannot be decoded")

    def test_a_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.png")
        refused(lambda: open_photo(tmp_path / "a.png"), tmp_path / "a.png", "no such file")
        assert not is_file(tmp_path / "a.png")


def test_json_of_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.jpg")
    write_json(tmp_path / "a.json", {"file": name, "é": np.pi})
    assert read_json(tmp_path / "a.json", what="file") == {"file": name, "é": np.pi}
    assert json.loads((tmp_path / "a.json").read_bytes())["file"] == name
