"""The board: one row a method and budget, means over seeds, judged within each table. Knows results only."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from malloc_bench.registry import clipped, folded, shown, suggest
from malloc_bench.report.judge import alike, delta, full, judged, main, one_line_a_state, tested
from malloc_bench.report.lineage import APART, apart
from malloc_bench.results import COLUMNS, budget_asked, budget_label, budget_labels, complete, label
from malloc_bench.results.labels import bare, spelled

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

GROUP = ("dataset", "task", "split", "backbone")
METHOD = ("family", "compressor", "compressor_params", "budget")
MIN_STRUCTURAL_SEEDS = 3  # fewer trainings cannot tell the method from training noise

_MOST = (
    "n_users", "n_targets", "users_one_class", "measured_users", "measured_candidates", "measured_history",
    "measured_history_long",
)  # fmt: skip
_TESTS = ("p_value", "p_auc")
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

    Adds `seeds` (how many the means cover), `seeds_total` (the most that any method there has), `cell_ids` (theirs,
    apart by blanks), `method` (the bare name), `alike_lo` and `alike_hi` (the least and the most that a seed keeps of
    the full state's order), `read_ms` (a read over the full state's, round by round, times the full state's: what other
    work on a machine moves least), and within each dataset, task, split and backbone what `judge.judged` says. Over
    several seeds interval ends are averaged, which leaves the interval as wide as one seed's. `also` names further
    columns of numbers to average.
    """
    asked = tuple(also)
    if not (_LAST and _LAST[0][0] is frame and _LAST[0][1] == asked):
        _LAST[:] = [(frame, asked, _aggregated(frame, asked))]
    return _LAST[0][2]


_LAST: list[tuple[pl.DataFrame, tuple[str, ...], pl.DataFrame]] = []  # a report's tables and figures ask for the same


def _aggregated(frame: pl.DataFrame, also: Sequence[str]) -> pl.DataFrame:
    ok = pl.col("status") == "ok"
    means = (
        labelled(newest(complete(frame)))
        .group_by(*GROUP, *METHOD, maintain_order=True)
        .agg(
            ok.sum().cast(pl.Int64).alias("seeds"),
            pl.len().cast(pl.Int64).alias("seeds_total"),
            *(pl.col(name).filter(ok).max() for name in _MOST),
            pl.col("structural").filter(ok).any(),
            *(pl.col(name).filter(ok).first() for name in ("budget_unit", "measured_weights", "store")),
            pl.col("values_digest")
            .filter(ok)
            .sort_by(pl.col("seed").filter(ok))
            .str.join(" ", ignore_nulls=False)
            .alias("digests"),
            pl.col("cell_id").filter(ok).sort_by(pl.col("seed").filter(ok)).str.join(" ").alias("cell_ids"),
            *(_worst(pl.col(name).filter(ok)).alias(name) for name in ("timing", "request_timing")),
            alike().filter(ok).min().alias("alike_lo"),
            alike().filter(ok).max().alias("alike_hi"),
            *(pl.col(name).filter(ok).mean() for name in (*_REALS, *also) if name not in _TESTS),
            *(_p(pl.col(name).filter(ok)).alias(name) for name in _TESTS),
            delta().filter(ok).std().alias("delta_spread"),
        )
        .filter(pl.col("seeds") > 0)
        .with_columns(pl.col("seeds_total").max().over(GROUP))  # one beside means of three is told
        .rename({"compressor": "method", "compressor_params": "compressor"})
    )
    noisy = pl.col("structural") & (pl.col("seeds") < MIN_STRUCTURAL_SEEDS)
    full_read = pl.col("read_ms_p50").filter(pl.col("method") == "full").first()
    board = tested(one_line_a_state(means, GROUP), noisy).drop("delta_spread")
    board = board.with_columns(
        *(pl.when(pl.col("method") != "full").then(pl.col(name)).alias(name) for name in _REALS if "delta_" in name),
        (1 / pl.col("ratio")).alias("smaller_x"),
        (0.5 / pl.col("ratio")).alias("smaller_f16_x"),
        *(share_of(known).alias(f"of_{known}_ceiling") for known in ("full", "window")),
        (pl.col("read_flops") / 1e6).alias("read_mflops"),
        pl.coalesce(pl.col("read_ratio") * full_read.over(GROUP), "read_ms_p50").alias("read_ms"),
    )
    board = board.with_columns(
        pl.when(full() > 0).then(delta(end) / full()).alias(f"delta_of_full{end}") for end in ("", "_lo", "_hi")
    )
    groups = [judged(group) for _, group in groups_of(board)]
    return _sorted(pl.concat(groups)) if groups else judged(board)


