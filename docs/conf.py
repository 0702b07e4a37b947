"""Sphinx builds docs/ into HTML: `uv run --group docs sphinx-build -W -b html docs build/docs`. No network is used."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT))  # the API pages describe this checkout, not what happens to be installed

_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "fewshot-seg"
author = "the fewshot-seg authors"
release = version = _PROJECT["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["results.json"]

html_theme = "furo"
html_title = f"fewshot-seg {release}"
html_theme_options = {"navigation_with_keys": True}
html_static_path: list[str] = []
html_copy_source = False

myst_enable_extensions = ["deflist", "attrs_block"]
myst_heading_anchors = 3

default_role = "py:obj"  # single backticks in docstrings name objects
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"UInt8Array": "UInt8Array", "FloatArray": "FloatArray"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

_SUBSTITUTION = re.compile(r"(?<!\\)\|")


def _as_plain_text(*given: Any) -> None:
    """Docstrings are written for people who read code: |x| is an absolute value there, no substitution of Sphinx."""
    lines: list[str] = given[-1]
    lines[:] = [line if line.lstrip().startswith(">>>") else _SUBSTITUTION.sub(r"\\|", line) for line in lines]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _as_plain_text)
