"""Every kind of data, protocol, support and list of episodes through ``evaluate`` and ``train``, in tiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from episodes.episode_files import read_episodes
from episodes.protocols import Fit
from episodes.sources import SyntheticSource
from episodes.types import SUPPORT_KINDS
from fewshot_seg.checkpoint import load_segmenter
from fewshot_seg.cli import main
from fewshot_seg.photos import read_photo
from fewshot_seg.prediction import PhotoPrediction, Predictor

TINY = ("--backbone", "mobilenetv3_small_050", "--backbone-weights", "random", "--resolution", "64")
SHORT = ("--steps", "2", "--batch-size", "2", "--validation-episodes", "4", "--training", "joint")
NAMES = ("ant", "bee", "cat")
SIZE = (96, 72)  # width, height


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSHOT_SEG_CACHE", str(tmp_path / "cache"))


class FewPictures(SyntheticSource):
    """The command line's generated pictures, but few and small."""

    def __init__(self) -> None:
        super().__init__(base_classes=6, novel_classes=2, images_per_class=4, size=64)


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail: exit code 2 and one line of error, which is returned."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(one) for one in arguments]) == 2
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("fewshot-seg: error: ")]
        assert len(errors) == 1
        assert "Traceback" not in printed.err
        return errors[0].removeprefix("fewshot-seg: error: ")

    return run


def call(*arguments: object) -> None:
    assert main([str(one) for one in arguments]) == 0


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def evaluate(out: Path, *more: object) -> Any:
    call("evaluate", *TINY, "--out", out, *more)
    return read(out / "evaluation.json")


def pictures() -> list[tuple[str, int, tuple[int, int, int, int], np.ndarray[Any, np.dtype[np.uint8]]]]:
    """(name, class, box x0 y0 x1 y1, photo): four of each class; the object is 56 x 50 = 2800 pixels."""
    found = []
    for class_id in range(1, len(NAMES) + 1):
        for k in range(4):
            photo = np.random.default_rng([class_id, k]).integers(0, 90, (SIZE[1], SIZE[0], 3)).astype(np.uint8)
            x, y = 4 + 5 * k, 3 + 4 * k
            photo[y : y + 50, x : x + 56] = (70 * class_id, 240 - 50 * class_id, 120)
            found.append((f"{NAMES[class_id - 1]}{k}", class_id, (x, y, x + 56, y + 50), photo))
    return found


def mask_of(box: tuple[int, int, int, int], value: int) -> Image.Image:
    labels = np.zeros(SIZE[::-1], np.uint8)
    labels[box[1] : box[3], box[0] : box[2]] = value
    return Image.fromarray(labels)


def write_folder(root: Path) -> list[object]:
    (root / "images").mkdir(parents=True)
    for name in NAMES:
        (root / "masks" / name).mkdir(parents=True)
    for name, class_id, box, photo in pictures():
        Image.fromarray(photo).save(root / "images" / f"{name}.jpg")
        mask_of(box, 255).save(root / "masks" / NAMES[class_id - 1] / f"{name}.png")
    return ["--data", "folder", "--root", root]


def write_fss(root: Path) -> list[object]:
    for number, (_, class_id, box, photo) in enumerate(pictures()):
        folder = root / NAMES[class_id - 1]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(folder / f"{number % 4 + 1}.jpg")
        mask_of(box, 255).convert("RGB").save(folder / f"{number % 4 + 1}.png")
    return ["--data", "fss", "--root", root]


def coco_content(suffix: str = ".jpg") -> dict[str, Any]:
    images, annotations = [], []
    for number, (name, class_id, (x, y, right, bottom), _) in enumerate(pictures(), 1):
        images.append({"id": number, "file_name": name + suffix, "width": SIZE[0], "height": SIZE[1]})
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": class_id,
                "segmentation": [[x, y, right, y, right, bottom, x, bottom]],
                "bbox": [x, y, right - x, bottom - y],
                "area": (right - x) * (bottom - y),
                "iscrowd": 0,
            }
        )
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root: Path) -> list[object]:
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        for name, _, _, photo in pictures():
            Image.fromarray(photo).save(root / split / f"{name}.jpg")
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco_content()))
    return ["--data", "coco", "--root", root]


