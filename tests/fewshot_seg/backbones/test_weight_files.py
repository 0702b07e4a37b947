"""Weights from files: of encoders and classifiers, as their authors published them, damaged, or from timm's hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.backbones import build_backbone


class RunsCode:
    """Its pickle makes a file when it is read by a careless loader."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


class TestWeightFiles:
    @pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
    @pytest.mark.parametrize("ending", [".pth", ".bin", ".safetensors"])
    def test_a_classifier_file_fits(self, tmp_path: Path, name: str, ending: str) -> None:
        torch.manual_seed(5)
        classifier = timm.create_model(name, pretrained=False).eval()
        path = tmp_path / f"weights{ending}"
        if ending == ".safetensors":
            save_file(classifier.state_dict(), path)
        else:
            torch.save(classifier.state_dict(), path)
        images = torch.rand(1, 3, 64, 64)
        backbone = build_backbone(name, strides=(32,), weights=path)
        mean, std = torch.tensor(backbone.mean)[:, None, None], torch.tensor(backbone.std)[:, None, None]
        with torch.no_grad():
            expected = classifier.forward_intermediates((images - mean) / std, intermediates_only=True)[-1]
        torch.testing.assert_close(backbone(images)[0], expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("prefix", ["", "model."])
    def test_an_encoder_file_fits_with_and_without_prefix(self, tmp_path: Path, prefix: str) -> None:
        source = build_backbone("resnet10t", strides=(16,), weights="random", seed=9)
        state = {f"{prefix}{k.removeprefix('model.')}": v for k, v in source.encoder.state_dict().items()}
        torch.save(state, tmp_path / "encoder.pth")
        loaded = build_backbone("resnet10t", strides=(16,), weights=tmp_path / "encoder.pth")
        assert loaded.fingerprint == source.fingerprint

    def test_missing_and_misshapen_tensors_are_named(self, tmp_path: Path) -> None:
        state = build_backbone("resnet10t", weights="random").encoder.state_dict()
        state["model.conv1.0.weight"] = torch.zeros(1)
        del state["model.conv1.1.bias"]
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(
            DataError, match=r"w.pth does not fit: 2 of \d+ tensors .*first model.conv1.0.weight, model.c"
        ):
            build_backbone("resnet10t", weights=tmp_path / "w.pth")

    def test_absent_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no weight file at .*nothing.pth"):
            build_backbone("resnet10t", weights=tmp_path / "nothing.pth")

    @pytest.mark.parametrize("ending", [".pth", ".safetensors"])
    def test_damaged_file(self, tmp_path: Path, ending: str) -> None:
        path = tmp_path / f"damaged{ending}"
        path.write_bytes(b"no weights here")
        with pytest.raises(DataError, match=r"cannot read weights from .*damaged"):
            build_backbone("resnet10t", weights=path)

    def test_a_pickle_that_runs_code_is_refused(self, tmp_path: Path) -> None:
        path, mark = tmp_path / "evil.pth", tmp_path / "executed"
        torch.save({"weights": RunsCode(mark)}, path)
        with pytest.raises(DataError, match=r"cannot read weights from .*evil.pth"):
            build_backbone("resnet10t", weights=path)
        assert not mark.exists()
        torch.load(path, weights_only=False)
        assert mark.exists()  # the file is as dangerous as it should be for this test

    def test_no_state_dict(self, tmp_path: Path) -> None:
        torch.save([torch.zeros(1)], tmp_path / "list.pth")
        with pytest.raises(DataError, match="holds no state dict"):
            build_backbone("resnet10t", weights=tmp_path / "list.pth")


def random_classifier(name: str) -> nn.Module:
    """timm's own model, every weight drawn: zeros and ones would agree with anything."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        model = timm.create_model(name, pretrained=False).eval()
        for value in model.parameters():
            nn.init.normal_(value, std=0.05)
    return model  # type: ignore[no-any-return]


def as_dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names -> those of Meta's DINOv2 with registers, whose class token has a position of its own."""
    position = torch.full_like(state["cls_token"], 0.25)
    return {
        **{key: value for key, value in state.items() if key not in ("reg_token", "cls_token", "pos_embed")},
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - position,
        "pos_embed": torch.cat([position, state["pos_embed"]], dim=1),
        "mask_token": torch.zeros(1, state["cls_token"].shape[2]),
    }


def as_dinov3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names -> those of Meta's DINOv3, which joins the biases of query, key and value."""
    meta = {"storage_tokens": state["reg_token"], "mask_token": torch.zeros_like(state["cls_token"])[0]}
    for key, value in state.items():
        if key.endswith("q_bias"):
            other = state[key.replace("q_bias", "v_bias")]
            meta[key.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.zeros_like(value), other])
        elif not key.endswith(("v_bias", "k_bias", "reg_token")):
            meta[re.sub(r"gamma_([12])", r"ls\1.gamma", key)] = value
    return meta


