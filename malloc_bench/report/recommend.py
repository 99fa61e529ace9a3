"""Which methods to use within limits of bytes, accuracy and time: those that no other beats. Knows results only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from malloc_bench import results
from malloc_bench.evaluation.metrics import holm
from malloc_bench.report.board import EMPTY, aggregate, groups_of, sections, select, steps, title
from malloc_bench.report.judge import REBUILT, alike, delta, deployable, full, of_most_trainings, remark
from malloc_bench.report.render import filled, interval, number, significant, tell, terminal, words
from malloc_bench.report.users import Users, p_of

if TYPE_CHECKING:
    from rich.console import Console

LEVEL = 0.05  # a method that is worse than the best with a larger p (Holm) ties with it
STANDINGS = ("best", "ties", "smaller", "cheaper read", "rebuilds")


@dataclass(frozen=True)
class Limits:
    """What a state may cost. size: bytes a user; share: of the full state's bytes; read_ms: of a read, see `board`;
    at_least: share of the full state's NDCG@10 (or GAUC above 0.5), see `sure`. None: no limit."""

    size: float | None = None
    share: float | None = None
    read_ms: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        for name in ("size", "share", "read_ms", "at_least"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"a limit is a number, not {value:g}")

    def kept(self) -> pl.Expr:
        """Whether a row of `board.aggregate` is within all of them; a row in which one was not measured is not."""
        at_most = (
            (pl.col("bytes_mean"), self.size),
            (pl.col("ratio"), self.share),
            (pl.col("read_ms"), self.read_ms),
        )
        tests = [(value <= limit * (1 + 1e-9)).fill_null(False) for value, limit in at_most if limit is not None]
        if self.at_least is not None:
            tests.append(((sure() >= self.at_least) | (pl.col("method") == "full")).fill_null(False))
        return pl.all_horizontal(pl.lit(True), *tests)

    def __str__(self) -> str:
        said = [
            f"{self.size / 1e3:g} KB" if self.size is not None else "",
            f"{100 * self.share:.4g} % of the full state's bytes" if self.share is not None else "",
            f"{self.read_ms:g} ms a read" if self.read_ms is not None else "",
        ]
        least = f"surely keeping {100 * self.at_least:.4g} % of its accuracy" if self.at_least is not None else ""
        return ", ".join(filter(None, (" and ".join(filter(None, said)), least))) or "any size"


def sure() -> pl.Expr:
    """Share of the full state's accuracy at the lower end of its interval, or of the mean where there is none."""
    return pl.when(full() > 0).then(1 + pl.coalesce(delta("_lo"), delta()) / full())


def recommend(
    frame: pl.DataFrame,
    limits: Limits,
    folder: str | Path | None = None,
    only: Mapping[str, Sequence[str]] | None = None,
) -> pl.DataFrame:
    """The rows of `board.aggregate` that no other beats within the limits, best first in each table.

    Of each method its best row counts: the one that keeps most of the full state's order (overlap@10, or agreement).
    Adds `standing`: `best` of those that keep a state, `ties` with it (not significantly worse: paired over users,
    seeds pooled, Holm), or beaten by none in order, bytes and cost of a read together: `smaller`, `cheaper read`,
    `rebuilds` (the family recompute); `p_best`, null where values by user are missing; and `tested`: whether all of
    the table could be tested. folder: of the run, where those values are. only: rows to choose among, as
    `board.select` takes them. No history, what knows the reader, and means over fewer trainings than others' are left
    out. In a table without headroom accuracy is no limit.
    """
    return of_board(select(frame, only or {}), limits, Users(frame, folder))


def of_board(board: pl.DataFrame, limits: Limits, users: Users) -> pl.DataFrame:
    """As `recommend`, from the rows of `board.aggregate`."""
    found = [_section(rows, limits, users) for _, rows in sections(board)]
    found = [each for each in found if not each.is_empty()]
    return pl.concat(found) if found else _section(board.clear(), limits, users)


