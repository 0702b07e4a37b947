"""What every rival must do, whatever its method: one contract for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from episodes.sources import SyntheticSource
from episodes.types import DataError
from fewshot_seg.evaluation import choose_logit_thresholds, evaluate_logits
from fewshot_seg.feature_episodes import CachedEpisodes, FeatureBatch
from fewshot_seg.losses import segmentation_loss
from fewshot_seg.metrics import EpisodeIoU
from fewshot_seg.rivals.correlation import CorrelationNetwork
from fewshot_seg.rivals.enrichment import EnrichmentNetwork
from fewshot_seg.rivals.experiment import train_rival, trainable_parameters
from fewshot_seg.rivals.model import HEAD, EpisodeModel, query_loss, rival_logits
from fewshot_seg.rivals.prototypes import PrototypeNetwork
from fewshot_seg.rivals.transduction import TransductiveClassifier

CHANNELS, SIDES = (5, 7), (8, 4)
MakeBatch = Callable[..., FeatureBatch]
DrawEpisodes = Callable[..., CachedEpisodes]

BUILD: dict[str, Callable[[], EpisodeModel]] = {
    "panet": lambda: PrototypeNetwork(CHANNELS, rank=4),
    "pfenet": lambda: EnrichmentNetwork(CHANNELS, width=8),
    "hsnet": lambda: CorrelationNetwork(SIDES, widths=(4, 4, 8)),
    "repri": lambda: TransductiveClassifier(CHANNELS, (1, 2), rank=4),
    "repri-frozen": lambda: TransductiveClassifier(CHANNELS, (1, 2), rank=0),
}
TRAINED = [name for name in BUILD if name != "repri-frozen"]


@pytest.fixture(params=list(BUILD))
def model(request: pytest.FixtureRequest) -> EpisodeModel:
    return BUILD[request.param]().eval()


def mixed_up(model: EpisodeModel) -> EpisodeModel:
    """Weights as training might leave them: an embedding that starts as the identity hides mistakes."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def reorder_supports(batch: FeatureBatch, order: list[int]) -> FeatureBatch:
    episodes, shots = batch.support_masks.shape[:2]
    levels = tuple(
        level.reshape(episodes, shots, *level.shape[1:])[:, order].flatten(0, 1) for level in batch.support_levels
    )
    return replace(batch, support_levels=levels, support_masks=batch.support_masks[:, order])


def one_episode(batch: FeatureBatch, row: int) -> FeatureBatch:
    shots = batch.support_masks.shape[1]
    return replace(
        batch,
        support_levels=tuple(level[row * shots : (row + 1) * shots] for level in batch.support_levels),
        support_masks=batch.support_masks[row : row + 1],
        support_dense=batch.support_dense[row : row + 1],
        support_truth=batch.support_truth[row : row + 1],
        query_levels=tuple(level[row : row + 1] for level in batch.query_levels),
        query_masks=batch.query_masks[row : row + 1],
        specs=batch.specs[row : row + 1],
    )


class TestContract:
    def test_shapes(self, model: EpisodeModel, make_batch: MakeBatch) -> None:
        maps = 3 if model.shot_rule == "vote" else 1
        logits = model(make_batch(2, shots=3))
        assert logits.shape[:2] == (2, maps)
        assert logits.shape[2] == logits.shape[3] >= 8
        assert torch.isfinite(logits).all()
        read = rival_logits(model, make_batch(2, shots=3), (20, 24))
        assert read.heads[HEAD].shape == (2, maps, 20, 24)
        assert read.margins(HEAD, 0.0).shape == (2, 20, 24)

    def test_the_order_of_supports_does_not_matter(self, model: EpisodeModel, make_batch: MakeBatch) -> None:
        batch = make_batch(2, shots=3)
        mixed_up(model)
        one, other = (
            rival_logits(model, each, (32, 32)).margins(HEAD, 0.1)
            for each in (batch, reorder_supports(batch, [2, 0, 1]))
        )
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)

    def test_episodes_of_a_batch_do_not_see_each_other(self, model: EpisodeModel, make_batch: MakeBatch) -> None:
        batch = make_batch(3, shots=2)
        mixed_up(model)
        alone = torch.cat([model(one_episode(batch, row)) for row in range(3)])
        torch.testing.assert_close(model(batch), alone, atol=1e-4, rtol=1e-4)

    def test_the_query_mask_is_not_looked_at(self, model: EpisodeModel, make_batch: MakeBatch) -> None:
        batch = make_batch()
        blind = replace(batch, query_masks=torch.full_like(batch.query_masks, 255))
        torch.testing.assert_close(model(batch), model(blind))

    def test_supports_must_be_masks_that_show_an_object(self, model: EpisodeModel, make_batch: MakeBatch) -> None:
        batch = make_batch()
        with pytest.raises(DataError, match="masks only"):
            model(replace(batch, support_dense=torch.zeros_like(batch.support_dense)))
        with pytest.raises(DataError, match="no foreground"):
            model(replace(batch, support_masks=torch.zeros_like(batch.support_masks)))

    def test_the_same_seed_gives_the_same_model(self) -> None:
        for build in BUILD.values():
            state = torch.get_rng_state()
            one, other = build(), build()
            torch.testing.assert_close(one.state_dict(), other.state_dict())
            assert torch.equal(torch.get_rng_state(), state)

    def test_descriptions_can_be_written(self, model: EpisodeModel) -> None:
        assert json.loads(json.dumps(model.description()))


