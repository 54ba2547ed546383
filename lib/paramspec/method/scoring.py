"""Score questions: the log-likelihood of every option, with or without masks.

    items = [encode(tokenizer, question) for question in questions]
    scores = score_options(view, [Request(item, mask=0) for item in items], keeps)
    predicted = [choose(score, question.options) for ...]

The definitions are lm-evaluation-harness's: the log-likelihood of an option is the sum over its
tokens, given the cloze and a space; `acc` takes the option with the highest sum, `acc_norm` the
one with the highest sum per character.

How little of that has to be computed, `rows` tells. A model that cannot take such a row (learnt
from a test forward, see `choose_engine`) is scored one sequence a row. The unembedding runs only
where a prediction is read off, a block of the vocabulary at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from paramspec.errors import InputError, naming
from paramspec.execution.limits import OutOfMemory, is_out_of_memory
from paramspec.method.batches import BATCH_TOKENS, in_batches
from paramspec.method.hooks import (
    ValueVectorView,
    mask_rows,
    refuse_too_long,
    unembed_only,
)
from paramspec.method.kernels import packed_layers
from paramspec.method.rows import (
    READ_MULTIPLE,
    ROW_MULTIPLE,
    ROW_TOKENS,
    Cell,
    Engine,
    Item,
    Request,
    Row,
    branches_within,
    cell_batches,
    fill_rows,
    round_up,
)
from paramspec.models.tokens import token_ids
from paramspec.specwiki import Question

# Raised whenever a change could move a score; part of every result's key.
SCORING_VERSION = 4

# Two scores are a tie if they differ by no more than this share of them: by float32's rounding.
TIE = 1e-6

# Logits that are in memory at once, of each place that is read off.
VOCABULARY_BLOCK = 4096


def encode(tokenizer: PreTrainedTokenizerBase, question: Question) -> Item:
    """`item = encode(tokenizer, question)`: the cloze, a space, and each option.

    >>> item = encode(tokenizer, questions[0])
    >>> len(item.options)
    4

    The prompt and an option are encoded together and then split at the length of the prompt
    alone, as lm-evaluation-harness does, so that the space belongs to the option.

    Raises:
        InputError: if the tokenizer cannot read a text (see `token_ids`), if an option has no
            tokens of its own, or if two options have the same ones.
    """
    texts = [question.cloze, *(f"{question.cloze} {option}" for option in question.options)]
    with naming(question.id):
        context, *wholes = token_ids(tokenizer, texts)
    named: dict[tuple[int, ...], list[str]] = {}
    for option, whole in zip(question.options, wholes, strict=True):
        if len(whole) <= len(context):
            raise InputError(
                f"{question.id}: option {option!r} adds no token to the cloze {question.cloze!r}"
            )
        before = whole[: len(context)]
        # Either side may have the space between them, but no letter may be on the wrong one.
        if before != context and _spelled(tokenizer, before) != _spelled(tokenizer, context):
            raise InputError(
                f"{question.id}: the tokenizer joins the end of the cloze with the start of option "
                f"{option!r}, which cannot be scored by itself then; word one of them differently"
            )
        named.setdefault(tuple(whole[len(context) :]), []).append(option)
    for tokens, alike in named.items():
        if len(alike) > 1:
            shown = " ".join(map(str, tokenizer.convert_ids_to_tokens(list(tokens))))
            raise InputError(
                f"{question.id}: options {', '.join(map(repr, alike))} are the same tokens to this "
                f"tokenizer ({shown}), so the model cannot tell them apart; leave the question "
                "out, or use a model whose tokenizer has these characters"
            )
    return Item(tuple(context), tuple(named), question.id)


def _spelled(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)).rstrip()


class Choice(NamedTuple):
    """The option chosen by the sum (`acc`) and by the sum over characters (`acc_norm`)."""

    by_sum: int
    by_characters: int


def choose(log_likelihoods: Sequence[float], options: Sequence[str]) -> Choice:
    """`choose([-3.1, -2.0, ...], question.options)`: the predicted option, both ways.

    Of options that tie, the first.

    Raises:
        InputError: if a log-likelihood is not a number.
    """
    by_sum, by_characters = _best(log_likelihoods, options)
    return Choice(by_sum[0], by_characters[0])


def mark(log_likelihoods: Sequence[float], question: Question) -> dict[str, float]:
    """`mark(score.tolist(), question)`: the predicted options, and whether they are right.

    Returns:
        `predicted` and `predicted_norm`, from `choose`; `correct` and `correct_norm`, 1 where that
        option is the answer and 0 where it is not; where the answer ties with others, its share of
        them: 1/n of n options.
    """
    by_sum, by_characters = _best(log_likelihoods, question.options)
    return {
        "predicted": by_sum[0],
        "predicted_norm": by_characters[0],
        "correct": (question.answer in by_sum) / len(by_sum),
        "correct_norm": (question.answer in by_characters) / len(by_characters),
    }


def _best(log_likelihoods: Sequence[float], options: Sequence[str]) -> tuple[list[int], list[int]]:
    """The options with the highest sum, and those with the highest sum over characters."""
    sums = np.asarray(log_likelihoods, dtype=float)
    if np.isnan(sums).any():
        raise InputError(f"log-likelihoods {sums.tolist()}: not all are numbers")
    characters = np.array([len(option) for option in options], dtype=float)
    by_sum, by_characters = (
        np.flatnonzero(values >= values.max() - TIE * abs(values.max())).tolist()
        for values in (sums, sums / characters)
    )
    return by_sum, by_characters


# --- scoring ------------------------------------------------------------------------------------


@torch.inference_mode()
def score_options(
    view: ValueVectorView,
    requests: Sequence[Request],
    keeps: Sequence[Tensor | None],
    *,
    engine: Engine | None = None,
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """`scores = score_options(view, requests, keeps)`: log-likelihoods of every option.

    >>> from paramspec.method.scoring import Request
    >>> requests = [Request(encode(tokenizer, question), mask=0) for question in questions]
    >>> scores = score_options(view, requests, [None])
    >>> len(scores), scores[0].shape
    (30, torch.Size([4]))

    Args:
        view: the model's value vectors.
        requests: what to score; a batch mixes masks.
        keeps: the masks that `Request.mask` counts, bool `[layers, width]`, False where masked,
            or None for no mask.
        engine: from `choose_engine`; chosen here if not given.
        row_tokens: tokens of a packed row, about: one takes whole questions.
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
    if requests:
        longest = max((request.item for request in requests), key=lambda item: item.longest)
        refuse_too_long(view, longest.longest, longest.name)
    engine = engine or choose_engine(view)
    scores = [[0.0] * len(request.item.options) for request in requests]

    def run(
        cells: list[Cell], branches: bool, forward: Callable[[Sequence[Cell], int], Tensor]
    ) -> None:
        batches = cell_batches(cells, batch_tokens, branches)
        # Halves of a batch keep its length: in bfloat16 padding is what moves a number.
        lengths: dict[int, int] = {}
        for batch in batches:
            longest = max(len(cell.row.tokens) for cell in batch)
            lengths |= dict.fromkeys(map(id, batch), longest)
        for done, values in in_batches(
            batches,
            lambda batch: forward(batch, lengths[id(batch[0])]),
            tokens=lambda batch: len(batch) * lengths[id(batch[0])],
        ):
            reads = [(read, cell) for cell in done for read in cell.row.reads]
            for (read, cell), value in zip(reads, values.tolist(), strict=True):
                scores[cell.requests[read.item]][read.option] += value
            begun = {cell.requests[read.item] for read, cell in reads if read.option == 0}
            progress(len(begun))

    packed, plain = fill_rows(requests, engine, row_tokens)
    run(plain, False, lambda batch, length: _plain_forward(view, batch, length, keeps))
    tokens = sum(len(cell.row.tokens) for cell in packed)
    with packed_layers(view.model, tokens=tokens):
        head = _Head.of(view.model)
        run(
            packed,
            engine.branches,
            lambda batch, length: _forward(view, head, batch, length, keeps, engine),
        )
    for request, score in zip(requests, scores, strict=True):
        if not np.isfinite(score).all():
            place = f"{request.item.name}: " if request.item.name else ""
            raise InputError(
                f"{place}a log-likelihood of {type(view.model).__name__} is not a finite number; "
                "the weights are damaged, or their dtype overflows: try float32"
            )
    return [torch.tensor(score) for score in scores]


