"""Scores of embeddings: retrieval (recall@k, MAP@R) and person re-identification (CMC rank-k, mAP).

Similarity is the cosine, in float64 and rounded to 2^-40 (about 1e-12): photos that agree up to the rounding of a
matrix product are tied, whatever the size of the chunks. Ties are ranked by position: the photo that comes first in
the tensors comes first. Scores are percentages (0-100).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.types import DataError

Float64Array = npt.NDArray[np.float64]
Score = tuple[float, float, float]
"""(value, low, high): a mean and its 95% interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalResult:
    """Scores in percent, each (value, low, high) with a 95% bootstrap interval over queries.

    Attributes:
        recall: k -> recall@k.
        map_at_r: MAP@R.
        queries: photos with at least one other photo of their class; the scores are means over these.
        skipped: photos that are alone in their class and cannot be found.
    """

    recall: Mapping[int, Score]
    map_at_r: Score
    queries: int
    skipped: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ReidentificationResult:
    """Scores in percent, each (value, low, high) with a 95% bootstrap interval over queries.

    Attributes:
        rank: k -> CMC at rank k, the share of queries with a right photo among the first k.
        mean_ap: mAP.
        queries: queries with at least one right gallery photo of another camera; the scores are means over these.
        skipped: queries without one.
    """

    rank: Mapping[int, Score]
    mean_ap: Score
    queries: int
    skipped: int


