"""How the engine's time and memory grow: with questions, masks, prompts and the model.

    rows = measure_time(loaded, Sizes(), rounds=3)     # a row per point of an axis
    rows = measure_memory("smollm2-135m", "bfloat16", ((8, 1), (32, 1), (8, 8)))

All points of all axes are timed in turn, round by round. Memory is that of a process of its own
for each case: `python tests/benchmarks/growth.py MODEL DTYPE CONCEPTS MASKS` prints it.
"""

from __future__ import annotations

import copy
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import peers
from paramspec.execution.limits import release_memory
from paramspec.method.hooks import ValueVectorView, value_vector_view
from paramspec.method.pss import Choices, asked_questions
from paramspec.method.rows import Engine, Item, Request
from paramspec.method.scoring import choose_engine, encode
from paramspec.models.load import LoadedModel, load_model
from paramspec.specwiki import Question, load_questions
from paramspec.studies.plan import cost_of

RATIO = 0.01
LINEAR = ("questions", "concepts", "ratios", "controls")  # the axes that time is linear in


@dataclass(frozen=True)
class Sizes:
    """The points of each axis; an empty one is not measured.

    Attributes:
        questions: without a mask.
        concepts: a mask each, on its own questions and ten general ones.
        ratios: masks of each of four concepts, each larger than the one before.
        controls: masks of each of four concepts beside its own, as large as it.
        prompt: tokens in front of each of some questions, other ones for each.
        shared_prompt: tokens in front of each of some questions, the same for all.
        models: (hidden size, layers), in the proportions of the model at hand.
        prompts: questions that prompts are put in front of.
    """

    questions: tuple[int, ...] = (55, 110, 220, 440)
    concepts: tuple[int, ...] = (8, 16, 32)
    ratios: tuple[int, ...] = (1, 2, 4, 8)
    controls: tuple[int, ...] = (0, 1, 3, 7)
    prompt: tuple[int, ...] = (10, 20, 40, 80, 160)
    shared_prompt: tuple[int, ...] = (10, 20, 40, 80, 160)
    models: tuple[tuple[int, int], ...] = ((192, 10), (384, 20), (576, 30), (960, 32))
    prompts: int = 40


@dataclass
class Point:
    """A place on an axis: `x`, and the work that is timed there."""

    axis: str
    x: int
    view: ValueVectorView
    engine: Engine
    work: peers.Work
    seconds: list[float] = field(default_factory=list)

    def run(self) -> None:
        began = time.perf_counter()
        peers.engine(self.view, self.engine, self.work)
        self.seconds.append(time.perf_counter() - began)

    def row(self) -> dict[str, object]:
        found = peers.needed(self.work.requests)
        return {
            "axis": self.axis,
            "x": self.x,
            "dtype": str(self.view.model.dtype).removeprefix("torch."),
            "seconds": statistics.median(self.seconds),
            "low": min(self.seconds),
            "high": max(self.seconds),
            "questions": len(self.work.requests),
            "tokens": found.tokens,
            "flops": found.flops(cost_of(self.view.model.config)),
        }


