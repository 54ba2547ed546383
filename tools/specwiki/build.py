"""Build `questions.jsonl` from the fact tables: `python -m specwiki.build`, in `tools/`.

The same tables give the same bytes: every choice is a SHA-256 hash of what is chosen, never a
random number. `python -m specwiki.build --concepts` first measures the names again and rewrites
`concepts.csv` (it needs `wordfreq`, which nothing else here does).
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from paramspec.seeds import by_hash
from paramspec.specwiki import QUESTIONS, Question
from paramspec.specwiki.questions import normalise
from paramspec.tables import TIERS
from specwiki.facts import FACTS_A_CONCEPT, Domain, Fact, number, read_tables, slug, stands_in

CONCEPTS = Path(__file__).with_name("concepts.csv")

N_CONCEPTS = 525

# How distractors are drawn. The numbers were set so that choosing the longest, the shortest, the
# commonest or the rarest option scores near chance; `tests/specwiki/test_specwiki.py` measures it.
LENGTH_SCALE = 3.0  # characters of difference in length that divide a value's weight by e
LENGTH_SHIFT = 5.0  # characters by which the preferred length is off the answer's, at most
COMMON = 1.6  # the power of the number of concepts that a value is true of
CODE_LENGTH, SAME_INITIAL = 3, 20  # codes: the concept's initial alone must not give them away
NEAREST = 5  # numeric distractors come from so many values on each side of the true one
YEAR_GAP = 2  # a year so near the true one may be arguable, so it is no distractor


def _hash(*parts: object) -> float:
    """A number in (0, 1) that only `parts` decide."""
    return (int.from_bytes(by_hash(*parts)[:6], "big") + 1) / (2**48 + 1)


def choose_concepts(domains: list[Domain], count: int = N_CONCEPTS) -> list[dict[str, str]]:
    """The rows of `concepts.csv`: `count` concepts, their Zipf frequency, and their tier.

    Of more than `count` candidates each domain gives up the same share, by hash of the name.
    Tiers are the thirds of the names sorted by frequency, ties by name.
    """
    from wordfreq import zipf_frequency

    names = []
    for domain in domains:
        kept = sorted(set(domain.concepts()) - set(domain.homographs))
        kept.sort(key=lambda name: _hash("concept", name))
        # The share of its domain that stands before a name: cutting by it cuts all domains alike.
        names += [
            ((place + 0.5) / len(kept), name, domain.domain) for place, name in enumerate(kept)
        ]
    rows = [
        {"concept": name, "domain": domain, "zipf": f"{zipf_frequency(name, 'en'):.2f}"}
        for _, name, domain in sorted(names)[:count]
    ]
    rows.sort(key=lambda row: (-float(row["zipf"]), row["concept"]))
    return [row | {"tier": TIERS[3 * place // len(rows)]} for place, row in enumerate(rows)]


def read_concepts() -> list[dict[str, str]]:
    """The rows of `concepts.csv`: concept, domain, zipf, tier."""
    with CONCEPTS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def build_questions(domains: list[Domain], concepts: Iterable[dict[str, str]]) -> list[Question]:
    """Ten questions for each of `concepts`, in their order, from the first ten relations."""
    by_name = {domain.domain: domain for domain in domains}
    tables = {domain.domain: domain.concepts() for domain in domains}
    values = {domain.domain: _values(domain) for domain in domains}
    asked: list[tuple[Domain, Fact, dict]] = []
    for row in concepts:
        facts = list(tables[row["domain"]][row["concept"]].values())[:FACTS_A_CONCEPT]
        ids = {f"{slug(fact.concept)}/{fact.relation}": fact for fact in facts}
        first_half = sorted(ids, key=lambda name: _hash("fold", name))[: len(ids) // 2]
        for name, fact in ids.items():
            fields = {"id": name, "tier": row["tier"], "fold": int(name not in first_half)}
            asked.append((by_name[row["domain"]], fact, fields))
    # The answer's place: 0 to 3 in turn, over the questions shuffled within domain and fold.
    keys = [(domain.domain, fields["fold"], fields["id"]) for domain, _, fields in asked]
    order = sorted(keys, key=lambda key: (*key[:2], _hash("place", key[2])))
    places = {name: place % 4 for place, (_, _, name) in enumerate(order)}
    return [
        _question(domain, fact, values[domain.domain][fact.relation], places[fields["id"]], fields)
        for domain, fact, fields in asked
    ]


def _values(domain: Domain) -> dict[str, tuple[Counter[str], dict[str, set[str]]]]:
    """For each relation its answers with their counts, and every answer's normalised spellings."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    spellings: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for fact in domain.facts:
        counts[fact.relation][fact.answer] += 1
        names = {normalise(text) for text in (fact.answer, *fact.aliases)}
        spellings[fact.relation][fact.answer] |= names
    for name, relation in domain.relations.items():
        for value in relation.pool:
            counts[name].setdefault(value, 1)
            spellings[name][value].add(normalise(value))
    return {name: (counts[name], spellings[name]) for name in counts}


