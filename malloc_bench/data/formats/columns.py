"""From raw columns to events: ids, times and feedback as numbers, and what becomes of values that are none.

A column is converted at once; only where something in it is amiss is it looked at value by value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from malloc_bench.data.errors import DataError
from malloc_bench.data.formats import times
from malloc_bench.data.formats.batch import Batch, Rows, nulled, row_of, rows_at
from malloc_bench.data.formats.formats import Layout
from malloc_bench.data.formats.ids import as_numbers
from malloc_bench.data.formats.policies import Judge

if TYPE_CHECKING:
    import polars as pl

HISTORY = r"^\d{1,18}(\^\d{1,18})*$"
WHOLE = r"^[+-]?\d+$"
TRUTH = {"true": "1", "false": "0"}  # as pandas writes them, in any case


@dataclass
class Column:
    """A column's values, with null where one is not what it must be."""

    values: pl.Series
    must: str  # what is said of a null
    huge: np.ndarray | None = None  # (n,) bool: of the nulls, the ids beyond 63 bits


def wanted(layout: Layout, feedback: Mapping[str, str]) -> dict[str, Any]:
    """The columns that are read of a file, and as what a parser may read them where every value is that."""
    import polars as pl

    types: dict[str, Any] = {
        name: pl.String if name in layout.text else pl.Int64 for name in (layout.user, layout.item)
    }
    if layout.time:
        units = {"date": pl.String, "iso": pl.String, "s.fraction": pl.Float64}
        types[layout.time] = units.get(layout.unit, pl.Int64)
    if layout.history:
        types |= {layout.label: pl.Float32, layout.history: pl.String}
    return types | {name: pl.String if name in layout.codes else pl.Float32 for name in feedback}


def converted(
    batch: Batch, layout: Layout, feedback: Mapping[str, str], judge: Judge
) -> tuple[pl.DataFrame, Rows, pl.Series | None]:
    """Frame of user, item and feedback, rows of the file, and times as they are there; the bad rows met their policy.

    Raises DataError where a policy rejects, with the first such row.
    """
    import polars as pl

    found: dict[str, Column] = {}
    for name, raw in batch.columns.items():
        if name in (layout.user, layout.item):
            found[name] = _ids(batch.file, name, raw, name in layout.text)
        elif name == layout.history:
            good = raw.str.contains(HISTORY).fill_null(False)
            found[name] = Column(nulled(raw, ~good), "not numbers joined by ^")
        elif name == layout.time:
            found[name] = Column(*times.parsed(batch.file, name, raw, layout))
        else:
            found[name] = _numbers(batch.file, name, raw, layout.codes.get(name))
    rows: Rows = batch.rows
    names = {layout.user: "user", layout.item: "item", **feedback, layout.history: "\0history", layout.label: "\0label"}
    frame = pl.DataFrame({names[name]: column.values for name, column in found.items() if name in names})
    clock = found[layout.time].values if layout.time else None
    if batch.broken is not None or any(column.values.null_count() for column in found.values()):
        left = np.flatnonzero(~_amiss(batch, found, judge))
        frame, rows = frame[left], rows_at(rows, left)
        clock = None if clock is None else clock[left]
    ids = {name: as_numbers(frame[name]) for name in ("user", "item") if frame[name].dtype == pl.String}
    return frame.with_columns(**ids), rows, clock


def _amiss(batch: Batch, found: Mapping[str, Column], judge: Judge) -> np.ndarray:
    """(n,) bool: which records are dropped; of all that is amiss, the first row that is rejected is told."""
    n = len(next(iter(found.values())).values)
    wrong = np.zeros(n, bool) if batch.broken is None else batch.broken.copy()
    huge = np.zeros(n, bool)
    message = {int(at): batch.why(int(at)) for at in np.flatnonzero(wrong)[:1]}
    for name, column in found.items():
        new = column.values.is_null().to_numpy() & ~wrong & ~huge
        big = new & column.huge if column.huge is not None else np.zeros(n, bool)
        if big.any() and not huge.any():
            message[int(big.argmax())] = _said(batch, name, int(big.argmax()), "beyond 63 bits")
        huge, new = huge | big, new & ~big
        if new.any():
            message[int(new.argmax())] = _said(batch, name, int(new.argmax()), column.must)
        wrong = wrong | new
    for at in sorted(message):
        case = "huge_id" if huge[at] else "bad_row"
        if judge.answer(case) == "reject":
            judge.meet(case, 1, f"{batch.file}: row {row_of(batch.rows, at)}: {message[at]}")
    for case, mask in (("bad_row", wrong), ("huge_id", huge)):
        if mask.any():
            judge.meet(case, int(mask.sum()), "")
    return wrong | huge


