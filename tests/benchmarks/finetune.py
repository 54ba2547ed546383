"""What a step of fine-tuning costs: `python tests/benchmarks/finetune.py [--model M] [--rounds N]`.

A round takes one step of every way, on the same batch. The learning rate is 0: the same work, and
the weights stay. `masked PV` is the usual way to train some columns, whole weights with masked
gradients; `whole FV` trains whole weights without a hook. Exits with 1 if training fewer columns
takes longer, or more memory than its share.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pandas as pd
import torch
from torch import Tensor, nn

from paramspec.method.hooks import ValueVectorView, train_value_vectors, value_vector_view
from paramspec.method.masks import keep_tensor
from paramspec.models.load import load_model
from paramspec.specwiki import load_questions
from paramspec.studies.training import (
    METHODS,
    Training,
    choose_vectors,
    encode_texts,
    language_modelling_loss,
    training_texts,
)
from turns import conditions, report, timed, times

CONCEPTS = ("France", "gold")
Trained = tuple[list[nn.Parameter], Callable[[], None]]  # and what is called after each backward


@contextmanager
def whole_weights(view: ValueVectorView, vectors: Tensor, masked: bool) -> Iterator[Trained]:
    """All down projections are parameters; if `masked`, gradients of other vectors are zeroed."""
    keep = keep_tensor(vectors, view.layers, view.width)
    weights = [module.weight.requires_grad_(True) for module in view.modules]

    def mask() -> None:
        for layer, (weight, rows) in enumerate(zip(weights, keep, strict=True)):
            turned = not view.vectors(layer).is_contiguous()  # GPT-2's Conv1D keeps rows
            (weight.grad.T if turned else weight.grad)[rows] = 0

    try:
        yield weights, mask if masked else lambda: None
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


@contextmanager
def columns(view: ValueVectorView, vectors: Tensor) -> Iterator[Trained]:
    with train_value_vectors(view, vectors) as trained:
        yield list(trained.parameters()), lambda: None


def measure(view: ValueVectorView, rows: list[list[int]], trained: Trained) -> tuple[float, int]:
    """Seconds of a step, and the bytes that its optimizer holds."""
    parameters, mask = trained
    optimizer = torch.optim.AdamW(parameters, lr=0, weight_decay=0)

    def step() -> None:
        language_modelling_loss(view.model, rows).backward()
        mask()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    seconds = timed(step)
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return seconds, sum(tensor.numel() * tensor.element_size() for tensor in moments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    loaded = load_model(given.model, dtype="float32")
    view, questions = value_vector_view(loaded.model), load_questions()
    training = Training.parse(method="FT-FV", concepts=CONCEPTS)
    rows = encode_texts(view, loaded.tokenizer, training_texts(questions, training))
    rows = sorted(rows, key=len)[: training.batch]
    vectors = {}
    for method in METHODS:
        own = training.model_copy(update={"method": method})
        vectors[method] = choose_vectors(view, loaded.tokenizer, questions, own)
    ways = {method: lambda method=method: columns(view, vectors[method]) for method in METHODS}
    ways["masked PV"] = lambda: whole_weights(view, vectors["FT-PV"], masked=True)
    ways["whole FV"] = lambda: whole_weights(view, vectors["FT-FV"], masked=False)
    seconds, held = {way: [] for way in ways}, {}
    for _ in range(given.rounds):
        for way, block in ways.items():
            with ExitStack() as stack:
                spent, held[way] = measure(view, rows, stack.enter_context(block()))
            seconds[way].append(spent)
    table = pd.DataFrame({"s/step": {way: statistics.median(one) for way, one in seconds.items()}})
    table["of FV"] = table["s/step"] / table.loc["FT-FV", "s/step"]
    table["optimizer MB"] = pd.Series(held) / 1e6
    table["share"] = table["optimizer MB"] / table.loc["FT-FV", "optimizer MB"]
    print(f"{given.model}, {loaded.dtype}, {loaded.device}; {conditions()}")
    print(f"{len(rows)} statements, {sum(map(len, rows))} tokens a step; {given.rounds} rounds")
    print(table.to_string(float_format="{:.3f}".format))
    problems = [
        f"a step of FT-PV takes longer than one of {way}"
        for way in ("FT-FV", "whole FV")
        if times(seconds["FT-PV"], seconds[way]) > 1
    ]
    for method in ("FT-PV", "FT-RV", "FT-CV"):
        share = len(vectors[method]) / len(vectors["FT-FV"])
        if held[method] > share * held["FT-FV"] * 1.001:  # torch's step counters are not columns
            problems.append(f"the optimizer of {method} holds more than its {share:.3f} of FT-FV's")
    return report(problems)


if __name__ == "__main__":
    sys.exit(main())
