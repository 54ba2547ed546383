"""One loader for all models: every weight comes from the checkpoint, and remote code is never run.

loaded = load_model("smollm2-135m")
loaded.model, loaded.tokenizer, loaded.digest
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoHfQuantizer

from paramspec.errors import InputError
from paramspec.execution.limits import require_memory
from paramspec.models import checkpoints
from paramspec.models.checkpoints import Checkpoint
from paramspec.models.libraries import line_of, quiet_transformers, told_in_one_line
from paramspec.models.registry import empty_model
from paramspec.models.tokens import front_tokens
from paramspec.models.unpack import (
    gguf_config,
    read_weights,
    restore_rotation,
    unpacked,
    unpacked_tokenizer,
)
from paramspec.models.zoo_training import read_record

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be measured.

    Attributes:
        model: in eval mode; no parameter asks for a gradient.
        tokenizer: of the model's own directory or file.
        name: the registry id, the hub id, or the path as it was given.
        digest: SHA-256 of the files the model was read from; see `digest_of`.
        dtype: of the weights.
        device: where token ids go; the first of them when the model is spread over several.
        commit: of the hub's repository, or None of a model that is not from there.
        taught: of a micro model, the concepts that it was taught; None of any other.
        quantized: the method by which the weights are quantized (`compressed-tensors`, `gptq`,
            `bitsandbytes`, ...), or None of plain weights.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    digest: str
    dtype: torch.dtype
    device: torch.device
    commit: str | None = None
    taught: tuple[str, ...] | None = None
    quantized: str | None = None


def load_model(
    model: str | Checkpoint, *, dtype: str = "auto", device: str = "auto"
) -> LoadedModel:
    """`load_model("smollm2-135m")`: a model and its tokenizer, complete or not at all.

    >>> loaded = load_model("my-checkpoint/", dtype="float32")
    >>> loaded.name, loaded.dtype, type(loaded.model).__name__
    ('my-checkpoint', torch.float32, 'LlamaForCausalLM')

    Args:
        model: a registry id, a hub id (`org/name`, `org/name@revision` or `org/name:file.gguf`), a
            directory that holds config.json, safetensors and a tokenizer, or an adapter of PEFT, a
            GGUF file, or what `find_checkpoint` found.
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
    # float32 is float32: not TF32's ten bits, whatever the environment says.
    torch.set_float32_matmul_precision("highest")
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    checkpoint = checkpoints.find_checkpoint(model) if isinstance(model, str) else model
    path = checkpoint.path
    with quiet_transformers(), told_in_one_line(path):
        directory = unpacked(path, kind) if path.is_file() else path
        base = checkpoints.base_of(directory)
        config = _directory_config(base or directory)
        quantized, needed = _quantization(config), _size_of(config, directory, kind)
        tokenizer = load_tokenizer(directory)
        network = _language_model(base or directory, dtype=kind, **device_map(needed, place))
        network = _with_adapter(network, directory) if base else network
        restore_rotation(network)
        embedding: Any = network.get_input_embeddings().weight
        highest = max([tokenizer.vocab_size - 1, *front_tokens(tokenizer)])
        if highest >= len(embedding):
            raise InputError(
                f"{path}: token {highest}, but {len(embedding)} in the model; use its own tokenizer"
            )
    network.eval().requires_grad_(False)
    record = read_record(path)
    return LoadedModel(
        model=network,
        tokenizer=tokenizer,
        name=checkpoint.name,
        digest=checkpoints.digest_of(path),
        dtype=kind,
        device=embedding.device,
        commit=checkpoint.commit,
        taught=record.concepts if record else None,
        quantized=quantized,
    )


def place_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """`place_and_dtype("auto", "auto")`: what `load_model` would take on this machine."""
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if usable else "cpu"
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: unknown; use {', '.join(DTYPES)}")
    known = ["cpu", *(["cuda"] if usable else []), *(f"cuda:{index}" for index in range(usable))]
    if device not in known:
        raise InputError(f"device {device!r}: not on this machine; use auto, {', '.join(known)}")
    place = torch.device(device)
    if place.type == "cpu":
        return place, torch.bfloat16 if dtype == "bfloat16" else torch.float32
    _try_out(place)
    capable = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not capable:
        raise InputError(f"dtype 'bfloat16': {place} does not compute in it; use float32")
    return place, torch.bfloat16 if capable and dtype != "float32" else torch.float32


