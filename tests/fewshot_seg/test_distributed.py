"""Several processes against one.

As a script it is one of these processes. They are forked from a server that has imported everything, with torchrun's
variables set: importing it all anew in each would take most of the time. A real torchrun starts a small script.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from episodes.augment import EpisodeTransform
from episodes.index import build_index
from episodes.loader import EpisodeDataset
from episodes.n_way import NWaySampler
from episodes.sampler import EpisodeSampler, spec_to_json
from episodes.sources import SyntheticSource
from episodes.types import DataError, SupportKind
from fewshot_seg import training
from fewshot_seg.backbones import build_backbone
from fewshot_seg.checkpoint import read_tensors, trained_tensors
from fewshot_seg.cli import main
from fewshot_seg.decoder import MapDropout, PriorReadout
from fewshot_seg.distributed import (
    Rows,
    barrier,
    current_ranks,
    dealt,
    gather_dealt,
    launched_ranks,
    mean_over_ranks,
    on_first,
    process_group,
    raise_if_lost,
    rows_of_ranks,
    share_of,
    split_rows,
)
from fewshot_seg.evaluation import choose_threshold, evaluate, evaluate_heads
from fewshot_seg.feature_episodes import CachedEpisodes, FeatureBatch, FeatureEpisodes, LiveEpisodes
from fewshot_seg.features import FeatureStore, MaskStore
from fewshot_seg.metrics import EpisodeIoU
from fewshot_seg.n_way import evaluate_n_way
from fewshot_seg.optimisation import CHECKPOINT_NAME
from fewshot_seg.ranks import LostRankError, Ranks, TerminatedError
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter

STEPS, BATCH = 6, 4
STOPPED = 3  # steps before an interruption
SOURCE = SyntheticSource(base_classes=3, novel_classes=2, images_per_class=4, size=64)
TRAININGS: dict[str, dict[str, Any]] = {
    "masks": {"model": {"appearance": 4}},
    "mixed": {"model": {"appearance": 4, "completion": True}, "supports": ("mask", "box", "scribble"), "shots": 2},
    # one episode a rank: often one rank alone has a weak support, and then one alone uses the completion
    "no prior": {
        "model": {"appearance": 4, "completion": True, "prior": "none"},
        "supports": ("mask", "mask", "box"),
        "batch_size": 2,
    },
    "live": {"model": {}, "live": True},
}
CLI_TRAIN = (
    *(
        "train",
        "--data",
        "synthetic",
        "--backbone",
        "mobilenetv3_small_050",
        "--backbone-weights",
        "random",
        "--resolution",
        "64",
    ),
    *("--device", "cpu", "--steps", "6", "--validation-episodes", "7", "--training", "joint"),
)
COMMANDS: dict[str, tuple[str, ...]] = {
    "odd": (*CLI_TRAIN, "--batch-size", "3"),
    "run": (*CLI_TRAIN, "--batch-size", "2", "--supports", "mask", "box"),
    "scores": ("evaluate", "--data", "synthetic", "--count", "9", "--batch-size", "2", "--device", "cpu"),
}


class FewPictures(SyntheticSource):
    """The command line's generated pictures, but few and small."""

    def __init__(self) -> None:
        super().__init__(base_classes=6, novel_classes=2, images_per_class=4, size=64)


class Stops:
    """Episodes that are interrupted before a step."""

    def __init__(self, episodes: FeatureEpisodes, step: int) -> None:
        self._episodes, self._step = episodes, step

    def __len__(self) -> int:
        return len(self._episodes)

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[FeatureBatch]:
        for number, batch in enumerate(self._episodes.batches(batch_size, start=start)):
            if start + number * batch_size >= self._step * BATCH:
                raise KeyboardInterrupt
            yield batch


