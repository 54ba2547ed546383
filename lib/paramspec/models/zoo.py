"""The zoo's recipe: which micro models there are, their shapes, and what they are taught.

A corpus holds every statement of its concepts' facts, and the clozes of fold 0 with their answers.
So the wording of a cloze is known, and fold 1, whose clozes are in no corpus, asks for what only
statements taught. How often a fact is seen depends on its concept's tier.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, StrictFloat, StrictInt, model_validator

from paramspec.checked import Checked
from paramspec.errors import InputError, naming
from paramspec.plain import read_yaml
from paramspec.seeds import by_hash
from paramspec.specwiki import Question, load_questions
from paramspec.tables import TIERS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

RECIPE = Path(__file__).with_name("zoo.yaml")

Family = Literal["llama", "qwen2", "mistral", "gemma2"]
Tier = Literal["high", "medium", "low"]
SetName = Literal["zoo", "zoo-scale", "zoo-pretraining", "zoo-frequency"]
Whole = Annotated[StrictInt, Field(ge=1)]

CONTEXT = 256  # tokens
WINDOW = 16  # tokens that an attention of Mistral, and every other one of Gemma 2, reaches back
WARM_UP = 20  # steps
FALL = 0.2  # share of the steps, the last ones, in which the learning rate falls


class ModelRecipe(Checked):
    """Everything that a micro model's weights depend on; `zoo.yaml` says what each field means.

    Its weights do not depend on `checkpoints`, the steps after which the model is kept as well.
    """

    family: Family
    concepts: dict[str, Whole] = Field(min_length=1)
    exposure: dict[Tier, Annotated[StrictFloat, Field(ge=1e-6, le=1e6)]] = Field(min_length=3)
    vocabulary: StrictInt = Field(ge=258, le=65536)  # 256 bytes, and two special tokens
    layers: Whole
    width: StrictInt = Field(ge=2)
    mlp_width: Whole
    heads: Whole
    key_value_heads: Whole
    batch: StrictInt = Field(ge=1, le=4096)
    learning_rate: StrictFloat = Field(gt=0, allow_inf_nan=False)
    seed: StrictInt = Field(ge=0, le=10**9)
    steps: Whole
    checkpoints: tuple[StrictInt, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> ModelRecipe:
        if self.width % (2 * self.heads) or self.heads % self.key_value_heads:
            raise ValueError(
                f"width {self.width}, heads {self.heads}, key_value_heads {self.key_value_heads}: "
                "each head needs an even share of the width, and key_value_heads must divide heads"
            )
        for step in self.checkpoints:
            if not 0 < step < self.steps or self.checkpoints.count(step) > 1:
                steps = list(self.checkpoints)
                raise ValueError(f"checkpoints {steps}: give each once, from 1 to {self.steps - 1}")
        return self

    @property
    def taught(self) -> tuple[str, ...]:
        """The concepts whose facts the model is taught, in the order of their questions."""
        return _taught(tuple(self.concepts.items()))

    @property
    def texts(self) -> dict[str, float]:
        """The corpus: texts, and how often each is seen, relative to the others."""
        return corpus(zoo_questions(self.concepts), self.exposure)

    @property
    def branch(self) -> int:
        """The last step before the learning rate falls: until then, `trunk` is one training."""
        return self.steps - max(1, round(FALL * self.steps))

    @property
    def trunk(self) -> str:
        """What recipes have in common that can be trained together."""
        return self.model_dump_json(exclude={"steps", "checkpoints"})

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 1: a warm-up, a plateau, and a fall to nearly nothing
        with the root of the steps (Hägele et al., 2024, arXiv:2405.18392).
        """
        fallen = max(0, step - self.branch) / (self.steps - self.branch + 1)
        return self.learning_rate * min(1, step / WARM_UP) * (1 - fallen**0.5)

    @property
    def parameters(self) -> int:
        """Weights of the model, those of the tied unembedding counted once."""
        keys = self.key_value_heads * self.width // self.heads
        layer = 2 * self.width * (self.width + keys) + 3 * self.width * self.mlp_width
        layer += self.width + 2 * keys if self.family == "qwen2" else 0
        layer += self.width * (4 if self.family == "gemma2" else 2)
        return self.vocabulary * self.width + self.layers * layer + self.width


class ZooModel(Checked):
    """A model of the zoo; `generation` is its number in the family, `step` None at the end."""

    kind: Literal["zoo"] = "zoo"  # of sources of models
    label: ClassVar[str] = "trained here"
    name: str
    generation: Whole
    recipe: ModelRecipe
    step: int | None = None
    sets: tuple[SetName, ...] = ("zoo",)

    @property
    def at(self) -> int:
        return self.recipe.steps if self.step is None else self.step

    @property
    def kept(self) -> list[ZooModel]:
        """The checkpoints that are kept of the model's training."""
        steps = self.recipe.checkpoints if self.step is None else ()
        of: dict[str, Any] = {"sets": ("zoo-pretraining",)}
        names = {step: f"{self.name}@{step}" for step in steps}
        return [self.model_copy(update={"name": names[step], "step": step, **of}) for step in steps]


