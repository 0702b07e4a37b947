"""Contact sheets: which colours mark what, and which pages are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from episodes.loader import collate
from episodes.types import IGNORE, DataError, EpisodeBatch, EpisodeSpec
from fewshot_seg.contact_sheet import draw_episodes, write_contact_sheets
from fewshot_seg.pictures import BACKGROUND, OBJECT, TRUTH, overlay_annotation

NAMES = {1: "boat", 2: "cat"}
SIZE = 256  # the side of a panel, so that pictures are shown pixel by pixel
TOP, LEFT, STEP = 38, 10, 266  # of the first panel, and from one panel to the next


def episode(shots: int = 1, *, dense: Sequence[bool] = (), class_id: int = 1, number: int = 0) -> EpisodeBatch:
    """Grey photos; the object is the middle of the picture, the lowest eighth is ignored or not known."""
    mask = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    mask[96:160, 96:160] = 1
    mask[-32:] = IGNORE
    supports = mask.expand(1, shots, SIZE, SIZE).clone()
    spec = EpisodeSpec(
        class_id=class_id,
        support_ids=tuple(f"photo{number}_{k}" for k in range(shots)),
        query_id=f"query{number}",
        seed=number,
    )
    return EpisodeBatch(
        support_images=torch.full((1, shots, 3, SIZE, SIZE), 100 / 255),
        support_masks=supports,
        support_dense=torch.tensor([dense or [True] * shots]),
        support_truth=supports,
        query_images=torch.full((1, 3, SIZE, SIZE), 100 / 255),
        query_masks=mask[None],
        class_ids=torch.tensor([class_id]),
        specs=(spec,),
    )


def panel(sheet: np.ndarray, column: int, top: int = TOP) -> np.ndarray:
    left = LEFT + column * STEP
    return sheet[top : top + SIZE, left : left + SIZE].astype(int)


def nearer(colour: np.ndarray, one: Sequence[int], other: Sequence[int]) -> bool:
    return bool(np.abs(colour - np.array(one)).sum() < np.abs(colour - np.array(other)).sum())


class TestOverlayAnnotation:
    image = np.full((60, 60, 3), 100, np.uint8)

    def test_a_box_tints_the_known_background_and_darkens_the_inside(self) -> None:
        annotation = np.zeros((60, 60), np.uint8)
        annotation[20:40, 20:40] = IGNORE
        painted = overlay_annotation(self.image, annotation)
        assert painted[30, 30].tolist() == [40, 40, 40]
        expected = np.round(0.65 * 100 + 0.35 * np.array(BACKGROUND))
        assert painted[5, 5].tolist() == expected.tolist()
        assert len(np.unique(painted.reshape(-1, 3), axis=0)) == 2  # no outline of an object that nobody marked

    def test_a_point_shows_the_object_in_the_dark(self) -> None:
        annotation = np.full((60, 60), IGNORE, np.uint8)
        annotation[28:33, 28:33] = 1
        painted = overlay_annotation(self.image, annotation)
        assert painted[30, 30].tolist() == np.round(0.55 * 100 + 0.45 * np.array(OBJECT)).tolist()
        assert painted[27, 30].tolist() == list(OBJECT)
        assert painted[5, 5].tolist() == [40, 40, 40]

    def test_leaves_its_arguments_alone(self) -> None:
        image, annotation = self.image.copy(), np.full((60, 60), IGNORE, np.uint8)
        overlay_annotation(image, annotation)
        np.testing.assert_array_equal(image, self.image)
        assert (annotation == IGNORE).all()


class TestDrawEpisodes:
    def test_a_mask_shows_object_and_ignored_and_leaves_the_background(self) -> None:
        support = panel(draw_episodes(episode(), ["0: boat"]), 0)
        assert nearer(support[128, 128], OBJECT, TRUTH)
        assert support[20, 20].tolist() == [100, 100, 100]
        assert np.ptp(support[-10, 128]) == 0
        assert 100 < support[-10, 128, 0] < 128

    def test_a_weak_support_shows_background_and_unknown(self) -> None:
        support = panel(draw_episodes(episode(dense=[False]), ["0: boat"]), 0)
        assert nearer(support[128, 128], OBJECT, BACKGROUND)
        assert nearer(support[20, 20], np.round(0.65 * 100 + 0.35 * np.array(BACKGROUND)).tolist(), [100] * 3)
        assert support[-10, 128].tolist() == [40, 40, 40]

    def test_supports_are_in_order_before_the_query(self) -> None:
        batch = episode(3, dense=[True, False, True])
        batch.support_images[0, 0], batch.support_images[0, 1] = 0.0, 1.0
        sheet = draw_episodes(batch, ["0: boat"])
        assert sheet.shape[1] == LEFT + 4 * STEP
        assert panel(sheet, 0)[20, 20].tolist() == [0, 0, 0]
        assert panel(sheet, 1)[-10, 128].tolist() == [102, 102, 102]  # white, darkened
        assert panel(sheet, 2)[20, 20].tolist() == [100, 100, 100]
        assert nearer(panel(sheet, 3)[128, 128], TRUTH, OBJECT)

    def test_episodes_are_below_each_other(self) -> None:
        one, two = episode(number=0), episode(number=1, dense=[False])
        together = draw_episodes(collate([one, two]), ["a", "b"])
        expected = np.concatenate([draw_episodes(one, ["a"]), draw_episodes(two, ["b"])])
        np.testing.assert_array_equal(together, expected)

    @pytest.mark.parametrize(("shots", "rows"), [(1, 1), (5, 1), (6, 1), (7, 2), (10, 2)])
    def test_no_page_is_wider_than_2000_pixels(self, shots: int, rows: int) -> None:
        sheet = draw_episodes(episode(shots), ["0: boat"])
        assert sheet.shape[1] <= 2000
        assert sheet.shape[0] == 38 + rows * (256 + 22 + 10)

    def test_captions_and_ids_are_written(self) -> None:
        sheet = draw_episodes(episode(), ["0: boat"])
        other = draw_episodes(episode(), ["1: boat"])
        assert not np.array_equal(sheet[:TOP], other[:TOP])
        np.testing.assert_array_equal(sheet[TOP:], other[TOP:])
        renamed = draw_episodes(episode(number=1), ["0: boat"])
        below = slice(TOP + SIZE, None)
        np.testing.assert_array_equal(sheet[: TOP + SIZE], renamed[: TOP + SIZE])
        for columns in (slice(None, STEP), slice(STEP, None)):  # of the support, and of the query
            assert not np.array_equal(sheet[below, columns], renamed[below, columns])

    def test_one_caption_per_episode(self) -> None:
        with pytest.raises(DataError, match="expected one caption per episode, got 2 for 1 episodes"):
            draw_episodes(episode(), ["a", "b"])


class TestWriteContactSheets:
    def test_pages_show_every_episode_once_and_in_order(self, tmp_path: Path) -> None:
        episodes = [episode(number=number, class_id=1 + number % 2) for number in range(5)]
        batches = [collate(episodes[:3]), collate(episodes[3:])]
        kinds = [("mask",)] * 5
        pages = write_contact_sheets(tmp_path / "new", batches, class_names=NAMES, kinds=kinds, rows_per_page=2)
        assert [page.name for page in pages] == ["page-001.png", "page-002.png", "page-003.png"]
        assert sorted((tmp_path / "new").iterdir()) == pages  # nothing temporary is left
        captions = [f"{number}: {NAMES[1 + number % 2]}, marked by mask" for number in range(5)]
        for page, numbers in zip(pages, [(0, 1), (2, 3), (4,)], strict=True):
            with Image.open(page) as opened:
                shown = np.asarray(opened)
            rows = np.concatenate([draw_episodes(episodes[number], [captions[number]]) for number in numbers])
            np.testing.assert_array_equal(shown[-len(rows) :, : rows.shape[1]], rows)
            assert (shown[-len(rows) :, rows.shape[1] :] == 255).all()

    def test_every_page_names_the_colours(self, tmp_path: Path) -> None:
        (page,) = write_contact_sheets(tmp_path, [episode()], class_names=NAMES, kinds=[("mask",)])
        with Image.open(page) as opened:
            legend = np.asarray(opened)[:30].reshape(-1, 3)
        for colour in (OBJECT, TRUTH, BACKGROUND):
            assert (legend == colour).all(axis=1).sum() >= 100

    def test_a_caption_names_different_kinds_in_the_order_of_the_supports(self, tmp_path: Path) -> None:
        batch = episode(3, dense=[False, True, False])
        (page,) = write_contact_sheets(tmp_path, [batch], class_names=NAMES, kinds=[("box", "mask", "point")])
        row = draw_episodes(batch, ["0: boat, marked by box, mask, point"])
        with Image.open(page) as opened:
            np.testing.assert_array_equal(np.asarray(opened)[-len(row) :, : row.shape[1]], row)

    def test_batches_are_loaded_one_by_one(self, tmp_path: Path) -> None:
        written_before = []

        def batches() -> object:
            for number in range(3):
                written_before.append(len(list(tmp_path.iterdir())))
                yield episode(number=number)

        write_contact_sheets(tmp_path, batches(), class_names=NAMES, kinds=[("mask",)] * 3, rows_per_page=1)
        assert written_before == [0, 1, 2]

    def test_no_episodes_no_pages(self, tmp_path: Path) -> None:
        assert write_contact_sheets(tmp_path, [], class_names=NAMES, kinds=[]) == []

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rows_per_page": 0}, "rows per page must be at least 1, got 0"),
            ({"class_names": {2: "cat"}}, r"class 1 of episode 0 has no name among \[2\]"),
            ({"kinds": [("mask",)]}, "kinds of supports of every episode, got those of 1 only"),
            ({"kinds": [("mask",)] * 3}, "kinds of supports of 2 episodes, got those of 3"),
            ({"kinds": [("mask", "box")] * 2}, "expected 1 kinds of supports for episode 0, got 2"),
        ],
    )
    def test_bad_arguments(self, tmp_path: Path, changes: dict[str, object], message: str) -> None:
        arguments = {"class_names": NAMES, "kinds": [("mask",)] * 2, **changes}
        with pytest.raises(DataError, match=message):
            write_contact_sheets(tmp_path, [episode(number=0), episode(number=1)], **arguments)
