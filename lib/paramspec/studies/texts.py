"""Plain texts about concepts to train on, as long as articles, in place of statements.

texts = read_texts(Path("articles"))  # of France.txt, gold.txt, ...
questions = text_questions(texts, tokenizer, window=512)
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from paramspec.errors import InputError
from paramspec.models.tokens import token_ids
from paramspec.plain import read_text
from paramspec.specwiki import Question
from paramspec.tables import ONE


def read_texts(folder: Path) -> dict[str, str]:
    """`read_texts(Path("articles"))["France"]`: the text of each file NAME.txt in UTF-8."""
    texts = {path.stem: read_text(path).strip() for path in sorted(folder.glob("*.txt"))}
    if not texts:
        raise InputError(f"{folder}: no file CONCEPT.txt; give a folder of plain texts")
    if empty := [name for name, text in texts.items() if not text]:
        raise InputError(f"{folder / empty[0]}.txt: nothing in it; write its text, or remove it")
    return texts


def text_questions(
    texts: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, window: int
) -> list[Question]:
    """Windows of the texts as statements, each of a question that is never asked, as training takes
    them. A window has up to `window` tokens, its beginning and end included.
    """
    return [
        Question(
            id=f"{concept}/{number}",
            concept=concept,
            domain=ONE,
            tier="all",
            relation=ONE,
            question=f"Window {number} of a text",
            cloze=f"Window {number} of a text:",
            options=("0", "1"),
            answer=0,
            aliases=(),
            fold=0,
            statements=(part,),
        )
        for concept, text in texts.items()
        for number, part in enumerate(windows(text, tokenizer, window))
    ]


def windows(text: str, tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    """A text in parts of up to `size` tokens, one of which is kept for the end, cut at spaces."""
    pieces = re.findall(r"\s*\S{1,40}", text)  # a script without spaces is cut between letters
    found, start = [], 0
    while start < len(pieces):
        take = min(size, len(pieces) - start)
        while True:
            part = "".join(pieces[start : start + take]).strip()
            length = len(token_ids(tokenizer, [part])[0]) + 1
            if length <= size:
                break
            if take == 1:
                raise InputError(f"window {size}: {part!r} alone has {length} tokens; use more")
            take = max(1, min(take - 1, take * size // length))
        found.append(part)
        start += take
    return found


def warn_of_wordings(texts: Mapping[str, str], questions: Sequence[Question]) -> None:
    """Warn if a text holds the cloze of a question on its concept: its answer is trained on."""
    plain = {concept: text.casefold() for concept, text in texts.items()}
    held = [q.id for q in questions if q.cloze.casefold() in plain.get(q.concept, "")]
    if held:
        warnings.warn(
            f"the texts hold the wording of {len(held)} questions, as of {held[0]!r}: their "
            "answers are trained on, not learnt from other words",
            stacklevel=1,
        )