def _try_out(place: torch.device) -> None:
    try:
        torch.zeros(1, device=place).sum().item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device '{place}': it is there and does not work ({line_of(error)}); mend its driver "
            "or this build of torch, free the GPU, or use device cpu"
        ) from error


def device_map(needed: int, place: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained` that say where `needed` bytes of weights go.

    Over all GPUs where `place` names none and one has no room; a tenth is left for forward passes.
    """
    if place.type == "cpu":
        require_memory(needed)
        return {}
    torch.cuda.empty_cache()  # the driver counts memory that earlier models left as used
    gpus = range(torch.cuda.device_count())
    free = {index: int(0.9 * torch.cuda.mem_get_info(index)[0]) for index in gpus}
    single = torch.cuda.current_device() if place.index is None else place.index
    if place.index is not None or needed <= free[single]:
        return {"device_map": {"": single}}
    return {"device_map": "auto", "max_memory": free}


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or a GGUF file, without its weights."""
    with quiet_transformers(), told_in_one_line(path):
        path = unpacked_tokenizer(path) if path.is_file() else path
        if not any((path / name).is_file() for name in checkpoints.VOCABULARIES):
            if base := checkpoints.base_of(path):
                return load_tokenizer(base)
            raise InputError(f"{path}: no tokenizer; save it there with tokenizer.save_pretrained")
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def check_checkpoint(path: Path) -> PreTrainedModel:
    """A model's shapes, on the device `meta`; without reading weights, what `load_model` refuses of
    its config, its tokenizer and the headers of its files is refused here.
    """
    with quiet_transformers(), told_in_one_line(path):
        if path.is_file():
            return empty_model(gguf_config(path))
        load_tokenizer(path)
        path = checkpoints.base_of(path) or path
        if _quantization(config := _directory_config(path)):
            checkpoints.checkpoint_files(path)
            quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
            quantizer.validate_environment(device_map={"": "meta"})  # what it needs is installed
            return empty_model(config)
        return _language_model(path, device_map={"": "meta"})


def _directory_config(path: Path) -> PreTrainedConfig:
    """The config of a directory, if its weights are those of a plain model."""
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    if getattr(config, "transformers_weights", None):
        raise InputError(
            f"{path}: transformers_weights in config.json; use plain weights, or a GGUF file"
        )
    return config


def _quantization(config: PreTrainedConfig) -> str | None:
    """The method by which a config says that weights are quantized."""
    found: Any = getattr(config, "quantization_config", None)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def _size_of(config: PreTrainedConfig, path: Path, dtype: torch.dtype) -> int:
    """The bytes of a model's weights as they are loaded: if quantized, as its files hold them."""
    if _quantization(config):
        return sum(file.stat().st_size for file in checkpoints.checkpoint_files(path).values())
    return empty_model(config).num_parameters() * dtype.itemsize


def _with_adapter(network: PreTrainedModel, path: Path) -> PreTrainedModel:
    """The model with an adapter merged into its weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(f"{path}: an adapter; `pip install peft`, which merges it") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        return PeftModel.from_pretrained(network, path).merge_and_unload()


def _language_model(path: Path, **where: Any) -> PreTrainedModel:
    """The network of a directory; of one that also sees images, the language model alone."""
    checkpoints.checkpoint_files(path)  # every shard is there
    architectures = _directory_config(path).architectures or ()
    network = read_weights(path, **where)
    if type(network).__name__ not in architectures:
        raise InputError(
            f"{path}: {list(architectures)}, not a causal language model; use a decoder-only model"
        )
    if {"cpu", "disk"} & set(getattr(network, "hf_device_map", {}).values()):
        # There, weights could not be read as value vectors.
        raise InputError(f"{path}: the weights exceed the GPUs' free memory; use more, or bfloat16")
    text = network.config.get_text_config(decoder=True)
    if text is network.config:
        return network
    half, decoder = empty_model(text), network.get_decoder()
    if type(decoder) is not type(half.base_model):
        raise InputError(f"{path}: its language model cannot be taken out; use a text-only model")
    setattr(half, half.base_model_prefix, decoder)
    half.set_output_embeddings(network.get_output_embeddings())
    half.generation_config = network.generation_config
    return half