def per_query_retrieval(
    embeddings: Tensor, labels: Tensor, ks: Sequence[int] = (1, 2, 4, 8), *, chunk: int = 512
) -> dict[str, Float64Array]:
    """Every photo is a query against all others; it is kept from finding itself by its index, not its distance.

    recall@k is 100 if one of the k nearest shares the label (all others where there are fewer than k), else 0.
    MAP@R (Musgrave, Belongie, Lim, "A Metric Learning Reality Check", arXiv 2003.08505): R is the number of other
    photos of the class; the mean over i = 1..R of the precision of the first i if photo i is right, else of 0.

    Args:
        embeddings: float (N, D) of any length; the zero vector has similarity 0 to everything.
        labels: integer (N,).
        ks: the k of recall@k.
        chunk: queries at a time; bounds memory (chunk x N similarities), does not change the values.

    Returns:
        ``recall@k`` for every k and ``MAP@R`` -> float64 (N,) in percent, NaN where no other photo has the label.

    Raises:
        DataError: wrong shapes or types, values that are not finite, or a k below 1.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3]])
        >>> values = per_query_retrieval(embeddings, torch.tensor([5, 6, 5]), [1, 2])
        >>> values["recall@1"].tolist(), values["recall@2"].tolist(), values["MAP@R"].tolist()
        ([0.0, nan, 0.0], [100.0, nan, 100.0], [0.0, nan, 0.0])
    """
    _check_counts("ks", ks)
    unit = _unit_length("embeddings", embeddings)
    labels = _checked_integers("labels", labels, unit)
    _, of_class, class_sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    others = class_sizes[of_class] - 1
    queries = (others > 0).nonzero()[:, 0]
    values = {name: np.full(len(unit), np.nan) for name in (*(f"recall@{k}" for k in ks), "MAP@R")}
    if not len(queries):
        return values
    depth = min(max(*ks, int(others.max())), len(unit) - 1)
    for rows in torch.split(queries, chunk):
        similarity = _similarity(unit[rows], unit)
        similarity[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
        hits = labels[_nearest(similarity, depth)] == labels[rows, None]
        within = torch.arange(depth, device=hits.device) < others[rows, None]
        where = rows.cpu().numpy()
        for k in ks:
            values[f"recall@{k}"][where] = 100 * hits[:, :k].any(1).cpu().numpy()
        values["MAP@R"][where] = 100 * _mean_precision(hits & within, others[rows]).cpu().numpy()
    return values


def retrieval_scores(
    embeddings: Tensor, labels: Tensor, *, ks: Sequence[int] = (1, 2, 4, 8), resamples: int = 1000, seed: int = 0
) -> RetrievalResult:
    """Means of `per_query_retrieval` with intervals; arguments and errors as there.

    Args:
        embeddings: float (N, D).
        labels: integer (N,).
        ks: the k of recall@k.
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        DataError: also when every photo is alone in its class.
    """
    values = per_query_retrieval(embeddings, labels, ks)
    scores, queries, skipped = _summary(values, resamples, seed, needed="two photos of one class")
    recall = {k: scores[f"recall@{k}"] for k in ks}
    return RetrievalResult(recall=recall, map_at_r=scores["MAP@R"], queries=queries, skipped=skipped)


def per_query_reidentification(
    query_embeddings: Tensor,
    query_labels: Tensor,
    query_cameras: Tensor,
    gallery_embeddings: Tensor,
    gallery_labels: Tensor,
    gallery_cameras: Tensor,
    ranks: Sequence[int] = (1, 5, 10),
    *,
    chunk: int = 256,
) -> dict[str, Float64Array]:
    """Single-query protocol of Market-1501 (Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015).

    Gallery photos of the query's person by the query's camera are junk: removed from its ranking. Average
    precision is the mean of the precision at every right photo, as torchreid and fast-reid compute it (equal to
    scikit-learn's without ties). Market-1501's own code takes the trapezoid rule instead, which never scores higher.

    Args:
        query_embeddings: float (Q, D) of any length; the zero vector has similarity 0 to everything.
        query_labels: integer (Q,), the person; not negative, as junk photos were left out on loading.
        query_cameras: integer (Q,).
        gallery_embeddings: float (G, D).
        gallery_labels: integer (G,); distractors carry a label that no query has.
        gallery_cameras: integer (G,).
        ranks: the k of CMC rank-k.
        chunk: queries at a time; bounds memory, does not change the values.

    Returns:
        ``rank-k`` for every k and ``mAP`` -> float64 (Q,) in percent, NaN for a query without any right photo.

    Raises:
        DataError: wrong shapes or types, values that are not finite, negative labels, or a rank below 1.
    """
    _check_counts("ranks", ranks)
    query = _unit_length("query_embeddings", query_embeddings)
    gallery = _unit_length("gallery_embeddings", gallery_embeddings)
    if query.shape[1] != gallery.shape[1]:
        raise DataError(f"query embeddings have width {query.shape[1]}, gallery embeddings {gallery.shape[1]}")
    query_labels = _checked_people("query_labels", query_labels, query)
    gallery_labels = _checked_people("gallery_labels", gallery_labels, gallery)
    query_cameras = _checked_integers("query_cameras", query_cameras, query)
    gallery_cameras = _checked_integers("gallery_cameras", gallery_cameras, gallery)
    values = {name: np.full(len(query), np.nan) for name in (*(f"rank-{k}" for k in ranks), "mAP")}
    for rows in torch.split(torch.arange(len(query), device=query.device), chunk):
        same_person = query_labels[rows, None] == gallery_labels
        junk = same_person & (query_cameras[rows, None] == gallery_cameras)
        right = same_person & ~junk
        similarity = _similarity(query[rows], gallery).masked_fill_(junk, -torch.inf)  # junk behind all else
        hits = right.gather(1, similarity.argsort(dim=1, descending=True, stable=True))
        found = right.any(1)
        where = rows[found].cpu().numpy()
        for k in ranks:
            values[f"rank-{k}"][where] = 100 * hits[found, :k].any(1).cpu().numpy()
        values["mAP"][where] = 100 * _mean_precision(hits[found], right[found].sum(1)).cpu().numpy()
    return values


def reidentification_scores(
    query_embeddings: Tensor,
    query_labels: Tensor,
    query_cameras: Tensor,
    gallery_embeddings: Tensor,
    gallery_labels: Tensor,
    gallery_cameras: Tensor,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    resamples: int = 1000,
    seed: int = 0,
) -> ReidentificationResult:
    """Means of `per_query_reidentification` with intervals; tensors, ranks and errors as there.

    Args:
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        DataError: also when no query has a right gallery photo of another camera.
    """
    values = per_query_reidentification(
        query_embeddings, query_labels, query_cameras, gallery_embeddings, gallery_labels, gallery_cameras, ranks
    )
    needed = "a person whom the query and the gallery show by different cameras"
    scores, queries, skipped = _summary(values, resamples, seed, needed=needed)
    rank = {k: scores[f"rank-{k}"] for k in ranks}
    return ReidentificationResult(rank=rank, mean_ap=scores["mAP"], queries=queries, skipped=skipped)


def bootstrap_means(values: Float64Array, *, resamples: int = 1000, seed: int = 0) -> list[Score]:
    """Mean of every column and its 95% interval: percentiles of a bootstrap over rows, all columns at once.

    The interval says how far the score depends on which queries there are; not on the seed of a training.

    Args:
        values: float64 (N, M), finite; the order of the rows does not matter.
        resamples: number of resamples, each of N rows.
        seed: seed of the resampling.

    Raises:
        DataError: no row, or fewer than one resample.
    """
    if values.ndim != 2 or not len(values) or resamples < 1:
        raise DataError(f"a bootstrap needs values (N, M) and resamples >= 1; got {values.shape} and {resamples}")
    values = values[np.lexsort(values.T)]  # or the resamples would depend on the order
    generator = np.random.default_rng(seed)
    count = len(values)
    draws = np.stack(
        [np.bincount(generator.integers(count, size=count), minlength=count) @ values for _ in range(resamples)]
    )
    low, high = np.percentile(draws / count, (2.5, 97.5), axis=0)
    return list(zip(values.mean(0).tolist(), low.tolist(), high.tolist(), strict=True))


def _summary(
    values: Mapping[str, Float64Array], resamples: int, seed: int, *, needed: str
) -> tuple[dict[str, Score], int, int]:
    """Scores by name, the number of queries that can be found, and of those that cannot."""
    table = np.stack(list(values.values()), axis=1)
    found = ~np.isnan(table).any(axis=1)
    queries, skipped = int(found.sum()), int((~found).sum())
    if not queries:
        raise DataError(f"none of the {skipped} queries can be found: at least one needs {needed}; check the labels")
    scores = bootstrap_means(table[found], resamples=resamples, seed=seed)
    return dict(zip(values, scores, strict=True)), queries, skipped


def _similarity(queries: Tensor, gallery: Tensor) -> Tensor:
    """Cosine in units of 2^-40, whole numbers. float64 (Q, D), (G, D) of unit length -> (Q, G)."""
    return (queries @ gallery.T).mul_(2**40).round_()


def _nearest(similarity: Tensor, depth: int) -> Tensor:
    """Columns of the `depth` largest of every row, ties by position: a stable sort's start, but much faster.

    depth is less than the number of columns.
    """
    values, columns = similarity.topk(depth + 1, dim=1)
    crowded = values[:, -1] == values[:, -2]  # a tie across the cut: topk chose among equals at will
    columns = columns[:, :-1].sort(dim=1).values
    order = similarity.gather(1, columns).argsort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if crowded.any():
        columns[crowded] = similarity[crowded].argsort(dim=1, descending=True, stable=True)[:, :depth]
    return columns


def _mean_precision(hits: Tensor, total: Tensor) -> Tensor:
    """Precision at every hit, summed, over `total`. bool (Q, K) ranked, int (Q,) -> float64 (Q,)."""
    position = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device=hits.device)
    return (hits.cumsum(1) / position * hits).sum(1) / total


