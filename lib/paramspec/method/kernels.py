"""The same numbers from faster operators, put into a model for a while.

    with faster_layers(model, tokens=4096):  # how many tokens will go through
        logits = model(**inputs).logits

On a CPU three things are slower than they need be, and nothing is anywhere else. Torch hands linear
layers to MKL or lays out their weights at each call; oneDNN, which torch has as well, is faster on
weights that it has laid out for itself beforehand. A gated MLP goes through its widest states four
times; oneDNN applies activation and gate as it computes them. And a decoder layer goes through all
else in many small steps, with attention over every pair of tokens of a row, when in a forest a
token has but a few ancestors: see `_Decoder`.

oneDNN's operators are private to torch: they are tried first and held against torch's own, and left
alone where they are missing or differ.

What is computed with which operator depends on the dtype and on what the processor can do, never on
a stopwatch; see `arithmetic`. In float32 both ways agree to 5e-6 nats, so that free memory and the
number of tokens may choose between them. In bfloat16 they differ by up to 0.1 nats, as rounding in
either of them does: there layers are packed whatever the number of tokens, or memory does not
suffice and that is an error. On one processor these leave every bit of a bfloat16 score as it is:
the number of threads, other batches beside a row, and halving a batch, whose halves keep its
padding. These move it, and are part of a result's key: `row_tokens`, `batch_tokens` (padding
changes with them), and the processor (padded rows of a model's own attention differ by 0.07 nats
between AVX2 and AVX512). The engine moves it as much as packing does; it follows from the model,
the dtype and the processor, see `choose_engine`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from paramspec.execution.limits import OutOfMemory, available_memory, is_out_of_memory
from paramspec.method.rows import round_up

# Laying out a weight costs what it saves on some 150 tokens. In float32; see above.
WORTH_PACKING = 512
# Queries that attend to the same keys: fewer have fewer ancestors, and more make larger products.
BLOCK_QUERIES = 32
KEY_MULTIPLE = 16  # of the keys: oneDNN compiles code for each number of them

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Faster:
    """What `faster_layers` has made faster.

    Attributes:
        packs: whether linear layers are packed where they can be.
    """

    packs: bool
    _last: _Decoder | None

    def read_only(self, places: Tensor) -> bool:
        """Of the model's next states, leave out all but those at `places`, `[batch or 1, n]`.

        Returns:
            Whether that is done: then the states are `[batch, n, hidden]`.
        """
        if self._last is None:
            return False
        self._last.places = places
        return True


@contextmanager
def faster_layers(
    model: PreTrainedModel, *, tokens: int, prepacked: bool = True
) -> Iterator[Faster]:
    """`with faster_layers(model, tokens=4096): model(...)`: faster where it pays, else as it was.

    Within the block attention takes additive masks alone. Weights must not change within it.

    Args:
        model: whose unembedding is left as it is, see `linear_of`.
        tokens: that will go through the model; for few of them, in float32, nothing is packed.
        prepacked: False leaves the linear layers as they are.

    Yields:
        What has become faster.

    Raises:
        OutOfMemory: in bfloat16, if there is no room for the packed layers.
    """
    dtype = model.dtype
    packing = prepacked and packs(dtype)
    if dtype == torch.float32:
        packing = packing and tokens >= WORTH_PACKING and _has_room(model)
    last = None
    with ExitStack() as stack:
        try:
            for module, forward in _packed_forwards(model) if packing else ():
                module.forward = forward
                stack.callback(delattr, module, "forward")
                last = forward if isinstance(forward, _Decoder) else last
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if dtype != torch.float32:
                raise OutOfMemory(
                    f"{type(model).__name__}: out of memory for the packed copy of its bfloat16 "
                    "weights, which takes as much again as they do; use float32, which can do "
                    "without, a smaller model or fewer --jobs side by side"
                ) from error
            packing, last = False, None  # what is left stays as it is
        yield Faster(packing, last)


def linear_of(
    weight: Tensor, bias: Tensor | None, *, prepacked: bool = True, copied: bool = True
) -> Linear:
    """`linear_of(weight, bias)(states)`: a linear layer, packed where that can be.

    Args:
        weight: `[out, in]`.
        bias: `[out]`, or None.
        copied: False packs the weight at each call, to the same numbers and without a copy of it.
    """
    if prepacked and _packable(weight):
        packed = _pack(weight) if copied else weight.detach()
        return lambda states: _run_packed(states, packed, bias)
    return lambda states: nn.functional.linear(states, weight, bias)


# --- linear layers ------------------------------------------------------------------------------


def _packed_forwards(model: PreTrainedModel) -> Iterator[tuple[Any, Callable[..., Tensor]]]:
    """Modules, and what is to be their forward pass."""
    done: set[Any] = {model.get_output_embeddings()}
    for layer, decoder in _decoders(model):
        done |= {part for part in layer.modules() if part is not layer.mlp.down_proj}
        yield layer, decoder
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


def _gated_forward(module: Any) -> Linear | None:
    """Of a gated MLP up to its down projection: activation and product with their linear layers.

    In float32 the two take as long as one of the three linear layers, by themselves.
    """
    parts: list[Any] = [
        getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")
    ]
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


def _fused_activation(function: Any) -> tuple[str, str] | None:
    """What oneDNN calls an activation, and its algorithm; None for others than these two."""
    known: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
        ("swish", ""): nn.functional.silu,
        ("gelu", "tanh"): functools.partial(nn.functional.gelu, approximate="tanh"),
    }
    points = torch.linspace(-5, 5, 31)
    for name, own in known.items() if callable(function) else ():
        if torch.allclose(function(points), own(points), rtol=0, atol=1e-6):
            return name
    return None


def _packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and packs(weight.dtype)


def _operators() -> Any:
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
    return size < available_memory() / 2


def arithmetic(dtype: torch.dtype, device: str) -> str:
    """`arithmetic(torch.bfloat16, "cpu")`: as `"packed AVX512"`, part of every result's key.

    Machines that say the same compute the same, but for rounding in float32. Everything else that
    decides it is in the key, too: the dtype, the kind of device, the versions of libraries.

    Args:
        device: its kind, `cpu` or `cuda`.
    """
    if dtype == torch.float32 or device != "cpu":
        return "stock"
    way = "packed" if packs(dtype) else "stock"
    matrices = torch.cpu.get_capabilities().get("amx_bf16")  # units with an order of their own
    return f"{way} {torch.backends.cpu.get_cpu_capability()}{' AMX' if matrices else ''}"


@functools.cache
@torch.no_grad()
def packs(dtype: torch.dtype) -> bool:
    """`packs(torch.bfloat16)`: whether this processor has packed layers, and they are right."""
    return _packing_works(dtype)


def _packing_works(dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    states, weight = _example(dtype)
    expected = nn.functional.linear(states, weight)
    try:
        off = (_run_packed(states, _pack(weight), None) - expected).abs().max()
    except (AttributeError, RuntimeError) as error:  # of a processor, or a torch, without them
        if is_out_of_memory(error):
            raise
        return False
    return bool(off <= _tolerance(weight) * expected.abs().max())


def _tolerance(weight: Tensor) -> float:
    return 1e-5 if weight.dtype == torch.float32 else 2e-2


def _example(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """States `[256, 512]` and a weight `[256, 512]`."""
    draw = torch.Generator().manual_seed(0)
    states, weight = torch.randn(2, 256, 512, generator=draw).to(dtype)
    return states, weight


# --- decoder layers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """Attention over a few keys: a block of queries, and the keys that any of them attends to.

    Tokens are counted through the batch, and a head of a token is a row of the states `[rows,
    size]` that are given; so one gathering brings a head's queries and keys side by side.

    Attributes:
        queries: rows of the states, `[blocks * key heads * group * queries]`, where `group` query
            heads share a key head.
        keys, values: rows, `[blocks * key heads * keys]`.
        outputs: where a head of a token is in what `queries` brings together.
        bias: additive, `[blocks * key heads, group * queries, keys]`.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    outputs: Tensor
    bias: Tensor

    @classmethod
    def of(cls, mask: Tensor, batch: int, heads: int, shared: int) -> _Blocks:
        """`_Blocks.of(mask, batch, heads, shared)`: `shared` key heads, behind the query heads.

        Args:
            mask: additive, `[batch or 1, 1, tokens, tokens]`.
            batch: of the states.
        """
        tokens = mask.shape[-1]
        size = BLOCK_QUERIES
        count = math.ceil(tokens / size)
        # Queries beyond the last token see nothing, and nobody reads them.
        lowest = torch.finfo(mask.dtype).min
        bias = nn.functional.pad(mask[:, 0], (0, 0, 0, count * size - tokens), value=lowest)
        bias = bias.unflatten(1, (count, size))
        seen = (bias > lowest).any(2)  # [masks, blocks, tokens]
        most = min(tokens, round_up(int(seen.sum(-1).max()), KEY_MULTIPLE))
        keys = seen.byte().argsort(dim=-1, descending=True, stable=True)[..., :most]
        bias = bias.gather(-1, keys[:, :, None].expand(-1, -1, size, -1))
        group, every = heads // shared, heads + shared

        places = torch.arange(count * size).clamp(max=tokens - 1).view(count, 1, 1, size)
        head = torch.arange(heads).view(shared, group, 1)
        row = torch.arange(batch)
        first = (row * tokens).view(-1, 1, 1, 1)
        keyed = first + keys[:, :, None]  # [batch, blocks, 1, keys]
        behind = heads + torch.arange(shared)[:, None]
        token = torch.arange(tokens)
        block, place = token // size, token % size
        start = (row[:, None] * count + block)[..., None] * heads + torch.arange(heads)
        return cls(
            queries=((first[..., None] + places) * every + head).flatten(),
            keys=(keyed * every + behind).flatten(),
            values=(keyed * (every + shared) + behind + shared).flatten(),
            outputs=(start * size + place[:, None]).flatten(),
            bias=bias[:, :, None, None]
            .expand(batch, -1, shared, group, -1, -1)
            .reshape(-1, group * size, most),
        )

    def attend(self, rotated: Tensor, merged: Tensor, scaling: float) -> Tensor:
        """`[rows, size]`, a row for each head of each token.

        Args:
            rotated: queries and keys, `[rows, size]`.
            merged: queries, keys and values, `[rows, size]`.
        """
        (pairs, queries, keys), size = self.bias.shape, merged.shape[-1]
        query = rotated.index_select(0, self.queries).view(pairs, queries, size)
        key = rotated.index_select(0, self.keys).view(pairs, keys, size)
        value = merged.index_select(0, self.values).view(pairs, keys, size)
        scores = torch.baddbmm(self.bias, query, key.transpose(1, 2), alpha=scaling)
        # Over so few keys torch's softmax is three times as fast in float32.
        weights = scores.float().softmax(-1).to(value.dtype)
        return torch.bmm(weights, value).view(-1, size).index_select(0, self.outputs)


