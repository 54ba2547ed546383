"""Read, check and choose questions: `load_questions(concepts=60, folds=[1])`."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from paramspec.checked import first_breach
from paramspec.errors import InputError
from paramspec.seeds import by_hash
from paramspec.specwiki.schema import Question
from paramspec.tables import TIERS

QUESTIONS = Path(__file__).with_name("questions.jsonl")


def load_questions(
    path: str | Path | None = None,
    *,
    concepts: int | str | Sequence[str] | None = None,
    tiers: str | Sequence[str] | None = None,
    domains: str | Sequence[str] | None = None,
    folds: int | Sequence[int] | None = None,
    seed: int = 0,
) -> list[Question]:
    """Questions of a file in its order, whole concepts at a time.

    >>> questions = load_questions(concepts=60)
    >>> len(questions), len(load_questions(concepts=["France", "gold"], folds=[1]))
    (600, 10)

    Args:
        path: a JSON Lines file of questions; the committed one by default.
        concepts: how many concepts, taken evenly from the tiers that are left, or their names.
            A larger number with the same seed holds the smaller one's concepts.
        tiers, domains, folds: keep these alone.
        seed: decides which concepts a number of them takes.

    Raises:
        InputError: the file breaks a rule of the schema (the first breach is reported as
            `questions.jsonl:17: answer 4, but 4 options (0-3)`), or a name, tier, domain or fold is
            unknown, or fewer concepts are there than asked for.
    """
    path = Path(path) if path is not None else QUESTIONS
    questions, problems = _check(path)
    if problems:
        raise InputError(problems[0])
    questions = _keep(questions, "tier", tiers, TIERS, path)
    known_domains = sorted({question.domain for question in questions})
    questions = _keep(questions, "domain", domains, known_domains, path)
    if isinstance(concepts, int):
        questions = sample_concepts(questions, concepts, seed, path)
    elif concepts is not None:
        known = {question.concept: None for question in questions}
        questions = _keep(questions, "concept", concepts, known, path)
    kept = _keep(questions, "fold", folds, (0, 1), path)
    lost = {question.concept for question in questions} - {question.concept for question in kept}
    if lost:
        raise InputError(
            f"{path}: concept {min(lost)!r} has no question in fold {folds}; "
            "give it one, or leave the concept out"
        )
    return kept


def validate(path: str | Path) -> list[str]:
    """Every breach of the schema in a question file, one line each: `validate("mine.jsonl")`.

    Returns an empty list when `load_questions` accepts the file.
    """
    return _check(Path(path))[1]


def find(questions: Sequence[Question], name: str) -> Question:
    """The question with the id `name`: `find(load_questions(), "france/capital")`.

    Raises:
        InputError: no question has it; the message names ids that come close.
    """
    by_id = {question.id: question for question in questions}
    if name not in by_id:
        raise InputError(f"unknown question {name!r}; {_hint(name, by_id)}")
    return by_id[name]


def describe(question: Question) -> str:
    """A question as a few lines to read, the true option marked by an asterisk."""
    lines = [
        f"{question.id}  ({question.domain}, {question.tier}, fold {question.fold})",
        f"  {question.question}",
        f"  {question.cloze} ...",
    ]
    for place, option in enumerate(question.options):
        lines.append(f"  {'*' if place == question.answer else ' '} {option}")
    return "\n".join(lines)


def questions_digest(questions: Iterable[Question]) -> str:
    """SHA-256 (64 hexadecimal digits) of the questions as canonical JSON, in their order."""
    rows = [question.model_dump(mode="json") for question in questions]
    text = json.dumps(rows, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check(path: Path) -> tuple[list[Question], list[str]]:
    """The questions of the file, each as its line has it, and what is wrong with the others."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return [], [f"{path}: cannot be read ({error.strerror}); give a JSON Lines file"]
    questions, problems = _check_content(data)
    return list(questions), [f"{path}{problem}" for problem in problems]


@functools.lru_cache(maxsize=2)  # by content: a file may be edited while a process lives
def _check_content(data: bytes) -> tuple[list[Question], list[str]]:
    if not data.strip():
        return [], [": empty; write one question, a JSON object, a line"]
    questions: list[Question] = []
    problems: list[str] = []
    seen: dict[tuple[str, str], tuple[int, str]] = {}
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            question = _parse(line)
        except InputError as error:
            problems.append(f":{number}: {error}")
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a line, in which a key stands once: a reader would take the last of them."""
    names = [key for key, _ in pairs]
    for key in names:
        if names.count(key) > 1:
            raise InputError(f"key {key!r} stands twice; give it once")
    return dict(pairs)


def _parse(line: bytes) -> Question:
    """The question of a line; an InputError says what is wrong with it."""
    try:
        # Decoded here: given bytes, `json.loads` guesses the encoding.
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg}, column {error.colno}); write one JSON object a line"
        raise InputError(problem) from error
    if not isinstance(row, dict):
        raise InputError(f"a JSON {type(row).__name__}, not an object; write one question a line")
    try:
        return Question.model_validate_json(line)
    except ValidationError as error:
        raise InputError(first_breach(error)) from error


def _keep(
    questions: list[Question], field: str, chosen: Any, known: Collection[Any], path: Path
) -> list[Question]:
    """The questions whose `field` is among `chosen` (one value, several, or None for all)."""
    if chosen is None:
        return questions
    values = [chosen] if isinstance(chosen, str | int) else list(chosen)
    for value in values:
        if value not in known:
            raise InputError(f"{path}: unknown {field} {value!r}; {_hint(value, known)}")
    kept = [question for question in questions if getattr(question, field) in values]
    if not kept and field != "fold":
        raise InputError(f"{path}: no question has {field} {chosen!r}; choose another {field}")
    return kept


def _hint(name: object, known: Collection[Any]) -> str:
    """All names if they are few, else those that come close."""
    if len(known) <= 20:
        return f"choose from {', '.join(map(str, known))}"
    folded = {each.casefold(): each for each in known}
    close = [folded[n] for n in difflib.get_close_matches(str(name).casefold(), folded, n=3)]
    return f"did you mean {', '.join(close)}?" if close else "see `paramspec questions`"


def sample_concepts(
    questions: list[Question], count: int, seed: int, place: object
) -> list[Question]:
    """The questions of `count` concepts, evenly from the tiers, the first by hash of seed and name.

    A tier that has too few gives all it has, and the others make up for it.

    Args:
        place: where the questions are from, for the message.

    Raises:
        InputError: if there are fewer concepts.
    """
    tier_of = {question.concept: question.tier for question in questions}
    if not 1 <= count <= len(tier_of):
        raise InputError(f"{place}: {count} concepts asked for; choose from 1 to {len(tier_of)}")
    order = sorted(tier_of, key=lambda name: by_hash(seed, name))
    turns: list[tuple[int, str]] = []
    for tier in TIERS:
        turns += enumerate(name for name in order if tier_of[name] == tier)
    turns.sort(key=lambda turn: turn[0])  # the first of each tier, then the second of each
    chosen = {name for _, name in turns[:count]}
    return [question for question in questions if question.concept in chosen]
