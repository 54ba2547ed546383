"""What computed a result: the library versions in its key, and the record that is stored with it.

    number_versions()                     # in every key: {"torch": "2.13.0", ...}
    computed(**unit_record(loaded))       # with every stored result, as `computed.json`
    group_records([({"unit": "pss"}, read_computed(path)), ...])

A record holds `versions`, `hardware`, `date` (UTC), and what its unit adds: of a model `model`,
`digest`, `commit` (of the hub, None of other models), `tokenizer` (see `tokens.tokenizer_facts`),
`dtype`, `device`, `arithmetic` (see `kernels`) and `engine`; of fine-tuned vectors' evaluation also
`trained`, their own record.

The record of a run, `run.json`, holds

- `questions` (`digest`, `count`), `choices` and `scoring_version`;
- `models`, of each `name`, `digest`, `dtype`, `tokenizer`, `layers`, `width`, `evaluations`,
  `units` and, of these, `units_from_store`, `seconds` of computing, and `computed`: the distinct
  records, each with `units`, a list of what it computed (`{"unit": "pss", "concepts": [...]}`,
  `{"unit": "coefficients"}`, `{"unit": "training"}` of a micro model), and the `first` and `last`
  date. Nothing in it is of the process that wrote it, unless that process computed a unit.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Whoever changes one of these may change a number: models' code and kernels, tokens, weights that
# are unpacked, random draws. Others that are installed hand numbers on, or are applied to results.
NUMBER_LIBRARIES = ("torch", "transformers", "tokenizers", "sentencepiece", "gguf", "numpy")
COMPUTED = "computed.json"
# Names a file that gets a line for each result that is read: so a page knows what it rests on.
USED = "PARAMSPEC_USED"


def number_versions() -> dict[str, str]:
    """`number_versions()["torch"]`: of each library whose change may change a number.

    Without the local part (`+cpu`): it says what a build is for, and a key has the device.
    """
    return {name: found.partition("+")[0] for name, found in versions(*NUMBER_LIBRARIES).items()}


def versions(*names: str) -> dict[str, str]:
    """`versions("torch")`: of those that are installed."""
    return {name: found for name in names if (found := version_of(name))}


@functools.cache  # read from files, for each stored result; what is imported stays what it is
def version_of(name: str) -> str | None:
    """`version_of("torch")`: None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """`hardware()`: `cpu`, `cores`, `memory` (bytes), `gpus`, `threads`, `instructions`.

    Cores and memory are those that the process may use. Of a process without torch, neither GPUs
    nor the last two. Never the machine's name.
    """
    from paramspec.execution.limits import cores, memory  # half a second

    cpu = None
    with suppress(OSError):
        cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    found: dict[str, Any] = {
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "cores": cores(),
        "memory": memory(),
    }
    torch = sys.modules.get("torch")  # what computes has imported it
    names: list[str] = []
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
        names = [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())]
    return found | {"gpus": names}


def machine(hardware: Mapping[str, Any]) -> str:
    """`machine(hardware())`: in a few words, as "EPYC 7763, 2 cores, 8 GiB, 1 x A100"."""
    gpus = list(hardware["gpus"])
    parts = [str(hardware["cpu"]), f"{hardware['cores']} cores"]
    parts.append(f"{hardware['memory'] / 2**30:.0f} GiB")
    return ", ".join(parts + sorted({f"{gpus.count(name)} x {name}" for name in gpus}))


def computed(**unit: object) -> dict[str, Any]:
    """`computed(device="cpu")`: the record of what this process computes now."""
    return {
        "versions": {"python": platform.python_version()}
        | versions("paramspec", *NUMBER_LIBRARIES),
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **unit,
    }


def read_computed(path: Path) -> dict[str, Any]:
    """`read_computed(store.get(key))`: the record of a stored result; empty where there is none."""
    with suppress(OSError, ValueError):
        return json.loads((path / COMPUTED).read_text(encoding="utf-8"))
    return {}


def group_records(
    units: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> list[dict[str, Any]]:
    """`group_records([({"unit": "pss"}, record), ...])`: distinct records with what they computed.

    Args:
        units: of each, what to call it, and its record.

    Returns:
        Records without their `date` and `seconds`, each with `units`, what they computed, in
        order, and the `first` and `last` date.
    """
    groups: dict[str, dict[str, Any]] = {}
    for label, record in units:
        same = {name: value for name, value in record.items() if name not in ("date", "seconds")}
        group = groups.setdefault(json.dumps(same, sort_keys=True), {"units": [], **same})
        group["units"].append(dict(label))
        date = record.get("date")
        group["first"] = min(filter(None, (group.get("first"), date)), default=None)
        group["last"] = max(filter(None, (group.get("last"), date)), default=None)
    return list(groups.values())


def note_use(path: Path) -> None:
    """`note_use(path)`: add a result that was read to the file that `USED` names, if it does."""
    if file := os.environ.get(USED):
        with suppress(OSError), open(file, "a", encoding="utf-8") as opened:
            opened.write(json.dumps(str(path.absolute())) + "\n")


def used_results(file: Path) -> dict[str, Any]:
    """`used_results(file)`: what the results noted in it were computed by, for a page.

    Returns:
        `computed`, as `group_records` gives, of each group `versions`, `hardware`, `device` and
        `units`, the number of results by kind; `models`, by name, the `commit` of the hub and the
        tokens that are put before each text.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    units, models = [], {}
    for path in dict.fromkeys(Path(json.loads(line)) for line in lines):
        record = read_computed(path)
        if not record:
            continue
        unit = json.loads((path / "key.json").read_text(encoding="utf-8"))["unit"]
        trained = record.pop("trained", None) or {}
        for name, one in (("finetune", trained), (unit, record)):
            kept = {
                key: one[key] for key in ("versions", "hardware", "device", "date") if key in one
            }
            units += [({"unit": name}, kept)] if kept else []
            if "tokenizer" in one:
                before = [token["token"] for token in one["tokenizer"]["kept"]]
                models[one["model"]] = {"commit": one["commit"], "before": before}
    groups = group_records(units)
    for group in groups:
        group["units"] = dict(Counter(unit["unit"] for unit in group["units"]))
    return {"computed": groups, "models": models}
