"""The leak guard over all that a training could use, of every fold and protocol: counts of what was looked at.

    python scripts/check_leaks.py --voc ../shared/data/VOCdevkit/VOC2012 --coco ../shared/data/coco \
        --cub ../shared/data/cub_subset

No network is asked. A leak stops the script with the line that stops a training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from episodes.fold_lists import open_lists
from episodes.folds import FOLDS
from episodes.leak_guard import LeakGuard, check_labelled
from episodes.protocols import get_protocol
from episodes.retrieval import open_retrieval
from episodes.sources import CocoSource, VocSource
from episodes.types import MaskSource
from fewshot_seg.config import default_cache
from fewshot_seg.report import Table, text_table

PROTOCOLS = ("hsnet", "pfenet", "bam", "repri")
HEADER = (
    *("data", "protocol", "fold", "photos trained on", "photos chosen on", "photos scored", "show a novel class"),
    *("novel pixels ignored", "as background", "of both classes", "files read twice"),
)


def rows_of(source: MaskSource, protocols: tuple[str, ...], cache: Path) -> list[list[str]]:
    """One a fold and protocol: all pairs of the training, and all of the choices."""
    rows = []
    for name in protocols:
        for fold in range(FOLDS):
            lists, guard = (
                open_lists(source, get_protocol(name, source.folds), fold=fold, index_cache=cache),
                LeakGuard(),
            )
            guard.check_pairs(lists, lists.training_pairs, lists.training_source, purpose="training")
            guard.check_pairs(lists, lists.pairs_to_choose, lists.training_source, purpose="choices")
            found = guard.record()
            counts = [
                *(found[purpose]["photos"] for purpose in ("training", "choices")),
                found["evaluation_photos"],
                found["photos_that_show_novel_classes"],
                *found["novel_pixels"].values(),
                found["compared_with_evaluation_by_content"]["read"],
            ]
            rows.append([source.name, name, str(fold), *map(str, counts)])
            print(" | ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, help="folder VOC2012")
    parser.add_argument("--coco", type=Path, help="folder with annotations/")
    parser.add_argument("--cub", type=Path, help="folder with train/ and test/")
    parser.add_argument("--cache", type=Path, default=default_cache())
    arguments = parser.parse_args()
    rows = list[list[str]]()
    if arguments.voc is not None:
        rows += rows_of(VocSource(arguments.voc), PROTOCOLS, arguments.cache / "index")
    if arguments.coco is not None:
        rows += rows_of(CocoSource(arguments.coco), ("hsnet", "bam"), arguments.cache / "index")
    if rows:
        print(text_table(Table(header=list(HEADER), rows=rows)))
    if arguments.cub is not None:
        photos = open_retrieval("folders", arguments.cub)
        print("retrieval:", check_labelled(photos.train, photos.test))
    print(f"{len(rows)} folds and protocols looked at, no leak")


if __name__ == "__main__":
    main()
