"""From data files to frames of events, some records at a time, in file order.

What a kind of file looks like is said in its own module: each gives batches of raw columns, which are converted here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from malloc_bench.data.errors import DataError
from malloc_bench.data.formats import times
from malloc_bench.data.formats.arrays import arrow, numpy_array, parquet
from malloc_bench.data.formats.batch import Batch, Rows, row_of, rows_at
from malloc_bench.data.formats.columns import converted, wanted
from malloc_bench.data.formats.delimited import header, table
from malloc_bench.data.formats.formats import Layout
from malloc_bench.data.formats.histories import histories
from malloc_bench.data.formats.ids import as_numbers
from malloc_bench.data.formats.objects import objects
from malloc_bench.data.formats.policies import Judge
from malloc_bench.data.sources.archive import Part, head

if TYPE_CHECKING:
    import polars as pl

log = logging.getLogger(__name__)

BLOCK = 8 << 20  # bytes of text at a time: small enough that memory is used again, not asked for
KINDS: dict[str, Callable[[Part, Layout, Mapping[str, Any], int], Iterator[Batch]]] = {
    "table": table, "json": objects, "npy": numpy_array, "parquet": parquet, "arrow": arrow,
}  # fmt: skip
#: how files begin that are not what they seem, and what would mend them
MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow", b"{": "json"}
OTHERS = {
    b"PK\x03\x04": "a zip archive or a spreadsheet", b"\x1f\x8b": "packed by gzip: name it .gz", b"FEA1": "feather 1",
    b"SQLite": "a database", b"\xd0\xcf\x11\xe0": "a spreadsheet", b"BZh": "packed by bzip2",
    b"(\xb5/\xfd": "packed by zstd", b"\xfd7zXZ": "packed by xz", b"[{": "one JSON array, where a line is an object",
}  # fmt: skip


@dataclass
class Reader:
    """Reads the parts of one source. `keep` names the feedback wanted, None for all that the layout has."""

    layout: Layout
    judge: Judge
    keep: Sequence[str] | None = None
    starts: list[tuple[int, str, Rows]] = field(default_factory=list)  # (first event, part, rows) of each batch
    events: int = 0
    latest: int = -1  # what the last event so far is ordered by
    absent: frozenset[str] = frozenset()  # optional feedback that the files turned out not to have

    @property
    def feedback(self) -> dict[str, str]:
        """Column in the file -> name, of the feedback that is read; final once there is a frame."""
        wished = {old: new for old, new in self.layout.feedback.items() if self.keep is None or new in self.keep}
        return {old: new for old, new in wished.items() if old not in self.absent}

    def frames(self, parts: Sequence[Part]) -> Iterator[pl.DataFrame]:
        """Frames of `user`, `item` (Int64 or String), `order` (Int64) and the feedback (Float32), in file order.

        Warns of times that are none. Raises DataError with file, row and value where a policy rejects what is met.
        """
        yield from self._frames(parts)
        kept = self.judge.answer("bad_time") == "keep"
        if self.layout.has_time and not kept and (doubt := times.all_in_1970(self.latest, self.layout)):
            log.warning("%s: %s: %s", parts[0].name, self.layout.time or "time", doubt)

    def _frames(self, parts: Sequence[Part]) -> Iterator[pl.DataFrame]:
        if self.layout.lines == "history":
            yield from self._events(histories(parts, self.layout, self.judge, BLOCK), parts[0].name)
            return
        if self.layout.optional and self.feedback:
            asked = [*wanted(self.layout, self.feedback)]
            self.absent = frozenset(self.feedback).difference(*(header(x, self.layout, asked, BLOCK) for x in parts))
        types = wanted(self.layout, self.feedback)
        for part in parts:
            read = KINDS[_kind(part, self.layout.encoding) if self.layout.lines == "auto" else self.layout.lines]
            yield from self._events(read(part, self.layout, types, BLOCK), part.name)

    def place(self, event: int) -> str:
        """File and row of an event by its number, for messages."""
        first, part, rows = self.starts[int(np.searchsorted([start[0] for start in self.starts], event, "right")) - 1]
        return f"{part}: row {row_of(rows, event - first)}"

    def _events(self, batches: Iterator[Batch], file: str) -> Iterator[pl.DataFrame]:
        empty = True
        for batch in batches:
            empty = False
            frame, rows = self._frame(batch)
            # only policies that reject events later on ask where each of them stood
            late = "reject" in (self.judge.answer("duplicates"), self.judge.answer("single_event_users"))
            self.starts.append((self.events, batch.file, rows if late or not len(frame) else row_of(rows, 0)))
            if len(frame):
                self.events += len(frame)
                self.latest = max(self.latest, int(frame["order"].max()))  # type: ignore[arg-type]
                yield frame
        if empty:
            raise DataError(f"{file}: the file is empty")

    def _frame(self, batch: Batch) -> tuple[pl.DataFrame, Rows]:
        import polars as pl

        frame, rows, clock = converted(batch, self.layout, self.feedback, self.judge)
        if self.layout.history:
            frame, rows = _samples(frame, rows)
        if clock is None:
            order = pl.int_range(pl.len(), dtype=pl.Int64) + self.events
            return frame.select("user", "item", order.alias("order"), *self.feedback.values()), rows
        return self._in_time(frame, clock, rows, batch.file)

    def _in_time(self, frame: pl.DataFrame, clock: pl.Series, rows: Rows, file: str) -> tuple[pl.DataFrame, Rows]:
        order, bad, must = times.ordered(clock, self.layout)
        order = order.alias("order")
        name = self.layout.time or "time"
        kept = self.judge.answer("bad_time") == "keep"
        if not kept and (other := times.other_unit(clock, self.layout)):
            raise DataError(f"{file}: row {row_of(rows, 0)}: {name}: {other} (on_bad: {{bad_time: keep}} keeps it)")
        if kept and (far := order.abs() >= times.FARTHEST).any():  # it would tie with all others that are as far
            value = times.shown(clock[far.arg_max() or 0], self.layout)
            where = f"{file}: row {row_of(rows, far.arg_max() or 0)}: {name} is {value}"
            raise DataError(f"{where}, too far from 1970 to be kept: name the unit that it is in, or bad_time: drop")
        frame = frame.select("user", "item", order, *self.feedback.values())
        if bad.any():
            at = bad.arg_max() or 0
            message = f"{file}: row {row_of(rows, at)}: {name} is {times.shown(clock[at], self.layout)}, not {must}"
            if self.judge.meet("bad_time", int(bad.sum()), message) == "drop":
                good = np.flatnonzero(~bad.to_numpy())
                return frame[good], rows_at(rows, good)
        return frame, rows


def _samples(frame: pl.DataFrame, rows: Rows) -> tuple[pl.DataFrame, Rows]:
    """The events of samples with the items before: of those that are liked, for the others have the same history."""
    import polars as pl

    at = pl.Series("\0at", np.arange(len(frame)))
    liked = frame.with_columns(at).filter(pl.col("\0label") == 1)
    words = pl.concat_str(pl.col("\0history"), pl.col("item").cast(pl.String), separator="^")
    events = liked.select("user", "\0at", item=words.str.split("^")).explode("item")
    events = events.with_columns(item=as_numbers(events["item"]))
    return events.select("user", "item"), rows_at(rows, events["\0at"].to_numpy())


def _kind(part: Part, encoding: str) -> str:
    """What a file is, by how it begins: text in columns where nothing else is known of it."""
    begins = head(part, 64)
    text = begins.decode(encoding, "ignore").removeprefix("\ufeff").encode() if b"{" in begins else b""
    for magic, what in OTHERS.items():
        if begins.startswith(magic) or b"".join(text.split()).startswith(magic):
            raise DataError(f"{part.name}: is {what}, not csv, parquet, arrow or json lines")
    begins = text.lstrip() or begins
    return next((kind for magic, kind in MAGIC.items() if begins.startswith(magic)), "table")
