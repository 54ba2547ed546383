"""Facts of models that are known before they are measured, and the questions to ask of them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from paramspec.errors import InputError
from paramspec.models.load import LoadedModel
from paramspec.models.registry import find_micro, find_spec, load_registry
from paramspec.models.zoo import zoo_questions
from paramspec.models.zoo_training import read_record, trained
from paramspec.specwiki import Question, load_questions
from paramspec.specwiki.questions import sample_concepts


def describe_models(names: Sequence[str]) -> pd.DataFrame:
    """`describe_models(expand_models(["zoo"]))`: the facts that a chapter plots models against.

    >>> about = describe_models(["llama-2-7b", "llama-7b"])
    >>> about[["model", "family", "order"]].values.tolist()
    [['llama-2-7b', 'llama', 2.0], ['llama-7b', 'llama', 1.0]]

    Returns:
        A row per model: `model`, `micro` (whether it is a micro model), `family` and `generation`
        (missing of a model that is in no registry and no recipe), `order` (the generation's place
        in its family, from 1, by date of release, of micro models by the recipe's number; missing
        where that is not known), `parameters`, `width`, `released` (days since 2023-01-01), `mmlu`
        (percent), `tokens` (seen in training, of a trained micro model), `step` (of a checkpoint)
        and `exposure` (of a micro model: how often it sees a fact of the high tier, over one of the
        low).
    """
    columns = ["model", "micro", "family", "generation", "order", "parameters", "width"]
    columns += ["released", "mmlu", "tokens", "step", "exposure"]
    table = pd.DataFrame([_facts(name) for name in names]).reindex(columns=[*columns, "place"])
    places = sorted(table["place"].dropna().unique())
    table["order"] = table["place"].map({place: number for number, place in enumerate(places)})
    table["order"] = table.groupby(["family", "micro"])["order"].rank(method="dense")
    return table[columns]


def _facts(name: str) -> dict[str, Any]:
    """A row of `describe_models`; `place` sorts the generations of a family."""
    spec, micro = find_spec(name), find_micro(name)
    row: dict[str, Any] = {"model": name, "micro": taught(name) is not None}
    if row["micro"]:
        record = read_record(trained(micro, train=False) if micro else Path(name).expanduser())
        row |= record.model_dump(include={"tokens", "step"}) if record else {}
    if spec is None:
        return row
    row |= {field: getattr(spec, field) for field in ("family", "generation", "parameters")}
    row["width"] = spec.width
    if micro:
        exposure = micro.recipe.exposure
        row["exposure"] = exposure["high"] / exposure["low"]
        return row | {"place": (micro.generation, micro.step or math.inf)}
    step = re.search(r"step(\d+)", spec.source.label)
    row["step"] = float(step[1]) if step else None
    row["released"] = (spec.released - date(2023, 1, 1)).days if spec.released else None
    row["mmlu"] = spec.mmlu.score if spec.mmlu else None
    dates = [
        other.released
        for other in load_registry().values()
        if (other.family, other.generation) == (spec.family, spec.generation) and other.released
    ]
    return row | {"place": (min(dates).toordinal(), row["step"] or math.inf) if dates else None}


def comparable_models(names: Sequence[str]) -> list[str]:
    """The models that a correlation is taken over: micro models or the registry's others, whichever
    are more. Both kinds together would be two clouds.
    """
    micro = [name for name in names if find_micro(name)]
    others = [name for name in names if find_spec(name) and name not in micro]
    return micro if len(micro) > len(others) else others


def study_questions(
    names: Sequence[str], concepts: int | None = None, seed: int = 0
) -> list[Question]:
    """`study_questions(["zoo-llama-1", "smollm2-135m"])`: the questions for all of these models.

    >>> asked = study_questions(["zoo-llama-1", "smollm2-135m"], concepts=6)
    >>> len(asked), {question.concept for question in asked} <= set(taught("zoo-llama-1"))
    (60, True)

    Both folds, though micro models are scored on fold 1 alone: see `require_taught`.

    Args:
        names: of the models.
        concepts: how many, evenly over the tiers (see `load_questions`); with micro models among
            the models, of those that all of them were taught. If not given, all that these were
            taught; without a micro model, those that the zoo is taught.
        seed: decides which concepts a number of them takes.

    Raises:
        InputError: if micro models have fewer than two concepts in common, or if there are fewer
            concepts than asked for.
    """
    taught_by = {name: known for name in names if (known := taught(name)) is not None}
    if not taught_by:
        return zoo_questions() if concepts is None else load_questions(concepts=concepts, seed=seed)
    common = set.intersection(*map(set, taught_by.values()))
    asked = [question for question in load_questions() if question.concept in common]
    if len({question.concept for question in asked}) < 2:
        raise InputError(
            f"models {', '.join(taught_by)}: taught too few concepts in common; measure them apart"
        )
    if concepts is None:
        return asked
    return sample_concepts(asked, concepts, seed, f"taught to {', '.join(taught_by)}")


def taught(model: str | LoadedModel) -> tuple[str, ...] | None:
    """`taught("zoo-llama-1")`: the concepts that a micro model was taught; None of any other model.

    >>> len(taught("zoo-llama-1")), taught("smollm2-135m")
    (72, None)

    A recipe names them, and so does the record of the training in a model's directory, also in a
    copy and in a fine-tuned one.
    """
    if isinstance(model, LoadedModel):
        return model.taught
    spec = find_spec(model)
    if spec is not None:
        return spec.micro.recipe.taught if spec.micro else None
    record = read_record(Path(model).expanduser())
    return record.concepts if record else None


def folds_asked(models: Sequence[str | LoadedModel]) -> tuple[int, ...]:
    """`folds_asked(["zoo-llama-1", "smollm2-135m"])`: (1,) where one of them is a micro model."""
    return (0, 1) if all(taught(model) is None for model in models) else (1,)


def require_taught(
    models: Sequence[str | LoadedModel], questions: Sequence[Question], folds: Collection[int]
) -> None:
    """Refuse a question that a micro model must not be asked: on a concept that it was not taught,
    or, in the `folds` that are scored, with a cloze that it was trained on, as those of fold 0.
    """
    clozes = [(q.concept, q.cloze.casefold()) for q in load_questions() if q.fold == 0]
    for model in models:
        known = taught(model)
        if known is None:
            continue
        read = {cloze for concept, cloze in clozes if concept in known}
        for question in questions:
            seen = question.fold == 0 or question.cloze.casefold() in read
            if question.concept in known and not (seen and question.fold in folds):
                continue
            name = model if isinstance(model, str) else model.name
            reason = f"was not taught {question.concept!r}"
            if question.concept in known:
                reason = "was trained on the cloze of this question, as on all of fold 0"
            raise InputError(
                f"question {question.id!r}: {name!r}, a micro model, {reason}; ask of the concepts "
                f"taught, as study_questions([{name!r}]) does, and score fold 1 alone"
            )
