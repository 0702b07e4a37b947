"""Data sets with files that are damaged, odd or made to harm: one line that names the file, or what people see."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from episodes.episode_files import read_episodes
from episodes.labelled import LabelledImages
from episodes.protocols import read_protocol
from episodes.sampler import spec_from_json
from episodes.sources import CocoJsonSource, FolderSource, FssSource, LabelmeSource, SourceError, VocSource
from episodes.sources.label_maps import read_label_map
from episodes.types import DataError

SIDE = 32


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claimed(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG of some bytes that claims a size."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


_ZEROS = zlib.compress(bytes(100_000_000), 9)
BROKEN = {
    "empty": b"",
    "truncated PNG": encoded(noise(), "PNG")[:700],
    "truncated JPEG": encoded(noise(), "JPEG")[:300],
    "text": b"no picture at all\n",
    "EPS, which Pillow would hand to another program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "a PNG of 100000 x 100000": claimed(100_000, 100_000),
    "a PNG without rows": claimed(0, 0),
    "a profile that unpacks to 100 MB": claimed(SIDE, SIDE, chunk(b"iCCP", b"x\0\0" + _ZEROS)),
    "a comment that unpacks to 100 MB": claimed(SIDE, SIDE, chunk(b"zTXt", b"Comment\0\0" + _ZEROS)),
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """images/a.png with a mask, in a folder whose name is odd enough."""
    root = tmp_path / "my data é"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    noise().save(root / "images" / "a.png")
    Image.fromarray(np.eye(SIDE, dtype=np.uint8)).save(root / "masks" / "a.png")
    return root


def refused(action: Callable[[], object], file: Path | str, match: str | None = None) -> None:
    with pytest.raises(DataError, match=match) as caught:
        action()
    assert str(file) in str(caught.value)
    assert str(caught.value).isprintable()


class TestPictures:
    @pytest.mark.parametrize("what", BROKEN)
    def test_a_broken_photo_and_mask(self, own: Path, what: str) -> None:
        photo, mask = own / "images" / "a.png", own / "masks" / "a.png"
        sound = photo.read_bytes()
        photo.write_bytes(BROKEN[what])
        refused(lambda: FolderSource(own).image("a"), photo, "photo cannot be decoded")
        photo.write_bytes(sound)
        mask.write_bytes(BROKEN[what])
        refused(lambda: FolderSource(own).mask("a", 1), mask, "mask cannot be decoded")

    @pytest.mark.parametrize("form", ["JPEG", "WEBP", "GIF", "BMP", "TIFF"])
    def test_a_mislabelled_photo_is_read_by_its_content(self, own: Path, form: str) -> None:
        (own / "images" / "a.png").write_bytes(encoded(noise(), form))
        assert FolderSource(own).image("a").shape == (SIDE, SIDE, 3)

    @pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP"])
    def test_of_an_animation_it_is_the_first_picture(self, own: Path, form: str) -> None:
        options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
        frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
        content = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50, **options)
        (own / "images" / "a.png").write_bytes(content)
        assert FolderSource(own).image("a")[0, 0].tolist() == [255, 0, 0]

    def test_a_palette_with_transparency(self, own: Path) -> None:
        picture = Image.fromarray(np.eye(SIDE, dtype=np.uint8))
        picture.putpalette(bytes([9, 9, 9, 200, 0, 0]))
        picture.save(own / "images" / "a.png", transparency=0)
        pixels = FolderSource(own).image("a")
        assert pixels[0, 1].tolist() == [255, 255, 255]
        assert pixels[0, 0].tolist() == [200, 0, 0]
        picture.save(own / "masks" / "a.png", transparency=0)
        assert np.array_equal(FolderSource(own).mask("a", 1), np.eye(SIDE))  # values, whatever they look like

    def test_odd_metadata_is_no_reason_to_refuse(self, own: Path) -> None:
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", "x" * 100_000, zip=True)
        noise().save(own / "images" / "a.png", pnginfo=text)
        assert FolderSource(own).image("a").shape == (SIDE, SIDE, 3)

    def test_grey_labels_of_two_bits_are_refused(self, tmp_path: Path) -> None:
        """Pillow spreads them: class 3 would be read as 255, ignored."""
        rows = b"".join(b"\0" + bytes([0b00011011]) * 2 for _ in range(8))
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 2, 0, 0, 0, 0))
        parts = head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
        refused(lambda: read_label_map(tmp_path / "m.png"), tmp_path / "m.png", "fewer than 8 bits")


def test_a_class_number_of_thousands_of_digits(own: Path) -> None:
    (own / "classes.txt").write_text(f"1 cat\n{'9' * 5000} dog\n")
    refused(lambda: FolderSource(own), own / "classes.txt", "line 2 has no number")


class TestPlaces:
    @pytest.mark.parametrize("name", ["with space", "über", "a\nb", os.fsdecode(b"\xff")])
    def test_odd_names_are_names(self, own: Path, name: str) -> None:
        for folder in ("images", "masks"):
            (own / folder / "a.png").rename(own / folder / f"{name}.png")
        source = FolderSource(own)
        assert source.ids("all") == (name,)
        assert source.mask(name, 1).shape == (SIDE, SIDE)
        (own / "images" / f"{name}.png").write_bytes(b"")
        with pytest.raises(SourceError, match="cannot be decoded") as caught:
            source.image(name)
        assert str(caught.value).isprintable()

    def test_a_pipe_is_no_photo(self, own: Path) -> None:
        (own / "images" / "a.png").unlink()
        os.mkfifo(own / "images" / "a.png")
        assert FolderSource(own).ids("all") == ()

    def test_links_in_circles_are_no_photos(self, own: Path) -> None:
        (own / "images" / "loop.png").symlink_to(own / "images" / "loop.png")
        (own / "masks" / "again").symlink_to(own)
        (own / "masks" / "a.png").unlink()
        assert FolderSource(own).ids("all") == ("a",)
        loop = own.parent / "loop"
        loop.symlink_to(loop)
        refused(lambda: FolderSource(loop), loop)
        refused(lambda: VocSource(loop), loop)
        refused(lambda: CocoJsonSource(loop), loop)
        refused(lambda: LabelmeSource(loop), loop)
        refused(lambda: FssSource(loop), loop)

    @pytest.mark.parametrize("name", ["pipe", "folder", "device"])
    def test_lists_that_are_no_files(self, own: Path, name: str) -> None:
        path = own / "splits" / "val.txt"
        path.parent.mkdir()
        {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda place: place.symlink_to("/dev/zero")}[name](path)
        refused(lambda: FolderSource(own).ids("val"), path, "not a readable text file")

    @pytest.mark.parametrize("read", [read_episodes, read_protocol])
    def test_files_that_are_pipes(self, tmp_path: Path, read: Callable[[Path], object]) -> None:
        os.mkfifo(tmp_path / "pipe")
        refused(lambda: read(tmp_path / "pipe"), tmp_path / "pipe", "named pipe")

    @pytest.mark.parametrize("name", ["../../secret", "a/../../secret", "/etc/passwd", "x\0y"])
    def test_ids_of_a_list_that_lead_out_of_the_data(self, tiny_voc: Path, name: str) -> None:
        path = tiny_voc / "ImageSets" / "Segmentation" / "val.txt"
        path.write_text(f"{name}\n")
        refused(lambda: VocSource(tiny_voc).ids("val"), path, "leads out of the data set")

    @pytest.mark.parametrize("name", ["a" * 400, "x\0y", "\ud800"])
    def test_ids_that_no_file_has(self, tiny_voc: Path, name: str) -> None:
        source = VocSource(tiny_voc)
        for read in (source.image, source.class_masks, lambda one: source.fingerprint([one])):
            with pytest.raises(SourceError) as caught:
                read(name)
            assert str(caught.value).isprintable()

    def test_photos_outside_their_folder(self, tmp_path: Path) -> None:
        refused(lambda: LabelledImages(name="x", root=tmp_path, files=("../a.jpg",), labels=("a",)), "../a.jpg")


def coco(**changed: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": SIDE, "height": SIDE}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]}],
        **changed,
    }


def with_annotation(**changed: Any) -> dict[str, Any]:
    return coco(annotations=[coco()["annotations"][0] | changed])


def with_image(**changed: Any) -> dict[str, Any]:
    return coco(images=[coco()["images"][0] | changed])


DEEP = "[" * 960 + "]" * 960
WRONG: dict[str, Any] = {
    "NaN": with_annotation(segmentation=[[1, 1, 9, 1, 9, float("nan")]]),
    "infinity": with_annotation(segmentation=[[1, 1, 9, 1, 9, float("inf")]]),
    "a number without end": with_annotation(segmentation=[[1, 1, 9, 1, 9, 10**400]]),
    "a size without end": with_image(width=10**400, height=10**400),
    "a size of 1e308": with_image(width=1e308, height=1e308),
    "a size that no photo has": with_image(width=100_000, height=100_000),
    "ids twice": coco(images=coco()["images"] * 2),
    "names twice": coco(images=[coco()["images"][0], coco()["images"][0] | {"id": 2}]),
    "texts for numbers": with_annotation(category_id="1"),
    "an object for a list": coco(images={}),
    "null": coco(annotations=None),
    "a name outside": with_image(file_name="../../etc/passwd.png"),
    "a name with NUL": with_image(file_name="a\0.png"),
    "half a character": with_image(file_name="\ud800.png"),
    "deep in an id": with_annotation(category_id="DEEP"),
    "deep in an outline": with_annotation(segmentation="DEEP"),
    "deep in a box": with_annotation(segmentation=[], bbox="DEEP"),
    "an outline across the photo, over and over": with_annotation(
        segmentation=[[0, 0, *(n // 2 % 2 * SIDE * 4 for n in range(100_000))]]
    ),
}


@pytest.fixture
def coco_json(tmp_path: Path) -> Path:
    noise().save(tmp_path / "a.png")
    return tmp_path / "annotations.json"


class TestJson:
    def read(self, path: Path) -> None:
        source = CocoJsonSource(path)
        for image_id in source.ids("all"):
            source.class_masks(image_id)
            source.mask(image_id, 1)
            source.annotation(image_id, 1, "box")

    def test_the_sound_one(self, coco_json: Path) -> None:
        coco_json.write_text(json.dumps(coco()))
        self.read(coco_json)

    @pytest.mark.parametrize("what", WRONG)
    def test_wrong_values(self, coco_json: Path, what: str) -> None:
        coco_json.write_text(json.dumps(WRONG[what]).replace('"DEEP"', DEEP))
        refused(lambda: self.read(coco_json), coco_json)

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[]", b"nul", b"\xff\xfe\x00", b"[" * 100_000, b'{"images": 1e999}']
    )
    def test_no_such_json(self, coco_json: Path, content: bytes) -> None:
        coco_json.write_bytes(content)
        refused(lambda: self.read(coco_json), coco_json)
        refused(lambda: read_episodes(coco_json), coco_json)

    def test_many_classes_on_a_photo_that_claims_to_be_huge(self, coco_json: Path) -> None:
        """A few kilobytes would ask for 20 GB of masks."""
        one = coco()["annotations"][0]
        coco_json.write_text(
            json.dumps(
                with_image(width=13_000, height=13_000)
                | {"categories": [{"id": n, "name": f"c{n}"} for n in range(1, 121)]}
                | {"annotations": [one | {"id": n, "category_id": n} for n in range(1, 121)]}
            )
        )
        source = CocoJsonSource(coco_json)
        refused(
            lambda: source.class_masks("a"), coco_json, "shows 120 classes, whose masks would take more than 2.1 GB"
        )

    @pytest.mark.parametrize(
        "text", [DEEP, "[" * 100_000, '{"class_id": 1e999, "support_ids": [], "query_id": 1, "seed": 1}']
    )
    def test_an_episode_line(self, text: str) -> None:
        with pytest.raises(DataError, match="not an episode"):
            spec_from_json(text)

    def test_what_is_no_photo_inside_labelme_json(self, tmp_path: Path) -> None:
        document = {"shapes": [{"label": "cat", "points": [[1, 1], [9, 1], [9, 9]], "shape_type": "polygon"}],
                    "imagePath": "gone.jpg"}  # fmt: skip
        photo = encoded(noise(), "JPEG")
        for wrong in (5, "!!!", [photo.hex()], base64.b64encode(photo[:200]).decode()):
            (tmp_path / "a.json").write_text(json.dumps(document | {"imageData": wrong}))
            refused(lambda: LabelmeSource(tmp_path).image("a"), tmp_path, "imageData is no picture")
