"""``fewshot-seg``: flags from the configuration classes, one-line errors, exit codes.

0: done; 1: done, but some files had problems; 2: nothing done, the line on stderr says why; 3: another process of a
run under torchrun was lost; 130: interrupted; 141: nobody reads
stdout any more; 143: stopped by SIGTERM under torchrun.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from episodes.files import user_path
from episodes.types import DataError
from episodes.writing import reason_of
from fewshot_seg.config import (
    AppConfig,
    Config,
    DemoConfig,
    EpisodesConfig,
    EvaluateConfig,
    ExplainConfig,
    ExportConfig,
    PredictConfig,
    PrepareConfig,
    ReportConfig,
    Setting,
    ShowConfig,
    SimilarityEvaluateConfig,
    SimilarityExplainConfig,
    SimilarityTrainConfig,
    TrainConfig,
    VerifyConfig,
    WeightsListConfig,
    WeightsVerifyConfig,
    resolve,
    settings_of,
)
from fewshot_seg.folder_lock import folder_of_one_run
from fewshot_seg.ranks import LostRankError, Ranks, SaidByFirstError, TerminatedError, launched_ranks

PROGRAM = "fewshot-seg"
_OVER_RANKS = ("commands.train", "commands.evaluate_method")
"""What several processes can do together."""

_Verb = tuple[type[Config], str, str]
"""Configuration, module and function that do it (imported when it runs: torch takes seconds), explanation."""
_VERBS: dict[str, _Verb] = {
    "demo": (DemoConfig, "commands.demo", "train and score on generated pictures: no data, no download"),
    "train": (TrainConfig, "commands.train", "train one fold"),
    "evaluate": (EvaluateConfig, "commands.evaluate_method", "score a model, or a bare prior map, on novel classes"),
    "explain": (
        ExplainConfig,
        "explain_commands.explain",
        "show why, in episodes or your own photos; score explainers",
    ),
    "report": (ReportConfig, "commands.report", "write report.html of one run, or of several side by side"),
    "predict": (PredictConfig, "commands.predict", "segment your own photos from your own examples"),
    "app": (AppConfig, "app_commands.app", "a page in the browser: mark an object in examples, see it found in photos"),
    "export": (ExportConfig, "commands.export", "write the model as ONNX files, which run without torch"),
}
_GROUPS: dict[str, tuple[str, dict[str, _Verb]]] = {
    "data": (
        "look after a data set",
        {
            "prepare": (
                PrepareConfig,
                "data_commands.data_prepare",
                "fetch, check and unpack VOC (with SBD), COCO, FSS-1000",
            ),
            "verify": (VerifyConfig, "data_commands.data_verify", "list every problem of a data set by file"),
            "episodes": (
                EpisodesConfig,
                "data_commands.data_episodes",
                "write the exact episodes of a protocol and fold, which `evaluate --episodes` replays",
            ),
            "show": (
                ShowConfig,
                "data_commands.data_show",
                "draw what the network sees: augmented supports and queries",
            ),
        },
    ),
    "similarity": (
        "the similarity network alone: retrieval, re-identification, attention maps",
        {
            "train": (
                SimilarityTrainConfig,
                "similarity_commands.similarity_train",
                "train on photos with labels, or on episodes of base classes",
            ),
            "evaluate": (
                SimilarityEvaluateConfig,
                "similarity_commands.similarity_evaluate",
                "recall@k and MAP@R, CMC and mAP, or AUC and IoU of every attention map on episodes",
            ),
            "explain": (
                SimilarityExplainConfig,
                "similarity_commands.similarity_explain",
                "draw what makes photos alike, and what a dissimilar one shares",
            ),
        },
    ),
    "weights": (
        "trained models that come with the package",
        {
            "list": (WeightsListConfig, "weights_commands.weights_list", "names, sizes, data and scores"),
            "verify": (
                WeightsVerifyConfig,
                "weights_commands.weights_verify",
                "check digests, and that each of them loads",
            ),
        },
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser; its result has `config_class`, `command`, `config` and the given settings."""
    parser = _Parser(
        prog=PROGRAM,
        description="Segment an object from one to five labelled examples, and see why.",
        allow_abbrev=False,
    )
    version = importlib.metadata.version("fewshot-seg")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, verb in _VERBS.items():
        _add_verb(verbs, name, verb)
    for group, (explanation, group_verbs) in _GROUPS.items():
        below = verbs.add_parser(group, help=explanation, description=explanation, allow_abbrev=False)
        verbs_below = below.add_subparsers(title="verbs", metavar="VERB", required=True)
        for name, verb in group_verbs.items():
            _add_verb(verbs_below, name, verb)
    return parser


