"""What README and docs/ show works: every command and every block of Python runs, or is checked as far as it can be.

`scripts/documented_commands.py` finds the commands and has the table of how each is checked; a command, program,
language or setting that it does not know fails here. Its counts are those of docs/reliability-documentation.md.
"""

from __future__ import annotations

import contextlib
import doctest
import itertools
import re
import runpy
import shlex
import shutil
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.run import get_args_parser

from episodes.protocols import read_protocol
from fewshot_seg import app_commands
from fewshot_seg.app.serving import Served
from fewshot_seg.backbones import build_backbone
from fewshot_seg.cli import build_parser, main
from fewshot_seg.config import Config, resolve, settings_of
from fewshot_seg.cross_fitting import train_base_learner
from fewshot_seg.explainers.episode import ShownPhotos, compare_photos
from fewshot_seg.segmenter import training_free

ROOT = Path(__file__).resolve().parents[2]
PAGES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))]

SMALL = {
    "demo": "--steps 2 --batch-size 2 --episodes 6 --report-episodes 2 --resolution 64",
    "train": "--resolution 64 --steps 2 --batch-size 2 --decoder-steps 2 --decoder-episodes 2 --validation-episodes 4",
    "evaluate": "--resolution 64 --report-episodes 1",
    "explain": "--resolution 64 --panel 64 --count 1 --score-episodes 1",
    "predict": "--size 64",
    "export": "--size 64",
    "data episodes": "--count 4",
    "data show": "--count 2 --resolution 64",
    "similarity train": "--resolution 64 --steps 2 --batch-size 2 --classes 2 --photos 2",
    "similarity evaluate": "--resolution 64",
    "similarity explain": "--resolution 64 --count 1",
}
"""Settings that make a verb cheap; they come last, and so win over those of the page."""


def config_of(arguments: Sequence[str]) -> tuple[str, Config]:
    """The verb and the whole configuration of a command line, checked as the command would."""
    given = vars(build_parser().parse_args(list(arguments)))
    config_class, _, file = (given.pop(name) for name in ("config_class", "command", "config"))
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    verb = " ".join(arguments[:2]) if arguments[0] in ("data", "similarity", "weights") else arguments[0]
    return verb, resolve(config_class, flags, file)


def of_fewshot_seg(words: Sequence[str]) -> list[str]:
    """The arguments of fewshot-seg in any of its three ways to be started."""
    return list(words[1:] if words[0] == "fewshot-seg" else words[list(words).index("fewshot_seg") + 1 :])


