"""The value vectors of a concept, and those that are masked as its controls.

    coefficients = record_concepts(view, tokenizer, questions)
    vectors = top_vectors(value_vector_scores(coefficients, "France"), ratio=0.05)

The score of a value vector is its mean absolute coefficient over a concept's questions minus its
mean over unrelated ones; the k highest are the concept's (paper, section 3, knowledge-vector
masking). The paper does not say which layers compete: `scope` is `layer` (k in every layer, the
default) or `model` (k times the number of layers, from the whole model).
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from paramspec.errors import InputError
from paramspec.method import hooks
from paramspec.method.batches import BATCH_TOKENS, in_batches, pad_right, prompt_batches
from paramspec.method.hooks import Position, ValueVectorView
from paramspec.models.tokens import prompt_ids
from paramspec.specwiki import Question

Scope = Literal["layer", "model"]


@dataclass(frozen=True)
class ConceptCoefficients:
    """Absolute coefficients, summed over the questions of each concept and fold.

    `sums` is fp32 `[concepts, 2, layers, width]`, `counts` `[concepts, 2]`. Coefficients of single
    questions would be 7 GB for a model of 7 billion parameters.
    """

    concepts: tuple[str, ...]
    sums: Tensor
    counts: Tensor

    def related(self, concept: str, folds: Sequence[int] = (0, 1)) -> Tensor:
        """Mean over the concept's own questions of these folds, `[layers, width]`."""
        row, folds = self.concepts.index(concept), list(folds)
        return self.sums[row, folds].sum(0) / self.counts[row, folds].sum()

    def unrelated(self, concept: str, folds: Sequence[int] = (0, 1)) -> Tensor:
        """Mean over the questions of all other concepts in these folds, `[layers, width]`."""
        row, folds = self.concepts.index(concept), list(folds)
        count = self.counts[:, folds].sum() - self.counts[row, folds].sum()
        if count == 0:
            raise InputError(f"{concept}: no other concept to compare with; give at least two")
        return (self.sums[:, folds].sum((0, 1)) - self.sums[row, folds].sum(0)) / count

    def most_active(self, share: float, folds: Sequence[int] = (0, 1)) -> Tensor:
        """This share of each layer, of the highest means over all questions: `[layers, width]`."""
        means = self.sums[:, list(folds)].sum((0, 1))
        places = means.topk(round(share * means.shape[1]), dim=1).indices
        return torch.zeros_like(means, dtype=torch.bool).scatter_(1, places, True)


def record_concepts(
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    position: Position = "mean",
    chat: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] = lambda done: None,
) -> ConceptCoefficients:
    """`coefficients = record_concepts(view, tokenizer, questions)`: run every question's cloze.

    >>> coefficients = record_concepts(view, tokenizer, questions)
    >>> coefficients.concepts
    ('alpha', 'beta', 'gamma')

    Args:
        questions: of at least two concepts.
        position: the tokens that count, see `record_coefficients`.
        chat: put the cloze into the model's chat template, see `prompt_ids`; all its tokens count.
        batch_tokens: tokens per forward pass, padding included; fewer where memory runs out.
        progress: called after each forward pass with its number of questions.

    Raises:
        InputError: if a cloze is longer than the model's context, or too long for memory.
    """
    concepts = tuple(dict.fromkeys(question.concept for question in questions))
    sums = torch.zeros(len(concepts), 2, view.layers, view.width)
    counts = torch.zeros(len(concepts), 2)
    rows = prompt_ids(tokenizer, [question.cloze for question in questions], chat=chat)
    names = [question.id for question in questions]
    record = partial(hooks.record_coefficients, position=position)
    for indices, found in _record_rows(view, rows, names, record, batch_tokens):
        for index, coefficients in zip(indices, found, strict=True):
            place = concepts.index(questions[index].concept), questions[index].fold
            sums[place] += coefficients
            counts[place] += 1
        progress(len(indices))
    return ConceptCoefficients(concepts, sums, counts)


def mean_coefficients(
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    signed: bool = False,
    chat: bool = False,
) -> Tensor:
    """`mean_coefficients(view, tokenizer, statements)`: fp32 `[layers, width]`, over any texts;
    absolute, unless `signed`. With `chat`, the texts are in the model's chat template.
    """
    total = torch.zeros(view.layers, view.width)
    names = ["a text"] * len(texts)
    record = partial(hooks.record_coefficients, signed=signed)
    rows = prompt_ids(tokenizer, texts, chat=chat)
    for _, found in _record_rows(view, rows, names, record, BATCH_TOKENS):
        total += found.sum(0)
    return total / len(texts)


