"""One SpecWiki question: the schema of a line of `questions.jsonl`."""

from __future__ import annotations

import re
import string
from typing import Literal

from pydantic import ConfigDict, model_validator

from paramspec.checked import Checked


class Question(Checked):
    """A four-option multiple-choice question about one concept.

    >>> from paramspec import load_questions
    >>> question = load_questions(concepts="France")[0]
    >>> question.cloze, question.options[question.answer]
    ('The capital of France is', 'Paris')

    `cloze` is the prompt that the options continue after one space; `options[answer]` is the true
    one; `aliases` are the accepted answers of the open-ended form; `statements` state the fact for
    training and never contain the cloze; `fold` is the split that every held-out protocol uses.
    """

    model_config = ConfigDict(strict=True)

    id: str
    concept: str
    domain: str
    tier: Literal["high", "medium", "low"]
    relation: str
    question: str
    cloze: str
    options: tuple[str, str, str, str]
    answer: int
    aliases: tuple[str, ...]
    fold: Literal[0, 1]
    statements: tuple[str, ...]

    @model_validator(mode="after")
    def _rules(self) -> Question:
        """What types cannot say; each message names the value, and reads on after the place."""
        if not 0 <= self.answer <= 3:
            raise ValueError(f"answer {self.answer}, but 4 options (0-3)")
        for field in ("id", "concept", "domain", "relation", "question", "cloze"):
            if not getattr(self, field).strip():
                raise ValueError(f"{field} is empty; fill it")
        if self.cloze != self.cloze.rstrip():
            raise ValueError(f"cloze {self.cloze!r} ends in white space; options follow one space")
        for place, option in enumerate(self.options):
            if option != option.strip() or not option:
                raise ValueError(f"option {place}, {option!r}, is empty or padded; strip it")
            if option in self.options[:place]:
                raise ValueError(f"option {option!r} stands twice; options must differ")
        for text in self.statements:
            if self.cloze.casefold() in text.casefold():
                raise ValueError(f"statement {text!r} contains the cloze; word it differently")
        return self


def normalise(text: str) -> str:
    """`text` as SQuAD's script compares answers: lower case, no punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
