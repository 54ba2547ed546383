"""What the benchmark compares is the same: contenders score alike; needed work is counted."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import growth
import peers
import scale
import scoring
import works
from paramspec.method.hooks import value_vector_view
from paramspec.method.rows import Item, Request
from toy_study import toy_loaded, toy_questions


@pytest.fixture(scope="module")
def loaded():
    return toy_loaded("llama")


@pytest.fixture(scope="module")
def view(loaded):
    return value_vector_view(loaded.model)


@pytest.fixture(scope="module")
def masked(loaded, view):
    """Questions on two concepts, options of one and two tokens, under two masks and none."""
    work = works.masked(view, loaded.tokenizer, toy_questions(2), [0.2], general=2)
    assert {len(option) for item, _ in work.requests for option in item.options} == {1, 2}
    bare = [request._replace(mask=2) for request in work.requests[::5]]
    options = [*work.options, *work.options[::5]]
    return works.Work("masked", [*work.requests, *bare], [*work.keeps, None], options)


def agree(actual, expected):
    assert len(expected) > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("rows", [0, 5])
def test_nnsight_scores_what_one_at_a_time_does_under_masks(loaded, view, masked, rows):
    pytest.importorskip("nnsight")
    expected = peers.one_at_a_time(view, masked)
    agree(peers.Nnsight(peers.wrap(loaded), view.names, rows)(masked), expected)
    # Masks move these scores by more than the tolerance, and wrapping left the model as it was.
    plain = dataclasses.replace(masked, keeps=[None] * 3)
    moved = zip(peers.one_at_a_time(view, plain), expected, masked.requests, strict=True)
    assert all(float((a - b).abs().max()) > 0.01 for a, b, request in moved if request.mask < 2)
    agree(peers.one_at_a_time(view, masked), expected)


def test_lm_eval_scores_what_one_at_a_time_does(loaded, view, masked):
    pytest.importorskip("lm_eval")
    plain = dataclasses.replace(masked, keeps=[None] * 3)
    agree(peers.LmEval(loaded, batch=5)(plain), peers.one_at_a_time(view, plain))


def test_needed_work_is_that_of_a_count_by_hand(loaded):
    """Two questions share `1 2`; an option's last token is predicted, and never a node."""
    first = Item((1, 2), ((5,), (6, 7), (6, 8)))  # nodes 1, 12, 126; read after 12, 126
    second = Item((1, 2, 3), ((5,), (4, 4, 4)))  # and 123, 1234, 12344; read after each of them
    found = works.needed([Request(first, 0), Request(second, 0)])
    assert found == (6, 1 + 2 + 3 + 3 + 4 + 5, 5)
    # Under two masks nothing is shared between the questions.
    apart = works.needed([Request(first, 0), Request(second, 1)])
    assert apart == (3 + 5, (1 + 2 + 3) + (1 + 2 + 3 + 4 + 5), 2 + 3)
    # A llama's matrices
    config = loaded.model.config
    width, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
    assert config.num_attention_heads * config.head_dim == width
    weights = 2 * width**2 + 2 * width * keys + 3 * width * config.intermediate_size
    token, pair = 2 * config.num_hidden_layers * weights, 4 * config.num_hidden_layers * width
    assert found.flops(loaded.model) == 6 * token + 18 * pair + 5 * 2 * width * config.vocab_size


@pytest.fixture
def on_toys(monkeypatch):
    """The benchmark on a toy model, whose matrices are as small as its peak is."""
    for module in (scoring, growth):
        monkeypatch.setattr(module, "load_questions", lambda concepts=8: toy_questions(concepts))
    monkeypatch.setattr(scoring, "load_model", lambda *_, **__: toy_loaded("llama"))
    monkeypatch.setattr(growth, "PROMPTS", 5)
    square = torch.ones(64, 64)
    monkeypatch.setattr(scoring, "products", lambda _: {"a": (2 * 64**3, lambda: square @ square)})
    line = "--quick --dtypes float32 --questions 10 --concepts 3 --general 2"
    given = scoring.parse(line.split())
    given.batches, given.nnsight_batches = (4, 8), (6, 0)
    given.axes = {"questions": (4, 8), "concepts": (2, 4), "masks": (1, 2), "shared_prompt": (2, 4)}
    return given


