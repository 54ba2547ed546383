"""GGUF files: the logits of the model they were written from, or refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from paramspec.errors import InputError
from paramspec.models import unpack
from paramspec.models.checkpoints import digest_of
from paramspec.models.load import check_checkpoint, load_model, load_tokenizer
from paramspec.models.tokens import token_ids
from paramspec.models.unpack import honoured
from toys import _COMMON, random_model

TOKENS = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
SIZES = _COMMON | {"vocab_size": 300}
GEMMA = SIZES | {"sliding_window": 8, "query_pre_attn_scalar": 5}
TEXTS = ["the cat sat", "the <|end|> of it"]  # which is its end token
FIELDS = {"block_count": "num_hidden_layers", "context_length": "max_position_embeddings"}
FIELDS |= {"embedding_length": "hidden_size", "feed_forward_length": "intermediate_size"}
FIELDS |= {"attention.head_count": "num_attention_heads"}
FIELDS |= {"attention.head_count_kv": "num_key_value_heads"}
FIELDS |= {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}


# A byte-level vocabulary of 260 tokens: 256 bytes, three merges, and an end of text.
MERGES = [("t", "h"), ("th", "e"), ("a", "t")]
VOCABULARY = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "at", "<|end|>"]


def toy_tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Llama's query and key rows in llama.cpp's order, as its own converter writes them."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).flatten(0, 2)


def write(path: Path, model, arch=gguf.MODEL_ARCH.LLAMA, facts=None, tensors=None) -> str:
    """A file by gguf's own writer and names of tensors, with `facts` below its architecture."""
    config = model.config
    name = gguf.MODEL_ARCH_NAMES[arch]
    writer = gguf.GGUFWriter(path, name)
    said = {fact: getattr(config, field) for fact, field in FIELDS.items()}
    add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
    add |= {str: writer.add_string}
    for key, value in (said | (facts or {})).items():
        add[type(value)](key if key.startswith("tokenizer.") else f"{name}.{key}", value)
    size, padding = len(VOCABULARY), config.vocab_size - len(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*VOCABULARY, *(f"<pad {number}>" for number in range(padding))])
    writer.add_token_types([1] * (size - 1) + [3] + [5] * padding)
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(size - 1)
    writer.add_unk_token_id(3)  # as every file of Gemma's has one
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name == "llama" and "q_proj" in key:
            weight = permuted(weight, config.num_attention_heads)
        if name == "llama" and "k_proj" in key:
            weight = permuted(weight, config.num_key_value_heads)
        if "norm" in key and "gemma" in name:  # llama.cpp's converter adds the one
            weight = weight + 1
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), weight.numpy())
    for key, values in (tensors or {}).items():
        writer.add_tensor(key, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def require_same(path: str, model) -> None:
    torch.testing.assert_close(logits(load_model(path).model), logits(model), rtol=0, atol=2e-5)


def llama(**settings):
    return random_model(transformers.LlamaConfig(**SIZES | settings))


def gemma2(**settings):
    return random_model(transformers.Gemma2Config(**GEMMA | settings))


def test_a_file_gives_the_model_it_was_written_from(tmp_path):
    path = write(tmp_path / "toy.gguf", llama(), facts={"rope.dimension_count": 8})
    loaded = load_model(path)
    torch.testing.assert_close(logits(loaded.model), logits(llama()), rtol=0, atol=2e-5)
    assert isinstance(loaded.model.model.layers[0].mlp.down_proj, torch.nn.Linear)
    assert loaded.name == path
    assert digest_of(Path(shutil.copy(path, tmp_path / "other.gguf"))) == loaded.digest
    assert check_checkpoint(Path(path)).num_parameters() == loaded.model.num_parameters()


def test_the_tokenizer_of_a_file_reads_as_that_of_a_directory(tmp_path, monkeypatch):
    facts = {"tokenizer.ggml.add_eos_token": True}
    tokenizer = load_model(write(tmp_path / "toy.gguf", llama(), facts=facts)).tokenizer
    assert tokenizer(TEXTS[0])["input_ids"][-1] == tokenizer.eos_token_id
    rows = token_ids(tokenizer, TEXTS)
    assert rows == token_ids(toy_tokenizer(), TEXTS)
    # Without the weights, read once and then from where it was put
    monkeypatch.setattr(unpack, "UNPACKED", tmp_path / "unpacked")
    for _ in range(2):
        alone = load_tokenizer(tmp_path / "toy.gguf")
        assert alone(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
        monkeypatch.setattr(unpack, "_read_tokenizer", None)
    assert not any(tokenizer.eos_token_id in row for row in rows)


def test_llama_3_keeps_its_rotary_factors(tmp_path):
    """llama.cpp stores `rope_type: llama3` as factors; transformers' own class is the oracle."""
    rope = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = llama(rope_parameters=rope | {"original_max_position_embeddings": 16})
    frequencies = 10_000.0 ** -(torch.arange(0, 8, 2) / 8)
    factors = frequencies / scaled.model.rotary_emb.inv_freq
    assert factors.max() > 2  # or the test could not fail
    assert not torch.allclose(logits(scaled), logits(llama()), atol=1e-4)
    path = write(tmp_path / "toy.gguf", scaled, tensors={"rope_freqs.weight": factors})
    for _ in range(2):  # as it is unpacked, and from there
        require_same(path, scaled)
    with pytest.raises(InputError, match="understood for Llama only"):
        load_model(write(tmp_path / "toy.gguf", scaled, tensors={"rope_freqs.weight": factors[1:]}))


GEMMA_2 = gguf.MODEL_ARCH.GEMMA2
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
        ({"sliding_window": 4}, {"attention.sliding_window": 4}),
    ],
)
def test_a_gemma_2_file_gives_the_logits_of_its_safetensors_twin(tmp_path, settings, facts):
    twin = gemma2(**settings)
    assert (logits(twin) - logits(gemma2())).abs().max() > 1e-3  # or the test could not fail
    require_same(write(tmp_path / "toy.gguf", twin, GEMMA_2, GEMMA_FACTS | facts), twin)


