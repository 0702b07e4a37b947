"""A visitor's session, without any page."""

from __future__ import annotations

import dataclasses
import json
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as run_lengths

from episodes.sources import SyntheticSource
from episodes.types import DataError, UInt8Array
from fewshot_seg.app import session as session_module
from fewshot_seg.app.downloads import write_downloads
from fewshot_seg.app.drawings import Drawing, Shape, annotation_of
from fewshot_seg.app.guard import held_bytes
from fewshot_seg.app.limits import Limits
from fewshot_seg.app.session import SUPPORT_SIDE, Engine, Session
from fewshot_seg.app.sessions import Sessions
from fewshot_seg.app.synthetic_example import outlined, synthetic_example
from fewshot_seg.backbones import Backbone
from fewshot_seg.photos import read_photo
from fewshot_seg.predicted_files import PhotoWriter
from fewshot_seg.prediction import Predictor
from fewshot_seg.segmenter import training_free

SIZE = 64
THRESHOLD = 0.3
BOX = Drawing(kind="box", shapes=(Shape("box", ((18, 8), (62, 42))),))
OUTLINE = Drawing(kind="mask", shapes=(Shape("outline", ((20, 10), (59, 10), (59, 39), (20, 39))),))


def picture(seed: int, height: int = 50, width: int = 80) -> UInt8Array:
    """A red rectangle on grey noise."""
    image = np.random.default_rng(seed).integers(90, 130, (height, width, 3)).astype(np.uint8)
    image[10:40, 20:60] = (220, 30, 30)
    return image


