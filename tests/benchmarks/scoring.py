"""How fast options are scored, beside other tools: `python tests/benchmarks/scoring.py [--quick]`.

Each round runs every contender in turn, on the same weights, items, dtype and one thread, so that a
machine which slows down slows all of them; ratios are taken round by round. Unmasked scoring stands
beside lm-evaluation-harness, masked scoring beside nnsight, and both beside the loop of hooks, one
option a forward pass, that papers use, and beside the rate of large matrix multiplications on this
machine. `growth.py` measures how time and memory grow. DIR/speed.json holds what is printed. Exits
with 1 if a bound is missed, see `find_problems`.
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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it
    sys.path.append(str(Path(__file__).parents[1]))  # where the oracles are

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

import growth
import peers
from paramspec.execution.provenance import hardware, versions
from paramspec.method.hooks import ValueVectorView, value_vector_view
from paramspec.method.masks import keep_tensor, record_concepts, top_vectors, value_vector_scores
from paramspec.method.pss import Choices, asked_questions
from paramspec.method.rows import Engine, Request
from paramspec.method.scoring import choose, choose_engine, encode
from paramspec.models.load import LoadedModel, load_model
from paramspec.specwiki import load_questions
from paramspec.studies.plan import cost_of

ENGINE, HOOKS, LM_EVAL, NNSIGHT = "paramspec", "hooks", "lm-eval", "nnsight"
SHARED, UNSHARED, STOCK = "as is", "nothing shared between questions", "stock linear layers"
PACKAGES = ("torch", "transformers", "lm-eval", "nnsight")

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


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        work, dtype, contender, variant: what was measured.
        questions, options, masks: how many were scored.
        tokens: that are needed, see `peers.needed`.
        seconds: the median over rounds; `low` and `high` are the extremes.
        ratio: how many times the engine's seconds, the median over rounds; `ratio_unshared` and
            `ratio_stock` are those to the engine that shares nothing between questions, and to the
            one with stock linear layers.
        share: needed FLOPs a second over the peak.
        differing: questions whose choice (by sum, or by characters) is not that of the reference,
            one option at a time in fp32.
        difference: the largest from the reference's log-likelihoods, nats.
    """

    work: str
    dtype: str
    contender: str
    variant: str
    questions: int
    options: int
    masks: int
    tokens: int
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    ratio_unshared: float | None = None
    ratio_stock: float | None = None
    share: float | None = None
    differing: int | None = None
    difference: float | None = None


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
        began = time.perf_counter()
        scores = self.run(part)
        spent = time.perf_counter() - began
        self.seconds.append(spent * count_options(work) / count_options(part))
        self.scores |= dict(zip(indices, scores, strict=True))


def count_options(work: peers.Work) -> int:
    return sum(len(request.item.options) for request in work.requests)


# --- works and contenders -----------------------------------------------------------------------


