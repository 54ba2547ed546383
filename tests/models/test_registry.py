"""The registry of models: what it says is right, and a file that does not fit is refused."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch

from paramspec.errors import InputError
from paramspec.models.registry import empty_model, load_registry, models_in, published_config

MADE = [spec for spec in load_registry().values() if not spec.micro]


def test_registry_holds_the_sets_that_the_paper_describes():
    assert len(models_in("twenty")) == 20
    generations = {(spec.family, spec.generation) for spec in models_in("twenty")}
    counts = Counter(family for family, _ in generations)
    assert set(counts) == {"llama", "qwen", "mistral", "gemma"}
    assert min(counts.values()) >= 3
    qwen = [f"qwen1.5-{size}" for size in ("0.5b", "1.8b", "4b", "7b", "14b")]
    assert [spec.id for spec in models_in("scale")] == [*qwen, "gemma-2-2b", "gemma-2-9b"]
    assert [spec.id for spec in models_in("causal")] == ["llama-2-7b", "qwen2-7b"]


def test_pretraining_revisions_are_ten_of_one_run():
    """The hub names a checkpoint by step and tokens: a step is 2^22 tokens, rounded up to 1e9."""
    specs = models_in("pretraining")
    steps = []
    for spec in specs:
        assert spec.source.repo == "allenai/OLMo-2-1124-7B"
        named = re.fullmatch(r"stage1-step(\d+)-tokens(\d+)B", spec.source.revision)
        steps.append(int(named[1]))
        assert int(named[2]) == math.ceil(int(named[1]) * 2**22 / 1e9)
        assert spec.id == f"olmo-2-7b-{steps[-1] // 1000}k"
    assert steps == list(range(10_000, 1_000_000, 100_000))
    assert len({spec.source.commit for spec in specs}) == 10


def test_every_hub_entry_is_filled_and_a_gate_says_where_to_ask():
    gated = {"meta-llama", "google"}  # makers who ask a user to accept their terms first
    for spec in MADE:
        assert 2023 <= spec.released.year <= 2025
        assert spec.licence
        assert spec.sets or spec.source.kind == "wheel", spec.id
        if spec.mmlu is None:  # nobody measured a checkpoint
            assert spec.sets == ("pretraining",), spec.id
        else:
            assert len(spec.mmlu.source.split()) > 2, spec.id
        if spec.source.kind == "hub":
            if spec.source.repo.split("/")[0] in gated:
                assert spec.gated, spec.id
            if spec.gated:
                assert spec.gated == f"https://huggingface.co/{spec.source.repo}"


@pytest.mark.parametrize("spec", MADE, ids=lambda spec: spec.id)
def test_full_size_architecture_has_the_registered_numbers(spec):
    """transformers' own class at full size, on the device that holds shapes alone."""
    model = empty_model(published_config(spec))
    assert model.dtype == getattr(torch, spec.config["dtype"])
    assert model.device.type == "meta"
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.parameters
    mlps = [part for name, part in model.named_modules() if name.endswith("mlp.down_proj")]
    assert len(mlps) == spec.layers
    shapes = {(part.in_features, part.out_features) for part in mlps}
    assert shapes == {(spec.mlp_width, spec.width)}


ENTRY = """
- {id: toy, family: llama, generation: "1", model_type: llama, parameters: 10, layers: 2, width: 4,
   mlp_width: 8, source: {kind: hub, repo: org/toy}, licence: MIT}
"""


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (ENTRY.replace("layers: 2, ", ""), "model 'toy': layers: missing"),
        (ENTRY.replace("org/toy", "toy"), "model 'toy': source.hub.repo 'toy': "),
        (ENTRY + ENTRY, "model 'toy': the id is used twice"),
        ("id: toy\n", "expected a list"),
    ],
)
def test_registry_errors_name_the_entry_and_the_field(tmp_path, content, told):
    path = tmp_path / "models.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: {re.escape(told)}"):
        load_registry(path)


def test_command_lists_the_registry(command):
    status, shown, _ = command("models")
    assert status == 0
    for spec in load_registry().values():
        line = next(line for line in shown.splitlines() if line.split()[:1] == [spec.id])
        assert spec.source.label in line
        assert spec.generation in line
    rows = json.loads(command("models", "--set", "scale", "--json")[1])
    assert [row["id"] for row in rows] == [spec.id for spec in models_in("scale")]
    assert rows[0]["mmlu"]["score"] == 39.2
    assert rows[0]["on_disk"] in (True, False)


def test_listing_the_registry_imports_nothing_heavy():
    code = (
        "import sys; from paramspec.models.registry import load_registry; load_registry()\n"
        "print([name for name in ('torch', 'transformers', 'gguf') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert run.stdout == "[]\n", run.stderr
