"""What a fleet costs over how often each user asks: a kept state is flat until it is read often, rebuilding is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from malloc_bench.report.lines import Curve, draw, human_ticks, sheet
from malloc_bench.report.style import FLOOR

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def break_even_figure(
    curves: Sequence[Curve], evens: Mapping[str, tuple[float, float]], asked: float, unit: str, title: str, width: float
) -> Figure:
    """Of one table. curves: what each method's fleet costs, in `unit`, over requests per user and day, all over the
    same; keeping ids and rebuilding is of the family `recompute`. evens: by label, where keeping begins to pay, a dot.

    asked: requests per user and day of the fleet that was asked for, a dashed line where the curves reach it.
    """
    figure, axes, font = sheet(width, 3.0 if width < 5 else 4.2, title)
    axes.set(xscale="log", yscale="log", xlabel="requests per user and day", ylabel=unit)
    x = curves[0].x
    if x[0] <= asked <= x[-1]:
        axes.axvline(asked, color=FLOOR, ls=(0, (5, 3)), lw=1.0, gid="asked", zorder=0)
        axes.annotate("asked for", (asked, 1), xycoords=("data", "axes fraction"), xytext=(2, 0), ha="left", va="top",
                      textcoords="offset points", fontsize=font - 1, color=FLOOR)  # fmt: skip
    draw(axes, curves, font, left=True, marker="")
    for line in axes.lines:
        label = str(line.get_gid()).removeprefix("line:")
        if label in evens:
            axes.plot(
                *([each] for each in evens[label]), "o", color=line.get_color(), mec="white", ms=5, gid=f"even:{label}"
            )
    human_ticks(axes.xaxis, x[0], x[-1], 2)
    human_ticks(axes.yaxis, min(c.y.min() for c in curves), max(c.y.max() for c in curves), 2)
    axes.grid(True, color="#e6e6e6", lw=0.6)
    return figure
