"""What results are held against: the definitions, computed the plain way."""

from __future__ import annotations

import copy
from contextlib import ExitStack, nullcontext

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paramspec.method.hooks import ValueVectorView, mask_value_vectors
from paramspec.method.rows import Item


@torch.no_grad()
def score_one_at_a_time(view: ValueVectorView, item: Item, keep: Tensor | None = None) -> Tensor:
    """`score_one_at_a_time(view, item)`: the log-likelihood of each option.

    One option a forward pass, no padding, all logits, as lm-evaluation-harness defines it.

    Returns:
        fp32 `[options]`, in nats.
    """
    scores = []
    for option in item.options:
        tokens = torch.tensor([item.context + option], device=view.model.device)
        masked = nullcontext() if keep is None else mask_value_vectors(view, keep[:, None])
        with masked:
            logits = view.model(input_ids=tokens[:, :-1], use_cache=False).logits[0].float()
        log_probabilities = logits.log_softmax(-1)[-len(option) :]
        scores.append(log_probabilities.gather(1, tokens[0, -len(option) :, None]).sum().cpu())
    return torch.stack(scores)


def with_vectors_zeroed(view: ValueVectorView, keep: Tensor | None) -> nn.Module:
    """A copy of the model in which the value vectors themselves are zero where `keep` is False."""
    edited = copy.deepcopy(view.model)
    for layer, name in enumerate(view.names if keep is not None else ()):
        module = edited.get_submodule(name)
        weight = module.weight.data if isinstance(module, Conv1D) else module.weight.data.T
        weight[~keep[layer]] = 0
    return edited


def same_tables(one: pd.DataFrame, other: pd.DataFrame, atol: float = 1e-3, **options) -> None:
    """Tables of the same questions and masks; log-likelihoods may differ by rounding."""
    tables = [plain(one.reset_index(drop=True)), plain(other.reset_index(drop=True))]
    if "option_logprobs" in one:
        scores = [np.stack(table.pop("option_logprobs")) for table in tables]
        np.testing.assert_allclose(*scores, rtol=0, atol=atol)
    pd.testing.assert_frame_equal(*tables, **options)


def plain(table: pd.DataFrame) -> pd.DataFrame:
    """Categories as texts, and the lists of a parquet file, whoever read it, as lists."""
    kinds = {name: column.dtype for name, column in table.items()}
    texts = [name for name, kind in kinds.items() if isinstance(kind, pd.CategoricalDtype)]
    lists = [name for name in ("option_logprobs", "option_tokens") if name in kinds]
    return table.astype(dict.fromkeys(texts, str)).assign(
        **{name: list(map(list, table[name])) for name in lists}
    )


@torch.no_grad()
def coefficients_alone(view: ValueVectorView, tokens: list[int], position: str) -> Tensor:
    """Absolute coefficients of one prompt without padding, `[layers, width]`."""
    inputs: list[Tensor] = []
    with ExitStack() as stack:
        for module in view.modules:
            hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
            stack.enter_context(hook)
        view.model(input_ids=torch.tensor([tokens]), use_cache=False)
    each = torch.stack([layer.reshape(len(tokens), view.width).abs() for layer in inputs])
    return each.mean(1) if position == "mean" else each[:, -1]
