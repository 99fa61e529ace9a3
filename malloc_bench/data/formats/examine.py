"""Line by line: what is amiss in a block that could not be read at once. Slow, and only ever run on such a block."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from malloc_bench.data.errors import DataError
from malloc_bench.data.formats.formats import Layout
from malloc_bench.data.formats.policies import Judge

if TYPE_CHECKING:
    import polars as pl

HISTORY = r"^\d{1,18}(\^\d{1,18})*$"


def examine(
    block: bytes,
    file: str,
    row: int,
    layout: Layout,
    types: Mapping[str, Any],
    columns: Sequence[str],
    judge: Judge,
) -> tuple[bytes, np.ndarray]:
    """The lines of a block that are as they should be, and their rows; the others have met their policies.

    `row` is the first line's number in `file`. Raises DataError where a policy rejects, with the first such row.
    """
    import polars as pl

    try:
        text = block.decode()
    except UnicodeDecodeError:
        raise no_text(block, "utf-8", file, row) from None
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    fields, broken, why = (_objects if layout.lines == "json" else _split)(lines, layout, columns)
    message = {int(i): f"{lines[i][:80]!r} {why}" for i in np.flatnonzero(broken)[:1]}
    huge, wrong = np.zeros(len(lines), bool), broken.copy()
    for name, dtype in types.items():
        raw = fields[name]
        bad, what = _bad(raw, name, dtype, layout)
        new = bad & ~wrong & ~huge
        if dtype == pl.Int64 and name in (layout.user, layout.item):
            big = new & raw.str.contains(r"^[+-]?\d{19,}$").fill_null(False).to_numpy()
            if big.any() and not huge.any():
                at = int(big.argmax())
                message[at] = f"{name} is {raw[at]!r}, beyond 63 bits"
            huge, new = huge | big, new & ~big
        if new.any():
            at = int(new.argmax())
            message[at] = f"{name} is {raw[at]!r}, {what}"
        wrong = wrong | new
    for at in sorted(message):  # of all that is amiss, the first row that is rejected is told
        case = "huge_id" if huge[at] else "bad_row"
        if judge.answer(case) == "reject":
            judge.meet(case, 1, f"{file}: row {row + at}: {message[at]}")
    for case, mask in (("bad_row", wrong), ("huge_id", huge)):
        if mask.any():
            judge.meet(case, int(mask.sum()), "")
    good = np.flatnonzero(~(wrong | huge))
    kept = "\n".join(lines[i] for i in good) + "\n"
    return kept.encode(), good + row


def no_text(data: bytes, encoding: str, file: str, row: int) -> DataError:
    """The error of bytes that are no text, with row and byte."""
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        at = row + data.count(b"\n", 0, error.start)
        return DataError(f"{file}: row {at}: byte 0x{data[error.start]:02x} is no plain text")
    return DataError(f"{file}: row {row}: is no plain text")


def _split(lines: list[str], layout: Layout, columns: Sequence[str]) -> tuple[Mapping[str, pl.Series], np.ndarray, str]:
    import polars as pl

    width = len(columns)
    text = pl.Series(lines, dtype=pl.String)
    fields = text.str.split_exact(layout.separator, width).struct.unnest()  # one more: null unless a row is too long
    uneven = fields[f"field_{width}"].is_not_null() | fields[f"field_{width - 1}"].is_null()
    why = f"has not {width} columns: {', '.join(columns)}"
    return {name: fields[f"field_{i}"] for i, name in enumerate(columns)}, uneven.to_numpy(), why


def _objects(
    lines: list[str], layout: Layout, columns: Sequence[str]
) -> tuple[Mapping[str, pl.Series], np.ndarray, str]:
    import polars as pl

    objects: list[dict[str, Any]] = []
    broken = np.zeros(len(lines), bool)
    for i, line in enumerate(lines):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        broken[i] = not isinstance(found, dict)
        objects.append(found if isinstance(found, dict) else {})
    told = {name: [None if (v := each.get(name)) is None else str(v) for each in objects] for name in columns}
    series = {name: pl.Series(values, dtype=pl.String) for name, values in told.items()}
    return series, broken, "is no JSON object"


def _bad(raw: pl.Series, name: str, dtype: Any, layout: Layout) -> tuple[np.ndarray, str]:
    """Which values of a column are not what they must be, and what they must be."""
    import polars as pl

    if name == layout.history and name:
        return ~raw.str.contains(HISTORY).fill_null(False).to_numpy(), "not numbers joined by ^"
    if name in layout.codes:
        words = list(layout.codes[name])
        return ~raw.is_in(words).fill_null(False).to_numpy(), f"not one of {', '.join(words)}"
    if dtype == pl.String:
        if name == layout.time:
            parsed = raw.str.to_datetime(layout.date, time_unit="ms", strict=False)
            return parsed.is_null().to_numpy(), f"not a date like {layout.date}"
        return (raw.is_null() | (raw == "")).fill_null(True).to_numpy(), "empty"
    return ~raw.cast(dtype, strict=False).is_finite().fill_null(False).to_numpy(), "not a number"
