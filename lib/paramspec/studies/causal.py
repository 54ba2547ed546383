"""Fine-tune a model in many ways and evaluate each result: what chapters 8 and 9 measure.

    runs = [Run("original", None, evaluation), Run("FT-PV/0", training, evaluation), ...]
    study = measure_runs("smollm2-135m", questions, runs)
    study.answers, study.generated, study.texts, study.pss, study.curves, study.samples
    draws = resample_runs(study.answers, "correct_norm")     # [1 + resamples, runs], as in trends

A run is one training (or none) and what is asked of its result. Trained value vectors and answers
are stored apart as they are done, so that a rerun after a crash, one more question to ask, or a
second chapter trains nothing twice.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from paramspec.errors import InputError
from paramspec.execution.limits import release_memory
from paramspec.execution.parallel import begin_work, hand_out, on_this_machine
from paramspec.execution.provenance import group_records, read_computed
from paramspec.execution.store import Store
from paramspec.method.batches import in_batches
from paramspec.method.generation import (
    GENERATION_VERSION,
    MAX_NEW_TOKENS,
    OPEN_PROMPT,
    answer_matches,
    decode,
    first_lines,
    likeliest,
)
from paramspec.method.hooks import (
    ValueVectorView,
    replace_value_vectors,
    train_value_vectors,
    value_vector_view,
)
from paramspec.method.kernels import arithmetic
from paramspec.method.masks import mean_coefficients, record_concepts
from paramspec.method.pss import Choices, count_masks, measure_concepts
from paramspec.method.rows import Engine, Request
from paramspec.method.scoring import SCORING_VERSION, choose_engine, encode, score_options
from paramspec.models.checkpoints import (
    Checkpoint,
    checkpoint_files,
    digest_files,
    find_checkpoints,
)
from paramspec.models.describe import folds_asked, require_taught
from paramspec.models.devices import place_and_dtype
from paramspec.models.load import LoadedModel, load_model
from paramspec.models.tokens import front_tokens, token_ids
from paramspec.specwiki import Question, questions_digest
from paramspec.stats.trends import Draws, resample_models
from paramspec.studies.finetune import (
    FINETUNE_VERSION,
    METHODS,
    Coefficients,
    Diverged,
    Training,
    choose_vectors,
    count_steps,
    encode_texts,
    next_token_nats,
    optimizer_bytes,
    train,
    training_texts,
)
from paramspec.studies.hallucination import sample_answers
from paramspec.studies.records import unit_record
from paramspec.studies.sweep import (
    Identity,
    answer_row,
    elsewhere,
    require_same_arithmetic,
    require_shared,
    watching,
)

TRAINED = "vectors.safetensors"
RECORD = "record.json"
TABLES = ("answers", "generated", "texts", "pss", "curve", "samples")
EVALUATION_VERSION = 4  # raised whenever a change of this file could move what is stored
PROSE = Path(__file__).with_name("prose.txt")  # prose.md says whose it is
PASSAGE_TOKENS = 128
LIKELIHOOD_TOKENS = 256  # of texts in a forward pass, whose logits are all in memory


class Evaluation(BaseModel):
    """What is asked of a model once it is trained.

    Attributes:
        folds: of the questions on the concepts trained on, those asked. None: 1 of a micro model,
            which was trained on the clozes of fold 0; else both.
        others: questions on other concepts, of the same folds; drawn once for all runs.
        open_ended: the questions on the trained concepts are also asked without options: as the
            `question` after examples, as the `cloze` alone (which is all that a micro model can
            continue), or not at all.
        stated: statements of other concepts whose likelihood is taken.
        prose: passages of 128 tokens of English prose whose likelihood is taken: the beginning of
            Jane Austen's "Mansfield Park" (`prose.txt`), some 90 passages.
        choices: PSS is measured with these, on the trained concepts against `others`; if given.
        points: parts of the training between which accuracy is measured.
        sampled: of the questions asked open-ended, how many are also answered by sampling.
        samples: answers sampled to each of those.
        temperature: of the samples.
        seed: of the questions and statements on other concepts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folds: tuple[int, ...] | None = None
    others: int = 0
    open_ended: Literal["question", "cloze", "no"] = "no"
    stated: int = 0
    prose: int = 0
    choices: Choices | None = None
    points: int = 1
    sampled: int = 0
    samples: int = 10
    temperature: float = 1.0
    seed: int = 0

    def parts(self) -> dict[str, dict[str, object]]:
        """What is measured, and the fields that each part depends on: parts are stored apart."""
        fields = {
            "answers": ("folds", "others", "seed"),
            "generated": ("folds", "open_ended"),
            "texts": ("stated", "prose", "seed"),
            "pss": ("folds", "others", "choices", "seed"),
            "curve": ("folds", "points"),
            "samples": ("folds", "open_ended", "sampled", "samples", "temperature", "seed"),
        }
        wanted = {"answers", "curve"}
        wanted |= {"generated"} if self.open_ended != "no" else set()
        wanted |= {"texts"} if self.stated or self.prose else set()
        wanted |= {"pss"} if self.choices else set()
        wanted |= {"samples"} if self.sampled and self.open_ended != "no" else set()
        values = self.model_dump(mode="json")
        return {
            part: {name: values[name] for name in names}
            for part, names in fields.items()
            if part in wanted
        }


