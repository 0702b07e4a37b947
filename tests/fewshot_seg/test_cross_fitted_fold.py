"""Cross-fitting a fold: who sees which classes, cells of base classes, and runs that survive being killed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from episodes.folds import ClassSplit
from episodes.protocols import get_protocol
from episodes.sources import SyntheticSource, VocSource
from episodes.types import DataError
from fewshot_seg import cross_fitted_fold
from fewshot_seg.backbones import Backbone
from fewshot_seg.checkpoint import read_tensors, trained_tensors
from fewshot_seg.cross_fitted_fold import class_groups, train_cross_fitted
from fewshot_seg.cross_fitting import train_decoder
from fewshot_seg.decoder import ContextDecoder
from fewshot_seg.experiment import TrainedFold
from fewshot_seg.feature_episodes import CachedEpisodes, FeatureEpisodes
from fewshot_seg.fold_data import ClassCells, FoldData, class_cells, group_episodes, open_fold, training_episodes
from fewshot_seg.objectness import ObjectClassifier
from fewshot_seg.optimisation import TrainingResult
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter
from fewshot_seg.similarity import join_levels

BASE, NOVEL = (1, 2, 3, 4, 5, 6), (7, 8)
GROUPS = ((5, 6), (1, 3), (2, 4))  # the held-out classes first, the others in turn
SHORT: dict[str, Any] = {
    "steps": 3,
    "batch_size": 2,
    "decoder_steps": 4,
    "decoder_episodes": ((1, 5), (2, 3)),
    "checkpoint_every": 2,
    "learning_rate": 1e-2,
    "seed": 5,
}


@pytest.fixture(scope="module")
def data(tiny_backbone: Backbone) -> FoldData:
    """Six base classes, two novel ones, features in memory."""
    source = SyntheticSource(base_classes=6, novel_classes=2, images_per_class=4, size=64)
    return open_fold(source, tiny_backbone, get_protocol("hsnet"), fold=0)


@pytest.fixture(scope="module")
def voc(tiny_backbone: Backbone, shared_voc: Path) -> FoldData:
    """Two classes of each fold, a ring of ignored pixels around every main object."""
    return open_fold(VocSource(shared_voc), tiny_backbone, get_protocol("hsnet"), fold=0, resolution=64)


@pytest.fixture(autouse=True)
def _quick_base_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = partial(cross_fitted_fold.train_base_learner, steps=5, batch_size=32)
    monkeypatch.setattr(cross_fitted_fold, "train_base_learner", quick)


def build(classes: int, *, backbone: Backbone, **options: Any) -> FewShotSegmenter:
    return build_segmenter(backbone, similarity_rank=3, base_classes=classes, **options)


def train(data: FoldData, folder: Path | None = None, *, completion: bool = False, **options: Any) -> TrainedFold:
    made = partial(build, backbone=data.backbone, completion=completion)
    return train_cross_fitted(made, data, folder=folder, **(SHORT | options))


def shown_classes(episodes: FeatureEpisodes) -> set[int]:
    assert isinstance(episodes, CachedEpisodes)
    return {class_id for batch in episodes.batches(100) for class_id in batch.class_ids}


class TestClassGroups:
    def test_deals_out_the_base_classes(self, data: FoldData) -> None:
        assert data.split == ClassSplit(base=BASE, novel=NOVEL)
        assert class_groups(data) == GROUPS
        assert class_groups(data)[0] == data.choices.novel

    @pytest.mark.parametrize("fold", range(4))
    def test_are_the_other_folds_of_pascal(self, tiny_backbone: Backbone, shared_voc: Path, fold: int) -> None:
        opened = open_fold(
            VocSource(shared_voc), tiny_backbone, get_protocol("hsnet"), fold=fold, resolution=64, validation_fold=None
        )
        groups = class_groups(opened)
        others = {tuple(range(5 * k + 1, 5 * k + 6)) for k in range(4) if k != fold}
        assert set(groups) == others
        assert sorted(class_id for group in groups for class_id in group) == sorted(opened.split.base)

    @pytest.mark.parametrize("count", [2, 3, 4, 7])
    def test_any_number_of_classes(self, data: FoldData, count: int) -> None:
        base = tuple(range(1, count + 1))
        held_out = ClassSplit(base=base[:-1], novel=base[-1:])
        groups = class_groups(replace(data, split=ClassSplit(base=base, novel=(90,)), held_out=held_out))
        assert sorted(class_id for group in groups for class_id in group) == list(base)
        assert all(groups)
        assert len(groups) == min(count, 3)

    def test_one_class_cannot_be_dealt(self, data: FoldData) -> None:
        with pytest.raises(DataError, match=r"two groups, synthetic has 1 \(.*\) in one; .*--training joint"):
            class_groups(replace(data, split=ClassSplit(base=(1,), novel=(90,)), held_out=None))


class TestGroupEpisodes:
    def test_show_the_classes_of_the_group_alone(self, data: FoldData) -> None:
        episodes = group_episodes(data, (3, 4), shots=2, count=20, seed=0)
        assert len(episodes) == 20
        assert shown_classes(episodes) == {3, 4}
        batch = next(episodes.batches(20))
        assert batch.stored is not None  # nothing is mirrored
        assert all(spec.shots == 2 for spec in batch.specs)

    @pytest.mark.parametrize("classes", [(7,), (1, 8), (99,)])
    def test_novel_classes_are_refused(self, data: FoldData, classes: tuple[int, ...]) -> None:
        with pytest.raises(DataError, match=rf"classes \[{classes[-1]}\] are not among the base classes; novel"):
            group_episodes(data, classes, shots=1, count=2, seed=0)

    def test_photos_that_the_protocol_shuts_out_stay_out(self, voc: FoldData) -> None:
        """BAM trains on no photo that shows a novel class: here, those of class 17 with class 1 in a corner."""
        strict = replace(voc, protocol=replace(voc.protocol, novel_in_training="excluded"))
        for opened, expected in ((voc, True), (strict, False)):
            episodes = group_episodes(opened, (16, 17), shots=1, count=40, seed=0)
            shown = {
                image_id
                for batch in episodes.batches(40)
                for spec in batch.specs
                for image_id in (*spec.support_ids, spec.query_id)
            }
            novel = {image_id for image_id in shown if set(voc.training_index.areas[image_id]) & {1, 2}}
            assert bool(novel) == expected


def by_hand() -> ClassCells:
    """Photos 0, 1 and 2 of two cells each, classes 4, 6 and 9: 0 shows 4; 1 shows 6; 2 shows 4 and 9."""
    shares = torch.tensor(
        [
            [0.5, 0.0, 0.0, 0.5],
            [0.0, 0.0, 0.0, 1.0],
            [0.0, 0.75, 0.0, 0.25],
            [0.0, 0.0, 0.0, 0.5],  # half of it is ignored
            [0.25, 0.0, 0.5, 0.25],
            [0.0, 0.0, 1.0, 0.0],
        ]
    )
    cells = torch.arange(12.0).reshape(6, 2).half()
    return ClassCells(cells=cells, shares=shares.half(), photos=torch.tensor([0, 0, 1, 1, 2, 2]), classes=(4, 6, 9))


class TestClassCells:
    def test_of_all_classes(self) -> None:
        cells, shares = by_hand().of((4, 6, 9))
        assert torch.equal(cells, by_hand().cells)
        assert torch.equal(shares, by_hand().shares)

    def test_photos_without_the_classes_are_dropped(self) -> None:
        cells, shares = by_hand().of((6,))
        assert torch.equal(cells, by_hand().cells[2:4])
        assert shares.tolist() == [[0.75, 0.25], [0.0, 0.5]]

    def test_other_classes_become_background(self) -> None:
        cells, shares = by_hand().of((9, 6))  # in the order that was asked for
        assert torch.equal(cells, by_hand().cells[2:])
        assert shares.tolist() == [[0.0, 0.75, 0.25], [0.0, 0.0, 0.5], [0.5, 0.0, 0.5], [1.0, 0.0, 0.0]]


class TestCellsOfAFold:
    def test_equal_a_plain_computation(self, voc: FoldData) -> None:
        """Every cell is 16 x 16 pixels: shares are counts of labels, and ignored pixels are in none."""
        found = class_cells(voc, per_photo=16)
        base = voc.split.base
        assert found.classes == base
        assert found.shares.shape == (len(found.cells), len(base) + 1)
        photos = list(dict.fromkeys(image_id for image_id, _ in voc.training_pairs))
        assert torch.equal(found.photos, torch.arange(len(photos)).repeat_interleave(16))
        ignored = 0
        for number, image_id in enumerate(photos):
            frozen = join_levels(voc.store.get([image_id]))[0]
            rows = found.photos == number
            of_cells = {tuple(one.tolist()): n for n, one in enumerate(found.cells[rows])}
            assert len(of_cells) == 16
            masks = torch.cat([voc.training_masks.get([image_id], [class_id]) for class_id in base])
            for y in range(4):
                for x in range(4):
                    block = masks[:, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16].flatten(1)
                    counts = [int((one == 1).sum()) for one in block]
                    rest = int((block == 0).all(dim=0).sum())
                    shares = found.shares[rows][of_cells[tuple(frozen[:, y, x].half().tolist())]]
                    expected = [count / 256 for count in (*counts, rest)]
                    assert shares.tolist() == pytest.approx(expected, abs=1e-3)
                    ignored += 256 - sum(counts) - rest
        assert ignored > 0
        assert found.shares.float().sum(dim=1).max() <= 1 + 1e-3
        assert found.shares.min() >= 0

    def test_some_cells_of_every_photo_by_the_seed(self, data: FoldData) -> None:
        few, same, other = (class_cells(data, per_photo=5, seed=seed) for seed in (0, 0, 1))
        photos = len({image_id for image_id, _ in data.training_pairs})
        assert torch.equal(few.photos, torch.arange(photos).repeat_interleave(5))
        assert few.cells.dtype == few.shares.dtype == torch.half
        assert torch.equal(few.cells, same.cells)
        assert not torch.equal(few.cells, other.cells)
        torch.testing.assert_close(few.cells.float().norm(dim=1), torch.ones(len(few.cells)), rtol=1e-2, atol=1e-2)


@dataclass
class Seen:
    """What the parts of a training were given, in order."""

    trained: list[tuple[ClassSplit, set[int]]] = field(default_factory=list)
    known: list[tuple[int, ...]] = field(default_factory=list)
    asked: list[tuple[tuple[int, ...], int, set[int]]] = field(default_factory=list)


@pytest.fixture(scope="module")
def uninterrupted(data: FoldData, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainedFold, Path, Seen]:
    seen, folder, of = Seen(), tmp_path_factory.mktemp("whole"), ClassCells.of

    def watched_training(data: FoldData, classes: ClassSplit, **arguments: Any) -> FeatureEpisodes:
        found = training_episodes(data, classes, **arguments)
        seen.trained.append((classes, shown_classes(found)))
        return found

    def watched_group(data: FoldData, classes: tuple[int, ...], **arguments: Any) -> FeatureEpisodes:
        found = group_episodes(data, classes, **arguments)
        seen.asked.append((classes, arguments["shots"], shown_classes(found)))
        return found

    def watched_cells(cells: ClassCells, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
        seen.known.append(tuple(classes))
        return of(cells, classes)

    with pytest.MonkeyPatch.context() as patch:
        quick = partial(cross_fitted_fold.train_base_learner, steps=5, batch_size=32)
        patch.setattr(cross_fitted_fold, "train_base_learner", quick)
        patch.setattr(cross_fitted_fold, "training_episodes", watched_training)
        patch.setattr(cross_fitted_fold, "group_episodes", watched_group)
        patch.setattr(ClassCells, "of", watched_cells)
        return train(data, folder), folder, seen


class TestTraining:
    def test_no_embedding_sees_its_group_or_novel_classes(self, uninterrupted: tuple[TrainedFold, Path, Seen]) -> None:
        seen = uninterrupted[2]
        assert len(seen.trained) == len(seen.known) == len(GROUPS) + 1
        for group, (classes, shown), known in zip(GROUPS, seen.trained, seen.known, strict=False):
            others = set(BASE) - set(group)
            assert set(classes.base) == set(known) == others
            assert set(classes.novel) == {*group, *NOVEL}
            assert shown <= others
        classes, shown = seen.trained[-1]
        assert classes == ClassSplit(base=BASE, novel=NOVEL)
        assert seen.known[-1] == BASE
        assert shown <= set(BASE)

    def test_the_decoder_learns_from_every_group(self, uninterrupted: tuple[TrainedFold, Path, Seen]) -> None:
        asked = uninterrupted[2].asked
        assert [(group, shots) for group, shots, _ in asked] == [(one, shots) for one in GROUPS for shots in (1, 2)]
        assert all(shown <= set(group) for group, _, shown in asked)

    def test_what_comes_out(self, uninterrupted: tuple[TrainedFold, Path, Seen]) -> None:
        trained, folder, _ = uninterrupted
        segmenter = trained.segmenter
        assert segmenter.base_learner is not None
        assert segmenter.base_learner.classes == len(BASE)
        assert (segmenter.threshold, trained.selection) == (0.0, None)
        assert isinstance(segmenter.decoder, ContextDecoder)
        assert segmenter.decoder.exit.weight.abs().sum() > 0
        assert not torch.equal(segmenter.decoder.scale, torch.ones(10))
        assert not any(module.training for module in segmenter.modules())
        assert trained.result.steps == SHORT["decoder_steps"]
        assert trained.held_out_miou is not None
        assert 0 < trained.held_out_miou < 100
        names = sorted(one.name for one in folder.iterdir())
        assert names == ["all", "decoder", "group0", "group1", "group2"]
        for name, steps in (("group0", 3), ("all", 3), ("decoder", 4)):
            assert (folder / name / "checkpoint.safetensors").exists()
            lines = (folder / name / "training.jsonl").read_text().splitlines()
            assert all(json.loads(line)["step"] <= steps for line in lines)

    def test_without_a_folder_it_is_the_same(
        self, data: FoldData, uninterrupted: tuple[TrainedFold, Path, Seen]
    ) -> None:
        trained = train(data)
        assert trained.held_out_miou == uninterrupted[0].held_out_miou
        assert_same_weights(trained, uninterrupted[0])

    def test_weak_supports_cost_masks_nothing(
        self, data: FoldData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """The embedding is that of masks; each decoder learns from what it will answer for."""
        learned = list[tuple[int, int]]()

        def train_and_note(decoder: ContextDecoder, stored: dict[str, Tensor], **options: Any) -> TrainingResult:
            learned.append((decoder.prior_channels, len(stored["priors"])))
            return train_decoder(decoder, stored, **options)

        monkeypatch.setattr(cross_fitted_fold, "train_decoder", train_and_note)
        masks = train(data, completion=True)
        weak = train(data, tmp_path, completion=True, supports=("mask", "box", "label"))
        episodes = len(GROUPS) * sum(count for _, count in SHORT["decoder_episodes"])
        assert learned == [(11, episodes), (11, episodes), (11, 2 * episodes)]
        expected, found = (trained_tensors(one.segmenter) for one in (masks, weak))
        for name in expected:  # nearly: the completion's gradients are clipped together with the similarity's
            if name.startswith(("similarity.", "base_learner.")):
                assert (found[name] - expected[name]).norm() < 0.1 * expected[name].norm(), name
        assert weak.segmenter.weak_decoder is not None
        assert not torch.equal(weak.segmenter.weak_decoder.exit.weight, weak.segmenter.decoder.exit.weight)  # type: ignore[union-attr]
        again = train(data, tmp_path, completion=True, supports=("mask", "box", "label"), resume=True)
        assert_same_weights(again, weak)

    def test_objects_are_those_of_the_classes_that_train(self, data: FoldData, tmp_path: Path) -> None:
        """What answers for bare photos is fitted to base classes; of the group's own priors, to the other groups."""
        options = {"completion": True, "supports": ("mask", "label")}
        trained = train(data, tmp_path, **options)
        cells = class_cells(data, seed=SHORT["seed"])
        for number, group in enumerate((*GROUPS, ())):
            expected = ObjectClassifier(feature_channels=cells.cells.shape[1])
            expected.fit(*cells.of(tuple(class_id for class_id in BASE if class_id not in group)))
            folder = tmp_path / (f"group{number}" if group else "all")
            tensors, _ = read_tensors(folder / "checkpoint.safetensors")
            assert torch.equal(tensors["completion.objects.weight"], expected.weight)
        assert trained.segmenter.completion is not None
        assert trained.segmenter.completion.objects is not None
        assert torch.equal(trained.segmenter.completion.objects.weight, expected.weight)

    def test_classes_with_few_photos_give_what_they_can(self, data: FoldData, monkeypatch: pytest.MonkeyPatch) -> None:
        """A class is on 24 photos at most: too few for 24 supports that must differ."""
        own = replace(data, protocol=replace(data.protocol, repeat_supports=False))
        asked = list[int]()

        def watched(*arguments: Any, **named: Any) -> FeatureEpisodes:
            asked.append(named["shots"])
            return group_episodes(*arguments, **named)

        monkeypatch.setattr(cross_fitted_fold, "group_episodes", watched)
        train(own, steps=1, decoder_steps=1, decoder_episodes=((1, 4), (24, 2)))
        assert asked == [1, 1, 1]