def _question(
    domain: Domain,
    fact: Fact,
    values: tuple[Counter[str], dict[str, set[str]]],
    place: int,
    fields: dict[str, Any],
) -> Question:
    relation, name = domain.relations[fact.relation], fields["id"]
    question, cloze = domain.fill(relation.question, fact), domain.fill(relation.cloze, fact)
    counts, spellings = values
    candidates = _false_values(fact, counts, spellings, f"{question} {cloze}")
    ranked = (_near if relation.numeric else _alike)(name, fact.answer, candidates)
    options = _three(fact.answer, ranked, spellings, fact.place)
    options.sort(key=lambda option: _hash("order", name, option))
    options.insert(place, fact.answer)
    return Question(
        **fields,
        concept=fact.concept,
        domain=domain.domain,
        relation=fact.relation,
        question=question,
        cloze=cloze,
        options=cast("tuple[str, str, str, str]", tuple(options)),
        answer=place,
        aliases=tuple(dict.fromkeys((fact.answer, *fact.aliases, *fact.also_true))),
        statements=tuple(domain.fill(text, fact) for text in relation.statements),
    )


def _false_values(
    fact: Fact, counts: Counter[str], spellings: dict[str, set[str]], text: str
) -> Counter[str]:
    """The relation's values that are false of the concept and not to be read in the question."""
    true = {normalise(text) for text in (fact.answer, *fact.aliases, *fact.also_true)}
    true |= spellings[fact.answer]
    return Counter(
        {
            value: count
            for value, count in counts.items()
            if not spellings[value] & true and not stands_in(value, text)
        }
    )


def _alike(name: str, answer: str, candidates: Counter[str]) -> list[str]:
    """`candidates` in a hashed order that prefers values of like length that are true of many.

    Sampling without replacement (Efraimidis and Spirakis, 2006), a value's weight rising with the
    number of concepts it is true of: drawn uniformly, distractors would be rarer than answers.
    """
    # Around the answer's own length the answer would too seldom be the longest or the shortest.
    length = len(answer) + LENGTH_SHIFT * (2 * _hash("length", name) - 1)

    def key(value: str) -> float:
        weight = candidates[value] ** COMMON * math.exp(-abs(len(value) - length) / LENGTH_SCALE)
        if len(answer) <= CODE_LENGTH and value[0].lower() == name[0]:
            weight *= SAME_INITIAL
        return -math.log(_hash("option", name, value)) / weight

    return sorted(candidates, key=key)


def _near(name: str, answer: str, candidates: Counter[str]) -> list[str]:
    """Numbers near `answer`; how many of the first three lie below it is hashed, 0 to 3 alike."""
    true = number(answer)
    gap = YEAR_GAP if abs(true) >= 1000 else 0
    below = sorted((v for v in candidates if number(v) < true - gap), key=number, reverse=True)
    above = sorted((v for v in candidates if number(v) > true + gap), key=number)
    sides = [
        sorted(side[:NEAREST], key=lambda v: _hash("option", name, v)) + side[NEAREST:]
        for side in (below, above)
    ]
    n_below = int(4 * _hash("below", name))
    first = sides[0][:n_below] + sides[1][: 3 - n_below]
    return first + sides[0][n_below:] + sides[1][3 - n_below :]


def _three(answer: str, ranked: list[str], spellings: dict[str, set[str]], where: str) -> list[str]:
    """The first three of `ranked` of which none repeats or holds another, or the answer."""
    chosen: list[str] = []
    for value in ranked:
        if all(
            value.casefold() not in other.casefold()
            and other.casefold() not in value.casefold()
            and not spellings[value] & spellings[other]
            for other in (answer, *chosen)
        ):
            chosen.append(value)
        if len(chosen) == 3:
            return chosen
    raise ValueError(f"{where}: {len(chosen)} distractors for {answer!r}, 3 are needed: add a pool")


def to_jsonl(questions: Iterable[Question]) -> str:
    """The text of a question file: one compact JSON object a line."""
    return "".join(question.model_dump_json() + "\n" for question in questions)


def main() -> None:
    """Write `questions.jsonl`, and with `--concepts` first `concepts.csv`."""
    parser = argparse.ArgumentParser(description="Build questions.jsonl from the fact tables.")
    parser.add_argument("--concepts", action="store_true", help="measure names with wordfreq first")
    parser.add_argument("--out", type=Path, default=QUESTIONS, help="where to write the questions")
    args = parser.parse_args()
    domains = read_tables()
    if args.concepts:
        rows = choose_concepts(domains)
        with CONCEPTS.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    questions = build_questions(domains, read_concepts())
    args.out.write_text(to_jsonl(questions), encoding="utf-8")
    print(f"{args.out}: {len(questions)} questions")


if __name__ == "__main__":
    main()
