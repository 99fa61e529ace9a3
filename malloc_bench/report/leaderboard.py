"""The leaderboard: one line per method and budget, grouped by dataset, task and backbone. Knows results only."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl

from malloc_bench.report.judge import judged, main, one_line_a_state, remark, tested
from malloc_bench.report.lineage import APART, apart
from malloc_bench.report.render import (
    Column,
    budget_label,
    csv,
    digits,
    filled,
    latex,
    markdown,
    number,
    significant,
    terminal,
    words,
)
from malloc_bench.results import COLUMNS, complete, label

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

GROUP = ("dataset", "task", "split", "backbone")
METHOD = ("family", "compressor", "compressor_params", "budget")
MIN_STRUCTURAL_SEEDS = 3  # fewer trainings cannot tell the method from training noise

_MOST = ("n_users", "n_targets", "users_one_class", "measured_history", "measured_history_long")
_REALS = [name for name, kind in COLUMNS.items() if kind == "real"]


def newest(frame: pl.DataFrame) -> pl.DataFrame:
    """One row a cell and seed: where a method was rerun in another version, its latest.

    Rows of other data, training or weights stay, with what tells them apart in a column of its own (`lineage.apart`).
    """
    frame = apart(frame, [*GROUP, "backbone_params"])
    same = [*GROUP, "backbone_params", APART, *METHOD, "seed"]
    return frame.sort("created_at", nulls_last=False, maintain_order=True).unique(
        same, keep="last", maintain_order=True
    )


def aggregate(frame: pl.DataFrame, also: Sequence[str] = ()) -> pl.DataFrame:
    """Means over the seeds that ended ok, one row a method and budget, with labels instead of parameters.

    Adds `seeds` (how many the means cover), `seeds_total`, `method` (the bare name), and within each dataset, task,
    split and backbone what `judge.judged` says. Over several seeds interval ends are averaged, which leaves the
    interval as wide as one seed's. `also` names further columns of numbers to average.
    """
    ok = pl.col("status") == "ok"
    means = (
        _labelled(newest(complete(frame)))
        .group_by(*GROUP, *METHOD, maintain_order=True)
        .agg(
            ok.sum().cast(pl.Int64).alias("seeds"),
            pl.len().cast(pl.Int64).alias("seeds_total"),
            *(pl.col(name).filter(ok).max() for name in _MOST),
            pl.col("structural").filter(ok).any(),
            *(pl.col(name).filter(ok).first() for name in ("budget_unit", "measured_weights")),
            pl.col("values_digest")
            .filter(ok)
            .sort_by(pl.col("seed").filter(ok))
            .str.join(" ", ignore_nulls=False)
            .alias("digests"),
            pl.col("cell_id").filter(ok).sort_by(pl.col("seed").filter(ok)).str.join(" ").alias("cell_ids"),
            _worst(pl.col("timing").filter(ok)),
            *(pl.col(name).filter(ok).mean() for name in (*_REALS, *also)),
        )
        .filter(pl.col("seeds") > 0)
        .rename({"compressor": "method", "compressor_params": "compressor"})
    )
    noisy = pl.col("structural") & (pl.col("seeds") < MIN_STRUCTURAL_SEEDS)
    board = tested(one_line_a_state(means, GROUP), noisy).with_columns(
        *(pl.when(pl.col("method") != "full").then(pl.col(name)).alias(name) for name in _REALS if "delta_" in name),
        (1 / pl.col("ratio")).alias("smaller_x"),
        (0.5 / pl.col("ratio")).alias("smaller_f16_x"),
        *(share_of(known).alias(f"of_{known}_ceiling") for known in ("full", "window")),
        (pl.col("read_flops") / 1e6).alias("read_mflops"),
    )
    groups = [judged(group) for _, group in _groups(board)]
    return _sorted(pl.concat(groups)) if groups else judged(board)


def _worst(timing: pl.Expr) -> pl.Expr:
    """`ok`, or all that is wrong with the times of some seed."""
    wrong = [pl.when(timing.str.contains(word).any()).then(pl.lit(word)) for word in ("noisy", "busy")]
    said = pl.concat_str(*wrong, separator=", ", ignore_nulls=True)
    return pl.when(timing.is_not_null().any()).then(said.replace("", "ok")).alias("timing")


def share_of(known: str, metric: str = "hr@10") -> pl.Expr:
    """Of the way from the floor to a ceiling, how much a method has gone; null where there is no way to go."""
    floor = pl.col(f"ceiling_none_{metric}")
    way = pl.col(f"ceiling_{known}_{metric}") - floor
    return pl.when(way > 0).then((pl.col(metric) - floor) / way)


def _labelled(frame: pl.DataFrame) -> pl.DataFrame:
    """`compressor_params` becomes the method's label; `backbone` gets its parameters where one name has several, and

    what else tells its rows apart: they are tables of their own.
    """
    ambiguous = pl.col("backbone_params").n_unique().over("backbone") > 1
    pairs = pl.struct("backbone", "backbone_params").map_elements(_backbone, pl.String)
    return frame.with_columns(
        pl.when(ambiguous).then(pairs).otherwise(pl.col("backbone"))
        + pl.when(pl.col(APART).is_not_null()).then(" [" + pl.col(APART) + "]").otherwise(pl.lit("")),
        pl.struct("compressor", "compressor_params").map_elements(_compressor, pl.String).alias("compressor_params"),
        pl.col("budget").map_elements(budget_label, pl.String).alias("budget"),
    )


def _backbone(row: Mapping[str, Any]) -> str:
    return label(row["backbone"], row["backbone_params"])


def _compressor(row: Mapping[str, Any]) -> str:
    return label(row["compressor"], row["compressor_params"])


def _groups(frame: pl.DataFrame) -> Iterator[tuple[tuple[Any, ...], pl.DataFrame]]:
    yield from frame.group_by(*GROUP, maintain_order=True)


def _sorted(board: pl.DataFrame) -> pl.DataFrame:
    """Groups by name; in each the full state, then larger budgets first (the achieved ratio where there is none)."""
    size = pl.col("budget").str.extract(r"^([\d.]+)(?:, [\d.]+)* %$").cast(pl.Float64) / 100
    keys = [
        *(pl.col(name) for name in GROUP),
        pl.col("method") != "full",
        -size.fill_null(pl.col("ratio")),
        -main(),
    ]
    return board.sort(*keys, nulls_last=True, maintain_order=True)


SHOWN = (
    *GROUP, "n_users", "headroom", "query_headroom", "note", "seeds", "seeds_total", "compressor", "family", "budget",
    "budget_unit", "bytes_mean", "smaller_x", "smaller_f16_x", "share_at_floor", "hr@10", "ndcg@10", "delta_ndcg@10",
    "delta_ndcg@10_lo", "delta_ndcg@10_hi", "gauc", "delta_gauc", "delta_gauc_lo", "delta_gauc_hi", "auc", "logloss",
    "p_holm", "lossless", "lossless_of", "p_lossless", "overlap@10", "agreement", "fidelity", "above_constant",
    "logit_error", "ceiling_full_hr@10", "ceiling_window_hr@10", "of_full_ceiling", "of_window_ceiling",
    "measured_history", "measured_history_long", "read_ms_p50", "read_ratio", "read_ratio_lo", "read_ratio_hi",
    "timing", "compress_ms_p50", "read_mflops",
)  # fmt: skip


def leaderboard(frame: pl.DataFrame) -> pl.DataFrame:
    """The board of a results frame, as numbers, under SHOWN: ok rows only (`problems` has the others)."""
    return aggregate(frame).select(SHOWN)


def problems(frame: pl.DataFrame) -> list[str]:
    """One line for every skipped and failed cell, with its reason; one for all cells that lack the same data."""
    rows = unfinished(frame).iter_rows(named=True)
    return without_data(frame) + [_problem(row) for row in rows if not _lacks_data(row)]


def unfinished(frame: pl.DataFrame) -> pl.DataFrame:
    """The skipped and failed rows, labelled as `aggregate` does: `compressor_params` is the method's label."""
    return _labelled(newest(frame)).filter(pl.col("status") != "ok").sort(*GROUP, "status", maintain_order=True)


