"""Which episodes are drawn, and what of them is kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from episodes.sources import SyntheticSource
from episodes.types import IGNORE, DataError, EpisodeSpec
from fewshot_seg.backbones import Backbone
from fewshot_seg.feature_episodes import CachedEpisodes
from fewshot_seg.reports.gallery import check_gallery, chosen_episodes, draw_gallery, errors_picture, landmarks
from fewshot_seg.segmenter import training_free


def specs(classes: list[int]) -> list[EpisodeSpec]:
    return [EpisodeSpec(class_id=c, support_ids=("a",), query_id="b", seed=n) for n, c in enumerate(classes)]


class TestChosen:
    def test_worst_best_median_come_first(self) -> None:
        scores = [50.0, 10.0, 90.0, 30.0, 70.0]
        assert chosen_episodes(specs([1] * 5), scores, 3) == (1, 2, 0)

    @pytest.mark.parametrize("count", [3, 4, 24, 200])
    def test_landmarks_are_the_first(self, count: int) -> None:
        scores = np.random.default_rng(count).integers(0, 50, count).astype(float).tolist()  # with ties
        found = landmarks(scores)
        assert list(found) == ["Worst", "Best", "Median"]
        assert tuple(found.values()) == chosen_episodes(specs([1] * count), scores, 24)[:3]
        assert [scores[n] for n in found.values()] == [min(scores), max(scores), sorted(scores)[count // 2]]
        assert landmarks(scores[:2]) == {}

    def test_every_class_has_its_worst(self) -> None:
        random = np.random.default_rng(0)
        classes, scores = random.integers(1, 6, 200).tolist(), random.uniform(0, 100, 200).tolist()
        chosen = chosen_episodes(specs(classes), scores, 24)
        assert len(chosen) == len(set(chosen)) == 24
        for class_id in range(1, 6):
            worst = min((score, n) for n, score in enumerate(scores) if classes[n] == class_id)[1]
            assert worst in chosen

    @pytest.mark.parametrize(("episodes", "count", "expected"), [(2, 24, 2), (1, 1, 1), (5, 0, 0), (0, 24, 0)])
    def test_few(self, episodes: int, count: int, expected: int) -> None:
        chosen = chosen_episodes(specs([1] * episodes), [float(n) for n in range(episodes)], count)
        assert len(chosen) == len(set(chosen)) == expected


def test_errors_are_told_apart() -> None:
    photo = np.full((40, 40, 3), 100, np.uint8)
    prediction, target = np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint8)
    prediction[:, :20] = 1
    target[:20] = 1
    target[30:] = IGNORE
    picture = errors_picture(photo, prediction, target)
    assert picture[10, 10].tolist() == [100, 100, 100]  # right
    assert picture[10, 33, 2] > picture[10, 33, 0]  # missed: blue
    assert picture[25, 10, 0] > picture[25, 10, 1]  # wrong: pink
    assert np.ptp(picture[36, 33]) == 0  # not scored: grey


def test_gallery_is_kept_and_replaced(
    tmp_path: Path, tiny_backbone: Backbone, tiny_source: SyntheticSource, draw_episodes: object
) -> None:
    assert callable(draw_episodes)
    episodes: CachedEpisodes = draw_episodes(4)
    drawn = [spec for batch in episodes.batches(4) for spec in batch.specs]
    segmenter = training_free(tiny_backbone).eval()
    arguments = {"fingerprint": "f", "resolution": 64, "folder": tmp_path}
    draw_gallery(segmenter, tiny_source, drawn, numbers=(2, 0), **arguments)
    index = json.loads((tmp_path / "gallery" / "gallery.json").read_text())
    assert [one["number"] for one in index["episodes"]] == [2, 0]
    labels = [panel["label"] for panel in index["episodes"][0]["panels"]]
    assert labels == ["support", "query", "attention", "prior: soft margin", "mask found", "truth", "errors"]
    with Image.open(tmp_path / "gallery" / index["episodes"][0]["panels"][1]["file"]) as query:
        kept = torch.from_numpy(np.asarray(query).astype(np.float32))
    photo = torch.from_numpy(tiny_source.image(drawn[2].query_id).astype(np.float32))
    assert (kept - photo).abs().mean() < 12  # compressed
    (tmp_path / "gallery" / "own.webp").write_text("of the user")
    draw_gallery(segmenter, tiny_source, drawn, numbers=(1,), **arguments)
    pictures = [f"episode-00001-{place}.webp" for place in range(7)]
    assert sorted(path.name for path in (tmp_path / "gallery").iterdir()) == [*pictures, "gallery.json", "own.webp"]
    (tmp_path / "gallery" / "own.webp").unlink()
    draw_gallery(segmenter, tiny_source, drawn, numbers=(), **arguments)
    assert not (tmp_path / "gallery").exists()


class TestForeignGallery:
    """`--out` may be a folder with a `gallery` of the user's own."""

    @pytest.mark.parametrize("name", ["holiday.jpg", "gallery.json", "episode-1.webp"])
    def test_is_refused_and_kept(
        self, tmp_path: Path, tiny_backbone: Backbone, tiny_source: SyntheticSource, name: str
    ) -> None:
        own = tmp_path / "gallery" / name
        own.parent.mkdir()
        own.write_text("[]")
        segmenter, arguments = training_free(tiny_backbone).eval(), {"fingerprint": "f", "resolution": 64}
        with pytest.raises(DataError, match=f"gallery holds '{name}', which is of no earlier run") as raised:
            draw_gallery(segmenter, tiny_source, specs([1]), numbers=(0,), folder=tmp_path, **arguments)
        assert "\n" not in str(raised.value)
        draw_gallery(segmenter, tiny_source, specs([1]), numbers=(), folder=tmp_path, **arguments)  # nothing to draw
        assert own.read_text() == "[]"

    def test_a_file_is_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "gallery").write_text("a file")
        with pytest.raises(DataError, match=r"gallery is no folder, and .* give another --out"):
            check_gallery(tmp_path)

    def test_what_a_killed_run_leaves_is_ours(self, tmp_path: Path) -> None:
        check_gallery(tmp_path)
        (tmp_path / "gallery").mkdir()
        check_gallery(tmp_path)
        for name in ("episode-00003-0.webp", ".episode-00003-1-abc.webp"):
            (tmp_path / "gallery" / name).write_bytes(b"")
        check_gallery(tmp_path)
