"""The ablations of the cross-fitted models: each does without what its name says, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("reproduce_cross_fitting")


def stored(seed: int) -> dict[str, Tensor]:
    """Priors of 12 episodes whose first map tells the object."""
    generator = torch.Generator().manual_seed(seed)
    priors = torch.randn(12, 10, 6, 6, generator=generator)
    foreground = (priors[:, 0] > 0.5).float()
    return {
        "priors": priors.half(),
        "foreground": foreground.half(),
        "background": (1 - foreground).half(),
        "class_ids": torch.arange(12) % 3,
    }


def test_every_ablation_ignores_what_it_does_without(script: ModuleType) -> None:
    decoders = script.ablations(stored(0), stored(1), steps=3)
    assert set(decoders) == {*script.WITHOUT, script.NO_STATISTICS, script.IN_FOLD}
    priors = stored(2)["priors"].float()
    for name, maps in script.WITHOUT.items():
        missing = [script.MAPS.index(one) for one in maps]
        changed = priors.clone()
        changed[:, missing] = torch.randn_like(changed[:, missing])
        assert torch.equal(decoders[name](priors, priors, priors), decoders[name](changed, priors, priors))
        kept = next(n for n in range(len(script.MAPS)) if n not in missing)
        changed[:, kept] += 1
        assert not torch.equal(decoders[name](priors, priors, priors), decoders[name](changed, priors, priors))


def test_without_statistics_a_cell_does_not_know_the_rest_of_the_photo(script: ModuleType) -> None:
    decoders = script.ablations(stored(0), stored(1), steps=3)
    priors = stored(2)["priors"].float()
    changed = priors.clone()
    changed[:, :, 3:] += 1
    before, after = (decoders[script.NO_STATISTICS](one, one, one)[:, :3] for one in (priors, changed))
    assert torch.equal(before, after)
    before, after = (decoders[script.IN_FOLD](one, one, one)[:, :3] for one in (priors, changed))
    assert not torch.equal(before, after)


def test_the_threshold_of_the_margin_is_the_best_single_cut(script: ModuleType) -> None:
    assert script.margin_threshold(stored(0)) == pytest.approx(0.5, abs=0.06)