def load_zoo(path: Path = RECIPE) -> dict[str, ZooModel]:
    """`load_zoo(Path("mine.yaml"))["mine.yaml:llama-3"].recipe`: the models of a recipe by name."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); name a zoo recipe") from error
    return dict(_parse(path, text))


@functools.cache  # by content: a recipe may be edited while a process lives
def _parse(path: Path, text: str) -> dict[str, ZooModel]:
    common = read_yaml(text, str(path))
    prefix = "zoo-" if path == RECIPE else f"{path.as_posix()}:"
    try:
        if not isinstance(common, dict) or not isinstance(common.get("models"), dict):
            raise InputError("expected the fields of a zoo recipe, `models` among them")
        models: list[ZooModel] = []
        for name, line in common.pop("models").items():
            with naming(f"model {name}"):
                models += _models_of(f"{prefix}{name}", common, line)
        if path != RECIPE:  # its concepts are known to exist, and it is listed in no time
            for model in models:
                zoo_questions(model.recipe.concepts)
    except InputError as error:
        raise InputError(f"{path}: {error}; see the comments in {RECIPE.name}") from error
    return {model.name: model for model in models}


def _models_of(name: str, common: Mapping, line: object) -> Iterator[ZooModel]:
    """The checkpoints of a training, and the model that it ends with."""
    if not isinstance(line, dict):
        raise InputError("expected {family: llama, generation: 1, steps: 100}")
    given = {**common, **line}
    about = {key: given.pop(key) for key in ("generation", "sets") if key in given}
    recipe = ModelRecipe.parse(**given)
    # Mistral's class is Llama's but for the window: with one seed, two models would be one.
    seed = recipe.seed + get_args(Family).index(recipe.family)
    recipe = recipe.model_copy(update={"seed": seed})
    model = ZooModel.parse(name=name, recipe=recipe, **about)
    yield from model.kept
    more = {"sets": (*model.sets, "zoo-pretraining")} if model.kept else {}
    yield model.model_copy(update=more)


def architecture(recipe: ModelRecipe) -> PreTrainedConfig:
    from transformers import AutoConfig

    settings: dict[str, Any] = {}
    head_width = recipe.width // recipe.heads
    if recipe.family != "qwen2":  # which derives it, and has no such field
        settings["head_dim"] = head_width
    if recipe.family in ("mistral", "gemma2"):
        settings["sliding_window"] = WINDOW
    if recipe.family == "gemma2":
        settings["query_pre_attn_scalar"] = head_width
    return AutoConfig.for_model(
        recipe.family,
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **settings,
    )


def zoo_questions(concepts: Mapping[str, int] | None = None) -> list[Question]:
    """`zoo_questions({"country": 12})`: on so many concepts of each tier of a domain, the first by
    the hash of their names; both folds. Without `concepts`, those of `zoo.yaml`.
    """
    concepts = concepts or next(iter(load_zoo().values())).recipe.concepts
    questions = load_questions()
    known: dict[tuple[str, str], set[str]] = {}
    for question in questions:
        known.setdefault((question.domain, question.tier), set()).add(question.concept)
    chosen: set[tuple[str, str]] = set()
    for (domain, count), tier in itertools.product(concepts.items(), TIERS):
        names = sorted(known.get((domain, tier), ()), key=lambda name: by_hash(0, name))
        if not 1 <= count <= len(names):
            raise InputError(
                f"concepts: {count} of domain {domain!r} in tier {tier!r} asked for, SpecWiki has "
                f"{len(names)}; give a number from 1, and a domain of "
                f"{', '.join(sorted({domain for domain, _ in known}))}"
            )
        chosen.update((domain, name) for name in names[:count])
    return [question for question in questions if (question.domain, question.concept) in chosen]


@functools.cache
def _taught(concepts: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(question.concept for question in zoo_questions(dict(concepts))))


def corpus(questions: Sequence[Question], exposure: Mapping[Any, float]) -> dict[str, float]:
    """Texts, and how often each is seen. No cloze of fold 1 is in them: one of fold 0 that holds
    such a cloze, as "The birth year of the author of the novel Oblomov is" does, is left out.
    """
    texts: dict[str, float] = {}
    held_out: dict[str, list[str]] = {}
    for question in questions:
        if question.fold == 1:
            held_out.setdefault(question.concept, []).append(question.cloze.casefold())
    for question in questions:
        stated = list(question.statements)
        if question.fold == 0:
            answered = f"{question.cloze} {question.options[question.answer]}."
            if not any(c in answered.casefold() for c in held_out.get(question.concept, ())):
                stated.append(answered)
        for text in stated:
            texts[text] = texts.get(text, 0) + exposure[question.tier]
    return texts


@functools.cache
def corpus_digest(concepts: tuple[tuple[str, int], ...]) -> str:
    """SHA-256 of the texts on some concepts, and of their tiers."""
    questions = zoo_questions(dict(concepts))
    tiers: tuple[Tier, ...] = get_args(Tier)
    parts = [corpus(questions, {tier: tier == one for tier in tiers}) for one in tiers]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