def as_convnext(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """timm's names -> those of the ConvNeXt paper's repository, in the file's own envelope."""
    names = {
        r"^stem\.": "downsample_layers.0.",
        r"^stages\.(\d+)\.downsample\.": r"downsample_layers.\1.",
        r"\.blocks\.": ".",
        r"\.conv_dw\.": ".dwconv.",
        r"\.mlp\.fc([12])\.": r".pwconv\1.",
        r"^head\.norm\.": "norm.",
        r"^head\.fc\.": "head.",
    }
    meta = {}
    for key, value in state.items():
        renamed = key
        for pattern, name in names.items():
            renamed = re.sub(pattern, name, renamed)
        meta[renamed] = value[:, :, 0, 0] if "pwconv" in renamed and value.ndim == 4 else value
    return {"model": meta}


class TestPublishedNames:
    @pytest.mark.parametrize(
        ("name", "renamed"),
        [
            ("vit_small_patch14_reg4_dinov2", as_dinov2),
            ("vit_tiny_patch16_dinov3_qkvb", as_dinov3),
            ("convnext_atto", as_convnext),
        ],
    )
    def test_files_of_the_authors_give_the_same_features(self, tmp_path: Path, name: str, renamed: Any) -> None:
        state = random_classifier(name).state_dict()
        torch.save(state, tmp_path / "timm.pth")
        torch.save(renamed(state), tmp_path / "authors.pth")
        expected = build_backbone(name, weights=tmp_path / "timm.pth")
        loaded = build_backbone(name, weights=tmp_path / "authors.pth")
        images = torch.rand(1, 3, 64, 64)
        for one, other in zip(loaded(images), expected(images), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)

    def test_a_foreign_file_is_named_in_spite_of_the_conversion(self, tmp_path: Path) -> None:
        torch.save(random_classifier("resnet10t").state_dict(), tmp_path / "resnet.pth")
        with pytest.raises(DataError, match=r"resnet.pth does not fit: \d+ of \d+ tensors"):
            build_backbone("vit_tiny_patch16_224", weights=tmp_path / "resnet.pth")


class TestHub:
    def test_weights_come_from_timm_and_are_those_of_its_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, create = random_classifier("resnet10t"), timm.create_model

        def created(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
            return model if pretrained else create(name, pretrained=False, **arguments)

        monkeypatch.setattr(timm, "create_model", created)
        backbone = build_backbone("resnet10t.c3_in1k", weights="hub")
        assert torch.equal(backbone.encoder.state_dict()["model.conv1.0.weight"], model.state_dict()["conv1.0.weight"])

    def test_without_a_network_the_way_round_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        create = timm.create_model

        def created(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
            if pretrained:
                raise OSError("We couldn't connect to the hub\nand more")
            return create(name, pretrained=False, **arguments)  # type: ignore[no-any-return]

        monkeypatch.setattr(timm, "create_model", created)
        with pytest.raises(
            DataError, match=r"cannot get the weights of resnet10t .*couldn't connect to the hub\).*"
        ) as e:
            build_backbone("resnet10t", weights="hub")
        assert "and more" not in str(e.value)
        assert "torch.save(timm.create_model('resnet10t', pretrained=True)" in str(e.value)
        assert "--backbone-weights resnet10t.pth" in str(e.value)

    def test_timm_has_none(self) -> None:
        with pytest.raises(DataError, match="timm has no weights for backbone 'mit_b0'; give a file"):
            build_backbone("mit_b0", weights="hub")

    def test_nothing_is_downloaded_unasked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        create = timm.create_model

        def created(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
            assert not pretrained
            return create(name, pretrained=False, **arguments)  # type: ignore[no-any-return]

        monkeypatch.setattr(timm, "create_model", created)
        for name in ("resnet10t", "vit_tiny_patch16_224"):
            build_backbone(name, weights="random")
