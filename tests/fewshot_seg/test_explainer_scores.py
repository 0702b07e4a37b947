"""Scores of explainers: against plain loops, and runs that go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from episodes.sources import SyntheticSource
from episodes.types import DataError, EpisodeSpec
from fewshot_seg.backbones import Backbone
from fewshot_seg.explainer_scores import ScoringRule, rank_likeness, score_episode, score_explainers
from fewshot_seg.explainer_table import METRICS, score_tables, summarise
from fewshot_seg.explainers import EXPLAINERS, Comparison
from fewshot_seg.explainers.episode import compare_photos, episode_photos, randomised
from fewshot_seg.faithfulness import perturbation_curve
from fewshot_seg.segmenter import FewShotSegmenter, training_free

SPECS = [
    EpisodeSpec(class_id=class_id, support_ids=(f"val-00{class_id}-0001",), query_id=f"val-00{class_id}-000{n}", seed=0)
    for class_id in (4, 5)
    for n in (0, 2)
]
RULE = ScoringRule(explainers=("attention", "chance"), steps=3, sanity_every=2)
SIZE = 64


@pytest.fixture(scope="module")
def segmenter(tiny_backbone: Backbone) -> FewShotSegmenter:
    return training_free(tiny_backbone).eval()


@pytest.fixture
def comparison(segmenter: FewShotSegmenter, tiny_source: SyntheticSource) -> Comparison:
    return compare_photos(segmenter, episode_photos(tiny_source, SPECS[0]), resolution=SIZE)


@pytest.fixture
def target(tiny_source: SyntheticSource) -> torch.Tensor:
    return torch.from_numpy(tiny_source.mask(SPECS[0].query_id, 4))


class TestScoreEpisode:
    @pytest.mark.parametrize(("side", "place"), [("query", 0), ("support", 1)])
    def test_curves_are_those_of_the_faithfulness_module(
        self, comparison: Comparison, target: torch.Tensor, side: str, place: int
    ) -> None:
        record = score_episode(comparison, target, RULE)
        values = EXPLAINERS["attention"](comparison, place)
        for mode in ("deletion", "insertion"):
            expected = perturbation_curve(
                lambda photos: comparison.changed(place, photos),
                comparison.photos[place : place + 1],
                values[None],
                mode=mode,
                baseline=comparison.baselines[place : place + 1],
                steps=RULE.steps,
            )[0]
            inner = record["explainers"]["attention"][side][mode]["similarity"]
            ends = [record[side][end]["similarity"] for end in ("whole", "blank")]
            found = [ends[0], *inner, ends[1]] if mode == "deletion" else [ends[1], *inner, ends[0]]
            assert found == pytest.approx(expected.tolist(), abs=1e-5)

    def test_whole_photo_has_the_episodes_iou(
        self, comparison: Comparison, target: torch.Tensor, segmenter: FewShotSegmenter
    ) -> None:
        record = score_episode(comparison, target, RULE)
        found = segmenter.segment(comparison.support, comparison.photos[:1]).masks[0]
        both, either = (found & (target == 1)).sum(), (found | (target == 1)).sum()
        for side in ("query", "support"):
            assert record[side]["whole"]["intersection"] == pytest.approx(int(both), abs=2)
            assert record[side]["whole"]["union"] == pytest.approx(int(either), abs=2)

    def test_pointing_and_energy(
        self, comparison: Comparison, target: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = F.adaptive_avg_pool2d((target == 1).float()[None], (8, 8))[0]
        maps = {"right": right, "wrong": right.max() - right, "nowhere": -torch.ones(8, 8)}
        monkeypatch.setattr(
            "fewshot_seg.explainer_scores.EXPLAINERS", {name: lambda _, __, m=m: m for name, m in maps.items()}
        )
        rule = ScoringRule(explainers=tuple(maps), steps=2)
        scores = {name: one["query"] for name, one in score_episode(comparison, target, rule)["explainers"].items()}
        assert scores["right"]["pointing"] == 1
        assert scores["wrong"]["pointing"] == scores["nowhere"]["pointing"] == scores["nowhere"]["energy"] == 0
        large = F.interpolate(right[None, None], (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0]
        expected = float(large[target == 1].sum() / large[target != 255].sum())
        assert scores["right"]["energy"] == pytest.approx(expected, abs=1e-5)
        assert scores["wrong"]["energy"] < scores["right"]["energy"]

    def test_sanity_compares_with_random_weights(
        self, comparison: Comparison, target: torch.Tensor, segmenter: FewShotSegmenter
    ) -> None:
        other = randomised(segmenter, seed=1)
        record = score_episode(comparison, target, RULE, randomised_model=other)
        expected = rank_likeness(
            EXPLAINERS["attention"](comparison, 0), EXPLAINERS["attention"](comparison.with_segmenter(other), 0)
        )
        assert record["explainers"]["attention"]["query"]["sanity"] == pytest.approx(expected)
        assert record["explainers"]["chance"]["query"]["sanity"] == pytest.approx(1)  # it knows no weights at all

    def test_several_supports_are_averaged(self, segmenter: FewShotSegmenter, tiny_source: SyntheticSource) -> None:
        same = EpisodeSpec(class_id=4, support_ids=("val-004-0001", "val-004-0002"), query_id="val-004-0000", seed=0)
        two = compare_photos(segmenter, episode_photos(tiny_source, same), resolution=SIZE)
        target = torch.from_numpy(tiny_source.mask(same.query_id, 4))
        found = score_episode(two, target, RULE)["support"]["blank"]["similarity"]
        each = [float(two.changed(place, two.baselines[place : place + 1])[0]) for place in (1, 2)]
        assert found == pytest.approx(np.mean(each), abs=1e-5)


class TestRankLikeness:
    def test_by_hand(self) -> None:
        values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        assert rank_likeness(values, values**3) == pytest.approx(1)
        assert rank_likeness(values, -values) == pytest.approx(1)
        assert rank_likeness(values, torch.tensor([[2.0, 1.0], [3.0, 4.0]])) == pytest.approx(0.8)
        assert rank_likeness(values, torch.zeros(2, 2)) == 0


class TestRuns:
    def run(self, segmenter: FewShotSegmenter, source: SyntheticSource, path: Path, count: int = 4) -> list[object]:
        return list(
            score_explainers(segmenter, source, SPECS[:count], path, rule=RULE, resolution=SIZE, identity={"fold": 0})
        )

    def test_goes_on_where_it_stopped(
        self, segmenter: FewShotSegmenter, tiny_source: SyntheticSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = self.run(segmenter, tiny_source, tmp_path / "whole.jsonl")
        path = tmp_path / "cut.jsonl"
        lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
        assert len(lines) == 5
        path.write_text("".join(lines[:3]) + lines[3][:40])  # stopped in the middle of a line
        done = []
        monkeypatch.setattr(
            "fewshot_seg.explainer_scores.score_episode",
            lambda *a, **b: done.append(a) or score_episode(*a, **b),  # type: ignore[func-returns-value]
        )
        assert self.run(segmenter, tiny_source, path) == whole
        assert len(done) == 2
        assert path.read_text().splitlines() == [line.rstrip("\n") for line in lines]

    def test_another_run_is_refused(
        self, segmenter: FewShotSegmenter, tiny_source: SyntheticSource, tmp_path: Path
    ) -> None:
        path = tmp_path / "episodes.jsonl"
        path.write_text(json.dumps({"fold": 1}) + "\n")
        with pytest.raises(DataError, match="holds episodes of another run"):
            self.run(segmenter, tiny_source, path)

    def test_a_damaged_file_is_refused_by_its_line(
        self, segmenter: FewShotSegmenter, tiny_source: SyntheticSource, tmp_path: Path
    ) -> None:
        path = tmp_path / "episodes.jsonl"
        self.run(segmenter, tiny_source, path, count=2)
        lines = path.read_text().splitlines(keepends=True)
        path.write_text(lines[0] + lines[1][:30] + "\n" + lines[2])
        with pytest.raises(DataError, match=r"line 2 of .*episodes.jsonl is damaged .*; delete this line"):
            self.run(segmenter, tiny_source, path)
        assert path.read_text() == lines[0] + lines[1][:30] + "\n" + lines[2]
        with pytest.raises(DataError, match="cannot read finished episodes"):
            self.run(segmenter, tiny_source, tmp_path)

    def test_unknown_explainer(self) -> None:
        with pytest.raises(DataError, match="--explainers: expected names out of attention, "):
            ScoringRule(explainers=("magic",))


@pytest.fixture(scope="module")
def records(
    tiny_backbone: Backbone, tiny_source: SyntheticSource, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, object]]:
    path = tmp_path_factory.mktemp("scores") / "episodes.jsonl"
    segmenter = training_free(tiny_backbone).eval()
    return score_explainers(segmenter, tiny_source, SPECS, path, rule=RULE, resolution=SIZE, identity={})


class TestTable:
    def test_values_by_a_plain_loop(self, records: list[dict[str, object]]) -> None:
        found = summarise(records)["attention"]
        gains, counts = [], dict[int, np.ndarray]()
        for record in records:
            one, ends = record["explainers"]["attention"]["query"], record["query"]
            curve = [ends["whole"]["similarity"], *one["deletion"]["similarity"], ends["blank"]["similarity"]]
            gains.append(np.trapezoid(curve, dx=1 / 3) - (curve[0] + curve[-1]) / 2)
            of_steps = np.asarray(
                [[ends["whole"][key], *one["deletion"][key], ends["blank"][key]] for key in ("intersection", "union")]
            )
            counts[record["class_id"]] = counts.get(record["class_id"], 0) + of_steps
        assert found["query: deletion, similarity"][0] == pytest.approx(100 * np.mean(gains))
        miou = np.mean([both / either for both, either in counts.values()], axis=0)
        assert found["query: deletion, mIoU"][0] == pytest.approx(100 * np.trapezoid(miou, dx=1 / 3))
        sane = [r["explainers"]["attention"]["query"]["sanity"] for r in records[1::2]]
        assert found["query: sanity"][0] == pytest.approx(100 * np.mean(sane))
        assert all(low <= value <= high for value, low, high in found.values())
        assert found["forward"] == (1, 1, 1)

    def test_best_carries_a_star(self, records: list[dict[str, object]]) -> None:
        scores = summarise(records)
        tables = score_tables(scores)
        assert set(tables) == {"query", "support"}
        for side, table in tables.items():
            assert table.header[1 : 1 + len(METRICS)] == [
                f"{metric} {'↑' if higher else '↓'}" for metric, higher in METRICS.items()
            ]
            for column, (metric, higher) in enumerate(METRICS.items(), 1):
                values = [scores[row[0]][f"{side}: {metric}"][0] for row in table.rows]
                starred = ["*" in row[column] for row in table.rows]
                assert starred == [value == (max if higher else min)(values) for value in values]
