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
from collections.abc import Iterable, Iterator, Mapping
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
    locks name, and the content of files: those that a parameter names (a model, a recipe as
    `FILE.yaml:NAME`, a list as `@FILE`), and those that the front matter does.
    """
    text = chapter.read_text("utf-8")
    packages = [LIBRARY / "paramspec", LIBRARY / "paramspec_book"]
    named = [path for value in _texts(parameters.values()) for path in _named_paths(value, root)]
    read = [path for pattern in declared_inputs(text) for path in root.glob(pattern)]
    lines = [text, profile, json.dumps(dict(parameters), sort_keys=True)]
    lines += _installed(root)
    lines += sorted(_contents(LIBRARY, packages))
    lines += sorted(_contents(root, [*named, *read]))
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


def _installed(root: Path) -> Iterator[str]:
    """Yield Python's version, and that of everything that the locks name, as the embedded model."""
    yield platform.python_version()
    for lock in sorted(root.glob("requirements*.lock")):
        for name in re.findall(r"^([\w.-]+)==", lock.read_text("utf-8"), re.M):
            yield f"{name}=={version_of(name)}"


def _texts(values: Iterable[Any]) -> Iterator[str]:
    """Yield every text in parameters' values, which may be lists and mappings."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | dict):
            yield from _texts(value.values() if isinstance(value, dict) else value)


def _named_paths(text: str, root: Path) -> Iterator[Path]:
    """Yield the files and folders that a parameter's text names, as a chapter would find them.

    The text may be a path, one behind an `@`, or one before a colon, as in `FILE.yaml:NAME@STEP`.
    A folder that holds the book itself is not meant.
    """
    for name in filter(None, (text, text.removeprefix("@"), text.rpartition(":")[0])):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # not a path after all
            path = (root / Path(name).expanduser()).resolve()
            if path.exists() and not root.resolve().is_relative_to(path):
                yield path


def _contents(place: Path, paths: Iterable[Path]) -> Iterator[str]:
    """Yield a line for each file, or each file of a folder: where it is, and its content's digest.

    Of a large file, such as a model's weights, size and time of change stand for the content.
    """
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if not file.is_file() or "__pycache__" in file.parts:
                continue
            stat = file.stat()
            content = f"{stat.st_size} {stat.st_mtime_ns}"
            if stat.st_size <= READ_WHOLE:
                content = hashlib.sha256(file.read_bytes()).hexdigest()
            yield f"{os.path.relpath(file, place)} {content}"