def draw(
    length: int, *, shots: int = 1, supports: tuple[SupportKind, ...] = ("mask",), live: bool = False, ways: int = 1
) -> FeatureEpisodes:
    pairs, backbone = (
        build_index(SOURCE, "train").pairs((1, 2, 3)),
        build_backbone("mobilenetv3_small_050", weights="random"),
    )
    arguments: dict[str, Any] = {
        "shots": shots,
        "seed": 0,
        "length": length,
        "order": "random",
        "repeat_supports": False,
    }
    specs = NWaySampler(pairs, ways=ways, **arguments) if ways > 1 else EpisodeSampler(pairs, **arguments)
    if live:
        transform = EpisodeTransform("flip", 64, "squash")
        return LiveEpisodes(backbone, EpisodeDataset(SOURCE, specs, transform, transform, supports=supports))
    store = FeatureStore(backbone, SOURCE, size=64, directory=None)
    return CachedEpisodes(store, MaskStore(SOURCE, size=64), specs, supports=supports)


def new_model(**options: Any) -> FewShotSegmenter:
    # two channels per group of the normalisation: with one, biases before it would have no gradient but rounding
    small = {"similarity_rank": 4, "decoder_width": 16, "decoder_blocks": 1, "dropout": 0.3}
    return build_segmenter(build_backbone("mobilenetv3_small_050", weights="random"), **(small | options)).eval()


def all_scores() -> dict[str, Any]:
    """Everything that an evaluation gives but its seconds, JSON-able to the last digit."""
    model, episodes = new_model(appearance=4), draw(23, shots=2)
    model.threshold, threshold = (found := choose_threshold(model, episodes, batch_size=4))[0], list(found)
    original = evaluate(model, episodes, scoring_size=None, source=SOURCE, shot_rule="vote", batch_size=3)
    heads = {"margin": (PriorReadout(1), 0.1), "gradient": (PriorReadout(0, scaled=True), 0.5)}
    several = evaluate_heads(model, heads, draw(20), scoring_size=50, source=SOURCE, repeats=2, batch_size=7)
    few = evaluate(model, draw(2), scoring_size=64, source=SOURCE)  # one batch: the other ranks have none
    n_way = evaluate_n_way(model, draw(22, ways=2), ways=2, scoring_size=64, source=SOURCE, batch_size=2)
    scores: dict[str, Any] = {"threshold": threshold, "n_way": [asdict(n_way.result), n_way.way_iou.tolist()]}
    for name, one in {"original": original, "few": few, **several}.items():
        specs = [spec_to_json(spec) for spec in one.specs]
        scores[name] = [asdict(one.result), [asdict(part) for part in one.repeats], one.episode_iou.tolist(), specs]
    scores["n_way"].append([[spec_to_json(spec) for spec in way] for way in n_way.specs])
    text = json.dumps(scores)
    return dict(json.loads(text))


def trained(name: str, folder: Path | None = None, *, stop: int | None = None) -> tuple[dict[str, Tensor], list[float]]:
    settings = dict(TRAININGS[name])
    model = new_model(**settings.pop("model"))
    batch_size = settings.pop("batch_size", BATCH)
    drawn = draw(STEPS * BATCH, **settings)
    episodes = drawn if stop is None else Stops(drawn, stop)
    result = training.train(
        model,
        episodes,
        steps=STEPS * BATCH // batch_size,
        batch_size=batch_size,
        learning_rate=1e-2,
        seed=3,
        folder=folder,
        resume=True,
        log_every=1,
    )
    return trained_tensors(model), list(result.losses)


def as_rank(part: str, folder: Path) -> int:
    """One of the processes; what it finds goes to its own files."""
    torch.set_num_threads(1)
    rank = launched_ranks().rank
    if part == "lost":
        return main_that_dies(folder) if rank == 1 else cli(*CLI_TRAIN, "--batch-size", "2", "--out", folder / "run")
    if part in COMMANDS:
        (folder / f"{part}-{rank}.json").write_text(json.dumps(cli(*COMMANDS[part], *outputs(part, folder))))
        return 0
    with process_group("cpu"):
        found: dict[str, Any] = {"scores": all_scores()}
        if part == "all":
            for name in TRAININGS:
                weights, losses = trained(name)
                torch.save([weights, losses], folder / f"{name}-{rank}.pt")
            torch.save(trained("mixed", folder / "of one process")[0], folder / f"resumed-{rank}.pt")
            with contextlib.suppress(KeyboardInterrupt):
                trained("mixed", folder / "of two processes", stop=STOPPED)
            found |= small_things()
        (folder / f"found-{rank}.json").write_text(json.dumps(found))
    return 0


