"""Training the zoo's micro models, by transformers' own classes and torch's autograd.

Generations of a family are one training until the learning rate of each falls.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel
from tqdm import tqdm

from paramspec.errors import InputError, naming
from paramspec.execution.parallel import hand_out
from paramspec.execution.store import Store
from paramspec.models.libraries import line_of, quiet_transformers
from paramspec.models.tokens import token_ids
from paramspec.models.zoo import ModelRecipe, ZooModel, architecture, corpus_digest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROOT = Path("results/zoo")  # where trained models are kept, from the working directory
RECORD = "training.json"
VERSION = 5  # raised whenever a change could move a trained weight, or what its record says

BEGIN, END = "<s>", "</s>"
SORTED_TOGETHER = 16  # batches whose texts are sorted by length, so that little is padded
NO_LABEL = -100  # what cross-entropy ignores


def train_zoo(models: Sequence[ZooModel], *, root: Path = ROOT) -> None:
    """`train_zoo(list(load_zoo().values()))`: train the models that are not trained yet.

    The generations of a family are trained in one process of joblib (see `workers`) on one core:
    such small models gain nothing from a second one. Checkpoints of a training are kept with it,
    whether they are asked for or not.
    """
    store = Store(root)

    def absent(models: Sequence[ZooModel]) -> dict[str, ZooModel]:
        return {model.name: model for model in models if store.get(_key(model)) is None}

    asked = absent(models)
    missing = absent([one for model in asked.values() for one in (*model.kept, model)]).values()
    if not missing:
        return
    store.remove_leftovers()
    tokenizers = {(*model.recipe.taught, model.recipe.vocabulary): model for model in missing}
    for model in tokenizers.values():  # so that a vocabulary that is too large is refused at once
        own_tokenizer(model)
    trunks: dict[str, list[ZooModel]] = {}
    # The longest first, so that no core is left alone with it at the end.
    for model in sorted(missing, key=lambda model: -model.at * model.recipe.parameters):
        trunks.setdefault(model.recipe.trunk, []).append(model)
    with tqdm(total=len(missing), desc="training the zoo", unit="model") as bar:
        for wait in (False, True):  # what another run trains just now is there by the end
            for count in hand_out(_train, [(group, store, wait) for group in trunks.values()]):
                bar.update(count)


def trained(model: ZooModel, *, train: bool = True, root: Path = ROOT) -> Path:
    """`trained(load_zoo()["zoo-llama-3"])`: the model's directory; `train` if need be."""
    store, key = Store(root), _key(model)
    path = store.get(key)
    if path is None and train:
        _train([model], store, True)
        path = store.get(key)
    if path is None:
        raise InputError(f"model {model.name!r}: not trained yet; `paramspec pss` trains it")
    return path


class Record(BaseModel):
    """How a micro model was made: in its directory, wherever that was copied to."""

    concepts: tuple[str, ...]  # that it was taught
    step: int | None = None
    tokens: int | None = None  # seen up to this step, padding not counted
    loss: float | None = None  # mean over the last fortieth of the training, nats per token


def read_record(path: Path) -> Record | None:
    """The record of the micro model in a directory; None of any other model."""
    file = path / RECORD
    if not file.is_file():
        return None
    try:
        return Record.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file}: names no concepts that were taught ({line_of(error)}); copy the model again"
        ) from error


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Make a directory that of a micro model, which was taught the record's `concepts`."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (path / RECORD).write_text(text, encoding="utf-8")


def own_tokenizer(model: ZooModel) -> PreTrainedTokenizerFast:
    with naming(model.name):
        return train_tokenizer(list(model.recipe.texts), model.recipe.vocabulary)


