"""From a row of measured costs to what one user of so many events costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from malloc_bench.measure.fleet.times import Row, flops_at, pace, times
from malloc_bench.registry import find, names
from malloc_bench.results import REQUEST_STEPS
from malloc_bench.results.labels import first_step

RAW_EVENT = 12  # bytes of an id (int32) and a time (int64)
KEPT_WHOLE = ("full", "none")  # append makes them what compressing again would
MOVING = tuple(f"request_{step}_ms_p50" for step in ("load", "unpack", "pack", "write"))  # what bytes are moved by

Slopes = Mapping[str, float]  # milliseconds: step of MOVING -> of one more byte; `read`, `append` -> of one more FLOP


@dataclass(frozen=True)
class Costs:
    """Of one user of a method, at some number of events: bytes kept, and milliseconds of one core.

    read: of a request. append: of a new event. rebuild: of compressing the whole history again, prefill and statistics
    included, 0 where appending does as well. build: of the first time. raw: ids are kept, `read` rebuilds the state.
    growth: of bytes with events, in words. by_request: whether loading, unpacking, packing and writing are in them.
    """

    method: str
    bytes: float
    read: float
    append: float
    rebuild: float
    build: float
    raw: bool
    growth: str
    by_request: bool


def costs(row: Row, events: float, per_more: Slopes | None = None) -> Costs | None:
    """Of a method's row, for users of so many events; None where its bytes or its times were not measured.

    Bytes follow the line through the two lengths that were measured, beyond them those of a share are in proportion to
    events; times see `times`; where one was measured, or the row is older than measured bytes, both are in proportion,
    or constant. What more bytes take to load, unpack, pack and write, and more FLOPs at least, is `per_more`, see
    `slopes`; None: nothing.
    """
    kept = _bytes(row, events)
    if kept is None or row.get("read_cpu_ms_p50") is None:
        return None
    size, growth = kept
    raw = row.get("append_cpu_ms_p50") is None
    before = _bytes(row, row["measured_history"])
    slope = per_more or {}
    grown = None if raw else partial(_grown_bytes, row)
    reads, appends = (times(row, step, events, grown, slope.get(step, 0.0)) for step in ("read", "append"))
    method = row.get("method", row["compressor"])
    build = _grown(row, "prefill", events) + _grown(row, "compress", events)
    build = 0.0 if raw or method == "none" else build  # nothing is made of nothing
    rebuild = 0.0 if method in KEPT_WHOLE else build
    read, append = row["read_cpu_ms_p50"] * reads, (row.get("append_cpu_ms_p50") or 0.0) * appends
    steps: list[Any] = [row.get(f"request_{step}_ms_p50") for step in REQUEST_STEPS]
    if by_request := row.get("request_ms_p50") is not None and None not in steps:
        more = size - before[0] if before else 0.0  # bytes beyond those of the requests that were measured
        load, unpack, pack, write = (max(0.0, row[each] + slope.get(each, 0.0) * more) for each in MOVING)
        read = load + unpack + row["request_read_ms_p50"]  # one user at a time, as measured
        read += _more(row, "read", events, reads, grown)
        append = load + unpack + pack + write + row["request_append_ms_p50"]
        append += 0.0 if raw else _more(row, "append", events, appends, grown)
    return Costs(_name(row), size, read, append, rebuild, build, raw, growth, by_request)


def _more(row: Row, step: str, events: float, times: float, grown: Callable[[float], float] | None) -> float:
    """Milliseconds that a step of a request of one user takes more than at the measured history.

    What it takes a user of a batch, as many times as more candidates read (a prefill they share), at most in proportion
    to FLOPs: what a request of one user takes beside does not grow.
    """
    more = (row.get(f"{step}_ms_p50") or 0.0) * (times - 1)
    if grown is None:
        return more
    if step == "read":
        candidates = row.get("measured_candidates") or 1
        more *= candidates / (row.get("batch_candidates") or candidates)
    longer = (row.get("measured_history_long") or 0) > row["measured_history"]
    known = longer and row.get(f"{step}_flops") and row.get(f"{step}_flops_long")
    share = flops_at(row, step, events, False) / row[f"{step}_flops"] if known else grown(events)
    most = row[f"request_{step}_ms_p50"] * (share - 1)
    return min(more, max(most, 0.0)) if more > 0 else max(more, min(most, 0.0))


def slopes(rows: Sequence[Row]) -> dict[str, Slopes]:
    """Milliseconds that one more byte takes in each of the MOVING steps, by method, from the rows of one backbone.

    By least squares over the method's own budgets; of one size, what the full state takes beyond no history. Never less
    than nothing. `read` and `append`: what one more FLOP takes, of the full state beyond no history.
    """
    points: dict[str, list[Row]] = {}
    for row in rows:
        if None not in (*(row.get(each) for each in MOVING), _at_requests(row)):
            points.setdefault(row["compressor"], []).append(row)
    plain = _slope([row for name in KEPT_WHOLE for row in points.get(name, [])])
    full, empty = (
        next((row for row in rows if row.get("method", row["compressor"]) == name), None) for name in KEPT_WHOLE
    )
    paces = {step: pace(full, empty, step) for step in ("read", "append")}
    found: dict[str, Slopes] = {}
    for name in dict.fromkeys(row["compressor"] for row in rows):
        own = points.get(name, [])
        found[name] = {**(_slope(own) if len({_at_requests(row) for row in own}) > 1 else plain), **paces}
    return found


def _slope(rows: Sequence[Row]) -> Slopes:
    size = [_at_requests(row) or 0.0 for row in rows]
    if len(set(size)) < 2:
        return {}
    found, _ = np.polyfit(size, [[row[step] for step in MOVING] for row in rows], 1)
    return dict(zip(MOVING, np.maximum(found, 0.0).tolist()))


def _at_requests(row: Row) -> float | None:
    """Bytes of the state that requests were measured with."""
    found = _bytes(row, row["measured_history"]) if row.get("measured_history") else None
    return None if found is None else found[0]


def rebuilt(full: Row, events: float) -> Costs | None:
    """Ids kept and every read a prefill, made up from the full state's row where a run has no such method."""
    if costs(full, events) is None:
        return None
    read = _grown(full, "prefill", events) + _grown(full, "read", events)
    growth = f"{RAW_EVENT} bytes an event (assumed)"
    return Costs("recompute (made up)", RAW_EVENT * events, read, 0.0, 0.0, 0.0, True, growth, False)