def assert_same_weights(one: TrainedFold, other: TrainedFold) -> None:
    left, right = trained_tensors(one.segmenter), trained_tensors(other.segmenter)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


class TestResume:
    @pytest.mark.parametrize(
        ("part", "call"),
        [("train_embedding", 1), ("priors_of_episodes", 2), ("train_embedding", 3), ("train_decoder", 0)],
    )
    def test_killed_and_resumed_it_ends_the_same(
        self,
        data: FoldData,
        uninterrupted: tuple[TrainedFold, Path, Seen],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        part: str,
        call: int,
    ) -> None:
        whole, calls = getattr(cross_fitted_fold, part), iter(range(100))

        def dies(*arguments: Any, **named: Any) -> Any:
            if next(calls) == call:
                raise KeyboardInterrupt
            return whole(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(cross_fitted_fold, part, dies)
            with pytest.raises(KeyboardInterrupt):
                train(data, tmp_path, resume=True)
        done = {one.parent.name: one.stat().st_mtime_ns for one in tmp_path.glob("*/priors.safetensors")}
        expected = {"train_embedding": call, "priors_of_episodes": call // 2, "train_decoder": 3}[part]
        assert len(done) == expected
        resumed = train(data, tmp_path, resume=True)
        assert_same_weights(resumed, uninterrupted[0])
        assert resumed.held_out_miou == uninterrupted[0].held_out_miou
        for name, when in done.items():  # a group that was done is not done again
            assert (tmp_path / name / "priors.safetensors").stat().st_mtime_ns == when

    def test_other_settings_are_refused_by_the_priors_too(self, data: FoldData, tmp_path: Path) -> None:
        """The embeddings' checkpoints know of neither the episodes nor the model."""
        train(data, tmp_path, steps=1, decoder_steps=1)
        train(data, tmp_path, steps=1, decoder_steps=1, resume=True)
        for changed, message in (
            ({"decoder_episodes": ((1, 5),)}, r"episodes was \[\[1, 5\], \[2, 3\]\], now \[\[1, 5\]\]"),
            ({"augment": "none"}, "augment was mirror, now none"),
            ({"completion": True}, "completion was None, now"),
        ):
            with pytest.raises(DataError, match=message):
                train(data, tmp_path, resume=True, **({"steps": 1, "decoder_steps": 1} | changed))

    def test_without_resume_it_starts_anew(self, data: FoldData, tmp_path: Path) -> None:
        train(data, tmp_path, steps=1, decoder_steps=1)
        stale = [tmp_path / "group1" / "priors.safetensors", tmp_path / "all" / "known_priors.safetensors"]
        for one in stale:
            one.write_bytes(b"of another run")
        train(data, tmp_path, steps=1, decoder_steps=1, known_episodes=((1, 4),))
        assert all(one.read_bytes() != b"of another run" for one in stale)


class TestKnownEpisodes:
    def test_teach_the_decoder_but_do_not_count(self, data: FoldData, monkeypatch: pytest.MonkeyPatch) -> None:
        scored, taught, whole = list[dict[str, Tensor]](), list[dict[str, Tensor]](), cross_fitted_fold._cell_miou

        def scores(decoder: torch.nn.Module, stored: dict[str, Tensor]) -> float:
            scored.append(stored)
            return whole(decoder, stored)

        def teaches(decoder: ContextDecoder, stored: dict[str, Tensor], **options: Any) -> TrainingResult:
            taught.append(stored)
            return train_decoder(decoder, stored, **options)

        monkeypatch.setattr(cross_fitted_fold, "_cell_miou", scores)
        monkeypatch.setattr(cross_fitted_fold, "train_decoder", teaches)
        without = train(data, steps=1, decoder_steps=1)
        known = train(data, steps=1, decoder_steps=1, known_episodes=((1, 4), (2, 3)))
        assert [len(one["priors"]) for one in scored] == [24, 24]  # 5 + 3 of each group
        assert [len(one["priors"]) for one in taught] == [24, 31]
        for name, tensor in scored[0].items():
            assert torch.equal(tensor, scored[1][name]), name
            assert torch.equal(tensor, taught[1][name][:24]), name
        assert known.held_out_miou is not None
        left, right = trained_tensors(without.segmenter), trained_tensors(known.segmenter)
        assert {name.split(".")[0] for name in left if not torch.equal(left[name], right[name])} == {"decoder"}

    def test_are_kept_for_a_resumed_run(self, data: FoldData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given: dict[str, Any] = {"steps": 1, "decoder_steps": 2, "known_episodes": ((1, 4),), "resume": True}

        def dies(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(cross_fitted_fold, "train_decoder", dies)
            with pytest.raises(KeyboardInterrupt):
                train(data, tmp_path, **given)
        assert (tmp_path / "all" / "known_priors.safetensors").exists()
        with monkeypatch.context() as patch:
            patch.setattr(cross_fitted_fold, "priors_of_episodes", dies)  # all are at hand
            resumed = train(data, tmp_path, **given)
        whole = train(data, **given)
        assert_same_weights(resumed, whole)
        assert resumed.held_out_miou == whole.held_out_miou
        with pytest.raises(DataError, match=r"known_priors\.safetensors belongs .*episodes was \[\[1, 4\]\], now"):
            train(data, tmp_path, **(given | {"known_episodes": ((1, 5),)}))


class TestRefused:
    def test_a_model_without_a_base_learner(self, data: FoldData) -> None:
        with pytest.raises(DataError, match="trains a model with a base learner and a ContextDecoder"):
            train_cross_fitted(lambda _: build_segmenter(data.backbone, similarity_rank=3), data, **SHORT)

    def test_one_group(self, data: FoldData) -> None:
        alone = replace(data, split=ClassSplit(base=(1, 2), novel=NOVEL), held_out=ClassSplit(base=(), novel=(1, 2)))
        with pytest.raises(DataError, match=r"two groups, synthetic has 2 \(.*\) in one; name fewer --novel-classes"):
            train(alone)

    def test_several_processes(self, data: FoldData, monkeypatch: pytest.MonkeyPatch) -> None:
        class Two:
            size, first = 2, True

        monkeypatch.setattr(cross_fitted_fold, "current_ranks", Two)
        with pytest.raises(DataError, match=r"runs in one process; .* or add --training joint"):
            train(data)
