"""`paramspec pss` as a user meets it: what it writes and prints; one line for every bad input."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from disks import small_disk
from paramspec.method.masks import load_masks
from paramspec.tables import MASKS
from toy_study import CONCEPTS, RELATIONS, save_questions, save_toy, toy_questions

# Names and order as the design page has them, after whose row it is.
PSS = "model concept domain tier ratio mask seed protocol "
PSS += "concept_accuracy general_accuracy n_concept n_general"
DETAILS = "model protocol question_id concept role mask_concept ratio mask seed option_logprobs "
DETAILS += "option_tokens predicted predicted_norm correct correct_norm"
COMMAND = Path(sys.executable).with_name("paramspec")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model directory, a question file and results of an earlier run."""
    place = tmp_path_factory.mktemp("cli")
    save_toy(place / "toy")
    save_questions(place / "questions.jsonl", toy_questions(4))
    return place


@pytest.fixture(scope="module")
def first(place):
    """The command itself, in a process of its own: (process, output directory)."""
    return pss_process(place, "--ratios", "0.1,0.3", "--out", "out"), place / "out"


def pss_process(place, *options):
    words = [COMMAND, "pss", place / "toy", "--questions", place / "questions.jsonl", *options]
    return subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=600)


@pytest.fixture
def pss(place, tmp_path, command):
    """`status, out, err = pss(*options)`: the command in this process."""

    def pss(*options, model=None, store=tmp_path / "store"):
        model = [place / "toy"] if model is None else model
        kept = () if store is None else ("--store", store)
        return command("pss", *model, "--questions", place / "questions.jsonl", *options, *kept)

    return pss


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_it_exits_with_0_and_shows_progress_with_the_time_left(first):
    process, _ = first
    assert process.returncode == 0, process.stderr
    assert re.search(r"toy: +\d+%.*\d+/720 \[\d+:\d+<\d+:\d+, .*question/s\]", process.stderr)
    # Nothing that is imported or called adds a line of its own.
    for line in re.split(r"[\r\n]+", process.stderr.strip()):
        assert re.match(r".*(toy|coefficients|answers): +\d+%", line) or not line.strip(
            "\x1b[A "
        ), line


def test_it_writes_five_files_with_their_columns(first, place):
    _, out = first
    assert len(contents(out)) == 5
    pss, details = (pd.read_parquet(out / name) for name in ("pss.parquet", "details.parquet"))
    assert list(pss.columns) == PSS.split()
    assert list(details.columns) == DETAILS.split()
    assert set(pss["mask"]) == set(MASKS)
    assert set(pss["concept"]) == set(CONCEPTS[:4])
    assert len(pss) == 4 * (1 + 2 * 4)
    assert (pss[["n_concept", "n_general"]] == 10).all(axis=None)
    assert len(details) == 20 * len(pss)
    assert all(len(row) == 4 for row in details["option_logprobs"])
    masked = pss[pss["mask"] != "none"].itertuples()
    masks, _ = load_masks(out / "masks.safetensors")
    assert set(masks) == {
        f"{place / 'toy'}/{row.concept}/{row.ratio}/{row.mask}/{row.seed}" for row in masked
    }
    for name, vectors in masks.items():
        assert vectors.dtype == torch.int32
        assert vectors.shape == (3 * round(float(name.split("/")[-3]) * 48), 2)
        assert (vectors < torch.tensor([3, 48])).all()


def test_run_json_says_what_was_measured_on_what(first, place):
    run = json.loads((first[1] / "run.json").read_text())
    choices = {"ratios": [0.1, 0.3], "position": "mean", "scope": "layer", "protocol": "paper"}
    choices |= {"folds": [0, 1], "controls": 1, "nulls": ["random", "magnitude", "other"]}
    choices |= {
        "spared": 0.0,
        "ablation": "zero",
        "general": 10,
        "general_by": "question",
        "seed": 0,
        "chat": False,
        "row_tokens": 160,
        "batch_tokens": 1024,
    }
    assert run["choices"] == choices
    (model,) = run["models"]
    for digested in (run["questions"], model):
        assert re.fullmatch(r"[0-9a-f]{64}", digested["digest"])
    assert (model["name"], model["dtype"]) == (str(place / "toy"), "float32")
    (record,) = model["computed"]
    for name in ("torch", "transformers", "tokenizers", "numpy", "paramspec"):
        assert record["versions"][name] == importlib.metadata.version(name)
    assert record["hardware"]["cpu"]
    assert run["scoring_version"] >= 1


