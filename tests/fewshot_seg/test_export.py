"""ONNX graphs against the segmenter, at other sizes, shots and batches than they were traced with."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor, nn

from episodes.augment import EpisodeTransform
from episodes.protocols import Fit
from episodes.types import DataError, UInt8Array
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.cli import main
from fewshot_seg.decoder import ContextDecoder
from fewshot_seg.export import METADATA_NAME, QUERY_NAME, SUPPORT_NAME, export_segmenter
from fewshot_seg.onnx_graphs import (
    EMBEDDING,
    EVIDENCE_EMBEDDING,
    QueryGraph,
    SameConvolution,
    SupportGraph,
    bin_means,
    whole_priors,
)
from fewshot_seg.prediction import Predictor
from fewshot_seg.priors import similarity_priors
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter, training_free

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

EXAMPLE = Path(__file__).resolve().parents[2] / "scripts" / "onnx_example.py"
TOLERANCE = 1e-4
"""Of logits: float32, sums in another order."""


class TinyEncoder(nn.Module):
    """Five stages of stride 2, two of them padded as TensorFlow does."""

    out_channels = (3, 4, 4, 8, 12, 8)

    def __init__(self, *, drops_border: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(3)
            widths = list(zip(self.out_channels[:-1], self.out_channels[1:], strict=True))
            self.stages = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 0 if drops_border else 1) for i, o in widths)
            if not drops_border:
                self.stages[0] = Conv2dSame(3, 4, 3, 2, bias=False)
                self.stages[4] = Conv2dSame(12, 8, 5, 2)
            for stage in self.stages:
                nn.init.normal_(stage.weight, std=stage.weight[0].numel() ** -0.5)  # features that tell cells apart
                if stage.bias is not None:
                    nn.init.normal_(stage.bias, std=0.3)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [images]
        for stage in self.stages:
            maps.append(F.hardswish(stage(maps[-1])))
        return maps


def tiny(encoder: nn.Module | None = None) -> Backbone:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    return Backbone(encoder or TinyEncoder(), name="tiny", strides=(16, 32), mean=mean, std=std)


def trained(**arguments: Any) -> FewShotSegmenter:
    """A model whose every part has a say; the decoder of weak supports has none in the graphs, which are of masks."""
    segmenter = build_segmenter(tiny(), decoder_width=8, decoder_blocks=1, similarity_rank=4, **arguments).eval()
    weak, segmenter.weak_decoder = segmenter.weak_decoder, None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in segmenter.trainable_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        if segmenter.completion is not None and segmenter.completion.objects is not None:
            segmenter.completion.objects.weight.normal_(std=4, generator=generator)
    if isinstance(segmenter.decoder, ContextDecoder):
        maps = torch.randn(9, segmenter.decoder.prior_channels, 5, 5, generator=generator)
        segmenter.decoder.fit_scales(2 * maps + 1)
    segmenter.guided = False  # the graphs give the logits as they are before they follow the photo's edges
    segmenter.threshold = 0.4
    if isinstance(segmenter.decoder, ContextDecoder):  # its random values are far from 0: cut where both sides are
        images, masks, queries = episode(1, 2, 64, 64)
        with torch.no_grad():
            logits = segmenter.segment(segmenter.encode_support(images[None], masks[None]), queries[:1]).logits
        segmenter.threshold = float(logits.median())
    segmenter.weak_decoder = weak
    return segmenter


MODELS = {
    "decoder with appearance and completion": lambda: trained(appearance=4, completion=True),
    "base learner and completion": lambda: trained(base_classes=5, completion=True),
    "soft margin alone": lambda: training_free(tiny(), threshold=0.0).eval(),
}


def episode(shots: int, batch: int, height: int, width: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = np.random.default_rng([seed, shots, batch, height, width])
    images = random.uniform(size=(shots + batch, 3, height, width)).astype(np.float32)
    images[:, :, height // 4 : height // 2, width // 4 : -width // 4] *= 0.3
    masks = np.zeros((shots, height, width), np.uint8)
    masks[:, height // 4 : height // 2, width // 4 : -width // 4] = 1
    masks[:, :7] = 255
    return torch.from_numpy(images[:shots]), torch.from_numpy(masks), torch.from_numpy(images[shots:])


class Exported:
    """The written graphs in onnxruntime."""

    def __init__(self, segmenter: FewShotSegmenter, folder: Path) -> None:
        self.segmenter, self.folder = segmenter, folder
        self.metadata = json.loads((folder / METADATA_NAME).read_text())
        self.support, self.query = (
            onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
            for name in (SUPPORT_NAME, QUERY_NAME)
        )

    def encode(self, images: Tensor, masks: Tensor) -> dict[str, Any]:
        names = list(self.metadata["graphs"]["support"]["outputs"])
        found = self.support.run(names, {"images": images.numpy(), "masks": masks.numpy()})
        return dict(zip(names, found, strict=True))

    def check(self, shots: int, batch: int, height: int, width: int) -> None:
        images, masks, queries = episode(shots, batch, height, width)
        with torch.no_grad():
            support = self.segmenter.encode_support(images[None], masks[None])
            expected = self.segmenter.segment(support, queries)
        embedding = self.encode(images, masks)
        for name, found in embedding.items():
            np.testing.assert_allclose(found, getattr(support, name)[0], atol=2e-6, err_msg=name)
        logits, coarse = self.query.run(["logits", "coarse_logits"], {"images": queries.numpy(), **embedding})
        np.testing.assert_allclose(logits, expected.logits, atol=TOLERANCE)
        clear = (expected.logits - expected.threshold).abs().numpy() > TOLERANCE
        assert clear.mean() > 0.99
        mask = logits > self.metadata["threshold"]
        assert np.array_equal(mask[clear], expected.masks.numpy()[clear])
        assert 0 < mask.mean() < 1
        assert expected.logits.std() > 100 * TOLERANCE
        enlarged = F.interpolate(torch.from_numpy(coarse)[:, None], (height, width), mode="bilinear")[:, 0]
        np.testing.assert_allclose(enlarged, expected.logits, atol=TOLERANCE)


@pytest.fixture(scope="module")
def by_verb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command line writes for the soft margin alone."""
    folder = tmp_path_factory.mktemp("export") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewshot_seg.method.build_backbone", lambda *_, **__: tiny())
        assert main(["export", "--model", "none", "--out", str(folder), "--size", "80", "--threshold", "0"]) == 0
    return folder