def _unit_length(name: str, embeddings: Tensor) -> Tensor:
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise DataError(f"{name} must be float (N, D); got {embeddings.dtype} {tuple(embeddings.shape)}")
    finite = embeddings.isfinite().all(1)
    if not finite.all():
        raise DataError(
            f"{name} must be finite; {int((~finite).sum())} of {len(finite)} rows are not, the first is row "
            f"{int(finite.int().argmin())}: look for a diverged training or a broken photo"
        )
    if embeddings.device.type == "mps":
        embeddings = embeddings.cpu()  # Apple's GPU has no float64
    return F.normalize(embeddings.detach().double(), dim=1)


def _checked_integers(name: str, integers: Tensor, embeddings: Tensor) -> Tensor:
    if integers.shape != embeddings.shape[:1] or integers.is_floating_point() or integers.dtype == torch.bool:
        raise DataError(
            f"{name} must be integers ({len(embeddings)},), one per embedding; "
            f"got {integers.dtype} {tuple(integers.shape)}"
        )
    return integers.to(embeddings.device)


def _checked_people(name: str, labels: Tensor, embeddings: Tensor) -> Tensor:
    labels = _checked_integers(name, labels, embeddings)
    if (labels < 0).any():
        raise DataError(f"{name} must not be negative, got {int(labels.min())}: leave junk photos out on loading")
    return labels


def _check_counts(name: str, counts: Sequence[int]) -> None:
    if not counts or min(counts) < 1:
        raise DataError(f"{name} must be one or more numbers >= 1, got {tuple(counts)}")
