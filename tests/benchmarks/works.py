"""What the benchmarks score, and what no way of scoring it can leave out.

work = masked(view, tokenizer, load_questions(concepts=30), ratios=[0.01], general=10)
needed(work.requests).flops(model)
timed(lambda: score(work))                  # seconds
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from paramspec.method.hooks import ValueVectorView
from paramspec.method.pss import Choices, asked_questions
from paramspec.method.rows import Item, Request
from paramspec.method.scoring import encode
from paramspec.specwiki import Question


def timed(work: Callable[[], object]) -> float:
    """`timed(work)`: the seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Work:
    """What every contender scores.

    `Request.mask` counts `keeps`: bool `[layers, width]`, False where masked, or None for no mask.
    `options` are the texts of each request's options, to choose between them by characters.
    """

    name: str
    requests: Sequence[Request]
    keeps: Sequence[Tensor | None] = (None,)
    options: Sequence[Sequence[str]] = field(default=(), repr=False)

    def only(self, indices: Sequence[int]) -> Work:
        """`work.only(range(8))`: some of the requests, under the same masks."""
        requests = [self.requests[index] for index in indices]
        return replace(self, requests=requests, options=[self.options[index] for index in indices])

    @property
    def size(self) -> int:
        """How many options are scored."""
        return sum(len(request.item.options) for request in self.requests)


def spread(questions: Sequence[Question], count: int) -> Sequence[Question]:
    """`spread(questions, 40)`: evenly over all of them."""
    return questions[:: len(questions) // count][:count]


def unmasked(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]] = (),
) -> Work:
    """`unmasked(tokenizer, questions)`: without a mask, each behind a prompt's tokens, if any."""
    items = [encode(tokenizer, question) for question in questions]
    pairs = zip(items, prompts or [()] * len(items), strict=True)
    requests = [Request(Item((*own, *item.context), item.options), 0) for item, own in pairs]
    return Work("unmasked", requests, options=[question.options for question in questions])


def masked(
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    ratios: Sequence[float],
    general: int,
) -> Work:
    """`masked(view, tokenizer, questions, [0.01], 10)`: each concept under a mask per ratio.

    A mask is scored on the concept's own questions and on general ones. Its vectors are random:
    any others cost the same.
    """
    choices, draw = Choices(ratios=tuple(ratios), general=general), torch.Generator().manual_seed(0)
    items = {question.id: encode(tokenizer, question) for question in questions}
    requests, keeps, options = [], [], []
    for concept in dict.fromkeys(question.concept for question in questions):
        asked = [question for question, _ in asked_questions(questions, concept, choices)]
        for ratio in ratios:
            requests += [Request(items[question.id], len(keeps)) for question in asked]
            options += [question.options for question in asked]
            rank = torch.rand(view.layers, view.width, generator=draw).argsort(1).argsort(1)
            keeps.append(rank >= max(1, round(ratio * view.width)))
    return Work("masked", requests, keeps, options)


class Needed(NamedTuple):
    """What no way of scoring can leave out: `needed(requests).flops(model)`.

    `tokens` are distinct beginnings of the token sequences under a mask, each computed once;
    `pairs` are of such a token and one that it attends to, its ancestors and itself; `unembedded`
    are distinct places at which an option's token is predicted.
    """

    tokens: int
    pairs: int
    unembedded: int

    def flops(self, model: PreTrainedModel) -> int:
        """Of products of matrices, two per weight and token."""
        config, unembedding = model.config, model.get_output_embeddings().weight.numel()
        linear = [part for part in model.modules() if isinstance(part, nn.Linear | Conv1D)]
        projections = sum(part.weight.numel() for part in linear) - unembedding
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        # Of a pair, queries with keys, and their weights with values.
        pair = 4 * config.num_hidden_layers * width
        return 2 * self.tokens * projections + self.pairs * pair + 2 * self.unembedded * unembedding


def needed(requests: Sequence[Request]) -> Needed:
    """`needed(work.requests).tokens`: no padding, nothing twice.

    Masks are counted apart, though up to the first layer's value vectors they need the same.
    """
    beginnings, read = set(), set()
    for item, mask in requests:
        for option in item.options:
            path = item.context + option
            beginnings |= {(mask, path[:end]) for end in range(1, len(path))}
            read |= {(mask, path[:end]) for end in range(len(item.context), len(path))}
    return Needed(len(beginnings), sum(len(path) for _, path in beginnings), len(read))
