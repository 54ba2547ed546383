"""The registry of models, `models.yaml`: what a MODEL argument may say.

    load_registry()["smollm2-135m"].layers
    expand_models(["zoo", "smollm2-135m"])      # a set as its models

torch and transformers are imported where they are used, so that listing the registry is quick.
"""

from __future__ import annotations

import copy
import difflib
import functools
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import Field, StrictBool, StrictFloat

from paramspec.checked import Checked
from paramspec.errors import InputError, naming
from paramspec.models.zoo import SetName as ZooSet
from paramspec.models.zoo import Whole, ZooModel, architecture, load_zoo
from paramspec.plain import read_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


REGISTRY = Path(__file__).with_name("models.yaml")
SetName = Literal["twenty", "scale", "pretraining", "causal", ZooSet]
SETS = get_args(SetName)


class HubSource(Checked):
    """A repository of the Hugging Face hub, at a branch or tag; `commit` pins it where known."""

    kind: Literal["hub"]
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = "main"
    commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")

    @property
    def label(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


class WheelSource(Checked):
    """A GGUF file inside an installed wheel. The wheel is read, never imported."""

    kind: Literal["wheel"]
    distribution: str
    version: str
    file: str

    @property
    def label(self) -> str:
        return f"wheel {self.distribution} {self.version}"


class ZooSource(Checked):
    """A micro model, trained here from a recipe."""

    kind: Literal["zoo"]
    recipe: str

    @property
    def label(self) -> str:
        return "trained here"


Source = Annotated[HubSource | WheelSource | ZooSource, Field(discriminator="kind")]


class Mmlu(Checked):
    """Published MMLU accuracy, 5-shot unless the source says otherwise, in percent."""

    score: StrictFloat = Field(ge=0, le=100)
    source: str


class Architecture(Checked):
    """The remaining fields of the maker's config.json that decide the shapes of weights.

    `dtype` is that of the published weights.
    """

    num_attention_heads: Whole
    num_key_value_heads: Whole
    head_dim: Whole
    vocab_size: Whole
    max_position_embeddings: Whole
    sliding_window: Whole | None = None
    tie_word_embeddings: StrictBool
    dtype: Literal["float32", "bfloat16", "float16"]


class ModelSpec(Checked):
    """One entry of `models.yaml`; the head of that file says what each field means."""

    id: str
    family: str
    generation: str
    model_type: str
    parameters: Whole
    released: date | None
    mmlu: Mmlu | None
    layers: Whole
    width: Whole
    mlp_width: Whole
    config: Architecture | None = None
    source: Source
    licence: str
    gated: str | None = None
    sets: tuple[SetName, ...] = ()


@functools.cache
def load_registry(path: Path = REGISTRY) -> dict[str, ModelSpec]:
    """`load_registry()["smollm2-135m"].layers`: the entries of `models.yaml` by id, in file order.

    An entry `zoo: FILE` stands for every model of a zoo recipe that lies beside it.

    Raises:
        InputError: naming the entry and the field, if the file does not fit `ModelSpec`.
    """
    registry: dict[str, ModelSpec] = {}
    entries = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: expected a list of models; see the head of the file")
    for number, entry in enumerate(entries, start=1):
        if set(entry) == {"zoo"}:
            recipe = path.parent / entry["zoo"]
            registry |= {model.name: zoo_spec(model) for model in load_zoo(recipe).values()}
            continue
        with naming(f"{path}: model {entry.get('id', number)!r}"):
            spec = ModelSpec.parse(**entry)
            if spec.id in registry:
                raise InputError("the id is used twice; rename one")
        registry[spec.id] = spec
    return registry


def models_in(chosen: str | None = None) -> list[ModelSpec]:
    """`models_in("twenty")`: the registry entries of a set, or all of them, in file order."""
    if chosen is not None and chosen not in SETS:
        raise InputError(f"set {chosen!r}: no such set in {REGISTRY.name}; use {', '.join(SETS)}")
    return [spec for spec in load_registry().values() if chosen is None or chosen in spec.sets]


def expand_models(names: Sequence[str]) -> list[str]:
    """`expand_models(["zoo", "smollm2-135m"])`: a set's name, or a zoo recipe's, as its models.

    Args:
        names: MODEL arguments, names of sets of the registry, or `.yaml` zoo recipes; of a recipe,
            the models that belong to the set `zoo`, one of each family and generation.

    Raises:
        InputError: if none is named, or one twice.
    """
    expanded: list[str] = []
    for name in names:
        if name in SETS:
            expanded += [spec.id for spec in models_in(name)]
        elif name.endswith((".yaml", ".yml")) and not Path(name).is_dir():
            expanded += [m.name for m in load_zoo(Path(name)).values() if "zoo" in m.sets]
        else:
            expanded.append(name)
    require_distinct(expanded)
    return expanded


def require_distinct(names: Sequence[str]) -> None:
    """`require_distinct(names)`: refuse none at all, and one twice; an InputError."""
    if not names:
        raise InputError("models: none given; name at least one model, or a set such as 'zoo'")
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(
                f"model {name!r}: given twice; results are told apart by its name: leave one out, "
                "or name another directory by its whole path"
            )


def published_config(spec: ModelSpec) -> PreTrainedConfig:
    """`published_config(load_registry()["qwen2-7b"])`: of transformers' own class, no network.

    It decides every shape of the language model, and so its cost; what decides none (rotary
    frequencies, the epsilon of a norm) comes with the checkpoint. The entry has a `config`, or is
    of the zoo.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if spec.source.kind == "zoo":
        return architecture(zoo_model(spec.id).recipe)
    model_type = CONFIG_MAPPING[spec.model_type]().get_text_config(decoder=True).model_type
    return AutoConfig.for_model(
        model_type,
        num_hidden_layers=spec.layers,
        hidden_size=spec.width,
        intermediate_size=spec.mlp_width,
        **(spec.config.model_dump(exclude_unset=True) if spec.config else {}),
    )


def toy_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """`toy_config(published_config(spec))`: the same class in small, for what size cannot change.

    A layer of each kind, at least two; heads that share keys, and heads that do not fill the
    width, where those of the model do so.
    """
    small = copy.deepcopy(config)
    groups = config.num_attention_heads // config.num_key_value_heads
    keys = min(2, config.num_key_value_heads)
    heads = keys * min(2, groups)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    uneven = config.hidden_size != config.num_attention_heads * head_dim
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    changes = {
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": 8,
        "hidden_size": 8 * heads + (16 if uneven else 0),
        "intermediate_size": 48,
        "num_hidden_layers": max(2, len(kinds)),
        "vocab_size": 97,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    if kinds:
        changes["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
    if getattr(config, "sliding_window", None):
        changes["sliding_window"] = 32
    for name, value in changes.items():
        setattr(small, name, value)
    return small


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """`empty_model(published_config(spec))`: the whole model on torch's `meta` device, no weights.

    Its shapes are there, and take no memory; its embeddings are tied where the config says so.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def find_spec(model: str) -> ModelSpec | None:
    """`find_spec("zoo-llama-3").generation`: what the registry or a recipe says of a model."""
    found = _of_a_recipe(model)
    return zoo_spec(found) if found else load_registry().get(model)


def zoo_model(name: str) -> ZooModel:
    """`zoo_model("zoo-llama-3").recipe`: a micro model that `find_spec` knows."""
    return _of_a_recipe(name) or load_zoo()[name]


def _of_a_recipe(model: str) -> ZooModel | None:
    """The model that `FILE.yaml:NAME` means, or None if this is no such name."""
    file, colon, name = model.rpartition(":")
    if not colon or not file.endswith((".yaml", ".yml")) or Path(model).expanduser().exists():
        return None
    known = load_zoo(Path(file).expanduser())
    model = f"{Path(file).expanduser().as_posix()}:{name}"
    if model not in known:
        near = difflib.get_close_matches(model, known, n=3) or list(known)[:3]
        raise InputError(f"model {model!r}: not in that recipe; did you mean {', '.join(near)}?")
    return known[model]


def zoo_spec(model: ZooModel) -> ModelSpec:
    """`zoo_spec(load_zoo()["zoo-llama-3"])`: a micro model as an entry of the registry."""
    recipe = model.recipe
    step = "" if model.step is None else f", step {model.step}"
    return ModelSpec(
        id=model.name,
        family=recipe.family.rstrip("2"),  # the registry's name: qwen, gemma
        generation=f"zoo {model.generation}{step}",
        model_type=recipe.family,
        parameters=recipe.parameters,
        released=None,
        mmlu=None,
        layers=recipe.layers,
        width=recipe.width,
        mlp_width=recipe.mlp_width,
        source=ZooSource(kind="zoo", recipe=model.name),
        licence="MIT",
        sets=model.sets,
    )