@torch.no_grad()
def _record_rows(
    view: ValueVectorView,
    rows: Sequence[Sequence[int]],
    names: Sequence[str],
    record: Callable[[ValueVectorView, Tensor], AbstractContextManager[Tensor]],
    batch_tokens: int,
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Batch by batch: indices of rows, and their coefficients `[rows, layers, width]`."""
    batches = prompt_batches(rows, batch_tokens)
    for longest, *_ in batches[:1]:
        hooks.refuse_too_long(view, len(rows[longest]), names[longest])

    def forward(indices: Sequence[int], length: int) -> Tensor:
        tokens, attention_mask = pad_right([rows[index] for index in indices], length)
        device = view.embedding.device
        tokens, attention_mask = tokens.to(device), attention_mask.to(device)
        with (
            record(view, attention_mask) as recorded,
            hooks.unembed_only(view.model, torch.zeros(1, 2, dtype=torch.long)),
        ):
            view.model(input_ids=tokens, attention_mask=attention_mask, use_cache=False)
        return recorded.cpu()

    for indices, found in in_batches(batches, forward, lambda indices: len(rows[indices[0]])):
        for index, coefficients in zip(indices, found, strict=True):
            hooks.require_numbers(view, coefficients, f"{names[index]}: a coefficient")
        yield indices, found


def value_vector_scores(
    coefficients: ConceptCoefficients, concept: str, folds: Sequence[int] = (0, 1)
) -> Tensor:
    """`value_vector_scores(coefficients, "France")`: how specific each vector is to the concept.

    >>> coefficients = record_concepts(view, tokenizer, questions)
    >>> value_vector_scores(coefficients, "alpha").shape == (view.layers, view.width)
    True

    Returns:
        `[layers, width]`: mean absolute coefficient over the concept's questions minus the mean
        over those of all other concepts, on the given folds.
    """
    return coefficients.related(concept, folds) - coefficients.unrelated(concept, folds)


def top_vectors(scores: Tensor, ratio: float, scope: Scope = "layer") -> Tensor:
    """`top_vectors(scores, 0.05)`: the concept's value vectors, int32 `[n, 2]`, sorted.

    >>> scores = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.0, 0.3, 0.1, 0.4]])
    >>> top_vectors(scores, 0.25).tolist(), top_vectors(scores, 0.25, scope="model").tolist()
    ([[0, 1], [1, 3]], [[0, 1], [0, 2]])

    Args:
        scores: `[layers, width]`.
        ratio: the share of value vectors to take, from 0 to 1.
        scope: the highest of each `layer`, or of the whole `model`.
    """
    if scope not in ("layer", "model"):
        raise InputError(f"scope {scope!r}: expected 'layer' or 'model'")
    layers, width = scores.shape
    count = round(ratio * width)
    if scope == "model":
        scores, count = scores.reshape(1, -1), count * layers
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(1, scores.topk(count, dim=1).indices, True)
    return chosen.reshape(layers, width).nonzero().int()


def random_vectors(like: Tensor, layers: int, width: int, generator: torch.Generator) -> Tensor:
    """As many value vectors in each layer as `like` has, at random."""
    counts = torch.bincount(like[:, 0].long(), minlength=layers)
    chosen = torch.zeros(layers, width, dtype=torch.bool)
    for layer, count in enumerate(counts.tolist()):
        chosen[layer, torch.randperm(width, generator=generator)[:count]] = True
    return chosen.nonzero().int()


def magnitude_matched_vectors(
    like: Tensor, magnitudes: Tensor, generator: torch.Generator
) -> Tensor:
    """For each vector of `like`, in random order, the nearest in magnitude of its layer.

    `magnitudes` is `[layers, width]`. A vector in `like`, or taken already, is not taken; where too
    few are left, there are fewer.
    """
    layers, width = magnitudes.shape
    keep = keep_tensor(like, layers, width)
    chosen = torch.zeros_like(keep)
    for layer in range(layers):
        values = magnitudes[layer].tolist()
        free = sorted((values[index], index) for index in keep[layer].nonzero()[:, 0].tolist())
        wanted = (~keep[layer]).nonzero()[:, 0]
        for index in wanted[torch.randperm(len(wanted), generator=generator)].tolist():
            if not free:
                break
            place = bisect.bisect_left(free, (values[index], -1))
            if place == len(free) or (
                place > 0 and values[index] - free[place - 1][0] < free[place][0] - values[index]
            ):
                place -= 1
            chosen[layer, free.pop(place)[1]] = True
    return chosen.nonzero().int()


def keep_tensor(vectors: Tensor, layers: int, width: int) -> Tensor:
    """`keep_tensor(vectors, layers, width)`: bool `[layers, width]`, False where masked.

    >>> keep_tensor(torch.tensor([[0, 1], [1, 2]]), layers=2, width=3).tolist()
    [[True, False, True], [True, True, False]]
    """
    keep = torch.ones(layers, width, dtype=torch.bool)
    keep[vectors[:, 0].long(), vectors[:, 1].long()] = False
    return keep


def save_masks(path: Path, masks: Mapping[str, Tensor], choices: Mapping[str, Any]) -> None:
    """`save_masks(path, {mask_name(...): vectors}, choices)`: in a directory published whole."""
    metadata = {name: json.dumps(value) for name, value in choices.items()}
    tensors = {name: vectors.contiguous() for name, vectors in masks.items()}
    # Without tensors and metadata, `save_file` would make a file that nothing reads.
    save_file(tensors, path, metadata if tensors else metadata or None)


def load_masks(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`masks, choices = load_masks(path)`, as `save_masks` was given them."""
    with safetensors.safe_open(path, framework="pt") as file:
        masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        choices = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
    return masks, choices
