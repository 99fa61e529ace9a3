"""A method against named ones, paired over users: at equal bytes, and over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl

from malloc_bench.evaluation.metrics import holm, slices
from malloc_bench.report.board import GROUP, aggregate, sections
from malloc_bench.report.judge import alike, remark
from malloc_bench.report.recommend import LEVEL
from malloc_bench.report.render import Column, filled, interval, number, p_value, tell, terminal, words
from malloc_bench.report.users import Both, Users, columns_of, difference

if TYPE_CHECKING:
    from rich.console import Console


class Curve(NamedTuple):
    """A method's cells by budget, from the smallest state up: mean bytes and the ids of each."""

    budgets: list[str | None]
    size: list[float]
    cells: list[list[str]]


def verdict(frame: pl.DataFrame, folder: str | Path, method: str, against: Sequence[str]) -> pl.DataFrame:
    """Paired differences of a method (a bare name) to each of `against`, in every table, one row a pair and budget.

    `alike` is what is judged first, overlap@10 or agreement: its difference with interval `_lo`, `_hi`, p and p_holm
    (over the table), `wins` and `losses` of users, and by history length; `main`: the same of NDCG@10 or the GAUC. A
    baseline without a budget is held against the method's values at its bytes, between its budgets by interpolation in
    log bytes, a smaller one against its smallest state. Rows with `budget` "all" have the mean over log bytes where
    both have states: the area between their curves over its width. Pairs without values by user are left out.
    `smaller`: the baseline is smaller than all of the method's states; `said`: what must be known of the table first;
    headroom: whether it can judge at all, see `judge.judged`.
    """
    users = Users(frame, folder)
    found: list[dict[str, Any]] = []
    for head, rows in sections(aggregate(frame)):
        pairs: list[dict[str, Any]] = []
        for own in _labels(rows, method):
            mine = _curve(rows, own)
            for other in (label for name in against for label in _labels(rows, name)):
                pairs += _pairs(mine, _curve(rows, other), users, {"method": own, "against": other})
        for row, p in zip(pairs, holm(each["p"] for each in pairs)):
            key = dict(zip(GROUP, rows.select(GROUP).row(0)))
            said = {"said": remark(rows), "headroom": rows["headroom"][0]}
            found.append({**key, "n_users": rows["n_users"][0], "table": head, **row, **said, "p_holm": float(p)})
    return pl.DataFrame(found, infer_schema_length=None)


def _labels(rows: pl.DataFrame, name: str) -> list[str]:
    """Labels of the methods of a table that go by a name, or by that label."""
    known = rows.filter((pl.col("method") == name) | (pl.col("compressor") == name))
    return known["compressor"].unique(maintain_order=True).to_list()


def _curve(rows: pl.DataFrame, label: str) -> Curve:
    own = rows.filter((pl.col("compressor") == label) & alike().is_not_null()).sort("bytes_mean", nulls_last=True)
    cells = [each.split() for each in own["cell_ids"]]
    return Curve(own["budget"].replace("", None).to_list(), own["bytes_mean"].fill_null(0.0).to_list(), cells)


