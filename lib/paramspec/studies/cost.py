"""What studies cost before they are run: weights, tokens, FLOPs, hours. Loads no weights.

    planned = plan({"4-twenty-models": chapter_experiments("4-twenty-models", parameters)})
    planned.models, planned.chapters        # tables
    planned.gpu_hours

Tokens are counted as a run packs them, see `method.rows`, with a model's own tokenizer where it
lies on this disk. FLOPs are two for each weight of a token, and for the unembedding of each token
that is read. What attention does, padding and loading are left out: some percent; and what micro
models take to be trained first: minutes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
from transformers import PreTrainedTokenizerBase

from paramspec.errors import InputError
from paramspec.execution.limits import cores, memory
from paramspec.method.pss import asked_questions, count_masks
from paramspec.method.rows import Engine, Request, fill_rows
from paramspec.method.scoring import encode
from paramspec.models.checkpoints import checkpoint_files, find_checkpoint
from paramspec.models.load import check_checkpoint, load_tokenizer
from paramspec.models.registry import empty_model, find_spec, published_config
from paramspec.models.tokens import token_ids
from paramspec.models.zoo import ZooModel
from paramspec.models.zoo_training import own_tokenizer
from paramspec.specwiki import questions_digest
from paramspec.studies.chapters import Experiment

EMBEDDED = "smollm2-135m"  # its tokenizer counts for models that are not on this disk
PACKED = Engine("packed", "as on every model but a few")
# fp32 operations of a CPU core a second: two fused multiply-adds of eight numbers a cycle (AVX2)
# at 3 GHz.
CORE = 2 * 2 * 8 * 3e9


class Gpu(NamedTuple):
    """Peak of dense matrix multiplication in bf16, FLOP/s; memory, bytes; who says so."""

    name: str
    peak: float
    memory: float
    source: str


GPUS = (
    Gpu("A100 80GB", 312e12, 80e9, "NVIDIA A100 datasheet"),
    Gpu("A100 40GB", 312e12, 40e9, "NVIDIA A100 datasheet"),
    Gpu("H100 80GB", 989.5e12, 80e9, "NVIDIA H100 datasheet, SXM: half of the sparse 1979"),
    Gpu("H200 141GB", 989.5e12, 141e9, "NVIDIA H200 datasheet, SXM: half of the sparse 1979"),
    Gpu("L40S", 362.05e12, 48e9, "NVIDIA L40S datasheet"),
    Gpu("L4", 121e12, 24e9, "NVIDIA L4 datasheet: half of the sparse 242"),
    Gpu("RTX 4090", 165.2e12, 24e9, "NVIDIA Ada whitepaper, sums in fp32"),
    Gpu("RTX 3090", 71e12, 24e9, "NVIDIA GA102 whitepaper, sums in fp32"),
)


def find_gpu(name: str) -> Gpu:
    """`find_gpu("rtx4090")`: of `GPUS` by name, spaces and case aside; `cpu` is this machine.

    Raises:
        InputError: if none is called so, or several.
    """

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    cpu = Gpu("cpu", cores() * CORE, memory(), f"{cores()} cores, AVX2 at 3 GHz")
    known = {plain(gpu.name): gpu for gpu in (*GPUS, cpu)}
    found = [gpu for key, gpu in known.items() if key.startswith(plain(name))]
    if plain(name) not in known and len(found) != 1:
        names = ", ".join(gpu.name for gpu in found or known.values())
        raise InputError(f"GPU {name!r}: {'could be several' if found else 'unknown'}; use {names}")
    return known.get(plain(name), found[0])


# --- tokens and FLOPs ---------------------------------------------------------------------------


class Tokens(NamedTuple):
    """Tokens that go through the model, and those whose logits are read."""

    passed: int
    read: int


def tokens_of(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """`tokens_of(experiment, tokenizer).passed`: for each model that reads with the tokenizer.

    Coefficients are recorded once on every cloze; then each concept's questions, and those that are
    not about it, are asked under each of its masks.
    """
    questions, choices = experiment.questions, experiment.choices
    items = {question.id: encode(tokenizer, question) for question in questions}
    passed = read = 0
    for concept in dict.fromkeys(question.concept for question in questions):
        asked = [Request(items[q.id], 0) for q, _ in asked_questions(questions, concept, choices)]
        cells = fill_rows(asked, PACKED, choices.row_tokens)
        passed += sum(len(cell.row.tokens) for cell in cells)
        read += sum(len(cell.row.places) for cell in cells)
    recorded = sum(map(len, token_ids(tokenizer, [question.cloze for question in questions])))
    masks = count_masks(choices)
    return Tokens(masks * passed + recorded, masks * read)


@dataclass(frozen=True)
class Subject:
    """A model as far as it is known without its weights.

    Attributes:
        parameters, unembedding: weights in all, and those of the unembedding.
        body: weights that each token is multiplied with, the unembedding's not among them.
        weights: bytes of its files, or of its weights in bf16 if they are not here.
        tokenizer: whose it is: its own, or that of `EMBEDDED`.
        micro: of the zoo.
    """

    parameters: int
    unembedding: int
    body: int
    weights: int
    on_disk: bool
    tokenizer: str
    micro: ZooModel | None

    def flops(self, tokens: Tokens) -> int:
        return 2 * (self.body * tokens.passed + self.unembedding * tokens.read)


def subject(name: str) -> Subject:
    """`subject("llama-2-7b").parameters`: from the registry, or from the model's config.

    Raises:
        InputError: if there is no model of that name.
    """
    spec = find_spec(name)
    micro = spec.micro if spec else None
    try:
        checkpoint = find_checkpoint(name, fetch=())
    except InputError:
        if spec is None:
            raise
        checkpoint = None
    if spec is not None and (spec.config or micro):
        model = empty_model(published_config(spec))
    else:
        model = check_checkpoint((checkpoint or find_checkpoint(name, fetch=())).path)
    parameters = sum(part.numel() for part in model.parameters())
    embedding = model.get_input_embeddings().weight
    unembedding = model.get_output_embeddings().weight
    weights = 2 * parameters
    if checkpoint is not None:
        weights = sum(path.stat().st_size for path in checkpoint_files(checkpoint.path).values())
    return Subject(
        parameters=parameters,
        unembedding=unembedding.numel(),
        body=parameters - sum(part.numel() for part in {embedding, unembedding}),
        weights=weights,
        on_disk=checkpoint is not None,
        tokenizer=name if checkpoint is not None or micro else EMBEDDED,
        micro=micro,
    )


# --- the plan -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What `plan` gives.

    Attributes:
        gpu: what hours are of, at `utilisation`, a share of its peak.
        models: a row a model, over all chapters: `model`, `parameters`, `weights` (bytes on disk),
            `on_disk`, `gpus` that hold it in bf16 (fp32 on a CPU), `tokens`, `flops`, `gpu_hours`,
            `micro`, and `tokenizer`, that counted the tokens. Work that chapters share counts once.
        chapters: a row a chapter, by itself: `chapter`, `models`, `concepts`, `tokens`, `flops`,
            `gpu_hours`, and `shared`, the part of its FLOPs that a chapter above has done.
    """

    gpu: Gpu
    utilisation: float
    models: pd.DataFrame
    chapters: pd.DataFrame

    @property
    def gpu_hours(self) -> float:
        return float(self.models["gpu_hours"].sum())

    def as_dict(self) -> dict[str, Any]:
        """`planned.as_dict()`: plain JSON; `totals` of what the tables list."""
        totals = {name: self.models[name].sum().item() for name in ("tokens", "flops", "gpu_hours")}
        return {
            "gpu": self.gpu._asdict(),
            "utilisation": self.utilisation,
            "models": self.models.to_dict("records"),
            "chapters": self.chapters.to_dict("records"),
            "totals": {"models": len(self.models), **totals},
        }


