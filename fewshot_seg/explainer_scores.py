"""How faithful explainers are, episode by episode: the same episodes, photos and baselines for all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from episodes.augment import EpisodeTransform
from episodes.files import read_text
from episodes.progress import tqdm
from episodes.protocols import Fit
from episodes.types import IGNORE, DataError, EpisodeSpec, MaskSource, SupportKind
from fewshot_seg.explainers import EXPLAINERS, Comparison, Explanation, run_explainer
from fewshot_seg.explainers.episode import compare_photos, episode_photos, randomised
from fewshot_seg.faithfulness import energy_inside, perturbation_order
from fewshot_seg.metrics import intersection_union
from fewshot_seg.runtime import atomic_path
from fewshot_seg.segmenter import FewShotSegmenter

Side = Literal["query", "support"]
SIDES: tuple[Side, ...] = ("query", "support")
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringRule:
    """What is measured, and how finely.

    Attributes:
        explainers: names of `EXPLAINERS`, all by default.
        steps: of the deletion and insertion curves.
        sanity_every: every so many episodes are also explained with random weights, for the sanity check.
    """

    explainers: tuple[str, ...] = tuple(EXPLAINERS)
    steps: int = 5
    sanity_every: int = 5

    def __post_init__(self) -> None:
        unknown = [name for name in self.explainers if name not in EXPLAINERS]
        if unknown or len(set(self.explainers)) != len(self.explainers) or not self.explainers:
            raise DataError(
                f"--explainers: expected names out of {', '.join(EXPLAINERS)}, each once; got "
                f"{', '.join(self.explainers) or 'none'}"
            )


def score_episode(
    comparison: Comparison, target: Tensor, rule: ScoringRule, *, randomised_model: FewShotSegmenter | None = None
) -> Record:
    """All explainers on one episode.

    Args:
        comparison: the episode.
        target: uint8 (H, W), the query's mask at the size of the comparison's photos, 255 ignored.
        rule: what is measured.
        randomised_model: for the sanity check; None leaves it out.

    Returns:
        JSON-able: per side the scores of the photo as it is and of the blurred one (``whole``, ``blank``: similarity,
        intersection, union), and per explainer its cost and, per side, what `_side_record` lists. With several supports
        one is changed at a time, and values are means over them.
    """
    places = {"query": (0,), "support": tuple(range(1, comparison.shots + 1))}
    record: Record = {side: _mean([_ends(comparison, place, target) for place in places[side]]) for side in SIDES}
    other = None if randomised_model is None else comparison.with_segmenter(randomised_model)
    record["explainers"] = {}
    for name in rule.explainers:
        explainer = EXPLAINERS[name]
        found = run_explainer(explainer, comparison)
        random = None if other is None else run_explainer(explainer, other)
        entry: Record = {"forward": found.forward, "backward": found.backward}
        for side in SIDES:
            entry[side] = _mean(
                [_side_record(comparison, place, target, found, random, rule) for place in places[side]]
            )
        record["explainers"][name] = entry
    return record


def _side_record(
    comparison: Comparison,
    place: int,
    target: Tensor,
    found: Explanation,
    random: Explanation | None,
    rule: ScoringRule,
) -> Record:
    """Deletion and insertion at the inner points of the curves, pointing, energy, and likeness to the random model's.

    Faithfulness: the points that `faithfulness.perturbation_curve` has between whole and blank photo; similarity,
    intersection and union with the target. Pointing game (Zhang et al., arXiv 1608.00507): 1 if the highest pixel lies
    on the object. A map that is nowhere positive points nowhere and has no energy inside: both are 0.
    """
    values, mask = found.maps[place], target if place == 0 else comparison.masks[place - 1]
    record: Record = {}
    order = perturbation_order(values[None], comparison.size, seed=comparison.seed)[0]
    pixels, whole, blank = order.numel(), comparison.photos[place], comparison.baselines[place]
    cuts = [round(step * pixels / rule.steps) for step in range(1, rule.steps)]
    gone = torch.stack([order < cut for cut in cuts])[:, None]
    changed = torch.cat([torch.where(gone, blank, whole), torch.where(gone, whole, blank)])
    outcomes = _outcomes(comparison, place, changed, target)
    for number, mode in enumerate(("deletion", "insertion")):
        part = slice(number * len(cuts), (number + 1) * len(cuts))
        record[mode] = {key: points[part] for key, points in outcomes.items()}
    large = F.interpolate(values[None, None], comparison.size, mode="bilinear", align_corners=False)[0]
    energy = float(energy_inside(large, mask[None]))
    record["energy"] = 0.0 if math.isnan(energy) else energy
    seen = large[0].masked_fill(mask == IGNORE, -math.inf)
    record["pointing"] = float(bool(seen.max() > 0) and bool(mask.flatten()[seen.argmax()] == 1))
    if random is not None:
        record["sanity"] = rank_likeness(values, random.maps[place])
    return record


def rank_likeness(values: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two maps without its sign; 0 where one of them is constant."""
    pair = [one.flatten().double().cpu().numpy() for one in (values, other)]
    if any(np.ptp(one) == 0 for one in pair):
        return 0.0
    return abs(float(spearmanr(*pair).statistic))


