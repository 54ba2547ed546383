"""Verdicts on the paper's claims, from intervals; `book/claims.yaml` has the rules in words."""

from __future__ import annotations

import math
from collections.abc import Mapping


def verdict(*effects: Mapping[str, float], measured: bool = True, testable: bool = True) -> str:
    """What this run says of a claim that some effects are above zero.

    >>> up, unsure = {"low": 0.1, "high": 0.3}, {"low": -0.1, "high": 0.3}
    >>> verdict(up, up), verdict(up, unsure), verdict(up, {"low": -0.3, "high": -0.1})
    ('consistent', 'cannot tell', 'opposite')

    Args:
        effects: the 95 % intervals, `low` and `high`, of all that the claim says is positive.
        measured: False if the run did not measure the subject of the claim.
        testable: False if it did, but a precondition of the claim fails.

    Returns:
        `not run`; `not testable here`; `cannot tell`, if a bound is missing or an interval holds
        zero; `opposite`, if one effect is below zero beyond its interval; else `consistent`.
    """
    if measured and not testable:
        return "not testable here"
    if not measured or not effects:
        return "not run"
    bounds = [(one["low"], one["high"]) for one in effects]
    if any(math.isnan(bound) for pair in bounds for bound in pair):
        return "cannot tell"
    if any(high < 0 for _, high in bounds):
        return "opposite"
    return "consistent" if all(low > 0 for low, _ in bounds) else "cannot tell"


def holds(interval: Mapping[str, float], published: float) -> str:
    """`holds(interval, 0.92)`: whether it contains the paper's value, as `yes`, `no` or `?`."""
    if math.isnan(interval["low"]) or math.isnan(interval["high"]):
        return "?"
    return "yes" if interval["low"] <= published <= interval["high"] else "no"
