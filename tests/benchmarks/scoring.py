"""How fast options are scored, beside other tools: `python tests/benchmarks/scoring.py [--quick]`.

Each round runs every contender in turn, on the same weights, items, dtype and one thread, so that a
machine which slows down slows all of them; ratios are taken round by round. Unmasked scoring is
compared with lm-evaluation-harness, masked scoring with nnsight, and both with the loop of hooks,
one option a forward pass, that papers use, and with large matrix multiplications on this machine.
DIR/speed.json holds what is printed. Exits with 1 if a bound is missed, see `find_problems`.

The table of speed.json has a row for each `work`, `dtype`, `contender` and `variant`:

- `questions`, `options`, `masks`: how many were scored; `tokens` that are needed for that;
- `seconds`: the median over rounds; `low` and `high` are the extremes;
- `ratio`: how many times the engine's seconds, the median over rounds; `ratio_unshared` and
  `ratio_stock` are those to the engine that shares nothing between questions, and to the one with
  stock linear layers;
- `share`: needed FLOPs a second over the peak;
- `differing`: questions whose choice (by sum, or by characters) is not that of the reference, one
  option at a time in fp32; `difference`: the largest from its log-likelihoods, in nats.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it
    sys.path.append(str(Path(__file__).parents[1]))  # where the oracles are

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

import growth
import peers
from paramspec.execution.provenance import hardware, version_of
from paramspec.method import kernels
from paramspec.method.hooks import value_vector_view
from paramspec.method.scoring import choose_engine
from paramspec.models.load import LoadedModel, load_model
from paramspec.specwiki import load_questions
from works import Work, masked, needed, spread, timed, unmasked

ENGINE, HOOKS, LM_EVAL, NNSIGHT = "paramspec", "hooks", "lm-eval", "nnsight"
SHARED, UNSHARED, STOCK = "as is", "nothing shared between questions", "stock linear layers"
PACKAGES = ("torch", "transformers", "lm-eval", "nnsight")
MEASURED = ("seconds", "low", "high", "ratio", "ratio_unshared", "ratio_stock", "share")
MEASURED += ("differing", "difference")

# The engine is at least so many times as fast, and reaches at least this share of the peak.
BOUNDS = {
    ("unmasked", "float32", LM_EVAL): 3,
    ("unmasked", "bfloat16", LM_EVAL): 3,
    ("masked", "bfloat16", NNSIGHT): 4,
    ("masked", "bfloat16", HOOKS): 15,
}
LEAST_SHARE = 0.5
TOLERANCE = 1e-3  # nats, in fp32


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


def measure_peak(ways: Products) -> tuple[float, str]:
    """`rate, name = measure_peak(products(torch.float32))`: the best of them all, FLOP/s."""
    return max(
        (flops / min(timed(run) for _ in range(3)), name) for name, (flops, run) in ways.items()
    )


@dataclass
class Runner:
    """A contender at a work, and what its rounds gave; `run` is None if it is not installed.

    Each round of a slow contender takes another of `slices` parts of the requests, and its seconds
    are scaled by options.
    """

    work: Work
    contender: str
    variant: str
    run: Callable[[Work], list[Tensor]] | None
    slices: int = 1
    seconds: list[float] = field(default_factory=list)
    scores: dict[int, Tensor] = field(default_factory=dict)

    def take(self, number: int) -> None:
        indices = range(number % self.slices, len(self.work.requests), self.slices)
        part = self.work.only(indices)
        spent = timed(lambda: self.scores.update(zip(indices, self.run(part), strict=True)))
        self.seconds.append(spent * self.work.size / part.size)


def contenders(work: Work, loaded: LoadedModel, given: argparse.Namespace) -> list[Runner]:
    """`contenders(work, loaded, given)`: ready to be timed, the engine first."""
    view = value_vector_view(loaded.model)
    engine = choose_engine(view)
    own = {SHARED: peers.engine, UNSHARED: peers.unshared}
    if loaded.dtype == torch.float32:  # in others, linear layers are torch's own
        own[STOCK] = peers.stock_engine
    runners = [Runner(work, ENGINE, name, partial(run, view, engine)) for name, run in own.items()]
    slow = f"one option a pass, 1/{given.rounds} of the questions a round"
    runners.append(Runner(work, HOOKS, slow, partial(peers.one_at_a_time, view), given.rounds))
    name, package = {"unmasked": (LM_EVAL, "lm_eval"), "masked": (NNSIGHT, "nnsight")}[work.name]
    if find_spec(package) is None:
        return [*runners, Runner(work, name, "not installed", None)]
    if name == LM_EVAL:
        ways = {f"batch {size}": peers.LmEval(loaded, size) for size in given.batches}
    else:
        wrapped = peers.wrap(loaded)
        ways = {
            f"{rows or 'all'} options a batch": peers.Nnsight(wrapped, view.names, rows)
            for rows in given.nnsight_batches
        }
    few = work.only([index for index, request in enumerate(work.requests) if request.mask < 4])
    seconds = {}
    for way, run in tqdm(ways.items(), desc="best batch size", leave=False):
        run(work.only(range(min(4, len(work.requests)))))  # what is prepared once is not timed
        seconds[way] = timed(partial(run, few))
    best = min(seconds, key=seconds.get)
    return [*runners, Runner(work, name, best, ways[best])]


def race(
    works: Sequence[Work], loaded: LoadedModel, given: argparse.Namespace
) -> tuple[list[Runner], tuple[float, str]]:
    """`runners, peak = race(works, loaded, given)`: every contender once a round, and the peak."""
    ways = products(loaded.dtype)
    runners = [runner for work in works for runner in contenders(work, loaded, given)]
    installed = [runner for runner in runners if runner.run is not None]
    for runner in installed:  # what is prepared once is not timed
        runner.run(runner.work.only(range(min(8, len(runner.work.requests)))))
    peaks = []
    for number in tqdm(range(given.rounds), desc=str(loaded.dtype)):
        peaks.append(measure_peak(ways))
        for runner in installed:
            runner.take(number)
    return runners, sorted(peaks)[len(peaks) // 2]


def predicted(scores: Tensor, options: Sequence[str]) -> tuple[int, int]:
    """`predicted(scores, options)`: the option chosen by the sum, and by characters."""
    lengths = torch.tensor([len(option) for option in options])
    return int(scores.argmax()), int((scores / lengths).argmax())


def table_row(
    runner: Runner, runners: Sequence[Runner], reference: Sequence[Tensor], least: float
) -> dict[str, object]:
    """`table_row(runner, runners, reference, least)`: of speed.json's table, see the top.

    `reference` has the log-likelihoods of each request, and `least` are the seconds that the needed
    FLOPs take at the peak.
    """
    work, seconds = runner.work, runner.seconds
    row = {"work": work.name, "contender": runner.contender, "variant": runner.variant}
    row |= {"questions": len(work.requests), "options": work.size}
    row |= {"masks": len(work.keeps) if work.name == "masked" else 0}
    row |= {"tokens": needed(work.requests).tokens, **dict.fromkeys(MEASURED)}
    if not seconds:
        return row
    row |= {"seconds": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}
    row["share"] = least / row["seconds"]
    names = {SHARED: "ratio", UNSHARED: "ratio_unshared", STOCK: "ratio_stock"}
    for other in runners:
        if other.work is work and other.contender == ENGINE:
            ratios = [one / engine for one, engine in zip(seconds, other.seconds, strict=True)]
            row[names[other.variant]] = statistics.median(ratios)
    pairs = [(score, reference[i], work.options[i]) for i, score in runner.scores.items()]
    row["differing"] = sum(
        predicted(ours, options) != predicted(theirs, options) for ours, theirs, options in pairs
    )
    row["difference"] = max(float((ours - theirs).abs().max()) for ours, theirs, _ in pairs)
    return row


def measure(given: argparse.Namespace) -> dict[str, object]:
    """`measure(given)`: everything that speed.json holds."""
    torch.set_num_threads(1)
    loaded = load_model(given.model, dtype="float32", device="cpu")
    view, tokenizer = value_vector_view(loaded.model), loaded.tokenizer
    asked = load_questions(concepts=given.concepts)
    works = [
        unmasked(tokenizer, spread(load_questions(), given.questions)),
        masked(view, tokenizer, asked, [0.01], given.general),
    ]
    references: dict[str, list[Tensor]] = {}
    table, peaks, dtypes = [], {}, ["float32"]
    if "bfloat16" in given.dtypes and has_bf16():
        dtypes += ["bfloat16"]
    for dtype in dtypes:  # fp32 first: its loop of hooks is the reference
        loaded = load_model(given.model, dtype=dtype, device="cpu")
        runners, (rate, way) = race(works, loaded, given)
        peaks[dtype] = {"flops": rate, "way": way}
        for work, slow in ((one.work, one) for one in runners if one.contender == HOOKS):
            scores = [slow.scores[index] for index in range(len(work.requests))]
            references.setdefault(work.name, scores)
        for one in runners:
            least = needed(one.work.requests).flops(loaded.model) / rate
            row = table_row(one, runners, references[one.work.name], least)
            table.append({"dtype": dtype} | row)
    grown = growth.measure_time(loaded, given.axes, given.growth_rounds)
    remembered = growth.measure_memory(given.model, dtypes[-1], given.memory)
    problems = [*growth.superlinear(grown), *growth.growing(remembered)]
    line = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(line, cwd=Path(__file__).parent, capture_output=True, text=True)
    installed = {name: version_of(name) or "not installed" for name in PACKAGES}
    return {
        "machine": hardware() | {"bf16": has_bf16()},
        "versions": {"python": platform.python_version()} | installed,
        "commit": done.stdout.strip() or None,
        "settings": vars(given) | {"out": str(given.out)},
        "peak": peaks,
        "table": table,
        "growth": grown,
        "memory": remembered,
        "problems": find_problems(table, bounded=not given.quick) + problems,
    }


def has_bf16() -> bool:
    """`has_bf16()`: whether the CPU multiplies bf16 itself, rather than by way of fp32."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def find_problems(table: Sequence[Mapping], bounded: bool) -> list[str]:
    """`find_problems(table, bounded=True)`: where the engine is wrong, and the bounds missed.

    The bounds are for the full sizes: fewer questions share less.
    """
    problems = []
    plain = {(r["work"], r["dtype"]): r["differing"] for r in table if r["contender"] == HOOKS}
    for row in table:
        if row["seconds"] is None:
            continue
        kind, exact = (row["work"], row["dtype"]), row["dtype"] == "float32"
        place = f"{', '.join(kind)}, {row['contender']} ({row['variant']})"
        if exact and (row["differing"] or row["difference"] > TOLERANCE):
            problems.append(f"{place}: answers differ from the reference's")
        bounds = {"ratio": BOUNDS.get((*kind, row["contender"]), 0)}
        if not exact and (row["contender"], row["variant"]) == (ENGINE, SHARED):
            bounds["share"] = LEAST_SHARE
            if row["differing"] > plain[kind]:
                problems.append(f"{place}: more choices differ from fp32's than one at a time")
        problems += [
            f"{place}: {what} {row[what]:.2f}, expected at least {bound}"
            for what, bound in bounds.items()
            if bounded and row[what] < bound
        ]
    return problems


