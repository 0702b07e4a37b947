"""A step whose numbers are not finite: who is named, what is kept, that the run goes on as if it had never been."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from episodes.sampler import spec_to_json
from episodes.types import DataError
from fewshot_seg.backbones import Backbone
from fewshot_seg.bad_steps import BAD_STEP_NAME, account_of_episodes, episodes_of, not_finite, read_bad_step
from fewshot_seg.checkpoint import trained_tensors
from fewshot_seg.cli import main
from fewshot_seg.cross_fitting import priors_of_episodes, train_decoder, train_embedding
from fewshot_seg.decoder import ContextDecoder
from fewshot_seg.feature_episodes import CachedEpisodes, FeatureBatch, FeatureEpisodes
from fewshot_seg.optimisation import CHECKPOINT_NAME, Plan, optimise
from fewshot_seg.replay import main as replay_main
from fewshot_seg.replay import replay
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter
from fewshot_seg.similarity_training import train_on_episodes
from fewshot_seg.trainee import NamedModules
from fewshot_seg.training import train

DrawEpisodes = Callable[..., CachedEpisodes]
STEPS, BATCH = 6, 3
FILE = f"{BAD_STEP_NAME}.safetensors"


class Poisoned:
    """Episodes of which one, by its number, has a feature that is not a number."""

    def __init__(self, episodes: CachedEpisodes, number: int, *, side: str = "query_levels") -> None:
        self._episodes, self._number, self._side = episodes, number, side

    def __len__(self) -> int:
        return len(self._episodes)

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[FeatureBatch]:
        for first, batch in enumerate(self._episodes.batches(batch_size, start=start)):
            row = self._number - start - first * batch_size
            if 0 <= row < len(batch.specs):
                levels = [level.clone() for level in getattr(batch, self._side)]
                levels[0][row, 0, 0, 0] = math.nan
                batch = dataclasses.replace(batch, stored=None, **{self._side: tuple(levels)})
            yield batch


def spec_of(episodes: FeatureEpisodes, number: int) -> str:
    return spec_to_json(next(episodes.batches(1, start=number)).specs[0])


def model(backbone: Backbone, **options: Any) -> FewShotSegmenter:
    return build_segmenter(backbone, similarity_rank=3, seed=1, **options)


def joint(segmenter: FewShotSegmenter, episodes: FeatureEpisodes, folder: Path | None, **options: Any) -> None:
    train(segmenter, episodes, steps=STEPS, batch_size=BATCH, learning_rate=1e-2, folder=folder, **options)


def embedding(segmenter: FewShotSegmenter, episodes: FeatureEpisodes, folder: Path | None, **options: Any) -> None:
    train_embedding(segmenter, episodes, steps=STEPS, batch_size=BATCH, folder=folder, **options)


def similarity(segmenter: FewShotSegmenter, episodes: FeatureEpisodes, folder: Path | None, **options: Any) -> None:
    plan = Plan(steps=STEPS, learning_rate=1e-2, weight_decay=0.0, schedule="cosine", seed=0, details={})
    train_on_episodes(segmenter, episodes, batch_size=BATCH, maps=("soft margin",), plan=plan, folder=folder, **options)


TRAININGS = {"joint": joint, "embedding": embedding}
OPTIONS: dict[str, dict[str, Any]] = {
    "joint": {"decoder_width": 8},
    "embedding": {"base_classes": 3, "completion": True},
}


@pytest.fixture
def episodes(draw_episodes: DrawEpisodes) -> CachedEpisodes:
    return draw_episodes(STEPS * BATCH)


@pytest.mark.parametrize("kind", TRAININGS)
class TestEveryTraining:
    def test_names_the_one_episode_and_ends_as_if_it_had_been_mended_before(
        self, tmp_path: Path, tiny_backbone: Backbone, episodes: CachedEpisodes, kind: str
    ) -> None:
        run, options = TRAININGS[kind], OPTIONS[kind]
        whole, stopped, resumed = (model(tiny_backbone, **options) for _ in range(3))
        run(whole, episodes, None)
        with pytest.raises(DataError) as raised:
            run(stopped, Poisoned(episodes, 3 * BATCH + 1), tmp_path)
        message = str(raised.value)
        assert message.startswith("loss is nan at step 3; what it read is not finite (query_level0): mend that")
        assert f"episodes: {spec_of(episodes, 3 * BATCH + 1)}; its batch is kept" in message
        assert message.count("query_id") == 1  # no other episode is blamed
        assert "\n" not in message
        run(resumed, episodes, tmp_path, resume=True)
        expected = trained_tensors(whole)
        assert all(torch.equal(value, expected[name]) for name, value in trained_tensors(resumed).items())

    def test_is_replayed_without_data_or_backbone(
        self, tmp_path: Path, tiny_backbone: Backbone, episodes: CachedEpisodes, kind: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        with pytest.raises(DataError):
            TRAININGS[kind](model(tiny_backbone, **OPTIONS[kind]), Poisoned(episodes, 4), tmp_path)
        assert replay_main([str(tmp_path / FILE)]) == 1
        said, named = capsys.readouterr().out, spec_of(episodes, 4)
        assert f"not finite in query_level0: {named}" in said
        assert f"not finite alone: {named}" in said
        assert said.count("not finite alone") == 1
        assert said.endswith("loss or gradient is not finite\n")


def test_the_replayed_loss_is_the_one_that_was(
    tmp_path: Path, tiny_backbone: Backbone, episodes: CachedEpisodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that is in order is replayed to the loss of its step, dropout included."""
    segmenter = model(tiny_backbone, decoder_width=8, dropout=0.3)
    seen = list[float]()
    real = torch.isfinite

    def lies_at_step_2(value: Tensor) -> Tensor:
        if value.ndim == 0 and value.requires_grad:
            seen.append(value.item())
            return torch.tensor(len(seen) not in (3, 4))
        return real(value)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "isfinite", lies_at_step_2)
        with pytest.raises(DataError, match="at step 2; lower --learning-rate; episodes: "):
            joint(segmenter, episodes, tmp_path)
    lines, finite = replay(tmp_path / FILE)
    assert finite
    found = next(float(line.removeprefix("loss: ")) for line in lines if line.startswith("loss: "))
    assert found == seen[2]


