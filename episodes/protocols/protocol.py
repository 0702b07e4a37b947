"""What a protocol is made of, and how one's own is written."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from episodes.files import read_text
from episodes.sources.annotation_files import shown
from episodes.types import DataError, FoldedDataset

QueryDraw = Literal["list", "random", "image", "class"]
Fit = Literal["squash", "pad"]
NovelInTraining = Literal["background", "excluded", "ignored"]
ShotRule = Literal["pooled", "vote", "mean", "reweighted"]
Pair = tuple[str, int]
"""(image id, class id)"""

CUSTOM = "custom"


@dataclass(frozen=True, kw_only=True)
class EpisodeProtocol:
    """How episodes are drawn and scored.

    Attributes:
        name: name in reports and on the command line.
        description: what the rules are and whose, for people.
        dataset: data set whose folds, sizes and episode counts these are; None for any source.
        training_split: split whose images train; None is the first of the source's `default_splits`.
        evaluation_split: split whose images are scored, supports come from it too; None is the second of the
            source's `default_splits`.
        episodes: number of episodes of one evaluation with one seed.
        repeats: number of seeds (seed, seed + 1, ...) that an evaluation runs with.
        seed: first seed of the evaluation's episodes.
        resolution: side in pixels of the square that a network sees.
        fit: how a photo becomes square. ``squash``: stretched; ``pad``: its aspect kept, its long side becomes
            `resolution`, at the top left, padded with black (the mask with 255).
        scoring_size: side of the square at which masks are compared (nearest neighbour); None is the
            label's original size.
        query_draw: what query n of an evaluation is; see `episodes.sampler.EpisodeSampler`.
            ``list``: pair n of the list, modulo its length; ``random``: each pass through the list is in a new
            random order; ``image``: image n of the images with a pair on the list, modulo their number, and one
            of its classes at random; ``class``: a class at random, then one of its images at random.
        small_queries: whether a query may be of a class that the size filter leaves out in that image, as long as
            another class of the image passes (see `query_pairs`); supports always pass.
        repeat_supports: whether a support may occur twice in one episode.
        min_area: pixels of the class a pair needs at least, counted in the labels as they are stored: a copy with
            reduced labels needs a smaller number, which nothing here guesses.
        min_grid_points: grid points on the class a pair needs at least (`episodes.index.count_grid_points`).
        listed: pairs of the published lists that the rule alone would leave out.
        novel_in_training: what happens to novel classes in training images. ``background``: their pixels are
            background; ``ignored``: their pixels are 255; ``excluded``: `training_pairs` leaves out every image
            that shows one, however small.
        shot_rule: how K supports become one answer. ``pooled``: the pixels of all supports at once; ``mean``:
            prototypes and priors averaged; ``vote``: K one-shot answers vote per pixel; ``reweighted``: a weight
            per support.
        reports_fb_iou: whether the literature that uses the protocol reports FB-IoU.

    Raises:
        DataError: a value of the wrong kind or out of range; the field is named.
    """

    name: str
    description: str = "A protocol of one's own."
    dataset: FoldedDataset | None = None
    training_split: str | None = None
    evaluation_split: str | None = None
    episodes: int = 1000
    repeats: int = 1
    seed: int = 0
    resolution: int = 400
    fit: Fit = "squash"
    scoring_size: int | None = None
    query_draw: QueryDraw = "list"
    small_queries: bool = False
    repeat_supports: bool = False
    min_area: int = 1
    min_grid_points: int = 0
    listed: frozenset[Pair] = frozenset()
    novel_in_training: NovelInTraining = "background"
    shot_rule: ShotRule = "pooled"
    reports_fb_iou: bool = True

    def __post_init__(self) -> None:
        for field, (kind, optional) in _KINDS.items():
            value = getattr(self, field)
            if not (optional and value is None):
                self._check(field, kind, value)
        if not isinstance(self.listed, frozenset) or not all(_is_pair(pair) for pair in self.listed):
            raise DataError(f"protocol {self.name}: listed must be pairs of an image id and a class id")

    def _check(self, field: str, kind: Any, value: Any) -> None:
        if isinstance(kind, int):
            sound, expected = _is_whole(value) and value >= kind, f"a whole number, at least {kind}"
        elif kind is bool:
            sound, expected = isinstance(value, bool), "true or false"
        elif kind is str:
            sound, expected = isinstance(value, str) and bool(value.strip()), "a text that is not empty"
        else:
            sound, expected = isinstance(value, str) and value in kind, f"one of {', '.join(kind)}"
        if not sound:
            raise DataError(f"protocol {str(self.name)[:60]}: {field} must be {expected}; got {_shown(value)}")


_KINDS: Mapping[str, tuple[Any, bool]] = MappingProxyType(
    {
        "name": (str, False),
        "description": (str, False),
        "dataset": (get_args(FoldedDataset), True),
        "training_split": (str, True),
        "evaluation_split": (str, True),
        "episodes": (1, False),
        "repeats": (1, False),
        "seed": (0, False),
        "resolution": (1, False),
        "fit": (get_args(Fit), False),
        "scoring_size": (1, True),
        "query_draw": (get_args(QueryDraw), False),
        "small_queries": (bool, False),
        "repeat_supports": (bool, False),
        "min_area": (1, False),
        "min_grid_points": (0, False),
        "novel_in_training": (get_args(NovelInTraining), False),
        "shot_rule": (get_args(ShotRule), False),
        "reports_fb_iou": (bool, False),
    }
)
"""Field -> (str, bool, the choices, or the least whole number; whether None will do)."""


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and _is_whole(value[1])


def _shown(value: object) -> str:
    return shown(value, 60)


def custom_protocol(**fields: Any) -> EpisodeProtocol:
    """A protocol of one's own: the fields of `EpisodeProtocol`, all of them optional.

    Args:
        fields: `listed` may be any list of (image id, class id); `name` is ``custom`` by default, and `query_draw` is
            ``random``, so that a few episodes already show every class; `novel_in_training` is ``ignored``, because
            one's own photos may be both trained on and scored.

    Raises:
        DataError: an unknown field, or a value of the wrong kind or out of range.

    >>> custom_protocol(episodes=200, query_draw="class").resolution
    400
    """
    known = [field.name for field in dataclasses.fields(EpisodeProtocol)]
    unknown = [_shown(name) for name in fields if name not in known]
    if unknown:
        raise DataError(f"a protocol has no field {', '.join(unknown[:5])}; its fields are: {', '.join(known)}")
    listed = fields.get("listed", ())
    if not isinstance(listed, list | tuple | set | frozenset) or not all(
        isinstance(pair, list | tuple) and _is_pair(tuple(pair)) for pair in listed
    ):
        raise DataError(f"listed must be pairs of an image id and a class id, got {_shown(listed)}")
    return EpisodeProtocol(
        **{
            "name": CUSTOM,
            "query_draw": "random",
            "novel_in_training": "ignored",
            **fields,
            "listed": frozenset(tuple(pair) for pair in listed),
        }
    )


def read_protocol(path: Path) -> EpisodeProtocol:
    """A protocol of one's own from a TOML file whose keys are fields of `EpisodeProtocol`.

    Its name is that of the file, unless the file says otherwise. For example ``episodes = 500``, ``resolution = 473``,
    ``fit = "pad"``, ``min_area = 2048``. A field that may be None (`scoring_size`, the splits, `dataset`) is left out
    for None.

    Raises:
        DataError: no such file, not TOML, an unknown field, or a value of the wrong kind or out of range; the
            file is named.
    """
    try:
        fields = tomllib.loads(read_text(path))
    except OSError as error:
        raise DataError(f"cannot read protocol {path}: {error.strerror}; name a TOML file") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"protocol {path} is not TOML ({reason}); write lines such as episodes = 500") from None
    try:
        return custom_protocol(**{"name": Path(path).stem, **fields})
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
