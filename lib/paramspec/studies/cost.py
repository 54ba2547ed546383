"""The cost of studies before they are run: weights, tokens, FLOPs, hours. Loads no weights.

Tokens are counted as a run packs them, see `method.rows`, with a model's own tokenizer where it
lies on this disk. FLOPs are two for each weight of a token, and for the unembedding of each token
that is read. Attention, padding and loading are left out, some percent; and so is the training of
micro models, some minutes.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from paramspec.errors import InputError
from paramspec.execution.limits import cores, memory
from paramspec.method.hooks import unverified_view
from paramspec.method.pss import asked_questions, count_masks
from paramspec.method.rows import Engine, Request, fill_rows
from paramspec.method.scoring import encode_all
from paramspec.models.checkpoints import checkpoint_files, find_checkpoint
from paramspec.models.load import check_checkpoint, load_tokenizer
from paramspec.models.registry import empty_model, find_micro, find_spec, published_config
from paramspec.models.zoo import ZooModel
from paramspec.models.zoo_training import own_tokenizer
from paramspec.specwiki import Question, questions_digest
from paramspec.studies.chapters import Experiment
from paramspec.studies.sweep import needs_of

EMBEDDED = "smollm2-135m"  # its tokenizer counts for models that are not on this disk
PACKED = Engine("packed", "as on every model but a few")
# fp32 operations of a CPU core a second: two fused multiply-adds of eight numbers a cycle (AVX2)
# at 3 GHz.
CORE = 2 * 2 * 8 * 3e9


class Gpu(NamedTuple):
    """Its peak is of dense matrix multiplication in bf16, FLOP/s; its memory is in bytes."""

    name: str
    peak: float
    memory: float
    source: str


def find_gpu(name: str) -> Gpu:
    """`find_gpu("rtx4090")`: of `gpus.csv`, spaces and case aside; `cpu` is this machine."""

    def plain(text: str) -> str:
        return text.lower().replace(" ", "")

    table = pd.read_csv(Path(__file__).with_name("gpus.csv"))
    known = [Gpu(*row) for row in table.itertuples(index=False)]
    known.append(Gpu("cpu", cores() * CORE, memory(), f"{cores()} cores, AVX2 at 3 GHz"))
    for gpu in known:
        if plain(gpu.name) == plain(name):
            return gpu
    raise InputError(f"GPU {name!r}: unknown; use {', '.join(gpu.name for gpu in known)}")


class Tokens(NamedTuple):
    """Tokens that go through the model, and those whose logits are read."""

    passed: int
    read: int


def tokens_of(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The tokens of each model with this tokenizer: every cloze once, for coefficients; every
    question once, without a mask; and each concept's questions, and general ones, under its masks.
    """
    questions, choices = experiment.questions, experiment.choices
    items = {item.name: item for item in encode_all(tokenizer, questions, chat=choices.chat)}

    def scored(asked: Iterable[Question]) -> np.ndarray:
        cells = fill_rows([Request(items[q.id], 0) for q in asked], PACKED, choices.row_tokens)
        return np.array([(len(cell.row.tokens), len(cell.row.places)) for cell in cells]).sum(0)

    recorded = sum(len(item.context) for item in items.values())
    bare = scored(question for question in questions if question.fold in choices.score_on)
    masked = sum(
        scored(question for question, _ in asked_questions(questions, concept, choices))
        for concept in dict.fromkeys(question.concept for question in questions)
    )
    passed, read = (bare + (count_masks(choices) - 1) * masked).tolist()
    return Tokens(passed + recorded, read)


class Subject(NamedTuple):
    """A model as far as it is known without its weights."""

    parameters: int
    body: int  # weights that each token is multiplied with
    unembedding: int  # and those that each token is whose logits are read
    vectors: int  # value vectors of all layers
    weights: int  # bytes: of its files, or of its weights in bf16 if they are not here
    on_disk: bool
    micro: ZooModel | None
    tokenizer: str  # the name of the model that it is of: this one, or EMBEDDED

    def flops(self, tokens: Tokens) -> int:
        return 2 * (self.body * tokens.passed + self.unembedding * tokens.read)


def subject(name: str) -> Subject:
    """`subject("llama-2-7b").parameters`: from the registry, or from the model's config."""
    spec, micro = find_spec(name), find_micro(name)
    here = None
    with suppress(InputError):
        here = find_checkpoint(name, fetch=())
    if spec is not None and (spec.config or micro):
        model = empty_model(published_config(spec))
    else:
        model = check_checkpoint((here or find_checkpoint(name, fetch=())).path)
    parameters, view = sum(part.numel() for part in model.parameters()), unverified_view(model)
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    files = checkpoint_files(here.path).values() if here else ()
    return Subject(
        parameters=parameters,
        body=parameters - sum(part.numel() for part in embeddings),
        unembedding=model.get_output_embeddings().weight.numel(),
        vectors=view.layers * view.width,
        weights=sum(path.stat().st_size for path in files) if here else 2 * parameters,
        on_disk=here is not None,
        micro=micro,
        tokenizer=name if here or micro else EMBEDDED,
    )


