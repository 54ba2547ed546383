"""Questions to a model as it is, or once it is trained: each kind gives a table."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from paramspec.checked import Checked, Count
from paramspec.errors import InputError
from paramspec.execution.limits import release_memory
from paramspec.method import generation
from paramspec.method.batches import in_batches, prompt_batches
from paramspec.method.hooks import require_numbers
from paramspec.method.masks import record_concepts
from paramspec.method.pss import Choices, measure_concepts
from paramspec.models.tokens import front_tokens, token_ids
from paramspec.seeds import by_hash
from paramspec.specwiki import Question
from paramspec.studies.hallucination import Sampled, sample_answers
from paramspec.studies.runner import Ready
from paramspec.studies.sweep import answer_table, scores_by_id
from paramspec.studies.training import last_statements, next_token_nats

EVALUATION_VERSION = 7  # raised whenever a change of this file could move a stored result
TABLES = ("answers", "generated", "texts", "details", "samples")
PROSE = Path(__file__).with_name("prose.txt")  # prose.md names its source
PASSAGE_TOKENS = 128
LIKELIHOOD_TOKENS = 256  # of texts in a forward pass, whose logits are all in memory


class Evaluation(Checked):
    """The questions to a model once it is trained.

    >>> evaluation = Evaluation(others=50, open_ended="cloze")
    >>> evaluation.samples
    10

    Attributes:
        folds: of the questions on the concepts trained on. If not given, 1 for a micro model, which
            was trained on the clozes of fold 0, and both for any other model.
        others: questions on other concepts, of the same folds; drawn once for all runs.
        open_ended: the questions on the trained concepts are also asked without options: as the
            `question` after examples, as the `cloze` alone (which is all that a micro model can
            continue), or not at all.
        stated: the number of statements of other concepts whose likelihood is taken.
        left_out: the number of facts of the trained concepts of whose last statement the likelihood
            is taken. No run may have trained on it.
        prose: the number of passages of 128 tokens of English prose whose likelihood is taken, from
            the beginning of Jane Austen's "Mansfield Park" (`prose.txt`), some 90 passages.
        choices: of PSS, on the trained concepts against `others`; none is measured without them.
        sampled: the number of the open-ended questions that are also answered by sampling.
        samples: answers sampled to each of those.
        temperature: of the samples.
        seed: of the questions and statements on other concepts.
    """

    folds: tuple[int, ...] = ()
    others: int = 0
    open_ended: Literal["question", "cloze", "no"] = "no"
    stated: int = 0
    left_out: int = 0
    prose: int = 0
    choices: Choices | None = None
    sampled: int = 0
    samples: Count = 10
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    seed: int = 0

    def with_folds(self, folds: tuple[int, ...]) -> Evaluation:
        """The same with these folds, unless others were chosen."""
        folds = self.folds or folds
        choices = self.choices and self.choices.with_folds(folds)
        needed: set[int] = {*choices.choose_on, *choices.score_on} if choices else set()
        if not needed <= set(folds):
            raise InputError(
                f"folds {list(folds)}: the choices for PSS need folds {sorted(needed)}; ask these"
            )
        return self.model_copy(update={"folds": folds, "choices": choices})

    def key(self) -> dict[str, Any]:
        """All that answers depend on, next to the model, the questions and the concepts."""
        key = self.model_dump(mode="json") | {"evaluation_version": EVALUATION_VERSION}
        if self.stated or self.left_out or self.prose:
            key["texts"] = [hashlib.sha256(PROSE.read_bytes()).hexdigest(), PASSAGE_TOKENS]
        if self.open_ended != "no":
            version, most = generation.GENERATION_VERSION, generation.MAX_NEW_TOKENS
            key["generation"] = [version, self.prompt, most]
        return key

    @property
    def prompt(self) -> str:
        """The words around a question that is asked open-ended, or around its cloze."""
        return generation.OPEN_PROMPT if self.open_ended == "question" else "{question}"


def evaluate(
    ready: Ready, questions: Sequence[Question], concepts: Sequence[str], asked: Evaluation
) -> dict[str, pd.DataFrame]:
    """Those of `TABLES` that are asked for, of a model that is trained on the concepts or not."""
    own = [q for q in questions if q.concept in concepts and q.fold in asked.folds]
    others = _other_questions(questions, concepts, asked)
    answers = answer_table(ready, [*own, *others])
    tables = {"answers": answers.assign(trained=answers["concept"].isin(concepts))}
    about = ["question_id", "concept"]
    if asked.open_ended != "no":
        said = _open_ended(ready, own, asked, samples=0)
        correct = map(generation.answer_matches, said["greedy"], [q.aliases for q in own])
        states = [state.tolist() for state in said["state"]]
        greedy = said[about].assign(answer=said["greedy"], correct=list(correct), state=states)
        tables["generated"] = greedy
    if asked.stated or asked.left_out or asked.prose:
        tables["texts"] = _likelihoods(ready, questions, concepts, asked)
    if asked.choices:
        tables["details"] = _specialization(
            ready, [*own, *others], concepts, asked.choices, answers
        )
    if asked.sampled and asked.open_ended != "no":
        options = {"samples": asked.samples, "temperature": asked.temperature, "seed": asked.seed}
        said = _open_ended(ready, _sampled(own, concepts, asked), asked, **options)
        tables["samples"] = said[[*about, "answers", "log_likelihoods", "tokens"]]
    release_memory()  # packed copies of the weights
    return tables


def _other_questions(
    questions: Sequence[Question], concepts: Sequence[str], asked: Evaluation
) -> list[Question]:
    """Questions on other concepts, whole folds of a concept at a time, the same for all runs."""
    pool = [q for q in questions if q.concept not in concepts and q.fold in asked.folds]
    chosen: list[Question] = []
    for name in sorted({q.concept for q in pool}, key=lambda name: by_hash(asked.seed, name)):
        if len(chosen) < asked.others:
            chosen += [question for question in pool if question.concept == name]
    if len(chosen) < asked.others:
        raise InputError(
            f"others {asked.others}: only {len(chosen)} questions on other concepts; ask for fewer"
        )
    return chosen


def _specialization(
    ready: Ready,
    questions: Sequence[Question],
    concepts: Sequence[str],
    choices: Choices,
    answers: pd.DataFrame,
) -> pd.DataFrame:
    """Answers under each concept's masks; unrelated questions are on concepts not trained on."""
    questions = [q for q in questions if q.fold in {*choices.choose_on, *choices.score_on}]
    view, tokenizer = ready.view, ready.loaded.tokenizer
    how = choices.model_dump(include={"position", "chat", "batch_tokens"})
    measured = measure_concepts(
        ready.loaded.name,
        view,
        tokenizer,
        [q for q in questions if q.concept in concepts],
        concepts,
        choices,
        record_concepts(view, tokenizer, questions, **how),
        unrelated=[q for q in questions if q.concept not in concepts],
        unmasked=scores_by_id(answers),
        engine=ready.engine,
    )
    return measured.details


