"""Read, check and choose questions: `load_questions(concepts=60, folds=[1])`."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from paramspec.errors import InputError
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
    """Questions of a file in its order, whole concepts at a time: `load_questions(concepts=60)`.

    Args:
        path: a JSON Lines file of questions; the committed one by default.
        concepts: how many concepts, taken evenly from the tiers that are left, or their names.
            A larger number with the same seed holds the smaller one's concepts.
        tiers, domains, folds: keep these alone.
        seed: decides which concepts a number of them takes.

    Raises:
        InputError: the file breaks a rule of the schema (the first breach is told as
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
    if isinstance(concepts, str):
        concepts = [concepts]
    if isinstance(concepts, int):
        questions = sample_concepts(questions, concepts, seed, path)
    elif concepts is not None:
        questions = _named(questions, concepts, path)
    if folds is None:
        return questions
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
        hint = ", ".join(difflib.get_close_matches(name, by_id, n=3))
        raise InputError(
            f"unknown question {name!r}; "
            + (f"did you mean {hint}?" if hint else "an id reads like france/capital")
        )
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
    except FileNotFoundError:
        return [], [f"{path}: no such file; give the path of a JSON Lines file of questions"]
    except OSError as error:
        return [], [f"{path}: cannot be read ({error.strerror}); give a JSON Lines file"]
    questions, problems = _check_content(path, data)
    return list(questions), list(problems)


@functools.lru_cache(maxsize=2)  # by content: a file may be edited while a process lives
def _check_content(path: Path, data: bytes) -> tuple[Sequence[Question], Sequence[str]]:
    lines = data.removesuffix(b"\n").split(b"\n")
    if not data.strip():
        return [], [f"{path}: empty; write one question, a JSON object, a line"]
    questions = []
    problems = []
    first: dict[tuple[str, str], tuple[int, Any]] = {}
    for number, line in enumerate(lines, start=1):
        question = _parse(line)
        if isinstance(question, str):
            problems.append(f"{path}:{number}: {question}")
            continue
        questions.append(question)
        place, _ = first.setdefault(("id", question.id), (number, None))
        if place != number:
            problems.append(
                f"{path}:{number}: id {question.id!r} is that of line {place}; ids must differ"
            )
        for field in ("domain", "tier"):
            value = getattr(question, field)
            place, seen = first.setdefault((field, question.concept), (number, value))
            if seen != value:
                problems.append(
                    f"{path}:{number}: {field} {value!r} of concept {question.concept!r}, "
                    f"but {seen!r} in line {place}; a concept has one {field}"
                )
    return questions, problems


class _Twice(Exception):
    """A key that an object of a line holds twice: a reader would take the last of them."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    for key, _ in pairs if len(row) < len(pairs) else ():
        if sum(key == other for other, _ in pairs) > 1:
            raise _Twice(key)
    return row


def _parse(line: bytes) -> Question | str:
    """The question of a line, or what is wrong with it."""
    try:
        # Decoded here: given bytes, `json.loads` guesses the encoding.
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start}); save the file as UTF-8"
    except _Twice as error:
        return f"key {error.args[0]!r} stands twice; give it once"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg}, column {error.colno}); write one JSON object a line"
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}, not an object; write one question a line"
    options = row.get("options")
    if isinstance(options, list) and len(options) != 4:
        return f"{len(options)} options, but a question has 4"
    try:
        return Question.model_validate_json(line)
    except ValidationError as errors:
        return _say(errors.errors(include_url=False)[0])


def _say(error: Any) -> str:
    """A pydantic error in one line that names the field, its value and what is expected."""
    field = ".".join(map(str, error["loc"]))
    value = json.dumps(error["input"], ensure_ascii=False, default=str)
    value = value if len(value) <= 40 else value[:37] + "..."
    match error["type"]:
        case "missing":
            return f"field {field!r} is missing"
        case "extra_forbidden":
            return f"unknown field {field!r}; remove it"
        case "value_error":
            return str(error["ctx"]["error"])
        case "literal_error":
            return f"{field} {value}, expected {error['ctx']['expected']}"
        case _:
            return f"{field} {value}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _keep(
    questions: list[Question], field: str, chosen: Any, known: Sequence[Any], path: Path
) -> list[Question]:
    """The questions whose `field` is among `chosen` (one value, several, or None for all)."""
    if chosen is None:
        return questions
    values = [chosen] if isinstance(chosen, str | int) else list(chosen)
    for value in values:
        if value not in known:
            names = ", ".join(map(str, known))
            raise InputError(f"{path}: unknown {field} {value!r}; choose from {names}")
    kept = [question for question in questions if getattr(question, field) in values]
    if not kept and field != "fold":
        raise InputError(f"{path}: no question has {field} {chosen!r}; choose another {field}")
    return kept


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
    queues = [
        sorted(
            (name for name in tier_of if tier_of[name] == tier),
            key=lambda name: hashlib.sha256(f"{seed}\x1f{name}".encode()).digest(),
        )
        for tier in TIERS
    ]
    turns = sorted(
        (place, tier, name) for tier, queue in enumerate(queues) for place, name in enumerate(queue)
    )
    chosen = {name for _, _, name in turns[:count]}
    return [question for question in questions if question.concept in chosen]


def _named(questions: list[Question], names: Sequence[str], path: Path) -> list[Question]:
    """The questions of the concepts called `names`."""
    known = {question.concept for question in questions}
    for name in names:
        if name not in known:
            lower = {concept.casefold(): concept for concept in known}
            close = difflib.get_close_matches(str(name).casefold(), lower, n=3)
            hint = ", ".join(lower[match] for match in close)
            raise InputError(
                f"{path}: unknown concept {name!r}; "
                + (f"did you mean {hint}?" if hint else "see `paramspec questions`")
            )
    return [question for question in questions if question.concept in set(names)]
