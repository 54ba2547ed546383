"""The parameter specialization score (PSS) of a model, its nulls and its intervals.

    tables = measure_concepts(view, tokenizer, questions, concepts, choices, coefficients)
    tables.pss          # a row per (model, concept, ratio, mask, seed)
    summarize(pss)      # a row per (model, protocol, mask, ratio), with intervals
    peak_pss(pss)       # the maximum over the ratios, with intervals

Names are the paper's (section 3): C(k) is the accuracy on a concept's own questions under its
mask, G(k) on unrelated questions under the same mask, PSS(k) = |G(k) - C(k)| / G(0), and peak PSS
its maximum over the mask ratios. Two readings of "accuracy" are kept apart: `pooled` over all
concepts before the absolute value, and `per_concept`, the mean of each concept's own PSS. A
headline accuracy is lm-evaluation-harness's `acc_norm`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

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
from paramspec.plain import number
from paramspec.specwiki import TIERS, Question

Protocol = Literal["paper", "holdout"]
Null = Literal["random", "magnitude", "other"]
MASKS = ("none", "concept", "random", "magnitude", "other")
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2)


def check_seed(seed: int) -> int:
    """`check_seed(0)`: the seed, or a ValueError where it is out of its range."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed}: expected a number from 0 to {2**32 - 1}")
    return seed


