"""Toy models: every supported family's own transformers class, small and randomly initialised."""

from __future__ import annotations

import torch
import transformers
from torch import nn

_SMALL = {"vocab_size": 97, "hidden_size": 32, "pad_token_id": 0}
_HEADS = {"num_hidden_layers": 3, "num_attention_heads": 4}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_COMMON = _SMALL | _HEADS | _ENDS | {"intermediate_size": 48, "num_key_value_heads": 2}
_COMMON |= {"head_dim": 8, "max_position_embeddings": 64}
_GPT = _ENDS | {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4}
_GPT |= {"n_positions": 64, "n_inner": 48}
_OPT = _SMALL | _HEADS | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
_MPT = {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_SHARED = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}

# Family: (configuration class, settings that differ from the common ones).
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", _COMMON),
    "mistral": ("MistralConfig", _COMMON | {"sliding_window": 32}),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", _COMMON),
    "gemma": ("GemmaConfig", _COMMON),
    "gemma2": ("Gemma2Config", _COMMON | {"sliding_window": 32}),
    "gemma3": ("Gemma3TextConfig", _COMMON | {"sliding_window": 32}),
    "olmo": ("OlmoConfig", _COMMON),
    "olmo2": ("Olmo2Config", _COMMON),
    "phi": ("PhiConfig", _COMMON),
    "phi3": ("Phi3Config", _COMMON),
    "glm4": ("Glm4Config", _COMMON),
    "granite": ("GraniteConfig", _COMMON | {"logits_scaling": 2.0}),
    "cohere": ("CohereConfig", _COMMON),
    "stablelm": ("StableLmConfig", _COMMON),
    "gpt2": ("GPT2Config", _GPT),
    "gptj": ("GPTJConfig", _GPT | {"rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXConfig", _COMMON),
    "bloom": ("BloomConfig", _SMALL | {"n_layer": 3, "n_head": 4}),
    "falcon": ("FalconConfig", _SMALL | _HEADS | {"ffn_hidden_size": 48}),
    "opt": ("OPTConfig", _OPT),
    "mpt": ("MptConfig", _MPT),
}

MIXTURES: dict[str, tuple[str, dict]] = {
    "mixtral": ("MixtralConfig", _COMMON | {"num_local_experts": 4}),
    "olmoe": ("OlmoeConfig", _COMMON | _EXPERTS),
    "qwen2_moe": ("Qwen2MoeConfig", _COMMON | _EXPERTS | _SHARED),
}


def toy_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`toy_model("gpt2")`: a model of 3 layers whose weights are large enough to matter."""
    class_name, settings = (FAMILIES | MIXTURES)[family]
    return random_model(getattr(transformers, class_name)(**settings), seed, dtype)


def random_model(
    config: transformers.PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """`random_model(config)`: a model whose weights are large enough to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            # Default initialisation leaves biases at 0 and hardly moves the logits.
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).requires_grad_(False)


# Where the value vectors of a family are, apart from the library: a plain Linear, GPT-2's Conv1D,
# OPT's flattened inputs.
DOWN = {
    "llama": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "opt": "model.decoder.layers.{}.fc2",
    "gemma": "model.layers.{}.mlp.down_proj",
}


def value_vectors(model: nn.Module, family: str, *, gradients: bool = False) -> list[torch.Tensor]:
    """`value_vectors(model, "gpt2")`: `[width, hidden]` of each layer, as views; or gradients."""
    weights = [model.get_submodule(DOWN[family].format(layer)).weight for layer in range(3)]
    found = [weight.grad if gradients else weight for weight in weights]
    return found if family == "gpt2" else [weight.T for weight in found]


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of every parameter and buffer, also of those that no state_dict holds."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def same_weights(first: dict, second: dict, but: list[str] | None = None) -> None:
    """`same_weights(before, weights_of(model))`: bit by bit, but for some."""
    assert first.keys() == second.keys()
    for name in first.keys() - set(but or ()):
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name
