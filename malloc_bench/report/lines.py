"""Lines that are named at their ends, for one column of print or for two: what the figures of lines share."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from malloc_bench.registry import find, names
from malloc_bench.report.style import COLOURS, DASHES, FLOOR, OTHER, human
from malloc_bench.results.labels import first_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

WIDTHS = {"": 7.0, "-narrow": 3.3}  # inches: of two columns, and of one
REFERENCES = ("random", "recent")  # are drawn whatever is better
MOST = (34, 22)  # letters of a name, in a wide figure and in a narrow one
CHAINS = 4  # of different families


class Curve(NamedTuple):
    """A line: its name, its family (None: a level, thin and grey), where it goes, x ascending, and between which ends
    each y was found."""

    label: str
    family: str | None
    x: np.ndarray
    y: np.ndarray
    ends: tuple[np.ndarray, np.ndarray] | None = None


def looks_like(label: str, family: str) -> str:
    """The family of a method, of a chain that of its first step where it is known here."""
    first = first_step(label)
    return find("compressors", first).family if family == "chain" and first in names("compressors") else family


def best_of_families(found: Iterable[tuple[str, str, Any, T]]) -> list[T]:
    """Of (label, family, how good, what): what is best in each family alone, the best few chains whose first steps are
    of different families, and the references."""
    best: dict[str, tuple[Any, T]] = {}
    for label, family, good, what in found:
        first = first_step(label)
        key = first if first in REFERENCES else f"chain {looks_like(label, family)}" if family == "chain" else family
        if key not in best or good > best[key][0]:
            best[key] = good, what
    chains = sorted((key for key in best if key.startswith("chain ")), key=lambda key: best[key][0], reverse=True)
    return [what for key, (_, what) in best.items() if key not in chains[CHAINS:]]


def short(label: str, small: bool) -> str:
    """A method's name without its parameters where it is long, cut where it is longer still; of `h2o at 0.390625 %`
    the budget stays, in three digits."""
    name, at, budget = label.partition(" at ")
    said = at + re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.3g}", budget)
    most = MOST[small] - len(said)
    text = name if len(name) <= most else re.sub(r"\([^()]*\)", "", name)
    return (text if len(text) <= most else f"{text[: most - 1]}…") + said


def sheet(width: float, height: float, title: str) -> tuple[Figure, Axes, float]:
    """An empty figure of a width in inches, its axes and its size of font; a narrow one goes without its title."""
    figure, (axes,), font = sheets(1, width, height, title)
    return figure, axes, font


def sheets(number: int, width: float, height: float, title: str) -> tuple[Figure, list[Axes], float]:
    """As `sheet`, of so many panels of that height: two side by side in a wide figure, one below the other else."""
    from matplotlib.figure import Figure

    small = width < 5
    across = 1 if small else min(number, 2)
    down = -(-number // across)
    figure, font = Figure(figsize=(width, height * down), layout="constrained"), 6.5 if small or across > 1 else 8.5
    every = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in every[number:]:
        axes.remove()
    for axes in every[:number]:
        axes.tick_params(labelsize=font - 0.5)
        axes.xaxis.label.set_fontsize(font)
        axes.yaxis.label.set_fontsize(font)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if not small:
        head = figure.suptitle(title, fontsize=9.5, x=0.01, ha="left")
        with warnings.catch_warnings(action="ignore"):  # of letters that no font has
            for _ in range(3):  # in one line; small letters are not as narrow as their size says
                share = head.get_window_extent().width / figure.bbox.width
                head.set_fontsize(float(head.get_fontsize()) * min(1.0, 0.97 / max(share, 1e-9)))
    return figure, every[:number], font


def draw(axes: Axes, curves: Sequence[Curve], font: float, left: bool, marker: str = "o") -> None:
    """The lines, and beside one end of each its name."""
    for curve in curves:
        colour, dash = _look(curve)
        thin, width = curve.family is None, 1.2 if font < 7 else 1.7
        axes.plot(
            curve.x, curve.y, color=colour, ls=dash, lw=width / 2 if thin else width, marker="" if thin else marker,
            ms=2.5, gid=f"line:{curve.label}",
        )  # fmt: skip
        if curve.ends is not None:
            axes.errorbar(
                curve.x, curve.y, [curve.y - curve.ends[0], curve.ends[1] - curve.y], fmt="none", ecolor=colour,
                elinewidth=width / 2, capsize=1.5, capthick=width / 2,
            )  # fmt: skip
    lay_out(axes.figure)  # type: ignore[arg-type]
    name_ends(axes, curves, font, left)


def human_ticks(axis: Any, low: float, high: float, unit: int | None) -> None:
    """Ones and threes of a log axis as `human` says them; ones alone of over three decades, more within one."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    finest = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    every = ((1,), (1, 3), (1, 2, 5), finest)[2 if high / low < 10 else 1 if high / low < 1e3 else 0 :]
    for steps in every:  # the finer where a coarse one has but one tick
        numbers = (step * 10.0**power for power in range(-6, 13) for step in steps)
        ticks = [each for each in numbers if low * 0.8 <= each <= high * 1.2]
        if len(ticks) > 1:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: human(value, unit)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _look(curve: Curve) -> tuple[str, Any]:
    """Its colour, and its dashes."""
    if curve.family is None:
        return FLOOR, (0, (4, 2))
    if first_step(curve.label) in REFERENCES:  # a chain is a whole line here too
        return FLOOR, DASHES["chain"] if curve.family == "chain" else (0, (1.5, 1.5))
    return COLOURS.get(looks_like(curve.label, curve.family), OTHER), DASHES.get(curve.family, "-")


