"""What is kept at which size: the best method of each family as a line, named at its end, for one column or two."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl

from malloc_bench.report.judge import alike, deployable
from malloc_bench.report.style import COLOURS, DASHES, FLOOR, OTHER, human

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTHS = {"": 7.0, "-narrow": 3.3}  # inches: of two columns, and of one
REFERENCES = ("random", "recent")  # are drawn whatever is better
LEAST = 3  # sizes that make a line
SMALLEST = 1e-9  # what is less has no place on a log axis
MOST = (34, 22)  # letters of a name, in a wide figure and in a narrow one
CHAINS = 4  # of different first steps


class Curve(NamedTuple):
    """A method's line: bytes a user, ascending, and what is kept."""

    label: str
    family: str
    size: np.ndarray
    kept: np.ndarray


def curves_figure(board: pl.DataFrame, title: str, width: float = 7.0) -> Figure | None:
    """The figure of one table from its rows of `board.aggregate`; None where no method has LEAST sizes.

    Of every family the method with the largest mean over log bytes, of chains the best few with different first steps,
    and slots by lot and the newest as references; the levels of no history and of a constant; fidelity where there is a
    floor, else overlap or agreement.
    """
    from matplotlib.figure import Figure

    what = "fidelity" if board["fidelity"].is_not_null().any() else "overlap@10"
    what = what if board[what].is_not_null().any() else "agreement"
    chosen = _chosen(board, what)
    if not chosen:
        return None
    small = width < 5
    figure = Figure(figsize=(width, 2.7 if small else 3.6), layout="constrained")
    axes = figure.subplots()
    font = 6.5 if small else 8.5
    dashes = iter(DASHES.values())
    for curve in chosen:
        colour, dash = _look(curve)
        if curve.family == "chain" and colour != FLOOR:
            dash = next(dashes)
        axes.plot(curve.size, curve.kept, color=colour, ls=dash, lw=1.2 if small else 1.7, marker="o", ms=2.5)
    for name, said in (("fit_constant", "a constant"), ("none", "no history")):
        for level in board.filter(pl.col("method") == name)[what].drop_nulls().to_list()[:1]:
            axes.axhline(level, color=FLOOR, lw=0.8, ls=(0, (4, 2)), zorder=0)
            axes.annotate(said, (1, level), xycoords=("axes fraction", "data"), fontsize=font - 1, color=FLOOR,
                          ha="right", va="bottom")  # fmt: skip
    _style(axes, chosen, what, font)
    _name(axes, chosen, font, small)
    if not small:
        axes.set_title(title, fontsize=font + 1, loc="left")
    return figure


def _chosen(board: pl.DataFrame, what: str) -> list[Curve]:
    rows = board.filter(
        deployable() & pl.col(what).is_not_null() & (pl.col("bytes_mean") > SMALLEST) & alike().is_not_null()
    )
    best: dict[str, tuple[float, Curve]] = {}
    for (label, family), own in rows.group_by("compressor", "family", maintain_order=True):
        own = own.sort("bytes_mean").unique("bytes_mean", keep="last", maintain_order=True)
        if len(own) < LEAST or family == "recompute":
            continue
        curve = Curve(str(label), str(family), own["bytes_mean"].to_numpy(), own[what].to_numpy())
        first = _first(curve)
        key = first if first in REFERENCES else f"{family} {first}" if family == "chain" else family
        area = _mean(curve)
        if key not in best or area > best[key][0]:
            best[key] = area, curve
    chains = [key for key in sorted(best, key=lambda key: -best[key][0]) if key.startswith("chain ")]
    kept = [curve for key, (_, curve) in best.items() if key not in chains[CHAINS:]]
    return sorted(kept, key=lambda curve: -curve.kept[0])


def _first(curve: Curve) -> str:
    """The bare name of a method, or of a chain's first step."""
    return curve.label.split(" + ")[0].split("(")[0]


def _look(curve: Curve) -> tuple[str, Any]:
    """Its colour, and its dashes."""
    if _first(curve) in REFERENCES:
        return FLOOR, (0, (1.5, 1.5))
    return COLOURS.get(curve.family, OTHER), DASHES.get(curve.family, "-")


def _mean(curve: Curve) -> float:
    """Over log bytes: what small states keep counts as much as what large ones do."""
    x = np.log(curve.size)
    return float(np.trapezoid(curve.kept, x) / (x[-1] - x[0])) if x[-1] > x[0] else float(curve.kept[0])


def _style(axes: Axes, chosen: list[Curve], what: str, font: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    axes.set_xscale("log")
    low, high = min(c.size[0] for c in chosen), max(c.size[-1] for c in chosen)
    letters = max(len(_short(c.label, MOST[font < 7])) for c in chosen)
    share = min(0.6, letters * font * 0.62 / 72 / (axes.figure.get_figwidth() * 0.86) + 0.05)  # type: ignore[union-attr]
    axes.set_xlim(low * (low / high) ** (share / (1 - share)), high * 1.08)  # room for names at the left
    ticks = [
        each for power in range(0, 13) for step in (1, 3) if low * 0.8 <= (each := step * 10.0**power) <= high * 1.2
    ]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value, 1)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=font - 0.5)
    axes.set_xlabel("state (bytes a user)", fontsize=font)
    axes.set_ylabel(
        f"{what} with the full state" if what != "fidelity" else "fidelity to the full state", fontsize=font
    )
    axes.grid(True, axis="y", color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _name(axes: Axes, chosen: list[Curve], font: float, small: bool) -> None:
    """Each line's name at its left end, moved apart where they would touch."""
    low, high = axes.get_ylim()
    height = (high - low) * font / 72 / (axes.figure.get_figheight() * 0.78) * 1.15  # type: ignore[union-attr]
    ends = np.array([curve.kept[0] for curve in chosen])
    places = _apart(ends, height)
    axes.set_ylim(min(low, places.min() - height), max(high, places.max() + height))
    for curve, place in zip(chosen, places):
        colour, _ = _look(curve)
        left, right = axes.get_xlim()
        at = left * (right / left) ** 0.01, place
        line = {"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 2}
        end, text = (curve.size[0], curve.kept[0]), _short(curve.label, MOST[small])
        axes.annotate(
            text, end, xytext=at, textcoords="data", fontsize=font, color=colour, va="center", arrowprops=line
        )


def _apart(places: np.ndarray, least: float) -> np.ndarray:
    """Descending places, each at least so far from the next, as near as that goes to where they were."""
    found = places.astype(float).copy()
    for _ in range(100):
        close = np.flatnonzero(found[:-1] - found[1:] < least - 1e-9)
        if not len(close):
            break
        for i in close:
            push = (least - (found[i] - found[i + 1])) / 2
            found[i] += push
            found[i + 1] -= push
    return found


def _short(label: str, most: int) -> str:
    text = label if len(label) <= most else re.sub(r"\([^()]*\)", "", label)
    return text if len(text) <= most else f"{text[: most - 1]}…"
