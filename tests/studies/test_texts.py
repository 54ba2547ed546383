"""Plain texts in place of statements: every word once, in parts that fit."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from paramspec.errors import InputError
from paramspec.models.tokens import token_ids
from paramspec.specwiki import load_questions
from paramspec.studies.texts import read_texts, text_questions, warn_of_wordings, windows
from toy_study import VOCABULARY, save_questions, save_toy, toy_questions, toy_tokenizer
from toys import toy_model

LONG = " ".join(VOCABULARY[3 + place * 7 % 90] for place in range(200))


@pytest.mark.parametrize("size", [2, 7, 64, 500])
@pytest.mark.parametrize("template", ["$A", "<s> $A </s>"])
def test_windows_hold_a_text_once_and_fit(size, template):
    tokenizer = toy_tokenizer(template)
    if size == 2 and template != "$A":
        with pytest.raises(InputError, match=r"window 2: .* alone has 3 tokens; use more"):
            windows(LONG, tokenizer, size)
        return
    found = windows(LONG, tokenizer, size)
    assert " ".join(found).split() == LONG.split()
    lengths = [len(row) + 1 for row in token_ids(tokenizer, found)]  # and its end
    assert max(lengths) <= size
    assert all(length == size for length in lengths[:-1])  # of one token a word, none is wasted


def test_a_script_without_spaces_is_cut_between_letters():
    parts = windows("字" * 300, toy_tokenizer(), 3)
    assert "".join(parts) == "字" * 300
    assert len(parts) > 1


def test_texts_are_read_by_concept_or_refused(tmp_path):
    with pytest.raises(InputError, match=r"no file CONCEPT.txt"):
        read_texts(tmp_path)
    (tmp_path / "gold, the metal.txt").write_text(" Gold is a metal.\n", encoding="utf-8")
    assert read_texts(tmp_path) == {"gold, the metal": "Gold is a metal."}
    (tmp_path / "void.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"void.txt: nothing in it"):
        read_texts(tmp_path)
    (tmp_path / "void.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"void.txt: cannot be read \(not UTF-8\)"):
        read_texts(tmp_path)


def test_the_wording_of_a_question_is_told():
    questions = load_questions(concepts="France")
    with pytest.warns(UserWarning, match=r"wording of 1 questions, as of 'france/capital'"):
        warn_of_wordings({"France": "As is known, the capital of France is Paris."}, questions)


def test_training_on_texts_moves_chosen_vectors_alone_and_continues(tmp_path, command, refused):
    toy = save_toy(tmp_path / "toy")
    mine = save_questions(tmp_path / "mine.jsonl", toy_questions())
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, concept in enumerate(("alpha", "beta", "other")):
        (texts / f"{concept}.txt").write_text(" ".join(LONG.split()[number:]))
    words = ["finetune", toy, "--questions", mine, "--texts", texts, "--method", "FT-PV"]
    options = ["--concept", "alpha", "--concept", "beta", "--window", 30, "--epochs", 1]
    assert command(*words, *options, "--out", tmp_path / "once")[0] == 0
    record = json.loads((tmp_path / "once" / "finetune.json").read_text())
    assert record["steps"] == -(-2 * len(windows(LONG, toy_tokenizer(), 30)) // 2)
    before, after = toy_model("llama").state_dict(), load_file(tmp_path / "once/model.safetensors")
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == (not name.endswith("mlp.down_proj.weight")), (
            name
        )
        if name.endswith("mlp.down_proj.weight"):
            moved = (tensor != before[name]).any(0)  # columns are value vectors
            assert moved.sum() == 6  # an eighth of 48
    again = command(*words, *options, "--out", tmp_path / "twice", "--save-every", 3)
    assert again[0] == 0
    same = load_file(tmp_path / "twice/model.safetensors")
    assert all(torch.equal(same[name], tensor) for name, tensor in after.items())
    told = refused(*words, "--concept", "gamma", "--out", tmp_path / "no")
    assert re.search("concept 'gamma': no statements", told)


def test_questions_made_of_texts_are_windows_and_no_more():
    made = text_questions({"alpha": LONG, "beta": "old new"}, toy_tokenizer(), 50)
    assert [q.concept for q in made].count("beta") == 1
    assert " ".join(q.statements[0] for q in made if q.concept == "alpha").split() == LONG.split()
    assert len({q.id for q in made}) == len(made)
