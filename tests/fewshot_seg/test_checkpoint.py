"""Model files: what is written is read back exactly, and every damage has its one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fewshot_seg.checkpoint
from episodes.types import DataError
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.checkpoint import (
    load_segmenter,
    load_trained_tensors,
    read_tensors,
    save_segmenter,
    trained_tensors,
    write_tensors,
)
from fewshot_seg.segmenter import FewShotSegmenter, Prediction, build_segmenter, training_free


def disturbed(segmenter: FewShotSegmenter) -> FewShotSegmenter:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in segmenter.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return segmenter.eval()


def make(backbone: Backbone, kind: str) -> FewShotSegmenter:
    small: dict[str, Any] = {"similarity_rank": 3, "decoder_width": 8, "decoder_blocks": 1}
    made: dict[str, Callable[[], FewShotSegmenter]] = {
        "ours": lambda: build_segmenter(backbone, appearance=2, attention="triplet", **small),
        "pfenet": lambda: build_segmenter(backbone, prior="pfenet", **small),
        "none": lambda: build_segmenter(backbone, prior="none", appearance=2, **small),
        "readout": lambda: training_free(backbone, channel="gradient attention", temperature=0.1),
    }
    segmenter = disturbed(made[kind]())
    segmenter.threshold = 0.25
    return segmenter


def predict(segmenter: FewShotSegmenter) -> Prediction:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    masks[..., 10:40, 10:50] = 1
    support = segmenter.encode_support(torch.rand(1, 1, 3, 64, 64, generator=generator), masks)
    return segmenter.segment(support, torch.rand(1, 3, 64, 64, generator=generator))


@pytest.fixture
def model(tmp_path: Path, tiny_backbone: Backbone) -> Path:
    path = tmp_path / "model.safetensors"
    save_segmenter(path, make(tiny_backbone, "ours"), backbone_weights="random", resolution=64)
    return path


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_segmenter(path)
    assert "\n" not in str(caught.value)


class TestRoundTrip:
    @pytest.mark.parametrize("kind", ["ours", "pfenet", "none", "readout"])
    def test_predictions_are_identical(self, tmp_path: Path, tiny_backbone: Backbone, kind: str) -> None:
        segmenter, notes = make(tiny_backbone, kind), {"fold": 2, "data": "Voc über alles"}
        path = tmp_path / "new" / "model.safetensors"
        save_segmenter(path, segmenter, backbone_weights="random", resolution=96, notes=notes)
        loaded = load_segmenter(path)
        assert loaded.resolution == 96
        assert loaded.notes == notes
        assert not any(module.training for module in loaded.segmenter.modules())
        before, after = predict(segmenter), predict(loaded.segmenter)
        assert torch.equal(after.logits, before.logits)
        assert torch.equal(after.attention, before.attention)
        assert torch.equal(after.masks, before.masks)
        settings = ("prior", "attention", "threshold", "temperature")
        assert [getattr(loaded.segmenter, s) for s in settings] == [getattr(segmenter, s) for s in settings]

    def test_tensors_and_description(self, tmp_path: Path) -> None:
        tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor(3)}
        description = {"format": 1, "rate": 0.1, "name": "ü", "nested": [1, None]}
        write_tensors(tmp_path / "state", tensors, description)
        read, told = read_tensors(tmp_path / "state")
        assert told == description
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)

    def test_the_file_holds_no_backbone(self, model: Path) -> None:
        tensors, _ = read_tensors(model)
        assert {name.split(".")[0] for name in tensors} == {"similarity", "decoder"}

    def test_other_backbone_weights_by_file(self, tmp_path: Path, tiny_backbone: Backbone) -> None:
        other = build_backbone(tiny_backbone.name, weights="random", seed=7)
        segmenter = make(other, "ours")
        save_segmenter(tmp_path / "model", segmenter, backbone_weights="random", resolution=64)
        assert_refused(
            tmp_path / "model", r"model was trained on other weights of mobilenetv3_small_050; .*--backbone-weights"
        )
        file = tmp_path / "backbone.safetensors"
        save_file({name: value.contiguous() for name, value in other.encoder.state_dict().items()}, file)
        loaded = load_segmenter(tmp_path / "model", backbone_weights=str(file))
        assert torch.equal(predict(loaded.segmenter).logits, predict(segmenter).logits)


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    tensors, description = read_tensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors, description)
    write_tensors(path, tensors, description)


class TestDamage:
    def test_missing(self, tmp_path: Path) -> None:
        assert_refused(tmp_path / "no.safetensors", r"no model file at .*no\.safetensors; train one with ")

    @pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
    def test_truncated(self, model: Path, kept: float) -> None:
        content = model.read_bytes()
        model.write_bytes(content[: int(kept * len(content))])
        assert_refused(model, r"model\.safetensors is damaged or was not written by fewshot-seg \(.*\); train it again")

    def test_some_other_file(self, model: Path) -> None:
        expected = r"model\.safetensors is damaged or was not written by fewshot-seg"
        model.write_text("hello " * 100)
        assert_refused(model, expected)
        save_file({"weight": torch.zeros(3)}, model)
        assert_refused(model, expected)
        save_file({"weight": torch.zeros(3)}, model, metadata={"fewshot_seg": "{half"})
        assert_refused(model, expected)

    @pytest.mark.parametrize("description", [{"format": 2}, {}, [1]])
    def test_another_format(self, model: Path, description: Any) -> None:
        save_file({"weight": torch.zeros(3)}, model, metadata={"fewshot_seg": json.dumps(description)})
        assert_refused(model, r"model\.safetensors has another file format than 1; use the version of fewshot-seg ")

    def test_a_missing_part_of_the_description(self, model: Path) -> None:
        _, description = read_tensors(model)
        original = model.read_bytes()
        for key in description.keys() - {"format"}:
            model.write_bytes(original)
            rewrite(model, lambda _, told, key=key: told.pop(key))  # type: ignore[misc]
            assert_refused(model, rf"model\.safetensors lacks a part of its description \(KeyError\('{key}'\)\)")

    @pytest.mark.parametrize(
        "wrong", [{"resolution": "large"}, {"similarity_rank": "x"}, {"decoder": {"widht": 8}}, {"decoder": None}]
    )
    def test_a_wrong_description(self, model: Path, wrong: dict[str, Any]) -> None:
        rewrite(model, lambda _, told: told.update(wrong))
        assert_refused(model, r"model\.safetensors lacks a part of its description")

    def test_unknown_backbone(self, model: Path) -> None:
        rewrite(model, lambda _, told: told.update(backbone="resnet_of_tomorrow"))
        assert_refused(model, "unknown backbone 'resnet_of_tomorrow'")

    def test_tensors_of_another_shape_missing_or_surplus(self, model: Path) -> None:
        def damage(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
            tensors["decoder.exit.weight"] = torch.zeros(2, 8, 1, 1)
            del tensors["similarity.up.weight"]
            tensors["decoder.surplus"] = torch.zeros(1)

        rewrite(model, damage)
        assert_refused(
            model,
            r"does not fit this model: 3 tensors differ, first decoder\.exit\.weight, decoder\.surplus, similarity\.up",
        )

    def test_a_refused_file_leaves_the_model_as_it_was(self, tiny_backbone: Backbone, tmp_path: Path) -> None:
        segmenter = make(tiny_backbone, "ours")
        before = {name: tensor.clone() for name, tensor in trained_tensors(segmenter).items()}
        wrong = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
        del wrong["decoder.gain"]
        with pytest.raises(DataError, match=r"1 tensors differ, first decoder\.gain"):
            load_trained_tensors(segmenter, wrong, where=tmp_path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in trained_tensors(segmenter).items())


class TestNothingHalfWritten:
    @pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
    def test_a_failing_write_keeps_the_old_file(
        self, model: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, failure: BaseException
    ) -> None:
        content = model.read_bytes()

        def fail(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
            assert tensors
            Path(path).write_bytes(b"half")
            raise failure

        monkeypatch.setattr(fewshot_seg.checkpoint, "save_file", fail)
        with pytest.raises(type(failure)):
            save_segmenter(model, make(tiny_backbone, "pfenet"), backbone_weights="random", resolution=64)
        assert model.read_bytes() == content
        assert list(model.parent.iterdir()) == [model]

    def test_notes_that_are_not_json_keep_the_old_file(self, model: Path, tiny_backbone: Backbone) -> None:
        content = model.read_bytes()
        with pytest.raises(TypeError):
            save_segmenter(
                model,
                make(tiny_backbone, "ours"),
                backbone_weights="random",
                resolution=64,
                notes={"image": torch.zeros(1)},
            )
        assert model.read_bytes() == content
        assert list(model.parent.iterdir()) == [model]
