"""Evaluation protocols of the literature by name: which lists, how many episodes, how scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from episodes.folds import ClassSplit
from episodes.index import ClassIndex
from episodes.types import DataError

QueryDraw = Literal["list", "random"]
Pair = tuple[str, int]
"""(image id, class id)"""


@dataclass(frozen=True, kw_only=True)
class EpisodeProtocol:
    """How episodes are drawn and scored.

    Attributes:
        name: name in reports and on the command line.
        description: one sentence for people.
        training_split: split whose images train.
        evaluation_split: split whose images are scored; supports come from it too.
        episodes: number of episodes of one evaluation.
        seed: seed of the evaluation's episodes.
        resolution: side in pixels of the square that images are squashed to.
        scoring_size: side of the square at which masks are compared (nearest neighbour); None is the
            label's original size.
        repeat_supports: whether a support may occur twice in one episode.
        query_draw: ``list``: query n of an evaluation is pair n of the list, modulo its length; ``random``:
            each pass through the list is in a new random order.
        min_area: pixels of the class a pair needs at least.
        min_grid_points: grid points on the class a pair needs at least (`index.count_grid_points`).
        listed: pairs of the published lists that the rule alone would leave out.
    """

    name: str
    description: str
    training_split: str
    evaluation_split: str
    episodes: int = 1000
    seed: int = 0
    resolution: int = 400
    scoring_size: int | None = None
    repeat_supports: bool = False
    query_draw: QueryDraw = "list"
    min_area: int = 1
    min_grid_points: int = 0
    listed: frozenset[Pair] = frozenset()

    def __post_init__(self) -> None:
        for field in ("episodes", "resolution", "min_area"):
            if getattr(self, field) < 1:
                raise DataError(f"protocol {self.name}: {field} must be at least 1, got {getattr(self, field)}")
        if self.scoring_size is not None and self.scoring_size < 1:
            raise DataError(f"protocol {self.name}: scoring size must be at least 1, got {self.scoring_size}")


HSNET = EpisodeProtocol(
    name="hsnet",
    description=(
        "HSNet (Min et al. 2021): 1000 episodes over fixed (image, class) lists, squashed to 400 x 400 and "
        "scored there; supports may repeat."
    ),
    training_split="trainaug",
    evaluation_split="val",
    episodes=1000,
    seed=0,
    resolution=400,
    scoring_size=400,
    repeat_supports=True,
    query_draw="list",
    # OSLSM's filter, from which the lists descend: more than two cells left of the mask at 1/32.
    min_grid_points=3,
    # Only two grid points fall on its potted plant, and yet it is on the list; the one pair of the 1036 at
    # hand that the rule misses. Probably the original's resize rounded an exact half the other way.
    listed=frozenset({("2007_001408", 16)}),
)

_PROTOCOLS: Mapping[str, EpisodeProtocol] = MappingProxyType({HSNET.name: HSNET})


def get_protocol(name: str) -> EpisodeProtocol:
    """A protocol by name. Raises DataError that lists the known names.

    >>> get_protocol("hsnet").episodes
    1000
    """
    if name not in _PROTOCOLS:
        raise DataError(f"no protocol {name!r}; known are: {', '.join(sorted(_PROTOCOLS))}")
    return _PROTOCOLS[name]


def list_pairs(protocol: EpisodeProtocol, index: ClassIndex, classes: Iterable[int]) -> list[Pair]:
    """(image, class) pairs that a protocol admits for these classes, in image order, then by class id."""
    return [
        (image_id, class_id)
        for image_id, class_id in index.pairs(classes)
        if index.areas[image_id][class_id] >= protocol.min_area
        and (
            index.grid_points[image_id][class_id] >= protocol.min_grid_points or (image_id, class_id) in protocol.listed
        )
    ]


def evaluation_pairs(protocol: EpisodeProtocol, index: ClassIndex, classes: ClassSplit) -> list[Pair]:
    """The list of an evaluation: pairs of the novel classes in the evaluation split's index."""
    return list_pairs(protocol, index, classes.novel)


def training_pairs(protocol: EpisodeProtocol, index: ClassIndex, classes: ClassSplit) -> list[Pair]:
    """The list of a training: pairs of the base classes in the training split's index.

    Images that also show a novel class stay in; its pixels are background there, as in HSNet's code.
    """
    return list_pairs(protocol, index, classes.base)
