"""The value-vector view of a causal language model: find it, read it, record, mask, train it.

    with mask_value_vectors(value_vector_view(model), keep):  # bool [layers, batch, width]
        logits = model(**tokens).logits

The output of an MLP is `sum_j m_j v_j` (plus a bias): `v_j`, a column of the down projection, is
a *value vector*, and `m_j`, the j-th input of the down projection, is its *coefficient* (Geva et
al. 2021; paper, section 2). Hooks sit on the inputs of the down projections, so that a fused or a
gated first half of the MLP makes no difference, and are removed when the `with` block ends.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from paramspec.errors import InputError, naming

Position = Literal["mean", "last"]

OWN = "PARAMSPEC_DOWN_PROJECTION"  # a name of one's own, instead of these
# Where a decoder layer keeps its down projection, by family.
DOWN_PROJECTIONS = (
    "mlp.down_proj",  # Llama, Mistral, Qwen, Gemma, OLMo, Phi-3, GLM-4, Granite, Cohere, StableLM
    "mlp.fc2",  # Phi
    "fc2",  # OPT: on the layer itself
    "mlp.c_proj",  # GPT-2
    "mlp.dense_4h_to_h",  # GPT-NeoX, BLOOM, Falcon
    "mlp.fc_out",  # GPT-J
    "ffn.down_proj",  # MPT
    "feed_forward.w2",  # LFM2
    "feed_forward.down_proj",  # Falcon-H1
    "mlp_block.down_proj",  # RecurrentGemma
    "mlp.Wo",  # ModernBERT's decoder
)


@dataclass(frozen=True)
class ValueVectorView:
    """The down projections of a model, one per layer: modules and their dotted names.

    `width` is the number of value vectors in a layer, `hidden` the length of each. `ablated`,
    `[layers, width]`, is what a mask sets coefficients to; None stands for zero.
    """

    model: PreTrainedModel
    modules: tuple[nn.Linear | Conv1D, ...]
    names: tuple[str, ...]
    width: int
    hidden: int
    ablated: Tensor | None = None

    @property
    def layers(self) -> int:
        return len(self.modules)

    @property
    def embedding(self) -> Tensor:
        """The input embedding, `[vocabulary, hidden size]`; tokens go to its device."""
        return cast("Tensor", self.model.get_input_embeddings().weight)

    @property
    def readable(self) -> bool:
        """Whether the value vectors are numbers: quantized ones can be masked, and not be read."""
        shape = {(self.width, self.hidden), (self.hidden, self.width)}
        weights = [getattr(module, "weight", None) for module in self.modules]
        return all(
            isinstance(one, Tensor) and one.is_floating_point() and one.shape in shape
            for one in weights
        )

    def vectors(self, layer: int) -> Tensor:
        """`view.vectors(3)`: the value vectors of a layer, `[width, hidden]`, not a copy."""
        if not self.readable:
            raise InputError(
                f"{self.names[layer]}: quantized, so that its value vectors can be masked, and not "
                "be read or trained; use the model's plain weights"
            )
        # A Linear keeps its inputs as columns, GPT-2's Conv1D as rows.
        module = self.modules[layer]
        return module.weight if isinstance(module, Conv1D) else module.weight.T


def _sizes(module: Any) -> tuple[int, int] | None:
    """The inputs and outputs of a linear layer, quantized or not; None of anything else."""
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return inputs, outputs
    ends: list[Any] = [getattr(module, f"{end}_features", None) for end in ("in", "out")]
    return None if None in ends else (ends[0], ends[1])


def value_vector_view(model: PreTrainedModel) -> ValueVectorView:
    """`view = value_vector_view(model)`: find the value vectors of any causal LM, and verify them.

    >>> from transformers import AutoModelForCausalLM
    >>> view = value_vector_view(AutoModelForCausalLM.from_pretrained("my-checkpoint/"))
    >>> view.layers, view.width, view.names[0]
    (3, 48, 'model.layers.0.mlp.down_proj')

    The view is found by the names above, then compared with one forward pass: every down
    projection runs once, its output is the sum of coefficients times value vectors plus the bias,
    and the MLP's output equals it, plus at most a residual that the MLP was given.

    Raises:
        InputError: if the model is a mixture of experts, if a layer has no down projection of a
            known name (or of that in the variable PARAMSPEC_DOWN_PROJECTION), or if the forward
            pass contradicts the view. The weights of quantized layers are not compared.
    """
    view = unverified_view(model)
    with naming(type(model).__name__):
        _verify(view)
    return view


def unverified_view(model: PreTrainedModel) -> ValueVectorView:
    """`unverified_view(model)`: found by name and shape alone, also without weights."""
    with naming(type(model).__name__):
        found = _find_down_projections(model)
        shapes = {sizes for module in found.values() if (sizes := _sizes(module))}
        if len(shapes) > 1:
            raise InputError(f"layers differ in width ({sorted(shapes)}); use a model of one width")
    (width, hidden), *_ = shapes
    return ValueVectorView(model, tuple(found.values()), tuple(found), width, hidden)


def _find_down_projections(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    modules: dict[str, Any] = dict(model.named_modules())
    for name in modules:
        if name.rpartition(".")[2] == "experts":
            raise InputError(
                "a mixture of experts is not supported: a router decides which tokens meet the "
                f"value vectors in {name}; use a dense model"
            )
    stacks = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    own = os.environ.get(OWN)
    for stack, suffix in itertools.product(stacks, (own,) if own else DOWN_PROJECTIONS):
        names = [f"{stack}.{index}.{suffix}" for index in range(layers)]
        if all(_sizes(modules.get(name)) for name in names):
            return {name: modules[name] for name in names}
    first = [f"{stack}.0." for stack in stacks]
    linear = [
        name.removeprefix(stack)
        for stack in first
        for name, module in modules.items()
        if name.startswith(stack) and _sizes(module)
    ]
    raise InputError(
        f"no down projection {own or 'of a known name'} in its {layers} layers; give its name "
        f"within a layer by --down-projection: {', '.join(linear) or 'no linear layer is there'}"
    )


@torch.no_grad()
def _verify(view: ValueVectorView) -> None:
    """Compare the view with one forward pass, on two short rows of tokens."""
    parents = [name.rpartition(".")[0] for name in view.names]
    # OPT has no MLP module: its down projection is on the layer itself.
    own = not parents[0].rpartition(".")[2].isdigit()
    mlps = [view.model.get_submodule(parent) for parent in parents] if own else []
    # Of each call of a module: the tensors that go in, and the first that comes out.
    calls: dict[nn.Module, list[tuple[list[Tensor], Tensor]]] = defaultdict(list)

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        output = output if isinstance(output, Tensor) else output[0]
        # A copy: Falcon adds its attention to the output of the MLP in place.
        calls[module].append((given, output.clone()))

    with ExitStack() as stack:
        for module in (*view.modules, *mlps):
            stack.enter_context(module.register_forward_hook(note, with_kwargs=True))
        places = torch.arange(10, device=view.embedding.device)
        tokens = (places * 7 + 3).remainder(len(view.embedding)).reshape(2, 5)
        view.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)

    tolerance = 1e-4 if view.embedding.dtype == torch.float32 else 2e-2
    for layer, (name, projection) in enumerate(zip(view.names, view.modules, strict=True)):
        if len(calls[projection]) != 1:
            raise InputError(f"{name} does not run exactly once in a forward pass")
        ((coefficients, *_), output) = calls[projection][0]
        if view.readable:
            expected = coefficients.float() @ view.vectors(layer).float()
            if (bias := getattr(projection, "bias", None)) is not None:
                expected += bias.float()
            sums = "the sum of coefficients times value vectors"
            _expect_equal(name, sums, output, expected, tolerance)
        for given, mlp_output in calls[mlps[layer]] if mlps else ():
            if output.numel() != mlp_output.numel():
                raise InputError(
                    f"{name} gives {output.shape[-1]} numbers, and its MLP {mlp_output.shape[-1]}; "
                    "the value-vector view does not hold for this model"
                )
            ways = [output.reshape(mlp_output.shape)]
            ways += [ways[0] + each for each in given if each.shape == mlp_output.shape]
            best = min(ways, key=lambda way: float((mlp_output - way).abs().max()))
            _expect_equal(name, "the output of its MLP", mlp_output, best, tolerance)


def _expect_equal(
    name: str, other: str, actual: Tensor, expected: Tensor, tolerance: float
) -> None:
    actual, expected = actual.float(), expected.float()
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-12))
    if not error <= tolerance:  # also when it is nan
        raise InputError(
            f"the output of {name} differs from {other} by {error:.1e} (relative); the "
            "value-vector view does not hold for this model"
        )


@contextmanager
def record_coefficients(
    view: ValueVectorView,
    tokens_kept: Tensor,
    position: Position = "mean",
    *,
    signed: bool = False,
) -> Iterator[Tensor]:
    """`with record_coefficients(view, attention_mask) as coefficients: model(...)`.

    >>> tokens = torch.tensor([[3, 4, 5]])
    >>> with record_coefficients(view, torch.ones_like(tokens)) as coefficients:
    ...     output = view.model(tokens)
    >>> coefficients.shape == (1, view.layers, view.width)
    True

    Args:
        view: the model's value vectors.
        tokens_kept: `[batch, tokens]`, non-zero at the prompt's tokens (one or more), zero at
            padding.
        position: reduce absolute coefficients to their `mean` over those tokens, or take the
            `last` of them.
        signed: coefficients as they are, rather than absolute.

    Yields:
        fp32 `[batch, layers, width]`, filled by one forward pass, nan until then. Coefficients are
        reduced inside the hooks, so that `[batch, tokens, width]` is never kept.
    """
    if position not in ("mean", "last"):
        raise InputError(f"position {position!r}: expected 'mean' or 'last'")
    kept = tokens_kept.bool()
    if position == "last":
        kept = kept & (kept.cumsum(dim=1) == kept.sum(dim=1, keepdim=True))
    weights = kept.float() / kept.sum(dim=1, keepdim=True)
    shape = len(kept), view.layers, view.width
    recorded = torch.full(shape, torch.nan, device=kept.device)

    def reduce(layer: int, _: nn.Module, args: tuple[Tensor]) -> None:
        inputs = args[0].reshape(*kept.shape, -1)  # OPT flattens batch and tokens
        # Padding may hold anything, even inf: leave it out before it is weighted.
        padding = ~kept.to(inputs.device)[..., None]
        values = inputs.detach().float().masked_fill(padding, 0)
        values = values if signed else values.abs()
        recorded[:, layer] = torch.einsum("bt,btw->bw", weights.to(inputs.device), values)

    with ExitStack() as stack:
        for layer, module in enumerate(view.modules):
            stack.enter_context(module.register_forward_pre_hook(partial(reduce, layer)))
        yield recorded


@contextmanager
def mask_value_vectors(view: ValueVectorView, keep: Tensor) -> Iterator[None]:
    """`with mask_value_vectors(view, keep): model(...)`: set coefficients to zero, or `ablated`.

    >>> tokens, keep = torch.tensor([[3, 4, 5]]), torch.ones(view.layers, 1, view.width).bool()
    >>> keep[0, 0, :10] = False
    >>> with mask_value_vectors(view, keep):
    ...     masked = view.model(tokens).logits
    >>> torch.equal(masked, view.model(tokens).logits)
    False

    Args:
        view: the model's value vectors.
        keep: bool `[layers, batch, width]`, False where a row's value vector is masked; a batch
            of 1 applies to every row. Under a batch of several, a single row of tokens becomes a
            row per mask at the first layer where one masks: layers below are computed once.

    Zeros are exact: zeroing the value vectors themselves would give the same bits.
    """
    fits = keep.ndim == 3 and keep.shape[::2] == (view.layers, view.width)
    if keep.dtype != torch.bool or not fits:
        raise InputError(
            f"keep: {keep.dtype} {list(keep.shape)}; expected torch.bool "
            f"[{view.layers}, batch, {view.width}]"
        )
    with ExitStack() as stack:
        for layer, module in enumerate(view.modules):
            if not keep[layer].all():
                tensors = itertools.chain(module.parameters(), module.buffers())
                device = next(tensors, view.embedding).device
                own = keep[layer, :, None].to(device)  # [batch, 1, width]
                value = torch.zeros(()) if view.ablated is None else view.ablated[layer]
                value = value.to(device, view.embedding.dtype)
                stack.enter_context(module.register_forward_pre_hook(partial(_masked, own, value)))
        yield


def _masked(keep: Tensor, value: Tensor, _: nn.Module, args: tuple[Tensor]) -> Tensor:
    """The inputs of a down projection, `value` where `keep` `[batch, 1, width]` is False."""
    (inputs,) = args
    # OPT flattens batch and tokens.
    rows = inputs if inputs.ndim == 3 else inputs.reshape(len(keep), -1, keep.shape[-1])
    # Values are written, not multiplied by: inf * 0 is nan.
    masked = torch.where(keep, rows, value)
    return masked if inputs.ndim == 3 else masked.reshape(-1, keep.shape[-1])


def mask_rows(
    view: ValueVectorView, keeps: Sequence[Tensor | None]
) -> AbstractContextManager[None]:
    """`with mask_rows(view, [keep, None]): model(...)`: a `[layers, width]` per row."""
    if all(keep is None for keep in keeps):
        return nullcontext()
    everything = torch.ones(view.layers, view.width, dtype=torch.bool)
    chosen = [everything if keep is None else keep for keep in keeps]
    return mask_value_vectors(view, torch.stack(chosen, dim=1))


@dataclass(frozen=True)
class TrainedVectors:
    """How far chosen value vectors have moved; `train_value_vectors` makes it.

    `offsets[str(layer)]` is a parameter, fp32 `[n, hidden]`; row i is of vector `chosen[layer][i]`.
    """

    view: ValueVectorView
    chosen: dict[int, Tensor]
    offsets: nn.ParameterDict

    @torch.no_grad()
    def merge(self) -> None:
        """Add the offsets to the model's own weights, in fp32, and start again at zero."""
        for layer, chosen in self.chosen.items():
            vectors, offset = self.view.vectors(layer), self.offsets[str(layer)]
            vectors[chosen] = (vectors[chosen].float() + offset).to(vectors.dtype)
            offset.zero_()


