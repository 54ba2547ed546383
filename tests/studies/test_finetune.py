"""Fine-tuning of chosen value vectors: nothing else moves, and what moves is what should.

The oracles are independent: masked gradients on whole weights, plain transformers to read what was
written, and processes really killed.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from paramspec.errors import InputError
from paramspec.method.hooks import value_vector_view
from paramspec.models.load import load_model
from paramspec.studies import finetune as tuning
from paramspec.studies.finetune import batches_of, finetune, refuse_divergence, tune
from paramspec.studies.training import METHODS, Training, training_texts
from toy_study import save_questions, save_toy, toy_questions, toy_tokenizer
from toys import DOWN, same_weights, toy_model, value_vectors, weights_of

LAYERS, WIDTH, HIDDEN = 3, 48, 32
QUESTIONS = toy_questions()


def choices(**changed):
    """25 steps on 40 statements."""
    given = {"method": "FT-PV", "concepts": ("alpha", "beta"), "statements": 2, "epochs": 5}
    return Training.parse(**given | {"batch": 8, "learning_rate": 0.01} | changed)


def tuned(model, training):
    return tune(value_vector_view(model), toy_tokenizer(), QUESTIONS, training)


def logits(model):
    tokens = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", DOWN)
def test_all_but_the_chosen_vectors_keep_their_bits(family, method):
    """Tied embeddings too, which all families but llama have here."""
    model = toy_model(family)
    before = weights_of(model)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (family != "llama")
    old = [own.clone() for own in value_vectors(model, family)]
    with tuned(model, choices(method=method, epochs=1)) as (vectors, trained, _):
        trained.merge()
    new = value_vectors(model, family)
    moved = torch.stack([(one != other).any(1) for one, other in zip(old, new, strict=True)])
    chosen = torch.zeros(LAYERS, WIDTH, dtype=torch.bool)
    chosen[tuple(vectors.long().T)] = True
    assert not (moved & ~chosen).any()
    # ReLU may hold some vectors of OPT at a coefficient of 0, where there is no gradient.
    assert moved.sum() >= len(vectors) * (0.9 if family == "opt" else 1)
    down = [f"{DOWN[family].format(layer)}.weight" for layer in range(LAYERS)]
    same_weights(before, weights_of(model), but=down)


def by_masked_gradients(model, family, training, vectors):
    """The usual way: whole weights, gradients masked, transformers' loss; the schedule anew."""
    rows = [[*toy_tokenizer().encode(text), 2] for text in training_texts(QUESTIONS, training)]
    masks = torch.zeros(LAYERS, WIDTH, 1)
    masks[tuple(vectors.long().T)] = 1
    parameters = [model.get_submodule(DOWN[family].format(n)).weight for n in range(LAYERS)]
    for weight in parameters:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0)
    steps = training.epochs * math.ceil(len(rows) / training.batch)
    warm_up, losses = steps // 10, []
    for done, indices in enumerate(batches_of([len(row) for row in rows], training), 1):
        part = [torch.tensor(rows[index]) for index in indices]
        labels = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=-100)
        given = {"input_ids": labels.clamp(min=0), "attention_mask": (labels >= 0).long()}
        loss = model(**given, labels=labels, use_cache=False).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for own, mask in zip(value_vectors(model, family, gradients=True), masks, strict=True):
            own *= mask
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        part_done = (done - warm_up) / (steps - warm_up + 1)
        share = done / warm_up if done <= warm_up else (1 + math.cos(math.pi * part_done)) / 2
        optimizer.param_groups[0]["lr"] = training.learning_rate * share
        optimizer.step()
    return losses


