"""A fine-tuning: its texts, and the value vectors that it may move.

The training texts are the statements of the concepts' facts, never the wording of an evaluation:
no statement holds a cloze. The paper does not state its statements, epochs, learning rate and
batches: they are fields of `Training`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paramspec.checked import Checked, Count, Seed, Share
from paramspec.errors import InputError
from paramspec.method import masks
from paramspec.method.batches import pad_right
from paramspec.method.hooks import ValueVectorView, refuse_too_long, train_value_vectors
from paramspec.models.tokens import token_ids
from paramspec.specwiki import Question

Method = Literal["FT-FV", "FT-PV", "FT-CV", "FT-RV"]
METHODS: tuple[Method, ...] = get_args(Method)
Rule = Literal["coefficient", "score", "gradient", "magnitude", "other"]
# Mean absolute coefficients over texts, `[layers, width]`.
Coefficients = Callable[[ValueVectorView, PreTrainedTokenizerBase, Sequence[str]], Tensor]


class Training(Checked):
    """Everything that fine-tuned value vectors depend on, apart from the model and the statements.

    >>> training = Training(method="FT-PV", concepts=("France", "gold"), share=0.05)
    >>> training.rule, training.epochs
    ('coefficient', 3)

    Attributes:
        method: which value vectors are trained (paper, section 5). `FT-FV`: all. `FT-PV`: in each
            layer the share that `rule` chooses. `FT-CV`: all but those of FT-PV. `FT-RV`: as many
            as FT-PV, at random.
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
        return tuple(dict.fromkeys(concepts))


def training_texts(questions: Sequence[Question], training: Training) -> list[str]:
    """The first statements of each fact, once each. Refused are a concept without statements, and a
    statement that holds the wording of a question on any of the concepts.
    """
    asked = {
        concept: [q for q in questions if q.concept == concept] for concept in training.concepts
    }
    texts: list[str] = []
    for concept, own in asked.items():
        stated = [text for question in own for text in question.statements[: training.statements]]
        if not stated:
            raise InputError(f"concept {concept!r}: no statements to train on; correct the name")
        texts += stated
    wordings = {
        _plain(text): q for own in asked.values() for q in own for text in (q.cloze, q.question)
    }
    for text in texts:
        plain = _plain(text)
        if held := [question for wording, question in wordings.items() if wording in plain]:
            raise InputError(
                f"statement {text!r}: holds the wording of question {held[0].id!r}; reword it"
            )
    return list(dict.fromkeys(texts))


def last_statements(questions: Sequence[Question], concepts: Sequence[str]) -> set[str]:
    """The last statement of each fact about the concepts: left out of a training on fewer."""
    return {q.statements[-1] for q in questions if q.concept in concepts and q.statements}


def _plain(text: str) -> str:
    """The same wording in other case or white space is one text."""
    return " ".join(text.casefold().split())


def other_concepts(questions: Sequence[Question], training: Training) -> list[str]:
    """A partner of each concept, drawn by the seed: of its own domain where one is left."""
    domain_of = {question.concept: question.domain for question in questions}
    draw = torch.Generator().manual_seed(training.seed)
    names = [name for name in domain_of if name not in training.concepts]
    if len(names) < len(training.concepts):
        raise InputError(
            f"rule {training.rule!r}: needs as many other concepts, and has {len(names)}; give more"
        )
    free = [names[index] for index in torch.randperm(len(names), generator=draw).tolist()]
    partners = []
    for concept in training.concepts:
        near = [name for name in free if domain_of[name] == domain_of[concept]]
        partners.append((near or free)[0])
        free.remove(partners[-1])
    return partners


