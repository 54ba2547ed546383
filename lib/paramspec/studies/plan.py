"""What a profile costs before it is run: weights, memory, tokens, FLOPs and hours. No network.

    planned = plan("paper", gpu="A100 80GB", utilisation=0.3)
    planned.models[0].flops, planned.gpu_hours
    passes = pss_passes(items, engine, questions, choices)      # the forward passes of a study
    flops(passes, cost_of(published_config(spec)))              # of matrix multiplications

Questions, masks, rows and batches are listed by the functions that a run itself calls, so tokens
are exact for the tokenizer that counted them; masks are taken to begin in the first layer, as they
do unless layers compete for them. FLOPs are those of matrix multiplications, as
`torch.utils.flop_counter` counts them: projections, MLPs, attention scores, the unembedding where
it is applied, and the reduction of coefficients. Hours are FLOPs at a stated share of the GPU's
peak, and memory is an estimate.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from paramspec.errors import InputError
from paramspec.execution.limits import cores, memory
from paramspec.method.batches import BATCH_TOKENS
from paramspec.method.hooks import unverified_view, value_vector_view
from paramspec.method.masks import prompt_batches, sorted_prompts
from paramspec.method.pss import Choices, asked_questions, count_masks, parse_choices
from paramspec.method.rows import (
    READ_MULTIPLE,
    ROW_MULTIPLE,
    ROW_TOKENS,
    Cell,
    Engine,
    Item,
    Request,
    branches_within,
    cell_batches,
    fill_rows,
    round_up,
)
from paramspec.method.scoring import VOCABULARY_BLOCK, choose_engine, encode
from paramspec.models.registry import (
    checkpoint_files,
    comparable_models,
    empty_model,
    expand_models,
    find_checkpoint,
    find_spec,
    folds_asked,
    load_config,
    load_tokenizer,
    published_config,
    study_questions,
    toy_config,
)
from paramspec.models.zoo import ZooModel, load_zoo, own_tokenizer, tokens_to_train
from paramspec.specwiki import Question, questions_digest
from paramspec.studies.sweep import concept_shards
from paramspec_book import book

EMBEDDED = "smollm2-135m"  # its tokenizer counts for models that are not on this disk
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
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


# --- forward passes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """Forward passes, summed into what their cost depends on.

    Attributes:
        count: of passes.
        tokens: that questions need; each is computed once.
        computed: with padding, rows times the longest.
        pairs: of tokens that attention compares, rows times the longest squared.
        spared, spared_pairs: of `computed` and `pairs`, those whose first layer, up to its value
            vectors, was computed for another mask of the same row.
        unembedded: places whose logits are computed.
        recorded: of `computed`, those whose coefficients are recorded.
        largest: (rows, tokens of a row, places unembedded) of the pass that computes most.
    """

    count: int = 0
    tokens: int = 0
    computed: int = 0
    pairs: int = 0
    spared: int = 0
    spared_pairs: int = 0
    unembedded: int = 0
    recorded: int = 0
    largest: tuple[int, int, int] = (0, 0, 0)

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            *(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)[:-1]),
            max(self.largest, other.largest, key=lambda shape: (shape[0] * shape[1], shape[2])),
        )


def _total(passes: Iterable[Passes]) -> Passes:
    return sum(passes, Passes())


def _pass(
    lengths: Sequence[int],
    unembedded: int,
    *,
    recorded: bool = False,
    branched: bool = False,
    multiple: int = 1,
) -> Passes:
    """One forward pass over rows of these lengths, the longest first, padded to a multiple."""
    rows, longest = len(lengths), round_up(lengths[0], multiple)
    spared = rows - 1 if branched else 0
    return Passes(
        count=1,
        tokens=sum(lengths),
        computed=rows * longest,
        pairs=rows * longest**2,
        spared=spared * longest,
        spared_pairs=spared * longest**2,
        unembedded=unembedded,
        recorded=rows * longest if recorded else 0,
        largest=(rows, longest, unembedded),
    )


def _cell_passes(
    packed: list[Cell], plain: list[Cell], engine: Engine, batch_tokens: int
) -> Passes:
    found = Passes()
    for batch in cell_batches(packed, batch_tokens, engine.branches):
        found += _pass(
            [len(cell.row.tokens) for cell in batch],
            round_up(sum(len(cell.row.places) for cell in batch), READ_MULTIPLE),
            branched=branches_within(batch, engine),
            multiple=ROW_MULTIPLE,
        )
    for batch in cell_batches(plain, batch_tokens, branches=False):
        lengths = [len(cell.row.tokens) for cell in batch]
        found += _pass(lengths, sum(len(cell.row.reads) for cell in batch))
    return found


def scoring_passes(
    items: Sequence[Item],
    engine: Engine,
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
) -> Passes:
    """`scoring_passes(items, engine)`: those of `score_options`, each item once, without a mask."""
    cells = fill_rows([Request(item, 0) for item in items], engine, row_tokens)
    return _cell_passes(*cells, engine, batch_tokens)


def pss_passes(
    items: Mapping[str, Item],
    engine: Engine,
    questions: Sequence[Question],
    choices: Choices,
    concepts: Sequence[str] | None = None,
) -> Passes:
    """`pss_passes(items, engine, questions, choices)`: those of `measure_concepts`, unit by unit.

    Args:
        items: of all questions by id, from `encode`.
        concepts: measured together; if not given, all of the questions, in units as `measure_pss`
            makes them.
    """
    shards = concept_shards(questions) if concepts is None else [list(concepts)]
    masks = count_masks(choices)

    def cells_of(concept: str) -> list[list[Cell]]:
        """Packed and plain; each mask of a concept fills the same rows."""
        asked = [items[q.id] for q, _ in asked_questions(questions, concept, choices)]
        cells = fill_rows([Request(item, 0) for item in asked], engine, choices.row_tokens)
        return [[cell for cell in kind for _ in range(masks)] for kind in cells]

    found = Passes()
    for shard in shards:
        kinds = zip(*map(cells_of, shard), strict=True)
        packed, plain = (list(itertools.chain(*kind)) for kind in kinds)
        found += _cell_passes(packed, plain, engine, choices.batch_tokens)
    return found


def recording_passes(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    batch_tokens: int = BATCH_TOKENS,
) -> Passes:
    """`recording_passes(tokenizer, questions)`: those of `record_concepts`."""
    clozes = [question.cloze for question in questions]
    return _total(
        _pass([len(prompt) for prompt, _ in batch], 1, recorded=True)
        for batch in prompt_batches(sorted_prompts(tokenizer, clozes), batch_tokens)
    )


# --- a model's cost -----------------------------------------------------------------------------


class Cost(NamedTuple):
    """FLOPs a token, a pair of tokens in attention, a place unembedded, a token recorded.

    `first_token` and `first_pair` are those of the first layer up to its value vectors.
    """

    token: int
    pair: int
    first_token: int
    first_pair: int
    unembedded: int
    recorded: int


def cost_of(config: PreTrainedConfig) -> Cost:
    """`cost_of(published_config(spec)).token`: FLOPs of the model's matrix multiplications.

    Read off the model on the `meta` device: two for each weight of a projection.
    """
    model = empty_model(config)
    view, unembedding = unverified_view(model), model.get_output_embeddings()
    projections = {
        name: 2 * part.weight.numel()
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | Conv1D) and part is not unembedding
    }
    down = view.names[0]
    layer = down[: down.index(".0.") + 3]
    # Queries with keys, and their weights with values.
    pair = 4 * config.num_attention_heads * _head_dim(config)
    return Cost(
        token=sum(projections.values()),
        pair=config.num_hidden_layers * pair,
        first_token=sum(
            cost for name, cost in projections.items() if name.startswith(layer) and name != down
        ),
        first_pair=pair,
        unembedded=2 * unembedding.weight.numel(),
        recorded=2 * view.layers * view.width,
    )


def flops(passes: Passes, cost: Cost) -> int:
    """`flops(passes, cost_of(config))`: as `torch.utils.flop_counter` would count them."""
    return (
        passes.computed * cost.token
        + passes.pairs * cost.pair
        - passes.spared * cost.first_token
        - passes.spared_pairs * cost.first_pair
        + passes.unembedded * cost.unembedded
        + passes.recorded * cost.recorded
    )


def peak_memory(
    config: PreTrainedConfig,
    parameters: int,
    width: int,
    largest: tuple[int, int, int],
    size: int,
) -> int:
    """`peak_memory(config, spec.parameters, spec.mlp_width, passes.largest, 2)`: an estimate.

    Weights of `size` bytes, what one layer holds of the largest batch (states, MLP, scores and mask
    of attention, coefficients in fp32), and a block of the logits; in bytes.
    """
    rows, length, unembedded = largest
    heads, hidden = config.num_attention_heads, config.hidden_size
    states = rows * length * (6 * hidden + 4 * heads * _head_dim(config) + 3 * width) * size
    attention = rows * length**2 * (heads * (size + 4) + size)
    recorded = rows * (2 * length + config.num_hidden_layers) * width * 4
    logits = min(config.vocab_size, VOCABULARY_BLOCK) * unembedded * (size + 8)
    return parameters * size + states + attention + recorded + logits


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# --- studies ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """What a chapter asks of some models, as one call of the library.

    `kind` is `pss` (`measure_pss`), `answers` (`score_questions`) or `coefficients`
    (`concept_coefficients`).
    """

    kind: str
    models: tuple[str, ...]
    questions: tuple[Question, ...]
    choices: Choices


def chapter_studies(chapter: str, parameters: Mapping[str, Any]) -> list[Study]:
    """`chapter_studies("3-masking", parameters)`: what the chapter measures, in its order.

    Args:
        chapter: one of `CHAPTERS`.
        parameters: all that the chapter declares.
    """
    return CHAPTERS[chapter](parameters)


def _choices(p: Mapping[str, Any], **others: object) -> Choices:
    names = ("ratios", "folds", "general", "controls", "position", "scope", "seed")
    return parse_choices(**{name: p[name] for name in names if name in p}, **others)


def _held_out(choices: Choices) -> Choices:
    return choices.model_copy(update={"protocol": "holdout", "controls": 0})


def _specwiki(p: Mapping[str, Any]) -> list[Study]:
    asked = study_questions([p["model"]], p["concepts"], p["seed"])
    asked = [question for question in asked if question.fold in folds_asked([p["model"]])]
    blind = [question.model_copy(update={"cloze": "Answer:"}) for question in asked]
    return [
        Study("answers", (p["model"],), tuple(questions), Choices()) for questions in (asked, blind)
    ]


def _masking(p: Mapping[str, Any]) -> list[Study]:
    asked = tuple(study_questions([p["model"]], p["concepts"], p["seed"]))
    choices = _choices(p).with_folds(folds_asked([p["model"]]))
    return [Study("pss", (p["model"],), asked, c) for c in (choices, _held_out(choices))]


def _over_models(p: Mapping[str, Any]) -> tuple[list[str], tuple[Question, ...], Choices]:
    names = expand_models(p["models"])
    asked = study_questions(names, p["concepts"], p["seed"])
    return names, tuple(asked), _choices(p, nulls=["random"])


def _twenty_models(p: Mapping[str, Any]) -> list[Study]:
    names, asked, choices = _over_models(p)
    measured = comparable_models(names) or names
    return [
        Study("pss", tuple(names), asked, choices),
        Study("pss", tuple(measured), asked, _held_out(choices)),
    ]


def _frequency(p: Mapping[str, Any]) -> list[Study]:
    names, asked, choices = _over_models(p)
    pairs = expand_models(p["turned"]) if p["turned"] else []
    return [Study("pss", tuple(dict.fromkeys(names + pairs)), asked, choices)]


def _one_sweep(p: Mapping[str, Any]) -> list[Study]:
    names, asked, choices = _over_models(p)
    return [Study("pss", tuple(names), asked, choices)]


def _sensitivity(p: Mapping[str, Any]) -> list[Study]:
    names = expand_models(p["models"])
    names, asked, choices = _over_models(p | {"models": comparable_models(names) or names})
    changes = (
        {"position": "last"},
        {"scope": "model"},
        {"protocol": "holdout"},
        {"seed": p["seed"] + 1},
    )
    changed = [choices.model_copy(update={"controls": 0} | change) for change in changes]
    studies = [Study("pss", tuple(names), asked, c) for c in (choices, *changed)]
    # The chapter looks at a measured model too, whose coefficients are there by then.
    looked_at = (p["magnified"],) if p["magnified"] else ()
    for position in ("mean", "last") if looked_at else ():
        at = choices.model_copy(update={"position": position})
        studies.append(Study("coefficients", looked_at, asked, at))
    return studies


CHAPTERS: dict[str, Callable[[Mapping[str, Any]], list[Study]]] = {
    "2-specwiki": _specwiki,
    "3-masking": _masking,
    "4-twenty-models": _twenty_models,
    "5-frequency": _frequency,
    "6-scale": _one_sweep,
    "7-pretraining": _one_sweep,
    "sensitivity": _sensitivity,
}


# --- the plan -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelPlan:
    """What a model costs in all chapters; work that chapters share counts once.

    `tokens` are those that questions need, `computed` those with padding; `disk` and `memory` are
    bytes, `memory` that of all `gpus` together. `tokenizer` counted the tokens, which are exact if
    it is the model's own. `hours` pass while all its GPUs are taken.
    """

    model: str
    parameters: int
    disk: int
    on_disk: bool
    memory: int
    gpus: int
    tokenizer: str
    exact: bool
    engine: str
    passes: int
    tokens: int
    computed: int
    flops: int
    hours: float
    gpu_hours: float


@dataclass(frozen=True)
class ChapterPlan:
    """What a chapter costs by itself, and how much of that an earlier chapter has done."""

    chapter: str
    models: int
    concepts: int
    tokens: int
    flops: int
    gpu_hours: float
    shared_flops: int


@dataclass(frozen=True)
class Training:
    """A micro model that is not trained yet: tokens, six FLOPs a weight and token, core-hours.

    Without what it shares with another one that is trained with it.
    """

    model: str
    tokens: int
    flops: int
    core_hours: float


@dataclass(frozen=True)
class Plan:
    """What `plan` gives; `asdict(planned)` is what `paramspec plan --json` prints."""

    profile: str
    gpu: str
    peak: float
    gpu_memory: float
    source: str
    dtype: str
    utilisation: float
    models: list[ModelPlan]
    chapters: list[ChapterPlan]
    training: list[Training]
    notes: list[str] = field(default_factory=list)

    @property
    def flops(self) -> int:
        return sum(model.flops for model in self.models)

    @property
    def gpu_hours(self) -> float:
        return sum(model.gpu_hours for model in self.models)

    def as_dict(self) -> dict[str, Any]:
        totals = {"models": len(self.models), "tokens": sum(model.tokens for model in self.models)}
        totals |= {"flops": self.flops, "gpu_hours": self.gpu_hours}
        return asdict(self) | {"totals": totals}


def find_gpu(name: str) -> Gpu:
    """`find_gpu("rtx4090")`: of `GPUS` by name, spaces and case aside; `cpu` is this machine.

    Raises:
        InputError: if none is called so, or several.
    """
    count = cores()
    cpu = Gpu("cpu", count * CORE, memory(), f"{count} cores, AVX2 at 3 GHz")

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    known = [*GPUS, cpu]
    found = [gpu for gpu in known if plain(gpu.name) == plain(name)]
    found = found or [
        gpu for gpu in known if plain(name) and plain(gpu.name).startswith(plain(name))
    ]
    if len(found) != 1:
        names = ", ".join(gpu.name for gpu in (found or known))
        raise InputError(f"GPU {name!r}: {'could be several' if found else 'unknown'}; use {names}")
    return found[0]


def plan(
    profile: str = "default",
    chapters: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    *,
    gpu: str = "A100 80GB",
    utilisation: float = 0.3,
    root: Path | None = None,
) -> Plan:
    """`plan("paper").gpu_hours`: what the chapters of the book cost under a profile.

    Args:
        profile: of book/profiles, or a YAML file.
        chapters: only these; all of the book's if none is given.
        parameters: go before the profile's, in each chapter that declares them.
        gpu: see `find_gpu`.
        utilisation: share of the GPU's peak that is reached, above 0 and up to 1.

    Raises:
        InputError: for an unknown profile, chapter, parameter, model or GPU, for a utilisation out
            of range, and if no chapter is left that measures models.
    """
    if not 0 < utilisation <= 1:
        raise InputError(f"utilisation {utilisation:g}: expected a share above 0 and up to 1")
    chosen = find_gpu(gpu)
    root = root or book.find_root()
    values, left_out = _parameters(profile, chapters, parameters or {}, root)
    size = 4 if chosen.name == "cpu" else 2
    known = _Known()
    by_chapter: dict[str, dict[tuple, Passes]] = {}
    concepts: dict[str, int] = {}
    for chapter, given in values.items():
        studies = chapter_studies(chapter, given)
        concepts[chapter] = max(len({q.concept for q in study.questions}) for study in studies)
        by_chapter[chapter] = {}
        for study in studies:
            for name in study.models:
                by_chapter[chapter] |= known.units(name, study)

    def hours(found: int) -> float:
        return found / (chosen.peak * utilisation) / 3600

    units = {key: passes for found in by_chapter.values() for key, passes in found.items()}
    models: dict[str, ModelPlan] = {}
    for name in dict.fromkeys(key[0] for key in units):
        subject = known.subject(name)
        passes = _total(found for key, found in units.items() if key[0] == name)
        memory = peak_memory(
            subject.config, subject.parameters, subject.width, passes.largest, size
        )
        cards = 1
        if chosen.name != "cpu":  # the loader leaves a tenth of each GPU free of weights
            weights = subject.parameters * size / 0.9
            cards = math.ceil(max(weights, memory) / chosen.memory)
        spent = flops(passes, subject.cost)
        models[name] = ModelPlan(
            model=name,
            parameters=subject.parameters,
            disk=subject.disk,
            on_disk=subject.on_disk,
            memory=memory,
            gpus=cards,
            tokenizer=subject.tokenizer,
            exact=subject.exact,
            engine=subject.engine.name,
            passes=passes.count,
            tokens=passes.tokens,
            computed=passes.computed,
            flops=spent,
            hours=hours(spent),
            gpu_hours=cards * hours(spent),
        )
    done: set[tuple] = set()
    rows = []
    for chapter, found in by_chapter.items():
        each = {key: flops(passes, known.subject(key[0]).cost) for key, passes in found.items()}
        rows.append(
            ChapterPlan(
                chapter=chapter,
                models=len({key[0] for key in found}),
                concepts=concepts[chapter],
                tokens=sum(passes.tokens for passes in found.values()),
                flops=sum(each.values()),
                gpu_hours=sum(models[key[0]].gpus * hours(spent) for key, spent in each.items()),
                shared_flops=sum(spent for key, spent in each.items() if key in done),
            )
        )
        done |= found.keys()
    return Plan(
        profile=profile,
        gpu=chosen.name,
        peak=chosen.peak,
        gpu_memory=chosen.memory,
        source=chosen.source,
        dtype="float32" if size == 4 else "bfloat16",
        utilisation=utilisation,
        models=list(models.values()),
        chapters=rows,
        training=known.training(list(models), utilisation),
        notes=_notes(list(models.values()), left_out),
    )


def _parameters(
    profile: str, chapters: Sequence[str], given: Mapping[str, Any], root: Path
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The parameters of each chapter to plan, and the chapters that are not planned."""
    table = book.load_profile(profile, root)
    found = [book.find_chapter(name, root) for name in chapters] or book.chapters(root)
    planned = [chapter for chapter in found if chapter.name in CHAPTERS]
    if not planned:
        named = ", ".join(chapters) or "the book"
        raise InputError(
            f"profile {profile}: {named} has no chapter that measures models; "
            f"name one of {', '.join(CHAPTERS)}"
        )
    values, used = {}, set()
    for chapter in planned:
        declared = book.declared_parameters(chapter)
        own = {name: value for name, value in given.items() if name in declared}
        used |= own.keys()
        values[chapter.name] = {p.name: p.default for p in declared.values()}
        values[chapter.name] |= book.check_parameters(
            chapter, table.get(chapter.name, {}), f"profile {profile}"
        )
        values[chapter.name] |= book.check_parameters(chapter, own, "-p")
    for name in given:
        if name not in used:
            raise InputError(f"-p {name}: no chapter planned here has such a parameter; correct it")
    return values, [chapter.name for chapter in found if chapter.name not in CHAPTERS]


