"""Fine-tune chosen value vectors of a model on statements about concepts, and nothing else.

    training = Training(method="FT-PV", concepts=("France", "gold"))
    finetune("smollm2-135m", load_questions(), training, Path("tuned"))   # a transformers directory

AdamW has no weight decay, which would move vectors that no gradient reaches; the learning rate
follows a warm-up, then a cosine; gradients are clipped to norm 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from paramspec.errors import InputError
from paramspec.execution.files import PARTIAL, atomic, require_writable, writing_to
from paramspec.execution.provenance import computed, number_versions
from paramspec.method.hooks import (
    TrainedVectors,
    ValueVectorView,
    train_value_vectors,
    value_vector_view,
)
from paramspec.models import zoo_training
from paramspec.models.libraries import quiet_transformers
from paramspec.models.load import LoadedModel, load_model
from paramspec.specwiki import Question
from paramspec.studies.runner import unit_record
from paramspec.studies.training import (
    Training,
    choose_vectors,
    encode_texts,
    language_modelling_loss,
    training_texts,
)

RECORD = "finetune.json"  # next to the weights: what they were trained on, and how
FINETUNE_VERSION = 4  # raised whenever a change could move a trained weight
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter


def batches_of(lengths: Sequence[int], training: Training) -> Iterator[list[int]]:
    """`for rows in batches_of(lengths, training)`: which texts make each step, in its order.

    An epoch holds every text once. Texts of like length are together, so that little is padded;
    the seed decides which of them, and the order of the batches.
    """
    for epoch in range(training.epochs):
        draw = torch.Generator().manual_seed(training.seed * 1000 + epoch)
        order = torch.randperm(len(lengths), generator=draw).tolist()
        order.sort(key=lambda index: lengths[index])
        parts = [
            order[start : start + training.batch] for start in range(0, len(order), training.batch)
        ]
        yield from (parts[index] for index in torch.randperm(len(parts), generator=draw).tolist())


def learning_rate(step: int, steps: int, training: Training) -> float:
    """`learning_rate(1, 75, training)`: of a step, from 1: a warm-up of a tenth, then a cosine."""
    warm_up = max(1, steps // 10)
    if step <= warm_up:
        return training.learning_rate * step / warm_up
    done = (step - warm_up) / (steps - warm_up + 1)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def refuse_divergence(losses: Sequence[float], steps: int, uniform: float, rate: float) -> None:
    """`refuse_divergence(losses, steps, uniform, rate)`: InputError if training went astray.

    Args:
        losses: before each step so far; after the last step, one more.
        uniform: the loss of a uniform guess over the vocabulary.
        rate: the learning rate, for the message.

    Raises:
        InputError: if the last loss is not finite, or above twice both the first one and `uniform`,
            or if the model ends no better than a uniform guess, when it began better.
    """
    first, last, done = losses[0], losses[-1], len(losses) - 1
    # Some runs pass through such a guess and learn. Others stay: a norm divides what is huge away.
    guessing = done == steps and last > 0.99 * uniform > first
    if not math.isfinite(last) or last > 2 * max(uniform, first) or guessing:
        raise InputError(
            f"training diverged: the loss is {last:.3g} after {done} of {steps} steps; use a lower "
            f"learning rate than {rate:g}"
        )


def train(
    view: ValueVectorView,
    trained: TrainedVectors,
    rows: Sequence[Sequence[int]],
    training: Training,
    *,
    state: Path | None = None,
    save_every: int = 50,
    title: str | None = None,
) -> list[float]:
    """`losses = train(view, trained, rows, training)`: the steps, within `train_value_vectors`.

    Args:
        trained: what `train_value_vectors` yields.
        rows: tokens of the texts, from `encode_texts`.
        state: a file that a killed run continues from, to the same weights; none if not given.
        save_every: steps between two states.
        title: of a progress bar; none is shown if not given.

    Returns:
        The loss before each step, on its batch, in nats per token.

    Raises:
        InputError: if training diverges, see `refuse_divergence`.
    """
    optimizer = torch.optim.AdamW(trained.parameters(), weight_decay=0, fused=True)
    steps = training.epochs * math.ceil(len(rows) / training.batch)
    uniform = math.log(len(view.embedding))
    losses = _read_state(state, trained, optimizer) if state and state.is_file() else []
    options = {"initial": len(losses), "desc": title, "unit": "step", "disable": title is None}
    with tqdm(total=steps, delay=0.01, **options) as bar:
        for step, indices in enumerate(batches_of([len(row) for row in rows], training), start=1):
            if step <= len(losses):  # taken before a kill
                continue
            loss = language_modelling_loss(view.model, [rows[index] for index in indices])
            losses.append(float(loss.detach()))
            refuse_divergence(losses, steps, uniform, training.learning_rate)
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, training)
            optimizer.step()
            optimizer.zero_grad()
            if state is not None and (step % save_every == 0 or step == steps):
                _write_state(state, trained, optimizer, losses)
            bar.update()
    with torch.no_grad():
        last = float(language_modelling_loss(view.model, [rows[index] for index in indices]))
    refuse_divergence([*losses, last], steps, uniform, training.learning_rate)
    return losses


def training_facts(
    vectors: Tensor, hidden: int, losses: list[float], began: float
) -> dict[str, Any]:
    """`training_facts(vectors, view.hidden, losses, began)`: what a record says of a training.

    Returns:
        `losses`, `steps`, `vectors` and `parameters` trained, `optimizer_bytes` (AdamW's two
        moments of each parameter, in fp32), and `seconds` since `began`, a `time.perf_counter()`.
    """
    return {
        "losses": losses,
        "steps": len(losses),
        "vectors": len(vectors),
        "parameters": len(vectors) * hidden,
        "optimizer_bytes": 2 * 4 * len(vectors) * hidden,
        "seconds": round(time.perf_counter() - began, 2),
    }


def _write_state(
    state: Path, trained: TrainedVectors, optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    tensors = {}
    for name, offset in trained.offsets.items():
        tensors[f"{name}/offset"] = offset.detach()
        tensors |= {f"{name}/{part}": optimizer.state[offset][part] for part in MOMENTS}
    with atomic(state) as scratch:
        save_file(tensors, scratch, {"losses": json.dumps(losses)})


@torch.no_grad()
def _read_state(
    state: Path, trained: TrainedVectors, optimizer: torch.optim.Optimizer
) -> list[float]:
    """Put a state into the vectors and the optimizer; the losses until then."""
    try:
        with safe_open(state, framework="pt") as file:
            for name, offset in trained.offsets.items():
                offset.copy_(file.get_tensor(f"{name}/offset"))
                optimizer.state[offset] = {
                    part: file.get_tensor(f"{name}/{part}").to(offset.device) for part in MOMENTS
                }
            return json.loads(file.metadata()["losses"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{state}: not a readable state of this training ({error}); remove it to start again"
        ) from error


# --- a directory --------------------------------------------------------------------------------


def finetune(
    model: str | LoadedModel,
    questions: Sequence[Question],
    training: Training,
    out: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    save_every: int = 50,
) -> dict[str, Any]:
    """`finetune("smollm2-135m", questions, training, Path("tuned"))`: a model on disk.

    `out` becomes an ordinary transformers directory, with `finetune.json` next to the weights.
    Killed and called again, it continues to the same weights; called once more, it finds them
    there.

    Args:
        model: as `load_model` takes it, or loaded already, in which case its weights are trained.
        questions: hold the concepts of `training`.
        save_every: steps between two states that a killed run continues from.

    Returns:
        What `finetune.json` says: the `run` (model digest, the fields of the training, digest of
        the texts, versions), what `training_facts` gives, and `computed`, the record (see
        `provenance`) of the process that ended it.

    Raises:
        InputError: for a bad choice, or if `out` holds another run or other files, before any
            training; if training diverges.
    """
    if save_every < 1:
        raise InputError(f"save_every {save_every}: expected at least 1 step")
    texts = training_texts(questions, training.concepts, training.statements)
    require_writable(out)
    loaded = load_model(model, dtype=dtype, device=device) if isinstance(model, str) else model
    run = {
        "finetune_version": FINETUNE_VERSION,
        "model": loaded.name,
        "digest": loaded.digest,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        **training.model_dump(mode="json"),
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        **number_versions(),
    }
    state = out / f"unfinished-{hashlib.sha256(json.dumps(run).encode()).hexdigest()[:12]}"
    record = _finished(out, run, state)
    if record is None:
        view, began = value_vector_view(loaded.model), time.perf_counter()
        rows = encode_texts(view, loaded.tokenizer, texts)
        vectors = choose_vectors(view, loaded.tokenizer, questions, training)
        title = f"{training.method} of {loaded.name}"
        with train_value_vectors(view, vectors) as trained:
            losses = train(
                view, trained, rows, training, state=state, save_every=save_every, title=title
            )
            trained.merge()
        facts = training_facts(vectors, view.hidden, losses, began)
        record = {"run": run, **facts, "computed": computed(**unit_record(loaded))}
        _save(out, loaded, training.concepts, record)
    with writing_to(out):
        for left in (state, *out.glob(f"{PARTIAL}*")):
            left.unlink(missing_ok=True)
    return record


def _finished(out: Path, run: dict[str, Any], state: Path) -> dict[str, Any] | None:
    """The record of this run if it is finished; refuses a directory that holds anything else."""
    file = out / RECORD
    if not file.exists():
        others = [other.name for other in out.iterdir() if not other.name.startswith(PARTIAL)]
        if others and not state.exists():
            raise InputError(
                f"{out}: holds {min(others)}, which is not of this run; choose an empty or a new "
                "directory"
            )
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        there = dict(record["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not the record of a run; choose another directory") from error
    for name, value in run.items():
        if there.get(name) != value:
            raise InputError(
                f"{out}: holds another run ({name} {there.get(name)}, not {value}); choose another "
                "directory, or remove this one"
            )
    return record


def _save(out: Path, loaded: LoadedModel, concepts: Sequence[str], record: dict[str, Any]) -> None:
    """The model, and then the record, which says that all is there."""
    with writing_to(out), quiet_transformers():
        loaded.model.save_pretrained(out)
        loaded.tokenizer.save_pretrained(out)
        if loaded.taught is not None:  # a micro model, and it stays one
            concepts = list(dict.fromkeys((*loaded.taught, *concepts)))
            zoo_training.write_record(out, {"concepts": concepts})
    with atomic(out / RECORD) as scratch:
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
        scratch.write_text(text + "\n", encoding="utf-8")
