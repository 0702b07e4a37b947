"""Encoded supports as files: what comes back is what was put in, and nothing else is taken."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from episodes.protocols import Fit
from episodes.types import DataError
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.checkpoint import save_segmenter, write_tensors
from fewshot_seg.cli import main
from fewshot_seg.encodings import SupportEncoding
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter, training_free
from fewshot_seg.support_files import load_support, model_digest, save_support

SIZE = 64
TINY = ("--backbone", "mobilenetv3_small_050", "--backbone-weights", "random", "--size", "64")


@pytest.fixture
def segmenter(tiny_backbone: Backbone) -> FewShotSegmenter:
    return build_segmenter(tiny_backbone, decoder_width=8, decoder_blocks=1, completion=True).eval()


@pytest.fixture
def learned(tiny_backbone: Backbone) -> FewShotSegmenter:
    """With a base learner that knows something."""
    segmenter, generator = build_segmenter(tiny_backbone, base_classes=3), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in segmenter.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return segmenter.eval()


def encoded(segmenter: FewShotSegmenter, *, weak: bool = False, shots: int = 2) -> SupportEncoding:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(1, shots, SIZE, SIZE, dtype=torch.uint8)
    masks[..., 10:40, 20:60] = 255 if weak else 1
    with torch.no_grad():
        return segmenter.encode_support(
            torch.rand(1, shots, 3, SIZE, SIZE, generator=generator), masks, torch.full((1, shots), not weak)
        )


@pytest.fixture
def path(segmenter: FewShotSegmenter, tmp_path: Path) -> Path:
    path = tmp_path / "sets" / "cats.safetensors"
    save_support(path, encoded(segmenter), segmenter, resolution=SIZE, fit="squash", names=("a.jpg:a.png", "b.jpg"))
    return path


@pytest.mark.parametrize("weak", [False, True])
def test_comes_back_to_the_last_digit(segmenter: FewShotSegmenter, tmp_path: Path, weak: bool) -> None:
    support = encoded(segmenter, weak=weak)
    save_support(tmp_path / "s.safetensors", support, segmenter, resolution=SIZE, fit="pad", names=("a", "b"))
    back = load_support(tmp_path / "s.safetensors", segmenter, resolution=SIZE, fit="pad")
    assert back.names == ("a", "b")
    for field in fields(SupportEncoding):
        assert torch.equal(getattr(back.encoding, field.name), getattr(support, field.name)), field.name
    query = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(segmenter.segment(back.encoding, query).logits, segmenter.segment(support, query).logits)


def test_of_a_model_with_a_base_learner(learned: FewShotSegmenter, tmp_path: Path) -> None:
    support, path = encoded(learned), tmp_path / "s.safetensors"
    assert support.profile.shape == (1, 3)
    save_support(path, support, learned, resolution=SIZE, fit="squash")
    back = load_support(path, learned, resolution=SIZE, fit="squash").encoding
    for field in fields(SupportEncoding):
        assert torch.equal(getattr(back, field.name), getattr(support, field.name)), field.name
    query = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(learned.segment(back, query).logits, learned.segment(support, query).logits)
        assert learned.base_learner is not None
        learned.base_learner.bias[0] += 1
    with pytest.raises(DataError, match="made by another model; give the one that made it"):
        load_support(path, learned, resolution=SIZE, fit="squash")


@pytest.mark.parametrize("number", [-1, 10**6, None])
def test_numbers_of_supports_that_cannot_be_are_refused(
    segmenter: FewShotSegmenter, tmp_path: Path, number: int | None
) -> None:
    path = tmp_path / "s.safetensors"
    save_support(path, encoded(segmenter, weak=True), segmenter, resolution=SIZE, fit="pad")
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["fewshot_seg"])
    tensors = load_file(path)
    photo = tensors["photo"]
    tensors["photo"] = photo.float() if number is None else photo.clone().fill_(number)
    write_tensors(path, tensors, description)
    with pytest.raises(DataError, match="its tensors are not those of a support set"):
        load_support(path, segmenter, resolution=SIZE, fit="pad")


@pytest.mark.parametrize("damage", ["lacking", "classes", "dimensions", "nan"])
def test_a_damaged_profile_is_refused(learned: FewShotSegmenter, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s.safetensors"
    save_support(path, encoded(learned), learned, resolution=SIZE, fit="squash")
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["fewshot_seg"])
    tensors = load_file(path)
    profile = tensors.pop("profile")
    changed = {
        "classes": profile[:, 1:].contiguous(),
        "dimensions": profile[0],
        "nan": profile * float("nan"),
    }
    if damage != "lacking":
        tensors["profile"] = changed[damage]
    write_tensors(path, tensors, description)
    with pytest.raises(DataError, match="its tensors are not those of a support set"):
        load_support(path, learned, resolution=SIZE, fit="squash")


def test_the_threshold_may_differ(segmenter: FewShotSegmenter, path: Path) -> None:
    segmenter.threshold = 0.7
    assert load_support(path, segmenter, resolution=SIZE, fit="squash").names == ("a.jpg:a.png", "b.jpg")


class TestRefused:
    def test_several_episodes(self, segmenter: FewShotSegmenter, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds one set of supports, got 3"):
            save_support(
                tmp_path / "s.safetensors", encoded(segmenter).expand(3), segmenter, resolution=SIZE, fit="squash"
            )

    @pytest.mark.parametrize("part", ["similarity", "decoder", "completion"])
    def test_another_model(self, segmenter: FewShotSegmenter, path: Path, part: str) -> None:
        before = model_digest(segmenter)
        with torch.no_grad():
            next(getattr(segmenter, part).parameters()).flatten()[0] += 1e-3
        assert model_digest(segmenter) != before
        with pytest.raises(DataError, match="made by another model; give the one that made it"):
            load_support(path, segmenter, resolution=SIZE, fit="squash")

    def test_another_backbone(self, path: Path) -> None:
        other = build_segmenter(build_backbone("mobilenetv3_small_050", strides=(8, 16), weights="random"))
        with pytest.raises(DataError, match=r"other weights or strides of a backbone \('mobilenetv3_small_050'\)"):
            load_support(path, other, resolution=SIZE, fit="squash")

    @pytest.mark.parametrize(("resolution", "fit"), [(96, "squash"), (64, "pad")])
    def test_another_resolution_or_fit(
        self, segmenter: FewShotSegmenter, path: Path, resolution: int, fit: Fit
    ) -> None:
        with pytest.raises(DataError, match=r"fitted to 64 pixels by 'squash', queries.*use --size 64"):
            load_support(path, segmenter, resolution=resolution, fit=fit)

    def test_missing(self, segmenter: FewShotSegmenter, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no support set at .*none\.safetensors; write one with"):
            load_support(tmp_path / "none.safetensors", segmenter, resolution=SIZE, fit="squash")

    @pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\xff" * 64])
    def test_foreign(self, segmenter: FewShotSegmenter, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"cats\.safetensors is damaged or no support set"):
            load_support(path, segmenter, resolution=SIZE, fit="squash")

    def test_cut_short(self, segmenter: FewShotSegmenter, path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DataError, match=r"cats\.safetensors is damaged or no support set"):
            load_support(path, segmenter, resolution=SIZE, fit="squash")

    def test_safetensors_of_others(self, segmenter: FewShotSegmenter, tmp_path: Path) -> None:
        save_file({"cells": torch.zeros(2)}, tmp_path / "s.safetensors")
        with pytest.raises(DataError, match="is damaged or no support set"):
            load_support(tmp_path / "s.safetensors", segmenter, resolution=SIZE, fit="squash")

    def test_a_model(self, segmenter: FewShotSegmenter, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        save_segmenter(path, segmenter, backbone_weights="random", resolution=SIZE)
        with pytest.raises(DataError, match="holds a model, not a support set"):
            load_support(path, segmenter, resolution=SIZE, fit="squash")

    @pytest.mark.parametrize("damage", ["lacking", "shape", "dimensions", "nan", "integers"])
    def test_other_tensors(self, segmenter: FewShotSegmenter, path: Path, damage: str) -> None:
        with safe_open(path, framework="pt") as file:
            description = json.loads(file.metadata()["fewshot_seg"])
        tensors = load_file(path)
        if damage == "lacking":
            del tensors["share"]
        elif damage == "shape":
            tensors["share"] = tensors["share"][:, 1:]
        elif damage == "dimensions":
            tensors["frozen"] = tensors["frozen"][0]
        elif damage == "nan":
            tensors["prototype"][0, 3] = float("nan")
        else:
            tensors["prototype"] = tensors["prototype"].int()
        write_tensors(path, tensors, description)
        with pytest.raises(DataError, match="its tensors are not those of a support set"):
            load_support(path, segmenter, resolution=SIZE, fit="squash")


def test_digest_of_a_model_without_a_decoder_of_its_own(tiny_backbone: Backbone) -> None:
    assert model_digest(training_free(tiny_backbone)) == model_digest(training_free(tiny_backbone, threshold=3.0))


class TestCommandLine:
    @pytest.fixture
    def photo(self, tmp_path: Path) -> Path:
        random = np.random.default_rng(0)
        pixels = random.integers(90, 130, (50, 80, 3)).astype(np.uint8)
        mask = np.zeros((50, 80), np.uint8)
        mask[10:40, 20:60] = 255
        pixels[mask == 255] = (220, 30, 30)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        Image.fromarray(mask).save(tmp_path / "a_mask.png")
        return tmp_path / "a.png"

    def test_saved_and_used(self, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pair, file = f"{photo}:{tmp_path / 'a_mask.png'}", tmp_path / "set.safetensors"
        query = ["--query", str(photo)]
        saved = [*TINY, "--support", pair, "--save-support", str(file)]
        assert main(["predict", *saved, *query, "--out", str(tmp_path / "one")]) == 0
        assert main(["predict", *TINY, "--support-set", str(file), *query, "--out", str(tmp_path / "two")]) == 0
        assert (tmp_path / "one/masks/a.png").read_bytes() == (tmp_path / "two/masks/a.png").read_bytes()
        records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
        assert records[0]["results"]["photos"] == records[1]["results"]["photos"]
        assert records[1]["results"]["supports"] == [pair]
        before = file.read_bytes()
        file.unlink()
        capsys.readouterr()
        assert main(["predict", *saved, "--out", str(tmp_path / "three")]) == 0
        assert file.read_bytes() == before
        assert capsys.readouterr().out == f"support set of 1 photo(s): {file}\n"
        assert not (tmp_path / "three").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--query", "x.jpg"], "missing --support: PHOTO:MASK pairs.*or --support-set"),
            (["--support", "x.jpg"], "missing --query: photos to segment"),
            (["--support-set", "f", "--save-support", "g"], "--save-support keeps what --support shows"),
        ],
    )
    def test_flags_that_do_not_go_together(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["predict", *arguments]) == 2
        assert re.search(message, capsys.readouterr().err)