@pytest.mark.parametrize("name", TRAINED)
def test_training_lowers_the_loss(name: str, make_batch: MakeBatch) -> None:
    model, batch = BUILD[name]().train(), make_batch(4, shots=1)
    optimiser = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    taken = []
    for _ in range(25):
        loss = model.losses(batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        taken.append(loss.item())
    assert sum(taken[-5:]) < 0.9 * sum(taken[:5])


@pytest.mark.parametrize("name", TRAINED)
def test_every_parameter_gets_a_gradient(name: str, make_batch: MakeBatch) -> None:
    model = mixed_up(BUILD[name]())
    model.losses(make_batch(2, shots=2))["loss"].backward()
    assert [key for key, one in model.named_parameters() if one.grad is None or not one.grad.abs().sum()] == []


def test_the_mask_loss_is_that_of_ours(make_batch: MakeBatch) -> None:
    batch, logits = make_batch(), torch.randn(2, 1, 8, 8)
    expected = segmentation_loss(logits[:, 0], batch.query_masks[:, 2::4, 2::4])
    torch.testing.assert_close(query_loss(logits, batch), expected)
    torch.testing.assert_close(query_loss(logits.expand(-1, 3, -1, -1), batch), expected)


def test_a_killed_run_ends_with_the_same_weights(draw_episodes: DrawEpisodes, tmp_path: Path) -> None:
    drawn = draw_episodes(8)
    channels = tuple(level.shape[1] for level in next(drawn.batches(1)).query_levels)

    class Killed:
        def __len__(self) -> int:
            return len(drawn)

        def batches(self, batch_size: int, *, start: int = 0):  # type: ignore[no-untyped-def]
            for number, batch in enumerate(drawn.batches(batch_size, start=start)):
                if number == 2:
                    raise KeyboardInterrupt
                yield batch

    def build() -> PrototypeNetwork:
        return PrototypeNetwork(channels, rank=4)

    whole, resumed = build(), build()
    settings = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2}
    train_rival(whole, drawn, **settings)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        train_rival(build(), Killed(), folder=tmp_path, **settings)  # type: ignore[arg-type]
    assert train_rival(resumed, drawn, folder=tmp_path, resume=True, **settings).steps == 4  # type: ignore[arg-type]
    torch.testing.assert_close(whole.state_dict(), resumed.state_dict())
    with pytest.raises(DataError, match="other settings"):
        train_rival(PrototypeNetwork(channels, rank=5), drawn, folder=tmp_path, resume=True, **settings)  # type: ignore[arg-type]


def test_bad_training_arguments(draw_episodes: DrawEpisodes) -> None:
    model = BUILD["panet"]()
    with pytest.raises(DataError, match="at least 1, got 0"):
        train_rival(model, draw_episodes(2), steps=0)
    with pytest.raises(DataError, match="3 steps of 2 need 6 episodes, got 2"):
        train_rival(model, draw_episodes(2), steps=3, batch_size=2)
    with pytest.raises(DataError, match="nothing to train"):
        train_rival(BUILD["repri-frozen"](), draw_episodes(2), steps=1, batch_size=2)


def test_scores_are_those_of_a_plain_loop(draw_episodes: DrawEpisodes, tiny_source: SyntheticSource) -> None:
    drawn = draw_episodes(6, shots=2)
    model = CorrelationNetwork((4, 2), widths=(4, 4, 8)).eval()  # which votes
    read = partial(rival_logits, model)
    cuts = {"one": (HEAD, 0.0), "other": (HEAD, -0.05)}
    found = evaluate_logits(read, cuts, drawn, scoring_size=64, source=tiny_source, batch_size=4)
    for name, (_, threshold) in cuts.items():
        metric = EpisodeIoU()
        for batch in drawn.batches(1):
            maps = torch.nn.functional.interpolate(model(batch).detach(), (64, 64), mode="bilinear")[0] > threshold
            votes = maps.sum(0)
            mask = votes / max(1, int(votes.max())) >= 0.5
            metric.update(mask[None], batch.query_masks, batch.class_ids)
        assert found[name].result.miou == pytest.approx(metric.compute().miou)
    threshold, miou = choose_logit_thresholds(read, drawn)[HEAD]
    at_chosen = evaluate_logits(read, {"it": (HEAD, threshold)}, drawn, scoring_size=16, source=tiny_source)
    assert at_chosen["it"].result.miou == pytest.approx(miou)
