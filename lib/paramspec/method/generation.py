"""Open-ended answers: generated greedily or by another rule.

generate_answers(view, tokenizer, ["What is the capital of France?"])      # ["Paris"]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from paramspec.method import hooks
from paramspec.method.hooks import ValueVectorView
from paramspec.method.scoring import attention_window, takes_positions
from paramspec.models.tokens import token_ids
from paramspec.specwiki.questions import normalise

# Raised whenever a change could move an answer or a sample of one; part of their keys.
GENERATION_VERSION = 3
MAX_NEW_TOKENS = 12
BATCH = 64  # answers that are decoded together

# Three examples show that the answer alone is asked for; without them, models answer in sentences,
# or stop at once. They are about no concept of SpecWiki.
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
    *,
    prompt: str = OPEN_PROMPT,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """`answers = generate_answers(view, tokenizer, ["What is the capital of France?"])`.

    >>> answers = generate_answers(view, tokenizer, ["age of alpha"], prompt="{question}")
    >>> len(answers), type(answers[0])
    (1, <class 'str'>)

    Greedy decoding of the first line after the prompt. Within `mask_value_vectors`, with one mask
    for all rows, answers are those under the mask.

    Args:
        prompt: holds `{question}`.
        max_new_tokens: of an answer.

    Returns:
        The answers, stripped, in the order of the questions.
    """
    prompts = [prompt.replace("{question}", question) for question in questions]
    decoded = decode(view, tokenizer, prompts, likeliest, max_new_tokens=max_new_tokens)
    return [row.text for (row,) in decoded]


Pick = Callable[[int, list[int], Tensor], Tensor]


@dataclass
class Decoded:
    """Answer number `copy` to prompt number `prompt`.

    `tokens` include the one that ended the text or its line, `text` is that line, stripped;
    `log_likelihood` is that of the tokens, in nats, by the model's own probabilities; `state`, fp32
    `[hidden]`, is the unembedding's input from which the last token was predicted.
    """

    prompt: int
    copy: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    log_likelihood: float = 0.0
    state: Tensor | None = None


@torch.no_grad()
def decode(
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    pick: Pick,
    *,
    copies: int = 1,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[list[Decoded]]:
    """`decode(view, tokenizer, prompts, likeliest)`: `copies` answers to each prompt, of one line.

    Each needed token is computed once: the beginning that all prompts share for all of them, the
    rest of a prompt for all its copies, and nothing after an answer's end.
    `pick` gives the next token of each unfinished copy of a prompt, from the prompt's number, the
    numbers of these copies, and their fp32 logits `[unfinished copies, vocabulary]`.
    """
    encoded = token_ids(tokenizer, prompts)
    longest = max(map(len, encoded), default=0) + max_new_tokens
    hooks.refuse_too_long(view, longest)
    beginning, shared = _read_beginning(view, encoded)
    # Rows of different lengths: only with positions of their own, and within the window.
    window = attention_window(view.model.config)
    pads = shared > 0 and takes_positions(view.model) and (window is None or longest <= window)
    answers = [[Decoded(index, copy) for copy in range(copies)] for index in range(len(prompts))]
    for part in _parts(encoded, max(1, BATCH // copies), equal=not pads):
        cache = deepcopy(beginning)
        tokens, seen = _pad_left([encoded[index] for index in part], shared)
        if shared:
            cache.batch_repeat_interleave(len(part))
        found = _extend(view, tokens, cache, seen, pads)
        cache.batch_repeat_interleave(copies)
        logits, states, seen = (each.repeat_interleave(copies, dim=0) for each in (*found, seen))
        going = [answer for index in part for answer in answers[index]]
        for _ in range(max_new_tokens):
            _take_tokens(view, going, logits, states, pick)
            on = [n for n, one in enumerate(going) if not _has_ended(view, tokenizer, one.tokens)]
            if not on:
                break
            if len(on) < len(going):
                cache.batch_select_indices(torch.tensor(on, device=logits.device))
                going, seen = [going[place] for place in on], seen[on]
            seen = nn.functional.pad(seen, (0, 1), value=1)
            tokens = torch.tensor([answer.tokens[-1:] for answer in going])
            logits, states = _extend(view, tokens, cache, seen, pads)
    for answer in itertools.chain.from_iterable(answers):
        answer.text = _words(tokenizer, answer.tokens).strip().split("\n")[0].strip()
    return answers


def likeliest(index: int, copies: list[int], logits: Tensor) -> Tensor:
    """`decode(..., pick=likeliest)`: greedy."""
    return logits.argmax(-1)


def _take_tokens(
    view: ValueVectorView, going: Sequence[Decoded], logits: Tensor, states: Tensor, pick: Pick
) -> None:
    """Add a token to each answer; `logits` and `states` have a row for each answer."""
    log_probabilities = logits.log_softmax(-1)
    hooks.require_numbers(view, log_probabilities.amax(-1), "a log-probability")
    tokens: list[int] = []
    for prompt, group in itertools.groupby(going, key=lambda answer: answer.prompt):
        copies = [answer.copy for answer in group]
        tokens += pick(prompt, copies, logits[len(tokens) : len(tokens) + len(copies)]).tolist()
    chosen = log_probabilities[range(len(going)), tokens].tolist()
    for answer, token, log_probability, state in zip(going, tokens, chosen, states, strict=True):
        answer.tokens.append(token)
        answer.log_likelihood += log_probability
        answer.state = state


def _extend(
    view: ValueVectorView, rows: Tensor, cache: DynamicCache, seen: Tensor, pads: bool
) -> tuple[Tensor, Tensor]:
    """Each row's logits, fp32, and hidden state at its last token; the cache grows by the rows.

    `seen`, `[rows, tokens]`, is 0 at padding; with `pads`, positions do not count it.
    """
    device = view.embedding.device
    last = torch.tensor([(row, rows.shape[1] - 1) for row in range(len(rows))])
    places = seen.cumsum(1).sub(1).clamp(min=0)[:, -rows.shape[1] :]
    states: list[Tensor] = []
    unembedding = view.model.get_output_embeddings()
    with (
        hooks.unembed_only(view.model, last),
        unembedding.register_forward_pre_hook(
            lambda _, args: states.append(args[0][0].float().cpu())
        ),
    ):
        logits = view.model(
            input_ids=rows.to(device),
            attention_mask=seen.to(device),
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": places.to(device)} if pads else {}),
        ).logits[0]
    return logits.float(), states[0]


def _read_beginning(
    view: ValueVectorView, rows: Sequence[Sequence[int]]
) -> tuple[DynamicCache, int]:
    """A cache of the tokens that all rows begin with, and how many; one of each row is left."""
    cache = DynamicCache(config=view.model.config.get_text_config(decoder=True))
    most = min(map(len, rows), default=1) - 1
    shared = next((n for n in range(most) if len({row[n] for row in rows}) > 1), most)
    if shared:
        first = torch.tensor([rows[0][:shared]])
        _extend(view, first, cache, torch.ones_like(first), False)
    return cache, shared


def _pad_left(rows: Sequence[Sequence[int]], shared: int) -> tuple[Tensor, Tensor]:
    """Each row after its first `shared` tokens, padded in front; the attention mask of it all."""
    width = max(map(len, rows))
    rest = [[0] * (width - len(row)) + list(row[shared:]) for row in rows]
    seen = [[1] * shared + [0] * (width - len(row)) + [1] * (len(row) - shared) for row in rows]
    return torch.tensor(rest), torch.tensor(seen)


def _parts(rows: Sequence[Sequence[int]], most: int, *, equal: bool) -> Iterator[list[int]]:
    """Indices of rows, up to `most` together, the longest first; with `equal`, of one length."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    for _, group in itertools.groupby(order, key=lambda index: equal and len(rows[index])):
        members = list(group)
        yield from (members[start : start + most] for start in range(0, len(members), most))


def _has_ended(
    view: ValueVectorView, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]
) -> bool:
    """Whether a text or its first line has ended; space before the first word is ignored."""
    ends = view.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if tokens[-1] in (*ends, tokenizer.eos_token_id):
        return True
    return "\n" in _words(tokenizer, tokens).lstrip()


def _words(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def answer_matches(answer: str, aliases: Sequence[str]) -> bool:
    """`answer_matches("The Paris.", ["Paris"])`: SQuAD's exact match against any alias.

    >>> answer_matches("The Paris.", ["Paris"]), answer_matches("Lyon", ["Paris"])
    (True, False)

    Normalisation leaves nothing of an alias that is an article or a sign (blood group A, C#'s #):
    it is compared as it is, so that an empty answer is not right.
    """
    if said := normalise(answer):
        return said in {normalise(alias) for alias in aliases}
    said = answer.strip().casefold()
    return bool(said) and said in {alias.strip().casefold() for alias in aliases}
