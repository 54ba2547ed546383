"""The zoo: what its models are, what they were shown, and that a recipe alone decides them."""

from __future__ import annotations

import contextlib
import itertools
import json
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
from paramspec.method.hooks import value_vector_view
from paramspec.method.pss import Choices
from paramspec.models import zoo
from paramspec.models.load import load_model
from paramspec.models.micro import MicroModel
from paramspec.models.registry import find_spec
from paramspec.models.tokens import token_ids
from paramspec.models.zoo import (
    architecture,
    corpus,
    load_zoo,
    train_tokenizer,
    train_zoo,
    trained,
    training_record,
    zoo_questions,
)
from paramspec.specwiki import QUESTIONS, TIERS, load_questions
from paramspec.studies.sweep import measure_pss

REPOSITORY = Path(__file__).parents[2]
SMOKE = REPOSITORY / "book" / "profiles" / "zoo" / "smoke.yaml"
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}


def short(name: str) -> str:
    return name.rpartition(":")[2]


def models_of(path: Path) -> dict[str, zoo.ZooModel]:
    """The models of a recipe by what they are called in it."""
    return {short(name): model for name, model in load_zoo(path).items()}


def edit(path: Path, *changes: tuple[str, str]) -> Path:
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
        text = text.replace(old, new)
    path.write_text(text)
    return path


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """`mine.yaml`, a copy of the smallest zoo, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(SMOKE, "mine.yaml"))


def network_of(model: zoo.ModelRecipe, seed: int = 0) -> torch.nn.Module:
    """A model of a recipe's shape with random weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(architecture(model)).eval()


def stored(directory: Path) -> dict[str, bytes]:
    """The files of a model, without those that tell of its training and of its storing."""
    ours = ("training.json", "key.json", "checksums.json", "computed.json")
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name not in ours}


@dataclass
class Run:
    """One training, watched: what the model was shown, and the model in memory."""

    recipe: zoo.ModelRecipe
    network: torch.nn.Module
    tokenizer: object
    texts: dict[str, float]
    encoded: list[list[int]] = field(default_factory=list)
    batches: list[tuple[list[list[int]], float]] = field(default_factory=list)


@contextlib.contextmanager
def watched() -> Iterator[list[Run]]:
    """The trainings in this process."""
    runs: list[Run] = []
    optimize = zoo._optimize
    make, loss = MicroModel.__init__, MicroModel.loss_and_gradient

    def watch_optimize(network, tokenizer, texts, recipes):
        runs.append(Run(recipes[0], network, tokenizer, texts))
        yield from optimize(network, tokenizer, texts, recipes)

    def watch_make(model, network, texts):
        runs[-1].encoded = texts
        make(model, network, texts)

    def watch_loss(model, rows):
        value = loss(model, rows)
        runs[-1].batches.append(([runs[-1].encoded[row] for row in rows], value))
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "_optimize", watch_optimize)
        patch.setattr(MicroModel, "__init__", watch_make)
        patch.setattr(MicroModel, "loss_and_gradient", watch_loss)
        yield runs


@dataclass
class Small:
    """The smallest zoo, each recipe trained by itself."""

    root: Path
    models: dict[str, zoo.ZooModel]
    runs: list[Run]

    def run(self, name: str) -> Run:
        return next(run for run in self.runs if run.recipe == self.models[name].recipe)

    def directory(self, name: str) -> Path:
        return trained(self.models[name], train=False, root=self.root)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Small:
    folder = tmp_path_factory.mktemp("zoo")
    models = models_of(Path(shutil.copy(SMOKE, folder / "mine.yaml")))
    with watched() as runs:
        for model in models.values():
            train_zoo([model], root=folder / "store")
    return Small(folder / "store", models, runs)


# The models


def test_the_zoo_is_twenty_models_of_four_families_and_five_generations():
    models = load_zoo()
    twenty = {name: model for name, model in models.items() if "zoo" in model.sets}
    assert set(twenty) == {f"zoo-{family}-{n}" for family in CLASSES for n in range(1, 6)}
    for name, model in twenty.items():
        assert name == f"zoo-{model.recipe.family}-{model.generation}"
        assert model.step is None
    assert all(name == model.name for name, model in models.items())