# --- the command --------------------------------------------------------------------------------

FULL = {
    "batches": (8, 16, 32, 64, 128),  # of lm-evaluation-harness
    "nnsight_batches": (10, 20, 40, 0),  # options; 0: all of a mask
    "axes": growth.AXES,
    "memory": ((8, 1), (32, 1), (8, 8)),  # concepts, and masks of each
}
QUICK = {
    "rounds": 2,
    "questions": 24,
    "concepts": 2,
    "general": 2,
    "growth_rounds": 1,
    "batches": (16, 32),
    "nnsight_batches": (16,),
    "axes": {"questions": (20, 40), "concepts": (2, 4)},
    "memory": (),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """`parse(["--quick"])`: the settings; what is named goes before `--quick`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--quick", action="store_true", help="small sizes: about two minutes")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="float32 is always there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=220, help="unmasked")
    parser.add_argument("--concepts", type=int, default=30, help="masks")
    parser.add_argument("--general", type=int, default=10, help="questions beside a mask's own")
    parser.add_argument("--growth-rounds", type=int, default=3, help="0: do not measure growth")
    quick = parser.parse_known_args(arguments)[0].quick
    parser.set_defaults(**FULL | (QUICK if quick else {}))
    return parser.parse_args(arguments)


def main() -> int:
    given = parse()
    found = measure(given)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "speed.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    for name in ("machine", "versions", "commit", "peak"):
        print(f"{name}: {found[name]}")
    for name in ("table", "growth", "memory"):
        if found[name]:
            rows = pd.DataFrame(found[name])
            print("", rows.to_string(index=False, float_format="{:.3g}".format), sep="\n")
    for problem in found["problems"]:
        print(f"benchmark: {problem}", file=sys.stderr)
    return bool(found["problems"])


if __name__ == "__main__":
    sys.exit(main())