def _said(batch: Batch, name: str, at: int, must: str) -> str:
    value = batch.columns[name][at]
    return f"{name} is missing" if value is None else f"{name} is {short(value)}, {must}"


def short(value: object) -> str:
    told = repr(value)
    return told if len(told) <= 80 else f"{told[:60]}...{told[-10:]}"


def refused(file: str, name: str, raw: pl.Series, must: str) -> DataError:
    return DataError(f"{file}: {name} holds {raw.dtype}, not {must}")


def _ids(file: str, name: str, raw: pl.Series, text: bool) -> Column:
    """Ids as numbers or words; whole numbers that are written in an odd way (007) stay words."""
    import polars as pl

    dtype, huge = raw.dtype, None
    must = "empty" if text else "not a number"
    if dtype.is_float() or dtype == pl.Null:  # what a table without whole numbers makes of a column with gaps
        values = raw.cast(pl.Float64)
        whole = (values == values.round()) & (values.abs() < times.EXACT)
        return Column(nulled(values, ~whole).cast(pl.Int64), "not a whole number below 2^53")
    if dtype.is_integer():
        numbers = raw.cast(pl.Int64, strict=False)
        beyond = numbers.is_null() & raw.is_not_null()
        if not beyond.any():
            return Column(numbers, must)
        return Column(raw.cast(pl.String), must) if text else Column(numbers, must, beyond.to_numpy())
    if isinstance(dtype, pl.Decimal) and dtype.scale == 0:  # what some databases make of 64 bits without a sign
        raw = raw.cast(pl.String)
        dtype = raw.dtype
    if not text and dtype != pl.String:
        raise refused(file, name, raw, "whole numbers")
    if isinstance(dtype, (pl.Categorical, pl.Enum)):
        raw = raw.cast(pl.String)
    elif dtype != pl.String:
        raise refused(file, name, raw, "text or whole numbers")
    if text:
        return Column(nulled(raw, raw.str.strip_chars(" \t") == ""), must)
    if not raw.cast(pl.Int64, strict=False).null_count():
        return Column(raw, must)
    raw = raw.str.strip_chars()
    beyond = raw.str.contains(r"^[+-]?0*[1-9]\d{18,}$") & raw.cast(pl.Int64, strict=False).is_null()
    huge = beyond.fill_null(False).to_numpy()
    good = raw.str.contains(WHOLE).fill_null(False) & ~pl.Series(huge)
    return Column(nulled(raw, ~good), must, huge)


def _numbers(file: str, name: str, raw: pl.Series, words: Mapping[str, float] | None) -> Column:
    """Finite numbers (Float32), or the numbers that words stand for."""
    import polars as pl

    must = "not a number"
    if words and raw.dtype == pl.String:
        values = raw.replace_strict(words, default=None, return_dtype=pl.Float32)
        return Column(values, f"not one of {', '.join(words)}")
    raw = raw.cast(pl.Float32) if raw.dtype == pl.Null else raw
    if not (raw.dtype == pl.String or raw.dtype.is_numeric() or raw.dtype == pl.Boolean):
        raise refused(file, name, raw, "numbers")
    values = raw.cast(pl.Float32, strict=False)
    if values.null_count() and raw.dtype == pl.String:
        raw = raw.str.strip_chars()
        values = raw.str.to_lowercase().replace(TRUTH).cast(pl.Float32, strict=False)
    return Column(nulled(values, ~values.is_finite()), must)
