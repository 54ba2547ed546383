"""The same numbers from faster operators, put into a model for a while.

    with faster_layers(model, tokens=4096):  # how many tokens will go through
        logits = model(**inputs).logits

On a CPU two things are slower than they need be, and nothing is anywhere else. In float32, torch
hands linear layers to MKL, which leaves half of some processors unused; oneDNN, which torch has as
well, is faster on weights that it has laid out for itself beforehand. In bfloat16, torch's fused
attention converts back and forth; written as two batched products over the heads that share keys,
it takes less than half of the time.

oneDNN's operators are private to torch: they are tried first, held against torch's own and timed,
and left alone where they are missing, differ or do not pay.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import psutil
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from paramspec.batches import is_out_of_memory

# Laying out a weight costs what it saves on some 150 tokens.
WORTH_PACKING = 512
GROUPED = "paramspec_grouped"

Linear = Callable[[Tensor], Tensor]


@contextmanager
def faster_layers(model: PreTrainedModel, *, tokens: int, prepacked: bool = True) -> Iterator[bool]:
    """`with faster_layers(model, tokens=4096): model(...)`: faster where it pays, else as it was.

    Within the block attention takes additive masks alone. Weights must not change within it.

    Args:
        model: whose unembedding is left as it is, see `linear_of`.
        tokens: that will go through the model; for few of them nothing is packed.
        prepacked: False leaves the linear layers as they are.

    Yields:
        Whether linear layers are packed where they can be.
    """
    packing = prepacked and tokens >= WORTH_PACKING and _has_room(model)
    unembedding = model.get_output_embeddings()
    with ExitStack() as stack:
        for module in model.modules():
            # accelerate keeps a forward of its own on each module that it has placed.
            if packing and module is not unembedding and "forward" not in vars(module):
                try:
                    faster = _packed_forward(module)
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    packing = False  # what is left stays as it is
                    continue
                if faster is not None:
                    module.forward = faster
                    stack.callback(delattr, module, "forward")
        if _takes_grouped_attention(model):
            before = model.config._attn_implementation
            model.set_attn_implementation(GROUPED)
            stack.callback(model.set_attn_implementation, before)
        yield packing


def linear_of(weight: Tensor, bias: Tensor | None, *, prepacked: bool = True) -> Linear:
    """`linear_of(weight, bias)(states)`: a linear layer, packed where that is faster.

    Args:
        weight: `[out, in]`.
        bias: `[out]`, or None.
    """
    if prepacked and _packable(weight):
        packed = _pack(weight)
        return lambda states: _run_packed(states, packed, bias)
    return lambda states: nn.functional.linear(states, weight, bias)


# --- linear layers ------------------------------------------------------------------------------


def _packed_forward(module: nn.Module) -> Linear | None:
    if type(module) is nn.Linear and _packable(module.weight):
        return linear_of(module.weight, module.bias)
    if type(module) is Conv1D and _packable(module.weight):  # GPT-2 keeps its weights transposed
        return linear_of(module.weight.T.contiguous(), module.bias)
    return None


def _packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and packing_pays()


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def _run_packed(states: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")


def _has_room(model: nn.Module) -> bool:
    """Whether a second copy of the weights would leave half of the free memory free."""
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return size < psutil.virtual_memory().available / 2


@functools.cache
@torch.no_grad()
def packing_pays() -> bool:
    """`packing_pays()`: whether packed linear layers are here, right, and faster than torch's."""
    if not _packing_works():
        return False
    states, weight = _example()
    packed = _pack(weight)
    stock = _fastest(lambda: nn.functional.linear(states, weight))
    return _fastest(lambda: _run_packed(states, packed, None)) < 0.9 * stock


def _packing_works() -> bool:
    states, weight = _example()
    expected = nn.functional.linear(states, weight)
    try:
        ours = _run_packed(states, _pack(weight), None)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def _example() -> tuple[Tensor, Tensor]:
    """States `[256, 512]` and a weight `[256, 512]`."""
    draw = torch.Generator().manual_seed(0)
    states, weight = torch.randn(2, 256, 512, generator=draw)
    return states, weight


def _fastest(run: Callable[[], object], times: int = 7) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)


# --- attention ----------------------------------------------------------------------------------


def _takes_grouped_attention(model: PreTrainedModel) -> bool:
    weight = model.get_input_embeddings().weight
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    return model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation()


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention as `transformers.AttentionInterface` asks for it, a product for each key head.

    Args:
        query: `[batch, heads, tokens, size]`.
        key, value: `[batch, key heads, tokens, size]`, each of which serves `heads / key heads`
            query heads.
        attention_mask: additive, `[batch or 1, 1, tokens, tokens]`.
        scaling: of the scores.

    Returns:
        `[batch, tokens, heads, size]`, and no weights.
    """
    batch, heads, tokens, size = query.shape
    shared = key.shape[1]
    group = heads // shared
    bias = attention_mask[:, :, None].expand(batch, shared, group, tokens, tokens)
    scores = torch.baddbmm(
        bias.reshape(batch * shared, group * tokens, tokens),
        query.reshape(batch * shared, group * tokens, size),
        key.reshape(batch * shared, tokens, size).transpose(1, 2),
        alpha=scaling,
    )
    mixed = torch.bmm(scores.softmax(-1), value.reshape(batch * shared, tokens, size))
    return mixed.view(batch, heads, tokens, size).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
