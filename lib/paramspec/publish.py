"""Put questions, or the results of a run, into a `datasets` repository of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from paramspec.errors import InputError
from paramspec.models.libraries import line_of
from paramspec.specwiki import QUESTIONS, Question

TABLES = ("pss.parquet", "details.parquet", "questions.jsonl")  # of which `load_dataset` reads one
RUN_CARD = """\
---
configs:
{configs}
tags:
- parameter-specialization
---

# Parameter specialization of {models}

Measured by `paramspec pss`; the definitions are those of *The Rise of Parameter Specialization for
Knowledge Storage in Large Language Models* (Hong et al. 2025, arXiv 2505.17260).

```python
from datasets import load_dataset

answers = load_dataset("{repo}", "details")  # every answer; "pss": accuracies; "questions"
```

`masks.safetensors` holds a bit for each value vector, 1 where it is masked, layer by layer, as
`numpy.packbits` does; `run.json` says what was measured, by which versions, on which machine.
"""
QUESTIONS_CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: test
    path: questions.jsonl
---

# {count} questions on {concepts} concepts

```python
from paramspec import load_questions

questions = load_questions("{repo}:test")  # or datasets.load_dataset("{repo}", split="test")
```
"""


def publish_run(folder: Path, repo: str) -> str:
    """`publish_run(Path("results/pss"), "me/my-results")`: the files of a run; their address."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    configs = "\n".join(
        f"- config_name: {Path(name).stem}\n  data_files: {name}" for name in TABLES
    )
    models = ", ".join(model["name"] for model in run["models"])
    card = RUN_CARD.format(configs=configs, models=models, repo=repo)
    names = [*TABLES, "masks.safetensors", "run.json"]
    return _upload(repo, card, {name: folder / name for name in names})


def publish_questions(questions: Sequence[Question], repo: str) -> str:
    """`publish_questions(load_questions(), "me/specwiki")`: a question file; its address.

    All of SpecWiki goes with its own card.
    """
    lines = "".join(f"{question.model_dump_json()}\n" for question in questions)
    whole = lines == QUESTIONS.read_text(encoding="utf-8")
    concepts = len({question.concept for question in questions})
    card = QUESTIONS_CARD.format(count=len(questions), concepts=concepts, repo=repo)
    if whole:
        card = QUESTIONS.with_name("README.md").read_text(encoding="utf-8")
    with TemporaryDirectory() as name:
        path = Path(name) / QUESTIONS.name
        path.write_text(lines, encoding="utf-8")
        return _upload(repo, card, {path.name: path})


def _upload(repo: str, card: str, files: dict[str, Path]) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    added = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    added.append(CommitOperationAdd("README.md", card.encode()))
    try:
        api.create_repo(repo, repo_type="dataset", exist_ok=True)
        api.create_commit(repo, added, repo_type="dataset", commit_message="Results of paramspec")
    except Exception as error:  # of the network or the hub
        raise InputError(
            f"{repo}: not published ({type(error).__name__}: {line_of(error)}); run `hf auth "
            "login` with a token that may write there; the files are on this disk"
        ) from error
    return f"{api.endpoint}/datasets/{repo}"
