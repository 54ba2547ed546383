"""Score questions: the log-likelihood of every option, with or without masks.

    requests = [Request(encode(tokenizer, question), mask=0) for question in questions]
    scores = score_options(view, requests, keeps)
    mark(scores[0].tolist(), questions[0])["correct_norm"]

The definitions are lm-evaluation-harness's: the log-likelihood of an option is the sum over its
tokens, given the cloze and a space. `rows` describes how work is shared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from paramspec.errors import InputError, naming
from paramspec.execution.limits import OutOfMemory, is_out_of_memory
from paramspec.method import hooks, rows
from paramspec.method.batches import BATCH_TOKENS, in_batches, pad_right
from paramspec.method.hooks import ValueVectorView
from paramspec.method.kernels import packed_layers
from paramspec.method.rows import Cell, Engine, Item, Request
from paramspec.models.tokens import front_tokens, prompt_ids, token_ids
from paramspec.specwiki import Question

# Raised whenever a change could move a score; part of every result's key.
SCORING_VERSION = 8
# Two scores tie if they differ by no more than this share of them: by float32's rounding.
TIE = 1e-6
VOCABULARY_BLOCK = 4096  # logits that are in memory at once, for each position that is read


def encode(tokenizer: PreTrainedTokenizerBase, question: Question, *, chat: bool = False) -> Item:
    """`item = encode(tokenizer, question)`: the cloze, a space, and each option.

    >>> item = encode(tokenizer, questions[0])
    >>> len(item.options)
    4

    The prompt and an option are encoded together and then split at the length of the prompt
    alone, as lm-evaluation-harness does, so that the space belongs to the option. With `chat`, the
    prompt is a user's turn (see `prompt_ids`), and the option alone is the answer.

    Raises:
        InputError: if the tokenizer cannot read a text (see `token_ids`), if an option has no
            tokens of its own, or if two options have the same ones.
    """
    return encode_all(tokenizer, [question], chat=chat)[0]


def encode_all(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], *, chat: bool = False
) -> list[Item]:
    """`items = encode_all(tokenizer, questions)`: what `encode` gives for each, in less time."""
    asked = [(question, option) for question in questions for option in question.options]
    texts = [option if chat else f"{question.cloze} {option}" for question, option in asked]
    clozes, names = [q.cloze for q in questions], [q.id for q in questions]
    contexts = prompt_ids(tokenizer, clozes, names, chat=chat)
    rows = iter(token_ids(tokenizer, texts, [question.id for question, _ in asked]))
    front = len(front_tokens(tokenizer)) if chat else 0
    items = []
    for question, context in zip(questions, contexts, strict=True):
        wholes = [next(rows) for _ in question.options]
        if chat:
            wholes = [[*context, *row[front:]] for row in wholes]
        with naming(question.id):
            own = _own_tokens(tokenizer, question, context, wholes)
        items.append(Item(tuple(context), own, question.id))
    return items


def _own_tokens(
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    context: list[int],
    wholes: Sequence[list[int]],
) -> tuple[tuple[int, ...], ...]:
    """The tokens of each option, behind those of the prompt."""
    found: dict[tuple[int, ...], str] = {}
    for option, whole in zip(question.options, wholes, strict=True):
        before, own = whole[: len(context)], tuple(whole[len(context) :])
        if not own:
            raise InputError(f"option {option!r} adds no token to the cloze; reword it")
        # Either text may hold the space between them, but no letter of the other.
        if before != context and _spelled(tokenizer, before) != _spelled(tokenizer, context):
            raise InputError(
                f"the tokenizer joins option {option!r} with the end of the cloze, so that it "
                "cannot be scored by itself; word one of them differently"
            )
        if own in found:
            raise InputError(
                f"options {found[own]!r} and {option!r} are the same tokens to this tokenizer; "
                "leave the question out, or use a model whose tokenizer has these characters"
            )
        found[own] = option
    return tuple(found)


def _spelled(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)).rstrip()


def mark(log_likelihoods: Sequence[float], question: Question) -> dict[str, float]:
    """`mark(score.tolist(), question)`: the predicted options, and whether they are right.

    Returns `predicted` (by sum, `acc`), `predicted_norm` (by sum over characters, `acc_norm`),
    `correct` and `correct_norm`, as in `DETAIL_COLUMNS`.
    """
    sums = np.asarray(log_likelihoods, dtype=float)
    each = {"": sums, "_norm": sums / [len(option) for option in question.options]}
    best = {
        name: np.flatnonzero(values >= values.max() - TIE * abs(values.max())).tolist()
        for name, values in each.items()
    }
    marked: dict[str, float] = {f"predicted{name}": found[0] for name, found in best.items()}
    for name, found in best.items():
        marked[f"correct{name}"] = (question.answer in found) / len(found)
    return marked


@torch.inference_mode()
def score_options(
    view: ValueVectorView,
    requests: Sequence[Request],
    keeps: Sequence[Tensor | None],
    *,
    engine: Engine | None = None,
    row_tokens: int = rows.ROW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """`scores = score_options(view, requests, keeps)`: log-likelihoods of every option.

    >>> from paramspec.method.rows import Request
    >>> requests = [Request(encode(tokenizer, question), mask=0) for question in questions]
    >>> scores = score_options(view, requests, [None])
    >>> len(scores), scores[0].shape
    (30, torch.Size([4]))

    Args:
        view: the model's value vectors.
        requests: the questions to score; a batch mixes masks.
        keeps: the masks, `keeps[request.mask]` that of a request: bool `[layers, width]`, False
            where masked, or None for no mask.
        engine: from `choose_engine`; chosen here if not given.
        row_tokens: tokens of a packed row, about, since a row has whole questions.
        batch_tokens: tokens of a forward pass; fewer where memory runs out.
        progress: called after each forward pass with its number of new requests.

    Returns:
        For each request an fp32 tensor `[options]`, in nats, on the CPU.

    Raises:
        InputError: if a question is longer than the context, if one row does not fit into memory,
            or if the model gives no numbers (damaged weights, an overflow).
    """
    if requests:
        longest = max((request.item for request in requests), key=lambda item: item.longest)
        hooks.refuse_too_long(view, longest.longest, longest.name)
    engine = engine or choose_engine(view)
    cells = rows.fill_rows(requests, engine, row_tokens)
    batches = rows.cell_batches(cells, batch_tokens, engine.branches)
    tokens = sum(len(cell.row.tokens) for cell in cells) if engine.name == "packed" else 0
    scores = [[0.0] * len(request.item.options) for request in requests]
    forward = partial(_plain_forward, view, keeps)
    if engine.name == "packed":
        forward = partial(_packed_forward, view, keeps, engine, _head(view.model))
    with packed_layers(view.model, tokens=tokens):
        for done, values in in_batches(batches, forward, rows.longest_row):
            reads = [
                (cell.requests[item], option)
                for cell in done
                for item, option in zip(cell.row.reads.items, cell.row.reads.options, strict=True)
            ]
            for (number, option), value in zip(reads, values.tolist(), strict=True):
                scores[number][option] += value
            progress(len({number for number, option in reads if option == 0}))
    found = [torch.tensor(score) for score in scores]
    for request, score in zip(requests, found, strict=True):
        hooks.require_numbers(view, score, f"{request.item.name}: a log-likelihood")
    return found


def _packed_forward(
    view: ValueVectorView,
    keeps: Sequence[Tensor | None],
    engine: Engine,
    head: Callable[[Tensor, Tensor, Tensor], Tensor],
    batch: Sequence[Cell],
    length: int,
) -> Tensor:
    """The log-probability of each read, in order, by one forward pass over a batch of forests."""
    forests = [cell.row for cell in batch]
    forests = forests[:1] if engine.branches and len(set(forests)) == 1 else forests
    with hooks.mask_rows(view, [keeps[cell.mask] for cell in batch]):
        states = view.model.base_model(**_inputs(view, forests, length), use_cache=False)[0]
    states = states.expand(len(batch), -1, -1)  # still one row, if no mask made it several
    sizes = [len(cell.row.places) for cell in batch]
    places = np.concatenate([cell.row.places for cell in batch])
    read = states[np.repeat(np.arange(len(batch)), sizes), places]
    starts = np.cumsum(sizes) - sizes
    which = [start + cell.row.which for start, cell in zip(starts, batch, strict=True)]
    targets = torch.tensor([token for cell in batch for token in cell.row.reads.tokens])
    return head(read, torch.from_numpy(np.concatenate(which)), targets).cpu()


def _inputs(view: ValueVectorView, forests: Sequence[rows.Row], length: int) -> dict[str, Any]:
    """Rows as a model takes them: tokens, depths as positions, an attention bias from ancestors."""
    length = rows.round_up(length, rows.ROW_MULTIPLE)
    tokens, _ = pad_right([row.tokens for row in forests], length)
    depths, _ = pad_right([row.depths for row in forests], length)
    sees = torch.eye(length, dtype=torch.bool).repeat(len(forests), 1, 1, 1)  # also of padding
    for index, row in enumerate(forests):
        size = len(row.tokens)
        sees[index, 0, :size, :size] = torch.from_numpy(row.sees())
    config, embedded = view.model.config, view.embedding

    def bias(sees: Tensor) -> Tensor:
        # Eager attention adds its mask: a boolean one would be silently wrong.
        added = torch.zeros(sees.shape, dtype=embedded.dtype)
        return added.masked_fill_(~sees, torch.finfo(embedded.dtype).min).to(embedded.device)

    window = attention_window(config)
    attention_mask: object = bias(sees)
    if window is not None:
        near = bias(sees & (depths[:, None, :, None] - depths[:, None, None, :] < window))
        # Where layers differ, the model takes a mask for each kind (Gemma); else one (Mistral).
        kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
        both = {"full_attention": attention_mask, "sliding_attention": near}
        attention_mask = both if kinds else near
    return {
        "input_ids": tokens.to(embedded.device),
        "position_ids": depths.to(embedded.device),
        "attention_mask": attention_mask,
    }


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether position ids decide how far tokens are apart. ALiBi counts places in the row."""
    named = "position_ids" in inspect.signature(model.forward).parameters
    return named and not getattr(model.config, "alibi", False)