def _p(each: pl.Expr) -> pl.Expr:
    """The mean of the seeds' p; where some have one, a seed whose lists are the full state's own has 1."""
    return pl.when(each.is_not_null().any()).then(each.fill_null(1.0).mean())


def chains_as_one(board: pl.DataFrame) -> pl.DataFrame:
    """Chains of one table whose states are the same (their encoder alone meets the budget) as one row that says so."""
    key = [*GROUP, "digests", "bytes_mean", "seeds"]
    rows = board.with_row_index("place")
    chain = (pl.col("family") == "chain") & (pl.col("digests").fill_null("") != "")
    rows = rows.with_columns(pl.when(chain).then(0).otherwise("place").alias("own"))
    others = (pl.len().over([*key, "own"]) - 1).alias("others")
    said = pl.col("compressor") + pl.format(" = {} more", "others")
    return (
        rows.with_columns(others)
        .unique([*key, "own"], keep="first", maintain_order=True)
        .with_columns(pl.when(chain & (pl.col("others") > 0)).then(said).otherwise("compressor").alias("compressor"))
        .select(board.columns)
    )


def _worst(timing: pl.Expr) -> pl.Expr:
    """`ok`, or all that is wrong with the times of some seed."""
    wrong = [pl.when(timing.str.contains(word).any()).then(pl.lit(word)) for word in ("noisy", "busy")]
    said = pl.concat_str(*wrong, separator=", ", ignore_nulls=True)
    return pl.when(timing.is_not_null().any()).then(said.replace("", "ok"))


def share_of(known: str, metric: str = "hr@10") -> pl.Expr:
    """Of the way from the floor to a ceiling, how much a method has gone; null where there is no way to go."""
    floor = pl.col(f"ceiling_none_{metric}")
    way = pl.col(f"ceiling_{known}_{metric}") - floor
    return pl.when(way > 0).then((pl.col(metric) - floor) / way)


def labelled(frame: pl.DataFrame) -> pl.DataFrame:
    """`compressor_params` becomes the method's label; `backbone` gets its parameters where one name has several, and

    what else tells its rows apart: they are tables of their own.
    """
    return frame.with_columns(
        _told_apart(),
        pl.struct("compressor", "compressor_params").map_elements(_compressor, pl.String).alias("compressor_params"),
        pl.col("budget").map_elements(budget_label, pl.String).alias("budget"),
        pl.col("family", "split").fill_null(""),  # of a method without one, and of what was never settled
    )


def _told_apart() -> pl.Expr:
    ambiguous = pl.col("backbone_params").n_unique().over("backbone") > 1
    pairs = pl.struct("backbone", "backbone_params").map_elements(_backbone, pl.String)
    words = pl.when(pl.col(APART).is_not_null()).then(" [" + pl.col(APART) + "]").otherwise(pl.lit(""))
    return pl.when(ambiguous).then(pairs).otherwise(pl.col("backbone")) + words


def side_by_side(frames: Sequence[pl.DataFrame]) -> list[pl.DataFrame]:
    """Results frames of several runs in which one name of a backbone means one: its parameters and what else tells its
    rows apart, but for weights, stand in `backbone` where it takes that to tell two runs apart."""
    numbered = [complete(frame).with_columns(pl.lit(i).alias("frame")) for i, frame in enumerate(frames)]
    whole = apart(pl.concat(numbered, how="diagonal_relaxed"), [*GROUP, "backbone_params"], weights=False)
    whole = whole.with_columns(_told_apart(), pl.lit("{}").alias("backbone_params")).drop(APART)
    return [whole.filter(pl.col("frame") == i).drop("frame") for i in range(len(frames))]


def reason_of(row: Mapping[str, Any]) -> str:
    """Why a row did not end well, on one line."""
    return clipped(shown(folded(row["reason"] or "")), 500) or "no reason recorded"


def _backbone(row: Mapping[str, Any]) -> str:
    return label(row["backbone"], row["backbone_params"])


def _compressor(row: Mapping[str, Any]) -> str:
    return label(row["compressor"], row["compressor_params"])


def groups_of(frame: pl.DataFrame) -> Iterator[tuple[tuple[Any, ...], pl.DataFrame]]:
    yield from frame.group_by(*GROUP, maintain_order=True)


def _sorted(board: pl.DataFrame) -> pl.DataFrame:
    """Groups by name; in each the full state, then larger budgets first (the achieved ratio where there is none), and

    at one budget what keeps most of the full state's order.
    """
    size = pl.col("budget").str.extract(r"^([\d.]+)(?:, [\d.]+)* %$").cast(pl.Float64) / 100
    keys = [
        *(pl.col(name) for name in GROUP),
        pl.col("method") != "full",
        -size.fill_null(pl.col("ratio")),
        -alike(),
        -main(),
    ]
    return board.sort(*keys, nulls_last=True, maintain_order=True)


