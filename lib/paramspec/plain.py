"""YAML and numbers as JSON has them, with no value that a reader guesses.

    read_yaml("seed: 3\ntime: 12:30", "mine.yaml")     # {"seed": 3, "time": "12:30"}
    read_value("010", "-p seed")                       # "010": not 8, and not 10
    integer("10"), number("1e-3")                      # of the command line

PyYAML reads YAML 1.1: `010` as 8, `12:30` as 750, `1_0` as 10, `no` as false, `2020-01-01` as a
date. Here these are texts, which are refused where a number is expected.
"""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from typing import Any

import yaml

from paramspec.errors import InputError

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)\Z")
# JSON's numbers, and those without a zero: .5 and 1.
_NUMBER = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?\Z")
_WORDS = {"null": None, "true": True, "false": False}


def integer(text: str) -> int:
    """`integer("10")`: a whole number in decimal digits; ValueError for `010`, `1_0` or `1.0`."""
    if isinstance(text, str) and not _INTEGER.match(text):  # an option's default is a number
        raise ValueError(f"expected a whole number, as 10, not {text!r}")
    return int(text)


def number(text: str) -> float:
    """`number("1e-3")`: a finite number; ValueError for `1_0`, `nan`, `inf` or `1,5`."""
    if isinstance(text, str) and not (_NUMBER.match(text) and math.isfinite(float(text))):
        raise ValueError(f"expected a number, as 0.05, not {text!r}")
    return float(text)


def read_value(text: str, place: str) -> Any:
    """`read_value("3", "-p seed")`: a value as it is typed after `-p`.

    A list, a mapping and a quoted text are YAML. Anything else is one value, also with a colon or
    a # in it: a number, true, false or null, and otherwise a text.
    """
    bare = text.strip()
    if bare[:1] in ("[", "{", '"', "'"):
        return read_yaml(bare, f"{place}: {text!r}")
    value = _scalar(bare)
    return text if isinstance(value, str) else value


def read_yaml(text: str, place: str) -> Any:
    """`read_yaml(path.read_text("utf-8"), str(path))`: the value of a YAML text.

    Numbers, true, false and null are JSON's (and numbers as `1e3`, `.5`); every other scalar is a
    text. No key may be given twice. An InputError names the place, the line and the problem.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and "\n" in text.strip() else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{place}{line}: not YAML ({problem}); mend it") from error


def read_text(path: Path) -> str:
    """`read_text(Path("prompt.txt"))`: of a file in UTF-8, which must be there."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"{path}: cannot be read ({reason}); give a text file") from error


def require_unicode(path: Path) -> None:
    """Refuse a path that is not UTF-8, which files of weights and tables can't hold."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: a path that is not UTF-8; rename it") from error


def _scalar(text: str) -> Any:
    """A number, true, false or null as JSON has them, or else the text."""
    for read in (_WORDS.__getitem__, integer, number):
        with contextlib.suppress(KeyError, ValueError):
            return read(text)
    return text


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """PyYAML's safe loader, with JSON's scalars in place of YAML 1.1's."""

    def resolve(self, kind: type, value: str, implicit: tuple[bool, bool]) -> str:
        plain = kind is yaml.ScalarNode and implicit[0]  # neither quoted nor tagged
        return "!plain" if plain else super().resolve(kind, value, implicit)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                problem = f"{key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("!plain", lambda _, node: _scalar(node.value) if node.value else None)
