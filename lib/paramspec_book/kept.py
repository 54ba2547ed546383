"""What an executed copy leaves behind, in the folder `NAME.data/` next to it: the numbers of its
figures and tables, as `figure-1.csv` and `table-1.csv`, and the answers that a verdict rests on.
"""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

DATA = "PARAMSPEC_DATA"  # the variable that names the folder; by hand, nothing is kept


def folder() -> Path | None:
    """Return the folder, made if need be, or None where nothing is kept."""
    found = Path(os.environ.get(DATA, os.devnull))
    if found.suffix != ".data":
        return None
    found.mkdir(exist_ok=True)
    return found


def keep_csv(kind: str, table: pd.DataFrame) -> str:
    """Keep a table as the next of its kind, and return its name, as `table-3`; "" where none is."""
    place = folder()
    if place is None:
        return ""
    name = f"{kind}-{len([*place.glob(f'{kind}-*.csv')]) + 1}"
    table.to_csv(place / f"{name}.csv", float_format="%.6g")
    return name
