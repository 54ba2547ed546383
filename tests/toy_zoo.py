"""The smallest zoo, for tests: its recipe in a folder of its own, edited, and its networks."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from checkout import REPOSITORY
from paramspec.models import zoo

SMOKE = REPOSITORY / "book" / "profiles" / "zoo" / "smoke.yaml"
LINE = "  llama-1: {family: llama, generation: 1, steps: 2}"
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}


def copy_recipe(folder: Path) -> Path:
    """`mine.yaml`, a copy of the smallest zoo's recipe."""
    return Path(shutil.copy(SMOKE, folder / "mine.yaml"))


def models_of(path: Path) -> dict[str, zoo.ZooModel]:
    """The models of a recipe by what they are called in it."""
    return {name.rpartition(":")[2]: model for name, model in zoo.load_zoo(path).items()}


def edit(path: Path, *changes: tuple[str, str]) -> Path:
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
        text = text.replace(old, new)
    path.write_text(text)
    return path


def network_of(recipe: zoo.ModelRecipe) -> torch.nn.Module:
    """A model of a recipe's shape with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(zoo.architecture(recipe)).eval()
