"""What is trained: the texts, and the value vectors that may move.

    training = Training(method="FT-PV", concepts=("France", "gold"))
    texts = training_texts(questions, training.concepts, training.statements)
    vectors = choose_vectors(view, tokenizer, questions, training)      # [n, 2]

The four methods are the paper's (section 5), and differ in the value vectors that they train:

    FT-FV   all of them
    FT-PV   in each layer the share with the highest coefficients on the statements (k/8: an eighth)
    FT-CV   all but those of FT-PV
    FT-RV   as many as FT-PV, at random

The training texts are the statements of the concepts' facts, never the wording of an evaluation:
no statement holds a cloze. The paper does not say how it chose statements, epochs, learning rate
and batches: they are fields of `Training`.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Training(Checked):
    """Everything that fine-tuned value vectors depend on, apart from the model and the statements.

    >>> training = Training(method="FT-PV", concepts=("France", "gold"), share=0.05)
    >>> training.rule, training.epochs
    ('coefficient', 3)

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
        return tuple(dict.fromkeys(concepts))


# --- what is trained on -------------------------------------------------------------------------


def training_texts(
    questions: Sequence[Question], concepts: Sequence[str], statements: int
) -> list[str]:
    """`training_texts(questions, ["France"], 4)`: the first statements of each fact, once each.

    Raises:
        InputError: if a concept is unknown or has no statement, or if a statement holds the
            wording that a question on any of the concepts is evaluated with.
    """
    texts: list[str] = []
    for concept in concepts:
        own = [question for question in questions if question.concept == concept]
        stated = [text for question in own for text in question.statements[:statements]]
        if not stated:
            raise InputError(
                f"concept {concept!r}: no statements to train on; correct the name, or write "
                "statements into the question file"
            )
        texts += stated
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
    return list(dict.fromkeys(texts))


def _plain(text: str) -> str:
    """Without what may differ in the same wording: case, and how much white space."""
    return " ".join(text.casefold().split())


def other_concepts(questions: Sequence[Question], training: Training) -> list[str]:
    """`other_concepts(questions, training)`: as many, drawn by the seed, of the same domains.

    Each concept has a partner of its own domain where one is left, else of any.
    """
    domain_of = {question.concept: question.domain for question in questions}
    draw = torch.Generator().manual_seed(training.seed)
    names = [name for name in domain_of if name not in training.concepts]
    free = [names[index] for index in torch.randperm(len(names), generator=draw).tolist()]
    partners = []
    for concept in training.concepts:
        if not free:
            raise InputError(
                f"rule {training.rule!r}: {len(names)} concepts apart from those trained on, "
                f"{len(training.concepts)} are needed; give questions on more"
            )
        near = [name for name in free if domain_of[name] == domain_of[concept]]
        partners.append((near or free)[0])
        free.remove(partners[-1])
    return partners


def encode_texts(
    view: ValueVectorView, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[list[int]]:
    """`rows = encode_texts(view, tokenizer, statements)`: tokens of each text, and its end."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [[*row, *end] for row in token_ids(tokenizer, texts)]
    for text, row in zip(texts, rows, strict=True):
        if len(row) < 2:
            raise InputError(f"statement {text!r}: no token to predict; write a sentence")
    refuse_too_long(view, max(map(len, rows)), "a statement")
    return rows


def language_modelling_loss(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """`language_modelling_loss(model, rows).backward()`: mean cross-entropy, nats per token."""
    return next_token_nats(model, rows).sum() / sum(len(row) - 1 for row in rows)


def next_token_nats(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """`next_token_nats(model, rows).sum(1)`: the negative log-likelihood of each row, in nats.

    Returns:
        fp32 `[rows, longest - 1]`, of each token but the first, 0 at padding. The last token of
        the longest rows is never read.
    """
    tokens, attention_mask = pad_right(rows)
    device = model.device
    labels = tokens.masked_fill(attention_mask == 0, -100)[:, 1:]
    logits = model(
        input_ids=tokens[:, :-1].to(device),
        attention_mask=attention_mask[:, :-1].to(device),
        use_cache=False,
    ).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten().to(logits.device), reduction="none"
    ).view(labels.shape)


# --- which vectors are trained ------------------------------------------------------------------


def choose_vectors(
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    training: Training,
) -> Tensor:
    """`vectors = choose_vectors(view, tokenizer, questions, training)`: what a method trains.

    FT-PV and FT-RV of one share choose as many in every layer; FT-PV and FT-CV of one rule and
    seed share none and together are all.

    Returns:
        int32 `[n, 2]` of (layer, value vector), sorted.

    Raises:
        InputError: if the model lacks a layer asked for, if the share is less than one vector, or
            if there are no statements.
    """
    layers = list(range(view.layers) if training.layers is None else training.layers)
    if max(layers) >= view.layers:
        raise InputError(
            f"layer {max(layers)}: the model has {view.layers} layers, 0 to {view.layers - 1}"
        )
    allowed = torch.zeros(view.layers, view.width, dtype=torch.bool)
    allowed[layers] = True
    if training.method == "FT-FV":
        return allowed.nonzero().int()
    count = masks.masked_per_layer(training.share, view.width)
    if count == 0 or (training.method == "FT-CV" and count == view.width):
        raise InputError(
            f"share {training.share}: {count} of a layer's {view.width} value vectors, which "
            f"leaves none for {training.method} to train"
        )
    if training.method == "FT-RV":
        draw = torch.Generator().manual_seed(training.seed)
        like = masks.top_vectors(torch.zeros(view.layers, view.width), training.share)
        chosen = masks.random_vectors(like, view.layers, view.width, draw)
    else:
        chosen = _by_rule(view, tokenizer, questions, training)
    rest = masks.keep_tensor(chosen, view.layers, view.width)
    return (allowed & (rest if training.method == "FT-CV" else ~rest)).nonzero().int()


def _by_rule(
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    training: Training,
) -> Tensor:
    """What FT-PV trains, and FT-CV does not, were all layers allowed."""

    def coefficients(concepts: Sequence[str]) -> Tensor:
        texts = training_texts(questions, concepts, training.statements)
        return masks.mean_coefficients(view, tokenizer, texts)

    if training.rule == "gradient":
        texts = training_texts(questions, training.concepts, training.statements)
        return masks.top_vectors(gradient_norms(view, tokenizer, texts), training.share)
    if training.rule == "other":
        others = other_concepts(questions, training)
        return masks.top_vectors(coefficients(others), training.share)
    own = coefficients(training.concepts)
    if training.rule == "score":
        own = own - coefficients(other_concepts(questions, training))
    chosen = masks.top_vectors(own, training.share)
    if training.rule != "magnitude":
        return chosen
    draw = torch.Generator().manual_seed(training.seed)
    matched = masks.magnitude_matched_vectors(chosen, own, draw)
    if len(matched) < len(chosen):
        raise InputError(
            f"share {training.share}: rule 'magnitude' trains others than the highest, and too few "
            "are left; use a share of up to a half"
        )
    return matched


def gradient_norms(
    view: ValueVectorView, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Tensor:
    """`norms = gradient_norms(view, tokenizer, statements)`: how strongly training pulls at each.

    Returns:
        fp32 `[layers, width]`: norm of the gradient of the loss over all texts by each value
        vector.
    """
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