@pytest.fixture(scope="module", params=list(MODELS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    segmenter = MODELS[request.param]()
    if request.param == "soft margin alone":
        return Exported(segmenter, request.getfixturevalue("by_verb"))
    folder = tmp_path_factory.mktemp("export")
    written = export_segmenter(segmenter, folder, size=80)
    assert written == json.loads((folder / METADATA_NAME).read_text())
    return Exported(segmenter, folder)


class TestInOnnxruntime:
    @pytest.mark.parametrize(
        ("shots", "batch", "height", "width"),
        [(1, 1, 64, 64), (2, 3, 96, 160), (3, 2, 65, 131), (1, 2, 80, 80), (5, 1, 250, 99)],
    )
    def test_equals_the_segmenter(self, exported: Exported, shots: int, batch: int, height: int, width: int) -> None:
        exported.check(shots, batch, height, width)

    def test_supports_and_queries_of_different_sizes(self, exported: Exported) -> None:
        images, masks, _ = episode(2, 1, 96, 64)
        queries = episode(1, 2, 70, 112)[2]
        with torch.no_grad():
            support = exported.segmenter.encode_support(images[None], masks[None])
            expected = exported.segmenter.segment(support, queries).logits
        found = exported.query.run(["logits"], {"images": queries.numpy(), **exported.encode(images, masks)})[0]
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)

    def test_metadata_says_what_the_graphs_read(self, exported: Exported) -> None:
        written = exported.metadata
        assert (written["size"], written["fit"]) == (80, "squash")
        assert written["threshold"] == exported.segmenter.threshold
        assert (written["size_multiple"], written["least_side"]) == (1, 64)
        for name, session in (("support", exported.support), ("query", exported.query)):
            described = written["graphs"][name]
            assert [one.name for one in session.get_inputs()] == list(described["inputs"])
            assert [one.name for one in session.get_outputs()] == list(described["outputs"])
            for one in session.get_inputs():
                expected = described["inputs"][one.name]
                assert one.type == {"float32": "tensor(float)", "uint8": "tensor(uint8)"}[expected["type"]]
                assert one.shape == expected["shape"]

    def test_leaves_the_segmenter_alone(self, exported: Exported) -> None:
        assert not any(isinstance(module, SameConvolution) for module in exported.segmenter.modules())


def test_default_backbone(tmp_path: Path) -> None:
    """Its real weights and every kind of block, but of the alike blocks of a stage the first alone."""
    backbone = build_backbone()
    blocks = next(part for name, part in backbone.encoder.named_modules() if name.split(".")[-1] == "blocks")
    before = len(list(backbone.encoder.modules()))
    for number, stage in enumerate(blocks):
        blocks[number] = stage[:1]
    assert len(list(backbone.encoder.modules())) < 0.6 * before
    segmenter = training_free(backbone, threshold=0.5).eval()
    export_segmenter(segmenter, tmp_path, size=400)
    exported = Exported(segmenter, tmp_path)
    exported.check(1, 2, 96, 133)
    exported.check(2, 1, 400, 400)


class TestGraphs:
    """The modules before they are exported."""

    @pytest.mark.parametrize("model", list(MODELS))
    def test_equal_the_segmenter(self, model: str) -> None:
        segmenter, (images, masks, queries) = MODELS[model](), episode(2, 3, 90, 65)
        with torch.no_grad():
            support = segmenter.encode_support(images[None], masks[None])
            found = SupportGraph(segmenter)(images, masks)
            logits = QueryGraph(segmenter)(queries, *found)[0]
            expected = segmenter.segment(support, queries).logits
        names = EMBEDDING if segmenter.base_learner is None else EVIDENCE_EMBEDDING
        for name, one in zip(names, found, strict=True):
            torch.testing.assert_close(one, getattr(support, name)[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)

    @pytest.mark.parametrize(("pixels", "bins"), [(64, 4), (65, 5), (473, 30), (3, 3), (2, 5)])
    def test_bin_means(self, pixels: int, bins: int) -> None:
        values = torch.rand(1, pixels)
        expected = F.adaptive_avg_pool1d(values, bins)
        torch.testing.assert_close(values @ bin_means(pixels, bins).T, expected, atol=1e-6, rtol=0)

    def test_whole_priors(self) -> None:
        generator = torch.Generator().manual_seed(0)
        maps = F.normalize(torch.randn(2, 6, 3, 4, generator=generator), dim=1)
        cells = F.normalize(torch.randn(7, 6, generator=generator), dim=1)
        foreground, background = torch.rand(7, generator=generator), torch.zeros(7)  # a side that nothing shows
        embeddings = F.normalize(torch.randn(2, 6, generator=generator), dim=1)
        found = whole_priors(maps, cells, (foreground, background), (embeddings[0], embeddings[1]), temperature=0.05)
        each = [one[None].expand(2, *one.shape) for one in (cells, foreground, background, *embeddings)]
        expected = similarity_priors(maps, *each, temperature=0.05)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


class TestRefused:
    def test_other_priors(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="prior 'pfenet' cannot be exported; train one with 'similarity'"):
            export_segmenter(build_segmenter(tiny(), prior="pfenet"), tmp_path, size=64)

    def test_other_padding_by_size(self, tmp_path: Path) -> None:
        encoder = TinyEncoder()
        encoder.stages[1] = nn.Sequential(encoder.stages[1], MaxPool2dSame(3, 1))
        with pytest.raises(DataError, match="backbone 'tiny' cannot be exported: its MaxPool2dSame pads by"):
            export_segmenter(training_free(tiny(encoder)), tmp_path, size=64)

    def test_folder_that_holds_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("")
        with pytest.raises(DataError, match=r"holds something else \(thesis.tex\); choose a new or empty folder"):
            export_segmenter(training_free(tiny()), tmp_path, size=64)

    def test_file_in_place_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("")
        with pytest.raises(DataError, match="is a file; choose a folder"):
            export_segmenter(training_free(tiny()), tmp_path / "out", size=64)

    def test_small_size(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="--size 48: this model's graphs take sides of 64 pixels or more"):
            export_segmenter(training_free(tiny()), tmp_path, size=48)

    def test_size_of_a_backbone_that_drops_the_border(self, tmp_path: Path) -> None:
        backbone = build_backbone("convnext_atto", weights="random")
        with pytest.raises(DataError, match=r"--size 80: .* 64 pixels or more that are multiples of 32"):
            export_segmenter(training_free(backbone), tmp_path, size=80)

    def test_missing_packages(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("onnx", "onnxscript"):
            monkeypatch.setitem(sys.modules, name, None)
        assert main(["export", "--backbone-weights", "random", "--out", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr().err.strip()
        assert printed == 'fewshot-seg: error: export needs onnx and onnxscript: pip install "fewshot-seg[export]"'
        assert not (tmp_path / "out").exists()


def test_verb(by_verb: Path) -> None:
    assert sorted(file.name for file in by_verb.iterdir()) == sorted([METADATA_NAME, QUERY_NAME, SUPPORT_NAME])
    assert json.loads((by_verb / METADATA_NAME).read_text())["method"] == "soft margin, training-free"


def photo(seed: int, height: int, width: int) -> tuple[UInt8Array, UInt8Array]:
    random = np.random.default_rng(seed)
    image = random.integers(90, 130, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 5 : height // 2, width // 4 : width // 2] = 1
    image[mask == 1] = (220, 30, 30)
    return image, mask


class TestExample:
    """`scripts/onnx_example.py` in a process that has no torch."""

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        blocked = "torch", "torchvision", "timm", "fewshot_seg", "episodes", "cv2", "albumentations", "scipy"
        code = (
            f"import sys, runpy; sys.modules.update(dict.fromkeys({blocked!r})); sys.argv = sys.argv[1:]; "
            "runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        command = [sys.executable, "-c", code, str(EXAMPLE), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)

    @pytest.mark.parametrize("fit", ["squash", "pad"])
    def test_masks_of_the_predictor(self, fit: Fit, by_verb: Path, tmp_path: Path) -> None:
        shutil.copytree(by_verb, tmp_path / "export")
        metadata = json.loads((by_verb / METADATA_NAME).read_text())  # graphs do not know how photos became square
        (tmp_path / "export" / METADATA_NAME).write_text(json.dumps(metadata | {"fit": fit}))
        supports = [photo(0, 64, 101), photo(1, 120, 90)]
        queries = {"large": photo(2, 140, 200)[0], "small": photo(3, 50, 60)[0], "mixed": photo(4, 70, 130)[0]}
        given: list[object] = []
        for number, (image, mask) in enumerate(supports):
            files = tmp_path / f"support{number}.png", tmp_path / f"mask{number}.png"
            Image.fromarray(image).save(files[0])
            Image.fromarray(mask * (255 if number else 1)).save(files[1])
            given += ["--support", *files]
        given.append("--query")
        for name, image in queries.items():
            Image.fromarray(image).save(tmp_path / f"{name}.png")
            given.append(tmp_path / f"{name}.png")
        done = self.run("--model", tmp_path / "export", *given, "--out", tmp_path / "masks")
        assert done.returncode == 0, done.stderr
        predictor = Predictor(training_free(tiny(), threshold=0.0), 80, fit)
        predictor.remember(*zip(*supports, strict=True))
        for name, image in queries.items():
            found, expected = np.asarray(Image.open(tmp_path / "masks" / f"{name}.png")), predictor.predict(image)
            assert set(np.unique(found)) == {0, 255}
            clear = np.abs(expected.confidence - 0.5) > 0.02  # resizing differs by up to a grey level
            assert clear.mean() > 0.8
            assert np.array_equal(found[clear] == 255, expected.mask[clear] == 1)

    @pytest.mark.parametrize(("height", "width"), [(200, 300), (40, 50), (60, 130), (80, 80), (80, 31), (161, 80)])
    @pytest.mark.parametrize("fit", ["squash", "pad"])
    def test_makes_photos_square_as_the_package_does(self, height: int, width: int, fit: Fit) -> None:
        example = runpy.run_path(str(EXAMPLE))
        image, mask = photo(7, height, width)
        image[::3, ::2] = 10
        expected, expected_mask = EpisodeTransform("none", 80, fit)(image, mask, seed=0)
        found, found_mask = example["square"](image, 80, fit), example["square_mask"](mask, 80, fit)
        assert np.abs(found - expected.numpy()).max() < 1.01 / 255
        different = (found_mask != expected_mask.numpy()).sum()  # OpenCV breaks ties between two pixels its own way
        assert different <= 20  # one row or column of the object

    def test_mask_without_an_object(self, by_verb: Path, tmp_path: Path) -> None:
        image, mask = photo(0, 64, 64)
        Image.fromarray(image).save(tmp_path / "photo.png")
        Image.fromarray(0 * mask).save(tmp_path / "mask.png")
        files = tmp_path / "photo.png", tmp_path / "mask.png"
        done = self.run("--model", by_verb, "--support", *files, "--query", files[0], "--out", tmp_path)
        assert done.returncode != 0
        assert done.stderr.strip() == f"{files[1]}: the mask shows no object at 80 x 80 pixels; mark it with 1 or white"