@pytest.mark.parametrize("method", ["FT-PV", "FT-CV"])
@pytest.mark.parametrize("family", DOWN)
def test_training_columns_is_training_whole_weights_with_masked_gradients(family, method):
    """To 1e-5, of moves of 0.05. A whole weight of about 0.5 is rounded by up to 3e-8 in each of 25
    steps; AdamW then carries a gradient's relative error of 1e-6 into a step of 0.01. Hence about
    1e-6; a component whose gradient is next to nothing may be ten times as far off.
    """
    model, plain, training = toy_model(family), toy_model(family), choices(method=method)
    before = [own.clone() for own in value_vectors(model, family)]
    with tuned(model, training) as (vectors, trained, facts):
        # The optimizer knows of the chosen vectors alone.
        assert sum(offset.numel() for offset in trained.offsets.values()) == len(vectors) * HIDDEN
        trained.merge()
    losses = by_masked_gradients(plain, family, training, vectors)
    assert len(losses) == 25
    assert facts["losses"] == pytest.approx(losses, abs=1e-5)
    found, expected = (torch.stack(value_vectors(one, family)).detach() for one in (model, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for layer, moves in enumerate((expected - torch.stack(before)).abs()):
        chosen = vectors[vectors[:, 0] == layer, 1].long()
        assert moves[chosen].median() > 0.01  # a thousand times the tolerance


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_weights_move_by_fp32_offsets_rounded_once(family):
    model = toy_model(family, dtype=torch.bfloat16)
    before = [own.clone() for own in value_vectors(model, family)]
    with tuned(model, choices()) as (_, trained, _):
        assert {offset.dtype for offset in trained.offsets.values()} == {torch.float32}
        offsets = torch.zeros(LAYERS, WIDTH, HIDDEN, dtype=torch.float64)
        for layer, chosen in trained.chosen.items():
            offsets[layer, chosen] = trained.offsets[str(layer)].detach().double()
        trained.merge()
    for old, new, offset in zip(before, value_vectors(model, family), offsets, strict=True):
        assert new.dtype == torch.bfloat16
        still = (offset == 0).all(1)
        assert torch.equal(old[still], new[still])
        exact = old.double() + offset
        # Of 8 significant bits, neighbours stand 2^-7 of the power of two apart.
        apart = torch.exp2(exact.abs().log2().floor() - 7)
        assert ((new.double() - exact).abs() <= apart / 2 * (1 + 1e-4)).all()


def test_an_epoch_holds_every_text_once_and_a_seed_orders_it():
    lengths = [5 + place % 7 for place in range(30)]
    first, other = choices(epochs=2), choices(epochs=2, seed=1)
    order = list(batches_of(lengths, first))
    assert len(order) == 8
    for epoch in (order[:4], order[4:]):
        assert sorted(index for part in epoch for index in part) == list(range(30))
        assert sorted(map(len, epoch)) == [6, 8, 8, 8]
    assert order[:4] != order[4:]
    assert order == list(batches_of(lengths, first))
    assert order != list(batches_of(lengths, other))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_directory_is_plain_transformers(family, tmp_path):
    """transformers reads what was trained; the record is that of the training."""
    out, toy = tmp_path / "out", load_model(str(save_toy(tmp_path / "base", family)))
    base, before = toy.digest, logits(toy.model)
    record = finetune(toy, QUESTIONS, choices(), out)
    expected = logits(toy.model)
    assert not torch.allclose(before, expected, atol=1e-2)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(plain), expected)
    text = QUESTIONS[0].statements[0]
    assert AutoTokenizer.from_pretrained(out).encode(text) == toy_tokenizer().encode(text)
    ours = load_model(str(out))
    assert torch.equal(logits(ours.model), expected)
    assert ours.digest != base
    assert not list(out.glob("unfinished-*"))
    assert json.loads((out / "finetune.json").read_text()) == record
    assert record["run"].items() >= (choices().model_dump(mode="json") | {"digest": base}).items()
    assert (record["steps"], len(record["losses"]), record["vectors"]) == (25, 25, 3 * 6)
    assert record["losses"][-1] < record["losses"][0]
    assert record["optimizer_bytes"] == 8 * record["parameters"] == 8 * 3 * 6 * HIDDEN
    assert (record["computed"]["digest"], record["computed"]["device"]) == (base, "cpu")


LONG = {"statements": 2, "batch": 8, "epochs": 30}  # 150 steps
WORDS = ["--statements", "2", "--batch", "8", "--epochs", "30", "--save-every", "7"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model directory, question files, and `whole`: a run that nothing stopped."""
    place = tmp_path_factory.mktemp("finetune")
    save_toy(place / "toy")
    save_questions(place / "questions.jsonl", QUESTIONS)
    long = QUESTIONS[0].model_copy(update={"statements": ("ash " * 64,)})
    save_questions(place / "long.jsonl", [long, *QUESTIONS[1:]])
    run(place, place / "whole")
    return place


def run(place, out):
    training = Training(method="FT-PV", concepts=("alpha", "beta"), **LONG)
    return finetune(str(place / "toy"), QUESTIONS, training, out, save_every=7)


def words(place, out, *options):
    """The command; an option that is given again takes the place of the first."""
    return [
        *("finetune", str(place / "toy"), "--method", "FT-PV", "--out", str(out)),
        *("--concept", "alpha", "--concept", "beta"),
        *("--questions", str(place / "questions.jsonl"), *options),
    ]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*")}


# The command, in a process that SIGKILL ends as soon as a state is written.
KILLED = """
import os, signal
from paramspec.cli import main
from paramspec.studies import finetune

def write_and_die(*given):
    write(*given)
    os.kill(os.getpid(), signal.SIGKILL)

write, finetune._write_state = finetune._write_state, write_and_die
main()
"""


@pytest.fixture(scope="module")
def killed(place):
    """What SIGKILL left of the same run, a state with it."""
    argv = [sys.executable, "-c", KILLED, *words(place, place / "killed", *WORDS)]
    ended = subprocess.run(argv, cwd=place, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return place / "killed"


@pytest.fixture
def out(killed, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(killed, tmp_path / "out"))


def state_of(out):
    (state,) = out.glob("unfinished-*")
    return state


@pytest.mark.parametrize("moment", ["as it began", "in a state", "in the save"])
def test_a_killed_run_continues_to_the_same_bytes(place, out, monkeypatch, moment):
    """Of the record, all but the seconds and who computed it."""
    with safe_open(state_of(out), "pt") as state:
        assert len(json.loads(state.metadata()["losses"])) == 7
    if moment == "as it began":
        state_of(out).rename(out / ".partial-1-unfinished")
    elif moment == "in a state":
        (out / ".partial-1-unfinished").write_bytes(state_of(out).read_bytes()[:999])
    else:
        (out / "config.json").write_text("{")
        (out / "model.safetensors").write_bytes(b"\0" * 1000)
    taken, loss = [], tuning.language_modelling_loss
    monkeypatch.setattr(
        tuning, "language_modelling_loss", lambda *given: taken.append(1) or loss(*given)
    )
    run(place, out)
    # One loss a step that was left, and one at the end.
    assert len(taken) == 151 - (0 if moment == "as it began" else 7)
    ours, theirs = contents(out), contents(place / "whole")
    records = [json.loads(files.pop("finetune.json")) for files in (ours, theirs)]
    assert ours == theirs
    measured = [(record.pop("seconds"), record.pop("computed")) for record in records]
    assert all(map(all, measured))
    assert records[0] == records[1]


def test_a_finished_run_is_found_and_not_trained_again(place, killed, tmp_path, monkeypatch):
    out = Path(shutil.copytree(place / "whole", tmp_path / "out"))
    shutil.copy(state_of(killed), out)  # killed just after the record was written
    monkeypatch.setattr(tuning, "tune", None)
    assert run(place, out)["steps"] == 150
    assert contents(out) == contents(place / "whole")


def test_the_command_reports_what_it_trained(place, out, command):
    status, told, progress = command(*words(place, out, *WORDS))
    assert status == 0
    assert "18 value vectors trained in 150 steps" in told
    assert "150/150" in progress


@pytest.fixture
def refuse(place, refused):
    """`error = refuse(out, "--seed", "-1")`: of a call that leaves what there is as it is."""

    def call(out, *options):
        before = contents(out)
        error = refused(*words(place, out, *options))
        assert contents(out) == before
        return error

    return call


def test_a_damaged_state_is_refused(out, refuse):
    file = state_of(out)
    for damaged in (file.read_bytes()[:-100], b"\x02" + bytes(7) + b"{}"):
        file.write_bytes(damaged)
        assert f"{file.name}: not a readable state" in refuse(out, *WORDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--concept nowhere", "concept 'nowhere': no statements"),
        ("--layers 1-3", "layer 3: the model has layers 0 to 2"),
        ("--layers 2-1", "Invalid value for '--layers'"),
        ("--share 0.001", "share 0.001: leaves no vector for FT-PV"),
        ("--share 1 --method FT-CV", "share 1.0: leaves no vector for FT-CV"),
        ("--share 0.8 --rule magnitude", "share 0.8: rule 'magnitude'"),
        ("--rule other --concept gamma --concept delta --concept zeta", "rule 'other': needs .* 3"),
        ("--learning-rate 1e38", r"learning_rate 1e\+38: "),
        ("--save-every 0", "save_every 0: "),
        ("--questions {}/long.jsonl", "65 tokens does not fit the model's context of 64"),
    ],
)
def test_an_option_that_is_none(place, tmp_path, refuse, options, message):
    assert re.search(message, refuse(tmp_path / "out", *options.format(place).split()))


def test_a_directory_that_holds_something_else(place, killed, tmp_path, refuse):
    """Another run's, finished or not; no run's; the base itself, not to be written over."""
    whole = place / "whole"
    for other in ("--share 0.25", "--method FT-RV", f"--questions {place}/long.jsonl"):
        assert f"{whole}: holds finetune.json" in refuse(whole, *WORDS, *other.split())
    record = json.loads((whole / "finetune.json").read_text())
    record["run"]["torch"] = "1.0.0"  # its vectors are those of another torch
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    for text in (json.dumps(record), "", "[]", '{"run": 3}'):
        (out / "finetune.json").write_text(text)
        assert f"{out}: holds finetune.json" in refuse(out, *WORDS)
    told = refuse(killed, *WORDS, "--method", "FT-RV")
    assert f"{killed}: holds {state_of(killed).name}" in told
    assert "holds chat_template.jinja" in refuse(place / "toy")


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([4.0, 3.0, math.nan], "nan after 2"),
        ([math.nan], "nan after 0"),
        ([4.0, math.inf], "inf after 1"),
        ([4.0, 20.1], "20.1 after 1"),  # above twice a uniform guess
        ([15.0, 30.1], "30.1 after 1"),  # above twice the first
        ([4.0, *[1.0] * 8, 9.95], "9.95 after 9"),  # ends as a guess
        ([4.0, 19.9], None),
        ([15.0, 29.9], None),
        ([4.0, *[10.0] * 8, 9.85], None),  # passes through a guess
        ([10.0, *[9.95] * 9], None),  # a guess at first
    ],
)
def test_what_counts_as_diverged(losses, told):
    """A uniform guess has a loss of 10. Norms divide huge values away: it may be all that is left,
    but runs that learn may pass through it."""
    raises = pytest.raises(InputError, match=f"the loss is {told} of 9 steps; .* than 0.5")
    with raises if told else nullcontext():
        refuse_divergence(losses, 9, 10.0, 0.5)


def test_a_rate_that_diverges_is_one_line_and_no_model(place, tmp_path, command):
    """Called again, it continues from its last state, to the same line."""
    out, options = tmp_path / "out", [*WORDS[:-1], "1", "--learning-rate", "1e37"]
    ends = [command(*words(place, out, *options)) for _ in range(2)]
    lines = [re.split(r"[\r\n]+", error.strip())[-1] for _, _, error in ends]
    assert [status for status, _, _ in ends] == [2, 2]
    assert lines[0] == lines[1]
    assert re.match(r"paramspec: error: training diverged: the loss is nan after \d+ of", lines[0])
    assert set(contents(out)) <= {state_of(out).name}


def test_it_may_diverge_in_the_last_step():
    """Then no loss of a step shows it, and one after the last does."""
    training = choices(epochs=1, batch=40, learning_rate=1e20)
    with pytest.raises(InputError, match="the loss is nan after 1 of 1 steps"):
        tuned(toy_model("gpt2"), training).__enter__()
