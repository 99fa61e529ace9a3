"""What is kept at which size, and by which length of history: the best method of each family as a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from malloc_bench.report.judge import CONSTANT, REBUILT, alike, deployable
from malloc_bench.report.lines import Curve, best_of_families, draw, human_ticks, sheet
from malloc_bench.report.tables import SLICES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST = 3  # sizes that make a line
FLOORS = {CONSTANT: "a constant", "none": "no history"}
SMALLEST = 1e-9  # what is less has no place on a log axis


def curves_figure(board: pl.DataFrame, title: str, width: float = 7.0) -> Figure | None:
    """The figure of one table from its rows of `board.aggregate`; None where no method has LEAST sizes.

    Of every family the method with the largest mean over log bytes, of chains the best few that begin in different
    families, in the colours of these, and slots by lot and the newest as references; the levels of no history and of a
    constant; fidelity where there is a floor, else overlap or agreement.
    """
    what = "fidelity" if board["fidelity"].is_not_null().any() else _alike(board)
    curves = _by_size(board, what)
    if not curves:
        return None
    ends = np.array([min(c.x[0] for c in curves), max(c.x[-1] for c in curves)])
    for name, said in FLOORS.items():
        at = board.filter(pl.col("method") == name)[what].drop_nulls().to_list()[:1]
        curves += [Curve(said, None, ends, np.repeat(each, 2)) for each in at]
    figure, axes, font = sheet(width, 2.7 if width < 5 else 3.6, title)
    axes.set_xscale("log")
    human_ticks(axes.xaxis, ends[0], ends[1], 1)
    bars = any(each.ends is not None for each in curves)
    axes.set_xlabel("state (bytes a user)" + ("; bars: the range of seeds" if bars else ""))
    axes.set_ylabel(f"{what} {'to' if what == 'fidelity' else 'with'} the full state")
    axes.grid(True, axis="y", color="#e6e6e6", lw=0.6)
    draw(axes, curves, font, left=True)
    return figure


def _alike(board: pl.DataFrame) -> str:
    return "overlap@10" if board["overlap@10"].is_not_null().any() else "agreement"


def _by_size(board: pl.DataFrame, what: str) -> list[Curve]:
    rows = board.filter(
        deployable() & pl.col(what).is_not_null() & (pl.col("bytes_mean") > SMALLEST) & alike().is_not_null()
    )
    floor = board.filter(pl.col("method") == "none").select(alike()).to_series().max()
    scale = 1 / (1 - float(floor)) if what == "fidelity" else 1.0  # type: ignore[arg-type]
    found = []
    for (label, family), own in rows.group_by("compressor", "family", maintain_order=True):
        own = own.sort("bytes_mean").unique("bytes_mean", keep="last", maintain_order=True)
        if len(own) < LEAST or family == REBUILT:
            continue
        kept = own.select(what, alike().alias("alike"), "alike_lo", "alike_hi").to_numpy().T
        low, high = (kept[0] + (end - kept[1]) * scale for end in kept[2:])
        ends = (low, high) if own["seeds"].to_numpy().min() > 1 else None
        curve = Curve(str(label), str(family), own["bytes_mean"].to_numpy(), kept[0], ends)
        found.append((curve.label, str(family), _mean(curve), curve))
    return best_of_families(found)


def _mean(curve: Curve) -> float:
    """Over log bytes: what small states keep counts as much as what large ones do."""
    x = np.log(curve.x)
    return float(np.trapezoid(curve.y, x) / (x[-1] - x[0])) if x[-1] > x[0] else float(curve.y[0])


def few(board: pl.DataFrame) -> tuple[pl.DataFrame, str | None]:
    """Of one table the rows that a figure of single states has room for, those that keep most first, and the share of
    bytes that they are compared at, the smallest that half of the methods reach: of every family its best within that,
    where it has none its smallest; of chains some, and the references. `over`: how far a row is beyond the share."""
    rows = board.filter(deployable() & (pl.col("bytes_mean") > 0) & alike().is_not_null())
    rows = rows.filter(~pl.col("method").is_in(["full", *FLOORS]))
    asked = rows["budget"].str.extract(r"([\d.]+) %$").cast(pl.Float64).drop_nulls() / 100 * (1 + 1e-9)
    reached = rows.group_by("compressor").agg(pl.col("ratio").min())["ratio"].quantile(0.5, "higher")
    most = asked.filter(asked >= (reached or 0.0)).min()
    rows = rows.with_columns(alike().alias("alike"), (pl.col("ratio") - most).clip(0).fill_null(0.0).alias("over"))
    names = ("compressor", "family", "over", "alike", "cell_ids")
    found = ((name, family, (-over, kept), ids) for name, family, over, kept, ids in rows.select(names).iter_rows())
    chosen = rows.filter(pl.col("cell_ids").is_in(best_of_families(found))).sort(
        "alike", descending=True, maintain_order=True
    )
    return chosen, None if most is None else f"{100 * float(most):.3g} %"  # type: ignore[arg-type]


def history_figure(board: pl.DataFrame, title: str, width: float = 7.0) -> Figure | None:
    """What `few` methods and the floors keep of the full state's order by length of history, from the rows of one
    table of `tables.sliced`; None where all users' histories are about as long, or nothing was compressed."""
    what = _alike(board)
    chosen, share = few(board)
    chosen = chosen.filter((pl.col("family") != REBUILT) & (pl.col("over") == 0))
    floors = board.filter(pl.col("method").is_in(FLOORS))
    users = {part: int(n) for part in SLICES if (n := board[f"n_users {part}"].max())}  # type: ignore[arg-type]
    curves = []
    for row in (*chosen.iter_rows(named=True), *floors.iter_rows(named=True)):
        kept = [row[f"{what} {part}"] for part in users]
        label, family = (said, None) if (said := FLOORS.get(row["method"])) else (row["compressor"], row["family"])
        if None not in kept:
            curves.append(Curve(label, family, np.arange(len(kept)), np.array(kept)))
    if len(users) < 2 or len(curves) <= len(floors):
        return None
    figure, axes, font = sheet(width, 2.7 if width < 5 else 3.6, title)
    axes.set_xticks(range(len(users)), [f"{part}\n{n:,} users" for part, n in users.items()])
    axes.set_xlabel("events in the history" + (f"; states ≤ {share} of the bytes" if share else ""))
    axes.set_ylabel(f"{what} with the full state")
    axes.grid(True, axis="y", color="#e6e6e6", lw=0.6)
    draw(axes, [*curves, Curve("full state", None, curves[0].x, np.ones(len(users)))], font, left=False)
    return figure
