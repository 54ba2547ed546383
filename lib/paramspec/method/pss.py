"""The parameter specialization score (PSS) of a model: its masks, their controls, their answers.

    tables = measure_concepts(name, view, tokenizer, questions, concepts, choices, coefficients)

Names are the paper's (section 3): C(k) is the accuracy on a concept's own questions under its mask,
G(k) on unrelated questions under the same mask, PSS(k) = |G(k) - C(k)| / G(0), and peak PSS its
maximum over the mask ratios; `stats.summary` computes them. A headline accuracy is
lm-evaluation-harness's `acc_norm`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
import torch
from pydantic import Field, field_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from paramspec.checked import Checked, Count, Seed
from paramspec.errors import InputError
from paramspec.method import masks
from paramspec.method.batches import BATCH_TOKENS
from paramspec.method.hooks import Position, ValueVectorView
from paramspec.method.masks import ConceptCoefficients
from paramspec.method.rows import ROW_TOKENS, Engine, Request
from paramspec.method.scoring import SCORING_VERSION, encode_all, mark, score_options
from paramspec.seeds import by_hash
from paramspec.specwiki import Question
from paramspec.tables import DETAIL_COLUMNS, MASKS, PSS_COLUMNS

Protocol = Literal["paper", "holdout"]
Null = Literal["random", "magnitude", "other"]
Role = Literal["concept", "general"]


class Choices(Checked):
    """Every choice of a PSS measurement that the paper leaves open, and its sample sizes.

    >>> Choices(ratios=(0.05, 0.01), protocol="holdout").ratios
    (0.01, 0.05)

    Attributes:
        ratios: mask ratios, k over the number of value vectors of a layer.
        position: prompt tokens whose coefficients count, the `mean` over all or the `last`.
        spared: a share of each layer's value vectors, those most active over all questions, that no
            concept's mask holds.
        ablation: a masked coefficient becomes `zero`, or its `mean` over all questions' clozes.
        scope: take the k highest scores of each `layer`, or as many from the whole `model`.
        protocol: `paper` chooses and scores on the same questions; `holdout` chooses on fold 0
            and scores on fold 1.
        folds: of the questions that `paper` uses, 0, 1 or both. None: 1 where a micro model is
            among those measured, since it was trained on the clozes of fold 0; else both.
        controls: draws of each control mask; 0 for none.
        nulls: the kinds of control masks, of random, magnitude and other.
        general: unrelated questions that a concept's masks are scored on.
        general_by: they are drawn one `question` at a time, or all of one `concept` at a time.
        seed: of the general questions and the controls, from 0 to 2^32 - 1.
        chat: put each prompt into the model's chat template.
        row_tokens, batch_tokens: see `score_options`.
    """

    ratios: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.01, 0.02, 0.05, 0.1, 0.2)
    position: Position = "mean"
    scope: masks.Scope = "layer"
    spared: float = Field(default=0.0, ge=0, le=1)
    ablation: Literal["zero", "mean"] = "zero"
    protocol: Protocol = "paper"
    folds: tuple[Literal[0, 1], ...] | None = Field(default=None, min_length=1)
    controls: int = Field(default=1, ge=0)
    nulls: tuple[Null, ...] = ("random", "magnitude", "other")
    general: Count = 10
    general_by: Literal["question", "concept"] = "question"
    seed: Seed = 0
    chat: bool = False
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
        """`choices.with_folds((1,))`: the same with these folds, unless folds were chosen."""
        return self if self.folds is not None else self.model_copy(update={"folds": folds})


class Tables(NamedTuple):
    """The result of a measurement: see `PSS_COLUMNS` and `DETAIL_COLUMNS`; masks by name."""

    pss: pd.DataFrame
    details: pd.DataFrame
    masks: dict[str, Tensor]


class _Mask(NamedTuple):
    ratio: float
    kind: str
    seed: int
    vectors: Tensor


def general_questions(
    questions: Sequence[Question], concept: str, choices: Choices
) -> list[Question]:
    """`general_questions(questions, "France", choices)`: unrelated questions for its masks.

    They are drawn from those on other concepts, of the scored folds, by a seed of the concept's
    own: a concept keeps its general questions in any shard.
    """
    others = [q for q in questions if q.concept != concept and q.fold in choices.score_on]
    if len(others) < choices.general:
        raise InputError(
            f"general {choices.general}: only {len(others)} questions on other concepts than "
            f"{concept!r}; give more concepts or a smaller number"
        )
    draw = generator_of((choices.seed, "general", concept))
    order = torch.randperm(len(others), generator=draw).tolist()
    if choices.general_by == "concept":
        first = {others[index].concept: place for place, index in reversed([*enumerate(order)])}
        order.sort(key=lambda index: first[others[index].concept])
    return [others[index] for index in sorted(order[: choices.general])]


def most_general(questions: Sequence[Question], choices: Choices) -> int:
    """`most_general(questions, choices)`: the unrelated questions that each concept can have."""
    asked = Counter(question.concept for question in questions if question.fold in choices.score_on)
    return asked.total() - max(asked.values(), default=0)


def asked_questions(
    questions: Sequence[Question],
    concept: str,
    choices: Choices,
    unrelated: Sequence[Question] | None = None,
) -> list[tuple[Question, Role]]:
    """`asked_questions(questions, "France", choices)`: those that all its masks are scored on."""
    own = [q for q in questions if q.concept == concept and q.fold in choices.score_on]
    general = general_questions(questions if unrelated is None else unrelated, concept, choices)
    return [(q, "concept") for q in own] + [(q, "general") for q in general]


def count_masks(choices: Choices) -> int:
    """The number of a concept's masks, `none` and controls included."""
    return 1 + sum(1 for _ in mask_cells(choices))


