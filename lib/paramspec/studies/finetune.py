"""Fine-tune chosen value vectors of a model on statements about concepts, and nothing else.

    training = Training(method="FT-PV", concepts=("France", "gold"))
    finetune("smollm2-135m", load_questions(), training, Path("tuned"))   # a transformers directory

The four methods are the paper's (section 5), and differ in the value vectors that they train:

    FT-FV   all of them
    FT-PV   in each layer the share with the highest coefficients on the statements (k/8: an eighth)
    FT-CV   all but those of FT-PV
    FT-RV   as many as FT-PV, at random

What is trained on are the statements of the concepts' facts, never the wording of an evaluation:
no statement holds a cloze. AdamW without weight decay, which would move vectors that no gradient
reaches; a warm-up, then a cosine; gradients clipped to norm 1. How statements, epochs, learning
rate and batches were chosen in the paper is not known: they are fields of `Training`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import safetensors
import torch
from pydantic import Field, field_validator
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from paramspec.checked import Checked, Count, Seed, Share
from paramspec.errors import InputError
from paramspec.execution.files import PARTIAL, atomic, require_writable, writing_to
from paramspec.execution.provenance import computed, number_versions
from paramspec.method.batches import pad_right
from paramspec.method.hooks import (
    TrainedVectors,
    ValueVectorView,
    refuse_too_long,
    train_value_vectors,
    value_vector_view,
)
from paramspec.method.masks import (
    keep_tensor,
    magnitude_matched_vectors,
    masked_per_layer,
    mean_coefficients,
    random_vectors,
    top_vectors,
)
from paramspec.models import zoo_training
from paramspec.models.libraries import quiet_transformers
from paramspec.models.load import LoadedModel, load_model
from paramspec.models.tokens import token_ids
from paramspec.specwiki import Question
from paramspec.studies.runner import unit_record

# Of texts, fp32 `[layers, width]`, as `mean_coefficients` gives them.
Coefficients = Callable[[tuple[str, ...]], Tensor]
Method = Literal["FT-FV", "FT-PV", "FT-CV", "FT-RV"]
METHODS: tuple[Method, ...] = get_args(Method)
Rule = Literal["coefficient", "score", "gradient", "magnitude", "other"]
RULES: tuple[Rule, ...] = get_args(Rule)

RECORD = "finetune.json"  # beside the weights: what they were trained on, and how
STATE = "unfinished.safetensors"  # what a killed run continues from
FINETUNE_VERSION = 4  # raised whenever a change could move a trained weight


class Training(Checked):
    """Everything that fine-tuned value vectors depend on, beside the model and the statements.

    Attributes:
        method: FT-FV, FT-PV, FT-CV or FT-RV.
        concepts: whose statements are trained on, together.
        share: of a layer's value vectors, those that FT-PV and FT-RV train and FT-CV leaves out.
        rule: how those of FT-PV are chosen in each layer. `coefficient`, the paper's: the highest
            absolute coefficients on the statements. `score`: the highest once the coefficients on
            other concepts' statements are subtracted, as masks are chosen. `gradient`: the largest
            norm of the loss's gradient. `magnitude`: nearest in coefficient to those of the rule
            `coefficient`, but none of them. `other`: the highest coefficients on the statements of
            as many other concepts.
        layers: the layers whose value vectors may be chosen; all if None.
        statements: how many of each fact's statements are trained on, the first ones.
        epochs: times that each statement is seen.
        batch: statements of a step.
        learning_rate: at the end of the warm-up.
        seed: of random vectors, of other concepts, and of the order of statements.
    """

    method: Method
    concepts: tuple[str, ...] = Field(min_length=1)
    share: Share = 1 / 8
    rule: Rule = "coefficient"
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    statements: Count = 4
    epochs: Count = 3
    batch: Count = 16
    # AdamW multiplies its first step by ten, and hands a number to torch that float32 holds.
    learning_rate: float = Field(default=1e-3, gt=0, le=1e37)
    seed: Seed = 0

    @field_validator("concepts")
    @classmethod
    def _once(cls, concepts: tuple[str, ...]) -> tuple[str, ...]:
        for concept in concepts:
            if concepts.count(concept) > 1:
                raise ValueError(f"{concept!r} stands twice; give it once")
        return concepts

    @field_validator("layers")
    @classmethod
    def _sorted(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return layers and tuple(sorted(set(layers)))


# --- what is trained on -------------------------------------------------------------------------


def training_texts(
    questions: Sequence[Question], concepts: Sequence[str], statements: int
) -> list[str]:
    """`training_texts(questions, ["France"], 4)`: the first statements of each fact, once each.

    Raises:
        InputError: if a concept is unknown or has no statement, or if a statement holds the
            wording that a question on any of the concepts is evaluated with.
    """
    texts: dict[str, None] = {}
    for concept in concepts:
        own = [question for question in questions if question.concept == concept]
        if not own:
            raise InputError(f"concept {concept!r}: no question on it; correct the name")
        stated = [text for question in own for text in question.statements[:statements]]
        if not stated:
            raise InputError(
                f"concept {concept!r}: its questions have no statements to train on; write some "
                "into the question file"
            )
        texts |= dict.fromkeys(stated)
    asked = [question for question in questions if question.concept in concepts]
    wordings = {_plain(text): q for q in asked for text in (q.cloze, q.question)}
    for text in texts:
        plain = _plain(text)
        for wording, question in wordings.items():
            if wording in plain:
                raise InputError(
                    f"concept {question.concept!r}: statement {text!r} holds the wording of "
                    f"question {question.id!r}; word it differently"
                )
    return list(texts)


def _plain(text: str) -> str:
    """Without what may differ in the same wording: case, and how much white space."""
    return " ".join(text.casefold().split())


def other_concepts(questions: Sequence[Question], training: Training) -> list[str]:
    """`other_concepts(questions, training)`: as many, drawn by the seed, of the same domains.

    Each concept has a partner of its own domain where there is one left, else of any.
    """
    domain_of = {question.concept: question.domain for question in questions}
    draw = torch.Generator().manual_seed(training.seed)
    names = [name for name in domain_of if name not in training.concepts]
    free = [names[index] for index in torch.randperm(len(names), generator=draw).tolist()]
    partners = []
    for concept in training.concepts:
        if not free:
            raise InputError(
                f"rule {training.rule!r}: {len(names)} concepts beside those trained on, "
                f"{len(training.concepts)} are needed; give questions on more"
            )
        near = [name for name in free if domain_of[name] == domain_of[concept]]
        partners.append((near or free)[0])
        free.remove(partners[-1])
    return partners


# --- which vectors are trained ------------------------------------------------------------------


def choose_vectors(
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    training: Training,
    coefficients: Coefficients | None = None,
) -> Tensor:
    """`vectors = choose_vectors(view, tokenizer, questions, training)`: what a method trains.

    FT-PV and FT-RV of one share choose as many in every layer; FT-PV and FT-CV of one rule and
    seed share none and together are all.

    Args:
        coefficients: `mean_coefficients` of the model over some texts, for a caller that keeps them
            for the next choice; measured here if not given.

    Returns:
        int32 `[n, 2]` of (layer, value vector), sorted.

    Raises:
        InputError: if the model lacks a layer asked for, if the share is less than one vector, or
            if there are no statements.
    """
    layers = list(range(view.layers)) if training.layers is None else list(training.layers)
    for layer in layers:
        if not 0 <= layer < view.layers:
            raise InputError(
                f"layer {layer}: the model has {view.layers} layers, 0 to {view.layers - 1}"
            )
    everything = torch.ones(view.layers, view.width, dtype=torch.bool).nonzero().int()
    everything = everything[torch.isin(everything[:, 0], torch.tensor(layers))]
    if training.method == "FT-FV":
        return everything
    count = masked_per_layer(training.share, view.width)
    if count == 0:
        raise InputError(
            f"share {training.share}: less than one of a layer's {view.width} value vectors"
        )
    draw = torch.Generator().manual_seed(training.seed)
    if training.method == "FT-RV":
        of_each = [layer for layer in layers for _ in range(count)]
        like = torch.tensor([of_each, [0] * len(of_each)]).T
        return random_vectors(like, view.layers, view.width, draw)
    coefficients = coefficients or functools.partial(mean_coefficients, view, tokenizer)
    chosen = _by_rule(view, tokenizer, questions, training, draw, coefficients)
    chosen = chosen[torch.isin(chosen[:, 0], torch.tensor(layers))]
    if training.method == "FT-PV":
        return chosen
    keep = keep_tensor(chosen, view.layers, view.width)
    keep = everything[keep[everything[:, 0].long(), everything[:, 1].long()]]
    if len(keep) == 0:
        raise InputError(f"share {training.share}: FT-CV trains the rest, and there is none")
    return keep


def _by_rule(
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    training: Training,
    draw: torch.Generator,
    coefficients: Coefficients,
) -> Tensor:
    texts = training_texts(questions, training.concepts, training.statements)

    def others() -> Tensor:
        names = other_concepts(questions, training)
        stated = training_texts(questions, names, training.statements)
        return coefficients(tuple(stated))

    if training.rule == "gradient":
        norms = gradient_norms(view, tokenizer, texts)
        return top_vectors(norms, training.share)
    if training.rule == "other":
        return top_vectors(others(), training.share)
    own = coefficients(tuple(texts))
    if training.rule == "score":
        own = own - others()
    chosen = top_vectors(own, training.share)
    if training.rule != "magnitude":
        return chosen
    matched = magnitude_matched_vectors(chosen, own, draw)
    if len(matched) < len(chosen):
        raise InputError(
            f"share {training.share}: rule 'magnitude' trains others than the highest, and too few "
            "are left; use a share of up to a half"
        )
    return matched


def gradient_norms(
    view: ValueVectorView, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch: int = 32
) -> Tensor:
    """`norms = gradient_norms(view, tokenizer, statements)`: how much each vector is asked to move.

    Returns:
        fp32 `[layers, width]`: norm of the gradient of the loss over all texts by each value
        vector.
    """
    everything = torch.ones(view.layers, view.width, dtype=torch.bool).nonzero().int()
    rows = sorted(encode_texts(view, tokenizer, texts), key=len)
    tokens = sum(len(row) - 1 for row in rows)
    with train_value_vectors(view, everything) as trained:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            share = sum(len(row) - 1 for row in part) / tokens
            (language_modelling_loss(view.model, part) * share).backward()
        norms = [trained.offsets[str(layer)].grad.norm(dim=1).cpu() for layer in trained.chosen]
    return torch.stack(norms)


# --- training -----------------------------------------------------------------------------------


def encode_texts(
    view: ValueVectorView, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[list[int]]:
    """`rows = encode_texts(view, tokenizer, statements)`: tokens of each text, and its end."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [[*row, *end] for row in token_ids(tokenizer, texts)]
    for text, row in zip(texts, rows, strict=True):
        if len(row) < 2:
            raise InputError(f"statement {text!r}: no token to predict; write a sentence")
    refuse_too_long(view, max(map(len, rows)), "a statement", "shorten it")
    return rows


