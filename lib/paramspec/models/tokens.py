"""Text to tokens: the one way for all texts.

A text is data: `</s>` or `<|endoftext|>` in a question is the characters it is written with, never
a special token. The tokens that the tokenizer adds in front of a text (BOS) are kept, once. Those
that it adds behind are left out: a text that has ended cannot be continued by an option.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paramspec.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = "26 Jul 2024"
PROBE = "The year 1960"  # any text: a tokenizer adds the same to all


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], names: Sequence[str] = ()
) -> list[list[int]]:
    """`token_ids(tokenizer, [cloze])`: the tokens of each text, after those added in front.

    A text in which the tokenizer reads a special token, or nothing at all, is refused, by its name
    if it has one.
    """
    if not texts:
        return []
    front, rows = front_tokens(tokenizer), _read(tokenizer, texts)
    known = tokenizer.added_tokens_decoder.items()
    special = {number: token.content for number, token in known if token.special}
    written = re.compile("|".join(map(re.escape, special.values())) or r"(?!)")
    for name, text, row in zip(names or [""] * len(texts), texts, rows, strict=True):
        about = f"{name}: text {text[:80]!r}" if name else f"text {text[:80]!r}"
        if not row:
            raise InputError(f"{about}: the tokenizer reads nothing of it; reword it")
        if not written.search(text):
            continue
        for number in special.keys() & set(row):
            # Word-level and unigram vocabularies hold their special tokens among the words.
            if special[number] in text:
                raise InputError(f"{about}: holds the special token {special[number]!r}; reword it")
    return [[*front, *row] for row in rows] if front else rows


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    names: Sequence[str] = (),
    *,
    chat: bool = False,
) -> list[list[int]]:
    """`prompt_ids(tokenizer, [cloze], chat=True)`: each as a user's turn in the model's template.

    The template's own tokens, special ones among them, are around the prompt, and the answer is
    next. Without `chat`, as `token_ids`.
    """
    rows = token_ids(tokenizer, prompts, names)
    if not chat:
        return rows
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; leave it out")
    # The same on any day: a template may print the date.
    template = re.sub(r"strftime_now\([^()]*\)", "date_string", tokenizer.get_chat_template())
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROBE}],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
        date_string=TODAY,
    )
    head, found, tail = str(whole).partition(PROBE)
    if not found:
        raise InputError("the chat template does not hold the user's words; leave it out")
    before, after = (
        tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
        for part in (head, tail)
    )
    front = len(front_tokens(tokenizer))
    return [[*before, *row[front:], *after] for row in rows]


def front_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`front_tokens(tokenizer)`: the tokens added in front of each text, `[1]` for a BOS."""
    before, _ = added_tokens(tokenizer)
    return list(dict.fromkeys(before))  # a BOS that is added twice is a fault of the files


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """`before, after = added_tokens(tokenizer)`: the tokens that the tokenizer adds to any text."""
    (bare,) = _read(tokenizer, [PROBE])
    (whole,) = _read(tokenizer, [PROBE], add_special_tokens=True)
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    name = type(tokenizer).__name__
    raise InputError(f"{name}: unclear what it adds to {PROBE!r}; use a model with another one")


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Plain JSON for the record of a run. `size` counts the added tokens, too; the tokenizer puts
    `added_before` and `added_after` around a text, of which the tokens `kept` are used here.
    """

    def named(number: int | None) -> dict[str, Any] | None:
        token = None if number is None else tokenizer.convert_ids_to_tokens(number)
        return None if number is None else {"id": number, "token": token}

    before, after = added_tokens(tokenizer)
    around = {"added_before": before, "added_after": after, "kept": front_tokens(tokenizer)}
    return {
        "class": type(tokenizer).__name__,
        "size": len(tokenizer),
        **{name: [named(number) for number in numbers] for name, numbers in around.items()},
        **{name: named(getattr(tokenizer, f"{name}_token_id")) for name in ("bos", "eos", "unk")},
    }


def _read(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    read = tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,  # about lengths, which are compared with the model's context
    )
    return read["input_ids"]
