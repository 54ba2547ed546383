"""Text to tokens: one way for all that is read, and what a tokenizer adds to a text by itself.

    token_ids(tokenizer, ["The capital of France is"])     # [[1, 450, 7483, 310, 3444, 338]]
    tokenizer_facts(tokenizer)["added_before"]             # [{"id": 1, "token": "<s>"}]

A text is data: `</s>` or `<|endoftext|>` in a question is the characters it is written with, never
a special token. In front of a text stands what the tokenizer puts there (BOS), once. Behind it
stands nothing, whatever the tokenizer adds: a text that has ended cannot be continued by an option.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paramspec.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "The year 1960"  # shows what a tokenizer adds to a text, whatever the text


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """`token_ids(tokenizer, [cloze])`: the tokens of each text, after what is added in front.

    Raises:
        InputError: if a text holds a special token that the tokenizer cannot read as characters,
            or nothing that it can read.
    """
    if not texts:
        return []
    front, rows = front_tokens(tokenizer), _read(tokenizer, texts)
    known = tokenizer.added_tokens_decoder.items()
    special = {number: token.content for number, token in known if token.special}
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise InputError(f"text {text[:80]!r}: the tokenizer reads nothing of it; reword it")
        for number in special.keys() & set(row):
            # Word-level and unigram vocabularies hold their special tokens among the words.
            if special[number] in text:
                raise InputError(
                    f"text {text[:80]!r}: the tokenizer reads {special[number]!r} in it as a "
                    "special token; reword the text, or use another model"
                )
    return [[*front, *row] for row in rows]


def front_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`front_tokens(tokenizer)`: what stands in front of each text, `[1]` for a BOS.

    It is what the tokenizer adds there, but without repeats: a BOS that is added twice is a fault
    of the tokenizer's files.
    """
    before, _ = added_tokens(tokenizer)
    return list(dict.fromkeys(before))


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """`before, after = added_tokens(tokenizer)`: what the tokenizer puts around any text.

    Raises:
        InputError: if the tokens of a text are not found among those of the text with additions.
    """
    (bare,) = _read(tokenizer, [PROBE])
    (whole,) = _read(tokenizer, [PROBE], add_special_tokens=True)
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise InputError(
        f"{type(tokenizer).__name__}: cannot tell what it adds to a text ({PROBE!r} is {bare} "
        f"alone and {whole} with additions); use a model with another tokenizer"
    )


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """`tokenizer_facts(tokenizer)`: plain JSON for the record of a run.

    Returns:
        `class` and `size` (tokens, the added ones among them); `added_before` and `added_after`,
        what the tokenizer puts around a text, and `kept`, what of it stands in front of each text
        here (nothing stands behind one); `bos`, `eos` and `unk`. A token is `{"id": 1, "token":
        "<s>"}`, or None where the tokenizer has none.
    """

    def named(number: int | None) -> dict[str, Any] | None:
        if number is None:
            return None
        return {"id": int(number), "token": tokenizer.convert_ids_to_tokens(int(number))}

    before, after = added_tokens(tokenizer)
    around = {"added_before": before, "added_after": after, "kept": front_tokens(tokenizer)}
    facts = {"class": type(tokenizer).__name__, "size": len(tokenizer)}
    facts |= {name: [named(number) for number in numbers] for name, numbers in around.items()}
    return facts | {
        "bos": named(tokenizer.bos_token_id),
        "eos": named(tokenizer.eos_token_id),
        "unk": named(tokenizer.unk_token_id),
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
