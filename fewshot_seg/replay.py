"""A step of a training that ended because its numbers were not finite, computed again from the file that it left.

    python -m fewshot_seg.replay runs/fold0/bad_step.safetensors

Neither data nor backbone is needed: the file holds the batch as features and masks, and the weights that it met. For a
training of the similarity network, run.json of its folder says which losses it had. Exit codes: 0, all is finite now;
1, it is not; 2, the file cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.backbones import build_backbone
from fewshot_seg.bad_steps import KeptStep, episodes_of, not_finite, read_bad_step, step_is_finite
from fewshot_seg.checkpoint import load_part, segmenter_of
from fewshot_seg.config import SimilarityTrainConfig, settings_of
from fewshot_seg.cross_fitting import embedding_losses, stored_loss
from fewshot_seg.decoder import ContextDecoder
from fewshot_seg.feature_episodes import FeatureBatch
from fewshot_seg.runs import RUN_NAME
from fewshot_seg.runtime import read_json
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.similarity import SimilarityNetwork
from fewshot_seg.similarity_losses import Constraint
from fewshot_seg.similarity_runs import new_constraint, new_metric
from fewshot_seg.similarity_training import episode_similarity_losses, photo_losses, photos_of
from fewshot_seg.training import TrainingLosses

Losses = Callable[[int | None], Mapping[str, Tensor]]
"""Of the whole batch (None), or of one of its examples alone."""
_PARTS = ("similarity", "decoder", "completion", "weak_decoder", "base_learner")


def replay(path: Path) -> tuple[list[str], bool]:
    """Compute a kept step again.

    Returns:
        What was found, line by line, and whether all of it is finite.

    Raises:
        DataError: the file, or the record of its run, is missing, damaged or of something else.
    """
    kept = read_bad_step(path)
    names, noted = kept.noted["names"], kept.noted
    lines = [f"step {noted.get('step')}, {len(names)} {noted['what']}, losses: {noted['facts'].get('losses')}"]
    inputs = not_finite(kept.tensors, len(names))
    for name, numbers in inputs.items():
        lines += [f"not finite in {name}: {names[number]}" for number in numbers]
    for name, weights in kept.weights.items():
        if weights.is_floating_point() and not bool(torch.isfinite(weights).all()):
            lines.append(f"not finite among the weights: {name}")
            inputs[name] = []
    try:
        module, losses = _again(kept, path)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} lacks what it takes to compute its losses again ({error!r})") from error
    if losses is None:
        return [*lines, "its losses cannot be computed from the file: only what it read was looked at"], not inputs
    return _computed(lines, names, module, losses, kept)


def _computed(
    lines: list[str], names: Sequence[str], module: nn.Module, losses: Losses, kept: KeptStep
) -> tuple[list[str], bool]:
    parameters = [one for one in module.parameters() if one.requires_grad]
    first, hooks = list[str](), list[Any]()

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not first and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                first.append(name)

        return hook

    for name, part in module.named_modules():
        hooks.append(part.register_forward_hook(look(name or "all of it")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(kept.noted["seed"])
        found = losses(None)
    for hook in hooks:
        hook.remove()
    lines += [f"{name}: {value.item()}" for name, value in found.items()]
    lines += [f"first part whose output is not finite: {name}" for name in first]
    finite = step_is_finite(losses, None, parameters, kept.noted["seed"])
    if not finite and kept.noted["what"] == "episodes":
        for number, name in enumerate(names):
            if not step_is_finite(losses, number, parameters, kept.noted["seed"]):
                lines.append(f"not finite alone: {name}")
    return [*lines, "loss and gradient are finite" if finite else "loss or gradient is not finite"], finite


def _again(kept: KeptStep, path: Path) -> tuple[nn.Module, Losses | None]:
    facts, kind = kept.noted["facts"], kept.noted["facts"].get("losses")
    if kind == "decoder":
        decoder = ContextDecoder(**facts["decoder"]).train()
        load_part(decoder, kept.weights, prefix="decoder.", where=path, finite=False)
        return decoder, lambda number: stored_loss(decoder, _rows(kept.tensors, number))
    if kind == "similarity photos":
        return _similarity_photos(kept, path)
    if kind not in ("joint", "embedding", "similarity episodes"):
        return nn.Identity(), None
    strides = None if facts["strides"] is None else tuple(facts["strides"])
    backbone = build_backbone(facts["backbone"], strides=strides, weights="random")
    of_model = {name: one for name, one in kept.weights.items() if name.partition(".")[0] in _PARTS}
    segmenter = segmenter_of(facts["model"], backbone, of_model, where=path)
    for name in _PARTS:
        if any(one.startswith(f"{name}.") for one in of_model):
            load_part(getattr(segmenter, name), kept.weights, prefix=f"{name}.", where=path, finite=False)
    segmenter.train()

    def batch(number: int | None) -> FeatureBatch:
        return episodes_of(kept.tensors, facts["specs"], number)

    if kind == "joint":
        joint = TrainingLosses(segmenter, metric_weight=facts["metric_weight"], dice_weight=facts["dice_weight"])
        return joint, lambda number: joint(batch(number))
    if kind == "embedding":
        return segmenter, lambda number: embedding_losses(segmenter, batch(number))
    return _similarity_episodes(kept, path, segmenter, batch)


def _rows(tensors: Mapping[str, Tensor], number: int | None) -> Mapping[str, Tensor]:
    return tensors if number is None else {name: part[number : number + 1] for name, part in tensors.items()}


def _similarity_photos(kept: KeptStep, path: Path) -> tuple[nn.Module, Losses]:
    config = _config_beside(path)
    backbone = build_backbone(config.backbone, strides=config.strides, weights=config.backbone_weights)
    rank = len(kept.weights["similarity.down.weight"]) if "similarity.down.weight" in kept.weights else 0
    similarity = SimilarityNetwork(backbone.channels, rank=rank).train()
    load_part(similarity, kept.weights, prefix="similarity.", where=path, finite=False)
    metric, weight = new_metric(config)
    constraint = _constraint(new_constraint(config, backbone, similarity), kept, path)
    batch = photos_of(kept.tensors, kept.noted["names"])
    return similarity, lambda _: photo_losses(
        similarity, batch, metric=metric, metric_weight=weight, constraint=constraint
    )


def _similarity_episodes(
    kept: KeptStep, path: Path, segmenter: FewShotSegmenter, batch: Callable[[int | None], FeatureBatch]
) -> tuple[nn.Module, Losses]:
    config = _config_beside(path)
    metric, weight = new_metric(config)
    constraint = _constraint(new_constraint(config, segmenter.backbone, segmenter.similarity), kept, path)
    return segmenter, lambda number: episode_similarity_losses(
        segmenter,
        batch(number),
        maps=config.maps if config.map_weight else (),
        map_weight=config.map_weight,
        metric=metric,
        metric_weight=weight,
        constraint=constraint,
    )


def _constraint(constraint: Constraint | None, kept: KeptStep, path: Path) -> Constraint | None:
    if constraint is not None:
        load_part(constraint.mining, kept.weights, prefix="mining.", where=path, finite=False)
    return constraint


def _config_beside(path: Path) -> SimilarityTrainConfig:
    """The settings of the run whose folder the file lies in."""
    stored = read_json(path.parent / RUN_NAME, what="record of the run")["configuration"]
    values = {}
    for one in settings_of(SimilarityTrainConfig):
        value = stored.get(one.name, one.default)
        if value is not None:
            many = tuple(one.kind(part) for part in value) if one.many else ()
            value = many if one.many else one.kind(value)
        values[one.name] = value
    return SimilarityTrainConfig(**values)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fewshot_seg.replay", description="Compute a step again whose numbers were not finite."
    )
    parser.add_argument("file", type=Path, help="bad_step.safetensors of a run")
    try:
        lines, finite = replay(parser.parse_args(arguments).file)
    except DataError as error:
        print(f"replay: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0 if finite else 1


if __name__ == "__main__":
    sys.exit(main())
