"""The fact tables of SpecWiki: `domains = read_tables()`.

A domain is two files in `tables/`: `DOMAIN.csv`, one fact a row with its source and licence, and
`DOMAIN.yaml`, the wording of each relation, most important relation first. The rules that every
row keeps are in `tests/specwiki/test_tables.py`.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from paramspec.checked import Checked
from paramspec.plain import read_yaml

TABLES = Path(__file__).with_name("tables")
FACTS_A_CONCEPT = 10


class Fact(Checked):
    """A row: `answer` is true of `concept`; `also_true` answers are never distractors."""

    concept: str
    relation: str
    answer: str
    aliases: tuple[str, ...]
    also_true: tuple[str, ...]
    source: str
    licence: str
    place: str


class Relation(Checked):
    """The wording of one relation: templates in `{concept}`, and in `{answer}` for statements.

    `numeric` answers get distractors near the true value; `pool` holds further false values.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)

    question: str
    cloze: str
    statements: tuple[str, ...]
    numeric: bool = False
    pool: tuple[str, ...] = ()


class Domain(Checked):
    """A kind of concepts. `display` is how a name reads in a sentence, when not as it stands;
    `homographs` are names whose word mostly means something else, left out of the questions."""

    domain: str
    relations: dict[str, Relation]
    facts: tuple[Fact, ...]
    display: dict[str, str]
    homographs: tuple[str, ...] = ()

    def concepts(self) -> dict[str, dict[str, Fact]]:
        """Facts by concept and relation, relations in the order of the YAML file."""
        found: dict[str, dict[str, Fact]] = defaultdict(dict)
        order = {name: place for place, name in enumerate(self.relations)}
        for fact in sorted(self.facts, key=lambda fact: order[fact.relation]):
            found[fact.concept][fact.relation] = fact
        return dict(found)

    def fill(self, template: str, fact: Fact) -> str:
        """`template` about `fact`, its first letter a capital."""
        text = template.replace("{concept}", self.display.get(fact.concept, fact.concept))
        text = text.replace("{answer}", fact.answer).replace("s's ", "s' ")
        return text if template.startswith("{answer}") else text[0].upper() + text[1:]


def slug(name: str) -> str:
    """`name` in lower-case ASCII letters, digits and hyphens: `São Paulo` is `sao-paulo`."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-")


def number(text: str) -> float:
    """The value of a numeric answer; years before Christ (`44 BC`) are negative."""
    return -float(text[:-3]) if text.endswith(" BC") else float(text)


def stands_in(option: str, text: str) -> bool:
    """Whether `option` can be read in `text`, as words or, from four letters on, inside a word."""
    words, inside = (" ".join(re.findall(r"\w+", part.casefold())) for part in (option, text))
    return f" {words} " in f" {inside} " or (
        len(option) >= 4 and option.casefold() in text.casefold()
    )


def read_tables(directory: str | Path = TABLES) -> list[Domain]:
    """All domains of `directory`, sorted by name.

    Raises:
        ValueError: a file does not have the columns or keys that the design asks for.
    """
    return [_read_domain(path) for path in sorted(Path(directory).glob("*.yaml"))]


def _read_domain(path: Path) -> Domain:
    wording = read_yaml(path.read_text(encoding="utf-8"), path.name)
    with path.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        facts = [_read_fact(row, f"{path.stem}.csv:{rows.line_num}") for row in rows]
    return Domain(facts=tuple(facts), **wording)


def _read_fact(row: dict[str, str], place: str) -> Fact:
    fields: dict[str, Any] = dict(row)
    for key in ("aliases", "also_true"):
        fields[key] = tuple(filter(None, row[key].split("|")))
    return Fact(**fields, place=place)