def random_masks(view: ValueVectorView, ratios: Sequence[float]) -> list[torch.Tensor]:
    """`random_masks(view, [0.01, 0.02])`: keep tensors. What is masked costs what else is does."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.rand(len(ratios), view.layers, view.width, generator=draw)
    counts = [max(1, round(ratio * view.width)) for ratio in ratios]
    return [
        torch.ones_like(each, dtype=torch.bool).scatter(1, each.topk(count, dim=1).indices, False)
        for each, count in zip(scores, counts, strict=True)
    ]


def masked_work(
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    ratios: Sequence[float],
) -> peers.Work:
    """`masked_work(view, tokenizer, load_questions(concepts=8), [0.01])`: a mask a ratio each."""
    choices = Choices(ratios=(RATIO,), general=10)
    items = {question.id: encode(tokenizer, question) for question in questions}
    requests, keeps = [], []
    for concept in dict.fromkeys(question.concept for question in questions):
        asked = asked_questions(questions, concept, choices)
        for keep in random_masks(view, ratios):
            requests += [Request(items[question.id], len(keeps)) for question, _ in asked]
            keeps.append(keep)
    return peers.Work("masked", requests, keeps)


def _behind(items: Sequence[Item], prompts: Sequence[Sequence[int]]) -> peers.Work:
    """The items without a mask, each with tokens put in front of it."""
    pairs = zip(items, prompts, strict=True)
    longer = [Item((*prompt, *item.context), item.options) for item, prompt in pairs]
    return peers.Work("unmasked", [Request(item, 0) for item in longer])


def points(loaded: LoadedModel, sizes: Sizes) -> list[Point]:
    """`points(loaded, Sizes())`: of all axes."""
    view, tokenizer, every = value_vector_view(loaded.model), loaded.tokenizer, load_questions()
    engine = choose_engine(view)

    def spread(count: int) -> list[Item]:
        return [encode(tokenizer, question) for question in every[:: len(every) // count][:count]]

    def masks(concepts: int, ratios: Sequence[float]) -> peers.Work:
        return masked_work(view, tokenizer, load_questions(concepts=concepts), ratios)

    items = spread(sizes.prompts)
    texts = [tokenizer.encode(" ".join(question.statements)) for question in every[: len(items)]]
    # Text after text in a circle, beginning with another for each question.
    own = [
        [token for text in texts[at:] + texts[:at] for token in text] for at in range(len(texts))
    ]
    axes: dict[str, tuple[Sequence[int], Callable[[int], peers.Work]]] = {
        "questions": (sizes.questions, lambda x: _behind(spread(x), [()] * x)),
        "concepts": (sizes.concepts, lambda x: masks(x, [RATIO])),
        "ratios": (sizes.ratios, lambda x: masks(4, [RATIO * (1 + i) for i in range(x)])),
        "controls": (sizes.controls, lambda x: masks(4, [RATIO] * (1 + x))),
        "prompt": (sizes.prompt, lambda x: _behind(items, [text[:x] for text in own])),
        "shared_prompt": (sizes.shared_prompt, lambda x: _behind(items, [own[0][:x]] * len(items))),
    }
    found = [
        Point(axis, x, view, engine, work(x))
        for axis, (values, work) in axes.items()
        for x in values
    ]
    for hidden, layers in sizes.models:
        other = value_vector_view(random_model(loaded.model, hidden, layers))
        count = sum(parameter.numel() for parameter in other.model.parameters())
        work = _behind(items, [()] * len(items))
        found.append(Point("parameters", count, other, choose_engine(other), work))
    return found


def random_model(like: torch.nn.Module, hidden: int, layers: int) -> torch.nn.Module:
    """`random_model(loaded.model, 192, 10)`: of a kind, in its proportions, with random weights."""
    config = copy.deepcopy(like.config)
    groups = config.num_attention_heads // config.num_key_value_heads
    heads = max(groups, hidden // (config.hidden_size // config.num_attention_heads))
    config.intermediate_size = config.intermediate_size * hidden // config.hidden_size
    config.num_attention_heads, config.num_key_value_heads = heads, heads // groups
    config.hidden_size, config.num_hidden_layers = hidden, layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    return model.to(like.dtype).eval().requires_grad_(False)


def measure_time(
    loaded: LoadedModel,
    sizes: Sizes,
    rounds: int = 3,
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, object]]:
    """`measure_time(loaded, Sizes())`: a row a point; `progress` is called after each timing.

    Returns:
        `axis`, `x`, `dtype`, `seconds` (median), `low`, `high`, and the `questions`, `tokens` and
        `flops` that are needed there.
    """
    found = points(loaded, sizes)
    for point in found:  # what is prepared once, and each size's first memory, is not timed
        peers.engine(point.view, point.engine, point.work.only(range(4)))
    for _ in range(rounds):
        for point in found:
            point.run()
            progress()
    return [point.row() for point in found]


def superlinear(rows: Sequence[dict], slack: float = 1.2) -> list[str]:
    """`superlinear(rows)`: axes along which time grows faster than the tokens that are needed."""
    problems = []
    for axis in LINEAR:
        along = [row for row in rows if row["axis"] == axis]
        if len(along) > 1:
            first, last = along[0], along[-1]
            grown = last["seconds"] / first["seconds"] / (last["tokens"] / first["tokens"])
            if grown > slack:
                problems.append(
                    f"time a token at {last['x']} {axis} is {grown:.2f} times that at {first['x']}"
                )
    return problems


# --- memory -------------------------------------------------------------------------------------


@contextmanager
def watching_memory(every: float = 0.005) -> Iterator[list[int]]:
    """`with watching_memory() as seen: ...`: resident bytes of this process, time after time."""
    process, done = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(every):
            seen.append(process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen.append(process.memory_info().rss)


def memory_here(model: str, dtype: str, concepts: int, masks: int) -> dict[str, object]:
    """`memory_here("smollm2-135m", "bfloat16", 8, 1)`: in this process, which had better be new."""
    torch.set_num_threads(1)
    loaded = load_model(model, dtype=dtype, device="cpu")
    view = value_vector_view(loaded.model)
    engine = choose_engine(view)
    ratios = [RATIO * (1 + number) for number in range(masks)]
    work = masked_work(view, loaded.tokenizer, load_questions(concepts=concepts), ratios)
    gc.collect()
    release_memory()
    with watching_memory() as seen:
        peers.engine(view, engine, work)
    return {
        "concepts": concepts,
        "masks": masks,
        "dtype": dtype,
        "questions": len(work.requests),
        "loaded": seen[0],
        "peak": max(seen),
        "growth": max(seen) - seen[0],
    }


def measure_memory(
    model: str,
    dtype: str,
    cases: Sequence[tuple[int, int]],
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, object]]:
    """`measure_memory("smollm2-135m", "bfloat16", ((8, 1), (32, 1)))`: concepts, and masks of each.

    Returns:
        A row a case: resident bytes once the model is `loaded` and the questions are encoded, at
        their `peak` while they are scored, and the `growth` from one to the other.
    """
    rows = []
    for concepts, masks in cases:
        line = [sys.executable, __file__, model, dtype, str(concepts), str(masks)]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(line)} failed:\n{done.stderr}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        progress()
    return rows


def growing(rows: Sequence[dict], slack: float = 0.1) -> list[str]:
    """`growing(rows)`: cases whose peak exceeds that of the fewest questions by more than slack."""
    least = min(rows, key=lambda row: row["questions"], default=None)
    return [
        f"{row['concepts']} concepts with {row['masks']} masks take {row['peak'] / 1e6:.0f} MB, "
        f"{least['concepts']} with {least['masks']} take {least['peak'] / 1e6:.0f} MB"
        for row in rows
        if row["peak"] > (1 + slack) * least["peak"]
    ]


if __name__ == "__main__":
    name, kind, *counts = sys.argv[1:]
    print(json.dumps(memory_here(name, kind, *map(int, counts))))
