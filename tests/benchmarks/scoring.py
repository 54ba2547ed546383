"""How fast options are scored, beside other tools: `python tests/benchmarks/scoring.py [--quick]`.

Each round runs every contender in turn, on the same weights, items, dtype and one thread, so that a
machine which slows down slows all of them; ratios are taken round by round. Unmasked scoring stands
beside lm-evaluation-harness, masked scoring beside nnsight, and both beside the loop of hooks, one
option a forward pass, that papers use, and beside the rate of large matrix multiplications on this
machine. `growth.py` measures how time and memory grow. DIR/speed.json holds what is printed. Exits
with 1 if a bound is missed, see `find_problems`.

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
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from paramspec.execution.provenance import hardware, versions
from paramspec.method.hooks import ValueVectorView, value_vector_view
from paramspec.method.masks import keep_tensor, record_concepts, top_vectors, value_vector_scores
from paramspec.method.pss import Choices, asked_questions
from paramspec.method.rows import Request
from paramspec.method.scoring import choose_engine, encode, mark
from paramspec.models.load import LoadedModel, load_model
from paramspec.specwiki import load_questions
from turns import measure_peak, products, report, timed, times

ENGINE, HOOKS, LM_EVAL, NNSIGHT = "paramspec", "hooks", "lm-eval", "nnsight"
SHARED, UNSHARED, STOCK = "as is", "nothing shared between questions", "stock linear layers"
WAYS = {SHARED: peers.engine, UNSHARED: peers.unshared}
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
LEAST_QUESTIONS, LEAST_MASKS = 220, 30  # fewer share less, and the bounds are not for them
TOLERANCE = 1e-3  # nats, in fp32


# --- works and contenders -----------------------------------------------------------------------


@dataclass
class Runner:
    """A contender at a work, and what its rounds gave; `run` is None if it is not installed.

    Attributes:
        slices: a round takes every so-many-th request, and its seconds are scaled by options.
    """

    contender: str
    variant: str
    run: Callable[[peers.Work], list[Tensor]] | None
    slices: int = 1
    seconds: list[float] = field(default_factory=list)
    scores: dict[int, Tensor] = field(default_factory=dict)

    def take(self, work: peers.Work, number: int) -> None:
        """Round `number`: of a slow contender another slice each, all of them in `slices`."""
        indices = range(number % self.slices, len(work.requests), self.slices)
        part = work.only(indices)
        spent = timed(lambda: self.scores.update(zip(indices, self.run(part), strict=True)))
        self.seconds.append(spent * count_options(work) / count_options(part))


def count_options(work: peers.Work) -> int:
    return sum(len(request.item.options) for request in work.requests)


def unmasked_work(loaded: LoadedModel, count: int) -> peers.Work:
    """`unmasked_work(loaded, 220)`: cloze questions spread over all concepts, without a mask."""
    every = load_questions()
    questions = every[:: len(every) // count][:count]
    requests = [Request(encode(loaded.tokenizer, question), 0) for question in questions]
    return peers.Work("unmasked", requests, questions=questions)


def masked_work(loaded: LoadedModel, given: argparse.Namespace) -> peers.Work:
    """`masked_work(loaded, given)`: each concept's own mask, on its own and general questions."""
    view, questions = value_vector_view(loaded.model), load_questions(concepts=given.concepts)
    choices = Choices(ratios=(growth.RATIO,), general=given.general)
    coefficients = record_concepts(view, loaded.tokenizer, questions)
    items = {question.id: encode(loaded.tokenizer, question) for question in questions}
    requests, asked, vectors = [], [], []
    for mask, concept in enumerate(coefficients.concepts):
        scores = value_vector_scores(coefficients, concept)
        vectors.append(top_vectors(scores, growth.RATIO))
        for question, _ in asked_questions(questions, concept, choices):
            requests.append(Request(items[question.id], mask))
            asked.append(question)
    keeps = [keep_tensor(chosen, view.layers, view.width) for chosen in vectors]
    return peers.Work("masked", requests, keeps, vectors, asked)


def variants(view: ValueVectorView, dtype: str) -> dict[str, Callable[[peers.Work], list[Tensor]]]:
    """`variants(view, "float32")`: what is the algorithm's, what the library's."""
    engine = choose_engine(view)
    found = {way: partial(run, view, engine) for way, run in WAYS.items()}
    if dtype == "float32":
        found[STOCK] = partial(peers.engine, view, replace(engine, prepacked=False))
    return found


