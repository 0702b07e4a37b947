"""Known vulnerabilities of the locked dependencies, by pip-audit; says how many of them a service has answered for.

    python scripts/audit_dependencies.py

Needs uv, and a vulnerability service (OSV's, else PyPI's). Where none answers, nothing is known: that is said, and the
exit code is 0. It is 1 where a package has a known vulnerability that is not explained below.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXPORT = (
    *("uv", "export", "--quiet", "--frozen", "--no-dev", "--all-extras", "--no-emit-project"),
    *("--format", "requirements-txt", "--output-file"),
)
SERVICES = ("osv", "pypi")
EXPLAINED: dict[str, str] = {}
"""Vulnerability -> why it does not matter here."""
_PATIENCE = 600


def audit(requirements: Path, service: str) -> list[dict[str, Any]] | str:
    """What pip-audit says of every package; or, where it gives no answer, why."""
    command = ["uvx", "pip-audit", "--requirement", str(requirements), "--no-deps", "--disable-pip"]
    command += ["--vulnerability-service", service, "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    try:
        answered: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return (done.stderr.strip().splitlines() or ["no answer"])[-1][:300]
    return answered


def summary(answered: list[dict[str, Any]], service: str) -> tuple[list[str], bool]:
    """Lines to print, and whether nothing unexplained was found."""
    skipped = [one for one in answered if "skip_reason" in one]
    found = [
        (f"{one['name']} {one['version']}", vulnerability["id"], vulnerability.get("fix_versions", []))
        for one in answered
        for vulnerability in one.get("vulns", ())
    ]
    asked = len(answered) - len(skipped)
    lines = [f"{service}: {len(answered)} packages, {asked} answered for, {len(found)} known vulnerabilities"]
    if skipped:
        lines.append(f"not answered for: {len(skipped)}, first: {skipped[0]['skip_reason']}")
    clean = True
    for package, name, fixed in found:
        clean &= name in EXPLAINED
        lines.append(
            f"{package}: {name}, {EXPLAINED.get(name, 'not explained')}; fixed in {', '.join(fixed) or 'none'}"
        )
    return lines, clean


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        subprocess.run([*EXPORT, str(requirements)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        clean = True
        for service in SERVICES:
            answered = audit(requirements, service)
            if isinstance(answered, str):
                print(f"{service}: no answer: {answered}")
                continue
            lines, clean = summary(answered, service)
            print("\n".join(lines))
            if any("skip_reason" not in one for one in answered):
                return 0 if clean else 1
    print("no service answered for any package: nothing is known of vulnerabilities; run it where one can be reached")
    return 0


if __name__ == "__main__":
    sys.exit(main())