def lay_out(figure: Figure) -> None:
    """Give panels their real sizes, which names need."""
    if (engine := figure.get_layout_engine()) is not None:
        with warnings.catch_warnings(action="ignore"):  # of letters that no font has
            engine.execute(figure)


def name_ends(axes: Axes, curves: Sequence[Curve], font: float, left: bool) -> None:
    """Each line's name beside its left or right end, moved apart where two would touch; axes grow to hold them."""
    (across, x_of), (along, y_of) = (_scale(axes.get_xscale()), _scale(axes.get_yscale()))
    small, end = font < 7, 0 if left else -1
    width, tall = np.array(axes.get_window_extent().size) / axes.figure.dpi  # as laid out so far
    if not curves:
        return
    shown = [short(curve.label, small) for curve in curves]
    low, high = across(axes.dataLim.intervalx)
    share = min(0.6, max(map(len, shown)) * font * 0.58 / 72 / width + 0.05)
    span = max(high - low, 0.1)
    room, rest = span * share / (1 - share), span * 0.04
    axes.set_xlim(*map(x_of, (low - room, high + rest) if left else (low - rest, high + room)))
    order = sorted(range(len(curves)), key=lambda i: -curves[i].y[end])
    ends = along(np.array([curves[i].y[end] for i in order]))
    for _ in range(2):  # names that stand beyond the lines make the axis longer, and letters taller on it
        low, high = along(np.array(axes.get_ylim()))
        height = (high - low) * font / 72 / tall * 1.3
        places = apart(ends, height)
        axes.set_ylim(*map(y_of, (min(low, places.min() - height / 2), max(high, places.max() + height / 2))))
    for i, place in zip(order, places):
        colour, _ = _look(curves[i])
        line = {"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6, "shrinkA": 4, "shrinkB": 0, "patchA": None}
        line["relpos"] = (1, 0.5) if left else (0, 0.5)  # the side of the name that the line begins at
        at = (0.01 if left else 1.05 - share, float(y_of(place)))
        axes.annotate(
            shown[i], (curves[i].x[end], curves[i].y[end]), xytext=at, textcoords=axes.get_yaxis_transform(),
            fontsize=font, color=colour, va="center", arrowprops=line,
        )  # fmt: skip


def _scale(name: str) -> Any:
    """To where an axis is even, and back."""
    return (np.log, np.exp) if name == "log" else (np.asarray, np.asarray)


def apart(places: np.ndarray, least: float) -> np.ndarray:
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
