"""What single states come to, as stacked bars: their bytes by part, and what it takes to make, grow and read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from malloc_bench.report.curves import few
from malloc_bench.report.lines import sheet, short
from malloc_bench.report.parts import PREFIX, colour, order, parts_of
from malloc_bench.report.render import three_digits
from malloc_bench.report.style import human

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CUT = 6  # times the usual length: a bar that long would leave all others none, and is cut
STEPS = {"compress": "#0072B2", "append": "#E69F00", "read": "#D55E00"}


class Bar(NamedTuple):
    """A name, how long each part is, and what is written behind the last."""

    label: str
    parts: Mapping[str, float]
    said: str


def parts_figure(board: pl.DataFrame, title: str, width: float = 7.0) -> Figure | None:
    """What the bytes of the full state, and of the smallest ones of `few` methods, hold, in percent, from the rows of
    one table with the columns of `parts.told_apart`; None where no row has any."""
    known = [name for name in board.columns if name.startswith(PREFIX)]
    bars = []
    told = board.filter(pl.any_horizontal(pl.lit(False), *(pl.col(name).is_not_null() for name in known)))
    for row in _shown(told, told.sort("bytes_mean").unique("compressor", keep="first", maintain_order=True)):
        parts = parts_of(row)
        size = sum(parts.values())
        bars.append(Bar(row["compressor"], {name: 100 * x / size for name, x in parts.items()}, _size(size)))
    names = sorted({name for bar in bars for name in bar.parts}, key=order)
    return _stacked(
        bars, {name: colour(name) for name in names}, "% of the bytes of each method's smallest state", title, width
    )


def latency_figure(board: pl.DataFrame, title: str, width: float = 7.0) -> Figure | None:
    """What the full state and `few` methods take to compress, to append to and to read, p50 at the median history, from
    the rows of one table of `board.aggregate`; None where nothing was timed."""
    bars = []
    timed = board.filter(pl.col("read_ms_p50").is_not_null())
    states, share = few(timed)
    for row in _shown(timed, states):
        parts = {step: row[f"{step}_ms_p50"] or 0.0 for step in STEPS}
        over = f" at {100 * row['ratio']:.2g} %" if row.get("over") else ""
        bars.append(Bar(row["compressor"] + over, parts, three_digits(sum(parts.values()))))
    said = "ms a user (p50)" + (f"; states ≤ {share} of bytes" if share else "")
    busy = timed["timing"].str.contains("busy").any()
    said += "; BUSY machine" if busy else ""
    return _stacked(bars, STEPS, said, title, width)


def _shown(rows: pl.DataFrame, states: pl.DataFrame) -> list[dict[str, Any]]:
    """The full state, then those of the states that are of `few` methods, in their order."""
    return [
        *rows.filter(pl.col("method") == "full").to_dicts(),
        *few(rows)[0].select("compressor").join(states, "compressor", maintain_order="left").to_dicts(),
    ]


def _size(value: float) -> str:
    """`3.05 KB`: three digits, and its unit."""
    return human(float(f"{value:.3g}"), 1)


def _stacked(bars: Sequence[Bar], colours: Mapping[str, str], xlabel: str, title: str, width: float) -> Figure | None:
    """A bar each, one below the other, and what the colours mean below them; None without two bars. A bar that is far
    longer than most is cut, as the arrow before its length says."""
    if len(bars) < 2:
        return None
    small = width < 5
    figure, axes, font = sheet(width, (0.75 if small else 0.95) + len(bars) * (0.155 if small else 0.2), title)
    whole, ends = [sum(bar.parts.values()) for bar in bars], [0.0] * len(bars)
    usual = sorted(whole)[len(bars) // 2]
    most = max(whole) if max(whole) < CUT * usual else CUT / 2 * usual
    for part, tint in colours.items():
        long = [min(bar.parts.get(part, 0.0), most - end) for bar, end in zip(bars, ends)]
        axes.barh(range(len(bars)), long, left=ends, color=tint, height=0.72, label=part, ec="white", lw=0.3)
        ends = [end + each for end, each in zip(ends, long)]
    for at, (bar, end, size) in enumerate(zip(bars, ends, whole)):
        said = f"→ {bar.said}" if size > most else bar.said
        axes.annotate(said, (end, at), xytext=(3, 0), textcoords="offset points", va="center", fontsize=font - 1)
    axes.set_yticks(range(len(bars)), [short(bar.label, small) for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)  # the first on top
    room = max(len(text.get_text()) for text in axes.texts) * font * 0.62 / 72 / (width * 0.55)
    axes.set_xticks([each for each in axes.get_xticks() if 0 <= each <= max(ends) * 1.001])
    axes.set_xlim(0, max(ends) * (1 + room))
    axes.spines["bottom"].set_bounds(0, max(ends))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(xlabel)
    axes.grid(True, axis="x", color="#e6e6e6", lw=0.6)
    letters = max(map(len, colours)) * 0.6 + 3.5
    columns = min(len(colours), max(1, int(width * 72 / (font * letters))))
    figure.legend(loc="outside lower left", ncols=columns, fontsize=font - 0.5, frameon=False, handlelength=1,
                  handleheight=0.8, columnspacing=1.2, borderaxespad=0.2)  # fmt: skip
    return figure
