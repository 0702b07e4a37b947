"""Who this process is among those that torchrun started, and how it ends when one of them is lost.

Apart from `distributed`, so that the command line can say `--help` without loading torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from episodes.types import DataError


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run: `rank` in 0..`size`-1."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


class LostRankError(Exception):
    """Another process of the run is gone, or did not answer in time."""


class TerminatedError(BaseException):
    """SIGTERM: torchrun stops all processes when one fails, and so does a scheduler whose time is up."""


class SaidByFirstError(DataError):
    """An error that all ranks come upon alike, on the ranks that leave it to the first to report."""


def launched_ranks() -> Ranks:
    """What torchrun says in RANK and WORLD_SIZE; one of one without torchrun.

    Raises:
        DataError: variables that are no such numbers.
    """
    try:
        ranks = Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        raise DataError(f"RANK and WORLD_SIZE must be whole numbers, as torchrun sets them ({error})") from error
    if not 0 <= ranks.rank < ranks.size:
        raise DataError(f"RANK {ranks.rank} is not in 0..{ranks.size - 1} (WORLD_SIZE {ranks.size}): start by torchrun")
    return ranks