def test_the_printed_table_is_that_of_the_file(first):
    process, out = first
    pss = pd.read_parquet(out / "pss.parquet")
    g0 = pss.loc[pss["mask"] == "none", "general_accuracy"].mean()
    printed = re.sub(r"\s+", " ", process.stdout)
    for (kind, ratio), rows in pss.groupby(["mask", "ratio"]):
        own, general = rows["concept_accuracy"].mean(), rows["general_accuracy"].mean()
        shown = [rf"{value:.3f} \[\d\.\d+, \d\.\d+\]" for value in (own, general)]
        shown.append(rf"{abs(general - own) / g0:.3f} \[\d\.\d+, \d\.\d+\]")
        assert re.search(" ".join([kind, f"{ratio:g}", *shown]), printed), (kind, ratio, printed)
    peak = r"mask concept: difference in differences, .* peak PSS \d\.\d+ \[.*\] at ratio 0\.[13]"
    assert re.search(peak, printed)


def test_a_rerun_is_served_from_the_store_and_ends_with_the_same_files(first, place, pss):
    _, out = first
    again, store = out.with_name("again"), place / "results" / "store"
    assert pss("--ratios", "0.1,0.3", "--out", again, store=store)[0] == 0
    for name in ("pss.parquet", "details.parquet"):
        pd.testing.assert_frame_equal(pd.read_parquet(again / name), pd.read_parquet(out / name))
    record = json.loads((again / "run.json").read_text())["models"][0]
    assert record["units_from_store"] == record["units"] == 1


def test_options_reach_the_measurement(pss, tmp_path):
    options = "--ratios 0.25 --position last --scope model --protocol holdout --controls 0"
    options += " --general 5 --seed 4 --dtype bfloat16 --device cpu --concepts 3"
    status, _, error = pss(*options.split(), "--out", tmp_path / "out")
    assert status == 0, error
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    expected = {"ratios": [0.25], "position": "last", "scope": "model", "protocol": "holdout"}
    expected |= {"controls": 0, "general": 5, "seed": 4}
    assert expected.items() <= record["choices"].items()
    assert record["models"][0]["dtype"] == "bfloat16"
    rows = pd.read_parquet(tmp_path / "out" / "pss.parquet")
    assert rows["concept"].nunique() == rows["tier"].nunique() == 3
    assert set(rows["n_concept"]) == {5}


@pytest.fixture
def refuse(pss, first, tmp_path):
    """`error = refuse(*options)`: the last line of a failed run, which leaves what there is."""
    out = shutil.copytree(first[1], tmp_path / "out")
    before = contents(out)

    def refuse(*options, begun=False, **kept):
        status, printed, error = pss("--out", out, *options, **kept)
        assert (status, printed) == (2, "")
        assert contents(out) == before
        *progress, line = error.rstrip("\n").split("\n")
        assert begun or not progress, error
        assert line.startswith("paramspec: error: ")
        return line.removeprefix("paramspec: error: ")

    return refuse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ratios 0.1,1.5", "ratios[1] 1.5: "),
        ("--ratios 10%", "'--ratios': expected a number, as 0.05, not '10%'"),
        ("--scope head", "'--scope': 'head'"),
        ("--controls -1", "controls -1: "),
        ("--general 31", "general 31: only 30 questions on other concepts"),
        ("--seed 1_0", "'--seed': expected a whole number, as 10, not '1_0'"),
        ("--seed 99999999999999999999", "seed 99999999999999999999: "),
        ("--concepts 5", "5 concepts asked for; choose from 1 to 4"),
        ("--concepts 1", "questions on 1 concept(s): at least 2 are needed"),
        ("--device tpu", "device 'tpu': not on this machine; use auto, cpu"),
        ("--color red", "No such option: --color"),
        ("--questions nowhere.jsonl", "nowhere.jsonl: cannot be read"),
    ],
)
def test_an_option_that_is_none(refuse, options, message):
    assert message in refuse(*options.split())


