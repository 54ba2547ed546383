"""Training the zoo: what models are shown, and that their recipe alone decides their weights."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
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
from paramspec.models.zoo import load_zoo, zoo_questions
from paramspec.models.zoo_training import (
    ROOT,
    own_tokenizer,
    read_record,
    train_tokenizer,
    train_zoo,
    trained,
)
from paramspec.specwiki import load_questions
from paramspec.studies.sweep import measure_pss
from paramspec.tables import TIERS
from toy_zoo import CLASSES, LINE, SMOKE, copy_recipe, edit, models_of, network_of


def stored(directory: Path) -> dict[str, bytes]:
    """The files of a model, without those that tell of its training and of its storing."""
    ours = ("training.json", "key.json", "checksums.json", "computed.json")
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name not in ours}


Steps = list[tuple[list[list[int]], float, list[torch.Tensor]]]


@contextlib.contextmanager
def watched() -> Iterator[Steps]:
    """Of each step that is trained in this process: texts, loss, and the weights after it."""
    steps, train_step = [], zoo_training._train_step

    def watch(network, optimizer, texts, rate):
        loss = train_step(network, optimizer, texts, rate)
        steps.append((texts, loss, [weight.detach().clone() for weight in network.parameters()]))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo_training, "_train_step", watch)
        yield steps


@dataclass
class Small:
    """The smallest zoo, each model trained by itself."""

    root: Path
    models: dict[str, zoo.ZooModel]
    runs: dict[str, Steps]

    def directory(self, name: str, root: Path | None = None) -> Path:
        return trained(self.models[name], train=False, root=root or self.root)

    def require_same(self, root: Path, *names: str) -> None:
        """Models of another store, byte by byte as they are here."""
        for name in names:
            assert stored(self.directory(name, root)) == stored(self.directory(name)), name


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Small:
    folder = tmp_path_factory.mktemp("zoo")
    small = Small(folder / "store", models_of(copy_recipe(folder)), {})
    for name, model in small.models.items():
        with watched() as small.runs[name]:
            train_zoo([model], root=small.root)
    return small


def refusal(call) -> str:
    """The one line that a call refuses with."""
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_are_shown_their_corpus_and_nothing_else(small):
    clozes = [q.cloze.casefold() for q in load_questions() if q.fold == 1]
    for name, run in small.runs.items():
        model = small.models[name]
        tokenizer = own_tokenizer(model)
        for text in itertools.chain(*(texts for texts, *_ in run)):
            assert (text[0], text[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
            shown = tokenizer.decode(text[1:-1])
            assert shown in model.recipe.texts
            assert not any(cloze in shown.casefold() for cloze in clozes)


def batches_of(weights, number, lengths, **changed):
    recipe = load_zoo()["zoo-llama-1"].recipe.model_copy(update=changed)
    drawn = zoo_training._batches(lengths, weights, recipe)
    return np.array(list(itertools.islice(drawn, number)))


def test_batches_draw_texts_by_weight_and_seed():
    texts = load_zoo()["zoo-llama-1"].recipe.texts
    weights, lengths = list(texts.values()), list(map(len, texts))
    drawn = batches_of(weights, 4000, lengths)
    assert np.array_equal(drawn[:20], batches_of(weights, 20, lengths))
    assert not np.array_equal(drawn[:20], batches_of(weights, 20, lengths, seed=9))
    counts = np.bincount(drawn.ravel(), minlength=len(texts))
    assert counts.sum() == 4000 * 32
    shares = np.array(weights) / sum(weights)
    assert chisquare(counts, shares * counts.sum()).pvalue > 1e-3
    tiers = {text: q.tier for q in zoo_questions() for text in q.statements}
    seen = Counter()
    for text, count in zip(texts, counts, strict=True):
        seen[tiers.get(text)] += count
    # About 55,000 statements of the highest tier, and a relative error of 1 % is 5 sigma.
    assert seen["high"] / seen["low"] == pytest.approx(4, rel=0.04)
    assert seen["medium"] / seen["low"] == pytest.approx(2, rel=0.04)


def test_batches_hold_texts_of_like_length_in_no_order():
    lengths = np.random.default_rng(0).integers(5, 60, 500).tolist()
    drawn = np.array(lengths)[batches_of([1.0] * 500, 320, lengths)]
    padded = 1 - drawn.sum() / (drawn.max(axis=1) * drawn.shape[1]).sum()
    assert padded < 0.1  # of unsorted batches, it is 0.45
    # Sorted batches would rise in length within their block, and so correlate with their place.
    places = np.tile(np.arange(16), 20)
    assert abs(np.corrcoef(places, drawn.mean(axis=1))[0, 1]) < 0.25


def test_the_tokenizer_gives_every_text_back():
    texts = list(load_zoo()["zoo-llama-1"].recipe.texts)
    tokenizer = train_tokenizer(texts, 1000)
    assert len(tokenizer) == tokenizer.vocab_size == 1000
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1]  # as `architecture` has them
    for text in [*texts, "Łódź, 東京 and a\ttab"]:
        tokens = tokenizer(text)["input_ids"]
        assert tokens[0] == 0
        assert not {0, 1} & set(tokens[1:])
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    (marked,) = token_ids(tokenizer, ["a <s>b</s>"])
    assert marked[0] == 0
    assert not {0, 1} & set(marked[1:])
    again = train_tokenizer(texts, 1000)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_vocabulary_that_the_corpus_cannot_fill_is_refused():
    texts = ["gold is yellow", "gold is heavy"]
    told = refusal(lambda: train_tokenizer(texts, 5000))
    most = int(re.search(r"vocabulary 5000: the corpus has (\d+) tokens", told)[1])
    assert len(train_tokenizer(texts, most)) == most
    assert f"vocabulary {most + 1}" in refusal(lambda: train_tokenizer(texts, most + 1))


@pytest.mark.parametrize("family", CLASSES)
def test_a_step_follows_the_mean_loss_of_each_text_by_itself_its_gradient_cut_to_norm_1(family):
    network = network_of(load_zoo()[f"zoo-{family}-1"].recipe)
    draw = np.random.default_rng(0)
    rows = [[0, *draw.integers(2, 2048, length).tolist(), 1] for length in (3, 40, 17, 1)]
    nats = []
    for row in rows:
        shares = network(torch.tensor([row])).logits[0].log_softmax(-1)
        nats += [-shares[place, token] for place, token in enumerate(row[1:])]
    expected = torch.stack(nats).mean()
    weights = list(network.parameters())
    gradients = torch.autograd.grad(expected, weights)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert norm > 1.1  # or the test could not fail
    before = [weight.detach().clone() for weight in weights]
    loss = zoo_training._train_step(network, torch.optim.SGD(weights), rows, 0.1)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    for weight, old, gradient in zip(weights, before, gradients, strict=True):
        torch.testing.assert_close(weight, old - 0.1 * gradient / norm, rtol=0, atol=1e-5)


def test_a_record_is_what_was_counted(small):
    for name, model in small.models.items():
        record, steps = read_record(small.directory(name)), small.runs[name]
        assert record.step == model.at == len(steps)
        assert record.tokens == sum(len(text) for texts, *_ in steps for text in texts)
        last = [loss for _, loss, _ in steps][-max(1, model.recipe.steps // 40) :]
        assert record.loss == pytest.approx(np.mean(last))
        assert record.concepts == model.recipe.taught


def test_the_learning_rate_warms_up_stays_and_falls():
    changed = {"steps": 400, "learning_rate": 0.01}
    recipe = models_of(SMOKE)["llama-1"].recipe.model_copy(update=changed)
    rates = [recipe.rate(step) for step in range(1, 401)]
    np.testing.assert_allclose(rates[:20], 0.01 * np.arange(1, 21) / 20, rtol=1e-9)
    np.testing.assert_allclose(rates[20:320], 0.01, rtol=1e-9)
    fall = [0.01 * (1 - math.sqrt(step / 81)) for step in range(1, 81)]  # a fifth of the steps
    np.testing.assert_allclose(rates[320:], fall, rtol=1e-9)


def test_generations_share_their_way_and_come_out_as_each_by_itself(small, tmp_path):
    """Of 2 and 6 steps, whose rates fall from the last on: the first step is taken once."""
    names = ("llama-2", "llama-1", "llama-2@4", "llama-2@2")
    with watched() as steps:
        train_zoo([small.models[name] for name in names], root=tmp_path)
    assert len(steps) == 2 + 6 - 1
    small.require_same(tmp_path, *names)


@pytest.mark.parametrize("steps", [1, 40])
def test_a_training_that_diverges_is_told_in_one_line_and_leaves_no_model(recipe, steps):
    edit(recipe, ("0.005", "1e+41"), (LINE, LINE.replace("steps: 2", f"steps: {steps}")))
    told = refusal(lambda: trained(models_of(recipe)["llama-1"]))
    assert re.match(rf"mine\.yaml:llama-1: .*step {steps}; .* learning_rate than 1e\+41", told)
    assert list(ROOT.rglob("*.safetensors")) == list(ROOT.rglob(".partial-*")) == []


def test_a_checkpoint_is_the_model_as_it_was_at_that_step(small):
    """Held against a training that keeps nothing on its way."""
    for name, at in (("llama-2@2", 2), ("llama-2@4", 4), ("llama-2", 6)):
        kept = list(AutoModelForCausalLM.from_pretrained(small.directory(name)).parameters())
        same = [all(map(torch.equal, kept, weights)) for *_, weights in small.runs["llama-2"]]
        assert same == [place == at for place in range(1, 7)], name


def test_checkpoints_on_the_way_are_kept_with_a_model_and_trained_once(
    small, tmp_path, monkeypatch
):
    train_zoo([small.models["llama-2"]], root=tmp_path)
    monkeypatch.setattr(zoo_training, "_train", None)
    train_zoo(list(small.models["llama-2"].kept), root=tmp_path)
    small.require_same(tmp_path, "llama-2@2", "llama-2@4", "llama-2")


def test_a_training_that_another_process_does_is_left_to_it(small, tmp_path):
    model, store = small.models["llama-2"], Store(tmp_path)
    with store.turn({"unit": "zoo trunk", "trunk": model.recipe.trunk}):
        assert zoo_training._train([model], store, False) == 0
    assert zoo_training._train([model], store, False) == 1
    small.require_same(tmp_path, "llama-2")


def test_a_trained_model_is_an_ordinary_directory(small):
    text = "The capital of France is Paris"
    for name, model in small.models.items():
        directory = small.directory(name)
        assert {file.suffix for file in directory.iterdir()} == {".safetensors", ".json"}
        network = AutoModelForCausalLM.from_pretrained(directory).eval()
        assert type(network).__name__ == CLASSES[model.recipe.family]
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert ids[0].tolist() == own_tokenizer(model)(text)["input_ids"]
        with torch.no_grad():
            loaded = load_model(str(directory)).model
            assert torch.equal(network(ids).logits, loaded(ids).logits)


def test_a_trained_model_says_what_trained_it_and_a_study_of_it_too(small, tmp_path):
    path, model = small.directory("gemma2-2"), small.models["gemma2-2"]
    record = read_computed(path)
    assert (record["model"], record["hardware"]["threads"]) == (model.name, 1)
    choices = Choices(ratios=(0.1,), folds=(1,), general=2, nulls=(), controls=0)
    questions = zoo_questions(model.recipe.concepts)
    study = measure_pss([str(path)], questions, choices, store=Store(tmp_path))
    made = {unit: one for one in study.run["models"][0]["computed"] for unit in one["units"]}
    assert set(made) == {"pss", "coefficients", "answers", "zoo"}
    same = ("versions", "hardware")
    assert all(made["zoo"][name] == record[name] for name in same)


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
    assert "model.safetensors" in stored(again)
    small.require_same(tmp_path, "gemma2-2")


def test_every_model_has_weights_of_its_own(small):
    """Llama's and Mistral's classes differ in the window alone: their seeds must differ, too."""
    assert len({load_zoo()[f"zoo-{family}-1"].recipe.seed for family in CLASSES}) == len(CLASSES)
    weights = {name: stored(small.directory(name))["model.safetensors"] for name in small.models}
    assert len(set(weights.values())) == len(weights)


def test_models_train_side_by_side_and_come_out_the_same_and_once(small, recipe, monkeypatch):
    models, root = list(models_of(recipe).values()), Path("store")
    try:
        with workers(jobs=2):
            train_zoo(models, root=root)
            worse = list(models_of(edit(recipe, ("0.005", "1e+39"))).values())
            told = refusal(lambda: train_zoo(worse, root=root))
            assert re.match(r"mine\.yaml:\S+: .*lower learning_rate", told)
    finally:
        joblib.externals.loky.get_reusable_executor().shutdown()
    small.require_same(root, *small.models)
    monkeypatch.setattr(zoo_training, "_train", None)
    train_zoo(models, root=root)


FIELDS = (("vocabulary", 400, 401), ("layers", 2, 1), ("heads", 2, 1), ("key_value_heads", 1, 2))
FIELDS += (("batch", 8, 9), ("learning_rate", 0.005, 0.006), ("seed", 0, 1))


@pytest.mark.parametrize(
    ("old", "new", "anew"),
    [
        ("# The smallest zoo", "# My own zoo", ""),
        ("{country: 1, element: 1}", "{element: 1, country: 1}", ""),
        ("low: 1}", "low: 1.0}", ""),
        (LINE, "  llama-1: {steps: 2, sets: [zoo-scale], generation: 7, family: llama}", ""),
        (LINE, f"{LINE}\n  qwen2-1: {{family: qwen2, generation: 1, steps: 2}}", "qwen2-1"),
        (LINE, LINE.replace("steps: 2", "steps: 3"), "llama-1"),
        (LINE, LINE.replace("steps: 2", "steps: 2, seed: 1"), "llama-1"),
        ("checkpoints: [2, 4]", "checkpoints: [2]", ""),
        ("checkpoints: [2, 4]", "checkpoints: [4, 3]", "llama-2@3"),
        ("concepts: {country: 1", "concepts: {country: 2", "all"),
        ("concepts: {country: 1", "concepts: {city: 1", "all"),
        ("high: 4", "high: 5", "all but llama-2-reversed"),
        ("width: 8\n", "width: 12\n", "all but llama-2-w4"),
        ("mlp_width: 16", "mlp_width: 18", "all but llama-2-w4"),
        *((f"\n{name}: {old}\n", f"\n{name}: {new}\n", "all") for name, old, new in FIELDS),
    ],
)
def test_a_model_is_trained_again_exactly_when_a_line_that_it_depends_on_changes(
    small, recipe, old, new, anew
):
    models = models_of(edit(recipe, (old, new)))
    missing = set()
    for name, model in models.items():
        try:
            assert trained(model, train=False, root=small.root) == small.directory(name)
        except InputError:
            missing.add(name)
    every, _, kept = anew.partition(" but ")
    assert missing == (set(models) - {kept} if every == "all" else set(anew.split()))


def test_a_corpus_with_other_tiers_is_another_corpus(small, monkeypatch):
    """The same concepts and texts, seen in other proportions: never the old model."""
    turned = dict(zip(TIERS, TIERS[::-1], strict=True))
    questions = zoo_questions({"country": 1, "element": 1})
    others = [q.model_copy(update={"tier": turned[q.tier]}) for q in questions]
    monkeypatch.setattr(zoo, "zoo_questions", lambda concepts: others)
    zoo.corpus_digest.cache_clear()
    try:
        assert "not trained yet" in refusal(lambda: small.directory("llama-1"))
    finally:
        zoo.corpus_digest.cache_clear()


def test_a_recipe_is_found_however_its_path_is_spelt(recipe, small, monkeypatch):
    for path, prefix in ((Path("./mine.yaml"), "mine.yaml"), (recipe.resolve(),) * 2):
        assert list(load_zoo(path)) == [f"{prefix}:{name}" for name in small.models]
        model = load_zoo(path)[f"{prefix}:llama-1"]
        assert trained(model, train=False, root=small.root) == small.directory("llama-1")
    Path("deeper").mkdir()
    shutil.copy(recipe, "deeper")
    edit(recipe, ("width: 8\n", "width: 12\n"))
    monkeypatch.chdir("deeper")  # where the same name means another file
    assert load_zoo(Path("mine.yaml"))["mine.yaml:llama-1"].recipe.width == 8
    assert load_zoo(Path("../mine.yaml"))["../mine.yaml:llama-1"].recipe.width == 12


def test_a_recipe_that_is_edited_while_the_process_lives_is_read_again(recipe):
    first = trained(load_zoo(recipe)["mine.yaml:llama-1"])
    edit(recipe, ("width: 8\n", "width: 12\n"))
    assert find_spec("mine.yaml:llama-1").width == 12
    assert trained(load_zoo(recipe)["mine.yaml:llama-1"]) != first
    assert load_model("mine.yaml:llama-1").model.config.hidden_size == 12
    shutil.copy(SMOKE, recipe)
    assert load_model("mine.yaml:llama-1").model.config.hidden_size == 8
