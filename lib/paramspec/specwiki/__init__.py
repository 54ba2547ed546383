"""SpecWiki, open: ten four-option questions on each of 525 concepts, in three tiers of frequency.

    from paramspec import specwiki
    questions = specwiki.load_questions(concepts=60, domains=["country", "element"])

`README.md` is the dataset card; `tools/specwiki` in the repository builds `questions.jsonl`.
"""

from paramspec.specwiki.export import dataset, export_lm_eval, write_example
from paramspec.specwiki.questions import QUESTIONS, load_questions, questions_digest
from paramspec.specwiki.schema import Question

__all__ = [
    "QUESTIONS",
    "Question",
    "dataset",
    "export_lm_eval",
    "load_questions",
    "questions_digest",
    "write_example",
]
