"""The (image, class) lists of a protocol, by its rules, over the index of a split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from episodes.folds import ClassSplit
from episodes.index import ClassIndex
from episodes.protocols.protocol import EpisodeProtocol, Pair


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

    Images that also show another class stay in, and its pixels are background or, where the protocol says
    ``ignored``, must be turned to 255 by whoever makes the masks. Where it says ``excluded``, images that show any
    class that is not base are left out, whatever the object's size, as in BAM's code.
    """
    pairs = list_pairs(protocol, index, classes.base)
    if protocol.novel_in_training != "excluded":
        return pairs
    base = set(classes.base)
    return [(image_id, class_id) for image_id, class_id in pairs if base.issuperset(index.areas[image_id])]


def query_pairs(protocol: EpisodeProtocol, index: ClassIndex, pairs: Sequence[Pair]) -> list[Pair]:
    """What queries are drawn from when supports come from `pairs`.

    That is `pairs` itself, except where the protocol has `small_queries`: there, a query may be any of the wanted
    classes that its image shows, whatever the object's size, if the image is on the list for one of them.

    Args:
        protocol: the rules.
        index: the index that `pairs` comes from.
        pairs: of `evaluation_pairs` or `training_pairs`; their classes are the wanted ones.
    """
    if not protocol.small_queries:
        return list(pairs)
    images = {image_id for image_id, _ in pairs}
    return [pair for pair in index.pairs({class_id for _, class_id in pairs}) if pair[0] in images]
