"""The episodes of an evaluation as a file, so that two programs can be compared on the same ones.

The file is one JSON object, UTF-8::

    {
     "format": 1,
     "protocol": "hsnet",            name of the protocol
     "data": "voc",                  name of the data set
     "fold": 0,                      the test fold, or null for data without folds
     "shots": 1,                     supports of every episode
     "ways": 1,                      N: so many episodes one after another share a query and compete for it
     "seeds": [0],                   what the episodes were drawn with, in order
     "class_names": {"1": "aeroplane", ...},        of every class that occurs
     "source_fingerprint": "...",    of the photos and masks; other programs may leave it empty
     "pairs_fingerprint": "...",     of the (image, class) list that was drawn from; likewise
     "episodes_fingerprint": "...",  of the episodes below, in order: see `fingerprint_episodes`
     "episodes": [
      {"class_id": 1, "support_ids": ["2007_000033"], "query_id": "2007_000042", "seed": 5},
      ...
     ]
    }

Further keys are allowed and ignored. An episode's seed is of its augmentation and not negative.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from episodes.files import read_text
from episodes.protocols import Pair
from episodes.sampler import spec_to_json
from episodes.sources.annotation_files import shown
from episodes.types import DataError, EpisodeSpec, MaskSource
from episodes.writing import atomic_path

FORMAT = 1
_KINDS: Mapping[type, str] = MappingProxyType({str: "a text", int: "a whole number", list: "a list", dict: "an object"})
_Kind = TypeVar("_Kind")
_NAMED = 3
"""Ids that a message names before it only counts them."""


@dataclass(frozen=True, kw_only=True)
class EpisodeFile:
    """Episodes with where they come from.

    Attributes:
        protocol: name of the protocol.
        data: name of the data set.
        fold: the test fold; None for data without folds.
        shots: supports of every episode, K.
        seeds: what the episodes were drawn with, in order.
        class_names: class id -> name, at least of every class that occurs.
        source_fingerprint: of the photos and masks of the split, or empty.
        pairs_fingerprint: `fingerprint_pairs` of the list that was drawn from, or empty.
        specs: the episodes.
        ways: N, so many specs one after another share a query and compete for it (`episodes.n_way`).
        format: version of the file format.

    Raises:
        DataError: a value out of range, no episode, an episode with another number of supports or a class
            without a name; the place is named.
    """

    protocol: str
    data: str
    fold: int | None
    shots: int
    seeds: tuple[int, ...]
    class_names: Mapping[int, str]
    source_fingerprint: str
    pairs_fingerprint: str
    specs: tuple[EpisodeSpec, ...]
    ways: int = 1
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise DataError(f"format: expected {FORMAT}, got {self.format}; use a version that writes format {FORMAT}")
        if self.ways < 1 or len(self.specs) % self.ways:
            raise DataError(
                f"ways: expected a number that divides the {len(self.specs)} episodes, got {self.ways}; write one "
                "episode per way, the ways of a query one after another"
            )
        if self.shots < 1:
            raise DataError(f"shots: expected at least 1, got {self.shots}; write K supports per episode")
        if self.fold is not None and self.fold < 0:
            raise DataError(f"fold: expected 0 or more, or null, got {self.fold}; name the test fold")
        if not self.specs:
            raise DataError("episodes: expected at least one, got none; write the episodes")
        for n, spec in enumerate(self.specs):
            if spec.shots != self.shots:
                raise DataError(
                    f"episodes[{n}].support_ids: expected {self.shots} ids (shots), got {spec.shots}; mend one of them"
                )
            if spec.class_id not in self.class_names:
                raise DataError(f"class_names: no name of class {spec.class_id} (episodes[{n}]); add it")
            if spec.seed < 0:
                raise DataError(f"episodes[{n}].seed: expected 0 or more, got {spec.seed}; write another seed")
        object.__setattr__(self, "class_names", MappingProxyType(dict(sorted(self.class_names.items()))))

    @property
    def episodes_fingerprint(self) -> str:
        """`fingerprint_episodes` of the episodes."""
        return fingerprint_episodes(self.specs)


def fingerprint_pairs(pairs: Iterable[Pair]) -> str:
    """SHA-256, hex, of one line per pair, ``["IMAGE ID",CLASS ID]`` as JSON without spaces; order matters."""
    return _digest([image_id, class_id] for image_id, class_id in pairs)


def fingerprint_episodes(specs: Iterable[EpisodeSpec]) -> str:
    r"""SHA-256, hex, of one line per episode; order matters.

    A line is ``[CLASS ID,["SUPPORT ID",...],"QUERY ID",SEED]`` as JSON without spaces, every character beyond ASCII
    as ``\uXXXX``, with a newline at its end.
    """
    return _digest([spec.class_id, list(spec.support_ids), spec.query_id, spec.seed] for spec in specs)


def _digest(rows: Iterable[list[Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update((json.dumps(row, separators=(",", ":"), ensure_ascii=True) + "\n").encode("ascii"))
    return digest.hexdigest()


def episodes_as_text(file: EpisodeFile) -> str:
    """The JSON that `read_episodes` reads, one line per episode."""
    head = {
        "format": file.format,
        "protocol": file.protocol,
        "data": file.data,
        "fold": file.fold,
        "shots": file.shots,
        "ways": file.ways,
        "seeds": list(file.seeds),
        "class_names": {str(class_id): name for class_id, name in file.class_names.items()},
        "source_fingerprint": file.source_fingerprint,
        "pairs_fingerprint": file.pairs_fingerprint,
        "episodes_fingerprint": file.episodes_fingerprint,
    }
    rows = ",\n".join(f"  {spec_to_json(spec)}" for spec in file.specs)
    return json.dumps(head, indent=1).removesuffix("\n}") + f',\n "episodes": [\n{rows}\n ]\n}}\n'


def write_episodes(path: Path, file: EpisodeFile) -> None:
    """Write `episodes_as_text`; the file is there whole or not at all.

    Raises:
        DataError: the folder cannot be written.
    """
    text = episodes_as_text(file)
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_episodes(path: Path) -> EpisodeFile:
    """Read and check a file of episodes; see the module for its layout.

    Raises:
        DataError: no such file, not JSON, a value that is missing, of the wrong kind or out of range, or episodes
            that do not have the fingerprint written beside them. The message names the file and the place.
    """
    try:
        content = json.loads(read_text(path))
    except OSError as error:
        raise DataError(f"cannot read episodes {path}: {error.strerror}; name a file of episodes") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: expected JSON, got something else ({reason}); write the file anew") from None
    try:
        file = _parsed(content)
        written, found = _take(content, "episodes_fingerprint", str), file.episodes_fingerprint
        if written != found:
            raise DataError(
                f"episodes_fingerprint: the episodes have {found[:12]}, the file says {written[:12]!r}; they were "
                "changed after writing: fetch the file again"
            )
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return file


def _parsed(content: Any) -> EpisodeFile:
    content = _of_kind(content, dict, "the file")
    version = _take(content, "format", int)
    if version != FORMAT:  # before anything else: other formats may have other keys
        raise DataError(f"format: expected {FORMAT}, got {version}; use a version of this program that reads it")
    names = _take(content, "class_names", dict)
    for key in names:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise DataError(f"class_names: expected class ids as keys, got {_shown(key)}; mend the file")
    return EpisodeFile(
        format=version,
        protocol=_take(content, "protocol", str),
        data=_take(content, "data", str),
        fold=None if content.get("fold", 0) is None else _take(content, "fold", int),
        shots=_take(content, "shots", int),
        ways=_take(content, "ways", int),
        seeds=_all_of(_take(content, "seeds", list), int, "seeds"),
        class_names={int(key): _of_kind(name, str, f"class_names[{key!r}]") for key, name in names.items()},
        source_fingerprint=_take(content, "source_fingerprint", str),
        pairs_fingerprint=_take(content, "pairs_fingerprint", str),
        specs=tuple(_spec(row, f"episodes[{n}]") for n, row in enumerate(_take(content, "episodes", list))),
    )


def _spec(row: Any, place: str) -> EpisodeSpec:
    row = _of_kind(row, dict, place)
    fields: dict[str, Any] = {
        "class_id": _take(row, "class_id", int, place),
        "support_ids": _all_of(_take(row, "support_ids", list, place), str, f"{place}.support_ids"),
        "query_id": _take(row, "query_id", str, place),
        "seed": _take(row, "seed", int, place),
    }
    try:
        return EpisodeSpec(**fields)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _take(row: dict[str, Any], key: str, kind: type[_Kind], place: str = "") -> _Kind:
    where = f"{place}.{key}" if place else key
    if key not in row:
        raise DataError(f"{where}: expected {_KINDS[kind]}, got none; add it")
    return _of_kind(row[key], kind, where)


def _all_of(values: list[Any], kind: type[_Kind], place: str) -> tuple[_Kind, ...]:
    return tuple(_of_kind(value, kind, f"{place}[{k}]") for k, value in enumerate(values))


def _of_kind(value: Any, kind: type[_Kind], place: str) -> _Kind:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{place}: expected {_KINDS[kind]}, got {_shown(value)}; mend it or write the file anew")
    return value


def _shown(value: object) -> str:
    return shown(value, 60)


def check_episodes(file: EpisodeFile, source: MaskSource, split: str) -> None:
    """Check that a source can play a file's episodes; loads no image.

    Raises:
        DataError: image ids that the split lacks, class ids that the source lacks, or classes that have another
            name there (as when two programs number COCO's classes differently): the first few and their number.
    """
    known, names = set(source.ids(split)), source.class_names
    wanted = dict.fromkeys(image_id for spec in file.specs for image_id in (spec.query_id, *spec.support_ids))
    where = f"{source.name} (split {split!r})"
    _none_lacking(
        [repr(image_id)[:60] for image_id in wanted if image_id not in known],
        f"{where} lacks images of the episodes",
        "name the data and split that the episodes were drawn from",
    )
    classes = sorted({spec.class_id for spec in file.specs})
    _none_lacking(
        [str(class_id) for class_id in classes if class_id not in names],
        f"{source.name} lacks classes of the episodes",
        "name the data that the episodes were drawn from",
    )
    _none_lacking(
        [
            f"{class_id} ({names[class_id]}, in the episodes {file.class_names[class_id][:40]!r})"
            for class_id in classes
            if names[class_id] != file.class_names[class_id]
        ],
        f"classes have another name in {source.name}",
        "number and name the classes as this data set does",
    )


def _none_lacking(lacking: Sequence[str], what: str, mend: str) -> None:
    if lacking:
        more = ", ..." if len(lacking) > _NAMED else ""
        raise DataError(f"{what}: {', '.join(lacking[:_NAMED])}{more} ({len(lacking)} in all); {mend}")
