"""SpecWiki's questions: loading and choosing them, files that are wrong, other programs."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from paramspec.errors import InputError
from paramspec.specwiki import (
    QUESTIONS,
    dataset,
    export_lm_eval,
    load_questions,
    questions_digest,
)
from paramspec.specwiki.questions import read_questions
from specwiki.build import to_jsonl
from toy_study import save_toy

ROWS = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_loading_gives_the_file():
    assert to_jsonl(load_questions()) == QUESTIONS.read_text(encoding="utf-8")


# What a reader of files may take for a date, a number, a truth value, or nothing at all.
GUESSED = {
    "dates": ["1960-01-10", "1961-02-10", "1962-03-10", "1963-04-10"],
    "times": ["12:30", "01:02:03", "2020-01-01T00:00:00", "2020-01-01 00:00:00Z"],
    "numbers": ["007", "1e3", "1_0", "4"],
    "words": ["true", "no", "nan", "null"],
    "markup": ["{{ 1 }}", "{% raw %}", "# x: y", "<b>[x]</b>"],
    "scripts": ["Łódź", "東京", "e\u0301", "x\u2028y"],
}


def guessed_rows(values: list[str]) -> list[dict]:
    """Eight questions on two concepts, of the values in every field that may hold them."""
    rows = []
    for concept, place in itertools.product(values[:2], range(4)):
        value, before = values[place], values[place - 1]
        texts = dict.fromkeys(("relation", "question", "cloze"), value)
        row = {"id": f"{value} {concept}", "concept": concept, "domain": values[3], "tier": "low"}
        row |= texts | {"options": values, "answer": place, "aliases": [value], "fold": place % 2}
        # A statement may not hold the cloze.
        row["statements"] = [before] if value.casefold() not in before.casefold() else []
        rows.append(row)
    return rows


@pytest.mark.parametrize("kind", GUESSED)
def test_every_field_comes_out_as_the_file_has_it(tmp_path, kind):
    """Loaded, and exported: read as the harness does, by the YAML's loader and arguments."""
    import datasets
    import yaml

    rows = guessed_rows(GUESSED[kind])
    questions = load_questions(write_rows(tmp_path / "own.jsonl", rows))
    assert [question.model_dump(mode="json") for question in questions] == rows
    task = export_lm_eval(tmp_path / "a [b] *c* d? #e: {f} 'g'", questions)
    described = yaml.safe_load(task.read_text(encoding="utf-8"))
    loaded = datasets.load_dataset(
        described["dataset_path"], **described["dataset_kwargs"], cache_dir=str(tmp_path / "cache")
    )
    assert list(loaded["test"]) == rows
    fields = {described[name] for name in ("doc_to_text", "doc_to_choice", "doc_to_target")}
    assert fields == {"cloze", "options", "answer"}  # fields themselves, not templates of them


def test_a_changed_file_is_never_answered_from_a_cache(tmp_path):
    path = write_rows(tmp_path / "q.jsonl", ROWS[:10])
    before = load_questions(path)
    os.utime(write_rows(path, [ROWS[0] | {"question": "Changed?"}, *ROWS[1:10]]), ns=(0, 0))
    after = load_questions(path)
    assert after[0].question == "Changed?"
    assert before[1:] == after[1:]
    # A digest is of content and order.
    assert len({questions_digest(one) for one in (before, list(before), before[::-1], after)}) == 3


def test_a_choice_of_concepts_is_even_over_tiers_nested_and_seeded():
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
    named = load_questions(concepts=["France", "gold"], folds=[0])
    assert Counter(q.concept for q in named) == {"France": 5, "gold": 5}
    assert load_questions(concepts="France", folds=0) == [q for q in named if q.concept == "France"]


