"""What the command `pss` is asked: questions in a form, choices with defaults, a plan, a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paramspec.execution.files import require_writable
from paramspec.execution.store import Store
from paramspec.method.pss import Choices, most_general
from paramspec.models.describe import folds_asked, study_questions, taught
from paramspec.models.load import place_and_dtype
from paramspec.plain import read_text
from paramspec.specwiki import Question, load_questions
from paramspec.specwiki.prompts import FORMS, with_prompt
from paramspec.studies.chapters import Experiment
from paramspec.studies.cost import Plan
from paramspec.studies.cost import plan as make_plan
from paramspec.studies.sweep import Study, measure_pss, write_study


def questions_of(
    names: Sequence[str],
    questions: str | None,
    concepts: int | None,
    source: Mapping[str, Any],
    *,
    prompt: str,
    shots: int,
    seed: int,
) -> tuple[list[Question], dict[str, Any]]:
    """The questions for all models in the form of a `prompt`, and what `run.json` says of them.

    Of SpecWiki, micro models are asked what they were taught, and so is every model beside them.
    `source` has the options of `load_questions`; a prompt that is no known form is a file.
    """
    if questions is None and any(taught(name) is not None for name in names):
        print(
            "Micro models among these: all models are asked about concepts that these were "
            "taught, and scored on fold 1, whose clozes they never read."
        )
        asked = study_questions(names, concepts, seed)
    else:
        asked = load_questions(questions, concepts=concepts, seed=seed, **source)
    form = prompt if prompt in FORMS else read_text(Path(prompt))
    told = {"source": questions or "SpecWiki", "columns": source["columns"]}
    told |= {"prompt": form, "shots": shots}
    return with_prompt(asked, form, shots=shots, seed=seed), told


def choices_of(
    names: Sequence[str], asked: Sequence[Question], *, general: int | None, **given: Any
) -> Choices:
    """The choices of a run; without a number, 10 general questions, or all that there are."""
    choices = Choices.parse(**given, **({} if general is None else {"general": general}))
    choices = choices.with_folds(folds_asked(names))
    most = most_general(asked, choices)
    if general is None and 0 < most < choices.general:
        print(f"For each concept's masks: {most} unrelated questions, all there are")
        return choices.model_copy(update={"general": most})
    return choices


def plan_of(
    names: Sequence[str], asked: Sequence[Question], choices: Choices, *, dtype: str, device: str
) -> Plan:
    """What a run costs on this machine's processor, or on a GPU like the one that is chosen."""
    gpu = "cpu" if place_and_dtype(device, dtype)[0].type == "cpu" else "A100 80GB"
    return make_plan({"pss": [Experiment(tuple(names), tuple(asked), choices)]}, gpu=gpu)


def measure(
    names: Sequence[str],
    asked: Sequence[Question],
    choices: Choices,
    out: Path,
    store: Store,
    told: Mapping[str, Any],
    **where: str,
) -> Study:
    """Measure and write a study, if both places can be written; `told` is of the questions."""
    require_writable(out)
    require_writable(store.root)
    study = measure_pss(names, asked, choices, store=store, **where)
    study.run["questions"] |= told
    write_study(study, out)
    return study
