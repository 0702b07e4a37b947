"""``similarity train|evaluate|explain`` and ``--similarity`` in process, on tiny photos and a tiny VOC folder."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fewshot_seg.similarity_training
from episodes.labelled import LabelledImages, split_labels
from episodes.protocols import get_protocol
from episodes.reidentification import open_reidentification
from episodes.retrieval import open_retrieval
from episodes.sources import SyntheticSource, VocSource
from fewshot_seg.attention import ATTENTION_KINDS
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.checkpoint import load_similarity, save_similarity
from fewshot_seg.cli import main
from fewshot_seg.config import EvaluateConfig
from fewshot_seg.embedding import ImageEmbedder
from fewshot_seg.fold_data import evaluation_episodes, held_out_episodes, open_fold
from fewshot_seg.method import open_method
from fewshot_seg.prior_evaluation import evaluate_priors
from fewshot_seg.retrieval_metrics import reidentification_scores, retrieval_scores
from fewshot_seg.segmenter import training_free
from fewshot_seg.similarity import SimilarityNetwork
from fewshot_seg.similarity_evaluation import draw_comparisons, pair_faithfulness, read_squares

NAME = "similarity.safetensors"
TINY = ("--backbone", "mobilenetv3_small_050", "--backbone-weights", "random")
SIZE = ("--resolution", "64")
BATCH = ("--classes", "3", "--photos", "3", "--learning-rate", "0.02")  # large, so that a few steps are seen
SHORT = ("--steps", "4", "--checkpoint-every", "2")
PERSONS = ("--data", "market1501")
VOC = ("--data", "voc", "--root")
FEW = ("--steps", "3", "--batch-size", "2", "--learning-rate", "0.02")


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of features for this file, and every backbone built once: they are frozen, and building takes longest."""
    built: dict[Any, Backbone] = {}

    def build_once(name: str, *, strides: Sequence[int] | None = None, weights: str = "embedded") -> Backbone:
        key = name, None if strides is None else tuple(strides), weights
        if key not in built:
            built[key] = build_backbone(name, strides=strides, weights=weights)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSHOT_SEG_CACHE", str(tmp_path_factory.mktemp("cache")))
        for module in ("similarity_runs", "runs", "method", "checkpoint"):
            patch.setattr(f"fewshot_seg.{module}.build_backbone", build_once)
        yield


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail: exit code 2 and one line of error after the progress bars; returns the line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        lines = printed.err.replace("\r", "\n").splitlines()
        assert [line for line in lines if line.startswith("fewshot-seg: error: ")] == lines[-1:]
        assert "Traceback" not in printed.err
        return lines[-1].removeprefix("fewshot-seg: error: ")

    return run


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def embedded(network: Path | None, images: LabelledImages) -> torch.Tensor:
    """Embeddings photo by photo; features in half precision, as they are stored."""
    if network is None:
        backbone = build_backbone(TINY[1], weights="random")
        similarity = SimilarityNetwork(backbone.channels, rank=0)
    else:
        loaded = load_similarity(network)
        backbone, similarity = loaded.backbone, loaded.similarity
    rows = []
    for number in range(len(images)):
        levels = [level.half().float() for level in backbone(read_squares(images, [number], size=64))]
        rows.append(similarity.embed(similarity(levels))[0])
    return torch.stack(rows)


def linked(page: Path) -> list[str]:
    """Pictures that a page shows."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "img":
                found.append(dict(attrs)["src"] or "")

    Reader().feed(page.read_text())
    return found


def rows_of(printed: str) -> dict[str, list[str]]:
    """Printed table: name -> the cells that follow."""
    lines = printed.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("-----"))
    end = lines.index("", start)
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[start + 1 : end]]
    return {row[0]: row[1:] for row in cells}


@pytest.fixture(scope="module")
def train(photo_folders: Path) -> Callable[..., int]:
    """`similarity train` on the folders into a folder."""

    def run(out: Path, *more: object) -> int:
        return call("similarity", "train", "--root", photo_folders, "--out", out, *TINY, *SIZE, *BATCH, *SHORT, *more)

    return run


@pytest.fixture(scope="module")
def trained(train: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a network trained on all training classes of the folders."""
    out = tmp_path_factory.mktemp("runs") / "all"
    assert train(out) == 0
    return out


