"""Linear layers in float32 on a CPU, by oneDNN, which lays out their weights once.

    with packed_layers(model, tokens=4096):  # how many tokens will go through
        logits = model(**inputs).logits

Torch hands float32 linear layers to MKL. oneDNN, which torch also contains, is faster on weights
that it has laid out beforehand: by a tenth on one processor, 1.8 times on another. Its operators
are private to torch, and named in this file alone: they are compared with torch's own, and not used
where they are missing or differ. Both ways agree to 5e-6 nats, so free memory and the number of
tokens may choose between them. In bfloat16, every layer is torch's own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from paramspec.execution.limits import available_memory, is_out_of_memory

WORTH_PACKING = 512  # laying out a weight costs what it saves on some 150 tokens


@contextmanager
def packed_layers(model: PreTrainedModel, *, tokens: int) -> Iterator[None]:
    """`with packed_layers(model, tokens=4096): model(...)`: faster for many tokens.

    Weights must not change within the block. The unembedding is left unchanged.
    """
    worth = model.dtype == torch.float32 and tokens >= WORTH_PACKING
    with ExitStack() as stack:
        try:
            for module in _linear_layers(model) if worth and packs() else ():
                gpt2 = type(module) is Conv1D  # whose weights are transposed
                weight = module.weight.T.contiguous() if gpt2 else module.weight
                module.forward = functools.partial(_run_packed, _pack(weight), module.bias)
                stack.callback(delattr, module, "forward")
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise  # otherwise the remaining layers are left unchanged
        yield


def _linear_layers(model: PreTrainedModel) -> list[Any]:
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if size >= available_memory() / 2:  # a second copy would leave less than half of it free
        return []
    return [
        module
        for module in model.modules()
        if type(module) in (nn.Linear, Conv1D)
        and module.weight.device.type == "cpu"
        and module is not model.get_output_embeddings()
        # accelerate keeps a forward of its own on each module that it has placed.
        and "forward" not in vars(module)
    ]


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def _run_packed(packed: Tensor, bias: Tensor | None, states: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")


@functools.cache
@torch.no_grad()
def packs() -> bool:
    """Whether torch has these operators on this processor, and they compute rightly."""
    draw = torch.Generator().manual_seed(0)
    states, weight = torch.randn(2, 256, 512, generator=draw)
    expected = nn.functional.linear(states, weight)
    try:
        off = (_run_packed(_pack(weight), None, states) - expected).abs().max()
    except (AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise  # it says nothing of the operators, and must not be remembered
        return False
    return bool(off <= 1e-5 * expected.abs().max())


def arithmetic(dtype: torch.dtype, device: str) -> str:
    """`arithmetic(torch.bfloat16, "cpu")`: as `"stock AVX512"`, part of every result's key.

    Machines with equal values compute the same, except for rounding in float32. In bfloat16, scores
    move with the processor (0.07 nats between AVX2 and AVX512), and with `row_tokens` and
    `batch_tokens`, which change the padding and are in the key, too; and with the engine, which
    follows from the model, the dtype and the processor. They keep all of their bits under another
    number of threads, other rows in a batch, and halves of a batch, which keep its padding.
    """
    if dtype == torch.float32 or device != "cpu":
        return "stock"
    matrices = torch.cpu.get_capabilities().get("amx_bf16")  # units with an order of their own
    return f"stock {torch.backends.cpu.get_cpu_capability()}{' AMX' if matrices else ''}"
