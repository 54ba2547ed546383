"""Values that are checked on input, and one line on the first that does not fit.

class Choices(Checked):
    seed: Seed = 0

Choices.parse(seed=-1)      # InputError: seed -1: input should be greater than or equal to 0
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paramspec.errors import InputError

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(gt=0, le=1)]


class Checked(BaseModel):
    """Frozen values; a field that is not declared is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, **values: object) -> Self:
        """`Choices.parse(seed=0)`: as the class, but with an InputError for a bad value."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise InputError(first_breach(error)) from error


def first_breach(error: ValidationError) -> str:
    """The first field that does not fit, its value, and the reason, in one line."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    place = "".join(parts).removeprefix(".")
    if first["type"] == "missing":
        return f"{place}: missing"
    if not place or first["type"] == "value_error":  # its message names the value
        return f"{place}: {message}".removeprefix(": ")
    value = repr(first["input"])
    value = value if len(value) <= 100 else f"{value[:97]}..."
    return f"{place} {value}: {message[0].lower()}{message[1:]}"
