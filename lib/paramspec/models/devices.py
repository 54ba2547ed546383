"""Where weights are held, and as what.

device, dtype = place_and_dtype("auto", "auto")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paramspec.errors import InputError
from paramspec.execution.limits import memory

if TYPE_CHECKING:
    import torch


DTYPES = ("auto", "float32", "bfloat16")


def place_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """`place_and_dtype("auto", "auto")`: what `load_model` would take on this machine."""
    import torch

    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if usable else "cpu"
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: unknown; use {', '.join(DTYPES)}")
    known = ["cpu", *(["cuda"] if usable else []), *(f"cuda:{index}" for index in range(usable))]
    if device not in known:
        raise InputError(f"device {device!r}: not on this machine; use auto, {', '.join(known)}")
    place = torch.device(device)
    if place.type == "cpu":
        return place, torch.bfloat16 if dtype == "bfloat16" else torch.float32
    capable = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not capable:
        raise InputError(f"dtype 'bfloat16': {place} does not compute in it; use float32")
    return place, torch.bfloat16 if capable and dtype != "float32" else torch.float32


def device_map(needed: int, place: torch.device) -> dict:
    """`from_pretrained(..., **device_map(needed, place))`: where `needed` bytes of weights go.

    Over all GPUs where `place` names none and one has no room; a tenth is left for forward passes.
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
    single = torch.cuda.current_device() if place.index is None else place.index
    if place.index is not None or needed <= free[single]:
        return {"device_map": {"": single}}
    return {"device_map": "auto", "max_memory": free}