def small_things() -> dict[str, Any]:
    ranks = current_ranks()

    def refuse() -> None:
        raise DataError(f"refused on rank {ranks.rank}")

    said = ""
    try:
        on_first(refuse)
    except DataError as error:
        said = f"{type(error).__name__}: {error}"
    barrier()
    mean = mean_over_ranks({"one": torch.tensor(float(ranks.rank)), "two": torch.tensor(4.0)})
    return {
        "ranks": asdict(ranks),
        "on_first": on_first(lambda: {"rank": current_ranks().rank}),
        "said": said,
        "mean": {name: value.item() for name, value in mean.items()},
        "rows": [asdict(rows) for rows in rows_of_ranks(ranks.rank + 2, 5)],
        "share": share_of(range(11), block=2),
    }


def outputs(part: str, folder: Path) -> tuple[object, ...]:
    model = ("--model", folder / "run" / "model.safetensors") if part == "scores" else ()
    return (*model, "--out", folder / part)


def cli(*arguments: object) -> int:
    with mock.patch("fewshot_seg.runs.SyntheticSource", FewPictures):
        return main([str(one) for one in arguments])


def main_that_dies(folder: Path) -> int:
    """Train, and die by SIGKILL in the fifth step of the final run."""
    whole, calls = training.episode_losses, iter(range(1000))

    def dies(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 6 + 4:  # the run that chooses the threshold comes first
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **options)

    with mock.patch("fewshot_seg.training.episode_losses", dies):
        return cli(*CLI_TRAIN, "--batch-size", "2", "--out", folder / "run")


def launch(processes: int, part: str, folder: Path, *, codes: tuple[int, ...] | None = None) -> None:
    """Run the processes; what they print goes to files, and they must end with these codes, or else 0."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fewshot_seg.cli", "torch.distributed", "pytest"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"FEWSHOT_SEG_CACHE": str(folder / "cache")}
    started = []
    for rank in range(processes):
        given = {"GIVEN": (part, str(folder), shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})}
        started.append(context.Process(target=runpy.run_path, args=(__file__, given, "__main__")))
        started[-1].start()
    for process in started:
        process.join(400)
        process.kill()  # does nothing to one that has ended
    printed = "\n".join(file.read_text() for file in sorted(folder.glob(f"{part}-err-*")))
    assert [process.exitcode for process in started] == list(codes or (0,) * processes), printed


def as_launched(part: str, folder: Path, variables: dict[str, str]) -> int:
    os.environ.update(variables)
    rank = variables["RANK"]
    with (folder / f"{part}-out-{rank}").open("w") as out, (folder / f"{part}-err-{rank}").open("w") as err:
        sys.stdout, sys.stderr = out, err  # the process is ours and ends with this
        try:
            return as_rank(part, folder)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return all_scores()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what two processes found."""
    folder = tmp_path_factory.mktemp("two")
    with contextlib.suppress(KeyboardInterrupt):
        trained("mixed", folder / "of one process", stop=STOPPED)
    launch(2, "all", folder)
    return folder