class Reader:
    """Does what a page says, in the order of the page, in one folder."""

    def __init__(
        self,
        documented: ModuleType,
        monkeypatch: pytest.MonkeyPatch,
        make_run: Callable[..., Path],
        parse_script: Callable[[Sequence[str]], None],
    ) -> None:
        self.documented, self.monkeypatch, self.make_run = documented, monkeypatch, make_run
        self.parse_script = parse_script
        self.names: dict[str, Any] = {}

    def read(self, block: Any) -> None:
        """Run or check one block."""
        if block.language in (*self.documented.SHELL, "inline"):
            for words in self.documented.commands_of(block):
                self.check(words, executes=block.language != "inline")
        elif block.language == "python":
            self.names = stand_in_names() | self.names
            exec(compile(block.text, block.place, "exec"), self.names)
        elif block.language == "pycon":
            example = doctest.DocTestParser().get_doctest(block.text, self.names, block.page, block.page, block.line)
            assert doctest.DocTestRunner().run(example).failed == 0
        elif block.language == "toml":
            assert tomllib.loads(block.text)
            Path("mine.toml").write_text(block.text)
            read_protocol(Path("mine.toml"))
        elif block.language == "yaml":
            arguments = re.findall(r"^ {12}- (.+)$", block.text, flags=re.MULTILINE)
            config_of(arguments[arguments.index("fewshot_seg") + 1 :])

    def check(self, words: tuple[str, ...], *, executes: bool) -> None:
        """Check one command as the table says."""
        way, words = self.documented.check_of(words).way, self.documented.unwrapped(words)
        if way in ("run by CI", "only looked at"):
            self.look_at(words)
        elif words[0] == "python" and words[1].startswith("scripts/"):
            if way == "executed" and executes:
                self.run_script(words)
            else:
                self.parse_script(words)
        elif words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words[1:] if not word.startswith("-"))
        else:
            if words[0] == "torchrun":
                get_args_parser().parse_args(list(words[1:]))
            verb, config = self.parse(of_fewshot_seg(words), whole=executes)
            if config is not None and way == "executed" and executes:
                self.execute(verb, config, of_fewshot_seg(words))

    def parse(self, arguments: list[str], *, whole: bool) -> tuple[str, Config | None]:
        """Inline commands may leave out what a real one needs, or ask for help."""
        if "--help" in arguments:
            with pytest.raises(SystemExit):
                build_parser().parse_args(arguments)
            return "", None
        if not whole:  # --threshold T: a letter stands for a number
            build_parser().parse_args([re.sub(r"^[A-Z]$", "1", word) for word in arguments])
            return "", None
        return config_of(arguments)

    def look_at(self, words: tuple[str, ...]) -> None:
        """The extras and groups that an installation names exist."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        for extra in re.findall(r"fewshot-seg\[(.+?)\]", " ".join(words)):
            assert set(extra.split(",")) <= set(project["project"]["optional-dependencies"])
        for flag, group in itertools.pairwise(words):
            assert flag != "--group" or group in project["dependency-groups"]

    def run_script(self, words: tuple[str, ...]) -> None:
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", list(words[1:]))
            patch.syspath_prepend(str(ROOT / "scripts"))
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")

    def execute(self, verb: str, config: Config, arguments: list[str]) -> None:
        """Run a verb with small settings; it must succeed and write what it was asked for."""
        known, small = {one.flag for one in settings_of(type(config))}, shlex.split(SMALL.get(verb, ""))
        if verb == "evaluate" and "--episodes" not in arguments:
            small += ["--count", "4"]
        if verb == "similarity evaluate":
            small += ["--episodes", "4"] if getattr(config, "episodic", False) else []
            small += ["--faithfulness", "1"] if "--faithfulness" in arguments else []
        assert {word for word in small if word.startswith("--")} <= known
        if "--resume" in arguments:
            small += ["--resume"]
        self.provide(verb, config)
        code = main([*arguments, *small])
        found_problems = verb == "data verify" and code == 1  # some classes show up in no stand-in
        assert code == 0 or found_problems, f"exit code {code} of fewshot-seg {shlex.join(arguments)}"
        out = getattr(config, "out", None)
        if out is not None and not getattr(config, "save_support", None):
            assert Path(out).stat().st_size if Path(out).is_file() else any(Path(out).iterdir())

    def provide(self, verb: str, config: Config) -> None:
        """Models and runs that the page takes for granted: those of an earlier page, or of the reader's own."""
        if verb == "report":
            for number, folder in enumerate(config.runs):  # type: ignore[attr-defined]
                if not folder.exists():
                    self.make_run(folder, seed=number, episodes=12)
        for name in ("model", "similarity"):
            path = getattr(config, name, None)
            if path is not None and path.suffix == ".safetensors" and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.trained(path.name), path)

    def trained(self, name: str) -> Path:
        """A model or network that was trained for two steps."""
        path = Path("given") / name
        if not path.exists():
            verb = "train" if name.startswith("model") else "similarity train"
            data = ["--data", "voc", "--root", "VOC2012", "--out", "given"]
            assert main([*verb.split(), *data, *shlex.split(SMALL[verb])]) == 0
        return path


