"""Same seeds, same numbers: over runs, workers, batch sizes, threads, and whatever the feature store holds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from episodes.protocols import get_protocol
from episodes.sources import VocSource
from fewshot_seg import cross_fitted_fold
from fewshot_seg.backbones import Backbone
from fewshot_seg.checkpoint import trained_tensors
from fewshot_seg.cross_fitted_fold import train_cross_fitted
from fewshot_seg.evaluation import evaluate
from fewshot_seg.experiment import train_fold
from fewshot_seg.features import FeatureStore
from fewshot_seg.fold_data import FoldData, at_resolution, evaluation_episodes, group_episodes, open_fold
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter

LOGITS = {"atol": 1e-5, "rtol": 1e-5}
"""How far batches of other sizes may round a logit otherwise; their scores agree within a hundredth of a percent."""


@pytest.fixture(autouse=True)
def _quick_base_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = partial(cross_fitted_fold.train_base_learner, steps=5, batch_size=32)
    monkeypatch.setattr(cross_fitted_fold, "train_base_learner", quick)


def opened(root: Path, backbone: Backbone, cache: Path | None = None, **options: Any) -> FoldData:
    return open_fold(
        VocSource(root), backbone, get_protocol("hsnet"), fold=0, cache=cache, **{"resolution": 64, **options}
    )


def joint(data: FoldData, **options: Any) -> FewShotSegmenter:
    build = partial(build_segmenter, data.backbone, similarity_rank=3, decoder_width=8, dropout=0.2, seed=1)
    settings: dict[str, Any] = {"steps": 3, "batch_size": 4, "select_threshold": False, "seed": 2}
    return train_fold(build, data, **(settings | options)).segmenter


def cross_fitted(data: FoldData, **options: Any) -> FewShotSegmenter:
    settings: dict[str, Any] = {
        "steps": 2,
        "batch_size": 4,
        "decoder_steps": 3,
        "decoder_episodes": ((1, 6),),
        "seed": 2,
    }
    return train_cross_fitted(
        lambda classes: build_segmenter(data.backbone, similarity_rank=3, base_classes=classes, seed=1),
        data,
        **(settings | options),
    ).segmenter


TRAININGS = {"joint": joint, "cross-fitted": cross_fitted}


def differences(one: FewShotSegmenter, other: FewShotSegmenter) -> list[str]:
    left, right = trained_tensors(one), trained_tensors(other)
    assert left.keys() == right.keys()
    return [name for name, value in left.items() if not torch.equal(value, right[name])]


@pytest.fixture(scope="module")
def reference(shared_voc: Path, tiny_backbone: Backbone) -> dict[str, FewShotSegmenter]:
    """Trained once, features in memory, no workers."""
    with pytest.MonkeyPatch.context() as patch:
        quick = partial(cross_fitted_fold.train_base_learner, steps=5, batch_size=32)
        patch.setattr(cross_fitted_fold, "train_base_learner", quick)
        return {kind: run(opened(shared_voc, tiny_backbone)) for kind, run in TRAININGS.items()}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", TRAININGS)
class TestTraining:
    def test_another_run_whatever_ran_before(
        self, reference: dict[str, FewShotSegmenter], shared_voc: Path, tiny_backbone: Backbone, kind: str
    ) -> None:
        torch.manual_seed(99)
        np.random.seed(99)  # noqa: NPY002 - it must not matter
        torch.rand(7)
        assert differences(reference[kind], TRAININGS[kind](opened(shared_voc, tiny_backbone))) == []

    def test_any_state_of_the_feature_store(
        self,
        tmp_path: Path,
        reference: dict[str, FewShotSegmenter],
        shared_voc: Path,
        tiny_backbone: Backbone,
        kind: str,
    ) -> None:
        """Nothing there yet; all there; some gone; room for five photos only, so that most are computed each time."""
        run = TRAININGS[kind]
        assert differences(reference[kind], run(opened(shared_voc, tiny_backbone, tmp_path / "cold"))) == []
        assert differences(reference[kind], run(opened(shared_voc, tiny_backbone, tmp_path / "cold"))) == []
        kept = sorted((tmp_path / "cold" / "features").rglob("*.safetensors"))
        for file in kept[::2]:
            file.unlink()
        kept[1].write_bytes(b"damaged")
        with pytest.warns(UserWarning, match="damaged feature file"):
            assert differences(reference[kind], run(opened(shared_voc, tiny_backbone, tmp_path / "cold"))) == []
        small = opened(shared_voc, tiny_backbone, tmp_path / "small", byte_budget=5 * kept[-1].stat().st_size)
        assert differences(reference[kind], run(small)) == []
        assert len(list((tmp_path / "small" / "features").rglob("*.safetensors"))) <= 5


def test_threads_of_another_number(
    reference: dict[str, FewShotSegmenter],
    shared_voc: Path,
    tiny_backbone: Backbone,
    two_threads: None,  # noqa: ARG001
) -> None:
    """The last digits of a weight may differ with the number of threads; no more."""
    found = trained_tensors(joint(opened(shared_voc, tiny_backbone)))
    for name, value in trained_tensors(reference["joint"]).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


class TestWorkers:
    def test_any_number_gives_the_same_weights(self, shared_voc: Path, tiny_backbone: Backbone) -> None:
        """Photos are changed by chance here: chance must not depend on who loads them."""
        data = opened(shared_voc, tiny_backbone)
        alone, by_two = (joint(data, augment="flip", workers=workers) for workers in (0, 2))
        assert differences(alone, by_two) == []


class TestEvaluation:
    def test_batches_of_any_size(
        self, reference: dict[str, FewShotSegmenter], shared_voc: Path, tiny_backbone: Backbone
    ) -> None:
        data = opened(shared_voc, tiny_backbone)
        episodes = evaluation_episodes(data, shots=1, count=7)
        for segmenter in reference.values():
            segmenter.eval()
            scored = [
                evaluate(segmenter, episodes, scoring_size=None, source=data.source, batch_size=size).result.miou
                for size in (1, 3, 7, 1)
            ]
            assert scored == pytest.approx([scored[0]] * 4, abs=0.01)
            assert scored[0] == scored[3]
            torch.testing.assert_close(logits_of(segmenter, data, 1), logits_of(segmenter, data, 7), **LOGITS)

    @pytest.mark.parametrize("size", [2, 5])
    def test_features_of_photos_in_batches_of_any_size(
        self, shared_voc: Path, tiny_backbone: Backbone, size: int
    ) -> None:
        """Half precision: another batch size may round a feature to the next number. A CPU takes one at a time."""
        source = VocSource(shared_voc)
        photos = source.ids("val")[:5]
        alone, together = (
            FeatureStore(tiny_backbone, source, size=64, directory=None, batch_size=batch) for batch in (None, size)
        )
        assert alone.batch_size == 1
        for one, other in zip(alone.get(photos), together.get(photos), strict=True):
            torch.testing.assert_close(one, other, rtol=2**-10, atol=1e-4)


@torch.no_grad()
def logits_of(segmenter: FewShotSegmenter, data: FoldData, size: int) -> Tensor:
    found = []
    for batch in evaluation_episodes(data, shots=1, count=7).batches(size):
        support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks, batch.support_dense)
        found.append(segmenter.segment_levels(support, batch.query_levels, (64, 64)).logits)
    return torch.cat(found)


def test_a_fold_at_another_size_is_that_fold_opened_at_it(shared_voc: Path, tiny_backbone: Backbone) -> None:
    small = opened(shared_voc, tiny_backbone)
    large, expected = at_resolution(small, 96), opened(shared_voc, tiny_backbone, resolution=96)
    assert (small.resolution, large.resolution, large.guard) == (64, 96, small.guard)
    assert large.fingerprint == expected.fingerprint
    for ask in (
        lambda data: evaluation_episodes(data, shots=2, count=4),
        lambda data: group_episodes(data, data.split.base, shots=1, count=4, seed=0),
    ):
        for one, other in zip(ask(large).batches(2), ask(expected).batches(2), strict=True):
            assert one.specs == other.specs
            assert torch.equal(one.query_masks, other.query_masks)
            assert one.query_masks.shape[-1] == 96
            for level, same in zip(one.support_levels, other.support_levels, strict=True):
                assert torch.equal(level, same)
