from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from episodes.episode_files import (
    EpisodeFile,
    check_episodes,
    fingerprint_episodes,
    fingerprint_pairs,
    read_episodes,
    write_episodes,
)
from episodes.index import build_index
from episodes.sampler import EpisodeSampler
from episodes.sources import SyntheticSource
from episodes.types import DataError, EpisodeSpec

SOURCE = SyntheticSource(base_classes=3, novel_classes=2, images_per_class=4, size=48)
PAIRS = build_index(SOURCE, "val").pairs(SOURCE.novel_class_ids)
SPECS = tuple(EpisodeSampler(PAIRS, shots=2, seed=3, length=6, order="list", repeat_supports=False))
FILE = EpisodeFile(
    protocol="hsnet",
    data="synthetic",
    fold=None,
    shots=2,
    seeds=(3,),
    class_names={class_id: SOURCE.class_names[class_id] for class_id in SOURCE.novel_class_ids},
    source_fingerprint=SOURCE.fingerprint(SOURCE.ids("val")),
    pairs_fingerprint=fingerprint_pairs(PAIRS),
    specs=SPECS,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "episodes.json"
    write_episodes(path, FILE)
    return path


def rewrite(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "REMOVED"}))


class TestRoundTrip:
    def test_what_is_written_is_read(self, path: Path) -> None:
        assert read_episodes(path) == FILE
        assert [entry.name for entry in path.parent.iterdir()] == ["episodes.json"]

    def test_the_file_is_the_documented_object(self, path: Path) -> None:
        content = json.loads(path.read_text())
        assert content == {
            "format": 1,
            "protocol": "hsnet",
            "data": "synthetic",
            "fold": None,
            "shots": 2,
            "ways": 1,
            "seeds": [3],
            "class_names": {str(c): name for c, name in FILE.class_names.items()},
            "source_fingerprint": FILE.source_fingerprint,
            "pairs_fingerprint": FILE.pairs_fingerprint,
            "episodes_fingerprint": FILE.episodes_fingerprint,
            "episodes": [
                {"class_id": s.class_id, "support_ids": list(s.support_ids), "query_id": s.query_id, "seed": s.seed}
                for s in SPECS
            ],
        }
        assert len(path.read_text().splitlines()) < 25 + len(SPECS)  # one line per episode

    @settings(max_examples=30, deadline=None)
    @given(
        st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5), st.integers(0, 2**62)), min_size=1, max_size=4),
        st.integers(0, 3),
    )
    def test_any_ids_survive(
        self, tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, int]], fold: int
    ) -> None:
        specs = tuple(EpisodeSpec(class_id=1, support_ids=(f"s{a}",), query_id=f"q{b}", seed=s) for a, b, s in rows)
        file = replace(FILE, shots=1, specs=specs, class_names={1: "a \n b"}, fold=fold)
        path = tmp_path_factory.mktemp("any") / "e.json"
        write_episodes(path, file)
        assert read_episodes(path) == file

    def test_further_keys_are_ignored(self, path: Path) -> None:
        rewrite(path, program="another")
        assert read_episodes(path) == FILE

    def test_an_existing_file_is_replaced(self, path: Path) -> None:
        write_episodes(path, replace(FILE, fold=2))
        assert read_episodes(path).fold == 2

    def test_a_failed_write_leaves_the_old_file(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(DataError, match=r"cannot write .*episodes\.json: No space left on device"):
            write_episodes(path, replace(FILE, fold=2))
        assert [entry.name for entry in path.parent.iterdir()] == ["episodes.json"]
        assert read_episodes(path) == FILE

    def test_a_folder_that_is_a_file(self, path: Path) -> None:
        with pytest.raises(DataError, match="choose a folder you may write to"):
            write_episodes(path / "below.json", FILE)


class TestFingerprints:
    def test_episodes_by_hand(self) -> None:
        spec = EpisodeSpec(class_id=7, support_ids=("a", "ü"), query_id="c", seed=9)
        line = '[7,["a","\\u00fc"],"c",9]\n'
        assert fingerprint_episodes([spec]) == hashlib.sha256(line.encode()).hexdigest()
        assert fingerprint_episodes([spec, spec]) == hashlib.sha256(2 * line.encode()).hexdigest()

    def test_pairs_by_hand(self) -> None:
        assert fingerprint_pairs([("a", 1), ("b", 20)]) == hashlib.sha256(b'["a",1]\n["b",20]\n').hexdigest()

    def test_order_and_every_part_matter(self) -> None:
        spec = EpisodeSpec(class_id=7, support_ids=("a", "b"), query_id="c", seed=9)
        others = [
            replace(spec, class_id=8),
            replace(spec, support_ids=("b", "a")),
            replace(spec, query_id="d"),
            replace(spec, seed=10),
        ]
        assert len({fingerprint_episodes([one]) for one in (spec, *others)}) == 5
        assert fingerprint_episodes([spec, others[0]]) != fingerprint_episodes([others[0], spec])
        assert fingerprint_pairs([("a", 1), ("b", 1)]) != fingerprint_pairs([("b", 1), ("a", 1)])


EPISODE = {"class_id": 4, "support_ids": ["a", "b"], "query_id": "c", "seed": 0}


class TestDamage:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": 2}, r"format: expected 1, got 2"),
            ({"format": "REMOVED"}, r"format: expected a whole number, got none; add it"),
            ({"protocol": None}, r"protocol: expected a text, got None"),
            ({"fold": True}, r"fold: expected a whole number, got True"),
            ({"fold": "REMOVED"}, r"fold: expected a whole number, got none"),
            ({"fold": -1}, r"fold: expected 0 or more, or null, got -1"),
            ({"shots": 0}, r"shots: expected at least 1, got 0"),
            ({"shots": 3}, r"episodes\[0\].support_ids: expected 3 ids \(shots\), got 2"),
            ({"ways": 4}, r"ways: expected a number that divides the 6 episodes, got 4"),
            ({"ways": 0}, r"ways: expected a number that divides the 6 episodes, got 0"),
            ({"seeds": [0, 1.5]}, r"seeds\[1\]: expected a whole number, got 1.5"),
            ({"class_names": []}, r"class_names: expected an object, got \[\]"),
            ({"class_names": {"x": "cat"}}, r"class_names: expected class ids as keys, got 'x'"),
            ({"class_names": {"4": 1}}, r"class_names\['4'\]: expected a text, got 1"),
            ({"class_names": {}}, r"class_names: no name of class 4 \(episodes\[0\]\)"),
            ({"episodes": []}, r"episodes: expected at least one, got none"),
            ({"episodes": {}}, r"episodes: expected a list, got \{\}"),
            ({"episodes": ["x"]}, r"episodes\[0\]: expected an object, got 'x'"),
            ({"episodes": [EPISODE | {"class_id": "4"}]}, r"episodes\[0\].class_id: expected a whole number, got '4'"),
            ({"episodes": [EPISODE | {"support_ids": "ab"}]}, r"episodes\[0\].support_ids: expected a list"),
            ({"episodes": [EPISODE | {"support_ids": ["a", 1]}]}, r"episodes\[0\].support_ids\[1\]: expected a text"),
            ({"episodes": [EPISODE, EPISODE | {"query_id": "a"}]}, r"episodes\[1\]: query 'a' is among its own"),
            ({"episodes": [EPISODE | {"seed": -1}]}, r"episodes\[0\].seed: expected 0 or more, got -1"),
            ({"episodes": [EPISODE]}, r"episodes_fingerprint: the episodes have [0-9a-f]{12}, the file says"),
            ({"episodes_fingerprint": "0" * 64}, r"the file says '000000000000'; they were changed after writing"),
            ({"episodes_fingerprint": "REMOVED"}, r"episodes_fingerprint: expected a text, got none"),
        ],
    )
    def test_a_wrong_value_is_named_with_its_place(self, path: Path, changes: dict[str, Any], message: str) -> None:
        rewrite(path, **changes)
        with pytest.raises(DataError, match=message) as caught:
            read_episodes(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "text",
        [b"", b"[", b"\xff\xfe\x00", b"[" * 100_000, b'{"format": 1' + b"1" * 5000 + b"}", b"null", b'"a"', b"[1]"],
    )
    def test_not_even_an_object(self, path: Path, text: bytes) -> None:
        path.write_bytes(text)
        with pytest.raises(DataError, match=r"expected (JSON|an object), got") as caught:
            read_episodes(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400 + len(str(path))

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
    def test_truncated(self, path: Path, share: float) -> None:
        text = path.read_bytes().rstrip()
        path.write_bytes(text[: int(share * len(text))])
        with pytest.raises(DataError, match=r"episodes\.json: expected JSON, got something else"):
            read_episodes(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"cannot read episodes .*none\.json: No such file"):
            read_episodes(tmp_path / "none.json")

    @pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX")
    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="Is a directory"):
            read_episodes(tmp_path)