class Choices(BaseModel):
    """Every choice of a PSS measurement that the paper leaves open, and its sample sizes.

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

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratios: tuple[float, ...] = RATIOS
    position: Position = "mean"
    scope: Scope = "layer"
    protocol: Protocol = "paper"
    folds: tuple[int, ...] | None = None
    controls: int = 1
    nulls: tuple[Null, ...] = ("random", "magnitude", "other")
    general: int = 10
    seed: int = 0
    row_tokens: int = ROW_TOKENS
    batch_tokens: int = BATCH_TOKENS

    @field_validator("ratios")
    @classmethod
    def _ratios(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        for ratio in ratios:
            if not 0 <= ratio <= 1:
                raise ValueError(f"ratio {ratio}: expected a share of value vectors, from 0 to 1")
        # A ratio of 0 is always measured: it is the mask `none`.
        return tuple(sorted(set(ratios) - {0}))

    @field_validator("folds")
    @classmethod
    def _folds(cls, folds: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if folds is None:
            return None
        if not folds or not set(folds) <= {0, 1}:
            raise ValueError(f"folds {list(folds)}: expected 0, 1 or both")
        return tuple(sorted(set(folds)))

    @field_validator("nulls")
    @classmethod
    def _nulls(cls, nulls: tuple[Null, ...]) -> tuple[Null, ...]:
        return tuple(sorted(set(nulls), key=MASKS.index))

    @field_validator("controls", "general", "row_tokens", "batch_tokens")
    @classmethod
    def _counts(cls, value: int, info) -> int:
        least = 0 if info.field_name == "controls" else 1
        if value < least:
            raise ValueError(f"{info.field_name} {value}: expected at least {least}")
        return value

    @field_validator("seed")
    @classmethod
    def _seed(cls, seed: int) -> int:
        return check_seed(seed)

    @property
    def choose_on(self) -> tuple[int, ...]:
        return (0,) if self.protocol == "holdout" else self.folds or (0, 1)

    @property
    def score_on(self) -> tuple[int, ...]:
        return (1,) if self.protocol == "holdout" else self.folds or (0, 1)

    def with_folds(self, folds: tuple[int, ...]) -> Choices:
        """`choices.with_folds((1,))`: the same with these folds, unless they were chosen before."""
        return self if self.folds is not None else self.model_copy(update={"folds": folds})


def parse_choices(*, ratios: str | Sequence[float] = RATIOS, **others: object) -> Choices:
    """`parse_choices(ratios="0.01,0.05", scope="layer")`: `Choices`, or one line on what is wrong.

    Raises:
        InputError: for a ratio that is not a number from 0 to 1, or an unknown choice.
    """
    if isinstance(ratios, str):
        try:
            ratios = [number(part.strip()) for part in ratios.split(",")]
        except ValueError as error:
            raise InputError(
                f"ratios {ratios!r}: expected numbers from 0 to 1 separated by commas, as 0.01,0.05"
            ) from error
    try:
        return Choices(ratios=ratios, **others)
    except ValidationError as error:
        first = error.errors()[0]
        place, message = first["loc"][0], first["msg"].removeprefix("Value error, ")
        if first["type"] == "value_error":
            raise InputError(message) from error
        raise InputError(f"{place} {first['input']!r}: {message}") from error


class Tables(NamedTuple):
    """What a measurement gives: see `PSS_COLUMNS` and `DETAIL_COLUMNS`; masks by name."""

    pss: pd.DataFrame
    details: pd.DataFrame
    masks: dict[str, Tensor]


PSS_COLUMNS = {
    "model": "name of the model",
    "concept": "whose mask, and whose own questions",
    "domain": "the concept's domain",
    "tier": "the concept's frequency tier: high, medium, low",
    "ratio": "mask ratio; 0 without a mask",
    "mask": "none, concept, random, magnitude, or other",
    "seed": "of the mask's random draw and of the general questions",
    "protocol": "paper or holdout",
    "concept_accuracy": "acc_norm on the concept's own questions under the mask",
    "general_accuracy": "acc_norm on unrelated questions under the mask",
    "n_concept": "how many own questions",
    "n_general": "how many unrelated questions",
}
DETAIL_COLUMNS = {
    "model": "name of the model",
    "protocol": "paper or holdout",
    "question_id": "the question answered",
    "role": "concept (the mask's concept's own) or general (unrelated to it)",
    "mask_concept": "whose mask",
    "ratio": "mask ratio; 0 without a mask",
    "mask": "none, concept, random, magnitude, or other",
    "seed": "of the mask's random draw",
    "option_logprobs": "log-likelihood of each option, nats",
    "option_tokens": "tokens of each option",
    "predicted": "option with the highest log-likelihood, the first of those that tie",
    "predicted_norm": "the same of the log-likelihood per character",
    "correct": "1 if predicted is the answer, 0 if not, 1/n if it is one of n that tie (acc)",
    "correct_norm": "the same of predicted_norm (acc_norm)",
}


# --- measuring ----------------------------------------------------------------------------------


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
    """`concept_masks(coefficients, "France", choices)`: its masks and their controls."""
    layers, width = coefficients.sums.shape[2:]
    scores = value_vector_scores(coefficients, concept, choices.choose_on)
    magnitudes = coefficients.related(concept, choices.choose_on)
    masks = []
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
    return [mask for mask in masks if mask.kind in ("concept", *choices.nulls)]


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
    everything = torch.ones(view.layers, view.width, dtype=torch.bool)
    items: dict[str, Item] = {}
    requests, rows, keeps, masks = [], [], [], {}
    for concept in concepts:
        asked = asked_questions(questions, concept, choices, unrelated)
        none = _Mask("none", 0.0, choices.seed, torch.empty(0, 2, dtype=torch.int32))
        for mask in (none, *concept_masks(coefficients, concept, choices)):
            if mask.kind == "none":
                keeps.append(None)
            else:
                keeps.append(keep_tensor(mask.vectors, *everything.shape))
                masks[mask_name(name, concept, mask.ratio, mask.kind, mask.seed)] = mask.vectors
            for question, role in asked:
                if question.id not in items:
                    items[question.id] = encode(tokenizer, question)
                requests.append(Request(items[question.id], len(keeps) - 1))
                rows.append((question, role, concept, mask))
    known = [
        (unmasked or {}).get(question.id) if mask.kind == "none" else None
        for question, _, _, mask in rows
    ]
    found = iter(
        score_options(
            view,
            [request for request, score in zip(requests, known, strict=True) if score is None],
            keeps,
            engine=engine,
            row_tokens=choices.row_tokens,
            batch_tokens=choices.batch_tokens,
            progress=progress,
        )
    )
    scores = [next(found) if score is None else score for score in known]
    details = pd.DataFrame(
        [
            _detail(name, choices.protocol, row, request, score)
            for row, request, score in zip(rows, requests, scores, strict=True)
        ],
        columns=list(DETAIL_COLUMNS),
    )
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


def _detail(name: str, protocol: str, row: tuple, request: Request, score: Tensor) -> tuple:
    question, role, concept, mask = row
    return (
        name,
        protocol,
        question.id,
        role,
        concept,
        mask.ratio,
        mask.kind,
        mask.seed,
        score.tolist(),
        [len(option) for option in request.item.options],
        *mark(score.tolist(), question).values(),
    )


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


def accuracy_table(
    answers: pd.DataFrame, by: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """`accuracy_table(answers, by=["tier"])`: accuracy by group, with its 95 % interval.

    Args:
        answers: from `score_questions`; column `correct_norm` is averaged.
        by: columns that make the groups; none for all rows together.

    Returns:
        `by`, `group` (their names and values, joined by " / "), `accuracy`, `low` and `high` (a
        bootstrap over concepts; of a single concept, not a number), and `n`, the number of
        questions. Tiers come in their order, other groups by accuracy.
    """
    grouped = answers.groupby(list(by), sort=False) if by else [((), answers)]
    rows = []
    for values, part in grouped:
        right = part.groupby("concept")["correct_norm"].agg(["sum", "size"]).to_numpy().T

        def accuracy(sample: np.ndarray, axis: int, right=right) -> np.ndarray:
            return right[0][sample].sum(-1) / right[1][sample].sum(-1)

        low, high = _interval(accuracy, right.shape[1], resamples, seed)
        group = " / ".join(map(str, values))
        row = (" / ".join(by), group, float(part["correct_norm"].mean()), low, high, len(part))
        rows.append(row)
    table = pd.DataFrame(rows, columns=["by", "group", "accuracy", "low", "high", "n"])
    if list(by) == ["tier"]:
        return table.sort_values("group", key=lambda names: names.map(TIERS.index))
    return table.sort_values("accuracy", ascending=False)


# --- summarizing --------------------------------------------------------------------------------


def summarize(pss: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """`summarize(pss)`: accuracies and PSS at each ratio and mask, with 95 % intervals.

    Of several draws of a control, each gives its own value, and the mean of them is told: taken
    before the absolute value, it would shrink with the number of draws, and a control would not
    show what a single mask does. Intervals are percentiles of a bootstrap over concepts: a
    concept's questions, masks and draws stay together (`scipy.stats.bootstrap`).

    Returns:
        A row per (model, protocol, mask, ratio): `concepts`; then, each with `_low` and `_high`:
        `concept_accuracy` and `general_accuracy`, pooled over questions; `pss_pooled`,
        |G(k) - C(k)| / G(0); `pss_per_concept`, the mean over concepts of the same ratio with
        their own C(k) and G(k), over the pooled G(0); `did`, the difference in differences
        ((G(k) - C(k)) - (G(0) - C(0))) / G(0), signed; `general_change`, G(k) - G(0); and, with
        no interval, `floor_pooled` and `floor_per_concept`, what PSS would be if nothing but
        sampling parted C from G (see `sampling_floor`).

    Raises:
        InputError: if a mask lacks a row of a concept, or has two, or if there is no mask `none`.
    """
    rows = []
    for (model, protocol), part in pss.groupby(["model", "protocol"], sort=False):
        counts = ConceptCounts.of(part)
        for mask, ratio in counts.cells:
            row = {"model": model, "protocol": protocol, "mask": mask, "ratio": ratio}
            row["concepts"] = len(counts.names)
            row |= _with_intervals(counts, [(mask, ratio)], cell_statistics, resamples, seed)
            row |= _floors(counts, (mask, ratio))
            rows.append(row)
    return pd.DataFrame(rows)


def peak_pss(pss: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """`peak_pss(pss)`: the maximum of PSS over the ratios, with 95 % intervals.

    The maximum is taken anew in every resample of concepts and for every draw of a control. A
    maximum of noisy values is biased upwards: read a mask's peak beside those of its controls.

    Returns:
        A row per (model, protocol, mask): `peak_pooled` and `peak_per_concept`, each with `_low`
        and `_high`, and `ratio`, where the pooled PSS peaks.
    """
    rows = []
    for (model, protocol), part in pss.groupby(["model", "protocol"], sort=False):
        counts = ConceptCounts.of(part)
        for mask in dict.fromkeys(mask for mask, _ in counts.cells if mask != "none"):
            cells = [cell for cell in counts.cells if cell[0] == mask]
            row = {"model": model, "protocol": protocol, "mask": mask}
            row |= _with_intervals(counts, cells, _peak_statistics, resamples, seed)
            pooled = [
                cell_statistics(counts.none, counts.values[cell])["pss_pooled"].mean()
                for cell in cells
            ]
            row["ratio"] = cells[int(np.argmax(pooled))][1]
            rows.append(row)
    return pd.DataFrame(rows)


def sampling_floor(
    n_concept: np.ndarray, n_general: np.ndarray, accuracy: float, *, draws: int = 4000
) -> tuple[float, float]:
    """`pooled, per_concept = sampling_floor(n_concept, n_general, 0.7)`: PSS of no effect.

    The mean of |G - C| / accuracy when every question, own or general, is answered rightly with
    the same probability: what an absolute difference shows of sampling alone.

    Args:
        n_concept, n_general: questions of each concept, `[concepts]`.
        accuracy: that probability, above 0.
    """
    if accuracy <= 0:
        return float("nan"), float("nan")
    draw = np.random.default_rng(0)
    own = draw.binomial(n_concept, accuracy, (draws, len(n_concept)))
    general = draw.binomial(n_general, accuracy, (draws, len(n_general)))
    pooled = abs(general.sum(1) / n_general.sum() - own.sum(1) / n_concept.sum()).mean()
    per_concept = abs(general / n_general - own / n_concept).mean()
    return float(pooled / accuracy), float(per_concept / accuracy)


@dataclass(frozen=True)
class ConceptCounts:
    """Right answers and questions, per concept: `[4, draws, concepts]` for each (mask, ratio).

    The four are right own, own, right general, general; a draw is a seed.
    """

    names: list[str]
    cells: list[tuple[str, float]]
    values: dict[tuple[str, float], np.ndarray]

    @classmethod
    def of(cls, part: pd.DataFrame) -> ConceptCounts:
        names = list(dict.fromkeys(part["concept"]))
        table = part.assign(
            right_own=part["concept_accuracy"] * part["n_concept"],
            right_general=part["general_accuracy"] * part["n_general"],
        )
        values = {
            cell: np.stack([_draw(draw, names) for _, draw in rows.groupby("seed")], axis=1)
            for cell, rows in table.groupby(["mask", "ratio"], sort=False)
        }
        if ("none", 0.0) not in values:
            raise InputError("mask 'none': no row; PSS is relative to the accuracy without a mask")
        order = sorted(values, key=lambda cell: (MASKS.index(cell[0]), cell[1]))
        draws = {mask: values[mask, ratio].shape[1] for mask, ratio in order}
        for mask, ratio in order:
            if values[mask, ratio].shape[1] != draws[mask]:
                raise InputError(f"mask {mask!r}, ratio {ratio}: not as many draws as other ratios")
        return cls(names, order, values)

    @property
    def none(self) -> np.ndarray:
        return self.values["none", 0.0].sum(axis=1, keepdims=True)


def _draw(rows: pd.DataFrame, names: list[str]) -> np.ndarray:
    """The counts of one mask, ratio and seed, `[4, concepts]`, a row for each concept."""
    place = "mask {mask!r}, ratio {ratio}, seed {seed}".format(**rows.iloc[0])
    twice = rows["concept"][rows["concept"].duplicated()]
    if len(twice):
        raise InputError(f"{place}: more than one row for {twice.iloc[0]!r}; keep one")
    missing = [name for name in names if name not in set(rows["concept"])]
    if missing:
        raise InputError(f"{place}: no row for {missing[0]!r}; measure it, or leave it out")
    columns = ["right_own", "n_concept", "right_general", "n_general"]
    return rows.set_index("concept").loc[names, columns].to_numpy(dtype=float).T


def _pooled(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """C and G pooled over the last axis, concepts."""
    total = counts.sum(-1)
    return total[0] / total[1], total[2] / total[3]


def cell_statistics(none: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """`cell_statistics(counts.none, counts.values["concept", 0.05])["pss_pooled"]`.

    Args:
        none, counts: right answers and questions without and with a mask, `[4, draws, ...,
            concepts]`, as in `ConceptCounts`.

    Returns:
        Each statistic that `summarize` tells, `[draws, ...]`.
    """
    c0, g0 = _pooled(none)
    c, g = _pooled(counts)
    gaps = abs(counts[2] / counts[3] - counts[0] / counts[1]).mean(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "concept_accuracy": c,
            "general_accuracy": g,
            "pss_pooled": abs(g - c) / g0,
            "pss_per_concept": gaps / g0,
            "did": ((g - c) - (g0 - c0)) / g0,
            "general_change": g - g0,
        }


def _peak_statistics(none: np.ndarray, *cells: np.ndarray) -> dict[str, np.ndarray]:
    each = [cell_statistics(none, counts) for counts in cells]
    return {
        "peak_pooled": np.max([one["pss_pooled"] for one in each], axis=0),
        "peak_per_concept": np.max([one["pss_per_concept"] for one in each], axis=0),
    }


def _with_intervals(
    counts: ConceptCounts,
    cells: list[tuple[str, float]],
    statistics: Callable[..., dict[str, np.ndarray]],
    resamples: int,
    seed: int,
) -> dict[str, float]:
    """Each statistic, the mean over draws, and its 95 % interval over resampled concepts."""
    tables = [counts.none, *(counts.values[cell] for cell in cells)]
    point = {name: values.mean(axis=0) for name, values in statistics(*tables).items()}

    def resampled(sample: np.ndarray, axis: int) -> np.ndarray:
        values = statistics(*(table[..., sample] for table in tables)).values()
        return np.stack([value.mean(axis=0) for value in values])

    row = {name: float(value) for name, value in point.items()}
    bounds = _interval(resampled, len(counts.names), resamples, seed)
    low, high = (np.broadcast_to(bound, len(point)).tolist() for bound in bounds)
    row |= {f"{name}_low": value for name, value in zip(point, low, strict=True)}
    row |= {f"{name}_high": value for name, value in zip(point, high, strict=True)}
    return row


def _interval(
    statistic: Callable[..., np.ndarray], concepts: int, resamples: int, seed: int
) -> tuple[np.ndarray | float, np.ndarray | float]:
    """Bounds of the 95 % bootstrap interval of a statistic of concept indices `[..., concepts]`."""
    from scipy import stats  # half a second, of which workers have no use

    if concepts < 2:
        return float("nan"), float("nan")
    with warnings.catch_warnings():
        # Where G(0) is 0 a ratio is not a number, and so are its bounds.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (np.arange(concepts),),
            statistic,
            n_resamples=resamples,
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return interval.low, interval.high


def _floors(counts: ConceptCounts, cell: tuple[str, float]) -> dict[str, float]:
    own_right, own, general_right, general = counts.values[cell]
    accuracy = (own_right.sum() + general_right.sum()) / (own.sum() + general.sum())
    base = float(_pooled(counts.none)[1].item())
    # All draws of a control meet the same questions: the floor is that of one.
    pooled, per_concept = sampling_floor(own[0].astype(int), general[0].astype(int), accuracy)
    # sampling_floor divides by the accuracy under the mask; PSS divides by G(0).
    scale = accuracy / base if base > 0 else float("nan")
    return {"floor_pooled": pooled * scale, "floor_per_concept": per_concept * scale}


def method_key(choices: Choices) -> dict[str, object]:
    """What of the method a stored result depends on, beside the model and the questions."""
    return {"choices": choices.model_dump(mode="json"), "scoring_version": SCORING_VERSION}


def verdict(*lows: float, measured: bool = True) -> str:
    """`verdict(interval_low, other_low)`: whether a claim that something rises holds in this run.

    Args:
        lows: the lower bounds of the 95 % intervals of all that the claim says rises. One that is
            missing (not a number) is a condition that this run did not measure: it supports
            nothing, and without it the claim is neither reproduced nor not.
        measured: False if the run did not measure what the claim is about.
    """
    if not measured or not lows or np.isnan(lows).any():
        return "not run here"
    return "reproduced" if min(lows) > 0 else "not reproduced"


def best_general_change(
    pss: pd.DataFrame, ratios: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """`best_general_change(study.pss, [0.05, 0.1])`: the largest G(k) - G(0), with its interval.

    The best of several ratios is the best by luck, too, and its own interval knows nothing of
    that. So in each resample of concepts the maximum over the ratios is taken of how far a change
    lies from its measured value; the interval reaches down by the 97.5th percentile of these
    maxima, and up by that of the minima. If no ratio changes anything, it lies above zero in 2.5 %
    of all studies, however many ratios there are.

    Args:
        pss: rows of one model and protocol.
        ratios: those among which the best is chosen, of the concepts' own masks.

    Returns:
        `ratio`, `value`, `low` and `high`; the bounds are not numbers with a single concept.
    """
    counts = ConceptCounts.of(pss)
    concepts = len(counts.names)
    draw = np.random.default_rng(seed)
    samples = draw.integers(concepts, size=(resamples, concepts))
    samples = np.concatenate([np.arange(concepts)[None], samples])
    changes = np.stack(
        [
            cell_statistics(
                counts.none[..., samples], counts.values["concept", ratio][..., samples]
            )["general_change"].mean(axis=0)
            for ratio in ratios
        ]
    )
    best = int(changes[:, 0].argmax())
    value = float(changes[best, 0])
    row = {"ratio": float(ratios[best]), "value": value, "low": np.nan, "high": np.nan}
    if concepts > 1:
        luck = changes[:, 1:] - changes[:, :1]
        row["low"] = value - float(np.percentile(luck.max(axis=0), 97.5))
        row["high"] = value - float(np.percentile(luck.min(axis=0), 2.5))
    return row
