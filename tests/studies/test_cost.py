"""Costs are counted as a run computes, and what is shared counts once."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import socket
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from checkout import REPOSITORY
from paramspec.method.hooks import ValueVectorView, unembed_only, value_vector_view
from paramspec.method.masks import record_concepts
from paramspec.method.pss import Choices, measure_concepts
from paramspec.method.rows import Request
from paramspec.method.scoring import choose_engine, encode, score_options
from paramspec.models.describe import study_questions
from paramspec.models.registry import empty_model, load_registry, published_config
from paramspec.models.zoo import architecture, load_zoo
from paramspec.models.zoo_training import own_tokenizer, train_tokenizer, train_zoo
from paramspec.specwiki import load_questions
from paramspec.studies.chapters import CHAPTERS, Experiment
from paramspec.studies.cost import Tokens, find_gpu, plan, subject, tokens_of
from paramspec_book import parameters
from toy_study import save_toy
from toys import random_model


@pytest.fixture
def recipe(tmp_path):
    """Of the smallest zoo, in a folder of its own."""
    smoke = REPOSITORY / "book" / "profiles" / "zoo" / "smoke.yaml"
    return Path(shutil.copy(smoke, tmp_path)).as_posix()


@contextlib.contextmanager
def counting(view: ValueVectorView):
    """A list of the tokens that each forward pass computes under its masks, padding aside."""
    found, entered = [], []

    def enter(_, args, kwargs):
        entered.append(kwargs["attention_mask"])

    def leave(module, args, output):
        if entered:  # else a layer is tried out by itself before its packed copy is used
            mask = entered.pop()
            mask = mask["full_attention"] if isinstance(mask, dict) else mask
            if mask.ndim == 4:  # a packed row: who sees others, or is seen; padding sees itself
                sees = mask[:, 0] == 0
                mask = (sees.sum(-1) > 1) | (sees.sum(-2) > 1)
            found.append(int(mask.sum()) * len(output) // len(mask))

    hooks = [
        view.model.base_model.register_forward_pre_hook(enter, with_kwargs=True),
        view.modules[-1].register_forward_hook(leave),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tokens_are_those_of_a_counted_run(recipe, family):
    """Recording and measuring a micro model."""
    micro = load_zoo(Path(recipe))[f"{recipe}:{family}-1"]
    view = value_vector_view(random_model(architecture(micro.recipe)))
    tokenizer, engine = own_tokenizer(micro), choose_engine(view)
    questions = tuple(study_questions([micro.name]))
    choices = Choices(ratios=(0.1, 0.3), controls=2, general=4, row_tokens=48, batch_tokens=300)
    concepts = list(dict.fromkeys(question.concept for question in questions))
    with counting(view) as ran:
        coefficients = record_concepts(view, tokenizer, questions, batch_tokens=300)
        asked = (questions, concepts, choices, coefficients)
        requests = [Request(encode(tokenizer, question), 0) for question in questions]
        budget = {"row_tokens": 48, "batch_tokens": 300}
        scores = score_options(view, requests, [None], engine=engine, **budget)
        unmasked = {q.id: one for q, one in zip(questions, scores, strict=True)}
        measure_concepts("m", view, tokenizer, *asked, unmasked=unmasked, engine=engine)
    planned = tokens_of(Experiment((micro.name,), questions, choices), tokenizer)
    assert engine.name == "packed"
    assert planned.passed == sum(ran) > 0


@pytest.mark.parametrize("name", ["llama-2-7b", "qwen1.5-0.5b", "gemma-2-2b", "mistral-7b-v0.1"])
def test_flops_are_nearly_what_torch_counts_at_full_size(name):
    """On the device that holds shapes alone, in rows as long as packed ones; attention is small."""
    model = empty_model(published_config(load_registry()[name]))
    model.set_attn_implementation("eager")
    rows, length, read = 2, 160, 40
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    bias = torch.zeros(rows, 1, length, length, dtype=model.dtype, device="meta")
    places = torch.zeros(read, 2, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, unembed_only(model, places):
        model(input_ids=ids, attention_mask=bias, position_ids=ids, use_cache=False)
    counted = subject(name).flops(Tokens(rows * length, read))
    assert 0.93 < counted / counter.get_total_flops() <= 1


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A place without results, and no network at all."""
    calls = []

    def refuse(*where):
        calls.append(where)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert calls == []


def small(models, chapters=("6-scale",), **options):
    values = {"folds": [1], "ratios": [0.1], "general": 2, "controls": 1, "concepts": 6, "seed": 0}
    return plan({name: CHAPTERS[name](values | {"models": models}) for name in chapters}, **options)


def test_a_plan_adds_up_and_shared_work_counts_once(offline, recipe):
    models = [f"{recipe}:llama-1", f"{recipe}:gemma2-1"]
    one, both = small(models), small(models, ("6-scale", "7-pretraining"))
    flops = one.models["flops"].sum()
    assert one.chapters.loc[0, ["models", "concepts"]].tolist() == [2, 6]
    assert both.models.equals(one.models)
    assert both.totals == one.totals
    assert both.chapters["flops"].tolist() == [flops] * 2
    assert both.chapters["shared"].tolist() == [0, 1]
    assert one.totals["flops"] == flops
    assert math.isclose(one.totals["gpu_hours"] * 3600, flops / (312e12 * 0.3))


