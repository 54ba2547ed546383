"""Questions as a task of lm-evaluation-harness: `export_lm_eval("task", load_questions())`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import yaml

from paramspec.errors import InputError
from paramspec.specwiki.schema import Question


def export_lm_eval(directory: str | Path, questions: Iterable[Question]) -> Path:
    """Write `specwiki.yaml` and `specwiki.jsonl`, which the harness (0.4.13) runs as they are.

        lm_eval --model hf --model_args pretrained=MODEL --tasks specwiki --include_path DIRECTORY

    The prompt is the cloze, an option follows after one space, and `acc` and `acc_norm` are the
    harness's own. The YAML names the data by its absolute path: export again after moving it.

    Returns the path of the YAML file.

    Raises:
        InputError: the directory cannot be written.
    """
    directory = Path(directory)
    data, task = directory / "specwiki.jsonl", directory / "specwiki.yaml"
    description = {
        "task": "specwiki",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{cloze}}",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(data, "".join(question.model_dump_json() + "\n" for question in questions))
        _write(task, yaml.safe_dump(description, sort_keys=False))
    except OSError as error:
        raise InputError(
            f"{error.filename or directory}: cannot be written ({error.strerror}); "
            "choose another directory"
        ) from None
    return task


def _write(path: Path, text: str) -> None:
    """Write `text` whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