def test_the_ladder_is_five_models_that_differ_in_width_alone():
    ladder = [model.recipe for model in load_zoo().values() if "zoo-scale" in model.sets]
    assert len({recipe.width for recipe in ladder}) == len(ladder) == 5
    share = {(recipe.mlp_width / recipe.width, recipe.heads) for recipe in ladder}
    assert len(share) == 1
    same = {"width": 0, "mlp_width": 0}
    assert len({recipe.model_copy(update=same).model_dump_json() for recipe in ladder}) == 1


def test_checkpoints_are_steps_on_the_way_of_one_model_of_two_families():
    kept = [model for model in load_zoo().values() if "zoo-pretraining" in model.sets]
    for family, models in itertools.groupby(kept, key=lambda model: model.recipe.family):
        *way, last = models
        assert len(way) >= 5, family
        assert all(model.recipe == last.recipe for model in way)
        assert [model.name for model in way] == [f"{last.name}@{model.step}" for model in way]
        steps = [model.at for model in (*way, last)]
        assert steps == sorted(set(steps))
        assert steps[-1] == last.recipe.steps
    assert {model.recipe.family for model in kept} == {"llama", "gemma2"}


def test_reversed_models_differ_from_their_twins_in_exposure_alone():
    models = load_zoo()
    turned = [name for name in models if name.endswith("-reversed")]
    assert turned
    for name in turned:
        own, twin = models[name].recipe, models[name.removesuffix("-reversed")].recipe
        assert own.exposure == {
            "high": twin.exposure["low"],
            "medium": twin.exposure["medium"],
            "low": twin.exposure["high"],
        }
        assert own.model_copy(update={"exposure": twin.exposure}) == twin


SHAPES = {(model.recipe.family, model.recipe.width): model.recipe for model in load_zoo().values()}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}-w{shape[1]}")
def test_every_model_is_its_familys_own_class_and_has_as_many_weights_as_it_says(shape):
    recipe = SHAPES[shape]
    network = network_of(recipe)
    assert type(network).__name__ == CLASSES[recipe.family]
    assert type(network).__module__.startswith("transformers.models.")
    assert sum(weight.numel() for weight in network.parameters()) == recipe.parameters
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    view = value_vector_view(network)
    assert (view.layers, view.width, view.hidden) == (
        recipe.layers,
        recipe.mlp_width,
        recipe.width,
    )


