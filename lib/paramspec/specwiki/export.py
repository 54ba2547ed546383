"""Questions for other programs: a `datasets.Dataset`, and a task of lm-evaluation-harness."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from paramspec.errors import InputError
from paramspec.execution.files import atomic, require_writable
from paramspec.specwiki.questions import load_questions
from paramspec.specwiki.schema import Question
from paramspec.tables import TIERS

if TYPE_CHECKING:
    import datasets


def dataset() -> datasets.Dataset:
    """All questions with typed features, as `load_dataset` reads them by their card.

    >>> from paramspec import specwiki
    >>> found = specwiki.dataset()
    >>> found.num_rows, found.features["tier"].names
    (5250, ['high', 'medium', 'low'])

    `tier`, `domain` and `answer` are numbers with names; the answer's names are A to D.
    """
    from datasets import ClassLabel, Dataset, Features, List, Value

    questions = load_questions()
    text = Value("string")
    types = dict.fromkeys(Question.model_fields, text)
    types |= dict.fromkeys(("aliases", "statements"), List(text))
    types["options"] = List(text, length=4)
    types["domain"] = ClassLabel(names=sorted({question.domain for question in questions}))
    types["tier"] = ClassLabel(names=list(TIERS))
    types["answer"] = ClassLabel(names=["A", "B", "C", "D"])
    types["fold"] = Value("int64")
    rows = [question.model_dump(mode="json") for question in questions]
    return Dataset.from_list(rows, features=Features(types), split="test")


EXAMPLE = """\
# One question on each line. These four are enough: "concept", "question", "options" (2 to 26)
# and "answer": the text of an option, its letter (A is the first), or its index (0 is the first).
# Give each concept two questions or more, and have two concepts or more.
{"concept": "gold", "question": "What is the chemical symbol of gold?", "options": ["Au", "Ag", "Pb", "Fe"], "answer": "Au"}
{"concept": "gold", "question": "What is the colour of gold?", "options": ["green", "yellow", "blue"], "answer": "B"}
{"concept": "France", "question": "What is the capital of France?", "options": ["Rome", "Lyon", "Paris", "Bern"], "answer": 2}
# The rest may be left out: a prompt that the options continue after one space ("cloze"), more
# right answers in words ("aliases"), facts to train on that do not hold the cloze ("statements"),
# "id", "fold" (0 or 1), "tier" (high, medium or low), "domain", "relation".
{"concept": "France", "question": "Which river flows through Paris?", "options": ["Seine", "Rhine"], "answer": "Seine", "cloze": "The river that flows through Paris is the", "aliases": ["Seine", "the river Seine"], "statements": ["Paris lies on the Seine."], "fold": 1}
"""  # noqa: E501


def write_example(path: Path) -> None:
    """`write_example(Path("mine.jsonl"))`: a question file with comments, to be edited."""
    if path.exists():
        raise InputError(f"{path}: is there already; choose another name")
    with atomic(path) as scratch:
        scratch.write_text(EXAMPLE, encoding="utf-8")


def export_lm_eval(directory: str | Path, questions: Iterable[Question]) -> Path:
    """Write `specwiki.yaml` and `specwiki.parquet`, which the harness (0.4.13) runs as they are.

    >>> from paramspec import load_questions, specwiki
    >>> specwiki.export_lm_eval("task", load_questions(concepts=3)).name
    'specwiki.yaml'

    Then `lm_eval --model hf --model_args pretrained=MODEL --tasks specwiki --include_path task`.
    The prompt is the cloze, an option follows after one space, and `acc` and `acc_norm` are the
    harness's own. The YAML names the data by its absolute path: export again after moving it.

    Returns the path of the YAML file. Raises InputError if the directory cannot be written.
    """
    import pandas as pd

    directory = Path(directory)
    require_writable(directory)
    data, task = directory / "specwiki.parquet", directory / "specwiki.yaml"
    description = {
        "task": "specwiki",
        "dataset_path": "parquet",
        # The path is read as a pattern.
        "dataset_kwargs": {"data_files": {"test": glob.escape(str(data.resolve()))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        # Fields, not templates: a template of a cloze that is a number gives a number.
        "doc_to_text": "cloze",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    with atomic(data) as scratch:
        pd.DataFrame([q.model_dump(mode="json") for q in questions]).to_parquet(scratch)
    with atomic(task) as scratch:
        scratch.write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")
    return task
