"""What a step of training a micro model costs: `python tests/benchmarks/zoo.py [--rounds N]`.

On one core, for a model of each family. `plain` is the usual way: transformers' forward pass of
padded texts, autograd, AdamW over a tensor a weight. `micro` is the zoo's. Each round takes the
same 16 steps in either way, so that a machine which slows down slows both. The learning rate is 0:
the same work, and the weights stay. FLOPs are six a weight and token, padding not counted, whatever
a way spends on them; the peak is what this core makes of the product of two large fp32 matrices.
Exits with 1 if a step of `micro` takes more than half of one of `plain`.
"""

from __future__ import annotations

import argparse
import itertools
import operator
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from paramspec.models import micro, zoo
from paramspec.models.zoo import SORTED_TOGETHER, architecture, load_zoo

MODELS = ("zoo-llama-4", "zoo-qwen2-4", "zoo-mistral-4", "zoo-gemma2-4")
AT_LEAST = 2.0  # times as fast


def peak_of_this_core() -> float:
    """FLOP/s of the better of torch's two ways to multiply matrices."""
    size = 1024
    x, y = torch.randn(2, size, size)
    ways: list[Callable[[], object]] = [lambda: x @ y.t()]
    if micro.ONEDNN:
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], ""))
    return 2 * size**3 / min(statistics.median(timed(way) for _ in range(20)) for way in ways)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def optimizer_of(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0, betas=(0.9, 0.98), weight_decay=0, fused=True)


def plain_way(model: nn.Module, texts: list[list[int]]) -> Callable[[Sequence[int]], None]:
    parameters = list(model.parameters())
    optimizer = optimizer_of(parameters)

    def step(rows: Sequence[int]) -> None:
        chosen = [texts[row] for row in rows]
        longest = max(map(len, chosen))
        tokens = torch.full((len(chosen), longest), chosen[0][-1])
        labels = torch.full((len(chosen), longest), -100)
        for row, text in enumerate(chosen):
            tokens[row, : len(text)] = labels[row, : len(text)] = torch.tensor(text)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())

    return step


def micro_way(model: nn.Module, texts: list[list[int]]) -> Callable[[Sequence[int]], None]:
    made = micro.MicroModel(model, texts)
    optimizer = optimizer_of([made.weights])

    def step(rows: Sequence[int]) -> None:
        made.loss_and_gradient(rows)
        nn.utils.clip_grad_norm_([made.weights], 1.0)
        optimizer.step()

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    peak, problems = peak_of_this_core(), []
    print(
        f"{platform.processor()} {platform.platform()}; torch {torch.__version__}, 1 thread, "
        f"oneDNN {'used' if micro.ONEDNN else 'not there'}; peak {peak / 1e9:.0f} GFLOP/s; median "
        f"of {given.rounds} rounds of {SORTED_TOGETHER} steps"
    )
    print(
        f"{'model':<14} {'tokens':>6} {'way':<6} {'ms/step':>8} {'GFLOP/s':>8} {'of peak':>8} "
        f"{'times plain':>12}"
    )
    for name in given.models:
        model = load_zoo()[name]
        texts, tokenizer = zoo._corpus_and_tokenizer(model)
        encoded = zoo._encoded(tokenizer, texts)
        drawn = zoo._batches([len(text) for text in encoded], list(texts.values()), model.recipe)
        network = AutoModelForCausalLM.from_config(architecture(model.recipe)).train()
        ways = {"plain": plain_way(network, encoded), "micro": micro_way(network, encoded)}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        counted = []
        for number in range(given.rounds + 1):
            batches = list(itertools.islice(drawn, SORTED_TOGETHER))
            for way, step in ways.items():
                spent = timed(lambda step=step, batches=batches: [step(rows) for rows in batches])
                if number:  # the first makes the optimizer's state, and compiles kernels
                    seconds[way].append(spent / SORTED_TOGETHER)
            counted.append(sum(len(encoded[row]) for rows in batches for row in rows))
        tokens = statistics.mean(counted[1:]) / SORTED_TOGETHER
        # Round by round: a pair of neighbours in time is slowed alike.
        times = statistics.median(map(operator.truediv, seconds["plain"], seconds["micro"]))
        for way, spent in seconds.items():
            median = statistics.median(spent)
            flops = 6 * model.recipe.parameters * tokens / median
            print(
                f"{name:<14} {tokens:>6.0f} {way:<6} {median * 1e3:>8.2f} {flops / 1e9:>8.1f} "
                f"{flops / peak:>8.2f} {times if way == 'micro' else 1:>12.2f}"
            )
        if times < AT_LEAST:
            problems.append(f"{name}: {times:.2f} times as fast as the usual way, not {AT_LEAST}")
    for problem in problems:
        print(f"benchmark: {problem}", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
