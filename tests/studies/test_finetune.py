"""Fine-tuning of chosen value vectors: nothing else moves, and what moves is what should.

The oracles are independent: masked gradients on whole weights, coefficients recorded and gradients
taken one text at a time, plain transformers to read what was written, and processes really killed.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from paramspec.errors import InputError
from paramspec.method.hooks import (
    mask_value_vectors,
    replace_value_vectors,
    train_value_vectors,
    value_vector_view,
)
from paramspec.models.load import load_model
from paramspec.specwiki import load_questions
from paramspec.studies import finetune as tuning
from paramspec.studies.finetune import batches_of, finetune, refuse_divergence, train
from paramspec.studies.training import (
    METHODS,
    Rule,
    Training,
    choose_vectors,
    encode_texts,
    gradient_norms,
    language_modelling_loss,
    other_concepts,
    training_texts,
)
from toy_study import (
    CONCEPTS,
    loaded,
    save_questions,
    save_toy,
    toy_loaded,
    toy_questions,
    toy_tokenizer,
)
from toys import toy_model

LAYERS, WIDTH, HIDDEN = 3, 48, 32
# A plain Linear, GPT-2's Conv1D, OPT's flattened inputs; in the last three the embeddings are tied.
DOWN = {
    "llama": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "opt": "model.decoder.layers.{}.fc2",
    "gemma": "model.layers.{}.mlp.down_proj",
}


def stated_questions(concepts: int = 8) -> list:
    """The toy questions, with four statements each that hold no cloze."""
    questions = []
    for question in toy_questions(concepts):
        name, what, answer = question.concept, question.relation, question.options[question.answer]
        statements = (
            f"{name} the {what} {answer}",
            f"{answer} {what} of old {name}",
            f"new {what} {answer} {name}",
            f"old {answer} the {what} new {name}",
        )
        questions.append(question.model_copy(update={"statements": statements}))
    return questions


QUESTIONS = stated_questions()


def choices(**changed):
    """25 steps on 40 statements."""
    given = {"method": "FT-PV", "concepts": ("alpha", "beta"), "statements": 2, "epochs": 5}
    return Training.parse(**given | {"batch": 8, "learning_rate": 0.01} | changed)


def prepare(family, **changed):
    """(toy, view, training, rows, vectors): all that `train` needs."""
    toy, training = toy_loaded(family), choices(**changed)
    view = value_vector_view(toy.model)
    texts = training_texts(QUESTIONS, training.concepts, training.statements)
    rows = encode_texts(view, toy.tokenizer, texts)
    return toy, view, training, rows, choose_vectors(view, toy.tokenizer, QUESTIONS, training)


def weights(model):
    """Copies of every parameter and buffer, also of those that no state_dict holds."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def columns(weight, family):
    """Value vectors as rows `[width, hidden]`, by the family alone."""
    return weight if family == "gpt2" else weight.T


def in_layers(vectors):
    """The chosen vectors of each layer, as sets."""
    found = defaultdict(set)
    for layer, vector in vectors.tolist():
        found[layer].add(vector)
    return dict(found)


def logits(model, rows=3, seed=1):
    tokens = torch.randint(3, 97, (rows, 7), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
        ).logits