def mask_cells(choices: Choices) -> Iterator[tuple[float, str, int]]:
    """The ratio, kind and seed of each of a concept's masks but `none`, in order."""
    for ratio in choices.ratios:
        yield ratio, "concept", choices.seed
        for seed in range(choices.seed, choices.seed + choices.controls):
            yield from ((ratio, kind, seed) for kind in choices.nulls)


def concept_masks(coefficients: ConceptCoefficients, concept: str, choices: Choices) -> list[_Mask]:
    """No mask, the concept's masks, and their controls."""
    layers, width = coefficients.sums.shape[2:]
    spared = coefficients.most_active(choices.spared, choices.choose_on)

    def scored(name: str) -> Tensor:
        scores = masks.value_vector_scores(coefficients, name, choices.choose_on)
        return scores.masked_fill(spared, -torch.inf)

    scores = scored(concept)
    ascending = coefficients.related(concept, choices.choose_on).argsort(dim=1, stable=True)
    seeds = range(choices.seed, choices.seed + choices.controls)
    others = {}
    if "other" in choices.nulls:
        others = {
            seed: scored(other_concept(coefficients.concepts, concept, seed)) for seed in seeds
        }
    found = [_Mask(0.0, "none", choices.seed, torch.empty(0, 2, dtype=torch.int32))]
    for ratio in choices.ratios:
        own = masks.top_vectors(scores, ratio, choices.scope)
        found.append(_Mask(ratio, "concept", choices.seed, own))
        for seed in seeds:
            draw = generator_of((seed, "control", concept, ratio))
            drawn = {"random": masks.random_vectors(own, layers, width, draw)}
            if "magnitude" in choices.nulls:
                drawn["magnitude"] = masks.magnitude_matched_vectors(own, ascending, draw)
            if "other" in choices.nulls:
                drawn["other"] = masks.top_vectors(others[seed], ratio, choices.scope)
            found += [_Mask(ratio, kind, seed, drawn[kind]) for kind in choices.nulls]
    return found


