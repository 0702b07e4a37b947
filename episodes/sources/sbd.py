"""The Semantic Boundaries Dataset (SBD): more masks for VOC's photos, as MATLAB files.

Hariharan et al., Semantic Contours from Inverse Detectors, ICCV 2011. The archive unpacks to
``benchmark_RELEASE/dataset`` with ``img/ID.jpg``, ``cls/ID.mat`` (masks by class), ``inst/ID.mat`` (by object),
``train.txt`` and ``val.txt``. These lists divide the photos otherwise than VOC does: some of VOC's validation
photos are in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from episodes.matlab_files import read_matlab
from episodes.sources.decoding import missing_file, reason_of
from episodes.sources.errors import SourceError
from episodes.types import DataError, UInt8Array

_MOST_BYTES = 200_000_000  # SBD's labels have half a megapixel: a few hundred kB


def find_sbd(root: Path) -> Path:
    """The folder ``dataset`` of SBD, which may lie in ``benchmark_RELEASE``. Raises DataError when it is not there."""
    for candidate in (root, root / "dataset", root / "benchmark_RELEASE" / "dataset"):
        if (candidate / "cls").is_dir():
            return candidate
    came = "exists but has no such folder" if root.is_dir() else "does not exist"
    raise DataError(
        f"{root}: expected SBD's folder dataset with cls/, train.txt and val.txt (there, in dataset/ or in "
        f"benchmark_RELEASE/dataset/), but it {came}; name the folder benchmark_RELEASE"
    )


def read_sbd_labels(path: Path) -> UInt8Array:
    """Labels of ``cls/ID.mat``, its ``GTcls.Segmentation``: uint8 (H, W), 0 background, 1..20 VOC's classes.

    Raises:
        SourceError: missing or damaged file, or a MATLAB file of another kind.
    """
    try:
        content = read_matlab(path, most_bytes=_MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise missing_file(path) from None
    except (OSError, ValueError) as error:
        raise SourceError(
            path,
            "undecodable",
            f"not a readable MATLAB file ({reason_of(error)})",
            "unpack it from SBD's archive again",
        ) from None
    return _segmentation(content, path)


def _segmentation(content: dict[str, Any], path: Path) -> UInt8Array:
    try:
        labels = np.asarray(content["GTcls"]["Segmentation"][0])
    except (KeyError, IndexError, ValueError, TypeError):
        labels = np.zeros(0, dtype=np.float64)
    whole = labels.ndim == 2 and labels.size > 0 and labels.dtype.kind in "uif"
    if not whole or labels.min() < 0 or labels.max() > 255 or (labels != np.floor(labels)).any():
        raise SourceError(
            path,
            "undecodable",
            "expected a struct GTcls with a label matrix Segmentation, found none",
            "name SBD's folder, whose cls/ holds masks by class (inst/ is another annotation)",
        )
    return labels.astype(np.uint8)
