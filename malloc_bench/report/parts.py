"""What the bytes of a state hold: keys and values, their scales, positions, ids ... Knows results only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from malloc_bench.report.board import aggregate, newest, sections
from malloc_bench.report.evidence import HEAD, LABELS
from malloc_bench.report.judge import remark
from malloc_bench.report.render import Block, Column, Table, filled, number
from malloc_bench.report.style import OTHER, PARTS
from malloc_bench.results import complete

PREFIX = "bytes of "  # of the columns of a frame that hold the bytes of one part each
OLDER = "{} of {} rows are older than bytes by part and have none: run their suite anew"
_TINTS = {"scales": (0.55, 255), "sizes": (0.75, 255), "index": (0.45, 0)}  # how far a colour goes to white or black


def order(part: str) -> tuple[int, str]:
    """Numbers of fields come first, each before its scales, then what is known of slots and events."""
    names, field = list(PARTS), part.partition(" ")[0]
    return names.index(field) if field in names else len(names), part


def colour(part: str) -> str:
    """Of a part: scales are lighter than what they scale, an index is darker; grey of a field that is not known."""
    field, _, rest = part.partition(" ")
    if rest in PARTS:  # ids that several fields share
        return PARTS[rest]
    base, (share, end) = PARTS.get(field, OTHER), _TINTS.get(rest, (0.0, 0))
    mixed = (round((1 - share) * int(base[i : i + 2], 16) + share * end) for i in (1, 3, 5))
    return f"#{''.join(f'{each:02X}' for each in mixed)}"


def told_apart(frame: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """The newest rows of a results frame with a column for every part that some row has, and these columns in `order`:
    bytes, 0 where a state has no such part, null in rows that were written before parts were told apart."""
    rows = newest(complete(frame))
    found = [json.loads(text or "{}") for text in rows["bytes_by_part"]]
    names = sorted({name for each in found for name in each}, key=order)
    columns = {f"{PREFIX}{name}": [each.get(name, 0.0) if each else None for each in found] for name in names}
    return rows.with_columns(pl.Series(name, own, pl.Float64) for name, own in columns.items()), list(columns)


def parts_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Part -> bytes, of a row with the columns of `told_apart`: those that it has."""
    return {name.removeprefix(PREFIX): value for name, value in row.items() if name.startswith(PREFIX) and value}


def by_part(frame: pl.DataFrame) -> pl.DataFrame:
    """Mean bytes a user of each part of every method's state; they add up to `bytes_mean`."""
    rows, columns = told_apart(frame)
    return aggregate(rows, columns).select(*HEAD, "bytes_mean", *columns)


def _blocks(data: pl.DataFrame) -> Iterator[Block]:
    """Of each table the rows that have parts, in bytes and in percent of the state; how many have none is said."""
    names = [name for name in data.columns if name.startswith(PREFIX)]
    columns = (*LABELS, number("bytes_mean", "state (bytes)", ",.0f"), *map(_column, names))
    for head, group in sections(data):
        rows = group.filter(pl.any_horizontal(pl.lit(False), *(pl.col(name).is_not_null() for name in names)))
        missing = [OLDER.format(len(group) - len(rows), len(group))] if len(rows) < len(group) else []
        yield Block(head, rows, filled(rows, columns) or LABELS, remark(group), missing)


def _column(name: str) -> Column:
    def text(row: Mapping[str, Any]) -> str:
        return f"{row[name]:,.0f} ({row[name] / sum(parts_of(row).values()):.0%})" if row[name] else ""

    return Column(name.removeprefix(PREFIX), text)


TABLE = Table(by_part, blocks=_blocks)
