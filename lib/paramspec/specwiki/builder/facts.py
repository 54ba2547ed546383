"""The fact tables of SpecWiki: reading them, and the rules that every row keeps.

    domains = read_tables()
    assert not table_problems(domains)

A domain is two files in `tables/`: `DOMAIN.csv`, one fact a row with its source and licence, and
`DOMAIN.yaml`, the wording of each relation, most important relation first.
"""

from __future__ import annotations

import csv
import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paramspec.plain import read_yaml

TABLES = Path(__file__).with_name("tables")
COLUMNS = ["concept", "relation", "answer", "aliases", "also_true", "source", "licence"]
FACTS_A_CONCEPT = 10


@dataclass(frozen=True)
class Fact:
    """A row: `answer` is true of `concept`; `also_true` answers are never distractors."""

    concept: str
    relation: str
    answer: str
    aliases: tuple[str, ...]
    also_true: tuple[str, ...]
    source: str
    licence: str
    place: str


@dataclass(frozen=True)
class Relation:
    """The wording of one relation: templates in `{concept}`, and in `{answer}` for statements.

    `numeric` answers get distractors near the true value; `pool` holds further false values.
    """

    question: str
    cloze: str
    statements: tuple[str, ...]
    numeric: bool = False
    pool: tuple[str, ...] = ()


@dataclass(frozen=True)
class Domain:
    """A kind of concepts. `display` is how a name reads in a sentence, when not as it stands;
    `homographs` are names whose word mostly means something else, left out of the questions."""

    name: str
    relations: dict[str, Relation]
    facts: tuple[Fact, ...]
    display: dict[str, str]
    homographs: tuple[str, ...]

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


def normalise(text: str) -> str:
    """`text` as SQuAD's script compares answers: lower case, no punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


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
    relations = {
        name: Relation(
            question=entry["question"],
            cloze=entry["cloze"],
            statements=tuple(entry["statements"]),
            numeric=entry.get("numeric", False),
            pool=tuple(str(value) for value in entry.get("pool", ())),
        )
        for name, entry in wording["relations"].items()
    }
    table = path.with_suffix(".csv")
    with table.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != COLUMNS:
            raise ValueError(f"{table.name}: columns {rows.fieldnames}, expected {COLUMNS}")
        facts = tuple(_read_fact(row, f"{table.name}:{rows.line_num}") for row in rows)
    for fact in facts:
        if fact.relation not in relations:
            raise ValueError(f"{fact.place}: relation {fact.relation!r} is not in {path.name}")
    return Domain(
        name=wording["domain"],
        relations=relations,
        facts=facts,
        display=wording.get("display") or {},
        homographs=tuple(wording.get("homographs") or ()),
    )


def _read_fact(row: dict[str, str], place: str) -> Fact:
    if None in row or None in row.values():
        raise ValueError(f"{place}: {len(COLUMNS)} fields are needed")
    several = {key: tuple(filter(None, row[key].split("|"))) for key in ("aliases", "also_true")}
    return Fact(**{**row, **several}, place=place)


def table_problems(domains: list[Domain]) -> list[str]:
    """Every breach of the rules of the tables, a line each with its place."""
    problems = []
    owner: dict[str, str] = {}
    for domain in domains:
        problems += _wording_problems(domain)
        for fact in domain.facts:
            problems += [f"{fact.place}: {text}" for text in _fact_problems(domain, fact)]
        seen = Counter((fact.concept, fact.relation) for fact in domain.facts)
        problems += [
            f"{domain.name}: {key} stands twice" for key, count in seen.items() if count > 1
        ]
        for concept, facts in domain.concepts().items():
            if len(facts) < FACTS_A_CONCEPT:
                problems.append(f"{domain.name}: {concept} has {len(facts)} facts, not 10")
            if owner.setdefault(slug(concept), domain.name) != domain.name:
                problems.append(f"{domain.name}: {concept} is in {owner[slug(concept)]} too")
        slugs = Counter(slug(concept) for concept in domain.concepts())
        problems += [f"{domain.name}: slug {name} is shared" for name, n in slugs.items() if n > 1]
    return problems


def _wording_problems(domain: Domain) -> Iterator[str]:
    clozes = Counter(relation.cloze for relation in domain.relations.values())
    for name, relation in domain.relations.items():
        where = f"{domain.name}.yaml: {name}"
        if clozes[relation.cloze] > 1:
            yield f"{where}: cloze is not its own"
        if relation.cloze != relation.cloze.strip() or relation.cloze.count("{concept}") != 1:
            yield f"{where}: cloze needs one {{concept}} and no space at its ends"
        if "{concept}" not in relation.question or not relation.question.endswith("?"):
            yield f"{where}: question needs {{concept}} and a question mark"
        if not 4 <= len(set(relation.statements)) <= 5:
            yield f"{where}: {len(set(relation.statements))} different statements, not 4 or 5"
        for text in relation.statements:
            if text.count("{concept}") != 1 or text.count("{answer}") != 1 or text[-1] != ".":
                yield f"{where}: statement needs {{concept}}, {{answer}} and a full stop: {text}"
        kinds = {f.answer for f in domain.facts if f.relation == name} | set(relation.pool)
        if len(kinds) < 4:
            yield f"{where}: {len(kinds)} different answers are too few"


def _fact_problems(domain: Domain, fact: Fact) -> Iterator[str]:
    relation = domain.relations[fact.relation]
    texts = [fact.concept, fact.answer, fact.source, fact.licence, *fact.aliases, *fact.also_true]
    if any(not text or text != " ".join(text.split()) for text in texts):
        yield f"an empty field, or stray white space: {texts}"
    if not 1 <= len(fact.answer.split()) <= 7:
        yield f"answer {fact.answer!r} has {len(fact.answer.split())} words"
    if re.search(r"[()\[\]{};|/]", fact.answer):
        yield f"answer {fact.answer!r} holds a note"
    if not normalise(fact.answer):
        yield f"answer {fact.answer!r} is empty once normalised"
    true = {normalise(text) for text in (fact.answer, *fact.aliases)}
    if true & {normalise(text) for text in fact.also_true}:
        yield "an alias is in also_true as well"
    if relation.numeric and not re.fullmatch(r"-?\d+(\.\d+)?( BC)?", fact.answer):
        yield f"answer {fact.answer!r} is not a number"
    question, cloze = (domain.fill(text, fact) for text in (relation.question, relation.cloze))
    if stands_in(fact.answer, question) or stands_in(fact.answer, cloze):
        yield f"answer {fact.answer!r} stands in the question or the cloze"
    if shared_stem(fact.concept, fact.answer):
        yield f"answer {fact.answer!r} shares a stem with {fact.concept}"
    for template in relation.statements:
        if cloze.casefold() in domain.fill(template, fact).casefold():
            yield f"a statement holds the cloze {cloze!r}"


def shared_stem(concept: str, answer: str, letters: int = 4) -> bool:
    """Whether a word of `answer` begins with the same `letters` as a word of `concept`."""
    stems = [
        {word[:letters] for word in slug(text).split("-") if len(word) >= letters}
        for text in (concept, answer)
    ]
    return bool(stems[0] & stems[1])
