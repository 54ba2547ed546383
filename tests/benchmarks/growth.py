"""How the engine's time and memory grow: with questions, masks, prompts and the model.

    rows = measure_time(loaded, AXES, rounds=3)        # a row per point of an axis
    rows = measure_memory("smollm2-135m", "bfloat16", ((8, 1), (32, 1), (8, 8)))

All points of all axes are timed in turn, round by round. Memory is that of a process of its own
for each case: `python tests/benchmarks/growth.py MODEL DTYPE CONCEPTS MASKS` prints it.
"""

from __future__ import annotations

import copy
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
from turns import in_turns

RATIO = 0.01
LINEAR = ("questions", "concepts", "ratios", "controls")  # the axes that time is linear in
Axes = Mapping[str, Sequence]
# The points of each axis. `questions` are without a mask; `concepts` have a mask each, on their own
# questions and ten general ones; `ratios` are masks of each of four concepts, each larger than the
# one before; `controls` are masks beside its own, as large as it; `prompt` and `shared_prompt` are
# tokens in front of each of forty questions; `parameters` are (hidden size, layers).
AXES: Axes = {
    "questions": (55, 110, 220, 440),
    "concepts": (8, 16, 32),
    "ratios": (1, 2, 4, 8),
    "controls": (0, 1, 3, 7),
    "prompt": (10, 20, 40, 80, 160),
    "shared_prompt": (10, 20, 40, 80, 160),
    "parameters": ((192, 10), (384, 20), (576, 30), (960, 32)),
}
PROMPTS = 40


class Point(NamedTuple):
    """A place on an axis: `x`, and the work that is timed there."""

    axis: str
    x: int
    view: ValueVectorView
    engine: Engine
    work: peers.Work


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


def points(loaded: LoadedModel, axes: Axes) -> Iterator[Point]:
    """`points(loaded, AXES)`: of all axes."""
    view, tokenizer, every = value_vector_view(loaded.model), loaded.tokenizer, load_questions()

    def spread(count: int) -> list[Item]:
        return [encode(tokenizer, question) for question in every[:: len(every) // count][:count]]

    def masks(concepts: int, ratios: Sequence[float]) -> peers.Work:
        return masked_work(view, tokenizer, load_questions(concepts=concepts), ratios)

    items = spread(PROMPTS)
    texts = [tokenizer.encode(" ".join(question.statements)) for question in every[:PROMPTS]]
    # Text after text in a circle, beginning with another for each question.
    own = [[token for text in texts[at:] + texts[:at] for token in text] for at in range(PROMPTS)]
    works: dict[str, Callable[[int], peers.Work]] = {
        "questions": lambda x: _behind(spread(x), [()] * x),
        "concepts": lambda x: masks(x, [RATIO]),
        "ratios": lambda x: masks(4, [RATIO * (1 + i) for i in range(x)]),
        "controls": lambda x: masks(4, [RATIO] * (1 + x)),
        "prompt": lambda x: _behind(items, [text[:x] for text in own]),
        "shared_prompt": lambda x: _behind(items, [own[0][:x]] * PROMPTS),
    }
    for axis, work in works.items():
        for x in axes.get(axis, ()):
            yield Point(axis, x, view, choose_engine(view), work(x))
    for hidden, layers in axes.get("parameters", ()):
        other = value_vector_view(random_model(loaded.model, hidden, layers))
        count = sum(parameter.numel() for parameter in other.model.parameters())
        work = _behind(items, [()] * PROMPTS)
        yield Point("parameters", count, other, choose_engine(other), work)


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


def measure_time(loaded: LoadedModel, axes: Axes, rounds: int) -> list[dict[str, object]]:
    """`measure_time(loaded, AXES, 3)`: a row a point.

    Returns:
        `axis`, `x`, `seconds` (median), `low`, `high`, and the `questions`, `tokens` and `flops`
        that are needed there.
    """
    found = list(points(loaded, axes))
    ways = {
        number: partial(peers.engine, point.view, point.engine, point.work)
        for number, point in enumerate(found)
    }
    rows = []
    for point, seconds in zip(found, in_turns(ways, rounds).values(), strict=True):
        needed = peers.needed(point.work.requests)
        row = {"axis": point.axis, "x": point.x, "questions": len(point.work.requests)}
        row |= {"seconds": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}
        flops = needed.flops(point.view.model)
        rows.append(row | {"tokens": needed.tokens, "flops": flops})
    return rows


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


def memory_here(model: str, dtype: str, concepts: int, masks: int) -> dict[str, object]:
    """`memory_here("smollm2-135m", "bfloat16", 8, 1)`: in this process, which had better be new."""
    torch.set_num_threads(1)
    loaded = load_model(model, dtype=dtype, device="cpu")
    view = value_vector_view(loaded.model)
    engine = choose_engine(view)
    ratios = [RATIO * (1 + number) for number in range(masks)]
    work = masked_work(view, loaded.tokenizer, load_questions(concepts=concepts), ratios)
    release_memory()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is from here on
    peers.engine(view, engine, work)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = {"concepts": concepts, "masks": masks, "questions": len(work.requests)}
    return sizes | {"dtype": dtype, "loaded": before, "peak": peak}


def measure_memory(
    model: str, dtype: str, cases: Sequence[tuple[int, int]]
) -> list[dict[str, object]]:
    """`measure_memory("smollm2-135m", "bfloat16", ((8, 1), (32, 1)))`: concepts, and masks of each.

    Returns:
        A row a case: resident bytes once the model is `loaded` and the questions are encoded, and
        at the process's `peak`.
    """
    rows = []
    for case in cases:
        line = [sys.executable, __file__, model, dtype, *map(str, case)]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
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
