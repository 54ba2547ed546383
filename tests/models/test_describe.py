"""What chapters plot models against: their order, and which of them are compared."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from paramspec.models import describe
from paramspec.models import registry as registry_module
from paramspec.models.describe import comparable_models, describe_models
from paramspec.models.registry import load_registry, models_in
from paramspec.stats.trends import like_sized_ends


def in_order(names):
    return describe_models(names).set_index("model")["order"].to_dict()


@pytest.mark.parametrize(
    "oldest_first",
    [
        ["llama-7b", "llama-2-7b", "llama-3-8b", "llama-3.2-3b"],
        ["qwen1.5-14b", "qwen2-7b", "qwen2.5-7b", "qwen3-8b"],
        ["gemma-7b", "gemma-2-9b", "gemma-3-4b"],
        ["olmo-2-7b-10k", "olmo-2-7b-110k", "olmo-2-7b-910k"],
    ],
)
def test_generations_are_in_order_of_release_whatever_is_typed(oldest_first):
    for names in itertools.permutations(oldest_first):
        assert in_order(names) == dict(zip(oldest_first, itertools.count(1), strict=False))


def test_models_of_one_generation_share_its_place_and_one_without_a_date_has_none(monkeypatch):
    registry = dict(load_registry())
    changed = {"id": "undated", "generation": "secret", "released": None}
    registry["undated"] = registry["llama-2-7b"].model_copy(update=changed)
    for module in (describe, registry_module):
        monkeypatch.setattr(module, "load_registry", lambda: registry)
    found = in_order(["gemma-2-2b", "undated", "gemma-7b", "org/none", "gemma-2-9b", "gemma-2b"])
    unknown = [found.pop(name) for name in ("undated", "org/none")]
    assert np.isnan(unknown).all()
    assert found == {"gemma-2b": 1, "gemma-7b": 1, "gemma-2-2b": 2, "gemma-2-9b": 2}


def test_the_papers_models_are_compared_at_like_size():
    """The pairs that the rule finds in the registry, and how little their sizes differ."""
    specs = load_registry()
    names = [spec.id for spec in models_in("twenty")]
    for typed in (names, names[::-1]):
        ends = like_sized_ends(describe_models(typed)).set_index("family")
        assert set(ends.index) == {"llama", "qwen", "mistral", "gemma"}
        for pair in ends.itertuples():
            old, new = specs[pair.oldest], specs[pair.newest]
            assert old.released < new.released
            assert 0.8 <= old.parameters / new.parameters <= 1.25
        assert list(ends.loc["llama", ["oldest", "newest"]]) == ["llama-7b", "llama-3.1-8b"]


def test_a_correlation_is_over_models_of_one_kind():
    zoo = ["zoo-llama-1", "zoo-qwen2-2", "zoo-llama-3"]
    assert comparable_models([*zoo, "smollm2-135m", "my/checkpoint"]) == zoo
    real = ["llama-7b", "qwen2-7b", "smollm2-135m"]
    assert comparable_models(["my-dir", *real, *zoo[:2]]) == real
    assert comparable_models(["my-dir"]) == []