def write_coco_json(root: Path) -> list[object]:
    (root / "photos").mkdir(parents=True)
    for name, _, _, photo in pictures():
        Image.fromarray(photo).save(root / "photos" / f"{name}.jpg")
    (root / "mine.json").write_text(json.dumps(coco_content()))
    return ["--data", "coco-json", "--root", root / "mine.json", "--images", root / "photos"]


def write_labelme(root: Path) -> list[object]:
    root.mkdir(parents=True)
    for name, class_id, (x, y, right, bottom), photo in pictures():
        Image.fromarray(photo).save(root / f"{name}.jpg")
        points = [[x, y], [right, y], [right, bottom], [x, bottom]]
        shape = {"label": NAMES[class_id - 1], "points": points, "shape_type": "polygon", "group_id": None, "flags": {}}
        head = {"version": "5.0.1", "flags": {}, "imagePath": f"{name}.jpg", "imageData": None}
        content = {**head, "imageWidth": SIZE[0], "imageHeight": SIZE[1], "shapes": [shape]}
        (root / f"{name}.json").write_text(json.dumps(content))
    return ["--data", "labelme", "--root", root]


def write_voc(root: Path) -> list[object]:
    """Classes 1, 2 (fold 0), 6 (fold 1) and 11 (fold 2), three of the pictures with large objects under each."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for split in ("trainaug", "val"):
        ids = []
        for position, class_id in enumerate((1, 2, 6, 11)):
            for k, (_, _, box, photo) in enumerate(pictures()[:4]):
                image_id = f"{split}_{class_id}_{k}"
                photo = np.roll(photo, position, axis=2)
                photo[0, 0] = (position, 0, 0) if split == "val" else (0, position, 0)  # no photo is in both splits
                Image.fromarray(photo).save(root / "JPEGImages" / f"{image_id}.jpg", quality=100)
                mask_of(box, class_id).save(root / "SegmentationClass" / f"{image_id}.png")
                ids.append(image_id)
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(ids))
    return ["--data", "voc", "--root", root]


OWN = {
    "folder": write_folder,
    "fss": write_fss,
    "coco": write_coco,
    "coco-json": write_coco_json,
    "labelme": write_labelme,
}


class TestEvaluate:
    @pytest.mark.parametrize("kind", OWN)
    def test_own_data_without_any_training(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
        data = OWN[kind](tmp_path / "data")
        scored = evaluate(tmp_path / "o", *data, "--count", "12")
        printed = capsys.readouterr().out
        assert "usual for the soft margin" in printed
        assert f"mIoU {scored['miou'][0]:5.1f}".split() in [line.split()[:2] for line in printed.splitlines()]
        assert set(scored["per_class"]) == set(NAMES)
        assert scored["miou"][0] == pytest.approx(np.mean(list(scored["per_class"].values())))
        assert (scored["threshold"], scored["fold"], scored["left_out"]) == (0.5, None, [])
        assert scored["protocol"] == "custom"
        assert scored["benchmark"] == f"{kind}/12"

    def test_all_kinds_say_the_same_about_the_same_pictures(self, tmp_path: Path) -> None:
        found = {
            kind: evaluate(tmp_path / kind / "o", *write(tmp_path / kind / "data"), "--count", "12", "--threshold", "0")
            for kind, write in OWN.items()
            if kind in ("folder", "coco-json")
        }
        assert found["folder"]["miou"] == pytest.approx(found["coco-json"]["miou"])

    def test_synthetic(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fewshot_seg.runs.SyntheticSource", FewPictures)
        scored = evaluate(tmp_path, "--data", "synthetic", "--count", "4")
        assert scored["protocol"] == "hsnet (synthetic)"
        assert scored["threshold_origin"] == "chosen on base classes"

    @pytest.mark.parametrize(
        ("protocol", "repeats"), [("hsnet", 1), ("pfenet", 1), ("bam", 5), ("repri", 5), ("custom", 1)]
    )
    def test_protocols(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str, repeats: int) -> None:
        data = write_voc(tmp_path / "voc")
        scored = evaluate(tmp_path / "o", *data, "--protocol", protocol, "--count", "4", "--shot-rule", "protocol")
        assert len(scored["episodes"]) == 4 * repeats
        assert repeats == 1 or len(scored["repeats"]) == repeats
        assert scored["left_out"] == ["bird", "boat", "bottle"]
        printed = capsys.readouterr().out
        assert "left out, with too few images for 1 shot(s): bird, boat, bottle" in printed
        assert ("FB-IoU" in printed) == (protocol != "repri")
        record = read(tmp_path / "o" / "run.json")
        assert record["protocol"]["name"] == protocol
        assert all(len(digest) == 64 for digest in record["data"]["lists"].values())
        assert scored["shot_rule"] == record["protocol"]["shot_rule"]

    def test_protocol_file(self, tmp_path: Path, error_of: Callable[..., str]) -> None:
        data, rules = write_voc(tmp_path / "voc"), tmp_path / "mine.toml"
        rules.write_text('name = "mine"\nepisodes = 3\nfit = "pad"\nrepeats = 2\n')
        scored = evaluate(tmp_path / "o", *data, "--protocol-file", rules)
        assert (scored["protocol"], len(scored["episodes"])) == ("mine", 6)
        rules.write_text("episodez = 3\n")
        assert "has no field 'episodez'" in error_of("evaluate", *TINY, *data, "--protocol-file", rules)

    def test_protocol_file_that_takes_a_published_name(self, tmp_path: Path, error_of: Callable[..., str]) -> None:
        data, out = write_folder(tmp_path / "d"), tmp_path / "o"
        for name, content in (("hsnet", "episodes = 3"), ("mine", 'name = "bam"\nepisodes = 3')):
            rules = tmp_path / f"{name}.toml"
            rules.write_text(content)
            called = "hsnet" if name == "hsnet" else "bam"
            for verb in ("evaluate", "explain"):
                assert error_of(verb, *TINY, *data, "--protocol-file", rules, "--out", out) == (
                    f"{rules} calls itself {called!r}, which is a published protocol; give it another name, in the "
                    "file or of the file"
                )
        rules.write_text('name = "custom"\nepisodes = 3')  # which is nobody's
        assert evaluate(out, *data, "--protocol-file", rules)["protocol"] == "custom"

    @pytest.mark.parametrize("support", SUPPORT_KINDS[1:])
    def test_supports(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], support: str) -> None:
        scored = evaluate(tmp_path / "o", *write_folder(tmp_path / "d"), "--support", support, "--count", "4")
        assert scored["support"] == support
        assert f"supports marked by {support}" in capsys.readouterr().out

    @pytest.mark.parametrize("rule", ["vote", "mean", "reweighted", "protocol"])
    def test_shot_rules(self, tmp_path: Path, rule: str) -> None:
        data = write_folder(tmp_path / "d")
        scored = evaluate(tmp_path / "o", *data, "--shots", "2", "--shot-rule", rule, "--count", "4")
        assert scored["shot_rule"] == ("pooled" if rule == "protocol" else rule)
        assert all(len(episode["support_ids"]) == 2 for episode in scored["episodes"])

    @pytest.mark.parametrize("shots", [1, 2])
    def test_several_ways(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], shots: int) -> None:
        data = write_folder(tmp_path / "d")
        scored = evaluate(tmp_path / "o", *data, "--ways", "2", "--shots", shots, "--count", "4")
        assert (scored["ways"], len(scored["episodes"])) == (2, 8)
        assert f"2-way {shots}-shot" in capsys.readouterr().out

    def test_novel_classes_and_those_left_out(self, tmp_path: Path, error_of: Callable[..., str]) -> None:
        data = write_folder(tmp_path / "d")
        for k in (1, 2, 3):
            (tmp_path / "d" / "masks" / "bee" / f"bee{k}.png").unlink()
        scored = evaluate(tmp_path / "o", *data, "--novel-classes", "bee", "cat", "--count", "4")
        assert list(scored["per_class"]) == ["cat"]
        assert scored["left_out"] == ["bee"]
        message = error_of("evaluate", *TINY, *data, "--novel-classes", "cow", "--out", tmp_path / "p")
        assert message == "--novel-classes: folder has no class cow; it has: ant, bee, cat"
        assert not (tmp_path / "p").exists()


class TestReplay:
    def test_same_episodes_same_scores(self, tmp_path: Path) -> None:
        data, file = write_folder(tmp_path / "d"), tmp_path / "e.json"
        how = ("--shots", "2", "--ways", "2", "--count", "4", "--seed", "3")
        call("data", "episodes", *data, *how, "--out", file)
        drawn, replayed = evaluate(tmp_path / "a", *data, *how), evaluate(tmp_path / "b", *data, "--episodes", file)
        same = ("miou", "fb_iou", "per_class", "episodes", "episodes_fingerprint", "shots", "ways", "protocol")
        assert {name: drawn[name] for name in same} == {name: replayed[name] for name in same}
        assert replayed["episodes_fingerprint"] == read(file)["episodes_fingerprint"]
        assert (drawn["episodes_file"], replayed["episodes_file"]) == (None, str(file))

    def test_runs_of_a_protocol_are_kept_apart(self, tmp_path: Path) -> None:
        data, file = write_voc(tmp_path / "d"), tmp_path / "e.json"
        call("data", "episodes", *data, "--protocol", "bam", "--fold", "0", "--count", "3", "--out", file)
        drawn = evaluate(tmp_path / "a", *data, "--protocol", "bam", "--count", "3")
        replayed = evaluate(tmp_path / "b", *data, "--episodes", file)
        assert replayed["protocol"] == "bam"
        assert len(replayed["repeats"]) == 5
        assert replayed["repeats"] == drawn["repeats"]

    def test_what_does_not_fit(self, tmp_path: Path, error_of: Callable[..., str]) -> None:
        data, own, file = write_voc(tmp_path / "d"), write_folder(tmp_path / "own"), tmp_path / "e.json"
        call("data", "episodes", *data, "--protocol", "bam", "--fold", "0", "--count", "2", "--out", file)
        out = ("--out", tmp_path / "o")
        replay = ("evaluate", *TINY, *data, "--episodes", file, *out)
        assert error_of(*replay, "--fold", "1") == f"{file} is of fold 0, but --fold is 1; leave --fold out"
        message = f"{file} is of protocol bam, but --protocol is hsnet; leave --protocol out"
        assert error_of(*replay, "--protocol", "hsnet") == message
        message = error_of("evaluate", *TINY, *own, "--episodes", file, *out)
        assert "folder (split 'all') lacks images of the episodes: 'val_1_0'" in message
        assert "brings its own --count" in error_of(*replay, "--count", "2")
        message = error_of("evaluate", *TINY, *data, "--episodes", "100", *out)
        assert message == "--episodes 100: no such file; the number of episodes is --count"
        file.write_text(file.read_text().replace('"seed": ', '"seed": 1', 1))
        assert "they were changed after writing" in error_of(*replay)
        file.write_text("{")
        assert "expected JSON" in error_of(*replay)
        assert not (tmp_path / "o").exists()

    def test_fold_is_the_files_under_a_protocol_of_ones_own(self, tmp_path: Path, error_of: Callable[..., str]) -> None:
        data, file, rules = write_voc(tmp_path / "d"), tmp_path / "e.json", tmp_path / "mine.toml"
        rules.write_text("episodes = 3\n")
        drawn = ("--protocol-file", rules, "--fold", "1", "--out", file)
        call("data", "episodes", *data, *drawn)
        replay = (*data, "--episodes", file, "--protocol-file", rules)
        scored = evaluate(tmp_path / "o", *replay)
        assert (scored["protocol"], scored["fold"], list(scored["per_class"])) == ("mine", 1, ["bus"])
        assert read(tmp_path / "o" / "run.json")["data"]["novel_classes"] == [6, 7, 8, 9, 10]
        message = error_of("evaluate", *TINY, *replay, "--fold", "2", "--out", tmp_path / "p")
        assert message == f"{file} is of fold 1, but --fold is 2; leave --fold out"

    def test_a_protocol_of_ones_own_must_be_named_again(self, tmp_path: Path, error_of: Callable[..., str]) -> None:
        data, file, rules = write_folder(tmp_path / "d"), tmp_path / "e.json", tmp_path / "mine.toml"
        rules.write_text('name = "mine"\nfit = "pad"\n')
        call("data", "episodes", *data, "--protocol-file", rules, "--count", "2", "--out", file)
        message = error_of("evaluate", *TINY, *data, "--episodes", file, "--out", tmp_path / "o")
        assert (
            "is of protocol 'mine', which has no rules here for size and scoring; give its --protocol-file" in message
        )
        assert evaluate(tmp_path / "o", *data, "--episodes", file, "--protocol-file", rules)["protocol"] == "mine"
        assert evaluate(tmp_path / "o", *data, "--episodes", file, "--protocol", "custom")["protocol"] == "custom"


class TestExplain:
    def test_numbers_end_with_the_runs_of_a_protocol(self, tmp_path: Path, error_of: Callable[..., str]) -> None:
        data, out = write_voc(tmp_path / "d"), tmp_path / "why"
        explain = ("explain", *TINY, *data, "--threshold", "0", "--protocol", "bam", "--out", out)
        message = error_of(*explain, "--numbers", "0", "5000")
        assert message == "--numbers 5000: the episodes of bam are 0 to 4999"
        message = error_of(*explain, "--count", "5001")
        assert message == "--count 5001: the episodes of bam are 0 to 4999"
        assert not out.exists()
        call(*explain, "--numbers", "4999")
        assert [path.name for path in out.glob("*.png")] == ["episode-4999.png"]

    def test_numbers_go_on_where_there_is_one_run(self, tmp_path: Path) -> None:
        data, out, file = write_voc(tmp_path / "d"), tmp_path / "why", tmp_path / "e.json"
        call("explain", *TINY, *data, "--threshold", "0", "--numbers", "1003", "--out", out)
        call("data", "episodes", *data, "--fold", "0", "--count", "1004", "--out", file)
        spec = read_episodes(file).specs[1003]
        assert [path.name for path in out.glob("*.png")] == ["episode-1003.png"]
        shown = f"find it in {spec.query_id}, as shown in {spec.support_ids[0]}"
        assert shown in (out / "index.html").read_text()


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path]:
    """VOC in tiny, and a model that was trained on it by RePRI's protocol, which pads."""
    folder = tmp_path_factory.mktemp("padded")
    data = write_voc(folder / "voc")
    flags = ("--protocol", "repri", "--no-select-threshold", "--cache", folder / "cache")
    call("train", *TINY, *SHORT, *data, *flags, "--out", folder / "run")
    return data, folder / "run" / "model.safetensors"


