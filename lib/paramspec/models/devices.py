"""Where weights are held, and as what.

device, dtype = place_and_dtype("auto", "auto")
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from paramspec.errors import InputError
from paramspec.execution.limits import memory

if TYPE_CHECKING:
    import torch


DTYPES = ("auto", "float32", "bfloat16")


def place_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """`place_and_dtype("auto", "auto")`: what `load_model` would take on this machine.

    Raises:
        InputError: if there is no such device or dtype here.
    """
    place = _device(device)
    return place, _dtype(dtype, place)


def _device(device: str) -> torch.device:
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]*))?", device):
        raise InputError(f"device {device!r}: unknown; use auto, cpu, cuda or cuda:0")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r}: no usable GPU on this machine; use cpu")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {device!r}: this machine has {torch.cuda.device_count()} GPUs; count from 0"
        )
    return place


def _dtype(dtype: str, place: torch.device) -> torch.dtype:
    import torch

    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: unknown; use {', '.join(DTYPES)}")
    if place.type == "cpu":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    capable = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not capable:
        raise InputError(f"dtype 'bfloat16': {place} does not compute in it; use float32")
    return torch.bfloat16 if dtype != "float32" and capable else torch.float32


def device_map(needed: int, place: torch.device) -> dict:
    """How to place `needed` bytes of weights: on the CPU, on one GPU, or over all GPUs.

    A tenth is left for what a forward pass needs. Nothing is put off to CPU or disk behind a GPU,
    where weights could not be read as value vectors.
    """
    import torch

    if place.type == "cpu":
        if needed > memory():
            raise InputError(
                f"device 'cpu': the weights need {needed / 1e9:.0f} GB, this process may use "
                f"{memory() / 1e9:.0f} GB; use a GPU, bfloat16 or a smaller model"
            )
        return {}
    torch.cuda.empty_cache()  # what models before this one have left, the driver counts as used
    free = {
        index: int(0.9 * torch.cuda.mem_get_info(index)[0])
        for index in range(torch.cuda.device_count())
    }
    single = place.index if place.index is not None else torch.cuda.current_device()
    if needed <= free[single]:
        return {"device_map": {"": single}}
    if place.index is None and needed <= sum(free.values()):
        return {"device_map": "auto", "max_memory": free}
    room = free[single] if place.index is not None else sum(free.values())
    raise InputError(
        f"device {str(place)!r}: the weights need {needed / 1e9:.0f} GB, {room / 1e9:.0f} GB are "
        "free; use more GPUs, bfloat16 or a smaller model"
    )
