"""What results are held against: the definitions, computed the plain way."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

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
