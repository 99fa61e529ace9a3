"""Some records of a file on their way to events: raw columns, and the row of the file that each stands in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import polars as pl

Rows = int | np.ndarray  # the row of the first record, which the others follow, or (n,) the row of each


@dataclass
class Batch:
    """n records of a file. Columns are as the file has them: text, or numbers where it is an array."""

    file: str
    rows: Rows
    columns: Mapping[str, pl.Series]  # (n,) each, by the file's own name
    broken: np.ndarray | None = None  # (n,) bool: what is no record at all, its columns mean nothing
    why: Callable[[int], str] = lambda at: ""  # what is wrong with the broken record at a place


def row_of(rows: Rows, at: int) -> int:
    """The row of the file in which the record at a place stands."""
    return rows + at if isinstance(rows, int) else int(rows[at])


def rows_at(rows: Rows, places: np.ndarray) -> np.ndarray:
    """(len(places),) the rows of some records."""
    return rows + places if isinstance(rows, int) else rows[places]


def nulled(values: pl.Series, bad: pl.Series) -> pl.Series:
    """Values with null where they are bad."""
    import polars as pl

    if not bad.any():
        return values
    return pl.select(pl.when(~bad.fill_null(True)).then(values)).to_series()