def contenders(
    work: peers.Work, loaded: LoadedModel, view: ValueVectorView, given: argparse.Namespace
) -> list[Runner]:
    """`contenders(work, loaded, view, given)`: ready to be timed, the engine first."""
    dtype = str(loaded.dtype).removeprefix("torch.")
    runners = [Runner(ENGINE, variant, run) for variant, run in variants(view, dtype).items()]
    slow = f"one option a pass, 1/{given.rounds} of the questions a round"
    runners.append(Runner(HOOKS, slow, partial(peers.one_at_a_time, view), given.rounds))
    name, package = {"unmasked": (LM_EVAL, "lm_eval"), "masked": (NNSIGHT, "nnsight")}[work.name]
    if find_spec(package) is None:
        return [*runners, Runner(name, "not installed", None)]
    if name == LM_EVAL:
        ways = {f"batch {size}": peers.LmEval(loaded, size) for size in given.batches}
    else:
        wrapped = peers.wrap(loaded)
        ways = {
            f"{rows or 'all'} options a batch": peers.Nnsight(wrapped, view.names, rows)
            for rows in given.nnsight_batches
        }
    few = work.only([index for index, request in enumerate(work.requests) if request.mask < 4])
    return [*runners, Runner(name, *fastest(ways, few))]


def fastest(ways: Mapping[str, Callable], work: peers.Work) -> tuple[str, Callable]:
    """`name, run = fastest({"batch 8": ..., ...}, work)`: each is run once, after a short one."""
    seconds = {}
    for name, run in tqdm(ways.items(), desc="best batch size", leave=False):
        run(work.only(range(min(4, len(work.requests)))))
        seconds[name] = timed(partial(run, work))
    best = min(seconds, key=seconds.get)
    return best, ways[best]


# --- measuring ----------------------------------------------------------------------------------


