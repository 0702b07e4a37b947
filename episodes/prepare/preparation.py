"""From archives to a data set in place: space checked first, whole folders renamed into place, done once."""

from __future__ import annotations

import contextlib
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from episodes.files import user_path
from episodes.prepare.archives import Archive, CocoYear, DataSet, archives_of
from episodes.prepare.download import Patience, download
from episodes.prepare.extraction import extract
from episodes.prepare.part import Part
from episodes.prepare.records import RECORD_NAME, count_files, digests_of, is_damaged, read_record, write_record
from episodes.prepare.space import bytes_needed, check_space
from episodes.types import DataError
from episodes.writing import reason_of

_DOWNLOADS = "downloads"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedDataSet:
    """What `prepare` did.

    Attributes:
        data_set: ``voc``, ``coco`` or ``fss``.
        root: what the data set's source takes as its root.
        sbd: folder of SBD's ``cls`` and ``img``, for VOC with SBD.
        steps: one line per archive: unpacked, mended, or already there.
        changed: whether anything was done.
    """

    data_set: DataSet
    root: Path
    sbd: Path | None
    steps: tuple[str, ...]
    changed: bool

    @property
    def next_command(self) -> str:
        """The command that checks what was prepared."""
        sbd = f" --sbd {shlex.quote(str(self.sbd))}" if self.sbd else ""
        return f"fewshot-seg data verify --data {self.data_set} --root {shlex.quote(str(self.root))}{sbd}"


def prepare(
    data_set: DataSet,
    target: Path,
    *,
    archives: Path | None = None,
    mirror: str | None = None,
    year: CocoYear = 2017,
    with_sbd: bool = True,
    keep_archives: bool = False,
    patience: Patience | None = None,
    show_progress: bool = False,
) -> PreparedDataSet:
    """Put a data set into `target`: fetched where needed, checked, unpacked. What is already there is left alone.

    VOC becomes ``target/VOCdevkit/VOC2012`` and ``target/benchmark_RELEASE``, COCO ``target/train2017``,
    ``val2017`` and ``annotations`` (instances only), FSS-1000 ``target/fewshot_data``. ``target/prepared.json``
    records what was done.

    Args:
        data_set: ``voc``, ``coco`` or ``fss``.
        target: folder for the data; made when missing.
        archives: folder with the official archives under their official names; nothing is downloaded then.
        mirror: address of a folder with these archives, instead of the official addresses.
        year: of COCO, 2014 or 2017.
        with_sbd: VOC with the Semantic Boundaries Dataset.
        keep_archives: leave downloaded archives in ``target/downloads`` after unpacking.
        patience: how long a download is tried.
        show_progress: bars on stderr.

    Raises:
        DataError: too little space, an archive that is missing, not the official one or not to be trusted, or
            data in the target that came from elsewhere.
    """
    chosen = archives_of(data_set, year=year, with_sbd=with_sbd)
    target = user_path(target)
    steps = prepare_archives(
        chosen,
        target,
        archives=archives,
        mirror=mirror,
        keep_archives=keep_archives,
        patience=patience,
        show_progress=show_progress,
    )
    sbd = target / "benchmark_RELEASE" / "dataset" if data_set == "voc" and with_sbd else None
    return PreparedDataSet(
        data_set=data_set,
        root=_root_of(data_set, target),
        sbd=sbd,
        steps=tuple(step for step, _ in steps),
        changed=any(changed for _, changed in steps),
    )


def prepare_archives(
    chosen: Sequence[Archive],
    target: Path,
    *,
    archives: Path | None = None,
    mirror: str | None = None,
    keep_archives: bool = False,
    patience: Patience | None = None,
    show_progress: bool = False,
) -> list[tuple[str, bool]]:
    """As `prepare`, for any archives. Returns per archive what was done, in words, and whether anything was."""
    _make_folder(target)
    records = read_record(target)
    states = {archive.name: _state_of(archive, target, records.get(archive.name)) for archive in chosen}
    todo = [archive for archive in chosen if states[archive.name] != "complete"]
    if archives is not None:
        _check_all_there(todo, user_path(archives))
    downloads = target / _DOWNLOADS if archives is None else None
    check_space(target, bytes_needed(todo, downloads=downloads, keep_archives=keep_archives))
    steps = []
    for archive in chosen:
        if archive not in todo:
            _clear_away(archive, target, records[archive.name])
            steps.append((f"{archive.name}: already there, nothing to do", False))
            continue
        path, digests = _archive_file(archive, target, archives, mirror, patience or Patience(), show_progress)
        recorded = records.get(archive.name, {})
        if not archive.is_vouched_for and recorded.get("sha256", digests["sha256"]) != digests["sha256"]:
            raise DataError(
                f"{path}: sha256 {digests['sha256']}, but {target / RECORD_NAME} recorded {recorded['sha256']}; "
                "it is another archive than last time: get that one, or prepare into an empty folder"
            )
        fetched = archives is None and not keep_archives
        _unpack(archive, path, target, records, digests | {"fetched": fetched}, show_progress)
        _clear_away(archive, target, records[archive.name])
        steps.append((f"{archive.name}: {'unpacked' if states[archive.name] == 'new' else 'mended'}", True))
    return steps


