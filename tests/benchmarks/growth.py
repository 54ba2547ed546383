"""How the engine's time and memory grow: with questions, masks and prompts.

    rows = measure_time(loaded, AXES, rounds=3)        # a row per point of an axis
    rows = measure_memory("smollm2-135m", "bfloat16", ((8, 1), (32, 1), (8, 8)))

All points of all axes are timed in turn, round by round. Memory is that of a process of its own
for each case.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import peers
from paramspec.execution.limits import release_memory
from paramspec.method.hooks import ValueVectorView, value_vector_view
from paramspec.method.scoring import choose_engine
from paramspec.models.load import LoadedModel, load_model
from paramspec.specwiki import load_questions
from works import Work, masked, needed, spread, timed, unmasked

LINEAR = ("questions", "concepts", "masks")  # the axes that time is linear in
# The points of each axis. `questions` are without a mask; `concepts` have a mask each, on their own
# questions and ten general ones; `masks` are those of each of four concepts; `prompt` and
# `shared_prompt` are tokens in front of each of forty questions.
AXES: Mapping[str, Sequence[int]] = {
    "questions": (55, 110, 220, 440),
    "concepts": (8, 16, 32),
    "masks": (1, 2, 4, 8),
    "prompt": (10, 20, 40, 80, 160),
    "shared_prompt": (10, 20, 40, 80, 160),
}
PROMPTS = 40


def masks_of(
    view: ValueVectorView, tokenizer: PreTrainedTokenizerBase, concepts: int, masks: int
) -> Work:
    """`masks_of(view, tokenizer, 8, 2)`: two masks of each concept, the second one larger."""
    ratios = [0.01 * (1 + number) for number in range(masks)]
    return masked(view, tokenizer, load_questions(concepts=concepts), ratios, general=10)


def works_of(loaded: LoadedModel) -> dict[str, Callable[[int], Work]]:
    """`works_of(loaded)["questions"](55)`: what is timed at a point of an axis."""
    view, tokenizer, every = value_vector_view(loaded.model), loaded.tokenizer, load_questions()
    questions = spread(every, PROMPTS)
    texts = [tokenizer.encode(" ".join(question.statements)) for question in every[:PROMPTS]]
    # Text after text in a circle, beginning with another for each question.
    own = [[token for text in texts[at:] + texts[:at] for token in text] for at in range(PROMPTS)]
    return {
        "questions": lambda x: unmasked(tokenizer, spread(every, x)),
        "concepts": lambda x: masks_of(view, tokenizer, x, 1),
        "masks": lambda x: masks_of(view, tokenizer, 4, x),
        "prompt": lambda x: unmasked(tokenizer, questions, [text[:x] for text in own]),
        "shared_prompt": lambda x: unmasked(tokenizer, questions, [own[0][:x]] * PROMPTS),
    }


def measure_time(
    loaded: LoadedModel, axes: Mapping[str, Sequence[int]], rounds: int
) -> list[dict[str, object]]:
    """`measure_time(loaded, AXES, 3)`: a row per point, after a round that is not timed.

    `seconds` are the median; `questions`, `tokens` and `flops` are those that are needed there.
    """
    if not rounds:
        return []
    view, works = value_vector_view(loaded.model), works_of(loaded)
    engine = choose_engine(view)
    points = [(axis, x, works[axis](x)) for axis in axes for x in axes[axis]]
    seconds: list[list[float]] = [[] for _ in points]
    for _ in tqdm(range(rounds + 1), desc="growth"):
        for (_, _, work), own in zip(points, seconds, strict=True):
            own.append(timed(partial(peers.engine, view, engine, work)))
    rows = []
    for (axis, x, work), (_, *own) in zip(points, seconds, strict=True):
        least = needed(work.requests)
        row = {"axis": axis, "x": x, "questions": len(work.requests), "tokens": least.tokens}
        row |= {"seconds": statistics.median(own), "low": min(own), "high": max(own)}
        rows.append(row | {"flops": least.flops(loaded.model)})
    return rows


def superlinear(rows: Sequence[dict], slack: float = 1.2) -> list[str]:
    """`superlinear(rows)`: axes along which time grows faster than the tokens that are needed."""
    problems = []
    for axis in LINEAR:
        along = [row for row in rows if row["axis"] == axis]
        for first, last in zip(along[:1], along[-1:], strict=True):
            grown = last["seconds"] / first["seconds"] / (last["tokens"] / first["tokens"])
            if grown > slack:
                problems.append(f"{axis}: time per token grows {grown:.2f} times")
    return problems


def memory_here(model: str, dtype: str, concepts: int, masks: int) -> dict[str, object]:
    """`memory_here("smollm2-135m", "bfloat16", 8, 1)`: in this process, which had better be new."""
    torch.set_num_threads(1)
    loaded = load_model(model, dtype=dtype, device="cpu")
    view = value_vector_view(loaded.model)
    engine, work = choose_engine(view), masks_of(view, loaded.tokenizer, concepts, masks)
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

    A row per case: resident bytes once the model is `loaded` and the questions are encoded, and at
    the process's `peak`.
    """
    rows = []
    for case in cases:
        with multiprocessing.get_context("spawn").Pool(1) as process:
            rows.append(process.apply(memory_here, (model, dtype, *case)))
    return rows


def growing(rows: Sequence[dict], slack: float = 0.1) -> list[str]:
    """`growing(rows)`: cases whose peak exceeds that of the fewest questions by more than slack."""
    least = min(rows, key=lambda row: row["questions"], default=None)
    return [
        f"{row['questions']} questions take {row['peak'] / least['peak']:.2f} times the memory"
        for row in rows
        if row["peak"] > (1 + slack) * least["peak"]
    ]