class Plan(NamedTuple):
    """GPU-hours are of a GPU at `utilisation`, a share of its peak; CPU-hours of a core, beside
    forward passes; memory and disk are in bytes, memory beside the weights.

    `models` has a row per model, over all chapters; work that chapters share counts once. `gpus`
    hold it in bf16 (fp32 on a CPU), `tokenizer` counted its tokens. `chapters` has a row per
    chapter, by itself; `shared` is the part of its FLOPs that a chapter above has done.
    """

    gpu: Gpu
    utilisation: float
    models: pd.DataFrame
    chapters: pd.DataFrame
    totals: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        tables = {name: getattr(self, name).to_dict("records") for name in ("models", "chapters")}
        return self._asdict() | {"gpu": self.gpu._asdict()} | tables


def plan(
    experiments: Mapping[str, Sequence[Experiment]],
    *,
    gpu: str = "A100 80GB",
    utilisation: float = 0.3,
) -> Plan:
    """`plan({"6-scale": CHAPTERS["6-scale"](parameters)}).totals["gpu_hours"]`: see `Plan`."""
    if not 0 < utilisation <= 1:
        raise InputError(f"utilisation {utilisation:g}: expected a share above 0 and up to 1")
    chosen = find_gpu(gpu)
    names = dict.fromkeys(n for each in experiments.values() for one in each for n in one.models)
    subjects = {name: subject(name) for name in names}
    about = pd.DataFrame(list(subjects.values()), index=list(subjects))
    size, room = (4, math.inf) if chosen.name == "cpu" else (2, 0.9 * chosen.memory)  # the loader's
    about["gpus"] = [math.ceil(size * count / room) or 1 for count in about["parameters"]]
    gc.disable()  # of millions of tokens, none is in a cycle: the search takes a third of the time
    try:
        units = _units(experiments, subjects, size)
    finally:
        gc.enable()
    hours = units["flops"] / (chosen.peak * utilisation) / 3600
    units["gpu_hours"] = units["model"].map(about["gpus"]) * hours
    again = units.duplicated(["model", "experiment"])
    units["shared"] = units["flops"].where(again, 0)
    sums = dict.fromkeys(("tokens", "flops", "gpu_hours", "cpu_hours"), "sum")
    most = {"memory": "max", "disk": "sum"}
    models = _stored_once(units[~again]).groupby("model", sort=False).agg(sums | most)
    chapters = (
        _stored_once(units, "chapter")
        .groupby("chapter", sort=False)
        .agg({"model": "nunique", "concepts": "max", **sums, **most, "shared": "sum"})
    )
    chapters["shared"] /= chapters["flops"]
    about["micro"] = about["micro"].notna()
    about = about.drop(columns=["body", "unembedding", "vectors"])
    return Plan(
        chosen,
        utilisation,
        about.join(models).rename_axis("model").reset_index(),
        chapters.rename(columns={"model": "models"}).reset_index(),
        {
            "models": len(models),
            **{name: models[name].agg(how).item() for name, how in (sums | most).items()},
        },
    )


def _stored_once(units: pd.DataFrame, *within: str) -> pd.DataFrame:
    """With `disk`, to which coefficients add once, though several studies read them."""
    again = units.duplicated([*within, "model", "recorded"])
    return units.assign(disk=units["answers"] + units["coefficients"].where(~again, 0))


def _units(
    experiments: Mapping[str, Sequence[Experiment]], subjects: Mapping[str, Subject], size: int
) -> pd.DataFrame:
    """What each experiment takes on each model, whose weights have `size` bytes each; the tokens of
    models that read alike are counted once.
    """
    counted: dict[tuple[str, str], Tokens] = {}
    rows = []
    asked = [(chapter, one) for chapter, each in experiments.items() for one in each]
    for chapter, one in asked:
        digest = questions_digest(one.questions)
        key = f"{digest} {one.choices.model_dump_json()}"
        recorded = f"{digest} {one.choices.position} {one.choices.chat}"
        concepts = len({question.concept for question in one.questions})
        for name in one.models:
            of, micro = subjects[name], subjects[name].micro
            # Micro models that were taught the same have one tokenizer.
            reader = f"{micro.recipe.vocabulary} {micro.recipe.concepts}" if micro else of.tokenizer
            if (reader, key) not in counted:
                own = own_tokenizer(micro) if micro else _loaded_tokenizer(of.tokenizer)
                counted[reader, key] = tokens_of(one, own)
            tokens = counted[reader, key]
            needs = needs_of(one.questions, one.choices, of.vectors, size)
            row = {
                "chapter": chapter,
                "model": name,
                "experiment": key,
                "recorded": recorded,
                "concepts": concepts,
                "tokens": tokens.passed,
                "flops": of.flops(tokens),
                "cpu_hours": needs.seconds / 3600,
            }
            rows.append(row | needs._asdict())
    return pd.DataFrame(rows)


@functools.cache
def _loaded_tokenizer(name: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(find_checkpoint(name, fetch=()).path)
