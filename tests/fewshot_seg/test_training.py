"""Training: losses that fall, and runs that survive being killed.

As a script (``python test_training.py FOLDER``) it trains the tiny task and kills itself with SIGKILL in
the middle of writing a checkpoint.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from episodes.index import build_index
from episodes.sampler import EpisodeSampler
from episodes.sources import SyntheticSource
from episodes.types import SUPPORT_KINDS, DataError, SupportKind
from fewshot_seg.backbones import build_backbone
from fewshot_seg.checkpoint import read_tensors, trained_tensors
from fewshot_seg.decoder import PriorReadout
from fewshot_seg.feature_episodes import CachedEpisodes, FeatureBatch, FeatureEpisodes
from fewshot_seg.features import FeatureStore, MaskStore
from fewshot_seg.losses import balanced_map_loss, segmentation_loss
from fewshot_seg.optimisation import CHECKPOINT_NAME, TrainingResult, learning_rate_at
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter
from fewshot_seg.similarity import SimilarityNetwork, cell_weights
from fewshot_seg.training import episode_losses, train

STEPS, BATCH = 12, 2
BACKBONE = "mobilenetv3_small_050"


@functools.cache
def tiny_episodes(
    length: int = STEPS * BATCH, *, shots: int = 1, supports: tuple[SupportKind, ...] = ("mask",)
) -> CachedEpisodes:
    source = SyntheticSource(base_classes=2, novel_classes=2, images_per_class=4, size=64)
    pairs = build_index(source, "train").pairs(source.base_class_ids)
    specs = EpisodeSampler(pairs, shots=shots, seed=0, length=length, order="random", repeat_supports=False)
    backbone = build_backbone(BACKBONE, weights="random")
    store = FeatureStore(backbone, source, size=64, directory=None)
    return CachedEpisodes(store, MaskStore(source, size=64), specs, supports=supports)


def new_model(**options: Any) -> FewShotSegmenter:
    small = {"similarity_rank": 4, "decoder_width": 8, "decoder_blocks": 1, "dropout": 0.2}
    return build_segmenter(build_backbone(BACKBONE, weights="random"), **(small | options))


def run(
    segmenter: FewShotSegmenter, folder: Path | None, *, episodes: FeatureEpisodes | None = None, **options: Any
) -> TrainingResult:
    settings: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": BATCH,
        "learning_rate": 1e-2,
        "seed": 5,
        "checkpoint_every": 4,
        "log_every": 3,
        "resume": True,
    }
    return train(segmenter, episodes or tiny_episodes(), folder=folder, **(settings | options))


class Stops:
    """Episodes that raise instead of giving a batch."""

    def __init__(self, batch: int, error: BaseException, *, supports: tuple[SupportKind, ...] = ("mask",)) -> None:
        self.batch, self.error, self.episodes = batch, error, tiny_episodes(supports=supports)

    def __len__(self) -> int:
        return len(self.episodes)

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[FeatureBatch]:
        for number, batch in enumerate(self.episodes.batches(batch_size, start=start), start // batch_size):
            if number == self.batch:
                raise self.error
            yield batch


def assert_same_weights(one: FewShotSegmenter, other: FewShotSegmenter) -> None:
    left, right = trained_tensors(one), trained_tensors(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def logged_steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "training.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[FewShotSegmenter, Path, TrainingResult]:
    segmenter, folder = new_model(), tmp_path_factory.mktemp("uninterrupted")
    return segmenter, folder, run(segmenter, folder)


class TestLosses:
    def test_are_those_of_the_prediction_and_of_the_margin(self) -> None:
        segmenter, batch = new_model().eval(), next(tiny_episodes().batches(3))
        mask_loss, metric_loss, completion = episode_losses(segmenter, batch, dice_weight=0.5)
        support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks)
        prediction = segmenter.segment_levels(support, batch.query_levels, (16, 16))
        targets = batch.query_masks[:, 2::4, 2::4]
        torch.testing.assert_close(mask_loss, segmentation_loss(prediction.logits, targets, dice_weight=0.5))
        weights = [weight.flatten(1) for weight in cell_weights(batch.query_masks, (4, 4))]
        torch.testing.assert_close(metric_loss, balanced_map_loss(prediction.priors[:, 0].flatten(1), *weights))
        assert metric_loss > 0
        assert completion.item() == 0

    @pytest.mark.parametrize("prior", ["pfenet", "none"])
    def test_no_metric_loss_where_the_similarity_network_is_not_used(self, prior: str) -> None:
        segmenter = new_model(prior=prior, appearance=2).eval()
        mask_loss, metric_loss, completion = episode_losses(segmenter, next(tiny_episodes().batches(3)), dice_weight=1)
        assert metric_loss.item() == completion.item() == 0
        assert mask_loss.item() > 0

    @pytest.mark.parametrize("options", [{}, {"prior": "none", "appearance": 8}])
    def test_go_down(self, options: dict[str, Any]) -> None:
        segmenter, batch = new_model(dropout=0.0, **options).eval(), next(tiny_episodes().batches(STEPS * BATCH))
        before = sum(loss.item() for loss in episode_losses(segmenter, batch, dice_weight=1))
        run(segmenter, None, episodes=tiny_episodes(80), steps=40)
        after = sum(loss.item() for loss in episode_losses(segmenter, batch, dice_weight=1))
        assert after < 0.85 * before


def loss_of_completed(completed: Tensor, truth: Tensor, known: Tensor) -> float:
    """One support or query by plain loops over 4 x 4 cells of 16 x 16 pixels.

    completed: (4, 4), how much of the open part was taken for object; truth and known: (64, 64), mask and annotation.
    """
    entropy, valid, overlap, sizes = 0.0, 0.0, 0.0, 0.0
    for y in range(4):
        for x in range(4):
            pixels, marks = (side[16 * y : 16 * y + 16, 16 * x : 16 * x + 16] for side in (truth, known))
            true = [(pixels == value).float().mean().item() for value in (1, 0)]
            certain = [(marks == value).float().mean().item() for value in (1, 0)]
            share, remaining = completed[y, x].item(), 1 - sum(certain)
            said = [certain[0] + remaining * share, certain[1] + remaining * (1 - share)]
            entropy -= sum(t * math.log(max(s, 1e-4)) for s, t in zip(said, true, strict=True))
            valid += sum(true)
            overlap += said[0] * true[0]
            sizes += said[0] * sum(true) + true[0]
    return entropy / valid + 1 - (2 * overlap + 1) / (sizes + 1)


class TestCompletionLoss:
    MIXED: tuple[SupportKind, ...] = ("mask", "box", "scribble", "label")

    def of(self, segmenter: FewShotSegmenter, batch: FeatureBatch) -> float:
        return episode_losses(segmenter, batch, dice_weight=1)[2].item()

    def on_queries(self, segmenter: FewShotSegmenter, batch: FeatureBatch) -> float:
        support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks, batch.support_dense)
        objectness = segmenter.segment_levels(support, batch.query_levels, (16, 16)).priors[:, -1].sigmoid()
        pairs = list(zip(objectness, batch.query_masks, strict=True))
        return sum(loss_of_completed(o, m, torch.full_like(m, 255)) for o, m in pairs) / len(pairs)

    def on_supports(self, segmenter: FewShotSegmenter, batch: FeatureBatch) -> float:
        support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks, batch.support_dense)
        shares = support.share.reshape(-1, 4, 4)
        rows = zip(
            batch.support_dense.flatten().tolist(),
            shares,
            batch.support_truth.flatten(0, 1),
            batch.support_masks.flatten(0, 1),
            strict=True,
        )
        losses = [loss_of_completed(share, truth, known) for dense, share, truth, known in rows if not dense]
        return sum(losses) / len(losses)

    @pytest.mark.parametrize("prior", ["similarity", "pfenet", "none"])
    def test_equals_the_plain_loop(self, prior: str) -> None:
        segmenter = new_model(prior=prior, appearance=2, completion=True).eval()
        batch = next(tiny_episodes(6, shots=2, supports=self.MIXED).batches(6))
        assert 0 < batch.support_dense.sum() < 12
        expected = self.on_supports(segmenter, batch)
        if prior == "similarity":  # the others do not read the query's objectness
            expected += self.on_queries(segmenter, batch)
        assert self.of(segmenter, batch) == pytest.approx(expected, rel=1e-4)

    def test_of_masks_alone_is_that_of_the_queries(self) -> None:
        segmenter, batch = new_model(completion=True).eval(), next(tiny_episodes().batches(3))
        assert self.of(segmenter, batch) == pytest.approx(self.on_queries(segmenter, batch), rel=1e-4)

    @pytest.mark.parametrize("prior", ["pfenet", "none"])
    def test_is_zero_where_nothing_was_filled_in(self, prior: str) -> None:
        segmenter = new_model(prior=prior, appearance=2, completion=True).eval()
        assert self.of(segmenter, next(tiny_episodes().batches(3))) == 0

    def test_is_zero_where_nothing_is_trained_to_fill_in(self) -> None:
        batch = next(tiny_episodes(6, supports=("box",)).batches(3))
        losses = episode_losses(new_model().eval(), batch, dice_weight=1)
        assert losses[2].item() == 0
        assert all(loss.isfinite() for loss in losses)

    def test_trains_the_completion_alone(self) -> None:
        segmenter = new_model(completion=True)
        batch = next(tiny_episodes(6, supports=("box",)).batches(3))
        torch.autograd.backward(episode_losses(segmenter, batch, dice_weight=1)[2])
        assert segmenter.completion is not None
        reached = {name for name, p in segmenter.named_parameters() if p.grad is not None and p.grad.any()}
        assert {name.split(".")[0] for name in reached} == {"completion"}

    def test_goes_down(self) -> None:
        segmenter, batch = new_model(completion=True).eval(), next(tiny_episodes(80, supports=self.MIXED).batches(12))
        before = self.of(segmenter, batch)
        run(segmenter, None, episodes=tiny_episodes(80, supports=self.MIXED), steps=40)
        assert self.of(segmenter, batch) < 0.85 * before

    def test_is_part_of_the_loss_and_of_the_log(self, tmp_path: Path) -> None:
        run(new_model(completion=True), tmp_path, episodes=tiny_episodes(supports=self.MIXED), metric_weight=0.5)
        for line in map(json.loads, (tmp_path / "training.jsonl").read_text().splitlines()):
            parts = line["mask_loss"] + 0.5 * line["metric_loss"] + line["completion_loss"]
            assert line["loss"] == pytest.approx(parts, rel=1e-5)
            assert line["completion_loss"] > 0


class TestTrain:
    def test_reports_every_step(self, uninterrupted: tuple[FewShotSegmenter, Path, TrainingResult]) -> None:
        _, _, result = uninterrupted
        assert len(result.losses) == result.steps == STEPS
        assert result.seconds > 0

    def test_is_a_function_of_its_arguments(self, uninterrupted: tuple[FewShotSegmenter, Path, TrainingResult]) -> None:
        segmenter, _, result = uninterrupted
        torch.manual_seed(123)  # whatever the global state
        state = torch.get_rng_state()
        again, other = new_model(), new_model()
        assert run(again, None).losses == result.losses
        assert_same_weights(again, segmenter)
        assert run(other, None, seed=6).losses != result.losses
        assert torch.equal(torch.get_rng_state(), state)

    def test_changes_only_what_is_trained(self) -> None:
        segmenter = new_model()
        fingerprint = segmenter.backbone.fingerprint
        before = {name: tensor.clone() for name, tensor in segmenter.state_dict().items()}
        run(segmenter, None)
        for name, tensor in segmenter.state_dict().items():
            assert torch.equal(tensor, before[name]) == name.startswith("backbone."), name
        del segmenter.backbone.__dict__["fingerprint"]  # computed anew
        assert segmenter.backbone.fingerprint == fingerprint
        assert not any(module.training for module in segmenter.modules())

    def test_files(self, uninterrupted: tuple[FewShotSegmenter, Path, TrainingResult]) -> None:
        segmenter, folder, result = uninterrupted
        assert {path.name for path in folder.iterdir()} == {"training.jsonl", "tensorboard", CHECKPOINT_NAME}
        lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [3, 6, 9, 12]
        for line in lines:
            assert line["loss"] == result.losses[line["step"] - 1]
            assert line["loss"] == pytest.approx(line["mask_loss"] + line["metric_loss"], rel=1e-5)
            assert line["rate"] == learning_rate_at(line["step"] - 1, STEPS, 1e-2, "one-cycle")
        assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
        tensors, description = read_tensors(folder / CHECKPOINT_NAME)
        assert description["step"] == STEPS
        assert torch.equal(tensors["decoder.gain"], trained_tensors(segmenter)["decoder.gain"])

    def test_without_a_folder_nothing_is_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        run(new_model(), None, steps=3)
        assert list(tmp_path.iterdir()) == []

    def test_weights_of_the_losses(self) -> None:
        plain, heavy = run(new_model(), None, steps=1), run(new_model(), None, steps=1, metric_weight=3.0)
        batch = next(tiny_episodes().batches(BATCH))
        _, metric_loss, _ = episode_losses(new_model().eval(), batch, dice_weight=1)
        assert heavy.losses[0] - plain.losses[0] == pytest.approx(2 * metric_loss.item(), rel=1e-4)

    def test_a_readout_trains_the_similarity_network_alone(self) -> None:
        backbone = build_backbone(BACKBONE, weights="random")
        segmenter = FewShotSegmenter(
            backbone=backbone, similarity=SimilarityNetwork(backbone.channels, rank=4), decoder=PriorReadout(0)
        )
        run(segmenter, None)
        assert segmenter.similarity.up.weight.any()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"steps": 0}, "steps and batch size must be at least 1, got 0 and 2"),
            ({"batch_size": 0}, "steps and batch size must be at least 1, got 12 and 0"),
            ({"steps": 13}, "13 steps of 2 need 26 episodes, got 24"),
            ({"checkpoint_every": 0}, "checkpoint_every and log_every must be at least 1, got 0 and 3"),
            ({"log_every": 0}, "checkpoint_every and log_every must be at least 1, got 4 and 0"),
            ({"schedule": "linear"}, "unknown schedule 'linear'; known: one-cycle, cosine"),
        ],
    )
    def test_refuses(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            run(new_model(), tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()

    def test_nothing_to_train(self) -> None:
        backbone = build_backbone(BACKBONE, weights="random")
        segmenter = FewShotSegmenter(
            backbone=backbone, similarity=SimilarityNetwork(backbone.channels, rank=0), decoder=PriorReadout(0)
        )
        with pytest.raises(DataError, match="nothing to train"):
            run(segmenter, None)

    def test_a_loss_that_is_not_finite_names_the_episodes(self, tmp_path: Path) -> None:
        segmenter = new_model()
        with torch.no_grad():
            assert isinstance(segmenter.decoder.gain, Tensor)
            segmenter.decoder.gain.fill_(float("nan"))
        spec = next(tiny_episodes().batches(BATCH)).specs[1]
        expected = rf"loss is nan at step 0; lower --learning-rate; episodes: .*; .*{spec.query_id}.*{spec.seed}"
        with pytest.raises(DataError, match=expected):
            run(segmenter, tmp_path)
        assert not (tmp_path / CHECKPOINT_NAME).exists()


class TestResume:
    @pytest.mark.parametrize("error", [RuntimeError("disk gone"), KeyboardInterrupt()])
    @pytest.mark.parametrize("batch", [0, 4, 7, 11])
    def test_after_an_interruption_equals_an_uninterrupted_run(
        self,
        tmp_path: Path,
        uninterrupted: tuple[FewShotSegmenter, Path, TrainingResult],
        error: BaseException,
        batch: int,
    ) -> None:
        with pytest.raises(type(error)):
            run(new_model(), tmp_path, episodes=Stops(batch, error))
        kept = batch if isinstance(error, KeyboardInterrupt) else batch // 4 * 4
        resumed = new_model(seed=9)  # its initial values must not matter, if there is a checkpoint
        result = run(resumed if (tmp_path / CHECKPOINT_NAME).exists() else new_model(), tmp_path)
        assert result.steps == STEPS
        assert result.losses == uninterrupted[2].losses[kept:]
        finished = read_tensors(tmp_path / CHECKPOINT_NAME)[0]
        expected = read_tensors(uninterrupted[1] / CHECKPOINT_NAME)[0]
        assert finished.keys() == expected.keys()
        assert [name for name in finished if not torch.equal(finished[name], expected[name])] == []
        assert (tmp_path / "training.jsonl").read_text() == (uninterrupted[1] / "training.jsonl").read_text()

    def test_interrupted_twice(
        self, tmp_path: Path, uninterrupted: tuple[FewShotSegmenter, Path, TrainingResult]
    ) -> None:
        for batch in (2, 2, 5):  # the second time before any new step
            with pytest.raises(KeyboardInterrupt):
                run(new_model(), tmp_path, episodes=Stops(batch, KeyboardInterrupt()))
        resumed = new_model()
        run(resumed, tmp_path)
        assert_same_weights(resumed, uninterrupted[0])
        assert logged_steps(tmp_path) == [3, 6, 9, 12]

    def test_interrupted_in_the_middle_of_an_update(
        self,
        tmp_path: Path,
        uninterrupted: tuple[FewShotSegmenter, Path, TrainingResult],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        whole, calls = torch.optim.AdamW.step, iter(range(100))

        def half(optimiser: torch.optim.AdamW, closure: None = None) -> Any:
            result = whole(optimiser, closure)  # weights are changed, the step is not counted yet
            if next(calls) == 6:
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", half)
            with pytest.raises(KeyboardInterrupt):
                run(new_model(), tmp_path)
        assert read_tensors(tmp_path / CHECKPOINT_NAME)[1]["step"] == 4
        resumed = new_model()
        run(resumed, tmp_path)
        assert_same_weights(resumed, uninterrupted[0])

    def test_killed_in_the_middle_of_writing_a_checkpoint(
        self, tmp_path: Path, uninterrupted: tuple[FewShotSegmenter, Path, TrainingResult]
    ) -> None:
        killed = subprocess.run(
            [sys.executable, __file__, str(tmp_path)], check=False, capture_output=True, text=True, timeout=800
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert read_tensors(tmp_path / CHECKPOINT_NAME)[1]["step"] == 4
        assert logged_steps(tmp_path) == [3, 6]
        with (tmp_path / "training.jsonl").open("a") as log:
            log.write('{"step": 9, "los')  # as a crash of the machine would leave it
        resumed = new_model()
        result = run(resumed, tmp_path)
        assert len(result.losses) == STEPS - 4
        assert_same_weights(resumed, uninterrupted[0])
        assert logged_steps(tmp_path) == [3, 6, 9, 12]

    @pytest.mark.parametrize("prior", ["similarity", "none"])
    def test_with_weak_supports_and_their_completion(self, tmp_path: Path, prior: str) -> None:
        options: dict[str, Any] = {"prior": prior, "appearance": 2, "completion": True}
        whole, resumed = new_model(**options), new_model(seed=9, **options)
        expected = run(whole, None, episodes=tiny_episodes(supports=SUPPORT_KINDS))
        stops = Stops(6, KeyboardInterrupt(), supports=SUPPORT_KINDS)
        with pytest.raises(KeyboardInterrupt):
            run(new_model(**options), tmp_path, episodes=stops)
        result = run(resumed, tmp_path, episodes=tiny_episodes(supports=SUPPORT_KINDS))
        assert result.losses == expected.losses[6:]
        assert_same_weights(resumed, whole)
        tensors = read_tensors(tmp_path / CHECKPOINT_NAME)[0]
        assert whole.completion is not None
        for name, tensor in whole.completion.state_dict().items():
            assert torch.equal(tensors[f"completion.{name}"], tensor), name
        with pytest.raises(DataError, match="does not fit this model"):
            run(new_model(**options | {"completion": False}), tmp_path, episodes=tiny_episodes(supports=SUPPORT_KINDS))

    def test_tensorboard_has_every_step_once(self, tmp_path: Path) -> None:
        for batch, error in ((5, KeyboardInterrupt()), (9, RuntimeError())):
            with pytest.raises(type(error)):
                run(new_model(), tmp_path, episodes=Stops(batch, error), log_every=1)
        run(new_model(), tmp_path, log_every=1)
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == list(range(1, STEPS + 1))

    def test_a_finished_run_is_left_as_it_is(
        self, tmp_path: Path, uninterrupted: tuple[FewShotSegmenter, Path, TrainingResult]
    ) -> None:
        run(new_model(), tmp_path)
        resumed = new_model(seed=9)
        result = run(resumed, tmp_path)
        assert result.losses == ()
        assert result.steps == STEPS
        assert_same_weights(resumed, uninterrupted[0])

    def test_without_resume_it_starts_again(
        self, tmp_path: Path, uninterrupted: tuple[FewShotSegmenter, Path, TrainingResult]
    ) -> None:
        with pytest.raises(KeyboardInterrupt):
            run(new_model(), tmp_path, episodes=Stops(7, KeyboardInterrupt()))
        again = new_model()
        result = run(again, tmp_path, resume=False)
        assert result.losses == uninterrupted[2].losses
        assert logged_steps(tmp_path) == [3, 6, 9, 12]

    @pytest.mark.parametrize(
        "other",
        [{"learning_rate": 1e-3}, {"seed": 6}, {"steps": 11}, {"schedule": "cosine"}, {"metric_weight": 0.5}],
    )
    def test_refuses_another_runs_checkpoint(self, tmp_path: Path, other: dict[str, Any]) -> None:
        with pytest.raises(KeyboardInterrupt):
            run(new_model(), tmp_path, episodes=Stops(1, KeyboardInterrupt()))
        log = (tmp_path / "training.jsonl").read_text()
        expected = rf"{CHECKPOINT_NAME} belongs to a run with other settings .* choose another --out, or leave out"
        with pytest.raises(DataError, match=expected):
            run(new_model(), tmp_path, **other)
        assert (tmp_path / "training.jsonl").read_text() == log

    def test_refuses_the_checkpoint_of_another_model(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            run(new_model(), tmp_path, episodes=Stops(1, KeyboardInterrupt()))
        with pytest.raises(DataError, match="does not fit this model"):
            run(new_model(decoder_width=16), tmp_path)

    def test_refuses_a_damaged_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / CHECKPOINT_NAME).write_bytes(b"\x00" * 40)
        with pytest.raises(DataError, match=rf"{CHECKPOINT_NAME} is damaged"):
            run(new_model(), tmp_path)


def train_until_killed(folder: Path) -> None:
    """Die by SIGKILL with the second checkpoint half written."""
    torch.set_num_threads(1)
    calls, write = iter(range(100)), Path.write_bytes

    def half(path: Path, content: bytes) -> int:
        if next(calls) == 1:
            write(path, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, content)

    with mock.patch.object(Path, "write_bytes", half):
        run(new_model(), folder)


if __name__ == "__main__":
    train_until_killed(Path(sys.argv[1]))
