"""Tables as pages show them: an estimate large, its interval small; on a phone, cards for rows.

`use_book_tables()` makes a notebook show every DataFrame so. A long or wide one is folded.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd

from paramspec.stats.estimates import with_interval
from paramspec_book.kept import keep_csv

ROWS, COLUMNS = 12, 6  # a table of more is folded
INTERVAL = re.compile(
    r"(.*)(\u00a0\[.*\])", re.DOTALL
)  # as `stats.estimates.with_interval` writes it
MINUS = re.compile(r"(?<![\w.\u2212-])-(?=\.?\d)")
MINUS_ZERO = re.compile(r"(?<![\w.\u2212-])-(?=0(\.0+)?(?![\d.]))")


def use_book_tables() -> None:
    from IPython import get_ipython

    if shell := get_ipython():
        shell.display_formatter.formatters["text/html"].for_type(pd.DataFrame, to_html)


def to_html(frame: pd.DataFrame) -> str:
    """`to_html(frame)`: its HTML; its numbers are kept as the chapter's next `table-N.csv`."""
    name = keep_csv("table", frame)
    named = any(level is not None for level in frame.index.names)
    flat = frame.reset_index() if named or not isinstance(frame.index, pd.RangeIndex) else frame
    flat.columns = [
        ", ".join(str(part) for part in one if str(part)) if isinstance(one, tuple) else str(one)
        for one in flat.columns
    ]
    flat = flat.rename(columns={"index": ""}) if not named else flat
    styler = flat.style.format({column: partial(_cell, column) for column in flat.columns})
    styler = styler.hide(axis="index").format_index(html.escape, axis=1)
    table = styler.to_html(exclude_styles=True)
    size = f"{len(flat)} rows" if len(flat) > ROWS else f"{len(flat.columns)} columns"
    if len(flat) > ROWS or len(flat.columns) > COLUMNS:
        table = f"<details><summary>Table of {size}</summary>\n{table}</details>"
    region = f'tabindex="0" role="region" aria-label="Table" data-table="{name}"'
    return f'<div class="book-scroll tex2jax_ignore" {region}>\n{table}</div>'


def _cell(column: str, value: Any) -> str:
    """The text of a cell; the name of its column is shown where rows are cards."""
    found = INTERVAL.fullmatch(text := with_minus(_words(value)))
    shown = html.escape(text)
    if found:
        shown = f'{html.escape(found[1])}<small class="interval">{html.escape(found[2])}</small>'
    return f"<span hidden>{html.escape(column)}</span>{shown}"


def _words(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shown(table: pd.DataFrame, titles: Mapping[str, str], form: str = ".2f") -> pd.DataFrame:
    """`shown(table, {"peak_pss": "peak PSS"})`: columns of values with their intervals, as text."""
    rows = table.to_dict("records")
    texts = {
        title: [with_interval(row, name, form=form) for row in rows]
        for name, title in titles.items()
    }
    return pd.DataFrame(texts, index=table.index)


def with_minus(text: str) -> str:
    """`with_minus("-0.2")`: with a minus sign, where a hyphen stands for one; a zero has none."""
    return MINUS.sub("\u2212", MINUS_ZERO.sub("", text))
