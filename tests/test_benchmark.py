"""What the benchmark compares is the same: contenders score alike; needed work is counted."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import growth
import peers
import scoring
from paramspec.method.hooks import value_vector_view
from paramspec.method.masks import keep_tensor, random_vectors
from paramspec.method.rows import Item, Request
from paramspec.method.scoring import encode
from toy_study import toy_loaded, toy_questions


@pytest.fixture(scope="module")
def loaded():
    return toy_loaded("llama")


@pytest.fixture(scope="module")
def view(loaded):
    return value_vector_view(loaded.model)


@pytest.fixture(scope="module")
def masked(loaded, view) -> peers.Work:
    """Twelve questions, options of one and two tokens, under three masks and none."""
    questions = toy_questions()[::7]
    draw = torch.Generator().manual_seed(0)
    like = (torch.rand(view.layers, view.width, generator=draw) > 0.8).nonzero().int()
    vectors = [random_vectors(like, view.layers, view.width, draw) for _ in range(3)]
    keeps = [keep_tensor(chosen, view.layers, view.width) for chosen in vectors]
    requests = [
        Request(encode(loaded.tokenizer, question), number % 4)
        for number, question in enumerate(questions)
    ]
    assert {len(option) for request in requests for option in request.item.options} == {1, 2}
    return peers.Work("masked", requests, [*keeps, None], [*vectors, None], questions)


def agree(actual, expected):
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


@pytest.mark.parametrize("rows", [0, 5])
def test_nnsight_scores_what_one_at_a_time_does_under_masks(loaded, view, masked, rows):
    pytest.importorskip("nnsight")
    expected = peers.one_at_a_time(view, masked)
    agree(peers.Nnsight(peers.wrap(loaded), view.names, rows)(masked), expected)
    # Masks move these scores by more than the tolerance, and wrapping left the model as it was.
    plain = peers.Work("plain", [Request(item, 0) for item, _ in masked.requests])
    moved = zip(peers.one_at_a_time(view, plain), expected, masked.requests, strict=True)
    assert all(float((a - b).abs().max()) > 0.01 for a, b, request in moved if request.mask < 3)
    agree(peers.one_at_a_time(view, masked), expected)


def test_lm_eval_scores_what_one_at_a_time_does(loaded, view, masked):
    pytest.importorskip("lm_eval")
    plain = dataclasses.replace(masked, keeps=[None] * 4, vectors=[None] * 4)
    agree(peers.LmEval(loaded, batch=5)(plain), peers.one_at_a_time(view, plain))
    with pytest.raises(ValueError, match="without masks"):
        peers.LmEval(loaded, batch=5)(masked)


def test_needed_work_is_that_of_a_count_by_hand():
    """Two questions share `1 2`; an option's last token is predicted, and never a node."""
    first = Item((1, 2), ((5,), (6, 7), (6, 8)))  # nodes 1, 12, 126; read after 12, 126
    second = Item((1, 2, 3), ((5,), (4, 4, 4)))  # and 123, 1234, 12344; read after each of them
    found = peers.needed([Request(first, 0), Request(second, 0)])
    assert found == (6, 1 + 2 + 3 + 3 + 4 + 5, 5)
    # Under two masks nothing is shared between the questions.
    apart = peers.needed([Request(first, 0), Request(second, 1)])
    assert apart == (3 + 5, (1 + 2 + 3) + (1 + 2 + 3 + 4 + 5), 2 + 3)


def test_needed_flops_are_those_of_a_llama_s_matrices(loaded):
    config = loaded.model.config
    width, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
    weights = 2 * width**2 + 2 * width * keys + 3 * width * config.intermediate_size
    token, pair = 2 * config.num_hidden_layers * weights, 4 * config.num_hidden_layers * width
    read = 2 * width * config.vocab_size
    assert config.num_attention_heads * config.head_dim == width
    assert peers.Needed(6, 18, 5).flops(loaded.model) == 6 * token + 18 * pair + 5 * read


@pytest.fixture
def on_toys(monkeypatch):
    """The benchmark on a toy model, whose matrices are as small as its peak is."""

    def questions(concepts: int = 8):
        return toy_questions(concepts)

    for module in (scoring, growth):
        monkeypatch.setattr(module, "load_questions", questions)
    monkeypatch.setattr(scoring, "load_model", lambda *_, **__: toy_loaded("llama"))
    monkeypatch.setattr(growth, "PROMPTS", 5)
    square = torch.ones(64, 64)
    monkeypatch.setattr(scoring, "products", lambda _: {"a": (2 * 64**3, lambda: square @ square)})
    line = "--quick --dtypes float32 --questions 10 --concepts 3 --general 2 --growth-rounds 1"
    given = scoring.parse(line.split())
    given.batches, given.nnsight_batches = (4, 8), (6, 0)
    pairs = ("concepts", (2, 4)), ("ratios", (1, 2)), ("controls", (0, 1)), ("prompt", (2, 4))
    given.axes = {"questions": (4, 8), **dict(pairs), "shared_prompt": (2, 4)}
    given.axes["parameters"] = ((16, 1), (32, 2))
    return given


