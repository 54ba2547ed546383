"""The zoo: micro models trained from scratch on SpecWiki, from a recipe that a reader can edit.

    recipes = load_zoo()                          # {"zoo-llama-1": ModelRecipe(...), ...}
    train_zoo(list(recipes.values()))             # those not trained yet, side by side
    directory = trained(recipes["zoo-llama-3"])   # an ordinary transformers directory
    training_record(recipes["zoo-llama-3"])       # tokens seen, loss, seconds

The corpus of a model holds every statement of its concepts' facts, and the clozes of fold 0 with
their answers: so the wording of a cloze is known, and fold 1, whose clozes stand in no corpus, asks
what the statements taught. How often a fact is seen depends on its concept's tier.

torch and transformers are imported where they are used, so that listing the zoo is quick.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import numpy as np
from pydantic import Field, StrictFloat, StrictInt, model_validator
from tqdm import tqdm

from paramspec.checked import Checked
from paramspec.errors import InputError, naming
from paramspec.execution.parallel import begin_work, hand_out
from paramspec.execution.store import Store
from paramspec.models.libraries import quiet_transformers
from paramspec.models.tokens import token_ids
from paramspec.plain import read_yaml
from paramspec.specwiki import TIERS, Question, load_questions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

RECIPE = Path(__file__).with_name("zoo.yaml")
ROOT = Path("results/zoo")  # where trained models are kept, from the working directory
RECORD = "training.json"
VERSION = 4  # raised whenever a change could move a trained weight, or what its record says

Family = Literal["llama", "qwen2", "mistral", "gemma2"]
CONTEXT = 256  # tokens
WINDOW = 16  # tokens that an attention of Mistral, and every other one of Gemma 2, reaches back
BEGIN, END = "<s>", "</s>"
LARGEST = 200_000_000  # weights; five times as many numbers are in memory while it trains
WARM_UP = 20  # steps
FALL = 0.2  # of the steps, the last ones, in which the learning rate falls
SORTED_TOGETHER = 16  # batches whose texts are sorted by length, so that little is padded


Tier = Literal["high", "medium", "low"]
SetName = Literal["zoo", "zoo-scale", "zoo-pretraining", "zoo-frequency"]
Whole = Annotated[StrictInt, Field(ge=1)]


class ModelRecipe(Checked):
    """Everything that a micro model's weights depend on.

    `concepts` is the number of concepts of each tier by domain; `exposure` how often a fact of a
    tier is seen, relative to the others; `steps` counts optimizer steps of `batch` texts;
    `checkpoints` are steps after which the model is kept as well: its weights do not depend on
    them.
    """

    family: Family
    concepts: dict[str, Whole] = Field(min_length=1)
    exposure: dict[Tier, Annotated[StrictFloat, Field(ge=1e-6, le=1e6)]]
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
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} with {self.heads} heads: a head's share of the width must be "
                "a whole, even number"
            )
        if self.heads % self.key_value_heads:
            raise ValueError(
                f"key_value_heads {self.key_value_heads} with {self.heads} heads: each must serve "
                "as many heads as the others"
            )
        if set(self.exposure) != set(TIERS):
            raise ValueError(f"exposure {self.exposure}: give each of {', '.join(TIERS)}")
        for step in self.checkpoints:
            if not 0 < step < self.steps or self.checkpoints.count(step) > 1:
                raise ValueError(
                    f"checkpoint at step {step} of {self.steps}: give steps from 1 to "
                    f"{self.steps - 1}, each once"
                )
        if self.parameters > LARGEST:
            raise ValueError(
                f"width {self.width}, mlp_width {self.mlp_width}, layers {self.layers}, vocabulary "
                f"{self.vocabulary}: {self.parameters:,} weights, and {LARGEST:,} are the most "
                "that is trained here; lower one of them"
            )
        return self

    @property
    def taught(self) -> tuple[str, ...]:
        """The concepts whose facts the model is taught, in the order of their questions."""
        return _taught(tuple(self.concepts.items()))

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def branch(self) -> int:
        """The last step before the learning rate falls.

        Until then, recipes that differ in their steps alone are one and the same training.
        """
        return self.steps - max(1, round(FALL * self.steps))

    @property
    def trunk(self) -> str:
        """What recipes have in common that can be trained together, see `branch`."""
        return self.model_dump_json(exclude={"steps", "checkpoints"})

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 1: a warm-up, a plateau, a fall to nearly nothing.

        It falls with the root of the steps (Hägele et al., 2024, arXiv:2405.18392).
        """
        fallen = max(0, step - self.branch) / (self.steps - self.branch + 1)
        return self.learning_rate * min(1, step / WARM_UP) * (1 - fallen**0.5)

    @property
    def parameters(self) -> int:
        """Weights of the model, those of the tied unembedding counted once."""
        queries, keys = self.heads * self.head_width, self.key_value_heads * self.head_width
        layer = 2 * self.width * (queries + keys) + 3 * self.width * self.mlp_width
        layer += queries + 2 * keys if self.family == "qwen2" else 0
        layer += self.width * (4 if self.family == "gemma2" else 2)
        return self.vocabulary * self.width + self.layers * layer + self.width


