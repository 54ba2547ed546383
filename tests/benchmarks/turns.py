"""What the benchmarks share: ways that take turns, the rate of this processor, how a run ends.

    seconds = in_turns({"slow": slow, "fast": fast}, rounds=7)
    times(seconds["slow"], seconds["fast"])     # how many times as long, round by round
    sys.exit(report(problems))

Each round runs every way in turn, so that a machine which slows down slows all of them.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from paramspec.execution.provenance import hardware, machine, versions


def timed(work: Callable[[], object]) -> float:
    """`timed(work)`: the seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(ways: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, list[float]]:
    """`in_turns(ways, 7)`: seconds of each way in each round, after a round that is not timed."""
    seconds: dict[Any, list[float]] = {name: [] for name in ways}
    for number in tqdm(range(rounds + 1), disable=None):
        for name, work in ways.items():
            spent = timed(work)
            if number:
                seconds[name].append(spent)
    return seconds


def times(seconds: Sequence[float], other: Sequence[float]) -> float:
    """`times(slow, fast)`: the median of the ratios of neighbours in time."""
    return statistics.median(a / b for a, b in zip(seconds, other, strict=True))


Products = dict[str, tuple[int, Callable[[], object]]]  # the FLOPs of each, and how it is computed


def products(dtype: torch.dtype) -> Products:
    """`products(torch.float32)`: large ones, by torch's own way and with a prepacked weight."""
    ways: Products = {}
    for rows, width in itertools.product((512, 1024), (1024, 2048, 4096)):
        draw = torch.Generator().manual_seed(0)
        left, right = (torch.randn(size, width, generator=draw).to(dtype) for size in (rows, width))
        flops, shape = 2 * rows * width**2, f"{rows} x {width} x {width}"
        ways[f"torch.mm, {shape}"] = flops, partial(torch.mm, left, right)
        # oneDNN's own layout of a weight. Its operators are private to torch, and may go.
        with suppress(RuntimeError, AttributeError, NotImplementedError):
            packed = torch.ops.mkldnn._reorder_linear_weight(right, rows)
            linear = torch.ops.mkldnn._linear_pointwise
            linear = partial(linear, left, packed, None, "none", [], "")
            linear()
            ways[f"oneDNN, prepacked, {shape}"] = flops, linear
    return ways


def measure_peak(ways: Products, repeats: int = 3) -> tuple[float, str]:
    """`rate, name = measure_peak(products(torch.float32))`: the best of them all, FLOP/s."""
    return max(
        (flops / min(timed(run) for _ in range(repeats)), name)
        for name, (flops, run) in ways.items()
    )


def conditions() -> str:
    """`conditions()`: the machine, its threads, and the versions of what computes."""
    numbers = ", ".join(f"{name} {number}" for name, number in versions("torch").items())
    return f"{machine(hardware())}; {numbers}; {torch.get_num_threads()} thread(s)"


def report(problems: Sequence[str]) -> int:
    """`sys.exit(report(problems))`: each is a line; the status is 1 if there is one."""
    for problem in problems:
        print(f"benchmark: {problem}", file=sys.stderr)
    return bool(problems)
