"""What computed a result: the library versions in its key, and the record that is stored with it.

A record, `computed.json`, holds `versions`, `hardware`, `date` (UTC), and the fields that its unit
adds: see `runner.unit_record`; of an evaluation of fine-tuned vectors also `trained`, their own
record. `group_records` joins the records of many results, for `run.json` and for a page.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# A change of one of these may change a number: models' code and kernels, tokens, weights that are
# unpacked, random draws. Other libraries hand numbers on, or are applied to results.
NUMBER_LIBRARIES = ("torch", "transformers", "tokenizers", "sentencepiece", "gguf", "numpy")
COMPUTED = "computed.json"
# Names a file that gets a line for each result that is read: so a page knows its results.
USED = "PARAMSPEC_USED"


def number_versions() -> dict[str, str]:
    """Of each of `NUMBER_LIBRARIES`, without the local part (`+cpu`): a key has the device."""
    found = {name: version_of(name) for name in NUMBER_LIBRARIES}
    return {name: version.partition("+")[0] for name, version in found.items() if version}


@functools.cache  # it is read from files, for each stored result; an imported library stays
def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """`cpu`, `cores` and `memory` (bytes) that this process may use; of torch, if it is imported,
    `gpus`, `threads`, `instructions`, and of GPUs `float32`. Never the machine's name.
    """
    from paramspec.execution.limits import cores, memory  # half a second

    cpu = None
    with suppress(OSError):
        cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    name = cpu[1] if cpu else platform.processor() or platform.machine()
    found: dict[str, Any] = {"cpu": name, "cores": cores(), "memory": memory(), "gpus": []}
    if torch := sys.modules.get("torch"):  # what computes has imported it
        found["threads"] = torch.get_num_threads()
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
        gpus = range(torch.cuda.device_count())
        found["gpus"] = [torch.cuda.get_device_name(gpu) for gpu in gpus]
        if gpus:
            found["float32"] = torch.get_float32_matmul_precision()  # "highest": without TF32
    return found


def machine(hardware: Mapping[str, Any]) -> str:
    """A few words, as "EPYC 7763, 2 cores, 8 GiB, 1 x A100"."""
    gpus = sorted({f"{hardware['gpus'].count(name)} x {name}" for name in hardware["gpus"]})
    memory = f"{hardware['memory'] / 2**30:.0f} GiB"
    cores = "1 core" if hardware["cores"] == 1 else f"{hardware['cores']} cores"
    return ", ".join([hardware["cpu"], cores, memory, *gpus])


def computed(**unit: object) -> dict[str, Any]:
    """The record of a result that this process computes now, with the fields of its unit."""
    found = {name: version_of(name) for name in ("paramspec", *NUMBER_LIBRARIES)}
    installed = {name: version for name, version in found.items() if version}
    return {
        "versions": {"python": platform.python_version()} | installed,
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **unit,
    }


def read_computed(path: Path) -> dict[str, Any]:
    """The record of a stored result, with the `unit` of its key; empty where there is none."""
    with suppress(OSError, ValueError):
        texts = [(path / name).read_text(encoding="utf-8") for name in ("key.json", COMPUTED)]
        key, record = map(json.loads, texts)
        return {"unit": key.get("unit"), **record}
    return {}


def group_records(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The records of results, in groups of equal `versions`, `hardware` and `device`; each has also
    `units` (the number of results by kind, as `pss` or `finetune`), the `first` and `last` date.
    """
    groups: dict[str, dict[str, Any]] = {}
    for whole in map(read_computed, paths):
        for record in filter(None, (whole.get("trained"), whole)):
            same = {name: record.get(name) for name in ("versions", "hardware", "device")}
            group = groups.setdefault(json.dumps(same, sort_keys=True), {"units": {}, **same})
            unit, date = record.get("unit", "finetune"), record["date"]
            group["units"][unit] = group["units"].get(unit, 0) + 1
            group["first"] = min(date, group.get("first", date))
            group["last"] = max(date, group.get("last", date))
    return list(groups.values())


def note_use(path: Path) -> None:
    """Add a result that was read to the file that the environment variable `USED` names, if any."""
    if file := os.environ.get(USED):
        with suppress(OSError), open(file, "a", encoding="utf-8") as opened:
            opened.write(json.dumps(str(path.absolute())) + "\n")


def used_results(file: Path) -> dict[str, Any]:
    """Of the results noted in a file: `computed`, their `group_records`; and `models`, by name: the
    `commit` of the hub, and the tokens that are put `before` each text.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    paths = [Path(json.loads(line)) for line in dict.fromkeys(lines)]
    models = {}
    for record in map(read_computed, paths):
        if "tokenizer" in record:
            before = [token["token"] for token in record["tokenizer"]["kept"]]
            models[record["model"]] = {"commit": record["commit"], "before": before}
    return {"computed": group_records(paths), "models": models}
