"""The files of publishers, parsed strictly: a row that is not what the format says is an error with its number."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from .dataset import DataError, Rows

if TYPE_CHECKING:
    import polars as pl

VERSION = 2  # part of the prepared cache's key: raise it when a parser's result changes

COLUMNS = ["user_id", "item_id", "rating", "timestamp"]


def parse(format: str, data: bytes, file: str) -> Rows:
    """Rows of a data file in file order; `file` names it in messages.

    Raises DataError with file, row and value: an empty file, a wrong encoding, a missing column, a text for a number.
    """
    if not data.strip():
        raise DataError(f"{file}: the file is empty")
    match format:
        case "movielens-udata":
            return _delimited(_lines(data, file), "\t", COLUMNS, file)
        case "movielens-dat":
            return _delimited(_lines(data, file), "::", COLUMNS, file)
        case "recbole-inter":
            header, *lines = _lines(data, file)
            columns = [field.partition(":")[0] for field in header.split("\t")]
            for name in COLUMNS:
                if name not in columns:
                    raise DataError(f"{file}: row 1: no column '{name}' among {', '.join(columns)}")
            return _delimited(lines, "\t", columns, file, first_row=2)
        case "parquet-ordered":
            return _ordered(data, file)
    raise ValueError(f"no parser for format '{format}'")


def _lines(data: bytes, file: str) -> list[str]:
    try:
        return data.decode("ascii").splitlines()
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}: row {row}: byte 0x{data[error.start]:02x} is no plain text") from None


def _delimited(lines: list[str], separator: str, columns: list[str], file: str, first_row: int = 1) -> Rows:
    """Lines with the `columns` in that order. The first bad row is reported, the others are not looked for."""
    import polars as pl

    width = len(columns)
    text = pl.Series(lines, dtype=pl.String)
    fields = text.str.split_exact(separator, width).struct.unnest()  # one field more: null unless a row is too long
    uneven = fields[f"field_{width}"].is_not_null() | fields[f"field_{width - 1}"].is_null()
    if uneven.any():
        row = uneven.arg_max() or 0
        raise DataError(f"{file}: row {row + first_row}: {lines[row]!r} has not {width} columns: {', '.join(columns)}")

    def numbers(name: str, dtype: type[pl.DataType]) -> pl.Series:
        raw = fields[f"field_{columns.index(name)}"]
        column = raw.cast(dtype, strict=False)
        bad = ~column.is_finite().fill_null(False)
        if bad.any():
            row = bad.arg_max() or 0
            raise DataError(f"{file}: row {row + first_row}: {name} is {raw[row]!r}, not a number")
        return column

    return Rows(
        users=numbers("user_id", pl.Int64).to_numpy(),
        items=numbers("item_id", pl.Int64).to_numpy(),
        order=numbers("timestamp", pl.Int64).to_numpy(),
        has_time=True,
        feedback={"rating": numbers("rating", pl.Float32).to_numpy()},
    )


def _ordered(data: bytes, file: str) -> Rows:
    """A parquet of `user_id, item_id, position`: the order of events is known, their times are not."""
    import polars as pl

    names = ["user_id", "item_id", "position"]
    try:
        frame = pl.read_parquet(io.BytesIO(data))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{file}: no readable parquet: {str(error).splitlines()[0]}") from None
    for name in names:
        if name not in frame.columns:
            raise DataError(f"{file}: no column '{name}' among {', '.join(frame.columns)}")
        if not frame[name].dtype.is_integer():
            raise DataError(f"{file}: {name} holds {frame[name].dtype}, not whole numbers")
        if frame[name].has_nulls():
            raise DataError(f"{file}: row {(frame[name].is_null().arg_max() or 0) + 1}: {name} is missing")
    if frame.is_empty():
        raise DataError(f"{file}: the file is empty")
    users, items, order = (frame[name].cast(pl.Int64).to_numpy() for name in names)
    return Rows(users, items, order, has_time=False)
