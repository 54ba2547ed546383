"""Questions of one's own: what a row may leave out, from every kind of file, and how it is put."""

from __future__ import annotations

import itertools
import json
import re
import shutil

import datasets
import pandas as pd
import pytest
from huggingface_hub import constants

from paramspec.errors import InputError
from paramspec.specwiki import load_questions
from paramspec.specwiki.prompts import with_prompt
from paramspec.specwiki.questions import read_questions
from paramspec.specwiki.sources import columns_of

ROWS = [
    {"concept": concept, "question": f"{number} of {concept}?", "options": options, "answer": 1}
    for concept, number in itertools.product(("gold", "Łódź, PL"), range(4))
    for options in [["yes", "no", f"{number}", "1960-01-10"][: 2 + number % 3]]
]
LETTERS = [row | {"answer": "B"} for row in ROWS]
TEXTS = [row | {"answer": row["options"][1]} for row in ROWS]


def as_json_lines(path, rows):
    path.write_text("# a comment\n" + "".join(json.dumps(row) + "\n" for row in rows))


def as_csv(path, rows):
    """Options as columns, where they are shorter, empty cells."""
    wide = [row | dict(zip("ABCD", row["options"], strict=False)) for row in rows]
    pd.DataFrame(wide).drop(columns="options").to_csv(path, index=False)


def as_csv_lists(path, rows):
    lists = [row | {"options": json.dumps(row["options"])} for row in rows]
    pd.DataFrame(lists).to_csv(path, index=False)


def as_parquet(path, rows):
    pd.DataFrame(rows).to_parquet(path)


def as_data_set(path, rows):
    """A directory that `load_dataset` reads."""
    path.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(path / "test.parquet"))


FORMS = {
    "x.jsonl": as_json_lines,
    "x.csv": as_csv,
    "lists.csv": as_csv_lists,
    "x.parquet": as_parquet,
    "folder": as_data_set,
}


def read(path):
    with pytest.warns(UserWarning, match="assumed id .*, fold .*, tier .*, cloze") as told:
        questions = load_questions(path)
    assert len(told) == 1
    return questions


@pytest.mark.parametrize("rows", [ROWS, LETTERS, TEXTS], ids=["index", "letter", "text"])
@pytest.mark.parametrize("name", FORMS)
def test_four_fields_are_enough_in_every_form(tmp_path, name, rows):
    FORMS[name](tmp_path / name, rows)
    questions = read(tmp_path / name)
    for question, row in zip(questions, ROWS, strict=True):
        assert question.model_dump(include={"concept", "question"}) == {
            field: row[field] for field in ("concept", "question")
        }
        assert (list(question.options), question.answer) == (row["options"], 1)
        assert question.aliases == (row["options"][1],)
        assert question.cloze == f"Question: {row['question']}\nAnswer:"
        assert question.statements == ()
    assert len({question.id for question in questions}) == len(ROWS)
    for concept in ("gold", "Łódź, PL"):
        folds = [question.fold for question in questions if question.concept == concept]
        assert sorted(folds) == [0, 0, 1, 1]


def test_ids_and_folds_are_of_the_text_whatever_the_order(tmp_path):
    as_json_lines(tmp_path / "a.jsonl", ROWS)
    as_json_lines(tmp_path / "b.jsonl", ROWS[::-1])
    one, other = read(tmp_path / "a.jsonl"), read(tmp_path / "b.jsonl")
    assert one == other[::-1]


def test_what_a_row_has_is_kept(tmp_path):
    own = {"id": "x/1", "fold": 1, "tier": "low", "domain": "d", "cloze": "It is", "aliases": ["a"]}
    as_json_lines(tmp_path / "own.jsonl", [ROWS[0] | own, *ROWS[4:]])
    first = read(tmp_path / "own.jsonl")[0]
    assert first.model_dump(mode="json", include=set(own)) == own


def test_columns_have_other_names(tmp_path):
    rows = [
        {"topic": row["concept"], "q, in words": row["question"], "key": "B", "note": "x"}
        | {"choices": {"text": row["options"]}}
        for row in ROWS
    ]
    as_json_lines(tmp_path / "x.jsonl", rows)
    columns = '{concept: topic, question: "q, in words", options: choices.text, answer: key}'
    with pytest.warns(UserWarning, match="read as the letter of an option; not used: note"):
        found = load_questions(tmp_path / "x.jsonl", columns=columns)
    assert [list(one.options) for one in found] == [row["options"] for row in ROWS]
    pd.DataFrame(
        {"concept": ["a", "b"], "question": ["q", "r"], "right": ["x", "y"], "wrong": ["u", "v"]}
    ).to_csv(tmp_path / "y.csv", index=False)
    with pytest.warns(UserWarning, match="assumed"):
        found = load_questions(tmp_path / "y.csv", columns="options=right+wrong,answer=right")
    assert [(one.options, one.answer) for one in found] == [(("x", "u"), 0), (("y", "v"), 0)]
    with pytest.raises(InputError, match=r"no column 'topics' for concept; it has choices, key"):
        load_questions(tmp_path / "x.jsonl", columns="concept=topics")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["A", "C"], "option 1 by its text and option 0 by its letter"),  # of B, A, C
        (["B", "C"], [0, 2]),  # texts alone hold for both, as do letters: refused below
        (["0", "2"], [0, 2]),
        (["A", "0"], "option 1 by its text and option 0 by its letter"),
    ],
)
def test_an_answer_that_can_be_read_in_two_ways_is_refused(tmp_path, answers, expected):
    rows = [
        {"concept": f"c{place}", "question": "q?", "options": ["B", "A", "C"], "answer": answer}
        for place, answer in enumerate(answers)
    ]
    as_json_lines(tmp_path / "x.jsonl", rows)
    questions, problems, _ = read_questions(tmp_path / "x.jsonl")
    if isinstance(expected, str):
        assert expected in problems[0]
        assert problems[0].startswith(f"{tmp_path / 'x.jsonl'}:2: answer 'A' is ")
    elif answers == ["B", "C"]:
        assert "option 0 by its text and option 1 by its letter" in problems[0]
    else:
        assert [question.answer for question in questions] == expected


