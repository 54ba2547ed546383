"""Which value vectors a mask takes, and its controls, against sorting and counting by hand."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import chisquare

from oracles import coefficients_alone
from paramspec.errors import InputError
from paramspec.method.hooks import value_vector_view
from paramspec.method.masks import (
    keep_tensor,
    load_masks,
    magnitude_matched_vectors,
    random_vectors,
    record_concepts,
    save_masks,
    top_vectors,
    value_vector_scores,
)
from toy_study import CONCEPTS, toy_questions, toy_tokenizer
from toys import same_weights, toy_model

LAYERS, WIDTH = 4, 50


@pytest.fixture
def scores():
    return torch.randn(LAYERS, WIDTH, generator=generator(3))


def pairs(vectors):
    return {tuple(pair) for pair in vectors.tolist()}


def in_layer(vectors, layer):
    return {vector for place, vector in vectors.tolist() if place == layer}


def sizes(vectors):
    return [len(in_layer(vectors, layer)) for layer in range(LAYERS)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.1, 0.5, 0.98, 1.0])
def test_the_highest_of_each_layer_or_of_the_model(scores, ratio):
    count = round(ratio * WIDTH)
    order = np.argsort(-scores.numpy(), axis=1)[:, :count]
    layers = {(layer, int(vector)) for layer in range(LAYERS) for vector in order[layer]}
    order = np.argsort(-scores.numpy(), axis=None)[: count * LAYERS]
    model = {divmod(int(place), WIDTH) for place in order}
    for scope, expected in (("layer", layers), ("model", model)):
        vectors = top_vectors(scores, ratio, scope)
        assert vectors.dtype == torch.int32
        assert pairs((~keep_tensor(vectors, LAYERS, WIDTH)).nonzero()) == expected
        assert vectors.tolist() == sorted(map(list, expected))  # sorted, and each once
    assert (layers == model) == (ratio in (0, 1))


@pytest.mark.parametrize(
    ("ratio", "width", "count"),
    # 1536 is SmolLM2's width; Python rounds a half to the even neighbour.
    [(0.01, 1536, 15), (0.002, 1536, 3), (0.1, 48, 5), (0.01, 48, 0), (0.25, 10, 2), (0.35, 10, 4)],
)
def test_the_ratio_is_rounded_to_a_number_of_vectors(ratio, width, count):
    assert len(top_vectors(torch.randn(1, width), ratio)) == count


def test_an_unknown_scope_is_refused(scores):
    with pytest.raises(InputError, match="scope 'head'"):
        top_vectors(scores, 0.1, "head")


def test_keep_is_false_exactly_where_masked(scores):
    vectors = top_vectors(scores, 0.2)
    keep = keep_tensor(vectors, LAYERS, WIDTH)
    assert pairs((~keep).nonzero()) == pairs(vectors)


# Controls


def test_random_masks_are_as_large_in_each_layer_and_come_from_the_seed(scores):
    like = top_vectors(scores, 0.1, "model")  # as many as the layer happens to have
    assert len(set(sizes(like))) > 1
    first, again, other = (
        random_vectors(like, LAYERS, WIDTH, generator(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.int32
    assert sizes(first) == sizes(other) == sizes(like)


def test_random_masks_are_uniform_over_a_layer(scores):
    """Chi-square over 4,000 draws of 5 of 50, in each layer; and which 5 does not matter."""
    like, draw, draws = top_vectors(scores, 0.1), generator(), 4000
    hits = np.zeros((LAYERS, WIDTH))
    for _ in range(draws):
        hits += ~keep_tensor(random_vectors(like, LAYERS, WIDTH, draw), LAYERS, WIDTH).numpy()
    assert (hits.sum(1) == 5 * draws).all()
    for layer in range(LAYERS):
        # Without replacement, counts vary less than a multinomial's, by (1 - 5 / 50).
        statistic = chisquare(hits[layer]).statistic / (1 - 5 / WIDTH)
        assert 0.5 * WIDTH < statistic < 1.7 * WIDTH  # about 6 standard deviations of chi-square


@pytest.mark.parametrize("seed", range(30))
def test_matched_masks_are_the_best_assignment_by_rank(seed):
    """Oracle: the Hungarian algorithm, in a layer so narrow that nothing is left out at random."""
    draw, free = np.random.default_rng(seed), 9
    count = int(draw.integers(1, free))
    values = draw.permutation(count + free) ** 2.0
    wanted = draw.choice(count + free, count, replace=False)
    if seed % 2:  # as a concept's vectors are: the highest
        wanted = values.argsort()[-count:]
    others = np.sort(np.delete(values, wanted))
    cost = (np.arange(free) - (np.searchsorted(others, values[wanted])[:, None] - 0.5)) ** 2
    like = torch.tensor([[0, vector] for vector in sorted(wanted)], dtype=torch.int32)
    ascending = torch.from_numpy(values)[None].argsort(1)
    matched = sorted(in_layer(magnitude_matched_vectors(like, ascending, generator()), 0))
    chosen = np.searchsorted(others, np.sort(values[matched]))
    # On a line, pairs in order are the cheapest.
    ours = cost[values[wanted].argsort(), chosen].sum()
    assert ours == pytest.approx(cost[linear_sum_assignment(cost)].sum())


@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.2])
def test_matched_masks_are_near_in_magnitude_and_differ_by_draw(ratio):
    """By the Hungarian algorithm on absolute differences: at most a twentieth above the least."""
    magnitudes = torch.randn(LAYERS, 400, generator=generator(5)).mul(1.5).exp()  # a few large ones
    noise = torch.randn(magnitudes.shape, generator=generator(6))
    like = top_vectors(magnitudes.log() + noise, ratio)  # high in magnitude, but not the highest
    draws = [
        magnitude_matched_vectors(like, magnitudes.argsort(1), generator(seed)) for seed in range(4)
    ]
    assert len({frozenset(pairs(matched)) for matched in draws}) == len(draws)
    for matched in draws:
        assert not pairs(matched) & pairs(like)
        assert sizes(matched) == sizes(like)
    ours = best = 0.0
    for layer in range(LAYERS):
        own = sorted(in_layer(like, layer))
        free = [vector for vector in range(400) if vector not in own]
        values = magnitudes[layer].numpy().astype(float)
        cost = abs(values[own][:, None] - values[free][None])
        best += cost[linear_sum_assignment(cost)].sum()
        for matched in draws:
            chosen = np.sort(values[sorted(in_layer(matched, layer))])
            ours += abs(np.sort(values[own]) - chosen).sum() / len(draws)
    assert best - 1e-6 <= ours < 1.05 * best


def test_matched_masks_come_from_the_seed_and_ties_are_no_obstacle():
    like = torch.tensor([[0, vector] for vector in range(10)], dtype=torch.int32)
    ascending = torch.ones(1, 40).argsort(dim=1, stable=True)
    masks = [magnitude_matched_vectors(like, ascending, generator()) for _ in range(2)]
    assert torch.equal(*masks)
    assert len(masks[0]) == 10
    assert not pairs(masks[0]) & pairs(like)


@pytest.mark.parametrize(("ratio", "left"), [(0.5, 25), (0.6, 20), (1.0, 0)])
def test_where_too_few_are_left_the_rest_of_the_layer_is_taken(scores, ratio, left):
    like = top_vectors(scores, ratio)
    matched = magnitude_matched_vectors(like, scores.abs().argsort(1), generator())
    assert not pairs(matched) & pairs(like)
    assert sizes(matched) == [left] * LAYERS


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "opt"])
def view(request):
    return value_vector_view(toy_model(request.param))


def test_scores_are_the_concepts_mean_minus_the_others(view):
    questions, tokenizer = toy_questions(4)[:-3], toy_tokenizer()  # concepts of unequal size
    found = []
    for position in ("mean", "last"):
        coefficients = record_concepts(view, tokenizer, questions, position=position)
        each = [
            (q, coefficients_alone(view, tokenizer.encode(q.cloze), position).numpy())
            for q in questions
        ]
        for concept, folds in itertools.product(CONCEPTS[:4], [(0, 1), (0,), (1,)]):
            own = [c for q, c in each if q.concept == concept and q.fold in folds]
            others = [c for q, c in each if q.concept != concept and q.fold in folds]
            expected = np.mean(own, axis=0), np.mean(own, axis=0) - np.mean(others, axis=0)
            scores = value_vector_scores(coefficients, concept, folds)
            actual = coefficients.related(concept, folds), scores
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
            found += [scores] if concept == "beta" else []
    # Positions and folds differ, so that none can be taken for another.
    for one, other in itertools.combinations(found, 2):
        assert float((one - other).abs().max()) > 1e-2


def test_the_batch_does_not_move_coefficients(view):
    given = view, toy_tokenizer(), toy_questions(5)
    whole = record_concepts(*given)
    assert (whole.concepts, whole.counts.tolist()) == (CONCEPTS[:5], [[5, 5]] * 5)
    for budget in (1, 7, 60):
        done = []
        again = record_concepts(*given, batch_tokens=budget, progress=done.append)
        assert (again.concepts, again.counts.tolist()) == (whole.concepts, whole.counts.tolist())
        torch.testing.assert_close(again.sums, whole.sums, rtol=1e-4, atol=1e-4)
        assert sum(done) == 50


def test_what_no_vectors_can_be_chosen_by_is_refused():
    """`topk` would take what is not a number for the highest."""
    view, tokenizer = value_vector_view(toy_model("llama")), toy_tokenizer()
    single = record_concepts(view, tokenizer, toy_questions(1))
    with pytest.raises(InputError, match="alpha: no other concept to compare with"):
        value_vector_scores(single, "alpha")
    view.model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("beta")] = torch.inf
    with pytest.raises(InputError, match=r"^beta/\w+: a coefficient of LlamaForCausalLM is not a"):
        record_concepts(view, tokenizer, toy_questions(2))


def test_masks_come_back_with_their_choices_which_any_reader_can_read(tmp_path):
    masks = {
        "toy/New York/0.05/concept/0": torch.tensor([[0, 3], [1, 7]], dtype=torch.int32),
        "org/toy/Côte d'Ivoire/0.05/random/1": torch.tensor([[2, 0]], dtype=torch.int32),
        "toy/New York/0/concept/0": torch.empty(0, 2, dtype=torch.int32),
    }
    choices = {"questions": {"digest": "ab" * 32}, "ratios": [0.05], "position": "mean", "seed": 0}
    path = tmp_path / "masks.safetensors"
    shapes = dict(zip(masks, [(2, 8), (3, 50), (4, 9)], strict=True))
    save_masks(path, shapes, masks.values(), choices)
    loaded, read = load_masks(path)
    assert read == choices
    same_weights(loaded, masks)
    bits = safetensors.numpy.load_file(path)  # the library's own
    assert bits["toy/New York/0.05/concept/0"].tolist() == [[0b00010000], [0b00000001]]
    assert {name: one.shape for name, one in bits.items()} == dict(
        zip(masks, [(2, 1), (3, 7), (4, 2)], strict=True)
    )
    size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    assert {name: json.loads(text) for name, text in metadata.items()} == choices