def save(path: Path, pixels: UInt8Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def engine(tiny_backbone: Backbone) -> Engine:
    return Engine(
        segmenter=training_free(tiny_backbone, threshold=THRESHOLD).eval(), resolution=SIZE, fit="squash", name="tiny"
    )


@pytest.fixture
def session(engine: Engine, tmp_path: Path) -> Session:
    ready = Session(engine, Limits(supports=2, queries=3, file_bytes=60_000, pixels=20_000), tmp_path)
    assert ready.add_examples([save(tmp_path / "in" / "a.png", picture(0))]) == []
    assert (
        ready.add_queries([save(tmp_path / "in" / f"{name}.png", picture(3 + k)) for k, name in enumerate("bc")]) == []
    )
    return ready


class TestFinding:
    @pytest.mark.parametrize("threshold", [THRESHOLD, 0.1, -0.2, 0.6])
    def test_cut_anew_is_as_if_the_model_had_that_threshold(
        self, session: Session, tiny_backbone: Backbone, threshold: float
    ) -> None:
        session.find({1: OUTLINE}, "red thing")
        other = Predictor(training_free(tiny_backbone, threshold=threshold), SIZE)
        marks = np.zeros((50, 80), np.uint8)
        marks[10:40, 20:60] = 1
        other.remember([picture(0)], [marks])
        downloads = write_downloads(session, threshold)
        with zipfile.ZipFile(downloads.masks) as archive, archive.open("masks/c.png") as file:
            mask = np.array(Image.open(file))
        assert np.array_equal(mask, other.predict(picture(4)).mask)

    def test_the_network_is_not_asked_again(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        session.find({1: OUTLINE})
        monkeypatch.setattr(Predictor, "coarse_maps", None)
        monkeypatch.setattr(session.engine.segmenter, "forward", None)
        shares = [session.views(threshold, [0])[0].share for threshold in (-100.0, 0.1, 0.3, 100.0)]
        assert shares[0] == 1
        assert shares[-1] == 0
        assert shares == sorted(shares, reverse=True)

    def test_view_shows_mask_and_attention(self, session: Session) -> None:
        session.find({1: OUTLINE})
        (view,) = session.views(THRESHOLD, [1])
        assert view.name == "c.png"
        assert view.overlay.shape == view.attention.shape == (50, 80, 3)
        assert not np.array_equal(view.overlay, view.attention)
        assert 0 < view.confidence <= 1

    def test_every_kind_of_mark_and_several_examples(self, session: Session, tmp_path: Path) -> None:
        session.add_examples([save(tmp_path / "in" / "d.png", picture(9))])
        for drawing in (
            BOX,
            Drawing(kind="scribble", shapes=(Shape("brush", ((30, 20), (50, 30)), 4),)),
            Drawing(kind="point", shapes=(Shape("point", ((40, 25),)),)),
            Drawing(kind="label"),
        ):
            found = session.find({1: OUTLINE, 2: drawing})
            assert len(found.looked) == 2
            assert found.examples == ("a.png", "d.png")

    def test_order_of_examples_and_their_drawings(self, session: Session, tmp_path: Path) -> None:
        session.add_examples([save(tmp_path / "in" / "d.png", picture(9))])
        with pytest.raises(DataError, match=r"^d\.png: nothing is painted yet"):
            session.find({1: OUTLINE})
        session.remove_example(2)
        session.find({1: OUTLINE})

    def test_what_is_missing_is_said(self, session: Session, engine: Engine, tmp_path: Path) -> None:
        empty = Session(engine, Limits(), tmp_path)
        with pytest.raises(DataError, match="add an example photo first"):
            empty.find({})
        empty.add_example("a", picture(0))
        with pytest.raises(DataError, match="add photos to search"):
            empty.find({1: OUTLINE})
        with pytest.raises(DataError, match="nothing was searched yet"):
            empty.views(0.0, [0])
        session.find({1: OUTLINE})
        with pytest.raises(DataError, match="nothing is painted"):
            session.find({1: Drawing()})
        assert session.findings is not None  # of the search before


class TestUploads:
    def test_refused_by_name_and_without_our_folder(self, session: Session, tmp_path: Path) -> None:
        broken, empty = tmp_path / "in" / "broken.jpg", tmp_path / "in" / "empty.png"
        broken.write_bytes(b"\xff\xd8 this is no photo")
        empty.touch()
        large = save(tmp_path / "in" / "large.png", np.zeros((200, 200, 3), np.uint8))
        heavy = save(tmp_path / "in" / "heavy.bmp", picture(1, 140, 150))
        refused = session.add_queries([broken, empty, large, heavy, tmp_path / "in" / "gone.png"])
        expected = ["cannot be decoded", "cannot be decoded", "200x200 pixels", "0 MB, and files of at most", "no such"]
        assert len(refused) == len(expected)
        for line, name, part in zip(
            refused, ["broken.jpg", "empty.png", "large.png", "heavy.bmp"], expected, strict=False
        ):
            assert line.startswith(f"{name}: ")
            assert part in line
            assert str(tmp_path) not in line
        assert len(session.queries) == 2

    def test_no_more_than_so_many(self, session: Session, tmp_path: Path) -> None:
        more = [save(tmp_path / "in" / f"{k}.png", picture(k)) for k in range(3)]
        assert [line.split(":")[0] for line in session.add_queries(more)] == ["1.png", "2.png"]
        assert [line.split(":")[0] for line in session.add_examples(more)] == ["1.png", "2.png"]

    def test_the_same_name_twice(self, session: Session, tmp_path: Path) -> None:
        session.add_queries([save(tmp_path / "other" / "b.png", picture(7))])
        assert [one.name for one in session.queries] == ["b.png", "c.png", "b-2.png"]
        assert np.array_equal(read_photo(session.queries[2]), picture(7))

    def test_examples_are_kept_small(self, engine: Engine, tmp_path: Path) -> None:
        session = Session(engine, Limits(), tmp_path)
        session.add_examples([save(tmp_path / "in" / "wide.png", picture(0, 300, 2000))])
        assert session.examples[0].pixels.shape == (round(300 * SUPPORT_SIDE / 2000), SUPPORT_SIDE, 3)

    def test_nothing_is_left(self, session: Session) -> None:
        session.find({1: OUTLINE})
        write_downloads(session, 0.0)
        session.clear_queries()
        assert [one for one in session.folder.rglob("*") if one != session.files] == []
        session.close()
        assert not session.folder.exists()


class TestTurns:
    def test_long_work_is_not_waited_for(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(session_module, "_PATIENCE", 0.01)
        said: list[str] = []

        def other() -> None:
            for ask in (session.start_again, lambda: session.find({}), lambda: write_downloads(session, 0.0)):
                with pytest.raises(DataError) as caught:
                    ask()
                said.append(str(caught.value))

        def ask_meanwhile(_done: int, _count: int) -> None:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

        session.find({1: OUTLINE}, progress=ask_meanwhile)
        assert said == ["still searching: wait until that is done, then try again"] * 6
        session.start_again()
        assert not session.examples

    def test_a_closed_session_does_nothing(self, session: Session, tmp_path: Path) -> None:
        session.find({1: OUTLINE})
        session.close()
        another = [save(tmp_path / "in" / "d.png", picture(9))]
        for ask in (
            lambda: session.add_queries(another),
            lambda: session.find({1: OUTLINE}),
            lambda: write_downloads(session, 0.0),
        ):
            with pytest.raises(DataError, match="this page was put away"):
                ask()
        assert not session.folder.exists()

    def test_a_search_ends_when_its_page_is_closed(self, session: Session) -> None:
        closing: list[threading.Thread] = []

        def close(_done: int, _count: int) -> None:
            closing.append(threading.Thread(target=session.close))
            closing[-1].start()
            while not session._closed:
                pass

        with pytest.raises(DataError, match="this page was put away"):
            session.find({1: OUTLINE}, progress=close)
        closing[0].join()
        assert len(closing) == 1
        assert not session.folder.exists()


class TestDownloads:
    def test_coco_and_support_set(self, session: Session, engine: Engine) -> None:
        session.find({1: OUTLINE}, "../red thing")
        downloads = write_downloads(session, THRESHOLD)
        assert downloads.support.name == "red_thing.safetensors"
        with zipfile.ZipFile(downloads.masks) as archive:
            assert sorted(archive.namelist()) == sorted(
                ["instances.json"]
                + [f"masks/{name}.png" for name in "bc"]
                + [f"overlays/{name}.jpg" for name in "bc"]
                + [f"confidence/{name}.png" for name in "bc"]
            )
            with archive.open("masks/b.png") as file:
                mask = np.array(Image.open(file))
        document = json.loads(downloads.coco.read_text())
        assert document["categories"] == [{"id": 1, "name": "../red thing"}]
        assert [one["file_name"] for one in document["images"]] == ["b.png", "c.png"]
        annotation = document["annotations"][0]
        assert np.array_equal(run_lengths.decode(annotation["segmentation"]), mask)
        again = engine.predictor()
        assert again.load_support(downloads.support) == ("a.png",)
        assert np.array_equal(again.predict(picture(3)).mask, mask)

    def test_earlier_files_make_room(self, session: Session) -> None:
        session.find({1: OUTLINE})
        first = write_downloads(session, 0.0)
        write_downloads(session, 0.1)
        assert not first.masks.exists()

    def test_in_the_outbox_and_gone_with_the_session(self, engine: Engine, tmp_path: Path) -> None:
        outbox = tmp_path / "out"
        outbox.mkdir()
        session = Session(engine, Limits(), tmp_path, outbox=outbox)
        session.add_example("a.png", picture(0))
        session.add_queries([save(tmp_path / "in" / "b.png", picture(3))])
        session.find({1: OUTLINE})
        assert write_downloads(session, 0.0).masks.is_relative_to(outbox)
        session.close()
        assert list(outbox.iterdir()) == []

    def test_our_folder_is_not_told(self, session: Session) -> None:
        session.find({1: OUTLINE})
        session.queries[0].unlink()
        for ask in (lambda: write_downloads(session, 0.0), lambda: session.find({1: OUTLINE})):
            with pytest.raises(DataError, match=r"^b\.png: ") as caught:
                ask()
            assert str(session.parent) not in str(caught.value)
        assert list(session.files.iterdir()) == []

    def test_while_photos_are_removed(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        session.find({1: OUTLINE})
        waiting: list[threading.Thread] = []
        write = PhotoWriter.write

        def removed_meanwhile(self: PhotoWriter, *arguments: Any) -> Any:
            waiting.append(threading.Thread(target=session.close))
            waiting[-1].start()
            while not session._closed:
                pass
            return write(self, *arguments)

        monkeypatch.setattr(PhotoWriter, "write", removed_meanwhile)
        with pytest.raises(DataError, match="this page was put away"):
            write_downloads(session, 0.0)
        waiting[0].join()
        assert not session.folder.exists()

    def test_no_room(self, session: Session) -> None:
        session.find({1: OUTLINE})
        session.limits = dataclasses.replace(session.limits, disk_bytes=100)
        with pytest.raises(DataError, match="no room for more files"):
            write_downloads(session, 0.0)
        with pytest.raises(DataError, match="no room for more files"):
            write_downloads(session, 0.0)
        assert list(session.files.iterdir()) == []

    def test_the_zip_is_foreseen(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        """With so much room that all files fit, but not once more: the zip takes them in one by one."""
        session.find({1: OUTLINE})
        most = [0]
        write = zipfile.ZipFile.write

        def watched(archive: zipfile.ZipFile, *arguments: Any) -> None:
            write(archive, *arguments)
            most[0] = max(most[0], held_bytes(session.parent))

        monkeypatch.setattr(zipfile.ZipFile, "write", watched)
        before = held_bytes(session.parent)
        made = write_downloads(session, 0.0)
        with zipfile.ZipFile(made.masks) as archive:
            sizes = [one.file_size for one in archive.infolist()]
        held = held_bytes(session.parent)
        assert most[0] <= held + max(sizes)
        allowed = max(most[0], held) + 1000 * len(sizes) + max(sizes)
        session.limits = dataclasses.replace(session.limits, disk_bytes=allowed)
        write_downloads(session, 0.0)
        for room in (allowed - sum(sizes) // 2, held - 1):
            session.limits = dataclasses.replace(session.limits, disk_bytes=room)
            with pytest.raises(DataError, match="no room for more files"):
                write_downloads(session, 0.0)
            assert held_bytes(session.parent) == before


class TestSessions:
    def test_bounded_and_freed(self, engine: Engine, tmp_path: Path) -> None:
        now = [0.0]
        sessions = Sessions(
            lambda: Session(engine, Limits(), tmp_path), capacity=2, idle_seconds=10, clock=lambda: now[0]
        )
        first, second = sessions.get("a"), sessions.get("b")
        assert sessions.get("a") is first
        third = sessions.get("c")  # b was not used for longest
        assert not second.folder.exists()
        assert first.folder.exists()
        assert len(sessions) == 2
        now[0] = 11.0
        fourth = sessions.get("d")
        assert len(sessions) == 1
        assert not first.folder.exists()
        assert not third.folder.exists()
        sessions.drop("d")
        sessions.drop("d")
        assert not fourth.folder.exists()
        assert list(tmp_path.iterdir()) == []

    def test_a_page_in_use_is_not_put_away(self, engine: Engine, tmp_path: Path) -> None:
        now = [0.0]
        sessions = Sessions(
            lambda: Session(engine, Limits(), tmp_path), capacity=2, idle_seconds=10, clock=lambda: now[0]
        )
        first = sessions.get("a")
        for now[0] in (6.0, 12.0, 18.0):
            assert sessions.get("a") is first


class TestExample:
    def test_outline_covers_the_object(self) -> None:
        example = synthetic_example()
        assert len(example.queries) == 3
        source = SyntheticSource(seed=0, size=example.support.shape[0], images_per_class=4)
        image_id = next(one for one in source.ids("val") if np.array_equal(source.image(one), example.support))
        (class_id,) = (number for number, name in source.class_names.items() if name == example.name)
        mask = source.mask(image_id, class_id) == 1
        drawn = annotation_of(example.drawing, (mask.shape[0], mask.shape[1])) == 1
        assert (mask & drawn).sum() > 0.98 * (mask | drawn).sum()

    def test_outline_of_a_mask(self) -> None:
        mask = np.zeros((30, 40), np.uint8)
        mask[5:20, 10:30] = 1
        assert np.array_equal(annotation_of(outlined(mask), (30, 40)), mask)
