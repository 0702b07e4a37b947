"""What is installed with the package: locked by digest, under licences that allow it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lock() -> dict[str, Any]:
    return tomllib.loads((ROOT / "uv.lock").read_text("utf-8"))


class TestLock:
    def test_every_file_has_a_digest(self, lock: dict[str, Any]) -> None:
        files = 0
        for package in lock["package"]:
            if "editable" in package["source"] or "virtual" in package["source"]:
                assert package["name"] == "fewshot-seg"
                continue
            listed = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
            assert listed, f"{package['name']} {package['version']} has no files"
            for file in listed:
                assert file["hash"].startswith("sha256:"), (package["name"], file)
                assert len(file["hash"]) == len("sha256:") + 64
                files += 1
        assert files > 1000

    def test_all_comes_from_a_registry(self, lock: dict[str, Any]) -> None:
        """No branch of a repository, no file of somebody's: those may change under one name."""
        sources = {tuple(package["source"]) for package in lock["package"]}
        assert sources <= {("registry",), ("editable",), ("virtual",)}

    def test_it_is_that_of_the_project(self, lock: dict[str, Any]) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        own = next(package for package in lock["package"] if package["name"] == project["name"])
        asked = {one["name"] for one in own["dependencies"]}
        assert len(asked) == len(project["dependencies"])

    @pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
    def test_requirements_for_pip_have_digests(self, tmp_path: Path) -> None:
        command, target = script("audit_dependencies").EXPORT, tmp_path / "requirements.txt"
        subprocess.run([*command, str(target), "--offline"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        entries = target.read_text("utf-8").replace("\\\n", " ").splitlines()
        pinned = [entry for entry in entries if entry and not entry.lstrip().startswith("#")]
        assert len(pinned) > 80
        for entry in pinned:
            assert "==" in entry
            assert "--hash=sha256:" in entry


class TestLicences:
    def test_every_copyleft_is_explained(self) -> None:
        licences = script("list_licences")
        packages, _ = licences.installed_with()
        assert len(packages) > 40
        assert licences.unexplained(packages) == []

    def test_the_page_is_that_of_what_is_installed(self) -> None:
        """Of the packages that are here: extras and platforms differ."""
        licences = script("list_licences")
        written = (ROOT / "docs" / "licences.md").read_text("utf-8")
        for one in licences.installed_with()[0]:
            assert f"| {one.name} | {one.licence} |" in written, f"{one}: write docs/licences.md anew"

    @pytest.mark.parametrize(
        ("licence", "wrong"),
        [
            ("GPL-3.0-only", True),
            ("LGPL-2.1", True),
            ("AGPL", True),
            ("Mozilla Public License 2.0 (MPL 2.0)", True),
            ("GNU General Public License v3 (GPLv3)", True),
            ("not declared", True),
            ("MIT", False),
            ("Apache-2.0 WITH LLVM-exception", False),
        ],
    )
    def test_what_counts(self, licence: str, wrong: bool) -> None:
        licences = script("list_licences")
        found = licences.unexplained([licences.Licensed("x", licence, "y")])
        assert bool(found) == wrong


class TestAudit:
    def test_what_was_not_answered_for_is_not_clean(self) -> None:
        audit = script("audit_dependencies")
        answered = [
            {"name": "a", "version": "1", "vulns": []},
            {"name": "b", "skip_reason": "not found"},
            {"name": "c", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]},
        ]
        lines, clean = audit.summary(answered, "osv")
        assert not clean
        assert lines == [
            "osv: 3 packages, 2 answered for, 1 known vulnerabilities",
            "not answered for: 1, first: not found",
            "c 2: CVE-1, not explained; fixed in 3",
        ]
        assert audit.summary(answered[:1], "osv") == (
            ["osv: 1 packages, 1 answered for, 0 known vulnerabilities"],
            True,
        )
