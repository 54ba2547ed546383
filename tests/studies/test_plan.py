"""What a plan says before a run, held against runs that are counted pass by pass."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import socket
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jupytext
import myst_nb
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import paramspec
from paramspec import cli
from paramspec.errors import InputError
from paramspec.execution.store import Store
from paramspec.method import kernels
from paramspec.method.hooks import (
    ValueVectorView,
    unembed_only,
    unverified_view,
    value_vector_view,
)
from paramspec.method.masks import record_concepts
from paramspec.method.pss import Choices, measure_concepts
from paramspec.method.rows import Engine, Request
from paramspec.method.scoring import choose_engine, encode, score_options
from paramspec.models.micro import MicroModel
from paramspec.models.registry import (
    empty_model,
    folds_asked,
    load_registry,
    published_config,
    study_questions,
)
from paramspec.models.zoo import (
    architecture,
    load_zoo,
    own_tokenizer,
    tokens_to_train,
    train_tokenizer,
    train_zoo,
    training_record,
)
from paramspec.specwiki import load_questions
from paramspec.studies import sweep
from paramspec.studies.plan import (
    CHAPTERS,
    Passes,
    chapter_studies,
    cost_of,
    find_gpu,
    flops,
    plan,
    pss_passes,
    recording_passes,
    scoring_passes,
)
from paramspec_book import book
from toy_study import save_toy, toy_loaded, toy_questions, toy_tokenizer
from toys import random_model

REPOSITORY = Path(__file__).parents[2]
TINY = """
concepts: {country: 1, element: 1}
exposure: {high: 4, medium: 2, low: 1}
vocabulary: 400
layers: 2
width: 16
mlp_width: 24
heads: 4
key_value_heads: 2
batch: 8
learning_rate: 0.005
seed: 0
families: [llama, qwen2, mistral, gemma2]
generations: {1: 4}
checkpoints: {families: [llama], generation: 1, steps: [2]}
"""
FAMILIES = ("llama", "qwen2", "mistral", "gemma2")


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def countable(monkeypatch):
    """Linear layers as they are: torch counts none of oneDNN's."""
    monkeypatch.setattr(kernels, "packs", lambda dtype: False)


@contextlib.contextmanager
def counting(view: ValueVectorView):
    """Every forward pass of the model: FLOPs as torch counts them, and tokens as they go through.

    Rows are counted where they leave the last MLP: masks may make several of one.
    """
    found = SimpleNamespace(count=0, tokens=0, computed=0, forms=set(), flops=0)
    entered = []

    def enter(_, args, kwargs):
        entered.append((kwargs["input_ids"], kwargs["attention_mask"]))

    def leave(module, args, output):
        ids, mask = entered.pop()
        copies = len(output) // len(ids)
        found.count += 1
        found.computed += copies * ids.numel()
        if isinstance(mask, dict):
            mask = mask["full_attention"]
        if mask.ndim == 2:
            found.tokens += copies * int(mask.sum())
        else:  # a packed row: who sees others, or is seen; padding sees itself alone
            sees = mask[:, 0] == 0
            linked = (sees.sum(-1) > 1) | (sees.sum(-2) > 1)
            found.tokens += copies * int(linked.sum())
        found.forms.add({2: "plain", 4: "packed"}[mask.ndim])

    hooks = [
        view.model.base_model.register_forward_pre_hook(enter, with_kwargs=True),
        view.modules[-1].register_forward_hook(leave),
    ]
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            yield found
    finally:
        for hook in hooks:
            hook.remove()
        found.flops = counter.get_total_flops()


