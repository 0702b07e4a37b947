"""Backbones: one contract for every family, each an untrained model that is as small as the family has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from episodes.sources import SyntheticSource
from episodes.types import DataError
from fewshot_seg.acceleration import accelerate
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.backbones.levels import LevelEncoder
from fewshot_seg.checkpoint import load_segmenter, save_segmenter
from fewshot_seg.features import FeatureStore
from fewshot_seg.segmenter import build_segmenter
from fewshot_seg.similarity import join_levels


@pytest.fixture(scope="class")
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """The encoder that the contract's subclass names."""
    return build_backbone(request.cls.name, strides=request.cls.strides, weights="random")


class BackboneContract:
    """What every backbone keeps; subclasses name an encoder.

    `multiples` has one number per level: sides are cut into cells after rounding up to it.
    """

    name: str
    strides: tuple[int, ...] = (8, 16, 32)
    multiples: tuple[int, ...] = (1, 1, 1)
    levels: tuple[int, ...] | None = None  # strides of the levels, where they are not those asked for

    @pytest.mark.parametrize("size", [(64, 96), (100, 75), (33, 65)])
    def test_maps_have_the_declared_shapes(self, backbone: Backbone, size: tuple[int, int]) -> None:
        maps = backbone(torch.rand(2, 3, *size))
        assert backbone.strides == (self.levels or self.strides)
        expected = []
        for channels, stride, multiple in zip(backbone.channels, backbone.strides, self.multiples, strict=True):
            whole = [-(-side // multiple) * multiple for side in size]
            expected.append((2, channels, *(-(-side // stride) for side in whole)))
        assert [tuple(level.shape) for level in maps] == expected
        assert [tuple(level.shape[2:]) for level in maps] == list(backbone.grids(*size))
        assert {level.dtype for level in maps} == {torch.float32}
        assert list(backbone.strides) == sorted(backbone.strides)

    def test_sides_of_its_multiple_are_taken_as_they_are(self, backbone: Backbone) -> None:
        side = 2 * backbone.multiple * (1 if backbone.multiple > 8 else 32)
        assert backbone.grids(side, side) == tuple((-(-side // s), -(-side // s)) for s in backbone.strides)

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
        with torch.no_grad():
            raw = backbone.encoder((images - mean) / std)
        if not isinstance(backbone.encoder, LevelEncoder):
            by_width = {level.shape[-1]: level for level in raw}
            raw = [by_width[64 // stride] for stride in self.strides]
        for expected, level in zip(raw, backbone(images), strict=True):
            torch.testing.assert_close(level, expected, rtol=1e-3, atol=1e-4)

    def test_differentiable_and_plain_levels_equal_forward(self, backbone: Backbone) -> None:
        images = torch.rand(2, 3, 70, 96)
        expected = backbone(images)
        for left, plain, right in zip(backbone.differentiable(images), backbone.levels(images), expected, strict=True):
            assert torch.equal(left, right)
            torch.testing.assert_close(plain, right, rtol=1e-3, atol=1e-4)

    def test_differentiable_has_a_gradient_to_the_photo_and_none_to_the_weights(self, backbone: Backbone) -> None:
        images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for level in backbone.differentiable(images):
            (gradient,) = torch.autograd.grad(level.pow(2)[..., :1, :1].sum(), images, retain_graph=True)
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

    def test_seed_and_fingerprint(self, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
        """The seed decides the weights, global randomness is untouched, every weight and stride has a say."""
        torch.manual_seed(11)
        expected = torch.rand(4)
        torch.manual_seed(11)
        monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("reseeded the GPUs"))
        same = build_backbone(self.name, strides=self.strides, weights="random")
        other = build_backbone(self.name, strides=self.strides[1:] or self.strides, weights="random", seed=4)
        assert torch.equal(torch.rand(4), expected)
        assert same.fingerprint == backbone.fingerprint
        assert other.fingerprint != backbone.fingerprint
        last = [value for value in same.encoder.state_dict().values() if value.is_floating_point()][-1]
        last.view(-1)[-1] += 1e-3
        del same.fingerprint  # computed anew
        assert same.fingerprint != backbone.fingerprint

    def test_names_the_strides_it_has(self) -> None:
        with pytest.raises(DataError, match=r"has (strides \[.*8, 16, 32\], asked for|one grid, .* got) \(8, 64\)"):
            build_backbone(self.name, strides=(8, 64), weights="random")

    def test_in_lower_precision_and_other_layout(self, backbone: Backbone) -> None:
        images = torch.rand(1, 3, 64, 64)
        exact = backbone(images)
        try:
            for precision, last, tolerance in ((torch.bfloat16, False, 0.2), (torch.float32, False, 1e-3)):
                backbone.run_in(precision, channels_last=last)
                for level, expected in zip(backbone(images), exact, strict=True):
                    assert level.dtype == torch.float32
                    assert (level - expected).norm() < tolerance * expected.norm()
        finally:
            backbone.run_in(torch.float32, channels_last=True)

    def test_compiled_form_takes_the_encoders_place(self, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
        images, seen = torch.rand(1, 3, 64, 64), []

        def compile_nothing(encoder: torch.nn.Module) -> object:
            return lambda batch: seen.append(batch.shape) or encoder(batch)

        expected = backbone(images)
        monkeypatch.setattr(torch, "compile", compile_nothing)
        accelerate(backbone, size=64, compiled=True)
        try:
            assert all(torch.equal(*both) for both in zip(backbone(images), expected, strict=True))
            assert len(seen) == 1
        finally:
            backbone.run_by(None)

    def test_a_whole_model_and_its_file(self, backbone: Backbone, tmp_path: Path) -> None:
        segmenter = build_segmenter(backbone, decoder_width=8, decoder_blocks=1, similarity_rank=2).eval()
        path = tmp_path / "model.safetensors"
        save_segmenter(path, segmenter, backbone_weights="random", resolution=64)
        loaded = load_segmenter(path).segmenter
        assert loaded.backbone.plan == backbone.plan
        supports, query = torch.rand(1, 2, 3, 64, 64), torch.rand(1, 3, 64, 64)
        masks = torch.zeros(1, 2, 64, 64, dtype=torch.uint8)
        masks[..., 8:40, 16:48] = 1
        results = []
        with torch.no_grad():
            for model in (segmenter, loaded):
                results.append(model.segment(model.encode_support(supports, masks), query).logits)
        assert results[0].shape == (1, 64, 64)
        assert results[0].isfinite().all()
        assert torch.equal(*results)

    def test_the_feature_store_keeps_its_levels(self, backbone: Backbone, tmp_path: Path) -> None:
        source = SyntheticSource(base_classes=2, novel_classes=2, images_per_class=2, size=64)
        ids = source.ids("train")[:2]
        store = FeatureStore(backbone, source, size=72, directory=tmp_path)
        fresh = store.get(ids)
        assert [tuple(level.shape[2:]) for level in fresh] == list(backbone.grids(72, 72))
        kept = FeatureStore(backbone, source, size=72, directory=tmp_path).get(ids)
        assert all(torch.equal(*both) for both in zip(fresh, kept, strict=True))
        assert join_levels(kept).shape == (2, sum(backbone.channels), *backbone.grids(72, 72)[0])


class TestEfficientNetLite(BackboneContract):
    name = "tf_efficientnet_lite0"


class TestNativeResNet(BackboneContract):
    name = "resnet18"


class TestMobileNet(BackboneContract):
    name = "mobilenetv3_small_050"


class TestTimmResNet(BackboneContract):
    name = "resnet10t"
    strides = (4, 16)
    multiples = (1, 1)


class TestConvNeXt(BackboneContract):
    name = "convnext_atto"
    multiples = (32, 32, 32)


class TestConvNeXtV2(BackboneContract):
    name = "convnextv2_atto"
    strides, multiples = (16, 32), (32, 32)


class TestSwin(BackboneContract):
    name = "swin_tiny_patch4_window7_224"
    strides, multiples = (16, 32), (32, 32)


class TestVisionTransformer(BackboneContract):
    name = "vit_tiny_patch16_224"
    strides, multiples = (16, 16, 16), (16, 16, 16)


class TestDINOv2(BackboneContract):
    name = "vit_small_patch14_reg4_dinov2"
    strides, multiples = (14, 14), (14, 14)


class TestDINOv3(BackboneContract):
    name = "vit_tiny_patch16_dinov3_qkvb"
    strides, multiples = (16, 16), (16, 16)


class TestJointPyramids(BackboneContract):
    name = "tf_efficientnet_lite0+mobilenetv3_small_050"
    strides = (8, 32)
    levels, multiples = (8, 8, 32, 32), (1, 1, 1, 1)


class TestJointWithTransformer(BackboneContract):
    """A grid of its own beside strides of a pyramid, and one member that enlarges."""

    name = "convnext_atto+vit_tiny_patch16_224"
    strides = (16,)
    levels, multiples = (16, 16), (16, 16)


class TestBadRequests:
    def test_unknown_name_suggests_close_ones(self) -> None:
        with pytest.raises(
            DataError, match=r"unknown backbone 'tf_eficientnet_lite0'.*did you mean tf_efficientnet_lite0"
        ):
            build_backbone("tf_eficientnet_lite0", weights="random")

    def test_a_transformer_of_one_photo_size_is_refused(self) -> None:
        with pytest.raises(DataError, match="'beit_base_patch16_224' takes photos of one size only"):
            build_backbone("beit_base_patch16_224", weights="random")

    def test_a_pyramid_of_one_photo_size_is_refused(self) -> None:
        backbone = build_backbone("hiera_tiny_224", weights="random")
        with pytest.raises(DataError, match="'hiera_tiny_224' takes photos of one size only"):
            backbone(torch.rand(1, 3, 64, 64))

    @pytest.mark.parametrize("strides", [(), (16, 8), (16, 16)])
    def test_strides_ascend(self, strides: tuple[int, ...]) -> None:
        with pytest.raises(DataError, match="ascending"):
            build_backbone("resnet10t", strides=strides, weights="random")

    def test_an_encoder_that_drops_the_border_at_any_size_says_so(self) -> None:
        class Dropping(torch.nn.Module):
            out_channels = (3, 4)

            def __init__(self) -> None:
                super().__init__()
                self.first = torch.nn.Conv2d(3, 4, 3, stride=2)  # no padding

            def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
                return [images, self.first(images)]

        half = (0.5, 0.5, 0.5)
        backbone = Backbone(Dropping(), name="dropping", strides=(2,), mean=half, std=half)
        for forward in (backbone, backbone.differentiable):
            with pytest.raises(DataError, match=r"drops the border of 64 x 64 images at stride 2: expected 32 x 32"):
                forward(torch.rand(1, 3, 64, 64))


def test_a_border_that_would_be_dropped_is_stretched_into_the_cells(tmp_path: Path) -> None:
    """ConvNeXt on 100 x 75 sees what it sees on the same photo, stretched to 128 x 96."""
    backbone = build_backbone("convnext_atto", strides=(8, 32), weights="random")
    photos = torch.rand(1, 3, 100, 75)
    stretched = torch.nn.functional.interpolate(photos, (128, 96), mode="bilinear", align_corners=False)
    for level, expected in zip(backbone(photos), backbone(stretched), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-3, atol=1e-4)
    save_file(
        {name: value.contiguous() for name, value in backbone.encoder.state_dict().items()}, tmp_path / "w.safetensors"
    )
    assert build_backbone("convnext_atto", strides=(8, 32), weights=tmp_path / "w.safetensors").fingerprint == (
        backbone.fingerprint
    )
