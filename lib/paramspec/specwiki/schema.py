"""A question, and rows of anybody's made into questions: what they leave out gets a default.

found = complete([(1, {"concept": "gold", "question": "...", "options": [...], "answer": "B"})])
found.questions, found.problems, found.assumed
"""

from __future__ import annotations

import hashlib
import json
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, ValidationError, model_validator

from paramspec.checked import Checked, first_breach
from paramspec.seeds import by_hash
from paramspec.tables import ONE

# What a row may leave out, and what is assumed then.
DEFAULTS = {
    "id": "a hash of the text",
    "fold": "0 and 1 in turn within a concept, by a hash of the id",
    "tier": "one for all",
    "domain": "one for all",
    "relation": "one for all",
    "cloze": "'Question: ... Answer:'",
    "aliases": "the true option",
    "statements": "none, so that there is nothing to train on",
}


class Question(Checked):
    """A multiple-choice question about one concept.

    >>> from paramspec import load_questions
    >>> question = load_questions(concepts="France")[0]
    >>> question.cloze, question.options[question.answer]
    ('The capital of France is', 'Paris')

    `cloze` is the prompt that options continue after one space; `options[answer]` is the true one;
    `aliases` are the accepted answers of the open-ended form; `statements` state the fact for
    training and never contain the cloze; `fold` is the split that every held-out protocol uses. A
    file may leave out much of it, see `complete`.
    """

    model_config = ConfigDict(strict=True)

    id: str
    concept: str
    domain: str
    tier: Literal["high", "medium", "low", "all"]
    relation: str
    question: str
    cloze: str
    options: tuple[str, ...] = Field(min_length=2, max_length=26)
    answer: int
    aliases: tuple[str, ...]
    fold: Literal[0, 1]
    statements: tuple[str, ...]

    @model_validator(mode="after")
    def _rules(self) -> Question:
        """Rules beyond types; each message names the value, and continues after the place."""
        last = len(self.options) - 1
        if not 0 <= self.answer <= last:
            raise ValueError(f"answer {self.answer}, but {last + 1} options (0-{last})")
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


class Complete(NamedTuple):
    """Questions; the numbers of the rows that break a rule, and which; what was assumed, if
    anything, in one line.
    """

    questions: list[Question]
    problems: list[tuple[int, str]]
    assumed: str


def complete(rows: Sequence[tuple[int, Mapping[str, Any]]]) -> Complete:
    """`complete([(1, row)]).questions`: of the rows that break no rule.

    Enough are `concept`, `question`, `options` (2 to 26) and `answer`: an index from 0, a letter,
    or the text of an option; a text that may be read in two ways is read as all others can be.
    """
    ways = _ways([values for _, values in rows])
    assumed: Counter[str] = Counter()
    unused: dict[str, None] = {}
    filled, problems = [], []
    for number, row in rows:
        assumed.update(name for name in DEFAULTS if name not in row)
        unused |= dict.fromkeys(name for name in row if name not in Question.model_fields)
        values = {name: value for name, value in row.items() if name in Question.model_fields}
        try:
            values |= {"answer": _place(row, ways)} if "answer" in row else {}
        except ValueError as error:
            problems.append((number, str(error)))
            continue
        filled.append((number, _with_defaults(values)))
    _name_and_deal([values for _, values in filled])
    questions, found = _validated(filled)
    return Complete(questions, problems + found, _told(assumed, unused, ways))


def _readings(row: Mapping[str, Any]) -> dict[str, int]:
    """The options that a text may mean as an answer."""
    answer, options = row.get("answer"), row.get("options")
    found: dict[str, int] = {}
    if not isinstance(answer, str) or not isinstance(options, list | tuple):
        return found
    texts = [option.strip() if isinstance(option, str) else option for option in options]
    if answer.strip() in texts:
        found["text"] = texts.index(answer.strip())
    if len(answer) == 1 and answer.upper() in string.ascii_uppercase[: len(options)]:
        found["letter"] = string.ascii_uppercase.index(answer.upper())
    if answer.isascii() and answer.isdecimal() and int(answer) < len(options):
        found["index"] = int(answer)
    return found


