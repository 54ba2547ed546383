"""GGUF files: unpacked once, to a directory of safetensors, which is loaded as any other.

transformers reads some of a file's keys into the config, and leaves the class's defaults for the
others, without a word. Here each key is read by transformers, or set here; or it agrees with the
config, says that something is not there, or moves no number; or the file is refused by its name.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from paramspec.errors import InputError, naming
from paramspec.execution.limits import require_memory
from paramspec.execution.store import Computed, Store
from paramspec.models.checkpoints import digest_of

UNPACKED = Path("results/gguf")  # where GGUF files are unpacked to, from the working directory
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")  # which transformers leaves out
# Shapes, which the weights are held against; how the file was made; texts longer than any here.
MOVES_NOTHING = {
    "context_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count_kv",
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "pooling_type",
}


def unpacked(path: Path, dtype: torch.dtype) -> Path:
    """`unpacked(file, torch.float32)`: the directory of its model, with weights of that dtype."""
    key = {"unit": "gguf", "unpacking_version": 2, "dtype": str(dtype), "file": digest_of(path)}
    return Store(UNPACKED).find(key, functools.partial(_unpack, path, dtype))


def _unpack(path: Path, dtype: torch.dtype) -> Computed:
    """Read a GGUF file on the CPU, if all that it says can be kept."""
    reader = gguf.GGUFReader(path)  # takes seconds
    config = gguf_config(path, reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = tensors.pop("rope_freqs.weight", None)
    if factors is not None:
        # Llama 3.1 and later: each rotary frequency is divided by a factor of its own, llama.cpp's
        # form of `rope_type: llama3`. transformers leaves it out.
        config.rope_factors = factors.data.tolist()
    held = sum(int(tensor.n_elements) for tensor in tensors.values())
    require_memory(held * dtype.itemsize)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no switch silences
        network = read_weights(
            path,
            gguf_file=path.name,
            config=config,
            # Since transformers 5 the weights stay packed unless this is asked for.
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=dtype,
        )
    taken = sum(part.numel() for part in network.parameters())
    if held != taken:
        # transformers drops tensors it has no place for, without a word.
        raise InputError(
            f"{path}: the model takes {taken} of its {held} weights; use the model's safetensors"
        )
    restore_rotation(network)  # refused here, if it is not understood
    tokenizer = _read_tokenizer(path)

    def write(folder: Path) -> None:
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return write, {}


def unpacked_tokenizer(path: Path) -> Path:
    """`unpacked_tokenizer(file)`: the directory of its tokenizer alone, which a file takes seconds
    to give.
    """
    key = {"unit": "gguf tokenizer", "unpacking_version": 2, "file": digest_of(path)}
    return Store(UNPACKED).find(key, lambda: (_read_tokenizer(path).save_pretrained, {}))


def _read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def read_weights(path: Path, **given: Any) -> PreTrainedModel:
    """The network of a directory or a file, if its weights fit the config, number by number."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent if "gguf_file" in given else path,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # in the report, and refused with the rest of it
        output_loading_info=True,
        **given,
    )
    network, report = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(report.get(problem) or (), key=str)
        if found:
            raise InputError(
                f"{path}: the weights do not fit the config: {len(found)} {problem}, the first is "
                f"{found[0]}; put the model's own config and weights together"
            )
    return network


def restore_rotation(network: PreTrainedModel) -> None:
    """Divide rotary frequencies by the config's `rope_factors`: Llama 3.1's, from a GGUF file."""
    factors = getattr(network.config, "rope_factors", None)
    if factors is None:
        return
    rotary: Any = getattr(network.get_decoder(), "rotary_emb", None)
    if network.config.model_type != "llama" or len(rotary.inv_freq) != len(factors):
        raise InputError("rope_freqs.weight is understood for Llama only; use the safetensors")
    for frequencies in (rotary.inv_freq, rotary.original_inv_freq):
        frequencies.div_(torch.tensor(factors, device=frequencies.device))


def gguf_config(path: Path, reader: gguf.GGUFReader | None = None) -> PreTrainedConfig:
    """The config of a file's model, with all that the file says."""
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    fields = (reader or gguf.GGUFReader(path)).fields
    prefix = f"{fields['general.architecture'].contents()}."
    facts = {
        name.removeprefix(prefix): field.contents()
        for name, field in fields.items()
        if name.startswith(prefix)
    }
    with naming(str(path)):
        return honoured(config, facts)


def honoured(config: PreTrainedConfig, facts: Mapping[str, Any]) -> PreTrainedConfig:
    """The config as transformers reads it, changed to agree with `facts`, the file's keys below its
    architecture.
    """
    facts = {
        name: value[0] if isinstance(value, list) and len(set(value)) == 1 else value
        for name, value in facts.items()  # a value that is equal in all layers is the value of each
    }
    if facts.get("attention.sliding_window", 0) >= facts.get("context_length", math.inf):
        del facts["attention.sliding_window"]  # nothing is out of reach
    for name in CAPS:
        if name in facts and hasattr(config, name):
            setattr(config, name, facts[name] or None)  # 0 is none
    if facts.get("attention.scale") and hasattr(config, "query_pre_attn_scalar"):
        # The class takes whole numbers alone; compared below.
        config.query_pre_attn_scalar = round(facts["attention.scale"] ** -2)
    read: Any = GGUF_CONFIG_MAPPING.get(config.model_type.removesuffix("_text"), {})
    said = _said_otherwise(config)
    if not facts.get("attention.scale"):
        # llama.cpp takes the size of a head, and of models of 27B another that no key says.
        facts["attention.scale"] = said["attention.key_length"] ** -0.5
    for name, value in facts.items():
        if name in said:
            known = value == said[name] or math.isclose(value, said[name], rel_tol=1e-6)
        else:
            known = name in read or name in MOVES_NOTHING
        # What says that there is no such thing.
        known |= value in (0, "", "none", []) and name != "attention.causal"
        known |= value == 1 and name.endswith(("scale", "factor"))
        if not known:
            raise InputError(
                f"{name} {str(value)[:60]!r}: not so in transformers; use the model's safetensors"
            )
    return config


def _said_otherwise(config: PreTrainedConfig) -> dict[str, float]:
    """Values of the config that have other names in a file."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.sliding_window": getattr(config, "sliding_window", None) or 0,
        "attention.scale": getattr(config, "query_pre_attn_scalar", head) ** -0.5,
        "attention.causal": True,
        **{name: getattr(config, name, None) or 0 for name in CAPS},
        "rope.dimension_count": head * rope.get("partial_rotary_factor", 1),
        "rope.freq_base": rope.get("full_attention", rope).get("rope_theta", 0),
        "rope.freq_base_swa": rope.get("sliding_attention", rope).get("rope_theta", 0),
    }