def test_one_way_of_reading_that_fits_all_answers_is_taken(tmp_path):
    """B is option 0 by its text and 1 by its letter; the other answer can be a letter alone."""
    options = [["B", "x", "y"], ["u", "v", "w"]]
    rows = [
        {"concept": "c", "question": f"q{place}?", "options": each, "answer": answer}
        for place, (each, answer) in enumerate(zip(options, ["B", "C"], strict=True))
    ]
    as_json_lines(tmp_path / "x.jsonl", rows)
    assert [question.answer for question in read(tmp_path / "x.jsonl")] == [1, 2]


BAD = [
    ({"options": ["a"], "answer": 0}, "at least 2 items"),
    ({"options": ["a", " a"]}, "'a' is given twice"),
    ({"options": "a|b"}, "options 'a|b': "),
    ({"answer": "Z"}, "no option, and no letter or index"),
    ({"answer": 2}, "answer 2, but 2 options (0-1)"),
    ({"question": None}, "question: missing"),
    ({"concept": None}, "concept: missing"),
    ({"fold": 2}, "fold 2"),
    ({"tier": "huge"}, "tier 'huge': "),
]


@pytest.mark.parametrize(("change", "message"), BAD)
@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_a_bad_row_is_named_and_may_be_left_out(tmp_path, name, change, message):
    bad = {field: value for field, value in (ROWS[0] | change).items() if value is not None}
    if name == "x.parquet" and not isinstance(bad.get("options", []), list):
        bad["options"] = [bad["options"]]  # a column has one type
        message = "at least 2 items"
    if name == "x.parquet" and isinstance(bad["answer"], str):
        return
    FORMS[name](tmp_path / name, [ROWS[1], bad, *ROWS[2:]])
    with pytest.raises(InputError) as error:
        load_questions(tmp_path / name)
    place = ":3: " if name == "x.jsonl" else ", row 2: "  # a comment is the first line
    assert str(error.value).startswith(f"{tmp_path / name}{place}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match="1 rows left out, the first: "):
        kept = load_questions(tmp_path / name, skip_invalid=True)
    assert [question.question for question in kept] == [row["question"] for row in ROWS[1:]]


def test_data_sets_and_their_splits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        place = tmp_path / "sets" / split
        place.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_list(ROWS[:4] if split == "train" else ROWS).to_parquet(
            f"{place}.parquet"
        )
    assert len(read("sets:test")) == 8
    with pytest.raises(
        InputError, match=r"sets:dev: no split 'dev'; write sets:SPLIT, of tr.*, te"
    ):
        load_questions("sets:dev")
    with pytest.raises(InputError, match=r"sets: several splits; write sets:SPLIT"):
        load_questions("sets")
    with pytest.raises(InputError, match=r"nowhere: no such file or directory"):
        load_questions("nowhere")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # as if the network were gone
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"nobody/nothing:test: not read as a data set .*network"):
        load_questions("nobody/nothing:test")


def test_a_data_set_of_labels_as_mmlu_has(tmp_path):
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "subject": datasets.ClassLabel(names=["algebra", "law"]),
            "choices": datasets.List(datasets.Value("string")),
            "answer": datasets.ClassLabel(names=["A", "B", "C", "D"]),
        }
    )
    rows = [
        {"question": f"q{n}", "subject": n % 2, "choices": list("wxyz"), "answer": n}
        for n in range(4)
    ]
    (tmp_path / "mmlu").mkdir()
    datasets.Dataset.from_list(rows, features).to_parquet(str(tmp_path / "mmlu" / "test.parquet"))
    with pytest.warns(UserWarning, match="assumed"):
        found = load_questions(tmp_path / "mmlu", columns="mmlu")
    assert [question.concept for question in found] == ["algebra", "law"] * 2
    assert [question.answer for question in found] == [0, 1, 2, 3]


