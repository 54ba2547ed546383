"""Models as people have them: quantized, adapters, GGUF files on the hub, unknown names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import pack_to_int32
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from oracles import score_one_at_a_time
from paramspec import Choices, Store, Training, measure_pss
from paramspec.errors import InputError
from paramspec.method.hooks import OWN, mask_value_vectors, train_value_vectors, value_vector_view
from paramspec.method.rows import Request
from paramspec.method.scoring import encode, score_options
from paramspec.models.checkpoints import find_checkpoint
from paramspec.models.load import load_model
from paramspec.studies.finetune import finetune
from paramspec.studies.runner import unit_record
from toy_study import save_toy, toy_questions, toy_tokenizer
from toys import toy_model

IDS = torch.tensor([[5, 17, 56, 9, 3, 27, 42]])
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        }
    },
}


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> tuple[Path, Path]:
    """A toy with weights of eight bits, as compressed-tensors stores them; and the same in fp32."""
    small = save_toy(tmp_path_factory.mktemp("quantized") / "toy")
    plain = Path(shutil.copytree(small, small.with_name("plain")))
    tensors, rounded = {}, {}
    for name, weight in load_file(small / "model.safetensors").items():
        rounded[name] = tensors[name] = weight
        if ".layers." in name and name.endswith("proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            whole = (weight / scale).round().to(torch.int8)
            del tensors[name]
            tensors[f"{name}_packed"] = pack_to_int32(whole, 8)
            tensors[f"{name}_shape"] = torch.tensor(weight.shape)
            tensors[f"{name}_scale"] = scale
            rounded[name] = whole.float() * scale
    save_file(tensors, small / "model.safetensors", {"format": "pt"})
    save_file(rounded, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"quantization_config": COMPRESSED}))
    return small, plain


def test_a_quantized_model_is_masked_as_its_rounded_weights_are(quantized):
    small, plain = (load_model(str(path)) for path in quantized)
    assert small.quantized == unit_record(small)["quantized"] == "compressed-tensors"
    assert plain.quantized is None
    views = [value_vector_view(each.model) for each in (small, plain)]
    keep = torch.rand(3, 2, 48, generator=torch.Generator().manual_seed(0)) > 0.3
    logits = []
    for view in views:
        with mask_value_vectors(view, keep):
            logits.append(logits_of(view.model))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[0], logits_of(small.model))
    items = [encode(toy_tokenizer(), question) for question in toy_questions(2)]
    scores = score_options(views[0], [Request(item, 1) for item in items], [None, keep[:, 0]])
    for score, item in zip(scores, items, strict=True):
        torch.testing.assert_close(
            score, score_one_at_a_time(views[1], item, keep[:, 0]), atol=1e-3, rtol=0
        )


def test_a_quantized_model_is_measured_and_not_trained(quantized, tmp_path):
    questions = toy_questions(2)
    choices = Choices(ratios=(0.2,), general=3, nulls=("random",))
    studies = [
        measure_pss([str(path)], questions, choices, store=Store(tmp_path / "store"))
        for path in quantized
    ]
    columns = ["mask", "question_id", "correct_norm"]
    small, plain = (study.details[columns] for study in studies)
    assert (small == plain).all(axis=None)
    assert studies[0].run["models"][0]["quantized"] == "compressed-tensors"
    training = Training(method="FT-PV", concepts=("alpha",))
    with pytest.raises(
        InputError,
        match="quantized by compressed-tensors; its value vectors can be masked, and not",
    ):
        finetune(str(quantized[0]), questions, training, tmp_path / "tuned")


class EightBits(nn.Module):
    """A linear layer whose weights are not to be read, as bitsandbytes and GPTQ keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax() / 127
        self.register_buffer("qweight", (linear.weight / scale).round().to(torch.int8))
        self.scale = float(scale)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states @ (self.qweight.float() * self.scale).T


def test_weights_that_cannot_be_read_are_masked_all_the_same():
    model, rounded = toy_model("llama"), toy_model("llama")
    for layer, same in zip(model.model.layers, rounded.model.layers, strict=True):
        layer.mlp.down_proj = EightBits(layer.mlp.down_proj)
        bits = layer.mlp.down_proj
        same.mlp.down_proj.weight.copy_(bits.qweight.float() * bits.scale)
    view, expected = value_vector_view(model), value_vector_view(rounded)
    assert (view.readable, expected.readable) == (False, True)
    assert (view.layers, view.width, view.hidden) == (3, 48, 32)
    keep = torch.rand(3, 2, 48, generator=torch.Generator().manual_seed(0)) > 0.3
    with mask_value_vectors(view, keep), mask_value_vectors(expected, keep):
        torch.testing.assert_close(logits_of(model), logits_of(rounded), atol=1e-4, rtol=1e-4)
    with pytest.raises(
        InputError, match="quantized, so that its value vectors can be masked, and not"
    ):
        view.vectors(0)
    with (
        pytest.raises(InputError, match="be read or trained"),
        train_value_vectors(view, torch.tensor([[0, 1]], dtype=torch.int32)),
    ):
        pass