def encode_texts(
    view: ValueVectorView, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[list[int]]:
    """The tokens of each text, and its end."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [[*row, *end] for row in token_ids(tokenizer, texts)]
    refuse_too_long(view, max(map(len, rows)), "a statement")
    return rows


def language_modelling_loss(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Mean cross-entropy over all tokens of the rows but the first of each, nats per token."""
    return next_token_nats(model, rows).sum() / sum(len(row) - 1 for row in rows)


def next_token_nats(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Negative log-likelihoods of each token but the first: fp32 `[rows, longest - 1]`, in nats, 0
    at padding. The last token of the longest rows is never read.
    """
    tokens, attention_mask = pad_right(rows)
    labels = tokens.masked_fill(attention_mask == 0, -100)[:, 1:]
    logits = model(
        input_ids=tokens[:, :-1].to(model.device),
        attention_mask=attention_mask[:, :-1].to(model.device),
        use_cache=False,
    ).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten().to(logits.device), reduction="none"
    ).view(labels.shape)


def choose_vectors(
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    training: Training,
    coefficients: Coefficients = masks.mean_coefficients,
) -> Tensor:
    """The vectors that a method trains: int32 `[n, 2]` of (layer, value vector), sorted.

    FT-PV and FT-RV of one share choose as many in every layer; FT-PV and FT-CV of one rule and
    seed share none and together are all. `coefficients` are of texts, recorded or kept.
    """
    layers = list(range(view.layers) if training.layers is None else training.layers)
    if max(layers) >= view.layers:
        raise InputError(f"layer {max(layers)}: the model has layers 0 to {view.layers - 1}")
    allowed = torch.zeros(view.layers, view.width, dtype=torch.bool)
    allowed[layers] = True
    if training.method == "FT-FV":
        return allowed.nonzero().int()
    if training.method == "FT-RV":
        draw = torch.Generator().manual_seed(training.seed)
        like = masks.top_vectors(torch.zeros(view.layers, view.width), training.share)
        chosen = masks.random_vectors(like, view.layers, view.width, draw)
    else:
        chosen = _by_rule(view, tokenizer, questions, training, coefficients)
    rest = masks.keep_tensor(chosen, view.layers, view.width)
    trained = (allowed & (rest if training.method == "FT-CV" else ~rest)).nonzero().int()
    if len(trained) == 0:
        raise InputError(
            f"share {training.share}: leaves no vector for {training.method} to train; change it"
        )
    return trained


def _by_rule(
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    training: Training,
    coefficients: Coefficients,
) -> Tensor:
    """The vectors that FT-PV trains, and FT-CV does not, if all layers are allowed."""

    def on(concepts: Sequence[str]) -> Tensor:
        on_these = training.model_copy(update={"concepts": concepts})
        return coefficients(view, tokenizer, training_texts(questions, on_these))

    if training.rule == "gradient":
        scores = gradient_norms(view, tokenizer, training_texts(questions, training))
    elif training.rule == "other":
        scores = on(other_concepts(questions, training))
    else:
        scores = on(training.concepts)
    if training.rule == "score":
        scores = scores - on(other_concepts(questions, training))
    chosen = masks.top_vectors(scores, training.share)
    if training.rule != "magnitude":
        return chosen
    draw = torch.Generator().manual_seed(training.seed)
    ascending = scores.argsort(dim=1, stable=True)
    matched = masks.magnitude_matched_vectors(chosen, ascending, draw)
    if len(matched) < len(chosen):
        raise InputError(
            f"share {training.share}: rule 'magnitude' has too few vectors left; use up to a half"
        )
    return matched


def gradient_norms(
    view: ValueVectorView, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Tensor:
    """Norms of the gradient of the loss over all texts by each value vector: `[layers, width]`."""
    everything = torch.ones(view.layers, view.width, dtype=torch.bool).nonzero().int()
    rows = sorted(encode_texts(view, tokenizer, texts), key=len)
    tokens = sum(len(row) - 1 for row in rows)
    with train_value_vectors(view, everything) as trained:
        for start in range(0, len(rows), 32):
            part = rows[start : start + 32]
            share = sum(len(row) - 1 for row in part) / tokens
            (language_modelling_loss(view.model, part) * share).backward()
        norms = [trained.offsets[str(layer)].grad.norm(dim=1).cpu() for layer in trained.chosen]
    return torch.stack(norms)