def _open_ended(
    ready: Ready, own: Sequence[Question], asked: Evaluation, **options: Any
) -> pd.DataFrame:
    """The model's answers to questions without options: a row of `Sampled` per question."""
    texts = [q.question if asked.open_ended == "question" else q.cloze for q in own]
    tokenizer = ready.loaded.tokenizer
    found = sample_answers(ready.view, tokenizer, texts, prompt=asked.prompt, **options)
    rows = [(q.id, q.concept, *one) for q, one in zip(own, found, strict=True)]
    return pd.DataFrame(rows, columns=["question_id", "concept", *Sampled._fields])


def _sampled(own: Sequence[Question], concepts: Sequence[str], asked: Evaluation) -> list[Question]:
    """Of each concept the same number of questions, by the hash of their ids."""
    ordered = sorted(own, key=lambda question: by_hash(asked.seed, question.id))
    of = {concept: [q for q in ordered if q.concept == concept] for concept in concepts}
    each = math.ceil(asked.sampled / len(concepts))
    return [q for concept in concepts for q in of[concept][:each]][: asked.sampled]


@torch.no_grad()
def _likelihoods(
    ready: Ready, questions: Sequence[Question], concepts: Sequence[str], asked: Evaluation
) -> pd.DataFrame:
    """The negative log-likelihoods of texts that no run was trained on, of each kind."""
    tokenizer = ready.loaded.tokenizer
    first = {text for q in questions if q.concept not in concepts for text in q.statements[:1]}
    stated = _drawn(first, asked.stated, asked.seed)
    left_out = _drawn(last_statements(questions, concepts), asked.left_out, asked.seed)
    passages = _passages(tokenizer, asked.prose)
    rows = [*token_ids(tokenizer, stated), *token_ids(tokenizer, left_out), *passages]

    def forward(places: Sequence[int], _: int) -> list[float]:
        return next_token_nats(ready.view.model, [rows[place] for place in places]).sum(1).tolist()

    nats = np.zeros(len(rows))
    batches = prompt_batches(rows, LIKELIHOOD_TOKENS)
    for places, values in in_batches(batches, forward, lambda places: len(rows[places[0]])):
        nats[places] = values
    require_numbers(ready.view, torch.from_numpy(nats), "a log-likelihood of held-out texts")
    return pd.DataFrame(
        {
            "kind": ["statements"] * len(stated)
            + ["left out"] * len(left_out)
            + ["prose"] * len(passages),
            "text": range(len(rows)),
            "nats": nats,
            "tokens": [len(row) - 1 for row in rows],
        }
    )


def _drawn(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """So many of the texts, or all, by their hashes."""
    return sorted(texts, key=lambda text: by_hash(seed, text))[:count]


def _passages(tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """The first passages of `PROSE`, of `PASSAGE_TOKENS`, those added in front among them."""
    front = front_tokens(tokenizer)
    tokens = token_ids(tokenizer, [PROSE.read_text(encoding="utf-8")])[0][len(front) :]
    size = PASSAGE_TOKENS - len(front)
    if count > len(tokens) // size:
        raise InputError(
            f"prose {count}: {PROSE.name} holds {len(tokens) // size} passages of {PASSAGE_TOKENS} "
            "of the model's tokens; ask for fewer"
        )
    return [[*front, *tokens[start : start + size]] for start in range(0, count * size, size)]
