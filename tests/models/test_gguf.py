"""What a GGUF file says beside its weights: honoured, or refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import gguf
import pytest
import torch
import transformers
from test_models import toy_bpe

from paramspec.errors import InputError
from paramspec.models import unpack
from paramspec.models.gguf_config import honoured
from paramspec.models.load import load_model
from toys import _COMMON, random_model

TOKENS = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
GEMMA = _COMMON | {"sliding_window": 8, "query_pre_attn_scalar": 5}
GEMMA["vocab_size"] = 300


def write(path, model, arch, facts):
    """A file by gguf's own writer and names of tensors, with `facts` below its architecture."""
    config = model.config
    name = gguf.MODEL_ARCH_NAMES[arch]
    writer = gguf.GGUFWriter(path, name)
    common = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    for key, value in (common | facts).items():
        {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}[type(value)](
            f"{name}.{key}", value
        )
    vocab, merges = toy_bpe()
    tokens = [*vocab, *(f"<pad {i}>" for i in range(len(vocab), config.vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)  # as every file of Gemma's has one
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "norm" in key and "gemma" in name:  # llama.cpp's converter adds the one
            weight = weight + 1
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def gemma2(**settings):
    return random_model(transformers.Gemma2Config(**GEMMA | settings))


GEMMA_FACTS = {
    "attention.key_length": 8,
    "attention.value_length": 8,
    "attention.sliding_window": 8,
    "attention.scale": 5.0**-0.5,
    "rope.freq_base": 10_000.0,
}


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"final_logit_softcapping": 5.0}, {"final_logit_softcapping": 5.0}),
        ({"attn_logit_softcapping": 0.5}, {"attn_logit_softcapping": 0.5}),
        ({"final_logit_softcapping": None}, {"final_logit_softcapping": 0.0}),
        ({"query_pre_attn_scalar": 144}, {"attention.scale": 1 / 12}),
        ({"rms_norm_eps": 0.1}, {"attention.layer_norm_rms_epsilon": 0.1}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
            {"rope.freq_base": 50.0},
        ),
    ],
)
def test_a_gemma_2_file_gives_the_logits_of_its_safetensors_twin(tmp_path, settings, facts):
    twin = gemma2(**settings)
    assert (logits(twin) - logits(gemma2())).abs().max() > 1e-3  # or the test could not fail
    path = write(tmp_path / "toy.gguf", twin, gguf.MODEL_ARCH.GEMMA2, GEMMA_FACTS | facts)
    torch.testing.assert_close(logits(load_model(path).model), logits(twin), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("logit_scale", 0.25),
        ("embedding_scale", 12.0),
        ("residual_scale", 0.22),
        ("attention.scale", 0.02),
        ("attention.clamp_kqv", 8.0),
        ("attention.sliding_window", 16),
        ("attention.causal", False),
        ("final_logit_softcapping", 30.0),
        ("rope.scaling.factor", 8.0),
        ("rope.dimension_count", 4),
        ("expert_count", 8),
        ("a_key_of_tomorrow", 3),
    ],
)
def test_what_a_class_cannot_do_is_refused_by_name(tmp_path, fact, value):
    model = random_model(transformers.Qwen2Config(**_COMMON | {"vocab_size": 300}))
    path = write(tmp_path / "toy.gguf", model, gguf.MODEL_ARCH.QWEN2, {fact: value})
    with pytest.raises(InputError, match=rf"toy.gguf: qwen2.{fact} .*use the model's safetensors"):
        load_model(path)


def test_a_file_is_unpacked_once_and_again_when_it_changes(tmp_path, monkeypatch):
    model, facts = gemma2(), GEMMA_FACTS
    path = write(tmp_path / "toy.gguf", model, gguf.MODEL_ARCH.GEMMA2, facts)
    monkeypatch.setattr(unpack, "UNPACKED", tmp_path / "unpacked")
    read, seen = unpack.read_gguf, []
    monkeypatch.setattr(unpack, "read_gguf", lambda path: seen.append(path) or read(path))
    first, again = load_model(path), load_model(path)
    assert len(seen) == 1
    assert torch.equal(logits(first.model), logits(again.model))
    assert load_model(path, dtype="bfloat16").dtype == torch.bfloat16
    assert len(seen) == 2  # another dtype is another directory
    model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    write(path, model, gguf.MODEL_ARCH.GEMMA2, facts)
    changed = load_model(path)
    assert changed.digest != first.digest
    torch.testing.assert_close(logits(changed.model), logits(model), rtol=0, atol=1e-4)


# --- files too large for a test: their metadata alone ---------------------------------------------


def metadata(arch, **facts):
    fields = {f"{arch}.{key.replace('__', '.')}": value for key, value in facts.items()}
    fields["general.architecture"] = arch
    return SimpleNamespace(
        fields={
            key: SimpleNamespace(contents=lambda value=value: value)
            for key, value in fields.items()
        }
    )


def test_the_scale_of_gemma_2_27b_is_that_of_its_embedding():
    """No key says it: 4608 / 32 = 144, as its config.json has it."""
    given = {"num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32}
    given |= {"num_key_value_heads": 16, "head_dim": 128, "intermediate_size": 36864}
    file = metadata(
        "gemma2",
        block_count=46,
        embedding_length=4608,
        attention__head_count=32,
        attention__head_count_kv=16,
        attention__key_length=128,
        attention__value_length=128,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        attention__sliding_window=4096,
    )
    config = honoured("x.gguf", transformers.Gemma2Config(**given), file)
    assert config.query_pre_attn_scalar == 144
    given["num_hidden_layers"] = 12  # no model that is known
    file.fields["gemma2.block_count"].contents = lambda: 12
    with pytest.raises(InputError, match=r"x.gguf: gemma2.attention.scale is not in the file"):
        honoured("x.gguf", transformers.Gemma2Config(**given), file)


def test_a_small_gemma_3_is_taken_as_it_is():
    file = metadata(
        "gemma3",
        context_length=32768,
        embedding_length=640,
        block_count=18,
        feed_forward_length=2048,
        attention__head_count=4,
        attention__head_count_kv=1,
        attention__layer_norm_rms_epsilon=1e-6,
        attention__key_length=256,
        attention__value_length=256,
        rope__freq_base=1_000_000.0,
        attention__sliding_window=512,
    )
    given = {"num_hidden_layers": 18, "hidden_size": 640, "num_attention_heads": 4}
    given |= {"num_key_value_heads": 1, "intermediate_size": 2048, "sliding_window": 512}
    given |= {"max_position_embeddings": 32768}
    plain = transformers.Gemma3TextConfig(**given).to_dict()
    assert honoured("x.gguf", transformers.Gemma3TextConfig(**given), file).to_dict() == plain
