"""Archives that are hostile, damaged, or just as they should be."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import stat
import tarfile
import zipfile
from collections import namedtuple
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from episodes.prepare.extraction import extract
from episodes.prepare.part import Part
from episodes.prepare.records import read_record
from episodes.types import DataError

FILES = {"data/a.txt": b"alpha", "data/deep/b.txt": b"beta", "data/empty": b"", "other/c.txt": b"gamma"}
LIMIT = 1_000_000


def write_tar(path: Path, files: Mapping[str, bytes], *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in members:
            archive.addfile(member)
    return path


def write_zip(path: Path, files: Mapping[str, bytes], *members: zipfile.ZipInfo) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for member in members:
            archive.writestr(member, "target")
    return path


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


def special(name: str, mode: int) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.external_attr = (mode | 0o644) << 16
    return member


def unpack(path: Path, folder: Path, *, wanted: tuple[str, ...] = ("data",), limit: int = LIMIT) -> dict[str, bytes]:
    extract(path, folder, wanted=wanted, limit=limit, show_progress=False)
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
    }


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.zip", "A.ZIP"])
def test_what_is_wanted_comes_out(tmp_path: Path, name: str) -> None:
    write = write_zip if name.lower().endswith("zip") else write_tar
    path = write(tmp_path / name, FILES)
    assert unpack(path, tmp_path / "out") == {name: content for name, content in FILES.items() if "data" in name}
    assert unpack(path, tmp_path / "one", wanted=("data/deep/b.txt", "other")) == {
        "data/deep/b.txt": b"beta",
        "other/c.txt": b"gamma",
    }


def test_names_with_a_leading_dot_folder(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"./{name}": content for name, content in FILES.items()})
    assert unpack(path, tmp_path / "out")["data/a.txt"] == b"alpha"


ESCAPES = {
    "../evil.txt": "leaves the target folder",
    "data/../../evil.txt": "leaves the target folder",
    "data\\..\\..\\evil.txt": "leaves the target folder",
    "/tmp/evil.txt": "has an absolute path",
    "\\evil.txt": "has an absolute path",
    "C:/evil.txt": "has an absolute path",
    "C:evil.txt": "has an absolute path",
}


@pytest.mark.parametrize("write", [write_tar, write_zip])
@pytest.mark.parametrize(("name", "why"), ESCAPES.items())
def test_no_member_leaves_the_folder(
    tmp_path: Path, write: Callable[[Path, Mapping[str, bytes]], Path], name: str, why: str
) -> None:
    path = write(tmp_path / ("a.tar" if write is write_tar else "a.zip"), {name: b"evil"})
    with pytest.raises(DataError, match=why) as caught:
        unpack(path, tmp_path / "deep" / "out")
    assert str(caught.value).startswith(f"{path}: refused, member {name!r}")
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("to", ["/etc/passwd", "../../secret", "../secret"])
def test_no_link_points_outside(tmp_path: Path, kind: bytes, to: str) -> None:
    (tmp_path / "secret").write_text("secret")
    name = "data/l" if to.startswith("../../") else "l"
    path = write_tar(tmp_path / "a.tar", {"data/a.txt": b"alpha"}, link(name, to, kind))
    with pytest.raises(DataError, match=rf"member '{name}' is a link that leaves the target folder"):
        unpack(path, tmp_path / "out", wanted=("data", "l"))
    assert not (tmp_path / "out" / name).exists()


def test_inner_symbolic_links_are_left_out_and_nothing_is_written_through_them(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(link("data/inner", "deep"))
        member = tarfile.TarInfo("data/inner/b.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"beta"))
    assert unpack(path, tmp_path / "out") == {"data/inner/b.txt": b"beta"}
    assert not any(entry.is_symlink() for entry in (tmp_path / "out").rglob("*"))


def test_inner_hard_links_are_files(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"data/a.txt": b"alpha"}, link("data/same.txt", "data/a.txt", tarfile.LNKTYPE))
    assert unpack(path, tmp_path / "out") == {"data/a.txt": b"alpha", "data/same.txt": b"alpha"}


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_no_device(tmp_path: Path, kind: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", {}, link("data/device", "", kind))
    with pytest.raises(DataError, match="member 'data/device' is a special file"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("mode", "why"), [(stat.S_IFLNK, "is a link"), (stat.S_IFIFO, "is a special"), (stat.S_IFCHR, "is a special")]
)
def test_no_link_or_device_in_a_zip(tmp_path: Path, mode: int, why: str) -> None:
    path = write_zip(tmp_path / "a.zip", FILES, special("data/odd", mode))
    with pytest.raises(DataError, match=f"member 'data/odd' {why}"):
        unpack(path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_huge_declared_size_in_a_tar(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    member = tarfile.TarInfo("data/huge")
    member.size = 10**15
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(DataError, match=r"'data/huge' brings the contents above 0\.0 GB"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out" / "data").exists()


def test_a_zip_bomb(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"data/zeros": bytes(2 * LIMIT)})
    assert path.stat().st_size < LIMIT / 100
    with pytest.raises(DataError, match="'data/zeros' brings the contents above"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out" / "data").exists()


def test_a_zip_that_declares_less_than_it_holds(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"data/zeros": bytes(2 * LIMIT)})
    content = path.read_bytes()
    true_size, small = (2 * LIMIT).to_bytes(4, "little"), (1000).to_bytes(4, "little")
    assert content.count(true_size) == 2
    path.write_bytes(content.replace(true_size, small))
    with pytest.raises(DataError, match="not a sound archive"):
        unpack(path, tmp_path / "out")
    assert sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file()) <= 1000


def test_many_empty_members(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {f"data/{n}": b"" for n in range(200)})
    with pytest.raises(DataError, match="brings the contents above"):
        unpack(path, tmp_path / "out", limit=100 * 512)


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_a_name_that_is_there_twice(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.zip":
        with pytest.warns(UserWarning, match="Duplicate name"):
            write_zip(path, {"data/a.txt": b"alpha"}, zipfile.ZipInfo("data/a.txt"))
    else:
        write_tar(path, {"data/a.txt": b"alpha", "./data/a.txt": b"beta"})
    with pytest.raises(DataError, match=r"data/a.txt' is there twice"):
        unpack(path, tmp_path / "out")


def test_not_enough_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    path = write_zip(tmp_path / "a.zip", {"data/zeros": bytes(2000)})
    with pytest.raises(DataError, match=r"unpacking needs more than the 0\.0 GB that are free; make space"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("name", ["a.tar", "a.tgz", "a.zip"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_a_truncated_archive(tmp_path: Path, name: str, share: float) -> None:
    write = write_zip if name.endswith("zip") else write_tar
    noise = np.random.default_rng(0).bytes(100_000)
    path = write(tmp_path / name, {"data/a.txt": noise, "data/b.txt": noise[::-1]})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match="not a sound archive") as caught:
        unpack(path, tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.tar", "a.tgz", "a.zip"])
def test_not_an_archive_at_all(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("<html>Quota exceeded</html>" * 100)
    with pytest.raises(DataError, match=r"not a sound archive .*; fetch it again"):
        unpack(path, tmp_path / "out")


def test_damage_inside_a_zip(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(100_000)
    path = write_zip(tmp_path / "a.zip", {"data/a.txt": noise})
    content = bytearray(path.read_bytes())
    content[50_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a sound archive"):
        unpack(path, tmp_path / "out")


def test_an_encrypted_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"data/a.txt": b"alpha"})
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"not a sound archive .*password"):
        unpack(path, tmp_path / "out")


def test_a_missing_archive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot unpack: No such file"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


class TestBombsOfTheFormat:
    """What a tar may say of itself, and takes memory, disk or time before any member's size is known."""

    def test_a_header_that_unpacks_to_a_gigabyte(self, tmp_path: Path) -> None:
        header = tarfile.TarInfo("pax")
        header.type, header.size = tarfile.XHDTYPE, 10**9
        path = tmp_path / "a.tgz"
        with gzip.open(path, "wb") as file:
            file.write(header.tobuf(tarfile.USTAR_FORMAT))
            file.write(bytes(10**7))
        with pytest.raises(DataError, match="a header of 1000000000 bytes"):
            unpack(path, tmp_path / "out")

    def test_links_to_a_large_member_that_is_not_wanted(self, tmp_path: Path) -> None:
        """Each would be another copy of it, and none counts."""
        links = [link(f"data/{n}", "other/c.txt", tarfile.LNKTYPE) for n in range(100)]
        path = write_tar(tmp_path / "a.tar", FILES, *links)
        with pytest.raises(DataError, match="'data/0' is a link to a file that is not unpacked"):
            unpack(path, tmp_path / "out")

    @pytest.mark.parametrize("size", ["-512", "-100000", "9" * 30, "no number"])
    def test_sizes_that_are_none(self, tmp_path: Path, size: str) -> None:
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            member = tarfile.TarInfo("data/folder")
            member.type, member.pax_headers = tarfile.DIRTYPE, {"size": size}
            archive.addfile(member)
        with contextlib.suppress(DataError):  # Python's versions differ in what they make of it; none goes on for ever
            assert unpack(path, tmp_path / "out") == {}

    @pytest.mark.parametrize("suffix", [".tar.xz", ".tar.bz2", ".tgz"])
    @pytest.mark.parametrize("kept", [0.3, 0.9])
    def test_damaged_inside(self, tmp_path: Path, suffix: str, kept: float) -> None:
        path = tmp_path / f"a{suffix}"
        mode = {".tar.xz": "w:xz", ".tar.bz2": "w:bz2", ".tgz": "w:gz"}[suffix]
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
            member = tarfile.TarInfo("data/noise")
            member.size = 300_000
            archive.addfile(member, io.BytesIO(np.random.default_rng(0).bytes(300_000)))
        assert unpack(path, tmp_path / "sound").keys() == {"data/noise"}
        content = bytearray(path.read_bytes())
        place = int(kept * len(content))
        content[place : place + 50] = bytes(50)
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a sound archive"):
            unpack(path, tmp_path / "out")

    def test_a_damaged_member_of_a_zip_by_lzma(self, tmp_path: Path) -> None:
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
            archive.writestr("data/noise", np.random.default_rng(0).bytes(10_000))
        content = bytearray(path.read_bytes())
        content[60:200] = bytes(140)
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a sound archive"):
            unpack(path, tmp_path / "out")

    @pytest.mark.parametrize("name", ["a.zip", "a.tar"])
    def test_a_pipe(self, tmp_path: Path, name: str) -> None:
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="named pipe"):
            unpack(tmp_path / name, tmp_path / "out")


class TestRecords:
    @pytest.mark.parametrize(
        "record", ["[" * 100_000, "{}", '{"archives": 3}',
                   '{"archives": {"a": {"complete": 1, "sha256": 2, "folders": {}}}}',
                   '{"archives": {"a": {"complete": true, "sha256": "", "folders": {"../..": [1, 2]}}}}']
    )  # fmt: skip
    def test_a_record_that_is_none(self, tmp_path: Path, record: str) -> None:
        (tmp_path / "prepared.json").write_text(record)
        with pytest.raises(DataError, match="is not a record of `data prepare`"):
            read_record(tmp_path)

    @pytest.mark.parametrize(
        "record", ["[" * 100_000, '{"validator": "a\\r\\nHost: evil", "total": 3}', '{"validator": 5, "total": 3}',
                   '{"validator": "a", "total": -1}', '{"validator": "a", "total": "3"}',
                   '{"validator": "\\u00e9", "total": 3}']
    )  # fmt: skip
    def test_a_part_that_is_none_is_fetched_anew(self, tmp_path: Path, record: str) -> None:
        """What is recorded of a broken download becomes a header of the next request."""
        (tmp_path / "a.zip.part.json").write_text(record)
        assert Part(tmp_path, "a.zip").origin() is None