def same_bits(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


# What moves


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", DOWN)
def test_all_but_the_chosen_vectors_keep_their_bits(family, method):
    toy, view, training, rows, vectors = prepare(family, method=method, epochs=1)
    before = weights(toy.model)
    if family != "llama":
        assert toy.model.get_input_embeddings().weight is toy.model.get_output_embeddings().weight
    with train_value_vectors(view, vectors) as trained:
        train(view, trained, rows, training)
        trained.merge()
    after, chosen = weights(toy.model), in_layers(vectors)
    moved = torch.zeros(LAYERS, WIDTH, dtype=torch.bool)
    for layer in range(LAYERS):
        name = DOWN[family].format(layer) + ".weight"
        old, new = columns(before.pop(name), family), columns(after.pop(name), family)
        moved[layer] = (old != new).any(1)
        assert set(moved[layer].nonzero()[:, 0].tolist()) <= chosen.get(layer, set())
    same_bits(before, after)
    # ReLU may hold some vectors of OPT at a coefficient of 0, where there is no gradient.
    assert moved.sum() >= len(vectors) * (0.9 if family == "opt" else 1)


def by_masked_gradients(model, family, rows, training, vectors):
    """The usual way: whole weights, gradients masked; loss, clipping and schedule written anew."""
    model = copy.deepcopy(model)
    parameters, masks = [], []
    for layer in range(LAYERS):
        weight = model.get_submodule(DOWN[family].format(layer)).weight.requires_grad_(True)
        mask = torch.zeros(WIDTH, HIDDEN)
        for vector in in_layers(vectors).get(layer, ()):
            mask[vector] = 1
        parameters.append(weight)
        masks.append(columns(mask, family))
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0)
    steps = training.epochs * math.ceil(len(rows) / training.batch)
    warm_up = steps // 10
    done, losses = 0, []
    for indices in batches_of([len(row) for row in rows], training):
        done += 1
        part = [torch.tensor(rows[index]) for index in indices]
        tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        seen = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in part], True)
        output = model(input_ids=tokens, attention_mask=seen.long(), use_cache=False).logits
        each = output[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        loss = -(each * seen[:, 1:]).sum() / seen[:, 1:].sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for weight, mask in zip(parameters, masks, strict=True):
            weight.grad *= mask
        norm = math.sqrt(sum(float(weight.grad.double().square().sum()) for weight in parameters))
        for weight in parameters:
            weight.grad *= min(1.0, 1 / (norm + 1e-6))
        rate = training.learning_rate
        if done <= warm_up:
            rate *= done / warm_up
        else:
            rate *= (1 + math.cos(math.pi * (done - warm_up) / (steps - warm_up + 1))) / 2
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    assert done == steps
    return [columns(weight.detach(), family) for weight in parameters], losses


@pytest.mark.parametrize("method", ["FT-PV", "FT-CV"])
@pytest.mark.parametrize("family", DOWN)
def test_training_columns_is_training_whole_weights_with_masked_gradients(
    family, method, monkeypatch
):
    """To 1e-5, of moves of 0.05. A whole weight of about 0.5 is rounded by up to 3e-8 in each of 25
    steps; AdamW then carries a gradient's relative error of 1e-6 into a step of 0.01. Hence about
    1e-6; a component whose gradient is next to nothing may be ten times as far off.
    """
    made = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *args, **kw: made.append(adamw(*args, **kw)) or made[-1]
    )
    _, view, training, rows, vectors = prepare(family, method=method)
    before = [view.vectors(layer).clone() for layer in range(LAYERS)]
    with train_value_vectors(view, vectors) as trained:
        losses = train(view, trained, rows, training)
        (optimizer,) = made
        trained.merge()
    fresh = toy_loaded(family).model
    expected, expected_losses = by_masked_gradients(fresh, family, rows, training, vectors)
    assert len(losses) == 25
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    for layer in range(LAYERS):
        torch.testing.assert_close(view.vectors(layer), expected[layer], rtol=0, atol=1e-5)
        chosen = sorted(in_layers(vectors)[layer])
        moves = (expected[layer] - before[layer])[chosen].abs()
        assert moves.median() > 0.01  # a thousand times the tolerance
    # And the optimizer knows of the chosen vectors alone.
    numbers = sum(
        moment.numel()
        for moments in optimizer.state.values()
        for name, moment in moments.items()
        if name != "step"
    )
    assert numbers == 2 * len(vectors) * HIDDEN
    held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    assert sum(tensor.numel() for tensor in held) == len(vectors) * HIDDEN


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


# Which are chosen


def choose(view, **changed):
    return choose_vectors(view, toy_tokenizer(), QUESTIONS, choices(**changed))


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def view(family):
    return value_vector_view(toy_model(family))


@pytest.mark.parametrize("rule", ["coefficient", "score", "gradient", "magnitude", "other"])
def test_budgets_of_the_four_methods(view, rule):
    everything = {layer: set(range(WIDTH)) for layer in range(LAYERS)}
    chosen = {method: choose(view, method=method, rule=rule) for method in METHODS}
    for vectors in chosen.values():
        assert vectors.dtype == torch.int32
        assert vectors.tolist() == sorted(map(list, {tuple(row) for row in vectors.tolist()}))
    full, own, rest, chance = (in_layers(chosen[method]) for method in METHODS)
    assert full == everything
    for layer in range(LAYERS):
        assert len(own[layer]) == len(chance[layer]) == WIDTH // 8
        assert own[layer] | rest[layer] == everything[layer]
        assert not own[layer] & rest[layer]
    assert own != chance
    same = {method: choose(view, method=method, rule=rule, layers=(0, 2)) for method in METHODS}
    for method, vectors in same.items():
        assert in_layers(vectors) == {
            layer: of for layer, of in in_layers(chosen[method]).items() if layer != 1
        }


