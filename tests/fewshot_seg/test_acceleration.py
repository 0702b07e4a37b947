"""The fastest form of a backbone: measured, set in place, never at the price of a failed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from episodes.sources import SyntheticSource
from episodes.types import DataError
from fewshot_seg.acceleration import Form, accelerate, fastest_form
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.features import FeatureStore


@pytest.fixture
def backbone() -> Backbone:
    return build_backbone("mobilenetv3_small_050", weights="random")


def clock(backbone: Backbone, seconds: dict[Form, float]) -> Callable[[Callable[[], object]], float]:
    """Says how long each form takes, after running it."""

    def timed(work: Callable[[], object]) -> float:
        work()
        name: Any = str(backbone.precision).removeprefix("torch.")
        return seconds[Form(name, backbone._layout == torch.channels_last)]

    return timed


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ((1.0, 2.0, 0.5, 0.6), Form("bfloat16", channels_last=True)),
        ((1.0, 2.0, 0.6, 0.5), Form("bfloat16", channels_last=False)),
        ((1.0, 0.8, 0.75, 0.9), Form("float32", channels_last=False)),  # not worth the rounding
        ((1.0, 1.1, 3.0, 3.0), Form("float32", channels_last=True)),
    ],
)
def test_takes_what_was_measured_to_be_fastest(backbone: Backbone, seconds: tuple[float, ...], expected: Form) -> None:
    forms = [Form(precision, last) for precision in ("float32", "bfloat16") for last in (True, False)]  # type: ignore[arg-type]
    timed = clock(backbone, dict(zip(forms, seconds, strict=True)))
    assert fastest_form(backbone, 64, timed) == expected
    assert accelerate(backbone, size=64, precision="auto", seconds_of=timed) == expected
    assert str(backbone.precision) == f"torch.{expected.precision}"


def test_forms_agree_within_their_rounding_and_keep_the_weights(backbone: Backbone) -> None:
    photos = torch.rand(2, 3, 64, 64)
    exact, fingerprint = backbone(photos), backbone.fingerprint
    for precision, tolerance in (("float32", 1e-4), ("bfloat16", 0.1)):
        for last in (True, False):
            backbone.run_in(getattr(torch, precision), channels_last=last)
            for level, expected in zip(backbone(photos), exact, strict=True):
                assert level.dtype == torch.float32
                assert (level - expected).norm() < tolerance * expected.norm()
    del backbone.fingerprint  # computed anew
    assert backbone.fingerprint == fingerprint


def test_features_of_both_precisions_are_kept_apart(backbone: Backbone, tmp_path: Path) -> None:
    source = SyntheticSource(base_classes=2, novel_classes=2, images_per_class=2, size=64)
    for precision in (torch.float32, torch.bfloat16):
        backbone.run_in(precision, channels_last=True)
        FeatureStore(backbone, source, size=64, directory=tmp_path).ensure(source.ids("train"))
    names = sorted(folder.name for folder in tmp_path.iterdir())
    assert names == [f"{backbone.fingerprint[:16]}-64", f"{backbone.fingerprint[:16]}-64-bfloat16"]


def test_a_compiler_that_fails_is_named_and_left(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, calls, pyramids = torch.rand(1, 3, 64, 64), 0, []

    def broken(encoder: object) -> Callable[..., object]:  # noqa: ARG001
        def fails(images: object) -> object:  # noqa: ARG001
            nonlocal calls
            calls += 1
            raise RuntimeError("no compiler found\nand more")

        return fails

    monkeypatch.setattr(torch, "compile", broken)
    accelerate(backbone, size=64, compiled=True)
    grids = backbone.grids(64, 64)  # asks the encoder, too
    backbone.encoder.register_forward_hook(lambda _module, _given, pyramid: pyramids.append(pyramid))
    with pytest.warns(UserWarning, match=r"torch.compile does not work here \(no compiler found\); going on without"):
        found = backbone(photos)
    plain = {level.shape[2:]: level for level in pyramids[0]}
    assert len(pyramids) == 1
    assert [torch.equal(level, plain[grid]) for level, grid in zip(found, grids, strict=True)] == [True, True]
    backbone(photos)
    assert (calls, len(pyramids)) == (1, 2)


def test_a_compiled_backbone_gives_the_same(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler left out, which takes a minute: what is traced is what is run."""
    photos, compile_of_torch = torch.rand(1, 3, 64, 64), torch.compile
    expected = backbone(photos)
    monkeypatch.setattr(torch, "compile", lambda encoder: compile_of_torch(encoder, backend="eager"))
    accelerate(backbone, size=64, compiled=True)
    for level, other in zip(backbone(photos), expected, strict=True):
        torch.testing.assert_close(level, other)


def test_an_unknown_precision(backbone: Backbone) -> None:
    with pytest.raises(DataError, match="unknown precision 'half'; known: float32, bfloat16, auto"):
        accelerate(backbone, size=64, precision="half")  # type: ignore[arg-type]
