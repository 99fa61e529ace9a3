"""From the lines of data files to frames of events, a block of lines at a time, in file order.

A block is read by polars at once; only where something in it is amiss is it looked at line by line (`examine.py`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from malloc_bench.data.errors import DataError
from malloc_bench.data.formats.examine import HISTORY, examine, no_text
from malloc_bench.data.formats.formats import Layout
from malloc_bench.data.formats.policies import Judge
from malloc_bench.data.sources.archive import DAMAGE, Part, blocks, read_whole

if TYPE_CHECKING:
    import polars as pl

BLOCK = 8 << 20  # bytes of text at a time: small enough that memory is used again, not asked for
LATEST = 4_102_444_800  # unix seconds of 2100-01-01: no event is that late


@dataclass
class Reader:
    """Reads the parts of one source. `keep` names the feedback wanted, None for all that the layout has."""

    layout: Layout
    judge: Judge
    keep: Sequence[str] | None = None
    starts: list[tuple[int, str, int]] = field(default_factory=list)  # (first event, part, its row) of each block
    events: int = 0

    @property
    def feedback(self) -> dict[str, str]:
        """Column in the file -> name, of the feedback that is read."""
        return {old: new for old, new in self.layout.feedback.items() if self.keep is None or new in self.keep}

    def frames(self, parts: Sequence[Part]) -> Iterator[pl.DataFrame]:
        """Frames of `user`, `item` (Int64 or String), `order` (Int64) and the feedback (Float32), in file order.

        Raises DataError with file, row and value where a policy rejects what is met.
        """
        kinds = {"table": self._table, "json": self._json, "npy": self._array, "parquet": self._array}
        if self.layout.lines == "history":
            found = self._histories(parts)
        else:
            found = (frame for part in parts for frame in kinds[self.layout.lines](part))
        for frame in found:
            if len(frame):
                self.events += len(frame)
                yield frame

    def place(self, event: int) -> str:
        """File and row of an event by its number, for messages; in files with several events a line, near it."""
        first, part, row = self.starts[int(np.searchsorted([start[0] for start in self.starts], event, "right")) - 1]
        return f"{part}: row {row + event - first}"

    # ---- kinds of files

    def _table(self, part: Part) -> Iterator[pl.DataFrame]:
        columns: Sequence[str] | None = self.layout.columns
        row = 1
        for block, lines in blocks(part, BLOCK):
            if columns is None:
                head, _, block = block.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
                columns = self._header(head, part.name)
                row, lines = row + 1, lines - 1
            if self.layout.encoding == "latin-1":
                block = block.decode("latin-1").encode()
            if block and not block.isspace():
                read = partial(self._read, schema=self._schema(columns))
                yield self._checked(block, part.name, row, lines, read, columns)
            row += lines
        self._not_empty(part.name, header=self.layout.columns is None and columns is not None)

    def _json(self, part: Part) -> Iterator[pl.DataFrame]:
        import polars as pl

        types, row = self._types(), 1
        for block, lines in blocks(part, BLOCK):
            if not block.isspace():
                yield self._checked(
                    block, part.name, row, lines, lambda text, n: pl.read_ndjson(text, schema=types), list(types)
                )
            row += lines
        self._not_empty(part.name)

    def _not_empty(self, file: str, header: bool = False) -> None:
        if not any(part == file for _, part, _ in self.starts[-1:]):
            raise DataError(f"{file}: the file is empty" + (" but for its header" if header else ""))

    def _histories(self, parts: Sequence[Part]) -> Iterator[pl.DataFrame]:
        """`user item item ...` a line; with times, the second part says them in the same shape."""
        times: Any = None
        if self.layout.times_in:
            if len(parts) != 2:
                raise DataError(f"format user-items-times needs the files of items and of times, found {len(parts)}")
            times = parts[1].open()
            parts = parts[:1]
        try:
            for part in parts:
                row = 1
                for block, _ in blocks(part, BLOCK):
                    lines = block.splitlines()
                    yield self._history(lines, list(islice(times, len(lines))) if times else None, part.name, row)
                    row += len(lines)
                self._not_empty(part.name)
        except DAMAGE as error:
            raise DataError(f"a file of times is cut in the middle: {error}") from None
        finally:
            if times:
                times.close()

    def _history(self, lines: list[bytes], times: list[bytes] | None, file: str, row: int) -> pl.DataFrame:
        import polars as pl

        def numbers(text: list[bytes]) -> pl.DataFrame:
            try:
                words = pl.Series([line.decode("ascii") for line in text]).str.strip_chars().str.split(" ")
            except UnicodeDecodeError:
                raise no_text(b"\n".join(text), "ascii", file, row) from None
            return pl.DataFrame({"line": np.arange(len(text)), "text": words}).with_columns(
                n=pl.col("text").list.len(), value=pl.col("text").cast(pl.List(pl.Int64), strict=False)
            )

        items = numbers(lines)
        bad = items.select(
            bad=(pl.col("n") < 2) | pl.col("value").list.eval(pl.element().is_null()).list.any()
        ).to_series()
        columns = {"user": pl.col("value").list.first(), "item": pl.col("value").list.slice(1)}
        if times is not None:
            clock = numbers(times + [b""] * (len(lines) - len(times)))
            same = (clock["n"] == items["n"]) & (clock["value"].list.first() == items["value"].list.first())
            wrong = clock["value"].list.eval(pl.element().is_null()).list.any()
            bad = bad | ~same.fill_null(False) | wrong.fill_null(True)
            items = items.with_columns(order=clock["value"].list.slice(1))
            columns["order"] = pl.col("order")
        if bad.any():
            at = bad.arg_max() or 0
            what = "is not a user and its items as whole numbers" + (", with as many times" if times else "")
            self.judge.meet("bad_row", int(bad.sum()), f"{file}: row {row + at}: {_short(lines[at])} {what}")
        self.starts.append((self.events, file, row))
        frame = items.filter(~bad).select(**columns).explode([name for name in columns if name != "user"])
        if times is None:
            return frame.with_columns(order=pl.int_range(pl.len()) + self.events)
        return self._in_time(frame, file, None)

    def _array(self, part: Part) -> Iterator[pl.DataFrame]:
        import polars as pl

        layout, data = self.layout, read_whole(part)
        if not data:
            raise DataError(f"{part.name}: the file is empty")
        names = [layout.user, layout.item, layout.time or ""]
        try:
            if layout.lines == "npy":
                rows = np.load(io.BytesIO(data), allow_pickle=False)
                if rows.ndim != 2 or rows.shape[1] != 3 or rows.dtype.kind not in "iu":
                    raise DataError(
                        f"{part.name}: holds {rows.dtype}{list(rows.shape)}, not rows of {', '.join(names)}"
                    )
                frame = pl.DataFrame(rows, schema=names)
            else:
                frame = pl.read_parquet(io.BytesIO(data))
        except (pl.exceptions.PolarsError, OSError, ValueError) as error:
            kind = "numpy array" if layout.lines == "npy" else "parquet"
            raise DataError(f"{part.name}: no readable {kind}: {str(error).splitlines()[0]}") from None
        for name in names:
            if name not in frame.columns:
                raise DataError(f"{part.name}: no column '{name}' among {', '.join(frame.columns)}")
            if not frame[name].dtype.is_integer():
                raise DataError(f"{part.name}: {name} holds {frame[name].dtype}, not whole numbers")
            if frame[name].has_nulls():
                raise DataError(f"{part.name}: row {(frame[name].is_null().arg_max() or 0) + 1}: {name} is missing")
        if frame.is_empty():
            raise DataError(f"{part.name}: the file is empty")
        self.starts.append((self.events, part.name, 1))
        events = frame.select(user=pl.col(names[0]).cast(pl.Int64), item=pl.col(names[1]).cast(pl.Int64))
        order = frame[names[2]].cast(pl.Int64)
        yield self._in_time(events.with_columns(order=order), part.name, None)

    # ---- one block

    def _read(self, text: bytes, lines: int, schema: dict[str, Any]) -> pl.DataFrame | None:
        """The columns that are wanted, or None where some line has more or fewer than it must."""
        import polars as pl

        single = self.layout.separator[0]
        if np.count_nonzero(np.frombuffer(text, np.uint8) == ord(single)) != lines * (len(schema) - 1):
            return None  # polars takes a line that ends too soon for one with empty columns
        frame = pl.scan_csv(
            text, has_header=False, schema=schema, separator=single, quote_char=None, empty_string_is_null=False
        )
        wanted = [*self._types(), *(name for name in schema if name.startswith("\0"))]
        found = frame.select(wanted).collect()
        return found if len(found) == lines else None

    def _header(self, head: bytes, file: str) -> list[str]:
        try:
            columns = [name.strip().partition(":")[0] for name in head.decode().split(self.layout.separator)]
        except UnicodeDecodeError:
            raise no_text(head, "utf-8", file, 1) from None
        for name in self._types():
            if head.strip() and name not in columns:
                raise DataError(f"{file}: row 1: no column '{name}' among {', '.join(columns)}")
        return columns

    def _types(self) -> dict[str, Any]:
        """What is read, by column, and as what."""
        import polars as pl

        layout = self.layout
        times = {"date": pl.String, "s.fraction": pl.Float64, "order": pl.Float64}
        types: dict[str, Any] = {
            name: pl.String if name in layout.text else pl.Int64 for name in (layout.user, layout.item)
        }
        if layout.time:
            types[layout.time] = times.get(layout.unit, pl.Int64)
        if layout.history:
            types |= {layout.label: pl.Int64, layout.history: pl.String}
        return types | {name: pl.String if name in layout.codes else pl.Float32 for name in self.feedback}

    def _schema(self, columns: Sequence[str]) -> dict[str, Any]:
        """Every column of the file in order; the nothing between the two signs of a `::` is a column that must be."""
        import polars as pl

        types = self._types()
        schema: dict[str, Any] = {}
        for i, name in enumerate(columns):
            if i and len(self.layout.separator) == 2:
                schema[f"\0{i}"] = pl.String
            schema[name] = types.get(name, pl.String)
        return schema

    def _checked(
        self, block: bytes, file: str, row: int, lines: int, read: Any, columns: Sequence[str]
    ) -> pl.DataFrame:
        """The events of a block; what its lines have amiss meets its policy, then the rest is read again."""
        import polars as pl

        def tried(text: bytes, lines: int) -> pl.DataFrame | None:
            try:
                found = read(text, lines)
                return None if found is None else self._converted(found)
            except pl.exceptions.PolarsError:
                return None

        rows, frame = None, tried(block, lines)
        if frame is None:
            kept, rows = examine(block, file, row, self.layout, self._types(), columns, self.judge)
            self.starts.append((self.events, file, row))
            if not len(rows):
                return pl.DataFrame()
            frame = tried(kept, len(rows))
            if frame is None:
                raise DataError(f"{file}: rows {row} to {rows[-1]}: cannot be read, for a reason no line shows")
        if self.layout.history:
            frame = frame.filter(pl.col("label") == 1)  # the other sample of a pair has the same history
            words = pl.concat_str(pl.col("history"), pl.col("item").cast(pl.String), separator="^")
            frame = frame.select("user", item=words.str.split("^").cast(pl.List(pl.Int64))).explode("item")
            rows = None
        self.starts.append((self.events, file, row))
        if self.layout.time is None:
            return frame.with_columns(order=pl.int_range(pl.len()) + self.events)
        return self._in_time(frame, file, rows)

    def _converted(self, frame: pl.DataFrame) -> pl.DataFrame | None:
        """The columns under our names, or None where a value is missing or not what it must be."""
        import polars as pl

        layout = self.layout
        fillers = [name for name in frame.columns if name.startswith("\0")]
        empty = [name for name in layout.text if (frame[name] == "").any()]
        if empty or any((frame[name] != "").any() for name in fillers) or sum(frame.null_count().row(0)):
            return None
        columns: dict[str, pl.Expr] = {"user": pl.col(layout.user), "item": pl.col(layout.item)}
        if layout.history:
            columns |= {"label": pl.col(layout.label), "history": pl.col(layout.history)}
        if layout.unit == "date" and layout.time:
            stamp = pl.col(layout.time).str.to_datetime(layout.date, time_unit="ms", strict=False)
            columns["order"] = stamp.dt.epoch("s")
        elif layout.time:
            columns["order"] = pl.col(layout.time)
        for old, new in self.feedback.items():
            words = layout.codes.get(old)
            told = pl.col(old).replace_strict(words, default=None) if words else pl.col(old)
            columns[new] = told.cast(pl.Float32)
        frame = frame.select(**columns)
        floats = [name for name, dtype in frame.schema.items() if dtype.is_float()]
        if layout.history and not frame["history"].str.contains(HISTORY).all():
            return None
        finite = all(frame[name].is_finite().all() for name in floats)
        return frame if finite and not sum(frame.null_count().row(0)) else None

    def _in_time(self, frame: pl.DataFrame, file: str, rows: np.ndarray | None) -> pl.DataFrame:
        """`order` as whole seconds (or milliseconds), or as integers that compare as the file's numbers do."""
        import polars as pl

        unit, raw = self.layout.unit, frame["order"]
        if unit == "order" and raw.dtype.is_integer():
            return frame
        if unit == "order":
            order, bad = pl.Series(raw.to_numpy().view(np.int64)), raw < 0  # floats from 0 on compare as their bits do
            must = "a number from 0 on"
        else:
            order = (raw * 1000).round() if unit == "s.fraction" else raw * 60 if unit == "minutes" else raw
            bad = (order < 0) | (order >= LATEST * self.layout.per_second)
            order = order.cast(pl.Int64, strict=False).fill_null(2**62)
            must = "a time between 1970 and 2099"
        frame = frame.with_columns(order=order)
        if bad.any():
            at = bad.arg_max() or 0
            where = self.place(self.events + at) if rows is None else f"{file}: row {rows[at]}"
            message = f"{where}: {self.layout.time or 'time'} is {raw[at]}, not {must}"
            if self.judge.meet("bad_time", int(bad.sum()), message) == "drop":
                frame = frame.filter(~bad)
        return frame


def _short(line: bytes) -> str:
    return repr(line.decode("latin-1")[:60])
