"""YAML and numbers of the command line: JSON's values, and texts as they stand."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
import yaml

from paramspec.errors import InputError
from paramspec.plain import integer, number, read_yaml

ROOT = Path(__file__).parents[1]
SHIPPED = [
    ROOT / "_toc.yml",
    *sorted(ROOT.glob("book/profiles/**/*.yaml")),
    *sorted(ROOT.glob("lib/paramspec/**/*.yaml")),
]


def _dates_as_texts(value: object) -> object:
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, dict):
        return {key: _dates_as_texts(child) for key, child in value.items()}
    return [_dates_as_texts(child) for child in value] if isinstance(value, list) else value


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_what_is_shipped_reads_as_it_always_did(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    # `repr` tells 1 from 1.0 and from True.
    assert repr(read_yaml(text, path.name)) == repr(_dates_as_texts(yaml.safe_load(text)))


@pytest.mark.parametrize(
    "value", [0, -7, 1.5, -2e-3, 1e300, True, False, None, "", "a", "[x]", {"a": [1, {"b": None}]}]
)
def test_json_is_yaml(value: object) -> None:
    assert repr(read_yaml(json.dumps(value), "here")) == repr(value)


@pytest.mark.parametrize(
    "text",
    [
        *("010", "1:30", "1_0", "0x10", "0b1", "12:30", "12:30:59", "+1", "1,5", ".inf", ".nan"),
        *("no", "Yes", "on", "OFF", "True", "NULL", "~", "=", "<<", "2020-01-01"),
    ],
)
def test_a_plain_word_is_a_text(text: str) -> None:
    assert read_yaml(f"a: {text}\n{text}: b", "here") == {"a": text, text: "b"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 2\na: 3\n", "mine.yaml:3: not YAML ('a' stands twice); mend it"),
        ("a: {b: 1, b: 2}", "mine.yaml: not YAML ('b' stands twice); mend it"),
        ("a: 1e999", "mine.yaml: not YAML ('1e999': expected a number, as 0.05); mend it"),
        ("a: !!int 010", "mine.yaml: not YAML ('010': expected a whole number, as 10); mend it"),
        ("[" * 5000, "mine.yaml: not YAML ("),
        ("a: !!timestamp 2020-01-01", "mine.yaml: not YAML ("),
        ("a: \x07", "mine.yaml: not YAML ("),
    ],
)
def test_what_is_not_plain_is_one_line(text: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        read_yaml(text, "mine.yaml")
    assert str(error.value).startswith(told)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("-3", -3), ("4294967296", 2**32)])
def test_whole_numbers(text: str, value: int) -> None:
    assert integer(text) == value


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("1e-3", 0.001), (".5", 0.5), ("-1.", -1)])
def test_numbers(text: str, value: float) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    "text", ["1_0", "010", "1:30", "0x10", "\u0661", "", " 1", "+1", "nan", "inf"]
)
@pytest.mark.parametrize("read", [integer, number])
def test_what_python_takes_for_a_number_is_none(read, text: str) -> None:
    with pytest.raises(ValueError, match="expected a"):
        read(text)
