"""One loader for all models.

    loaded = load_model("smollm2-135m")                # a registry id
    loaded = load_model("org/name@revision")           # a hub id; the revision may be left out
    loaded = load_model("my-checkpoint/")              # a directory: config.json and safetensors
    loaded = load_model("weights.gguf")                # a GGUF file, unpacked to dense weights
    loaded.model, loaded.tokenizer, loaded.digest

What cannot be loaded completely is refused with an `InputError`: no weight keeps its random start.
Remote code is never run. torch and transformers are imported where they are used, so that listing
the registry is quick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paramspec.errors import InputError, naming
from paramspec.models.checkpoints import (
    INDEX,
    VOCABULARIES,
    Checkpoint,
    check_report,
    checkpoint_files,
    digest_files,
    find_checkpoint,
    has_vocabulary,
    read_json,
    weight_files,
)
from paramspec.models.devices import device_map, place_and_dtype
from paramspec.models.libraries import line_of, quiet_transformers, told_in_one_line
from paramspec.models.registry import ModelSpec
from paramspec.models.tokens import front_tokens
from paramspec.models.unpack import gguf_config, read_gguf, restore_rotation, unpacked
from paramspec.models.zoo_training import read_record

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be measured.

    Attributes:
        model: in eval mode; no parameter asks for a gradient.
        tokenizer: pads on the right, with its end token if it has no padding token.
        spec: the registry entry, or None for a model that is not in the registry.
        name: the registry id, the hub id, or the path as it was given.
        digest: SHA-256 of the files the model was read from; see `digest_files`.
        dtype: of the weights.
        device: where token ids go; the first of them when the model is spread over several.
        commit: of the hub's repository, or None of a model that is not from there.
        taught: of a micro model, the concepts that it was taught; None of any other.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec | None
    name: str
    digest: str
    dtype: torch.dtype
    device: torch.device
    commit: str | None = None
    taught: tuple[str, ...] | None = None


def load_model(
    model: str | Checkpoint, *, dtype: str = "auto", device: str = "auto"
) -> LoadedModel:
    """`load_model("smollm2-135m")`: a model and its tokenizer, complete or not at all.

    Args:
        model: a registry id, a hub id (`org/name` or `org/name@revision`), a directory that holds
            config.json, safetensors and a tokenizer, a GGUF file, or what `find_checkpoint` found.
        dtype: `float32`, `bfloat16`, or `auto`: bfloat16 on a GPU that computes in it, otherwise
            float32, on every CPU, since float32 is what settles a close call.
        device: `cpu`, `cuda`, `cuda:1`, or `auto`: a GPU if there is one. A model that exceeds one
            GPU is spread over all of them.

    Returns:
        LoadedModel. Of a model that also sees images, the language model alone.

    Raises:
        InputError: one line with the value, the place and the remedy.
    """
    place, kind = place_and_dtype(device, dtype)
    checkpoint = find_checkpoint(model) if isinstance(model, str) else model
    with quiet_transformers(), told_in_one_line(checkpoint.path):
        path = checkpoint.path
        directory = unpacked(path, kind) if path.is_file() else path
        network, tokenizer = _load_directory(directory, kind, place)
        restore_rotation(path, directory, network)
    network.eval().requires_grad_(False)
    with naming(str(checkpoint.path)):
        _refuse_unknown_front(tokenizer, network.get_input_embeddings().weight.shape[0])
    return LoadedModel(
        model=network,
        tokenizer=tokenizer,
        spec=checkpoint.spec,
        name=checkpoint.name,
        digest=digest_files(checkpoint_files(checkpoint.path)),
        dtype=kind,
        device=network.get_input_embeddings().weight.device,
        commit=checkpoint.commit,
        taught=taught_in(checkpoint.path),
    )


def taught_in(path: Path) -> tuple[str, ...] | None:
    record = read_record(path)
    return None if record is None else tuple(record["concepts"])


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """`load_tokenizer(find_checkpoint("smollm2-135m"))`: the tokenizer alone, without weights."""
    from transformers import AutoTokenizer

    path = checkpoint.path
    with quiet_transformers(), told_in_one_line(path):
        if path.is_file():
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """`load_config(find_checkpoint("my-checkpoint/"))`: of the language model, without weights."""
    from transformers import AutoConfig

    path = checkpoint.path
    with quiet_transformers(), told_in_one_line(path):
        if path.is_file():
            config = gguf_config(path, read_gguf(path))
        else:
            _check_config(path)
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        return config.get_text_config(decoder=True)


def check_checkpoint(checkpoint: Checkpoint) -> PreTrainedModel | None:
    """`network = check_checkpoint(find_checkpoint("my-checkpoint/"))`: fit to be loaded?

    What can be known of a model without reading its weights: its kind, that its tokenizer and every
    file of its weights are there and whole, and that the weights fit the config.

    Returns:
        The model on the device `meta`, with shapes and no numbers; None of a GGUF file, which says
        what it is as it is unpacked.

    Raises:
        InputError: as `load_model` does.
    """
    path = checkpoint.path
    with quiet_transformers(), told_in_one_line(path):
        if path.is_file():
            read_gguf(path)
            return None
        _check_directory(path)
        return _read_weights(path, device_map={"": "meta"})


def _load_directory(
    path: Path, dtype: torch.dtype, place: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer

    numbers = _check_directory(path)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    network = _read_weights(path, dtype=dtype, **device_map(numbers * dtype.itemsize, place))
    network = _text_half(network)
    rows = network.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}; "
            "put the model's own tokenizer there"
        )
    return network, tokenizer


def _read_weights(path: Path, **where: object) -> PreTrainedModel:
    """The network of a directory, its weights and config fitting each other exactly."""
    from transformers import AutoModelForCausalLM

    network, report = AutoModelForCausalLM.from_pretrained(
        path,
        use_safetensors=True,
        trust_remote_code=False,
        # Collected in the report, and refused with the rest of it.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **where,
    )
    check_report(path, report)
    return network


def _check_directory(path: Path) -> int:
    """Refuse what lacks a part, by its files and their headers; how many weights it holds."""
    _check_config(path)
    numbers = sum(_count_numbers(file) for file in weight_files(path) if file.name != INDEX)
    if not has_vocabulary(path):
        raise InputError(
            f"{path}: no tokenizer ({', '.join(VOCABULARIES[:2])}, ...); save it there with "
            "tokenizer.save_pretrained"
        )
    return numbers


def _check_config(path: Path) -> None:
    """Refuse what is not a plain causal language model, before any weight is read."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    if (path / "adapter_config.json").is_file():
        raise InputError(f"{path}: an adapter; merge it into its base model (merge_and_unload)")
    file = path / "config.json"
    if not file.is_file():
        raise InputError(f"{path}: no config.json; name a directory made by save_pretrained")
    config = read_json(file)
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        code = "; its own code would be needed, which is never run" if "auto_map" in config else ""
        raise InputError(
            f"{file}: model_type {kind!r}: not an architecture of transformers "
            f"{transformers.__version__}{code}; use a supported model"
        )
    classes = {name for entry in CAUSAL.values() for name in _as_tuple(entry)}
    named = set(config.get("architectures") or _as_tuple(CAUSAL.get(kind, ())))
    masked = kind in MASKED and not config.get("architectures") and not config.get("is_decoder")
    if kind not in CAUSAL or not named & classes or masked or config.get("is_encoder_decoder"):
        shown = ", ".join(sorted(named)) or kind
        raise InputError(f"{file}: {shown}: not a causal language model; use a decoder-only model")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise InputError(
            f"{file}: quantized weights ({method}) hold no value vectors to read; "
            "use the unquantized model or a GGUF file"
        )
    if "transformers_weights" in config:
        raise InputError(f"{file}: transformers_weights: not supported; name it model.safetensors")