def plan(
    experiments: Mapping[str, Sequence[Experiment]],
    *,
    gpu: str = "A100 80GB",
    utilisation: float = 0.3,
) -> Plan:
    """`plan({"6-scale": chapter_experiments("6-scale", parameters)}).gpu_hours`.

    Args:
        experiments: of each chapter.
        gpu: see `find_gpu`.
        utilisation: share of the GPU's peak that is reached, above 0 and up to 1.

    Raises:
        InputError: for an unknown model or GPU, or a utilisation out of range.
    """
    if not 0 < utilisation <= 1:
        raise InputError(f"utilisation {utilisation:g}: expected a share above 0 and up to 1")
    chosen = find_gpu(gpu)
    names = dict.fromkeys(n for each in experiments.values() for one in each for n in one.models)
    subjects = {name: subject(name) for name in names}
    about = pd.DataFrame(map(vars, subjects.values()), index=list(subjects))
    size, room = (4, math.inf) if chosen.name == "cpu" else (2, 0.9 * chosen.memory)  # the loader's
    about["gpus"] = [math.ceil(size * count / room) or 1 for count in about["parameters"]]
    units = _units(experiments, subjects)
    hours = units["flops"] / (chosen.peak * utilisation) / 3600
    units["gpu_hours"] = units["model"].map(about["gpus"]) * hours
    again = units.duplicated(["model", "experiment"])
    units["shared"] = units["flops"].where(again, 0)
    sums = dict.fromkeys(("tokens", "flops", "gpu_hours"), "sum")
    models = units[~again].groupby("model", sort=False).agg(sums)
    chapters = units.groupby("chapter", sort=False).agg(
        {"model": "nunique", "concepts": "max", **sums, "shared": "sum"}
    )
    chapters["shared"] /= chapters["flops"]
    about["micro"] = about["micro"].notna()
    columns = ["parameters", "weights", "on_disk", "micro", "gpus", "tokenizer"]
    return Plan(
        chosen,
        utilisation,
        about[columns].join(models).rename_axis("model").reset_index(),
        chapters.rename(columns={"model": "models"}).reset_index(),
    )


def _units(
    experiments: Mapping[str, Sequence[Experiment]], subjects: Mapping[str, Subject]
) -> pd.DataFrame:
    """What each experiment asks of each model; models that read alike are counted once."""
    counted: dict[tuple[str, str], Tokens] = {}
    rows = []
    for chapter, one in ((chapter, one) for chapter, each in experiments.items() for one in each):
        key = f"{questions_digest(one.questions)} {one.choices.model_dump_json()}"
        concepts = len({question.concept for question in one.questions})
        for name in one.models:
            of = subjects[name]
            micro = (
                of.micro and f"{of.micro.recipe.vocabulary} tokens of {of.micro.recipe.concepts}"
            )
            reader = micro or of.tokenizer
            if (reader, key) not in counted:
                own = own_tokenizer(of.micro) if of.micro else _loaded_tokenizer(of.tokenizer)
                counted[reader, key] = tokens_of(one, own)
            tokens = counted[reader, key]
            row = {"chapter": chapter, "model": name, "experiment": key, "concepts": concepts}
            rows.append(row | {"tokens": tokens.passed, "flops": of.flops(tokens)})
    return pd.DataFrame(rows)


@functools.cache
def _loaded_tokenizer(name: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(find_checkpoint(name, fetch=()).path)
