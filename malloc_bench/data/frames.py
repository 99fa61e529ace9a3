"""A data set from a table in memory, read by the same rules as a file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from malloc_bench.data.errors import DataError
from malloc_bench.registry import clipped

if TYPE_CHECKING:
    import polars as pl

    from malloc_bench.data.dataset import Dataset


def from_frame(
    frame: Any,
    user: str,
    item: str,
    time: str | None = None,
    rating: str | None = None,
    feedback: Sequence[str] = (),
    unit: str | None = None,
    name: str = "frame",
    label: dict[str, Any] | None = None,
    on_bad: dict[str, str] | None = None,
) -> Dataset:
    """The events of a polars or pandas frame, a row each; see `get_dataset`. Nothing is kept on disk.

    Raises DataError as for a file.
    """
    import polars as pl

    from malloc_bench.data import cache
    from malloc_bench.data.formats.parse import Reader
    from malloc_bench.data.formats.policies import Judge
    from malloc_bench.data.prepare import prepare
    from malloc_bench.data.sources.archive import open_parts
    from malloc_bench.data.sources.cards import card_of

    feedback = [feedback] if isinstance(feedback, str) else list(feedback)
    named = [each for each in (user, item, time, rating, *feedback) if each is not None]
    for each in (*named, name):
        if not isinstance(each, str):
            raise DataError(f"a frame's columns, and its name, are told as text, not {clipped(repr(each))}")
    found = _polars(frame, list(dict.fromkeys(named)))
    for each, kind in found.schema.items():
        if kind == pl.Object:
            raise DataError(f"{name}: {each} holds Python objects, not text, numbers or dates")
        if kind == pl.Int128:  # which Parquet has not
            raise DataError(f"{name}: {each} holds Int128, which no file has: cast it to Int64, or to text")
    if time is not None and unit is None:
        kind = found[time].dtype
        unit = "iso" if kind.is_temporal() or kind in (pl.String, pl.Categorical, pl.Enum) else "s"
    columns = {"user": user, "item": item, "time": time, "unit": unit, "rating": rating}
    table = {key: value for key, value in columns.items() if value is not None} | {"feedback": feedback}
    keys = {"format": "table", "table": {**table, "files": "parquet"}, "sources": [{"local": name}], "label": label}
    card = card_of(name, {**keys, "on_bad": on_bad or {}})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with (folder / name).open("wb") as file:  # polars itself takes no path that is not UTF-8
            found.write_parquet(file)
        reader = Reader(card.layout(), Judge(card.on_bad))
        with open_parts([folder / name]) as parts:
            return cache.load(card, folder, "a frame in memory", *prepare(reader.frames(parts), reader, folder))


def _polars(frame: Any, columns: list[str]) -> pl.DataFrame:
    """Those columns as polars has them, of a frame of polars, of Arrow or of pandas."""
    import polars as pl
    import pyarrow as pa

    reading = ""
    try:
        if isinstance(frame, pl.LazyFrame):
            return frame.select(columns).collect()
        if isinstance(frame, pl.DataFrame):
            return frame.select(columns)
        if hasattr(frame, "__arrow_c_stream__") and hasattr(frame, "iloc"):
            found = []
            for name in columns:  # one by one: what pandas says of objects does not name their column
                reading = f"column '{name}' of "
                found.append(pl.DataFrame(frame[[name]]).select(name))
            return pl.concat(found, how="horizontal")
        if hasattr(frame, "__arrow_c_stream__"):
            return pl.DataFrame(frame).select(columns)
        if hasattr(frame, "to_dict"):  # an older pandas
            return pl.DataFrame({name: frame[name].to_numpy() for name in columns})
    except (
        pl.exceptions.PolarsError,
        pa.ArrowException,
        OSError,
        LookupError,
        TypeError,
        ValueError,
        OverflowError,
    ) as e:
        raise DataError(f"{reading}the frame cannot be read: {' '.join(str(e).split())}") from None
    raise DataError(f"expected a frame of polars or pandas, not {type(frame).__name__}")
