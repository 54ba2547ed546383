"""Score questions: option log-likelihoods and generated answers, with or without masks.

    items = [encode(tokenizer, question) for question in questions]
    scores = score_options(view, [Request(item, mask=0) for item in items], keeps)
    predicted = [choose(score, question.options) for ...]

The definitions are lm-evaluation-harness's: the log-likelihood of an option is the sum over its
tokens, given the cloze and a space; `acc` takes the option with the highest sum, `acc_norm` the
one with the highest sum per character.

**How a forward pass is filled.** Each needed token is computed once. The token sequences that
share a mask are merged into a *forest*: a node a token, a path from a root for each sequence, so
that equal beginnings (a question's prompt under its four options, a template under two questions)
are one path. A forest is one row of a batch:

    The capital of France is -+- Par -(is)        row    The capital of France is Par Br Ly
              |               +- Br -uss -(els)   depth   0    1     2    3    4   5  5  5 ...
              |               +- Ly -(on)         sees   its ancestors and itself, nothing else
              +- of Spain is ...

The last token of an option (in brackets) is predicted, never read, so it is not in the row. The
position of a token is its depth, and it attends to its ancestors, so that every path is computed
as if it stood alone. Rows are filled up to a token budget, and the unembedding runs only where a
prediction is read off. A model that cannot take such a row (learnt from a test forward, see
`choose_engine`) is scored one sequence a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from paramspec.batches import in_batches
from paramspec.errors import InputError
from paramspec.hooks import (
    ValueVectorView,
    mask_value_vectors,
    refuse_too_long,
    unembed_only,
)
from paramspec.specwiki import Question, normalise

# Raised whenever a change could move a score; part of every result's key.
SCORING_VERSION = 1


@dataclass(frozen=True)
class Item:
    """A question in tokens: the prompt, and the tokens of each option after it."""

    context: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]


class Request(NamedTuple):
    """Score `item` under mask number `mask` of the masks given beside the requests."""

    item: Item
    mask: int


def encode(tokenizer: PreTrainedTokenizerBase, question: Question) -> Item:
    """`item = encode(tokenizer, question)`: the cloze, a space, and each option.

    The prompt and an option are encoded together and then split at the length of the prompt
    alone, as lm-evaluation-harness does, so that the space belongs to the option.
    """
    context = tokenizer.encode(question.cloze)
    options = []
    for option in question.options:
        whole = tokenizer.encode(f"{question.cloze} {option}")
        if len(whole) <= len(context):
            raise InputError(
                f"{question.id}: option {option!r} adds no token to the cloze {question.cloze!r}"
            )
        options.append(tuple(whole[len(context) :]))
    return Item(tuple(context), tuple(options))


class Choice(NamedTuple):
    """The option chosen by the sum (`acc`) and by the sum over characters (`acc_norm`)."""

    by_sum: int
    by_characters: int


def choose(log_likelihoods: Sequence[float], options: Sequence[str]) -> Choice:
    """`choose([-3.1, -2.0, ...], question.options)`: the predicted option, both ways."""
    sums = np.asarray(log_likelihoods, dtype=float)
    characters = np.array([len(option) for option in options], dtype=float)
    return Choice(int(sums.argmax()), int((sums / characters).argmax()))


# --- engines ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """How rows are filled: `packed` forests, or one sequence a row (`plain`), and why."""

    name: Literal["packed", "plain"]
    reason: str
    longest: int | None = None  # a path longer than this is scored plainly


def choose_engine(view: ValueVectorView) -> Engine:
    """`engine = choose_engine(view)`: packed rows if the model computes them correctly.

    Decided by a test: a forest that branches at every depth is scored packed and plain. Models
    whose attention is biased by distances that position ids do not set (BLOOM, MPT) fail it. A
    sliding window is no obstacle while no path is longer than the window.
    """
    attention = getattr(view.model.config, "_attn_implementation", None)
    if attention not in ("eager", "sdpa"):
        return Engine("plain", f"attention implementation {attention!r} takes no tree mask")
    config = view.model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (12,), generator=generator).tolist()
    context, rest = tuple(tokens[:4]), tokens[4:]
    items = [
        Item(context, ((rest[0], rest[1], rest[2]), (rest[0], rest[3]), (rest[4],))),
        Item(context[:2], ((rest[5], rest[6], rest[7]), (rest[6], rest[0], rest[1]))),
    ]
    requests = [Request(item, 0) for item in items]
    packed = Engine("packed", "verified by a test forward", window)
    try:
        actual = torch.cat(score_options(view, requests, [None], engine=packed))
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        return Engine("plain", f"a packed row failed: {str(error).splitlines()[0][:120]}")
    plain = Engine("plain", "reference")
    expected = torch.cat(score_options(view, requests, [None], engine=plain))
    error = float((actual - expected).abs().max())
    tolerance = 1e-3 if view.modules[0].weight.dtype == torch.float32 else 0.2
    if not error <= tolerance:
        return Engine("plain", f"packed rows differ from plain ones by {error:.2g} nats")
    return packed


# --- rows ---------------------------------------------------------------------------------------


class Read(NamedTuple):
    """Add the log-probability of `token` after node `place` to an option of a request."""

    place: int
    token: int
    request: int
    option: int


@dataclass
class Row:
    """A forest of tokens under one mask. `parents[i] < i`, or -1 at a root."""

    mask: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def missing(self, paths: Sequence[Sequence[int]]) -> int:
        """How many nodes the row would grow by, at most, with these paths."""
        total = 0
        for path in paths:
            node = -1
            for done, token in enumerate(path):
                node = self._children.get((node, token), None)
                if node is None:
                    total += len(path) - done
                    break
        return total

    def add(self, request: int, item: Item) -> None:
        for option, tokens in enumerate(item.options):
            node = -1
            for place, token in enumerate((*item.context, *tokens)):
                if place >= len(item.context):
                    self.reads.append(Read(node, token, request, option))
                if place < len(item.context) + len(tokens) - 1:
                    node = self._step(node, token)

    def _step(self, node: int, token: int) -> int:
        child = self._children.get((node, token))
        if child is None:
            child = self._children[node, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(node)
            self.depths.append(0 if node < 0 else self.depths[node] + 1)
        return child

    def sees(self) -> np.ndarray:
        """Bool `[tokens, tokens]`: whether a token attends to another: itself and ancestors."""
        sees = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        return sees


def _paths(item: Item) -> list[tuple[int, ...]]:
    return [item.context + option[:-1] for option in item.options]


def _packed_rows(numbered: list[tuple[int, Request]], row_tokens: int) -> Iterator[Row]:
    """Forests of at most `row_tokens` tokens (more if one question alone needs them)."""
    row = None
    for number, request in sorted(numbered, key=lambda pair: (pair[1].mask, pair[1].item.context)):
        full = row and len(row.tokens) + row.missing(_paths(request.item)) > row_tokens
        if row is None or row.mask != request.mask or full:
            if row is not None:
                yield row
            row = Row(request.mask)
        row.add(number, request.item)
    if row is not None:
        yield row


def _plain_rows(numbered: list[tuple[int, Request]]) -> Iterator[Row]:
    """A row for each option."""
    for number, request in numbered:
        for index, option in enumerate(request.item.options):
            row = Row(request.mask)
            row.add(number, Item(request.item.context, (option,)))
            row.reads = [read._replace(option=index) for read in row.reads]
            yield row


def fill_rows(
    requests: Sequence[Request], engine: Engine, row_tokens: int
) -> tuple[list[Row], list[Row]]:
    """`packed, plain = fill_rows(requests, engine, 128)`: the rows that score the requests.

    No row holds two masks, so the requests of one mask give the same rows whatever stands beside
    them.
    """
    numbered = list(enumerate(requests))
    packed, plain = numbered, []
    if engine.name == "plain":
        packed, plain = [], numbered
    elif engine.longest is not None:
        fits = [max(map(len, _paths(r.item))) <= engine.longest for _, r in numbered]
        packed = [pair for pair, fit in zip(numbered, fits, strict=True) if fit]
        plain = [pair for pair, fit in zip(numbered, fits, strict=True) if not fit]
    return list(_packed_rows(packed, row_tokens)), list(_plain_rows(plain))


def row_batches(rows: list[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Rows of like length together, longest first, so that memory runs out at once or never."""
    rows = sorted(rows, key=lambda row: -len(row.tokens))
    start = 0
    while start < len(rows):
        size = max(1, batch_tokens // len(rows[start].tokens))
        yield rows[start : start + size]
        start += size


# --- scoring ------------------------------------------------------------------------------------


@torch.no_grad()
def score_options(
    view: ValueVectorView,
    requests: Sequence[Request],
    keeps: Sequence[Tensor | None],
    *,
    engine: Engine | None = None,
    row_tokens: int = 128,
    batch_tokens: int = 2048,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """`scores = score_options(view, requests, keeps)`: log-likelihoods of every option.

    Args:
        view: the model's value vectors.
        requests: what to score; a batch mixes masks.
        keeps: the masks that `Request.mask` counts, bool `[layers, width]`, False where masked,
            or None for no mask.
        engine: from `choose_engine`; chosen here if not given.
        row_tokens: tokens of a packed row.
        batch_tokens: tokens of a forward pass; fewer where memory does not suffice.
        progress: called with the number of requests that each forward pass begins with.

    Returns:
        For each request an fp32 tensor `[options]`, in nats, on the CPU.

    Raises:
        InputError: if a budget is not positive, if a question is longer than the context, if one
            row does not fit into memory, or if the model gives no numbers (damaged weights, an
            overflow).
    """
    for name, value in (("row_tokens", row_tokens), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise InputError(f"{name} {value}: expected at least 1")
    longest = max((max(map(len, _paths(request.item))) for request in requests), default=0)
    refuse_too_long(view, longest)
    engine = engine or choose_engine(view)
    scores = [torch.zeros(len(request.item.options)) for request in requests]
    packed, plain = fill_rows(requests, engine, row_tokens)
    for rows, tree in ((packed, True), (plain, False)):
        batches = in_batches(
            row_batches(rows, batch_tokens),
            lambda batch, tree=tree: _forward(view, batch, keeps, tree),
            tokens=lambda batch: len(batch) * max(len(row.tokens) for row in batch),
        )
        for batch, values in batches:
            reads = [read for row in batch for read in row.reads]
            for read, value in zip(reads, values, strict=True):
                scores[read.request][read.option] += value
            progress(sum({read.request: 1 for read in reads if read.option == 0}.values()))
    if not all(bool(score.isfinite().all()) for score in scores):
        raise InputError(
            f"{type(view.model).__name__}: a log-likelihood is not a finite number; the weights "
            "are damaged, or their dtype overflows: try float32"
        )
    return scores


def _forward(
    view: ValueVectorView, rows: list[Row], keeps: Sequence[Tensor | None], tree: bool
) -> list[float]:
    """One forward pass over a batch of rows; the log-probability of each read, in order."""
    device = view.model.get_input_embeddings().weight.device
    length = max(len(row.tokens) for row in rows)
    tokens = np.zeros((len(rows), length), dtype=np.int64)
    depths = np.zeros_like(tokens)
    sees = np.zeros((len(rows), 1, length, length), dtype=bool)
    sees[:] = np.eye(length, dtype=bool)  # padding sees itself
    for index, row in enumerate(rows):
        size = len(row.tokens)
        tokens[index, :size] = row.tokens
        depths[index, :size] = row.depths
        if tree:
            sees[index, 0, :size, :size] = row.sees()
    inputs = {"input_ids": torch.from_numpy(tokens).to(device)}
    if tree:
        # Eager attention adds its mask: a boolean one would be silently wrong.
        dtype = view.model.get_input_embeddings().weight.dtype
        bias = torch.zeros(sees.shape, dtype=dtype)
        bias.masked_fill_(torch.from_numpy(~sees), torch.finfo(dtype).min)
        inputs |= {"attention_mask": bias.to(device)}
        inputs |= {"position_ids": torch.from_numpy(depths).to(device)}
    else:
        sizes = torch.tensor([len(row.tokens) for row in rows])
        inputs |= {"attention_mask": (torch.arange(length) < sizes[:, None]).long().to(device)}

    where = [(index, read.place) for index, row in enumerate(rows) for read in row.reads]
    targets = [read.token for row in rows for read in row.reads]
    places, inverse = np.unique(np.array(where), axis=0, return_inverse=True)
    with _row_masks(view, rows, keeps), unembed_only(view.model, torch.from_numpy(places)):
        logits = view.model(**inputs, use_cache=False).logits[0]
    log_normalizers = torch.cat([part.float().logsumexp(-1) for part in logits.split(256)])
    inverse = torch.from_numpy(inverse.reshape(-1)).to(logits.device)
    read = logits[inverse, torch.tensor(targets, device=logits.device)].float()
    return (read - log_normalizers[inverse]).cpu().tolist()


def _row_masks(view: ValueVectorView, rows: list[Row], keeps: Sequence[Tensor | None]):
    if all(keeps[row.mask] is None for row in rows):
        return nullcontext()
    everything = torch.ones(view.layers, view.width, dtype=torch.bool)
    chosen = [everything if keeps[row.mask] is None else keeps[row.mask] for row in rows]
    return mask_value_vectors(view, torch.stack(chosen, dim=1))


@torch.no_grad()
def score_one_at_a_time(view: ValueVectorView, item: Item, keep: Tensor | None = None) -> Tensor:
    """`score_one_at_a_time(view, item)`: the reference that every engine is held against.

    One option a forward pass, no padding, all logits, as lm-evaluation-harness defines it.

    Returns:
        fp32 `[options]`, in nats.
    """
    scores = []
    for option in item.options:
        tokens = torch.tensor([item.context + option], device=view.model.device)
        masked = nullcontext() if keep is None else mask_value_vectors(view, keep[:, None])
        with masked:
            logits = view.model(input_ids=tokens[:, :-1], use_cache=False).logits[0].float()
        log_probabilities = logits.log_softmax(-1)[-len(option) :]
        scores.append(log_probabilities.gather(1, tokens[0, -len(option) :, None]).sum().cpu())
    return torch.stack(scores)


# --- open-ended ---------------------------------------------------------------------------------

# Three examples show that a bare answer is wanted; without them, models answer in sentences, or
# stop at once. They are about no concept of SpecWiki.
OPEN_PROMPT = """\
Question: Who painted the Mona Lisa?
Answer: Leonardo da Vinci

Question: Which instrument has 88 keys?
Answer: the piano

Question: In which year was the Battle of Waterloo?
Answer: 1815

Question: {question}
Answer:"""


def generate_answers(
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    keeps: Sequence[Tensor | None] | None = None,
    *,
    prompt: str = OPEN_PROMPT,
    max_new_tokens: int = 12,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """`answers = generate_answers(view, tokenizer, ["What is the capital of France?"])`.

    Greedy decoding of the first line after the prompt, each question under its own mask.

    Args:
        keeps: a mask for each question, bool `[layers, width]` or None; no masks if not given.
        prompt: holds `{question}`.

    Returns:
        The answers, stripped, in the order of the questions.
    """
    decoded = decode(
        view,
        tokenizer,
        [prompt.replace("{question}", question) for question in questions],
        likeliest,
        keeps=keeps,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    return first_lines(tokenizer, [row.tokens for (row,) in decoded])


def first_lines(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """`first_lines(tokenizer, tokens)`: each answer in words, up to the end of its line."""
    texts = tokenizer.batch_decode(list(rows), skip_special_tokens=True)
    return [text.strip().split("\n")[0].strip() for text in texts]


@dataclass
class Decoded:
    """What was generated after a prompt.

    Attributes:
        tokens: up to and with the one that ended it, by ending the text or the line.
        log_likelihood: of these tokens, in nats, whatever they were picked by.
        state: `[hidden]`, fp32: what the last of them was predicted from, the unembedding's input
            at the token before it. Of an answer that has ended, its last token's.
    """

    tokens: list[int] = field(default_factory=list)
    log_likelihood: float = 0.0
    state: Tensor | None = None


@torch.no_grad()
def decode(
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    pick: Callable[[int, list[int], Tensor], Tensor],
    *,
    copies: int = 1,
    keeps: Sequence[Tensor | None] | None = None,
    max_new_tokens: int = 12,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[Decoded]]:
    """`decode(view, tokenizer, prompts, likeliest)`: the first line of an answer to each.

    Each needed token is computed once: the beginning that all prompts share for all of them (where
    none is masked), the rest of a prompt for all its copies, and nothing after an answer's end.
    Prompts of one length go together and none is padded, so that a sliding window reaches as far
    back as it should.

    Args:
        pick: given a prompt's number, those of its copies that go on, and fp32 logits `[copies
            that go on, vocabulary]`, the tokens to go on with.
        copies: answers to each prompt.
        keeps: as in `generate_answers`.
        batch_size: rows of a forward pass, `copies` to a prompt; at least one prompt's.

    Returns:
        The copies of each prompt.

    Raises:
        InputError: if a prompt and its answer are longer than the model's context.
    """
    keeps = [None] * len(prompts) if keeps is None else keeps
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    refuse_too_long(view, max(map(len, encoded), default=0) + max_new_tokens)
    masked = any(keep is not None for keep in keeps)
    shared = 0 if masked else _shared_beginning(encoded)
    beginning = DynamicCache(config=view.model.config.get_text_config(decoder=True))
    if shared:
        _extend(view, torch.tensor([encoded[0][:shared]]), beginning)
    answers = [[Decoded() for _ in range(copies)] for _ in prompts]
    for part in _equally_long(encoded, max(1, batch_size // copies)):
        cache = deepcopy(beginning)
        if shared:
            cache.batch_repeat_interleave(len(part))
        rest = torch.tensor([encoded[index][shared:] for index in part])
        with _row_masks(view, [Row(mask=index) for index in part], keeps):
            logits, states = _extend(view, rest, cache)
        cache.batch_repeat_interleave(copies)
        logits, states = (each.repeat_interleave(copies, dim=0) for each in (logits, states))
        rows = [(index, copy) for index in part for copy in range(copies)]  # those that go on
        for _ in range(max_new_tokens):
            tokens = []
            for index, group in itertools.groupby(rows, key=lambda row: row[0]):
                going = [copy for _, copy in group]
                own = logits[len(tokens) : len(tokens) + len(going)]
                tokens += pick(index, going, own).tolist()
            chosen = logits.log_softmax(-1)[range(len(rows)), tokens].tolist()
            for place, (index, copy) in enumerate(rows):
                answer = answers[index][copy]
                answer.tokens.append(tokens[place])
                answer.log_likelihood += chosen[place]
                answer.state = states[place]
            on = [
                place
                for place, (index, copy) in enumerate(rows)
                if not _has_ended(view, tokenizer, answers[index][copy].tokens)
            ]
            if not on:
                break
            if len(on) < len(rows):
                cache.batch_select_indices(torch.tensor(on, device=logits.device))
                rows = [rows[place] for place in on]
            with _row_masks(view, [Row(mask=index) for index, _ in rows], keeps):
                last = torch.tensor([tokens[place] for place in on])
                logits, states = _extend(view, last[:, None], cache)
        progress(len(part))
    return answers


def likeliest(index: int, copies: list[int], logits: Tensor) -> Tensor:
    """`decode(..., pick=likeliest)`: greedy."""
    return logits.argmax(-1)


def _extend(view: ValueVectorView, rows: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor]:
    """Each row's logits, fp32, and hidden state at its last token; the cache grows by the rows."""
    device = view.model.get_input_embeddings().weight.device
    last = torch.tensor([(row, rows.shape[1] - 1) for row in range(len(rows))])
    seen = torch.ones(len(rows), cache.get_seq_length() + rows.shape[1], dtype=torch.long)
    states: list[Tensor] = []
    with unembed_only(view.model, last), ExitStack() as stack:
        hook = view.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: states.append(args[0][0].float().cpu())
        )
        stack.callback(hook.remove)
        logits = view.model(
            input_ids=rows.to(device),
            attention_mask=seen.to(device),
            past_key_values=cache,
            use_cache=True,
        ).logits[0]
    return logits.float(), states[0]


def _shared_beginning(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with; each has one more, at least."""
    most = min(map(len, rows), default=1) - 1
    return next((n for n in range(most) if len({row[n] for row in rows}) > 1), most)


def _equally_long(rows: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Indices of rows of one length, up to `most` together, the longest first."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    for _, group in itertools.groupby(order, key=lambda index: len(rows[index])):
        members = list(group)
        yield from (members[start : start + most] for start in range(0, len(members), most))


def _has_ended(
    view: ValueVectorView, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]
) -> bool:
    """Whether a text or its first line has ended; space before the first word does not count."""
    ends = view.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if tokens[-1] in (*ends, tokenizer.eos_token_id):
        return True
    return "\n" in tokenizer.decode(tokens, skip_special_tokens=True).lstrip()


def answer_matches(answer: str, aliases: Sequence[str]) -> bool:
    """`answer_matches("The Paris.", ["Paris"])`: SQuAD's exact match against any alias."""
    return normalise(answer) in {normalise(alias) for alias in aliases}