def test_rows_as_popqa_has_get_objects_of_the_same_property_as_options(tmp_path):
    rows = [
        {"id": number, "subj": f"s{number // 2}", "prop": prop, "obj": f"{prop} {number // 2}"}
        | {"question": f"{prop} of s{number // 2}?", "s_pop": 100 - number, "more": 1}
        | {"possible_answers": json.dumps([f"{prop} {number // 2}", f"{prop} 0"])}
        for number in range(12)
        for prop in [("capital", "river")[number % 2]]
    ]
    as_json_lines(tmp_path / "popqa.jsonl", rows)
    with pytest.warns(UserWarning, match="assumed"):
        found = load_questions(tmp_path / "popqa.jsonl", columns="popqa")
    for question, row in zip(found, rows, strict=True):
        assert question.options[question.answer] == row["obj"]
        assert len(question.options) == 4
        assert all(option.startswith(row["prop"]) for option in question.options)
        wrong = set(question.options) - {row["obj"]}
        assert not wrong & set(question.aliases)  # none that is right, too
    assert [question.tier for question in found] == ["high"] * 4 + ["medium"] * 4 + ["low"] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("concept", "write FIELD=COLUMN"),
        ("concep=x", "no field 'concep'; use id"),
        ("{concept: [1]}", "write FIELD=COLUMN"),
        ("{", "not YAML"),
    ],
)
def test_columns_that_name_nothing_are_refused(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        columns_of(text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,a\n1,2\n", ":1: column 'a' is given twice"),
        (b"concept,question\nx,y,z\n", ":2: 3 cells under 2 names"),
        (b"concept;question;options;answer\nx;y;z;0\n", ":2: concept: missing"),
        (b'"a\n', ": not CSV"),
        (b"\xff\xfe,\n", ": not CSV"),
        (b"", ": empty"),
    ],
)
def test_a_csv_that_is_none(tmp_path, data, message):
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.raises(InputError, match=re.escape(message)):
        load_questions(tmp_path / "x.csv")


def test_the_example_is_a_question_file_that_says_what_is_assumed(tmp_path, command, refused):
    path = tmp_path / "mine.jsonl"
    status, out, _ = command("questions", "--init", path)
    assert (status, "paramspec questions --validate" in out) == (0, True)
    status, out, error = command("questions", "--validate", path)
    assert (status, error, "4 questions on 2 concepts" in out) == (0, "", True)
    assert out.count("assumed id (a hash of the text)") == 1
    assert "is there already" in refused("questions", "--init", path)


def test_a_prompt_is_a_form_and_examples_of_other_concepts():
    questions = load_questions(concepts=["gold", "France", "Italy", "Spain", "helium"])
    plain = with_prompt(questions)
    assert plain == questions
    asked = with_prompt(questions, "Of {concept}: {question}\n{options}\nAnswer:\n", shots=2)
    for question, put in zip(questions, asked, strict=True):
        first, second, own = put.cloze.split("\n\n")
        assert own.splitlines()[:2] == [
            f"Of {question.concept}: {question.question}",
            f"A. {question.options[0]}",
        ]
        assert own.endswith("\nAnswer:")
        for shot in (first, second):
            assert not shot.startswith(f"Of {question.concept}:")
            (told,) = [one for one in questions if f": {one.question}\n" in shot]
            assert shot.endswith(f"\nAnswer: {told.options[told.answer]}")
        assert put.model_dump(exclude={"cloze"}) == question.model_dump(exclude={"cloze"})
    fronts = {put.concept: put.cloze.rpartition("\n\n")[0] for put in asked}
    assert len(set(fronts.values())) <= 3  # shared, so that it is computed once


def test_braces_in_a_question_are_text():
    (question, *_) = load_questions(concepts="gold")
    odd = question.model_copy(update={"question": "What is {concept}?", "concept": "{question}"})
    (put,) = with_prompt([odd], "{concept}: {question} {other}")
    assert put.cloze == "{question}: What is {concept}? {other}"


@pytest.mark.parametrize(
    ("form", "shots", "message"),
    [("Answer:", 0, "no {question} and no {cloze}"), ("cloze", 11, "shots 11: only 10 questions")],
)
def test_prompts_that_cannot_be_made(form, shots, message):
    with pytest.raises(InputError, match=re.escape(message)):
        with_prompt(load_questions(concepts=["gold", "France"]), form, shots=shots)


def test_a_data_set_of_the_hub_is_read_from_the_cache_with_no_network(tmp_path, monkeypatch):
    as_parquet(tmp_path / "x.parquet", LETTERS)
    files = {"test": str(tmp_path / "x.parquet")}
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    (info,) = (tmp_path / "cache").rglob("dataset_info.json")
    place = tmp_path / "cache" / "org___mine" / "default" / "0.0.0" / ("a" * 40)
    shutil.copytree(info.parent, place)  # as a download of org/mine leaves it there
    for file in place.glob("parquet-*.arrow"):
        file.rename(place / file.name.replace("parquet-", "mine-"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("org/mine:test", "org/mine", "org/mine/default:test"):
        assert [question.answer for question in read(name)] == [1] * len(ROWS)
    with pytest.raises(InputError, match=r"org/mine:dev: no split 'dev'"):
        load_questions("org/mine:dev")
