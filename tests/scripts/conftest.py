"""Fixtures of the scripts' tests."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

_SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="session")
def load_script() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of scripts/ by its name; while tests run, scripts find each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(_SCRIPTS))
        yield importlib.import_module


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script of scripts/ with arguments, in a process of its own: some fork, and must have no other threads."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(_SCRIPTS / f"{name}.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)

    return run
