"""A step of a micro model is the step that transformers and torch would take, but for rounding."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from paramspec.models import micro, zoo
from paramspec.models.micro import MicroModel, PrefixTree
from paramspec.models.zoo import WINDOW, architecture, load_zoo

FAMILIES = ("llama", "qwen2", "mistral", "gemma2")
BOTH = pytest.mark.parametrize("onednn", [True, False], ids=["oneDNN", "plain"])


@pytest.fixture(autouse=True)
def _choose(request, monkeypatch):
    """With torch's own products of matrices, where a test asks for them."""
    if "onednn" in request.fixturenames and not request.getfixturevalue("onednn"):
        monkeypatch.setattr(micro, "ONEDNN", False)


def recipe_of(family: str, **changed) -> zoo.ModelRecipe:
    return load_zoo()[f"zoo-{family}-1"].recipe.model_copy(update=changed)


def network_of(recipe: zoo.ModelRecipe, spread: float = 0.1) -> torch.nn.Module:
    """All weights random, norms and biases too: a fresh model's are 1 or 0."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(architecture(recipe))
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight), alpha=spread)
    return network


def random_texts(number: int = 12, vocabulary: int = 2048) -> list[list[int]]:
    """Some as short as can be, some longer than a window; some that begin alike, one twice."""
    draw = np.random.default_rng(0)
    texts = [
        [0, *draw.integers(2, vocabulary, n).tolist(), 1] for n in draw.integers(1, 50, number)
    ]
    texts += [[*text[: len(text) // 2], 7, 1] for text in texts[::2]]
    return [*texts, texts[0], [0, 1]]


def plain_loss(network: torch.nn.Module, texts: list[list[int]]) -> torch.Tensor:
    """transformers' own, of texts that are padded at their ends."""
    longest = max(map(len, texts))
    tokens, seen, labels = (torch.full((len(texts), longest), fill) for fill in (1, 0, -100))
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = labels[row, : len(text)] = torch.tensor(text)
        seen[row, : len(text)] = 1
    return network(input_ids=tokens, attention_mask=seen, labels=labels).loss


