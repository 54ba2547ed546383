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
def test_what_is_shipped_reads_as_pyyaml_reads_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    # `repr` distinguishes 1 from 1.0 and from True.
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
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "mine.yaml:3: not YAML ('a' stands twice); mend it"),
        ("a: {b: 1, b: 2}", "mine.yaml: not YAML ('b' stands twice); mend it"),
        ("a: 1e999", "mine.yaml: not YAML (expected a number, as 0.05, not '1e999'); mend it"),
        ("[" * 5000, "mine.yaml: not YAML ("),
        ("a: \x07", "mine.yaml: not YAML ("),
    ],
)
def test_what_is_not_plain_is_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        read_yaml(text, "mine.yaml")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (integer, "0", 0),
        (integer, "-3", -3),
        (integer, "4294967296", 2**32),
        (number, "1e-3", 0.001),
        (number, ".5", 0.5),
        (number, "-1.", -1),
    ],
)
def test_numbers(read, text: str, value: float) -> None:
    assert read(text) == value


@pytest.mark.parametrize(
    "text", ["1_0", "010", "1:30", "0x10", "\u0661", "", " 1", "+1", "nan", "inf"]
)
@pytest.mark.parametrize("read", [integer, number])
def test_what_python_takes_for_a_number_is_none(read, text: str) -> None:
    with pytest.raises(ValueError, match="expected a"):
        read(text)
