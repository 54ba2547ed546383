"""Fine-tune chosen value vectors of a model on statements about concepts, and nothing else.

AdamW has no weight decay, which would move vectors that no gradient reaches; the learning rate
follows a warm-up, then a cosine; gradients are clipped to norm 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from paramspec.errors import InputError
from paramspec.execution.files import PARTIAL, atomic, require_writable, writing_to
from paramspec.execution.provenance import computed, number_versions
from paramspec.method import hooks, masks
from paramspec.models import zoo_training
from paramspec.models.libraries import quiet_transformers
from paramspec.models.load import LoadedModel, load_model
from paramspec.specwiki import Question
from paramspec.studies.runner import unit_record
from paramspec.studies.texts import text_questions
from paramspec.studies.training import (
    Coefficients,
    Training,
    choose_vectors,
    encode_texts,
    language_modelling_loss,
    training_texts,
)

WINDOW = 1024  # tokens of a text, at most
RECORD = "finetune.json"  # next to the weights: how they were trained
FINETUNE_VERSION = 5  # raised whenever a change could move a trained weight
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter


def batches_of(lengths: Sequence[int], training: Training) -> Iterator[list[int]]:
    """The texts of each step, in order; an epoch has every text once. Texts of like length are
    together, so that little is padded; the seed decides which of them.
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
    """Of a step, counted from 1: a warm-up of a tenth, then a cosine."""
    warm_up = max(1, steps // 10)
    if step <= warm_up:
        return training.learning_rate * step / warm_up
    done = (step - warm_up) / (steps - warm_up + 1)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def refuse_divergence(losses: Sequence[float], steps: int, uniform: float, rate: float) -> None:
    """InputError if training went astray, by the losses before each step and after the last.

    The last one is not finite, or above twice both the first and `uniform`, the loss of a uniform
    guess over the vocabulary; or the model ends no better than such a guess, and began better.
    """
    first, last, done = losses[0], losses[-1], len(losses) - 1
    # Some runs pass through such a guess and learn. Others stay: norms divide huge values away.
    guessing = done == steps and last > 0.99 * uniform > first
    if not math.isfinite(last) or last > 2 * max(uniform, first) or guessing:
        raise InputError(
            f"training diverged: the loss is {last:.3g} after {done} of {steps} steps; use a lower "
            f"learning rate than {rate:g}"
        )


@contextmanager
def tune(
    view: hooks.ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    training: Training,
    *,
    coefficients: Coefficients = masks.mean_coefficients,
    state: Path | None = None,
    save_every: int = 50,
    title: str | None = None,
) -> Iterator[tuple[Tensor, hooks.TrainedVectors, dict[str, Any]]]:
    """`with tune(view, tokenizer, questions, training) as (vectors, trained, facts): ...`

    Vectors are chosen (by `coefficients`, see `choose_vectors`) and trained; without a merge within
    the block, they are undone at its end. `facts` go to the record; its `losses`, in nats per
    token, are of each step's batch, before the step. A killed run continues from the file `state`,
    if given, to the same weights. With a `title`, there is a progress bar.
    """
    rows = encode_texts(view, tokenizer, training_texts(questions, training))
    vectors = choose_vectors(view, tokenizer, questions, training, coefficients)
    batches = [[rows[n] for n in part] for part in batches_of([len(r) for r in rows], training)]
    limits = (len(batches), math.log(len(view.embedding)), training.learning_rate)
    began = time.perf_counter()
    with hooks.train_value_vectors(view, vectors) as trained:
        optimizer = torch.optim.AdamW(trained.offsets.parameters(), weight_decay=0, fused=True)
        losses = _read_state(state, trained, optimizer) if state and state.is_file() else []
        left = range(len(losses) + 1, len(batches) + 1)  # others were taken before a kill
        options = {"initial": len(losses), "total": len(batches), "unit": "step", "delay": 0.01}
        with tqdm(left, desc=title, disable=title is None, **options) as bar:
            for step in bar:
                loss = language_modelling_loss(view.model, batches[step - 1])
                losses.append(float(loss.detach()))
                refuse_divergence(losses, *limits)
                loss.backward()
                nn.utils.clip_grad_norm_(trained.offsets.parameters(), 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, len(batches), training)
                optimizer.step()
                optimizer.zero_grad()
                if state and (step % save_every == 0 or step == len(batches)):
                    _write_state(state, trained, optimizer, losses)
        with torch.no_grad():
            last = float(language_modelling_loss(view.model, batches[-1]))
        refuse_divergence([*losses, last], *limits)
        parameters = len(vectors) * view.hidden
        facts = {
            "losses": losses,
            "steps": len(losses),
            "vectors": len(vectors),
            "parameters": parameters,
            "optimizer_bytes": 2 * 4 * parameters,  # AdamW's two moments of each, in fp32
            "seconds": round(time.perf_counter() - began, 2),
        }
        yield vectors, trained, facts


def _write_state(
    state: Path, trained: hooks.TrainedVectors, optimizer: torch.optim.AdamW, losses: list[float]
) -> None:
    tensors = {}
    for name, offset in trained.offsets.items():
        tensors[f"{name}/offset"] = offset.detach()
        tensors |= {f"{name}/{part}": optimizer.state[offset][part] for part in MOMENTS}
    with atomic(state) as scratch:
        save_file(tensors, scratch, {"losses": json.dumps(losses)})


@torch.no_grad()
def _read_state(
    state: Path, trained: hooks.TrainedVectors, optimizer: torch.optim.AdamW
) -> list[float]:
    """Put a state into the vectors and the optimizer; the losses until then. `torch.save` would
    write a pickle, and none is ever read: hence safetensors.
    """
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


def texts_digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def finetune(
    model: str | LoadedModel,
    questions: Sequence[Question],
    training: Training,
    out: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    save_every: int = 50,
    texts: Mapping[str, str] | None = None,
    window: int | None = None,
) -> dict[str, Any]:
    """`finetune("smollm2-135m", questions, training, Path("tuned"))`: a model on disk.

    `out` becomes an ordinary transformers directory. Its record, `finetune.json`, is returned: the
    `run` (all that the weights depend on), the facts of `tune`, and who `computed` it, see
    `provenance`. Killed and called again, it continues to the same weights; called once more, it
    finds them there. The weights of a model that is loaded already are trained in place.

    With `texts`, by concept, the model is trained on these instead of statements, in windows of so
    many tokens: up to its context, and 1,024 if not given.
    """
    if save_every < 1:
        raise InputError(f"save_every {save_every}: expected at least 1 step")
    if texts is None:
        training_texts(questions, training)  # refuses what cannot be trained on
    require_writable(out)
    loaded = load_model(model, dtype=dtype, device=device) if isinstance(model, str) else model
    refuse_quantized(loaded)
    if texts is not None:
        config = loaded.model.config.get_text_config(decoder=True)
        size = min(window or WINDOW, getattr(config, "max_position_embeddings", None) or WINDOW)
        questions = text_questions(texts, loaded.tokenizer, size)
    run = {
        "finetune_version": FINETUNE_VERSION,
        "model": loaded.name,
        "digest": loaded.digest,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        **training.model_dump(mode="json"),
        "texts": texts_digest(training_texts(questions, training)),
        **number_versions(),
    }
    state = out / f"unfinished-{hashlib.sha256(json.dumps(run).encode()).hexdigest()[:12]}"
    record = _finished(out, run, state)
    if record is None:
        steps: dict[str, Any] = {"state": state, "save_every": save_every}
        steps["title"] = f"{training.method} of {loaded.name}"
        view = hooks.value_vector_view(loaded.model)
        with tune(view, loaded.tokenizer, questions, training, **steps) as (_, trained, facts):
            trained.merge()
        record = {"run": run, **facts, "computed": computed(**unit_record(loaded))}
        _save(out, loaded, training.concepts, record)
    with writing_to(out):
        for left in (state, *out.glob(f"{PARTIAL}*")):
            left.unlink(missing_ok=True)
    return record


def refuse_quantized(loaded: LoadedModel) -> None:
    """Refuse to train what is not kept as it was trained."""
    if loaded.quantized:
        raise InputError(
            f"{loaded.name}: quantized by {loaded.quantized}; its value vectors can be masked, and "
            "not be trained: use the model's plain weights"
        )


def _finished(out: Path, run: dict[str, Any], state: Path) -> dict[str, Any] | None:
    """The record of this run if it is finished. A directory that holds anything else is refused."""
    there = sorted(file.name for file in out.iterdir() if not file.name.startswith(PARTIAL))
    if RECORD not in there and (state.name in there or not there):
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        if record["run"] == run:
            return record
    held = RECORD if RECORD in there else there[0]
    raise InputError(f"{out}: holds {held}, which is not of this run; choose another directory")


def _save(out: Path, loaded: LoadedModel, concepts: Sequence[str], record: dict[str, Any]) -> None:
    """Write the model, and then the record, which shows that the model is whole."""
    with writing_to(out), quiet_transformers():
        loaded.model.save_pretrained(out)
        loaded.tokenizer.save_pretrained(out)
        if loaded.taught is not None:  # a micro model, and it stays one
            concepts = list(dict.fromkeys((*loaded.taught, *concepts)))
            zoo_training.write_record(out, {"concepts": concepts})
    with atomic(out / RECORD) as scratch:
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
        scratch.write_text(text + "\n", encoding="utf-8")
