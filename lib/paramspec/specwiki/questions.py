"""`load_questions(concepts=60, folds=[1])`: read questions, SpecWiki's or one's own, and choose."""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import re
import string
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paramspec.errors import InputError
from paramspec.seeds import by_hash
from paramspec.specwiki.schema import Question, complete
from paramspec.specwiki.sources import columns_of, read_rows
from paramspec.tables import ONE, TIERS

QUESTIONS = Path(__file__).with_name("questions.jsonl")


class Read(NamedTuple):
    """Questions; a line per breach of the schema; a line on what was assumed, if anything was."""

    questions: list[Question]
    problems: list[str]
    assumed: str


def load_questions(
    path: str | Path | None = None,
    *,
    columns: str | Mapping[str, str | Sequence[str]] = "",
    skip_invalid: bool = False,
    concepts: int | str | Sequence[str] | None = None,
    tiers: str | Sequence[str] | None = None,
    domains: str | Sequence[str] | None = None,
    folds: int | Sequence[int] | None = None,
    seed: int = 0,
) -> list[Question]:
    """The questions of a file in its order, all or those of some concepts.

    >>> questions = load_questions(concepts=60)
    >>> len(questions), len(load_questions(concepts=["France", "gold"], folds=[1]))
    (600, 10)

    Args:
        path: a file of JSON lines, CSV (`.csv`) or parquet (`.parquet`), a directory, or a data set
            of the hub as `org/name:split` or `org/name/config:split`; SpecWiki if not given. A row
            needs `concept`, `question`, `options` and `answer`, see `schema.complete`; a warning
            says what is assumed instead of the rest.
        columns: where fields are that have another name there, as `concept=subject,options=A+B+C`
            or `{"concept": "subject"}`; or a preset, `mmlu` or `popqa`.
        skip_invalid: leave out rows that break a rule, with a warning.
        concepts: a number of concepts, evenly from the tiers that are kept, or their names. With
            the same seed, a larger number includes the concepts of a smaller one.
        tiers, domains, folds: those to keep.
        seed: of the choice of a number of concepts.

    Raises:
        InputError: if a row breaks a rule of the schema (the first breach is reported as
            `questions.jsonl:17: answer 4, but 4 options (0-3)`), if a name, tier, domain or fold is
            unknown, or if there are fewer concepts than asked for.
    """
    place = str(path) if path is not None else str(QUESTIONS)
    questions, problems, assumed = read_questions(place, columns)
    if problems and not (skip_invalid and questions):
        raise InputError(problems[0])
    if problems:
        warnings.warn(f"{len(problems)} rows left out, the first: {problems[0]}", stacklevel=1)
    if assumed:
        warnings.warn(f"{place}: {assumed}", stacklevel=1)
    questions = choose(questions, "tier", tiers, place)
    questions = choose(questions, "domain", domains, place)
    if isinstance(concepts, int):
        questions = sample_concepts(questions, concepts, seed, place)
    else:
        questions = choose(questions, "concept", concepts, place)
    kept = choose(questions, "fold", folds, place)
    lost = {question.concept for question in questions} - {question.concept for question in kept}
    if lost:
        raise InputError(
            f"{place}: concept {min(lost)!r} has no question in fold {folds}; "
            "give it one, or leave the concept out"
        )
    return list(kept)  # one that may be changed


def read_questions(
    source: str | Path, columns: str | Mapping[str, str | Sequence[str]] = ""
) -> Read:
    """`questions, problems, assumed = read_questions("mine.csv")`: see `load_questions`."""
    named = columns if isinstance(columns, str) else json.dumps(columns)
    try:
        digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    except OSError:
        return _read(str(source), named)
    return _read_once(str(source), named, digest)


@functools.lru_cache(maxsize=2)  # by content: a file may be edited while a process lives
def _read_once(source: str, columns: str, digest: str) -> Read:
    return _read(source, columns)


def _read(source: str, columns: str) -> Read:
    rows = read_rows(source, columns_of(columns) if columns else {})
    found = complete(rows.values)
    problems = [
        f"{source}{rows.place.format(number)}: {problem}"
        for number, problem in sorted(rows.problems + found.problems)
    ]
    if not problems and not found.questions:
        problems = [f"{source}: empty; write one question, a JSON object, per line"]
    return Read(found.questions, problems, found.assumed)


def choose(questions: list[Question], field: str, chosen: Any, place: object) -> list[Question]:
    """`choose(questions, "tier", "high", path)`: those of one value, of several, or (None) all."""
    if chosen is None:
        return questions
    values = [chosen] if isinstance(chosen, str | int) else list(chosen)
    known = sorted({getattr(question, field) for question in questions})
    for value in values:
        if value not in known:
            near = difflib.get_close_matches(str(value), map(str, known), n=3) or known[:20]
            hint = f"did you mean {', '.join(map(str, near))}?"
            raise InputError(f"{place}: unknown {field} {value!r}; {hint}")
    return [question for question in questions if getattr(question, field) in values]


def sample_concepts(
    questions: list[Question], count: int, seed: int, place: object
) -> list[Question]:
    """The questions of `count` concepts, evenly from the tiers, the first by hash of seed and name.

    A tier with too few gives all, and the others more. An error names the questions' `place`.
    """
    tier_of = {question.concept: question.tier for question in questions}
    if not 1 <= count <= len(tier_of):
        raise InputError(f"{place}: {count} concepts asked for; choose from 1 to {len(tier_of)}")
    order = sorted(tier_of, key=lambda name: by_hash(seed, name))
    tiers = [[name for name in order if tier_of[name] == tier] for tier in (*TIERS, ONE)]
    turns = itertools.zip_longest(*tiers)  # one of each tier
    chosen = set(itertools.islice(filter(None, itertools.chain(*turns)), count))
    return [question for question in questions if question.concept in chosen]


def describe(question: Question) -> str:
    """A question as a few lines to read, the true option marked by an asterisk."""
    head = f"{question.id}  ({question.domain}, {question.tier}, fold {question.fold})"
    options = [
        f"  {'*' if place == question.answer else ' '} {option}"
        for place, option in enumerate(question.options)
    ]
    return "\n".join([head, f"  {question.question}", f"  {question.cloze} ...", *options])


def questions_digest(questions: Iterable[Question]) -> str:
    """SHA-256 (64 hexadecimal digits) of the questions as canonical JSON, in their order."""
    rows = [question.model_dump(mode="json") for question in questions]
    text = json.dumps(rows, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def normalise(text: str) -> str:
    """`text` as SQuAD's script compares answers: lower case, no punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