def title(row: Mapping[str, Any]) -> str:
    """`ml-1m · retrieval · sasrec (leave_one_out, 6,040 users)` of any row of a group."""
    users = "" if row["n_users"] is None else f"{row['n_users']:,} users"
    about = ", ".join(filter(None, (row["split"], users)))
    return f"{row['dataset']} · {row['task']} · {row['backbone']}" + (f" ({about})" if about else "")


def sections(board: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """(title, rows) for every dataset, task, split and backbone."""
    for _, group in groups_of(board):
        yield title(group.row(0, named=True)), group


EMPTY = "No finished cells yet."


def steps(label: str) -> list[str]:
    """The parts of a chain's label, or the label of a method itself."""
    return re.split(r" \+ (?![^(]*\))", label)


#: key of `--only` -> column of the board, or of rows
SELECTED = {name: name for name in (*GROUP, "family", "compressor", "budget", "seed")}


REST = "no budget"  # the block of methods that have none, and fit in none of the others'
_INSTEAD = {"budget": "within", "compressor": "method"}


def select(frame: pl.DataFrame, wanted: Mapping[str, Sequence[str]], also: Sequence[str] = ()) -> pl.DataFrame:
    """The board of a results frame, its rows that have, of each key of SELECTED, one of the values wanted: a name or a

    label, a budget in any way of writing it, `none` for none of it; a seed is one of those that the means cover.
    also: as in `aggregate`. Raises ValueError for an unknown key, or a value that no row has.
    """
    for key, values in wanted.items():
        if key not in SELECTED:
            raise ValueError(f"--only {key}={','.join(values)}: unknown key.{suggest(key, SELECTED)}")
    board = aggregate(of_seeds(frame, wanted), also)
    chosen = [having(board, key, values) for key, values in wanted.items() if key != "seed"]
    return board.filter(pl.all_horizontal(pl.lit(True), *chosen))


def of_seeds(frame: pl.DataFrame, wanted: Mapping[str, Sequence[str]]) -> pl.DataFrame:
    """The rows of a results frame that have a seed wanted; all where none is. Raises ValueError."""
    return frame.filter(having(frame, "seed", wanted["seed"])) if "seed" in wanted else frame


def having(rows: pl.DataFrame, key: str, values: Sequence[str]) -> pl.Series:
    """Which rows have one of the values; raises ValueError for a value that none has."""
    known = {spelled(each): each for value in rows[SELECTED[key]].unique() for each in _had(key, value)}
    asked = {value: budget_asked(value) if key == "budget" else value for value in values}
    for value, meant in asked.items():
        if spelled(meant) not in known:
            raise ValueError(f"--only {key}={value}: no row has it.{suggest(meant, known.values())}")
    return _matching(rows[SELECTED[key]], key, values)


def narrowed(table: pl.DataFrame, name: str, frame: pl.DataFrame, wanted: Mapping[str, Sequence[str]]) -> pl.DataFrame:
    """Of a table made of a results frame the lines that have the values wanted.

    A line for all parameters of a method stands for each of them. Seeds are for `of_seeds`; of another key that the
    table has no column of, a warning is logged. Raises as `select`, whichever table it is.
    """
    select(frame, wanted)
    for key, values in wanted.items():
        # the blocks of `paper`, and the lines of `taxonomy`
        column = next((each for each in (key, _INSTEAD.get(key)) if each in table.columns), None)
        asked = [*map(bare, values)] if column == "method" else values
        if column is not None:
            table = table.filter(_matching(table[column], key, asked))
        elif key != "seed":
            log.warning("--only %s: the table %s has no such column, and is not narrowed by it", key, name)
    return table


def _matching(column: pl.Series, key: str, values: Sequence[str]) -> pl.Series:
    asked = {spelled(budget_asked(value) if key == "budget" else value) for value in values}
    return pl.Series([not asked.isdisjoint(map(spelled, _had(key, each))) for each in column], dtype=pl.Boolean)


def _had(key: str, value: str | int | None) -> set[str]:
    """What a value of a column may be asked for by: its label, and its bare names."""
    text = "" if value is None else str(value)
    if not text:
        return {"none"}
    if key == "budget":
        return {"none"} if text == REST else set(budget_labels(text))
    parts = steps(text)
    return {text, bare(text), *parts, *(each.split("(")[0].split(" [")[0] for each in parts)}