@dataclass(frozen=True)
class Run:
    """A training, or the model as it is, under a name that no other run of a study has.

    `concepts` are those asked about; those trained on if there is a training.
    """

    name: str
    training: Training | None
    evaluation: Evaluation
    concepts: tuple[str, ...] = ()

    @property
    def about(self) -> tuple[str, ...]:
        return self.training.concepts if self.training else self.concepts


def trained_concepts(questions: Sequence[Question], count: int, seed: int = 0) -> tuple[str, ...]:
    """`trained_concepts(questions, 10)`: concepts of the high tier, by the hash of their names.

    Raises:
        InputError: if there are fewer.
    """
    names = sorted(
        {question.concept for question in questions if question.tier == "high"},
        key=lambda name: _hash(seed, name),
    )
    if not 1 <= count <= len(names):
        raise InputError(
            f"concepts {count}: the questions hold {len(names)} concepts of the high tier; ask for "
            "1 or more, and no more than that"
        )
    return tuple(names[:count])


def causal_runs(
    training: Training,
    evaluation: Evaluation,
    *,
    seeds: int = 3,
    full_seeds: int | None = None,
    doses: Sequence[float] = (),
    dosed: Sequence[str] = ("FT-PV", "FT-RV"),
    rules: Sequence[str] = (),
    rates: Sequence[float] = (),
    alone: bool = False,
) -> dict[str, list[Run]]:
    """`parts = causal_runs(training, evaluation, doses=[1/32, 1/4])`: the runs of a causal study.

    Args:
        training: an FT-PV; what is not varied stays as it is.
        evaluation: in full, of the part `methods`; of the others, multiple choice and likelihoods.
        seeds: of each method.
        full_seeds: of these, how many are also asked open-ended and measured for PSS, which takes
            longest; all if not given.
        doses: other shares, for the methods `dosed`.
        rules: other rules to choose the vectors of FT-PV by.
        rates: other learning rates, as multiples of the training's.
        alone: whether each concept is also trained on by itself.

    Returns:
        `methods` (with the original), `doses`, `rules`, `rates` and `alone`.
    """
    brief = evaluation.model_copy(
        update={"open_ended": "no", "choices": None, "points": 1, "others": 0, "sampled": 0}
    )

    def run(name: str, asked: Evaluation, **changed: object) -> Run:
        return Run(name, training.model_copy(update=changed), asked)

    first = training.seed
    unwatched = evaluation.model_copy(update={"points": 1})
    without = unwatched.model_copy(update={"choices": None, "open_ended": "no"})
    parts = {"methods": [Run("original", None, unwatched, training.concepts)]}
    for number in range(seeds):
        asked = unwatched if number < (seeds if full_seeds is None else full_seeds) else without
        asked = evaluation if number == 0 else asked
        s = first + number
        parts["methods"] += [run(f"{m}/{s}", asked, method=m, seed=s) for m in METHODS]
    parts["doses"] = [
        run(f"{m}/share {share:.4g}", brief, method=m, share=share)
        for share in doses
        for m in dosed
    ]
    parts["rules"] = [run(f"FT-PV/{rule}", brief, rule=rule) for rule in rules]
    parts["rates"] = [
        run(f"{m}/rate x{rate:g}", brief, method=m, learning_rate=rate * training.learning_rate)
        for rate in rates
        for m in METHODS
    ]
    parts["alone"] = [
        run(f"{m}/{concept}", brief, method=m, concepts=(concept,))
        for concept in training.concepts * alone
        for m in METHODS
    ]
    return parts


class CausalStudy(NamedTuple):
    """What `measure_runs` gives; each table has a column `run`, the name of it.

    Attributes:
        runs: a row a run: `method` (`original` without training), `rule`, `share`, `seed`,
            `learning_rate`, `vectors`, `parameters`, `optimizer_bytes`, `steps`, `loss_first`,
            `loss_last`, `seconds` of training.
        answers: multiple choice, columns as `score_questions` gives, and `trained`, whether the
            question is on a concept trained on.
        generated: open-ended: `question_id`, `concept`, `answer`, `correct`, and `state`, the last
            hidden state of the answer's last token.
        samples: of some of these questions: `question_id`, `concept`, and lists over samples,
            `answers`, `log_likelihoods` and `tokens`, see `hallucination.Sampled`.
        texts: `kind` (`statements` or `prose`), `text` (its number), `nats` (its negative
            log-likelihood), `tokens` (those predicted).
        pss: `PSS_COLUMNS`, with the run's name as `model`.
        curves: `step`, `loss` (of its batch), `accuracy` on the trained concepts where measured,
            the original's at step 0 and the run's at the last.
        vectors: by run, int32 `[n, 2]`, the (layer, value vector) that it trained.
        computed: what trained and measured each part of each run: distinct records, as
            `provenance.group_records` gives.
    """

    runs: pd.DataFrame
    answers: pd.DataFrame
    generated: pd.DataFrame
    texts: pd.DataFrame
    pss: pd.DataFrame
    curves: pd.DataFrame
    samples: pd.DataFrame
    vectors: dict[str, Tensor]
    computed: list[dict[str, object]]


