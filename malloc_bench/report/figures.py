"""The figures of a run: Pareto figures, of accuracy and fidelity by bytes and by the cost of a read, and all others."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import polars as pl

from malloc_bench.registry import literal
from malloc_bench.report.bars import latency_figure, parts_figure
from malloc_bench.report.board import groups_of, title
from malloc_bench.report.curves import SMALLEST, curves_figure, history_figure
from malloc_bench.report.judge import CONSTANT, REBUILT
from malloc_bench.report.lines import WIDTHS
from malloc_bench.report.parts import told_apart
from malloc_bench.report.style import COLOURS, FLOOR, OTHER, human
from malloc_bench.report.tables import sliced
from malloc_bench.results import atomic_write, digest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Key = TypeVar("Key", bound=Hashable)

LONGEST = 120  # letters of a file's name, before what all such files have
MOST_NAMED = 70  # methods in a legend
MARKERS = "os^DvPX<>ph8"
FRONT = "#111111"
LEVELS = {"none": (0, (5, 2)), CONSTANT: (0, (5, 1.5, 1, 1.5))}  # whatever the budget
FLOORS = {**LEVELS, "random": (0, (1.5, 1.5))}  # dash patterns


class Panel(NamedTuple):
    x: str
    y: str
    xlabel: str
    ylabel: str
    title: str


def panels(board: pl.DataFrame) -> list[Panel]:
    """Two panels by bytes, and one by the cost of a read: the best of what was measured, none without any."""
    costs = {"read_ratio": "read (× full)", "read_ms_p50": "read (ms, p50)", "read_flops": "read (FLOPs)"}
    cost, unit = next((each for each in costs.items() if board[each[0]].is_not_null().any()), ("read_flops", ""))
    size = "state (bytes per user)"
    ranking = board["gauc"].is_not_null().any()
    good, alike = ("gauc", "agreement") if ranking else ("ndcg@10", "overlap@10")
    found = [
        Panel("bytes_mean", good, size, good.upper(), "Accuracy against memory"),
        Panel("bytes_mean", alike, size, alike, f"{alike[0].upper()}{alike[1:]} with the full state against memory"),
    ]
    if board[cost].is_not_null().any():
        found.append(Panel(cost, good, unit, good.upper(), "Accuracy against the cost of a read"))
    return found


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, value) that no other one beats: none is as cheap and better, or as good and cheaper."""
    best: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    return best


def pareto_figure(board: pl.DataFrame, title: str) -> Figure:
    """The figure of one dataset, task, split and backbone, from its rows of `leaderboard.aggregate`.

    A family is a colour and a line through its best methods; a method is a marker; bars are the paired interval of
    the difference to the full state. The step line is the Pareto front of what keeps a state.
    """
    from matplotlib.figure import Figure

    shown = panels(board)
    figure = Figure(figsize=(17, 6.2), layout="constrained")
    methods = board.filter(~pl.col("method").is_in(["full", *FLOORS]))
    markers = _markers(methods)
    for axes, panel in zip(figure.subplots(1, len(shown)), shown):
        for (family,), rows in methods.group_by("family", maintain_order=True):
            _draw_family(axes, panel, str(family), rows, markers)
        _draw_references(axes, panel, board)
        _style(axes, panel, measured=bool(_points(board, panel)))
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    _legend(figure, board, methods, markers, _named(methods, shown))
    return figure


def _draw_family(axes: Axes, panel: Panel, family: str, rows: pl.DataFrame, markers: dict[str, str]) -> None:
    colour = COLOURS.get(family, OTHER)
    axes.plot(*_xy(front(_points(rows, panel))), color=colour, lw=1.8, alpha=0.7, zorder=2, gid=f"family:{family}")
    for (name,), own in rows.with_columns(_name()).group_by("name", maintain_order=True):
        x, y = _xy(_points(own, panel))
        axes.errorbar(x, y, _bars(own, panel), fmt="none", ecolor=colour, elinewidth=0.9, alpha=0.5, zorder=3)
        marker, gid = markers[str(name)], f"method:{name}"
        axes.plot(x, y, ls="none", color=colour, marker=marker, ms=7, mec="white", mew=0.7, zorder=4, gid=gid)


