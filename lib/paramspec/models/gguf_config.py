"""What a GGUF file says of its model, put into the config; or refused by name.

    config = honoured(path, AutoConfig.from_pretrained(..., gguf_file=...), reader)

transformers reads some of the keys below a file's architecture and leaves the class's defaults for
the others, without a word. Here each key is one of these: it sets (and so agrees with) an
attribute of the config; it says that something is not there; it moves no number; or the file is
refused, and the key named.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from paramspec.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedConfig

# Key: attributes of the config, of which the first that it has is set.
ATTRIBUTES = {
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": (
        "layer_norm_epsilon",
        "layer_norm_eps",
        "norm_epsilon",
        "norm_eps",
    ),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "use_parallel_residual": ("use_parallel_residual",),
}
# Shapes, which the weights are held against; and what has no attribute in models without it.
SHAPES = {"context_length", "feed_forward_length", "vocab_size", "attention.head_count_kv"}
# Of how the file was made, or of texts longer than any here.
IRRELEVANT = {
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "pooling_type",
}
# What llama.cpp itself knows of a model by its number of layers, for no key says it: of these, the
# scale of attention is that of `embedding_length / head_count`.
UNSAID_SCALE = {"gemma2": 46, "gemma3_text": 62}


def honoured(path: Path, config: PreTrainedConfig, reader: GGUFReader) -> PreTrainedConfig:
    """`config = honoured(path, config, reader)`: changed in place where the file says otherwise.

    Raises:
        InputError: if the file says something that the model's class cannot do.
    """
    architecture = reader.fields["general.architecture"].contents()
    facts = {
        key.removeprefix(f"{architecture}."): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(f"{architecture}.")
    }
    # The size of a head first: others are compared with it.
    for name, value in sorted(facts.items(), key=lambda fact: fact[0] != "attention.key_length"):
        if not _apply(config, name, value, facts):
            raise InputError(
                f"{path}: {architecture}.{name} {_short(value)}: not what transformers' "
                f"{type(config).__name__} can be set to; use the model's safetensors"
            )
    _require_scale(path, config, architecture, facts)
    return config


def _apply(config: PreTrainedConfig, name: str, value: object, facts: Mapping[str, object]) -> bool:
    """Whether the config is now as the file says."""
    if name in IRRELEVANT:
        return True
    if isinstance(value, list) and value and all(each == value[0] for each in value):
        value = value[0] if name != "attention.sliding_window_pattern" else value
    match name:
        case "rope.freq_base":
            return _set_base(config, "full_attention", value)
        case "rope.freq_base_swa":
            return _set_base(config, "sliding_attention", value)
        case "rope.dimension_count":
            return _set_rotated(config, value)
        case "attention.scale" if value and hasattr(config, "query_pre_attn_scalar"):
            config.query_pre_attn_scalar = round(value**-2)  # the class takes whole ones alone
            return abs(config.query_pre_attn_scalar**-0.5 - value) < 1e-6
        case "attention.scale" if value and getattr(config, "attention_multiplier", None):
            config.attention_multiplier = value
            return True
        case "attention.scale" if value:
            return abs(value - _head_size(config) ** -0.5) < 1e-6
        case "attention.sliding_window":
            return _set_window(config, value, facts)
        case "attention.sliding_window_pattern":
            return _set_pattern(config, value)
        case "attention.causal":
            return value is True
    for attribute in ATTRIBUTES.get(name, ()):
        if hasattr(config, attribute):
            if "softcapping" in name and not value:
                value = None
            if isinstance(value, list):
                return False
            if getattr(config, attribute) != value:
                setattr(config, attribute, value)
            return True
    return name in SHAPES or _is_neutral(name, value) or _is_read(config, name)


def _is_neutral(name: str, value: object) -> bool:
    """Whether a value says that there is no such thing."""
    if isinstance(value, str | list):
        return value in ("", "none", [])
    return value == 0 or (name.endswith(("scale", "factor")) and value == 1)


def _is_read(config: PreTrainedConfig, name: str) -> bool:
    """Whether transformers reads a key that is not known here, into an attribute of the class."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    kind = config.model_type.removesuffix("_text")
    attribute = GGUF_CONFIG_MAPPING.get(kind, {}).get(name)
    return attribute is not None and hasattr(config, attribute)


def _set_base(config: PreTrainedConfig, kind: str, value: float) -> bool:
    """Of the rotation's frequencies; Gemma 3 has one for each kind of attention."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return False
    if kind in rope:
        rope[kind]["rope_theta"] = value
        return True
    if "rope_theta" not in rope or kind != "full_attention":
        return rope.get("rope_theta") == value
    rope["rope_theta"] = value
    return True


def _set_rotated(config: PreTrainedConfig, value: int) -> bool:
    """How many numbers of a head are rotated."""
    size = _head_size(config)
    rope = getattr(config, "rope_parameters", None) or {}
    if "partial_rotary_factor" in rope:
        rope["partial_rotary_factor"] = value / size
        return True
    return value == size


def _set_window(config: PreTrainedConfig, value: int, facts: Mapping[str, object]) -> bool:
    if not value or value >= facts.get("context_length", float("inf")):
        return True  # nothing is out of reach
    # Qwen's classes have a switch, which decides each layer's kind as the config is made.
    if not hasattr(config, "sliding_window") or hasattr(config, "use_sliding_window"):
        return False
    config.sliding_window = value
    return True


def _set_pattern(config: PreTrainedConfig, value: int | list) -> bool:
    """Which layers have a window: all but each so manieth, or a list."""
    if not getattr(config, "layer_types", None):
        return False
    count = config.num_hidden_layers
    slides = value
    if not isinstance(value, list):
        slides = [bool(value) and (layer + 1) % value != 0 for layer in range(count)]
    if len(slides) != count:
        return False
    config.layer_types = ["sliding_attention" if one else "full_attention" for one in slides]
    return True


def _require_scale(
    path: Path, config: PreTrainedConfig, architecture: str, facts: Mapping[str, object]
) -> None:
    """The scale of attention, where the class has one of its own and no key says it."""
    if not hasattr(config, "query_pre_attn_scalar") or facts.get("attention.scale"):
        return
    if config.num_hidden_layers == UNSAID_SCALE.get(config.model_type):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    elif config.head_dim != config.query_pre_attn_scalar:
        raise InputError(
            f"{path}: {architecture}.attention.scale is not in the file, and neither its "
            f"attention.key_length {config.head_dim} nor its block_count "
            f"{config.num_hidden_layers} is that of a model whose scale is known; use the "
            "model's safetensors"
        )


def _head_size(config: PreTrainedConfig) -> int:
    own = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
