"""Evaluation protocols of the literature by name and data set, and one's own: which lists, how drawn, how scored."""

from episodes.protocols.pairs import evaluation_pairs, list_pairs, query_pairs, training_pairs
from episodes.protocols.protocol import (
    EpisodeProtocol,
    Fit,
    NovelInTraining,
    Pair,
    QueryDraw,
    ShotRule,
    custom_protocol,
    read_protocol,
)
from episodes.protocols.published import PROTOCOL_NAMES, get_protocol

__all__ = [
    "PROTOCOL_NAMES",
    "EpisodeProtocol",
    "Fit",
    "NovelInTraining",
    "Pair",
    "QueryDraw",
    "ShotRule",
    "custom_protocol",
    "evaluation_pairs",
    "get_protocol",
    "list_pairs",
    "query_pairs",
    "read_protocol",
    "training_pairs",
]
