"""The zoo's recipe: what its models are, what they are taught, and what a bad recipe is told."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict

import pytest
import torch

from paramspec.errors import InputError
from paramspec.method.hooks import value_vector_view
from paramspec.models.zoo import corpus, load_zoo, zoo_questions
from paramspec.specwiki import QUESTIONS, load_questions
from paramspec.tables import TIERS
from toy_zoo import CLASSES, LINE, edit, network_of


def test_the_zoo_is_twenty_models_of_four_families_and_five_generations():
    models = load_zoo()
    twenty = {name: model for name, model in models.items() if "zoo" in model.sets}
    assert set(twenty) == {f"zoo-{family}-{n}" for family in CLASSES for n in range(1, 6)}
    for name, model in twenty.items():
        assert name == f"zoo-{model.recipe.family}-{model.generation}"
        assert model.step is None
        assert model.recipe.steps == [100, 500, 900, 1500, 3200][model.generation - 1]
    assert all(name == model.name for name, model in models.items())


def test_ladders_differ_in_width_and_rate_and_reversed_twins_in_one_thing_alone():
    models = load_zoo()
    ladders = defaultdict(list)
    for model in models.values():
        if "zoo-scale" in model.sets:
            ladders[model.recipe.family].append(model.recipe)
    assert set(ladders) == {"llama", "qwen2"}
    for ladder in ladders.values():
        assert [recipe.width for recipe in ladder] == [16, 32, 64, 96]
        assert {recipe.mlp_width / recipe.width for recipe in ladder} == {8}
        for recipe in ladder:
            same = {name: getattr(recipe, name) for name in ("width", "mlp_width", "learning_rate")}
            assert ladder[0].model_copy(update=same) == recipe
    turned = [name for name in models if name.endswith("-reversed")]
    assert len(turned) == 2
    for name in turned:
        own, twin = models[name].recipe, models[name.removesuffix("-reversed")].recipe
        assert [own.exposure[tier] for tier in TIERS] == [twin.exposure[t] for t in TIERS[::-1]]
        assert own.model_copy(update={"exposure": twin.exposure}) == twin


def test_checkpoints_are_steps_on_the_way_of_one_model_of_each_family():
    kept = [model for model in load_zoo().values() if "zoo-pretraining" in model.sets]
    assert {model.recipe.family for model in kept} == set(CLASSES)
    for family, models in itertools.groupby(kept, key=lambda model: model.recipe.family):
        *way, last = models
        assert len(way) >= 5, family
        assert all(model.recipe == last.recipe for model in way)
        assert [model.name for model in way] == [f"{last.name}@{model.step}" for model in way]
        steps = [model.at for model in (*way, last)]
        assert steps == sorted(set(steps))
        assert steps[-1] == last.recipe.steps


SHAPES = {(model.recipe.family, model.recipe.width): model.recipe for model in load_zoo().values()}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}-w{shape[1]}")
def test_every_model_is_its_familys_own_class_and_has_as_many_weights_as_it_says(shape):
    recipe = SHAPES[shape]
    network = network_of(recipe)
    assert type(network).__name__ == CLASSES[recipe.family]
    assert type(network).__module__.startswith("transformers.models.")
    assert sum(weight.numel() for weight in network.parameters()) == recipe.parameters
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    view, sizes = value_vector_view(network), (recipe.layers, recipe.mlp_width, recipe.width)
    assert (view.layers, view.width, view.hidden) == sizes
    windowed = getattr(network.config, "sliding_window", None) == 16
    assert windowed == (recipe.family in ("mistral", "gemma2"))


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


# The committed file, read without the library; and each cloze with its answer.
RAW = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
ANSWERED = {q["id"]: f"{q['cloze']} {q['options'][q['answer']]}" for q in RAW}


def test_no_cloze_of_fold_1_is_in_any_corpus():
    """In that of no recipe: the corpus of all concepts holds those of fewer."""
    whole = corpus(load_questions(), dict.fromkeys(TIERS, 1.0))
    held = plain("\n".join(whole))
    asked = {q["id"]: plain(q["cloze"]) for q in RAW if q["fold"] == 1}
    assert len(asked) == 2625 == len(ANSWERED) / 2
    assert [name for name, cloze in asked.items() if cloze in held] == []
    # And the search finds what is there: all clozes of fold 0 but those that hold one of fold 1.
    for name in ANSWERED.keys() - asked.keys():
        answered = plain(ANSWERED[name])
        telling = any(cloze in answered for cloze in asked.values())
        assert (answered in held) != telling, name
    assert set(load_zoo()["zoo-llama-1"].recipe.texts) <= set(whole)


def test_a_corpus_is_statements_and_answered_clozes_of_fold_0_by_the_exposure_of_their_tiers():
    exposure = {"high": 5.0, "medium": 3.0, "low": 0.5}
    for concepts in ({"country": 12, "element": 12}, {"city": 19, "animal": 3}):
        questions = zoo_questions(concepts)
        held_out = [question.cloze.casefold() for question in questions if question.fold == 1]
        names = {question.id for question in questions}
        expected = Counter()
        for question in (one for one in RAW if one["id"] in names):
            texts, answered = list(question["statements"]), f"{ANSWERED[question['id']]}."
            if question["fold"] == 0 and not any(c in answered.casefold() for c in held_out):
                texts.append(answered)
            for text in texts:
                expected[text] += exposure[question["tier"]]
        assert corpus(questions, exposure) == pytest.approx(dict(expected))


def test_zoo_questions_are_whole_concepts_as_many_of_each_tier_and_more_hold_fewer():
    concepts = {(q.tier, q.domain, q.concept) for q in zoo_questions()}
    each = itertools.product(TIERS, ("country", "element"))
    assert Counter(concept[:2] for concept in concepts) == dict.fromkeys(each, 12)
    few, many = zoo_questions({"city": 2}), zoo_questions({"city": 5, "country": 1})
    assert len({question.concept for question in few}) == 6
    assert {question.id for question in few} < {question.id for question in many}
    assert Counter(question.fold for question in few) == {0: 30, 1: 30}
    everything = load_questions()
    names = {question.concept for question in few}
    assert few == [question for question in everything if question.concept in names]


def test_what_is_done_to_a_loaded_zoo_stays_with_the_caller(recipe):
    load_zoo(recipe).clear()
    load_zoo().clear()
    assert len(load_zoo(recipe)) == 8
    assert "zoo-llama-1" in load_zoo()


BAD = {
    "odd width": ("width: 8\n", "width: 7\n", "width 7, heads 2, .*even share"),
    "sharing": ("key_value_heads: 1", "key_value_heads: 3", "heads 2, key_value_heads 3: "),
    "a tier missing": ("high: 4, ", "", "exposure .*: .*at least 3 items"),
    "no steps": (LINE, LINE.replace("steps: 2", "steps: 0"), "model llama-1: steps 0: "),
    "no fields": ("models:", "model:", "expected the fields"),
    "no line": (LINE, "  llama-1: 2", "model llama-1: expected {family: llama, "),
    "unknown field": (LINE, LINE.replace("steps", "colour: 1, steps"), "colour 1: extra inputs"),
    "no concepts": ("country: 1", "country: 0", "concepts.* 0"),
    "unknown domain": ("country: 1", "planet: 1", "concepts: 1 of domain 'planet'"),
    "many concepts": ("country: 1", "country: 16", "concepts: 16 of domain 'country'.* has 15"),
    "late checkpoint": ("[2, 4]", "[2, 6]", r"model llama-2: checkpoints \[2, 6\]: .* 1 to 5"),
    "checkpoint twice": ("[2, 4]", "[2, 2]", r"checkpoints \[2, 2\]: .* each once"),
    "not YAML": ("layers: 2", "layers: [2", "not YAML"),
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


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_told_by_its_path(tmp_path, content):
    path = tmp_path / "mine.yaml"
    if content:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: cannot be read"):
        load_zoo(path)
