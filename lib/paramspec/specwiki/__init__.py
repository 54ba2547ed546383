"""SpecWiki, open: ten four-option questions on each of 525 concepts, in three tiers of frequency.

    from paramspec import specwiki
    questions = specwiki.load_questions(concepts=60, domains=["country", "element"])

`README.md` is the dataset card; `tools/specwiki` in the repository builds `questions.jsonl`.
"""

from paramspec.specwiki.export import export_lm_eval
from paramspec.specwiki.load import (
    QUESTIONS,
    choose,
    describe,
    load_questions,
    questions_digest,
    read_questions,
    sample_concepts,
)
from paramspec.specwiki.schema import Question, normalise

__all__ = [
    "QUESTIONS",
    "Question",
    "choose",
    "describe",
    "export_lm_eval",
    "load_questions",
    "normalise",
    "questions_digest",
    "read_questions",
    "sample_concepts",
]
