"""JSON lines: an object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from malloc_bench.data.formats.batch import Batch
from malloc_bench.data.formats.delimited import text_of
from malloc_bench.data.formats.formats import Layout
from malloc_bench.data.sources.archive import PACKED, Part, blocks

if TYPE_CHECKING:
    import polars as pl


def objects(part: Part, layout: Layout, types: Mapping[str, Any], size: int) -> Iterator[Batch]:
    """Batches of the named keys as text, `size` bytes of the file at a time; a key that is not there is null."""
    row, names = 1, list(types)
    for block, count in blocks(part, size, layout.encoding):
        found = _read(block, names, count)
        yield Batch(part.name, row, found) if found else _one_by_one(block, part.name, row, names)
        row += count


def _read(block: bytes, names: Sequence[str], count: int) -> dict[str, pl.Series] | None:
    import polars as pl

    if block.startswith(PACKED):
        return None
    try:
        found = pl.read_ndjson(block, schema=dict.fromkeys(names, pl.String))
    except (pl.exceptions.PolarsError, OSError):
        return None
    # lists are not text, nor is half a surrogate, of which polars makes a NUL
    nested = any(found[name].str.contains(r"^[\[{]|\x00").any() for name in names)
    return {name: found[name] for name in names} if len(found) == count and not nested else None


def _one_by_one(block: bytes, file: str, row: int, names: Sequence[str]) -> Batch:
    """Line by line: for NaN, which is no JSON but stands in many a file, and for what is no object at all."""
    import polars as pl

    lines = text_of(block, file, row).removesuffix("\n").split("\n")
    found: list[dict[str, Any]] = []
    broken = np.zeros(len(lines), bool)
    for at, line in enumerate(lines):
        try:
            each = json.loads(line, parse_int=_whole, object_pairs_hook=_first)
        except (ValueError, RecursionError):
            each = None
        broken[at] = not isinstance(each, dict) or any(isinstance(each.get(name), (list, dict)) for name in names)
        found.append({} if broken[at] else each)
    columns = {name: pl.Series(name, [_text(each.get(name)) for each in found], dtype=pl.String) for name in names}
    return Batch(file, row, columns, broken, lambda at: f"{lines[at][:80]!r} is no JSON object of {', '.join(names)}")


def _first(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a key that stands there twice the first value counts, as polars has it."""
    return dict(reversed(pairs))


def _whole(digits: str) -> str:
    """A whole number as text: an id may have any number of digits; -0 is 0, as polars has it."""
    return "0" if digits == "-0" else digits


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value if value is None else value.encode("utf-8", "replace").decode()  # half a surrogate is no text
    if isinstance(value, float):
        return np.format_float_positional(value, trim="-")  # as polars has it
    return str(value).lower() if isinstance(value, bool) else str(value)
