"""Vision transformers as levels, against timm's own blocks, one after another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from episodes.types import DataError
from fewshot_seg.backbones import build_backbone, level_blocks
from fewshot_seg.backbones.patches import PatchEncoder

NAME = "vit_tiny_patch16_224"


@given(st.integers(2, 48).flatmap(lambda depth: st.tuples(st.just(depth), st.integers(1, depth - depth // 2))))
def test_blocks_are_different_ones_of_the_later_half_and_end_with_the_last(case: tuple[int, int]) -> None:
    depth, count = case
    blocks = level_blocks(depth, count)
    assert len(blocks) == count
    assert sorted(set(blocks)) == list(blocks)
    assert blocks[0] >= depth // 2
    assert blocks[-1] == depth - 1


def test_levels_are_normed_tokens_of_the_patches() -> None:
    backbone = build_backbone(NAME, strides=(16, 16), weights="random")
    assert isinstance(backbone.encoder, PatchEncoder)
    model = backbone.encoder.model
    photos = torch.rand(1, 3, 64, 96)
    tokens, expected = model._pos_embed(model.patch_embed((photos - 0.5) / 0.5)), []
    with torch.no_grad():
        for number, block in enumerate(model.blocks):
            tokens = block(tokens)
            if number in (8, 11):
                expected.append(model.norm(tokens)[:, 1:].transpose(1, 2).reshape(1, 192, 4, 6))  # without the class
    for level, maps in zip(backbone(photos), expected, strict=True):
        torch.testing.assert_close(level, maps, rtol=1e-3, atol=1e-4)


def test_sides_are_enlarged_to_the_next_multiple_of_the_patch() -> None:
    backbone = build_backbone("vit_small_patch14_dinov2", weights="random")
    assert (backbone.strides, backbone.multiple) == ((14, 14), 14)
    photos = torch.rand(1, 3, 50, 42)
    enlarged = F.interpolate(photos, (56, 42), mode="bilinear", align_corners=False)
    for level, expected in zip(backbone(photos), backbone(enlarged), strict=True):
        assert level.shape[2:] == (4, 3)
        torch.testing.assert_close(level, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strides", [(16, 32), (14, 14), (), (16,) * 7])
def test_strides_are_its_patch_once_per_level(strides: tuple[int, ...]) -> None:
    with pytest.raises(
        DataError, match=r"patches of 16 pixels: give --strides 16 once for each level, at most 6 times"
    ):
        build_backbone(NAME, strides=strides, weights="random")


def test_models_without_one_grid_are_refused() -> None:
    with pytest.raises(DataError, match="'linear' is no vision transformer with one grid"):
        PatchEncoder(torch.nn.Linear(1, 1), name="linear")