def _style(axes: Axes, panel: Panel, measured: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if measured:  # a log axis without any point has no end
        axes.set_xscale("log")
        axes.margins(x=0.06, y=0.05)
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=_subs(high / low)))
        unit = {"bytes_mean": 1, "read_flops": 2}.get(panel.x)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value, unit)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(panel.title, fontsize=11)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    axes.grid(True, which="major", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _subs(span: float) -> tuple[float, ...]:
    """Which multiples of powers of ten are labelled on an axis whose ends are `span` apart."""
    return (1.0,) if span > 1e4 else (1.0, 3.0) if span > 30 else (1.0, 2.0, 5.0)


def _draw_references(axes: Axes, panel: Panel, board: pl.DataFrame) -> None:
    """The full state, the floors and the front.

    `none` and `fit_constant` have no budget, so their value is a level; `random` has one, so it is a curve.
    """
    for name, dash in LEVELS.items():
        for value in board.filter(pl.col("method") == name)[panel.y].drop_nulls():
            axes.axhline(value, color=FLOOR, ls=dash, lw=1.4, zorder=1, gid=name)
    random = sorted(_points(board.filter(pl.col("method") == "random"), panel))
    axes.plot(*_xy(random), color=FLOOR, ls=FLOORS["random"], lw=1.8, zorder=1.2, gid="random")
    full = _points(board.filter(pl.col("method") == "full"), panel)
    axes.plot(*_xy(full), marker="*", ms=15, color=FRONT, mec="white", mew=0.8, ls="none", zorder=6, gid="full")
    kept = _points(board.filter((pl.col("method") != "none") & (pl.col("family") != REBUILT)), panel)
    reached = front(kept)
    last = [(max(kept)[0], reached[-1][1])] if kept else []  # the best stays the best at a higher cost
    axes.step(*_xy(reached + last), where="post", color=FRONT, lw=1.0, zorder=2.5, gid="front")


def _points(rows: pl.DataFrame, panel: Panel) -> list[tuple[float, float]]:
    """(x, y) where both were measured and x has a place on a log axis."""
    return list(_measured(rows, panel).select(panel.x, panel.y).iter_rows())


def _measured(rows: pl.DataFrame, panel: Panel) -> pl.DataFrame:
    return rows.filter((pl.col(panel.x) > SMALLEST) & pl.col(panel.y).is_not_null())


def _xy(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _bars(rows: pl.DataFrame, panel: Panel) -> list[list[float]] | None:
    """Lengths below and above each point: the paired interval, for accuracy only."""
    if f"delta_{panel.y}" not in rows.columns:
        return None
    delta, lo, hi = (pl.col(f"delta_{panel.y}{end}") for end in ("", "_lo", "_hi"))
    ends = _measured(rows, panel).select((delta - lo).alias("below"), (hi - delta).alias("above")).fill_null(0.0)
    return [ends["below"].clip(0).to_list(), ends["above"].clip(0).to_list()]


def _name() -> pl.Expr:
    """A method's name; a chain goes by its parts, or all chains would be one method."""
    return pl.when(pl.col("method") == "compose").then(pl.col("compressor")).otherwise(pl.col("method")).alias("name")


def _names(methods: pl.DataFrame) -> list[str]:
    return methods.select(_name()).to_series().unique().sort().to_list()


def _markers(methods: pl.DataFrame) -> dict[str, str]:
    """A marker a method, unlike its neighbours' in the family: the colour tells families apart."""
    families = [_names(rows) for _, rows in methods.group_by("family")]
    return {name: MARKERS[i % len(MARKERS)] for names in families for i, name in enumerate(names)}


def _named(methods: pl.DataFrame, shown: Sequence[Panel]) -> set[str]:
    """The methods that a legend has room for: all, or of very many those on their family's front in some panel."""
    if len(names := _names(methods)) <= MOST_NAMED:
        return set(names)
    found: set[str] = set()
    for _, rows in methods.with_columns(_name()).group_by("family"):
        for panel in shown:
            best = set(front(_points(rows, panel)))
            points = _measured(rows, panel).select("name", panel.x, panel.y).iter_rows()
            found |= {name for name, x, y in points if (x, y) in best}
    return found


def _legend(
    figure: Figure, board: pl.DataFrame, methods: pl.DataFrame, markers: dict[str, str], named: set[str]
) -> None:
    """What is always drawn, then every family with its `named` methods below it, right of the panels."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=FRONT, marker="*", ms=12, ls="none", label="full state"),
        Line2D([], [], color=FRONT, lw=1.0, label="Pareto front of kept states"),
    ]
    present = set(board["method"])
    for name, dash in FLOORS.items():
        if name in present:
            handles.append(Line2D([], [], color=FLOOR, ls=dash, lw=1.6, label=f"{name} (floor)"))
    families = []
    for (family,), rows in methods.sort("family").group_by("family", maintain_order=True):
        colour = COLOURS.get(str(family), OTHER)
        families.append(len(handles))
        handles.append(Line2D([], [], color=colour, lw=1.8, label=str(family)))
        for name in filter(named.__contains__, _names(rows)):
            handles.append(Line2D([], [], color=colour, marker=markers[name], ls="none", ms=7, mec="white", label=name))
    columns = 1 + len(handles) // 30
    legend = figure.legend(handles=handles, loc="outside right upper", fontsize=9, frameon=False, ncols=columns)
    for index in families:
        legend.get_texts()[index].set_fontweight("bold")


#: for print, two columns wide and one: name -> what draws it of a table's rows, its title and its width
PRINTED = {"curves": curves_figure, "bytes-by-part": parts_figure, "latency": latency_figure, "history": history_figure}


def write_figures(frame: pl.DataFrame, folder: str | Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Of every dataset, task, split and backbone a Pareto figure, and of PRINTED those that there is data for.

    `pareto-<...>.<format>`, `curves-<...>.<format>`, `curves-<...>-narrow.<format>` ...; png, svg or pdf, whose text is
    text.
    """
    paths = []
    tables = {key: _literal(rows) for key, rows in groups_of(sliced(*told_apart(frame)))}
    stems = file_stems({key: key for key in tables})
    for key, board in tables.items():
        head, stem = literal(title(board.row(0, named=True))), stems[key]
        blind = board["headroom"].eq(False).any()
        said = f"{head} · no headroom, judges nothing" if blind else head
        drawn: dict[str, Figure | None] = {f"pareto-{stem}": pareto_figure(board, said)}
        drawn |= {
            f"{name}-{stem}{end}": draw(board, head, width)
            for name, draw in PRINTED.items()
            for end, width in WIDTHS.items()
        }
        for name, figure in drawn.items():
            paths += [written(figure, Path(folder) / f"{name}.{suffix}") for suffix in formats if figure is not None]
    return paths


def _literal(board: pl.DataFrame) -> pl.DataFrame:
    """The rows with names that can be drawn."""
    names = ("family", "method", "compressor")
    return board.with_columns(pl.col(name).map_elements(literal, pl.String) for name in names)


def written(figure: Figure, path: Path) -> Path:
    """The figure in a file, whole, in the format of its suffix; the same figure makes the same file. Its path.

    Letters that no font has are boxes. Raises ResultsError.
    """
    from matplotlib import rc_context

    buffer, suffix = BytesIO(), path.suffix[1:]
    dated = {"svg": "Date", "pdf": "CreationDate"}.get(suffix)
    settled: Any = {"svg.hashsalt": "malloc-bench", "svg.fonttype": "none", "pdf.fonttype": 42}
    with rc_context(settled), warnings.catch_warnings(action="ignore"):  # of what it draws as well as it can
        figure.savefig(buffer, format=suffix, dpi=200, metadata={dated: None} if dated else None)
    atomic_write(path, buffer.getvalue())
    return path


def file_stems(names: Mapping[Key, Sequence[str]]) -> dict[Key, str]:
    """A name of a file for each key, made of some names: in letters that every system takes, short, no two the same."""
    words = {
        key: [re.sub(r"[^\w.-]+", "_", str(each), flags=re.ASCII).strip("_") for each in names[key]] for key in names
    }
    plain = {key: "-".join(each) for key, each in words.items()}
    twice = Counter(plain.values())
    return {
        key: text if twice[text] == 1 and len(text) <= LONGEST else f"{text[:LONGEST]}-{digest(key)[:8]}"
        for key, text in plain.items()
    }