class ZooModel(Checked):
    """A model of the zoo: what it is measured for, and at which step.

    `generation` is its number in the family; `step` is None for the finished model.
    """

    name: str
    generation: Whole
    recipe: ModelRecipe
    step: int | None = None
    sets: tuple[SetName, ...] = ("zoo",)

    @property
    def at(self) -> int:
        """The step that its weights are of."""
        return self.recipe.steps if self.step is None else self.step


def load_zoo(path: Path = RECIPE) -> dict[str, ZooModel]:
    """`load_zoo()["zoo-llama-3"].recipe.steps`: the models of a recipe file by name.

    The models of another file than the library's own are called by its path: `mine.yaml:llama-3`.

    Raises:
        InputError: one line naming the file, the field and the value, if a model of the recipe
            could not be built.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); name a zoo recipe") from error
    return dict(_parse(path, text))


@functools.cache  # by content: a recipe may be edited while a process lives
def _parse(path: Path, text: str) -> dict[str, ZooModel]:
    content = read_yaml(text, str(path))
    prefix = "zoo-" if path == RECIPE else f"{path.as_posix()}:"
    try:
        if not isinstance(content, dict) or not isinstance(content.get("models"), dict):
            raise InputError("expected the fields of a zoo recipe, `models` among them")
        common = {name: value for name, value in content.items() if name != "models"}
        models = [
            model
            for name, line in content["models"].items()
            for model in _models_of(prefix, str(name), common, line)
        ]
        if path != RECIPE:  # whose concepts are known to exist, and which is listed in no time
            for concepts in {tuple(model.recipe.concepts.items()) for model in models}:
                _corpus_digest(concepts)
    except InputError as error:
        raise InputError(f"{path}: {error}; see the comments in {RECIPE.name}") from error
    return {model.name: model for model in models}


def _models_of(prefix: str, name: str, common: Mapping, line: object) -> Iterator[ZooModel]:
    """A training's checkpoints, and what it ends with."""
    if not isinstance(line, dict):
        raise InputError(f"model {name}: expected {{family: llama, generation: 1, steps: 100}}")
    given = {**common, **line}
    about = {key: given.pop(key) for key in ("generation", "sets") if key in given}
    with naming(f"model {name}"):
        recipe = ModelRecipe.parse(**given)
        # Mistral's class is Llama's but for the window: with one seed, two models would be one.
        seed = recipe.seed + get_args(Family).index(recipe.family)
        about["recipe"] = recipe.model_copy(update={"seed": seed})
        model = ZooModel.parse(name=f"{prefix}{name}", **about)
    for step in recipe.checkpoints:
        update = {"name": f"{model.name}@{step}", "step": step, "sets": ("zoo-pretraining",)}
        yield model.model_copy(update=update)
    more = ("zoo-pretraining",) if recipe.checkpoints else ()
    yield model.model_copy(update={"sets": model.sets + more})


# --- the corpus ---------------------------------------------------------------------------------