def _forward(
    view: ValueVectorView,
    head: _Head,
    batch: Sequence[Cell],
    length: int,
    keeps: Sequence[Tensor | None],
    engine: Engine,
) -> Tensor:
    """One forward pass over a batch of forests; the log-probability of each read, in order.

    Args:
        length: tokens that each row is padded to, at least.
    """
    rows = [cell.row for cell in batch]
    rows = rows[:1] if branches_within(batch, engine) else rows
    sizes = [len(cell.row.places) for cell in batch]
    with mask_rows(view, [keeps[cell.mask] for cell in batch]):
        states = view.model.base_model(**_inputs(view, rows, length), use_cache=False)[0]
    states = states.expand(len(batch), -1, -1)  # one row still, if no mask parted it
    starts = np.cumsum(sizes) - sizes
    which = [start + cell.row.which for start, cell in zip(starts, batch, strict=True)]
    places = np.concatenate([cell.row.places for cell in batch])
    read = states[np.repeat(np.arange(len(batch)), sizes), places]
    targets = [read.token for cell in batch for read in cell.row.reads]
    return head.log_probabilities(
        read, torch.from_numpy(np.concatenate(which)), torch.tensor(targets)
    ).cpu()


def _inputs(view: ValueVectorView, rows: Sequence[Row], length: int) -> dict[str, Any]:
    """The rows as a model takes them: tokens, depths as positions, who sees whom as a bias."""
    length = round_up(length, ROW_MULTIPLE)
    tokens = np.zeros((len(rows), length), dtype=np.int64)
    depths = np.zeros_like(tokens)
    sees = np.zeros((len(rows), 1, length, length), dtype=bool)
    sees[:] = np.eye(length, dtype=bool)  # padding sees itself
    for index, row in enumerate(rows):
        size = len(row.tokens)
        tokens[index, :size] = row.tokens
        depths[index, :size] = row.depths
        sees[index, 0, :size, :size] = row.sees()
    config, embedded = view.model.config, view.embedding

    def bias(sees: np.ndarray) -> Tensor:
        # Eager attention adds its mask: a boolean one would be silently wrong.
        added = torch.zeros(sees.shape, dtype=embedded.dtype)
        added.masked_fill_(torch.from_numpy(~sees), torch.finfo(embedded.dtype).min)
        return added.to(embedded.device)

    window = attention_window(config)
    attention_mask: object = bias(sees)
    if window is not None:
        near = bias(sees & (depths[:, None, :, None] - depths[:, None, None, :] < window))
        # Where layers differ, the model takes a mask for each kind (Gemma); else one (Mistral).
        kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
        both = {"full_attention": attention_mask, "sliding_attention": near}
        attention_mask = both if kinds else near
    return {
        "input_ids": torch.from_numpy(tokens).to(embedded.device),
        "position_ids": torch.from_numpy(depths).to(embedded.device),
        "attention_mask": attention_mask,
    }