STRANGE = {"logit_scale": 0.25, "final_logit_softcapping": 30.0, "expert_count": 8}
STRANGE |= {"attention.scale": 0.02, "attention.clamp_kqv": 8.0, "attention.sliding_window": 16}
STRANGE |= {"attention.causal": False, "attention.key_length": 16, "rope.dimension_count": 4}
STRANGE |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "a_key_of_tomorrow": 3}


@pytest.mark.parametrize(("fact", "value"), STRANGE.items())
def test_what_a_class_cannot_do_is_refused_by_name(tmp_path, fact, value):
    model = random_model(transformers.Qwen2Config(**SIZES))
    path = write(tmp_path / "toy.gguf", model, gguf.MODEL_ARCH.QWEN2, {fact: value})
    with pytest.raises(InputError, match=rf"toy.gguf: {fact} .*use the model's safetensors"):
        load_model(path)


def test_what_says_nothing_is_taken(tmp_path):
    model = random_model(transformers.Qwen2Config(**SIZES))
    facts = {"logit_scale": 1.0, "attention.clamp_kqv": 0.0, "rope.scaling.type": "none"}
    facts |= {"attention.sliding_window": 64, "attention.causal": True, "expert_count": 0}
    require_same(write(tmp_path / "toy.gguf", model, gguf.MODEL_ARCH.QWEN2, facts), model)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_cut_anywhere_is_refused(tmp_path, share):
    path = Path(write(tmp_path / "toy.gguf", llama()))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    for check in (lambda: load_model(str(path)), lambda: check_checkpoint(path)):
        with pytest.raises(InputError, match=r"toy.gguf: cannot be loaded \(.*; check that it is"):
            check()


def test_a_file_that_would_load_wrong_is_refused(tmp_path):
    path = tmp_path / "toy.gguf"
    write(path, llama(), tensors={"blk.0.attn_q_norm.weight": np.ones(8)})
    with pytest.raises(InputError, match=r"the model takes \d+ of its \d+ weights"):
        load_model(str(path))
    short = llama()
    del short.model.layers[1:]
    write(path, short)
    with pytest.raises(InputError, match=r"18 missing_keys, the first is model.layers.1"):
        load_model(str(path))


def test_a_file_is_unpacked_once_and_again_when_it_changes(tmp_path, monkeypatch):
    model, facts = gemma2(), GEMMA_FACTS
    path = write(tmp_path / "toy.gguf", model, GEMMA_2, facts)
    monkeypatch.setattr(unpack, "UNPACKED", tmp_path / "unpacked")
    config, seen = unpack.gguf_config, []
    monkeypatch.setattr(
        unpack, "gguf_config", lambda path, *rest: seen.append(path) or config(path, *rest)
    )
    first, again = load_model(path), load_model(path)
    assert len(seen) == 1
    assert torch.equal(logits(first.model), logits(again.model))
    assert load_model(path, dtype="bfloat16").dtype == torch.bfloat16
    assert len(seen) == 2  # another dtype is another directory
    model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    write(tmp_path / "toy.gguf", model, GEMMA_2, facts)
    changed = load_model(path)
    assert changed.digest != first.digest
    torch.testing.assert_close(logits(changed.model), logits(model), rtol=0, atol=1e-4)


def test_a_small_gemma_3_is_taken_as_it_is():
    given = {"num_hidden_layers": 18, "hidden_size": 640, "num_attention_heads": 4}
    given |= {"num_key_value_heads": 1, "intermediate_size": 2048, "sliding_window": 512}
    facts = {"block_count": 18, "feed_forward_length": 2048, "attention.head_count_kv": 1}
    facts |= {"attention.key_length": 256, "attention.value_length": 256}
    facts |= {"rope.freq_base": 1_000_000.0, "attention.sliding_window": 512}
    plain = transformers.Gemma3TextConfig(**given).to_dict()
    assert honoured(transformers.Gemma3TextConfig(**given), facts).to_dict() == plain
    given["query_pre_attn_scalar"] = 168  # of 27B, for which no key stands in a file
    with pytest.raises(InputError, match=r"attention.scale .* not so in"):
        honoured(transformers.Gemma3TextConfig(**given), facts)
