"""Pictures and masks at the edge of what there is: every verb gives a defined result, or one line that says why not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from episodes.types import DataError, UInt8Array
from fewshot_seg.app.drawings import Drawing, Shape
from fewshot_seg.app.limits import Limits
from fewshot_seg.app.session import Engine, Session
from fewshot_seg.backbones import Backbone
from fewshot_seg.cli import main
from fewshot_seg.prediction import Predictor
from fewshot_seg.segmenter import build_segmenter, training_free

SIZE = 64
TINY = ("--backbone", "mobilenetv3_small_050", "--backbone-weights", "random", "--threshold", "0.1")
LARGE = (6000, 8000)
_ROOM = 900
"""Megabytes that a picture of 48 megapixels may take: itself (144), a working copy of 16 megapixels, its maps."""


def photo(height: int, width: int, seed: int = 0) -> UInt8Array:
    """Noise with a red rectangle in its middle."""
    made = np.random.default_rng(seed).integers(90, 130, (height, width, 3)).astype(np.uint8)
    made[height // 4 : max(1, 3 * height // 4), width // 4 : max(1, 3 * width // 4)] = (220, 30, 30)
    return made


def empty(height: int, width: int) -> UInt8Array:
    return np.zeros((height, width), np.uint8)


def one_pixel(height: int, width: int) -> UInt8Array:
    mask = empty(height, width)
    mask[height // 2, width // 2] = 1
    return mask


def whole(height: int, width: int) -> UInt8Array:
    return np.ones((height, width), np.uint8)


def save(path: Path, pixels: UInt8Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1) if path.suffix == ".png" else Image.fromarray(pixels).save(
        path
    )
    return path


SUPPORTS: dict[str, tuple[tuple[int, int], Callable[[int, int], UInt8Array]]] = {
    "one pixel": ((50, 80), one_pixel),
    "one pixel of a large photo": ((900, 700), one_pixel),
    "the whole photo": ((50, 80), whole),
    "a photo of one pixel": ((1, 1), whole),
    "one row": ((1, 300), whole),
    "one column": ((300, 1), one_pixel),
}
TOO_SMALL = {"one pixel of a large photo", "one column"}
"""Supports whose object is less than a cell of the square: refused, for nothing could be learned from them."""
QUERIES = {"one pixel": (1, 1), "one row": (1, 500), "one column": (500, 1), "usual": (50, 80)}


def models(backbone: Backbone) -> dict[str, Any]:
    return {
        "bare": training_free(backbone, threshold=0.1).eval(),
        "trained": build_segmenter(backbone, similarity_rank=3, base_classes=3, completion=True).eval(),
    }


class TestPredict:
    @pytest.mark.parametrize("fit", ["squash", "pad"])
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_every_support_with_every_query(self, tiny_backbone: Backbone, support: str, fit: Any) -> None:
        (height, width), draw = SUPPORTS[support]
        for segmenter in models(tiny_backbone).values():
            predictor = Predictor(segmenter, SIZE, fit)
            try:
                predictor.remember([photo(height, width)], [draw(height, width)])
            except DataError as error:
                assert support in TOO_SMALL
                assert "shows no object at 64 x 64 pixels; mark the object with 1" in str(error)  # noqa: PT017
                continue
            for shape in (*QUERIES.values(), (height, width)):
                found = predictor.predict(photo(*shape))
                assert found.mask.shape == shape
                assert set(np.unique(found.mask)) <= {0, 1}
                for values in (found.confidence, found.attention):
                    assert values.shape == shape
                    assert np.isfinite(values).all()
                again = predictor.predict(photo(*shape))
                assert np.array_equal(again.mask, found.mask)

    def test_an_empty_mask_is_refused(self, tiny_backbone: Backbone) -> None:
        predictor = Predictor(models(tiny_backbone)["bare"], SIZE)
        with pytest.raises(DataError, match="object"):
            predictor.remember([photo(50, 80)], [empty(50, 80)])

    def test_a_query_that_is_its_own_support(self, tiny_backbone: Backbone) -> None:
        predictor = Predictor(training_free(tiny_backbone, threshold=0.0).eval(), SIZE)
        shown, mask = photo(64, 64), empty(64, 64)
        mask[16:48, 16:48] = 1
        predictor.remember([shown], [mask])
        found = predictor.predict(shown).mask
        assert (found & mask).sum() / (found | mask).sum() > 0.6


class TestCommands:
    """The verbs, in files."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name, ((height, width), draw) in SUPPORTS.items():
            save(tmp_path / "supports" / f"{name.replace(' ', '-')}.png", photo(height, width))
            save(tmp_path / "supports" / f"{name.replace(' ', '-')}_mask.png", 255 * draw(height, width))
        for name, shape in QUERIES.items():
            save(tmp_path / "queries" / f"{name.replace(' ', '-')}.png", photo(*shape))
        save(tmp_path / "supports" / "empty_mask.png", empty(50, 80))
        return tmp_path

    @pytest.mark.parametrize("support", SUPPORTS)
    def test_predict(self, folder: Path, support: str, capsys: pytest.CaptureFixture[str]) -> None:
        stem, out = folder / "supports" / support.replace(" ", "-"), folder / "found"
        arguments = ["--support", f"{stem}.png:{stem}_mask.png", "--query", folder / "queries", "--out", out]
        code = main(["predict", *TINY, "--size", "64", *map(str, arguments)])
        assert code == (2 if support in TOO_SMALL else 0)
        if code:
            assert "shows no object at 64 x 64 pixels" in capsys.readouterr().err
            return
        for name, shape in QUERIES.items():
            with Image.open(out / "masks" / f"{name.replace(' ', '-')}.png") as mask:
                assert mask.size == shape[::-1]

    @pytest.mark.parametrize("support", ["one pixel", "a photo of one pixel", "one column"])
    def test_explain(self, folder: Path, support: str, capsys: pytest.CaptureFixture[str]) -> None:
        stem, out = folder / "supports" / support.replace(" ", "-"), folder / "why"
        arguments = ["--support", f"{stem}.png:{stem}_mask.png", "--query", folder / "queries", "--out", out]
        code = main(["explain", *TINY, "--resolution", "64", *map(str, arguments)])
        assert code == (2 if support in TOO_SMALL else 0)
        if code:
            assert "shows no object at 64 x 64 pixels" in capsys.readouterr().err

    @pytest.mark.parametrize("verb", ["predict", "explain"])
    def test_an_empty_mask_is_refused(self, folder: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
        support = f"{folder}/supports/one-pixel.png:{folder}/supports/empty_mask.png"
        size = "--size" if verb == "predict" else "--resolution"
        arguments = ["--support", support, "--query", folder / "queries", "--out", folder / "found"]
        assert main([verb, *TINY, size, "64", *map(str, arguments)]) == 2
        (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("fewshot-seg: error")]
        assert "empty_mask.png" in line
        assert not (folder / "found").exists()

    def test_a_query_that_is_its_own_support(self, folder: Path) -> None:
        stem = folder / "supports" / "the-whole-photo"
        for verb, size in (("predict", "--size"), ("explain", "--resolution")):
            arguments = ["--support", f"{stem}.png:{stem}_mask.png", "--query", f"{stem}.png", "--out", folder / verb]
            assert main([verb, *TINY, size, "64", *map(str, arguments)]) == 0

    def test_evaluate(self, tmp_path: Path) -> None:
        """A folder of one's own with objects of one pixel, of a whole photo, and photos of one pixel."""
        shapes = {
            "one": ((50, 80), one_pixel),
            "all": ((50, 80), whole),
            "dot": ((1, 1), whole),
            "row": ((1, 90), whole),
        }
        for number, (name, (shape, draw)) in enumerate(shapes.items()):
            save(tmp_path / "own" / "images" / f"{name}.png", photo(*shape, seed=number))
            save(tmp_path / "own" / "masks" / f"{name}.png", 255 * draw(*shape))
        save(tmp_path / "own" / "images" / "none.png", photo(50, 80, seed=9))
        save(tmp_path / "own" / "masks" / "none.png", empty(50, 80))  # shows nothing: drawn in no episode
        for scoring in ("protocol", "original"):
            arguments = ["--data", "folder", "--root", tmp_path / "own", "--count", 12, "--out", tmp_path / scoring]
            arguments += ["--scoring", scoring, "--resolution", 64, "--cache", tmp_path / "cache"]
            assert main(["evaluate", *TINY, *map(str, arguments)]) == 0
            found = json.loads((tmp_path / scoring / "evaluation.json").read_text())
            assert 0 <= found["miou"][0] <= 100
            drawn = {name for one in found["episodes"] for name in (*one["support_ids"], one["query_id"])}
            assert drawn == set(shapes)
            assert all(np.isfinite(one["iou"]) for one in found["episodes"])


class TestApp:
    def test_odd_examples_and_queries(self, tiny_backbone: Backbone, tmp_path: Path) -> None:
        engine = Engine(segmenter=training_free(tiny_backbone).eval(), resolution=SIZE, fit="squash", name="tiny")
        session = Session(engine, Limits(), tmp_path)
        files = [save(tmp_path / "in" / f"{n}.png", photo(*shape)) for n, shape in enumerate(QUERIES.values())]
        assert session.add_examples(files) == []
        assert session.add_queries(files) == []  # each is a support as well
        for drawing in (
            Drawing(
                kind="mask", shapes=(Shape("outline", ((-1.0, -1.0), (999.0, -1.0), (999.0, 999.0), (-1.0, 999.0))),)
            ),
            Drawing(kind="point", shapes=(Shape("point", ((0.0, 0.0),)),)),
            Drawing(kind="label"),
        ):
            found = session.find({one.number: drawing for one in session.examples})
            views = session.views(0.0, range(len(found.looked)))
            assert [view.overlay.shape[:2] for view in views] == [(1, 1), (1, 500), (500, 1), (50, 80)]
            assert all(0 <= view.share <= 1 and np.isfinite(view.confidence) for view in views)


def resident(field: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM at most since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise AssertionError(field)


def reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of memory cannot be reset here (/proc/self/clear_refs)")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    height, width = LARGE
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[2000:4000, 3000:6000] = (220, 30, 30)
    mask = np.where(pixels[..., 0] > 100, np.uint8(255), np.uint8(0))
    Image.fromarray(mask).save(folder / "mask.png", compress_level=1)
    Image.fromarray(pixels).save(folder / "photo.jpg", quality=80)
    return folder


slow = pytest.mark.skipif("FEWSHOT_SEG_LARGE" not in os.environ, reason="takes half a minute: set FEWSHOT_SEG_LARGE=1")


class TestLarge:
    """8000 x 6000 pixels, as photo, support and query."""

    def test_predict_within_bounds(self, large: Path, tiny_backbone: Backbone) -> None:
        predictor = Predictor(training_free(tiny_backbone, threshold=0.1).eval(), SIZE)
        reset_peak()
        before = resident("VmRSS")
        predictor.remember_files(f"{large}/photo.jpg:{large}/mask.png")
        found = predictor.predict_file(large / "photo.jpg")
        assert found.mask.shape == LARGE
        assert found.mask[3000, 4500] == 1
        assert found.mask[100, 100] == 0
        assert resident("VmHWM") - before < _ROOM

    def test_app_takes_it(self, large: Path, tiny_backbone: Backbone, tmp_path: Path) -> None:
        engine = Engine(segmenter=training_free(tiny_backbone).eval(), resolution=SIZE, fit="squash", name="tiny")
        session = Session(engine, Limits(), tmp_path)
        assert session.add_examples([large / "photo.jpg"]) == []
        assert session.add_queries([large / "photo.jpg"]) == []
        box = Drawing(kind="box", shapes=(Shape("box", ((380.0, 250.0), (770.0, 520.0))),))
        reset_peak()
        before = resident("VmRSS")
        session.find({1: box})
        (view,) = session.views(0.0, [0])
        assert view.overlay.shape[:2] == (600, 800)
        assert resident("VmHWM") - before < _ROOM

    @slow
    def test_explain(self, large: Path, tmp_path: Path) -> None:
        reset_peak()
        before = resident("VmRSS")
        support = ["--support", f"{large}/photo.jpg:{large}/mask.png", "--query", large / "photo.jpg"]
        assert main(["explain", *TINY, "--resolution", "64", *map(str, [*support, "--out", tmp_path / "why"])]) == 0
        taken = resident("VmHWM") - before
        print(f"explain took {taken:.0f} MB")
        assert taken < 3 * _ROOM

    @slow
    def test_evaluate(self, large: Path, tmp_path: Path) -> None:
        own = tmp_path / "own"
        for name in ("a", "b"):
            (own / "images").mkdir(parents=True, exist_ok=True)
            (own / "masks").mkdir(exist_ok=True)
            (own / "images" / f"{name}.jpg").symlink_to(large / "photo.jpg")
            (own / "masks" / f"{name}.png").symlink_to(large / "mask.png")
        arguments = ["--data", "folder", "--root", own, "--count", 1, "--out", tmp_path / "scored", "--resolution", 64]
        arguments += ["--cache", tmp_path / "cache", "--report-episodes", 0, "--scoring", "original"]
        reset_peak()
        before = resident("VmRSS")
        assert main(["evaluate", *TINY, *map(str, arguments)]) == 0
        taken = resident("VmHWM") - before
        print(f"evaluate took {taken:.0f} MB")
        assert taken < 3 * _ROOM
        found = json.loads((tmp_path / "scored" / "evaluation.json").read_text())
        assert found["miou"][0] > 50