def test_supports_are_examined_too(tmp_path: Path, tiny_backbone: Backbone, episodes: CachedEpisodes) -> None:
    with pytest.raises(DataError, match=r"at step 0; what it read is not finite \(support_level0\)"):
        joint(model(tiny_backbone, decoder_width=8), Poisoned(episodes, 2, side="support_levels"), tmp_path)
    assert not (tmp_path / CHECKPOINT_NAME).exists()  # nothing was learned yet


def test_similarity_on_episodes(tmp_path: Path, tiny_backbone: Backbone, episodes: CachedEpisodes) -> None:
    with pytest.raises(DataError) as raised:
        similarity(model(tiny_backbone), Poisoned(episodes, 5), tmp_path)
    assert f"; episodes: {spec_of(episodes, 5)}; its batch" in str(raised.value)
    with pytest.raises(DataError, match=r"cannot read record of the run .*run\.json"):
        replay(tmp_path / FILE)  # its losses are the run's


def test_the_decoder_of_a_cross_fitted_training(
    tmp_path: Path, tiny_backbone: Backbone, episodes: CachedEpisodes
) -> None:
    segmenter = model(tiny_backbone, base_classes=3)
    stored = priors_of_episodes(segmenter, episodes)
    decoder = segmenter.decoder
    assert isinstance(decoder, ContextDecoder)
    whole = {name: part.clone() for name, part in stored.items()}
    decoder.fit_scales(whole["priors"])
    stored["priors"][7, 0, 1, 1] = math.inf
    arguments: dict[str, Any] = {"steps": 8, "batch_size": 4, "folder": tmp_path, "name": lambda n: f"number {n}"}
    with pytest.raises(DataError, match=r"is nan at step \d; .*\(priors\).*; episodes: number 7; its batch is kept"):
        train_decoder(decoder, stored, **arguments)
    lines, finite = replay(tmp_path / FILE)
    assert not finite
    assert "not finite alone: number 7" in lines


