"""Find every command and every piece of Python in README.md and docs/, and say how each of them is checked.

    python scripts/documented_commands.py            # every command, its page and line, and how it is checked
    python scripts/documented_commands.py --counts   # the counts alone, as docs/reliability-documentation.md has them
    python scripts/documented_commands.py --write    # put them there

The checks themselves are in tests/docs. Commands are found by what bash makes of a block: its programs are replaced by
stand-ins that write down their arguments and do nothing. So loops, variables and continued lines count as they run, and
a program that nobody thought of is not found and refused.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]

Way = Literal["executed", "arguments parsed", "run by CI", "only looked at"]

SHELL = ("bash", "console")
SHOWN = ("text", "toml", "yaml", "json")
"""Languages of blocks that are no commands: output, files. Files of settings are read by the tests."""
LANGUAGES = (*SHELL, *SHOWN, "python", "pycon")

EXECUTED_SCRIPTS = ("scripts/documented_commands.py",)
CI_PROGRAMS = ("pytest", "ruff", "mypy", "lint-imports", "sphinx-build")
_PROGRAMS = ("fewshot-seg", "python", "torchrun", "pip", "uv", "srun", "scontrol", *CI_PROGRAMS)
_RECORD = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\1\\0'; } >> "$RECORDED"
"""
_CLUSTER = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "1"}


class UndocumentedError(LookupError):
    """A command, block or language that the tests do not know how to check."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A fenced block, or an inline piece of code that is a command.

    Attributes:
        page: path relative to the repository.
        line: where it begins, from 1.
        language: what stands after the fence, ``inline`` for inline code.
        text: its content.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """``docs/data.md:12``."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """How one command is checked, and why not better where it is not executed."""

    way: Way
    reason: str = ""


def documented_pages() -> list[Path]:
    """README and all pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read_blocks(page: Path) -> list[Block]:
    """Blocks and inline commands of a page, in order.

    Raises:
        UndocumentedError: a block without a known language, or an indented one.
    """
    name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "code_block":
            raise UndocumentedError(f"{name}:{line}: an indented block has no language; put it between ``` fences")
        if token.type == "fence" and not token.info.startswith("{"):  # {toctree} and the like are for Sphinx
            language = token.info.strip()
            if language not in LANGUAGES:
                raise UndocumentedError(f"{name}:{line}: language {language!r}; known are {', '.join(LANGUAGES)}")
            found.append(Block(page=name, line=line, language=language, text=token.content))
        found += [Block(page=name, line=line, language="inline", text=text) for text in _inline_commands(token)]
    return found


def _inline_commands(token: Token) -> Iterator[str]:
    for child in token.children or ():
        words = child.content.split()
        if child.type != "code_inline" or len(words) < 2 or any(mark in child.content for mark in ("...", "|")):
            continue
        if words[:2] == ["uv", "run"]:
            words = words[2:]
        if words[0] == "fewshot-seg" and len(words) < 3:
            continue  # the name of a verb
        if words[0] in ("fewshot-seg", *CI_PROGRAMS) or (words[0] == "python" and words[1].startswith("scripts/")):
            yield child.content


def commands_of(block: Block) -> list[tuple[str, ...]]:
    """What a block of bash calls: program and arguments of each call, as bash expands them.

    Raises:
        UndocumentedError: bash does not understand the block, or a program is none of those known.
    """
    if block.language == "inline":
        return [tuple(shlex.split(block.text.split(" > ")[0]))]
    lines = block.text.splitlines()
    if block.language == "console":  # only what follows the prompt is typed
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    with tempfile.TemporaryDirectory() as folder:
        programs, recorded = Path(folder) / "programs", Path(folder) / "recorded"
        programs.mkdir()
        recorded.touch()
        for name in _PROGRAMS:
            stand_in = programs / name
            stand_in.write_text(_RECORD + {"srun": 'exec "$@"\n', "scontrol": "echo node0\n"}.get(name, ""))
            stand_in.chmod(0o755)
        (programs / "head").symlink_to("/usr/bin/head")
        given = {"PATH": str(programs), "RECORDED": str(recorded), "HOME": folder, **_CLUSTER}
        script = "set -euo pipefail\n" + "\n".join(lines)
        ran = subprocess.run(["/bin/bash", "-c", script], cwd=folder, env=given, capture_output=True, text=True)
        if ran.returncode:
            raise UndocumentedError(f"{block.place}: {ran.stderr.strip() or f'exit code {ran.returncode}'}")
        calls = recorded.read_bytes().decode().split("\x01\0")
    found = [tuple(call.split("\0")[:-1]) for call in calls if call]
    return [call for call in found if call[0] not in ("srun", "scontrol")]


def unwrapped(words: Sequence[str]) -> tuple[str, ...]:
    """A command without ``uv run`` and its options before it."""
    if tuple(words[:2]) != ("uv", "run"):
        return tuple(words)
    rest = list(words[2:])
    while rest[:1] in (["--group"], ["--extra"]):
        rest = rest[2:]
    return tuple(rest)


