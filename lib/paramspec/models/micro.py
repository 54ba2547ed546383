"""A training step of a micro model, forward and backward, at a fraction of its usual cost.

    micro = MicroModel(model, texts)              # a small Llama, Qwen2, Mistral or Gemma 2
    optimizer = torch.optim.AdamW([micro.weights])
    loss = micro.loss_and_gradient([0, 3, 1])     # of these three texts
    optimizer.step()
    micro.write_back()                            # into the transformers model

With some hundred tokens and a third of a million weights, most of a usual step is spent on other
things than products of matrices. The function here is that of transformers' class, but for
rounding; what is won, and by what:

- Texts that begin alike are one until they part: a causal model says the same of the same
  beginning, so that all but attention is computed once for each distinct beginning (`Batch`).
- The end of a text is a label and never read; padding is seen by attention alone.
- Weights are one vector, over which AdamW and the clipping of gradients go once. Matrices that
  multiply the same input are one matrix.
- Each part below returns its output and the function that takes the gradient of its output to that
  of its input, and sets the gradients of its weights: no graph is recorded and then walked.
- Products of matrices are left to oneDNN where torch has it: its kernels use the whole width of
  processors on which those of torch's own choice use half.
- Softmax goes along the dimension before the last, tanh is written as a sigmoid: torch has fast
  code for these, and slow code for the other.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NODES_TOGETHER = 48  # oneDNN compiles, and keeps, code for each number of rows: let there be few
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

Back = Callable[[Tensor], Tensor]  # from the gradient of an output to that of the input
Part = Callable[[Tensor, "Batch"], tuple[Tensor, Back]]


@dataclass(frozen=True)
class Batch:
    """Texts as the tree of their beginnings: a node is a beginning, and `token` its last token.

    `token`, int64 `[nodes]`, the last ones standing for nothing; `node`, int64 `[texts, longest]`,
    the node at each place that is read; `place`, int64 `[nodes]`, a place in flattened `node` where
    the node stands; `before` and `label`, int64 `[predicted tokens]`, a node and the token that
    follows it in some text; `share`, `[nodes]`, of the predicted tokens, those that follow it.
    """

    token: Tensor
    node: Tensor
    place: Tensor
    before: Tensor
    label: Tensor
    share: Tensor


class PrefixTree:
    """`PrefixTree(texts).batch([0, 3, 1])`: the beginnings of all texts, each found once."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.longest = longest = max(map(len, texts)) - 1  # places that are read
        nodes: dict[tuple[int, int], int] = {}  # by the node before, and the token
        self._node = np.full((len(texts), longest), -1)
        self._label = np.full((len(texts), longest), -1)
        for row, text in enumerate(texts):
            node = -1
            for place, (token, label) in enumerate(itertools.pairwise(text)):
                node = nodes.setdefault((node, token), len(nodes))
                self._node[row, place], self._label[row, place] = node, label
        self._node[self._node < 0] = len(nodes)  # padding is a node of its own, of any token
        self._token = np.array([token for _, token in nodes] + [0])

    def batch(self, rows: Sequence[int]) -> Batch:
        """The texts of these numbers; one that is named twice counts twice."""
        label = self._label[rows]
        label = label[:, : (label >= 0).sum(1).max()]
        node = self._node[rows, : label.shape[1]]
        nodes, place, node = np.unique(node, return_index=True, return_inverse=True)
        node = node.reshape(label.shape)
        spare = -len(nodes) % NODES_TOGETHER
        before, label = node[label >= 0], label[label >= 0]
        share = np.bincount(before, minlength=len(nodes) + spare) / len(before)
        return Batch(
            token=torch.from_numpy(np.pad(self._token[nodes], (0, spare))),
            node=torch.from_numpy(node),
            place=torch.from_numpy(np.pad(place, (0, spare))),
            before=torch.from_numpy(before),
            label=torch.from_numpy(label),
            share=torch.from_numpy(share.astype(np.float32)),
        )


