"""One SpecWiki question: the schema of a line of `questions.jsonl`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

TIERS = ("high", "medium", "low")


class Question(BaseModel):
    """A four-option multiple-choice question about one concept.

    `cloze` is the prompt that the options continue after one space; `options[answer]` is the true
    one; `aliases` are the normalised-match answers of the open-ended form; `statements` state the
    fact for training and never contain the cloze; `fold` is the split that every held-out
    protocol uses.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

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