def attention_window(config: PreTrainedConfig) -> int | None:
    """The width of a sliding attention window in tokens, the token itself included, or None."""
    return getattr(config.get_text_config(decoder=True), "sliding_window", None)


def _head(model: PreTrainedModel) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The model's last step, from hidden states to log-probabilities."""
    module, config = model.get_output_embeddings(), model.config.get_text_config(decoder=True)
    weight, bias = module.weight, getattr(module, "bias", None)
    # Families that change each logit: Cohere and Granite scale it, Gemma 2 caps it.
    scale = getattr(config, "logit_scale", None) or 1
    scale /= getattr(config, "logits_scaling", None) or 1
    cap = getattr(config, "final_logit_softcapping", None)

    def finish(logits: Tensor) -> Tensor:
        logits = logits * scale if scale != 1 else logits
        return cap * torch.tanh(logits / cap) if cap else logits

    def log_probabilities(states: Tensor, which: Tensor, targets: Tensor) -> Tensor:
        """fp32 `[reads]`: token `targets[i]` after state `which[i]` of `states` `[n, hidden]`."""
        states, which, targets = (each.to(weight.device) for each in (states, which, targets))
        padding = rows.round_up(len(states), rows.READ_MULTIPLE) - len(states)
        padded = nn.functional.pad(states, (0, 0, 0, padding))
        sums = []
        for start in range(0, len(weight), VOCABULARY_BLOCK):
            block = slice(start, start + VOCABULARY_BLOCK)
            logits = nn.functional.linear(
                padded, weight[block], None if bias is None else bias[block]
            )
            logits = finish(logits).float()
            # torch's log_softmax is one pass, and takes half the time of its logsumexp.
            sums.append(logits[..., 0] - logits.log_softmax(-1)[..., 0])
        logits = (states[which].float() * weight[targets].float()).sum(-1)
        if bias is not None:
            logits += bias[targets].float()
        return finish(logits) - torch.stack(sums).logsumexp(0)[which]

    return log_probabilities