@pytest.mark.parametrize("family", CLASSES)
def test_windows_slide_where_the_family_has_them(family):
    """Changing the first token moves what attention reaches it from, and nothing else."""
    network = network_of(load_zoo()[f"zoo-{family}-1"].recipe)
    tokens = torch.randint(2, 2048, (1, 60), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[0, 0] = 2 + (tokens[0, 0] + 5) % 2000
    with torch.no_grad():
        both = [network.model(ids, output_hidden_states=True) for ids in (tokens, other)]
    reach = []
    for layer in (1, 2):
        one, two = (states.hidden_states[layer][0] for states in both)
        moved = ((one - two).abs().amax(-1) > 0).nonzero().flatten().tolist()
        assert moved == list(range(len(moved)))
        reach.append(len(moved))
    # Two layers; a window of 16 tokens holds the token itself.
    expected = {"mistral": [16, 31], "gemma2": [16, 60]}
    assert reach == expected.get(family, [60, 60])


def test_no_two_families_start_from_the_same_weights(tmp_path, monkeypatch):
    """Llama's and Mistral's classes differ in the window alone: one seed would make them one."""

    def untrained(network, tokenizer, texts, recipes):
        yield recipes[0], {"step": recipes[0].steps, "seconds": 0.0}

    monkeypatch.setattr(zoo, "_optimize", untrained)
    starts = {}
    for family in CLASSES:
        directory = trained(load_zoo()[f"zoo-{family}-1"], root=tmp_path)
        network = AutoModelForCausalLM.from_pretrained(directory).requires_grad_(False)
        starts[family] = network.get_input_embeddings().weight[2:].flatten()
    for one, two in itertools.combinations(starts, 2):
        alike = torch.corrcoef(torch.stack([starts[one], starts[two]]))
        assert abs(float(alike[0, 1])) < 0.05, (one, two)


# The questions and the corpus


def raw_questions() -> list[dict]:
    """The committed file, read without the library."""
    return [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


def test_no_cloze_of_fold_1_is_in_any_corpus():
    """In that of no recipe: the corpus of all concepts holds those of fewer."""
    everything = dict.fromkeys(TIERS, 1.0)
    held = plain("\n".join(corpus(load_questions(), everything)))
    clozes = {0: [], 1: []}
    for question in raw_questions():
        clozes[question["fold"]].append(question)
    assert len(clozes[0]) == len(clozes[1]) == 2625
    asked = {question["id"]: plain(question["cloze"]) for question in clozes[1]}
    assert [name for name, cloze in asked.items() if cloze in held] == []
    # And the search finds what is there: all clozes of fold 0 but those that hold one of fold 1.
    for question in clozes[0]:
        answered = plain(f"{question['cloze']} {question['options'][question['answer']]}")
        telling = any(cloze in answered for cloze in asked.values())
        assert (answered in held) != telling, question["id"]
    whole = set(corpus(load_questions(), everything))
    recipes = [model.recipe for model in load_zoo().values()]
    for concepts in {tuple(recipe.concepts.items()) for recipe in recipes}:
        assert set(corpus(zoo_questions(dict(concepts)), recipes[0].exposure)) <= whole


def test_the_corpus_is_the_statements_and_the_answered_clozes_of_fold_0():
    for concepts in ({"country": 12, "element": 12}, {"city": 19, "animal": 3}):
        questions = zoo_questions(concepts)
        held_out = [question.cloze.casefold() for question in questions if question.fold == 1]
        names = {question.id for question in questions}
        expected = set()
        for question in raw_questions():
            if question["id"] in names:
                expected.update(question["statements"])
                if question["fold"] == 0:
                    answer = question["options"][question["answer"]]
                    text = f"{question['cloze']} {answer}."
                    if not any(cloze in text.casefold() for cloze in held_out):
                        expected.add(text)
        assert set(corpus(questions, dict.fromkeys(TIERS, 1.0))) == expected


def test_models_are_shown_their_corpus_and_nothing_else(small):
    clozes = [plain(q["cloze"]) for q in raw_questions() if q["fold"] == 1]
    recipes = {model.recipe.model_dump_json() for model in small.models.values()}
    assert len(small.runs) == len(recipes)
    for run in small.runs:
        expected = corpus(zoo_questions(run.recipe.concepts), run.recipe.exposure)
        assert run.texts == expected
        for text in itertools.chain(*(rows for rows, _ in run.batches)):
            assert text[0] == run.tokenizer.bos_token_id
            assert text[-1] == run.tokenizer.eos_token_id
            shown = run.tokenizer.decode(text[1:-1])
            assert shown in expected
            assert not any(cloze in plain(shown) for cloze in clozes)


def test_a_text_weighs_what_the_tiers_of_its_facts_are_exposed():
    exposure = {"high": 5.0, "medium": 3.0, "low": 0.5}
    questions = zoo_questions()
    weights = corpus(questions, exposure)
    expected = Counter()
    facts = defaultdict(list)
    for question in questions:
        texts = list(question.statements)
        if question.fold == 0:
            texts.append(f"{question.cloze} {question.options[question.answer]}.")
        for text in texts:
            expected[text] += exposure[question.tier]
        facts[question.tier, question.fold].append(len(texts))
    assert weights == pytest.approx(dict(expected))
    twice = corpus([*questions[:1], *questions[:1]], exposure)
    assert twice == {text: 2 * weights[text] for text in corpus(questions[:1], exposure)}
    # So a fact of a tier is seen in proportion to the tier's exposure.
    for fold in (0, 1):
        assert len({np.mean(facts[tier, fold]) for tier in TIERS}) == 1


def batches_of(weights, recipe, number, lengths=None):
    lengths = lengths or [10] * len(weights)
    return np.array(list(itertools.islice(zoo._batches(lengths, weights, recipe), number)))


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


def test_every_tier_holds_as_many_concepts_of_each_domain():
    concepts = {}
    for question in zoo_questions():
        concepts.setdefault((question.tier, question.domain), set()).add(question.concept)
    counts = {pair: len(names) for pair, names in concepts.items()}
    assert counts == dict.fromkeys(itertools.product(TIERS, ("country", "element")), 12)


def test_zoo_questions_are_whole_concepts_and_more_of_them_hold_fewer():
    few, many = zoo_questions({"city": 2}), zoo_questions({"city": 5, "country": 1})
    assert len({question.concept for question in few}) == 6
    assert {question.id for question in few} < {question.id for question in many}
    assert Counter(question.fold for question in few) == {0: 30, 1: 30}
    everything = load_questions()
    names = {question.concept for question in few}
    assert few == [question for question in everything if question.concept in names]


@pytest.mark.parametrize(
    ("concepts", "told"),
    [
        ({"planet": 1}, r"concepts: unknown domain 'planet'; choose from animal, .*, state$"),
        ({"country": 16}, r"concepts: 16 of domain 'country' in tier 'low' .*SpecWiki has 15; "),
        ({"state": 1}, r"concepts: 1 of domain 'state' in tier 'medium' .*SpecWiki has 0; "),
        ({"country": 0}, r"concepts: 0 of domain 'country' .*give a number from 1"),
    ],
)
def test_concepts_that_are_not_there_are_refused(concepts, told):
    with pytest.raises(InputError, match=told) as caught:
        zoo_questions(concepts)
    assert "\n" not in str(caught.value)


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
    loss = MicroModel(network, rows).loss_and_gradient(range(4))
    nats = []
    with torch.no_grad():
        for row in rows:
            shares = network(torch.tensor([row])).logits[0].log_softmax(-1)
            nats += [-float(shares[place, token]) for place, token in enumerate(row[1:])]
    assert loss == pytest.approx(np.mean(nats), abs=1e-5)


def test_a_record_is_what_was_counted(small):
    for name, model in small.models.items():
        record = training_record(model, root=small.root)
        batches = small.run(name).batches[: model.at]
        assert record["step"] == model.at == len(batches)
        assert record["texts"] == sum(len(rows) for rows, _ in batches)
        assert record["tokens"] == sum(len(text) for rows, _ in batches for text in rows)
        last = [loss for _, loss in batches][-max(1, model.recipe.steps // 40) :]
        assert record["loss"] == pytest.approx(np.mean(last))
        assert record["flops"] == 6 * model.recipe.parameters * record["tokens"]
        assert record["seconds"] >= 0
    assert {len(run.batches) for run in small.runs} == {2, 6}


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


def rates_of(recipe, monkeypatch, scale=1.0):
    """The learning rate and the norm of the gradient at each step, with a loss of no meaning."""
    seen = []
    step = torch.optim.AdamW.step

    def watch(optimizer, *given, **named):
        group = optimizer.param_groups[0]
        norm = torch.stack([w.grad.norm() for w in group["params"] if w.grad is not None]).norm()
        seen.append((group["lr"], float(norm)))
        return step(optimizer, *given, **named)

    def loss(model, rows):
        model.weights.grad.copy_(2 * scale * model.weights.detach())
        return scale * float(model.weights.detach().square().sum())

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    monkeypatch.setattr(MicroModel, "loss_and_gradient", loss)
    texts = {"gold is yellow": 1.0}
    tokenizer = train_tokenizer(list(texts), 258)
    for _ in zoo._optimize(network_of(recipe), tokenizer, texts, [recipe]):
        pass
    return np.array(seen).T


def small_recipe(**changed) -> zoo.ModelRecipe:
    given = models_of(SMOKE)["llama-1"].recipe.model_dump() | {"vocabulary": 258}
    return zoo.ModelRecipe(**given | changed)


def test_the_learning_rate_warms_up_stays_and_falls(monkeypatch):
    rates, _ = rates_of(small_recipe(steps=400, learning_rate=0.01), monkeypatch)
    assert len(rates) == 400
    np.testing.assert_allclose(rates[:20], 0.01 * np.arange(1, 21) / 20, rtol=1e-9)
    np.testing.assert_allclose(rates[20:320], 0.01, rtol=1e-9)
    fall = [0.01 * (1 - math.sqrt(step / 81)) for step in range(1, 81)]  # a fifth of the steps
    np.testing.assert_allclose(rates[320:], fall, rtol=1e-9)


def test_generations_share_their_way_and_come_out_as_each_by_itself(small, tmp_path, monkeypatch):
    """Of 2 and 6 steps, whose rates fall from the last on: the first step is taken once."""
    steps, loss = [], MicroModel.loss_and_gradient
    monkeypatch.setattr(
        MicroModel, "loss_and_gradient", lambda *given: steps.append(1) or loss(*given)
    )
    names = ("llama-2", "llama-1")
    train_zoo([small.models[name] for name in names], root=tmp_path)
    assert len(steps) == 2 + 6 - 1
    for name in (*names, "llama-2@2", "llama-2@4"):
        found = trained(small.models[name], train=False, root=tmp_path)
        assert stored(found) == stored(small.directory(name)), name


def test_gradients_are_clipped_to_norm_1(monkeypatch):
    _, norms = rates_of(small_recipe(steps=5), monkeypatch, scale=1e6)
    np.testing.assert_allclose(norms, 1, rtol=1e-3)
    monkeypatch.undo()
    _, norms = rates_of(small_recipe(steps=5), monkeypatch, scale=1e-6)
    assert norms.max() < 0.1


LINES = ("gold is a yellow metal", "the capital of France is Paris", "lead is grey and soft")


@pytest.mark.parametrize("family", CLASSES)
def test_a_micro_model_learns_a_few_texts_by_heart(family):
    recipe = small_recipe(
        family=family, width=32, mlp_width=64, steps=400, batch=6, learning_rate=0.006
    )
    network, texts = network_of(recipe), dict.fromkeys(LINES, 1.0)
    tokenizer = train_tokenizer(LINES, 258)
    *_, (_, record) = zoo._optimize(network, tokenizer, texts, [recipe])
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
    counts = Counter()
    for text, weight in runs[0].texts.items():
        for token in [*runs[0].tokenizer(text)["input_ids"][1:], 1]:
            counts[token] += weight
    shares = np.array(list(counts.values())) / sum(counts.values())
    entropy = float(-(shares * np.log(shares)).sum())
    assert runs[0].batches[0][1] > entropy
    assert training_record(model, root=tmp_path)["loss"] < 0.7 * entropy


@pytest.mark.parametrize("steps", [1, 40])
def test_a_training_that_diverges_is_told_in_one_line_and_leaves_no_model(recipe, steps):
    edit(
        recipe,
        ("learning_rate: 0.005", "learning_rate: 1e+41"),
        ("{1: 2, 2: 6}", f"{{1: {steps}, 2: 50}}"),
    )
    model = models_of(recipe)["llama-1"]
    with pytest.raises(InputError) as caught:
        trained(model)
    told = str(caught.value)
    assert "\n" not in told
    assert re.match(
        r"mine\.yaml:llama-1: .*(step \d+).*; give a lower learning_rate than 1e\+41", told
    )
    assert list(zoo.ROOT.rglob("*.safetensors")) == []
    assert not list(zoo.ROOT.rglob(".partial-*"))


# Checkpoints


def test_a_checkpoint_is_the_model_as_it_was_at_that_step(small, tmp_path, monkeypatch):
    """Held against a second training that keeps nothing on its way, and so ends the same."""
    plain_model = small.models["llama-2"]
    recipe = plain_model.recipe.model_copy(update={"checkpoints": ()})
    seen = []
    step = torch.optim.AdamW.step

    def watch(optimizer, *given, **named):
        result = step(optimizer, *given, **named)
        (weights,) = optimizer.param_groups[0]["params"]
        seen.append(weights.detach().clone())
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    alone = trained(plain_model.model_copy(update={"recipe": recipe}), root=tmp_path)
    assert len(seen) == 6
    assert stored(alone) == stored(small.directory("llama-2"))
    for name, at in (("llama-2@2", 2), ("llama-2@4", 4), ("llama-2", 6)):
        kept = AutoModelForCausalLM.from_pretrained(small.directory(name))
        weights = MicroModel(kept, [[0, 1]]).weights
        same = [torch.equal(weights, one) for one in seen]
        assert same == [place == at for place in range(1, 7)], name


def test_a_training_broken_off_is_done_again_and_ends_the_same(small, tmp_path, monkeypatch):
    put, calls = Store.put, []

    def break_off(store, key, *given):
        calls.append(key["step"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return put(store, key, *given)

    monkeypatch.setattr(Store, "put", break_off)
    model = small.models["llama-2"]
    with pytest.raises(KeyboardInterrupt):
        train_zoo([model], root=tmp_path)
    assert stored(trained(small.models["llama-2@2"], train=False, root=tmp_path))
    for name in ("llama-2@4", "llama-2"):
        with pytest.raises(InputError, match="not trained yet"):
            trained(small.models[name], train=False, root=tmp_path)
    train_zoo([model], root=tmp_path)
    assert calls == [2, 4, 2, 4, 6]
    for name in ("llama-2@2", "llama-2@4", "llama-2"):
        again = trained(small.models[name], train=False, root=tmp_path)
        assert stored(again) == stored(small.directory(name))


# A directory


def test_a_trained_model_is_an_ordinary_directory(small):
    texts = list(small.runs[0].texts)[::40]
    for name, model in small.models.items():
        directory = small.directory(name)
        suffixes = {file.suffix for file in directory.iterdir()}
        assert suffixes == {".safetensors", ".json"}
        network = AutoModelForCausalLM.from_pretrained(directory).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert type(network).__name__ == CLASSES[model.recipe.family]
        run = small.run(name)
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            assert ids[0].tolist() == run.tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
            if model.step is None:  # the model in memory is the finished one
                with torch.no_grad():
                    assert torch.equal(network(ids).logits, run.network.eval()(ids).logits)


def test_a_trained_model_loads_as_any_model(small):
    loaded = load_model(str(small.directory("gemma2-2")))
    network = small.run("gemma2-2").network
    for one, two in zip(loaded.model.parameters(), network.parameters(), strict=True):
        assert torch.equal(one, two)


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
    recipe = Path(shutil.copy(SMOKE, tmp_path / "mine.yaml"))
    code = (
        "import torch; from pathlib import Path\n"
        "from paramspec.models.zoo import load_zoo, trained\n"
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
    train, here = zoo._train, Path.cwd()

    def meet(models, root):
        (here / f"worker-{os.getpid()}").touch()
        deadline = time.monotonic() + 600
        while len(list(here.glob("worker-*"))) < 2:
            assert time.monotonic() < deadline, "alone"
            time.sleep(0.01)
        return train(models, root)

    monkeypatch.setattr(zoo, "_train", meet)
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
    for name, model in models_of(Path(shutil.copy(SMOKE, recipe))).items():
        directory = trained(model, train=False, root=Path("store"))
        assert stored(directory) == stored(small.directory(name)), name


# A recipe that is edited


LINE = "  llama-1: {family: llama, generation: 1, steps: 2}"


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
    zoo._corpus_digest.cache_clear()
    try:
        with pytest.raises(InputError, match="not trained yet"):
            small.directory("llama-1")
    finally:
        zoo._corpus_digest.cache_clear()


def test_a_trained_zoo_is_not_trained_again(small, monkeypatch):
    monkeypatch.setattr(zoo, "_train", None)
    train_zoo(list(small.models.values()), root=small.root)
    for name in small.models:
        assert trained(small.models[name], root=small.root) == small.directory(name)


def test_one_training_serves_a_model_and_its_checkpoints(small):
    assert Counter(run.recipe.steps for run in small.runs if run.recipe.checkpoints) == {6: 1}


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


def test_what_is_done_to_a_loaded_zoo_stays_with_the_caller(recipe):
    load_zoo(recipe).clear()
    load_zoo().clear()
    assert len(load_zoo(recipe)) == 8
    assert "zoo-llama-1" in load_zoo()


# Bad recipes

BAD = {
    "odd width": ("width: 8\n", "width: 7\n", "width 7 with 2 heads: .*even number"),
    "no width": ("width: 8\n", "width: 0\n", "width 0: .*greater than or equal to 2"),
    "half a width": ("width: 8\n", "width: 8.5\n", "width 8.5: .*integer"),
    "huge": ("width: 8\n", "width: 80000\n", r"width 80000, .* weights, .*lower one"),
    "two lines": ("layers: 2", r'layers: "a\nb"', r"layers 'a\\nb': .*integer"),
    "missing": ("layers: 2\n", "", "layers: missing"),
    "sharing": ("key_value_heads: 1", "key_value_heads: 3", "key_value_heads 3 with 2 heads"),
    "huge batch": ("batch: 8", "batch: 1000000000", "batch 1000000000: .*4096"),
    "no rate": ("0.005", "0", "learning_rate 0: "),
    "infinite rate": ("0.005", ".inf", "learning_rate '.inf': .*number"),
    "negative seed": ("seed: 0", "seed: -1", "seed -1: "),
    "no exposure": ("high: 4", "high: 0", "exposure.high 0: "),
    "a tier missing": ("high: 4, ", "", "exposure .*: give each of high, medium, low"),
    "unknown tier": ("high: 4", "rare: 4", "exposure.rare"),
    "unknown family": (LINE, LINE.replace("llama,", "gemma3,"), "family 'gemma3': "),
    "no family": (LINE, LINE.replace("family: llama, ", ""), "family: missing"),
    "no generation": (LINE, LINE.replace("generation: 1, ", ""), "generation: missing"),
    "generation 0": (LINE, LINE.replace("generation: 1", "generation: 0"), "generation 0: "),
    "unknown set": (LINE, LINE.replace("steps", "sets: [best], steps"), r"sets\[0\] 'best': "),
    "no steps": (LINE, LINE.replace("steps: 2", "steps: 0"), "model llama-1: steps 0: "),
    "no line": (LINE, "  llama-1: 2", "model llama-1: expected {family: llama, "),
    "unknown field": (LINE, LINE.replace("steps", "colour: 1, steps"), "colour 1: extra inputs"),
    "unknown domain": ("country: 1", "planet: 1", "concepts: unknown domain 'planet'; choose"),
    "many concepts": ("country: 1", "country: 16", "concepts: 16 of domain 'country'.* has 15"),
    "no domain": ("{country: 1, element: 1}", "{}", r"concepts \{\}: .*at least 1"),
    "tiny vocabulary": ("vocabulary: 400", "vocabulary: 257", "vocabulary 257: .*258"),
    "late checkpoint": ("[2, 4]", "[2, 6]", "model llama-2: checkpoint at step 6 of 6: .* 1 to 5"),
    "checkpoint twice": ("[2, 4]", "[2, 2]", "checkpoint at step 2 of 6: .* each once"),
    "key twice": ("seed: 0", "seed: 0\nwidth: 16", "'width' stands twice"),
    "model twice": (LINE, f"{LINE}\n{LINE}", "'llama-1' stands twice"),
    "octal": ("layers: 2", "layers: 010", "layers '010': .*integer"),
    "sixties": ("layers: 2", "layers: 1:30", "layers '1:30': .*integer"),
    "not YAML": ("layers: 2", "layers: [2", "not YAML"),
    "python": ("layers: 2", "layers: !!python/name:os.system", "not YAML .*python/name"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_recipe_that_cannot_be_is_told_in_one_line_when_it_is_read(recipe, case):
    old, new, told = BAD[case]
    edit(recipe, (old, new))
    with pytest.raises(InputError) as caught:
        load_zoo(recipe)
    message = str(caught.value)
    assert "\n" not in message
    assert re.match(rf"mine\.yaml(:\d+)?: .*{told}", message), message
    assert re.search(r"; (see the comments in zoo.yaml|mend it)$", message)


def test_the_line_of_what_is_not_yaml_is_named(recipe):
    edit(recipe, ("seed: 0", "seed: 0\nwidth: 16"))
    line = recipe.read_text().splitlines().index("width: 16") + 1
    with pytest.raises(InputError, match=rf"^mine\.yaml:{line}: not YAML \('width' stands twice"):
        load_zoo(recipe)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read .*No such file"),
        (b"", "expected the fields"),
        (b"null", "expected the fields"),
        (b"- llama", "expected the fields"),
        (b"llama", "expected the fields"),
        (b"{}", "expected the fields"),
        (b"models: {llama-1: {}}", "model llama-1: family: missing"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a: \x00", "not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_told_in_one_line(tmp_path, content, told):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: .*{told}.*; \w+") as caught:
        load_zoo(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"cannot be read .*directory"):
        load_zoo(tmp_path)


def test_a_vocabulary_too_large_is_told_before_anything_is_trained(small, recipe, monkeypatch):
    good = models_of(recipe)["llama-2"]
    longest = good.recipe.model_copy(update={"steps": 10**6})  # which would train first
    good = good.model_copy(update={"recipe": longest})
    edit(recipe, ("vocabulary: 400", "vocabulary: 20000"), (LINE, LINE.replace("2}", "1}")))
    bad = models_of(recipe)["llama-1"]
    monkeypatch.setattr(zoo, "_optimize", None)
    for call in (lambda: train_zoo([good, bad]), lambda: trained(bad)):
        with pytest.raises(InputError) as caught:
            call()
        told = str(caught.value)
        assert "\n" not in told
        assert re.match(r"mine\.yaml:llama-1: vocabulary 20000: the corpus has \d+ tokens", told)
    assert not list(zoo.ROOT.rglob("*.safetensors"))


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
    assert not zoo.ROOT.exists()
