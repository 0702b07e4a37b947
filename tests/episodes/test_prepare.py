"""`prepare`: official layouts in tiny, from archives on disk and over HTTP; interrupted, repeated, damaged."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import shutil
import tarfile
import threading
import zipfile
from collections import namedtuple
from collections.abc import Iterator, Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from episodes.prepare import (
    DATA_SETS,
    Archive,
    CocoYear,
    DataSet,
    Patience,
    PreparedDataSet,
    archives_of,
    preparation,
    prepare,
)
from episodes.types import DataError

QUICK = Patience(attempts=2, timeout=60.0, pause=0.0)


def picture(suffix: str) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 4), 1).save(stream, suffix)
    return stream.getvalue()


VOC = {
    "VOCdevkit/VOC2012/JPEGImages/2007_1.jpg": picture("JPEG"),
    "VOCdevkit/VOC2012/SegmentationClass/2007_1.png": picture("PNG"),
    "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt": b"2007_1\n",
}
SBD = {
    "benchmark_RELEASE/dataset/cls/2008_1.mat": b"mat",
    "benchmark_RELEASE/dataset/train.txt": b"2008_1\n",
    "benchmark_RELEASE/README": b"read me",
}
COCO: dict[str, dict[str, bytes]] = {
    "annotations_trainval2017.zip": {
        "annotations/instances_train2017.json": b"{}",
        "annotations/instances_val2017.json": b"{} ",
        "annotations/captions_val2017.json": b"not needed",
    },
    "val2017.zip": {"val2017/1.jpg": picture("JPEG")},
    "train2017.zip": {"train2017/2.jpg": picture("JPEG"), "train2017/3.jpg": picture("JPEG")},
}
FSS = {
    f"fewshot_data/fewshot_data/{name}/{number}.{suffix}": picture("JPEG" if suffix == "jpg" else "PNG")
    for name in ("abacus", "zucchini")
    for number in (1, 2)
    for suffix in ("jpg", "png")
} | {"__MACOSX/fewshot_data/._x": b"dross"}

CONTENTS: dict[str, Mapping[str, bytes]] = {
    "VOCtrainval_11-May-2012.tar": VOC,
    "benchmark.tgz": SBD,
    "fewshot_data.zip": FSS,
    **COCO,
    **{
        name.replace("2017", "2014"): {inner.replace("2017", "2014"): content for inner, content in files.items()}
        for name, files in COCO.items()
    },
}


def write_archive(path: Path, files: Mapping[str, bytes]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all archives in tiny, and a table that holds their sizes and digests instead of the official."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for name, files in CONTENTS.items():
        write_archive(folder / name, files)

    def tiny(data_set: DataSet, *, year: CocoYear = 2017, with_sbd: bool = True) -> tuple[Archive, ...]:
        found = []
        for archive in archives_of(data_set, year=year, with_sbd=with_sbd):
            content = (folder / archive.name).read_bytes() if (folder / archive.name).exists() else b""
            md5, sha256 = hashlib.md5(content).hexdigest(), hashlib.sha256(content).hexdigest()
            tiny_facts = {"size": len(content), "md5": md5, "sha256": sha256} if archive.is_vouched_for else {}
            found.append(dataclasses.replace(archive, unpacked=100_000, **tiny_facts))
        return tuple(found)

    monkeypatch.setattr(preparation, "archives_of", tiny)
    return folder


@pytest.fixture
def mirror(shelf: Path) -> Iterator[tuple[str, list[str]]]:
    """Address of the shelf over HTTP, and the paths asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(shelf)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def files_below(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_voc_with_sbd_from_archives(tmp_path: Path, shelf: Path) -> None:
    target = tmp_path / "my data"
    done = prepare("voc", target, archives=shelf)
    assert files_below(target) == {*VOC, *SBD, "prepared.json"}
    assert done == PreparedDataSet(
        data_set="voc",
        root=target / "VOCdevkit" / "VOC2012",
        sbd=target / "benchmark_RELEASE" / "dataset",
        steps=("VOCtrainval_11-May-2012.tar: unpacked", "benchmark.tgz: unpacked"),
        changed=True,
    )
    assert done.next_command == (
        f"fewshot-seg data verify --data voc --root '{target}/VOCdevkit/VOC2012' "
        f"--sbd '{target}/benchmark_RELEASE/dataset'"
    )
    assert len(list(shelf.iterdir())) == len(CONTENTS)  # archives of one's own stay


def test_voc_alone(tmp_path: Path, shelf: Path) -> None:
    done = prepare("voc", tmp_path / "data", archives=shelf, with_sbd=False)
    assert files_below(tmp_path / "data") == {*VOC, "prepared.json"}
    assert done.sbd is None
    assert "--sbd" not in done.next_command


@pytest.mark.parametrize("year", get_args(CocoYear))
def test_coco_has_its_instances_only(tmp_path: Path, shelf: Path, year: CocoYear) -> None:
    done = prepare("coco", tmp_path / "data", archives=shelf, year=year)
    wanted = {name.replace("2017", str(year)) for files in COCO.values() for name in files if "captions" not in name}
    assert files_below(tmp_path / "data") == {*wanted, "prepared.json"}
    assert done.root == tmp_path / "data"


def test_both_years_of_coco_share_a_target(tmp_path: Path, shelf: Path) -> None:
    prepare("coco", tmp_path, archives=shelf, year=2014)
    prepare("coco", tmp_path, archives=shelf, year=2017)
    assert {file.name for file in (tmp_path / "annotations").iterdir()} == {
        f"instances_{split}{year}.json" for split in ("train", "val") for year in (2014, 2017)
    }
    assert not prepare("coco", tmp_path, archives=shelf, year=2014).changed


def test_fss_finds_its_root(tmp_path: Path, shelf: Path) -> None:
    done = prepare("fss", tmp_path / "data", archives=shelf)
    assert done.root == tmp_path / "data" / "fewshot_data" / "fewshot_data"
    assert files_below(tmp_path / "data") == {*(name for name in FSS if "MACOSX" not in name), "prepared.json"}


def test_fss_without_the_inner_folder(tmp_path: Path, shelf: Path) -> None:
    write_archive(shelf / "fewshot_data.zip", {"fewshot_data/abacus/1.jpg": b"", "fewshot_data/abacus/1.png": b""})
    assert prepare("fss", tmp_path / "data", archives=shelf).root == tmp_path / "data" / "fewshot_data"


def test_downloaded_archives_are_deleted_or_kept(tmp_path: Path, mirror: tuple[str, list[str]]) -> None:
    address, _ = mirror
    prepare("voc", tmp_path / "one", mirror=address, patience=QUICK)
    assert files_below(tmp_path / "one") == {*VOC, *SBD, "prepared.json"}
    assert not (tmp_path / "one" / "downloads").exists()
    prepare("voc", tmp_path / "two", mirror=f"{address}/", patience=QUICK, keep_archives=True)
    kept = {"downloads/VOCtrainval_11-May-2012.tar", "downloads/benchmark.tgz"}
    assert files_below(tmp_path / "two") == {*VOC, *SBD, *kept, "prepared.json"}


def test_the_second_run_does_nothing(tmp_path: Path, mirror: tuple[str, list[str]]) -> None:
    address, asked = mirror
    first = prepare("fss", tmp_path / "data", mirror=address, patience=QUICK)
    assert (first.changed, len(asked)) == (True, 1)
    again = prepare("fss", tmp_path / "data", mirror=address, patience=QUICK)
    assert (again.changed, len(asked)) == (False, 1)
    assert again.steps == ("fewshot_data.zip: already there, nothing to do",)
    assert again.root == first.root


def test_progress_goes_to_stderr(
    tmp_path: Path, mirror: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    prepare("fss", tmp_path / "one", mirror=mirror[0], patience=QUICK)
    assert capsys.readouterr() == ("", "")
    prepare("fss", tmp_path / "two", mirror=mirror[0], patience=QUICK, show_progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    for bar in ("fewshot_data.zip: 100%", "check fewshot_data.zip.part: 100%", "unpack fewshot_data.zip: "):
        assert bar in printed.err


def test_files_of_ones_own_beside_the_data_are_no_damage(tmp_path: Path, shelf: Path) -> None:
    prepare("voc", tmp_path / "data", archives=shelf)
    own = tmp_path / "data" / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt"
    own.write_text("2007_1\n")
    assert not prepare("voc", tmp_path / "data", archives=shelf).changed
    assert own.exists()


@pytest.mark.parametrize("damage", ["delete", "cut", "folder"])
def test_damaged_data_are_mended(tmp_path: Path, shelf: Path, damage: str) -> None:
    target = tmp_path / "data"
    prepare("voc", target, archives=shelf)
    photo = target / "VOCdevkit/VOC2012/JPEGImages/2007_1.jpg"
    own = target / "VOCdevkit/VOC2012/own.txt"
    own.write_text("kept")
    if damage == "folder":
        shutil.rmtree(photo.parent)
    elif damage == "cut":
        photo.write_bytes(b"")
    else:
        photo.unlink()
    done = prepare("voc", target, archives=shelf)
    assert done.steps == ("VOCtrainval_11-May-2012.tar: mended", "benchmark.tgz: already there, nothing to do")
    assert photo.read_bytes() == picture("JPEG")
    assert own.read_text() == "kept"


def test_a_lost_file_of_one_year_is_noticed_beside_the_other_year(tmp_path: Path, shelf: Path) -> None:
    for year in get_args(CocoYear):
        prepare("coco", tmp_path, archives=shelf, year=year)
    (tmp_path / "annotations" / "instances_val2017.json").unlink()
    assert not prepare("coco", tmp_path, archives=shelf, year=2014).changed
    assert prepare("coco", tmp_path, archives=shelf).steps[0] == "annotations_trainval2017.zip: mended"
    assert (tmp_path / "annotations" / "instances_val2017.json").read_bytes() == b"{} "


def test_data_from_elsewhere_are_left_alone(tmp_path: Path, shelf: Path) -> None:
    mine = tmp_path / "data" / "VOCdevkit" / "VOC2012" / "JPEGImages"
    mine.mkdir(parents=True)
    with pytest.raises(DataError, match=r"VOC2012 is already there, but not from `data prepare`; use it as it is"):
        prepare("voc", tmp_path / "data", archives=shelf)
    assert files_below(tmp_path / "data") == set()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_while_unpacking_leaves_nothing(
    tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    target = tmp_path / "data"

    def stop(_: Path, folder: Path, **__: object) -> None:
        (folder / "VOCdevkit").mkdir(parents=True)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(preparation, "extract", stop)
        with pytest.raises(DataError if error is OSError else KeyboardInterrupt):
            prepare("voc", target, archives=shelf)
    assert list(target.iterdir()) == []
    assert prepare("voc", target, archives=shelf).changed


def test_a_killed_run_is_repeated(tmp_path: Path, shelf: Path) -> None:
    left = tmp_path / "data" / ".VOCtrainval_11-May-2012.tar.unpacking" / "VOCdevkit" / "VOC2012" / "half.txt"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    prepare("voc", tmp_path / "data", archives=shelf)
    assert files_below(tmp_path / "data") == {*VOC, *SBD, "prepared.json"}


def test_a_run_killed_before_it_cleared_up_leaves_nothing(tmp_path: Path, shelf: Path) -> None:
    target = tmp_path / "data"
    left = {".VOCtrainval_11-May-2012.tar.unpacking/half", "downloads/VOCtrainval_11-May-2012.tar"}
    prepare("voc", target, archives=shelf)
    record = json.loads((target / "prepared.json").read_text())
    record["archives"]["VOCtrainval_11-May-2012.tar"]["fetched"] = True
    (target / "prepared.json").write_text(json.dumps(record))
    for name in left:
        (target / name).parent.mkdir()
        (target / name).write_text("half")
    assert not prepare("voc", target, archives=shelf).changed
    assert files_below(target) == {*VOC, *SBD, "prepared.json"}
    (target / "downloads").mkdir()
    (target / "downloads" / "benchmark.tgz").write_text("kept by its owner")
    prepare("voc", target, archives=shelf)
    assert (target / "downloads" / "benchmark.tgz").exists()


def test_an_interruption_while_renaming_is_repeated(
    tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COCO's annotations are two files: the first is in place when the second is interrupted."""
    target, place = tmp_path / "data", preparation._place

    def stop(source: Path, destination: Path) -> None:
        if "val" in destination.name:
            raise KeyboardInterrupt
        place(source, destination)

    with monkeypatch.context() as patched:
        patched.setattr(preparation, "_place", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare("coco", target, archives=shelf)
    assert (target / "annotations" / "instances_train2017.json").exists()
    assert prepare("coco", target, archives=shelf).steps[0] == "annotations_trainval2017.zip: unpacked"


def test_an_archive_on_disk_that_is_not_the_official_one(tmp_path: Path, shelf: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shelf, other)
    content = bytearray((other / "benchmark.tgz").read_bytes())
    content[50] ^= 1
    (other / "benchmark.tgz").write_bytes(content)
    with pytest.raises(DataError, match=r"benchmark.tgz: not the official archive \(md5 .*, expected .*\); delete it"):
        prepare("voc", tmp_path / "data", archives=other)
    (other / "benchmark.tgz").write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"bytes, expected "):
        prepare("voc", tmp_path / "data", archives=other)


def test_archives_that_are_missing_are_named_with_their_address(tmp_path: Path, shelf: Path) -> None:
    (shelf / "benchmark.tgz").unlink()
    with pytest.raises(DataError, match=r"shelf lacks benchmark.tgz \(https://www2.eecs.berkeley.edu/.*leave out"):
        prepare("voc", tmp_path / "data", archives=shelf)
    assert files_below(tmp_path / "data") == set()
    (shelf / "fewshot_data.zip").unlink()
    with pytest.raises(DataError, match=r"lacks fewshot_data.zip \(https://drive.google.com/file/d/"):
        prepare("fss", tmp_path / "data", archives=shelf)


def test_an_archive_without_published_digest_is_compared_with_the_last_time(tmp_path: Path, shelf: Path) -> None:
    target = tmp_path / "data"
    prepare("fss", target, archives=shelf)
    entry = json.loads((target / "prepared.json").read_text())["archives"]["fewshot_data.zip"]
    assert entry["sha256"] == hashlib.sha256((shelf / "fewshot_data.zip").read_bytes()).hexdigest()
    assert "none published" in entry["vouched for by"]
    (target / "fewshot_data" / "fewshot_data" / "abacus" / "1.jpg").unlink()
    write_archive(shelf / "fewshot_data.zip", {**FSS, "fewshot_data/fewshot_data/new/1.jpg": b""})
    with pytest.raises(DataError, match=r"prepared.json recorded .* another archive than last time"):
        prepare("fss", target, archives=shelf)
    write_archive(shelf / "fewshot_data.zip", FSS)


def test_an_archive_with_another_layout(tmp_path: Path, shelf: Path) -> None:
    write_archive(shelf / "fewshot_data.zip", {"FSS-1000/abacus/1.jpg": b""})
    with pytest.raises(DataError, match="expected fewshot_data in it; it is another archive"):
        prepare("fss", tmp_path / "data", archives=shelf)
    assert list((tmp_path / "data").iterdir()) == []


def test_fss_without_photos(tmp_path: Path, shelf: Path) -> None:
    write_archive(shelf / "fewshot_data.zip", {"fewshot_data/readme.txt": b""})
    with pytest.raises(DataError, match=r"expected CLASS/1\.jpg in it"):
        prepare("fss", tmp_path / "data", archives=shelf)


@pytest.mark.parametrize("text", ["no json", "[]", '{"archives": []}', '{"archives": {"a": {}}}'])
def test_a_damaged_record(tmp_path: Path, shelf: Path, text: str) -> None:
    (tmp_path / "prepared.json").write_text(text)
    with pytest.raises(DataError, match=r"prepared.json is not a record of `data prepare`; move it"):
        prepare("fss", tmp_path, archives=shelf)


def set_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(int(1e15), 0, int(free)))


@pytest.mark.parametrize(
    ("data_set", "options", "gigabytes"),
    [
        # the archive in hand, its contents, and the contents of those before it
        ("voc", {}, 2.0 + 2.0 + 1.4),
        ("voc", {"keep_archives": True}, 2.0 + 2.0 + 2.0 + 1.4),
        ("voc", {"with_sbd": False}, 2.0 + 2.0),
        ("coco", {}, 0.9 + 0.8 + 19.3 + 19.3),
        ("coco", {"year": 2014}, 0.9 + 6.6 + 13.5 + 13.5),
    ],
)
def test_space_is_checked_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_set: DataSet, options: dict[str, object], gigabytes: float
) -> None:
    """With the official table: nothing is asked of the network, for the mirror does not exist."""
    set_free(monkeypatch, (gigabytes - 0.3) * 1e9)
    with pytest.raises(DataError, match=r"needs about .* GB, .* GB are free; make space") as caught:
        prepare(data_set, tmp_path, mirror="http://127.0.0.1:1", patience=QUICK, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    needed = float(str(caught.value).split("needs about ")[1].split(" GB")[0])
    assert needed == pytest.approx(gigabytes, abs=0.25)
    set_free(monkeypatch, (gigabytes + 0.3) * 1e9)
    with pytest.raises(DataError, match="cannot download"):
        prepare(data_set, tmp_path, mirror="http://127.0.0.1:1", patience=QUICK, **options)  # type: ignore[arg-type]


def test_archives_on_disk_need_space_for_their_contents_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "VOCtrainval_11-May-2012.tar").touch()
    set_free(monkeypatch, 1.9e9)
    with pytest.raises(DataError, match=r"needs about 2\.0 GB, 1\.9 GB are free"):
        prepare("voc", tmp_path / "data", archives=tmp_path, with_sbd=False)


def test_a_target_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(DataError, match=r"cannot make folder .*data: File exists"):
        prepare("fss", tmp_path / "data")


def test_odd_requests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set 'ade20k' to prepare; choose one of voc, coco, fss"):
        prepare("ade20k", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="COCO has no year 2015 here; choose one of 2014, 2017"):
        prepare("coco", tmp_path, year=2015)  # type: ignore[arg-type]


@pytest.mark.parametrize("data_set", DATA_SETS)
@pytest.mark.parametrize("year", get_args(CocoYear))
def test_the_table_is_whole(data_set: DataSet, year: CocoYear) -> None:
    for archive in archives_of(data_set, year=year):
        assert archive.addresses
        assert all(address.startswith(("http://", "https://")) for address in archive.addresses)
        assert archive.is_vouched_for or (archive.by_hand and archive.origin.startswith("none"))
        assert archive.md5 is None or len(archive.md5) == 32
        assert archive.sha256 is None or len(archive.sha256) == 64
        assert archive.unpacked < archive.limit


def test_every_digest_of_the_table_is_compared() -> None:
    archive = Archive(name="a.zip", addresses=(), places=(), unpacked=1, size=3, md5="m", sha256="s")
    assert archive.fault(3, {"md5": "m", "sha256": "s"}) is None
    assert archive.fault(4, {"md5": "m", "sha256": "s"}) == "4 bytes, expected 3"
    assert archive.fault(3, {"md5": "x", "sha256": "s"}) == "md5 x, expected m"
    assert archive.fault(3, {"md5": "m", "sha256": "x"}) == "sha256 x, expected s"