class _Layout(NamedTuple):
    """What the layers share: attention, and the rotation of each head by a token's position."""

    blocks: _Blocks
    cos: Tensor
    sin: Tensor


@dataclass
class _Layouts:
    """The layouts that were asked for last, of `heads` query heads over `shared` key heads."""

    heads: int
    shared: int
    _known: list[tuple[Tensor, int, _Layout]] = field(default_factory=list)

    def of(self, mask: Tensor, batch: int, turns: tuple[Tensor, Tensor]) -> _Layout:
        for known, rows, layout in self._known:
            if known is mask and rows == batch:
                return layout
        cos, sin = turns
        half = cos.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)  # of what is swapped
        every = (-1, -1, self.heads + self.shared, -1)
        layout = _Layout(
            _Blocks.of(mask, batch, self.heads, self.shared),
            *(each[:, :, None].expand(every).contiguous() for each in (cos, sin)),
        )
        self._known = [*self._known[-3:], (mask, batch, layout)]
        return layout


class _Decoder:
    """A layer as LLaMA's, Mistral's and Qwen2's are, in fewer steps.

    One linear layer for queries, keys and values; queries and keys rotated together; attention by
    `_Blocks`. The states between layers are float32: in bfloat16 each sum would be rounded, which
    is a third of all that its log-likelihoods are off.
    """

    def __init__(self, layer: Any, layouts: _Layouts, mlp: Linear, last: bool) -> None:
        attention = layer.self_attn
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        biases = [part.bias for part in parts]
        self._merged = linear_of(
            torch.cat([part.weight for part in parts]),
            None if biases[0] is None else torch.cat(biases),
        )
        self._out = linear_of(attention.o_proj.weight, attention.o_proj.bias)
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self._size, self._scaling = attention.head_dim, attention.scaling
        self._layouts, self._mlp, self._last = layouts, mlp, last
        self.places: Tensor | None = None  # what is computed after attention; all if None

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **_: object,
    ) -> Tensor:
        batch, tokens = hidden_states.shape[:2]
        layout = self._layouts.of(attention_mask, batch, position_embeddings)
        states = self._norm(0, hidden_states)
        merged = self._merged(states).view(batch, tokens, -1, self._size)
        turned = merged[:, :, : -self._layouts.shared]
        swapped = turned.roll(self._size // 2, dims=-1)
        rotated = (turned * layout.cos).addcmul_(swapped, layout.sin)
        rotated, merged = rotated.reshape(-1, self._size), merged.reshape(-1, self._size)
        mixed = layout.blocks.attend(rotated, merged, self._scaling).view(batch, tokens, -1)
        if self.places is not None:
            row = torch.arange(batch)[:, None]
            mixed, hidden_states = mixed[row, self.places], hidden_states[row, self.places]
        hidden_states = hidden_states.float() + self._out(mixed)
        added = self._mlp(self._norm(1, hidden_states))
        if added.shape == hidden_states.shape:
            hidden_states.add_(added)
        else:
            hidden_states = hidden_states + added  # a row becomes several, where masks part
        return hidden_states.to(added.dtype) if self._last else hidden_states

    def _norm(self, number: int, states: Tensor) -> Tensor:
        """Over the root of the mean square, times a weight."""
        norm = self._norms[number]
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length.square() / states.shape[-1] + norm.variance_epsilon).rsqrt()
        return (states * scale).to(norm.weight.dtype).mul_(norm.weight)


