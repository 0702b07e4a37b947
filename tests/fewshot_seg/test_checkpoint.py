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

from episodes.types import DataError
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.checkpoint import (
    load_part,
    load_segmenter,
    load_similarity,
    load_trained_tensors,
    read_tensors,
    save_segmenter,
    save_similarity,
    trained_tensors,
    write_tensors,
)
from fewshot_seg.completion import SupportCompletion
from fewshot_seg.decoder import ContextDecoder
from fewshot_seg.encodings import Prediction
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter, training_free
from fewshot_seg.similarity import SimilarityNetwork
from tests.fewshot_seg.test_segmenter import disturbed

KINDS = (
    "ours",
    "pfenet",
    "none",
    "readout",
    "completion",
    "pfenet with completion",
    "readout with completion",
    "base learner",
    "base learner with completion",
)


def make(backbone: Backbone, kind: str) -> FewShotSegmenter:
    small: dict[str, Any] = {"similarity_rank": 3, "decoder_width": 8, "decoder_blocks": 1}
    made: dict[str, Callable[[], FewShotSegmenter]] = {
        "ours": lambda: build_segmenter(backbone, appearance=2, attention="triplet", **small),
        "pfenet": lambda: build_segmenter(backbone, prior="pfenet", **small),
        "none": lambda: build_segmenter(backbone, prior="none", appearance=2, **small),
        "readout": lambda: training_free(backbone, channel="gradient attention", temperature=0.1),
        "completion": lambda: build_segmenter(backbone, completion=True, **small),
        "pfenet with completion": lambda: build_segmenter(backbone, prior="pfenet", completion=True, **small),
        "readout with completion": lambda: training_free(
            backbone, completion=SupportCompletion(feature_channels=sum(backbone.channels), width=16, appearance=3)
        ),
        "base learner": lambda: build_segmenter(backbone, base_classes=3, **small),
        "base learner with completion": lambda: build_segmenter(backbone, base_classes=2, completion=True, **small),
    }
    segmenter = disturbed(made[kind]())
    if isinstance(segmenter.decoder, ContextDecoder):
        maps = segmenter.decoder.prior_channels
        segmenter.decoder.fit_scales(torch.randn(5, maps, 4, 4, generator=torch.Generator().manual_seed(4)))
    segmenter.threshold = 0.25
    return segmenter