def test_a_share_of_1_makes_fv_of_pv(view):
    full = choose(view, method="FT-FV")
    for method in ("FT-PV", "FT-RV"):
        assert torch.equal(choose(view, method=method, share=1.0), full)


def test_a_seed_changes_random_vectors_and_not_those_of_the_concepts(view):
    for rule in ("coefficient", "gradient"):
        first, second = (choose(view, rule=rule, seed=seed) for seed in (0, 1))
        assert torch.equal(first, second)
    draws = {str(choose(view, method="FT-RV", seed=seed).tolist()) for seed in range(5)}
    assert len(draws) == 5
    again = [choose(view, method="FT-RV", seed=3) for _ in range(2)]
    assert torch.equal(*again)


def coefficients_one_at_a_time(model, family, texts):
    """Mean absolute inputs of the down projections, a text by itself, no padding: `[3, 48]`."""
    tokenizer, total = toy_tokenizer(), torch.zeros(LAYERS, WIDTH, dtype=torch.float64)
    for text in texts:
        hooks = []
        for layer in range(LAYERS):

            def add(_, args, layer=layer):
                total[layer] += args[0].reshape(-1, WIDTH).double().abs().mean(0)

            module = model.get_submodule(DOWN[family].format(layer))
            hooks.append(module.register_forward_pre_hook(add))
        with torch.no_grad():
            model(input_ids=torch.tensor([tokenizer.encode(text)]))
        for hook in hooks:
            hook.remove()
    return total / len(texts)


def highest(values, count=WIDTH // 8):
    return {
        layer: set(sorted(range(WIDTH), key=lambda place: -row[place])[:count])
        for layer, row in enumerate(values.tolist())
    }


def statements_of(concepts, count=2):
    return [
        text
        for question in QUESTIONS
        if question.concept in concepts
        for text in question.statements[:count]
    ]


def test_each_rule_against_brute_force(view, family):
    training = choices()
    own = coefficients_one_at_a_time(view.model, family, statements_of(training.concepts))
    names = other_concepts(QUESTIONS, training)
    others = coefficients_one_at_a_time(view.model, family, statements_of(names))
    chosen = {rule: in_layers(choose(view, rule=rule)) for rule in get_args(Rule)}
    assert chosen["coefficient"] == highest(own)
    assert chosen["score"] == highest(own - others)
    assert chosen["other"] == highest(others)
    # Gradients of whole weights, a text at a time, of the mean over all tokens.
    model = copy.deepcopy(view.model)
    down = [model.get_submodule(DOWN[family].format(layer)).weight for layer in range(LAYERS)]
    rows = encode_texts(view, toy_tokenizer(), statements_of(training.concepts))
    for weight in down:
        weight.requires_grad_(True)
    for row in rows:
        tokens = torch.tensor([row])
        output = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        (-output.gather(1, tokens[0, 1:, None]).sum()).backward()
    count = sum(len(row) - 1 for row in rows)
    norms = torch.stack([columns(weight.grad, family).norm(dim=1) / count for weight in down])
    assert chosen["gradient"] == highest(norms)
    texts = statements_of(training.concepts)
    torch.testing.assert_close(
        gradient_norms(view, toy_tokenizer(), texts), norms, rtol=1e-3, atol=1e-6
    )
    # The nearest that is free, in an order drawn by the seed.
    draw = torch.Generator().manual_seed(training.seed)
    values = own.float()
    for layer in range(LAYERS):
        wanted = sorted(chosen["coefficient"][layer])
        free = set(range(WIDTH)) - set(wanted)
        expected = set()
        for place in torch.randperm(len(wanted), generator=draw).tolist():
            target = values[layer, wanted[place]]
            nearest = min(free - expected, key=lambda other: abs(values[layer, other] - target))
            expected.add(nearest)
        assert chosen["magnitude"][layer] == expected
        assert not expected & chosen["coefficient"][layer]
    assert len({str(rule) for rule in chosen.values()}) == len(chosen)


def test_other_concepts_are_not_trained_on_and_of_the_same_domains():
    """Toy concepts alternate between two domains, four of each."""
    domains = {question.concept: question.domain for question in QUESTIONS}
    drawn = set()
    for seed in range(12):
        training = choices(concepts=("alpha", "gamma", "beta"), seed=seed)
        names = other_concepts(QUESTIONS, training)
        assert len(set(names)) == 3
        assert not set(names) & set(training.concepts)
        # Two of alpha's and gamma's domain are left, one of them for each.
        assert [domains[name] for name in names] == ["greek", "greek", "letter"]
        drawn.add(tuple(names))
    assert len(drawn) > 3
    # Where a domain has none left, any will do.
    names = other_concepts(QUESTIONS, choices(concepts=("alpha", "gamma", "zeta")))
    assert sorted(domains[name] for name in names) == ["greek", "letter", "letter"]
    with pytest.raises(InputError, match="rule 'other': 3 concepts apart from those trained on, 5"):
        other_concepts(QUESTIONS, choices(concepts=CONCEPTS[:5], rule="other"))


# What is trained on


def in_words(text):
    return " " + " ".join(re.findall(r"\w+", text.casefold())) + " "


def test_no_text_holds_the_cloze_of_an_evaluation():
    """All of SpecWiki: no statement of any concept holds the cloze of any, word by word."""
    questions = load_questions()
    clozes = defaultdict(list)
    for question in questions:
        words = in_words(question.cloze)
        clozes[" ".join(words.split()[:3])].append(words)
    texts = set()
    for concept in {question.concept for question in questions}:
        own = [question for question in questions if question.concept == concept]
        texts |= set(training_texts(own, [concept], 5))
    for text in texts:
        words = in_words(text)
        each = words.split()
        for place in range(len(each)):
            for cloze in clozes.get(" ".join(each[place : place + 3]), ()):
                assert cloze not in words, text
    assert len(texts) >= 4 * 525 * 9
    # And of many concepts at once, as they are trained.
    concepts = [question.concept for question in questions[::400]]
    assert set(training_texts(questions, concepts, 4)) <= texts


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("alpha", "one says the AGE  of alpha bee"),  # its own cloze, in other case and spacing
        ("beta", "the age of alpha bee"),  # another trained concept's
        ("alpha", "who asks: what age has alpha? bee"),  # its own question
    ],
)
def test_a_statement_that_holds_a_wording_is_refused(where, text):
    changed = list(QUESTIONS)
    for place, question in enumerate(changed):
        if question.id == "alpha/age":
            question = question.model_copy(update={"question": "what age has alpha?"})
        if question.id == f"{where}/king":
            question = question.model_copy(update={"statements": (text,)})
        changed[place] = question
    with pytest.raises(InputError, match=r"concept 'alpha': .*wording of question 'alpha/age'"):
        training_texts(changed, ["alpha", "beta"], 4)
    # Statements that are not trained on may say what they like.
    assert training_texts(changed, ["gamma"], 4)


