"""The report of a run and of two: one file, whole by itself, whose numbers are those of the run."""

from __future__ import annotations

import json
import re
import shutil

import pandas as pd
import pytest

from paramspec.specwiki.questions import load_questions
from paramspec.stats.summary import peak_pss
from paramspec.studies.sweep import write_study
from toy_study import save_questions, save_toy, toy_questions

OPTIONS = ["--ratios", "0.1,0.3", "--general", "5"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on the same questions, of two toys; their folder."""
    from paramspec import Choices, Store, measure_pss

    folder = tmp_path_factory.mktemp("runs")
    choices = Choices(ratios=(0.1, 0.3), general=5)
    for seed, name in enumerate(("before", "after")):
        toy = save_toy(folder / f"toy <{name}>", seed=seed)
        store = Store(folder / "store")
        write_study(measure_pss([str(toy)], toy_questions(4), choices, store=store), folder / name)
    return folder


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page.partition("</style>")[2]).split())


def alone(page: str) -> bool:
    """Whether it asks for nothing: no script, no style, image or font from elsewhere."""
    asked = re.findall(r"""(?:src|href)\s*=\s*["']([^"']{5})|url\(|@import|<script|<link""", page)
    return all(start == "data:" or start == "https" for start in asked) and 'src="http' not in page


def test_a_report_is_one_file_with_the_numbers_of_the_run(runs, command):
    status, out, _ = command("report", runs / "before")
    page = (runs / "before" / "report.html").read_text()
    assert (status, str(runs / "before" / "report.html") in out) == (0, True)
    assert alone(page)
    assert len(page) < 1_000_000
    details = pd.read_parquet(runs / "before" / "details.parquet")
    peak = peak_pss(details).set_index("mask").loc["concept"]
    text = text_of(page)
    assert (
        f"{abs(peak['did']):.3f} {'more' if peak['did'] >= 0 else 'less'} of the accuracy" in text
    )
    assert f"{peak['peak_pooled']:.3f}" in text
    bare = details[(details["mask"] == "none") & (details["role"] == "concept")]
    assert f"answers {bare['correct_norm'].mean():.0%}".replace("%", " %") in text
    assert "a guess is right in 25 %" in text
    assert "toy <before>" not in page  # a name is text, not markup
    assert "toy &lt;before&gt;" in page
    known = bare.loc[bare["correct_norm"] == 1, "question_id"]
    own = details[(details["mask"] == "concept") & (details["role"] == "concept")]
    lost = own[(own["correct_norm"] == 0) & own["question_id"].isin(known)]["question_id"].nunique()
    assert f"Of {len(known)} questions that are answered rightly without a mask, {lost} are" in text


def test_a_run_keeps_its_questions(runs):
    assert load_questions(runs / "before" / "questions.jsonl") == toy_questions(4)


def test_two_runs_are_compared_in_the_terminal_and_on_a_page(runs, command, tmp_path):
    out = tmp_path / "pages" / "both.html"
    status, told, _ = command("compare", runs / "before", runs / "after", "--out", out)
    assert status == 0
    assert "40 questions on 4 concepts, paired" in told
    page = out.read_text()
    assert alone(page)
    assert "asked the same 40 questions on 4 concepts" in text_of(page)


def test_reworded_questions_are_not_compared(runs, command, refused, tmp_path):
    other = shutil.copytree(runs / "after", tmp_path / "other")
    questions = load_questions(other / "questions.jsonl")
    changed = [q.model_copy(update={"question": f"{q.question}!"}) for q in questions[:4]]
    save_questions(other / "questions.jsonl", [*changed, *questions[4:]])
    assert "36 questions on 4 concepts" in command("compare", runs / "before", other)[1]
    changed = [q.model_copy(update={"question": f"{q.question}!"}) for q in questions]
    save_questions(other / "questions.jsonl", changed)
    assert "no question in common" in refused("compare", runs / "before", other)


def test_a_fine_tuning_has_a_report(tmp_path, command):
    toy = save_toy(tmp_path / "toy")
    mine = save_questions(tmp_path / "mine.jsonl", toy_questions())
    words = ["--questions", mine, "--method", "FT-PV", "--concept", "alpha", "--out"]
    assert command("finetune", toy, *words, tmp_path / "tuned")[0] == 0
    assert command("report", tmp_path / "tuned", "--out", tmp_path / "x.html")[0] == 0
    text = text_of((tmp_path / "x.html").read_text())
    record = json.loads((tmp_path / "tuned" / "finetune.json").read_text())
    assert f"in {record['steps']} steps; the loss went from {record['losses'][0]:.2f}" in text


def test_what_is_no_run_is_refused(runs, refused, tmp_path):
    assert "no run of pss or finetune, run.json is missing" in refused("report", tmp_path)
    broken = shutil.copytree(runs / "before", tmp_path / "broken")
    (broken / "run.json").write_text("{")
    assert "run.json: damaged" in refused("report", broken)
    assert "is missing" in refused("compare", runs / "before", tmp_path)
