"""The key of an executed copy of a chapter: a digest of all that it depends on.

A chapter that reads files next to the library and its parameters names them in its front matter, by
patterns from the root: `paramspec: {inputs: ["tests/benchmarks/*.py"]}`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paramspec.execution.provenance import version_of
from paramspec.plain import read_yaml

# The name of the record of execution in a notebook's metadata, and of inputs in a front matter.
RECORD = "paramspec"
LIBRARY = Path(__file__).parents[1]
READ_WHOLE = 10_000_000  # bytes: a larger file has changed if its size or time of change has


def execution_key(
    chapter: Path,
    profile: str,
    parameters: Mapping[str, Any],
    root: Path,
    *,
    stand_ins: bool = False,
) -> str:
    """Return the digest of a chapter's text, profile and parameters, of the library, the installed
    versions of the locks' packages (one is the embedded model), and of files: those that a
    parameter names (a model, a recipe as `FILE.yaml:NAME`, a list as `@FILE`), or the front matter.
    """
    text, given = chapter.read_text("utf-8"), json.dumps(dict(parameters), sort_keys=True)
    lines = [text, profile, str(stand_ins), given, platform.python_version()]
    for lock in sorted(root.glob("requirements*.lock")):
        names = re.findall(r"^([\w.-]+)==", lock.read_text("utf-8"), re.M)
        lines += [f"{name}=={version_of(name)}" for name in names]
    read = [path for pattern in front_matter(text).get("inputs", []) for path in root.glob(pattern)]
    library = [LIBRARY / "paramspec", LIBRARY / "paramspec_book"]
    for place, paths in ((LIBRARY, library), (root, [*_named_paths(parameters, root), *read])):
        files = (file for path in paths for file in (path, *path.rglob("*")))
        lines += sorted(
            f"{os.path.relpath(file, place)} {_content(file)}"
            for file in files
            if file.is_file() and "__pycache__" not in file.parts
        )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def front_matter(text: str) -> dict[str, Any]:
    """Return what a chapter's text says under `paramspec` in its front matter: `inputs`, patterns
    of files, and `long` and `alone`, see `book`.
    """
    front = read_yaml(text.partition("\n---")[0].removeprefix("---"), "front matter")
    return front.get(RECORD, {})


def read_record(copy: Path) -> dict[str, Any] | None:
    """Return the record of an executed copy, or None if the copy is missing or damaged."""
    try:
        record = json.loads(copy.read_text("utf-8"))["metadata"][RECORD]
        return record if isinstance(record, dict) and "key" in record else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _named_paths(value: Any, root: Path) -> Iterator[Path]:
    """Yield the files and folders that texts in a value name: as a path, behind an `@`, or before a
    colon, as in `FILE.yaml:NAME@STEP`. A folder that holds the book itself is not meant.
    """
    if isinstance(value, str):
        for name in filter(None, (value, value.removeprefix("@"), value.rpartition(":")[0])):
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # not a path after all
                path = (root / Path(name).expanduser()).resolve()
                if path.exists() and not root.resolve().is_relative_to(path):
                    yield path
    elif isinstance(value, list | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _named_paths(part, root)


def _content(file: Path) -> str:
    """Return the digest of a file; for a large one, as weights, size and time of change."""
    stat = file.stat()
    if stat.st_size > READ_WHOLE:
        return f"{stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(file.read_bytes()).hexdigest()