def language_modelling_loss(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """`language_modelling_loss(model, rows).backward()`: mean cross-entropy, nats a token."""
    return next_token_nats(model, rows).sum() / sum(len(row) - 1 for row in rows)


def next_token_nats(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """`next_token_nats(model, rows).sum(1)`: the negative log-likelihood of each row, in nats.

    Returns:
        fp32 `[rows, longest - 1]`, of each token but the first, 0 at padding. The last token of
        the longest rows is never read.
    """
    tokens, attention_mask = pad_right(rows)
    device = model.get_input_embeddings().weight.device
    labels = tokens.masked_fill(attention_mask == 0, -100)[:, 1:]
    logits = model(
        input_ids=tokens[:, :-1].to(device),
        attention_mask=attention_mask[:, :-1].to(device),
        use_cache=False,
    ).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten().to(logits.device), reduction="none"
    ).view(labels.shape)


def count_steps(texts: int, training: Training) -> int:
    """`count_steps(len(texts), training)`: optimizer steps of a training."""
    return training.epochs * math.ceil(texts / training.batch)


def batches_of(lengths: Sequence[int], training: Training) -> Iterator[list[int]]:
    """`for rows in batches_of(lengths, training)`: which texts make each step, in its order.

    An epoch holds every text once. Texts of like length stand together, so that little is padded;
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


class Diverged(InputError):
    """Training left the range of numbers that mean something, at `step`; `kept` was the last good.

    `losses` are those before the steps up to and including `step`; if it was the last step that
    went wrong, also the one after it.
    """

    def __init__(self, step: int, kept: int, losses: list[float]) -> None:
        when = "at" if len(losses) == step else "after the last step,"
        super().__init__(f"the loss is {losses[-1]:.3g} {when} step {step}")
        self.step, self.kept, self.losses = step, kept, losses


def train(
    view: ValueVectorView,
    trained: TrainedVectors,
    rows: Sequence[Sequence[int]],
    training: Training,
    *,
    state: Path | None = None,
    save_every: int = 50,
    progress: Callable[[int], None] = lambda steps: None,
) -> list[float]:
    """`losses = train(view, trained, rows, training)`: the steps, within `train_value_vectors`.

    Args:
        trained: what `train_value_vectors` yields.
        rows: tokens of the texts, from `encode_texts`.
        state: a file that a killed run continues from, to the same weights; none if not given.
        save_every: steps between two states.
        progress: called with a number of steps that are done.

    Returns:
        The loss before each step, on its batch, in nats a token.

    Raises:
        Diverged: if a loss is not finite, or above twice both the first one and that of a uniform
            guess, or if the model ends no better than a uniform guess, when it began better; the
            state before it, if one was kept, is that of the last good step.
    """
    optimizer = torch.optim.AdamW(trained.parameters(), weight_decay=0, fused=True)
    steps = count_steps(len(rows), training)
    uniform = math.log(view.model.get_input_embeddings().weight.shape[0])

    def has_diverged(loss: float) -> bool:
        return not math.isfinite(loss) or loss > 2 * max(uniform, (losses or [loss])[0])

    def is_guess(loss: float) -> bool:
        # Some runs pass through this and learn. Others stay: a norm divides what is huge away.
        return loss > 0.99 * uniform > losses[0]

    losses = [] if state is None else _read_state(state, trained, optimizer)
    resumed, saved = len(losses), len(losses)
    progress(resumed)
    order = batches_of([len(row) for row in rows], training)
    for step, indices in enumerate(order, start=1):
        if step <= resumed:
            continue
        loss = language_modelling_loss(view.model, [rows[index] for index in indices])
        value = float(loss.detach())
        if has_diverged(value):
            raise Diverged(step, saved, [*losses, value])
        # A loss that is fine shows that the step before left the weights fine.
        due = state is not None and step > saved + save_every
        if due and not is_guess(value):
            _write_state(state, trained, optimizer, losses)
            saved = len(losses)
        losses.append(value)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, training)
        optimizer.step()
        optimizer.zero_grad()
        progress(1)
    with torch.no_grad():
        last = float(language_modelling_loss(view.model, [rows[index] for index in indices]))
    if has_diverged(last) or is_guess(last):
        raise Diverged(steps, saved, [*losses, last])
    return losses


def optimizer_bytes(vectors: int, hidden: int) -> int:
    """`optimizer_bytes(len(vectors), view.hidden)`: AdamW's two moments of each number, in fp32."""
    return 2 * 4 * vectors * hidden


def _write_state(
    state: Path, trained: TrainedVectors, optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    tensors = {}
    for name, offset in trained.offsets.items():
        moments = optimizer.state[offset]
        tensors[f"{name}/offset"] = offset.detach()
        tensors[f"{name}/exp_avg"] = moments["exp_avg"]
        tensors[f"{name}/exp_avg_sq"] = moments["exp_avg_sq"]
    about = {"losses": json.dumps(losses)}
    about["sha256"] = _digest(tensors, about["losses"])
    with atomic(state) as scratch:
        save_file(tensors, scratch, about)


@torch.no_grad()
def _read_state(
    state: Path, trained: TrainedVectors, optimizer: torch.optim.Optimizer
) -> list[float]:
    """Put a state into the vectors and the optimizer; the losses until then, none without one."""
    if not state.is_file():
        return []
    try:
        with safetensors.safe_open(state, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about.get("sha256") != _digest(tensors, about.get("losses", "")):
            raise ValueError("it is damaged")
        losses = json.loads(about["losses"])
        for name, offset in trained.offsets.items():
            offset.copy_(tensors[f"{name}/offset"])
            optimizer.state[offset] = {
                "step": torch.tensor(float(len(losses)), device=offset.device),
                **{
                    part: tensors[f"{name}/{part}"].to(offset.device)
                    for part in ("exp_avg", "exp_avg_sq")
                },
            }
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{state}: not a readable state of this training ({error}); remove it to start again"
        ) from error
    return losses


def _digest(tensors: dict[str, Tensor], losses: str) -> str:
    """Safetensors notices a file that was cut short, not a byte that flipped."""
    digest = hashlib.sha256(losses.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().cpu().numpy())
    return digest.hexdigest()


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
) -> dict[str, object]:
    """`finetune("smollm2-135m", questions, training, Path("tuned"))`: a model on disk.

    `out` becomes an ordinary transformers directory, with `finetune.json` beside the weights.
    Killed and called again, it continues to the same weights; called once more, it finds them
    there.

    Args:
        model: as `load_model` takes it, or loaded already, in which case its weights are trained.
        questions: hold the concepts of `training`.
        save_every: steps between two states that a killed run continues from.

    Returns:
        What `finetune.json` says: the run (model digest, training, digest of the texts), `status`,
        `steps`, `losses`, `vectors` trained, `parameters` trained, `optimizer_bytes`, `seconds`
        (of the call that ended it), `computed`, a record (see `provenance`) of each process that
        worked for it; of a run that diverged, also the `problem` and the step `kept`.

    Raises:
        InputError: for a bad choice, or if `out` holds another run or other files, before any
            training; if training diverges: `out` then holds the model of the last good state, or
            no model if there was none.
    """
    if save_every < 1:
        raise InputError(f"save_every {save_every}: expected at least 1 step")
    texts = training_texts(questions, training.concepts, training.statements)
    require_writable(out)
    _refuse_strangers(out)
    loaded = load_model(model, dtype=dtype, device=device) if isinstance(model, str) else model
    run = {
        "finetune_version": FINETUNE_VERSION,
        "model": loaded.name,
        "digest": loaded.digest,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "training": training.model_dump(mode="json"),
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        **number_versions(),
    }
    record = _read_record(out)
    if record is not None and record["run"] != run:
        raise InputError(
            f"{out}: holds another run ({_difference(record['run'], run)}); choose another "
            "directory, or remove this one"
        )
    if record is not None and record["status"] != "unfinished":
        return _done(record, out)
    began = time.perf_counter()
    view = value_vector_view(loaded.model)
    rows = encode_texts(view, loaded.tokenizer, texts)
    vectors = choose_vectors(view, loaded.tokenizer, questions, training)
    steps = count_steps(len(rows), training)
    record = {
        "run": run,
        "status": "unfinished",
        "steps": steps,
        "vectors": len(vectors),
        "parameters": len(vectors) * view.hidden,
        "optimizer_bytes": optimizer_bytes(len(vectors), view.hidden),
        "computed": [*(record or {}).get("computed", []), computed(**unit_record(loaded))],
    }
    _write_record(out, record)
    title = f"{training.method} of {loaded.name}"
    with (
        train_value_vectors(view, vectors) as trained,
        tqdm(total=steps, desc=title, unit="step", delay=0.01) as bar,
    ):
        try:
            losses = train(
                view,
                trained,
                rows,
                training,
                state=out / STATE,
                save_every=save_every,
                progress=bar.update,
            )
            record |= {"status": "finished", "losses": losses}
        except Diverged as error:
            record |= {
                "status": "diverged",
                "losses": error.losses[:-1],
                "kept": error.kept,
                "problem": str(error),
            }
            if error.kept:
                _read_state(out / STATE, trained, torch.optim.AdamW(trained.parameters()))
        record["seconds"] = round(time.perf_counter() - began, 2)
        if record["status"] == "finished" or record["kept"]:
            trained.merge()
            _save_model(out, loaded, training.concepts)
    _write_record(out, record)
    return _done(record, out)


def _done(record: dict[str, object], out: Path) -> dict[str, object]:
    """What to hand back of a run that has ended; nothing of it is needed to continue."""
    with writing_to(out):
        for left in (out / STATE, *out.glob(f"{PARTIAL}*")):
            left.unlink(missing_ok=True)
    if record["status"] == "finished":
        return record
    kept = record["kept"]
    held = f"{out} holds the model after step {kept}" if kept else "no earlier state was kept"
    raise InputError(
        f"training diverged: {record['problem']} of {record['steps']}; {held}; use another "
        f"directory and a lower learning rate than {record['run']['training']['learning_rate']:g}"
    )


def _refuse_strangers(out: Path) -> None:
    if not (out / RECORD).exists():
        for file in sorted(out.iterdir()):
            if file.name.startswith(PARTIAL):  # a run that was killed as it began
                continue
            raise InputError(
                f"{out}: holds {file.name}, and no {RECORD}; choose an empty or a new directory"
            )


def _read_record(out: Path) -> dict[str, object] | None:
    file = out / RECORD
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["status"] not in ("unfinished", "finished", "diverged"):
            raise ValueError
        {**record["run"], **record["run"]["training"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not the record of a run; choose another directory") from error
    return record


def _write_record(out: Path, record: dict[str, object]) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic(out / RECORD) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _save_model(out: Path, loaded: LoadedModel, concepts: Sequence[str]) -> None:
    with writing_to(out), quiet_transformers():
        loaded.model.save_pretrained(out)
        loaded.tokenizer.save_pretrained(out)
        if loaded.taught is not None:  # a micro model, and it stays one
            concepts = list(dict.fromkeys((*loaded.taught, *concepts)))
            zoo_training.write_record(out, {"concepts": concepts})


def _difference(there: dict[str, object], here: dict[str, object]) -> str:
    """The first thing in which two runs differ: `learning_rate 0.001, not 0.01`."""
    one, other = ({**run, **run["training"]} for run in (there, here))
    for name in other:
        if name != "training" and one.get(name) != other[name]:
            return f"{name} {one.get(name)}, not {other[name]}"
    return "of another version"
