"""Figures of `tasks`: a line for each of few methods over what was asked. Knows results only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from malloc_bench.registry import literal
from malloc_bench.report.board import GROUP
from malloc_bench.report.curves import FLOORS
from malloc_bench.report.lines import Curve, best_of_families, draw, sheets
from malloc_bench.report.tasks import KNOWING, popularity, robustness, trajectory, transfer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: name -> its table, what is a figure of its own, what its panels show, and what stands below them
PANELS = {
    "popularity": (popularity, GROUP, ("ndcg@10", "overlap@10"), "quarter of training events, popular items first"),
    "robustness": (robustness, KNOWING, ("ndcg@10", "overlap@10"), "what is known of users"),
    "trajectory": (trajectory, GROUP, ("true_hr@10", "own_hr@10", "true_overlap@10", "own_overlap@10"), "step"),
    "transfer": (transfer, GROUP, ("ndcg@10", "overlap@10"), "how the backbone was trained"),
}
SAID = {
    "ndcg@10": "NDCG@10",
    "overlap@10": "overlap@10 with the full state",
    "true_hr@10": "HR@10, told the truth",
    "own_hr@10": "HR@10, fed its own items",
    "true_overlap@10": "overlap@10, told the truth",
    "own_overlap@10": "overlap@10, fed its own items",
}


def task_figures(frame: pl.DataFrame, width: float) -> Iterator[tuple[str, tuple[str, ...], Figure]]:
    """(name, the values that tell it from others of that name, figure) of all tables of PANELS that have rows.

    Methods at the smallest budget: of every family the best, some chains, the references; the full state and the floors
    in grey. Popularity only where all is known: `robustness` has the other tasks.
    """
    for name, (make, group, values, below) in PANELS.items():
        data = make(frame)
        if name == "popularity":
            data = data.filter(~pl.col("task").str.contains("(", literal=True))
        for key, rows in data.group_by(*group, maintain_order=True):
            runs = _runs(rows["key"].unique(maintain_order=True).to_list())
            every = [(value, keys, _curves(rows, value, keys)) for keys in runs for value in values]
            panels = [each for each in every if any(curve.family for curve in each[2])]
            if panels:
                title = literal(
                    f"{name}: {' · '.join(map(str, key))}{''.join(f' · states of {b}' for b in _smallest(rows))}"
                )
                yield name, tuple(map(str, key)), _panels(panels, title, below, width)


def _runs(keys: list[str]) -> list[list[str]]:
    """Keys that go on from one another: of robustness each way to know less, from all that is known."""
    if "all" not in keys:
        return [keys] if len(keys) > 1 else []
    kinds = [[key for key in keys if word in key] for word in ("newest", "deleted", "replaced")]
    return [["all", *own] for own in kinds if own]


def _curves(rows: pl.DataFrame, value: str, keys: Sequence[str]) -> list[Curve]:
    """A line a method that has every key."""
    rows = rows.filter(pl.col("budget").is_null() | pl.col("budget").is_in(_smallest(rows)))
    levels, found = [], []
    for (label, method, family), own in rows.group_by("compressor", "method", "family", maintain_order=True):
        known = dict(own.select("key", value).iter_rows())
        y = np.array([known.get(each) for each in keys], dtype=float)
        if np.isnan(y).any():
            continue
        if method == "full" or method in FLOORS:
            levels.append(Curve(FLOORS.get(str(method), "full state"), None, np.arange(len(keys)), y))
        else:
            curve = Curve(literal(str(label)), literal(str(family)), np.arange(len(keys)), y)
            found.append((curve.label, str(family), float(y.mean()), curve))
    return best_of_families(found) + levels


def _smallest(rows: pl.DataFrame) -> list[str]:
    """The label of the smallest budget, if there is any."""
    return rows.filter(pl.col("budget").is_not_null())["budget"].unique(maintain_order=True).to_list()[-1:]


def _panels(panels: Sequence[tuple[str, list[str], list[Curve]]], title: str, below: str, width: float) -> Figure:
    """A panel for each (value, keys, lines)."""
    figure, every, font = sheets(len(panels), width, 2.3 if width < 5 else 2.6, title)
    for axes, (value, keys, own) in zip(every, panels):
        axes.set_xticks(range(len(keys)), [literal(key.removeprefix("popularity ")) for key in keys])
        axes.set_xlabel(below)
        axes.set_ylabel(SAID[value])
        axes.grid(True, axis="y", color="#e6e6e6", lw=0.6)
        draw(axes, own, font, left=False)
    return figure