def zoo_questions(concepts: Mapping[str, int] | None = None) -> list[Question]:
    """`zoo_questions()`: the questions on the concepts that the zoo is taught, both folds.

    Args:
        concepts: of each tier, by domain, the first by the hash of their names; those of
            `zoo.yaml` if not given.

    Raises:
        InputError: if a domain is unknown, or has fewer concepts of a tier.
    """
    if concepts is None:
        concepts = next(iter(load_zoo().values())).recipe.concepts
    questions = load_questions()
    tier_of = {(q.domain, q.concept): q.tier for q in questions}
    domains = sorted({domain for domain, _ in tier_of})
    chosen: set[tuple[str, str]] = set()
    for (domain, count), tier in itertools.product(concepts.items(), TIERS):
        if domain not in domains:
            raise InputError(
                f"concepts: unknown domain {domain!r}; choose from {', '.join(domains)}"
            )
        known = sorted(
            (name for (home, name), found in tier_of.items() if (home, found) == (domain, tier)),
            key=lambda name: hashlib.sha256(f"0\x1f{name}".encode()).digest(),
        )
        if not 1 <= count <= len(known):
            raise InputError(
                f"concepts: {count} of domain {domain!r} in tier {tier!r} asked for, SpecWiki has "
                f"{len(known)}; give a number from 1, or another domain"
            )
        chosen.update((domain, name) for name in known[:count])
    return [question for question in questions if (question.domain, question.concept) in chosen]


def corpus(questions: Sequence[Question], exposure: Mapping[str, float]) -> dict[str, float]:
    """`corpus(zoo_questions(), {"high": 4, "medium": 2, "low": 1})`: texts and their weights.

    Every statement of every fact, and the cloze of each fact of fold 0 with its answer. No cloze
    of fold 1 is in it: one of fold 0 that holds one of fold 1, as "The birth year of the author of
    the novel Oblomov is" does, is left out.
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


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """`train_tokenizer(list(corpus), 2048)`: byte-level BPE that starts a text with `<s>`.

    Raises:
        InputError: if the texts have fewer merges to offer than the vocabulary asks for.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise InputError(
            f"vocabulary {vocabulary}: the corpus has {tokenizer.get_vocab_size()} tokens to give; "
            "ask for no more, or for more concepts"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END
    )


# --- training -----------------------------------------------------------------------------------


def architecture(recipe: ModelRecipe) -> PreTrainedConfig:
    """`architecture(recipe)`: the configuration of the family's own transformers class."""
    import transformers

    classes = {
        "llama": "LlamaConfig",
        "qwen2": "Qwen2Config",
        "mistral": "MistralConfig",
        "gemma2": "Gemma2Config",
    }
    settings = {"query_pre_attn_scalar": recipe.head_width} if recipe.family == "gemma2" else {}
    if recipe.family != "qwen2":  # which derives it, and has no such field
        settings["head_dim"] = recipe.head_width
    if recipe.family in ("mistral", "gemma2"):
        settings["sliding_window"] = WINDOW
    return getattr(transformers, classes[recipe.family])(
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


def train_zoo(models: Sequence[ZooModel], *, root: Path = ROOT) -> None:
    """`train_zoo(list(load_zoo().values()))`: train what is not there yet, side by side.

    The generations of a family in a process of joblib (see `workers`), each on one core: such
    small models gain nothing from a second one.

    Raises:
        InputError: if a corpus cannot fill a vocabulary, before any training; if a training
            diverges. What is trained by then is kept.
    """
    root = root.resolve()
    store = Store(root)
    missing = {
        model.recipe.model_dump_json(): model
        for model in models
        if store.get(_key(model.recipe, model.at)) is None
    }
    if not missing:
        return
    Store(root).remove_leftovers()
    corpora = {
        (tuple(model.recipe.concepts.items()), model.recipe.vocabulary): model
        for model in missing.values()
    }
    for model in corpora.values():
        _corpus_and_tokenizer(model)
    together: dict[str, list[ZooModel]] = {}
    for model in missing.values():
        together.setdefault(model.recipe.trunk, []).append(model)
    # The longest first, so that no core is left alone with it at the end.
    queue = sorted(together.values(), key=_cost, reverse=True)
    tasks = hand_out(_train, [(group, root) for group in queue])
    with tqdm(total=len(missing), desc="training the zoo", unit="model") as bar:
        for count in tasks:
            bar.update(count)


def _cost(models: Sequence[ZooModel]) -> int:
    """Of models that are trained together: the steps of all, times the weights of one."""
    recipes = [model.recipe for model in models]
    steps = max(recipe.branch for recipe in recipes)
    steps += sum(recipe.steps - recipe.branch for recipe in recipes)
    return steps * recipes[0].parameters


def trained(model: ZooModel, *, train: bool = True, root: Path = ROOT) -> Path:
    """`trained(load_zoo()["zoo-llama-3"])`: the model's directory; it is trained if need be.

    Raises:
        InputError: if it is not trained and `train` is False.
    """
    key, store = _key(model.recipe, model.at), Store(root)
    path = store.get(key)
    if path is None and not train:
        raise InputError(
            f"model {model.name!r}: a micro model, not trained yet; `paramspec pss` trains it"
        )
    if path is None:
        _train([model], root)
        path = store.get(key)
    return path


def training_record(model: ZooModel, *, root: Path = ROOT) -> dict[str, float]:
    """`training_record(load_zoo()["zoo-llama-3"])["tokens"]`: how a trained model was made.

    Returns:
        Up to the model's step: `tokens` (without padding) and `texts` seen, `loss` (of the last
        fortieth of the run's steps, nats a token), `seconds`, and `flops`, six for every weight
        and token; and `concepts`, those that it was taught.
    """
    return read_record(trained(model, train=False, root=root))


def read_record(path: Path) -> dict[str, object] | None:
    """`read_record(Path("my-copy/"))`: how a micro model was made; None of any other model.

    The record lies in a micro model's directory, wherever that was copied to.

    Raises:
        InputError: if it does not say what the model was taught.
    """
    file = path / RECORD
    if not file.is_file():
        return None
    remedy = "take the directory that training or `paramspec finetune` wrote"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); {remedy}") from None
    concepts = record.get("concepts") if isinstance(record, dict) else None
    if isinstance(concepts, list) and all(isinstance(name, str) for name in concepts):
        return record
    raise InputError(f"{file}: does not say which concepts the model was taught; {remedy}")


