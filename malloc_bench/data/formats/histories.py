"""Whole histories: `user item item ...` a line, with the times in a second file of the same shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from malloc_bench.data.errors import DataError
from malloc_bench.data.formats.batch import Batch
from malloc_bench.data.formats.delimited import text_of
from malloc_bench.data.formats.formats import Layout
from malloc_bench.data.formats.policies import Judge
from malloc_bench.data.sources.archive import Part, blocks

if TYPE_CHECKING:
    import polars as pl

NUMBERS = r"^[+-]?\d+( +[+-]?\d+)+$"
TIMES = r"^[+-]?\d+( +[+-]?\d+(\.\d+)?)+$"


def histories(parts: Sequence[Part], layout: Layout, judge: Judge, size: int) -> Iterator[Batch]:
    """Batches of an event a record; lines that are no history met the policy bad_row.

    Raises DataError where there is no file of times for those that need one, or a policy rejects.
    """
    import polars as pl

    if layout.times_in and len(parts) != 2:
        raise DataError(f"format user-items-times needs the files of items and of times, found {len(parts)}")
    for part in parts[:1] if layout.times_in else parts:
        row = 1
        clock = _lines(parts[1], layout, size) if layout.times_in else None
        files = [each.name for each in parts] if clock else [part.name]
        for block, count in blocks(part, size, layout.encoding):
            lines = _split(text_of(block, part.name, row), count)
            times = pl.Series([next(clock, "") for _ in range(count)], dtype=pl.String) if clock else None
            yield _batch(lines, times, files, row, layout, judge)
            row += count
        if row == 1:
            raise DataError(f"{part.name}: the file is empty")
        if clock and next(clock, None) is not None:
            raise DataError(f"{parts[1].name}: row {row}: has more lines than {part.name}")


def _lines(part: Part, layout: Layout, size: int) -> Iterator[str]:
    row = 1
    for block, count in blocks(part, size, layout.encoding):
        yield from _split(text_of(block, part.name, row), count)
        row += count


def _split(text: str, count: int) -> list[str]:
    return [line.strip() for line in text.split("\n")[:count]]


def _batch(
    lines: list[str], times: pl.Series | None, files: Sequence[str], row: int, layout: Layout, judge: Judge
) -> Batch:
    import polars as pl

    file = files[0]
    told = pl.Series(lines, dtype=pl.String)
    frame = pl.DataFrame({"row": np.arange(row, row + len(lines)), "words": _words(told)})
    good = told.str.contains(NUMBERS)
    if times is not None:
        frame = frame.with_columns(times=_words(times))
        same = (pl.col("words").list.len() == pl.col("times").list.len()) & (
            pl.col("words").list.first() == pl.col("times").list.first()
        )
        timed = times.str.contains(TIMES)
        good = good & timed & frame.select(same).to_series().fill_null(False)
    if not good.all():
        at = (~good).arg_max() or 0
        what = f"{file}: row {row + at}: {lines[at][:60]!r} is not a user and its items as whole numbers"
        if times is not None and told.str.contains(NUMBERS)[at]:
            what += f", with as many times in {files[1]}"
            if times[at] and not timed[at]:
                what = f"{files[1]}: row {row + at}: {times[at][:60]!r} is not a user, a whole number, and its times"
        judge.meet("bad_row", int((~good).sum()), what)
    columns = {layout.user: pl.col("words").list.first(), layout.item: pl.col("words").list.slice(1)}
    if times is not None and layout.time:
        columns[layout.time] = pl.col("times").list.slice(1)
    events = frame.filter(good).select("row", **columns).explode([name for name in columns if name != layout.user])
    return Batch(file, events["row"].to_numpy(), {name: events[name] for name in columns})


def _words(lines: pl.Series) -> pl.Series:
    return lines.str.replace_all(r" +", " ").str.split(" ")
