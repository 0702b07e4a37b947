"""Lists of ids: what they may hold, and what is said of one that cannot be followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from episodes.sources import SourceError
from episodes.sources.split_lists import default_splits, known_splits, read_split, split_file


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "val.txt").write_text("\ufeff# the hard ones\n\nb \n  a photo\n# c\nb\n", encoding="utf-8")
    (tmp_path / "splits" / "train.txt").write_text("a photo\nb\nd\n")
    return tmp_path


def test_reads_ids_in_the_order_of_the_list_each_once(listed: Path) -> None:
    assert read_split(listed, "val", ["a photo", "b", "c"]) == ("b", "a photo")
    assert read_split(listed, "all", ["c", "a photo"]) == ("c", "a photo")


def test_unknown_split_names_the_known_ones(listed: Path) -> None:
    with pytest.raises(SourceError, match=r"no split 'nowhere'; this data set has: all, train, val$") as caught:
        read_split(listed, "nowhere", ["b"])
    assert caught.value.kind == "missing"
    with pytest.raises(SourceError, match=r"this data set has: all$"):
        read_split(listed / "splits", "val", ["b"])


def test_unknown_id_is_named_with_its_line(listed: Path) -> None:
    with pytest.raises(SourceError, match=r"train\.txt: line 3 names 'd', which this data set of 2 images lacks"):
        read_split(listed, "train", ["a photo", "b"])


def test_list_that_is_no_text(listed: Path) -> None:
    (listed / "splits" / "val.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match=r"val\.txt: not a readable text file"):
        read_split(listed, "val", ["b"])


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        (["train", "val", "test"], ("train", "val")),
        (["train", "test"], ("train", "test")),
        (["train"], ("all", "all")),
        ([], ("all", "all")),
    ],
)
def test_default_splits(tmp_path: Path, lists: list[str], expected: tuple[str, str]) -> None:
    (tmp_path / "splits").mkdir()
    for name in lists:
        split_file(tmp_path, name).write_text("a\n")
    assert default_splits(tmp_path) == expected
    assert known_splits(tmp_path) == ("all", *sorted(lists))