def other_concept(concepts: Sequence[str], concept: str, seed: int) -> str:
    """The concept whose mask is the control `other`: the next on a circle shuffled by the seed."""
    circle = torch.randperm(len(concepts), generator=generator_of((seed, "other"))).tolist()
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
) -> Tables:
    """`tables = measure_concepts("smollm2-135m", view, tokenizer, questions, concepts, ...)`.

    `questions` and `coefficients`, from `record_concepts`, are of all concepts of the study,
    `concepts` those to measure. General questions are drawn from `unrelated`, if given. `unmasked`
    are known scores without a mask, by question id.
    """
    if choices.ablation == "mean" and view.ablated is None:
        view = replace(view, ablated=study_means(view, tokenizer, questions, choices))
    asked = {one: asked_questions(questions, one, choices, unrelated) for one in concepts}
    once = list({q.id: q for own in asked.values() for q, _ in own}.values())
    items = {item.name: item for item in encode_all(tokenizer, once, chat=choices.chat)}
    masked = [(one, mask) for one in concepts for mask in concept_masks(coefficients, one, choices)]
    keeps: list[Tensor | None] = []
    requests: list[Request] = []
    cells: list[tuple[str, _Mask, Question, Role, Tensor | None]] = []
    for number, (concept, mask) in enumerate(masked):
        bare = mask.kind == "none"
        keeps.append(None if bare else masks.keep_tensor(mask.vectors, view.layers, view.width))
        for question, role in asked[concept]:
            known = unmasked.get(question.id) if unmasked and bare else None
            cells.append((concept, mask, question, role, known))
            if known is None:
                requests.append(Request(items[question.id], number))
    budgets = choices.model_dump(include={"row_tokens", "batch_tokens"})
    found = iter(score_options(view, requests, keeps, engine=engine, **budgets))
    rows = []
    for concept, mask, question, role, known in cells:
        logprobs = (next(found) if known is None else known).tolist()
        row = {
            "model": name,
            "protocol": choices.protocol,
            "question_id": question.id,
            "concept": question.concept,
            "role": role,
            "mask_concept": concept,
            "ratio": mask.ratio,
            "mask": mask.kind,
            "seed": mask.seed,
            "option_logprobs": logprobs,
            "option_tokens": [len(option) for option in items[question.id].options],
        }
        rows.append(row | mark(logprobs, question))
    details = pd.DataFrame(rows, columns=list(DETAIL_COLUMNS))
    named = {mask_name(name, one, *mask[:3]): mask.vectors for one, mask in masked if mask.ratio}
    return Tables(pss_rows(details, questions), details, named)


def study_means(
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    choices: Choices,
) -> Tensor:
    """`study_means(view, tokenizer, questions, choices)`: the coefficients of `ablation="mean"`."""
    clozes = [question.cloze for question in questions]
    return masks.mean_coefficients(view, tokenizer, clozes, signed=True, chat=choices.chat)


def evaluations(choices: Choices, questions: Sequence[Question], concepts: Sequence[str]) -> int:
    """The number of (question, mask) pairs that `measure_concepts` scores."""
    named = set(concepts)
    own = sum(q.concept in named and q.fold in choices.score_on for q in questions)
    return count_masks(choices) * (own + choices.general * len(named))


def mask_name(model: str, concept: str, ratio: float, kind: str, seed: int) -> str:
    """The name of a mask in `masks.safetensors`: `MODEL/CONCEPT/RATIO/MASK/SEED`."""
    concept = concept.replace("%", "%25").replace("/", "%2F")  # two masks never have one name
    return f"{model}/{concept}/{repr(float(ratio)).removesuffix('.0')}/{kind}/{seed}"


def generator_of(key: object) -> torch.Generator:
    """A generator seeded by its purpose, so that no draw depends on the order of others."""
    return torch.Generator().manual_seed(int.from_bytes(by_hash(key)[:8], "big") >> 1)


def pss_rows(details: pd.DataFrame, questions: Sequence[Question]) -> pd.DataFrame:
    """`pss_rows(study.details, questions)`: rows of `PSS_COLUMNS`, from all or some answers."""
    about = {q.concept: (q.domain, q.tier) for q in questions}
    keys = ["model", "mask_concept", "ratio", "mask", "seed", "protocol"]
    grouped = details.groupby([*keys, "role"], sort=False)["correct_norm"].agg(["mean", "size"])
    wide = grouped.unstack("role")
    wide.columns = [f"{role}_accuracy" if of == "mean" else f"n_{role}" for of, role in wide]
    table = wide.reset_index().rename(columns={"mask_concept": "concept"})
    table["domain"] = [about[concept][0] for concept in table["concept"]]
    table["tier"] = [about[concept][1] for concept in table["concept"]]
    return table[list(PSS_COLUMNS)]


def method_key(choices: Choices) -> dict[str, Any]:
    """The part of a stored result's key that is neither the model nor the questions."""
    return {"choices": choices.model_dump(mode="json"), "scoring_version": SCORING_VERSION}
