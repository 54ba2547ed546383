"""The key figures once more, to be explored: hover says what a point is, a menu switches measures.

Altair writes what is to be drawn; a page's script draws it, below the static figure. `chosen` maps
the titles of the menu to columns that have intervals.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

import altair as alt
import pandas as pd

from paramspec_book.panels import FAMILIES, GENERAL, NULL, OTHER

SHAPES = ("circle", "square", "triangle-up", "triangle-down", "cross")  # as in `FAMILIES`


class Interactive:
    """A chart whose HTML is a place for the page's script to draw in."""

    def __init__(self, height: Any, shown: Any, *layers: Any) -> None:
        chart = alt.layer(*layers).add_params(shown).configure_view(stroke=None)
        chart = chart.properties(width="container", height=height, background="transparent")
        self.specification = chart.to_dict()

    def _repr_html_(self) -> str:
        text = html.escape(json.dumps(self.specification, ensure_ascii=False))
        return f'<div class="interactive" data-spec="{text}"></div>'


def models(
    table: pd.DataFrame, x: str, title: str, chosen: Mapping[str, str], *, log: bool = False
) -> Interactive:
    """Models of `trends.model_table` over a column: points with intervals, in the look of their
    `family`, and a line for each `run` if the table has runs.
    """
    titles = {name: look[0] for name, look in FAMILIES.items()}
    table = table.assign(family=table["family"].map(lambda name: titles.get(name, str(name))))
    known = {
        title: (colour, shape)
        for (title, colour, _), shape in zip(FAMILIES.values(), SHAPES, strict=True)
    }
    looks = {name: known.get(name, (OTHER, "diamond")) for name in table["family"]}
    scale: Any = {"domain": list(looks)}
    colour = alt.Color("family:N", title=None)
    colour = colour.scale(**scale, range=[colour for colour, _ in looks.values()])
    shape = alt.Shape("family:N").scale(**scale, range=[shape for _, shape in looks.values()])
    runs = ["run"] if "run" in table else []
    base, shown = _base(table, ["model", "family", x, *runs], chosen)
    across = alt.X(f"{x}:Q", title=title).scale(type="log" if log else "linear", zero=False)
    base = base.encode(x=across, color=colour)
    told = ["model:N", alt.Tooltip(f"{x}:Q", title=title, format="," if log else ".2f")]
    bars = base.mark_rule(opacity=0.5, aria=False).encode(y=alt.Y("low:Q", title=None), y2="high:Q")
    points = base.mark_point(filled=True, size=70)
    points = points.encode(y="value:Q", shape=shape, tooltip=[*told, *_numbers()])
    lines = (
        [base.mark_line(opacity=0.6, aria=False).encode(y="value:Q", detail="run:N")]
        if runs
        else []
    )
    null = base.mark_point(shape="diamond", size=25, aria=False).encode(
        y="null:Q", color=alt.value(NULL)
    )
    return Interactive(320, shown, null, *lines, bars, points)


def readings(table: pd.DataFrame, chosen: Mapping[str, str]) -> Interactive:
    """A row for each `reading` of a claim, with its interval, in the order of the table."""
    base, shown = _base(table, ["reading"], chosen)
    rows = alt.Y("reading:N", title=None, sort=list(table["reading"])).axis(labelLimit=320)
    base = base.encode(y=rows)
    bars = base.mark_rule(strokeWidth=2, color=GENERAL, aria=False)
    bars = bars.encode(x=alt.X("low:Q", title=None), x2="high:Q")
    points = base.mark_point(filled=True, size=60, color=GENERAL)
    points = points.encode(x="value:Q", tooltip=["reading:N", *_numbers()])
    return Interactive({"step": 18}, shown, bars, points)


def _base(table: pd.DataFrame, keep: list[str], chosen: Mapping[str, str]) -> tuple[Any, Any]:
    """A chart of the chosen measure, and the menu that chooses it."""
    parts = []
    for title, column in chosen.items():
        values = {"value": column, "low": f"{column}_low", "high": f"{column}_high"}
        values |= {"null": f"null_{column}"}
        numbers = {name: table.get(one, float("nan")) for name, one in values.items()}
        parts.append(table[keep].assign(measure=title, **numbers))
    rows = pd.concat(parts, ignore_index=True).dropna(subset=["value"])
    menu = alt.binding_select(options=list(chosen), name="shown: ")
    shown = alt.param(name="shown", bind=menu, value=next(iter(chosen)))
    return alt.Chart(rows).transform_filter(alt.datum.measure == shown), shown


def _numbers() -> list[Any]:
    titles = {"value": "value", "low": "low", "high": "high", "null": "random masks"}
    return [alt.Tooltip(f"{name}:Q", title=title, format=".2f") for name, title in titles.items()]
