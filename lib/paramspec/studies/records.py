"""What a study records of the model beside each result."""

from __future__ import annotations

from paramspec.method.kernels import arithmetic
from paramspec.method.rows import Engine
from paramspec.models.load import LoadedModel
from paramspec.models.tokens import tokenizer_facts


def unit_record(loaded: LoadedModel, engine: Engine | None = None) -> dict[str, object]:
    """`unit_record(loaded, engine)`: what a unit's record says of the model.

    `execution.provenance` names the fields.
    """
    return {
        "model": loaded.name,
        "digest": loaded.digest,
        "commit": loaded.commit,
        "tokenizer": tokenizer_facts(loaded.tokenizer),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "arithmetic": arithmetic(loaded.dtype, loaded.device.type),
        "engine": engine and {"name": engine.name, "reason": engine.reason},
    }