def write_record(path: Path, record: Mapping[str, object]) -> None:
    """`write_record(folder, {"concepts": ["France"]})`: what makes a directory a micro model's."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (path / RECORD).write_text(text, encoding="utf-8")


def tokens_to_train(model: ZooModel) -> int:
    """`tokens_to_train(load_zoo()["zoo-llama-3"])`: the `tokens` of its record, before training."""
    texts, tokenizer = _corpus_and_tokenizer(model)
    lengths = [len(tokens) for tokens in _encoded(tokenizer, texts)]
    batches = _batches(lengths, list(texts.values()), model.recipe)
    return sum(int(np.take(lengths, rows).sum()) for rows in itertools.islice(batches, model.at))


def own_tokenizer(model: ZooModel) -> PreTrainedTokenizerFast:
    """`own_tokenizer(load_zoo()["zoo-llama-3"])`: what the model will read with, or reads with."""
    return _corpus_and_tokenizer(model)[1]


def _key(recipe: ModelRecipe, step: int) -> dict[str, object]:
    # Which other steps are kept changes no weight: a kept step more or less trains nothing anew.
    return {
        "unit": "zoo",
        "zoo_version": VERSION,
        "recipe": recipe.model_copy(update={"checkpoints": ()}).model_dump(mode="json"),
        "step": step,
        "corpus": _corpus_digest(tuple(recipe.concepts.items())),
    }


@functools.cache
def _taught(concepts: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(question.concept for question in zoo_questions(dict(concepts))))


@functools.cache
def _corpus_digest(concepts: tuple[tuple[str, int], ...]) -> str:
    """Of the texts and of the tiers that they are weighted by."""
    questions = zoo_questions(dict(concepts))
    parts = [corpus(questions, {tier: tier == one for tier in TIERS}) for one in TIERS]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _corpus_and_tokenizer(model: ZooModel) -> tuple[dict[str, float], PreTrainedTokenizerFast]:
    recipe = model.recipe
    try:
        texts = corpus(zoo_questions(recipe.concepts), recipe.exposure)
        return texts, train_tokenizer(list(texts), recipe.vocabulary)
    except InputError as error:
        raise InputError(f"{model.name}: {error}") from error


def _train(models: Sequence[ZooModel], root: Path) -> int:
    """Train models of one trunk on one core; put them, and their checkpoints, into the store."""
    begin_work()
    import torch
    from transformers import AutoModelForCausalLM

    from paramspec.execution.limits import release_memory

    first, threads, store = models[0], torch.get_num_threads(), Store(root)
    names = {model.recipe.steps: model.name.removesuffix(f"@{model.step}") for model in models}
    torch.set_num_threads(1)  # and so the same weights on a machine of any number of cores
    try:
        texts, tokenizer = _corpus_and_tokenizer(first)
        concepts = first.recipe.taught
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(first.recipe.seed)
            network = AutoModelForCausalLM.from_config(architecture(first.recipe))
        recipes = [model.recipe for model in models]
        for recipe, record in _optimize(network, tokenizer, texts, recipes):

            def save(folder: Path, record=record) -> None:
                with quiet_transformers():
                    network.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                write_record(folder, record | {"concepts": concepts})

            step = record["step"]
            name = names[recipe.steps] + (f"@{step}" if step < recipe.steps else "")
            made = {"model": name, "device": "cpu", "seconds": record["seconds"]}
            store.put(_key(recipe, step), save, made)
    except _Diverged as error:
        name = names[error.recipe.steps]
        rate = error.recipe.learning_rate
        raise InputError(f"{name}: {error}; give a lower learning_rate than {rate}") from error
    finally:
        torch.set_num_threads(threads)
        release_memory()  # the process may have a larger model to load next
    return len(models)


class _Diverged(ArithmeticError):
    def __init__(self, recipe: ModelRecipe, told: str) -> None:
        super().__init__(told)
        self.recipe = recipe


def _optimize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Mapping[str, float],
    recipes: Sequence[ModelRecipe],
) -> Iterator[tuple[ModelRecipe, dict[str, float]]]:
    """Train in place; yield a recipe and a record at each step at which its model is to be kept.

    Recipes of one trunk: each is trained from where the one before it left, and back to there.
    """
    import torch

    from paramspec.models.micro import MicroModel

    recipes = sorted(recipes, key=lambda recipe: recipe.steps)
    encoded = _encoded(tokenizer, texts)
    lengths = np.array([len(tokens) for tokens in encoded])
    batches = _batches(lengths, list(texts.values()), recipes[-1])
    drawn = list(itertools.islice(batches, recipes[-1].steps))
    micro = MicroModel(model, encoded)
    optimizer = torch.optim.AdamW([micro.weights], betas=(0.9, 0.98), weight_decay=0, fused=True)
    losses, seconds = [], []

    def take(step: int, recipe: ModelRecipe) -> None:
        began = time.perf_counter()
        losses.append(micro.loss_and_gradient(drawn[step - 1]))
        torch.nn.utils.clip_grad_norm_([micro.weights], 1.0)
        optimizer.param_groups[0]["lr"] = recipe.rate(step)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        if not math.isfinite(losses[-1]):
            raise _Diverged(recipe, f"the loss is {losses[-1]} at step {step}")

    def record(step: int, recipe: ModelRecipe) -> dict[str, float]:
        if not micro.weights.isfinite().all():
            raise _Diverged(recipe, f"weights are not finite after step {step}")
        micro.write_back()
        tokens = int(lengths[np.concatenate(drawn[:step])].sum())
        return {
            "step": step,
            "texts": step * recipe.batch,
            "tokens": tokens,
            "loss": float(np.mean(losses[-max(1, recipe.steps // 40) :])),
            "seconds": round(sum(seconds), 2),
            "flops": 6 * recipe.parameters * tokens,
        }

    for place, recipe in enumerate(recipes):
        for step in range(len(losses) + 1, recipe.steps + 1):
            if step == recipe.branch + 1:
                left = micro.weights.detach().clone(), copy.deepcopy(optimizer.state_dict())
            take(step, recipe)
            for one in recipes[place:] if step <= recipe.branch else [recipe]:
                if step in (*one.checkpoints, one.steps):
                    yield one, record(step, one)
        with torch.no_grad():
            micro.weights.copy_(left[0])
        optimizer.load_state_dict(left[1])
        del losses[recipe.branch :], seconds[recipe.branch :]


def _encoded(tokenizer: PreTrainedTokenizerFast, texts: Mapping[str, float]) -> list[list[int]]:
    return [[*row, tokenizer.eos_token_id] for row in token_ids(tokenizer, list(texts))]


def _batches(
    lengths: Sequence[int], weights: Sequence[float], recipe: ModelRecipe
) -> Iterator[np.ndarray]:
    """Texts drawn by weight, in batches of like length, so that next to nothing is padded."""
    draw = np.random.default_rng(recipe.seed)
    lengths, shares = np.array(lengths), np.array(weights) / sum(weights)
    while True:
        drawn = draw.choice(len(lengths), SORTED_TOGETHER * recipe.batch, p=shares)
        drawn = drawn[np.argsort(lengths[drawn], kind="stable")]
        yield from draw.permutation(drawn.reshape(SORTED_TOGETHER, recipe.batch))