def _add_verb(verbs: Any, name: str, verb: _Verb) -> None:
    config_class, command, explanation = verb
    parser = verbs.add_parser(name, help=explanation, description=explanation, allow_abbrev=False)
    parser.set_defaults(config_class=config_class, command=command)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings; flags win over it")
    for setting in settings_of(config_class):
        if setting.positional:  # also optional for argparse: the line for a missing one is the configuration's
            options = _options(setting) | {"nargs": "*" if setting.many else "?"}
            parser.add_argument(setting.name, default=argparse.SUPPRESS, **options)
        else:
            parser.add_argument(setting.flag, dest=setting.name, default=argparse.SUPPRESS, **_options(setting))


def _options(setting: Setting) -> dict[str, Any]:
    options: dict[str, Any] = {"help": _help(setting)}
    if setting.kind is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    options["type"] = _path if setting.kind is Path else setting.kind
    options["metavar"] = "{" + ",".join(setting.choices) + "}" if setting.choices else _metavar(setting)
    if setting.many:
        options |= {"nargs": "+", "action": "extend"}  # --support A:M B:N and --support A:M --support B:N
    return options


def _metavar(setting: Setting) -> str:
    return {Path: "PATH", int: "N", float: "X"}.get(setting.kind, "TEXT")


def _help(setting: Setting) -> str:
    text = setting.help.replace("%", "%%")
    if setting.required:
        return f"{text} (required)"
    if setting.default is None or (setting.kind is bool and not setting.default):
        return text
    default = " ".join(map(str, setting.default)) if setting.many else setting.default
    return f"{text} (default: {default})"


def _path(text: str) -> Path:
    return user_path(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    ranks, working = Ranks(), False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
    try:
        ranks = launched_ranks()
        given = vars(build_parser().parse_args(arguments))
        config_class, command, file = (given.pop(name) for name in ("config_class", "command", "config"))
        flags = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        config = resolve(config_class, flags, file)
        with _joined(command, config, ranks), _alone_in(config.filled):
            working = True
            code = _load(command)(config)
            sys.stdout.flush()  # a disk that is full is said here, not at the interpreter's end
    except DataError as error:
        _say(f"error: {' '.join(str(error).split())}", ranks, alike=not working or isinstance(error, SaidByFirstError))
        return 2
    except BrokenPipeError:  # whoever read stdout has gone: `fewshot-seg ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        _say(f"error: {_of_the_system(error)}", ranks)
        return 2
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        _say(f"error: a process that loads photos was lost ({error}); free memory, or lower --workers", ranks)
        return 2
    except LostRankError as error:
        _say(f"error: {' '.join(str(error).split())}", ranks)
        return 3
    except KeyboardInterrupt:
        _say("interrupted; a training goes on with --resume", ranks, alike=True)
        return 130
    except TerminatedError as error:
        _say(str(error), ranks, alike=True)
        return 143
    return code


def _load(command: str) -> Callable[[Any], int]:
    module, function = command.split(".")
    loaded: Callable[[Any], int] = getattr(importlib.import_module(f"fewshot_seg.{module}"), function)
    return loaded


def _joined(command: str, config: Any, ranks: Ranks) -> contextlib.AbstractContextManager[Any]:
    """The process group of a verb that several processes can do together.

    Raises:
        DataError: several processes, and another verb.
    """
    if command in _OVER_RANKS:
        from fewshot_seg.distributed import process_group  # loads torch

        return process_group(config.device)
    if ranks.size > 1:
        raise DataError("torchrun is for the verbs train and evaluate; start this one without it")
    return contextlib.nullcontext()


@contextlib.contextmanager
def _alone_in(folder: Path | None) -> Iterator[None]:
    """No other run in this folder; of several ranks, the first sees to it for all."""
    with contextlib.ExitStack() as stack:
        if folder is not None:
            from fewshot_seg.distributed import on_first  # loads torch

            on_first(lambda: stack.enter_context(folder_of_one_run(folder)))
        yield


def _of_the_system(error: OSError) -> str:
    """One line of what the system refused, wherever it was."""
    where = "" if error.filename is None else f"{error.filename}: "
    return " ".join(f"{where}{reason_of(error)}".split())


def _say(message: str, ranks: Ranks, *, alike: bool = False) -> None:
    """A line on stderr; what all ranks would say `alike` is said by the first."""
    if ranks.first:
        print(f"{PROGRAM}: {message}", file=sys.stderr)
    elif not alike:
        print(f"{PROGRAM}: rank {ranks.rank}: {message}", file=sys.stderr)
