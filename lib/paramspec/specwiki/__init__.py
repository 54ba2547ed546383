"""SpecWiki, open: ten four-option questions on each of 525 concepts, in three tiers of frequency.

    from paramspec import specwiki
    questions = specwiki.load_questions(concepts=60, domains=["country", "element"])

`README.md` is the dataset card; `tools/specwiki` in the repository builds `questions.jsonl`.
"""

from paramspec.specwiki.export import dataset, export_lm_eval
from paramspec.specwiki.questions import (
    QUESTIONS,
    Question,
    choose,
    describe,
    load_questions,
    normalise,
    questions_digest,
    read_questions,
    sample_concepts,
)

__all__ = [
    "QUESTIONS",
    "Question",
    "choose",
    "dataset",
    "describe",
    "export_lm_eval",
    "load_questions",
    "normalise",
    "questions_digest",
    "read_questions",
    "sample_concepts",
]