class TestCheck:
    def test_the_source_they_come_from(self) -> None:
        check_episodes(FILE, SOURCE, "val")

    def test_images_that_are_not_there(self) -> None:
        count = len({image for spec in SPECS for image in (spec.query_id, *spec.support_ids)})
        assert count > 3
        with pytest.raises(
            DataError, match=rf"\(split 'train'\) lacks images .*'val-.*, \.\.\. \({count} in all\)"
        ) as e:
            check_episodes(FILE, SOURCE, "train")
        assert "\n" not in str(e.value)
        one = replace(FILE, specs=(*SPECS, replace(SPECS[0], query_id="ab\nc")))
        with pytest.raises(DataError, match=r"lacks images of the episodes: 'ab\\nc' \(1 in all\)"):
            check_episodes(one, SOURCE, "val")

    def test_classes_that_are_not_there(self) -> None:
        specs = (replace(SPECS[0], class_id=99), SPECS[1])
        file = replace(FILE, specs=specs, class_names={**FILE.class_names, 99: "yeti"})
        with pytest.raises(DataError, match=r"synthetic lacks classes of the episodes: 99 \(1 in all\)"):
            check_episodes(file, SOURCE, "val")

    def test_classes_that_are_called_otherwise(self) -> None:
        names = dict.fromkeys(FILE.class_names, "yeti")
        with pytest.raises(DataError, match=r"another name in synthetic: 4 \(.*, in the episodes 'yeti'\)"):
            check_episodes(replace(FILE, class_names=names), SOURCE, "val")
