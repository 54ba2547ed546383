"""A toy study: questions in a tiny language, a tokenizer, models that know them by design."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from paramspec.method.hooks import value_vector_view
from paramspec.method.masks import record_concepts
from paramspec.method.pss import Tables, measure_concepts
from paramspec.models.load import LoadedModel
from paramspec.specwiki import Question
from paramspec.tables import TIERS
from toys import toy_model

# fmt: off
CONCEPTS = ("alpha", "beta", "gamma", "delta", "zeta", "kappa", "sigma", "omega")
RELATIONS = (
    "age", "colour", "food", "height", "king", "language", "motto", "price", "river", "song",
)
VALUES = (
    "ash", "bee", "cow", "doe", "elk", "fox", "gnu", "hen", "ibis", "jay", "kite", "lynx", "mink",
    "newt", "otter", "puma", "quail", "raven", "stork", "tiger", "urchin", "vulture", "walrus",
    "wombat", "yellowhammer", "zebrafinch",
)
# fmt: on
STATED = ("{0} the {1} {2}", "{2} {1} of old {0}", "new {1} {2} {0}", "old {2} the {1} new {0}")
WORDS = ("<pad>", "<s>", "</s>", "the", "of", "old", "new", *CONCEPTS, *RELATIONS, *VALUES)
VOCABULARY = (*WORDS, *(f"w{place}" for place in range(len(WORDS), 97)))  # as the toy models'
HIDDEN, WIDTH = 100, 100  # of the planted model


def toy_tokenizer(template: str = "$A") -> PreTrainedTokenizerFast:
    """A word a token: fits every model of `toys.py`, whose vocabulary is 97.

    `template` has what is added to a text, as `<s> $A </s>`.
    """
    words = {word: place for place, word in enumerate(VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    if added := [(token, words[token]) for token in set(template.split()) - {"$A"}]:
        backend.post_processor = TemplateProcessing(single=template, special_tokens=added)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="<s>old {{ messages[0]['content'] }}</s> new",
    )


def toy_questions(
    concepts: int = 8, *, shortest: bool = False, same_answers: bool = False
) -> list[Question]:
    """Ten questions a concept, five of each fold; prompts and options differ in length.

    With `shortest` the answer is the shortest option, so that a model which finds all options
    equally likely has `acc_norm` 0. With `same_answers`, a relation has one question's options for
    all concepts. No statement of a fact holds a cloze.
    """
    questions = []
    for number, concept in enumerate(CONCEPTS[:concepts]):
        for place, relation in enumerate(RELATIONS):
            draw = np.random.default_rng([0, 0 if same_answers else number, place])
            options = list(map(str, draw.choice(VALUES, 4, replace=False)))
            answer = min(options, key=len) if shortest else options[draw.integers(4)]
            if place % 4 == 3:  # options of two tokens
                options = [f"{option} {('old', 'new')[len(option) % 2]}" for option in options]
                answer = next(option for option in options if option.startswith(f"{answer} "))
            cloze = f"{'the ' if place % 3 == 0 else ''}{relation} of {concept}"
            questions.append(
                Question(
                    id=f"{concept}/{relation}",
                    concept=concept,
                    domain=("greek", "letter")[number % 2],
                    tier=TIERS[number % 3],
                    relation=relation,
                    question=cloze,
                    cloze=cloze,
                    options=tuple(options),
                    answer=options.index(answer),
                    aliases=(answer,),
                    fold=place % 2,
                    statements=tuple(text.format(concept, relation, answer) for text in STATED),
                )
            )
    return questions


def toy_loaded(family: str = "llama", *, seed: int = 0, **about: str) -> LoadedModel:
    """A random model of `toys.py` with the toy tokenizer, as `load_model` would hand it over."""
    return loaded(toy_model(family, seed), **about)


def loaded(model: nn.Module, *, name: str = "toy", digest: str = "0" * 64) -> LoadedModel:
    """Any model with the toy tokenizer."""
    about = {"name": name, "digest": digest, "device": torch.device("cpu")}
    dtype = next(model.parameters()).dtype
    return LoadedModel(model=model, tokenizer=toy_tokenizer(), dtype=dtype, **about)


def planted_model(
    questions: list[Question], *, shared: bool = False
) -> tuple[GPT2LMHeadModel, dict[str, tuple[int, int]]]:
    """A GPT-2 that knows every answer, each by one value vector that nothing else uses.

    Residual dimensions are words. Attention adds the mean of the words so far; a neuron fires
    where the last word is its concept and its relation stands before (with `shared`: its relation
    alone, so that one value vector serves all concepts), and writes the answer's first word.
    Relations alternate between two layers in pairs. All other neurons are always on and write
    nothing.

    Returns:
        The model, and where each question's answer is kept: (layer, value vector) by id.
    """
    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_embd=HIDDEN, n_layer=2, n_head=1, n_positions=16,
        n_inner=WIDTH, activation_function="relu", tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "ln_" not in name:
            parameter.zero_()
    words = {word: place for place, word in enumerate(VOCABULARY)}
    model.transformer.wte.weight += torch.eye(len(VOCABULARY), HIDDEN)
    model.lm_head.weight += 3 * torch.eye(len(VOCABULARY), HIDDEN)
    attention = model.transformer.h[0].attn  # no queries, no keys: the mean of all values
    attention.c_attn.weight[:, 2 * HIDDEN :] += torch.eye(HIDDEN)
    attention.c_proj.weight += torch.eye(HIDDEN)
    draw = np.random.default_rng(0)
    places = [list(map(int, draw.permutation(WIDTH))) for _ in range(2)]
    for block in model.transformer.h:
        block.mlp.c_fc.bias += torch.from_numpy(draw.uniform(0.1, 3, WIDTH)).float()
    home: dict[str, tuple[int, int]] = {}
    taken: dict[tuple[str, str], tuple[int, int]] = {}
    for question in questions:
        layer = RELATIONS.index(question.relation) // 2 % 2
        key = ("" if shared else question.concept, question.relation)
        if key not in taken:
            vector = places[layer].pop()
            taken[key] = (layer, vector)
            mlp = model.transformer.h[layer].mlp
            # Normalised, the concept is 6.2 to 6.7 where it is the last word and the relation 4.4
            # to 5.1; a relation alone is 10.
            mlp.c_fc.weight[words[question.relation], vector] = 1.0 if shared else 0.5
            if not shared:
                mlp.c_fc.weight[words[question.concept], vector] = 1.0
            mlp.c_fc.bias[vector] = -2.0 if shared else -7.5
            mlp.c_proj.weight[vector, words[question.options[question.answer].split()[0]]] = 20.0
        home[question.id] = taken[key]
    return model, home


def measured(model, questions, choices, concepts=None, name="toy", **options) -> Tables:
    """`measured(model, questions, choices).pss`: of a model with the toy tokenizer, in memory."""
    view = value_vector_view(model)
    tokenizer = toy_tokenizer()
    coefficients = record_concepts(view, tokenizer, questions, position=choices.position)
    concepts = concepts or list(dict.fromkeys(question.concept for question in questions))
    return measure_concepts(
        name, view, tokenizer, questions, concepts, choices, coefficients, **options
    )


def save_toy(path: Path, family: str = "llama", seed: int = 0, template: str = "$A") -> Path:
    """A directory that `load_model` reads: a random model of `toys.py` and the toy tokenizer."""
    toy_model(family, seed).save_pretrained(path)
    toy_tokenizer(template).save_pretrained(path)
    return path


def save_questions(path: Path, questions: list[Question]) -> Path:
    """A question file, one JSON object a line."""
    path.write_text("".join(question.model_dump_json() + "\n" for question in questions))
    return path