class TestGradient:
    """A loss may be finite where its gradient is not: sqrt at 0."""

    def run(self, folder: Path, layer: nn.Linear, rows: Sequence[float]) -> None:
        plan = Plan(steps=3, learning_rate=0.1, weight_decay=0.0, schedule="cosine", seed=0, details={})
        optimise(
            NamedModules(layer=layer),
            lambda step: iter([torch.tensor([[row]]) for row in rows][step:]),
            lambda batch: {"loss": layer(batch).square().sum().sqrt()},
            plan=plan,
            describe=lambda batch: _account(batch),
            folder=folder,
        )

    def test_is_not_taken(self, tmp_path: Path) -> None:
        layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(layer.weight)
        with pytest.raises(DataError, match=r"gradient is nan at step 1; lower --learning-rate; rows: 0\.0; its batch"):
            self.run(tmp_path, layer, [1.0, 0.0, 1.0])
        assert bool(torch.isfinite(layer.weight).all())
        assert read_bad_step(tmp_path / FILE).noted["step"] == 1
        assert (tmp_path / CHECKPOINT_NAME).exists()


def _account(batch: Tensor) -> Any:
    from fewshot_seg.bad_steps import Account

    return Account(what="rows", names=tuple(str(row.item()) for row in batch), tensors={"rows": batch})


class TestKept:
    def test_batch_comes_back(self, draw_episodes: DrawEpisodes) -> None:
        batch = next(draw_episodes(3, shots=2).batches(3))
        account = account_of_episodes(batch)
        again, one = episodes_of(account.tensors, account.names), episodes_of(account.tensors, account.names, 1)
        assert again.specs == batch.specs
        assert one.specs == batch.specs[1:2]
        for side in ("support_levels", "query_levels"):
            for found, expected in zip(getattr(again, side), getattr(batch, side), strict=True):
                assert torch.equal(found, expected)
        assert torch.equal(one.support_levels[0], batch.support_levels[0][2:4])
        assert torch.equal(one.query_masks, batch.query_masks[1:2])

    def test_not_finite(self) -> None:
        tensors = {"two a row": torch.zeros(6, 2), "whole": torch.zeros(3, dtype=torch.int64), "fine": torch.ones(3)}
        tensors["two a row"][5, 0] = math.inf
        assert not_finite(tensors, 3) == {"two a row": [2]}

    def test_other_files_are_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "x").write_bytes(b"no")
        assert replay_main([str(tmp_path / "x")]) == 2
        assert "is damaged or was not written by fewshot-seg" in capsys.readouterr().err


def test_command_line(tmp_path: Path, shared_voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one line, the batch beside the run, and a state before it that is whole."""
    arguments: list[Any] = ["train", "--data", "voc", "--root", shared_voc, "--fold", 0, "--out", tmp_path / "run"]
    arguments += ["--backbone", "mobilenetv3_small_050", "--backbone-weights", "random", "--resolution", 64]
    arguments += ["--training", "joint", "--no-select-threshold", "--steps", 6, "--batch-size", 2]
    arguments += ["--cache", tmp_path / "cache", "--learning-rate", "1e38"]
    assert main([str(one) for one in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewshot-seg: error")]
    assert len(lines) == 1
    assert "lower --learning-rate; episodes: " in lines[0]
    kept = tmp_path / "run" / FILE
    assert f"python -m fewshot_seg.replay {kept}" in lines[0]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["results"] is None
    assert replay_main([str(kept)]) == 1


def test_command_line_of_the_similarity(
    tmp_path: Path, photo_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: list[Any] = ["similarity", "train", "--root", photo_folders, "--out", tmp_path / "run", "--steps", 4]
    arguments += ["--backbone", "mobilenetv3_small_050", "--backbone-weights", "random", "--resolution", 64]
    arguments += ["--classes", 3, "--photos", 3, "--constraint", 0.5, "--cache", tmp_path / "cache"]
    assert main([str(one) for one in [*arguments, "--learning-rate", "1e30"]]) == 2
    assert "photos: train/" in capsys.readouterr().err
    assert replay_main([str(tmp_path / "run" / FILE)]) == 1
    assert "losses: similarity photos" in capsys.readouterr().out