@contextmanager
def train_value_vectors(view: ValueVectorView, vectors: Tensor) -> Iterator[TrainedVectors]:
    """`with train_value_vectors(view, vectors) as trained: ...`: chosen vectors as parameters.

    `vectors` is int32 `[n, 2]`, each once. Every forward pass adds, for each, its coefficient times
    its offset, so that gradients and optimizer states are `[n, hidden]`; none of the model's own
    parameters should ask for a gradient. Without `merge`, the model is afterwards as it was.
    """
    _require_vectors(view, vectors)
    trained = TrainedVectors(view, {}, nn.ParameterDict())
    for layer in vectors[:, 0].unique().tolist():
        device = view.modules[layer].weight.device
        chosen = vectors[vectors[:, 0] == layer, 1].long().sort().values.to(device)
        trained.chosen[layer] = chosen
        trained.offsets[str(layer)] = torch.zeros(len(chosen), view.hidden, device=device)

    def add(layer: int, _: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        (inputs,) = args
        chosen, offset = trained.chosen[layer], trained.offsets[str(layer)]
        inputs = inputs.index_select(-1, chosen) if len(chosen) < view.width else inputs
        return output + inputs @ offset.to(inputs.dtype)

    with ExitStack() as stack:
        for layer in trained.chosen:
            stack.enter_context(view.modules[layer].register_forward_hook(partial(add, layer)))
        yield trained


@contextmanager
@torch.no_grad()
def replace_value_vectors(view: ValueVectorView, vectors: Tensor, values: Tensor) -> Iterator[None]:
    """`with replace_value_vectors(view, vectors, values): model(...)`: `values` `[n, hidden]`."""
    _require_vectors(view, vectors)
    before = []
    for layer in vectors[:, 0].unique().tolist():
        rows, own = vectors[:, 0] == layer, view.vectors(layer)
        chosen = vectors[rows, 1].long().to(own.device)
        before.append((own, chosen, own[chosen]))  # a copy
        own[chosen] = values[rows].to(own)
    try:
        yield
    finally:
        for own, chosen, values in before:
            own[chosen] = values


def _require_vectors(view: ValueVectorView, vectors: Tensor) -> None:
    view.vectors(0)  # refuses what cannot be read
    there = (vectors >= 0) & (vectors < torch.tensor([view.layers, view.width]))
    if not len(vectors.unique(dim=0)) == len(vectors) > 0 or not there.all():
        raise InputError(
            f"value vectors {vectors[:3].tolist()}...: expected at least one (layer, vector), each "
            f"once, of {view.layers} layers (from 0) of {view.width} value vectors"
        )


@contextmanager
def unembed_only(model: PreTrainedModel, places: Tensor) -> Iterator[None]:
    """Within the block, logits are `[1, n, vocabulary]`, at `places` `[n, 2]` of (row, token)."""

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows, tokens = places.to(args[0].device).T
        return (args[0][rows, tokens][None], *args[1:])

    with model.get_output_embeddings().register_forward_pre_hook(gather):
        yield


def refuse_too_long(view: ValueVectorView, tokens: int, what: str = "a question") -> None:
    """InputError if the model has no position for so many tokens."""
    config = view.model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise InputError(
            f"{what} of {tokens} tokens does not fit the model's context of {limit} tokens; "
            "shorten it"
        )


def require_numbers(view: ValueVectorView, values: Tensor, what: str) -> None:
    """InputError if the model gave inf or nan."""
    if not values.isfinite().all():
        raise InputError(
            f"{what} of {type(view.model).__name__} is not a finite number; the weights are "
            "damaged, or their dtype overflows: try float32"
        )