def test_texts_are_the_first_statements_of_each_fact_once():
    for count in (1, 2, 4, 9):
        expected = statements_of(("alpha", "gamma"), count)
        assert training_texts(QUESTIONS, ["alpha", "gamma"], count) == expected
    twice = [q.model_copy(update={"statements": ("the same words",)}) for q in QUESTIONS]
    assert training_texts(twice, ["alpha", "beta"], 4) == ["the same words"]


def test_the_loss_is_that_of_each_text_alone():
    toy, view, _, rows, _ = prepare("llama")
    part = [rows[0], rows[5][:3], rows[9]]
    total = 0.0
    for row in part:
        output = logits_of(toy.model, row)
        total -= sum(float(output[place, row[place + 1]]) for place in range(len(row) - 1))
    expected = total / sum(len(row) - 1 for row in part)
    with torch.no_grad():
        assert float(language_modelling_loss(view.model, part)) == pytest.approx(expected, abs=1e-5)
    assert all(row[-1] == toy.tokenizer.eos_token_id for row in rows)
    # The end is this one alone, where the tokenizer itself ends texts, too.
    assert encode_texts(view, toy_tokenizer("$A </s>"), statements_of(("alpha",)))[0] == rows[0]
    # A tokenizer without an end token ends no text.
    toy.tokenizer.eos_token = None
    assert encode_texts(view, toy.tokenizer, statements_of(("alpha",)))[0] == rows[0][:-1]
    with pytest.raises(InputError, match=r"statement 'bee': no token to predict"):
        encode_texts(view, toy.tokenizer, ["bee"])


@torch.no_grad()
def logits_of(model, row):
    return model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)


