"""Questions: their schema, and `load_questions(concepts=60, folds=[1])` to read and choose them."""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError, model_validator

from paramspec.checked import Checked, first_breach
from paramspec.errors import InputError
from paramspec.seeds import by_hash
from paramspec.tables import TIERS

QUESTIONS = Path(__file__).with_name("questions.jsonl")


class Question(Checked):
    """A four-option multiple-choice question about one concept.

    >>> from paramspec import load_questions
    >>> question = load_questions(concepts="France")[0]
    >>> question.cloze, question.options[question.answer]
    ('The capital of France is', 'Paris')

    `cloze` is the prompt that options continue after one space; `options[answer]` is the true one;
    `aliases` are the accepted answers of the open-ended form; `statements` state the fact for
    training and never contain the cloze; `fold` is the split that every held-out protocol uses.
    """

    model_config = ConfigDict(strict=True)

    id: str
    concept: str
    domain: str
    tier: Literal["high", "medium", "low"]
    relation: str
    question: str
    cloze: str
    options: tuple[str, str, str, str]
    answer: int
    aliases: tuple[str, ...]
    fold: Literal[0, 1]
    statements: tuple[str, ...]

    @model_validator(mode="after")
    def _rules(self) -> Question:
        """Rules beyond types; each message names the value, and continues after the place."""
        if not 0 <= self.answer <= 3:
            raise ValueError(f"answer {self.answer}, but 4 options (0-3)")
        for field in ("id", "concept", "domain", "relation", "question", "cloze"):
            if not getattr(self, field).strip():
                raise ValueError(f"{field} is empty; fill it")
        if self.cloze != self.cloze.rstrip():
            raise ValueError(f"cloze {self.cloze!r} ends in white space; remove it")
        for place, option in enumerate(self.options):
            if option != option.strip() or not option:
                raise ValueError(f"option {place}, {option!r}, is empty or padded; strip it")
            if option in self.options[:place]:
                raise ValueError(f"option {option!r} is given twice; options must differ")
        for text in self.statements:
            if self.cloze.casefold() in text.casefold():
                raise ValueError(f"statement {text!r} contains the cloze; word it differently")
        return self


def load_questions(
    path: str | Path | None = None,
    *,
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
        path: a JSON Lines file of questions; the committed one by default.
        concepts: a number of concepts, evenly from the tiers that are kept, or their names. With
            the same seed, a larger number includes the concepts of a smaller one.
        tiers, domains, folds: those to keep.
        seed: of the choice of a number of concepts.

    Raises:
        InputError: if the file breaks a rule of the schema (the first breach is reported as
            `questions.jsonl:17: answer 4, but 4 options (0-3)`), if a name, tier, domain or fold is
            unknown, or if the file has fewer concepts than asked for.
    """
    path = Path(path) if path is not None else QUESTIONS
    questions, problems = read_questions(path)
    if problems:
        raise InputError(problems[0])
    questions = choose(questions, "tier", tiers, path)
    questions = choose(questions, "domain", domains, path)
    if isinstance(concepts, int):
        questions = sample_concepts(questions, concepts, seed, path)
    else:
        questions = choose(questions, "concept", concepts, path)
    kept = choose(questions, "fold", folds, path)
    lost = {question.concept for question in questions} - {question.concept for question in kept}
    if lost:
        raise InputError(
            f"{path}: concept {min(lost)!r} has no question in fold {folds}; "
            "give it one, or leave the concept out"
        )
    return kept


def read_questions(path: str | Path) -> tuple[list[Question], list[str]]:
    """`questions, problems = read_questions("mine.jsonl")`: a line per breach of the schema."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        return [], [f"{path}: cannot be read ({error.strerror}); give a JSON Lines file"]
    questions, problems = _parse(data)
    return list(questions), [f"{path}{problem}" for problem in problems]


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
    tiers = [[name for name in order if tier_of[name] == tier] for tier in TIERS]
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


@functools.lru_cache(maxsize=2)  # by content: a file may be edited while a process lives
def _parse(data: bytes) -> tuple[list[Question], list[str]]:
    """Questions of a file, and its problems: `:17: answer 4, but 4 options (0-3)`."""
    if not data.strip():
        return [], [": empty; write one question, a JSON object, per line"]
    questions: list[Question] = []
    problems: list[str] = []
    seen: dict[tuple[str, str], tuple[int, str]] = {}
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            # Decoded here: given bytes, `json.loads` guesses the encoding.
            json.loads(line.decode("utf-8"), object_pairs_hook=_require_distinct)
            question = Question.model_validate_json(line)
        except ValidationError as error:
            problems.append(f":{number}: {first_breach(error)}")
            continue
        except (ValueError, RecursionError) as error:
            problems.append(
                f":{number}: not plain JSON ({error}); write one object per line, in UTF-8"
            )
            continue
        questions.append(question)
        first, _ = seen.setdefault(("id", question.id), (number, ""))
        if first != number:
            problem = f"id {question.id!r} is that of line {first}; ids must differ"
            problems.append(f":{number}: {problem}")
        for field in ("domain", "tier"):
            value = getattr(question, field)
            first, other = seen.setdefault((field, question.concept), (number, value))
            if other != value:
                problem = f"{field} {value!r} of concept {question.concept!r}, but {other!r} in"
                problems.append(f":{number}: {problem} line {first}; a concept has one {field}")
    return questions, problems


def _require_distinct(pairs: list[tuple[str, Any]]) -> None:
    """Refuse an object that gives a key twice, of which a reader would take the last."""
    names = [key for key, _ in pairs]
    for key in names:
        if names.count(key) > 1:
            raise ValueError(f"key {key!r} is given twice")
