"""The same numbers from faster operators, put into a model for a while.

    with faster_layers(model, tokens=4096):  # how many tokens will go through
        logits = model(**inputs).logits

On a CPU three things are slower than they need be, and nothing is anywhere else. In float32, torch
hands linear layers to MKL, which leaves half of some processors unused; oneDNN, which torch has as
well, is faster on weights that it has laid out for itself beforehand. A gated MLP goes through its
widest states four times; oneDNN applies activation and gate as it computes them. In bfloat16,
torch's fused attention converts back and forth; written as two batched products over the heads that
share keys, it takes a third of the time.

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
    with ExitStack() as stack:
        try:
            for module, forward in _packed_forwards(model) if packing else ():
                module.forward = forward
                stack.callback(delattr, module, "forward")
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            packing = False  # what is left stays as it is
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


def _packed_forwards(model: PreTrainedModel) -> Iterator[tuple[nn.Module, Linear]]:
    """Modules, and what is to be their forward pass."""
    done = {model.get_output_embeddings()}
    for module in model.modules():
        # accelerate keeps a forward of its own on each module that it has placed.
        if module in done or "forward" in vars(module):
            continue
        gated = _gated_forward(module)
        if gated is not None:
            done |= {module.gate_proj, module.up_proj}
            yield module, gated
        elif type(module) is nn.Linear and _packable(module.weight):
            yield module, linear_of(module.weight, module.bias)
        elif type(module) is Conv1D and _packable(module.weight):  # GPT-2's are transposed
            yield module, linear_of(module.weight.T.contiguous(), module.bias)


def _gated_forward(module: nn.Module) -> Linear | None:
    """Of a gated MLP up to its down projection: activation and product with their linear layers.

    In float32 the two take as long as one of the three linear layers, by themselves.
    """
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(type(part) is nn.Linear and "forward" not in vars(part) for part in parts):
        return None
    gate, up, down = parts
    activation = _fused_activation(getattr(module, "act_fn", None))
    if activation is None or not _packable(gate.weight) or not _packable(up.weight):
        return None
    gate_weight, up_weight = _pack(gate.weight), _pack(up.weight)

    def forward(states: Tensor) -> Tensor:
        active = _run_packed(states, gate_weight, gate.bias, *activation)
        return down(
            _operators()._linear_pointwise.binary(states, active, up_weight, up.bias, "mul")
        )

    example = gate.weight[:4]  # of the states' width
    expected = module(example)
    error = (forward(example) - expected).abs().max()
    return forward if error <= _tolerance(gate.weight) * expected.abs().max() else None


def _fused_activation(function: object) -> tuple[str, str] | None:
    """What oneDNN calls an activation, and its algorithm; None for others than these two."""
    known = {
        ("swish", ""): nn.functional.silu,
        ("gelu", "tanh"): functools.partial(nn.functional.gelu, approximate="tanh"),
    }
    points = torch.linspace(-5, 5, 31)
    for name, own in known.items() if callable(function) else ():
        if torch.allclose(function(points), own(points), rtol=0, atol=1e-6):
            return name
    return None


def _packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and packing_pays(weight.dtype)


def _operators() -> object:
    return torch.ops.mkldnn


def _pack(weight: Tensor) -> Tensor:
    return _operators()._reorder_linear_weight(weight.detach())


def _run_packed(
    states: Tensor, packed: Tensor, bias: Tensor | None, activation: str = "none", way: str = ""
) -> Tensor:
    return _operators()._linear_pointwise(states, packed, bias, activation, [], way)


def _has_room(model: nn.Module) -> bool:
    """Whether a second copy of the weights would leave half of the free memory free."""
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return size < psutil.virtual_memory().available / 2


@functools.cache
@torch.no_grad()
def packing_pays(dtype: torch.dtype) -> bool:
    """`packing_pays(torch.float32)`: whether packed layers are here, right, and the faster ones."""
    if not _packing_works(dtype):
        return False
    states, weight = _example(dtype)
    packed = _pack(weight)
    stock = _fastest(lambda: nn.functional.linear(states, weight))
    return _fastest(lambda: _run_packed(states, packed, None)) < stock


def _packing_works(dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    states, weight = _example(dtype)
    expected = nn.functional.linear(states, weight)
    try:
        error = (_run_packed(states, _pack(weight), None) - expected).abs().max()
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool(error <= _tolerance(weight) * expected.abs().max())


def _tolerance(weight: Tensor) -> float:
    return 1e-5 if weight.dtype == torch.float32 else 2e-2


def _example(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """States `[256, 512]` and a weight `[256, 512]`."""
    draw = torch.Generator().manual_seed(0)
    states, weight = torch.randn(2, 256, 512, generator=draw).to(dtype)
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
    # Over so few keys torch's softmax is three times as fast in float32.
    weights = scores.float().softmax(-1).to(value.dtype)
    mixed = torch.bmm(weights, value.reshape(batch * shared, tokens, size))
    return mixed.view(batch, heads, tokens, size).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