@pytest.mark.parametrize("engine", ["packed", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_flops_are_those_of_a_counted_run(recipe, family, engine, countable):
    """Recording and measuring a micro model; those with a window of 16 have longer paths, too."""
    micro = load_zoo(recipe)[f"{recipe.as_posix()}:{family}-1"]
    config = architecture(micro.recipe)
    model = random_model(config)
    model.set_attn_implementation("eager")  # torch counts no fused attention of a CPU
    view, tokenizer = value_vector_view(model), own_tokenizer(micro)
    chosen = choose_engine(view) if engine == "packed" else Engine("plain", "asked for")
    questions = study_questions([micro.name])
    concepts = list(dict.fromkeys(question.concept for question in questions))[:3]
    choices = Choices(ratios=(0.1, 0.3), controls=2, general=4, row_tokens=48, batch_tokens=300)
    items = {question.id: encode(tokenizer, question) for question in questions}
    cost = cost_of(config)

    with counting(view) as ran:
        coefficients = record_concepts(view, tokenizer, questions, batch_tokens=300)
    planned = recording_passes(tokenizer, questions, 300)
    assert (planned.count, planned.tokens, planned.computed) == (
        ran.count,
        ran.tokens,
        ran.computed,
    )
    assert flops(planned, cost) == ran.flops > 0

    with counting(view) as ran:
        measure_concepts(
            "m", view, tokenizer, questions, concepts, choices, coefficients, engine=chosen
        )
    planned = pss_passes(items, chosen, questions, choices, concepts)
    assert (planned.count, planned.tokens, planned.computed) == (
        ran.count,
        ran.tokens,
        ran.computed,
    )
    assert flops(planned, cost) == ran.flops > 0
    assert ran.forms == {engine}

    with counting(view) as ran:
        score_options(view, [Request(item, 0) for item in items.values()], [None], engine=chosen)
    planned = scoring_passes(list(items.values()), chosen)
    assert (planned.count, planned.tokens, planned.computed) == (
        ran.count,
        ran.tokens,
        ran.computed,
    )
    assert flops(planned, cost) == ran.flops > 0


def test_a_study_is_counted_in_the_units_that_it_is_measured_in(tmp_path, monkeypatch, countable):
    """`measure_pss` itself, in units of four concepts, its test passes left aside."""
    loaded, questions = toy_loaded(), toy_questions()
    loaded.model.set_attn_implementation("eager")
    choices = Choices(ratios=(0.1,), general=5, batch_tokens=200)
    ran = []

    def counted(function):
        def wrapper(*args, **kwargs):
            with counting(unverified_view(loaded.model)) as found:
                result = function(*args, **kwargs)
            ran.append(found)
            return result

        return wrapper

    for name in ("measure_concepts", "record_concepts"):
        monkeypatch.setattr(sweep, name, counted(getattr(sweep, name)))
    sweep.measure_pss([loaded], questions, choices, store=Store(tmp_path))
    tokenizer = toy_tokenizer()
    items = {question.id: encode(tokenizer, question) for question in questions}
    engine = choose_engine(value_vector_view(loaded.model))
    planned = pss_passes(items, engine, questions, choices)
    planned += recording_passes(tokenizer, questions, choices.batch_tokens)
    assert len(ran) == 3  # the coefficients, and two units
    assert planned.count == sum(found.count for found in ran)
    assert planned.computed == sum(found.computed for found in ran)
    assert flops(planned, cost_of(loaded.model.config)) == sum(found.flops for found in ran)


HUB = [spec for spec in load_registry().values() if spec.source.kind == "hub"]


@pytest.mark.parametrize(
    "spec", [s for s in HUB if "pretraining" not in s.sets] + [HUB[-1]], ids=lambda s: s.id
)
def test_full_size_flops_are_what_torch_counts(spec):
    """One forward pass at full size, on the device that holds shapes alone."""
    model = empty_model(published_config(spec))
    model.set_attn_implementation("eager")
    rows, length, unembedded = 3, 11, 5
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    bias = torch.zeros(rows, 1, length, length, dtype=model.dtype, device="meta")
    places = torch.zeros(unembedded, 2, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, unembed_only(model, places):
        model(input_ids=ids, attention_mask=bias, position_ids=ids, use_cache=False)
    passes = Passes(
        computed=rows * length,
        pairs=rows * length**2,
        unembedded=unembedded,
    )
    assert flops(passes, cost_of(model.config)) == counter.get_total_flops()


def test_training_is_counted_before_it_is_done(recipe, tmp_path):
    zoo = load_zoo(recipe)
    root = tmp_path / "zoo"
    models = [zoo[f"{recipe.as_posix()}:{name}"] for name in ("llama-1", "llama-1@2", "gemma2-1")]
    before = [tokens_to_train(model) for model in models]
    train_zoo(models, root=root)
    assert before == [training_record(model, root=root)["tokens"] for model in models]


# Chapters


def asked_by(chapter: str, values: dict[str, object], monkeypatch) -> list[tuple]:
    """Run the cells of a chapter that measure, with calls noted down in place of models."""
    calls = []

    def note(kind):
        def call(models, questions, choices=None, **_):
            names = models if isinstance(models, list) else [models]
            names = [name if isinstance(name, str) else name.name for name in names]
            asked = (choices or Choices()).with_folds(folds_asked(names))  # as `measure_pss` does
            calls.append((kind, tuple(names), tuple(questions), asked))
            return SimpleNamespace(concepts=["x"], sums=torch.zeros(1, 2, 3, 4))

        return call

    def not_trained(*_):  # whatever lies in the results of this checkout
        raise InputError("a micro model, not trained yet")

    stand_ins = {
        "measure_pss": note("pss"),
        "score_questions": note("answers"),
        "concept_coefficients": note("coefficients"),
        "load_model": lambda name: SimpleNamespace(name=name),
        "value_vector_scores": lambda *_: torch.arange(12.0),
        "describe_models": not_trained,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(paramspec, name, stand_in, raising=False)
    monkeypatch.setattr(myst_nb, "glue", lambda *_, **__: None)
    names = paramspec.expand_models(values.get("models", [values.get("model")]))
    families = [getattr(paramspec.find_spec(name), "family", None) for name in names]
    space = {"about": pd.DataFrame({"model": names, "family": families})}
    unmeasured = set(stand_ins)  # names that hold what was not measured, or what hangs on it
    for cell in jupytext.read(REPOSITORY / "book" / f"{chapter}.md").cells:
        for statement in ast.parse(cell.source).body if cell.cell_type == "code" else []:
            used, bound = names_in(statement)
            try:
                exec(compile(ast.Module([statement], []), chapter, "exec"), space)
            except Exception:
                if not used & unmeasured:
                    raise
            if used & unmeasured:
                modules = {name for name in bound if isinstance(space.get(name), ModuleType)}
                unmeasured |= bound - modules
        if "parameters" in cell.metadata.get("tags", []):
            space |= values
    return calls


def names_in(statement: ast.stmt) -> tuple[set[str], set[str]]:
    """What a statement reads, and what it gives a name to or adds to."""
    used, bound = set(), set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.value, ast.Name):
            bound.add(node.value.id)  # as rows.append(...), table["x"] = ...
        if isinstance(node, ast.FunctionDef):
            bound.add(node.name)
    return used, bound


CALLS = ("measure_pss(", "score_questions(", "concept_coefficients(")


@pytest.mark.parametrize("profile", ["default", "paper", "smoke"])
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_measures_what_is_planned(chapter, profile, monkeypatch):
    """The chapter's own cells are run with the calls that measure noted down."""
    monkeypatch.chdir(REPOSITORY)
    found = book.find_chapter(chapter, REPOSITORY)
    values = {p.name: p.default for p in book.declared_parameters(found).values()}
    values |= book.load_profile(profile, REPOSITORY).get(chapter, {})
    planned = chapter_studies(chapter, values)
    asked = asked_by(chapter, values, monkeypatch)
    assert asked

    def units(calls):
        """What is measured, each model and question set once: coefficients come with a study."""
        found = set()
        for kind, names, questions, choices in calls:
            ids = hash(tuple((question.id, question.cloze) for question in questions))
            for name in names:
                if kind == "pss":
                    found.add((name, kind, ids, choices.model_dump_json()))
                if kind == "answers":
                    found.add((name, kind, ids))
                if kind != "answers":
                    found.add((name, "coefficients", ids, choices.position, choices.batch_tokens))
        return found

    assert units((s.kind, s.models, s.questions, s.choices) for s in planned) == units(asked)


def test_every_chapter_that_measures_is_planned():
    for chapter in book.chapters(REPOSITORY):
        text = chapter.source.read_text("utf-8")
        assert (chapter.name in CHAPTERS) == any(call in text for call in CALLS), chapter.name


# The plan


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A place without results, and no network at all."""

    calls = []

    def refuse(*where):
        calls.append(where)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert calls == []


SMALL = {"concepts": 6, "ratios": [0.1], "general": 2}


def small(models, chapters=("6-scale",), **options):
    options = {"root": REPOSITORY} | options
    return plan("default", chapters, SMALL | {"models": models}, **options)


def test_a_plan_adds_up_and_shared_work_counts_once(offline, recipe):
    models = [f"{recipe.as_posix()}:llama-1", f"{recipe.as_posix()}:gemma2-1"]
    one = small(models)
    both = small(models, ("6-scale", "7-pretraining"))
    assert (one.chapters[0].models, one.chapters[0].concepts) == (2, 6)
    assert both.flops == one.flops == sum(model.flops for model in one.models) > 0
    assert [chapter.shared_flops for chapter in both.chapters] == [0, one.flops]
    assert sum(chapter.flops for chapter in both.chapters) == 2 * one.flops
    for model in one.models:
        seconds = model.flops / (312e12 * 0.3)
        assert math.isclose(model.hours * 3600, seconds)
        assert model.exact
        assert not model.on_disk


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_a_model_s_flops_are_those_of_its_passes(offline, recipe, family):
    """With the engine that the model itself would get, which keeps to Mistral's window."""
    name = f"{recipe.as_posix()}:{family}-1"
    planned = small([name]).models[0]
    micro = load_zoo(recipe)[name]
    tokenizer = own_tokenizer(micro)
    engine = choose_engine(value_vector_view(random_model(architecture(micro.recipe))))
    questions = study_questions([name], 6, 0)
    choices = Choices(ratios=(0.1,), folds=(1,), general=2, nulls=("random",))
    items = {question.id: encode(tokenizer, question) for question in questions}
    passes = pss_passes(items, engine, questions, choices) + recording_passes(tokenizer, questions)
    assert (planned.tokens, planned.computed) == (passes.tokens, passes.computed)
    assert planned.flops == flops(passes, cost_of(architecture(micro.recipe)))
    assert planned.parameters == micro.recipe.parameters


def test_a_recipe_of_any_name_is_planned(offline, recipe, monkeypatch):
    odd = recipe.with_name("a@1: b.yaml")
    recipe.rename(odd)
    monkeypatch.chdir(odd.parent)
    for given in ("./a@1: b.yaml:llama-1", "a@1: b.yaml:llama-1@2"):
        assert [row.model for row in small([given]).training] == ["a@1: b.yaml:llama-1"]


def test_micro_models_that_are_not_trained_are_counted_by_run(offline, recipe):
    name = f"{recipe.as_posix()}:llama-1"
    planned = small([f"{name}@2", name]).training
    assert [row.model for row in planned] == [name]
    micro = load_zoo(recipe)[name]
    assert planned[0].tokens == tokens_to_train(micro)
    assert planned[0].flops == 6 * micro.recipe.parameters * planned[0].tokens
    train_zoo([micro])
    after = small([f"{name}@2", name])
    assert after.training == []
    assert all(model.on_disk for model in after.models)
    assert training_record(micro)["flops"] == planned[0].flops


def test_what_generations_share_is_counted_once(offline, recipe, monkeypatch):
    """Against the tokens of all texts that the training of both is shown."""
    recipe.write_text(TINY.replace("{1: 4}", "{1: 4, 2: 9}"))
    names = [f"{recipe.as_posix()}:llama-{number}" for number in (2, 1)]
    planned = small(names).training
    made, shown = [], []
    make, loss = MicroModel.__init__, MicroModel.loss_and_gradient
    monkeypatch.setattr(
        MicroModel, "__init__", lambda *given: made.append(given[2]) or make(*given)
    )
    monkeypatch.setattr(
        MicroModel, "loss_and_gradient", lambda *given: shown.extend(given[1]) or loss(*given)
    )
    train_zoo([load_zoo(recipe)[name] for name in names])
    assert len(made) == 1
    assert len(shown) == 8 * (4 + 9 - 3)  # texts, of which a quarter of the shorter's is a fall
    assert sum(one.tokens for one in planned) == sum(len(made[0][row]) for row in shown)


def test_tokens_are_the_model_s_own_where_its_tokenizer_lies_here(offline):
    own = save_toy(offline / "own")
    clozes = [question.cloze for question in load_questions(concepts=30)]
    train_tokenizer(clozes, 300).save_pretrained(own)
    planned = small([str(own), "qwen1.5-0.5b", "smollm2-135m"])
    toy, far, embedded = planned.models
    assert (toy.exact, far.exact, embedded.exact) == (True, False, True)
    assert (toy.on_disk, far.on_disk, embedded.on_disk) == (True, False, True)
    assert far.tokenizer == "smollm2-135m"
    assert far.tokens == embedded.tokens != toy.tokens
    assert any("Not on this disk: 1 models, counted with" in note for note in planned.notes)
    assert far.disk == 2 * load_registry()["qwen1.5-0.5b"].parameters
    assert toy.disk > (own / "model.safetensors").stat().st_size


def test_a_model_larger_than_a_gpu_takes_several(offline):
    a100, rtx = small(["qwen1.5-14b"]), small(["qwen1.5-14b"], gpu="rtx 4090")
    one, two = a100.models[0], rtx.models[0]
    assert (one.gpus, two.gpus) == (1, 2)
    weights = 2 * load_registry()["qwen1.5-14b"].parameters
    assert weights < one.memory < 1.2 * weights
    assert math.isclose(two.gpu_hours, 2 * two.hours)
    assert math.isclose(two.hours, one.hours * 312 / 165.2)
    assert rtx.chapters[0].gpu_hours == pytest.approx(two.gpu_hours)
    half = small(["qwen1.5-14b"], utilisation=0.15)
    assert half.gpu_hours == pytest.approx(2 * a100.gpu_hours)
    on_cpu = small(["qwen1.5-14b"], gpu="cpu")
    assert on_cpu.dtype == "float32"
    assert on_cpu.models[0].memory > 2 * weights


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--profile", "papre"], "unknown profile 'papre'; did you mean paper?"),
        (["--gpu", "A1000"], "GPU 'A1000': unknown; use A100 80GB, "),
        (["--gpu", "A100"], "GPU 'A100': could be several; use A100 80GB, A100 40GB"),
        (["--utilisation", "0"], "utilisation 0: expected a share above 0 and up to 1"),
        (["--utilisation", "1.5"], "utilisation 1.5: expected a share above 0 and up to 1"),
        (["--utilisation", "nan"], "'--utilisation': expected a number, as 0.05: 'nan'"),
        (["9-hopes"], "unknown chapter '9-hopes'"),
        (["1-value-vectors"], "1-value-vectors has no chapter that measures models; name one of"),
        (["--profile", "none.yaml"], "unknown chapter 'chapter'"),
        (["--profile", "typed.yaml", "6-scale"], "parameter concepts must be int | None"),
        (["6-scale", "-p", "modles", "[]"], "-p modles: no chapter planned here has such"),
        (["6-scale", "-p", "models", "[lama]"], "model 'lama': not in models.yaml"),
        (["6-scale", "-p", "models", "[]"], "models: none given"),
    ],
)
def test_bad_input_is_one_line(words, told, offline, monkeypatch, capsys):
    (offline / "none.yaml").write_text("chapter: {}\n")
    (offline / "typed.yaml").write_text("6-scale: {concepts: many}\n")
    monkeypatch.setattr(book, "find_root", lambda: REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["paramspec", "plan", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr()
    assert (stopped.value.code, shown.out) == (2, "")
    assert shown.err.startswith("paramspec: error: ")
    assert told in shown.err
    assert shown.err.count("\n") == 1


def test_gpus_are_sourced_and_found_by_any_spelling():
    assert find_gpu("h100").name == "H100 80GB"
    assert find_gpu("l4").name == "L4"  # and not the L40S
    assert find_gpu("RTX4090").peak == 165.2e12
    with pytest.raises(InputError):
        find_gpu("")


def test_command_says_what_twenty_models_cost(offline, monkeypatch, capsys):
    """The paper's profile, whole; the same numbers as JSON for one of its chapters."""
    monkeypatch.setattr(book, "find_root", lambda: REPOSITORY)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["paramspec", "plan", "--profile", "paper", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        return capsys.readouterr().out

    lines = run().splitlines()
    content = json.loads(run("4-twenty-models", "--json"))
    hours = f"{content['totals']['gpu_hours']:,.1f}"
    told = f"20 models, 525 concepts: {hours} GPU-hours on an A100 80GB at 30 %"
    assert f"4-twenty-models: {told}" in lines
    assert lines[-1].startswith("In all: 33 models, 525 concepts: ")
    for spec in HUB:
        row = next(line.split() for line in lines if line.split()[:1] == [spec.id])
        assert f"{spec.parameters / 1e9:.2f}" == row[1]
    assert content["totals"]["flops"] == sum(model["flops"] for model in content["models"])
    assert [model["model"] for model in content["models"]] == [
        spec.id for spec in HUB if "twenty" in spec.sets
    ]
    assert content["source"]