def predict(segmenter: FewShotSegmenter, *, weak: bool = False) -> Prediction:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    masks[..., 10:40, 10:50] = 255 if weak else 1
    dense = torch.tensor([[not weak]])
    support = segmenter.encode_support(torch.rand(1, 1, 3, 64, 64, generator=generator), masks, dense)
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
    @pytest.mark.parametrize("kind", KINDS)
    def test_predictions_are_identical(self, tmp_path: Path, tiny_backbone: Backbone, kind: str) -> None:
        segmenter, notes = make(tiny_backbone, kind), {"fold": 2, "data": "Voc über alles"}
        path = tmp_path / "new" / "model.safetensors"
        save_segmenter(path, segmenter, backbone_weights="random", resolution=96, notes=notes)
        loaded = load_segmenter(path)
        assert loaded.resolution == 96
        assert loaded.notes == notes
        assert not any(module.training for module in loaded.segmenter.modules())
        for weak in (False, True):
            before, after = predict(segmenter, weak=weak), predict(loaded.segmenter, weak=weak)
            assert torch.equal(after.logits, before.logits)
            assert torch.equal(after.attention, before.attention)
            assert torch.equal(after.masks, before.masks)
        assert (loaded.segmenter.completion is None) == (segmenter.completion is None)
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

    def test_a_completion_is_in_the_file_with_its_sizes(self, tmp_path: Path, tiny_backbone: Backbone) -> None:
        segmenter, path = make(tiny_backbone, "readout with completion"), tmp_path / "model"
        save_segmenter(path, segmenter, backbone_weights="random", resolution=64)
        tensors, description = read_tensors(path)
        assert segmenter.completion is not None
        assert description["completion"] == segmenter.completion.description()
        found = {name.removeprefix("completion.") for name in tensors if name.startswith("completion.")}
        assert found == segmenter.completion.state_dict().keys()
        completion = load_segmenter(path).segmenter.completion
        assert completion is not None
        assert completion.description() == segmenter.completion.description()

    def test_a_base_learner_is_in_the_file_with_its_sizes_and_the_decoders_scales(
        self, tmp_path: Path, tiny_backbone: Backbone
    ) -> None:
        segmenter, path = make(tiny_backbone, "base learner"), tmp_path / "model"
        save_segmenter(path, segmenter, backbone_weights="random", resolution=64)
        tensors, description = read_tensors(path)
        assert {name.split(".")[0] for name in tensors} == {"similarity", "decoder", "base_learner"}
        assert description["base_learner"] == {"feature_channels": sum(tiny_backbone.channels), "classes": 3}
        loaded = load_segmenter(path).segmenter
        assert isinstance(loaded.decoder, ContextDecoder)
        assert not torch.equal(loaded.decoder.scale, torch.ones(10))
        assert loaded.base_learner is not None
        assert loaded.base_learner.classes == 3
        for name, tensor in trained_tensors(segmenter).items():
            assert torch.equal(trained_tensors(loaded)[name], tensor), name

    @pytest.mark.parametrize(("kind", "named"), [("ours", "mask"), ("readout", "readout"), ("base learner", "context")])
    def test_the_kind_of_decoder_is_in_the_file(
        self, tmp_path: Path, tiny_backbone: Backbone, kind: str, named: str
    ) -> None:
        segmenter, path = make(tiny_backbone, kind), tmp_path / "model"
        save_segmenter(path, segmenter, backbone_weights="random", resolution=64)
        assert read_tensors(path)[1]["decoder"] == {"kind": named} | segmenter.decoder.description()
        if named != "context":  # the only kind that earlier files name
            rewrite(path, lambda _, told: told["decoder"].pop("kind"))
            assert type(load_segmenter(path).segmenter.decoder) is type(segmenter.decoder)

    def test_a_file_of_before_there_were_base_learners(self, model: Path, tiny_backbone: Backbone) -> None:
        rewrite(model, lambda _, told: told.pop("base_learner"))
        loaded = load_segmenter(model).segmenter
        assert loaded.base_learner is None
        assert torch.equal(predict(loaded).logits, predict(make(tiny_backbone, "ours")).logits)

    def test_a_file_that_lost_its_base_learner(self, tmp_path: Path, tiny_backbone: Backbone) -> None:
        path = tmp_path / "model"
        save_segmenter(path, make(tiny_backbone, "base learner"), backbone_weights="random", resolution=64)
        rewrite(path, lambda tensors, _: tensors.pop("base_learner.bias"))
        assert_refused(path, "does not fit this model: 1 tensors differ, first base_learner.bias")

    def test_a_file_of_before_there_were_completions(self, model: Path, tiny_backbone: Backbone) -> None:
        rewrite(model, lambda _, told: told.pop("completion"))
        loaded = load_segmenter(model).segmenter
        assert loaded.completion is None
        assert torch.equal(predict(loaded).logits, predict(make(tiny_backbone, "ours")).logits)

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
        for key in description.keys() - {
            "format",
            "completion",
            "weak_decoder",
            "base_learner",
            "guided",
        }:  # older files know none
            model.write_bytes(original)
            rewrite(model, lambda _, told, key=key: told.pop(key))  # type: ignore[misc]
            assert_refused(model, rf"model\.safetensors lacks a part of its description \(KeyError\('{key}'\)\)")

    @pytest.mark.parametrize(
        "wrong",
        [
            {"resolution": "large"},
            {"similarity_rank": "x"},
            {"decoder": {"widht": 8}},
            {"decoder": None},
            {"completion": 3},
        ],
    )
    def test_a_wrong_description(self, model: Path, wrong: dict[str, Any]) -> None:
        rewrite(model, lambda _, told: told.update(wrong))
        assert_refused(model, r"model\.safetensors lacks a part of its description")

    def test_unknown_backbone(self, model: Path) -> None:
        rewrite(model, lambda _, told: told.update(backbone="resnet_of_tomorrow"))
        assert_refused(model, "unknown backbone 'resnet_of_tomorrow'")

    def test_a_completion_without_its_tensors_and_tensors_without_their_completion(
        self, tmp_path: Path, tiny_backbone: Backbone
    ) -> None:
        path = tmp_path / "model"
        for kind, completion in (("pfenet with completion", None), ("pfenet", SupportCompletion(feature_channels=1))):
            save_segmenter(path, make(tiny_backbone, kind), backbone_weights="random", resolution=64)
            channels = {"feature_channels": sum(tiny_backbone.channels)}
            told = None if completion is None else completion.description() | channels
            rewrite(path, lambda _, description, told=told: description.update(completion=told))  # type: ignore[misc]
            assert_refused(path, r"model does not fit this model: \d+ tensors differ, first completion\.")

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