class MicroModel:
    """`MicroModel(model, texts)`: a model of one of the zoo's families, made for its training.

    Args:
        model: of the class of Llama, Qwen2, Mistral or Gemma 2, with tied embeddings.
        texts: tokens of each text that it may be trained on.

    Attributes:
        weights: all weights in one vector `[parameters]`, for an optimizer; `weights.grad` is set
            by `loss_and_gradient`.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> None:
        self._tree, self._config, self._inner = PrefixTree(texts), model.config, model.model
        self._groups = _weights_by_use(model.model)
        parts = [part.detach().flatten() for part in itertools.chain(*self._groups.values())]
        self.weights = nn.Parameter(torch.cat(parts))
        if len(self.weights) != sum(part.numel() for part in model.parameters()):
            raise ValueError(f"{type(model).__name__}: it has weights that are not named here")
        self.weights.grad = torch.zeros_like(self.weights)
        self._named = dict(zip(self._groups, self._views(self.weights.detach()), strict=True))
        self._gradients = dict(zip(self._groups, self._views(self.weights.grad), strict=True))
        self._blocks = self._parts()

    def write_back(self) -> None:
        """Give the transformers model the weights as they are now."""
        with torch.no_grad():
            for name, group in self._groups.items():
                values = self._named[name].split([len(part) for part in group])
                for part, value in zip(group, values, strict=True):
                    part.copy_(value)

    @torch.no_grad()
    def loss_and_gradient(self, rows: Sequence[int]) -> float:
        """Mean cross-entropy, nats a token, of all tokens of the texts but their first ones.

        Its gradient is put into `weights.grad`, in place of what was there.

        Args:
            rows: numbers of texts among those that the model was made with.
        """
        batch, backs = self._tree.batch(rows), []
        embedding, gradient = self._named["embedding"], self._gradients["embedding"]
        x = embedding.index_select(0, batch.token)
        if self._embedding_scale != 1:
            x *= self._embedding_scale
        for block in self._blocks:
            moved, back = _through(block, x, batch)
            x = x + moved
            backs.append(back)
        logits, back = _through(self._unembed, x, batch)
        loss, grad = _cross_entropy(logits, batch)
        grad = back(grad)
        for back in reversed(backs):
            grad = grad + back(grad)
        gradient.index_add_(0, batch.token, grad, alpha=self._embedding_scale)
        return loss

    def _views(self, vector: Tensor) -> list[Tensor]:
        sizes = [sum(part.numel() for part in group) for group in self._groups.values()]
        return [
            part.view(-1, *group[0].shape[1:])
            for part, group in zip(vector.split(sizes), self._groups.values(), strict=True)
        ]

    def _parts(self) -> list[list[Part]]:
        """What is added to the residual stream, in turn: attention and MLP of each layer."""
        config = self._config
        gemma = config.model_type == "gemma2"
        self._embedding_scale = config.hidden_size**0.5 if gemma else 1.0

        def part(function: Callable, name: str, **given: object) -> Part:
            named, gradients = self._named, self._gradients
            return functools.partial(function, named[name], gradients[name], **given)

        def norm(name: str) -> Part:
            return part(_norm, name, epsilon=config.rms_norm_eps, above=1.0 if gemma else 0.0)

        cap = getattr(config, "final_logit_softcapping", None)
        self._unembed = [norm("norm"), part(_linear, "embedding")]
        self._unembed += [functools.partial(_cap, cap)] if cap else []
        blocks = []
        for n, layer in enumerate(self._inner.layers):
            bias = [part(_bias, f"{n}.bias")] if f"{n}.bias" in self._named else []
            attend = functools.partial(_attend, self._attention(layer.self_attn))
            attention = [part(_linear, f"{n}.qkv"), *bias, attend, part(_linear, f"{n}.out")]
            gate = functools.partial(_gate, gemma)
            mlp = [part(_linear, f"{n}.gate_up"), gate, part(_linear, f"{n}.down")]
            first, second = norm(f"{n}.input_layernorm"), norm(f"{n}.post_attention_layernorm")
            if gemma:  # which has a norm before and after each
                before = norm(f"{n}.pre_feedforward_layernorm")
                after = norm(f"{n}.post_feedforward_layernorm")
                blocks += [[first, *attention, second], [before, *mlp, after]]
            else:
                blocks += [[first, *attention], [second, *mlp]]
        return blocks

    def _attention(self, module: nn.Module) -> _Attention:
        config = self._config
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        cos, sin = self._inner.rotary_emb(self.weights, torch.arange(self._tree.longest)[None])
        # transformers turns by the other half with its sign changed: here the sine has the sign.
        half = cos.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        scale = torch.tensor([module.scaling] * heads + [1.0] * shared)[:, None]
        # Gemma 2 says of each layer whether its window slides; Mistral has one for all.
        slides = getattr(module, "layer_type", "sliding_attention") == "sliding_attention"
        return _Attention(
            heads=heads,
            shared=shared,
            cap=getattr(module, "attn_logit_softcapping", None),
            window=(slides and getattr(config, "sliding_window", None)) or self._tree.longest,
            cos=cos[0, :, None] * scale,
            sin=sin[0, :, None] * scale,
        )


def _weights_by_use(model: nn.Module) -> dict[str, list[Tensor]]:
    """The weights of a model, those together, under one name, that multiply the same input."""
    groups = {"embedding": [model.embed_tokens.weight], "norm": [model.norm.weight]}
    for number, layer in enumerate(model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        groups[f"{number}.qkv"] = [part.weight for part in inputs]
        if inputs[0].bias is not None:
            groups[f"{number}.bias"] = [part.bias for part in inputs]
        groups[f"{number}.out"] = [attention.o_proj.weight]
        groups[f"{number}.gate_up"] = [mlp.gate_proj.weight, mlp.up_proj.weight]
        groups[f"{number}.down"] = [mlp.down_proj.weight]
        for name, part in layer.named_children():
            if name.endswith("layernorm"):
                groups[f"{number}.{name}"] = [part.weight]
    return groups


# --- the parts ----------------------------------------------------------------------------------
# Each takes what it is made of, the input `[nodes, width]` and the batch.


def _through(parts: Sequence[Part], x: Tensor, batch: Batch) -> tuple[Tensor, Back]:
    backs = []
    for part in parts:
        x, back = part(x, batch)
        backs.append(back)

    def all_back(grad: Tensor) -> Tensor:
        for back in reversed(backs):
            grad = back(grad)
        return grad

    return x, all_back


def _product(x: Tensor, y: Tensor) -> Tensor:
    """`x` times `y` transposed, `[m, k]` and `[n, k]`."""
    if ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")
    return x @ y.t()


def _linear(weight: Tensor, gradient: Tensor, x: Tensor, _: Batch) -> tuple[Tensor, Back]:
    def back(grad: Tensor) -> Tensor:
        if len(weight) > weight.shape[1]:  # the kernels are quicker with the longer side last
            gradient.copy_(_product(x.t(), grad.t()).t())
        else:
            gradient.copy_(_product(grad.t(), x.t()))
        return _product(grad, weight.t())

    return _product(x, weight), back


def _bias(bias: Tensor, gradient: Tensor, x: Tensor, _: Batch) -> tuple[Tensor, Back]:
    def back(grad: Tensor) -> Tensor:
        torch.sum(grad, 0, out=gradient)
        return grad

    return x + bias, back


def _norm(
    weight: Tensor, gradient: Tensor, x: Tensor, _: Batch, *, epsilon: float, above: float
) -> tuple[Tensor, Back]:
    """RMS norm, times a weight that is kept as what it is above 0, or above 1."""
    scale = x.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    unit, weight = x * scale, weight + above if above else weight

    def back(grad: Tensor) -> Tensor:
        torch.sum(grad * unit, 0, out=gradient)
        grad = grad * weight
        along = (grad * unit).mean(-1, keepdim=True)
        return grad.addcmul_(unit, along, value=-1).mul_(scale)

    return unit * weight, back


def _gate(gelu: bool, x: Tensor, _: Batch) -> tuple[Tensor, Back]:
    """SiLU of the first half, or GELU by its tanh formula, times the second half."""
    gate, up = x.chunk(2, dim=-1)
    active = functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)

    def back(grad: Tensor) -> Tensor:
        both = torch.empty_like(x)
        to_gate, to_up = both.chunk(2, dim=-1)
        if gelu:
            torch.ops.aten.gelu_backward.grad_input(
                grad * up, gate, approximate="tanh", grad_input=to_gate
            )
        else:
            torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
        torch.mul(active, grad, out=to_up)
        return both

    return active * up, back


def _cap(cap: float, x: Tensor, _: Batch | None = None) -> tuple[Tensor, Back]:
    """`cap` tanh(x / cap), plus `cap`: of which the softmax that follows sees nothing."""
    sigmoid = (x * (2 / cap)).sigmoid_()

    def back(grad: Tensor) -> Tensor:
        return torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1).mul_(grad).mul_(4)

    return sigmoid * (2 * cap), back


@dataclass(frozen=True)
class _Attention:
    """Heads of one layer, `window` in tokens.

    `cos` and `sin`, `[places, heads of queries and keys, head width]`, turn them by their place;
    those of queries hold the scale of the scores as well.
    """

    heads: int
    shared: int  # heads of keys and values
    cap: float | None
    window: int
    cos: Tensor
    sin: Tensor


def _attend(attention: _Attention, x: Tensor, batch: Batch) -> tuple[Tensor, Back]:
    """From queries, keys and values `[nodes, all their heads]` to `[nodes, heads]`.

    Each text attends by itself, in a row of its own. Scores are `[texts and key heads, key, query]`
    with the queries of all heads that share keys side by side.
    """
    (texts, longest), heads, shared = batch.node.shape, attention.heads, attention.shared
    cos, sin = attention.cos[:longest], attention.sin[:longest]
    node = batch.node.flatten()

    def by_head(rows: Tensor) -> Tensor:
        return rows.transpose(1, 2).reshape(texts * shared, -1, rows.shape[-1])

    def by_place(part: Tensor) -> Tensor:
        return part.view(texts, -1, longest, part.shape[-1]).transpose(1, 2)

    rows = x.index_select(0, node).view(texts, longest, heads + 2 * shared, -1)
    turned, value = rows.split([heads + shared, shared], dim=2)
    turned = turned * cos + _halves_swapped(turned) * sin
    query, key, value = map(by_head, (*turned.split([heads, shared], dim=2), value))
    scores, cap_back = key @ query.transpose(1, 2), None
    if attention.cap:
        scores, cap_back = _cap(attention.cap, scores)
    scores += _mask(longest, attention.window, heads // shared)
    weights = scores.softmax(1)
    out = by_place(weights.transpose(1, 2) @ value).reshape(texts * longest, -1)

    def back(grad: Tensor) -> Tensor:
        grad = torch.zeros_like(out).index_add_(0, batch.place, grad)
        grad = by_head(grad.view(texts, longest, heads, -1))
        to_scores = (value @ grad.transpose(1, 2)).mul_(weights)
        to_scores.addcmul_(weights, to_scores.sum(1, keepdim=True), value=-1)
        if cap_back:
            to_scores = cap_back(to_scores)
        to_query, to_key = to_scores.transpose(1, 2) @ key, to_scores @ query
        turned = torch.cat([by_place(to_query), by_place(to_key)], dim=2)
        turned = turned * cos - _halves_swapped(turned) * sin
        to_rows = torch.cat([turned, by_place(weights @ grad)], dim=2)
        return torch.zeros_like(x).index_add_(0, node, to_rows.view(len(node), -1))

    return out.index_select(0, batch.place), back


def _halves_swapped(x: Tensor) -> Tensor:
    return x.roll(x.shape[-1] // 2, -1)


@functools.cache
def _mask(longest: int, window: int, queries: int) -> Tensor:
    """`[longest, queries * longest]`: 0 where a query sees a key, else minus infinity."""
    place = torch.arange(longest)
    back = place - place[:, None]
    mask = torch.zeros(back.shape).masked_fill_((back < 0) | (back >= window), -torch.inf)
    return mask.repeat(1, queries)


def _cross_entropy(logits: Tensor, batch: Batch) -> tuple[float, Tensor]:
    """The mean over the predicted tokens, and its gradient."""
    grad = logits.softmax(-1)
    # The largest of a softmax is exp(largest logit - log-sum-exp), and never vanishes.
    log_sum = logits.amax(-1) - grad.amax(-1).log()
    loss = (log_sum[batch.before] - logits[batch.before, batch.label]).mean()
    grad *= batch.share[:, None]
    one = torch.tensor(-1 / len(batch.label))
    grad.index_put_((batch.before, batch.label), one, accumulate=True)
    return float(loss), grad