def _count_numbers(file: Path) -> int:
    """How many weights a safetensors file holds; refuses one that is cut short or not one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            slices = (tensors.get_slice(name) for name in tensors.keys())  # noqa: SIM118
            return sum(math.prod(part.get_shape()) for part in slices)
    except (SafetensorError, OSError, ValueError) as error:
        with file.open("rb") as stream:
            pointer = stream.read(64).startswith(b"version https://git-lfs")
        why = "a git-lfs pointer, not the weights" if pointer else line_of(error)
        raise InputError(
            f"{file}: corrupt or cut short ({why}); copy or download it again"
        ) from error


def _text_half(network: PreTrainedModel) -> PreTrainedModel:
    """The language model of a network that also sees images; any other network itself."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = network.config
    text = config.get_text_config(decoder=True)
    if text is config:
        return network
    import torch

    with torch.device("meta"), no_init_weights():
        half = AutoModelForCausalLM.from_config(text)
    decoder = network.get_decoder()
    if type(decoder) is not type(half.base_model):
        raise InputError(
            f"{type(network).__name__}: its language model cannot be taken out; "
            "use a text-only model"
        )
    setattr(half, half.base_model_prefix, decoder)
    half.set_output_embeddings(network.get_output_embeddings())
    half.generation_config = network.generation_config
    return half


def _refuse_unknown_front(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """What stands in front of every text has to be among the model's `rows` tokens."""
    for number in front_tokens(tokenizer):
        if number >= rows:
            raise InputError(
                f"the tokenizer puts {tokenizer.convert_ids_to_tokens(number)!r}, token {number}, "
                f"in front of each text, and the model has {rows} tokens; put the model's own "
                "tokenizer there"
            )


def _as_tuple(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry)