def without_data(frame: pl.DataFrame) -> list[str]:
    """One line for all cells that are skipped for one reason: their data could not be had, or do not fit."""
    rows = filter(_lacks_data, frame.filter(pl.col("status") == "skipped").iter_rows(named=True))
    missing = Counter((row["dataset"], row["reason"]) for row in rows)
    return [f"skipped: {data}, {n} cells: {reason}" for (data, reason), n in sorted(missing.items())]


def _lacks_data(row: Mapping[str, Any]) -> bool:
    return json.loads(row["cell"] or "{}").get("data", 0) is None


def _problem(row: Mapping[str, Any]) -> str:
    at = f" at {row['budget']}" if row["budget"] else ""
    where = f"{row['dataset']}, {row['task']}, {row['backbone']}, {row['compressor_params']}{at}, seed {row['seed']}"
    reason = (row["reason"] or "").strip() or "no reason recorded"
    return f"{row['status']}: {where}: {reason.splitlines()[0]}"


def _difference(name: str, row: Mapping[str, Any]) -> str:
    delta, lo, hi = (row[f"delta_{name}{end}"] for end in ("", "_lo", "_hi"))
    interval = "" if lo is None or hi is None else f" [{lo:+z.4f}, {hi:+z.4f}]"
    return digits(delta, "+z.4f") + interval


def _p(row: Mapping[str, Any]) -> str:
    return "<0.001" if row["p_holm"] is not None and row["p_holm"] < 0.001 else digits(row["p_holm"], ".3f")


def _seeds(row: Mapping[str, Any]) -> str:
    return "" if row["seeds_total"] == 1 else f"{row['seeds']}/{row['seeds_total']}"


