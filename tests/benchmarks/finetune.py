"""What a step of fine-tuning costs: `python tests/benchmarks/finetune.py [--model M] [--rounds N]`.

Each round takes one step of every way in turn, on the same batch, so that a machine which slows
down slows all of them. The learning rate is 0: the same work, and the weights stay. `masked PV` is
the usual way to train some columns, whole weights with masked gradients; `whole FV` trains whole
weights without a hook. Exits with 1 if training fewer columns takes longer, or more memory than
its share.
"""

from __future__ import annotations

import argparse
import operator
import platform
import statistics
import sys
import time
from contextlib import contextmanager

import torch
from torch import nn

from paramspec.method.hooks import train_value_vectors, value_vector_view
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

CONCEPTS = ("France", "gold")


@contextmanager
def whole_weights(view, vectors):
    """The usual way: all down projections are parameters; `mask` is called after each backward."""
    keep = keep_tensor(vectors, view.layers, view.width)
    weights = [module.weight.requires_grad_(True) for module in view.modules]

    def mask():
        for layer, (weight, rows) in enumerate(zip(weights, keep, strict=True)):
            turned = not view.vectors(layer).is_contiguous()  # GPT-2's Conv1D keeps rows
            (weight.grad.T if turned else weight.grad)[rows] = 0

    try:
        yield weights, mask
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


@contextmanager
def columns(view, vectors):
    with train_value_vectors(view, vectors) as trained:
        yield list(trained.parameters()), lambda: None


def step(view, rows, parameters, optimizer, mask) -> float:
    began = time.perf_counter()
    language_modelling_loss(view.model, rows).backward()
    mask()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    loaded = load_model(given.model, dtype="float32")
    view, questions = value_vector_view(loaded.model), load_questions()
    training = Training.parse(method="FT-FV", concepts=CONCEPTS)
    rows = encode_texts(view, loaded.tokenizer, training_texts(questions, CONCEPTS, 4))
    rows = sorted(rows, key=len)[: training.batch]
    vectors = {
        method: choose_vectors(
            view, loaded.tokenizer, questions, training.model_copy(update={"method": method})
        )
        for method in METHODS
    }
    ways = {method: (columns, vectors[method]) for method in METHODS}
    ways |= {
        "masked PV": (whole_weights, vectors["FT-PV"]),
        "whole FV": (whole_weights, vectors["FT-FV"]),
    }
    seconds, held = {way: [] for way in ways}, {}
    for _ in range(given.rounds):
        for way, (block, chosen) in ways.items():
            with block(view, chosen) as (parameters, mask):
                mask = mask if way == "masked PV" else lambda: None
                optimizer = torch.optim.AdamW(parameters, lr=0, weight_decay=0)
                step(view, rows, parameters, optimizer, mask)  # makes the optimizer's state
                seconds[way].append(step(view, rows, parameters, optimizer, mask))
                held[way] = sum(
                    tensor.numel() * tensor.element_size()
                    for moments in optimizer.state.values()
                    for tensor in moments.values()
                )
    median = {way: statistics.median(times) for way, times in seconds.items()}
    tokens = sum(map(len, rows))
    print(
        f"{given.model}, {loaded.dtype}, {loaded.device}; {platform.processor()} "
        f"{platform.platform()}; torch {torch.__version__}, {torch.get_num_threads()} thread(s); "
        f"{len(rows)} statements, {tokens} tokens a step; median of {given.rounds} rounds"
    )
    print(
        f"{'way':<10} {'columns':>8} {'s/step':>8} {'of FV':>6} {'optimizer MB':>13} {'of FV':>6}"
    )
    for way, (_, chosen) in ways.items():
        print(
            f"{way:<10} {len(chosen):>8,} {median[way]:>8.3f} {median[way] / median['FT-FV']:>6.2f}"
            f" {held[way] / 1e6:>13.1f} {held[way] / held['FT-FV']:>6.3f}"
        )
    problems = [
        f"a step of FT-PV takes longer than one of {way}"
        for way in ("FT-FV", "whole FV")
        # Round by round: a pair of neighbours in time is slowed alike.
        if statistics.median(map(operator.truediv, seconds["FT-PV"], seconds[way])) > 1
    ]
    for method in ("FT-PV", "FT-RV", "FT-CV"):
        share = len(vectors[method]) / len(vectors["FT-FV"])
        if held[method] > share * held["FT-FV"] * 1.001:  # torch's step counters are not columns
            problems.append(f"the optimizer of {method} holds more than its {share:.3f} of FT-FV's")
    for problem in problems:
        print(f"benchmark: {problem}", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