def judges(rows: pl.DataFrame) -> bool:
    """Whether accuracy says anything in a table: not where the full state does not beat no history."""
    return len(rows) == 0 or rows["headroom"][0] is not False


def _section(rows: pl.DataFrame, limits: Limits, users: Users) -> pl.DataFrame:
    limits = limits if judges(rows) else replace(limits, at_least=None)
    cost = next((c for c in ("read_ms", "read_flops") if rows[c].is_not_null().any()), "read_flops")
    size = pl.col("bytes_mean").fill_null(0.0)
    rows = (
        _able(rows, limits)
        .filter(_comparable())
        .with_columns(alike().alias("alike"))
        .sort(-pl.col("alike"), size, maintain_order=True)
        .unique("compressor", keep="first", maintain_order=True)
    )
    kept = (pl.col("family") != REBUILT).alias("kept")
    rows = rows.with_columns(kept).sort("kept", descending=True, maintain_order=True)
    best = rows.row(0, named=True) if len(rows) and rows["kept"][0] else None
    p = _against(best, rows, users)
    among = front(rows.filter("kept"), "bytes_mean", cost)  # what rebuilds does not stand for a kept state
    unbeaten = among + front(rows, "bytes_mean", cost)[len(among) :]
    rows = rows.with_columns(
        pl.Series("p_best", p, pl.Float64),
        pl.lit(all(each is not None for each, kept in list(zip(p, rows["kept"]))[1:] if kept)).alias("tested"),
        pl.Series("front", unbeaten, pl.Boolean),
    )
    ties = pl.col("kept") & (pl.col("p_best") >= LEVEL)
    if best is not None:
        ties |= pl.col("kept") & (pl.col("alike") == best["alike"])
    smaller = pl.lit(best is not None) & (pl.col("bytes_mean") < ((best or {}).get("bytes_mean") or 0.0))
    standing = (
        pl.when(pl.int_range(pl.len()) == 0).then(pl.when("kept").then(pl.lit("best")).otherwise(pl.lit("rebuilds")))
        .when(ties).then(pl.lit("ties"))
        .when(pl.col("front") & ~pl.col("kept")).then(pl.lit("rebuilds"))
        .when(pl.col("front") & smaller).then(pl.lit("smaller"))
        .when("front").then(pl.lit("cheaper read"))
    )  # fmt: skip
    found = rows.with_columns(standing.alias("standing")).filter(pl.col("standing").is_not_null())
    order = pl.col("standing").replace_strict({s: i for i, s in enumerate(STANDINGS)}, return_dtype=pl.Int64)
    return found.sort(order, -pl.col("alike"), "bytes_mean", maintain_order=True).drop("kept", "front")


def _able(rows: pl.DataFrame, limits: Limits) -> pl.DataFrame:
    return rows.filter(limits.kept() & deployable() & (pl.col("method") != "none") & alike().is_not_null())


def _comparable() -> pl.Expr:
    kept = pl.col("family") != REBUILT
    return ~kept | of_most_trainings(kept)


def _against(best: dict | None, rows: pl.DataFrame, users: Users) -> list[float | None]:
    """p (Holm) of each kept row being no worse than the best; None where it cannot be told."""
    p: list[float | None] = [None] * len(rows)
    if best is None:
        return p
    for i, row in enumerate(rows.iter_rows(named=True)):
        if i and row["kept"]:
            p[i] = p_of(users.both(row["cell_ids"].split(), best["cell_ids"].split()))
    return [None if each != each else float(each) for each in holm(p)]


