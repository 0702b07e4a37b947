"""People's own photos explained: a picture and the raw maps for every query, and one line for each that failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from episodes.augment import EpisodeTransform
from episodes.progress import tqdm
from episodes.protocols import Fit
from episodes.types import DataError, UInt8Array
from fewshot_seg.explainers import Comparison
from fewshot_seg.explainers.episode import ShownPhotos, compare_photos
from fewshot_seg.explanation import episode_picture, explain_photos, write_maps
from fewshot_seg.photos import open_photo, output_names
from fewshot_seg.pictures import write_picture
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.support_photos import Support


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainedFile:
    """What was written of one query and class: picture, maps, a title, and the share of the photo that was found."""

    query: Path
    name: str
    path: Path
    maps: Path
    title: str
    share: float


def explain_files(
    segmenter: FewShotSegmenter,
    supports: Mapping[str, Sequence[Support]],
    queries: Sequence[Path],
    folder: Path,
    *,
    resolution: int,
    fit: Fit = "squash",
    scale: float = 1,
    show_progress: bool = False,
) -> tuple[list[ExplainedFile], list[str]]:
    """Write ``NAME.png`` and ``NAME.npz`` for every query; of several classes ``NAME-CLASS.png``.

    Photos of more than `photos.WORKING_PIXELS` are explained in their reduced copies.

    Args:
        segmenter: the model, in evaluation mode.
        supports: of each class, as `support_photos.read_supports` has them.
        queries: photo files.
        folder: created when missing.
        resolution: side of the square that photos are fitted into.
        fit: how.
        scale: of `pictures.panel_sheet`.
        show_progress: bar on stderr.

    Returns:
        What was written, and one line for every query that could not be read.

    Raises:
        DataError: supports whose object is lost at this size.
    """
    square, written, failures = EpisodeTransform("none", resolution, fit), list[ExplainedFile](), list[str]()
    for class_name, shown in supports.items():
        _check_objects(class_name, shown, square, resolution)
    compared: dict[str, Comparison] = {}
    named = list(zip(queries, output_names(queries), strict=True))
    for query, name in tqdm(named, desc="explaining", unit="photo", disable=not show_progress):
        try:
            photo = open_photo(query).pixels
        except DataError as error:
            failures.append(str(error))
            continue
        for class_name, shown in supports.items():
            photos = _shown(shown, photo)
            if class_name in compared:  # the supports are encoded once
                earlier = compared[class_name]
                comparison = earlier.with_query(square.photo(photo).to(earlier.photos.device))
            else:
                comparison = compare_photos(segmenter, photos, resolution=resolution, fit=fit)
            compared[class_name] = comparison
            explained = explain_photos(comparison, photos, fit=fit)
            path = folder / f"{name if len(supports) == 1 else f'{name}-{class_name}'}.png"
            title = f"{class_name}: find it in {query.name}"
            write_picture(path, episode_picture(explained, title=title, scale=scale))
            write_maps(path.with_suffix(".npz"), explained)
            share = float((explained.prediction == 1).mean())
            written.append(
                ExplainedFile(
                    query=query, name=class_name, path=path, maps=path.with_suffix(".npz"), title=title, share=share
                )
            )
    return written, failures


def _shown(supports: Sequence[Support], query: UInt8Array) -> ShownPhotos:
    return ShownPhotos(
        supports=tuple(one.photo for one in supports),
        marks=tuple(one.marks for one in supports),
        dense=tuple(one.kind == "mask" for one in supports),
        query=query,
    )


def _check_objects(class_name: str, shown: Sequence[Support], square: EpisodeTransform, resolution: int) -> None:
    """As `Predictor.remember`: an object that is lost at this size is refused, not mended."""
    for number, one in enumerate(shown, 1):
        if one.kind == "mask" and not bool((square(one.photo, one.marks, seed=0)[1] == 1).any()):
            raise DataError(
                f"mask of support {number} of {class_name} shows no object at {resolution} x {resolution} pixels; mark "
                "the object with 1, choose a larger one, or raise --resolution"
            )
