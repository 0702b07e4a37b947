"""MATLAB files: the same as SciPy reads, and a ValueError for everything else."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from episodes.matlab_files import read_matlab

ROOM = 10_000_000


def write(path: Path, variables: dict[str, Any], *, compressed: bool = True) -> Path:
    savemat(path, variables, do_compression=compressed)
    return path


@pytest.mark.parametrize("compressed", [False, True])
class TestAsScipy:
    @pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
    @pytest.mark.parametrize("shape", [(1, 1), (3, 5), (0, 4), (2, 3, 4)])
    def test_numbers(self, tmp_path: Path, compressed: bool, kind: str, shape: tuple[int, ...]) -> None:
        values = (np.random.default_rng(0).random(shape) * 100).astype(kind)
        path = write(tmp_path / "a.mat", {"x": values, "longer_name_than_eight": values}, compressed=compressed)
        found, expected = read_matlab(path, most_bytes=ROOM), loadmat(path)
        for name in ("x", "longer_name_than_eight"):
            np.testing.assert_array_equal(found[name], expected[name])
            assert found[name].dtype == expected[name].dtype

    def test_texts_cells_and_structs(self, tmp_path: Path, compressed: bool) -> None:
        cells = np.empty((1, 3), dtype=object)
        cells[0] = ["one", np.arange(4), "drei é"]
        rows = np.array([("a/b.jpg", 3), ("c.jpg", 4)], dtype=[("path", object), ("class", object)])
        path = write(
            tmp_path / "a.mat",
            {"cells": cells, "rows": rows, "one": {"Segmentation": np.eye(3, dtype=np.uint8)}, "text": "hallo"},
            compressed=compressed,
        )
        found = read_matlab(path, most_bytes=ROOM)
        assert found["text"] == "hallo"
        assert found["cells"][0] == "one"
        assert found["cells"][2] == "drei é"
        np.testing.assert_array_equal(found["cells"][1], np.arange(4)[None])
        assert found["rows"]["path"] == ["a/b.jpg", "c.jpg"]
        assert [int(one.item()) for one in found["rows"]["class"]] == [3, 4]
        np.testing.assert_array_equal(found["one"]["Segmentation"][0], np.eye(3))

    def test_the_other_byte_order(self, tmp_path: Path, compressed: bool) -> None:
        # SciPy writes little-endian only: a big-endian file by hand
        def part(kind: int, data: bytes) -> bytes:
            return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)

        inside = part(6, struct.pack(">II", 11, 0)) + part(5, struct.pack(">ii", 1, 2)) + part(1, b"x")
        matrix = part(14, inside + part(4, struct.pack(">HH", 7, 300)))
        body = part(15, zlib.compress(matrix)) if compressed else matrix
        path = tmp_path / "big.mat"
        path.write_bytes(b" " * 124 + b"\x01\x00MI" + body)
        assert read_matlab(path, most_bytes=ROOM)["x"].tolist() == [[7, 300]]


class TestHostile:
    def test_a_bomb(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.mat", {"x": np.zeros((1000, 1000))})
        assert path.stat().st_size < 20_000
        with pytest.raises(ValueError, match="unpacks to more than such a file holds"):
            read_matlab(path, most_bytes=1_000_000)

    @pytest.mark.parametrize("content", [b"", b"MATLAB", bytes(128), bytes(1000)])
    def test_no_such_file(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.mat").write_bytes(content)
        with pytest.raises(ValueError, match="not of version 5"):
            read_matlab(tmp_path / "a.mat", most_bytes=ROOM)

    def test_every_changed_byte_is_a_result_or_a_value_error(self, tmp_path: Path) -> None:
        """SciPy ends the process on some of these."""
        rows = np.array([("a/b.jpg", 3), ("c.jpg", 4)], dtype=[("path", object), ("class", object)])
        buffer = io.BytesIO()
        savemat(buffer, {"rows": rows, "x": np.eye(3, dtype=np.uint8)})
        content, chance, path = buffer.getvalue(), random.Random(0), tmp_path / "a.mat"
        refused = 0
        for place in range(len(content)):
            for value in (0, 1, 255, chance.randrange(256)):
                path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
                try:
                    read_matlab(path, most_bytes=ROOM)
                except ValueError:
                    refused += 1
        assert refused > len(content)

    def test_cut_anywhere(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.mat", {"x": np.arange(100), "y": "text"})
        content = path.read_bytes()
        for length in range(0, len(content), 3):
            path.write_bytes(content[:length])
            try:
                found = read_matlab(path, most_bytes=ROOM)
            except ValueError:
                continue
            assert found.keys() <= {"x", "y"}
