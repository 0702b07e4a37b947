"""A step whose numbers are not finite: which example it was, and its batch on disk, to look at and to compute again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from episodes.sampler import spec_from_json, spec_to_json
from episodes.types import DataError
from fewshot_seg.checkpoint import describe_segmenter, read_tensors, write_tensors
from fewshot_seg.feature_episodes import FeatureBatch
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.trainee import Trainee

BAD_STEP_NAME = "bad_step"
"""A run's ``bad_step.safetensors``, and ``bad_step-rank2.safetensors`` of another rank than the first."""

_MOST_NAMES = 4
_TRAINEE = "trainee."

Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True)
class Account(Generic[Batch]):
    """A batch by its examples.

    Attributes:
        what: of the examples, for a message: ``episodes``, ``photos``.
        names: of the examples, in order.
        tensors: what the loss reads, as many rows per example in each.
        facts: whatever else it takes to compute the loss again (`fewshot_seg.replay`), JSON-able.
        alone: a batch of one of its examples; None where examples only count together.
    """

    what: str
    names: tuple[str, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    alone: Callable[[int], Batch] | None = None


def account_of_episodes(batch: FeatureBatch, **facts: Any) -> Account[FeatureBatch]:
    """Of episodes as features; `episodes_of` makes the batch again."""
    tensors = {f"support_level{number}": level for number, level in enumerate(batch.support_levels)}
    tensors |= {f"query_level{number}": level for number, level in enumerate(batch.query_levels)}
    tensors |= {name: getattr(batch, name) for name in _MASKS}
    specs = [spec_to_json(spec) for spec in batch.specs]
    return Account(
        what="episodes",
        names=tuple(specs),
        tensors=tensors,
        facts={"specs": specs, **facts},
        alone=lambda number: episodes_of(tensors, specs, number),
    )


_MASKS = ("support_masks", "support_dense", "support_truth", "query_masks")


def model_facts(segmenter: FewShotSegmenter) -> dict[str, Any]:
    """Of a model whose losses read features: what builds it again, but for its tensors; JSON-able."""
    backbone = segmenter.backbone
    return {"backbone": backbone.name, "strides": backbone.plan, "model": describe_segmenter(segmenter)}


def episodes_of(tensors: Mapping[str, Tensor], specs: Sequence[str], alone: int | None = None) -> FeatureBatch:
    """The batch of `account_of_episodes`, or one of its episodes alone."""

    def rows(name: str) -> Tensor:
        part = tensors[name]
        if alone is None:
            return part
        size = len(part) // len(specs)
        return part[alone * size : (alone + 1) * size]

    def levels(side: str) -> tuple[Tensor, ...]:
        count = sum(name.startswith(side) for name in tensors)
        return tuple(rows(f"{side}{number}") for number in range(count))

    return FeatureBatch(
        support_levels=levels("support_level"),
        query_levels=levels("query_level"),
        specs=tuple(spec_from_json(one) for one in (specs if alone is None else [specs[alone]])),
        support_masks=rows("support_masks"),
        support_dense=rows("support_dense"),
        support_truth=rows("support_truth"),
        query_masks=rows("query_masks"),
    )


def not_finite(tensors: Mapping[str, Tensor], count: int) -> dict[str, list[int]]:
    """Tensor name -> which of `count` examples have a value in it that is not finite; only those with any."""
    found = {}
    for name, values in tensors.items():
        if values.is_floating_point() and count and len(values) % count == 0:
            bad = (~torch.isfinite(values)).reshape(count, -1).any(dim=1)
            if bool(bad.any()):
                found[name] = bad.nonzero().flatten().tolist()
    return found


def step_is_finite(
    losses: Callable[[Any], Mapping[str, Tensor]], batch: Any, parameters: Sequence[nn.Parameter], seed: int
) -> bool:
    """Whether the loss of a batch, and its gradient, are; the parameters' own gradients are left alone."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        loss = losses(batch)["loss"]
        if not bool(torch.isfinite(loss)) or not loss.requires_grad:
            return bool(torch.isfinite(loss))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return all(bool(torch.isfinite(one).all()) for one in gradients if one is not None)


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """What is known of such a step.

    Attributes:
        account: of its batch.
        inputs: `not_finite` of the batch.
        culprits: the examples that are to blame, by number; all, where none can be told from the others.
    """

    account: Account[Any]
    inputs: dict[str, list[int]]
    culprits: list[int]

    @property
    def names(self) -> str:
        """The culprits, for a message."""
        names = [self.account.names[number] for number in self.culprits]
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        return f"{self.account.what}: {'; '.join(names[:_MOST_NAMES])}{more}"

    @property
    def mend(self) -> str:
        """What to do about it, for a message."""
        if not self.inputs:
            return "lower --learning-rate"
        return f"what it read is not finite ({', '.join(self.inputs)}): mend that, then go on with --resume"


def examine(
    account: Account[Any],
    losses: Callable[[Any], Mapping[str, Tensor]],
    parameters: Sequence[nn.Parameter],
    seed: int,
    *,
    one_by_one: bool,
) -> BadStep:
    """Find the examples to blame: those that hold such values, else those that alone give such a loss or gradient.

    Args:
        account: of the batch.
        losses, parameters, seed: of the step.
        one_by_one: whether the losses may be asked for each example alone; not where ranks compute them together.
    """
    inputs, count = not_finite(account.tensors, len(account.names)), len(account.names)
    culprits = sorted({number for numbers in inputs.values() for number in numbers})
    if not culprits and one_by_one and account.alone is not None:
        culprits = [n for n in range(count) if not step_is_finite(losses, account.alone(n), parameters, seed)]
    return BadStep(account=account, inputs=inputs, culprits=culprits or list(range(count)))


def keep_bad_step(folder: Path, bad: BadStep, trainee: Trainee, description: Mapping[str, Any], rank: int) -> Path:
    """Write the batch and the weights it met; returns the file."""
    path = folder / f"{BAD_STEP_NAME}{f'-rank{rank}' if rank else ''}.safetensors"
    weights = {f"{_TRAINEE}{name}": value for name, value in trainee.tensors().items()}
    account = bad.account
    noted = {
        "format": 1,
        "what": account.what,
        "names": list(account.names),
        "culprits": bad.culprits,
        "not_finite": bad.inputs,
        "facts": dict(account.facts),
        **{name: None if _not_a_number(value) else value for name, value in description.items()},
    }
    write_tensors(path, {name: value.clone() for name, value in account.tensors.items()} | weights, noted)
    return path


def _not_a_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class KeptStep:
    """A file of `keep_bad_step`: tensors of the batch, weights, and what was noted."""

    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]
    noted: dict[str, Any]


def read_bad_step(path: Path) -> KeptStep:
    """Reverse of `keep_bad_step`. Raises DataError naming the file when missing, damaged or another kind of file."""
    tensors, noted = read_tensors(path)
    if not {"what", "names", "culprits", "facts", "seed"} <= noted.keys():
        raise DataError(f"{path} is no kept batch of a training; give the {BAD_STEP_NAME}.safetensors of a run")
    return KeptStep(
        tensors={name: value for name, value in tensors.items() if not name.startswith(_TRAINEE)},
        weights={name.removeprefix(_TRAINEE): v for name, v in tensors.items() if name.startswith(_TRAINEE)},
        noted=noted,
    )