@pytest.fixture(scope="module")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what two processes of the command line wrote and printed."""
    folder = tmp_path_factory.mktemp("cli")
    for part in COMMANDS:
        launch(2, part, folder)
    return folder


def found(folder: Path, rank: int) -> Any:
    return json.loads((folder / f"found-{rank}.json").read_text())


def assert_same(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        # AdamW divides a gradient by its size: where that is nearly zero, rounding shows in the weight. 1e-4 is a
        # hundredth of a single step.
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


class TestEvaluation:
    def test_two_processes_equal_one_to_the_last_digit(self, by_two: Path, one_process: dict[str, Any]) -> None:
        assert found(by_two, 0)["scores"] == one_process
        assert found(by_two, 1)["scores"] == one_process

    def test_so_do_three(self, tmp_path: Path, one_process: dict[str, Any]) -> None:
        launch(3, "evaluation", tmp_path)
        for rank in range(3):
            assert found(tmp_path, rank)["scores"] == one_process


class TestTraining:
    @pytest.mark.parametrize("name", TRAININGS)
    def test_two_processes_equal_one_within_rounding(self, by_two: Path, name: str) -> None:
        expected, losses = trained(name)
        for rank in range(2):
            weights, losses_of_rank = torch.load(by_two / f"{name}-{rank}.pt", weights_only=True)
            assert_same(weights, expected)
            assert losses_of_rank == pytest.approx(losses, rel=1e-5)

    def test_ranks_had_different_numbers_of_weak_supports(self) -> None:
        episodes = draw(STEPS * BATCH, supports=TRAININGS["no prior"]["supports"])
        weak = [tuple((~batch.support_dense).flatten().tolist()) for batch in episodes.batches(2)]
        assert {(True, False), (False, True), (False, False)} <= set(weak)

    def test_dropout_was_on(self) -> None:
        with mock.patch.object(MapDropout, "forward", lambda _, maps: maps):
            without, _ = trained("masks")
        assert not torch.allclose(without["decoder.exit.weight"], trained("masks")[0]["decoder.exit.weight"], rtol=1e-2)

    def test_two_processes_go_on_from_ones_checkpoint(self, by_two: Path) -> None:
        expected, _ = trained("mixed")
        for rank in range(2):
            assert_same(torch.load(by_two / f"resumed-{rank}.pt", weights_only=True), expected)

    def test_one_process_goes_on_from_the_checkpoint_of_two(self, by_two: Path) -> None:
        folder = by_two / "of two processes"
        assert read_tensors(folder / CHECKPOINT_NAME)[1]["step"] == STOPPED
        weights, losses = trained("mixed", folder)
        expected, expected_losses = trained("mixed")
        assert_same(weights, expected)
        assert losses == pytest.approx(expected_losses[STOPPED:], rel=1e-5)
        lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))  # one rank's, not two
        assert [line["loss"] for line in lines] == pytest.approx(expected_losses, rel=1e-5)


class TestCommandLine:
    def test_writes_and_prints_once(self, command_line: Path) -> None:
        folder = command_line
        for rank in range(2):
            assert [json.loads((folder / f"{part}-{rank}.json").read_text()) for part in COMMANDS] == [2, 0, 0]
        printed = "".join((folder / f"{part}-out-0").read_text() for part in COMMANDS)
        assert printed.count("model: ") == 1
        assert printed.count("mIoU") == 2  # of the held-out classes, and of the evaluation
        assert "".join((folder / f"{part}-out-1").read_text() for part in COMMANDS) == ""
        errors = "".join((folder / f"{part}-err-1").read_text() for part in COMMANDS)
        assert "fewshot-seg" not in errors
        assert "/s]" not in errors  # bars
        assert len(list((folder / "run" / "tensorboard").iterdir())) == 1
        assert json.loads((folder / "run" / "run.json").read_text())["results"]["steps"] == 6
        # files of a rank that was stopped while it wrote would have other names
        assert {file.name for file in (folder / "scores").iterdir()} == {
            "evaluation.json",
            "gallery",
            "report.html",
            "run.json",
        }

    def test_a_batch_that_cannot_be_split(self, command_line: Path) -> None:
        errors = [line for line in (command_line / "odd-err-0").read_text().splitlines() if "fewshot-seg: " in line]
        expected = "--batch-size 3 cannot be split evenly over 2 processes; choose a multiple of 2"
        assert [line.split("fewshot-seg: ")[1] for line in errors] == [f"error: {expected}"]

    def test_scores_are_those_of_one_process(
        self,
        command_line: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder = command_line
        monkeypatch.setenv("FEWSHOT_SEG_CACHE", str(tmp_path / "cache"))
        given = (*COMMANDS["scores"], *outputs("scores", folder)[:2])
        assert cli(*given, "--out", tmp_path / "scores") == 0
        ours, theirs = (json.loads((one / "scores" / "evaluation.json").read_text()) for one in (tmp_path, folder))
        assert ours.pop("seconds") > 0
        assert theirs.pop("seconds") > 0
        assert ours == theirs

    def test_a_lost_rank_ends_the_run_with_a_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        launch(2, "lost", tmp_path, codes=(3, -signal.SIGKILL))
        printed = (tmp_path / "lost-err-0").read_text()
        lines = [line for line in printed.splitlines() if line.startswith("fewshot-seg: ")]
        assert len(lines) == 1, printed
        assert re.fullmatch(
            r"fewshot-seg: error: another process of this run is gone or does not answer \(.*\); "
            rf".*{CHECKPOINT_NAME} holds step 4: go on with --resume",
            lines[0],
        )
        assert read_tensors(tmp_path / "run" / CHECKPOINT_NAME)[1]["step"] == 4
        monkeypatch.setenv("FEWSHOT_SEG_CACHE", str(tmp_path / "cache"))
        assert cli(*CLI_TRAIN, "--batch-size", "2", "--out", tmp_path / "run", "--resume") == 0
        assert cli(*CLI_TRAIN, "--batch-size", "2", "--out", tmp_path / "whole") == 0
        resumed, whole = (read_tensors(tmp_path / name / "model.safetensors")[0] for name in ("run", "whole"))
        assert resumed.keys() == whole.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-3)
        capfd.readouterr()

    def test_refuses_other_verbs(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank, expected in (
            ("0", "torchrun is for the verbs train and evaluate; start this one without it\n"),
            ("1", ""),
        ):
            monkeypatch.setenv("RANK", rank)
            assert main(["data", "verify", "--data", "synthetic"]) == 2
            assert capsys.readouterr().err.removeprefix("fewshot-seg: error: ") == expected

    @pytest.mark.parametrize(
        ("rank", "size", "message"),
        [("x", "2", "must be whole numbers, as torchrun sets them"), ("2", "2", "RANK 2 is not in 0..1")],
    )
    def test_refuses_a_half_set_environment(
        self, monkeypatch: pytest.MonkeyPatch, rank: str, size: str, message: str
    ) -> None:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(DataError, match=re.escape(message)):
            launched_ranks()


class TestTalk:
    def test_of_two_processes(self, by_two: Path) -> None:
        zero, one = found(by_two, 0), found(by_two, 1)
        assert zero["ranks"] == {"rank": 0, "size": 2}
        assert one["ranks"] == {"rank": 1, "size": 2}
        assert zero["said"] == "DataError: refused on rank 0"
        assert one["said"] == "SaidByFirstError: refused on rank 0"
        assert zero["on_first"] == one["on_first"] == {"rank": 0}
        assert zero["mean"] == one["mean"] == {"one": 0.5, "two": 4.0}
        assert zero["rows"] == [{"before": 0, "total": 5}, {"before": 0, "total": 10}]
        assert one["rows"] == [{"before": 2, "total": 5}, {"before": 5, "total": 10}]
        assert zero["share"] == [0, 1, 4, 5, 8, 9]
        assert one["share"] == [2, 3, 6, 7, 10]

    def test_alone_nothing_changes(self) -> None:
        assert current_ranks() == launched_ranks() == Ranks(0, 1)
        with process_group("cpu") as ranks:
            assert ranks.first
            assert not torch.distributed.is_initialized()
        value = torch.tensor(1.0, requires_grad=True)
        assert mean_over_ranks({"loss": value})["loss"] is value
        assert gather_dealt([3, 1, 2]) == [3, 1, 2]
        assert share_of([3, 1, 2], block=2) == [3, 1, 2]
        assert rows_of_ranks(4) == (Rows(0, 4),)
        assert [len(batch.specs) for batch in dealt(draw(5), 2, start=1)] == [2, 2]
        barrier()

    @pytest.mark.parametrize(
        "error", [RuntimeError("CUDA error: out of range"), RuntimeError("Connection closed by peer")]
    )
    def test_without_a_group_no_error_is_a_lost_rank(self, error: RuntimeError) -> None:
        raise_if_lost(error)

    @pytest.mark.parametrize(
        ("error", "lost"),
        [
            (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), True),
            (torch.distributed.DistBackendError("anything"), True),
            (torch.OutOfMemoryError("a connection timed out"), False),
            (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        ],
    )
    def test_which_errors_are_lost_ranks(self, error: RuntimeError, lost: bool) -> None:
        with (
            mock.patch("torch.distributed.is_initialized", return_value=True),
            pytest.raises(LostRankError, match="gone or does not answer") if lost else contextlib.nullcontext(),
        ):
            raise_if_lost(error)


def test_sigterm_raises_once_and_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)

    def stopped_twice() -> None:
        with process_group("cpu"):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # as it may come while a checkpoint is being written

    with (
        mock.patch("torch.distributed.init_process_group"),
        mock.patch("torch.distributed.destroy_process_group") as left,
        pytest.raises(TerminatedError, match="stopped by SIGTERM"),
    ):
        stopped_twice()
    assert signal.getsignal(signal.SIGTERM) is before
    left.assert_called_once_with()


_SCRIPT = """
import os, signal, sys, time
from fewshot_seg.distributed import barrier, process_group, share_of
from fewshot_seg.ranks import LostRankError, TerminatedError