@dataclass(frozen=True)
class _Subject:
    """A model to plan for: what is known of it without its weights."""

    config: PreTrainedConfig
    parameters: int
    width: int
    cost: Cost
    engine: Engine
    disk: int
    on_disk: bool
    tokenizer: str
    exact: bool
    micro: ZooModel | None


class _Known:
    """What a plan has found out so far: models by name, questions in tokens, passes of studies.

    Most models share tokenizers and are asked the same: each is counted once.
    """

    def __init__(self) -> None:
        self._subjects: dict[str, _Subject] = {}
        self._engines: dict[tuple, Engine] = {}
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self._items: dict[tuple, dict[str, Item]] = {}
        self._passes: dict[tuple, Passes] = {}
        self._digests: dict[int, tuple[tuple[Question, ...], str]] = {}

    def subject(self, name: str) -> _Subject:
        if name not in self._subjects:
            self._subjects[name] = self._look_up(name)
        return self._subjects[name]

    def _look_up(self, name: str) -> _Subject:
        spec = find_spec(name)
        micro = _micro(spec.id) if spec is not None and spec.source.kind == "zoo" else None
        try:
            checkpoint = find_checkpoint(name, download=False)
            disk = sum(path.stat().st_size for path in checkpoint_files(checkpoint.path).values())
        except InputError:
            if spec is None:
                raise
            checkpoint, disk = None, 0
        if spec is not None and (spec.config or micro):
            config = published_config(spec)
        else:
            config = load_config(checkpoint)
        cost = cost_of(config)
        empty = empty_model(config)
        parameters = sum(part.numel() for part in empty.parameters())
        if micro is not None:
            recipe = micro.recipe
            key = f"of {recipe.vocabulary} tokens, from the corpus on {recipe.concepts}"
            if key not in self._tokenizers:
                self._tokenizers[key] = own_tokenizer(micro)
        else:
            key = name if checkpoint is not None else EMBEDDED
            if key not in self._tokenizers:
                self._tokenizers[key] = (
                    _embedded_tokenizer() if key == EMBEDDED else load_tokenizer(checkpoint)
                )
        if checkpoint is None:
            disk = parameters * BYTES[spec.config.dtype if spec.config else "float32"]
        return _Subject(
            config=config,
            parameters=parameters,
            width=unverified_view(empty).width,
            cost=cost,
            engine=self._engine(config),
            disk=disk,
            on_disk=checkpoint is not None,
            tokenizer=key,
            exact=micro is not None or checkpoint is not None,
            micro=micro,
        )

    def _engine(self, config: PreTrainedConfig) -> Engine:
        """Chosen on a toy of the same class; how far a path may reach is the model's own."""
        key = (type(config), tuple(sorted(set(getattr(config, "layer_types", None) or []))))
        if key not in self._engines:
            toy = AutoModelForCausalLM.from_config(toy_config(config)).eval()
            self._engines[key] = choose_engine(value_vector_view(toy))
        engine = self._engines[key]
        if engine.longest is None:
            return engine
        return replace(engine, longest=getattr(config, "sliding_window", None))

    def units(self, name: str, study: Study) -> dict[tuple, Passes]:
        """What the study asks of the model, by what the store keeps apart."""
        subject, choices = self.subject(name), study.choices
        digest = self._digest(study.questions)
        engine = self._engine_for(subject, study.questions)
        engine_key = (engine.name, engine.longest)
        budget = (choices.row_tokens, choices.batch_tokens)
        found: dict[tuple, Passes] = {}
        if study.kind in ("pss", "coefficients"):
            unit = ("coefficients", digest, choices.position, choices.batch_tokens)
            found[name, *unit] = self._counted(
                (subject.tokenizer, "coefficients", digest, choices.batch_tokens),
                lambda: recording_passes(
                    self._tokenizers[subject.tokenizer], study.questions, choices.batch_tokens
                ),
            )
        if study.kind == "pss":
            found[name, "pss", digest, choices.model_dump_json()] = self._counted(
                (subject.tokenizer, *engine_key, "pss", digest, choices.model_dump_json()),
                lambda: pss_passes(
                    self._encoded(subject.tokenizer, study.questions),
                    engine,
                    study.questions,
                    choices,
                ),
            )
        if study.kind == "answers":
            found[name, "answers", digest, budget] = self._counted(
                (subject.tokenizer, *engine_key, "answers", digest, budget),
                lambda: scoring_passes(
                    list(self._encoded(subject.tokenizer, study.questions).values()),
                    engine,
                    *budget,
                ),
            )
        return found

    def _engine_for(self, subject: _Subject, questions: Sequence[Question]) -> Engine:
        """The model's engine; a limit that no question reaches is left out, and counts shared."""
        engine = subject.engine
        items = self._encoded(subject.tokenizer, questions).values()
        longest = max(len(item.context) + max(map(len, item.options)) - 1 for item in items)
        if engine.longest is not None and longest <= engine.longest:
            return replace(engine, longest=None)
        return engine

    def _counted(self, key: tuple, count: Callable[[], Passes]) -> Passes:
        if key not in self._passes:
            self._passes[key] = count()
        return self._passes[key]

    def _encoded(self, tokenizer: str, questions: Sequence[Question]) -> dict[str, Item]:
        key = (tokenizer, self._digest(questions))
        if key not in self._items:
            reader = self._tokenizers[tokenizer]
            self._items[key] = {question.id: encode(reader, question) for question in questions}
        return self._items[key]

    def _digest(self, questions: Sequence[Question]) -> str:
        # The questions are kept, so that their id stays theirs.
        if id(questions) not in self._digests:
            self._digests[id(questions)] = (questions, questions_digest(questions))
        return self._digests[id(questions)][1]

    def training(self, names: Sequence[str], utilisation: float) -> list[Training]:
        """Of the micro models that are not there; the checkpoints of a run come with its last."""
        runs: dict[str, ZooModel] = {}
        for subject in (self.subject(name) for name in names):
            if subject.micro is not None and not subject.on_disk:
                name = subject.micro.name.removesuffix(f"@{subject.micro.step}")
                last = subject.micro.model_copy(update={"step": None, "name": name})
                runs.setdefault(last.recipe.model_dump_json(), last)
        found = []
        shared: dict[str, ZooModel] = {}  # by trunk, the one that was on it before
        for model in sorted(runs.values(), key=lambda model: model.recipe.steps):
            tokens = tokens_to_train(model)
            if before := shared.get(model.recipe.trunk):
                step = before.recipe.branch
                tokens -= tokens_to_train(model.model_copy(update={"step": step}))
            shared[model.recipe.trunk] = model
            spent = 6 * model.recipe.parameters * tokens
            found.append(Training(model.name, tokens, spent, spent / (CORE * utilisation) / 3600))
        return found


