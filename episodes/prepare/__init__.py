"""Data sets as `episodes.sources` read them, from archives on disk or from their official addresses."""

from episodes.prepare.archives import DATA_SETS, Archive, CocoYear, DataSet, archives_of
from episodes.prepare.download import Patience
from episodes.prepare.preparation import PreparedDataSet, prepare, prepare_archives

__all__ = [
    "DATA_SETS",
    "Archive",
    "CocoYear",
    "DataSet",
    "Patience",
    "PreparedDataSet",
    "archives_of",
    "prepare",
    "prepare_archives",
]