def test_micro_models_of_a_recipe_of_any_name_are_planned_untrained(offline, recipe):
    Path(recipe).rename(offline / "a@1: b.yaml")
    name = "a@1: b.yaml:llama-2"
    before = small([f"{name}@2", f"./{name}"]).models
    recipes = load_zoo(Path("a@1: b.yaml"))
    train_zoo([recipes[name], recipes[f"{name}@2"]])
    after = small([f"{name}@2", f"./{name}"]).models
    assert before["micro"].all()
    assert (before["on_disk"].sum(), after["on_disk"].sum()) == (0, 2)
    assert before["flops"].equals(after["flops"])


def test_tokens_are_the_model_s_own_where_its_tokenizer_lies_here(offline):
    own = save_toy(offline / "own")
    clozes = [question.cloze for question in load_questions(concepts=30)]
    train_tokenizer(clozes, 300).save_pretrained(own)
    planned = small([str(own), "qwen1.5-0.5b", "smollm2-135m"]).models
    assert planned["tokenizer"].tolist() == [str(own), "smollm2-135m", "smollm2-135m"]
    assert planned["on_disk"].tolist() == [True, False, True]
    toy, far, embedded = planned["tokens"]
    assert far == embedded != toy
    assert planned["weights"][1] == 2 * load_registry()["qwen1.5-0.5b"].parameters
    assert planned["weights"][0] > (own / "model.safetensors").stat().st_size


def test_a_model_larger_than_a_gpu_takes_several(offline):
    planned = {gpu: small(["llama-2-13b"], gpu=gpu).models.iloc[0] for gpu in ("L4", "H100")}
    assert planned["L4"]["gpus"] == 2  # 26 GB of bf16, of 24 GB
    assert planned["H100"]["gpus"] == 1
    hours = {gpu: row["gpu_hours"] / row["gpus"] for gpu, row in planned.items()}
    assert math.isclose(hours["L4"] / hours["H100"], 989.5 / 121)


@pytest.fixture
def checkout(offline, monkeypatch):
    """The book is found, though the working directory is another."""
    monkeypatch.setattr(parameters, "find_root", lambda: REPOSITORY)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpu", "abacus"], "GPU 'abacus': unknown; use A100 80GB"),
        (["--utilisation", "0"], "utilisation 0: "),
        (["9-nothing"], "unknown chapter '9-nothing'"),
        (["1-value-vectors"], "1-value-vectors has no chapter that measures models"),
        (["6-scale", "-p", "concepts", "many"], "6-scale: concepts 'many'"),
        (["6-scale", "-p", "modles", "[]"], "-p modles: "),
        (["6-scale", "-p", "models", "[lama]"], "model 'lama': not in models.yaml"),
        (["6-scale", "-p", "models", "[]"], "models: none given"),
    ],
)
def test_bad_input_is_one_line(words, told, checkout, refused):
    assert told in refused("plan", *words)


def test_gpus_are_sourced_and_found_by_any_spelling():
    assert find_gpu("l4").name == "L4"
    assert find_gpu("RTX4090").peak == 165.2e12


@pytest.mark.slow
def test_command_says_what_twenty_models_cost(checkout, command):
    """Of the paper's profile, as tables and as JSON."""
    words = ("plan", "4-twenty-models", "--profile", "paper")
    (_, shown, _), (_, text, _) = command(*words), command(*words, "--json")
    lines, content = shown.splitlines(), json.loads(text)
    totals = content["totals"]
    told = f"20 models, 525 concepts: {totals['gpu_hours']:,.1f} hours of one A100 80GB at 30 %"
    told += f", {totals['cpu_hours']:,.1f} of a CPU core"
    assert lines[-1].startswith(f"In all: {told}, ")
    assert content["totals"]["flops"] == sum(model["flops"] for model in content["models"])
    twenty = [spec for spec in load_registry().values() if "twenty" in spec.sets]
    assert [model["model"] for model in content["models"]] == [spec.id for spec in twenty]
    for spec in twenty:
        row = next(line.split() for line in lines if line.split()[:1] == [spec.id])
        assert f"{spec.parameters / 1e9:.2f}" == row[1]
    assert content["gpu"]["source"]


def test_changes_of_an_experiment_are_as_the_chapters_say():
    values = {"model": "smollm2-135m", "concepts": 4, "ratios": [0.1], "general": 3, "controls": 2}
    own, held_out = CHAPTERS["3-masking"](values | {"seed": 1})
    assert own.models == held_out.models == ("smollm2-135m",)
    assert own.questions == held_out.questions == tuple(load_questions(concepts=4, seed=1))
    assert own.choices == Choices(ratios=(0.1,), general=3, controls=2, seed=1, folds=(0, 1))
    changed = {"protocol": "holdout", "controls": 0}
    assert held_out.choices == own.choices.model_copy(update=changed)
