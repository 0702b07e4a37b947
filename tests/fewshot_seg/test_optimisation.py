"""Optimisation apart from what is trained: schedules against torch's, a run against a loop by hand, resumed runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.bad_steps import Account
from fewshot_seg.checkpoint import load_part, read_tensors
from fewshot_seg.optimisation import (
    CHECKPOINT_NAME,
    SCHEDULES,
    Plan,
    Schedule,
    TrainingResult,
    learning_rate_at,
    optimise,
)

STEPS = 20


@pytest.fixture
def plan() -> Plan:
    return make_plan()


def make_plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "steps": STEPS,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "schedule": "one-cycle",
        "seed": 3,
        "details": {"batch_size": 4},
    }
    return Plan(**(settings | changes))


class Small:
    """A network with dropout and a fixed tensor, as a trainee that notes its modes."""

    def __init__(self, *, dropout: float = 0.0, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(dropout), nn.Linear(4, 1))
        self.network.register_buffer("constant", torch.tensor(float(seed)))
        self.modes: list[bool] = []

    def parameters(self) -> Sequence[nn.Parameter]:
        return list(self.network.parameters())

    def tensors(self) -> dict[str, Tensor]:
        return {f"network.{name}": value for name, value in self.network.state_dict().items()}

    def restore(self, tensors: Mapping[str, Tensor], where: Path) -> None:
        load_part(self.network, tensors, prefix="network.", where=where)

    def set_training(self, training: bool) -> None:
        self.modes.append(training)
        self.network.train(training)

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        error = (self.network(batch)[:, 0] - 5 * batch.sum(1)).square().mean()
        size = sum(parameter.square().sum() for parameter in self.parameters())
        return {"loss": error + 0.01 * size, "error": error}


def batch_of(step: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


def batches(start: int) -> Iterator[Tensor]:
    """Without an end: `optimise` takes as many as there are steps."""
    while True:
        yield batch_of(start)
        start += 1


def interrupted(at: int, error: BaseException) -> Callable[[int], Iterator[Tensor]]:
    def following(start: int) -> Iterator[Tensor]:
        for step, batch in enumerate(batches(start), start):
            if step == at:
                raise error
            yield batch

    return following


def run(trainee: Small, plan: Plan, folder: Path | None = None, **options: Any) -> TrainingResult:
    settings: dict[str, Any] = {
        "batches": batches,
        "losses": trainee.losses,
        "describe": lambda batch: Account(
            what="rows",
            names=tuple(f"row {number}" for number in range(len(batch))),
            tensors={"rows": batch},
            alone=lambda number: batch[number : number + 1],
        ),
        "checkpoint_every": 4,
        "log_every": 3,
        "resume": True,
    } | options
    return optimise(trainee, settings.pop("batches"), settings.pop("losses"), plan=plan, folder=folder, **settings)


def assert_same(one: Small, other: Small) -> None:
    left, right = one.tensors(), other.tensors()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


class TestLearningRate:
    @pytest.mark.parametrize("steps", [20, 37, 240])
    def test_one_cycle_is_torchs(self, steps: int) -> None:
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, max_lr=0.3, total_steps=steps, pct_start=0.1, div_factor=25, final_div_factor=1e4
        )
        for step in range(steps):
            assert learning_rate_at(step, steps, 0.3, "one-cycle") == pytest.approx(
                scheduler.get_last_lr()[0], rel=1e-6, abs=1e-12
            )
            optimiser.step()
            if step < steps - 1:
                scheduler.step()

    @pytest.mark.parametrize("steps", [1, 7, 100])
    def test_cosine_is_torchs(self, steps: int) -> None:
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=steps)
        for step in range(steps):
            expected = scheduler.get_last_lr()[0]
            assert learning_rate_at(step, steps, 0.3, "cosine") == pytest.approx(expected, rel=1e-6, abs=1e-12)
            optimiser.step()
            scheduler.step()

    @pytest.mark.parametrize("schedule", SCHEDULES)
    @pytest.mark.parametrize("steps", [1, 2, 5, 11])
    def test_short_runs_stay_within_the_peak(self, schedule: Schedule, steps: int) -> None:
        rates = [learning_rate_at(step, steps, 1.0, schedule) for step in range(steps)]
        assert all(0 < rate <= 1 for rate in rates)


class TestPlan:
    def test_as_json_is_flat_and_whole(self, plan: Plan) -> None:
        assert json.loads(json.dumps(plan.as_json())) == {
            "steps": STEPS,
            "learning_rate": 0.05,
            "weight_decay": 0.1,
            "schedule": "one-cycle",
            "seed": 3,
            "batch_size": 4,
        }

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"steps": 0}, "steps must be at least 1, got 0"),
            ({"schedule": "linear"}, "unknown schedule 'linear'; known: one-cycle, cosine"),
        ],
    )
    def test_refuses(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            make_plan(**changes)


class TestOptimise:
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_equals_a_loop_with_torchs_own_parts(self, schedule: Schedule) -> None:
        trainee, by_hand = Small(), Small()
        result = run(trainee, make_plan(schedule=schedule))
        optimiser = torch.optim.AdamW(by_hand.parameters(), lr=0.05, weight_decay=0.1)
        scheduler: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
        if schedule == "one-cycle":
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimiser,
                max_lr=0.05,
                total_steps=STEPS,
                pct_start=0.1,
                div_factor=25,
                final_div_factor=1e4,
                cycle_momentum=False,
            )
        expected, clipped = [], 0
        for step in range(STEPS):
            loss = by_hand.losses(batch_of(step))["loss"]
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            clipped += int(nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0) > 1)
            optimiser.step()
            scheduler.step()
            expected.append(loss.item())
        assert clipped > 0  # else clipping would not be seen
        assert result.losses == pytest.approx(expected, rel=1e-4)
        for found, wanted in zip(trainee.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)

    def test_trains_in_training_mode_and_ends_in_evaluation_mode(self, plan: Plan) -> None:
        trainee, modes = Small(), list[bool]()

        def losses(batch: Tensor) -> dict[str, Tensor]:
            modes.append(trainee.network.training)
            return trainee.losses(batch)

        run(trainee, plan, losses=losses)
        assert modes == [True] * STEPS
        assert trainee.modes == [True, False]
        with pytest.raises(RuntimeError):
            run(trainee, plan, batches=interrupted(2, RuntimeError()))
        assert not trainee.network.training

    def test_dropout_is_a_function_of_seed_and_step(self, plan: Plan) -> None:
        runs = [Small(dropout=0.5) for _ in range(3)]
        torch.manual_seed(1)
        first = run(runs[0], plan)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        assert run(runs[1], plan).losses == first.losses
        assert torch.equal(torch.get_rng_state(), state)
        assert_same(runs[0], runs[1])
        assert run(runs[2], make_plan(seed=4)).losses != first.losses

    def test_logs_every_named_value(self, tmp_path: Path, plan: Plan) -> None:
        result = run(Small(), plan, tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18]
        assert all(line.keys() == {"step", "loss", "error", "rate"} for line in lines)
        assert [line["loss"] for line in lines] == list(result.losses[2::3])
        assert all(line["error"] < line["loss"] for line in lines)
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [event.value for event in events.Scalars("error")] == pytest.approx([line["error"] for line in lines])

    def test_the_checkpoint_is_whole(self, tmp_path: Path, plan: Plan) -> None:
        trainee = Small()
        run(trainee, plan, tmp_path)
        tensors, description = read_tensors(tmp_path / CHECKPOINT_NAME)
        loss = description.pop("loss")
        assert description == {"format": 1, "step": STEPS, "plan": plan.as_json()}
        state = {f"optimiser.{n}.{key}" for n in range(4) for key in ("step", "exp_avg", "exp_avg_sq")}
        assert tensors.keys() == trainee.tensors().keys() | state
        assert tensors["optimiser.0.step"] == STEPS

    @pytest.mark.parametrize("error", [RuntimeError("killed"), KeyboardInterrupt()])
    @pytest.mark.parametrize("at", [3, 10, 19])
    def test_resumed_equals_uninterrupted(self, tmp_path: Path, at: int, error: BaseException) -> None:
        whole = Small(dropout=0.3)
        plan = make_plan(details={"sizes": (4, 3)})  # a tuple comes back from the file as a list
        expected = run(whole, plan)
        with pytest.raises(type(error)):
            run(Small(dropout=0.3), plan, tmp_path, batches=interrupted(at, error))
        saved = (tmp_path / CHECKPOINT_NAME).exists()
        resumed = Small(dropout=0.3, seed=7 if saved else 0)
        result = run(resumed, plan, tmp_path)
        assert result.losses == expected.losses[at if isinstance(error, KeyboardInterrupt) else at // 4 * 4 :]
        assert result.steps == STEPS
        assert_same(resumed, whole)

    @pytest.mark.parametrize("changes", [{"details": {"batch_size": 5}}, {"weight_decay": 0.0}, {"details": {}}])
    def test_refuses_the_checkpoint_of_another_plan(self, tmp_path: Path, plan: Plan, changes: dict[str, Any]) -> None:
        run(Small(), plan, tmp_path)
        content = (tmp_path / CHECKPOINT_NAME).read_bytes()
        with pytest.raises(DataError, match=rf"{CHECKPOINT_NAME} belongs to a run with other settings"):
            run(Small(), make_plan(**changes), tmp_path)
        assert (tmp_path / CHECKPOINT_NAME).read_bytes() == content

    def test_a_loss_that_is_not_finite_names_step_and_batch(self, plan: Plan) -> None:
        trainee = Small()

        def losses(batch: Tensor) -> dict[str, Tensor]:
            factor = float("inf") if torch.equal(batch, batch_of(5)) else 1.0
            return {"loss": factor * trainee.losses(batch)["loss"]}

        with pytest.raises(DataError, match=r"loss is inf at step 5; .*; rows: row 0; row 1; row 2; row 3"):
            run(trainee, plan, losses=losses)
        assert all(parameter.isfinite().all() for parameter in trainee.parameters())

    def test_nothing_to_train(self, tmp_path: Path, plan: Plan) -> None:
        trainee = Small()
        trainee.network = nn.Sequential(nn.ReLU())
        with pytest.raises(DataError, match="nothing to train: no part of this model has parameters"):
            run(trainee, plan, tmp_path / "run")
        assert not (tmp_path / "run").exists()
