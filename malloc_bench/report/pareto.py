"""What every method keeps, by the bytes of its state and by the cost of a read; what no other beats is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl

from malloc_bench.report.curves import FLOORS, SMALLEST
from malloc_bench.report.judge import CONSTANT, REBUILT, deployable, of_most_trainings
from malloc_bench.report.lines import Curve, human_ticks, lay_out, name_ends, sheets
from malloc_bench.report.style import COLOURS, FLOOR, MARKS, OTHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 6  # methods on a front
FRONT = "#111111"


class Panel(NamedTuple):
    x: str
    y: str
    xlabel: str
    unit: int | None


def panels(board: pl.DataFrame, small: bool) -> list[Panel]:
    """Of what was measured: what is kept of the full state's order, and accuracy where there is room, by bytes and by
    the cost of a read, the best of what stands in for it."""
    costs = {"read_ratio": "read (× full)", "read_ms_p50": "read (ms, p50)", "read_flops": "read (FLOPs)"}
    cost = next((name for name in costs if board[name].is_not_null().any()), "read_flops")
    good, alike = ("gauc", "agreement") if board["gauc"].is_not_null().any() else ("ndcg@10", "overlap@10")
    kept = "fidelity" if board["fidelity"].is_not_null().any() else alike
    by = {"bytes_mean": ("state (bytes a user)", 1), cost: (costs[cost], 2 if cost == "read_flops" else None)}
    judged = (kept,) if small and board[kept].is_not_null().any() else (kept, good)
    found = [Panel(x, y, *said) for x, said in by.items() for y in judged]
    return [each for each in found if _points(board.filter(pl.col("method") != "none"), each)]  # a level needs ends


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, value) that no other one beats: none is as cheap and better, or as good and cheaper."""
    best: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    return best