def attention_window(config: PreTrainedConfig) -> int | None:
    """How many tokens a sliding attention reaches back, itself included, if there is one."""
    return getattr(config.get_text_config(decoder=True), "sliding_window", None)


@dataclass(frozen=True)
class _Head:
    """The model's last step, from hidden states to log-probabilities.

    `finish` is what the family does to logits.
    """

    weight: Tensor
    bias: Tensor | None
    finish: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Head:
        module = model.get_output_embeddings()
        return cls(module.weight, getattr(module, "bias", None), _finish(model.config))

    def log_probabilities(self, states: Tensor, which: Tensor, targets: Tensor) -> Tensor:
        """fp32 `[reads]`: of token `targets[i]` after state `which[i]` of `states` `[n, hidden]`.

        No more logits are in memory than those of a block; what is kept of one is the logarithm
        of its sum.
        """
        device = self.weight.device
        states, which, targets = states.to(device), which.to(device), targets.to(device)
        padding = round_up(len(states), READ_MULTIPLE) - len(states)
        padded = torch.nn.functional.pad(states, (0, 0, 0, padding))
        sums = []
        for start in range(0, len(self.weight), VOCABULARY_BLOCK):
            block = slice(start, start + VOCABULARY_BLOCK)
            bias = None if self.bias is None else self.bias[block]
            logits = torch.nn.functional.linear(padded, self.weight[block], bias)
            sums.append(_log_sum(self.finish(logits).float()))
        logits = (states[which].float() * self.weight[targets].float()).sum(-1)
        if self.bias is not None:
            logits += self.bias[targets].float()
        return self.finish(logits) - torch.stack(sums).logsumexp(0)[which]


