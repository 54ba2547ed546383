"""YAML and numbers of the command line: JSON's values, and texts as they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from paramspec.errors import InputError
from paramspec.plain import integer, number, read_value, read_yaml

ROOT = Path(__file__).parents[1]
FOLDERS = ("book/profiles", "lib/paramspec", "tools/specwiki")
SHIPPED = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.yaml"))
TEXTS = (
    *("010", "1:30", "1_0", "0x10", "0b1", "12:30", "12:30:59", "+1", "1,5", ".inf", ".nan"),
    *("1e999", "no", "Yes", "on", "OFF", "True", "NULL", "~", "=", "<<", "2020-01-01"),
)


@pytest.mark.parametrize("path", [ROOT / "_toc.yml", *SHIPPED], ids=lambda path: path.name)
def test_what_is_shipped_reads_as_pyyaml_reads_it(path):
    text = path.read_text(encoding="utf-8")
    # As texts, 1, 1.0 and true differ; dates are texts here.
    assert json.dumps(read_yaml(text, "")) == json.dumps(yaml.safe_load(text), default=str)


@pytest.mark.parametrize(
    "value", [0, -7, 1.5, -2e-3, 1e300, True, False, None, "", "a", "[x]", {"a": [1, {"b": None}]}]
)
def test_json_is_yaml_and_a_value_of_the_command_line(value):
    assert repr(read_yaml(json.dumps(value), "here")) == repr(value)
    assert repr(read_value(json.dumps(value), "-p x")) == repr(value)


@pytest.mark.parametrize("text", TEXTS)
def test_a_plain_word_is_a_text(text):
    assert read_yaml(f"a: {text}\n{text}: b", "here") == {"a": text, text: "b"}
    assert read_value(text, "-p x") == text
    assert read_value(f"{text}: # b", "-p x") == f"{text}: # b"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: 1\nb: 2\na: 3\n", "mine.yaml:3: not YAML ('a' is given twice"),
        ("a: {b: 1, b: 2}", "mine.yaml: not YAML ('b' is given twice"),
        ("[" * 5000, "mine.yaml: not YAML ("),
        ("a: \x07", "mine.yaml: not YAML ("),
        ("a: !!python/name:os.system x", "mine.yaml: not YAML ("),
    ],
)
def test_what_is_not_plain_is_one_line(text, place):
    with pytest.raises(InputError, match=f"^{re.escape(place)}.*$"):
        read_yaml(text, "mine.yaml")


def test_numbers():
    assert list(map(integer, ("0", "-3", "4294967296"))) == [0, -3, 2**32]
    assert list(map(number, ("1e-3", ".5", "-1."))) == [0.001, 0.5, -1]


@pytest.mark.parametrize("text", ["1_0", "010", "1:30", "0x10", "\u0661", "", " 1", "+1", "nan"])
@pytest.mark.parametrize("read", [integer, number])
def test_what_python_takes_for_a_number_is_none(read, text):
    with pytest.raises(ValueError, match="expected a"):
        read(text)
