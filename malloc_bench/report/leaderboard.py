"""The leaderboard: one line per method and budget, grouped by dataset, task and backbone. Knows results only."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from malloc_bench.registry import folded, shown, suggest
from malloc_bench.report.board import (
    EMPTY,
    GROUP,
    aggregate,
    chains_as_one,
    groups_of,
    labelled,
    newest,
    reason_of,
    sections,
    select,
    title,
)
from malloc_bench.report.judge import POPULAR, popular, remark
from malloc_bench.report.recommend import DELTA, best_per_budget, untested
from malloc_bench.report.render import (
    Column,
    csv,
    filled,
    inline,
    interval,
    latex,
    markdown,
    number,
    p_value,
    significant,
    tell,
    terminal,
    words,
)
from malloc_bench.report.users import Users

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

SHOWN = (
    *GROUP, "n_users", "headroom", "query_headroom", "note", "seeds", "seeds_total", "compressor", "family", "budget",
    "budget_unit", "bytes_mean", "smaller_x", "smaller_f16_x", "share_at_floor", "hr@10", "ndcg@10", "delta_ndcg@10",
    "delta_ndcg@10_lo", "delta_ndcg@10_hi", "gauc", "delta_gauc", "delta_gauc_lo", "delta_gauc_hi", "auc", "logloss",
    "p_holm", "lossless", "lossless_of", "p_lossless", "overlap@10", "agreement", "fidelity", "above_constant",
    "logit_error", "ceiling_full_hr@10", "ceiling_window_hr@10", "of_full_ceiling", "of_window_ceiling",
    "measured_history", "measured_history_long", "read_ms_p50", "read_ratio", "read_ratio_lo", "read_ratio_hi",
    "timing", "compress_ms_p50", "read_mflops", *(f"{floor}_ndcg@10" for floor in POPULAR),
)  # fmt: skip


def leaderboard(frame: pl.DataFrame) -> pl.DataFrame:
    """The board of a results frame, as numbers, under SHOWN: ok rows only (`problems` has the others)."""
    return aggregate(frame).select(SHOWN)


BEST = (
    words("within", "within"),
    words("compressor", "best", most=19),
    significant("bytes_mean", "state (KB/user)", scale=1e-3),
    number("fidelity", "fidelity", ".3f"),
    number("overlap@10", "overlap@10", ".3f"),
    number("agreement", "agreement", ".3f"),
    DELTA,
    number("read_ratio", "read (× full)", ".2f", rank=2),
    Column("as good (5 %, Holm)", lambda row: _ties(row), rank=3, left=True, most=30),
)


def _ties(row: Mapping[str, Any]) -> str:
    """Which methods tie with the best one, as far as that was tested."""
    if not row["tested"]:
        return "not tested"
    named = ", ".join(row["ties"][:2])
    return f"{named} and {len(row['ties']) - 2} more" if len(row["ties"]) > 2 else named or "none"


def problems(frame: pl.DataFrame) -> list[str]:
    """One line for every skipped and failed cell, with its reason; one for all cells that lack the same data."""
    rows = unfinished(frame).iter_rows(named=True)
    return without_data(frame) + [_problem(row) for row in rows if not _lacks_data(row)]


def unfinished(frame: pl.DataFrame) -> pl.DataFrame:
    """The skipped and failed rows, labelled as `aggregate` does: `compressor_params` is the method's label."""
    return labelled(newest(frame)).filter(pl.col("status") != "ok").sort(*GROUP, "status", maintain_order=True)


def without_data(frame: pl.DataFrame) -> list[str]:
    """One line for all cells that are skipped for one reason: their data could not be had, or do not fit."""
    rows = filter(_lacks_data, frame.filter(pl.col("status") == "skipped").iter_rows(named=True))
    missing = Counter((shown(folded(row["dataset"])), reason_of(row)) for row in rows)
    return [f"skipped: {data}, {n} cells: {reason}" for (data, reason), n in sorted(missing.items())]


def _lacks_data(row: Mapping[str, Any]) -> bool:
    return json.loads(row["cell"] or "{}").get("data", 0) is None


def _problem(row: Mapping[str, Any]) -> str:
    at = f" at {row['budget']}" if row["budget"] else ""
    where = f"{row['dataset']}, {row['task']}, {row['backbone']}, {row['compressor_params']}{at}, seed {row['seed']}"
    return shown(folded(f"{row['status']}: {where}: {reason_of(row)}"))


def _seeds(row: Mapping[str, Any]) -> str:
    return "" if row["seeds_total"] == 1 else f"{row['seeds']}/{row['seeds_total']}"