# What is written


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_directory_is_plain_transformers(family, tmp_path):
    toy = load_model(str(save_toy(tmp_path / "base", family)))
    base, before = toy.digest, logits(toy.model)
    record = finetune(toy, QUESTIONS, choices(), tmp_path / "out")
    expected = logits(toy.model)
    assert not torch.allclose(before, expected, atol=1e-2)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain) is type(toy.model)
    assert torch.equal(logits(plain), expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = QUESTIONS[0].statements[0]
    assert tokenizer.encode(text) == toy_tokenizer().encode(text)
    ours = load_model(str(tmp_path / "out"))
    assert torch.equal(logits(ours.model), expected)
    assert ours.digest != base
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "finetune.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    check_record(tmp_path / "out", record, base)


def check_record(out, record, base):
    assert json.loads((out / "finetune.json").read_text()) == record
    assert record["run"]["digest"] == base
    training = choices().model_dump(mode="json")
    assert {name: record["run"][name] for name in training} == training
    assert (record["steps"], len(record["losses"])) == (25, 25)
    assert record["losses"][-1] < record["losses"][0]
    assert record["vectors"] == 3 * 6
    assert record["parameters"] == 3 * 6 * HIDDEN
    assert record["optimizer_bytes"] == 8 * record["parameters"]
    assert record["seconds"] > 0
    computed = record["computed"]
    assert computed["versions"]["torch"] == importlib.metadata.version("torch")
    assert (computed["digest"], computed["device"]) == (base, "cpu")


# Killed

LONG = {"statements": 2, "batch": 8, "epochs": 30}  # 150 steps
WORDS = [*("--statements", "2", "--batch", "8", "--epochs", "30"), "--save-every", "7"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model directory, a question file, and `whole`: a run that nothing stopped."""
    place = tmp_path_factory.mktemp("finetune")
    save_toy(place / "toy")
    save_questions(place / "questions.jsonl", QUESTIONS)
    run(place, place / "whole")
    return place


def run(place, out):
    training = Training(method="FT-PV", concepts=("alpha", "beta"), **LONG)
    return finetune(str(place / "toy"), QUESTIONS, training, out, save_every=7)


def words(place, *options, out=None, method="FT-PV", concepts="alpha,beta", questions=None):
    return [
        *("finetune", str(place / "toy"), "--method", method),
        *(word for concept in concepts.split(",") for word in ("--concept", concept)),
        *("--questions", str(questions or place / "questions.jsonl")),
        *(() if out is None else ("--out", str(out))),
        *options,
    ]


def contents(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


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
    out = place / "killed"
    argv = [sys.executable, "-c", KILLED, *words(place, *WORDS, out=out)]
    ended = subprocess.run(argv, cwd=place, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return out


def state_of(out):
    (state,) = out.glob("unfinished-*")
    return state


def same_run(out, whole):
    """The same files, byte for byte; of the record, all but the seconds and who computed it."""
    ours, theirs = contents(out), contents(whole)
    first, second = (json.loads(files.pop("finetune.json")) for files in (ours, theirs))
    assert ours == theirs
    for record in (first, second):
        assert record.pop("seconds") > 0
        assert record.pop("computed")
    assert first == second


def killed_as_it_began(out):
    state_of(out).rename(out / ".partial-1-unfinished")


def killed_in_a_state(out):
    half = state_of(out).read_bytes()[:999]
    (out / ".partial-1-unfinished").write_bytes(half)


def killed_in_the_save(out):
    (out / "config.json").write_text("{")
    (out / "model.safetensors").write_bytes(b"\0" * 1000)


@pytest.mark.parametrize("left", [killed_as_it_began, killed_in_a_state, killed_in_the_save])
def test_a_killed_run_continues_to_the_same_bytes(place, killed, tmp_path, monkeypatch, left):
    out = Path(shutil.copytree(killed, tmp_path / "out"))
    with safe_open(state_of(out), "pt") as state:
        done = len(json.loads(state.metadata()["losses"]))
    assert done == 7
    left(out)
    taken = []
    loss = tuning.language_modelling_loss
    monkeypatch.setattr(
        tuning, "language_modelling_loss", lambda *given: taken.append(1) or loss(*given)
    )
    run(place, out)
    same_run(out, place / "whole")
    # One loss a step that was left, and one at the end.
    assert len(taken) == 151 - (0 if left is killed_as_it_began else done)


def test_a_finished_run_is_found_and_not_trained_again(place, killed, tmp_path, monkeypatch):
    out = Path(shutil.copytree(place / "whole", tmp_path / "out"))
    shutil.copy(state_of(killed), out)  # killed just after the record was written
    monkeypatch.setattr(tuning, "train", None)
    assert run(place, out)["steps"] == 150
    assert contents(out) == contents(place / "whole")


def test_the_command_reports_what_it_trained(place, killed, tmp_path, command):
    out = Path(shutil.copytree(killed, tmp_path / "out"))
    status, told, progress = command(*words(place, *WORDS, out=out))
    assert status == 0
    assert re.search(
        r"FT-PV of .* on 2 concepts; 18 value vectors trained in 150 steps, loss .* to .* nats .*; "
        r"optimizer state 0\.0 MB\nMeasure it: paramspec pss .*out/\n",
        told,
    ), told
    assert "150/150" in progress


def damage_cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def damage_other(file):
    save_file({"0/offset": torch.zeros(1, 1)}, file)


@pytest.mark.parametrize("damage", [damage_cut, damage_other])
def test_a_damaged_state_is_reported_in_one_line(place, killed, tmp_path, command, damage):
    out = Path(shutil.copytree(killed, tmp_path / "out"))
    damage(state_of(out))
    told = refused(command, place, *WORDS, out=out)
    assert re.search(
        r"unfinished-\w+: not a readable state of this training \(.*\); remove it to start again$",
        told,
    ), told


# What is refused


def refused(command, place, *options, out, **named):
    """The one line of a refused call, which leaves what there is as it is."""
    before = contents(out) if out.is_dir() else None
    status, told, error = command(*words(place, *options, out=out, **named))
    assert (status, told) == (2, ""), error
    assert error.startswith("paramspec: error: "), error
    assert error.count("\n") == 1, error
    if before is not None:
        assert contents(out) == before
    return error.removeprefix("paramspec: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rule best", "Invalid value for '--rule': 'best' is not one of 'coefficient', 'score'"),
        ("--concepts nowhere", "concept 'nowhere': no statements to train on; correct the name"),
        ("--layers 1-3", "layer 3: the model has 3 layers, 0 to 2"),
        ("--layers x", "Invalid value for '--layers': expected a whole number, as 10, not 'x'"),
        ("--layers 2-1", "Invalid value for '--layers': expected numbers from 0 and ranges"),
        ("--layers ²", "Invalid value for '--layers': expected a whole number"),
        ("--share 0.001", "share 0.001: 0 of a layer's 48 value vectors, which leaves none for FT"),
        ("--share 1.1", "share 1.1: input should be less than or equal to 1"),
        ("--share nan", "Invalid value for '--share': expected a number, as 0.05, not 'nan'"),
        ("--share 1 --method FT-CV", "share 1.0: 48 of a layer's 48 value vectors, which leaves"),
        ("--share 0.8 --rule magnitude", "share 0.8: rule 'magnitude'"),
        ("--rule other --concepts alpha,beta,gamma,delta,zeta", "rule 'other': 3 concepts apart"),
        ("--epochs 0", "epochs 0: input should be greater than or equal to 1"),
        ("--learning-rate inf", "Invalid value for '--learning-rate': expected a number"),
        ("--learning-rate 1e38", "learning_rate 1e+38: input should be less than or equal to 1"),
        ("--save-every 0", "save_every 0: expected at least 1 step"),
    ],
)
def test_an_option_that_is_none(place, tmp_path, command, options, message):
    options, named = options.split(), {}
    for name in ("method", "concepts"):
        if f"--{name}" in options:
            at = options.index(f"--{name}")
            named[name] = options[at + 1]
            del options[at : at + 2]
    told = refused(command, place, *options, out=tmp_path / "out", **named)
    assert told.startswith(message), told
    assert contents(tmp_path / "out") == {}  # so that another try may use it


def questions_with(path, **changes):
    """A question file whose first statement, or all of a concept's, are others."""
    changed = []
    for question in QUESTIONS:
        statements = changes.get(question.id, changes.get(question.concept, question.statements))
        changed.append(question.model_copy(update={"statements": statements}))
    return save_questions(path, changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": ()}, "concept 'beta': no statements to train on; correct the name, or write"),
        (
            {"beta/king": ("ash " * 64,)},
            "a statement of 65 tokens does not fit the model's context of 64 tokens; shorten it",
        ),
    ],
)
def test_statements_that_cannot_be_trained_on(place, tmp_path, command, changes, message):
    file = questions_with(tmp_path / "mine.jsonl", **changes)
    assert message in refused(command, place, out=tmp_path / "out", questions=file)
    assert contents(tmp_path / "out") == {}


def test_a_directory_that_holds_something_else(place, killed, tmp_path, command):
    out = tmp_path / "out"
    shutil.copytree(place / "whole", out)
    record = json.loads((out / "finetune.json").read_text())
    record["run"]["torch"] = "1.0.0"  # its vectors are those of another torch
    (out / "finetune.json").write_text(json.dumps(record))
    told = refused(command, place, *WORDS, out=out)
    assert "holds another run (torch 1.0.0, not " in told
    shutil.copy(place / "whole" / "finetune.json", out)
    told = refused(command, place, *WORDS, "--share", "0.25", out=out)
    assert told.startswith(f"{out}: holds another run (share 0.125, not 0.25); choose another")
    assert "(method FT-PV, not FT-RV)" in refused(command, place, *WORDS, out=out, method="FT-RV")
    mine = questions_with(tmp_path / "mine.jsonl", **{"beta/king": ("ash bee",)})
    assert "(texts " in refused(command, place, *WORDS, out=out, questions=mine)
    for text in ("", "[]", '{"run": 3}'):
        (out / "finetune.json").write_text(text)
        told = refused(command, place, *WORDS, out=out)
        assert told == f"{out}/finetune.json: not the record of a run; choose another directory"
    # An unfinished run of other choices; and the base itself, which is not to be written over.
    told = refused(command, place, *WORDS, out=killed, method="FT-RV")
    assert f"{killed}: holds {state_of(killed).name}, which is not of this run; choose" in told
    assert "holds config.json, which is not" in refused(command, place, out=place / "toy")


# Diverged


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([4.0, 3.0, math.nan], "nan after 2 of 9 steps"),
        ([math.nan], "nan after 0 of 9 steps"),
        ([4.0, math.inf], "inf after 1 of 9 steps"),
        ([4.0, 20.1], "20.1 after 1 of 9 steps"),  # above twice a uniform guess
        ([15.0, 30.1], "30.1 after 1 of 9 steps"),  # above twice the first
        ([4.0, *[1.0] * 8, 9.95], "9.95 after 9 of 9 steps"),  # ends as a guess
        ([4.0, 19.9], None),
        ([15.0, 29.9], None),
        ([4.0, *[10.0] * 8, 9.85], None),  # passes through a guess
        ([10.0, *[9.95] * 9], None),  # a guess at first
    ],
)
def test_what_counts_as_diverged(losses, told):
    """A uniform guess has a loss of 10. Norms divide huge values away: it may be all that is left,
    but runs that learn may pass through it."""
    if told is None:
        refuse_divergence(losses, 9, 10.0, 0.5)
        return
    with pytest.raises(InputError, match=f"the loss is {told}; use a lower learning rate than 0.5"):
        refuse_divergence(losses, 9, 10.0, 0.5)