def _ends(comparison: Comparison, place: int, target: Tensor) -> Record:
    both = torch.stack([comparison.photos[place], comparison.baselines[place]])
    outcomes = _outcomes(comparison, place, both, target)
    return {name: {key: points[number] for key, points in outcomes.items()} for number, name in enumerate(_ENDS)}


_ENDS = ("whole", "blank")


def _outcomes(comparison: Comparison, place: int, photos: Tensor, target: Tensor) -> dict[str, list[float]]:
    """Similarity, match, and intersection and union with the target, where photo `place` is each of these."""
    scores, matches, masks = comparison.outcomes(place, photos)
    counts = intersection_union(masks, target.expand(len(masks), *target.shape))[:, 1]
    return {
        "similarity": scores.tolist(),
        "match": matches.tolist(),
        "intersection": counts[:, 0].tolist(),
        "union": counts[:, 1].tolist(),
    }


def _mean(records: Sequence[Any]) -> Any:
    """Mean of records alike, number by number."""
    if isinstance(records[0], Mapping):
        return {key: _mean([record[key] for record in records]) for key in records[0]}
    return np.mean(records, axis=0).tolist()


def score_explainers(
    segmenter: FewShotSegmenter,
    source: MaskSource,
    specs: Sequence[EpisodeSpec],
    path: Path,
    *,
    rule: ScoringRule,
    resolution: int,
    identity: Mapping[str, Any],
    support: SupportKind = "mask",
    fit: Fit = "squash",
    show_progress: bool = False,
) -> list[Record]:
    """Records of all episodes; those that an interrupted run finished are read, not computed again.

    Args:
        segmenter: the model, in evaluation mode.
        source: photos and masks.
        specs: the episodes.
        path: file of one line per finished episode.
        rule: what is measured.
        resolution, support, fit: see `explainers.episode`.
        identity: what else a run that goes on must share, for example model and data.
        show_progress: bar on stderr.

    Raises:
        DataError: a file of another run, or one that is damaged or cannot be written.
    """
    shared = {
        **identity,
        "explainers": list(rule.explainers),
        "steps": rule.steps,
        "sanity_every": rule.sanity_every,
        "resolution": resolution,
        "support": support,
    }
    done = _read_done(path, shared)
    random = randomised(segmenter) if rule.sanity_every <= len(specs) else None
    transform = EpisodeTransform("none", resolution, fit)
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(
            total=len(specs),
            initial=min(len(done), len(specs)),
            desc="scoring explainers",
            unit="episode",
            disable=not show_progress,
        ) as bar,
    ):
        for number, spec in enumerate(specs):
            if number in done:
                continue
            photos = episode_photos(source, spec, support)
            comparison = compare_photos(segmenter, photos, resolution=resolution, fit=fit, seed=number)
            _, target = transform.support(photos.query, source.mask(spec.query_id, spec.class_id), is_mask=True)
            sane = random if (number + 1) % rule.sanity_every == 0 else None
            record = score_episode(comparison, target.to(comparison.photos.device), rule, randomised_model=sane)
            done[number] = {"number": number, "class_id": spec.class_id, **record}
            file.write(json.dumps(done[number]) + "\n")
            file.flush()
            bar.update()
    return [done[number] for number in range(len(specs))]


def _read_done(path: Path, shared: Mapping[str, Any]) -> dict[int, Record]:
    """Finished episodes by number; a new file begins with what its run is, and a line that was cut off is dropped."""
    try:
        text = read_text(path) if path.exists() else ""
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read finished episodes {path}: {error}; delete it, or choose another --out") from error
    written = text.splitlines(keepends=True)
    whole = [line for line in written if line.endswith("\n")]  # the last one may have been cut off
    lines: list[Any] = []
    for number, line in enumerate(whole, 1):
        try:
            lines.append(json.loads(line))
            if not isinstance(lines[-1], dict) or (number > 1 and type(lines[-1].get("number")) is not int):
                raise ValueError("no record of an episode")
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"line {number} of {path} is damaged ({error}); delete this line, or choose another --out"
            ) from error
    if lines and lines[0] != json.loads(json.dumps(shared)):
        raise DataError(f"{path} holds episodes of another run; delete it, or choose another --out")
    if not lines or len(whole) < len(written):
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in (lines or [shared])), encoding="utf-8")
    return {line["number"]: line for line in lines[1:]}