def make_similarity(backbone: Backbone, *, rank: int = 3, seed: int = 3) -> SimilarityNetwork:
    """As after training: no parameter is zero."""
    similarity = SimilarityNetwork(backbone.channels, rank=rank)
    generator = torch.Generator().manual_seed(seed)
    for parameter in similarity.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return similarity.train()


def same_network(one: SimilarityNetwork, other: SimilarityNetwork) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class TestSimilarityFile:
    @pytest.fixture
    def path(self, tmp_path: Path, tiny_backbone: Backbone) -> Path:
        path = tmp_path / "new" / "similarity.safetensors"
        save_similarity(
            path,
            make_similarity(tiny_backbone),
            tiny_backbone,
            backbone_weights="random",
            resolution=96,
            notes={"labels": ["ä", "b"]},
        )
        return path

    @pytest.mark.parametrize("rank", [0, 3])
    def test_round_trip(self, tmp_path: Path, tiny_backbone: Backbone, rank: int) -> None:
        similarity, path = make_similarity(tiny_backbone, rank=rank), tmp_path / "similarity.safetensors"
        save_similarity(path, similarity, tiny_backbone, backbone_weights="random", resolution=96, notes={"seed": 4})
        loaded = load_similarity(path)
        assert (loaded.resolution, loaded.notes) == (96, {"seed": 4})
        assert loaded.similarity.rank == rank
        assert same_network(loaded.similarity, similarity)
        assert not any(module.training for module in (*loaded.similarity.modules(), *loaded.backbone.modules()))
        assert loaded.backbone.fingerprint == tiny_backbone.fingerprint
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        before, after = similarity(tiny_backbone(images)), loaded.similarity(loaded.backbone(images))
        assert torch.equal(before, after)

    def test_notes_are_optional_and_the_file_holds_no_backbone(self, tmp_path: Path, tiny_backbone: Backbone) -> None:
        path = tmp_path / "similarity.safetensors"
        save_similarity(path, make_similarity(tiny_backbone), tiny_backbone, backbone_weights="random", resolution=64)
        assert load_similarity(path).notes == {}
        assert read_tensors(path)[0].keys() == {"similarity.down.weight", "similarity.up.weight"}

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_whole_model_gives_its_similarity_network(
        self, tmp_path: Path, tiny_backbone: Backbone, kind: str
    ) -> None:
        segmenter, path = make(tiny_backbone, kind), tmp_path / "model.safetensors"
        save_segmenter(path, segmenter, backbone_weights="random", resolution=64, notes={"fold": 2})
        loaded = load_similarity(path)
        assert same_network(loaded.similarity, segmenter.similarity)
        assert (loaded.resolution, loaded.notes) == (64, {"fold": 2})

    def test_is_no_whole_model(self, path: Path) -> None:
        assert_refused(
            path,
            r"similarity\.safetensors holds a similarity network alone, without a decoder; give it with --similarity",
        )

    def test_other_backbone_weights(self, tmp_path: Path, tiny_backbone: Backbone) -> None:
        other = build_backbone(tiny_backbone.name, weights="random", seed=7)
        similarity, path = make_similarity(other), tmp_path / "similarity"
        save_similarity(path, similarity, other, backbone_weights="random", resolution=64)
        expected = r"similarity was trained on other weights of mobilenetv3_small_050; .*--backbone-weights"
        with pytest.raises(DataError, match=expected):
            load_similarity(path)
        file = tmp_path / "backbone.safetensors"
        save_file({name: value.contiguous() for name, value in other.encoder.state_dict().items()}, file)
        loaded = load_similarity(path, backbone_weights=str(file))
        assert loaded.backbone.fingerprint == other.fingerprint
        assert same_network(loaded.similarity, similarity)

    def test_other_strides_are_another_backbone(self, path: Path) -> None:
        rewrite(path, lambda _, told: told.update(strides=[8, 32]))
        with pytest.raises(DataError, match="was trained on other weights of mobilenetv3_small_050"):
            load_similarity(path)

    def test_wrong_shapes(self, path: Path) -> None:
        def damage(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
            tensors["similarity.down.weight"] = torch.zeros(3, 8, 1, 1)
            del tensors["similarity.up.weight"]
            tensors["similarity.surplus"] = torch.zeros(1)

        rewrite(path, damage)
        expected = (
            r"similarity\.safetensors does not fit this model: 3 tensors differ, first similarity\.down\.weight, "
        )
        with pytest.raises(DataError, match=expected):
            load_similarity(path)

    def test_another_rank_than_described(self, path: Path) -> None:
        rewrite(path, lambda _, told: told.update(similarity_rank=4))
        with pytest.raises(
            DataError, match=r"2 tensors differ, first similarity\.down\.weight, similarity\.up\.weight"
        ):
            load_similarity(path)

    @pytest.mark.parametrize(
        "wrong", [{"resolution": "large"}, {"similarity_rank": "x"}, {"notes": 3}, {"strides": None}]
    )
    def test_a_wrong_description(self, path: Path, wrong: dict[str, Any]) -> None:
        rewrite(path, lambda _, told: told.update(wrong))
        with pytest.raises(DataError, match=r"similarity\.safetensors lacks a part of its description"):
            load_similarity(path)

    def test_a_missing_part_of_the_description(self, path: Path) -> None:
        _, description = read_tensors(path)
        original = path.read_bytes()
        for key in description.keys() - {"format", "kind"}:
            path.write_bytes(original)
            rewrite(path, lambda _, told, key=key: told.pop(key))  # type: ignore[misc]
            with pytest.raises(DataError, match=rf"lacks a part of its description \(KeyError\('{key}'\)\)"):
                load_similarity(path)

    def test_missing_and_damaged(self, tmp_path: Path, path: Path) -> None:
        with pytest.raises(DataError, match=r"no model file at .*nothing\.safetensors"):
            load_similarity(tmp_path / "nothing.safetensors")
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(DataError, match=r"similarity\.safetensors is damaged or was not written by fewshot-seg"):
            load_similarity(path)


class TestLoadPart:
    def test_takes_its_own_prefix_and_leaves_the_rest(self, tmp_path: Path, tiny_backbone: Backbone) -> None:
        source, target = make_similarity(tiny_backbone, seed=5), make_similarity(tiny_backbone)
        tensors = {f"one.{name}": value for name, value in source.state_dict().items()}
        load_part(target, tensors | {"two.down.weight": torch.zeros(1)}, prefix="one.", where=tmp_path)
        assert same_network(target, source)

    def test_a_refused_state_leaves_the_part_as_it_was(self, tmp_path: Path, tiny_backbone: Backbone) -> None:
        target = make_similarity(tiny_backbone)
        wrong = {"one.down.weight": torch.zeros_like(target.down.weight), "one.up.weight": torch.zeros(1)}
        with pytest.raises(DataError, match=rf"{tmp_path.name} does not fit this model: 1 tensors differ, first up"):
            load_part(target, wrong, prefix="one.", where=tmp_path)
        assert same_network(target, make_similarity(tiny_backbone))


class TestNothingHalfWritten:
    @pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
    def test_a_failing_write_keeps_the_old_file(
        self, model: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, failure: BaseException
    ) -> None:
        content = model.read_bytes()

        write = Path.write_bytes

        def fail(path: Path, content: bytes) -> int:
            write(path, content[: len(content) // 2])
            raise failure

        monkeypatch.setattr(Path, "write_bytes", fail)
        with pytest.raises(DataError if isinstance(failure, OSError) else KeyboardInterrupt):
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