def _state_of(archive: Archive, target: Path, recorded: dict[str, Any] | None) -> str:
    """``new``, ``complete``, or ``damaged``. Raises DataError for data that came from elsewhere."""
    if recorded is None:
        for place in archive.places:
            if (target / place).exists():
                raise DataError(
                    f"{target / place} is already there, but not from `data prepare`; use it as it is (see "
                    "`data verify`), move it away, or choose another target"
                )
        return "new"
    if not recorded["complete"]:
        return "new"
    whole = all((target / place).exists() for place in archive.places) and not is_damaged(target, recorded["folders"])
    return "complete" if whole else "damaged"


def _check_all_there(todo: Sequence[Archive], folder: Path) -> None:
    missing = [archive for archive in todo if not (folder / archive.name).is_file()]
    if missing:
        where = ", ".join(f"{archive.name} ({archive.by_hand or archive.addresses[0]})" for archive in missing)
        raise DataError(f"{folder} lacks {where}; put the file there, or leave out --archives to download")


def _archive_file(
    archive: Archive, target: Path, archives: Path | None, mirror: str | None, patience: Patience, show_progress: bool
) -> tuple[Path, dict[str, str]]:
    folder = target / _DOWNLOADS if archives is None else user_path(archives)
    path = folder / archive.name
    if not path.exists():
        addresses = archive.addresses if mirror is None else (f"{mirror.rstrip('/')}/{archive.name}",)
        _make_folder(folder)
        digests = download(archive, folder, addresses=addresses, patience=patience, show_progress=show_progress)
        return path, digests
    digests = digests_of(path, show_progress=show_progress)
    fault = archive.fault(path.stat().st_size, digests)
    if fault is not None:
        raise DataError(f"{path}: not the official archive ({fault}); delete it and fetch it again")
    return path, digests


def _unpack(
    archive: Archive,
    path: Path,
    target: Path,
    records: dict[str, Any],
    origin: dict[str, Any],
    show_progress: bool,
) -> None:
    """Into place; `origin` has the archive's sha256, and whether it was ``fetched`` for this and is of no further use.

    Raises:
        DataError: an archive that is not sound or not the right one, or the target cannot be written.
    """
    temporary = _temporary(archive, target)
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        extract(path, temporary, wanted=archive.places, limit=archive.limit, show_progress=show_progress)
        for place in archive.places:
            if not (temporary / place).exists():
                raise DataError(f"{path}: expected {place} in it; it is another archive: fetch the official one")
        entry = {
            "sha256": origin["sha256"],
            "fetched": origin["fetched"],
            "vouched for by": archive.origin,
            "folders": count_files(temporary),
            "complete": False,
        }
        records[archive.name] = entry
        write_record(target, records)  # before: what lies there after an interruption is ours and may be replaced
        for place in archive.places:
            _place(temporary / place, target / place)
        records[archive.name] = entry | {"complete": True}
        write_record(target, records)
    except OSError as error:
        raise DataError(f"cannot write into {target}: {reason_of(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(archive: Archive, target: Path) -> Path:
    return target / f".{archive.name}.unpacking"


def _clear_away(archive: Archive, target: Path, entry: Mapping[str, Any]) -> None:
    """What is of no use once an archive is in place; a run that was killed just then has left it."""
    shutil.rmtree(_temporary(archive, target), ignore_errors=True)
    if not entry.get("fetched"):
        return
    downloads = target / _DOWNLOADS
    (downloads / archive.name).unlink(missing_ok=True)
    Part(downloads, archive.name).discard()
    with contextlib.suppress(OSError):  # holds other archives
        downloads.rmdir()


def _place(source: Path, destination: Path) -> None:
    """Rename into place, whole where nothing is there; into a folder that is there, entry by entry."""
    if source.is_dir() and destination.is_dir():
        for entry in sorted(source.iterdir()):
            _place(entry, destination / entry.name)
    else:
        destination.parent.mkdir(parents=True, exist_ok=True)
        source.replace(destination)


def _make_folder(target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make folder {target}: {error.strerror}; choose a folder you may write to") from error


def _root_of(data_set: DataSet, target: Path) -> Path:
    if data_set == "voc":
        return target / "VOCdevkit" / "VOC2012"
    if data_set == "coco":
        return target
    # FSS-1000 lies in fewshot_data/fewshot_data/CLASS/1.jpg; a repacked archive may lack one level
    inside = [first.parent.parent for first in sorted((target / "fewshot_data").glob("**/1.jpg"))]
    if not inside:
        raise DataError(f"{target / 'fewshot_data'}: expected CLASS/1.jpg in it; fetch the official archive")
    return min(inside, key=lambda folder: len(folder.parts))
