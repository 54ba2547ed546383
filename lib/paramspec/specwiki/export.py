"""Questions as a task of lm-evaluation-harness: `export_lm_eval("task", load_questions())`."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

import yaml

from paramspec.execution.files import atomic, require_writable
from paramspec.specwiki.schema import Question


def export_lm_eval(directory: str | Path, questions: Iterable[Question]) -> Path:
    """Write `specwiki.yaml` and `specwiki.parquet`, which the harness (0.4.13) runs as they are.

        lm_eval --model hf --model_args pretrained=MODEL --tasks specwiki --include_path DIRECTORY

    The prompt is the cloze, an option follows after one space, and `acc` and `acc_norm` are the
    harness's own. Parquet keeps every text a text: of JSON lines, the harness's reader takes a
    column of dates for times. The YAML names fields, not templates of them: a template of a cloze
    that is a number gives a number. It names the data by its absolute path: export again after
    moving it.

    Returns the path of the YAML file.

    Raises:
        InputError: the directory cannot be written.
    """
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
        _write_parquet(questions, scratch)
    with atomic(task) as scratch:
        scratch.write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")
    return task


def _write_parquet(questions: Iterable[Question], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    text, number = pyarrow.string(), pyarrow.int64()
    types = dict.fromkeys(Question.model_fields, text)
    types |= dict.fromkeys(("options", "aliases", "statements"), pyarrow.list_(text))
    types |= dict.fromkeys(("answer", "fold"), number)
    rows = [question.model_dump(mode="json") for question in questions]
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(types)), path)