def _log_sum(logits: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials over the last dimension."""
    # torch's log_softmax is one pass, and takes half the time of its logsumexp.
    return logits[..., 0] - logits.log_softmax(-1)[..., 0]


def _finish(config: PreTrainedConfig) -> Callable[[Tensor], Tensor]:
    """What a family does to its logits, one by one: Cohere and Granite scale, Gemma 2 caps."""
    config = config.get_text_config(decoder=True)
    scale = getattr(config, "logit_scale", None) or 1
    scale /= getattr(config, "logits_scaling", None) or 1
    cap = getattr(config, "final_logit_softcapping", None)

    def finish(logits: Tensor) -> Tensor:
        logits = logits * scale if scale != 1 else logits
        return cap * torch.tanh(logits / cap) if cap else logits

    return finish


def _plain_forward(
    view: ValueVectorView, batch: Sequence[Cell], length: int, keeps: Sequence[Tensor | None]
) -> Tensor:
    """The same of single sequences, by the model's own forward pass."""
    device = view.embedding.device
    sizes = torch.tensor([len(cell.row.tokens) for cell in batch])
    tokens = torch.zeros(len(batch), length, dtype=torch.long)
    for index, cell in enumerate(batch):
        tokens[index, : sizes[index]] = torch.tensor(cell.row.tokens)
    kept = (torch.arange(length) < sizes[:, None]).long()
    where = [(index, read.place) for index, cell in enumerate(batch) for read in cell.row.reads]
    targets = torch.tensor([read.token for cell in batch for read in cell.row.reads])
    with (
        mask_rows(view, [keeps[cell.mask] for cell in batch]),
        unembed_only(view.model, torch.tensor(where)),
    ):
        logits = view.model(
            input_ids=tokens.to(device), attention_mask=kept.to(device), use_cache=False
        ).logits[0]
    chosen = logits[torch.arange(len(targets)), targets.to(logits.device)].float()
    sums = [part.float().logsumexp(-1) for part in logits.split(256)]
    return (chosen - torch.cat(sums)).cpu()


# --- choosing an engine ---------------------------------------------------------------------------


def choose_engine(view: ValueVectorView) -> Engine:
    """`engine = choose_engine(view)`: packed rows if the model computes them correctly.

    Decided by a test: a forest that branches at every depth, under three masks, is scored packed
    and plain. Models whose attention is biased by distances that position ids do not set (BLOOM,
    MPT) fail it. Whether a sliding window is kept is tested with a short one; if it is not, paths
    longer than the model's window are scored plainly.
    """
    attention = getattr(view.model.config, "_attn_implementation", None)
    if attention not in ("eager", "sdpa"):
        return Engine("plain", f"attention implementation {attention!r} takes no tree mask")
    for branches in (True, False):
        engine = Engine("packed", "verified by a test forward", branches=branches)
        failure = _failure(view, engine)
        if failure is None:
            break
    else:
        return Engine("plain", str(failure))
    window = attention_window(view.model.config)
    if window is None:
        return engine
    config: Any = view.model.config.get_text_config(decoder=True)
    try:
        config.sliding_window = 3  # from which each forward pass makes its masks
        return engine if _failure(view, engine) is None else replace(engine, longest=window)
    finally:
        config.sliding_window = window


def _failure(view: ValueVectorView, engine: Engine) -> str | None:
    """Why a forest is not scored as its paths alone are; None if it is."""
    draw = torch.Generator().manual_seed(0)
    t = torch.randint(len(view.embedding), (32,), generator=draw).tolist()
    items = [
        Item(tuple(t[:4]), ((t[4], t[5], t[6]), (t[4], t[7]), (t[8],))),
        Item(tuple(t[:2]), ((t[9], t[10], t[11]), (t[10], t[4], t[5]))),
        Item(tuple(t[:8]), tuple(zip(t[12:22], t[22:32], strict=True))),
    ]
    keeps = [None, *(torch.rand(2, view.layers, view.width, generator=draw) > 0.05)]
    requests = [Request(item, mask) for mask in range(3) for item in items]
    try:
        actual = torch.cat(score_options(view, requests, keeps, engine=engine))
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        if isinstance(error, OutOfMemory) or is_out_of_memory(error):
            raise  # it says nothing of the model
        return f"a packed row failed: {str(error).splitlines()[0][:120]}"
    plain = Engine("plain", "reference")
    expected = torch.cat(score_options(view, requests, keeps, engine=plain))
    off = (actual - expected).abs()
    if view.modules[0].weight.dtype == torch.float32:
        right = bool(off.max() <= 1e-3)
    else:
        # One path differs by rounding as much as by a wrong mask, but not all of them together: in
        # SmolLM2 0.02 of the spread of scores, and 0.11 or more where siblings see each other,
        # positions are wrong or the masks are left out.
        right = bool(off.mean() <= 0.05 * expected.std())
    return None if right else f"packed rows differ from plain ones by {off.max():.2g} nats"
