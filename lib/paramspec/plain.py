"""YAML and numbers that mean what they say: JSON's values, and nothing that a reader guesses.

    read_yaml("seed: 3\ntime: 12:30", "mine.yaml")     # {"seed": 3, "time": "12:30"}
    read_value("[0.1, 1e-3]", "-p ratios")             # [0.1, 0.001]
    read_value("010", "-p seed")                       # "010": not 8, and not 10
    integer("10"), number("1e-3")                      # of the command line

YAML 1.1, PyYAML's, takes `010` for 8, `12:30` for 750, `1_0` for 10, `no` for false, `2020-01-01`
for a date. Here they are the texts that they look like; a place that wants a number refuses them.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from paramspec.errors import InputError

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)\Z")
# JSON's numbers, and those that leave out a zero: .5 and 1.
_NUMBER = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?\Z")
_WORDS = {"null": None, "true": True, "false": False}


def integer(text: str) -> int:
    """`integer("10")`: a whole number in decimal digits; a ValueError for `010`, `1_0` or `1.0`."""
    if not isinstance(text, str):  # an option's default
        return text
    if not _INTEGER.match(text):
        raise ValueError("expected a whole number, as 10")
    return int(text)


def number(text: str) -> float:
    """`number("1e-3")`: a finite number; a ValueError for `1_0`, `nan`, `inf` or `1,5`."""
    if not isinstance(text, str):
        return text
    if not _NUMBER.match(text) or not math.isfinite(float(text)):
        raise ValueError("expected a number, as 0.05")
    return float(text)


def read_value(text: str, place: str) -> Any:
    """`read_value("3", "-p seed")`: a value as it is typed after `-p`.

    A list, a mapping and a quoted text are YAML. All else is one value to its end: a number, true,
    false or null where it is one of JSON's, and otherwise the text.

    Raises:
        InputError: naming the place, for what is not YAML.
    """
    bare = text.strip()
    if bare[:1] in ("[", "{", '"', "'"):
        return read_yaml(bare, f"{place}: {text!r}")
    if bare in _WORDS:
        return _WORDS[bare]
    for read, form in ((integer, _INTEGER), (number, _NUMBER)):
        if form.match(bare):
            try:
                return read(bare)
            except ValueError as error:
                raise InputError(f"{place}: {text!r} is too large a number ({error})") from error
    return text


def read_yaml(text: str, place: str) -> Any:
    """`read_yaml(path.read_text("utf-8"), str(path))`: the value that YAML holds.

    Numbers, true, false and null are JSON's (and numbers as `1e3`, `.5`); every other scalar is a
    text. A key stands once.

    Raises:
        InputError: naming the place, the line and the problem.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and "\n" in text.strip() else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        problem = " ".join(str(problem).split())
        raise InputError(f"{place}{line}: not YAML ({problem}); mend it") from error


def require_unicode(path: Path) -> None:
    """`require_unicode(out)`: refuse a path that is not UTF-8, which weights and tables can't hold.

    Raises:
        InputError: naming the path.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: a path that is not UTF-8; rename it") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with JSON's scalars in place of YAML 1.1's."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  PyYAML fills it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                name = self.construct_object(key)
                if name in seen:
                    self._refuse(f"{name!r} stands twice", key)
                seen.add(name)
        return super().construct_mapping(node, deep)

    def _number(self, node: yaml.ScalarNode) -> int | float:
        read = integer if node.tag.endswith(":int") else number
        try:
            return read(self.construct_scalar(node))
        except ValueError as error:
            self._refuse(f"{node.value!r}: {error}", node)

    def _refuse(self, problem: str, node: yaml.Node) -> None:
        raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)


def _prepare(loader: type[_Loader]) -> None:
    tag = "tag:yaml.org,2002:"
    kept = ("null", "bool", "str", "seq", "map")
    constructors = yaml.SafeLoader.yaml_constructors
    loader.yaml_constructors = {None: constructors[None]}
    loader.yaml_constructors |= {tag + name: constructors[tag + name] for name in kept}
    for name in ("int", "float"):
        loader.add_constructor(tag + name, loader._number)
    loader.add_implicit_resolver(tag + "null", re.compile(r"(null)?\Z"), ["n", ""])
    loader.add_implicit_resolver(tag + "bool", re.compile(r"(true|false)\Z"), ["t", "f"])
    loader.add_implicit_resolver(tag + "int", _INTEGER, list("-0123456789"))
    loader.add_implicit_resolver(tag + "float", _NUMBER, list("-.0123456789"))


_prepare(_Loader)
