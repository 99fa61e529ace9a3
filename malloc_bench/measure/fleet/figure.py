"""What a fleet costs over how often each user asks: a kept state is flat until it is read often, rebuilding is not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from malloc_bench.files import atomic_write
from malloc_bench.measure.fleet.fleet import Lines, at, break_even

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 9  # methods beside ids
ALIKE = math.log(1.3)  # costs nearer than that are drawn once
_REBUILT, _ASKED = "#111111", "#999999"
_BETWEEN = (1e-3, 1e5)  # requests per user and day


def break_even_figure(
    paid: Mapping[str, Lines], rebuilt: tuple[str, Lines], asked: float, unit: str, title: str
) -> Figure:
    """Of one table. paid: what each method's fleet costs, in `unit`, by label, better ones first: of those that cost
    about the same the first is drawn. rebuilt: of ids alone, and its label.

    asked: requests per user and day of the fleet that was asked for, a dashed line. A dot: where keeping begins to pay.
    """
    from matplotlib.figure import Figure

    name, ids = rebuilt
    evens = {method: break_even(lines, ids) for method, lines in paid.items()}
    shown = _shown(paid)
    some = [even for method in shown if (even := evens[method])] + ([asked] if asked > 0 else [])
    low, high = (min(some, default=1) / 30, max(some, default=1) * 30)
    x = np.geomspace(max(low, _BETWEEN[0]), max(min(high, _BETWEEN[1]), 10 * max(low, _BETWEEN[0])), 300)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, [at(ids, each) for each in x], color=_REBUILT, lw=2.2, label=name, gid="rebuilt")
    for method in shown:
        lines, even = paid[method], evens[method]
        (line,) = axes.plot(x, [at(lines, each) for each in x], lw=1.6, label=method, gid=f"method:{method}")
        if even and x[0] <= even <= x[-1]:
            axes.plot([even], [at(lines, even)], "o", color=line.get_color(), mec="white", ms=7, gid=f"even:{method}")
    if x[0] <= asked <= x[-1]:
        axes.axvline(asked, color=_ASKED, ls=(0, (5, 3)), lw=1.2, label="asked for", gid="asked")
    axes.set(xscale="log", yscale="log", xlabel="requests per user and day", ylabel=unit)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(True, which="major", color="#e6e6e6", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return figure


def _shown(paid: Mapping[str, Lines]) -> list[str]:
    """The first of those that cost about the same while nobody asks."""
    found: dict[str, float] = {}
    for method, lines in paid.items():
        idle = max(at(lines, 0.0), 1e-12)
        if len(found) < MOST and all(abs(math.log(idle / other)) > ALIKE for other in found.values()):
            found[method] = idle
    return list(found)


def write_figure(figure: Figure, stem: Path) -> list[Path]:
    """<stem>.svg and <stem>.png, whole; the same figure makes the same files. Raises ResultsError."""
    from matplotlib import rc_context

    paths = []
    for suffix in ("svg", "png"):
        buffer = BytesIO()
        with rc_context({"svg.hashsalt": "malloc-bench"}):
            figure.savefig(buffer, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
        paths.append(stem.with_name(f"{stem.name}.{suffix}"))
        atomic_write(paths[-1], buffer.getvalue())
    return paths