def unmasked_work(loaded: LoadedModel, count: int) -> peers.Work:
    """`unmasked_work(loaded, 220)`: cloze questions spread over all concepts, without a mask."""
    every = load_questions()
    questions = every[:: len(every) // count][:count]
    requests = [Request(encode(loaded.tokenizer, question), 0) for question in questions]
    return peers.Work("unmasked", requests, options=[question.options for question in questions])


def masked_work(loaded: LoadedModel, given: argparse.Namespace) -> peers.Work:
    """`masked_work(loaded, given)`: each concept's own mask, on its own and general questions."""
    view, questions = value_vector_view(loaded.model), load_questions(concepts=given.concepts)
    choices = Choices(ratios=(growth.RATIO,), general=given.general)
    coefficients = record_concepts(view, loaded.tokenizer, questions)
    items = {question.id: encode(loaded.tokenizer, question) for question in questions}
    requests, options, vectors = [], [], []
    for mask, concept in enumerate(coefficients.concepts):
        scores = value_vector_scores(coefficients, concept)
        vectors.append(top_vectors(scores, growth.RATIO))
        for question, _ in asked_questions(questions, concept, choices):
            requests.append(Request(items[question.id], mask))
            options.append(question.options)
    keeps = [keep_tensor(chosen, view.layers, view.width) for chosen in vectors]
    return peers.Work("masked", requests, keeps, vectors, options)


def variants(engine: Engine, dtype: str) -> dict[str, Engine]:
    """`variants(choose_engine(view), "float32")`: what is the algorithm's, what the library's."""
    found = {SHARED: engine, UNSHARED: replace(engine, shares=False)}
    if dtype == "float32":
        found[STOCK] = replace(engine, prepacked=False)
    return found


def contenders(
    work: peers.Work, loaded: LoadedModel, view: ValueVectorView, given: argparse.Namespace
) -> list[Runner]:
    """`contenders(work, loaded, view, given)`: ready to be timed, the engine first."""
    dtype = str(loaded.dtype).removeprefix("torch.")
    runners = [
        Runner(ENGINE, variant, partial(peers.engine, view, engine))
        for variant, engine in variants(choose_engine(view), dtype).items()
    ]
    slices = given.rounds
    slow = "one option a pass" + (f", 1/{slices} of the questions a round" if slices > 1 else "")
    runners.append(Runner(HOOKS, slow, partial(peers.one_at_a_time, view), slices))
    name, package, ways = _peer(work, loaded, view, given)
    if find_spec(package) is None:
        return [*runners, Runner(name, "not installed", None)]
    best = fastest(ways(), work.only([i for i, r in enumerate(work.requests) if r.mask < 4]))
    return [*runners, Runner(name, *best)]


def _peer(
    work: peers.Work, loaded: LoadedModel, view: ValueVectorView, given: argparse.Namespace
) -> tuple[str, str, Callable[[], dict[str, Callable]]]:
    """The peer's name, its module, and the ways of using it to choose from."""
    if work.name == "unmasked":
        sizes = given.batches
        return LM_EVAL, "lm_eval", lambda: {f"batch {b}": peers.LmEval(loaded, b) for b in sizes}

    def ways() -> dict[str, Callable]:
        wrapped = peers.wrap(loaded)
        return {
            f"{rows or 'all'} options a batch, {'needed' if only else 'all'} logits": peers.Nnsight(
                wrapped, view.names, rows, only
            )
            for rows, only in itertools.product(given.nnsight_batches, (True, False))
        }

    return NNSIGHT, "nnsight", ways


def fastest(ways: Mapping[str, Callable], work: peers.Work) -> tuple[str, Callable]:
    """`name, run = fastest({"batch 8": ..., ...}, work)`: each is run once, after a short one."""
    seconds = {}
    for name, run in tqdm(ways.items(), desc="best batch size", leave=False):
        run(work.only(range(min(4, len(work.requests)))))
        began = time.perf_counter()
        run(work)
        seconds[name] = time.perf_counter() - began
    best = min(seconds, key=seconds.get)
    return best, ways[best]


# --- the machine --------------------------------------------------------------------------------


def has_bf16() -> bool:
    """`has_bf16()`: whether the CPU multiplies bf16 itself, rather than by way of fp32."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


class Multiplication(NamedTuple):
    name: str
    flops: int
    run: Callable[[], Tensor]


def matmuls(dtype: str) -> list[Multiplication]:
    """`matmuls("float32")`: large ones, by torch's own way and with a prepacked weight."""
    ways = []
    for rows, width in itertools.product((512, 1024), (1024, 2048, 4096)):
        draw = torch.Generator().manual_seed(0)
        left, right = (
            torch.randn(size, width, generator=draw).to(getattr(torch, dtype))
            for size in (rows, width)
        )
        flops, shape = 2 * rows * width**2, f"{rows} x {width} x {width}"
        ways.append(Multiplication(f"torch.mm, {shape}", flops, partial(torch.mm, left, right)))
        # oneDNN's own layout of a weight. Its operators are private to torch, and may go.
        with suppress(RuntimeError, AttributeError, NotImplementedError):
            packed = torch.ops.mkldnn._reorder_linear_weight(right, rows)
            linear = torch.ops.mkldnn._linear_pointwise
            linear = partial(linear, left, packed, None, "none", [], "")
            linear()
            ways.append(Multiplication(f"oneDNN, prepacked, {shape}", flops, linear))
    return ways


def measure_peak(ways: Sequence[Multiplication], repeats: int = 3) -> tuple[float, str]:
    """`rate, name = measure_peak(matmuls("float32"))`: the best of them all, FLOP/s."""
    best = 0.0, ""
    for way in ways:
        for _ in range(repeats):
            began = time.perf_counter()
            way.run()
            best = max(best, (way.flops / (time.perf_counter() - began), way.name))
    return best


def describe(given: argparse.Namespace) -> dict[str, object]:
    """`describe(given)`: machine, versions, commit and settings."""
    found = {"python": platform.python_version()} | dict.fromkeys(PACKAGES, "not installed")
    line = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(line, cwd=Path(__file__).parent, capture_output=True, text=True)
    machine = hardware() | {"bf16": has_bf16()}
    settings = {
        name: asdict(value) if name == "sizes" else str(value) if name == "out" else value
        for name, value in vars(given).items()
    }
    return {
        "machine": machine,
        "versions": found | versions(*PACKAGES),
        "commit": done.stdout.strip() or None,
        "settings": settings,
    }


# --- measuring ----------------------------------------------------------------------------------


def race(
    works: Sequence[peers.Work], loaded: LoadedModel, given: argparse.Namespace
) -> tuple[list[list[Runner]], list[tuple[float, str]]]:
    """`runners, peaks = race(works, loaded, given)`: every contender once a round, and the peak."""
    dtype = str(loaded.dtype).removeprefix("torch.")
    view, ways = value_vector_view(loaded.model), matmuls(dtype)
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
    with tqdm(total=given.rounds * len(pairs), desc=dtype) as bar:
        for number in range(given.rounds):
            peaks.append(measure_peak(ways))
            for work, runner in pairs:
                bar.set_postfix_str(f"{work.name}, {runner.contender}")
                runner.take(work, number)
                bar.update()
    return lanes, peaks


def table_rows(
    work: peers.Work,
    dtype: str,
    runners: Sequence[Runner],
    reference: Sequence[Tensor],
    least: float,
) -> Iterator[Row]:
    """`table_rows(work, "float32", runners, reference, least)`: one a runner.

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
        row = Row(work.name, dtype, runner.contender, runner.variant, **sizes)
        if runner.seconds:
            seconds = statistics.median(runner.seconds)
            ratios = {
                name: statistics.median(
                    [a / b for a, b in zip(runner.seconds, engines[other].seconds, strict=True)]
                )
                for name, other in names.items()
                if other in engines
            }
            differing, difference = compare(work, runner.scores, reference)
            row = replace(
                row,
                seconds=seconds,
                low=min(runner.seconds),
                high=max(runner.seconds),
                share=least / seconds,
                differing=differing,
                difference=difference,
                **ratios,
            )
        yield row


def compare(
    work: peers.Work, scores: Mapping[int, Tensor], reference: Sequence[Tensor]
) -> tuple[int, float]:
    """`differing, difference = compare(work, runner.scores, reference)`: see `Row`."""
    differing, difference = 0, 0.0
    for index, score in scores.items():
        ours, theirs = (
            choose(each.tolist(), work.options[index]) for each in (score, reference[index])
        )
        differing += ours != theirs
        difference = max(difference, float((score - reference[index]).abs().max()))
    return differing, difference


def measure(given: argparse.Namespace) -> dict[str, object]:
    """`measure(given)`: everything that speed.json holds."""
    torch.set_num_threads(1)
    table, peaks, notes = [], {}, []
    grown = remembered = ()
    if "bfloat16" in given.dtypes and not has_bf16():
        notes.append("no bf16 rows: this CPU has no bf16 instructions")
        given.dtypes = ("float32",)
    loaded = load_model(given.model, dtype="float32", device="cpu")
    works = [unmasked_work(loaded, given.questions), masked_work(loaded, given)]
    cost, references = cost_of(loaded.model.config), {}
    if "float32" not in given.dtypes:
        view = value_vector_view(loaded.model)
        references = {work.name: peers.one_at_a_time(view, work) for work in works}
    for dtype in given.dtypes:  # fp32 first: its loop of hooks is the reference
        if dtype != "float32":
            loaded = load_model(given.model, dtype=dtype, device="cpu")
        lanes, found = race(works, loaded, given)
        rate, way = sorted(found)[len(found) // 2]
        peaks[dtype] = {"flops": rate, "way": way}
        for work, runners in zip(works, lanes, strict=True):
            if dtype == "float32":
                slow = next(runner for runner in runners if runner.contender == HOOKS)
                references[work.name] = [slow.scores[i] for i in range(len(work.requests))]
            least = peers.needed(work.requests).flops(cost) / rate
            table += table_rows(work, dtype, runners, references[work.name], least)
    if given.growth_rounds:
        every = sum(len(getattr(given.sizes, f.name)) for f in fields(given.sizes)[:-1])
        with tqdm(total=given.growth_rounds * every, desc="growth") as bar:
            grown = growth.measure_time(loaded, given.sizes, given.growth_rounds, bar.update)
    with tqdm(total=len(given.memory), desc="memory", disable=not given.memory) as bar:
        remembered = growth.measure_memory(given.model, given.dtypes[-1], given.memory, bar.update)
    problems, unchecked = find_problems(table, grown, remembered)
    return describe(given) | {
        "peak": peaks,
        "table": [asdict(row) for row in table],
        "growth": list(grown),
        "memory": list(remembered),
        "notes": notes + unchecked,
        "problems": problems,
    }


def find_problems(
    table: Sequence[Row], grown: Sequence[Mapping], remembered: Sequence[Mapping]
) -> tuple[list[str], list[str]]:
    """`problems, unchecked = find_problems(...)`: bounds missed, and bounds not for these sizes."""
    problems = [*growth.superlinear(grown), *growth.growing(remembered)]
    unchecked = []
    for row in table:
        place = f"{row.work}, {row.dtype}, {row.contender} ({row.variant})"
        if row.seconds is None:
            unchecked.append(f"{place}: nothing to compare with")
            continue
        if row.dtype == "float32" and not (row.differing == 0 and row.difference <= TOLERANCE):
            problems.append(
                f"{place}: {row.differing} choices differ from the reference's, "
                f"log-likelihoods by up to {row.difference:.1e}"
            )
        headline = row.contender == ENGINE and row.variant == SHARED
        if row.dtype == "bfloat16" and headline:
            plain = next(r for r in table if r.contender == HOOKS and _same(r, row))
            if row.differing > plain.differing:
                problems.append(
                    f"{place}: {row.differing} choices differ from fp32's, "
                    f"of one option at a time {plain.differing}"
                )
        bound, value, what = BOUNDS.get((row.work, row.dtype, row.contender)), row.ratio, "ratio"
        if row.dtype == "bfloat16" and headline:
            bound, value, what = LEAST_SHARE, row.share, "share of the peak"
        if bound is None:
            continue
        if row.questions < LEAST_QUESTIONS or (row.work == "masked" and row.masks < LEAST_MASKS):
            unchecked.append(f"{place}: too few questions to hold its {what} against a bound")
        elif value < bound:
            problems.append(f"{place}: {what} {value:.2f}, expected at least {bound}")
    return problems, unchecked


def _same(row: Row, other: Row) -> bool:
    return (row.work, row.dtype) == (other.work, other.dtype)


# --- telling ------------------------------------------------------------------------------------


def show(found: Mapping[str, object], console: Console) -> None:
    """`show(json.loads(path.read_text()), Console())`: the tables of speed.json."""
    machine, versions = found["machine"], found["versions"]
    console.print(
        f"{machine['cpu']} ({machine['instructions']}), {machine['threads']} thread(s) of "
        f"{machine['cores']} cores, {machine['memory'] / 1e9:.0f} GB; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + f"; commit {found['commit']}",
        highlight=False,
    )
    for dtype, peak in found["peak"].items():
        rate = f"{peak['flops'] / 1e9:.0f} GFLOP/s"
        console.print(f"peak {dtype}: {rate} ({peak['way']})", highlight=False)
    titles = ("s", "low", "high", "ratio", "unshared", "stock", "of peak", "differ", "nats")
    names = ("seconds", "low", "high", "ratio", "ratio_unshared", "ratio_stock", "share")
    for (work, dtype), rows in itertools.groupby(
        found["table"], key=lambda row: (row["work"], row["dtype"])
    ):
        rows = list(rows)
        about = ", ".join(f"{rows[0][n]:,} {n}" for n in ("questions", "options", "masks"))
        table = Table(title=f"{work}, {dtype}: {about}; {rows[0]['tokens']:,} tokens needed")
        table.add_column("contender")
        table.add_column("how")
        for title in titles:
            table.add_column(title, justify="right")
        for row in rows:
            cells = ["" if row[name] is None else f"{row[name]:.2f}" for name in names]
            cells.append("" if row["differing"] is None else str(row["differing"]))
            cells.append("" if row["difference"] is None else f"{row['difference']:.1e}")
            table.add_row(row["contender"], row["variant"], *cells)
        console.print(table)
    show_growth(found, console)
    for note in found["notes"]:
        console.print(note, highlight=False)


def show_growth(found: Mapping[str, object], console: Console) -> None:
    """`show_growth(found, console)`: time along each axis, and memory."""
    table = Table(title="growth of the engine's time")
    for title in ("axis", "x", "questions", "tokens", "s", "us a token", "GFLOP/s"):
        table.add_column(title, justify="left" if title == "axis" else "right")
    for row in found["growth"]:
        counts = (f"{row[name]:,}" for name in ("x", "questions", "tokens"))
        rates = (1e6 * row["seconds"] / row["tokens"], row["flops"] / row["seconds"] / 1e9)
        rates = (f"{row['seconds']:.2f}", *(f"{rate:.0f}" for rate in rates))
        table.add_row(row["axis"], *counts, *rates)
    memory = Table(title="memory, MB")
    for title in ("concepts", "masks", "questions", "loaded", "peak", "growth"):
        memory.add_column(title, justify="right")
    for row in found["memory"]:
        sizes = (f"{row[name] / 1e6:.0f}" for name in ("loaded", "peak", "growth"))
        memory.add_row(*(str(row[name]) for name in ("concepts", "masks", "questions")), *sizes)
    for each in (table, memory):
        if each.row_count:
            console.print(each)


# --- the command --------------------------------------------------------------------------------


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def pairs(text: str) -> tuple[tuple[int, int], ...]:
    """`pairs("8x1,32x1")`."""
    split = [part.split("x") for part in text.split(",") if part]
    return tuple((int(one), int(other)) for one, other in split)


QUICK = {
    "rounds": 2,
    "questions": 24,
    "concepts": 2,
    "general": 2,
    "batches": (16, 32),
    "nnsight_batches": (16,),
    "growth_rounds": 1,
    "memory": (),
    "grow_questions": (20, 40),
    "grow_concepts": (2, 4),
    "grow_ratios": (1, 2),
    "grow_controls": (),
    "grow_prompt": (10, 40),
    "grow_shared_prompt": (),
    "grow_models": ((192, 10), (384, 20)),
    "grow_prompts": 10,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """`parse(["--quick"])`: the settings; what is named goes before `--quick`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--quick", action="store_true", help="small sizes: about two minutes")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=220, help="unmasked")
    parser.add_argument("--concepts", type=int, default=30, help="masks")
    parser.add_argument("--general", type=int, default=10, help="questions beside a mask's own")
    parser.add_argument("--batches", type=numbers, default=(8, 16, 32, 64, 128), help="of lm-eval")
    parser.add_argument(
        "--nnsight-batches", type=numbers, default=(10, 20, 40, 0), help="options; 0: all of a mask"
    )
    parser.add_argument("--growth-rounds", type=int, default=3, help="0: do not measure growth")
    parser.add_argument(
        "--memory", type=pairs, default=((8, 1), (32, 1), (8, 8)), help="CONCEPTSxMASKS,..."
    )
    for each in fields(growth.Sizes):
        kind = {"models": pairs, "prompts": int}.get(each.name, numbers)
        name = f"--grow-{each.name.replace('_', '-')}"
        parser.add_argument(name, type=kind, default=each.default, help="see growth.Sizes")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    given = parser.parse_args(arguments)
    given.dtypes = tuple(sorted(given.dtypes.split(","), key=("float32", "bfloat16").index))
    grow = {each.name: vars(given).pop(f"grow_{each.name}") for each in fields(growth.Sizes)}
    given.sizes = growth.Sizes(**grow)
    return given


def main() -> int:
    given = parse()
    found = measure(given)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "speed.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    show(found, Console(width=None if sys.stdout.isatty() else 160))
    for problem in found["problems"]:
        print(f"benchmark: {problem}", file=sys.stderr)
    return bool(found["problems"])


if __name__ == "__main__":
    sys.exit(main())