def _pairs(mine: Curve, other: Curve, users: Users, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row for each size that both have, and one for the area between their curves."""
    rows = []
    for budget, size, cells in zip(other.budgets, other.size, other.cells):
        if budget in mine.budgets and budget is not None:
            i = mine.budgets.index(budget)
            both = {what: users.both(mine.cells[i], cells, what) for what in ("alike", "main")}
        else:
            both = {what: _at(mine, size, cells, users, what) for what in ("alike", "main")}
        at = {"budget": budget, "bytes": size, "smaller": bool(mine.size) and size < mine.size[0] / 1.1}
        if row := _row(both["alike"], both["main"]):
            rows.append({**names, **at, **row})
    if (area := _area(mine, other, users)) is not None and (row := _row(area, None)):
        rows.append({**names, "budget": "all", "bytes": None, "smaller": False, **row})
    return rows


def _row(alike_: Both | None, main_: Both | None) -> dict[str, Any] | None:
    found, also = difference(alike_), difference(main_)
    if found is None or alike_ is None:
        return None
    by_length = {
        part: [int((alike_.a > alike_.b)[mask].sum()), int((alike_.a < alike_.b)[mask].sum())]
        for part, mask in slices(alike_.length).items()
        if mask.any()
    }
    return {
        **columns_of("alike", found),
        **columns_of("main", also),
        "p": found.p,
        "p_main": None if also is None else also.p,
        "wins": found.wins,
        "losses": found.losses,
        "users": found.users,
        "by_length": "; ".join(f"{part}: {won}/{lost}" for part, (won, lost) in by_length.items()),
    }


def _at(mine: Curve, size: float, cells: list[str], users: Users, what: str) -> Both | None:
    """A method's values at a size between those of its budgets, beside one state of that size; None above them.

    A smaller state stands beside the method's smallest.
    """
    if not mine.size or size > mine.size[-1]:
        return None
    above = int(np.searchsorted(mine.size, size))
    upper = users.both(mine.cells[above], cells, what)
    if above == 0 or upper is None:
        return upper
    lower = users.both(mine.cells[above - 1], cells, what)
    if lower is None or not np.array_equal(lower.user, upper.user):
        return None
    low, high = np.log(mine.size[above - 1]), np.log(mine.size[above])
    share = (np.log(size) - low) / (high - low) if high > low else 1.0
    return upper._replace(a=(1 - share) * lower.a + share * upper.a)


def _area(mine: Curve, other: Curve, users: Users) -> Both | None:
    """Means of two methods' values over log bytes, where both curves have states; None where they share no range."""
    if min(len(mine.size), len(other.size)) < 2 or min(mine.size[0], other.size[0]) <= 0:
        return None
    xs = [np.log(np.maximum.accumulate(curve.size)) for curve in (mine, other)]
    lo, hi = max(x[0] for x in xs), min(x[-1] for x in xs)
    if hi <= lo:
        return None
    grid = np.unique(np.clip(np.concatenate(xs), lo, hi))
    steps = np.diff(grid, prepend=grid[0]) + np.diff(grid, append=grid[-1])
    values = [[users.both(cells, mine.cells[-1]) for cells in curve.cells] for curve in (mine, other)]  # same users
    found = [[one for one in each if one is not None] for each in values]
    first = found[0][0] if found[0] else None
    if first is None or list(map(len, found)) != list(map(len, values)):
        return None
    if not all(np.array_equal(one.user, first.user) for each in found for one in each):
        return None
    means = []
    for x, each in zip(xs, found):
        weights = np.stack([np.interp(grid, x, np.eye(len(x))[i]) for i in range(len(x))]) @ (steps / steps.sum())
        means.append(weights @ np.stack([one.a for one in each]))
    return Both(first.user, first.length, means[0], means[1])


# ---- in words


def sentences(rows: pl.DataFrame) -> list[str]:
    """Two sentences on a method in one table, made from rows of `verdict`: at equal bytes, and over all of them."""
    (name,) = rows["method"].unique()
    parts = []
    for (other,), sizes_of in rows.filter(pl.col("budget").fill_null("") != "all").group_by(
        "against", maintain_order=True
    ):
        sure, change = sizes_of.filter(pl.col("p_holm") < LEVEL), sizes_of["alike"].sort().to_list()
        won, lost = (sure.filter(test).height for test in (pl.col("alike") > 0, pl.col("alike") < 0))
        size = " to ".join(f"{each:+.3f}" for each in dict.fromkeys((change[0], change[-1])))
        one, sizes = len(change) == 1, f"{len(change)} sizes"
        smaller = sizes_of["smaller"].all()
        other = f"{other} (which is smaller)" if smaller else other
        counted = [
            f"{word} than {other} at {'its only size' if one else f'{n} of {sizes}'}"
            for word, n in (("better", won), ("worse", lost))
            if n
        ]
        said = " and ".join(counted) or f"not to be told apart from {other}'s at {'its only size' if one else sizes}"
        parts.append(f"{said} ({size})")
    if not parts:
        return []
    first = f"At equal bytes {name} keeps the full state's order " + "; ".join(parts) + "."
    area = rows.filter(pl.col("budget") == "all").sort("alike")
    if area.is_empty():
        return [first]
    means = [
        f"{row['alike']:+.3f} [{row['alike_lo']:+.3f}, {row['alike_hi']:+.3f}] to {row['against']}"
        for row in area.iter_rows(named=True)
    ]
    return [first, f"Over the whole range of bytes that is, on average, {', '.join(means)}."]


COLUMNS = (
    words("against", "against", most=19),
    words("budget", "budget", most=9),
    interval("alike", "Δ order [95 % interval]", "+z.3f"),
    p_value("p_holm"),
    Column("users won/lost", lambda row: f"{row['wins']}/{row['losses']}", rank=2),
    interval("main", "Δ accuracy [95 % interval]", "+z.4f", rank=1),
    number("bytes", "of (bytes)", ",.0f", rank=3),
    words("by_length", "won/lost by history", rank=4, most=30),
)
NOTE = (
    "Order: overlap@10 with the full state, or agreement; accuracy: NDCG@10, or GAUC. Differences are paired over "
    "users, seeds pooled; p corrected over each table; all: the mean over log bytes where both have states."
)


def print_verdict(found: pl.DataFrame, console: Console) -> None:
    """Print what `verdict` found: a table and two sentences for each data set and backbone."""
    if found.is_empty():
        tell(console, "No pair of methods has values by user on the same users: nothing to compare.")
        return
    for (head, own), rows in found.group_by("table", "method", maintain_order=True):
        if rows["said"][0]:
            tell(console, rows["said"][0], "bold yellow")
        console.print(terminal(rows, filled(rows, COLUMNS), f"{head}: {own}", console.width))
        for line in sentences(rows) if rows["headroom"][0] is not False else ():
            tell(console, line)
        console.print()
    tell(console, NOTE, "dim")