def measure_runs(
    model: str,
    questions: Sequence[Question],
    runs: Sequence[Run],
    *,
    store: Store | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> CausalStudy:
    """`study = measure_runs("smollm2-135m", questions, runs)`: train and evaluate each.

    Args:
        model: as `load_model` takes it.
        questions: hold the concepts trained on, and the other concepts; of a micro model, concepts
            that it was taught.
        runs: handed out to the processes or machines that `workers` says.
        store: where trained vectors and answers are kept and looked for.

    Raises:
        InputError: if two runs have one name, if a concept is unknown or has no statements, if a
            micro model must not be asked a question (see `require_taught`), or if PSS needs folds
            that an evaluation leaves out, before any training; if a training diverges, with its
            name: what is finished is kept.
    """
    runs = [_with_folds(run, folds_asked([model])) for run in runs]
    _refuse(runs, questions)
    folds = {fold for run in runs for fold in _scored(run.evaluation)}
    require_taught([model], questions, folds)
    plan = _plan(model, questions, runs, store or Store("results/store"), dtype, device)
    plan.store.remove_leftovers()
    missing = [run for run in runs if not plan.is_whole(run)]
    with tqdm(total=len(runs), desc=plan.identity.name, unit="run") as bar:
        bar.update(len(runs) - len(missing))
        if missing and not on_this_machine():
            require_shared(plan.store, [plan.checkpoint.path])
        missing.sort(key=lambda run: -_cost(run, questions))
        waiting = {run.name: (plan.key(run), 1) for run in missing}
        try:
            with watching(plan.store, waiting, bar):
                for _ in hand_out(_measure_missing, [(plan, run) for run in missing]):
                    pass
        finally:
            _HELD.clear()  # of this process, if it was the worker
    return _collect(plan, runs)


@contextmanager
def tuned(
    loaded: LoadedModel,
    questions: Sequence[Question],
    training: Training | None,
    *,
    store: Store | None = None,
) -> Iterator[LoadedModel]:
    """`with tuned(loaded, questions, training) as model: ...`: the model, trained, for a while.

    What it yields has a digest of its own, so that whatever is stored of it is not taken for the
    base model's; the base model's weights are back, bit by bit, when the block ends. Trained
    vectors are stored. Without a training it yields the model as it is.
    """
    if training is None:
        yield loaded
        return
    store = store or Store("results/store")
    view = value_vector_view(loaded.model)
    path = _trained(loaded, view, questions, training, store)
    digest = hashlib.sha256(f"{loaded.digest} {path.name}".encode()).hexdigest()
    with _replaced(view, path):
        yield dataclasses.replace(loaded, digest=digest)


# --- one run ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """The model of a study and what it is asked; goes to the workers."""

    checkpoint: Checkpoint
    identity: Identity
    place: str
    questions: tuple[Question, ...]
    questions_digest: str  # of thousands of questions, for hundreds of keys: taken once
    store: Store

    def key(self, run: Run) -> dict[str, object]:
        """Of a run as a whole: its record is stored last."""
        return self.part_key(run, "run") | {"evaluation": run.evaluation.parts()}

    def is_whole(self, run: Run) -> bool:
        keys = [self.part_key(run, part) for part in run.evaluation.parts()]
        return all(self.store.get(key) is not None for key in (self.key(run), *keys))

    def stored(self, run: Run, part: str | None = None) -> Path:
        """The directory of a run's record, or of one of its tables; it was there before."""
        path = self.store.get(self.part_key(run, part) if part else self.key(run))
        if path is None:
            raise InputError(
                f"{self.store.root}: a result of run {run.name!r} was damaged or removed as soon "
                "as it was written; check the disk, and run again: what is whole is kept"
            )
        return path

    def part_key(self, run: Run, part: str) -> dict[str, object]:
        """Of one table of a run."""
        return {
            "unit": f"causal {part}",
            "model": self.identity.digest,
            "dtype": str(self.identity.dtype),
            "device": self.identity.device,
            "arithmetic": self.identity.arithmetic,
            "questions": self.questions_digest,
            "training": run.training and run.training.model_dump(mode="json"),
            "concepts": list(run.about),
            "evaluation": run.evaluation.parts().get(part),
            "method": _method(part, run.evaluation.open_ended),
            "finetune_version": FINETUNE_VERSION,
            "scoring_version": SCORING_VERSION,
            "evaluation_version": EVALUATION_VERSION,
        }


def _plan(
    model: str,
    questions: Sequence[Question],
    runs: Sequence[Run],
    store: Store,
    dtype: str,
    device: str,
) -> _Plan:
    place, kind = elsewhere(place_and_dtype, device, dtype)
    (found,) = find_checkpoints([model])
    checkpoint = Checkpoint(found.name, found.spec, found.path.absolute())
    digest = digest_files(checkpoint_files(checkpoint.path))
    device_type = torch.device(place).type
    way = elsewhere(arithmetic, kind, device_type)
    identity = Identity(checkpoint.name, digest, kind, device_type, way)
    store = Store(store.root.absolute())
    return _Plan(
        checkpoint, identity, str(place), tuple(questions), questions_digest(questions), store
    )


def _with_folds(run: Run, folds: tuple[int, ...]) -> Run:
    """The run with its folds said: `folds`, where it leaves them open."""
    asked = run.evaluation
    asked = asked if asked.folds is not None else asked.model_copy(update={"folds": folds})
    if asked.choices is not None:
        choices = asked.choices.with_folds(asked.folds)
        asked = asked.model_copy(update={"choices": choices})
    return replace(run, evaluation=asked)


def _scored(asked: Evaluation) -> set[int]:
    return {*asked.folds, *(asked.choices.score_on if asked.choices else ())}


def _refuse(runs: Sequence[Run], questions: Sequence[Question]) -> None:
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            raise InputError(f"run {run.name!r} stands twice; give each its own name")
        if run.training is not None:
            training_texts(questions, run.about, run.training.statements)
        asked, choices = run.evaluation.folds, run.evaluation.choices
        needed = {*choices.choose_on, *choices.score_on} if choices else set()
        if not needed <= set(asked):
            raise InputError(
                f"run {run.name!r}: folds {list(asked)} are asked, and its choices for PSS need "
                f"folds {sorted(needed)}; ask for these, or measure PSS on fewer"
            )
        for concept in run.about:
            if not any(question.concept == concept for question in questions):
                raise InputError(f"concept {concept!r}: no question on it; correct the name")


def _cost(run: Run, questions: Sequence[Question]) -> float:
    """As many tokens of a question take as long, roughly: as was measured of SmolLM2 on a CPU."""
    training, asked = run.training, run.evaluation
    own = sum(q.concept in run.about and q.fold in asked.folds for q in questions)
    cost = 20 * (own * asked.points + asked.others) + 3 * (128 * asked.prose + 12 * asked.stated)
    if asked.open_ended != "no":
        cost += 37 * own + 24 * asked.sampled * (1 + asked.samples)
    if asked.choices:
        scored = own * len(asked.choices.score_on) / len(asked.folds)
        each = scored + asked.choices.general * len(run.about)
        cost += 20 * (scored + asked.others) + 23 * each * (count_masks(asked.choices) - 1)
    if training:
        texts = training_texts(questions, training.concepts, training.statements)
        more = 1.25 if training.method in ("FT-FV", "FT-CV") else 1
        more += training.rule == "gradient"
        cost += 57 * training.epochs * len(texts) * more
    return cost


def _measure_missing(plan: _Plan, run: Run) -> None:
    """A task: train and evaluate a run, unless another study did meanwhile."""
    begin_work()
    with plan.store.turn(plan.key(run)):
        if not plan.is_whole(run):
            try:
                _measure_run(plan, _hold(plan), run)
            except InputError as error:
                raise InputError(f"{run.name}: {error}") from error


# The model that a worker's last task was about: the next is most likely about the same.
_HELD: dict[tuple[object, ...], _Model] = {}


def _hold(plan: _Plan) -> _Model:
    """The study's model, loaded once for all runs of a worker."""
    which = (plan.checkpoint.path, plan.identity, plan.place)
    if which not in _HELD:
        _HELD.clear()  # before another one takes memory
        dtype = str(plan.identity.dtype).removeprefix("torch.")
        loaded = load_model(plan.checkpoint, dtype=dtype, device=plan.place)
        if loaded.digest != plan.identity.digest:
            raise InputError(
                f"{plan.checkpoint.path}: not the files that the study began with; let them be "
                "the same, and run again"
            )
        require_same_arithmetic(plan.identity, loaded)
        view = value_vector_view(loaded.model)
        measured = functools.cache(functools.partial(mean_coefficients, view, loaded.tokenizer))
        _HELD[which] = _Model(loaded, view, loaded.tokenizer, choose_engine(view), measured)
    return _HELD[which]


class _Model(NamedTuple):
    """A model that a worker has loaded; its view is found and verified once for all runs."""

    loaded: LoadedModel
    view: ValueVectorView
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    coefficients: Coefficients  # of texts in the model as it is, each measured once


def _measure_run(plan: _Plan, model: _Model, run: Run) -> None:
    own = _own(run, plan.questions)
    record: dict[str, object] = {}
    made, trained = unit_record(model.loaded, model.engine), None
    vectors = torch.empty(0, 2, dtype=torch.int32)
    missing = [
        part for part in run.evaluation.parts() if plan.store.get(plan.part_key(run, part)) is None
    ]
    accuracy: list[tuple[int, float]] = []

    def measure(step: int) -> None:
        right = _answers(model, own)["correct_norm"]
        accuracy.append((step, float(right.mean())))

    def keep(part: str, table: pd.DataFrame) -> None:
        plan.store.put(
            plan.part_key(run, part),
            lambda folder: table.to_parquet(folder / f"{part}.parquet", index=False),
            made,
        )

    with ExitStack() as stack:
        if run.training is not None:
            points = run.evaluation.points if "curve" in missing else 1
            path = _trained(
                model.loaded,
                model.view,
                plan.questions,
                run.training,
                plan.store,
                points,
                measure,
                model.coefficients,
            )
            release_memory()  # an optimizer's worth of it
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
            trained = read_computed(path)
            vectors = stack.enter_context(_replaced(model.view, path))
        for part in missing:
            if part == "curve":
                keep(part, _curve(record.get("losses", []), accuracy))
            else:
                keep(part, _EVALUATIONS[part](plan, model, run, own))
                release_memory()  # a packed copy of the weights

    def write(folder: Path) -> None:
        save_file({"vectors": vectors}, folder / TRAINED)
        (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")

    plan.store.put(plan.key(run), write, made | {"trained": trained})


def _curve(losses: Sequence[float], accuracy: Sequence[tuple[int, float]]) -> pd.DataFrame:
    curve = pd.DataFrame({"step": range(1, len(losses) + 1), "loss": losses})
    measured = pd.DataFrame(accuracy, columns=["step", "accuracy"])
    return curve.merge(measured, on="step", how="outer").sort_values("step")


def _own(run: Run, questions: Sequence[Question]) -> list[Question]:
    return [q for q in questions if q.concept in run.about and q.fold in run.evaluation.folds]


def _method(part: str, form: Literal["question", "cloze", "no"]) -> dict[str, object]:
    """What a part depends on beside its fields, the model and the questions."""
    if part == "texts":
        digest = hashlib.sha256(PROSE.read_bytes()).hexdigest()
        return {"prose": digest, "passage_tokens": PASSAGE_TOKENS}
    if part in ("generated", "samples"):
        return {
            "generation_version": GENERATION_VERSION,
            "prompt": _prompt(form),
            "max_new_tokens": MAX_NEW_TOKENS,
        }
    return {}


# --- training -----------------------------------------------------------------------------------


def _trained(
    loaded: LoadedModel,
    view: ValueVectorView,
    questions: Sequence[Question],
    training: Training,
    store: Store,
    points: int = 1,
    measure: Callable[[int], None] = lambda step: None,
    coefficients: Coefficients | None = None,
) -> Path:
    """The directory of trained vectors; `measure` is called between `points` parts of the way.

    Then they are trained in any case; otherwise, they are looked for first. `coefficients` are the
    untrained model's, see `choose_vectors`.
    """
    texts = training_texts(questions, training.concepts, training.statements)
    key = {
        "unit": "finetune",
        "model": loaded.digest,
        "dtype": str(loaded.dtype),
        "device": loaded.device.type,
        "training": training.model_dump(mode="json"),
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "finetune_version": FINETUNE_VERSION,
    }
    if training.rule in ("score", "other"):  # which look at other concepts' statements
        key["questions"] = questions_digest(questions)
    path = store.get(key)
    if path is not None and points < 2:
        return path
    began = time.perf_counter()
    vectors = choose_vectors(view, loaded.tokenizer, questions, training, coefficients)
    rows = encode_texts(view, loaded.tokenizer, texts)
    seconds_choosing = time.perf_counter() - began
    steps = count_steps(len(rows), training)
    places = {round(steps * part / points) for part in range(1, points)}
    watched = 0.0

    def observe(step: int) -> None:
        nonlocal watched
        started = time.perf_counter()
        if step in places:
            measure(step)
        watched += time.perf_counter() - started

    began = time.perf_counter()
    with train_value_vectors(view, vectors) as trained:
        try:
            losses = train(view, trained, rows, training, observe=observe)
        except Diverged as error:
            raise InputError(
                f"{error}; give a lower learning rate than {training.learning_rate:g}"
            ) from error
        values = _moved(view, trained, vectors)
    record = {
        "losses": losses,
        "steps": steps,
        "vectors": len(vectors),
        "parameters": len(vectors) * view.hidden,
        "optimizer_bytes": optimizer_bytes(len(vectors), view.hidden),
        "seconds": round(time.perf_counter() - began - watched, 2),
        "seconds_choosing": round(seconds_choosing, 2),
    }

    def write(folder: Path) -> None:
        save_file({"vectors": vectors.contiguous(), "values": values}, folder / TRAINED)
        (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")

    return store.put(key, write, unit_record(loaded))


@torch.no_grad()
def _moved(view: ValueVectorView, trained: object, vectors: Tensor) -> Tensor:
    """Where the chosen vectors are after training, `[n, hidden]`, in the weights' dtype."""
    values = torch.empty(len(vectors), view.hidden, dtype=view.modules[0].weight.dtype)
    for layer, chosen in trained.chosen.items():
        rows = vectors[:, 0] == layer
        offset = trained.offsets[str(layer)]
        values[rows] = (view.vectors(layer)[chosen].float() + offset).to(values.dtype).cpu()
    return values


@contextmanager
def _replaced(view: ValueVectorView, path: Path) -> Iterator[Tensor]:
    """The trained vectors in their places, for a while; which they are."""
    tensors = load_file(path / TRAINED)
    vectors = tensors["vectors"]
    with replace_value_vectors(view, vectors, tensors.pop("values")):
        yield vectors


# --- evaluating ---------------------------------------------------------------------------------


def _asked(plan: _Plan, model: _Model, run: Run, own: Sequence[Question]) -> pd.DataFrame:
    others = _other_questions(plan.questions, run, run.evaluation)
    answers = _answers(model, [*own, *others])
    answers["trained"] = [True] * len(own) + [False] * len(others)
    return answers


def _answers(model: _Model, questions: Sequence[Question]) -> pd.DataFrame:
    requests = [Request(encode(model.tokenizer, question), 0) for question in questions]
    scores = score_options(model.view, requests, [None], engine=model.engine)
    return pd.DataFrame(
        [answer_row(question, score) for question, score in zip(questions, scores, strict=True)]
    )


def _specialization(plan: _Plan, model: _Model, run: Run, own: Sequence[Question]) -> pd.DataFrame:
    """Rows of PSS for each trained concept; unrelated are questions on concepts not trained on."""
    view, tokenizer, choices = model.view, model.tokenizer, run.evaluation.choices
    others = _other_questions(plan.questions, run, run.evaluation)
    folds = {*choices.choose_on, *choices.score_on}
    own, others = ([q for q in part if q.fold in folds] for part in (own, others))
    answers = pd.read_parquet(plan.stored(run, "answers") / "answers.parquet")
    unmasked = {
        name: torch.tensor(scores)
        for name, scores in zip(answers["question_id"], answers["option_logprobs"], strict=True)
    }
    coefficients = record_concepts(
        view,
        tokenizer,
        [*own, *others],
        position=choices.position,
        batch_tokens=choices.batch_tokens,
    )
    measured = measure_concepts(
        run.name,
        view,
        tokenizer,
        own,
        run.about,
        choices,
        coefficients,
        unrelated=others,
        unmasked=unmasked,
        engine=model.engine,
    )
    return measured.pss


def _prompt(form: Literal["question", "cloze", "no"]) -> str:
    """What stands around a question that is asked open-ended, or around its cloze."""
    return OPEN_PROMPT if form == "question" else "{question}"


def _open_questions(questions: Sequence[Question], form: Literal["question", "cloze"]) -> list[str]:
    return [question.question if form == "question" else question.cloze for question in questions]


def _generated(plan: _Plan, model: _Model, run: Run, own: Sequence[Question]) -> pd.DataFrame:
    form = run.evaluation.open_ended
    decoded = decode(
        model.view,
        model.tokenizer,
        [_prompt(form).replace("{question}", words) for words in _open_questions(own, form)],
        likeliest,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    answers = first_lines(model.tokenizer, [row.tokens for (row,) in decoded])
    return pd.DataFrame(
        {
            "question_id": [question.id for question in own],
            "concept": [question.concept for question in own],
            "answer": answers,
            "correct": [
                answer_matches(answer, question.aliases)
                for answer, question in zip(answers, own, strict=True)
            ],
            "state": [row.state.tolist() for (row,) in decoded],
        }
    )


def _samples(plan: _Plan, model: _Model, run: Run, own: Sequence[Question]) -> pd.DataFrame:
    """Of each concept the same number of questions, by the hash of their ids."""
    asked = run.evaluation
    each = -(-asked.sampled // len(run.about))
    chosen = [
        question
        for concept in run.about
        for question in sorted(
            (q for q in own if q.concept == concept), key=lambda q: _hash(asked.seed, q.id)
        )[:each]
    ][: asked.sampled]
    found = sample_answers(
        model.view,
        model.tokenizer,
        _open_questions(chosen, asked.open_ended),
        prompt=_prompt(asked.open_ended),
        max_new_tokens=MAX_NEW_TOKENS,
        samples=asked.samples,
        temperature=asked.temperature,
        seed=asked.seed,
    )
    return pd.DataFrame(
        {
            "question_id": [question.id for question in chosen],
            "concept": [question.concept for question in chosen],
            "answers": [one.answers for one in found],
            "log_likelihoods": [one.log_likelihoods for one in found],
            "tokens": [one.tokens for one in found],
        }
    )


def _other_questions(questions: Sequence[Question], run: Run, asked: Evaluation) -> list[Question]:
    """Questions on other concepts, whole folds of a concept at a time, the same for all runs."""
    pool: dict[str, list[Question]] = {}
    for question in questions:
        if question.concept not in run.about and question.fold in asked.folds:
            pool.setdefault(question.concept, []).append(question)
    names = sorted(pool, key=lambda name: _hash(asked.seed, name))
    chosen: list[Question] = []
    for name in names:
        if len(chosen) >= asked.others:
            break
        chosen += pool[name]
    if len(chosen) < asked.others:
        raise InputError(
            f"others {asked.others}: only {len(chosen)} questions on other concepts; ask for fewer"
        )
    return chosen


def _held_out(
    questions: Sequence[Question], run: Run, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, list[int]]]:
    """Texts that nothing was trained on, of both kinds, in tokens."""
    asked = run.evaluation
    stated = [
        text
        for question in questions
        if question.concept not in run.about
        for text in question.statements[:1]
    ]
    stated = sorted(dict.fromkeys(stated), key=lambda text: _hash(asked.seed, text))
    texts = [("statements", row) for row in token_ids(tokenizer, stated[: asked.stated])]
    if asked.prose:
        front = front_tokens(tokenizer)
        tokens = token_ids(tokenizer, [PROSE.read_text(encoding="utf-8")])[0][len(front) :]
        size = PASSAGE_TOKENS - len(front)
        passages = len(tokens) // size
        if asked.prose > passages:
            raise InputError(
                f"prose {asked.prose}: {PROSE.name} holds {passages} passages of {PASSAGE_TOKENS} "
                "of the model's tokens; ask for fewer"
            )
        texts += [
            ("prose", [*front, *tokens[number * size : (number + 1) * size]])
            for number in range(asked.prose)
        ]
    return texts


@torch.no_grad()
def _likelihoods(plan: _Plan, model: _Model, run: Run, own: Sequence[Question]) -> pd.DataFrame:
    network = model.view.model
    texts = _held_out(plan.questions, run, model.tokenizer)

    def forward(batch: Sequence[tuple[int, list[int]]]) -> list[float]:
        return next_token_nats(network, [row for _, row in batch]).sum(1).tolist()

    numbered = sorted(
        ((index, row) for index, (_, row) in enumerate(texts)), key=lambda pair: -len(pair[1])
    )
    parts: list[list[tuple[int, list[int]]]] = []
    for index, row in numbered:  # the longest of a part is its first
        if not parts or (len(parts[-1]) + 1) * len(parts[-1][0][1]) > LIKELIHOOD_TOKENS:
            parts.append([])
        parts[-1].append((index, row))
    nats = [0.0] * len(texts)
    for batch, values in in_batches(
        parts, forward, tokens=lambda rows: len(rows) * len(rows[0][1])
    ):
        for (index, _), value in zip(batch, values, strict=True):
            nats[index] = value
    if not np.isfinite(nats).all():
        raise InputError(
            f"{model.loaded.name}: a log-likelihood of held-out texts is not a finite number; the "
            "weights are damaged, or their dtype overflows: try float32"
        )
    return pd.DataFrame(
        {
            "kind": [kind for kind, _ in texts],
            "text": range(len(texts)),
            "nats": nats,
            "tokens": [len(row) - 1 for _, row in texts],
        }
    )


# What measures each part of an evaluation, given the trained model and the questions on it.
_EVALUATIONS = {
    "answers": _asked,
    "generated": _generated,
    "texts": _likelihoods,
    "pss": _specialization,
    "samples": _samples,
}


def _hash(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\x1f{text}".encode()).digest()


def _collect(plan: _Plan, runs: Sequence[Run]) -> CausalStudy:
    rows, vectors, tables, records = [], {}, {name: [] for name in TABLES}, []
    for run in runs:
        path = plan.stored(run)
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        training = run.training
        losses = record.get("losses") or [np.nan]
        rows.append(
            {
                "run": run.name,
                "method": training.method if training else "original",
                "rule": training.rule if training else "",
                "share": training.share if training else 0.0,
                "seed": training.seed if training else 0,
                "learning_rate": training.learning_rate if training else 0.0,
                "loss_first": losses[0],
                "loss_last": float(np.mean(losses[-max(1, len(losses) // 10) :])),
                **{
                    name: record.get(name, 0)
                    for name in ("vectors", "parameters", "optimizer_bytes", "steps", "seconds")
                },
            }
        )
        vectors[run.name] = load_file(path / TRAINED)["vectors"]
        trained = read_computed(path).get("trained")
        records += [({"unit": "training", "run": run.name}, trained)] if trained else []
        for name, parts in tables.items():
            if name in run.evaluation.parts():
                found = plan.stored(run, name)
                parts.append(pd.read_parquet(found / f"{name}.parquet").assign(run=run.name))
                records.append(({"unit": name, "run": run.name}, read_computed(found)))
    for table in tables["pss"]:
        table["model"] = table["run"]  # stored under another run's name, perhaps
    _close_curves(tables["curve"], tables["answers"], runs)
    joined = {
        name: pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
        for name, parts in tables.items()
    }
    return CausalStudy(
        pd.DataFrame(rows),
        joined["answers"],
        joined["generated"],
        joined["texts"],
        joined["pss"],
        joined["curve"],
        joined["samples"],
        vectors,
        group_records(records),
    )


def _close_curves(
    curves: list[pd.DataFrame], answers: Sequence[pd.DataFrame], runs: Sequence[Run]
) -> None:
    """Put the accuracy before and after training into each curve; both are measured anyway."""
    accuracy = {}
    for run, table in zip(runs, answers, strict=True):
        accuracy[run.name] = float(table.loc[table["trained"], "correct_norm"].mean())
    for place, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        if run.training is None:
            continue
        original = next((one for one in runs if _is_original_of(one, run)), None)
        before = accuracy[original.name] if original else np.nan
        first = pd.DataFrame({"step": [0], "accuracy": [before], "run": [run.name]})
        curve.loc[curve["step"] == curve["step"].max(), "accuracy"] = accuracy[run.name]
        curves[place] = pd.concat([first, curve], ignore_index=True)


def _is_original_of(one: Run, run: Run) -> bool:
    same = one.evaluation.folds == run.evaluation.folds
    return one.training is None and one.about == run.about and same


# --- intervals ----------------------------------------------------------------------------------


def resample_runs(
    table: pd.DataFrame,
    value: str,
    *,
    weight: str | None = None,
    unit: str = "concept",
    resamples: int = 1000,
    seed: int = 0,
) -> Draws:
    """`draws = resample_runs(study.answers, "correct_norm")`: each run's mean, in resamples.

    All runs are asked the same, so a resample draws units once for all of them, and differences
    between runs are paired.

    Args:
        table: rows of one run each (`run`), all runs having the same units.
        value: the column that is averaged, over rows; with `weight`, its sum over that of `weight`.
        unit: what stays together in a resample.

    Returns:
        Draws whose `models` are the runs, with the one measure `value`.

    Raises:
        InputError: if a run lacks a unit that another has.
    """
    weights = table[weight] if weight else pd.Series(1.0, index=table.index)
    frame = pd.DataFrame(
        {"run": table["run"], "unit": table[unit], "value": table[value], "weight": weights}
    )
    sums = frame.groupby(["run", "unit"], sort=False).sum()
    wide = sums.unstack("run")
    if wide.isna().any(axis=None):
        run = wide.columns[wide.isna().any()][0][1]
        raise InputError(f"run {run!r}: lacks a {unit} that another run has; ask all the same")
    names = tuple(dict.fromkeys(table["run"]))
    top = wide["value"][list(names)].to_numpy(dtype=float)
    bottom = wide["weight"][list(names)].to_numpy(dtype=float)
    draw = np.random.default_rng(seed)
    samples = draw.integers(len(top), size=(resamples, len(top)))
    samples = np.concatenate([np.arange(len(top))[None], samples])
    return Draws(names, {value: top[samples].sum(1) / bottom[samples].sum(1)})


def over_seeds(draws: Draws, runs: Sequence[str], measure: str, *, seed: int = 0) -> np.ndarray:
    """`over_seeds(draws, ["FT-PV/0", "FT-PV/1"], "correct_norm")`: `[1 + resamples]`.

    The mean over the seeds of a method; in each resample of units, seeds are drawn anew as well,
    the same ones for any list of as many runs, so that differences stay paired. With one seed
    only, what seeds do is not in the interval.
    """
    values = draws.of(measure)[:, [draws.index(run) for run in runs]]
    draw = np.random.default_rng(seed)
    chosen = draw.integers(len(runs), size=values.shape)
    chosen[0] = np.arange(len(runs))
    return np.take_along_axis(values, chosen, axis=1).mean(axis=1)


# What is told of a way of training, and how the book calls it.
MEASURES = {
    "multiple choice": "accuracy (acc_norm) on the concepts trained on",
    "open-ended": "exact match with an alias, on the concepts trained on",
    "PSS pooled": "peak over the ratios of |G(k) - C(k)| / G(0), pooled over concepts",
    "PSS, random masks": "the same under random masks of the same size",
    "PSS per concept": "peak of the mean over concepts of |G(k) - C(k)| / G(0)",
    "diff. in diff.": "peak of ((G(k) - C(k)) - (G(0) - C(0))) / G(0), pooled",
    "other concepts": "accuracy (acc_norm) on concepts not trained on",
    "statements": "nats a token of statements on concepts not trained on",
    "prose": "nats a token of English prose",
}


def measure_methods(
    study: CausalStudy, runs: Sequence[Run], *, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """`measures = measure_methods(study, parts["methods"])`: by measure and method, in resamples.

    `interval(measures["open-ended"]["FT-PV"] - measures["open-ended"]["FT-RV"])` is a paired
    difference: both have the same resampled concepts (or texts), and the same resampled seeds.

    Args:
        runs: the original, and each method at the same seeds.

    Returns:
        For each of `MEASURES` that was taken, and each method, `[1 + resamples]`.
    """
    method_of = {run.name: run.training.method if run.training else "original" for run in runs}

    def over_methods(draws: Draws, measure: str) -> dict[str, np.ndarray]:
        methods: dict[str, list[str]] = {}
        for name in draws.models:
            methods.setdefault(method_of[name], []).append(name)
        return {m: over_seeds(draws, part, measure, seed=seed) for m, part in methods.items()}

    def of(table: pd.DataFrame, value: str, **options: object) -> dict[str, np.ndarray]:
        table = table[table["run"].isin(method_of)]
        if table.empty:
            return {}
        draws = resample_runs(table, value, resamples=resamples, seed=seed, **options)
        return over_methods(draws, value)

    trained = study.answers["trained"]
    found = {
        "multiple choice": of(study.answers[trained], "correct_norm"),
        "other concepts": of(study.answers[~trained], "correct_norm"),
    }
    if len(study.generated):
        found["open-ended"] = of(study.generated, "correct")
    for kind in ("statements", "prose"):
        texts = study.texts[study.texts["kind"] == kind]
        found[kind] = of(texts, "nats", weight="tokens", unit="text")
    if len(study.pss):
        masked = study.pss[study.pss["model"].isin(method_of)]
        draws = resample_models(masked, resamples=resamples, seed=seed)
        for title, measure in {
            "PSS pooled": "peak_pss",
            "PSS, random masks": "peak_null",
            "PSS per concept": "peak_per_concept",
            "diff. in diff.": "peak_did",
        }.items():
            found[title] = over_methods(draws, measure)
    return {name: found[name] for name in MEASURES if found.get(name)}