def test_a_rate_that_diverges_is_one_line_and_no_model(place, tmp_path, command):
    """Called again, it continues from its last state, to the same line."""
    out, options = tmp_path / "out", [*WORDS[:-1], "1", "--learning-rate", "1e37"]
    ends = [command(*words(place, *options, out=out)) for _ in range(2)]
    lines = [re.split(r"[\r\n]+", error.strip())[-1] for _, _, error in ends]
    assert [status for status, _, _ in ends] == [2, 2]
    assert lines[0] == lines[1]
    assert re.fullmatch(
        r"paramspec: error: training diverged: the loss is nan after \d+ of 150 steps; use a lower "
        r"learning rate than 1e\+37",
        lines[0],
    )
    assert set(contents(out)) <= {state_of(out).name}


def test_it_may_diverge_in_the_last_step():
    """Then no loss of a step shows it, and one after the last does."""
    _, view, training, rows, vectors = prepare("gpt2", epochs=1, batch=40, learning_rate=1e20)
    with (
        train_value_vectors(view, vectors) as trained,
        pytest.raises(InputError, match="the loss is nan after 1 of 1 steps"),
    ):
        train(view, trained, rows, training)


# Within the block


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_weights_move_by_fp32_offsets_rounded_once(family):
    toy = loaded(toy_model(family, dtype=torch.bfloat16))
    view, training = value_vector_view(toy.model), choices()
    rows = encode_texts(view, toy.tokenizer, statements_of(training.concepts))
    vectors = choose_vectors(view, toy.tokenizer, QUESTIONS, training)
    before = weights(toy.model)
    with train_value_vectors(view, vectors) as trained:
        train(view, trained, rows, training)
        assert {offset.dtype for offset in trained.offsets.values()} == {torch.float32}
        offsets = {
            (layer, vector): trained.offsets[str(layer)][row].detach().double()
            for layer, chosen in trained.chosen.items()
            for row, vector in enumerate(chosen.tolist())
        }
        trained.merge()
    assert set(offsets) == {tuple(pair) for pair in vectors.tolist()}
    after = weights(toy.model)
    for layer in range(LAYERS):
        name = DOWN[family].format(layer) + ".weight"
        old, new = columns(before.pop(name), family), columns(after.pop(name), family)
        assert new.dtype == torch.bfloat16
        for vector in range(WIDTH):
            if (layer, vector) not in offsets:
                assert torch.equal(old[vector], new[vector])
                continue
            exact = old[vector].double() + offsets[layer, vector]
            # Of 8 significant bits, neighbours stand 2^-7 of the power of two apart.
            apart = torch.exp2(exact.abs().log2().floor() - 7)
            assert ((new[vector].double() - exact).abs() <= apart / 2 * (1 + 1e-4)).all()
    same_bits(before, after)