#: where a budget of that many bytes or slots does not buy bytes or slots
BUDGET_OF = Column("budget of", lambda row: row["budget_unit"] if row["budget_unit"] == "events" else "", rank=3)

COLUMNS_SHOWN = (
    words("compressor", "compressor"),
    words("family", "family", rank=6),
    Column("seeds ok", _seeds, rank=3),
    Column("budget", lambda row: row["budget"] or ""),
    BUDGET_OF,
    significant("bytes_mean", "state (KB/user)", scale=1e-3),
    number("smaller_x", "× smaller", ".1f", rank=3),
    number("smaller_f16_x", "× smaller than float16", ".1f", rank=7),
    number("share_at_floor", "at floor (% users)", ".0f", rank=9, scale=100),
    number("hr@10", "HR@10", ".4f", rank=5),
    number("gauc", "GAUC", ".4f"),
    Column("ΔGAUC [95 % interval]", partial(_difference, "gauc"), rank=2),
    number("auc", "AUC", ".4f", rank=5),
    number("logloss", "LogLoss", ".4f", rank=6),
    number("ndcg@10", "NDCG@10", ".4f"),
    Column("ΔNDCG@10 [95 % interval]", partial(_difference, "ndcg@10"), rank=2),
    Column("p (Holm)", _p, rank=4),
    Column("lossless", lambda row: f"✓ {row['lossless_of']}" if row["lossless"] else "", rank=3),
    number("overlap@10", "overlap@10", ".3f", rank=1),  # what small data are judged by
    number("of_full_ceiling", "HR@10 of its ceiling (%)", ".1f", rank=2, scale=100),
    number("ceiling_window_hr@10", "a window's HR@10 (at most)", ".4f", rank=2),
    number("of_window_ceiling", "HR@10 of a window's (%)", ".1f", rank=2, scale=100),
    number("agreement", "agreement", ".3f", rank=1),
    number("fidelity", "fidelity", ".3f", rank=3),
    number("above_constant", "above a constant", ".3f", rank=6),
    significant("read_ms_p50", "read (ms, p50)", rank=4),
    number("read_ratio", "read (× full)", ".2f", rank=4),
    Column("timing", lambda row: "" if row["timing"] in (None, "ok") else row["timing"], rank=4),
    significant("compress_ms_p50", "compress (ms, p50)", rank=7),
    significant("read_mflops", "read (MFLOPs)", rank=8),
    number("measured_history", "measured at (events)", ",.0f", rank=9),
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
    "At floor: users whose state is the smallest that the method can make. Blank: does not apply or was not measured.",
)
CEILINGS = (
    "Ceilings (generated data): HR@10 as a share of the way from the best guess without any event to the best possible "
    "with the whole history, and to the most that anyone can reach who knows only the newest events that fit, "
    "uncompressed, into as many bytes: above 100 % a method knows older events, or writes them down in fewer bytes."
)
EMPTY = "No finished cells yet."


def title(row: Mapping[str, Any]) -> str:
    """`ml-1m · retrieval · sasrec (leave_one_out, 6,040 users)` of any row of a group."""
    users = "" if row["n_users"] is None else f", {row['n_users']:,} users"
    return f"{row['dataset']} · {row['task']} · {row['backbone']} ({row['split']}{users})"


def sections(board: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """(title, rows) for every dataset, task, split and backbone."""
    for _, group in _groups(board):
        yield title(group.row(0, named=True)), group


def to_markdown(frame: pl.DataFrame) -> str:
    """The leaderboard of a results frame as a Markdown page."""
    board, faults = leaderboard(frame), problems(frame)
    parts = [
        f"## {head}\n\n{on_top(group)}{markdown(group, filled(group, COLUMNS_SHOWN))}"
        for head, group in sections(board)
    ]
    notes = "".join(f"- {note}\n" for note in _notes(board)) if parts else f"{EMPTY}\n"
    listed = "## Skipped and failed\n\n" + "".join(f"- {line}\n" for line in faults) if faults else ""
    return "\n".join(["# Leaderboard\n", *parts, notes, *([listed] if listed else [])])


def on_top(group: pl.DataFrame) -> str:
    """What must be said above a Markdown table, or nothing."""
    return f"> **{said}**\n\n" if (said := remark(group)) else ""


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


def print_leaderboard(frame: pl.DataFrame, console: Console) -> None:
    """Print the leaderboard of a results frame; columns that do not fit the terminal are left out."""
    board = leaderboard(frame)
    for head, group in sections(board):
        if said := remark(group):
            console.print(said, style="bold yellow", highlight=False, markup=False)
        console.print(terminal(group, filled(group, COLUMNS_SHOWN), head, console.width))
        console.print()
    for note in (EMPTY,) if board.is_empty() else NOTES[1:3]:
        console.print(note, style="dim", highlight=False, markup=False)
    for line in problems(frame):
        console.print(line, style="red" if line.startswith("failed") else "yellow", highlight=False, markup=False)
