"""The value-vector view of a causal language model: find it, read it, record, mask, train it.

    view = value_vector_view(model)
    with record_coefficients(view, tokens.attention_mask) as recorded:
        model(**tokens)
    recorded.coefficients  # [batch, layers, width]
    with mask_value_vectors(view, keep):  # keep: bool [layers, batch, width]
        logits = model(**tokens).logits
    with train_value_vectors(view, vectors) as trained:  # vectors: int32 [n, 2]
        optimizer = torch.optim.AdamW(trained.parameters())
        ...
        trained.merge()

The output of an MLP is `sum_j m_j v_j` (plus a bias): `v_j`, a column of the down projection, is
a *value vector*, and `m_j`, the j-th input of the down projection, is its *coefficient* (Geva et
al. 2021; paper, section 2). Hooks sit on the inputs of the down projections, so that a fused or a
gated first half of the MLP makes no difference, and are removed when the `with` block ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from paramspec.errors import InputError

Position = Literal["mean", "last"]

# Where a decoder layer keeps its down projection, by family.
DOWN_PROJECTIONS = (
    "mlp.down_proj",  # Llama, Mistral, Qwen, Gemma, OLMo, Phi-3, GLM-4, Granite, Cohere, StableLM
    "mlp.fc2",  # Phi
    "fc2",  # OPT: on the layer itself
    "mlp.c_proj",  # GPT-2
    "mlp.dense_4h_to_h",  # GPT-NeoX, BLOOM, Falcon
    "mlp.fc_out",  # GPT-J
    "ffn.down_proj",  # MPT
)


@dataclass(frozen=True)
class ValueVectorView:
    """The down projections of a model, one a layer, found and verified.

    `modules[l]` holds the value vectors of layer `l`; `names[l]` is its dotted name in the model;
    `width` is the number of value vectors in a layer, `hidden` the length of each.
    """

    model: PreTrainedModel
    modules: tuple[nn.Linear | Conv1D, ...]
    names: tuple[str, ...]
    width: int
    hidden: int

    @property
    def layers(self) -> int:
        return len(self.modules)

    @property
    def embedding(self) -> Tensor:
        """The input embedding, `[vocabulary, hidden size]`; tokens go to its device."""
        return cast("Tensor", self.model.get_input_embeddings().weight)

    def vectors(self, layer: int) -> Tensor:
        """`view.vectors(3)`: the value vectors of a layer, `[width, hidden]`, not a copy."""
        module = self.modules[layer]
        # A Linear keeps its inputs as columns, GPT-2's Conv1D as rows.
        return module.weight if isinstance(module, Conv1D) else module.weight.T


def value_vector_view(model: PreTrainedModel) -> ValueVectorView:
    """`view = value_vector_view(model)`: find the value vectors of any causal LM, and verify them.

    >>> from transformers import AutoModelForCausalLM
    >>> view = value_vector_view(AutoModelForCausalLM.from_pretrained("my-checkpoint/"))
    >>> view.layers, view.width, view.names[0]
    (3, 48, 'model.layers.0.mlp.down_proj')

    The view is found by the names above, then held against one forward pass: every down
    projection runs once, its output is the sum of coefficients times value vectors plus the bias,
    and the MLP adds nothing to it but a residual that it was given.

    Raises:
        InputError: if the model is a mixture of experts, if a layer has no down projection of a
            known name, or if the forward pass contradicts the view.
    """
    view = unverified_view(model)
    _verify(view)
    return view


def unverified_view(model: PreTrainedModel) -> ValueVectorView:
    """`unverified_view(model)`: found by name and shape alone, also in a model without weights."""
    names = down_projections(model)
    modules = tuple(cast("nn.Linear | Conv1D", model.get_submodule(name)) for name in names)
    shapes = {_shape(module) for module in modules}
    if len(shapes) > 1:
        raise InputError(
            f"{_name(model)}: MLP widths differ between layers ({sorted(shapes)}); "
            "only models with one width are supported"
        )
    width, hidden = shapes.pop()
    return ValueVectorView(model, modules, names, width, hidden)


def down_projections(model: PreTrainedModel) -> tuple[str, ...]:
    """`names = down_projections(model)`: by the names alone, also of a model without numbers.

    Raises:
        InputError: if the model is a mixture of experts, or if a layer has none of a known name.
    """
    _refuse_experts(model)
    return _find_down_projections(model)


@dataclass
class Recorded:
    """What `record_coefficients` fills in: `coefficients`, fp32 `[batch, layers, width]`."""

    layers: list[Tensor | None]

    @property
    def coefficients(self) -> Tensor:
        reached = [layer for layer in self.layers if layer is not None]
        if len(reached) < len(self.layers):
            missing = [index for index, layer in enumerate(self.layers) if layer is None]
            raise RuntimeError(f"no forward pass reached the down projections of layers {missing}")
        return torch.stack(reached, dim=1)


@contextmanager
def record_coefficients(
    view: ValueVectorView, tokens_kept: Tensor, position: Position = "mean"
) -> Iterator[Recorded]:
    """`with record_coefficients(view, attention_mask) as recorded: model(...)`.

    >>> tokens = torch.tensor([[3, 4, 5]])
    >>> with record_coefficients(view, torch.ones_like(tokens)) as recorded:
    ...     output = view.model(tokens)
    >>> recorded.coefficients.shape == (1, view.layers, view.width)
    True

    Args:
        view: the model's value vectors.
        tokens_kept: `[batch, tokens]`, non-zero at the prompt's tokens, zero at padding.
        position: reduce absolute coefficients to their `mean` over those tokens, or take the
            `last` of them.

    Yields:
        Recorded, whose `coefficients` are there after one forward pass. They are reduced inside
        the hooks, in fp32, so that `[batch, tokens, width]` is never kept.
    """
    if position not in ("mean", "last"):
        raise InputError(f"position {position!r}: expected 'mean' or 'last'")
    kept = tokens_kept.bool()
    if not bool(kept.any(dim=1).all()):
        raise InputError("a prompt has no token to record: every row needs at least one")
    if position == "last":
        places = torch.arange(kept.shape[1], device=kept.device)
        last = torch.where(kept, places, -1).amax(dim=1, keepdim=True)
        kept = places == last
    weights = kept.float() / kept.sum(dim=1, keepdim=True)
    recorded = Recorded([None] * view.layers)

    def reduce(layer: int, inputs: Tensor) -> None:
        inputs = inputs.reshape(*kept.shape, -1)  # OPT flattens batch and tokens
        absolute = inputs.detach().float().abs()
        here = kept.to(inputs.device)[..., None]
        # Padding may hold anything, even inf: leave it out before it is weighted.
        absolute = absolute.masked_fill(~here, 0)
        recorded.layers[layer] = torch.einsum("bt,btw->bw", weights.to(inputs.device), absolute).to(
            kept.device
        )

    with ExitStack() as stack:
        for layer, module in enumerate(view.modules):
            hook = module.register_forward_pre_hook(
                lambda _, args, layer=layer: reduce(layer, args[0])
            )
            stack.callback(hook.remove)
        yield recorded


@contextmanager
def mask_value_vectors(view: ValueVectorView, keep: Tensor) -> Iterator[None]:
    """`with mask_value_vectors(view, keep): model(...)`: set coefficients to zero.

    >>> tokens, keep = torch.tensor([[3, 4, 5]]), torch.ones(view.layers, 1, view.width).bool()
    >>> keep[0, 0, :10] = False
    >>> with mask_value_vectors(view, keep):
    ...     masked = view.model(tokens).logits
    >>> torch.equal(masked, view.model(tokens).logits)
    False

    Args:
        view: the model's value vectors.
        keep: bool `[layers, batch, width]`, False where a row's value vector is masked; a batch
            of 1 applies to every row. A batch of several under a single row of tokens makes a row
            of each mask at the first layer where one masks: what is below is computed once.

    Masking is exact: it gives the bits that zeroing the value vectors themselves would give.
    """
    if keep.dtype != torch.bool or keep.ndim != 3:
        raise InputError(
            f"keep: expected bool [layers, batch, width], got {keep.dtype} {keep.ndim}-d"
        )
    if keep.shape[0] != view.layers or keep.shape[2] != view.width:
        raise InputError(
            f"keep: shape {tuple(keep.shape)} does not fit {view.layers} layers "
            f"of {view.width} value vectors"
        )
    with ExitStack() as stack:
        for layer, module in enumerate(view.modules):
            if not keep[layer].all():
                own = keep[layer, :, None].to(module.weight.device)  # [batch, 1, width]
                hook = module.register_forward_pre_hook(
                    lambda _, args, own=own: (_masked(args[0], own), *args[1:])
                )
                stack.callback(hook.remove)
        yield


def _masked(inputs: Tensor, keep: Tensor) -> Tensor:
    """The inputs of a down projection, zero where `keep` `[batch, 1, width]` is False."""
    # OPT flattens batch and tokens.
    rows = inputs if inputs.ndim == 3 else inputs.reshape(len(keep), -1, keep.shape[-1])
    # Zeros are written, not multiplied by: inf * 0 is nan.
    masked = torch.where(keep, rows, 0)
    return masked if inputs.ndim == 3 else masked.reshape(-1, keep.shape[-1])


def mask_rows(
    view: ValueVectorView, keeps: Sequence[Tensor | None]
) -> AbstractContextManager[None]:
    """`with mask_rows(view, [keep, None]): model(...)`: each row of a batch under its own mask.

    Args:
        keeps: for each row bool `[layers, width]`, False where masked, or None for no mask.
    """
    if all(keep is None for keep in keeps):
        return nullcontext()
    everything = torch.ones(view.layers, view.width, dtype=torch.bool)
    chosen = [everything if keep is None else keep for keep in keeps]
    return mask_value_vectors(view, torch.stack(chosen, dim=1))


class TrainedVectors(nn.Module):
    """What `train_value_vectors` trains: how far each chosen value vector has moved.

    `offsets[str(layer)]` is a parameter, fp32 `[n, hidden]`, zero at first; row i belongs to value
    vector `chosen[layer][i]`. Layers without a chosen vector are in neither.
    """

    def __init__(self, view: ValueVectorView, vectors: Tensor) -> None:
        super().__init__()
        self._view = [view]  # in a list, lest the model's own parameters become this module's
        self.chosen: dict[int, Tensor] = {}
        self.offsets = nn.ParameterDict()
        for layer in vectors[:, 0].unique().tolist():
            device = view.modules[layer].weight.device
            chosen = vectors[vectors[:, 0] == layer, 1].long().sort().values.to(device)
            self.chosen[layer] = chosen
            self.offsets[str(layer)] = nn.Parameter(
                torch.zeros(len(chosen), view.hidden, device=device)
            )

    @torch.no_grad()
    def merge(self) -> None:
        """`trained.merge()`: add the offsets to the model's own weights, and start again at zero.

        The sum is taken in fp32 and rounded once, to the weights' dtype.
        """
        (view,) = self._view
        for layer, chosen in self.chosen.items():
            vectors, offset = view.vectors(layer), self.offsets[str(layer)]
            vectors[chosen] = (vectors[chosen].float() + offset).to(vectors.dtype)
            offset.zero_()


@contextmanager
def train_value_vectors(view: ValueVectorView, vectors: Tensor) -> Iterator[TrainedVectors]:
    """`with train_value_vectors(view, vectors) as trained: ...`: chosen vectors as parameters.

    Within the block every forward pass adds, for each chosen vector, its coefficient times how far
    it has moved. So only the chosen columns are parameters: gradients and optimizer states are
    `[n, hidden]` a layer, and every other weight stays out of the optimizer's reach. With no
    `merge`, the model leaves the block as it entered it.

    Args:
        view: the model's value vectors; none of its own parameters should ask for a gradient.
        vectors: int32 `[n, 2]` of (layer, value vector), n > 0, each once.

    Raises:
        InputError: if there is no such vector, or one is given twice.
    """
    _require_vectors(view, vectors)
    trained = TrainedVectors(view, vectors)

    def add(layer: int, inputs: Tensor, output: Tensor) -> Tensor:
        chosen, offset = trained.chosen[layer], trained.offsets[str(layer)]
        if len(chosen) < view.width:
            inputs = inputs.index_select(-1, chosen)
        return output + inputs @ offset.to(inputs.dtype)

    with ExitStack() as stack:
        for layer in trained.chosen:
            hook = view.modules[layer].register_forward_hook(
                lambda _, args, output, layer=layer: add(layer, args[0], output)
            )
            stack.callback(hook.remove)
        yield trained


@contextmanager
@torch.no_grad()
def replace_value_vectors(view: ValueVectorView, vectors: Tensor, values: Tensor) -> Iterator[None]:
    """`with replace_value_vectors(view, vectors, values): model(...)`: other vectors, for a while.

    Args:
        vectors: int32 `[n, 2]` of (layer, value vector), each once.
        values: `[n, hidden]`, what stands there within the block.

    Raises:
        InputError: if there is no such vector, or one is given twice, or the values do not fit.
    """
    _require_vectors(view, vectors)
    if values.shape != (len(vectors), view.hidden):
        raise InputError(
            f"values of shape {tuple(values.shape)} do not fit {len(vectors)} value vectors of "
            f"length {view.hidden}"
        )
    places = [(layer, vectors[:, 0] == layer) for layer in vectors[:, 0].unique().tolist()]
    before = {}
    for layer, rows in places:
        own, chosen = view.vectors(layer), vectors[rows, 1].long().to(view.vectors(layer).device)
        before[layer] = (chosen, own[chosen].clone())
        own[chosen] = values[rows].to(own.device, own.dtype)
    try:
        yield
    finally:
        for layer, (chosen, own) in before.items():
            view.vectors(layer)[chosen] = own


def _require_vectors(view: ValueVectorView, vectors: Tensor) -> None:
    if len(vectors) == 0:
        raise InputError("no value vector is chosen; take a larger share of them")
    limits = torch.tensor([view.layers, view.width])
    wrong = ((vectors < 0) | (vectors >= limits)).any(1)
    if bool(wrong.any()):
        layer, vector = vectors[wrong][0].tolist()
        raise InputError(
            f"{_name(view.model)}: no value vector {vector} in layer {layer}; it has "
            f"{view.layers} layers (from 0) of {view.width} value vectors"
        )
    if len(vectors.unique(dim=0)) < len(vectors):
        raise InputError("a value vector is chosen twice; give each once")


@contextmanager
def unembed_only(model: PreTrainedModel, places: Tensor) -> Iterator[None]:
    """`with unembed_only(model, places): logits = model(...).logits`: logits where needed.

    Args:
        places: `[n, 2]`, (row, token) of each hidden state to unembed; the logits are
            `[1, n, vocabulary]` within the block.
    """

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows, tokens = places.to(args[0].device).T
        return (args[0][rows, tokens][None], *args[1:])

    hook = cast("nn.Module", model.get_output_embeddings()).register_forward_pre_hook(gather)
    try:
        yield
    finally:
        hook.remove()


def refuse_too_long(
    view: ValueVectorView,
    tokens: int,
    what: str = "a question",
    remedy: str = "shorten its cloze or its options",
) -> None:
    """`refuse_too_long(view, 9000)`: InputError if the model has no position for so many tokens."""
    config = view.model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise InputError(
            f"{what} of {tokens} tokens does not fit the model's context of {limit} tokens; "
            f"{remedy}"
        )


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(width, hidden) of a down projection."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _refuse_experts(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "expert" in name:
            raise InputError(
                f"{_name(model)}: a mixture of experts is not supported: its value vectors lie in "
                f"{name}, one 3-D parameter for all experts, which no hook can read or mask; "
                "use a dense model"
            )
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts" and isinstance(module, nn.ModuleList):
            raise InputError(
                f"{_name(model)}: a mixture of experts is not supported: {name} holds "
                f"{len(module)} MLPs of which a router picks some a token; use a dense model"
            )


def _find_down_projections(model: PreTrainedModel) -> tuple[str, ...]:
    config = model.config.get_text_config(decoder=True)
    layers = config.num_hidden_layers
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    modules = dict(model.named_modules())
    for stack, _ in stacks:
        for suffix in DOWN_PROJECTIONS:
            names = tuple(f"{stack}.{index}.{suffix}" for index in range(layers))
            if all(isinstance(modules.get(name), nn.Linear | Conv1D) for name in names):
                return names
    raise InputError(
        f"{_name(model)}: no down projection found in its {layers} layers under any of the names "
        f"{', '.join(DOWN_PROJECTIONS)}; add the family's name to "
        "paramspec.method.hooks.DOWN_PROJECTIONS"
    )


def _tensors(values: object) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        return [tensor for value in values.values() for tensor in _tensors(value)]
    if isinstance(values, tuple | list):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


@torch.no_grad()
def _verify(view: ValueVectorView) -> None:
    """Hold the view against one forward pass, on two short rows of tokens.

    Outputs are copied: Falcon adds its attention to the output of the MLP in place.
    """
    calls: list[list[tuple[Tensor, Tensor]]] = [[] for _ in view.modules]
    mlps: list[list[tuple[list[Tensor], Tensor]]] = [[] for _ in view.modules]

    with ExitStack() as stack:
        for layer, (name, module) in enumerate(zip(view.names, view.modules, strict=True)):
            hook = module.register_forward_hook(
                lambda _, args, output, layer=layer: calls[layer].append((args[0], output.clone()))
            )
            stack.callback(hook.remove)
            parent = name.rpartition(".")[0]
            if not parent.rpartition(".")[2].isdigit():  # an MLP module, not the layer itself
                hook = view.model.get_submodule(parent).register_forward_hook(
                    lambda _, args, kwargs, output, layer=layer: mlps[layer].append(
                        (_tensors([args, kwargs]), _tensors(output)[0].clone())
                    ),
                    with_kwargs=True,
                )
                stack.callback(hook.remove)
        places = torch.arange(10, device=view.embedding.device)
        tokens = (places * 7 + 3).remainder(len(view.embedding)).reshape(2, 5)
        view.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)

    for layer, name in enumerate(view.names):
        if len(calls[layer]) != 1:
            raise InputError(
                f"{_name(view.model)}: {name} ran {len(calls[layer])} times in one forward pass, "
                "expected once; its value vectors cannot be trusted"
            )
        coefficients, output = calls[layer][0]
        bias = getattr(view.modules[layer], "bias", None)
        expected = coefficients.float() @ view.vectors(layer).float()
        expected = expected if bias is None else expected + bias.float()
        _expect_equal(view, name, "the sum of coefficients times value vectors", output, expected)
        for inputs, mlp_output in mlps[layer]:
            residuals = [tensor for tensor in inputs if tensor.shape == mlp_output.shape]
            sums = [output.reshape(mlp_output.shape)]
            sums += [sums[0] + residual for residual in residuals]
            best = min(sums, key=lambda total: float((mlp_output - total).abs().max()))
            _expect_equal(view, name, "the output of its MLP", mlp_output, best)


def _expect_equal(
    view: ValueVectorView, name: str, what: str, actual: Tensor, expected: Tensor
) -> None:
    actual, expected = actual.float(), expected.float()
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-12))
    tolerance = 1e-4 if view.modules[0].weight.dtype == torch.float32 else 2e-2
    if not error <= tolerance:  # also when it is nan
        raise InputError(
            f"{_name(view.model)}: the output of {name} differs from {what} by {error:.1e} "
            f"(relative); the value-vector view does not hold for this model"
        )