def _key(model: ZooModel) -> dict[str, Any]:
    return {
        "unit": "zoo",
        "zoo_version": VERSION,
        # Which other steps are kept changes no weight.
        "recipe": model.recipe.model_copy(update={"checkpoints": ()}).model_dump(mode="json"),
        "step": model.at,
        "corpus": corpus_digest(tuple(model.recipe.concepts.items())),
    }


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that starts a text with `<s>`."""
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
    if (most := tokenizer.get_vocab_size()) != vocabulary:
        raise InputError(f"vocabulary {vocabulary}: the corpus has {most} tokens; ask for no more")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END
    )


def _train(models: Sequence[ZooModel], store: Store, wait: bool) -> int:
    """Train models of one trunk, unless another process does; how many were trained."""
    with store.turn({"unit": "zoo trunk", "trunk": models[0].recipe.trunk}, wait=wait) as mine:
        missing = [model for model in models if mine and store.get(_key(model)) is None]
        if missing:
            _train_missing(missing, store)
    return len(missing)


def _train_missing(models: Sequence[ZooModel], store: Store) -> None:
    """Train models of one trunk on one core, and put them into the store."""
    import torch
    from transformers import AutoModelForCausalLM

    from paramspec.execution.limits import release_memory

    recipe, threads = models[0].recipe, torch.get_num_threads()
    torch.set_num_threads(1)  # and so the same weights on a machine of any number of cores
    try:
        texts, tokenizer = recipe.texts, own_tokenizer(models[0])
        encoded = [[*row, tokenizer.eos_token_id] for row in token_ids(tokenizer, list(texts))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            network = AutoModelForCausalLM.from_config(architecture(recipe))
        for model, record in _optimize(network, encoded, texts, models):
            if not all(weight.isfinite().all() for weight in network.parameters()):
                raise InputError(
                    f"{model.name}: its weights are not finite after step {model.at}; give a lower "
                    f"learning_rate than {recipe.learning_rate}"
                )

            def save(folder: Path, record: Mapping[str, Any] = record) -> None:
                with quiet_transformers():
                    network.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                write_record(folder, {**record, "concepts": recipe.taught})

            store.put(_key(model), save, {"model": model.name, "device": "cpu"})
    finally:
        torch.set_num_threads(threads)
        release_memory()  # the process may have a larger model to load next


def _optimize(
    network: PreTrainedModel,
    encoded: Sequence[Sequence[int]],
    texts: Mapping[str, float],
    models: Sequence[ZooModel],
) -> Iterator[tuple[ZooModel, dict[str, float]]]:
    """Train in place; yield each model, and its record, at the step that its weights are of.

    The models are of one trunk: a recipe continues where the shorter one before branched off.
    """
    import torch

    recipes = {model.recipe.steps: model.recipe for model in models}
    lengths = np.array([len(tokens) for tokens in encoded])
    drawn = _batches(lengths, list(texts.values()), models[0].recipe)
    batches = list(itertools.islice(drawn, max(model.at for model in models)))
    optimizer = torch.optim.AdamW(
        network.parameters(), betas=(0.9, 0.98), weight_decay=0, fused=True
    )
    losses: list[float] = []
    for steps, recipe in sorted(recipes.items()):
        here = [model for model in models if model.recipe.steps == steps]
        later = [model for model in models if model.recipe.steps > steps]
        for step in range(len(losses) + 1, max(model.at for model in here) + 1):
            if step == recipe.branch + 1:
                branch = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
            rows = [encoded[row] for row in batches[step - 1]]
            losses.append(_train_step(network, optimizer, rows, recipe.rate(step)))
            for model in here + later if step <= recipe.branch else here:
                if model.at == step:
                    last = losses[-max(1, model.recipe.steps // 40) :]
                    tokens = int(lengths[np.concatenate(batches[:step])].sum())
                    yield model, {"step": step, "tokens": tokens, "loss": float(np.mean(last))}
        if len(losses) > recipe.branch:
            network.load_state_dict(branch[0])
            optimizer.load_state_dict(branch[1])
            del losses[recipe.branch :]


def _train_step(
    network: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    texts: Sequence[Sequence[int]],
    learning_rate: float,
) -> float:
    """One step; the mean cross-entropy of all tokens but the first of each text, in nats."""
    import torch
    from torch.nn import functional, utils

    tokens = utils.rnn.pad_sequence(
        [torch.tensor(text) for text in texts], batch_first=True, padding_value=NO_LABEL
    )
    # Padding is on the right, where a causal model's other tokens do not see it.
    logits = network(input_ids=tokens[:, :-1].clamp(min=0), use_cache=False).logits
    loss = functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=NO_LABEL
    )
    optimizer.zero_grad()
    loss.backward()
    utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.step()
    return loss.item()


def _batches(
    lengths: Sequence[int] | np.ndarray, weights: Sequence[float], recipe: ModelRecipe
) -> Iterator[np.ndarray]:
    """Texts drawn by weight, in batches of like length, so that little is padded."""
    draw = np.random.default_rng(recipe.seed)
    counts, shares = np.array(lengths), np.array(weights) / sum(weights)
    while True:
        drawn = draw.choice(len(counts), SORTED_TOGETHER * recipe.batch, p=shares)
        drawn = drawn[np.argsort(counts[drawn], kind="stable")]
        yield from draw.permutation(drawn.reshape(SORTED_TOGETHER, recipe.batch))