def _ways(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """How all answers that are texts can be read."""
    each = [set(_readings(row)) for row in rows if isinstance(row.get("answer"), str)]
    return set.intersection(*each) if each else set()


def _place(row: Mapping[str, Any], ways: set[str]) -> Any:
    """The place of the answer among the options, or what is there instead of a text."""
    answer, found = row["answer"], _readings(row)
    if not isinstance(answer, str) or not isinstance(row.get("options"), list | tuple):
        return answer  # right or wrong, the schema says
    places = set(found.values())
    if len(places) > 1:
        places = {place for way, place in found.items() if way in ways} or places
    if len(places) == 1:
        return places.pop()
    if not places:
        count = len(row["options"])
        raise ValueError(
            f"answer {answer!r} is no option, and no letter or index of one of {count} (A or 0 is "
            "the first)"
        )
    ambiguous = " and ".join(f"option {place} by its {way}" for way, place in found.items())
    raise ValueError(f"answer {answer!r} is {ambiguous}; write all answers as indices")


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Lists as tuples, options without space around them, and all defaults but ids and folds."""
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    options = values.get("options")
    if isinstance(options, tuple):
        options = tuple(one.strip() if isinstance(one, str) else one for one in options)
        values["options"] = options
        if isinstance(place := values.get("answer"), int) and 0 <= place < len(options):
            values.setdefault("aliases", (options[place],))
    values.setdefault("cloze", f"Question: {values.get('question')}\nAnswer:")
    return (
        dict.fromkeys(("tier", "domain", "relation"), ONE)
        | {"aliases": (), "statements": ()}
        | values
    )


def _name_and_deal(rows: Sequence[dict[str, Any]]) -> None:
    """Give an id to each row without one, and then to each without a fold one of the two."""
    alike: Counter[str] = Counter()
    for row in rows:
        if "id" not in row:
            text = json.dumps([row.get(name) for name in ("concept", "question", "options")])
            name = hashlib.sha256(text.encode()).hexdigest()[:12]
            alike[name] += 1
            row["id"] = name if alike[name] == 1 else f"{name}-{alike[name]}"
    concepts: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if "fold" not in row:
            concepts.setdefault(str(row.get("concept")), []).append(row)
    for own in concepts.values():
        for place, row in enumerate(sorted(own, key=lambda row: by_hash(row["id"]))):
            row["fold"] = place % 2


def _validated(
    rows: Sequence[tuple[int, dict[str, Any]]],
) -> tuple[list[Question], list[tuple[int, str]]]:
    """The questions that keep to the schema, by themselves and together."""
    questions: list[Question] = []
    problems: list[tuple[int, str]] = []
    seen: dict[tuple[str, str], tuple[int, str]] = {}
    for number, values in rows:
        try:
            question = Question.model_validate(values)
        except ValidationError as error:
            problems.append((number, first_breach(error)))
            continue
        first, _ = seen.setdefault(("id", question.id), (number, ""))
        if first != number:
            problem = f"id {question.id!r} is that of line {first}; ids must differ"
            problems.append((number, problem))
            continue
        questions.append(question)
        for field in ("domain", "tier"):
            value = getattr(question, field)
            first, other = seen.setdefault((field, question.concept), (number, value))
            if other != value:
                problem = f"{field} {value!r} of concept {question.concept!r}, but {other!r} in"
                problems.append((number, f"{problem} line {first}; a concept has one {field}"))
    return questions, problems


def _told(assumed: Mapping[str, int], unused: Mapping[str, None], ways: set[str]) -> str:
    parts = []
    if assumed:
        named = (f"{name} ({DEFAULTS[name]})" for name in DEFAULTS if name in assumed)
        parts.append(f"assumed {', '.join(named)}")
    if len(ways) == 1:
        parts.append(f"answers are read as the {next(iter(ways))} of an option")
    if unused:
        parts.append(f"not used: {', '.join(unused)}")
    return "; ".join(parts)
