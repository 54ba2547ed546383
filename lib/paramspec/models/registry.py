"""The registry of models, `models.yaml`: the names that a MODEL argument may have.

torch and transformers are imported where they are used, so that listing the registry is quick.
"""

from __future__ import annotations

import difflib
import functools
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, StrictFloat

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
RECIPES = (".yaml", ".yml")  # how the name of a zoo recipe ends


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


class Mmlu(Checked):
    """Published MMLU accuracy, 5-shot unless the source says otherwise, in percent."""

    score: StrictFloat = Field(ge=0, le=100)
    source: str


class ModelSpec(Checked):
    """One entry of `models.yaml`; the head of that file says what each field means."""

    id: str
    family: str
    generation: str
    model_type: str
    parameters: Whole
    released: date | None = None
    mmlu: Mmlu | None = None
    layers: Whole
    width: Whole
    mlp_width: Whole
    config: dict[str, Any] | None = None  # of the maker's config.json
    source: Annotated[HubSource | WheelSource | ZooModel, Field(discriminator="kind")]
    licence: str
    gated: str | None = None
    sets: tuple[SetName, ...] = ()

    @property
    def micro(self) -> ZooModel | None:
        return self.source if isinstance(self.source, ZooModel) else None


@functools.cache
def load_registry(path: Path = REGISTRY) -> dict[str, ModelSpec]:
    """`load_registry()["smollm2-135m"].layers`: the entries of `models.yaml` by id, in file order.

    An entry `zoo: FILE` stands for every model of a zoo recipe in the same folder.
    """
    registry: dict[str, ModelSpec] = {}
    entries = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: expected a list of models; see the head of the file")
    for number, entry in enumerate(entries, start=1):
        if set(entry) == {"zoo"}:
            micro = load_zoo(path.parent / entry["zoo"])
            registry |= {name: _spec_of(model) for name, model in micro.items()}
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

    Of a recipe, those that belong to the set `zoo`, one of each family and generation.
    """
    expanded: list[str] = []
    for name in names:
        if name in SETS:
            expanded += [spec.id for spec in models_in(name)]
        elif name.endswith(RECIPES) and not Path(name).is_dir():
            expanded += [m.name for m in load_zoo(Path(name)).values() if "zoo" in m.sets]
        else:
            expanded.append(name)
    require_distinct(expanded)
    return expanded


def require_distinct(names: Sequence[str]) -> None:
    """Refuse no name at all, and a name that is given twice."""
    if not names:
        raise InputError("models: none given; name at least one model, or a set such as 'zoo'")
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"model {name!r}: given twice; leave one out, or give its whole path")


def published_config(spec: ModelSpec) -> PreTrainedConfig:
    """The config of an entry that has a `config` or is of the zoo, with all that decides shapes."""
    from transformers import AutoConfig

    if spec.micro is not None:
        return architecture(spec.micro.recipe)
    return AutoConfig.for_model(
        spec.model_type,
        num_hidden_layers=spec.layers,
        hidden_size=spec.width,
        intermediate_size=spec.mlp_width,
        **(spec.config or {}),
    )


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model's shapes, on torch's device `meta`."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def find_spec(model: str) -> ModelSpec | None:
    """`find_spec("mine.yaml:llama-3").width`: the entry of the registry or of a recipe, if any."""
    file, colon, name = model.rpartition(":")
    if not colon or not file.endswith(RECIPES) or Path(model).expanduser().exists():
        return load_registry().get(model)
    recipe = Path(file).expanduser()
    known, model = load_zoo(recipe), f"{recipe.as_posix()}:{name}"
    if model not in known:
        near = ", ".join(difflib.get_close_matches(model, known, cutoff=0))
        raise InputError(f"model {model!r}: not in that recipe; did you mean {near}?")
    return _spec_of(known[model])


def find_micro(model: str) -> ZooModel | None:
    """`find_micro("zoo-llama-3").recipe`: the micro model of that name, if there is one."""
    spec = find_spec(model)
    return spec.micro if spec else None


def _spec_of(model: ZooModel) -> ModelSpec:
    recipe = model.recipe
    step = "" if model.step is None else f", step {model.step}"
    return ModelSpec(
        id=model.name,
        family=recipe.family.rstrip("2"),  # the registry's name: qwen, gemma
        generation=f"zoo {model.generation}{step}",
        model_type=recipe.family,
        parameters=recipe.parameters,
        layers=recipe.layers,
        width=recipe.width,
        mlp_width=recipe.mlp_width,
        source=model,
        licence="MIT",
        sets=model.sets,
    )
