"""scripts/documented_commands.py: what bash makes of a page's blocks, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def documented(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("documented_commands")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("```\nls\n```", "language ''"),
        ("```sh\nls\n```", "language 'sh'"),
        ("text\n\n    fewshot-seg train\n", "an indented block has no language"),
        ("```bash\nmake all\n```", "make"),
        ("```bash\nfor fold in 0 1; do\n```", "syntax error"),
        ("```bash\npython other.py\n```", "no check is known for: python other.py"),
        ("```bash\nruff format .\n```", "no check is known for: ruff format ."),
        ("```bash\nuv publish\n```", "no check is known for: uv publish"),
    ],
)
def test_what_nobody_has_thought_of_is_refused(
    documented: ModuleType, tmp_path: Path, content: str, message: str
) -> None:
    page = tmp_path / "page.md"
    page.write_text(content)

    def check_all() -> None:
        for block in documented.read_blocks(page):
            for words in documented.commands_of(block):
                documented.check_of(words)

    with pytest.raises(documented.UndocumentedError, match=re.escape(message)):
        check_all()


def test_loops_and_variables_are_expanded(documented: ModuleType) -> None:
    text = 'DATA="--data voc"\nfor fold in 0 1; do  # twice\n  fewshot-seg train $DATA \\\n    --fold $fold\ndone\n'
    block = documented.Block(page="page.md", line=1, language="bash", text=text)
    expected = [("fewshot-seg", "train", "--data", "voc", "--fold", fold) for fold in ("0", "1")]
    assert documented.commands_of(block) == expected


def test_only_what_follows_the_prompt_is_typed(documented: ModuleType) -> None:
    block = documented.Block(page="p.md", line=1, language="console", text="$ fewshot-seg weights list\ngeneral\n")
    assert documented.commands_of(block) == [("fewshot-seg", "weights", "list")]
