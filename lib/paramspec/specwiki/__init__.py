"""SpecWiki, open: ten four-option questions on each of 525 concepts, in three tiers of frequency.

    from paramspec import specwiki
    questions = specwiki.load_questions(concepts=60, domains=["country", "element"])
    specwiki.dataset().push_to_hub("me/specwiki")

`README.md` is the dataset card; `tools/specwiki` in the repository builds `questions.jsonl`.
"""

from paramspec.specwiki.export import dataset, export_lm_eval
from paramspec.specwiki.load import (
    QUESTIONS,
    describe,
    find,
    load_questions,
    questions_digest,
    sample_concepts,
    validate,
)
from paramspec.specwiki.schema import Question, normalise
from paramspec.tables import TIERS

__all__ = [
    "QUESTIONS",
    "TIERS",
    "Question",
    "dataset",
    "describe",
    "export_lm_eval",
    "find",
    "load_questions",
    "normalise",
    "questions_digest",
    "sample_concepts",
    "validate",
]
