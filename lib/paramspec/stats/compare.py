"""Two runs, paired by question: what the second changes, with intervals.

compare(before.details, after.details)
"""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd

from paramspec.errors import InputError
from paramspec.stats.estimates import Estimates, Interval, share, told
from paramspec.stats.summary import BARE, Cells

ASKED = ["protocol", "mask", "ratio", "seed", "mask_concept", "role", "question_id"]


def compare(
    one: pd.DataFrame, other: pd.DataFrame, questions: Collection[str] | None = None
) -> pd.DataFrame:
    """`compare(before.details, after.details)`: the second minus the first, of one model each.

    >>> same = study.details[study.details["model"] == "new"]
    >>> float(compare(same, same)["difference"].abs().max())
    0.0

    Only what both were asked under masks of one kind, ratio and seed counts, so that a difference
    is paired: its interval is that of the difference of each concept.

    Args:
        one, other: `details` of a study, of one model and one protocol.
        questions: ids of those that count; all if not given.

    Returns:
        A row per measure: `measure`; then `first`, `second` and `difference`, each with `_low` and
        `_high`: the accuracy without a mask, C(k) and G(k) at each ratio of the concepts' own
        masks, and the difference in differences, mean over the ratios, of these masks and of random
        ones; `questions`, their number, and `concepts`.

    Raises:
        InputError: if the runs have nothing in common, or if one of them is of several models.
    """
    for details in (one, other):
        if details["model"].nunique() != 1 or details["protocol"].nunique() != 1:
            raise InputError(f"models {sorted(set(details['model']))}: compare one with one")
    shared = one[ASKED].merge(other[ASKED])
    if questions is not None:
        shared = shared[shared["question_id"].isin(questions)]
    if not (shared["mask"] == "none").any():
        raise InputError("the runs have no question in common; measure both on the same file")
    pair = [details.merge(shared) for details in (one, other)]
    units = sorted(set(pair[0]["concept"]) | set(pair[0]["mask_concept"]))
    first, second = (Cells.of(details, units) for details in pair)
    cells = [cell for cell in first.own if cell[0] == "concept"]
    rows = [_shares("accuracy", first, second, "own", BARE)]
    for _, ratio in cells:
        rows.append(_shares(f"C({ratio:g})", first, second, "own", ("concept", ratio)))
        rows.append(_shares(f"G({ratio:g})", first, second, "general", ("concept", ratio)))
    for mask, name in (("concept", "diff. in diff."), ("random", "the same, random masks")):
        if any(cell[0] == mask for cell in first.own):
            before, after = (each.over_ratios(mask)["did"] for each in (first, second))
            rows.append(_row(name, before.interval(), after.interval(), after - before))
    table = pd.DataFrame(rows)
    bare = pair[0][(pair[0]["mask"] == "none") & (pair[0]["role"] == "concept")]
    return table.assign(questions=bare["question_id"].nunique(), concepts=first.concepts)


def _shares(name: str, first: Cells, second: Cells, side: str, cell: tuple[str, float]) -> dict:
    asked = first.asked[cell][side == "general"]
    before, after = (getattr(each, side)[cell].mean() for each in (first, second))
    return _row(name, share(before, asked), share(after, asked), after - before)


def _row(name: str, before: Interval, after: Interval, difference: Estimates) -> dict:
    sides = told("first", before) | told("second", after)
    return {"measure": name} | sides | told("difference", difference.interval())