def at_candidates(rows: Sequence[dict[str, Any]], candidates: int) -> list[dict[str, Any]]:
    """Rows of results with requests of so many candidates in place of the first number of them.

    A row without such requests is as one that was not measured. Raises ValueError, which names what was measured, where
    no row has them.
    """
    found: list[dict[str, Any]] = []
    known: set[int] = set()
    for row in rows:
        text, first = row.get("requests"), row.get("measured_candidates")
        by = (json.loads(text) if isinstance(text, str) else text) or {}
        known |= {int(each) for each in (*by, *([] if first is None else [first]))}
        if first == candidates:
            found.append(row)
        elif str(candidates) in by:
            found.append({**row, **by[str(candidates)], "measured_candidates": candidates, "batch_candidates": first})
        else:
            found.append({**row, "read_cpu_ms_p50": None})
    if candidates not in known:
        raise ValueError(f"--candidates {candidates}: measured were {', '.join(map(str, sorted(known))) or 'none'}")
    return found


def _bytes(row: Row, events: float) -> tuple[float, str] | None:
    """Bytes of a state of so many events, and how they grow."""
    n, most, size, largest = (row.get(name) for name in _MEASURED)
    if not n:
        return None
    if size is not None and largest is not None and most is not None and most > n:
        slope = (largest - size) / (most - n)
        growth = "constant" if slope == 0 else f"{slope:.4g} bytes an event"
        line = size + slope * (events - n)
        if slope and str(row.get("budget")).endswith("%") and not n <= events <= most:
            return (size * events / n if events < n else largest * events / most), growth  # whole slots make no line
        return max(line, size * events / n if slope > 0 and events < n else 0.0), growth
    one = size
    if (
        size is None and most is not None and most > n
    ):  # both are of the median user; a suite's own length would be no one's
        one = row.get("bytes_p50")
    if one is None:
        return None
    if "slots" in (budget := str(row.get("budget"))) or "bytes" in budget or row.get("bytes_p99") == one:
        return one, "constant (assumed)"
    return one * events / n, f"{one / n:.4g} bytes an event (assumed)"


def _grown_bytes(row: Row, events: float) -> float:
    """How many times more bytes than at the measured history a state of so many events has."""
    before, after = (_bytes(row, n) for n in (row["measured_history"], events))
    return after[0] / before[0] if after and before and before[0] else 1.0


_MEASURED = ("measured_history", "measured_history_long", "measured_bytes", "measured_bytes_long")


def _grown(row: Row, step: str, events: float) -> float:
    """CPU milliseconds of a step at so many events; 0 where it was not measured."""
    bends = step != "compress" or _bends(row)
    return (row.get(f"{step}_cpu_ms_p50") or 0.0) * times(row, step, events, bends=bends)


def _bends(row: Row) -> bool:
    """Whether the work of compressing may grow with the square of a history: not where the method names other terms."""
    first = first_step(row["compressor"])
    return first not in names("compressors") or "n^2" in find("compressors", first).growth.get("compress", "n^2")


def _name(row: Row) -> str:
    """`snapkv(window=16) at 25 %`, from a row of the board."""
    return f"{row['compressor']} at {row['budget']}" if row.get("budget") else str(row["compressor"])
