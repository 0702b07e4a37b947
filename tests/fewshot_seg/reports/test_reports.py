"""What the report says, against made-up runs whose faults are known."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from episodes.types import DataError
from fewshot_seg.findings import Finding
from fewshot_seg.metrics import EpisodeIoU
from fewshot_seg.reports.comparison import differing_settings, paired_difference, run_names
from fewshot_seg.reports.diagnosis import diagnose, episode_fault, pooled_interval
from fewshot_seg.reports.page import write_report
from fewshot_seg.reports.run_folders import read_run

MakeRun = Callable[..., Path]


class TestDiagnosis:
    def test_names_the_fault_of_every_class(self, tmp_path: Path, make_run: MakeRun) -> None:
        found = diagnose(read_run(make_run(tmp_path / "run")))
        assert [one.name for one in found] == ["cat", "dog", "person"]
        assert [one.fault for one in found] == [
            "misses parts; threshold too high for many photos",
            "marks person, too",
            "works",
        ]
        cat, dog, person = found
        assert cat.missed == pytest.approx(80, abs=1)
        assert any("mainly misses the object: 80 %" in reason for reason in cat.reasons)
        assert any("Much of it is the threshold" in reason for reason in cat.reasons)
        assert dog.wrong == pytest.approx(100 / 1.9, abs=1)
        assert dog.confusions[0][0] == "person"
        assert dog.confusions[0][1] == pytest.approx(50, abs=1)
        assert any("50 % lies on person, and 50 % on no labelled class" in reason for reason in dog.reasons)
        assert any("hardly ever on another labelled class" in reason for reason in person.reasons)
        for one in found:
            assert one.parts is not None
            assert one.low is not None
            assert one.high is not None
            assert sum(one.parts) == pytest.approx(100)
            assert one.parts[0] == pytest.approx(one.iou, abs=0.1)  # right share of the union is the IoU
            assert one.low <= one.iou <= one.high
            assert sum(count for count, _ in one.by_size) == one.episodes == 10

    def test_interval_is_that_of_the_metric(self) -> None:
        """A single class: mIoU's own bootstrap, of the same counts."""
        import torch

        random, metric, findings = np.random.default_rng(5), EpisodeIoU(), []
        for _ in range(40):
            found, target = (torch.from_numpy(random.integers(0, 2, (1, 6, 6)).astype(np.uint8)) for _ in range(2))
            metric.update(found, target, [1])
            both = int((found & target).sum())
            findings.append(
                Finding(
                    scored=36, target=int(target.sum()), found=int(found.sum()), both=both, best_iou=None, on_others={}
                )
            )
        result = metric.compute(resamples=1000)
        assert pooled_interval(findings) == pytest.approx((result.miou_low, result.miou_high), abs=1.0)

    def test_overlapping_labels_leave_a_true_rest(self, tmp_path: Path, make_run: MakeRun) -> None:
        """All that is marked wrongly lies on a person, and nine tenths of it on a cat, too."""
        folder = make_run(tmp_path / "run")
        stored = json.loads((folder / "evaluation.json").read_text())
        for episode in stored["episodes"]:
            finding = episode["finding"]
            wrong = finding["found"] - finding["both"]
            if episode["class_id"] == 2:
                finding |= {"on_others": {"3": wrong, "1": wrong * 9 // 10}, "on_any_other": wrong}

        def reasons() -> str:
            (folder / "evaluation.json").write_text(json.dumps(stored))
            run = read_run(folder)
            write_report(tmp_path / "page.html", [run])
            return " ".join(next(one.reasons for one in diagnose(run) if one.name == "dog"))

        told = "100 % lies on person, 90 % on cat, and 0 % on no labelled class"
        assert told in reasons()
        for episode in stored["episodes"]:
            episode["finding"]["on_any_other"] = episode["finding"]["on_any_other"] // 2
        assert told.replace("0 % on no", "50 % on no") in reasons()
        for episode in stored["episodes"]:
            del episode["finding"]["on_any_other"]  # of an earlier version
        assert told in reasons()

    def test_without_findings_only_the_scores_are_told(self, tmp_path: Path, make_run: MakeRun) -> None:
        folder = make_run(tmp_path / "run")
        stored = json.loads((folder / "evaluation.json").read_text())
        for episode in stored["episodes"]:
            del episode["finding"]
        (folder / "evaluation.json").write_text(json.dumps(stored))
        run = read_run(folder)
        assert all(one.parts is None and one.fault == "" and one.iou > 0 for one in diagnose(run))
        assert episode_fault(run.episodes[0], run) == ("unknown", "")
        write_report(tmp_path / "page.html", [run])
        assert "Evaluated by an earlier version" in (tmp_path / "page.html").read_text()

    def test_episode_in_one_sentence(self, tmp_path: Path, make_run: MakeRun) -> None:
        run = read_run(make_run(tmp_path / "run"))
        keys = [episode_fault(episode, run)[0] for episode in run.episodes[:3]]
        assert keys == ["missed", "confused", "good"]
        assert "(50 % of that on person)" in episode_fault(run.episodes[1], run)[1]


class TestComparison:
    def test_difference_is_paired(self, tmp_path: Path, make_run: MakeRun) -> None:
        first, second = (read_run(make_run(tmp_path / str(n), noise=n / 10)) for n in range(2))
        difference = paired_difference(second, first)
        assert difference is not None
        expected = np.mean(list(second.results["per_class"].values())) - np.mean(
            list(first.results["per_class"].values())
        )
        assert difference.value == pytest.approx(expected)
        assert expected == pytest.approx(second.results["miou"][0] - first.results["miou"][0])
        assert difference.low < difference.value < difference.high < 0
        same = paired_difference(first, first)
        assert same is not None
        assert (same.value, same.low, same.high) == (0, 0, 0)

    def test_other_episodes_have_no_difference(self, tmp_path: Path, make_run: MakeRun) -> None:
        first, second = (read_run(make_run(tmp_path / str(n), seed=n)) for n in range(2))
        assert paired_difference(second, first) is None

    def test_names_and_settings(self, tmp_path: Path, make_run: MakeRun) -> None:
        runs = [read_run(make_run(tmp_path / name)) for name in ("a/run", "b/run")]
        assert run_names(runs) == ["a/run", "b/run"]
        assert run_names(runs[:1]) == ["run"]
        assert differing_settings(runs) == []  # the folder is no setting of the method
        runs[1].record["configuration"]["threshold"] = None
        assert differing_settings(runs) == [("threshold", ["0.25", "-"])]


class TestPage:
    def test_stays_below_5_mb_with_the_most_telling_pictures(self, tmp_path: Path, make_run: MakeRun) -> None:
        run = read_run(make_run(tmp_path / "run", episodes=1000, drawn=60, picture_side=160))
        assert sum(path.stat().st_size for path in (tmp_path / "run" / "gallery").iterdir()) > 4_000_000
        write_report(tmp_path / "page.html", [run])
        page = tmp_path / "page.html"
        assert page.stat().st_size < 5_000_000
        shown = {int(number) for number in re.findall(r'data-number="(\d+)"', page.read_text())}
        assert shown == set(run.drawn[: len(shown)])  # first drawn, first kept
        assert 10 < len(shown) < 60
        assert f"{60 - len(shown)} more are in the run folder" in page.read_text()

    def test_everything_is_escaped_and_nothing_is_fetched(self, tmp_path: Path, make_run: MakeRun) -> None:
        hostile = "<img src=x onerror=alert(1)>\"'"
        folder = make_run(tmp_path / "run", names=(hostile, "</script><script>alert(2)</script>", "c"), drawn=3)
        write_report(tmp_path / "page.html", [read_run(folder)])
        text = (tmp_path / "page.html").read_text()
        assert "<img src=x" not in text
        assert text.count("<script>") == text.count("</script>") == 1
        assert not re.search(r'(src|href)="(?!data:|#)', text)
        assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text

    def test_best_median_and_worst_are_told_by_score(self, tmp_path: Path, make_run: MakeRun) -> None:
        folder = make_run(tmp_path / "run", drawn=6)
        run = read_run(folder)
        ordered = sorted(run.episodes, key=lambda one: one.iou)
        expected = {"Worst": ordered[0], "Median": ordered[15], "Best": ordered[-1]}

        def told() -> dict[str, str]:
            write_report(tmp_path / "page.html", [read_run(folder)])
            text = (tmp_path / "page.html").read_text()
            cards = text[text.index("Best, median and worst") :].split('<div class="card">')[1:]
            found = [re.search(r"(Worst|Best|Median): .*?(q\d+)", card, re.DOTALL) for card in cards]
            return {one[1]: one[2] for one in found if one is not None}

        assert told() == {role: one.query_id for role, one in expected.items()}
        for picture in (folder / "gallery").glob(f"episode-{expected['Worst'].number:05d}-*.webp"):
            picture.unlink()
        del expected["Worst"]
        assert told() == {role: one.query_id for role, one in expected.items()}

    def test_facts_of_the_run(self, tmp_path: Path, make_run: MakeRun) -> None:
        write_report(tmp_path / "page.html", [read_run(make_run(tmp_path / "run"))])
        text = (tmp_path / "page.html").read_text()
        facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
        assert facts["Protocol"] == "hsnet"
        assert facts["Fingerprint of the evaluation data"] == "bbbb"
        assert facts["Seed of the episodes"] == "7 (the protocol&#39;s)"
        assert facts["Commit"] == "c0ffee"
        assert facts["Versions"] == "fewshot-seg 0.1.0"

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="at least one run"):
            write_report(tmp_path / "page.html", [])


class TestReading:
    @pytest.mark.parametrize(
        ("file", "damage", "message"),
        [
            ("run.json", "{", "is not valid JSON"),
            ("evaluation.json", "[]", "no run that can be reported"),
            ("evaluation.json", '{"scores": {}}', "similarity evaluate"),
            ("run.json", "{}", "no run that can be reported"),
            ("gallery/gallery.json", "{}", "no run that can be reported"),
            ("gallery/episode-*-0.webp", "no picture", "is no picture that can be read"),
        ],
    )
    def test_damage_is_one_line(self, tmp_path: Path, make_run: MakeRun, file: str, damage: str, message: str) -> None:
        folder = make_run(tmp_path / "run", drawn=1)
        next(folder.glob(file)).write_text(damage)
        with pytest.raises(DataError, match=message) as raised:
            write_report(tmp_path / "page.html", [read_run(folder)])
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "page.html").exists()

    def test_a_score_outside_its_interval(self, tmp_path: Path, make_run: MakeRun) -> None:
        """Many classes, few episodes: resamples miss most classes, and the percentiles may leave the value out."""
        runs = [
            read_run(make_run(tmp_path / name, miou=[80.0, 85.0, 88.0], fb_iou=[90.0, 60.0, 70.0])) for name in "ab"
        ]
        write_report(tmp_path / "page.html", runs)
        assert "[85.0, 88.0]" in (tmp_path / "page.html").read_text()

    @pytest.mark.parametrize("miou", [[float("nan"), 1.0, 2.0], [1.0, 0.0, float("inf")], [1.0, 2.0]])
    def test_a_score_that_is_none(self, tmp_path: Path, make_run: MakeRun, miou: list[float]) -> None:
        with pytest.raises(DataError, match="no run that can be reported"):
            read_run(make_run(tmp_path / "run", miou=miou))

    def test_two_evaluations_are_not_one(self, tmp_path: Path, make_run: MakeRun) -> None:
        """As a kill between the two files leaves them."""
        make_run(tmp_path / "a", seed=1)
        earlier = (tmp_path / "a" / "run.json").read_text()
        make_run(tmp_path / "a", seed=2)
        (tmp_path / "a" / "run.json").write_text(earlier)
        with pytest.raises(DataError, match=r"run\.json and evaluation\.json are of different runs, .*evaluate again"):
            read_run(tmp_path / "a")

    def test_pictures_of_other_episodes_are_not_taken(self, tmp_path: Path, make_run: MakeRun) -> None:
        folder = make_run(tmp_path / "run", drawn=2)
        index: dict[str, Any] = json.loads((folder / "gallery" / "gallery.json").read_text())
        (folder / "gallery" / "gallery.json").write_text(json.dumps(index | {"episodes_fingerprint": "other"}))
        assert read_run(folder).drawn == ()

    def test_pictures_from_elsewhere_are_not_taken(self, tmp_path: Path, make_run: MakeRun) -> None:
        folder = make_run(tmp_path / "run", drawn=1)
        (tmp_path / "secret.webp").write_text("secret")
        index = json.loads((folder / "gallery" / "gallery.json").read_text())
        index["episodes"][0]["panels"] = [{"file": "../../secret.webp", "label": "x"}]
        (folder / "gallery" / "gallery.json").write_text(json.dumps(index))
        assert read_run(folder).drawn == ()
