"""What is asked of a model as it is, or once it is trained: each part gives a table.

evaluation = Evaluation(others=30, open_ended="question")
tables = evaluate(ready, questions, ("France", "gold"), evaluation)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from paramspec.checked import Checked, Count
from paramspec.errors import InputError
from paramspec.execution.limits import release_memory
from paramspec.method.batches import in_batches
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
from paramspec.method.rows import Request
from paramspec.method.scoring import encode, score_options
from paramspec.models.tokens import front_tokens, token_ids
from paramspec.seeds import by_hash
from paramspec.specwiki import Question
from paramspec.studies.hallucination import sample_answers
from paramspec.studies.runner import Ready
from paramspec.studies.sweep import answer_row
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
    def scored(self) -> set[int]:
        """The folds that are scored."""
        return {*(self.folds or ()), *(self.choices.score_on if self.choices else ())}

    def with_folds(self, folds: tuple[int, ...]) -> Evaluation:
        """`evaluation.with_folds((1,))`: the same with these folds, unless they were chosen."""
        folds = self.folds or folds
        choices = self.choices and self.choices.with_folds(folds)
        return self.model_copy(update={"folds": folds, "choices": choices})

    def key(self) -> dict[str, object]:
        """All that answers depend on, beside the model, the questions and the concepts."""
        key = self.model_dump(mode="json") | {"evaluation_version": EVALUATION_VERSION}
        if self.stated or self.prose:
            key["texts"] = [hashlib.sha256(PROSE.read_bytes()).hexdigest(), PASSAGE_TOKENS]
        if self.open_ended != "no":
            key["generation"] = [GENERATION_VERSION, _prompt(self.open_ended), MAX_NEW_TOKENS]
        return key


def evaluate(
    ready: Ready, questions: Sequence[Question], concepts: Sequence[str], asked: Evaluation
) -> dict[str, pd.DataFrame]:
    """`tables = evaluate(ready, questions, ("France",), evaluation)`: those of `TABLES` asked for.

    Args:
        questions: hold the concepts, and others.
        concepts: that the model was trained on, or is compared on; `asked` says what of them.
    """
    own = [q for q in questions if q.concept in concepts and q.fold in asked.folds]
    tables = {"answers": _answers(ready, questions, concepts, own, asked)}
    if asked.open_ended != "no":
        tables["generated"] = _generated(ready, own, asked)
    if asked.stated or asked.prose:
        tables["texts"] = _likelihoods(ready, questions, concepts, asked)
    if asked.choices:
        tables["pss"] = _specialization(ready, questions, concepts, asked, tables["answers"])
    if asked.sampled and asked.open_ended != "no":
        tables["samples"] = _samples(ready, concepts, own, asked)
    release_memory()  # packed copies of the weights
    return tables


def _answers(
    ready: Ready,
    questions: Sequence[Question],
    concepts: Sequence[str],
    own: Sequence[Question],
    asked: Evaluation,
) -> pd.DataFrame:
    others = other_questions(questions, concepts, asked)
    every = [*own, *others]
    requests = [Request(encode(ready.loaded.tokenizer, question), 0) for question in every]
    scores = score_options(ready.view, requests, [None], engine=ready.engine)
    table = pd.DataFrame([answer_row(q, score) for q, score in zip(every, scores, strict=True)])
    return table.assign(trained=[True] * len(own) + [False] * len(others))


def _specialization(
    ready: Ready,
    questions: Sequence[Question],
    concepts: Sequence[str],
    asked: Evaluation,
    answers: pd.DataFrame,
) -> pd.DataFrame:
    """Rows of PSS for each concept; unrelated are questions on concepts not trained on."""
    choices = asked.choices
    folds = {*choices.choose_on, *choices.score_on}
    own = [q for q in questions if q.concept in concepts and q.fold in folds]
    others = [q for q in other_questions(questions, concepts, asked) if q.fold in folds]
    scored = zip(answers["question_id"], answers["option_logprobs"], strict=True)
    coefficients = record_concepts(
        ready.view,
        ready.loaded.tokenizer,
        [*own, *others],
        position=choices.position,
        batch_tokens=choices.batch_tokens,
    )
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


def _prompt(form: Literal["question", "cloze", "no"]) -> str:
    """What stands around a question that is asked open-ended, or around its cloze."""
    return OPEN_PROMPT if form == "question" else "{question}"


def _open_questions(questions: Sequence[Question], form: Literal["question", "cloze"]) -> list[str]:
    return [question.question if form == "question" else question.cloze for question in questions]


def _generated(ready: Ready, own: Sequence[Question], asked: Evaluation) -> pd.DataFrame:
    form = asked.open_ended
    decoded = decode(
        ready.view,
        ready.loaded.tokenizer,
        [_prompt(form).replace("{question}", words) for words in _open_questions(own, form)],
        likeliest,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    answers = first_lines(ready.loaded.tokenizer, [row.tokens for (row,) in decoded])
    return pd.DataFrame(
        {
            "question_id": [question.id for question in own],
            "concept": [question.concept for question in own],
            "answer": answers,
            "correct": [
                answer_matches(answer, question.aliases)
                for answer, question in zip(answers, own, strict=True)
            ],
            "state": [row.state.tolist() for (row,) in decoded],
        }
    )


def _samples(
    ready: Ready, concepts: Sequence[str], own: Sequence[Question], asked: Evaluation
) -> pd.DataFrame:
    """Of each concept the same number of questions, by the hash of their ids."""
    each = -(-asked.sampled // len(concepts))
    chosen = [
        question
        for concept in concepts
        for question in sorted(
            (q for q in own if q.concept == concept), key=lambda q: by_hash(asked.seed, q.id)
        )[:each]
    ][: asked.sampled]
    found = sample_answers(
        ready.view,
        ready.loaded.tokenizer,
        _open_questions(chosen, asked.open_ended),
        prompt=_prompt(asked.open_ended),
        max_new_tokens=MAX_NEW_TOKENS,
        samples=asked.samples,
        temperature=asked.temperature,
        seed=asked.seed,
    )
    return pd.DataFrame(
        {
            "question_id": [question.id for question in chosen],
            "concept": [question.concept for question in chosen],
            "answers": [one.answers for one in found],
            "log_likelihoods": [one.log_likelihoods for one in found],
            "tokens": [one.tokens for one in found],
        }
    )


def other_questions(
    questions: Sequence[Question], concepts: Sequence[str], asked: Evaluation
) -> list[Question]:
    """Questions on other concepts, whole folds of a concept at a time, the same for all runs."""
    pool: dict[str, list[Question]] = {}
    for question in questions:
        if question.concept not in concepts and question.fold in asked.folds:
            pool.setdefault(question.concept, []).append(question)
    names = sorted(pool, key=lambda name: by_hash(asked.seed, name))
    chosen: list[Question] = []
    for name in names:
        if len(chosen) >= asked.others:
            break
        chosen += pool[name]
    if len(chosen) < asked.others:
        raise InputError(
            f"others {asked.others}: only {len(chosen)} questions on other concepts; ask for fewer"
        )
    return chosen


def _held_out(
    questions: Sequence[Question],
    concepts: Sequence[str],
    asked: Evaluation,
    tokenizer: PreTrainedTokenizerBase,
) -> list[tuple[str, list[int]]]:
    """Texts that nothing was trained on, of both kinds, in tokens."""
    stated = [
        text
        for question in questions
        if question.concept not in concepts
        for text in question.statements[:1]
    ]
    stated = sorted(dict.fromkeys(stated), key=lambda text: by_hash(asked.seed, text))
    texts = [("statements", row) for row in token_ids(tokenizer, stated[: asked.stated])]
    if asked.prose:
        front = front_tokens(tokenizer)
        tokens = token_ids(tokenizer, [PROSE.read_text(encoding="utf-8")])[0][len(front) :]
        size = PASSAGE_TOKENS - len(front)
        passages = len(tokens) // size
        if asked.prose > passages:
            raise InputError(
                f"prose {asked.prose}: {PROSE.name} holds {passages} passages of {PASSAGE_TOKENS} "
                "of the model's tokens; ask for fewer"
            )
        texts += [
            ("prose", [*front, *tokens[number * size : (number + 1) * size]])
            for number in range(asked.prose)
        ]
    return texts


@torch.no_grad()
def _likelihoods(
    ready: Ready, questions: Sequence[Question], concepts: Sequence[str], asked: Evaluation
) -> pd.DataFrame:
    network = ready.view.model
    texts = _held_out(questions, concepts, asked, ready.loaded.tokenizer)

    def forward(batch: Sequence[tuple[int, list[int]]]) -> list[float]:
        return next_token_nats(network, [row for _, row in batch]).sum(1).tolist()

    numbered = sorted(
        ((index, row) for index, (_, row) in enumerate(texts)), key=lambda pair: -len(pair[1])
    )
    parts: list[list[tuple[int, list[int]]]] = []
    for index, row in numbered:  # the longest of a part is its first
        if not parts or (len(parts[-1]) + 1) * len(parts[-1][0][1]) > LIKELIHOOD_TOKENS:
            parts.append([])
        parts[-1].append((index, row))
    nats = [0.0] * len(texts)
    for batch, values in in_batches(
        parts, forward, tokens=lambda rows: len(rows) * len(rows[0][1])
    ):
        for (index, _), value in zip(batch, values, strict=True):
            nats[index] = value
    if not np.isfinite(nats).all():
        raise InputError(
            "a log-likelihood of held-out texts is not a finite number; the weights are damaged, "
            "or their dtype overflows: try float32"
        )
    return pd.DataFrame(
        {
            "kind": [kind for kind, _ in texts],
            "text": range(len(texts)),
            "nats": nats,
            "tokens": [len(row) - 1 for _, row in texts],
        }
    )