def test_a_second_model_that_is_wrong_stops_the_run_before_the_first(refuse, place, tmp_path):
    toy = str(place / "toy")
    assert "given twice" in refuse(model=[toy, toy])
    assert "model 'smollm3-135m': not in" in refuse(model=[toy, "smollm3-135m"])
    assert not list((tmp_path / "store").iterdir())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_question_that_no_model_position_is_left_for(refuse, tmp_path, family):
    questions = toy_questions(4)
    questions[4] = questions[4].model_copy(update={"cloze": "old " * 70 + "age"})
    file = save_questions(tmp_path / "mine.jsonl", questions)
    model = save_toy(tmp_path / "toy", family)
    told = refuse("--questions", file, model=[model], begun=True)
    assert re.match(f"{model}: .* of 7\\d tokens does not fit .* of 64 tokens", told)


@pytest.mark.parametrize("option", ["--out", "--store"])
def test_a_directory_that_cannot_be_written(refuse, tmp_path, option):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "results"
    assert refuse(option, str(path), store=None).startswith(f"{path}: cannot write (")
    with small_disk(tmp_path / "full", "64k") as disk:
        (disk / "ballast").write_bytes(b"\0" * 64 * 1024)
        told = refuse(option, str(disk), store=None)
        assert told.startswith(f"{disk}: cannot write (No space left on device); free some space")


@pytest.mark.slow
def test_a_warning_is_one_line(place, tmp_path):
    """A damaged result is set aside: told as an error is, without a line of code."""
    options = ("--ratios", "0.1", "--out", f"{tmp_path}/out", "--store", f"{tmp_path}/store")
    assert pss_process(place, *options).returncode == 0
    (unit,) = (tmp_path / "store").glob("v*/*/*/pss.parquet")
    unit.write_bytes(b"")
    told = pss_process(place, *options).stderr
    (line,) = [line for line in told.splitlines() if "set aside" in line]
    assert line.startswith(f"paramspec: warning: {unit.parent}: pss.parquet is damaged")
    assert "warnings.warn" not in told


def test_a_plan_measures_nothing(pss, tmp_path):
    status, out, _ = pss("--plan", "--out", tmp_path / "out")
    assert (status, (tmp_path / "out").exists(), (tmp_path / "store").exists()) == (0, False, False)
    assert re.search(r"In all: 1 models, 4 concepts: \S+ hours of one cpu", out)


def test_without_a_number_as_many_unrelated_questions_as_there_are(command, place, tmp_path):
    few = [q for q in toy_questions(2) if q.relation in RELATIONS[:4]]
    mine = save_questions(tmp_path / "few.jsonl", few)
    words = ["pss", place / "toy", "--questions", mine, "--ratios", "0.2", "--controls", 0]
    words += ["--store", tmp_path / "store", "--out", tmp_path / "out"]
    status, out, _ = command(*words)
    assert (status, "4 unrelated questions, all there are" in out) == (0, True)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["choices"]["general"] == 4
    status, _, error = command(*words, "--general", 5)
    assert (status, "general 5: only 4 questions" in error) == (2, True)


def test_a_prompt_from_a_file_is_what_the_model_reads(command, place, tmp_path):
    (tmp_path / "prompt.txt").write_text("the {cloze}\n")
    words = ["pss", place / "toy", "--questions", place / "questions.jsonl", "--ratios", "0.2"]
    words += ["--controls", 0, "--store", tmp_path / "store", "--prompt", tmp_path / "prompt.txt"]
    assert command(*words, "--shots", 1, "--chat-template", "--out", tmp_path / "out")[0] == 0
    asked = json.loads((tmp_path / "out" / "run.json").read_text())["questions"]
    assert (asked["prompt"], asked["shots"]) == ("the {cloze}\n", 1)
    kept = (tmp_path / "out" / "questions.jsonl").read_text().splitlines()
    for line, question in zip(kept, toy_questions(4), strict=True):
        assert json.loads(line)["cloze"].split("\n\n")[1] == f"the {question.cloze}"
    assert command(*words, "--prompt", tmp_path / "none.txt")[0] == 2