#: where a budget of that many bytes or slots does not buy bytes or slots
BUDGET_OF = Column("budget of", lambda row: row["budget_unit"] if row["budget_unit"] == "events" else "", rank=5)

COLUMNS_SHOWN = (
    words("compressor", "compressor", most=19),
    words("family", "family", rank=7),
    Column("seeds ok", _seeds, rank=4),
    words("budget", "budget", most=9),
    BUDGET_OF,
    significant("bytes_mean", "state (KB/user)", scale=1e-3),
    number("smaller_x", "× smaller", ".1f", rank=5),
    number("smaller_f16_x", "× smaller than float16", ".1f", rank=8),
    number("share_at_floor", "at floor (% users)", ".0f", rank=9, scale=100),
    number("fidelity", "fidelity", ".3f"),
    number("overlap@10", "overlap@10", ".3f", rank=3),  # fidelity says as much
    number("agreement", "agreement", ".3f", rank=3),
    number("above_constant", "above a constant", ".3f", rank=7),
    number("gauc", "GAUC", ".4f", rank=3),
    interval("delta_gauc", "ΔGAUC [95 % interval]", "+z.4f", rank=6),
    number("auc", "AUC", ".4f", rank=7),
    number("logloss", "LogLoss", ".4f", rank=7),
    number("ndcg@10", "NDCG@10", ".4f", rank=3),
    interval("delta_ndcg@10", "ΔNDCG@10 [95 % interval]", "+z.4f", rank=6),
    p_value("p_holm", rank=6),
    Column("lossless", lambda row: f"✓ {row['lossless_of']}" if row["lossless"] else "", rank=4),
    number("hr@10", "HR@10", ".4f", rank=7),
    number("of_full_ceiling", "HR@10 of its ceiling (%)", ".1f", rank=3, scale=100),
    number("ceiling_window_hr@10", "a window's HR@10 (at most)", ".4f", rank=3),
    number("of_window_ceiling", "HR@10 of a window's (%)", ".1f", rank=3, scale=100),
    significant("read_ms_p50", "read (ms, p50)", rank=6),
    number("read_ratio", "read (× full)", ".2f", rank=2),
    Column("timing", lambda row: "" if row["timing"] in (None, "ok") else row["timing"], rank=5),
    significant("compress_ms_p50", "compress (ms, p50)", rank=8),
    significant("read_mflops", "read (MFLOPs)", rank=4),
    number("measured_history", "measured at (events)", ",.0f", rank=9),
)

#: of a terminal: one difference, in percent of the full state's metric, which is narrow
IN_TERMINAL = tuple(
    DELTA if each.header.startswith("ΔNDCG") else each for each in COLUMNS_SHOWN if not each.header.startswith("ΔGAUC")
)

NOTES = (
    "State: measured mean bytes per user (1 KB = 1000 bytes). × smaller: sum of full float32 bytes / sum of bytes; "
    "half of it against a full state in float16. Budget of events: as many raw events as slots would fit, in far fewer "
    "bytes.",
    "Δ: difference to the full state, 95 % paired bootstrap interval over users; p: two-sided, Holm-corrected "
    "within each table. ✓ lossless: it surely loses less than 1 % of the full state's metric named (NDCG@10, or GAUC "
    "above 0.5), by a one-sided paired test at 2.5 %, Holm-corrected within each table.",
    "Overlap@10: share of the full state's top 10 that stays. Agreement: pairs of a request's candidates in the full "
    "state's order. Fidelity: (overlap or agreement - no history's) / (1 - no history's).",
    "ms and FLOPs: per user, at the median length of the histories evaluated (the longest: table `resources`). × full: "
    "a read over the full state's, round by round (CPU time on one thread). Noisy: the interval of that ratio is wider "
    "than 10 % either way; busy: other work was on the machine.",
    "At floor: users whose state is the smallest that the method can make. Blank: does not apply or was not measured. "
    "= 3 more: so many other chains come to the same state.",
)
CEILINGS = (
    "Ceilings (generated data): HR@10 as a share of the way from the best guess without any event to the best possible "
    "with the whole history, and to the most that anyone can reach who knows only the newest events that fit, "
    "uncompressed, into as many bytes: above 100 % a method knows older events, or writes them down in fewer bytes."
)


