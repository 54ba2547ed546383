"""What the engine is measured beside: other ways to score options, all called alike.

    scores = LmEval(loaded, batch=32)(work)      # without masks
    scores = Nnsight(wrap(loaded), view.names, rows=20)(work)
    scores = one_at_a_time(view, work)           # the reference

Each returns a tensor `[options]` for each request: log-likelihoods in nats. All start from the same
tokens, so that nobody's time holds tokenizing. lm-eval and nnsight are imported where they are
used: a run without them measures the others.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from oracles import score_one_at_a_time
from paramspec.method import kernels
from paramspec.method.batches import pad_right
from paramspec.method.hooks import ValueVectorView
from paramspec.method.rows import Engine, Request
from paramspec.method.scoring import score_options
from paramspec.models.load import LoadedModel
from works import Work

if TYPE_CHECKING:
    from nnsight import TransformersModel


def engine(view: ValueVectorView, chosen: Engine, work: Work) -> list[Tensor]:
    """`engine(view, choose_engine(view), work)`: what is measured."""
    return score_options(view, work.requests, work.keeps, engine=chosen)


def unshared(view: ValueVectorView, chosen: Engine, work: Work) -> list[Tensor]:
    """`unshared(view, choose_engine(view), work)`: each question under a mask of its own."""
    requests = [Request(item, number) for number, (item, _) in enumerate(work.requests)]
    keeps = [work.keeps[request.mask] for request in work.requests]
    return score_options(view, requests, keeps, engine=chosen)


def stock_engine(view: ValueVectorView, chosen: Engine, work: Work) -> list[Tensor]:
    """`stock_engine(view, choose_engine(view), work)`: on torch's own linear layers."""
    with mock.patch.object(kernels, "packs", return_value=False):
        return engine(view, chosen, work)


def one_at_a_time(view: ValueVectorView, work: Work) -> list[Tensor]:
    """`one_at_a_time(view, work)`: a forward pass an option, hooks for the mask, all logits."""
    return [score_one_at_a_time(view, item, work.keeps[mask]) for item, mask in work.requests]


class LmEval:
    """`LmEval(loaded, batch=32)(work)`: lm-evaluation-harness's own Hugging Face model class.

    Its step after tokenizing is called, which sorts, merges equal contexts and pads as the harness
    does. It knows no masks.
    """

    def __init__(self, loaded: LoadedModel, batch: int) -> None:
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model given ready
        self._model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch)

    def __call__(self, work: Work) -> list[Tensor]:
        asked = [
            # The texts are keys of its cache alone; without one they may be empty.
            (("", ""), list(item.context), list(option))
            for item, _ in work.requests
            for option in item.options
        ]
        answers = iter(self._model._loglikelihood_tokens(asked, disable_tqdm=True))
        return [torch.tensor([next(answers)[0] for _ in item.options]) for item, _ in work.requests]


def wrap(loaded: LoadedModel) -> TransformersModel:
    """`wrap(loaded)`: the model as nnsight takes it.

    nnsight replaces the `forward` of every module, and sets the tokenizer's padding. So it is given
    modules of its own, over the same weights, and the others run as if it were not there.
    """
    from nnsight import TransformersModel

    weights = itertools.chain(loaded.model.parameters(), loaded.model.buffers())
    twin = copy.deepcopy(loaded.model, {id(tensor): tensor for tensor in weights})
    tokenizer = copy.deepcopy(loaded.tokenizer)
    return TransformersModel(twin, tokenizer=tokenizer, task="text-generation")


class _Line(NamedTuple):
    """An option in a batch: the prompt's and its own tokens, and whose it is."""

    tokens: tuple[int, ...]
    option: tuple[int, ...]
    request: int
    place: int


@dataclass(frozen=True)
class Nnsight:
    """`Nnsight(wrap(loaded), view.names, rows=20)(work)`: batches of one mask each.

    `names` are those of the down projections. A batch has `rows` options, sorted by length and
    padded on the right, or with 0 all of a mask's. Only where an option is read is it unembedded.
    """

    wrapped: TransformersModel
    names: Sequence[str]
    rows: int

    def __call__(self, work: Work) -> list[Tensor]:
        scores = [torch.zeros(len(request.item.options)) for request in work.requests]
        of_mask: dict[int, list[_Line]] = {}
        for index, (item, mask) in enumerate(work.requests):
            for place, option in enumerate(item.options):
                line = _Line(item.context + option, option, index, place)
                of_mask.setdefault(mask, []).append(line)
        for mask, lines in of_mask.items():
            lines.sort(key=lambda line: -len(line.tokens))
            size = self.rows or len(lines)
            for start in range(0, len(lines), size):
                batch = lines[start : start + size]
                for line, score in zip(batch, self._score(batch, work.keeps[mask]), strict=True):
                    scores[line.request][line.place] = score
        return scores

    @torch.no_grad()
    def _score(self, lines: Sequence[_Line], keep: Tensor | None) -> list[Tensor]:
        import nnsight

        # The last token is predicted, never read.
        tokens, attention_mask = pad_right([line.tokens[:-1] for line in lines])
        options = [line.option for line in lines]
        rows = torch.tensor([row for row, option in enumerate(options) for _ in option])
        ends = [(len(line.tokens) - 1, len(line.option)) for line in lines]
        places = torch.tensor([place for end, size in ends for place in range(end - size, end)])
        targets = torch.tensor(list(itertools.chain(*options)))
        chosen = [
            (self.wrapped.get(name), (~keep[layer]).nonzero()[:, 0])
            for layer, name in enumerate(self.names if keep is not None else ())
        ]
        head = self.wrapped.lm_head
        with self.wrapped.trace(input_ids=tokens, attention_mask=attention_mask, use_cache=False):
            for projection, masked in chosen:
                projection.input[..., masked] = 0
            head.input = head.input[rows, places][None]
            logits = nnsight.save(head.output)
        logits = logits[0]
        read = logits.gather(1, targets[:, None])[:, 0].float()
        read = read - torch.cat([part.float().logsumexp(-1) for part in logits.split(256)])
        return [part.sum() for part in read.split(list(map(len, options)))]