class TestModelOfAProtocol:
    def test_it_is_scored_by_its_own(self, padded: tuple[list[object], Path], tmp_path: Path) -> None:
        data, model = padded
        score = ("evaluate", *data, "--model", model, "--count", "4")
        call(*score, "--out", tmp_path / "own")
        call(*score, "--protocol", "repri", "--out", tmp_path / "named")
        own, named = (read(tmp_path / name / "evaluation.json") for name in ("own", "named"))
        assert (own["protocol"], len(own["repeats"]), len(own["episodes"])) == ("repri", 5, 20)
        assert (own["miou"], own["episodes"]) == (named["miou"], named["episodes"])
        record = read(tmp_path / "own" / "run.json")
        assert (record["protocol"]["name"], record["protocol"]["fit"]) == ("repri", "pad")
        assert record["configuration"]["protocol"] is None  # as it was given
        call("explain", *data, "--model", model, "--count", "1", "--out", tmp_path / "why")
        record = read(tmp_path / "why" / "run.json")
        assert (record["protocol"]["name"], record["protocol"]["fit"]) == ("repri", "pad")

    @pytest.mark.parametrize("verb", ["evaluate", "explain"])
    def test_it_is_not_scored_by_photos_made_square_otherwise(
        self, padded: tuple[list[object], Path], tmp_path: Path, error_of: Callable[..., str], verb: str
    ) -> None:
        data, model = padded
        ask, rules = (verb, *data, "--model", model, "--out", tmp_path / "o"), tmp_path / "mine.toml"
        expected = (
            f"{model} was trained on photos made square by 'pad', protocol hsnet does it by 'squash'; give --protocol "
            "or --protocol-file as in its training"
        )
        assert error_of(*ask, "--protocol", "hsnet") == expected
        rules.write_text("episodes = 2\n")
        assert error_of(*ask, "--protocol-file", rules) == expected.replace("hsnet", "mine")
        assert not (tmp_path / "o").exists()
        rules.write_text('episodes = 2\nfit = "pad"\n')
        call(*ask, "--protocol-file", rules, *(("--count", "2") if verb == "explain" else ()))

    def test_it_predicts_padded(self, padded: tuple[list[object], Path], tmp_path: Path) -> None:
        data, model = padded
        photos = Path(str(data[3])) / "JPEGImages"
        shown, query = photos / "val_1_0.jpg", photos / "val_1_3.jpg"
        mask = mask_of((4, 3, 60, 53), 1)
        mask.save(tmp_path / "mask.png")

        def predicted(fit: Fit, threshold: float) -> PhotoPrediction:
            segmenter = load_segmenter(model).segmenter
            segmenter.threshold = threshold
            predictor = Predictor(segmenter, 64, fit)
            predictor.remember([read_photo(shown)], [np.asarray(mask)])
            return predictor.predict(read_photo(query))

        sure = predicted("pad", 0.0).confidence.astype(np.float64)
        threshold = float(np.median(np.log(sure / (1 - sure))))  # half of the photo is above it
        expected, otherwise = predicted("pad", threshold).mask, predicted("squash", threshold).mask
        assert not np.array_equal(expected, otherwise)
        support = f"{shown}:{tmp_path / 'mask.png'}"
        flags = ("--threshold", str(threshold), "--out", tmp_path / "found")
        call("predict", "--model", model, "--support", support, "--query", query, *flags)
        with Image.open(tmp_path / "found" / "masks" / "val_1_3.png") as written:
            assert np.array_equal(np.asarray(written), expected)