@functools.cache
def _embedded_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(find_checkpoint(EMBEDDED, download=False))


def _micro(name: str) -> ZooModel:
    file, colon, model = name.rpartition(":")
    path = Path(file).expanduser()
    return load_zoo(path)[f"{path.as_posix()}:{model}"] if colon else load_zoo()[name]


def _notes(models: Sequence[ModelPlan], left_out: Sequence[str]) -> list[str]:
    notes = [
        "Work that chapters share is counted once; results already in the store are not looked up.",
        "Memory is an estimate: weights, the largest batch, logits. Hours are FLOPs at that share "
        "of the peak; loading and downloading come on top.",
        "Not counted: test passes of a few tokens at each load, and the open answers of chapter 2.",
    ]
    guessed = sum(not model.exact for model in models)
    if guessed:
        notes.append(
            f"Tokens are exact where a model's own tokenizer counted them. Not on this disk: "
            f"{guessed} models, counted with the tokenizer of {EMBEDDED}."
        )
    if any(model.gpus > 1 for model in models):
        notes.append("A model on several GPUs uses one of them at a time.")
    if any(model.parameters < 1e7 for model in models):
        notes.append("Micro models are bound by overhead: their hours are a lower bound.")
    if left_out:
        notes.append(f"Not planned: {', '.join(left_out)}.")
    return notes