def to_markdown(frame: pl.DataFrame, folder: str | Path | None = None, best: pl.DataFrame | None = None) -> str:
    """The leaderboard of a results frame as a Markdown page. folder: of the run, whose values by user tell ties.

    best: of `best_per_budget`, where it is known already.
    """
    board, faults = chains_as_one(aggregate(frame)).select(SHOWN), problems(frame)
    firsts = dict(groups_of(best_per_budget(frame, Users(frame, folder)) if best is None else best))
    parts = [
        f"## {inline(title(group.row(0, named=True)))}\n\n{on_top(group)}{_best(firsts.get(key))}"
        + markdown(group, filled(group, COLUMNS_SHOWN))
        for key, group in groups_of(board)
    ]
    notes = "".join(f"- {note}\n" for note in _notes(board)) if parts else f"{EMPTY}\n"
    listed = "## Skipped and failed\n\n" + "".join(f"- {inline(line)}\n" for line in faults) if faults else ""
    return "\n".join(["# Leaderboard\n", *parts, notes, *([listed] if listed else [])])


def _best(rows: pl.DataFrame | None) -> str:
    """The best of each budget as a Markdown table, or nothing."""
    return "" if rows is None else f"Best per budget:\n\n{markdown(rows, filled(rows, BEST))}\n"


def on_top(group: pl.DataFrame) -> str:
    """What must be said above a Markdown table, or nothing."""
    top = f"> **{inline(said)}**\n\n" if (said := remark(group)) else ""
    return f"{top}{inline(floor)}\n\n" if (floor := popular(group)) else top


def caption(head: str, group: pl.DataFrame) -> str:
    """A LaTeX table's caption: its title and what must be said of it."""
    return f"{head}. {said}" if (said := remark(group)) else head


def _notes(board: pl.DataFrame) -> tuple[str, ...]:
    return (*NOTES, CEILINGS) if board["ceiling_full_hr@10"].is_not_null().any() else NOTES


def to_csv(frame: pl.DataFrame) -> str:
    """The leaderboard of a results frame as CSV: unrounded, units in the names."""
    return csv(leaderboard(frame))


def to_latex(frame: pl.DataFrame) -> str:
    """The leaderboard of a results frame as LaTeX tables, problems as comments."""
    parts = [
        latex(group, filled(group, COLUMNS_SHOWN), caption(head, group)) for head, group in sections(leaderboard(frame))
    ]
    return "\n".join([*(parts or [f"% {EMPTY}\n"]), *(f"% {line}\n" for line in problems(frame))])


def print_leaderboard(
    frame: pl.DataFrame,
    console: Console,
    folder: str | Path | None = None,
    *,
    only: Mapping[str, Sequence[str]] | None = None,
    sort: str | None = None,
    columns: Sequence[str] = (),
) -> None:
    """Print the leaderboard of a results frame; columns that do not fit the terminal are left out.

    folder: of the run, whose values by user tell ties. only: rows, as `board.select` takes them. sort: a column of
    `board.aggregate`, best or smallest first. columns: of it, in place of the usual ones. Raises ValueError.
    """
    board = select(frame, only or {})
    shown = tuple(map(partial(_column, board), columns)) or IN_TERMINAL
    board = chains_as_one(_by(board, sort))
    users = Users(frame, folder)
    best = {} if only or sort or columns else dict(groups_of(best_per_budget(frame, users)))
    for key, group in groups_of(board):
        head = title(group.row(0, named=True))
        if said := remark(group):
            tell(console, said, "bold yellow")
        if floor := popular(group):
            tell(console, floor, "dim")
        if (firsts := best.get(key)) is not None:
            console.print(terminal(firsts, filled(firsts, BEST), f"{head}: best per budget", console.width))
            console.print()
        console.print(terminal(group, filled(group, shown), head, console.width))
        console.print()
    if said := untested(best, users):
        tell(console, said, "dim")
    for note in (EMPTY,) if board.is_empty() else NOTES[1:3]:
        tell(console, note, "dim")
    for line in problems(frame):
        tell(console, line, "red" if line.startswith("failed") else "yellow")


def _by(board: pl.DataFrame, name: str | None) -> pl.DataFrame:
    """Sorted within each table by a column: what costs from below, what is kept from above."""
    if name is None:
        return board
    _column(board, name)
    better = re.match(
        r"(hr|ndcg|recall|overlap|appended)@|mrr|g?auc$|delta_|agree|alike|fidel|above|of_|smaller|lossless|requests_per",
        name,
    )
    descending = [*(False for _ in GROUP), better is not None]
    return board.sort(*GROUP, name, descending=descending, nulls_last=True, maintain_order=True)


def _column(board: pl.DataFrame, name: str) -> Column:
    """Any column of the board, under its own name; raises ValueError where there is none."""
    if name not in board.columns:
        raise ValueError(f"the leaderboard has no column '{name}'.{suggest(name, board.columns)}")
    return significant(name, name) if board.schema[name].is_numeric() else words(name, name, most=40)