def gradients(made: MicroModel, network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What is in the vector of gradients, by the names that the network has for its weights."""
    kept = made.weights.detach().clone()
    with torch.no_grad():
        made.weights.copy_(made.weights.grad)
        made.write_back()
        found = {name: weight.clone() for name, weight in network.named_parameters()}
        made.weights.copy_(kept)
        made.write_back()
    return found


def assert_same_step(recipe: zoo.ModelRecipe, texts: list[list[int]], rows: list[int]) -> None:
    network = network_of(recipe)
    made = MicroModel(network, texts)
    loss = made.loss_and_gradient(rows)
    found = gradients(made, network)
    expected = plain_loss(network, [texts[row] for row in rows])
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert set(found) == {name for name, _ in network.named_parameters()}
    for name, weight in network.named_parameters():
        off = (found[name] - weight.grad).norm() / weight.grad.norm()
        assert off < 2e-5, (name, float(off))


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_transformers(family, onednn):
    texts = random_texts()
    assert max(map(len, texts)) > 2 * WINDOW
    assert_same_step(recipe_of(family), texts, list(range(len(texts))))


@pytest.mark.parametrize(
    "changed",
    [
        {"heads": 1, "key_value_heads": 1},
        {"heads": 4, "key_value_heads": 4},
        {"layers": 1, "width": 16, "mlp_width": 8, "vocabulary": 300},
        {"layers": 3, "heads": 8, "key_value_heads": 2, "width": 48},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_the_shape(family, changed):
    recipe = recipe_of(family, **changed)
    texts = random_texts(vocabulary=recipe.vocabulary)
    assert_same_step(recipe, texts, list(range(len(texts))))


def test_a_step_is_of_the_texts_that_are_named_and_leaves_nothing_behind():
    """In any order, one of them twice; and no gradient of the step before stays."""
    texts = random_texts()
    assert_same_step(recipe_of("llama"), texts, [5, 2, 2, 9, 0])
    network = network_of(recipe_of("gemma2"))
    made = MicroModel(network, texts)
    made.loss_and_gradient([5, 2, 2])
    alone = made.weights.grad.clone()
    made.loss_and_gradient([0, 1])
    assert not torch.equal(made.weights.grad, alone)
    made.loss_and_gradient([5, 2, 2])
    assert torch.equal(made.weights.grad, alone)


def test_a_loss_is_finite_where_a_probability_is_too_small_to_be_a_number():
    network, texts = network_of(recipe_of("llama"), spread=4.0), random_texts()
    expected = plain_loss(copy.deepcopy(network).double(), texts)
    assert expected > 200  # exp(-104) is 0 in fp32
    made = MicroModel(network, texts)
    assert made.loss_and_gradient(range(len(texts))) == pytest.approx(expected.item(), rel=1e-4)


# Training


def plain_training(
    network: torch.nn.Module, batches: list[list[list[int]]], recipe: zoo.ModelRecipe
) -> None:
    """The first steps of a recipe in the usual way."""
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.98), weight_decay=0)
    fall = recipe.steps // 5
    for step, texts in enumerate(batches, start=1):
        fallen = max(0, step - (recipe.steps - fall)) / (fall + 1)
        rate = recipe.learning_rate * min(1, step / 20) * (1 - fallen**0.5)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        plain_loss(network, texts).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_are_those_of_transformers_and_torch(family, onednn):
    recipe = recipe_of(family, steps=20)
    model = load_zoo()[f"zoo-{family}-1"]
    texts, tokenizer = zoo._corpus_and_tokenizer(model)
    encoded = zoo._encoded(tokenizer, texts)
    drawn = zoo._batches([len(text) for text in encoded], list(texts.values()), recipe)
    batches = [[encoded[row] for row in rows] for rows in itertools.islice(drawn, recipe.steps)]
    torch.manual_seed(0)
    start = AutoModelForCausalLM.from_config(architecture(recipe))
    plain, quick = copy.deepcopy(start), copy.deepcopy(start)
    plain_training(plain, batches, recipe)
    ((_, record),) = zoo._optimize(quick, tokenizer, texts, [recipe])
    assert record["tokens"] == sum(len(text) for texts in batches for text in texts)
    vectors = [
        torch.nn.utils.parameters_to_vector(network.parameters()).detach()
        for network in (start, plain, quick)
    ]
    moved, off = (vectors[1] - vectors[0]).norm(), (vectors[2] - vectors[1]).norm()
    assert moved > 1
    assert off < 1e-4 * moved, (float(off), float(moved))


def test_weights_come_back_where_they_were():
    network = network_of(recipe_of("qwen2"))
    before = copy.deepcopy(network.state_dict())
    made = MicroModel(network, [[0, 1]])
    assert made.weights.shape == (recipe_of("qwen2").parameters,)
    with torch.no_grad():
        made.weights.add_(1)
    assert all(torch.equal(before[name], weight) for name, weight in network.state_dict().items())
    made.write_back()
    assert all(torch.equal(before[name] + 1, w) for name, w in network.state_dict().items())


def test_a_model_with_weights_of_its_own_kind_is_refused():
    config = architecture(recipe_of("llama"))
    config.tie_word_embeddings = False
    with pytest.raises(ValueError, match="LlamaForCausalLM: it has weights that are not named"):
        MicroModel(AutoModelForCausalLM.from_config(config), [[0, 1]])


# The tree


def test_a_node_is_a_beginning_and_each_is_there_once():
    texts = random_texts()
    tree = PrefixTree(texts)
    shortest = len(texts) - 1
    for rows in ([0], [3, 1], list(range(len(texts))), [shortest, 0, shortest]):
        batch = tree.batch(rows)
        beginnings = {}
        predicted = []
        for row, number in enumerate(rows):
            text = texts[number]
            for place in range(len(text) - 1):
                node = int(batch.node[row, place])
                assert beginnings.setdefault(node, text[: place + 1]) == text[: place + 1]
                assert int(batch.token[node]) == text[place]
                predicted.append((node, text[place + 1]))
        distinct = {tuple(texts[n][:end]) for n in rows for end in range(1, len(texts[n]))}
        assert sorted(map(tuple, beginnings.values())) == sorted(distinct)
        longest = max(len(texts[number]) - 1 for number in rows)
        assert batch.node.shape == (len(rows), longest)
        for node, beginning in beginnings.items():  # its place is where it stands, not padding
            row, place = divmod(int(batch.place[node]), longest)
            assert texts[rows[row]][:-1][: place + 1] == beginning
        assert 0 <= len(batch.token) - len(distinct) <= micro.NODES_TOGETHER
        assert len(batch.token) % micro.NODES_TOGETHER == 0
        assert sorted(zip(batch.before.tolist(), batch.label.tolist(), strict=True)) == sorted(
            predicted
        )
        shares = np.bincount([node for node, _ in predicted], minlength=len(batch.token))
        np.testing.assert_allclose(batch.share, shares / len(predicted), rtol=1e-6)