def check_of(words: Sequence[str]) -> Check:
    """How a command is checked.

    Raises:
        UndocumentedError: nobody has said how.
    """
    program, *arguments = unwrapped(words)
    if program == "fewshot-seg" or (program, *arguments[:2]) == ("python", "-m", "fewshot_seg"):
        return _check_of_verb(arguments if program == "fewshot-seg" else arguments[2:])
    if program == "torchrun":
        if "--nnodes" in arguments:
            return Check(way="arguments parsed", reason="needs several machines")
        return Check(way="executed", reason="by one process; tests/fewshot_seg/test_distributed.py starts torchrun")
    if program == "python" and arguments[:1] and arguments[0].startswith("scripts/"):
        if arguments[0] in EXECUTED_SCRIPTS:
            return Check(way="executed")
        if _takes_nothing(arguments[0]) and arguments[1:] == []:
            return Check(way="only looked at", reason="the script is there, and takes no arguments")
        if arguments[0] == "scripts/onnx_example.py":
            return Check(way="arguments parsed", reason="tests/fewshot_seg/test_export.py runs it")
        return Check(way="arguments parsed", reason="measures or draws for minutes to hours, on real data")
    if program == "python" and arguments[:1] == ["-c"] and "pretrained=True" in arguments[1]:
        return Check(way="only looked at", reason="downloads weights")
    if program in CI_PROGRAMS:
        if "uv run " in shlex.join(words) and shlex.join(words) in (ROOT / ".ci" / "run").read_text():
            return Check(way="run by CI", reason="the same line is in .ci/run")
        if program == "pytest":
            return Check(way="arguments parsed", reason="it would start the tests within a test")
    if program in ("pip", "uv") and arguments[:1] in (["install"], ["sync"], ["lock"], ["export"]):
        return Check(way="only looked at", reason="installs packages; the extras and groups that it names exist")
    raise UndocumentedError(f"no check is known for: {shlex.join(words)}; see scripts/documented_commands.py")


def _takes_nothing(script: str) -> bool:
    """Whether a script has no parser, neither of its own nor by `fold_benchmark`."""
    path = ROOT / script
    return path.is_file() and not any(word in path.read_text() for word in ("argparse", "fold_benchmark"))


def _check_of_verb(arguments: Sequence[str]) -> Check:
    if list(arguments[:2]) == ["data", "prepare"]:
        return Check(
            way="arguments parsed",
            reason="fetches gigabytes; tests/fewshot_seg/test_data_commands.py runs it on small archives",
        )
    if "cuda" in arguments or "hub" in arguments:
        return Check(way="arguments parsed", reason="needs a GPU or downloads weights")
    if any(argument.endswith(".pth") for argument in arguments):
        return Check(way="arguments parsed", reason="needs weights that are downloaded")
    up_to = {
        "export": "up to torch's exporter, which tests/fewshot_seg/test_export.py runs",
        "app": "up to the page, which tests/browser opens",
    }
    return Check(way="executed", reason=up_to.get(arguments[0], ""))


def all_checks() -> list[tuple[Block, tuple[str, ...], Check]]:
    """Every different command of every page, with its check; inline ones are parsed at most."""
    found = []
    for page in documented_pages():
        seen = set()
        for block in read_blocks(page):
            if block.language not in (*SHELL, "inline"):
                continue
            for words in commands_of(block):
                if (words, block.language == "inline") in seen:
                    continue
                seen.add((words, block.language == "inline"))
                check = check_of(words)
                if block.language == "inline" and check.way == "executed":
                    check = Check(way="arguments parsed", reason="inline")
                found.append((block, words, check))
    return found


def counts() -> dict[str, int]:
    """Numbers of pages, commands by the way they are checked, and blocks of Python."""
    ways = Counter(check.way for _, _, check in all_checks())
    blocks = [block.language for page in documented_pages() for block in read_blocks(page)]
    return {
        "pages": len(documented_pages()),
        "commands": ways.total(),
        **{way: ways[way] for way in ("executed", "arguments parsed", "run by CI", "only looked at")},
        "blocks of Python, all executed": blocks.count("python") + blocks.count("pycon"),
        "files of settings, all read": blocks.count("toml") + blocks.count("yaml"),
    }


def main() -> None:
    """Print the table, or the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", action="store_true", help="print the counts alone")
    parser.add_argument("--write", action="store_true", help="write the counts into docs/reliability-documentation.md")
    given = parser.parse_args()
    lines = "\n".join(f"{number:4d} {name}" for name, number in counts().items())
    if given.write:
        page = ROOT / "docs" / "reliability-documentation.md"
        page.write_text(re.sub(r"(?s)(?<=```text\n)[ \d]+pages\n.*?(?=\n```)", lines, page.read_text(), count=1))
    elif not given.counts:
        for block, words, check in all_checks():
            reason = f" ({check.reason})" if check.reason else ""
            print(f"{block.place}: {check.way}{reason}: {shlex.join(words)}")
        print()
    print(lines)


if __name__ == "__main__":
    main()
