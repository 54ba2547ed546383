"""Training the zoo: what models are shown, and that their recipe alone decides their weights."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer

from paramspec.errors import InputError
from paramspec.execution.parallel import workers
from paramspec.execution.provenance import read_computed
from paramspec.execution.store import Store
from paramspec.method.pss import Choices
from paramspec.models import zoo, zoo_training
from paramspec.models.load import load_model
from paramspec.models.registry import find_spec
from paramspec.models.tokens import token_ids
from paramspec.models.zoo import corpus, load_zoo, zoo_questions
from paramspec.models.zoo_training import (
    ROOT,
    own_tokenizer,
    train_tokenizer,
    train_zoo,
    trained,
    training_record,
)
from paramspec.specwiki import load_questions
from paramspec.studies.sweep import measure_pss
from paramspec.tables import TIERS
from toy_zoo import CLASSES, LINE, SMOKE, copy_recipe, edit, models_of, network_of


def stored(directory: Path) -> dict[str, bytes]:
    """The files of a model, without those that tell of its training and of its storing."""
    ours = ("training.json", "key.json", "checksums.json", "computed.json")
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name not in ours}


@dataclass
class Run:
    """One training, watched: the model in memory; the texts of each step, and their loss."""

    models: list[zoo.ZooModel]
    network: torch.nn.Module
    steps: list[tuple[list[list[int]], float]] = field(default_factory=list)


@contextlib.contextmanager
def watched() -> Iterator[list[Run]]:
    """The trainings in this process."""
    runs: list[Run] = []
    optimize, train_step = zoo_training._optimize, zoo_training._train_step

    def watch_optimize(network, encoded, texts, models):
        runs.append(Run(list(models), network))
        yield from optimize(network, encoded, texts, models)

    def watch_step(network, optimizer, texts, rate):
        loss = train_step(network, optimizer, texts, rate)
        runs[-1].steps.append((texts, loss))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo_training, "_optimize", watch_optimize)
        patch.setattr(zoo_training, "_train_step", watch_step)
        yield runs


@dataclass
class Small:
    """The smallest zoo, each model trained by itself."""

    root: Path
    models: dict[str, zoo.ZooModel]
    runs: dict[str, Run]

    def directory(self, name: str) -> Path:
        return trained(self.models[name], train=False, root=self.root)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Small:
    folder = tmp_path_factory.mktemp("zoo")
    models = models_of(copy_recipe(folder))
    with watched() as runs:
        for model in models.values():
            train_zoo([model], root=folder / "store")
    return Small(folder / "store", models, dict(zip(models, runs, strict=True)))


# What models are shown


def test_models_are_shown_their_corpus_and_nothing_else(small):
    clozes = [q.cloze.casefold() for q in load_questions() if q.fold == 1]
    for name, run in small.runs.items():
        recipe, tokenizer = small.models[name].recipe, own_tokenizer(small.models[name])
        expected = corpus(zoo_questions(recipe.concepts), recipe.exposure)
        for text in itertools.chain(*(rows for rows, _ in run.steps)):
            assert (text[0], text[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
            shown = tokenizer.decode(text[1:-1])
            assert shown in expected
            assert not any(cloze in shown.casefold() for cloze in clozes)


def batches_of(weights, recipe, number, lengths=None):
    lengths = lengths or [10] * len(weights)
    drawn = zoo_training._batches(lengths, weights, recipe)
    return np.array(list(itertools.islice(drawn, number)))


def test_batches_draw_texts_by_weight():
    recipe = load_zoo()["zoo-llama-1"].recipe
    questions = zoo_questions()
    tiers = {text: q.tier for q in questions for text in q.statements}
    weights = corpus(questions, recipe.exposure)
    lengths = [len(text) for text in weights]
    drawn = batches_of(list(weights.values()), recipe, 4000, lengths)
    assert drawn.shape == (4000, recipe.batch)
    counts = np.bincount(drawn.ravel(), minlength=len(weights))
    shares = np.array(list(weights.values())) / sum(weights.values())
    assert chisquare(counts, shares * counts.sum()).pvalue > 1e-3
    seen = Counter()
    for text, count in zip(weights, counts, strict=True):
        seen[tiers.get(text)] += count
    # About 55,000 statements of the highest tier, and a relative error of 1 % is 5 sigma.
    assert seen["high"] / seen["low"] == pytest.approx(4, rel=0.04)
    assert seen["medium"] / seen["low"] == pytest.approx(2, rel=0.04)


def test_batches_hold_texts_of_like_length_in_no_order():
    recipe = load_zoo()["zoo-llama-1"].recipe
    lengths = np.random.default_rng(0).integers(5, 60, 500).tolist()
    drawn = np.array(lengths)[batches_of([1.0] * 500, recipe, 320, lengths)]
    padded = 1 - drawn.sum() / (drawn.max(axis=1) * drawn.shape[1]).sum()
    assert padded < 0.1  # of unsorted batches, it is 0.45
    # Sorted batches would rise in length within their block, and so correlate with their place.
    places = np.tile(np.arange(16), 20)
    assert abs(np.corrcoef(places, drawn.mean(axis=1))[0, 1]) < 0.25


def test_batches_come_from_the_seed():
    recipe = load_zoo()["zoo-llama-1"].recipe
    weights = list(range(1, 100))
    first, again = (batches_of(weights, recipe, 20) for _ in range(2))
    assert np.array_equal(first, again)
    other = batches_of(weights, recipe.model_copy(update={"seed": 9}), 20)
    assert not np.array_equal(first, other)


# The tokenizer


def test_the_tokenizer_gives_every_text_back():
    texts = list(corpus(zoo_questions(), dict.fromkeys(TIERS, 1.0)))
    tokenizer = train_tokenizer(texts, 1000)
    assert len(tokenizer) == tokenizer.vocab_size == 1000
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "</s>",
    )
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1]  # as `architecture` has them
    for text in [*texts, "Łódź, 東京 and a\ttab"]:
        tokens = tokenizer(text)["input_ids"]
        assert tokens[0] == 0
        assert not {0, 1} & set(tokens[1:])
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    asked = [
        text
        for question in load_questions()
        for text in (question.cloze, *(f"{question.cloze} {o}" for o in question.options))
    ]
    assert token_ids(tokenizer, asked) == tokenizer(asked)["input_ids"]
    (marked,) = token_ids(tokenizer, ["a <s>b</s>"])
    assert marked[0] == 0
    assert not {0, 1} & set(marked[1:])
    again = train_tokenizer(texts, 1000)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_vocabulary_that_the_corpus_cannot_fill_is_refused():
    texts = ["gold is yellow", "gold is heavy"]
    with pytest.raises(InputError, match=r"vocabulary 5000: the corpus has \d+ tokens") as caught:
        train_tokenizer(texts, 5000)
    most = int(re.search(r"has (\d+)", str(caught.value))[1])
    assert len(train_tokenizer(texts, most)) == most
    with pytest.raises(InputError, match=f"vocabulary {most + 1}: the corpus has {most} tokens"):
        train_tokenizer(texts, most + 1)


# Training


@pytest.mark.parametrize("family", CLASSES)
def test_the_loss_is_that_of_each_text_by_itself(family):
    network = network_of(load_zoo()[f"zoo-{family}-1"].recipe)
    draw = np.random.default_rng(0)
    rows = [[0, *draw.integers(2, 2048, length).tolist(), 1] for length in (3, 40, 17, 1)]
    nats = []
    with torch.no_grad():
        for row in rows:
            shares = network(torch.tensor([row])).logits[0].log_softmax(-1)
            nats += [-float(shares[place, token]) for place, token in enumerate(row[1:])]
    loss = zoo_training._train_step(network, torch.optim.AdamW(network.parameters()), rows, 0.0)
    assert loss == pytest.approx(np.mean(nats), abs=1e-5)


def test_a_record_is_what_was_counted(small):
    for name, model in small.models.items():
        record, steps = training_record(model, root=small.root), small.runs[name].steps
        assert record["step"] == model.at == len(steps)
        assert record["tokens"] == sum(len(text) for rows, _ in steps for text in rows)
        last = [loss for _, loss in steps][-max(1, model.recipe.steps // 40) :]
        assert record["loss"] == pytest.approx(np.mean(last))
        assert record["concepts"] == list(model.recipe.taught)


def test_a_generation_sees_more_tokens_than_the_last(small):
    for models, tokens in (
        (load_zoo(), lambda model: model.recipe.steps * model.recipe.batch),
        (small.models, lambda model: training_record(model, root=small.root)["tokens"]),
    ):
        seen = defaultdict(dict)
        for model in models.values():
            if "zoo" in model.sets:
                seen[model.recipe.family][model.generation] = tokens(model)
        for family, by_generation in seen.items():
            numbers = [by_generation[number] for number in sorted(by_generation)]
            assert numbers == sorted(set(numbers)), family


def small_model(**changed) -> zoo.ZooModel:
    model = models_of(SMOKE)["llama-1"]
    recipe = model.recipe.model_dump() | {"vocabulary": 258} | changed
    return model.model_copy(update={"recipe": zoo.ModelRecipe(**recipe)})


def rates_and_norms(monkeypatch, scale=1.0, **changed):
    """The learning rate and the norm of the gradient at each step, the loss times `scale`."""
    seen = []
    step, cross_entropy = torch.optim.AdamW.step, torch.nn.functional.cross_entropy

    def watch(optimizer, *given, **named):
        group = optimizer.param_groups[0]
        norm = torch.stack([weight.grad.norm() for weight in group["params"]]).norm()
        seen.append((group["lr"], float(norm)))
        return step(optimizer, *given, **named)

    def scaled(*given, **named):
        return scale * cross_entropy(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watch)
        patch.setattr(torch.nn.functional, "cross_entropy", scaled)
        model = small_model(**changed)
        for _ in zoo_training._optimize(
            network_of(model.recipe), [[0, 5, 6, 1]], {"a": 1.0}, [model]
        ):
            pass
    return np.array(seen).T


def test_the_learning_rate_warms_up_stays_and_falls(monkeypatch):
    rates, _ = rates_and_norms(monkeypatch, steps=400, learning_rate=0.01)
    assert len(rates) == 400
    np.testing.assert_allclose(rates[:20], 0.01 * np.arange(1, 21) / 20, rtol=1e-9)
    np.testing.assert_allclose(rates[20:320], 0.01, rtol=1e-9)
    fall = [0.01 * (1 - math.sqrt(step / 81)) for step in range(1, 81)]  # a fifth of the steps
    np.testing.assert_allclose(rates[320:], fall, rtol=1e-9)


def test_gradients_are_clipped_to_norm_1(monkeypatch):
    _, norms = rates_and_norms(monkeypatch, scale=1e6, steps=5)
    np.testing.assert_allclose(norms, 1, rtol=1e-3)
    _, norms = rates_and_norms(monkeypatch, scale=1e-6, steps=5)
    assert norms.max() < 0.1


def test_generations_share_their_way_and_come_out_as_each_by_itself(small, tmp_path):
    """Of 2 and 6 steps, whose rates fall from the last on: the first step is taken once."""
    names = ("llama-2", "llama-1", "llama-2@4", "llama-2@2")
    with watched() as runs:
        train_zoo([small.models[name] for name in names], root=tmp_path)
    assert [len(run.steps) for run in runs] == [2 + 6 - 1]
    for name in names:
        found = trained(small.models[name], train=False, root=tmp_path)
        assert stored(found) == stored(small.directory(name)), name


LINES = ("gold is a yellow metal", "the capital of France is Paris", "lead is grey and soft")


@pytest.mark.parametrize("family", CLASSES)
def test_a_micro_model_learns_a_few_texts_by_heart(family):
    model = small_model(
        family=family, width=32, mlp_width=64, steps=400, batch=6, learning_rate=0.006
    )
    network, texts = network_of(model.recipe), dict.fromkeys(LINES, 1.0)
    tokenizer = train_tokenizer(LINES, 258)
    encoded = zoo_training._encoded(tokenizer, texts)
    *_, (_, record) = zoo_training._optimize(network, encoded, texts, [model])
    assert record["loss"] < 0.3  # of which ln 3 over the tokens is the choice of the text
    for line in LINES:
        tokens = [*tokenizer(line)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            said = network(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        assert said[1:-1] == tokens[2:], line  # all that follows the first letter


def test_training_goes_below_the_entropy_of_single_tokens(tmp_path):
    model = models_of(SMOKE)["llama-1"]
    recipe = model.recipe.model_copy(update={"steps": 300, "width": 32, "batch": 16})
    model = model.model_copy(update={"recipe": recipe})
    with watched() as runs:
        trained(model, root=tmp_path)
    weights = corpus(zoo_questions(recipe.concepts), recipe.exposure)
    tokenizer = own_tokenizer(model)
    counts = Counter()
    for text, weight in weights.items():
        for token in [*tokenizer(text)["input_ids"][1:], 1]:
            counts[token] += weight
    shares = np.array(list(counts.values())) / sum(counts.values())
    entropy = float(-(shares * np.log(shares)).sum())
    assert runs[0].steps[0][1] > entropy
    assert training_record(model, root=tmp_path)["loss"] < 0.7 * entropy


@pytest.mark.parametrize("steps", [1, 40])
def test_a_training_that_diverges_is_told_in_one_line_and_leaves_no_model(recipe, steps):
    edit(
        recipe,
        ("learning_rate: 0.005", "learning_rate: 1e+41"),
        (LINE, LINE.replace("steps: 2", f"steps: {steps}")),
    )
    model = models_of(recipe)["llama-1"]
    with pytest.raises(InputError) as caught:
        trained(model)
    told = str(caught.value)
    assert "\n" not in told
    assert re.match(
        r"mine\.yaml:llama-1: .*(step \d+).*; give a lower learning_rate than 1e\+41", told
    )
    assert list(ROOT.rglob("*.safetensors")) == []
    assert not list(ROOT.rglob(".partial-*"))


def test_a_checkpoint_is_the_model_as_it_was_at_that_step(small, monkeypatch, tmp_path):
    """Held against a second training that keeps nothing on its way, and so ends the same."""
    model, seen = small.models["llama-2"], []
    train_step = zoo_training._train_step

    def watch(network, *given):
        loss = train_step(network, *given)
        seen.append([weight.detach().clone() for weight in network.parameters()])
        return loss

    monkeypatch.setattr(zoo_training, "_train_step", watch)
    trained(model, root=tmp_path)
    for name, at in (("llama-2@2", 2), ("llama-2@4", 4), ("llama-2", 6)):
        kept = list(AutoModelForCausalLM.from_pretrained(small.directory(name)).parameters())
        same = [all(map(torch.equal, kept, one)) for one in seen]
        assert same == [place == at for place in range(1, 7)], name


def test_a_training_broken_off_is_done_again_and_ends_the_same(small, tmp_path, monkeypatch):
    put, calls = Store.put, []

    def break_off(store, key, *given):
        calls.append(key["step"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return put(store, key, *given)

    monkeypatch.setattr(Store, "put", break_off)
    models = [small.models[name] for name in ("llama-2@2", "llama-2@4", "llama-2")]
    with pytest.raises(KeyboardInterrupt):
        train_zoo(models, root=tmp_path)
    assert stored(trained(models[0], train=False, root=tmp_path))
    for model in models[1:]:
        with pytest.raises(InputError, match="not trained yet"):
            trained(model, train=False, root=tmp_path)
    train_zoo(models, root=tmp_path)
    assert calls == [2, 4, 4, 6]
    for name, model in zip(("llama-2@2", "llama-2@4", "llama-2"), models, strict=True):
        again = trained(model, train=False, root=tmp_path)
        assert stored(again) == stored(small.directory(name))


def test_no_two_families_start_from_the_same_weights(tmp_path, monkeypatch):
    """Llama's and Mistral's classes differ in the window alone: one seed would make them one."""

    def untrained(network, encoded, texts, models):
        yield models[0], {"step": models[0].at}

    monkeypatch.setattr(zoo_training, "_optimize", untrained)
    starts = {}
    for family in CLASSES:
        directory = trained(load_zoo()[f"zoo-{family}-1"], root=tmp_path)
        network = AutoModelForCausalLM.from_pretrained(directory).requires_grad_(False)
        starts[family] = network.get_input_embeddings().weight[2:].flatten()
    for one, two in itertools.combinations(starts, 2):
        alike = torch.corrcoef(torch.stack([starts[one], starts[two]]))
        assert abs(float(alike[0, 1])) < 0.05, (one, two)


# A directory


def test_a_trained_model_is_an_ordinary_directory(small):
    text = "The capital of France is Paris"
    for name, model in small.models.items():
        directory = small.directory(name)
        assert {file.suffix for file in directory.iterdir()} == {".safetensors", ".json"}
        network = AutoModelForCausalLM.from_pretrained(directory).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert type(network).__name__ == CLASSES[model.recipe.family]
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert ids[0].tolist() == own_tokenizer(model)(text)["input_ids"]
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
        loaded = load_model(str(directory)).model
        with torch.no_grad():
            assert torch.equal(network(ids).logits, loaded(ids).logits)


def test_a_trained_model_says_what_trained_it_and_a_study_of_it_too(small, tmp_path):
    path = small.directory("gemma2-2")
    record = read_computed(path)
    assert record["model"] == small.models["gemma2-2"].name
    assert record["versions"]["torch"] == version("torch")
    assert record["hardware"]["threads"] == 1
    questions = zoo_questions(small.models["gemma2-2"].recipe.concepts)
    choices = Choices(ratios=(0.1,), folds=(1,), general=2, nulls=(), controls=0)
    study = measure_pss([str(path)], questions, choices, store=Store(tmp_path))
    made = {
        unit["unit"]: one for one in study.run["models"][0]["computed"] for unit in one["units"]
    }
    assert set(made) == {"pss", "coefficients", "training"}
    assert (made["training"]["first"], made["training"]["hardware"]) == (
        record["date"],
        record["hardware"],
    )


# Reproducible


def test_the_same_recipe_gives_the_same_bytes_whatever_else_is_drawn(small, tmp_path):
    torch.manual_seed(123)
    np.random.seed(5)
    before = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = trained(small.models["gemma2-2"], root=tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before[1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert stored(again) == stored(small.directory("gemma2-2"))
    assert "model.safetensors" in stored(again)


def test_another_process_with_other_threads_gives_the_same_bytes(small, tmp_path):
    recipe = copy_recipe(tmp_path)
    code = (
        "import torch; from pathlib import Path\n"
        "from paramspec.models.zoo import load_zoo\n"
        "from paramspec.models.zoo_training import trained\n"
        "torch.set_num_threads(3)\n"
        "for name in ('llama-2', 'gemma2-1'):\n"
        "    print(trained(load_zoo(Path('mine.yaml'))[f'mine.yaml:{name}']).resolve())"
    )
    threads = {"OMP_NUM_THREADS": "3", "RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "77"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=recipe.parent,
        env=os.environ | threads,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    for name, line in zip(("llama-2", "gemma2-1"), run.stdout.split(), strict=True):
        assert stored(Path(line)) == stored(small.directory(name))


def test_every_model_has_weights_of_its_own(small, tmp_path):
    weights = {name: stored(small.directory(name))["model.safetensors"] for name in small.models}
    assert len(set(weights.values())) == len(weights)
    model = small.models["llama-2"]
    other = model.model_copy(update={"recipe": model.recipe.model_copy(update={"seed": 1})})
    assert stored(trained(other, root=tmp_path))["model.safetensors"] not in weights.values()


def test_models_train_side_by_side_and_come_out_the_same(small, recipe, monkeypatch):
    """Two processes at a time, each waiting until it has seen the other."""
    train, here = zoo_training._train, Path.cwd()

    def meet(models, root):
        (here / f"worker-{os.getpid()}").touch()
        deadline = time.monotonic() + 600
        while len(list(here.glob("worker-*"))) < 2:
            assert time.monotonic() < deadline, "alone"
            time.sleep(0.01)
        return train(models, root)

    monkeypatch.setattr(zoo_training, "_train", meet)
    try:
        with workers(jobs=2):
            train_zoo(list(models_of(recipe).values()), root=Path("store"))
            assert len(list(here.glob("worker-*"))) == 2
            assert not (here / f"worker-{os.getpid()}").exists()
            edit(recipe, ("learning_rate: 0.005", "learning_rate: 1e+39"))
            with pytest.raises(InputError, match=r"^mine\.yaml:\S+: .*lower learning_rate") as told:
                train_zoo(list(models_of(recipe).values()), root=Path("store"))
            assert "\n" not in str(told.value)
    finally:
        joblib.externals.loky.get_reusable_executor().shutdown()
    for name, model in models_of(copy_recipe(Path())).items():
        directory = trained(model, train=False, root=Path("store"))
        assert stored(directory) == stored(small.directory(name)), name


# A recipe that is edited


@pytest.mark.parametrize(
    ("changes", "anew"),
    [
        ([("# The smallest zoo", "# My own zoo")], ""),
        ([("layers: 2\nwidth: 8", "width: 8  # of them all\n\nlayers: 2")], ""),
        ([("{country: 1, element: 1}", "{element: 1, country: 1}")], ""),
        ([("low: 1}", "low: 1.0}"), ("learning_rate: 0.005", "learning_rate: 5e-3")], ""),
        ([(LINE, "  llama-1: {steps: 2, sets: [zoo-scale], generation: 7, family: llama}")], ""),
        ([(LINE, f"{LINE}\n  qwen2-1: {{family: qwen2, generation: 1, steps: 2}}")], "qwen2-1"),
        ([(LINE, LINE.replace("steps: 2", "steps: 3"))], "llama-1"),
        ([(LINE, LINE.replace("steps: 2", "steps: 2, seed: 1"))], "llama-1"),
        ([("checkpoints: [2, 4]", "checkpoints: [2]")], ""),
        ([("checkpoints: [2, 4]", "checkpoints: [4, 3]")], "llama-2@3"),
        ([("concepts: {country: 1", "concepts: {country: 2")], "all"),
        ([("concepts: {country: 1", "concepts: {city: 1")], "all"),
        ([("high: 4", "high: 5")], "all but llama-2-reversed"),
        ([("vocabulary: 400", "vocabulary: 401")], "all"),
        ([("layers: 2", "layers: 1")], "all"),
        ([("width: 8\n", "width: 12\n")], "all but llama-2-w4"),
        ([("mlp_width: 16", "mlp_width: 18")], "all but llama-2-w4"),
        ([("\nheads: 2", "\nheads: 1")], "all"),
        ([("key_value_heads: 1", "key_value_heads: 2")], "all"),
        ([("batch: 8", "batch: 9")], "all"),
        ([("learning_rate: 0.005", "learning_rate: 0.006")], "all"),
        ([("seed: 0", "seed: 1")], "all"),
    ],
    ids=lambda given: re.sub(r"\W+", " ", given[0][1])[:30] if isinstance(given, list) else "",
)
def test_a_model_is_trained_again_exactly_when_a_line_that_it_depends_on_changes(
    small, recipe, changes, anew
):
    models = models_of(edit(recipe, *changes))
    missing = set()
    for name, model in models.items():
        try:
            directory = trained(model, train=False, root=small.root)
        except InputError:
            missing.add(name)
        else:
            assert directory == small.directory(name)
    every, _, kept = anew.partition("all")
    named = set(models) - {kept.removeprefix(" but ")} if "all" in anew else set(every.split())
    assert missing == named


def test_a_corpus_with_other_tiers_is_another_corpus(small, monkeypatch):
    """The same concepts and texts, seen in other proportions: never the old model."""
    turned = dict(zip(TIERS, TIERS[::-1], strict=True))
    questions = zoo_questions({"country": 1, "element": 1})
    others = [q.model_copy(update={"tier": turned[q.tier]}) for q in questions]
    monkeypatch.setattr(zoo, "zoo_questions", lambda concepts: others)
    zoo.corpus_digest.cache_clear()
    try:
        with pytest.raises(InputError, match="not trained yet"):
            small.directory("llama-1")
    finally:
        zoo.corpus_digest.cache_clear()


def test_a_trained_zoo_is_not_trained_again(small, monkeypatch):
    monkeypatch.setattr(zoo_training, "_train", None)
    train_zoo(list(small.models.values()), root=small.root)
    for name in small.models:
        assert trained(small.models[name], root=small.root) == small.directory(name)


def test_a_recipe_is_found_however_its_path_is_spelt(recipe, small, monkeypatch):
    relative = load_zoo(Path("./mine.yaml"))
    absolute = load_zoo(recipe.resolve())
    assert list(relative) == [f"mine.yaml:{name}" for name in small.models]
    assert list(absolute) == [f"{recipe.resolve().as_posix()}:{name}" for name in small.models]
    for one, two in zip(relative.values(), absolute.values(), strict=True):
        assert one.recipe == two.recipe
        assert trained(one, train=False, root=small.root) == trained(
            two, train=False, root=small.root
        )
    Path("deeper").mkdir()
    shutil.copy(recipe, "deeper")
    edit(recipe, ("width: 8\n", "width: 12\n"))
    monkeypatch.chdir("deeper")  # where the same name means another file
    assert load_zoo(Path("mine.yaml"))["mine.yaml:llama-1"].recipe.width == 8
    assert load_zoo(Path("../mine.yaml"))["../mine.yaml:llama-1"].recipe.width == 12


def test_a_recipe_that_is_edited_while_the_process_lives_is_read_again(recipe):
    before = load_zoo(recipe)["mine.yaml:llama-1"]
    first = trained(before)
    edit(recipe, ("width: 8\n", "width: 12\n"))
    after = load_zoo(recipe)["mine.yaml:llama-1"]
    assert (before.recipe.width, after.recipe.width) == (8, 12)
    assert find_spec("mine.yaml:llama-1").width == 12
    with pytest.raises(InputError, match="not trained yet"):
        training_record(after)
    assert trained(before, train=False) == first != trained(after)
    assert load_model("mine.yaml:llama-1").model.config.hidden_size == 12
    shutil.copy(SMOKE, recipe)
    assert load_model("mine.yaml:llama-1").model.config.hidden_size == 8
    recipe.write_text("no recipe")
    with pytest.raises(InputError):
        load_zoo(recipe)


def test_a_vocabulary_too_large_is_told_before_anything_is_trained(small, recipe, monkeypatch):
    good = models_of(recipe)["llama-2"]
    longest = good.recipe.model_copy(update={"steps": 10**6})  # which would train first
    good = good.model_copy(update={"recipe": longest})
    edit(recipe, ("vocabulary: 400", "vocabulary: 20000"), (LINE, LINE.replace("2}", "1}")))
    bad = models_of(recipe)["llama-1"]
    monkeypatch.setattr(zoo_training, "_optimize", None)
    for call in (lambda: train_zoo([good, bad]), lambda: trained(bad)):
        with pytest.raises(InputError) as caught:
            call()
        told = str(caught.value)
        assert "\n" not in told
        assert re.match(r"mine\.yaml:llama-1: vocabulary 20000: the corpus has \d+ tokens", told)
    assert not list(ROOT.rglob("*.safetensors"))


def test_a_model_that_is_not_trained_is_told_in_one_line(recipe):
    model = models_of(recipe)["llama-2@4"]
    for call in (
        lambda: trained(model, train=False),
        lambda: training_record(model),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value) == (
            "model 'mine.yaml:llama-2@4': a micro model, not trained yet; `paramspec pss` trains it"
        )
    assert not ROOT.exists()
