"""The parameter specialization score (PSS) of a model: its masks, their nulls, and what they cost.

    tables = measure_concepts(view, tokenizer, questions, concepts, choices, coefficients)
    tables.pss          # a row per (model, concept, ratio, mask, seed), see `tables`

What they say together is `stats.summary`'s. Names are the paper's (section 3): C(k) is the accuracy
on a concept's own questions under its mask, G(k) on unrelated questions under the same mask,
PSS(k) = |G(k) - C(k)| / G(0), and peak PSS its maximum over the mask ratios. Two readings of
"accuracy" are kept apart: `pooled` over all concepts before the absolute value, and `per_concept`,
the mean of each concept's own PSS. A headline accuracy is lm-evaluation-harness's `acc_norm`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
import torch
from pydantic import Field, field_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from paramspec.checked import Checked, Count, Seed
from paramspec.errors import InputError
from paramspec.method.batches import BATCH_TOKENS
from paramspec.method.hooks import Position, ValueVectorView
from paramspec.method.masks import (
    ConceptCoefficients,
    Scope,
    keep_tensor,
    magnitude_matched_vectors,
    random_vectors,
    top_vectors,
    value_vector_scores,
)
from paramspec.method.rows import ROW_TOKENS, Engine, Item, Request
from paramspec.method.scoring import (
    SCORING_VERSION,
    encode,
    mark,
    score_options,
)
from paramspec.specwiki import Question
from paramspec.tables import DETAIL_COLUMNS, MASKS, PSS_COLUMNS

Protocol = Literal["paper", "holdout"]
Null = Literal["random", "magnitude", "other"]
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2)


class Choices(Checked):
    """Every choice of a PSS measurement that the paper leaves open, and its sample sizes.

    >>> Choices(ratios=(0.05, 0.01), protocol="holdout").ratios
    (0.01, 0.05)

    Attributes:
        ratios: mask ratios, k over the number of value vectors of a layer.
        position: prompt tokens whose coefficients count, the `mean` over all or the `last`.
        scope: take the k highest scores of each `layer`, or as many from the whole `model`.
        protocol: `paper` chooses and scores on the same questions; `holdout` chooses on fold 0
            and scores on fold 1.
        folds: of the questions that `paper` uses, 0, 1 or both. None: 1 where a micro model is
            measured, alone or beside others, for it was trained on the clozes of fold 0; else both.
        controls: draws of each control mask; 0 for none.
        nulls: the kinds of control masks, of random, magnitude and other.
        general: unrelated questions a concept's masks are scored on.
        seed: of the general questions and the controls, from 0 to 2^32 - 1.
        row_tokens, batch_tokens: how a forward pass is filled, see `score_options`.
    """

    ratios: tuple[Annotated[float, Field(ge=0, le=1)], ...] = RATIOS
    position: Position = "mean"
    scope: Scope = "layer"
    protocol: Protocol = "paper"
    folds: tuple[Literal[0, 1], ...] | None = Field(default=None, min_length=1)
    controls: int = Field(default=1, ge=0)
    nulls: tuple[Null, ...] = ("random", "magnitude", "other")
    general: Count = 10
    seed: Seed = 0
    row_tokens: Count = ROW_TOKENS
    batch_tokens: Count = BATCH_TOKENS

    @field_validator("ratios")
    @classmethod
    def _ratios(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        # A ratio of 0 is always measured: it is the mask `none`.
        return tuple(sorted(set(ratios) - {0}))

    @field_validator("folds", "nulls")
    @classmethod
    def _sorted(cls, values: tuple | None) -> tuple | None:
        return values and tuple(sorted(set(values), key=(0, 1, *MASKS).index))

    @property
    def choose_on(self) -> tuple[int, ...]:
        return (0,) if self.protocol == "holdout" else self.folds or (0, 1)

    @property
    def score_on(self) -> tuple[int, ...]:
        return (1,) if self.protocol == "holdout" else self.folds or (0, 1)

    def with_folds(self, folds: tuple[int, ...]) -> Choices:
        """`choices.with_folds((1,))`: the same with these folds, unless they were chosen before."""
        return self if self.folds is not None else self.model_copy(update={"folds": folds})


class Tables(NamedTuple):
    """What a measurement gives: see `PSS_COLUMNS` and `DETAIL_COLUMNS`; masks by name."""

    pss: pd.DataFrame
    details: pd.DataFrame
    masks: dict[str, Tensor]


class _Mask(NamedTuple):
    kind: str
    ratio: float
    seed: int
    vectors: Tensor


def general_questions(
    questions: Sequence[Question], concept: str, choices: Choices
) -> list[Question]:
    """`general_questions(questions, "France", choices)`: unrelated questions for its masks.

    Drawn without replacement from the questions of all other concepts (in the folds that the
    protocol scores on), by a seed of the concept's own, so that a concept keeps its general
    questions whichever shard it is measured in.
    """
    others = [q for q in questions if q.concept != concept and q.fold in choices.score_on]
    if len(others) < choices.general:
        raise InputError(
            f"general {choices.general}: only {len(others)} questions on other concepts than "
            f"{concept!r}; give more concepts or a smaller number"
        )
    draw = _generator(choices.seed, "general", concept)
    chosen = torch.randperm(len(others), generator=draw)[: choices.general].tolist()
    return [others[index] for index in sorted(chosen)]


def asked_questions(
    questions: Sequence[Question],
    concept: str,
    choices: Choices,
    unrelated: Sequence[Question] | None = None,
) -> list[tuple[Question, Literal["concept", "general"]]]:
    """`asked_questions(questions, "France", choices)`: what each of its masks is scored on.

    Args:
        unrelated: what general questions are drawn from, if not from all `questions`.
    """
    own = [q for q in questions if q.concept == concept and q.fold in choices.score_on]
    general = general_questions(questions if unrelated is None else unrelated, concept, choices)
    return [(q, "concept") for q in own] + [(q, "general") for q in general]


def count_masks(choices: Choices) -> int:
    """`count_masks(choices)`: the masks of a concept, its controls and `none` among them."""
    return 1 + len(choices.ratios) * (1 + len(choices.nulls) * choices.controls)


def concept_masks(coefficients: ConceptCoefficients, concept: str, choices: Choices) -> list[_Mask]:
    """`concept_masks(coefficients, "France", choices)`: none, its masks, and their controls."""
    layers, width = coefficients.sums.shape[2:]
    scores = value_vector_scores(coefficients, concept, choices.choose_on)
    magnitudes = coefficients.related(concept, choices.choose_on)
    masks = [_Mask("none", 0.0, choices.seed, torch.empty(0, 2, dtype=torch.int32))]
    for ratio in choices.ratios:
        own = top_vectors(scores, ratio, choices.scope)
        masks.append(_Mask("concept", ratio, choices.seed, own))
        for seed in range(choices.seed, choices.seed + choices.controls):
            draw = _generator(seed, "control", concept, ratio)
            chance = random_vectors(own, layers, width, draw)
            masks.append(_Mask("random", ratio, seed, chance))
            if "magnitude" in choices.nulls:
                matched = magnitude_matched_vectors(own, magnitudes, draw)
                masks.append(_Mask("magnitude", ratio, seed, matched))
            if "other" in choices.nulls:
                partner = other_concept(coefficients.concepts, concept, seed)
                theirs = value_vector_scores(coefficients, partner, choices.choose_on)
                other = top_vectors(theirs, ratio, choices.scope)
                masks.append(_Mask("other", ratio, seed, other))
    return [mask for mask in masks if mask.kind in ("none", "concept", *choices.nulls)]


def other_concept(concepts: Sequence[str], concept: str, seed: int) -> str:
    """`other_concept(concepts, "France", 0)`: whose mask is the control; never its own.

    Every concept is the partner of exactly one: the next on a circle shuffled by the seed.
    """
    circle = torch.randperm(len(concepts), generator=_generator(seed, "other")).tolist()
    place = circle.index(list(concepts).index(concept))
    return concepts[circle[(place + 1) % len(circle)]]


def measure_concepts(
    name: str,
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    concepts: Sequence[str],
    choices: Choices,
    coefficients: ConceptCoefficients,
    *,
    unrelated: Sequence[Question] | None = None,
    unmasked: Mapping[str, Tensor] | None = None,
    engine: Engine | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Tables:
    """`tables = measure_concepts("smollm2-135m", view, tokenizer, questions, concepts, ...)`.

    Args:
        name: what the model is called in the tables.
        questions: of all concepts of the study; general questions are drawn from them.
        concepts: those to measure here.
        choices: see `Choices`.
        coefficients: of all concepts of the study, from `record_concepts`.
        unrelated: what general questions are drawn from, if not from all `questions`.
        unmasked: scores without a mask that are known, by question id, as `score_options` gives.
        engine: see `score_options`.
        progress: called with the number of question evaluations done.
    """
    items: dict[str, Item] = {}
    keeps: list[Tensor | None] = []
    masks: dict[str, Tensor] = {}
    asked: list[tuple[Request, Question, dict[str, Any]]] = []
    for concept in concepts:
        own = asked_questions(questions, concept, choices, unrelated)
        for mask in concept_masks(coefficients, concept, choices):
            if mask.kind == "none":
                keeps.append(None)
            else:
                keeps.append(keep_tensor(mask.vectors, view.layers, view.width))
                masks[mask_name(name, concept, mask.ratio, mask.kind, mask.seed)] = mask.vectors
            for question, role in own:
                if question.id not in items:
                    items[question.id] = encode(tokenizer, question)
                item = items[question.id]
                row = {
                    "model": name,
                    "protocol": choices.protocol,
                    "question_id": question.id,
                    "role": role,
                    "mask_concept": concept,
                    "ratio": mask.ratio,
                    "mask": mask.kind,
                    "seed": mask.seed,
                    "option_tokens": [len(option) for option in item.options],
                }
                asked.append((Request(item, len(keeps) - 1), question, row))
    known = [
        (unmasked or {}).get(question.id) if row["mask"] == "none" else None
        for _, question, row in asked
    ]
    found = iter(
        score_options(
            view,
            [request for (request, *_), score in zip(asked, known, strict=True) if score is None],
            keeps,
            engine=engine,
            row_tokens=choices.row_tokens,
            batch_tokens=choices.batch_tokens,
            progress=progress,
        )
    )
    rows = []
    for (_, question, row), score in zip(asked, known, strict=True):
        logprobs = (next(found) if score is None else score).tolist()
        rows.append(row | {"option_logprobs": logprobs} | mark(logprobs, question))
    details = pd.DataFrame(rows, columns=list(DETAIL_COLUMNS))
    return Tables(pss_rows(details, questions), details, masks)


def evaluations(choices: Choices, questions: Sequence[Question], concepts: Sequence[str]) -> int:
    """How many (question, mask) pairs `measure_concepts` scores: the length of its progress."""
    own = sum(q.concept in set(concepts) and q.fold in choices.score_on for q in questions)
    return count_masks(choices) * (own + choices.general * len(concepts))


def mask_name(model: str, concept: str, ratio: float, kind: str, seed: int) -> str:
    """The name of a mask in `masks.safetensors`: `MODEL/CONCEPT/RATIO/MASK/SEED`.

    A slash in the concept is `%2F`, and `%` is `%25`: two masks never have one name.
    """
    concept = concept.replace("%", "%25").replace("/", "%2F")
    return f"{model}/{concept}/{repr(float(ratio)).removesuffix('.0')}/{kind}/{seed}"


def read_mask_name(name: str) -> tuple[str, str, float, str, int]:
    """`model, concept, ratio, kind, seed = read_mask_name(name)`: what `mask_name` was given."""
    model, concept, ratio, kind, seed = name.rsplit("/", 4)
    concept = concept.replace("%2F", "/").replace("%25", "%")
    return model, concept, float(ratio), kind, int(seed)


def _generator(*key: object) -> torch.Generator:
    """A generator seeded by what it is for, so that no draw depends on the order of another."""
    return generator_of(repr(key))


def generator_of(key: str) -> torch.Generator:
    """`generator_of("0 France")`: seeded by the digest of a text."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def pss_rows(details: pd.DataFrame, questions: Sequence[Question]) -> pd.DataFrame:
    """`pss_rows(study.details, questions)`: the rows of `PSS_COLUMNS`, from answers.

    Args:
        details: columns of `DETAIL_COLUMNS`; leave rows out to see what fewer questions give.
        questions: of all concepts, for their domains and tiers.
    """
    about = {q.concept: (q.domain, q.tier) for q in questions}
    keys = ["model", "mask_concept", "ratio", "mask", "seed", "protocol"]
    grouped = details.groupby([*keys, "role"], sort=False)["correct_norm"].agg(["mean", "size"])
    wide = grouped.unstack("role").reset_index()
    table = pd.DataFrame({key: wide[key] for key in keys}).rename(
        columns={"mask_concept": "concept"}
    )
    table["domain"] = [about[concept][0] for concept in table["concept"]]
    table["tier"] = [about[concept][1] for concept in table["concept"]]
    for role in ("concept", "general"):
        table[f"{role}_accuracy"] = wide["mean", role]
        table[f"n_{role}"] = wide["size", role]
    return table[list(PSS_COLUMNS)]


def method_key(choices: Choices) -> dict[str, Any]:
    """What of the method a stored result depends on, beside the model and the questions."""
    return {"choices": choices.model_dump(mode="json"), "scoring_version": SCORING_VERSION}