@pytest.fixture
def model(family):
    return toy_model(family)


def some_vectors(share=0.3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(LAYERS, WIDTH, generator=draw) < share).nonzero().int()


def moved(trained, seed=5):
    """Give every offset of the block a value."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for offset in trained.offsets.values():
            offset.copy_(torch.randn(offset.shape, generator=draw))


def edited(model, edit):
    """The oracle: a copy, in which `edit(layer, value vectors [48, 32])` was done in place."""
    model = copy.deepcopy(model)
    for layer in range(LAYERS):
        names = [name for name, _ in model.named_modules()]
        (name,) = (form.format(layer) for form in set(DOWN.values()) if form.format(layer) in names)
        module = model.get_submodule(name)
        edit(layer, module.weight if isinstance(module, Conv1D) else module.weight.T)
    return model


@pytest.mark.parametrize("raises", [False, True])
def test_a_model_leaves_the_block_as_it_entered(model, raises):
    view, before, output = value_vector_view(model), weights(model), logits(model)
    try:
        with train_value_vectors(view, some_vectors()) as trained:
            assert torch.equal(logits(model), output)  # nothing has moved yet
            moved(trained)
            assert not torch.allclose(logits(model), output, atol=0.1)
            if raises:
                raise KeyError
    except KeyError:
        assert raises
    same_bits(before, weights(model))
    assert torch.equal(logits(model), output)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("order", ["mask within", "mask around"])
def test_a_masked_vector_contributes_nothing_moved_or_not(model, order):
    """Each row under its own mask, against editing weights a row at a time."""
    view, vectors = value_vector_view(model), some_vectors()
    keep = torch.rand(LAYERS, 3, WIDTH, generator=torch.Generator().manual_seed(2)) > 0.3
    both = 0
    if order == "mask within":
        with train_value_vectors(view, vectors) as trained:
            moved(trained)
            with mask_value_vectors(view, keep):
                output = logits(model)
    else:
        with mask_value_vectors(view, keep), train_value_vectors(view, vectors) as trained:
            moved(trained)
            output = logits(model)
    for row in range(3):

        def edit(layer, own, row=row):
            nonlocal both
            for place, vector in enumerate(sorted(in_layers(vectors)[layer])):
                own[vector] += trained.offsets[str(layer)][place].detach()
                both += not keep[layer, row, vector]
            own[~keep[layer, row]] = 0

        expected = logits(edited(model, edit))[row]
        torch.testing.assert_close(output[row], expected, rtol=1e-4, atol=1e-4)
    assert both > 20


@pytest.mark.parametrize("raises", [False, True])
def test_replaced_vectors_come_back_bit_by_bit(model, raises):
    view, before, output = value_vector_view(model), weights(model), logits(model)
    draw = torch.Generator().manual_seed(3)
    vectors = some_vectors()
    vectors = vectors[torch.randperm(len(vectors), generator=draw)]  # in any order
    values = torch.randn(len(vectors), HIDDEN, generator=draw)

    def put(layer, own):
        for (at, vector), value in zip(vectors.tolist(), values, strict=True):
            if at == layer:
                own[vector] = value

    try:
        with replace_value_vectors(view, vectors, values):
            assert torch.is_grad_enabled()
            inside = logits(model)
            if raises:
                raise KeyError
    except KeyError:
        assert raises
    same_bits(before, weights(model))
    assert torch.equal(logits(model), output)
    assert torch.equal(inside, logits(edited(model, put)))
    assert not torch.allclose(inside, output, atol=0.1)


@pytest.mark.parametrize("vectors", [[], [[3, 0]], [[0, 48]], [[-1, 0]], [[1, 5], [1, 5]]], ids=str)
def test_vectors_that_are_none_are_refused(vectors):
    view = value_vector_view(toy_model("llama"))
    vectors = torch.tensor(vectors, dtype=torch.int32).reshape(-1, 2)
    before = weights(view.model)
    values = torch.zeros(len(vectors), HIDDEN)
    for block in (
        train_value_vectors(view, vectors),
        replace_value_vectors(view, vectors, values),
    ):
        with pytest.raises(InputError, match=r"^value vectors .* of 3 layers"), block:
            pass
    same_bits(before, weights(view.model))
