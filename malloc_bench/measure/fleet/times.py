"""How much longer a step takes on a longer history, from its wall times and FLOPs at the two that were measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Grown = Callable[[float], float]
Row = Mapping[str, Any]  # of results, or means over seeds of them


def times(
    row: Row, step: str, events: float, grown: Grown | None = None, pace: float = 0.0, bends: bool = True
) -> float:
    """How many times longer than at the measured history a step takes.

    Between the two histories that were measured, along the line through both. Shorter and longer ones by FLOPs (by that
    line where they are not counted, at least in proportion), each of which takes what it took between both, at least
    `pace` milliseconds and at most its share of the whole time: noise between two near lengths is not stretched over a
    far one. Without two lengths, in proportion to events.

    grown: of a kept state, how many times more bytes it has at so many events; noise is held between that and 1. bends:
    whether FLOPs of what is no read of a kept state may grow faster than a line, see `flops_at`.
    """
    n, long = row["measured_history"], row.get("measured_history_long")
    first, last = row.get(f"{step}_ms_p50"), row.get(f"{step}_ms_p50_long")
    if not (first and last and long is not None and long > n):
        low, high = (0.0, math.inf) if grown is None else sorted((1.0, grown(events)))
        return min(max(events / n, low), high)
    last = max(first, last)  # noise shrinks no time
    if grown is not None:
        last = min(last, first * max(1.0, grown(long)))
    slope = (last - first) / (long - n)
    line = 1 + slope / first * (events - n)
    if n <= events <= long:
        return float(line)
    at, end, whole = (n, "", first) if events < n else (long, "_long", last)
    here = row.get(f"{step}_flops{end}")
    if not here or not row.get(f"{step}_flops") or not row.get(f"{step}_flops_long"):
        share = whole / first * events / at  # of the whole time
        bound = max if events < n else min
        return float(line if grown is None and events > n else bound(line, share))
    more = row[f"{step}_flops_long"] - row[f"{step}_flops"]
    each = min(max((last - first) / more, pace), whole / here) if more > 0 else 0.0
    return float((whole + each * (flops_at(row, step, events, bends and grown is None) - here)) / first)


def flops_at(row: Row, step: str, events: float, bends: bool) -> float:
    """FLOPs of a step on a history of so many events: of a line through both lengths, exact for reads of slots.

    bends: of a parabola through no events, exact for prefills, where the work grew faster than that line.
    """
    n, long = float(row["measured_history"]), float(row["measured_history_long"])
    before, after = row[f"{step}_flops"], row[f"{step}_flops_long"]
    bend = (after / long - before / n) / (long - n)
    if bends and bend > 0:
        return max(0.0, (before / n - bend * n) * events + bend * events**2)
    return max(0.0, before + (after - before) / (long - n) * (events - n))


def pace(full: Row | None, empty: Row | None, step: str) -> float:
    """Milliseconds that one FLOP takes of the full state's longest step beyond the same step without history, or 0."""
    if full is None or empty is None:
        return 0.0
    (slow, many), (quick, few) = (
        (row.get(f"{step}_ms_p50_long"), row.get(f"{step}_flops_long")) for row in (full, empty)
    )
    if slow is None or quick is None or many is None or few is None or many <= few:
        return 0.0
    return float(max(0.0, (slow - quick) / (many - few)))