def front(rows: pl.DataFrame, *costs: str) -> list[bool]:
    """Whether no other row keeps more (`alike`) at no higher costs, or as much for less.

    To one that keeps more a cost is higher only beyond noise: 5 %, and the intervals of both where reads were timed. A
    cost that was not measured is infinite.
    """
    inf = float("inf")

    def end(cost: str, side: str) -> pl.Expr:
        timed = pl.col(cost) * pl.col(f"read_ratio_{side}") / pl.col("read_ratio")
        return pl.coalesce(timed if cost == "read_ms" else None, pl.col(cost), pl.lit(inf))

    means = rows.select("alike", *(pl.col(cost).fill_null(inf) for cost in costs)).rows()
    least, most = (rows.select(end(cost, side).alias(cost) for cost in costs).rows() for side in ("lo", "hi"))

    def beats(i: int, j: int) -> bool:
        if means[i][0] > means[j][0]:
            return all(a <= b * 1.05 for a, b in zip(least[i], most[j]))
        return means[i][0] == means[j][0] and means[i] != means[j] and all(a <= b for a, b in zip(means[i], means[j]))

    every = range(len(means))
    return [not any(beats(i, j) for i in every) for j in every]


def nearest(rows: pl.DataFrame, limits: Limits) -> str:
    """Of a table with nothing within the limits: what comes nearest to them, in words."""
    can = rows.filter(deployable() & (pl.col("method") != "none") & pl.col("bytes_mean").is_not_null())
    if can.is_empty():
        return "no method's state was measured"
    kept = sure().alias("kept")
    small = can.filter(replace(limits, at_least=None).kept()).with_columns(kept).drop_nulls("kept")
    if len(small):
        best = small.sort("kept", descending=True).row(0, named=True)
        return f"{best['compressor']} surely keeps {100 * best['kept']:.1f} % in {best['bytes_mean'] / 1e3:.3g} KB"
    if limits.read_ms is not None and not can["read_ms"].is_not_null().any():
        return "no read was timed"
    if limits.read_ms is not None and len(can.filter(replace(limits, at_least=None, read_ms=None).kept())):
        best = can.drop_nulls("read_ms").sort("read_ms").row(0, named=True)
        return f"the fastest read: {best['compressor']}, {best['read_ms']:.3g} ms"
    best = can.sort("bytes_mean").row(0, named=True)
    return f"the smallest state: {best['compressor']}, {best['bytes_mean'] / 1e3:.3g} KB"


def best_per_budget(frame: pl.DataFrame, users: Users) -> pl.DataFrame:
    """The best method of each table at each budget (a share) of its suite, and `ties`, the names of those that tie.

    `within` is the budget as a label, `limit` as a share; other columns as `recommend` has them. Methods without a
    budget compete where their state is small enough. users: of the frame's rows.
    """
    board, found = aggregate(frame), []
    shares = {float(v) for each in frame["budget"].drop_nulls().unique() if isinstance(v := json.loads(each), float)}
    for share in sorted(shares, reverse=True):
        for _, rows in sections(of_board(board, Limits(share=share), users)):
            ties = rows.filter(pl.col("standing") == "ties")["compressor"].to_list()
            first = rows.head(1).filter(pl.col("standing") == "best")
            found.append(
                first.with_columns(
                    pl.lit(f"{100 * share:g} %").alias("within"),
                    pl.lit(share).alias("limit"),
                    pl.lit(ties, pl.List(pl.String)).alias("ties"),
                )
            )
    return pl.concat(found) if found else board.clear()


# ---- limits as a user writes them


def share(text: str) -> float:
    """A share above 0 and at most 1 from `1/32`, `3.125%` or `0.03`; raises ValueError."""
    value = results.share(text)
    if value is None or not 0 < value <= 1:
        raise ValueError(f"'{text}' is no share: expected one above 0 and at most 1, such as 1/32, 3.125% or 0.03")
    return value


# ---- as text