def _decoders(model: PreTrainedModel) -> list[tuple[Any, _Decoder]]:
    """The decoder layers, and what computes the same: all or none.

    A layer of the model's own does not take the float32 states between them.
    """
    layers = getattr(model.base_model, "layers", ())
    if not layers or not all(_has_shape(layer) for layer in layers):
        return []
    config = model.config.get_text_config(decoder=True)
    layouts = _Layouts(config.num_attention_heads, config.num_key_value_heads)
    decoders = []
    for number, layer in enumerate(layers):
        gated = _gated_forward(layer.mlp)
        if gated is None:
            return []
        decoder = _Decoder(layer, layouts, gated, last=number == len(layers) - 1)
        if number == 0 and not _is_alike(model, layer, decoder):
            return []
        decoders.append((layer, decoder))
    return decoders


def _has_shape(layer: Any) -> bool:
    """Whether a layer consists of what `_Decoder` takes it to consist of."""
    parts = {name for name, _ in layer.named_children()}
    if parts != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    attention = dict(layer.self_attn.named_children())
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return (
        set(attention) == {"q_proj", "k_proj", "v_proj", "o_proj"}
        and all(type(part) is nn.Linear and _packable(part.weight) for part in attention.values())
        and not any("forward" in vars(part) for part in layer.modules())
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
    )


def _is_alike(model: PreTrainedModel, layer: Any, decoder: _Decoder) -> bool:
    """Whether a layer gives the same, on tokens that see every other one before them."""
    inner: Any = model.base_model
    weight = cast("Tensor", model.get_input_embeddings().weight)
    example = weight[None, :12]
    tokens = example.shape[1]
    try:
        place = torch.arange(tokens)
        turns = inner.rotary_emb(example, place[None])
        back = place[:, None] - place
        sees = (back >= 0) & (back % 2 == 0)
        mask = torch.zeros(1, 1, tokens, tokens, dtype=example.dtype)
        mask.masked_fill_(~sees, torch.finfo(mask.dtype).min)
        given = {"attention_mask": mask, "position_embeddings": turns}
        expected = layer(example, **given)
        error = (decoder(example, **given) - expected).abs().max()
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return False
    return bool(error <= _tolerance(example) * expected.abs().max())