def pareto_figure(board: pl.DataFrame, title: str, width: float = 7.0) -> Figure | None:
    """The figure of one table from its rows of `board.aggregate`; None where nothing was measured.

    A family is a colour and a mark. The stepped line is the front of what keeps a state (ids, which are rebuilt for
    every read, and means over fewer trainings than others' are drawn beside it); methods that hold most of it are
    named, with their paired intervals.
    """
    small, board = width < 5, _of_all_trainings(board)
    shown = panels(board, small)
    if not shown:
        return None
    figure, every, font = sheets(len(shown), width, 2.6, title)
    for axes, panel in zip(every, shown):
        for (family,), rows in _methods(board).group_by("family", maintain_order=True):
            colour, mark = COLOURS.get(str(family), OTHER), MARKS.get(str(family), "o")
            axes.plot(
                *_xy(_points(rows, panel)), ls="none", color=colour, marker=mark, ms=font / 2, mec="white", mew=0.3,
                alpha=0.6, gid=f"family:{family}",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_ylabel({"ndcg@10": "NDCG@10", "gauc": "GAUC"}.get(panel.y, panel.y))
        axes.set_xlabel(panel.xlabel)
        axes.grid(True, axis="y", color="#e6e6e6", lw=0.6)
    _legend(figure, board, font, small)
    lay_out(figure)
    for axes, panel in zip(every, shown):
        _front(axes, panel, board, font)
    return figure


def _of_all_trainings(board: pl.DataFrame) -> pl.DataFrame:
    """Accuracy of fewer trainings than others have as it would be of all: the full state's, plus what is paired."""
    fewer = pl.col("seeds") < pl.col("seeds_total")
    full = {name: pl.col(name).filter(pl.col("method") == "full").first() for name in ("ndcg@10", "gauc")}
    return board.with_columns(
        pl.when(fewer).then(pl.coalesce(of + pl.col(f"delta_{name}"), name)).otherwise(name).alias(name)
        for name, of in full.items()
    )


def _methods(board: pl.DataFrame) -> pl.DataFrame:
    return board.filter(deployable() & ~pl.col("method").is_in(["full", *FLOORS]))


def _front(axes: Axes, panel: Panel, board: pl.DataFrame, font: float) -> None:
    """The full state, the floors and the front, and the names of what is on it."""
    full = _points(board.filter(pl.col("method") == "full"), panel)
    axes.plot(*_xy(full), marker="*", ms=font, color=FRONT, mec="white", mew=0.4, ls="none", zorder=6, gid="full")
    kept = board.filter(deployable() & (pl.col("method") != "none") & (pl.col("family") != REBUILT))
    kept = kept.filter(of_most_trainings())
    reached = front(_points(kept, panel))
    ends = _xy([*reached, (max(x for x, _ in _points(kept, panel)), reached[-1][1])] if reached else [])
    axes.step(*ends, where="post", color=FRONT, lw=0.8, zorder=2.5, gid="front")  # the best stays so at a higher cost
    low, high = axes.dataLim.intervalx
    curves = [Curve(label, family, np.array([x]), np.array([y])) for label, family, (x, y) in named(kept, panel)]
    for curve in curves:
        own = kept.filter((pl.col("compressor") == curve.label) & (pl.col(panel.x) == curve.x[0]))
        colour, bars = COLOURS.get(str(curve.family), OTHER), _bars(own, panel)
        for bar in axes.errorbar(curve.x, curve.y, bars, fmt="none", ecolor=colour, elinewidth=0.8)[2]:
            bar.set_gid(f"bar:{curve.label}")
    for method, said in FLOORS.items():
        for value in board.filter(pl.col("method") == method)[panel.y].drop_nulls().to_list()[:1]:
            curves.append(Curve(said, None, np.array([low, high]), np.full(2, value)))
            axes.plot(curves[-1].x, curves[-1].y, color=FLOOR, ls=(0, (4, 2)), lw=0.8, zorder=1, gid=method)
    human_ticks(axes.xaxis, low, high, panel.unit)
    name_ends(axes, curves, font, left=True)


def named(kept: pl.DataFrame, panel: Panel) -> list[tuple[str, str, tuple[float, float]]]:
    """The NAMED methods that hold the front over most of a log axis: (method, family, its first point there)."""
    rows = _measured(kept, panel).filter(~pl.col("method").is_in(["full", CONSTANT]))
    who = {(x, y): each for *each, x, y in rows.select("compressor", "family", panel.x, panel.y).iter_rows()}
    reached = front(_points(kept, panel))
    held: dict[str, float] = {}
    first: dict[str, tuple[str, str, tuple[float, float]]] = {}
    last = max((x for x, _ in _points(kept, panel)), default=0.0)  # the best stays so at a higher cost
    for at, until in zip(reached, [*reached[1:], (last, 0.0)]):
        if at in who:
            label, family = who[at]
            held[label] = held.get(label, 0.0) + math.log(until[0] / at[0])
            first.setdefault(label, (label, family, at))
    return [first[label] for label in sorted(held, key=lambda each: -held[each])[:NAMED]]


def _points(rows: pl.DataFrame, panel: Panel) -> list[tuple[float, float]]:
    """(x, y) where both were measured and x has a place on a log axis."""
    return list(_measured(rows, panel).select(panel.x, panel.y).iter_rows())


def _measured(rows: pl.DataFrame, panel: Panel) -> pl.DataFrame:
    return rows.filter((pl.col(panel.x) > SMALLEST) & pl.col(panel.y).is_not_null())


def _xy(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _bars(rows: pl.DataFrame, panel: Panel) -> list[list[float]] | None:
    """Lengths below and above the first row's point: the paired interval, of accuracy only."""
    if f"delta_{panel.y}" not in rows.columns:
        return None
    delta, lo, hi = (rows[f"delta_{panel.y}{end}"].fill_null(0.0)[0] for end in ("", "_lo", "_hi"))
    return [[max(delta - lo, 0.0)], [max(hi - delta, 0.0)]]


def _legend(figure: Figure, board: pl.DataFrame, font: float, small: bool) -> None:
    """Families only, below the panels."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=FRONT, marker="*", ms=font, ls="none", label="full state"),
        Line2D([], [], color=FRONT, lw=0.8, label="front of kept states"),
        Line2D([], [], color=FRONT, marker="|", ms=font, ls="none", label="95 %, paired"),
    ]
    for family in _methods(board)["family"].unique().sort():
        colour, mark = COLOURS.get(family, OTHER), MARKS.get(family, "o")
        drawn = Line2D([], [], ls="none", color=colour, marker=mark, ms=font / 2, mec="white", mew=0.3, label=family)
        handles.append(drawn)
    figure.legend(
        handles=handles, loc="outside lower center", fontsize=font, frameon=False, ncols=3 if small else 6,
        handletextpad=0.4, columnspacing=1.2,
    )  # fmt: skip