DELTA = interval("delta_of_full", "Δ (%) [95 % interval]", "+z.1f", rank=1, scale=100)
COLUMNS = (
    words("compressor", "compressor", most=19),
    words("standing", "why", rank=1),
    words("budget", "budget", rank=1, most=9),
    significant("bytes_mean", "state (KB/user)", scale=1e-3),
    number("overlap@10", "overlap@10", ".3f"),
    number("agreement", "agreement", ".3f"),
    DELTA,
    number("read_ratio", "read (× full)", ".2f", rank=2),
    significant("read_ms", "read (ms)", rank=3),
    significant("read_mflops", "read (MFLOPs)", rank=3),
    significant("compress_ms_p50", "compress (ms, p50)", rank=4),
    number("smaller_x", "× smaller", ".1f", rank=5),
    number("fidelity", "fidelity", ".3f", rank=5),
    significant("bytes_fixed", "for all users (KB)", rank=6, scale=1e-3),
)
WHY = (
    "Best, keeps most: keeps most of the full state's order of all that keep a state. Ties: not significantly worse "
    "(paired over users, Holm, 5 %). Smaller, cheaper read, rebuilds (from raw ids, for every read): no other is as "
    "good in order, bytes and cost of a read together (5 % of a cost is noise, and the interval of a timed read; kept "
    "states among themselves). "
    "Read (ms): over the full state's, round by round, times the full state's median. "
    "Δ: of NDCG@10, or of GAUC above 0.5, with its interval."
)


def untested(found: Mapping[tuple[object, ...], pl.DataFrame], users: Users) -> str | None:
    """Why ties were not tested in some tables, in a line; None where they were."""
    if all(rows["tested"].any() for rows in found.values()):
        return None
    return f"Ties were not all tested: {users.lacking()} (run the suite to have values by user)."


def print_recommended(
    frame: pl.DataFrame,
    limits: Limits,
    console: Console,
    folder: str | Path | None = None,
    only: Mapping[str, Sequence[str]] | None = None,
    stores: Callable[[str], str] = lambda method: "",
) -> None:
    """Print what `recommend` finds; stores: words on what a method keeps, by its bare name. Raises ValueError."""
    board, users = select(frame, only or {}), Users(frame, folder)
    if board.is_empty():
        tell(console, EMPTY, "dim")
    found = dict(groups_of(of_board(board, limits, users)))
    for key, rows in groups_of(board):
        head = title(rows.row(0, named=True))
        if said := remark(rows):
            tell(console, said, "bold yellow")
        here = limits
        if limits.at_least is not None and not judges(rows):
            tell(console, "Accuracy is no limit here: --at-least was left aside.", "bold yellow")
            here = replace(limits, at_least=None)
        if key not in found:
            tell(console, f"{head}: nothing within {here}; {nearest(rows, here)}")
            continue
        best = found[key]
        if len(fewer := _able(rows, here).filter(~_comparable())):
            names = ", ".join(fewer["compressor"].unique(maintain_order=True).head(3))
            tell(console, f"Means over fewer trainings are not among these: {len(fewer)} rows ({names}).", "dim")
        if set(best["standing"]) == {"rebuilds"}:
            tell(
                console,
                f"No kept state is within {here}; {nearest(rows.filter(pl.col('family') != REBUILT), here)}.",
            )
        asked = [each._replace(rank=0) if "(ms)" in each.header and limits.read_ms else each for each in COLUMNS]
        if not judges(rows):  # nothing is best there, and no difference says anything
            best = best.with_columns(pl.col("standing").replace("best", "keeps most"))
            asked.remove(DELTA)
        console.print(terminal(best, filled(best, asked), f"{head}: within {here}", console.width))
        for row in best.head(3).iter_rows(named=True):
            parts = [each.split("(")[0] for each in steps(row["compressor"])]
            keeps = "; ".join(filter(None, map(stores, parts)))
            more = f"malloc-bench show {parts[0]}; malloc-bench reproduce {folder} {row['cell_ids'][:12]}"
            tell(console, f"{row['compressor']}: {f'stores {keeps}. ' if keeps else ''}More: {more}", "dim")
        console.print()
    if found:
        tell(console, WHY, "dim")
        if unsure := sorted({each for rows in found.values() for each in rows["timing"].drop_nulls()} - {"ok"}):
            tell(console, f"Times of a machine that did other work, or that vary: {'; '.join(unsure)}.", "yellow")
    if said := untested(found, users):
        tell(console, said, "dim")