@pytest.mark.parametrize("peers_installed", [True, False])
def test_the_whole_run_on_a_toy(on_toys, monkeypatch, peers_installed):
    if not peers_installed:
        monkeypatch.setattr(scoring, "find_spec", lambda name: None)
        on_toys.growth_rounds = 0
    found = json.loads(json.dumps(scoring.measure(on_toys)))
    rows = {(row["work"], row["contender"], row["variant"]): row for row in found["table"]}
    assert len(rows) == 2 * 5  # three engines, the loop of hooks, a peer
    for (work, contender, variant), row in rows.items():
        assert (row["questions"], row["masks"]) == ((10, 0) if work == "unmasked" else (36, 3))
        assert row["options"] == 4 * row["questions"]
        if not peers_installed and contender in ("lm-eval", "nnsight"):
            assert (variant, row["seconds"]) == ("not installed", None)
            continue
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        assert (row["differing"], row["difference"] < 1e-3) == (0, True)
        assert (row["ratio"] == 1) == ((contender, variant) == ("paramspec", scoring.SHARED))
        assert min(row[name] for name in ("ratio", "ratio_unshared", "ratio_stock", "share")) > 0
    axes = {(row["axis"], row["x"]): row["questions"] for row in found["growth"]}
    if peers_installed:
        assert list(axes) == [(axis, x) for axis, xs in on_toys.axes.items() for x in xs]
        assert axes["masks", 2] == 2 * axes["masks", 1]


def test_every_bound_is_held():
    """A table that meets all bounds, and the same with one number wrong at a time."""
    alike = {"variant": scoring.SHARED, "seconds": 1.0, "share": 0.6}
    columns = ["work", "dtype", "contender", "ratio", "differing", "difference"]
    cells = [
        ("unmasked", "float32", "paramspec", 1.0, 0, 1e-4),
        ("unmasked", "float32", "lm-eval", 3.1, 0, 1e-4),
        ("unmasked", "bfloat16", "paramspec", 1.0, 2, 0.3),
        ("unmasked", "bfloat16", "hooks", 20, 2, 1e-4),
        ("unmasked", "bfloat16", "lm-eval", 3.1, 9, 1e-4),
        ("masked", "bfloat16", "nnsight", 4.1, 0, 1e-4),
        ("masked", "bfloat16", "hooks", 15.1, 0, 1e-4),
    ]
    good = [alike | dict(zip(columns, row, strict=True)) for row in cells]
    assert scoring.find_problems(good, bounded=True) == []
    wrong = [(0, {"differing": 1}), (0, {"difference": 2e-3}), (1, {"differing": 1})]
    wrong += [(2, {"differing": 3})]
    bounds = [(1, {"ratio": 2.9}), (2, {"share": 0.4}), (4, {"ratio": 2.9})]
    bounds += [(5, {"ratio": 3.9}), (6, {"ratio": 14.9})]
    for place, values in wrong + bounds:
        table = [each | (values if i == place else {}) for i, each in enumerate(good)]
        assert len(scoring.find_problems(table, bounded=True)) == 1, (place, values)
        few = scoring.find_problems(table, bounded=False)  # bounds are for the full sizes
        assert len(few) == ((place, values) in wrong)


def test_time_may_grow_with_tokens_and_memory_with_nothing():
    def point(x, seconds, tokens):
        return {"axis": "concepts", "x": x, "seconds": seconds, "tokens": tokens}

    assert growth.superlinear([point(8, 1.0, 100), point(16, 2.2, 200)]) == []
    assert len(growth.superlinear([point(8, 1.0, 100), point(16, 2.6, 200)])) == 1

    def case(questions, peak):
        return {"questions": questions, "peak": peak, "concepts": questions // 20, "masks": 1}

    assert growth.growing([case(160, 1.0e9), case(640, 1.05e9)]) == []
    assert len(growth.growing([case(160, 1.0e9), case(640, 1.2e9)])) == 1


def test_the_scale_benchmark_answers_every_question_under_every_mask(tmp_path, monkeypatch):
    """Of models as wide as toys: every concept's answers, under every mask, from the store."""
    monkeypatch.setattr(scale, "SHAPES", ((2, 64), (3, 48)))
    for models in (1, 2):
        found = scale.measure_here(models, 6, str(tmp_path))
        assert found["answers"] == models * 6 * 20 * (1 + 7 * (1 + 3 * 3))
        assert found["rows"] == models