def stand_in_names() -> dict[str, Any]:
    """What the pages' Python takes for granted: a model of one's own, images as tensors, a comparison."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer4 = nn.Conv2d(3, 8, 3, stride=4, padding=1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layer4(images).relu().mean(dim=(2, 3))

    masks = torch.zeros(1, 2, 64, 64, dtype=torch.uint8)
    masks[:, :, 16:48, 16:48] = 1
    images, photos = torch.rand(4, 3, 64, 64), [(torch.rand(64, 64, 3) * 255).to(torch.uint8).numpy() for _ in range(2)]
    shown = ShownPhotos(supports=(photos[0],), marks=(masks[0, 0].numpy(),), dense=(True,), query=photos[1])
    tiny = training_free(build_backbone("mobilenetv3_small_050", weights="random"))
    return {
        "model": Model(),
        "anchor_images": images,
        "similar_images": images,
        "dissimilar_images": images,
        "support_images": torch.rand(1, 2, 3, 64, 64),
        "support_masks": masks,
        "query_images": torch.rand(2, 3, 64, 64),
        "comparison": compare_photos(tiny, shown, resolution=64),
    }


@pytest.fixture
def reader(
    documented: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    make_run: Callable[..., Path],
    parse_script: Callable[[Sequence[str]], None],
    tmp_path: Path,
    checkout: Path,  # noqa: ARG001
) -> Reader:
    """In a folder with stand-ins; nobody waits for the page of `fewshot-seg app`, or for the ONNX exporter."""

    @contextlib.contextmanager
    def listen(*_: Any, **__: Any) -> Iterator[Served]:
        yield Served(address="http://127.0.0.1:7860/", sessions=None, folder=tmp_path)  # type: ignore[arg-type]

    class Interrupted:
        def wait(self) -> None:
            raise KeyboardInterrupt

    def write_nothing_but_metadata(_: Any, folder: Path, **__: Any) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metadata.json").write_text("{}")
        return {"graphs": {"support": {"file": "support.onnx"}, "query": {"file": "query.onnx"}}}

    # wherever the commands import them
    for place in ("fewshot_seg.app.serving", "fewshot_seg.app_commands"):
        monkeypatch.setattr(f"{place}.check_package", lambda: None, raising=False)
        monkeypatch.setattr(f"{place}.serve", listen, raising=False)
    for place in ("fewshot_seg.export", "fewshot_seg.commands"):
        monkeypatch.setattr(f"{place}.export_segmenter", write_nothing_but_metadata, raising=False)
    monkeypatch.setitem(train_base_learner.__kwdefaults__, "steps", 3)  # no setting of the command line
    without_waiting = SimpleNamespace(**{**vars(threading), "Event": Interrupted})
    monkeypatch.setattr(app_commands, "threading", without_waiting)
    return Reader(documented, monkeypatch, make_run, parse_script)


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, documented: ModuleType, reader: Reader) -> None:
    for block in documented.read_blocks(ROOT / page):
        try:
            reader.read(block)
        except Exception as error:
            raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error


def test_counts_stand_in_the_documentation(documented: ModuleType) -> None:
    page = (ROOT / "docs" / "reliability-documentation.md").read_text()
    for name, number in documented.counts().items():
        assert f"{number:4d} {name}\n" in page, f"run scripts/documented_commands.py --write: {number} {name}"


@pytest.mark.parametrize(
    "command",
    [
        "fewshot-seg segment",
        "fewshot-seg predict --suport a.jpg:b.png --query photos/",
        "fewshot-seg train --data voc",
        "fewshot-seg evaluate --data folder --root my_pictures --shots no",
        "fewshot-seg evaluate --data folder --root no_such_folder",
        "python scripts/reproduce_priors.py --no-such-flag",
        "python scripts/no_such_script.py",
        "torchrun --no-such-flag -m fewshot_seg train",
        "pip install 'fewshot-seg[gpu]'",
    ],
)
def test_wrong_arguments_are_refused(documented: ModuleType, reader: Reader, command: str) -> None:
    block = documented.Block(page="page.md", line=1, language="bash", text=command)
    with pytest.raises((Exception, SystemExit)):
        reader.read(block)