try:
    with process_group("cpu") as ranks:
        barrier()
        open(f"{sys.argv[1]}/{ranks.rank}", "w").write(str(share_of(range(5))))
        barrier()
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            barrier()
except (LostRankError, TerminatedError) as error:
    open(f"{sys.argv[1]}/lost", "w").write(type(error).__name__)
    sys.exit(3)
"""


def test_torchrun_starts_it_and_a_lost_rank_ends_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = str(Path(__file__).resolve().parents[2])
    ended = subprocess.run(
        [*command, str(script), str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=800,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
    )
    assert ended.returncode == 1, ended.stderr
    assert (tmp_path / "0").read_text() == "[0, 2, 4]"
    assert (tmp_path / "1").read_text() == "[1, 3]"
    assert (tmp_path / "lost").read_text() in ("LostRankError", "TerminatedError")  # whichever comes first


class TestMapDropout:
    @pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 1.0])
    def test_equals_dropout2d(self, p: float) -> None:
        maps = torch.randn(6, 5, 3, 2, generator=torch.Generator().manual_seed(0))
        for split in (False, True):
            torch.manual_seed(1)
            with split_rows(Rows(0, 6)) if split else contextlib.nullcontext():
                ours = (MapDropout(p)(maps), torch.rand(3))
            torch.manual_seed(1)
            theirs = (nn.Dropout2d(p)(maps), torch.rand(3))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    def test_parts_are_those_of_the_whole(self) -> None:
        maps, parts = torch.ones(7, 5, 2, 2), []
        torch.manual_seed(1)
        whole = nn.Dropout2d(0.4)(maps)
        for before, rows in ((0, 3), (3, 0), (3, 4)):
            torch.manual_seed(1)
            with split_rows(Rows(before, 7)):
                parts.append(MapDropout(0.4)(maps[before : before + rows]))
        assert torch.equal(torch.cat(parts), whole)

    def test_does_nothing_in_evaluation(self) -> None:
        maps = torch.ones(2, 3, 2, 2)
        with split_rows(Rows(0, 4)):
            assert MapDropout(0.5).eval()(maps) is maps


class TestJoined:
    def test_undoes_split(self) -> None:
        random = torch.Generator().manual_seed(0)
        whole = EpisodeIoU()
        masks = torch.randint(0, 2, (6, 4, 4), generator=random, dtype=torch.uint8)
        whole.update(torch.rand(6, 4, 4, generator=random) > 0.5, masks, [1, 2, 1, 2, 3, 3])
        again = EpisodeIoU.joined(whole.split(3))
        assert again.compute() == whole.compute()
        assert again.episode_iou().tolist() == whole.episode_iou().tolist()

    def test_refuses_nothing_and_different_ways(self) -> None:
        for parts in ([], [EpisodeIoU(1), EpisodeIoU(2)]):
            with pytest.raises(ValueError, match="one or more parts of one number of ways"):
                EpisodeIoU.joined(parts)


if __name__ == "__main__":
    launched_part, launched_folder, launched_variables = globals()["GIVEN"]
    sys.exit(as_launched(launched_part, Path(launched_folder), launched_variables))
