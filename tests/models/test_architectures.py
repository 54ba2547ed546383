"""The architectures whose value vectors are verified: `architectures.csv`, which the book shows.

`python tests/models/test_architectures.py` tries all causal language models of transformers, and
writes it anew.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import paramspec.models
from oracles import with_vectors_zeroed
from paramspec.method.hooks import mask_value_vectors, value_vector_view
from paramspec.method.scoring import choose_engine
from toys import _COMMON, random_model

TABLE = Path(paramspec.models.__file__).with_name("architectures.csv")
SMALL = 3_000_000  # weights; a config that does not take the sizes below gives millions
# Settings that some configs need besides, or instead.
OTHERS = {
    "falcon": {"head_dim": None, "num_kv_heads": 2, "ffn_hidden_size": 48},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "gemma2": {"sliding_window": 32},
    "gemma3_text": {"sliding_window": 32},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "lfm2": {"full_attn_idxs": [1], "block_auto_adjust_ff_dim": False},
    "modernbert-decoder": {"global_attn_every_n_layers": 3, "local_attention": 32},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "xglm": {"d_model": 32, "attention_heads": 4, "num_layers": 3, "ffn_dim": 48},
}
TOKENS = torch.tensor([[5, 17, 56, 9, 3, 27, 42]])


def small(model_type: str) -> torch.nn.Module:
    """A model of that type with random weights."""
    settings = _COMMON | OTHERS.get(model_type, {})
    given = {name: value for name, value in settings.items() if value is not None}
    config = AutoConfig.for_model(model_type, **given)
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert weights < SMALL, f"{weights:,} weights"
    return random_model(config)


def row_of(model_type: str) -> dict[str, str]:
    """What the table says of an architecture, once masking it is as good as editing its weights."""
    model = small(model_type)
    view = value_vector_view(model)
    keep = torch.rand(view.layers, 1, view.width, generator=torch.Generator().manual_seed(0)) > 0.3
    with torch.no_grad():
        bare = model(TOKENS, use_cache=False).logits
        with mask_value_vectors(view, keep):
            masked = model(TOKENS, use_cache=False).logits
        expected = with_vectors_zeroed(view, keep[:, 0])(TOKENS, use_cache=False).logits
    scale = bare.abs().max()
    assert (masked - expected).abs().max() <= 1e-5 * scale
    assert (masked - bare).abs().max() > 1e-3 * scale
    return {
        "architecture": type(model).__name__,
        "type": model_type,
        "down projection": view.names[0].partition(".0.")[2],
        "rows": choose_engine(view).name,
    }


@pytest.mark.parametrize("row", pd.read_csv(TABLE).to_dict("records"), ids=lambda row: row["type"])
def test_an_architecture_of_the_table_is_verified(row):
    assert row_of(row["type"]) == row


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = []
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            found.append(row_of(name))
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
    pd.DataFrame(found).sort_values("architecture").to_csv(TABLE, index=False)
    print(f"{len(found)} written to {TABLE}")
