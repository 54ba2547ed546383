"""SpecWiki, open: ten four-option questions on each of 525 concepts, in three tiers of frequency.

    from paramspec.specwiki import load_questions
    questions = load_questions(concepts=60, domains=["country", "element"])

`python -m paramspec.specwiki.builder.build` builds `questions.jsonl` from the fact tables in
`builder/tables/`; `README.md` is the dataset card.
"""

from paramspec.specwiki.builder.facts import normalise
from paramspec.specwiki.export import export_lm_eval
from paramspec.specwiki.load import (
    QUESTIONS,
    describe,
    find,
    load_questions,
    questions_digest,
    sample_concepts,
    validate,
)
from paramspec.specwiki.schema import Question
from paramspec.tables import TIERS

__all__ = [
    "QUESTIONS",
    "TIERS",
    "Question",
    "describe",
    "export_lm_eval",
    "find",
    "load_questions",
    "normalise",
    "questions_digest",
    "sample_concepts",
    "validate",
]
