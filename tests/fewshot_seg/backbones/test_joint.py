"""Backbones side by side: their levels are those of the members, in the order that is promised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from episodes.types import DataError
from fewshot_seg.backbones import ALIASES, build_backbone, join_backbones
from fewshot_seg.onnx_graphs import QueryGraph, SupportGraph
from fewshot_seg.segmenter import build_segmenter

NAMES = ("resnet10t", "mobilenetv3_small_050")
JOINT = "+".join(NAMES)


def test_levels_are_those_of_the_members_by_stride() -> None:
    joint = build_backbone(JOINT, weights="random")
    members = [build_backbone(name, weights="random") for name in NAMES]
    assert joint.strides == (16, 16, 32, 32)
    assert joint.plan == ((16, 32), (16, 32))
    assert joint.mean == pytest.approx((0.485, 0.456, 0.406))
    images = torch.rand(2, 3, 64, 80)
    first, second = (member(images) for member in members)
    for level, expected in zip(joint(images), (first[0], second[0], first[1], second[1]), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-3, atol=1e-4)


def test_members_of_other_normalisation_see_their_own() -> None:
    joint = build_backbone("resnet10t+tf_efficientnet_lite0", strides=(32,), weights="random")
    assert joint.mean == pytest.approx((0.4925, 0.478, 0.453))
    images = torch.rand(1, 3, 64, 64)
    for level, name in zip(joint(images), joint.name.split("+"), strict=True):
        (expected,) = build_backbone(name, strides=(32,), weights="random")(images)
        torch.testing.assert_close(level, expected, rtol=1e-3, atol=1e-4)


def test_strides_of_each_member() -> None:
    joint = build_backbone(JOINT, strides=((8, 32), (16,)), weights="random")
    assert joint.strides == (8, 16, 32)
    assert joint.plan == ((8, 32), (16,))
    other = build_backbone(JOINT, strides=((8, 16), (32,)), weights="random")
    assert other.strides == joint.strides
    assert other.fingerprint != joint.fingerprint


def test_the_alias_names_the_three_embedded_encoders() -> None:
    joint = build_backbone("efficientnet_lite012", strides=(32,), weights="random")
    assert joint.name == ALIASES["efficientnet_lite012"]
    assert joint.channels == (320, 320, 352)


def test_weights_of_each_member(tmp_path: Path) -> None:
    source = build_backbone("resnet10t", strides=(16,), weights="random", seed=9)
    torch.save(source.encoder.state_dict(), tmp_path / "encoder.pth")
    joint = build_backbone(JOINT, strides=(16,), weights=f"{tmp_path / 'encoder.pth'}+random")
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(joint(images)[0], source(images)[0], rtol=1e-3, atol=1e-4)
    with pytest.raises(DataError, match=r"has 2 encoders, but --backbone-weights .*encoder.pth names 1; give one for"):
        build_backbone(JOINT, weights=tmp_path / "encoder.pth")


def test_the_graphs_of_an_export_agree_with_the_model() -> None:
    joint = build_backbone(JOINT, weights="random")
    segmenter = build_segmenter(joint, decoder_width=8, decoder_blocks=1, similarity_rank=2).eval()
    supports, query = torch.rand(2, 3, 64, 96), torch.rand(1, 3, 64, 96)
    masks = torch.zeros(2, 64, 96, dtype=torch.uint8)
    masks[:, 8:40, 16:48] = 1
    with torch.no_grad():
        expected = segmenter.segment(segmenter.encode_support(supports[None], masks[None]), query).logits
        logits, _ = QueryGraph(segmenter)(query, *SupportGraph(segmenter)(supports, masks))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "strides", "message"),
    [
        ("resnet10t+resnet10t", None, r"two or more different members, got resnet10t\+resnet10t"),
        ("resnet10t+", None, "unknown backbone ''"),
        (JOINT, ((16,),), "has 2 encoders, but strides for 1"),
        (JOINT, (16, 64), r"'resnet10t' has strides .*asked for \(16, 64\)"),
    ],
)
def test_bad_requests(name: str, strides: tuple[tuple[int, ...], ...] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_backbone(name, strides=strides, weights="random")


def test_one_member_is_no_joint() -> None:
    with pytest.raises(DataError, match="two or more different members, got resnet10t"):
        join_backbones([build_backbone("resnet10t", weights="random")])
