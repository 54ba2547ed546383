"""What is asked of a model as it is, or once it is trained: each part gives a table.

evaluation = Evaluation(others=30, open_ended="question")
tables = evaluate(ready, questions, ("France", "gold"), evaluation)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from paramspec.checked import Checked, Count
from paramspec.errors import InputError
from paramspec.execution.limits import release_memory
from paramspec.method.batches import in_batches, prompt_batches
from paramspec.method.generation import (
    GENERATION_VERSION,
    MAX_NEW_TOKENS,
    OPEN_PROMPT,
    answer_matches,
    decode,
    first_lines,
    likeliest,
)
from paramspec.method.masks import record_concepts
from paramspec.method.pss import Choices, measure_concepts
from paramspec.models.tokens import front_tokens, token_ids
from paramspec.seeds import by_hash
from paramspec.specwiki import Question
from paramspec.studies.hallucination import sample_answers
from paramspec.studies.runner import Ready
from paramspec.studies.sweep import answer_table
from paramspec.studies.training import next_token_nats

EVALUATION_VERSION = 5  # raised whenever a change of this file could move what is stored
TABLES = ("answers", "generated", "texts", "pss", "samples")
PROSE = Path(__file__).with_name("prose.txt")  # prose.md says whose it is
PASSAGE_TOKENS = 128
LIKELIHOOD_TOKENS = 256  # of texts in a forward pass, whose logits are all in memory


class Evaluation(Checked):
    """What is asked of a model once it is trained.

    >>> evaluation = Evaluation(others=50, open_ended="cloze")
    >>> evaluation.samples
    10

    Attributes:
        folds: of the questions on the concepts trained on, those asked. None: 1 of a micro model,
            which was trained on the clozes of fold 0; else both.
        others: questions on other concepts, of the same folds; drawn once for all runs.
        open_ended: the questions on the trained concepts are also asked without options: as the
            `question` after examples, as the `cloze` alone (which is all that a micro model can
            continue), or not at all.
        stated: statements of other concepts whose likelihood is taken.
        prose: passages of 128 tokens of English prose whose likelihood is taken: the beginning of
            Jane Austen's "Mansfield Park" (`prose.txt`), some 90 passages.
        choices: PSS is measured with these, on the trained concepts against `others`; if given.
        sampled: of the questions asked open-ended, how many are also answered by sampling.
        samples: answers sampled to each of those.
        temperature: of the samples.
        seed: of the questions and statements on other concepts.
    """

    folds: tuple[int, ...] | None = None
    others: int = 0
    open_ended: Literal["question", "cloze", "no"] = "no"
    stated: int = 0
    prose: int = 0
    choices: Choices | None = None
    sampled: int = 0
    samples: Count = 10
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    seed: int = 0

    @property
    def asked_folds(self) -> tuple[int, ...]:
        """The folds of `folds`; both if they were not chosen."""
        return self.folds or (0, 1)

    @property
    def scored(self) -> set[int]:
        """The folds that are scored."""
        return {*(self.folds or ()), *(self.choices.score_on if self.choices else ())}

    def with_folds(self, folds: tuple[int, ...]) -> Evaluation:
        """`evaluation.with_folds((1,))`: the same with these folds, unless they were chosen."""
        folds = self.folds or folds
        choices = self.choices and self.choices.with_folds(folds)
        return self.model_copy(update={"folds": folds, "choices": choices})

    def key(self) -> dict[str, Any]:
        """All that answers depend on, beside the model, the questions and the concepts."""
        key = self.model_dump(mode="json") | {"evaluation_version": EVALUATION_VERSION}
        if self.stated or self.prose:
            key["texts"] = [hashlib.sha256(PROSE.read_bytes()).hexdigest(), PASSAGE_TOKENS]
        if self.open_ended != "no":
            key["generation"] = [GENERATION_VERSION, self.prompt, MAX_NEW_TOKENS]
        return key

    @property
    def prompt(self) -> str:
        """What stands around a question that is asked open-ended, or around its cloze."""
        return OPEN_PROMPT if self.open_ended == "question" else "{question}"

    def texts(self, questions: Sequence[Question]) -> list[str]:
        """The words of questions that are asked open-ended."""
        return [q.question if self.open_ended == "question" else q.cloze for q in questions]


def evaluate(
    ready: Ready, questions: Sequence[Question], concepts: Sequence[str], asked: Evaluation
) -> dict[str, pd.DataFrame]:
    """`tables = evaluate(ready, questions, ("France",), evaluation)`: those of `TABLES` asked for.

    Args:
        questions: hold the concepts, and others.
        concepts: that the model was trained on, or is compared on; `asked` says what of them.
    """
    own = [q for q in questions if q.concept in concepts and q.fold in asked.asked_folds]
    others = _other_questions(questions, concepts, asked)
    answers = answer_table(ready, [*own, *others])
    tables = {"answers": answers.assign(trained=[True] * len(own) + [False] * len(others))}
    if asked.open_ended != "no":
        tables["generated"] = _generated(ready, own, asked)
    if asked.stated or asked.prose:
        tables["texts"] = _likelihoods(ready, questions, concepts, asked)
    if asked.choices:
        tables["pss"] = _specialization(ready, questions, concepts, others, asked.choices, answers)
    if asked.sampled and asked.open_ended != "no":
        tables["samples"] = _samples(ready, concepts, own, asked)
    release_memory()  # packed copies of the weights
    return tables


def _other_questions(
    questions: Sequence[Question], concepts: Sequence[str], asked: Evaluation
) -> list[Question]:
    """Questions on other concepts, whole folds of a concept at a time, the same for all runs."""
    pool: dict[str, list[Question]] = {}
    for question in questions:
        if question.concept not in concepts and question.fold in asked.asked_folds:
            pool.setdefault(question.concept, []).append(question)
    chosen: list[Question] = []
    for name in sorted(pool, key=lambda name: by_hash(asked.seed, name)):
        if len(chosen) < asked.others:
            chosen += pool[name]
    if len(chosen) < asked.others:
        raise InputError(
            f"others {asked.others}: only {len(chosen)} questions on other concepts; ask for fewer"
        )
    return chosen


def _specialization(
    ready: Ready,
    questions: Sequence[Question],
    concepts: Sequence[str],
    others: Sequence[Question],
    choices: Choices,
    answers: pd.DataFrame,
) -> pd.DataFrame:
    """Rows of PSS for each concept; unrelated are questions on concepts not trained on."""
    folds = {*choices.choose_on, *choices.score_on}
    own = [q for q in questions if q.concept in concepts and q.fold in folds]
    others = [q for q in others if q.fold in folds]
    coefficients = record_concepts(
        ready.view,
        ready.loaded.tokenizer,
        [*own, *others],
        position=choices.position,
        batch_tokens=choices.batch_tokens,
    )
    scored = zip(answers["question_id"], answers["option_logprobs"], strict=True)
    measured = measure_concepts(
        ready.loaded.name,
        ready.view,
        ready.loaded.tokenizer,
        own,
        concepts,
        choices,
        coefficients,
        unrelated=others,
        unmasked={name: torch.tensor(scores) for name, scores in scored},
        engine=ready.engine,
    )
    return measured.pss


def _generated(ready: Ready, own: Sequence[Question], asked: Evaluation) -> pd.DataFrame:
    tokenizer = ready.loaded.tokenizer
    prompts = [asked.prompt.replace("{question}", text) for text in asked.texts(own)]
    decoded = decode(ready.view, tokenizer, prompts, likeliest, max_new_tokens=MAX_NEW_TOKENS)
    answers = first_lines(tokenizer, [row.tokens for (row,) in decoded])
    return pd.DataFrame(
        {
            "question_id": question.id,
            "concept": question.concept,
            "answer": answer,
            "correct": answer_matches(answer, question.aliases),
            "state": cast("torch.Tensor", row.state).tolist(),
        }
        for question, answer, (row,) in zip(own, answers, decoded, strict=True)
    )


def _samples(
    ready: Ready, concepts: Sequence[str], own: Sequence[Question], asked: Evaluation
) -> pd.DataFrame:
    """Of each concept the same number of questions, by the hash of their ids."""
    each = math.ceil(asked.sampled / len(concepts))
    ordered = sorted(own, key=lambda question: by_hash(asked.seed, question.id))
    chosen = [
        q for concept in concepts for q in [q for q in ordered if q.concept == concept][:each]
    ]
    chosen = chosen[: asked.sampled]
    found = sample_answers(
        ready.view,
        ready.loaded.tokenizer,
        asked.texts(chosen),
        prompt=asked.prompt,
        max_new_tokens=MAX_NEW_TOKENS,
        samples=asked.samples,
        temperature=asked.temperature,
        seed=asked.seed,
    )
    return pd.DataFrame(
        {
            "question_id": question.id,
            "concept": question.concept,
            "answers": one.answers,
            "log_likelihoods": one.log_likelihoods,
            "tokens": one.tokens,
        }
        for question, one in zip(chosen, found, strict=True)
    )


@torch.no_grad()
def _likelihoods(
    ready: Ready, questions: Sequence[Question], concepts: Sequence[str], asked: Evaluation
) -> pd.DataFrame:
    """The negative log-likelihood of texts that nothing was trained on, of both kinds."""
    tokenizer = ready.loaded.tokenizer
    first = {text for q in questions if q.concept not in concepts for text in q.statements[:1]}
    stated = sorted(first, key=lambda text: by_hash(asked.seed, text))[: asked.stated]
    rows = [*token_ids(tokenizer, stated), *_passages(tokenizer, asked.prose)]

    def forward(places: Sequence[int], _: int) -> list[float]:
        return next_token_nats(ready.view.model, [rows[place] for place in places]).sum(1).tolist()

    nats = np.zeros(len(rows))
    batches = prompt_batches(rows, LIKELIHOOD_TOKENS)
    for places, values in in_batches(batches, forward, lambda places: len(rows[places[0]])):
        nats[places] = values
    if not np.isfinite(nats).all():
        raise InputError(
            "a log-likelihood of held-out texts is not a finite number; the weights are damaged, "
            "or their dtype overflows: try float32"
        )
    return pd.DataFrame(
        {
            "kind": ["statements"] * len(stated) + ["prose"] * asked.prose,
            "text": range(len(rows)),
            "nats": nats,
            "tokens": [len(row) - 1 for row in rows],
        }
    )


def _passages(tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """The first passages of `PROSE`, each of `PASSAGE_TOKENS` with what stands before a text."""
    front = front_tokens(tokenizer)
    tokens = token_ids(tokenizer, [PROSE.read_text(encoding="utf-8")])[0][len(front) :]
    size = PASSAGE_TOKENS - len(front)
    if count > len(tokens) // size:
        raise InputError(
            f"prose {count}: {PROSE.name} holds {len(tokens) // size} passages of {PASSAGE_TOKENS} "
            "of the model's tokens; ask for fewer"
        )
    return [[*front, *tokens[start : start + size]] for start in range(0, count * size, size)]
