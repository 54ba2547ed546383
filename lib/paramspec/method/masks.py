"""The value vectors of a concept, and those that are masked as its controls.

    coefficients = record_concepts(view, tokenizer, questions)
    vectors = top_vectors(value_vector_scores(coefficients, "France"), ratio=0.05)

The score of a value vector is its mean absolute coefficient over a concept's questions minus its
mean over unrelated ones; the k highest are the concept's (paper, section 3, knowledge-vector
masking). The paper does not say which layers compete: `scope` is `layer` (k in every layer, the
default) or `model` (k times the number of layers, from the whole model).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import torch
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
    _totals: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def related(self, concept: str, folds: Sequence[int] = (0, 1)) -> Tensor:
        """Mean over the concept's own questions of these folds, `[layers, width]`."""
        row, folds = self.concepts.index(concept), list(folds)
        return self.sums[row, folds].sum(0) / self.counts[row, folds].sum()

    def unrelated(self, concept: str, folds: Sequence[int] = (0, 1)) -> Tensor:
        """Mean over the questions of all other concepts in these folds, `[layers, width]`."""
        row, own = self.concepts.index(concept), list(folds)
        count = self.counts[:, own].sum() - self.counts[row, own].sum()
        if count == 0:
            raise InputError(f"{concept}: no other concept to compare with; give at least two")
        return (self.total(folds) - self.sums[row, own].sum(0)) / count

    def total(self, folds: Sequence[int] = (0, 1)) -> Tensor:
        """Sum over all questions of these folds, `[layers, width]`; added up once."""
        folds = tuple(folds)
        if folds not in self._totals:
            self._totals[folds] = self.sums[:, list(folds)].sum((0, 1))
        return self._totals[folds]

    def most_active(self, share: float, folds: Sequence[int] = (0, 1)) -> Tensor:
        """This share of each layer, of the highest means over all questions: `[layers, width]`."""
        means = self.total(folds)
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
    like: Tensor, ascending: Tensor, generator: torch.Generator
) -> Tensor:
    """As many value vectors in each layer, none of `like`, that are nearest in magnitude.

    `ascending` is int64 `[layers, width]`, `magnitudes.argsort(dim=1, stable=True)`. Of all ways to
    pair each vector of `like` with one of its own, the squared distances in rank are least. A tenth
    of the vectors is left out at random, so that draws differ; where too few are left, all of them
    are taken.
    """
    from scipy.optimize import isotonic_regression  # takes half a second

    layers, width = ascending.shape
    keep = keep_tensor(like, layers, width).gather(1, ascending).numpy()
    drawn = torch.rand(layers, width, generator=generator).numpy()
    chosen = torch.zeros(layers, width, dtype=torch.bool)
    for layer, order in enumerate(ascending):
        free, wanted = keep[layer], np.flatnonzero(~keep[layer])
        spared = max(0, min(free.sum() // 10, free.sum() - len(wanted)))
        free = free & ~_lowest(np.where(free, drawn[layer], 1), spared)
        places, pairs = np.flatnonzero(free), np.arange(min(len(wanted), free.sum()))
        # Between two free vectors, the rank is that of neither: a half less than the upper's.
        ranks = (np.cumsum(free)[wanted] - 0.5)[: len(pairs)]
        # Ranks that rise by one or more at each step are those that never fall, less the steps.
        level = isotonic_regression(ranks - pairs).x if len(pairs) else ranks
        level = np.ceil(level - 0.5).clip(0, len(places) - len(pairs)).astype(int)
        chosen[layer, order[places[level + pairs]]] = True
    return chosen.nonzero().int()


def _lowest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the lowest values are, `count` of them."""
    found = np.zeros(len(values), dtype=bool)
    found[np.argpartition(values, count)[:count]] = True
    return found


def keep_tensor(vectors: Tensor, layers: int, width: int) -> Tensor:
    """`keep_tensor(vectors, layers, width)`: bool `[layers, width]`, False where masked.

    >>> keep_tensor(torch.tensor([[0, 1], [1, 2]]), layers=2, width=3).tolist()
    [[True, False, True], [True, True, False]]
    """
    keep = torch.ones(layers, width, dtype=torch.bool)
    keep[vectors[:, 0].long(), vectors[:, 1].long()] = False
    return keep


def save_masks(
    path: Path,
    shapes: Mapping[str, tuple[int, int]],
    masks: Iterable[Tensor],
    choices: Mapping[str, Any],
) -> None:
    """`save_masks(path, {mask_name(...): (layers, width)}, [vectors], choices)`: a file of
    safetensors, uint8 `[layers, ceil(width / 8)]`, a bit for each value vector, the first highest.

    It is written mask by mask, which the library's own `save_file` cannot: those of a study of 7
    billion parameters would be gigabytes.
    """
    header: dict[str, Any] = {}
    if choices:
        header["__metadata__"] = {name: json.dumps(value) for name, value in choices.items()}
    end = 0
    for name, (layers, width) in shapes.items():
        start, end = end, end + layers * math.ceil(width / 8)
        shape, place = [layers, math.ceil(width / 8)], [start, end]
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (layers, width), vectors in zip(shapes.values(), masks, strict=True):
            masked = ~keep_tensor(vectors, layers, width).numpy()
            file.write(np.packbits(masked, axis=1).tobytes())


def load_masks(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`masks, choices = load_masks(path)`, as `save_masks` was given them: int32 `[n, 2]` each."""
    with safetensors.safe_open(path, framework="np") as file:
        masks = {name: _unpacked(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        choices = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
    return masks, choices


def _unpacked(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(np.argwhere(np.unpackbits(bits, axis=1))).int()