class TestTrain:
    def test_mixed_supports_then_labels_alone(self, tmp_path: Path) -> None:
        data, run = write_voc(tmp_path / "d"), tmp_path / "run"
        call("train", *TINY, *SHORT, *data, "--supports", "mask", "box", "label", "--out", run)
        scored = tmp_path / "o"
        call(
            "evaluate",
            *data,
            "--model",
            run / "model.safetensors",
            "--support",
            "label",
            "--count",
            "4",
            "--out",
            scored,
        )
        assert read(scored / "evaluation.json")["support"] == "label"
        assert read(run / "run.json")["data"]["held_out_classes"] == [6, 7, 8, 9, 10]

    def test_own_folder(self, tmp_path: Path, error_of: Callable[..., str]) -> None:
        data, run = write_folder(tmp_path / "d"), tmp_path / "run"
        train = ("train", *TINY, *SHORT, *data, "--out", run)
        message = (
            "there is nothing to train on: all classes of folder are to be scored; name those with --novel-classes"
        )
        for more in ([], ["--no-select-threshold"]):
            assert error_of(*train, *more).startswith(message)
        for more in ([], ["--no-select-threshold"]):
            cross_fit = (*train, "--training", "cross-fit", "--novel-classes", "ant", "bee")
            assert error_of(*cross_fit, *more) == (
                "cross-fitting needs base classes in at least two groups, folder has 1 (cat) in one; name fewer "
                "--novel-classes, or train with --training joint --no-select-threshold"
            )
        assert "too few base classes" in error_of(*train, "--novel-classes", "ant", "bee")
        assert not run.exists()
        call(*train, "--novel-classes", "cat")
        model = ("--model", run / "model.safetensors")
        out = ("--count", "4", "--out", tmp_path / "o")
        message = error_of("evaluate", *data, *model, *out)
        assert "was trained on ant, bee, to be scored here; name the classes that it has not seen with" in message
        call("evaluate", *data, *model, *out, "--novel-classes", "cat")
        assert read(tmp_path / "o" / "evaluation.json")["threshold_origin"] == "of the model"

    def test_own_folder_by_cross_fitting(self, tmp_path: Path) -> None:
        """Two base classes of four photos: two groups, and no 5-shot episodes."""
        data, run = write_folder(tmp_path / "d"), tmp_path / "run"
        short = ("--steps", "1", "--batch-size", "2", "--decoder-steps", "2", "--decoder-episodes", "3")
        call("train", *TINY, *short, *data, "--novel-classes", "cat", "--out", run)
        segmenter = load_segmenter(run / "model.safetensors").segmenter
        assert segmenter.base_learner is not None
        assert segmenter.base_learner.classes == 2
        call(
            "evaluate",
            *data,
            "--model",
            run / "model.safetensors",
            "--novel-classes",
            "cat",
            "--count",
            "4",
            "--out",
            tmp_path / "o",
        )
        assert set(read(tmp_path / "o" / "evaluation.json")["per_class"]) == {"cat"}

    def test_classes_of_another_folder_go_by_name(self, tmp_path: Path) -> None:
        call("train", *TINY, *SHORT, *write_folder(tmp_path / "a"), "--novel-classes", "cat", "--out", tmp_path / "run")
        data = write_folder(tmp_path / "b")
        for name, other in zip(NAMES, ("yak", "zebu", "zorse"), strict=True):  # the same numbers, other things
            (tmp_path / "b" / "masks" / name).rename(tmp_path / "b" / "masks" / other)
        model = tmp_path / "run" / "model.safetensors"
        call("evaluate", *data, "--model", model, "--count", "12", "--out", tmp_path / "o")
        assert set(read(tmp_path / "o" / "evaluation.json")["per_class"]) == {"yak", "zebu", "zorse"}

    @pytest.mark.parametrize(
        "augment",
        [("none",), ("standard",), ("flip", "none"), ("mirror", "strong"), ("pfenet",), ("colour",)],
    )
    def test_augmentation(self, tmp_path: Path, augment: tuple[str, ...]) -> None:
        flags = ("--augment", augment[0], *(("--support-augment", augment[1]) if len(augment) > 1 else ()))
        data = (*write_coco(tmp_path / "d"), "--novel-classes", "cat", "--no-select-threshold")
        call("train", *TINY, *SHORT, *data, *flags, "--out", tmp_path / "run")
        assert (tmp_path / "run" / "model.safetensors").exists()
