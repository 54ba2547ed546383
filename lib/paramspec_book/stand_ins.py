"""Stand-ins for models that are too large for this machine, so that a profile can be rehearsed.

A stand-in is of its model's own class and has its name, its pattern of heads and its tied weights,
but toy widths, random weights and the vocabulary of the zoo. Stand-ins lie in a folder as the hub's
cache lays models out, so that a run finds them where it finds downloaded ones.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from paramspec.models.libraries import quiet_transformers
from paramspec.models.registry import HubSource, load_registry
from paramspec.models.zoo import load_zoo
from paramspec.models.zoo_training import own_tokenizer
from paramspec_book.parameters import load_profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VERSION = 1  # raised whenever a stand-in would become another
WIDTH = 500  # value vectors of a layer: the smallest ratio of the paper profile is one of them
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": WIDTH,
    "num_attention_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "dtype": "float32",
}


def stand_ins(profile: str, root: Path) -> dict[str, str]:
    """Return the variables by which a run of a profile finds its stand-ins, which are made if need
    be; none of a profile without.
    """
    found = load_profile(profile, root)
    if not found.stand_ins:
        return {}
    cache = (root / "results" / f"stand-ins-{VERSION}").absolute()
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache.with_suffix(".lock")):  # of two chapters at once
        if not cache.exists():
            judge = found.chapters.get("9-hallucination", {}).get("judge", "")
            make_stand_ins(scratch := cache.with_suffix(".unfinished"), judge)
            scratch.rename(cache)
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def make_stand_ins(cache: Path, judge: str) -> None:
    """Make one for each model of the registry that is on the hub, and for the judge of chapter 9,
    if that is on the hub, too.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    shutil.rmtree(cache, ignore_errors=True)
    tokenizer = own_tokenizer(next(iter(load_zoo().values())))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ends |= {"pad_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    for number, spec in enumerate(load_registry().values()):
        if isinstance(spec.source, HubSource):
            of = spec.config or {}
            grouped = of["num_key_value_heads"] < of["num_attention_heads"]
            kept = {k: of[k] for k in ("tie_word_embeddings", "sliding_window") if k in of}
            shape = SHAPE | kept | ends | {"num_key_value_heads": 1 if grouped else 2}
            torch.manual_seed(number)
            config = AutoConfig.for_model(spec.model_type, **shape)
            _save(AutoModelForCausalLM.from_config(config), tokenizer, cache, spec.source)
    if judge.count("/") == 1 and not Path(judge).exists():
        labels = {0: "entailment", 1: "neutral", 2: "contradiction"}
        named = {"id2label": labels, "label2id": {name: label for label, name in labels.items()}}
        config = AutoConfig.for_model("deberta-v2", **SHAPE | ends | named)
        network = AutoModelForSequenceClassification.from_config(config)
        _save(network, tokenizer, cache, HubSource(kind="hub", repo=judge))


def _save(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, cache: Path, source: HubSource
) -> None:
    repository = cache / f"models--{source.repo.replace('/', '--')}"
    commit = source.commit or hashlib.sha1(source.label.encode()).hexdigest()
    folder = repository / "snapshots" / commit
    with quiet_transformers():
        network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / source.revision).write_text(commit)