def test_a_quantization_that_is_not_installed_is_named(quantized, tmp_path):
    place = Path(shutil.copytree(quantized[1], tmp_path / "gptq"))
    config = json.loads((place / "config.json").read_text())
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (place / "config.json").write_text(json.dumps(config | {"quantization_config": gptq}))
    with pytest.raises(
        InputError, match=r"gptq: cannot be loaded \(ImportError: .*(?i:gptq)"
    ) as error:
        load_model(str(place))
    assert "\n" not in str(error.value)


@pytest.fixture
def adapter(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A base model, and an adapter of it that names it by a path."""
    base = save_toy(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["down_proj", "q_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(toy_model("llama"), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def test_an_adapter_is_merged_into_its_base(adapter):
    base, place = adapter
    loaded = load_model(str(place))
    expected = PeftModel.from_pretrained(toy_model("llama"), place).eval()
    torch.testing.assert_close(logits_of(loaded.model), logits_of(expected), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits_of(loaded.model), logits_of(toy_model("llama")), atol=1e-2)
    assert value_vector_view(loaded.model).layers == 3
    assert loaded.name == str(place)
    before, own = loaded.digest, load_model(str(base)).digest
    assert before != own
    weights = load_file(place / "adapter_model.safetensors")
    save_file({name: 2 * one for name, one in weights.items()}, place / "adapter_model.safetensors")
    assert load_model(str(place)).digest not in (before, own)


def test_an_adapter_of_another_model_is_refused(adapter, tmp_path):
    _, place = adapter
    other = save_toy(tmp_path / "other", "gpt2")
    config = json.loads((place / "adapter_config.json").read_text())
    for base, message in ((other, "Target modules"), (tmp_path / "gone", "gone")):
        changed = config | {"base_model_name_or_path": str(base)}
        (place / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message) as error:
            load_model(str(place))
        assert "\n" not in str(error.value)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """`cached("org/name", {"a.gguf": path})`: a repository in the hub's cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repo: str, files: dict[str, Path]) -> Path:
        place = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        snapshot = place / "snapshots" / ("a" * 40)
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("a" * 40)
        for name, path in files.items():
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, snapshot / name)
        return snapshot

    return put


def test_a_gguf_file_of_the_hub_is_named_or_the_only_one(cached, tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    snapshot = cached("org/one", {"q8.gguf": file})
    for name in ("org/one", "org/one:q8.gguf", "org/one@main:q8.gguf"):
        found = find_checkpoint(name)
        assert (found.name, found.path) == (name, snapshot / "q8.gguf")
        assert found.commit == "a" * 40
    cached("org/two", {"q8.gguf": file, "in/q4.gguf": file})
    with pytest.raises(
        InputError, match=r"several GGUF files; name one: org/two:in/q4.gguf, org/tw"
    ):
        find_checkpoint("org/two")
    assert find_checkpoint("org/two:in/q4.gguf").path.name == "q4.gguf"
    with pytest.raises(InputError, match=r"no q2.gguf there; it has in/q4.gguf, q8.gguf"):
        find_checkpoint("org/two:q2.gguf")


class Renamed(nn.Module):
    """An MLP whose parts have names of its own."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.inner = mlp.gate_proj, mlp.up_proj, nn.Module()
        self.inner.back = mlp.down_proj

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner.back(nn.functional.silu(self.gate(states)) * self.up(states))


def test_an_unknown_name_is_given_and_checked_like_any_other(monkeypatch):
    model = toy_model("llama")
    for layer in model.model.layers:
        layer.mlp = Renamed(layer.mlp)
    with pytest.raises(InputError, match=r"--down-projection: .*mlp.gate, mlp.up, mlp.inner.back"):
        value_vector_view(model)
    monkeypatch.setenv(OWN, "mlp.inner.back")
    view = value_vector_view(model)
    assert view.names[2] == "model.layers.2.mlp.inner.back"
    assert torch.equal(view.vectors(0), toy_model("llama").model.layers[0].mlp.down_proj.weight.T)
    monkeypatch.setenv(OWN, "mlp.up")  # a linear layer, and not the last of its MLP
    with pytest.raises(InputError, match=re.escape("the value-vector view does not hold")):
        value_vector_view(model)


def test_a_name_is_part_of_what_a_result_depends_on(monkeypatch, tmp_path):
    from paramspec.studies.runner import basis_of
    from toy_study import toy_loaded

    before = basis_of(toy_loaded())
    monkeypatch.setenv(OWN, "mlp.down_proj")
    assert basis_of(toy_loaded()) == before | {"down_projection": "mlp.down_proj"}


def test_the_command_verifies_a_model(command, refused, tmp_path, quantized):
    toy = save_toy(tmp_path / "toy")
    status, out, _ = command("models", "--verify", toy)
    assert status == 0
    assert "value vectors: 3 layers of 48, each of 32 numbers" in out
    assert "its output is the sum of coefficients times value vectors" in out
    assert "a chat template" in out
    assert "quantized by compressed-tensors" in command("models", "--verify", quantized[0])[1]
    monkey = refused("models", "--verify", toy, "--down-projection", "mlp.none")
    assert "no down projection mlp.none in its 3 layers" in monkey
