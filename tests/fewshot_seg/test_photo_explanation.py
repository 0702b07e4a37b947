"""People's own photos explained, and the command line around it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from episodes.sources import SyntheticSource
from episodes.types import DataError
from fewshot_seg.backbones import Backbone
from fewshot_seg.checkpoint import save_segmenter
from fewshot_seg.cli import main
from fewshot_seg.photo_explanation import explain_files
from fewshot_seg.prediction import Predictor
from fewshot_seg.segmenter import build_segmenter, training_free
from fewshot_seg.support_photos import read_supports

BARE = ["--model", "none", "--backbone", "mobilenetv3_small_050", "--backbone-weights", "random", "--device", "cpu"]


@pytest.fixture
def folder(tiny_source: SyntheticSource, tmp_path: Path) -> Path:
    """Two photos of class 4, the mask of the first, and a file that is no photo."""
    for number in (0, 1):
        Image.fromarray(tiny_source.image(f"val-004-000{number}")).save(tmp_path / f"{number}.png")
    Image.fromarray(tiny_source.mask("val-004-0000", 4) * 255).save(tmp_path / "mask.png")
    (tmp_path / "queries").mkdir()
    Image.fromarray(tiny_source.image("val-004-0001")).save(tmp_path / "queries" / "one.png")
    (tmp_path / "queries" / "two.jpg").write_text("no photo")
    return tmp_path


class TestExplainFiles:
    def test_says_what_predict_says(self, tiny_backbone: Backbone, folder: Path) -> None:
        segmenter = training_free(tiny_backbone, threshold=0.5).eval()
        supports = read_supports([f"star={folder}/0.png:{folder}/mask.png", f"spot={folder}/1.png:point=30,30"])
        query = folder / "queries" / "one.png"
        written, failures = explain_files(segmenter, supports, [query], folder / "why", resolution=64)
        assert not failures
        assert [one.path.name for one in written] == ["one-star.png", "one-spot.png"]
        for one in written:
            predictor = Predictor(segmenter, 64)
            predictor.remember_supports(supports[one.name])
            expected = predictor.predict_file(query).mask
            with np.load(one.maps) as stored:
                assert np.array_equal(stored["mask"], expected)
                assert "target" not in stored
            assert one.share == pytest.approx(float(expected.mean()))

    def test_object_too_small_for_the_square(self, tiny_backbone: Backbone, folder: Path) -> None:
        Image.new("RGB", (900, 900)).save(folder / "large.png")
        mask = Image.new("L", (900, 900))
        mask.putpixel((1, 1), 255)
        mask.save(folder / "small.png")
        supports = read_supports([f"star={folder}/large.png:{folder}/small.png"])
        query = folder / "queries" / "one.png"
        with pytest.raises(
            DataError, match=r"mask of support 1 of star shows no object at 64 x 64 pixels.*--resolution"
        ):
            explain_files(training_free(tiny_backbone).eval(), supports, [query], folder / "why", resolution=64)
        assert not (folder / "why").exists()


class TestCommand:
    def test_own_photos(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        support, queries, out = f"{folder}/0.png:{folder}/mask.png", str(folder / "queries"), folder / "why"
        arguments = ["explain", *BARE, "--support", support, "--query", queries, "--out", str(out)]
        assert main([*arguments, "--resolution", "64", "--panel", "64"]) == 1
        said = capsys.readouterr()
        assert "1 pictures" in said.out
        assert "skipped" in said.err
        assert "two.jpg" in said.err
        assert sorted(path.name for path in out.iterdir()) == ["index.html", "one.npz", "one.png", "run.json"]
        record = json.loads((out / "run.json").read_text())
        assert record["results"]["photos"][0]["maps"] == "one.npz"
        assert record["results"]["resolution"] == 64

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--query", "photos"], "missing --support: PHOTO:MASK"),
            (["--query", "photos", "--support", "a:b", "--score"], "--score needs episodes"),
            (["--data", "synthetic", "--support", "a.jpg:b.png"], "--support must be one of mask, box"),
            (["--data", "synthetic", "--score", "--explainers", "magic", *BARE], "--explainers: expected names out of"),
        ],
    )
    def test_what_does_not_fit(self, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["explain", *arguments]) == 2
        assert said in capsys.readouterr().err

    def test_scores(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["explain", "--data", "synthetic", *BARE, "--threshold", "0.5", "--resolution", "64", "--score"]
        arguments += ["--score-episodes", "2", "--explainers", "attention", "pairwise", "--score-steps", "2"]
        arguments += ["--sanity-every", "2", "--out", str(tmp_path / "scores"), "--cache", str(tmp_path / "cache")]
        assert main(arguments) == 0
        first = capsys.readouterr().out
        assert "query side" in first
        assert "support side" in first
        scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
        assert set(scores["scores"]) == {"attention", "pairwise"}
        assert scores["episodes"] == 2
        assert (tmp_path / "scores" / "run.json").exists()
        assert main(arguments) == 0  # from the finished episodes
        assert capsys.readouterr().out == first

    def test_scores_of_a_model_that_was_trained_anew_are_not_taken_for_its_own(
        self, tiny_backbone: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = tmp_path / "model.safetensors"
        arguments = ["explain", "--data", "synthetic", "--model", str(model), "--device", "cpu", "--score"]
        arguments += ["--score-episodes", "1", "--explainers", "attention", "--score-steps", "2"]
        arguments += ["--out", str(tmp_path / "scores"), "--cache", str(tmp_path / "cache")]
        for rank, expected in ((2, 0), (3, 2)):
            segmenter = build_segmenter(tiny_backbone, similarity_rank=rank, decoder_width=8, decoder_blocks=1)
            save_segmenter(model, segmenter, backbone_weights="random", resolution=64)
            assert main(arguments) == expected
        assert "holds episodes of another run" in capsys.readouterr().err
