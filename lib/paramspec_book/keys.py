"""What an executed copy of a chapter depends on, as one key; and the record that it carries.

    execution_key(chapter, "default", {"seed": 0}, root)    # of a source and all that it reads
    read_record(copy)["key"]                                # of the copy that is there

What a chapter reads beside the library and its parameters, its front matter names by patterns from
the root: `paramspec: {inputs: ["tests/benchmarks/*.py"]}`.
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

# The key in a notebook's metadata that holds the record of its execution, and in a chapter's front
# matter what it reads.
RECORD = "paramspec"
LIBRARY = Path(__file__).parents[1]
READ_WHOLE = 10_000_000  # bytes of a file that is still read to find out whether it changed


def execution_key(chapter: Path, profile: str, parameters: Mapping[str, Any], root: Path) -> str:
    """Return the digest of all that an executed copy of a chapter depends on.

    That is its text, the profile, the parameters, the library, the installed versions of what the
    locks name (the embedded model is a package), and the content of files: those that a parameter
    names (a model, a recipe as `FILE.yaml:NAME`, a list as `@FILE`), and those that the front
    matter does.
    """
    text = chapter.read_text("utf-8")
    lines = [text, profile, json.dumps(dict(parameters), sort_keys=True), platform.python_version()]
    for lock in sorted(root.glob("requirements*.lock")):
        names = re.findall(r"^([\w.-]+)==", lock.read_text("utf-8"), re.M)
        lines += [f"{name}=={version_of(name)}" for name in names]
    read = [path for pattern in declared_inputs(text) for path in root.glob(pattern)]
    library = [LIBRARY / "paramspec", LIBRARY / "paramspec_book"]
    for place, paths in ((LIBRARY, library), (root, [*_named_paths(parameters, root), *read])):
        files = (file for path in paths for file in (path, *path.rglob("*")))
        lines += sorted(
            f"{os.path.relpath(file, place)} {_content(file)}"
            for file in files
            if file.is_file() and "__pycache__" not in file.parts
        )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def declared_inputs(text: str) -> list[str]:
    """Return the patterns of files that the front matter of a chapter's text says it reads."""
    front_matter = read_yaml(text.partition("\n---")[0].removeprefix("---"), "front matter")
    return front_matter.get(RECORD, {}).get("inputs", [])


def read_record(copy: Path) -> dict[str, Any] | None:
    """Return the record of an executed copy, or None when there is no sound copy."""
    try:
        record = json.loads(copy.read_text("utf-8"))["metadata"][RECORD]
        return record if isinstance(record, dict) and "key" in record else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _named_paths(value: Any, root: Path) -> Iterator[Path]:
    """Yield the files and folders that texts in a value name, as a chapter would find them.

    A text may be a path, one behind an `@`, or one before a colon, as in `FILE.yaml:NAME@STEP`.
    A folder that holds the book itself is not meant.
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