def test_the_whole_run_on_a_toy(on_toys):
    for package in ("lm_eval", "nnsight"):
        pytest.importorskip(package)
    found = json.loads(json.dumps(scoring.measure(on_toys)))
    assert [problem for problem in found["problems"] if "log-likelihoods" in problem] == []
    rows = {(row["work"], row["contender"], row["variant"]): row for row in found["table"]}
    assert len(rows) == 2 * 5  # three engines, the loop of hooks, a peer
    for (work, contender, variant), row in rows.items():
        assert (row["questions"], row["masks"]) == ((10, 0) if work == "unmasked" else (36, 3))
        assert row["options"] == 4 * row["questions"]
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        assert row["differing"] == 0
        assert row["difference"] < 1e-3
        assert (row["ratio"] == 1) == ((contender, variant) == ("paramspec", scoring.SHARED))
        assert row["ratio"] > 0 < row["ratio_unshared"]
        assert row["ratio_stock"] > 0 < row["share"]
    axes = [(row["axis"], row["x"]) for row in found["growth"]]
    assert axes[:4] == [("questions", 4), ("questions", 8), ("concepts", 2), ("concepts", 4)]
    assert len(axes) == 14
    masks = {key: row["questions"] for key, row in zip(axes, found["growth"], strict=True)}
    assert masks["ratios", 2] == 2 * masks["ratios", 1] == masks["controls", 1]
    scoring.show(found)


def test_a_peer_that_is_not_installed_is_a_row_that_says_so(on_toys, monkeypatch):
    monkeypatch.setattr(scoring, "find_spec", lambda name: None)
    on_toys.growth_rounds = 0
    found = scoring.measure(on_toys)
    absent = [row for row in found["table"] if row["variant"] == "not installed"]
    assert [row["contender"] for row in absent] == ["lm-eval", "nnsight"]
    assert all(row["seconds"] is None for row in absent)
    assert sum("nothing to compare with" in note for note in found["notes"]) == 2
    scoring.show(found)


def row(work, dtype, contender, **values):
    row = {"work": work, "dtype": dtype, "contender": contender, "variant": scoring.SHARED}
    row |= {"questions": 600, "masks": 30, "seconds": 1.0, "ratio": 1.0, "share": 0.6}
    return row | {"differing": 0, "difference": 1e-4} | values


def test_every_bound_is_held():
    """A table that meets all bounds, and the same with one number wrong at a time."""
    good = [
        row("unmasked", "float32", "paramspec"),
        row("unmasked", "float32", "lm-eval", ratio=3.1),
        row("unmasked", "bfloat16", "paramspec", differing=2, difference=0.3),
        row("unmasked", "bfloat16", "hooks", differing=2, ratio=20),
        row("unmasked", "bfloat16", "lm-eval", ratio=3.1, differing=9),
        row("masked", "bfloat16", "paramspec"),
        row("masked", "bfloat16", "nnsight", ratio=4.1),
        row("masked", "bfloat16", "hooks", ratio=15.1),
    ]
    assert scoring.find_problems(good, [], []) == ([], [])
    wrong = [
        (0, {"differing": 1}),
        (0, {"difference": 2e-3}),
        (1, {"ratio": 2.9}),
        (1, {"differing": 1}),
        (2, {"differing": 3}),
        (2, {"share": 0.4}),
        (4, {"ratio": 2.9}),
        (5, {"share": 0.4}),
        (6, {"ratio": 3.9}),
        (7, {"ratio": 14.9}),
    ]
    for place, values in wrong:
        table = list(good)
        table[place] = table[place] | values
        problems, _ = scoring.find_problems(table, [], [])
        assert len(problems) == 1, (place, values, problems)
    small = [each | {"questions": 100, "masks": 5, "ratio": 0.1} for each in good]
    problems, unchecked = scoring.find_problems(small, [], [])
    assert problems == []
    assert len(unchecked) == 6


def test_time_may_grow_with_tokens_and_memory_with_nothing():
    def point(x, seconds, tokens):
        return {"axis": "concepts", "x": x, "seconds": seconds, "tokens": tokens}

    assert growth.superlinear([point(8, 1.0, 100), point(16, 2.2, 200)]) == []
    assert len(growth.superlinear([point(8, 1.0, 100), point(16, 2.6, 200)])) == 1

    def case(questions, peak):
        return {"questions": questions, "peak": peak, "concepts": questions // 20, "masks": 1}

    assert growth.growing([case(160, 1.0e9), case(640, 1.05e9)]) == []
    assert len(growth.growing([case(160, 1.0e9), case(640, 1.2e9)])) == 1