def _plain_forward(
    view: ValueVectorView, keeps: Sequence[Tensor | None], batch: Sequence[Cell], length: int
) -> Tensor:
    """The same for single sequences, by the model's own forward pass."""
    device = view.embedding.device
    tokens, kept = pad_right([cell.row.tokens for cell in batch], length)
    where = [(index, place) for index, cell in enumerate(batch) for place in cell.row.reads.places]
    targets = torch.tensor([token for cell in batch for token in cell.row.reads.tokens])
    with (
        hooks.mask_rows(view, [keeps[cell.mask] for cell in batch]),
        hooks.unembed_only(view.model, torch.tensor(where)),
    ):
        logits = view.model(
            input_ids=tokens.to(device), attention_mask=kept.to(device), use_cache=False
        ).logits[0]
    chosen = logits[torch.arange(len(targets)), targets.to(logits.device)].float()
    sums = [part.float().logsumexp(-1) for part in logits.split(256)]
    return (chosen - torch.cat(sums)).cpu()


def choose_engine(view: ValueVectorView) -> Engine:
    """`engine = choose_engine(view)`: packed rows if the model computes them correctly.

    A test decides: a forest that branches at every depth, under three masks, is scored packed and
    plain. Models whose attention is biased by distances that position ids do not set (BLOOM, MPT,
    Falcon with ALiBi) are plain without a test: in bfloat16, it would not show their error.
    """
    config: Any = view.model.config.get_text_config(decoder=True)
    attention = view.model.config._attn_implementation
    if attention not in ("eager", "sdpa"):
        return Engine("plain", f"attention implementation {attention!r} takes no tree mask")
    if not takes_positions(view.model):
        return Engine("plain", "the distance between two tokens does not follow their position ids")
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo: not seen in a short row
        return Engine("plain", "local attention counts places in the row")
    for branches in (True, False):
        engine = Engine("packed", "verified by a test forward", branches=branches)
        failure = _failure(view, engine)
        if failure is None:
            break
    window = attention_window(config)
    if failure is None and window is not None:
        try:
            config.sliding_window = 3  # from which each forward pass makes its masks
            failure = _failure(view, engine)
        finally:
            config.sliding_window = window
    return engine if failure is None else Engine("plain", failure)


def _failure(view: ValueVectorView, engine: Engine) -> str | None:
    """Why a forest is scored otherwise than its paths alone; None if it is not."""
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
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, OutOfMemory) or is_out_of_memory(error):
            raise  # it says nothing of the model
        return f"a packed row failed: {str(error).splitlines()[0][:120]}"
    plain = Engine("plain", "reference")
    expected = torch.cat(score_options(view, requests, keeps, engine=plain))
    off = (actual - expected).abs()
    if view.embedding.dtype == torch.float32:
        right = bool(off.max() <= 1e-3)
    else:
        # One path differs by rounding as much as by a wrong mask, but not all of them together: in
        # SmolLM2 0.02 of the spread of scores, and 0.11 or more where siblings see each other,
        # positions are wrong or the masks are left out.
        right = bool(off.mean() <= 0.05 * expected.std())
    return None if right else f"packed rows differ from plain ones by {off.max():.2g} nats"
