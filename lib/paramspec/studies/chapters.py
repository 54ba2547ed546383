"""The experiments of each chapter, defined once for the chapter and for the planner.

A chapter is named as its notebook is, and needs all parameters that the notebook declares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paramspec.method.pss import Choices
from paramspec.models.describe import comparable_models, folds_asked, study_questions, taught
from paramspec.models.registry import expand_models
from paramspec.specwiki import Question, load_questions
from paramspec.specwiki.prompts import with_prompt
from paramspec.studies.causal import trained_concepts
from paramspec.studies.training import Training


@dataclass(frozen=True)
class Experiment:
    """PSS of some models on some questions, by some choices: a call of `measure_pss`."""

    models: tuple[str, ...]
    questions: tuple[Question, ...]
    choices: Choices

    def changed(self, **choices: object) -> Experiment:
        """The experiment with other choices, and without controls."""
        update = {"controls": 0} | choices
        return replace(self, choices=self.choices.model_copy(update=update))


def training_of(name: str, p: Mapping[str, Any]) -> tuple[list[Question], Training, list[float]]:
    """The questions of a model in chapters 8 and 9, its training, and the learning rates to try. A
    micro model is asked about concepts that it was taught; its training has its own parameters.
    """
    micro = taught(name) is not None
    questions = study_questions([name]) if micro else load_questions()
    concepts = trained_concepts(questions, p["concepts"], p["seed"])
    given = dict(p["micro_training" if micro else "training"])
    rates = given.pop("learning_rates", [])
    training = Training.parse(method="FT-PV", concepts=concepts, seed=p["seed"], **given)
    return questions, training, rates or [training.learning_rate]


def _experiment(names: Sequence[str], p: Mapping[str, Any], **others: object) -> Experiment:
    given = ("ratios", "folds", "general", "controls", "position", "scope", "seed")
    choices = Choices.parse(**{name: p[name] for name in given if name in p}, **others)
    questions = study_questions(names, p["concepts"], p["seed"])
    return Experiment(tuple(names), tuple(questions), choices.with_folds(folds_asked(names)))


def _masking(p: Mapping[str, Any]) -> list[Experiment]:
    own = _experiment([p["model"]], p)
    return [own, own.changed(protocol="holdout")]


def _over_models(p: Mapping[str, Any], *more: str) -> Experiment:
    names = expand_models(p["models"])
    own = _experiment(names, p, nulls=["random"])
    return replace(own, models=tuple(dict.fromkeys([*names, *more])))


def _twenty_models(p: Mapping[str, Any]) -> list[Experiment]:
    own = _over_models(p)
    comparable = tuple(comparable_models(own.models)) or own.models
    return [own, replace(own.changed(protocol="holdout"), models=comparable)]


def _frequency(p: Mapping[str, Any]) -> list[Experiment]:
    return [_over_models(p, *(expand_models(p["reversed_models"]) if p["reversed_models"] else ()))]


def _sensitivity(p: Mapping[str, Any]) -> list[Experiment]:
    names = expand_models(p["models"])
    own = _over_models({**p, "models": comparable_models(names) or names})
    return [
        own,
        own.changed(position="last"),
        own.changed(scope="model"),
        own.changed(ablation="mean"),
        own.changed(spared=0.02),
        own.changed(protocol="holdout"),
        own.changed(general_by="concept", general=_whole_concepts(own, 5)),
        *_prompted(p),
    ]


# Forms of a prompt, with its examples, and whether it is in the model's chat template.
PROMPTS = {
    "cloze": ("cloze", 0, False),
    "question": ("question", 0, False),
    "question, after three examples": ("question", 3, False),
    "question, in the chat template": ("{question}", 0, True),
}


def _prompted(p: Mapping[str, Any]) -> list[Experiment]:
    """One model under each of `PROMPTS`, at the first ratio; none where no model is named."""
    if not (name := p["prompted_model"]):
        return []
    questions = study_questions([name], p["prompted_concepts"], p["seed"])
    given = {"ratios": p["ratios"][:1], "general": p["general"], "seed": p["seed"], "controls": 0}
    choices = Choices.parse(**given, folds=folds_asked([name]))
    return [
        Experiment(
            (name,),
            tuple(with_prompt(questions, form, shots=shots, seed=p["seed"])),
            choices.model_copy(update={"chat": chat}),
        )
        for form, shots, chat in PROMPTS.values()
    ]


def _whole_concepts(experiment: Experiment, count: int) -> int:
    """The questions on so many concepts, of the folds that are scored."""
    scored = [q.concept for q in experiment.questions if q.fold in experiment.choices.score_on]
    each = sorted(Counter(scored).values(), reverse=True)
    return sum(each[:count]) if len(each) > count else experiment.choices.general


CHAPTERS: dict[str, Callable[[Mapping[str, Any]], list[Experiment]]] = {
    "3-masking": _masking,
    "4-twenty-models": _twenty_models,
    "5-frequency": _frequency,
    "6-scale": lambda p: [_over_models(p)],
    "7-pretraining": lambda p: [_over_models(p)],
    "sensitivity": _sensitivity,
}