def changed(**changes) -> str:
    return json.dumps(ROWS[0] | changes, ensure_ascii=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "not plain JSON"),
        ("[1, 2]", "not plain JSON (no object)"),
        ("", "not plain JSON"),
        (changed(answer=4), "answer 4, but 4 options (0-3)"),
        (changed(answer="E"), "answer 'E' is no option, and no letter or index of one of 4"),
        (changed(answer=True), "answer True: "),
        (changed(options=["a"], answer=0), "at least 2 items"),
        (changed(options=[*map(str, range(27))]), "at most 26 items"),
        (changed(options=["a", "b", "c", "a"]), "option 'a' is given twice"),
        (changed(options=["a", "b", "c", ""]), "option 3, '', is empty or padded"),
        (changed(options="abcd"), "options 'abcd': "),
        (changed(tier="huge"), "tier 'huge': "),
        (changed(concept=" "), "concept is empty"),
        (changed(cloze="It is "), "ends in white space"),
        (changed(statements=[f"Yes, {ROWS[0]['cloze']} so."]), "contains the cloze"),
        (changed()[:-1] + ', "answer": 3}', "key 'answer' is given twice"),
        (changed(), f"id {ROWS[0]['id']!r} is that of line 1"),
        (changed(id="x/y", tier="low"), "tier 'low' of concept"),
        (changed(aliases=["é"]).encode("latin-1"), "not plain JSON"),
        (changed().encode("utf-16-le"), "not plain JSON"),
    ],
)
def test_a_bad_line_is_one_line_with_its_place(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join([changed().encode(), line, json.dumps(ROWS[1]).encode(), b""]))
    with pytest.raises(InputError) as error:
        load_questions(path)
    text = str(error.value)
    assert text.startswith(f"{path}:2: ")
    assert message in text
    assert "\n" not in text
    assert text in read_questions(path)[1]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"concepts": ["Frence"]}, "unknown concept 'Frence'; did you mean France"),
        ({"concepts": 526}, "526 concepts asked for; choose from 1 to 525"),
        ({"concepts": 0}, "0 concepts asked for"),
        ({"tiers": "top"}, "unknown tier 'top'; did you mean high, low, medium"),
        ({"domains": ["country", "dog"]}, "unknown domain 'dog'"),
        ({"folds": 2}, "unknown fold 2; did you mean 0, 1"),
        ({"path": "none.jsonl"}, "none.jsonl: cannot be"),
        ({"path": "."}, ".: not read as a data set"),
        ({"path": "empty.jsonl"}, "empty.jsonl: empty"),
        ({"path": "mine.jsonl", "folds": 1}, f"concept {ROWS[0]['concept']!r} has no question in"),
    ],
)
def test_bad_choices_and_files(tmp_path, monkeypatch, choice, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("\n")
    first = next(row for row in ROWS if row["concept"] == ROWS[0]["concept"] and row["fold"] == 0)
    write_rows(Path("mine.jsonl"), [first, *ROWS[-10:]])
    with pytest.raises(InputError, match=re.escape(message)):
        load_questions(**choice)


def test_the_command_counts_and_shows(command, refused):
    assert re.search(r"total\s+175\s+175\s+175\s+525", command("questions")[1])
    first = ROWS[0]
    for words in (("--show", first["id"]), ("--concept", first["concept"])):
        assert f"* {first['options'][first['answer']]}" in command("questions", *words)[1]
    assert f"did you mean {first['id']}" in refused("questions", "--show", f"{first['id']}x")


def test_the_command_validates(tmp_path, command, refused):
    path = tmp_path / "mine.jsonl"
    path.write_text(changed(answer=4) + "\n")
    assert f"{path}:1: answer 4, but 4 options (0-3)" in refused("questions", "--validate", path)
    path.write_text(changed(answer=4) + "\n{}\n")
    status, out, error = command("questions", "--validate", path)
    assert (status, len(out.splitlines()), len(error.splitlines())) == (2, 2, 1)
    path.write_text(changed() + "\n")
    assert command("questions", "--validate", path)[0] == 0


def test_the_dataset_is_what_the_card_gives(tmp_path):
    """`load_dataset` on the directory, as its README configures it, and `dataset()`."""
    import datasets

    loaded = datasets.load_dataset(str(QUESTIONS.parent), cache_dir=str(tmp_path))
    assert list(loaded) == ["test"]
    features, rows = loaded["test"].features, list(loaded["test"])
    assert dataset().features == features
    assert list(dataset()) == rows
    for row in rows:
        row.update({name: features[name].int2str(row[name]) for name in ("tier", "domain")})
    assert rows == ROWS
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    labels = dict.fromkeys(("domain", "tier", "answer"), "ClassLabel")
    lists = dict.fromkeys(("options", "aliases", "statements"), "List")
    assert kinds == dict.fromkeys(ROWS[0], "Value") | labels | lists
    assert features["answer"].names == list("ABCD")


@pytest.mark.slow
def test_lm_evaluation_harness_runs_the_export(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval
    from lm_eval.tasks import TaskManager

    save_toy(tmp_path / "model")
    questions = load_questions(concepts=3)
    export_lm_eval(tmp_path / "task", questions)
    samples = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'model'},dtype=float32",
        tasks=["specwiki"],
        task_manager=TaskManager(include_path=str(tmp_path / "task")),
        **{"limit": 8, "device": "cpu", "batch_size": 8, "bootstrap_iters": 0},
    )["samples"]["specwiki"]
    assert len(samples) == 8
    for sample in samples:
        assert {"acc", "acc_norm"} <= sample.keys()
        question = questions[sample["doc_id"]]
        prompts = list(map(tuple, sample["arguments"]))
        assert prompts == [(question.cloze, f" {option}") for option in question.options]
        assert int(sample["target"]) == question.answer


def test_an_export_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        export_lm_eval(tmp_path / "file" / "task", load_questions(concepts=1))