def race(
    works: Sequence[peers.Work], loaded: LoadedModel, given: argparse.Namespace
) -> tuple[list[list[Runner]], tuple[float, str]]:
    """`runners, peak = race(works, loaded, given)`: every contender once a round, and the peak."""
    view, ways = value_vector_view(loaded.model), products(loaded.dtype)
    lanes = [contenders(work, loaded, view, given) for work in works]
    pairs = [
        (work, runner)
        for work, runners in zip(works, lanes, strict=True)
        for runner in runners
        if runner.run is not None
    ]
    for work, runner in pairs:  # what is prepared once is not timed
        runner.run(work.only(range(min(8, len(work.requests)))))
    peaks = []
    for number in tqdm(range(given.rounds), desc=str(loaded.dtype)):
        peaks.append(measure_peak(ways))
        for work, runner in pairs:
            runner.take(work, number)
    return lanes, sorted(peaks)[len(peaks) // 2]


def table_rows(
    work: peers.Work,
    dtype: str,
    runners: Sequence[Runner],
    reference: Sequence[Tensor],
    least: float,
) -> Iterator[dict[str, object]]:
    """`table_rows(work, "float32", runners, reference, least)`: one a runner, see the top.

    Args:
        reference: log-likelihoods of each request.
        least: seconds that the needed FLOPs take at the peak.
    """
    engines = {runner.variant: runner for runner in runners if runner.contender == ENGINE}
    names = {"ratio": SHARED, "ratio_unshared": UNSHARED, "ratio_stock": STOCK}
    sizes = {
        "questions": len(work.requests),
        "options": count_options(work),
        "masks": len(work.keeps) if work.name == "masked" else 0,
        "tokens": peers.needed(work.requests).tokens,
    }
    for runner in runners:
        row = {"work": work.name, "dtype": dtype, "contender": runner.contender}
        row |= {"variant": runner.variant, **sizes, **dict.fromkeys(MEASURED)}
        if runner.seconds:
            seconds = statistics.median(runner.seconds)
            row |= {"seconds": seconds, "low": min(runner.seconds), "high": max(runner.seconds)}
            row["share"] = least / seconds
            for name, other in names.items():
                if other in engines:
                    row[name] = times(runner.seconds, engines[other].seconds)
            row |= compare(work, runner.scores, reference)
        yield row


def compare(
    work: peers.Work, scores: Mapping[int, Tensor], reference: Sequence[Tensor]
) -> dict[str, float]:
    """`compare(work, runner.scores, reference)`: `differing` and `difference`, see the top."""
    differing, difference = 0, 0.0
    for index, score in scores.items():
        ours, theirs = (
            mark(each.tolist(), work.questions[index]) for each in (score, reference[index])
        )
        differing += any(ours[name] != theirs[name] for name in ("predicted", "predicted_norm"))
        difference = max(difference, float((score - reference[index]).abs().max()))
    return {"differing": differing, "difference": difference}


def measure(given: argparse.Namespace) -> dict[str, object]:
    """`measure(given)`: everything that speed.json holds."""
    torch.set_num_threads(1)
    table, peaks, notes, references, dtypes = [], {}, [], {}, ["float32"]
    if "bfloat16" in given.dtypes:
        dtypes += ["bfloat16"] if has_bf16() else []
        notes += [] if has_bf16() else ["no bf16 rows: this CPU has no bf16 instructions"]
    loaded = load_model(given.model, dtype="float32", device="cpu")
    works = [unmasked_work(loaded, given.questions), masked_work(loaded, given)]
    for dtype in dtypes:  # fp32 first: its loop of hooks is the reference
        loaded = load_model(given.model, dtype=dtype, device="cpu")
        lanes, (rate, way) = race(works, loaded, given)
        peaks[dtype] = {"flops": rate, "way": way}
        for work, runners in zip(works, lanes, strict=True):
            if dtype == "float32":
                (slow,) = [runner for runner in runners if runner.contender == HOOKS]
                references[work.name] = [slow.scores[i] for i in range(len(work.requests))]
            least = peers.needed(work.requests).flops(loaded.model) / rate
            table += table_rows(work, dtype, runners, references[work.name], least)
    axes = given.axes if given.growth_rounds else {}
    grown = growth.measure_time(loaded, axes, given.growth_rounds)
    remembered = growth.measure_memory(given.model, dtypes[-1], given.memory)
    problems, unchecked = find_problems(table, grown, remembered)
    found = dict.fromkeys(PACKAGES, "not installed") | versions(*PACKAGES)
    line = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(line, cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "machine": hardware() | {"bf16": has_bf16()},
        "versions": {"python": platform.python_version()} | found,
        "commit": done.stdout.strip() or None,
        "settings": vars(given) | {"out": str(given.out)},
        "peak": peaks,
        "table": table,
        "growth": grown,
        "memory": remembered,
        "notes": notes + unchecked,
        "problems": problems,
    }


def has_bf16() -> bool:
    """`has_bf16()`: whether the CPU multiplies bf16 itself, rather than by way of fp32."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def find_problems(
    table: Sequence[Mapping], grown: Sequence[Mapping], remembered: Sequence[Mapping]
) -> tuple[list[str], list[str]]:
    """`problems, unchecked = find_problems(...)`: bounds missed, and bounds not for these sizes."""
    problems = [*growth.superlinear(grown), *growth.growing(remembered)]
    unchecked = []
    plain = {(r["work"], r["dtype"]): r["differing"] for r in table if r["contender"] == HOOKS}
    for row in table:
        kind = row["work"], row["dtype"]
        place = f"{', '.join(kind)}, {row['contender']} ({row['variant']})"
        if row["seconds"] is None:
            unchecked.append(f"{place}: nothing to compare with")
            continue
        off = row["differing"] or row["difference"] > TOLERANCE
        if row["dtype"] == "float32" and off:
            problems.append(
                f"{place}: {row['differing']} choices differ from the reference's, "
                f"log-likelihoods by up to {row['difference']:.1e}"
            )
        bound, what = BOUNDS.get((*kind, row["contender"])), "ratio"
        if row["dtype"] == "bfloat16" and (row["contender"], row["variant"]) == (ENGINE, SHARED):
            bound, what = LEAST_SHARE, "share"
            if row["differing"] > plain.get(kind, 0):
                problems.append(f"{place}: more choices differ from fp32's than one at a time")
        if bound is None:
            continue
        few = row["work"] == "masked" and row["masks"] < LEAST_MASKS
        if row["questions"] < LEAST_QUESTIONS or few:
            unchecked.append(f"{place}: too few questions to hold its {what} against a bound")
        elif row[what] < bound:
            problems.append(f"{place}: {what} {row[what]:.2f}, expected at least {bound}")
    return problems, unchecked


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
    "axes": dict.fromkeys(growth.AXES, ()) | {"questions": (20, 40), "concepts": (2, 4)},
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


def show(found: Mapping[str, object]) -> None:
    """`show(json.loads(path.read_text()))`: what speed.json holds, as text."""
    for name in ("machine", "versions", "commit", "peak"):
        print(f"{name}: {found[name]}")
    for name in ("table", "growth", "memory"):
        rows = pd.DataFrame(found[name])
        if len(rows):
            print("", rows.to_string(index=False, float_format="{:.3g}".format), sep="\n")
    print("\n".join(["", *found["notes"]]))


def main() -> int:
    given = parse()
    found = measure(given)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "speed.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    show(found)
    return report(found["problems"])


if __name__ == "__main__":
    sys.exit(main())
