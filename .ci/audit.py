"""Look up known vulnerabilities of pinned packages; without a network, say so and pass.

python .ci/audit.py constraints.txt
"""

from __future__ import annotations

import json
import subprocess
import sys

SECONDS = 120

# Known, looked at, and of no consequence here; with the reason.
ACCEPTED: dict[str, str] = {}


def main(requirements: str) -> int:
    """Return 1 if a package has a vulnerability that is not accepted, else 0."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", requirements]
    command += ["--disable-pip", "--no-deps", "--format", "json", "--progress-spinner", "off"]
    try:
        result = subprocess.run(
            [*command, "--timeout", "5"], capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return skipped(f"no answer within {SECONDS} s")
    try:
        packages = json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError):
        lines = result.stderr.strip().splitlines()
        return skipped(lines[-1] if lines else f"exit {result.returncode}")
    looked_up = [package for package in packages if "vulns" in package]
    if not looked_up:
        return skipped(f"none of {len(packages)} packages could be looked up")
    found = [
        f"{package['name']} {package['version']}: {weakness['id']}, fixed in "
        f"{', '.join(weakness['fix_versions']) or 'no version'}"
        for package in looked_up
        for weakness in package["vulns"]
        if not ACCEPTED.keys() & {weakness["id"], *weakness["aliases"]}
    ]
    print(f"pip-audit: {len(looked_up)} of {len(packages)} packages looked up, {len(found)} found")
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


def skipped(reason: str) -> int:
    """Say why nothing was looked up."""
    print(f"pip-audit: skipped: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
