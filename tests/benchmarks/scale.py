"""What the paper profile costs beside its forward passes, at full shape; no model is needed.

    python tests/benchmarks/scale.py               # four models, 525 concepts: about half an hour
    python tests/benchmarks/scale.py --concepts 40 --models 1

Chapter 4's study, by its own code: coefficients, masks and their controls, packed rows, tables, the
store, and the statistics of all models together. A forward pass hands over random numbers. Memory
is that of a process of its own for each number of models, which finds the earlier models in the
store.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pandas as pd
import torch
from transformers import LlamaConfig

from paramspec.execution.store import Store
from paramspec.method.hooks import ValueVectorView, unverified_view
from paramspec.method.pss import Choices
from paramspec.models.checkpoints import find_checkpoint
from paramspec.models.load import LoadedModel, load_tokenizer
from paramspec.models.registry import empty_model
from paramspec.specwiki import load_questions
from paramspec.stats.trends import measure_models, model_table
from paramspec.studies.cost import PACKED
from paramspec.studies.sweep import measure_pss, needs_of

# Layers, value vectors of a layer: Llama-2-7B, Gemma-2-9B
SHAPES = ((32, 11008), (42, 14336))
CHOICES = Choices(
    ratios=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2), general=10, controls=3, folds=(0, 1)
)
# Of a model: CPU minutes and GB on the disk; of all models together: GB of memory
MOST = {"minutes": 10, "disk": 2, "memory": 8}


def stand_in(number: int, shape: tuple[int, int]) -> LoadedModel:
    """`stand_in(0, (32, 11008))`: a model of that shape, without weights."""
    layers, width = shape
    config = LlamaConfig(num_hidden_layers=layers, intermediate_size=width, torch_dtype="bfloat16")
    path = find_checkpoint("smollm2-135m").path
    return LoadedModel(
        model=empty_model(config),
        tokenizer=load_tokenizer(path),
        name=f"stand-in {number}",
        digest=str(number),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        commit=None,
        taught=None,
        quantized=None,
    )


def drawn_coefficients(
    view: ValueVectorView, rows: Sequence[Sequence[int]], *_: object
) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
    """In place of `masks._record_rows`: each row is another part of the same random numbers."""
    size = view.layers * view.width
    pool = torch.rand(size + len(rows)).pow(4)  # a few are large, as coefficients are
    for row in range(len(rows)):
        yield [row], pool[row : row + size].reshape(1, view.layers, view.width)


def drawn_answers(*given: object) -> torch.Tensor:
    """In place of `scoring._packed_forward`, whose last arguments are the cells and a length."""
    return -torch.rand(sum(len(cell.row.which) for cell in given[-2]))


# What a forward pass is needed for
IN_PLACE = {
    "method.masks._record_rows": drawn_coefficients,
    "method.scoring._packed_forward": drawn_answers,
    "method.scoring._head": lambda model: None,
    "method.scoring.packed_layers": lambda model, tokens: nullcontext(),
    "studies.runner.value_vector_view": unverified_view,
    "studies.runner.choose_engine": lambda view: PACKED,
    "studies.sweep.value_vector_view": unverified_view,
}


def measure_here(models: int, concepts: int, root: str) -> dict[str, object]:
    """`measure_here(2, 525, "store")`: in this process, which had better be new."""
    torch.set_num_threads(1)
    shapes = [SHAPES[number % len(SHAPES)] for number in range(models)]
    loaded = [stand_in(number, shape) for number, shape in enumerate(shapes)]
    questions, store = load_questions(concepts=concepts), Store(root)
    clocks = [time.process_time()]
    with ExitStack() as stack:
        for place, other in IN_PLACE.items():
            stack.enter_context(mock.patch(f"paramspec.{place}", other))
        study = measure_pss(loaded, questions, CHOICES, store=store)
    clocks.append(time.process_time())
    details = study.details
    table = model_table(measure_models(details))
    clocks.append(time.process_time())
    held = sum(file.stat().st_size for file in Path(root).rglob("*") if file.is_file())
    new = [not model["units_from_store"] for model in study.run["models"]]
    planned = [needs_of(questions, CHOICES, math.prod(shape), 2) for shape in shapes]
    seconds = sum(one.seconds for one, is_new in zip(planned, new, strict=True) if is_new)
    disk = sum(one.coefficients + one.answers for one in planned)
    return {
        "models": models,
        "concepts": concepts,
        "answers": len(details),
        "minutes_a_new_model": (clocks[1] - clocks[0]) / 60 / sum(new),
        "minutes_planned": seconds / 60 / sum(new),
        "minutes_of_statistics": (clocks[2] - clocks[1]) / 60,
        "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9,
        "memory_planned": max(one.memory for one in planned) / 1e9,
        "disk_a_model": held / 1e9 / models,
        "disk_planned": disk / 1e9 / models,
        "rows": len(table),
    }


def measure(counts: Sequence[int], concepts: int) -> list[dict[str, object]]:
    """`measure([1, 2, 4], 525)`: a row for each number of models, in GB and minutes."""
    rows = []
    with TemporaryDirectory() as root:
        for count in counts:
            with multiprocessing.get_context("spawn").Pool(1) as process:
                rows.append(process.apply(measure_here, (count, concepts, root)))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=int, default=4, help="1, 2, 4, ... up to so many")
    parser.add_argument("--concepts", type=int, default=525)
    given = parser.parse_args()
    counts = [2**n for n in range(int(math.log2(given.models)) + 1)]
    table = pd.DataFrame(measure(counts, given.concepts))
    print(table.to_string(index=False, float_format="{:.3g}".format))
    missed = {
        "minutes": table["minutes_a_new_model"].max(),
        "disk": table["disk_a_model"].max(),
        "memory": table["memory"].max(),
    }
    missed = {name: value for name, value in missed.items() if value > MOST[name]}
    for name, value in missed.items():
        print(f"benchmark: {name} {value:.3g}, expected at most {MOST[name]}", file=sys.stderr)
    # What `paramspec plan` says; its minutes are another processor's.
    off = {
        name: max(abs(table[name] / table[planned] - 1))
        for name, planned in {"memory": "memory_planned", "disk_a_model": "disk_planned"}.items()
    }
    off = {name: share for name, share in off.items() if share > 0.2}
    for name, share in off.items():
        print(f"benchmark: {name} is {share:.0%} off the plan's", file=sys.stderr)
    return bool(missed or off)


if __name__ == "__main__":
    sys.exit(main())