@pytest.fixture(scope="module")
def kept(train: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of a run with --held-out."""
    out = tmp_path_factory.mktemp("runs") / "kept"
    assert train(out, "--held-out") == 0
    return out / NAME


class TestTrainOnPhotos:
    def test_writes_network_and_record(self, trained: Path, photo_folders: Path) -> None:
        record, images = read(trained / "run.json"), open_retrieval("folders", photo_folders).train
        assert record["verb"] == "similarity train"
        assert (record["configuration"]["steps"], record["configuration"]["data"]) == (4, "folders")
        assert record["data"]["photos"]["fingerprint"] == images.fingerprint(images.files)
        assert (record["data"]["photos"]["photos"], record["data"]["photos"]["classes"]) == (24, 6)
        assert record["environment"]["versions"]["torch"] == importlib.metadata.version("torch")
        assert "commit" in record["environment"]
        assert record["results"]["steps"] == 4
        assert math.isfinite(record["results"]["loss"])
        loaded = load_similarity(trained / NAME)
        assert (loaded.resolution, loaded.similarity.rank, loaded.backbone.strides) == (64, 64, (16, 32))
        assert loaded.notes["labels"] == list(images.class_names)
        assert loaded.similarity.up.weight.any()  # it began as the identity

    def test_says_where_the_network_is(
        self, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train(tmp_path / "run", "--steps", "1", "--rank", "2") == 0
        assert capsys.readouterr().out == f"network: {tmp_path / 'run' / NAME}\n"
        assert load_similarity(tmp_path / "run" / NAME).similarity.rank == 2

    @pytest.mark.parametrize(
        "changes",
        [
            ("--loss", "contrastive"),
            ("--loss", "triplet", "--margin", "0.3", "--no-mine"),
            ("--loss", "quadruplet"),
            ("--constraint", "0.5", "--learn-mask"),
            ("--constraint", "0.5", "--constraint-domain", "photos", "--constraint-triples", "2"),
            ("--constraint", "1", "--metric-weight", "0", "--constraint-form", "triplet"),
            ("--no-mirror",),
        ],
        ids=" ".join,
    )
    def test_every_loss_and_constraint_leads_elsewhere(
        self, train: Callable[..., int], trained: Path, tmp_path: Path, changes: tuple[str, ...]
    ) -> None:
        assert train(tmp_path, *changes) == 0
        weights = load_file(tmp_path / NAME)
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
        assert not same_weights(tmp_path / NAME, trained / NAME)

    def test_settings_from_a_file(self, photo_folders: Path, trained: Path, tmp_path: Path) -> None:
        file = tmp_path / "run.toml"
        file.write_text(
            f'root = "{photo_folders}"\nbackbone = "{TINY[1]}"\nbackbone-weights = "random"\nresolution = 64\n'
            "classes = 3\nphotos = 3\nlearning-rate = 0.02\nsteps = 9\ncheckpoint-every = 2\n"
        )
        assert call("similarity", "train", "--config", file, "--steps", "4", "--out", tmp_path / "run") == 0
        assert same_weights(tmp_path / "run" / NAME, trained / NAME)

    def test_resumed_ends_with_the_same_weights(
        self,
        train: Callable[..., int],
        trained: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        original, calls = fewshot_seg.similarity_training.photo_losses, 0

        def interrupted(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise KeyboardInterrupt
            return original(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(fewshot_seg.similarity_training, "photo_losses", interrupted)
            assert train(tmp_path) == 130
        assert "interrupted; a training goes on with --resume" in capsys.readouterr().err
        assert not (tmp_path / NAME).exists()
        assert read(tmp_path / "run.json")["results"] is None
        assert train(tmp_path, "--resume") == 0
        assert same_weights(tmp_path / NAME, trained / NAME)
        assert read(tmp_path / "run.json")["results"]["steps"] == 4

    def test_an_earlier_run_is_kept(
        self, photo_folders: Path, trained: Path, tmp_path: Path, error_of: Callable[..., str]
    ) -> None:
        before = (trained / NAME).read_bytes()
        again = ("similarity", "train", "--root", photo_folders, "--out", trained, *TINY, *SIZE, *BATCH, *SHORT)
        assert f"{trained} holds an earlier run ({NAME}); go on with it by --resume, or choose" in error_of(*again)
        message = error_of(*again, "--resume", "--loss", "triplet", "--constraint", "0.5", "--cache", tmp_path)
        assert (
            f"cannot resume {trained}: constraint was 0.0, now 0.5, loss was multi-similarity, now triplet" in message
        )
        assert "cache" not in message
        assert (trained / NAME).read_bytes() == before


def seen_batches(monkeypatch: pytest.MonkeyPatch, losses: str) -> list[Any]:
    """The batches that the trainings of a test see."""
    original, seen = getattr(fewshot_seg.similarity_training, losses), list[Any]()

    def spy(trained: Any, batch: Any, **named: Any) -> Any:
        seen.append(batch)
        return original(trained, batch, **named)

    monkeypatch.setattr(fewshot_seg.similarity_training, losses, spy)
    return seen


class TestWhatTrainingSees:
    def test_photos(
        self, train: Callable[..., int], photo_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = seen_batches(monkeypatch, "photo_losses")
        assert train(tmp_path, "--held-out", "--classes", "4", "--steps", "3") == 0
        classes = {Path(file).parts[:2] for batch in seen for file in batch.files}
        kept, _ = split_labels(open_retrieval("folders", photo_folders).train)
        assert classes == {("train", name) for name in kept.class_names}

    @pytest.mark.parametrize(("more", "allowed"), [((), {1, 2, 11, 12, 16, 17}), (("--held-out",), {1, 2, 16, 17})])
    def test_episodes(
        self,
        shared_voc: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        more: tuple[str, ...],
        allowed: set[int],
    ) -> None:
        seen = seen_batches(monkeypatch, "episode_similarity_losses")
        arguments = ("similarity", "train", *VOC, shared_voc, "--fold", "1", "--out", tmp_path, *TINY, *SIZE)
        assert call(*arguments, "--steps", "3", "--batch-size", "8", *more) == 0
        assert {class_id for batch in seen for class_id in batch.class_ids} == allowed
        photos = {photo for batch in seen for spec in batch.specs for photo in (*spec.support_ids, spec.query_id)}
        assert all(photo.startswith("trainaug_") for photo in photos)


class TestRetrieval:
    @pytest.mark.parametrize("with_model", [True, False])
    def test_scores_equal_embeddings_by_hand(
        self,
        photo_folders: Path,
        trained: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        with_model: bool,
    ) -> None:
        model = trained / NAME if with_model else None
        named = ("--model", model) if model else (*TINY, *SIZE)
        arguments = ("similarity", "evaluate", "--root", photo_folders, *named, "--ks", "1", "3")
        assert call(*arguments, "--out", tmp_path) == 0
        images = open_retrieval("folders", photo_folders).test
        expected = retrieval_scores(embedded(model, images), torch.from_numpy(images.codes), ks=(1, 3))
        evaluation = read(tmp_path / "evaluation.json")
        by_name = {"recall@1": expected.recall[1], "recall@3": expected.recall[3], "MAP@R": expected.map_at_r}
        assert {name: pytest.approx(score) for name, score in evaluation["scores"].items()} == {
            name: list(score) for name, score in by_name.items()
        }
        assert 0 < expected.map_at_r[0] < 100
        assert (evaluation["queries"], evaluation["skipped"], evaluation["part"]) == (16, 0, "test")
        method = str(model) if model else "frozen features"
        assert evaluation["method"] == method
        printed = capsys.readouterr().out
        assert printed.startswith(f"{photo_folders.name} test: {method}\n")
        assert rows_of(printed) == {
            name: [f"{value:.1f}", f"{low:.1f} - {high:.1f}"] for name, (value, low, high) in by_name.items()
        }
        assert "queries 16, skipped 0" in printed
        record = read(tmp_path / "run.json")
        assert record["results"] == evaluation
        assert record["data"]["photos"]["fingerprint"] == images.fingerprint(images.files)

    def test_held_out_classes(
        self, photo_folders: Path, trained: Path, kept: Path, tmp_path: Path, error_of: Callable[..., str]
    ) -> None:
        arguments = ("similarity", "evaluate", "--root", photo_folders, "--out", tmp_path, "--part", "held-out")
        assert call(*arguments, "--model", kept) == 0
        _, held_out = split_labels(open_retrieval("folders", photo_folders).train)
        assert len(held_out.class_names) == 2
        assert not set(held_out.class_names) & set(load_similarity(kept).notes["labels"])
        expected = retrieval_scores(embedded(kept, held_out), torch.from_numpy(held_out.codes))
        evaluation = read(tmp_path / "evaluation.json")
        assert evaluation["scores"]["MAP@R"] == pytest.approx(list(expected.map_at_r))
        assert evaluation["queries"] == 8
        message = error_of(*arguments, "--model", trained / NAME)
        assert f"{trained / NAME} was trained on 2 of the classes to be scored ({held_out.class_names[0]}" in message
        assert "--held-out" in message
        assert call(*arguments, *TINY, *SIZE) == 0  # the frozen features have seen none

    def test_faithfulness(
        self, photo_folders: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pairs = ("--faithfulness", "3", "--form", "triplet", "--seed", "5")
        arguments = ("similarity", "evaluate", "--root", photo_folders, "--model", trained / NAME, "--out", tmp_path)
        assert call(*arguments, *pairs) == 0
        loaded, images = load_similarity(trained / NAME), open_retrieval("folders", photo_folders).test
        found = pair_faithfulness(
            ImageEmbedder(loaded.backbone, loaded.similarity),
            images,
            draw_comparisons(images, count=3, seed=5),
            size=64,
            kind="triplet",
        )
        evaluation = read(tmp_path / "evaluation.json")
        assert (evaluation["pairs"], evaluation["form"]) == (3, "triplet")
        printed = rows_of(capsys.readouterr().out)
        for name, values in asdict(found).items():
            row = f"{name} similarity" if name in ("whole", "blank") else name
            value, low, high = evaluation["scores"][row]
            assert value == pytest.approx(100 * values.mean())
            assert low <= value <= high
            assert printed[row][0] == f"{value:.1f}"

    def test_a_network_out_of_a_whole_model(
        self, tiny_voc: Path, photo_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole = tmp_path / "run" / "model.safetensors"
        run = ("train", "--root", tiny_voc, "--out", whole.parent, *TINY, *SIZE, *FEW, "--no-select-threshold")
        assert call(*run) == 0
        assert call("similarity", "evaluate", "--root", photo_folders, "--model", whole, "--out", tmp_path / "e") == 0
        images = open_retrieval("folders", photo_folders).test
        expected = retrieval_scores(embedded(whole, images), torch.from_numpy(images.codes))
        found = read(tmp_path / "e" / "evaluation.json")["scores"]["MAP@R"]
        assert found == pytest.approx(list(expected.map_at_r))
        assert f"{whole}" in capsys.readouterr().out


class TestExplain:
    @pytest.mark.parametrize("form", ["cosine", "margin", "quadruplet"])
    def test_photos_of_a_data_set(
        self, photo_folders: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
    ) -> None:
        arguments = ("similarity", "explain", "--root", photo_folders, "--model", trained / NAME, "--count", "2")
        assert call(*arguments, "--form", form, "--out", tmp_path) == 0
        names = ["comparison-0000.png", "comparison-0001.png"]
        assert sorted(path.name for path in tmp_path.glob("*.png")) == names
        assert linked(tmp_path / "index.html") == names
        assert f"2 pictures: {tmp_path / 'index.html'}" in capsys.readouterr().out
        images = open_retrieval("folders", photo_folders).test
        compared = {"cosine": 2, "margin": 3, "quadruplet": 4}[form]
        for comparison in draw_comparisons(images, count=2, seed=0):
            caption = " / ".join(images.labels[position] for position in comparison[:compared])
            assert f"<figcaption>{caption}</figcaption>" in (tmp_path / "index.html").read_text()
        with Image.open(tmp_path / names[0]) as picture:
            assert picture.width > 200 * compared
            assert np.asarray(picture.convert("RGB")).std() > 10
        record = read(tmp_path / "run.json")
        assert record["verb"] == "similarity explain"
        assert record["results"]["pictures"] == names
        assert record["configuration"]["form"] == form

    @pytest.mark.parametrize(("form", "compared"), [("siamese", 2), ("triplet", 3), ("margin", 3), ("quadruplet", 4)])
    def test_own_photos(self, photo_folders: Path, trained: Path, tmp_path: Path, form: str, compared: int) -> None:
        photos = sorted(photo_folders.glob("test/*/1.png"))[:4]
        arguments = ("similarity", "explain", "--model", trained / NAME, "--form", form, "--out", tmp_path)
        assert call(*arguments, "--images", *photos[:compared]) == 0
        enough = (tmp_path / "comparison.png").read_bytes()
        assert linked(tmp_path / "index.html") == ["comparison.png"]
        assert read(tmp_path / "run.json")["results"]["pictures"] == ["comparison.png"]
        assert call(*arguments, "--images", *photos) == 0  # those that the form does not compare are left out
        assert (tmp_path / "comparison.png").read_bytes() == enough
        caption = " / ".join(path.name for path in photos[:compared])
        assert f"<figcaption>{caption}</figcaption>" in (tmp_path / "index.html").read_text()

    def test_frozen_features_and_seed(self, photo_folders: Path, tmp_path: Path) -> None:
        arguments = ("similarity", "explain", "--root", photo_folders, *TINY, *SIZE, "--count", "1")
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            assert call(*arguments, "--seed", seed, "--out", tmp_path / name) == 0
        pictures = [(tmp_path / name / "comparison-0000.png").read_bytes() for name in "abc"]
        assert pictures[0] == pictures[1] != pictures[2]
        assert "frozen features" in (tmp_path / "a" / "index.html").read_text()

    def test_bad_photos(self, photo_folders: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
        photo = photo_folders / "test" / "gull" / "0.png"
        arguments = ("similarity", "explain", *TINY, *SIZE, "--out", tmp_path / "why", "--form", "cosine", "--images")
        assert f"{tmp_path / 'no.png'}: no such file" in error_of(*arguments, photo, tmp_path / "no.png")
        (tmp_path / "bad.png").write_bytes(b"no photo")
        assert f"{tmp_path / 'bad.png'}: photo cannot be decoded" in error_of(*arguments, photo, tmp_path / "bad.png")
        assert "--form cosine compares 2 photos, --images names 1; add photos" in error_of(*arguments, photo)
        assert not (tmp_path / "why").exists()

    def test_too_few_classes(self, photo_folders: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
        arguments = ("similarity", "explain", "--root", photo_folders, *TINY, *SIZE, "--part", "held-out")
        message = error_of(*arguments, "--out", tmp_path / "why")
        assert f"{photo_folders.name} train (held out): comparisons need at least 3 classes" in message


@pytest.fixture(scope="module")
def network(photo_persons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("persons-run")
    arguments = ("similarity", "train", *PERSONS, "--root", photo_persons, "--out", out)
    assert call(*arguments, *TINY, *SIZE, *BATCH, *SHORT) == 0
    return out / NAME


class TestReidentification:
    def test_scores_equal_embeddings_by_hand(
        self, photo_persons: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ("similarity", "evaluate", *PERSONS, "--root", photo_persons, "--model", network)
        assert call(*arguments, "--ranks", "1", "2", "--faithfulness", "2", "--out", tmp_path) == 0
        data = open_reidentification("market1501", photo_persons)
        sides = []
        for side in (data.query, data.gallery):
            assert side.cameras is not None
            persons = torch.tensor([int(label) for label in side.labels])
            sides += [embedded(network, side), persons, torch.tensor(side.cameras)]
        expected = reidentification_scores(*sides, ranks=(1, 2))
        evaluation = read(tmp_path / "evaluation.json")
        scores = {"rank-1": expected.rank[1], "rank-2": expected.rank[2], "mAP": expected.mean_ap}
        for name, score in scores.items():
            assert evaluation["scores"][name] == pytest.approx(list(score))
        assert {"deletion", "insertion"} < evaluation["scores"].keys()
        assert (evaluation["queries"], evaluation["skipped"]) == (3, 1)
        printed = capsys.readouterr().out
        assert printed.startswith("market1501 query: ")
        assert rows_of(printed)["mAP"][0] == f"{expected.mean_ap[0]:.1f}"
        parts = read(tmp_path / "run.json")["data"]
        assert [parts[part]["photos"] for part in ("photos", "gallery")] == [4, 13]

    def test_held_out_persons_are_scored_as_retrieval(
        self, photo_persons: Path, network: Path, tmp_path: Path, error_of: Callable[..., str]
    ) -> None:
        arguments = ("similarity", "evaluate", *PERSONS, "--root", photo_persons, "--part", "held-out")
        assert "was trained on 1 of the classes to be scored" in error_of(*arguments, "--model", network)
        assert call(*arguments, *TINY, *SIZE, "--out", tmp_path) == 0
        evaluation = read(tmp_path / "evaluation.json")
        assert evaluation["queries"] == 3
        assert "MAP@R" in evaluation["scores"]

    def test_distractors_are_not_drawn_as_one_person(self, photo_persons: Path, tmp_path: Path) -> None:
        arguments = ("similarity", "explain", *PERSONS, "--root", photo_persons, *TINY, *SIZE, "--count", "12")
        assert call(*arguments, "--form", "cosine", "--out", tmp_path) == 0
        page = (tmp_path / "index.html").read_text()
        assert "<figcaption>0001 / 0001</figcaption>" in page
        assert "0000" not in page.replace("comparison-0000.png", "")

    @pytest.mark.parametrize(
        ("layout", "pattern", "suffix"),
        [("dukemtmc", "{person}_c{camera}_f{number:07d}", "jpg"), ("cuhk03-np", "{person}_c{camera}_{number}", "png")],
    )
    def test_other_layouts(self, tmp_path: Path, layout: str, pattern: str, suffix: str) -> None:
        shown = {
            "bounding_box_train": [("0001", 1), ("0001", 2)],
            "query": [("0002", 1), ("0003", 2)],
            "bounding_box_test": [("0002", 2), ("0003", 1), ("0004", 1)],
        }
        for folder, photos in shown.items():
            (tmp_path / folder).mkdir()
            for number, (person, camera) in enumerate(photos):
                name = pattern.format(person=person, camera=camera, number=number)
                pixels = np.random.default_rng([int(person), camera]).integers(0, 256, (64, 32, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / f"{name}.{suffix}")
        arguments = ("similarity", "evaluate", "--data", layout, "--root", tmp_path, *TINY, *SIZE, "--ranks", "3")
        assert call(*arguments, "--out", tmp_path / "e") == 0
        evaluation = read(tmp_path / "e" / "evaluation.json")
        assert evaluation["scores"]["rank-3"][0] == 100
        assert (evaluation["queries"], evaluation["skipped"]) == (2, 0)


@pytest.fixture(scope="module")
def fold1(shared_voc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Network trained on the base classes of fold 1: those of folds 0, 2 and 3."""
    out = tmp_path_factory.mktemp("fold1")
    arguments = ("similarity", "train", *VOC, shared_voc, "--fold", "1", "--out", out)
    assert call(*arguments, *TINY, *SIZE, *FEW) == 0
    return out / NAME


class FewPictures(SyntheticSource):
    """The command line's generated pictures, but few and small."""

    def __init__(self) -> None:
        super().__init__(base_classes=6, novel_classes=2, images_per_class=3, size=64)


@pytest.fixture
def _few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewshot_seg.runs.SyntheticSource", FewPictures)


ROWS = {
    *("soft margin", "prototype margin", "prototype similarity", "nearest foreground", "nearest background"),
    *(f"gradient attention: {kind}" for kind in ATTENTION_KINDS),
    *("gradient attention: margin, signed", "gradient attention: soft margin, element-wise", "PFENet", "nothing"),
}


class TestEpisodes:
    def evaluate(self, root: Path, out: Path, *more: object) -> int:
        arguments = ("similarity", "evaluate", *VOC, root, "--out", out, "--episodes", "6")
        return call(*arguments, *more)

    def test_writes_network_and_record(self, fold1: Path) -> None:
        record, notes = read(fold1.parent / "run.json"), load_similarity(fold1).notes
        assert record["verb"] == "similarity train"
        assert record["data"]["novel_classes"] == [6, 7, 8, 9, 10]
        assert record["protocol"]["name"] == "hsnet"
        assert set(record["data"]["fingerprint"]) == {"training", "evaluation"}
        assert record["results"]["steps"] == 3
        assert (notes["source"], notes["fold"]) == ("voc", 1)
        assert notes["base_classes"] == [*range(1, 6), *range(11, 21)]
        assert load_similarity(fold1).similarity.rank == 16

    @pytest.mark.parametrize("shots", [1, 2])
    def test_scores_are_those_of_every_map(
        self, shared_voc: Path, fold1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shots: int
    ) -> None:
        assert self.evaluate(shared_voc, tmp_path, "--model", fold1, "--shots", shots) == 0  # the fold is the model's
        loaded = load_similarity(fold1)
        data = open_fold(VocSource(shared_voc), loaded.backbone, get_protocol("hsnet"), fold=1, resolution=64)
        segmenter = training_free(loaded.backbone, similarity=loaded.similarity)
        expected = evaluate_priors(segmenter, evaluation_episodes(data, shots=shots, count=6), kinds=ATTENTION_KINDS)
        evaluation = read(tmp_path / "evaluation.json")
        assert evaluation["scores"].keys() == {f"{row}, {metric}" for row in ROWS for metric in ("AUC", "best IoU")}
        for name, score in expected.items():
            assert evaluation["scores"][f"{name}, AUC"] == pytest.approx([100 * value for value in score.auc])
            assert evaluation["scores"][f"{name}, best IoU"] == pytest.approx([100 * one for one in score.best_iou])
        printed = capsys.readouterr().out
        assert f"PASCAL-5i/32, fold 1, {shots}-shot: {fold1}" in printed
        assert rows_of(printed)["nothing, AUC"] == ["50.0", "50.0 - 50.0"]
        assert read(tmp_path / "run.json")["data"]["fold"] == 1

    def test_seed_draws_other_episodes(self, shared_voc: Path, tmp_path: Path) -> None:
        for name, seed in (("protocol", ()), ("same", ("--seed", "0")), ("other", ("--seed", "7"))):
            assert self.evaluate(shared_voc, tmp_path / name, *TINY, *SIZE, *seed) == 0
        scores = [read(tmp_path / name / "evaluation.json")["scores"] for name in ("protocol", "same", "other")]
        assert get_protocol("hsnet").seed == 0
        assert scores[0] == scores[1] != scores[2]

    def test_classes_to_be_scored_must_be_new(
        self, shared_voc: Path, fold1: Path, tmp_path: Path, error_of: Callable[..., str]
    ) -> None:
        arguments = (
            "similarity",
            "evaluate",
            *VOC,
            shared_voc,
            "--out",
            tmp_path / "e",
            "--episodes",
            4,
        )
        message = error_of(*arguments, "--model", fold1, "--fold", "2")
        assert f"{fold1} was trained on diningtable, dog, horse, motorbike, person, which fold 2 scores as" in message
        assert "use --fold 1" in message
        message = error_of(*arguments, "--model", fold1, "--part", "held-out")
        assert message == (
            f"{fold1} was trained on diningtable, dog, horse, motorbike, person, which are held out; "
            "train it with --held-out"
        )
        assert not (tmp_path / "e").exists()

    def test_held_out_classes(self, shared_voc: Path, tmp_path: Path) -> None:
        arguments = (
            "similarity",
            "train",
            *VOC,
            shared_voc,
            "--held-out",
            "--out",
            tmp_path / "run",
        )
        assert call(*arguments, *TINY, *SIZE, *FEW, "--fold", "0") == 0
        network = tmp_path / "run" / NAME
        loaded = load_similarity(network)
        assert loaded.notes["base_classes"] == list(range(11, 21))  # neither fold 0 nor fold 1
        assert self.evaluate(shared_voc, tmp_path / "e", "--model", network, "--part", "held-out", "--seed", "3") == 0
        data = open_fold(VocSource(shared_voc), loaded.backbone, get_protocol("hsnet"), fold=0, resolution=64)
        segmenter = training_free(loaded.backbone, similarity=loaded.similarity)
        expected = evaluate_priors(segmenter, held_out_episodes(data, shots=1, count=6, seed=3), kinds=())
        found = read(tmp_path / "e" / "evaluation.json")["scores"]["soft margin, AUC"]
        assert found == pytest.approx([100 * value for value in expected["soft margin"].auc])

    def test_one_episode_has_the_widest_interval(self, shared_voc: Path, tmp_path: Path) -> None:
        assert self.evaluate(shared_voc, tmp_path, *TINY, *SIZE, "--episodes", "1") == 0
        value, low, high = read(tmp_path / "evaluation.json")["scores"]["soft margin, AUC"]
        assert (low, high) == (0, 100)
        assert 0 <= value <= 100

    @pytest.mark.usefixtures("_few_pictures")
    def test_synthetic(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ("similarity", "train", "--data", "synthetic", *TINY, *SIZE, *FEW, "--out", tmp_path / "run")
        terms = ("--metric-weight", "1", "--constraint", "0.5", "--maps", "soft margin", "margin")
        assert call(*arguments, *terms) == 0
        network = tmp_path / "run" / NAME
        assert load_similarity(network).similarity.up.weight.any()
        assert load_similarity(network).notes["base_classes"] == [1, 2, 3, 4, 5, 6]
        data = ("similarity", "evaluate", "--data", "synthetic", "--model", network, "--episodes", "4")
        assert call(*data, "--out", tmp_path / "e") == 0
        assert "synthetic, 1-shot" in capsys.readouterr().out
        assert len(read(tmp_path / "e" / "evaluation.json")["scores"]) == 2 * len(ROWS)

    def test_resumed_ends_with_the_same_weights(
        self, shared_voc: Path, fold1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original, calls = fewshot_seg.similarity_training.episode_similarity_losses, 0

        def interrupted(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return original(*arguments, **named)

        arguments = ("similarity", "train", *VOC, shared_voc, "--fold", "1", "--out", tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(fewshot_seg.similarity_training, "episode_similarity_losses", interrupted)
            assert call(*arguments, *TINY, *SIZE, *FEW) == 130
        assert call(*arguments, *TINY, *SIZE, *FEW, "--resume") == 0
        assert same_weights(tmp_path / NAME, fold1)

    def test_explain_points_to_the_other_verb(self, shared_voc: Path, error_of: Callable[..., str]) -> None:
        message = error_of("similarity", "explain", *VOC, shared_voc)
        assert message == "--data voc: episodes are drawn by `fewshot-seg explain --similarity FILE`"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("untrained") / NAME
    backbone = build_backbone(TINY[1], weights="random")
    save_similarity(
        path, SimilarityNetwork(backbone.channels, rank=8), backbone, backbone_weights="random", resolution=64
    )
    return path


class TestPlugIn:
    """``--similarity FILE``: the network as the source of the prior."""

    def test_train_takes_it_as_it_is(self, shared_voc: Path, fold1: Path, tmp_path: Path) -> None:
        arguments = ("train", "--root", shared_voc, "--fold", "1", *TINY, *SIZE, *FEW, "--validation-episodes", "4")
        assert call(*arguments, "--similarity", fold1, "--out", tmp_path / "a") == 0
        model, network = load_file(tmp_path / "a" / "model.safetensors"), load_file(fold1)
        assert {name for name in model if name.startswith("similarity.")} == set(network)
        assert all(torch.equal(model[name], network[name]) for name in network)
        longer = (*arguments[:-4], "--steps", "4", "--batch-size", "2", "--no-select-threshold")
        assert call(*longer, "--similarity", fold1, "--out", tmp_path / "b") == 0
        other = load_file(tmp_path / "b" / "model.safetensors")
        assert any(not torch.equal(model[name], other[name]) for name in model if name.startswith("decoder."))
        scored = ("evaluate", "--root", shared_voc, "--model", tmp_path / "a" / "model.safetensors", "--count", "4")
        assert call(*scored, "--out", tmp_path / "e") == 0
        assert read(tmp_path / "e" / "evaluation.json")["fold"] == 1

    def test_evaluate(
        self, shared_voc: Path, fold1: Path, untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        scored = ("evaluate", "--root", shared_voc, "--fold", "1", "--count", "12", "--threshold", "0")
        for name, source in (
            ("free", (*TINY, *SIZE)),
            ("untrained", ("--similarity", untrained)),
            ("trained", ("--similarity", fold1)),
        ):
            assert call(*scored, *source, "--out", tmp_path / name) == 0
        free, same, other = (
            np.array([episode["iou"] for episode in read(tmp_path / name / "evaluation.json")["episodes"]])
            for name in ("free", "untrained", "trained")
        )
        np.testing.assert_allclose(same, free, atol=0.05)  # the untrained network is the identity up to rounding
        assert np.abs(other - free).max() > 0.5
        assert f"soft margin, similarity {fold1}" in capsys.readouterr().out

    def test_evaluate_takes_fold_and_size_of_the_file(self, shared_voc: Path, fold1: Path, tmp_path: Path) -> None:
        arguments = ("evaluate", "--root", shared_voc, "--similarity", fold1, "--count", "4", "--out", tmp_path)
        assert call(*arguments, "--prior-map", "prototype margin") == 0
        evaluation = read(tmp_path / "evaluation.json")
        assert (evaluation["fold"], evaluation["threshold_origin"]) == (1, "chosen on base classes")
        assert evaluation["method"] == f"prototype margin, similarity {fold1}"

    def test_a_network_of_labelled_photos_leaves_the_size_to_the_protocol(self, trained: Path, fold1: Path) -> None:
        for network, resolution in ((trained / "similarity.safetensors", None), (fold1, 64)):
            assert open_method(EvaluateConfig(data="synthetic", similarity=network)).resolution == resolution

    def test_explain(self, shared_voc: Path, fold1: Path, tmp_path: Path) -> None:
        arguments = ("explain", "--root", shared_voc, "--similarity", fold1, "--threshold", "0", "--count", "2")
        assert call(*arguments, "--out", tmp_path) == 0
        assert linked(tmp_path / "index.html") == ["episode-0000.png", "episode-0001.png"]

    def test_predict(self, shared_voc: Path, fold1: Path, tmp_path: Path) -> None:
        mask = tmp_path / "mask.png"
        labels = np.asarray(Image.open(shared_voc / "SegmentationClassAug" / "val_06_0.png"))
        Image.fromarray(np.where(labels == 6, 255, 0).astype(np.uint8)).save(mask)
        support, query = (
            f"{shared_voc / 'JPEGImages' / 'val_06_0.jpg'}:{mask}",
            shared_voc / "JPEGImages" / "val_06_2.jpg",
        )
        arguments = ("predict", "--support", support, "--query", query)
        assert call(*arguments, "--similarity", fold1, "--threshold", "0", "--out", tmp_path / "a") == 0
        assert call(*arguments, *TINY, "--size", "64", "--threshold", "0", "--out", tmp_path / "b") == 0
        assert call(*arguments, "--similarity", fold1, "--out", tmp_path / "c") == 0
        masks = [np.asarray(Image.open(tmp_path / name / "masks" / "val_06_2.png")) for name in "abc"]
        assert masks[0].any()
        assert not np.array_equal(masks[0], masks[1])
        method = read(tmp_path / "a" / "run.json")["results"]["method"]
        assert method == f"soft margin, similarity {fold1}"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (("--strides", "8", "16"), "at strides (16, 32), this run has mobilenetv3_small_050 at (8, 16)"),
            (
                ("--backbone", "mobilenetv3_small_075"),
                "over mobilenetv3_small_050 at strides (16, 32), this run has mobilenetv3_small_075",
            ),
        ],
    )
    def test_train_refuses_another_backbone(
        self,
        shared_voc: Path,
        fold1: Path,
        tmp_path: Path,
        error_of: Callable[..., str],
        changes: tuple[str, ...],
        message: str,
    ) -> None:
        arguments = ("train", "--root", shared_voc, "--fold", "1", *TINY, *SIZE, *FEW, "--similarity", fold1, *changes)
        found = error_of(*arguments, "--out", tmp_path / "run")
        assert message in found
        assert found.endswith("choose the same --backbone, weights and --strides")

    @pytest.mark.parametrize("verb", ["train", "evaluate", "explain"])
    def test_refuses_a_network_that_has_seen_the_novel_classes(
        self, shared_voc: Path, fold1: Path, tmp_path: Path, error_of: Callable[..., str], verb: str
    ) -> None:
        run = (*TINY, *SIZE, *FEW) if verb == "train" else ("--threshold", "0")
        message = error_of(
            verb, "--root", shared_voc, "--fold", "0", "--similarity", fold1, "--out", tmp_path / "r", *run
        )
        assert "was trained on aeroplane, bicycle, bird, boat, bottle, which fold 0 scores as novel" in message

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ("evaluate", "--data", "synthetic", "--model", "m", "--similarity", "s"),
                "--model and --similarity exclude each other: a model brings its own network; give one",
            ),
            (
                ("train", "--data", "synthetic", "--prior", "pfenet", "--similarity", "s"),
                "--similarity is the source of the prior 'similarity', but --prior is 'pfenet'",
            ),
            (("evaluate", "--data", "synthetic", "--similarity", "no-such-file"), "no model file at no-such-file"),
        ],
    )
    def test_what_does_not_go_together(
        self, error_of: Callable[..., str], arguments: tuple[str, ...], message: str
    ) -> None:
        assert message in error_of(*arguments)

    def test_a_network_is_no_model(self, shared_voc: Path, fold1: Path, error_of: Callable[..., str]) -> None:
        message = error_of("evaluate", "--root", shared_voc, "--model", fold1)
        assert message == f"{fold1} holds a similarity network alone, without a decoder; give it with --similarity"


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("similarity",), "the following arguments are required: VERB; see fewshot-seg similarity --help"),
            (("similarity", "train"), "--data folders needs --root DIR, the folder of the data set"),
            (("similarity", "evaluate", "--data", "coco"), "--data must be one of folders, cub, cars, sop,"),
            (("similarity", "train", "--stepz", "1"), "unrecognized arguments: --stepz 1; see fewshot-seg"),
            (("similarity", "evaluate", "--root", ".", "--ks", "0"), "--ks must be at least 1, got 0"),
            (
                ("similarity", "explain", "--images", "a.png", "b.png"),
                "--form margin compares 3 photos, --images names",
            ),
        ],
    )
    def test_wrong_flags(self, error_of: Callable[..., str], arguments: tuple[str, ...], message: str) -> None:
        assert message in error_of(*arguments)

    @pytest.mark.parametrize("data", ["folders", "cub", "cars", "sop", "market1501", "dukemtmc", "cuhk03-np", "voc"])
    @pytest.mark.parametrize("verb", ["train", "evaluate"])
    def test_no_such_layout(self, tmp_path: Path, error_of: Callable[..., str], verb: str, data: str) -> None:
        out = ("--out", tmp_path / "out")
        message = error_of("similarity", verb, "--data", data, "--root", tmp_path, *TINY, *out)
        assert f"{tmp_path}" in message
        assert "no such file or folder; the layout" in message or "expected a VOC2012 folder" in message
        assert not (tmp_path / "out").exists()

    def test_too_few_classes_for_a_batch(
        self, photo_folders: Path, tmp_path: Path, error_of: Callable[..., str]
    ) -> None:
        arguments = (
            "similarity",
            "train",
            "--root",
            photo_folders,
            *TINY,
            *SIZE,
            "--held-out",
            "--out",
            tmp_path / "r",
        )
        message = error_of(*arguments)
        name = f"{photo_folders.name} train (kept)"
        assert message == f"--classes 8 in a batch, but {name} has 4 classes; lower --classes"
        assert not (tmp_path / "r").exists()

    def test_a_class_on_both_sides(self, tmp_path: Path, error_of: Callable[..., str]) -> None:
        for split in ("train", "test"):
            (tmp_path / split / "gull").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / "gull" / "0.png")
        message = error_of("similarity", "evaluate", "--root", tmp_path, *TINY, *SIZE)
        assert "1 classes are in train and in test (gull)" in message

    def test_a_broken_photo(self, tmp_path: Path, error_of: Callable[..., str]) -> None:
        for split, name in (("train", "gull"), ("test", "hawk"), ("test", "ibis")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{number}.png")
        (tmp_path / "test" / "ibis" / "1.png").write_bytes(b"broken")
        message = error_of("similarity", "evaluate", "--root", tmp_path, *TINY, *SIZE, "--out", tmp_path / "e")
        assert "test/ibis/1.png: photo cannot be decoded" in message
        assert not (tmp_path / "e").exists()

    def test_nothing_to_find(self, tmp_path: Path, error_of: Callable[..., str]) -> None:
        for split, name in (("train", "gull"), ("test", "hawk"), ("test", "ibis")):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
        message = error_of("similarity", "evaluate", "--root", tmp_path, *TINY, *SIZE, "--out", tmp_path / "e")
        assert "none of the 2 queries can be found: at least one needs two photos of one class" in message

    def test_damaged_model(self, photo_folders: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
        network = tmp_path / NAME
        network.write_bytes(b"\x10\0\0\0\0\0\0\0 damaged")
        message = error_of("similarity", "evaluate", "--root", photo_folders, "--model", network)
        assert f"{network} is damaged or was not written by fewshot-seg" in message
        missing = error_of("similarity", "explain", "--root", photo_folders, "--model", tmp_path / "none")
        assert f"no model file at {tmp_path / 'none'}" in missing

    def test_loss_that_is_not_finite(self, photo_folders: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
        arguments = ("similarity", "train", "--root", photo_folders, *TINY, *SIZE, *BATCH, *SHORT, "--out", tmp_path)
        message = error_of(*arguments, "--learning-rate", "1e30")
        assert "loss is nan at step" in message
        assert "lower --learning-rate; photos: train/" in message
        assert not (tmp_path / NAME).exists()
