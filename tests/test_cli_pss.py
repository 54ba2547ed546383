"""`paramspec pss` as a user meets it: what it writes and prints; one line for every bad input."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

from disks import read_only, small_disk
from toy_study import CONCEPTS, save_questions, save_toy, toy_questions
from toys import toy_model

FILES = ["details.parquet", "masks.safetensors", "pss.parquet", "run.json"]
# Names and order as the design page has them, after whose row it is.
# fmt: off
PSS = [
    "model", "concept", "domain", "tier", "ratio", "mask", "seed", "protocol",
    "concept_accuracy", "general_accuracy", "n_concept", "n_general",
]
DETAILS = [
    "model", "protocol", "question_id", "role", "mask_concept", "ratio", "mask", "seed",
    "option_logprobs", "option_tokens", "predicted", "predicted_norm", "correct", "correct_norm",
]
# fmt: on
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
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# What it does


def test_it_exits_with_0_and_shows_progress_with_the_time_left(first):
    process, _ = first
    assert process.returncode == 0, process.stderr
    assert re.search(r"toy: +\d+%.*\d+/720 \[\d+:\d+<\d+:\d+, .*question/s\]", process.stderr)
    # Nothing that is imported or called adds a line of its own.
    for line in re.split(r"[\r\n]+", process.stderr.strip()):
        assert re.match(r".*(toy|coefficients): +\d+%", line) or not line.strip("\x1b[A "), line


def test_it_writes_four_files_with_their_columns(first):
    _, out = first
    assert list(contents(out)) == FILES
    pss, details = pd.read_parquet(out / "pss.parquet"), pd.read_parquet(out / "details.parquet")
    assert list(pss.columns) == PSS
    assert list(details.columns) == DETAILS
    assert set(pss["mask"]) == {"none", "concept", "random", "magnitude", "other"}
    assert set(pss["concept"]) == set(CONCEPTS[:4])
    assert len(pss) == 4 * (1 + 2 * 4)
    assert (pss["n_concept"] == 10).all()
    assert (pss["n_general"] == 10).all()
    assert len(details) == 20 * len(pss)
    assert all(len(row) == 4 for row in details["option_logprobs"])
    assert details["option_logprobs"].iloc[0].dtype == np.float64


def test_masks_are_named_by_model_concept_ratio_mask_and_seed(first, place):
    _, out = first
    pss = pd.read_parquet(out / "pss.parquet")
    rows = pss[pss["mask"] != "none"]
    expected = {
        f"{place / 'toy'}/{row.concept}/{row.ratio}/{row.mask}/{row.seed}"
        for row in rows.itertuples()
    }
    with safe_open(out / "masks.safetensors", framework="np") as file:
        assert set(file.keys()) == expected
        metadata = {name: json.loads(text) for name, text in file.metadata().items()}
        for name in file.keys():  # noqa: SIM118
            vectors = file.get_tensor(name)
            ratio = float(name.split("/")[-3])
            assert vectors.dtype == np.int32
            assert vectors.shape == (3 * round(ratio * 48), 2)
            assert set(vectors[:, 0]) <= set(range(3))
            assert set(vectors[:, 1]) <= set(range(48))
    assert metadata["models"][0]["digest"]
    assert metadata["questions"]["digest"]
    assert metadata["choices"]["ratios"] == [0.1, 0.3]


def test_run_json_says_what_was_measured_on_what(first, place):
    _, out = first
    run = json.loads((out / "run.json").read_text())
    assert run["choices"] == {
        "ratios": [0.1, 0.3],
        "position": "mean",
        "scope": "layer",
        "protocol": "paper",
        "folds": [0, 1],
        "controls": 1,
        "nulls": ["random", "magnitude", "other"],
        "general": 10,
        "seed": 0,
        "row_tokens": 160,
        "batch_tokens": 1024,
    }
    (model,) = run["models"]
    for digested in (run["questions"], model):
        assert re.fullmatch(r"[0-9a-f]{64}", digested["digest"])
    assert run["questions"]["count"] == 40
    assert model["name"] == str(place / "toy")
    assert (model["layers"], model["width"], model["dtype"]) == (3, 48, "float32")
    assert (model["units"], model["units_from_store"]) == (1, 0)
    for record in model["computed"]:
        for name in ("torch", "transformers", "tokenizers", "numpy", "paramspec"):
            assert record["versions"][name] == importlib.metadata.version(name)
        assert record["hardware"]["cpu"]
    assert [token["token"] for token in model["tokenizer"]["kept"]] == []
    assert run["scoring_version"] >= 1


def test_the_printed_table_is_that_of_the_file(first):
    process, out = first
    pss = pd.read_parquet(out / "pss.parquet")
    g0 = pss.loc[pss["mask"] == "none", "general_accuracy"].mean()
    printed = re.sub(r"\s+", " ", process.stdout)
    for (kind, ratio), rows in pss.groupby(["mask", "ratio"]):
        own, general = rows["concept_accuracy"].mean(), rows["general_accuracy"].mean()
        gap = abs(general - own) / g0
        pattern = (
            rf"{kind} │? ?{ratio:g} │? ?{own:.3f} \[\d\.\d+, \d\.\d+\] │? ?"
            rf"{general:.3f} \[\d\.\d+, \d\.\d+\] │? ?{gap:.3f} \[\d\.\d+, \d\.\d+\]"
        )
        assert re.search(pattern, printed), (kind, ratio, process.stdout)
    assert re.search(r"mask concept: peak PSS pooled \d\.\d+ \[.*\] at ratio 0\.[13]", printed)


def test_a_rerun_is_served_from_the_store_and_ends_with_the_same_files(first, place, pss):
    _, out = first
    again = out.with_name("again")
    options = ["--ratios", "0.1,0.3", "--out", again]
    status, _, error = pss(*options, store=place / "results" / "store")
    assert status == 0, error
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
    pss = pd.read_parquet(tmp_path / "out" / "pss.parquet")
    assert pss["concept"].nunique() == 3
    assert set(pss["tier"]) == {"high", "medium", "low"}
    assert set(pss["n_concept"]) == {5}


# What it refuses


@pytest.fixture
def refused(pss, first, tmp_path):
    """`refused(*options)`: the one line of a refused run, checked for all that it must be."""
    out = shutil.copytree(first[1], tmp_path / "out")
    before = contents(out)

    def refused(*options, **kept):
        given = ("--out", out) if "--out" not in options else ()
        status, printed, error = pss(*given, *options, **kept)
        assert (status, printed) == (2, "")
        assert error.startswith("paramspec: error: ")
        assert error.count("\n") == 1, error
        assert contents(out) == before
        return error.removeprefix("paramspec: error: ").rstrip("\n")

    return refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ratios 0.1,1.5", "ratios[1] 1.5: input should be less than or equal to 1"),
        ("--ratios 10%", "Invalid value for '--ratios': expected a number, as 0.05, not '10%'"),
        ("--scope head", "Invalid value for '--scope': 'head' is not one of 'layer', 'model'"),
        ("--controls -1", "controls -1: "),
        ("--controls two", "Invalid value for '--controls': expected a whole number, as 10, not"),
        ("--general 31", "general 31: only 30 questions on other concepts"),
        ("--seed 1_0", "Invalid value for '--seed': expected a whole number, as 10, not '1_0'"),
        ("--seed 99999999999999999999", "seed 99999999999999999999: "),
        ("--concepts 5", "5 concepts asked for; choose from 1 to 4"),
        ("--concepts 1", "questions on 1 concept(s): at least 2 are needed"),
        ("--device tpu", "device 'tpu': not on this machine; use auto, cpu"),
        ("--color red", "No such option: --color"),
    ],
)
def test_an_option_that_is_none(refused, options, message):
    assert message in refused(*options.split())


def test_no_model_at_all(refused):
    assert "Missing argument 'MODEL...'" in refused(model=[])


# Models


def pickle_weights(path):
    torch.save(toy_model("llama").state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (shutil.rmtree, "no such directory"),
        (pickle_weights, "pickled weights, which can run code, are never read"),
    ],
)
def test_a_model_that_cannot_be_measured(refused, place, tmp_path, break_it, message):
    path = Path(shutil.copytree(place / "toy", tmp_path / "broken"))
    break_it(path)
    told = refused(model=[path])
    assert message in told
    assert str(path) in told


def test_a_second_model_that_is_wrong_stops_the_run_before_the_first(refused, place, tmp_path):
    toy = str(place / "toy")
    assert "given twice" in refused(model=[toy, toy])
    assert "model 'smollm3-135m': not in" in refused(model=[toy, "smollm3-135m"])
    assert not list((tmp_path / "store").iterdir())


# Questions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.clear(), "mine.jsonl: empty; write one question, a JSON object, a line"),
        (lambda rows: rows[4].update(answer=4), "mine.jsonl:5: answer 4, but 4 options (0-3)"),
        (lambda rows: rows.__delitem__(slice(10, 40)), "questions on 1 concept(s)"),
        (
            lambda rows: [row.update(fold=0) for row in rows[:10]],
            "'alpha' has questions of fold 0 alone; both folds are needed",
        ),
    ],
)
def test_a_question_file_that_is_wrong(refused, tmp_path, change, message):
    rows = [question.model_dump(mode="json") for question in toy_questions(4)]
    change(rows)
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert message in refused("--questions", str(file))


# Directories


@pytest.mark.parametrize("option", ["--out", "--store"])
def test_a_directory_that_cannot_be_written(refused, tmp_path, option):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "results", tmp_path / "file"):
        told = refused(option, str(path), store=None)
        assert told.startswith(f"{path}: cannot write (")
        assert told.endswith("choose a directory that you may write to")
    with read_only(tmp_path / "disk") as disk:
        told = refused(option, str(disk / "results"), store=None)
        assert "cannot write (Read-only file system)" in told
    with small_disk(tmp_path / "full", "64k") as disk:
        (disk / "ballast").write_bytes(b"\0" * 64 * 1024)
        told = refused(option, str(disk), store=None)
        assert told.startswith(f"{disk}: cannot write (No space left on device); free some space")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_question_that_no_model_position_is_left_for(pss, tmp_path, family):
    """Told when the model is there: progress is on the screen, and the error is the last line."""
    questions = toy_questions(4)
    questions[4] = questions[4].model_copy(update={"cloze": "old " * 70 + "age"})
    file = save_questions(tmp_path / "mine.jsonl", questions)
    model = [str(save_toy(tmp_path / "toy", family))]
    status, _, error = pss("--questions", file, "--out", tmp_path / "out", model=model)
    assert status == 2
    last = error.rstrip("\n").split("\n")[-1]
    assert re.fullmatch(
        rf"paramspec: error: {model[0]}: [\w /-]+ of 7\d tokens does not fit the model's context "
        r"of 64 tokens; shorten its cloze or its options",
        last,
    )


def test_a_model_whose_outputs_are_no_numbers(pss, tmp_path):
    path = save_toy(tmp_path / "toy")
    model = toy_model("llama")
    model.lm_head.weight[5] = torch.nan
    model.save_pretrained(path)
    out = tmp_path / "out"
    status, _, error = pss("--out", out, model=[path])
    assert status == 2
    last = error.rstrip("\n").split("\n")[-1]
    told = (
        rf"paramspec: error: {path}: alpha/\w+: a log-likelihood of LlamaForCausalLM is not a fin"
    )
    assert re.match(told, last)
    assert list(out.iterdir()) == []


def test_a_disk_that_fills_up_during_the_run(pss, first, tmp_path):
    """Progress is on the screen by then: the error is the last line."""
    with small_disk(tmp_path / "disk", "400k") as disk:
        out = shutil.copytree(first[1], disk / "out")
        before = contents(out)
        (disk / "ballast").write_bytes(b"\0" * (shutil.disk_usage(disk).free - 16 * 1024))
        status, _, error = pss("--out", out, "--ratios", "0.2")
        assert status == 2
        last = error.rstrip("\n").split("\n")[-1]
        assert re.fullmatch(rf"paramspec: error: {out}.*: cannot write \(.*No space left.*", last)
        assert contents(out) == before


def test_a_warning_is_one_line(place, tmp_path):
    """A damaged result is set aside: told as an error is, without a line of code."""
    options = ("--ratios", "0.1", "--out", f"{tmp_path}/out", "--store", f"{tmp_path}/store")
    assert pss_process(place, *options).returncode == 0
    (unit,) = (tmp_path / "store").glob("v*/*/*/pss.parquet")
    unit.write_bytes(b"")
    told = pss_process(place, *options).stderr
    (line,) = [line for line in told.splitlines() if "set aside" in line]
    assert line.startswith(
        f"paramspec: warning: {unit.parent}: pss.parquet is damaged; set aside as"
    )
    assert "warnings.warn" not in told
