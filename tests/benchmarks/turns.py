"""What the benchmarks share: how long work takes, and the rate of this processor.

times(slow, fast)                           # seconds of each round: how many times as long
measure_peak(products(torch.float32))       # FLOP/s
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch

from paramspec.method import kernels


def timed(work: Callable[[], object]) -> float:
    """`timed(work)`: the seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


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
            linear = partial(kernels._run_packed, kernels._pack(right), None, left)
            linear()
            ways[f"oneDNN, prepacked, {shape}"] = flops, linear
    return ways


def measure_peak(ways: Products, repeats: int = 3) -> tuple[float, str]:
    """`rate, name = measure_peak(products(torch.float32))`: the best of them all, FLOP/s."""
    return max(
        (flops / min(timed(run) for _ in range(repeats)), name)
        for name, (flops, run) in ways.items()
    )
