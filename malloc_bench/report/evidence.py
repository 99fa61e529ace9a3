"""Tables of what holds: fronts of accuracy and cost, tests, and growth with the history. Knows results only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from malloc_bench.evaluation.metrics import holm, noninferiority
from malloc_bench.registry import find, names
from malloc_bench.report.board import GROUP, aggregate, groups_of
from malloc_bench.report.judge import REBUILT, alike, deployable, judged, of_most_trainings
from malloc_bench.report.paper import at_budgets, competes, paper, paper_blocks
from malloc_bench.report.recommend import front
from malloc_bench.report.render import Column, Table, interval, number, p_value, significant, words
from malloc_bench.report.users import Users, difference, p_of
from malloc_bench.results import STEPS
from malloc_bench.results.labels import first_step

HEAD = (*GROUP, "n_users", "note", "family", "compressor", "budget")
LABELS = (words("family", "family"), words("compressor", "compressor"), words("budget", "budget"))
LEAST_GROWTH = 1.5  # lengths nearer to one another say nothing of growth

# ---- fronts


def pareto(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows that no other beats in what they keep of the full state's order and in bytes, in the cost of a read, or

    in all three together (`recommend.front`), in each group; smallest first. No history, ceilings, ids, which are
    rebuilt for every read, and means over fewer trainings than others' are left out; where no read was measured so are
    fronts by it.
    """
    parts = []
    kept = deployable() & (pl.col("method") != "none") & (pl.col("family") != REBUILT) & alike().is_not_null()
    for _, rows in groups_of(aggregate(frame)):
        able = rows.filter(kept).filter(of_most_trainings()).with_columns(alike().alias("alike"))
        read = next((cost for cost in ("read_ms", "read_flops") if able[cost].is_not_null().any()), None)
        costs = {"by_bytes": ("bytes_mean",), "by_read": (read,), "by_all": ("bytes_mean", read)}
        on = able.with_columns(
            pl.lit(None, pl.Boolean).alias(name) if None in each else pl.Series(name, front(able, *each), pl.Boolean)  # type: ignore[arg-type]
            for name, each in costs.items()
        )
        parts.append(on.filter(pl.any_horizontal(*costs)).sort("bytes_mean", nulls_last=True, maintain_order=True))
    whole = pl.concat(parts) if parts else aggregate(frame).with_columns(
        alike().alias("alike"), *(pl.lit(None, pl.Boolean).alias(name) for name in ("by_bytes", "by_read", "by_all"))
    )  # fmt: skip
    numbers = ("bytes_mean", "smaller_x", "read_ms", "read_ratio", "read_mflops", "fidelity", "alike")
    return whole.select(*HEAD, *numbers, "by_bytes", "by_read", "by_all")


# ---- tests


def significance(frame: pl.DataFrame, folder: str | Path | None = None) -> pl.DataFrame:
    """Of each method and budget: its difference to the full state, and to the best of its budget, with intervals and p.

    Several trainings are pooled, clustered by user, where values by user are in `folder`; see `pooled`. The best keeps
    most of the full state's order of all that keep a state; `apart` is the difference to it in overlap@10 or agreement,
    paired over users, `p_best` Holm-corrected within a budget: null without values by user in `folder`.
    """
    users, parts = Users(frame, folder), []
    rows = at_budgets(pooled(aggregate(frame), users)).filter(pl.col("method") != "full")
    for _, block in rows.group_by(*GROUP, "within", maintain_order=True):
        able = block.filter(competes() & alike().is_not_null()).filter(of_most_trainings())
        able = able.sort(-alike(), pl.col("bytes_mean").fill_null(0.0), maintain_order=True)
        best = able.row(0, named=True) if len(able) else None
        parts.append(block.with_columns(_to_best(block, best, users)))
    measured = ("best", "apart", "apart_lo", "apart_hi", "p_best")
    none = [pl.lit(None, pl.String if name == "best" else pl.Float64).alias(name) for name in measured]
    whole = pl.concat(parts) if parts else rows.with_columns(none)
    of = pl.when(pl.col("lossless_of") == "GAUC")
    deltas = [of.then(f"delta_gauc{e}").otherwise(f"delta_ndcg@10{e}").alias(f"delta{e}") for e in ("", "_lo", "_hi")]
    head = (*GROUP, "n_users", "note", "family", "compressor", pl.col("within").alias("budget"))
    tested = ("p_holm", "p_lossless", "lossless", "pooled")
    return whole.select(*head, pl.col("lossless_of").alias("metric"), *deltas, *tested, *measured).sort(
        *GROUP, maintain_order=True
    )


def pooled(board: pl.DataFrame, users: Users) -> pl.DataFrame:
    """`aggregate`'s rows judged again, with differences to the full state of each user's mean over the trainings.

    Their intervals narrow with trainings, where `aggregate` averages the ends of one training's. `pooled`: over how
    many users; null where a row stays as it was: one training, weights of its own, no values by user, nothing to test.
    """
    parts = []
    for _, group in groups_of(board):
        of, chance = ("gauc", 0.5) if group["lossless_of"][0] == "GAUC" else ("ndcg@10", 0.0)
        full = group.filter(pl.col("method") == "full")["cell_ids"].to_list()
        found = [_over_users(row, full, users, chance) for row in group.iter_rows(named=True)]
        names = *(f"delta_{of}{end}" for end in ("", "_lo", "_hi")), "p_value", "p_noninferior", "pooled"
        group = group.with_columns(pl.lit(None, pl.Float64).alias("pooled"))
        new = [
            pl.Series(name, [each[i] if each else before for each, before in zip(found, group[name])], pl.Float64)
            for i, name in enumerate(names)
        ]
        parts.append(judged(group.with_columns(new)))
    return pl.concat(parts) if parts else board.with_columns(pl.lit(None, pl.Float64).alias("pooled"))


def _over_users(row: Mapping[str, Any], full: list[str], users: Users, chance: float) -> tuple[float, ...] | None:
    """Delta, its interval, p, p of non-inferiority, and users."""
    # without a p it is the full state, or has its lists
    if row["p_value"] is None or row["structural"] or row["seeds"] < 2 or not full:
        return None
    both = users.both(row["cell_ids"].split(), full[0].split(), "main")
    if (found := difference(both)) is None or both is None:
        return None
    return *found[:4], float(noninferiority(both.a[None], both.b, chance=chance)[0]), found.users


def _to_best(block: pl.DataFrame, best: Mapping[str, Any] | None, users: Users) -> list[pl.Series]:
    found, p = [], []
    for row in block.iter_rows(named=True):
        other = best is not None and row["cell_ids"] != best["cell_ids"]
        both = users.both(row["cell_ids"].split(), best["cell_ids"].split()) if best is not None and other else None
        found.append(difference(both))
        p.append(p_of(both))
    corrected = [None if each != each else float(each) for each in holm(p)]
    return [
        pl.Series("best", [None if best is None else best["compressor"]] * len(block), pl.String),
        *(
            pl.Series(f"apart{end}", [None if each is None else getattr(each, name) for each in found], pl.Float64)
            for end, name in (("", "delta"), ("_lo", "lo"), ("_hi", "hi"))
        ),
        pl.Series("p_best", corrected, pl.Float64),
    ]


# ---- growth


def complexity(frame: pl.DataFrame) -> pl.DataFrame:
    """How bytes, FLOPs and time grow: the leading terms that a method names, in n events, L layers, d channels and what

    `compressors.base.grows` lists; and e in n^e between the two lengths of history that were measured. Null where they
    are too near to one another. A part of each cost does not grow, which lowers e where histories are short: `read
    FLOPs beyond none` are those that a read of no history does not take.
    """
    rows = aggregate(frame)
    floors = [
        pl.col(name).filter(pl.col("method") == "none").first().over(GROUP).alias(f"none_{name}") for name in READ
    ]
    beyond = [pl.when(pl.col("method") != "none").then(pl.col(n) - pl.col(f"none_{n}")).alias(f"own_{n}") for n in READ]
    rows = rows.with_columns(floors).with_columns(beyond)
    longer = pl.col("measured_history_long") / pl.col("measured_history")
    exponents = [
        pl.when((longer >= LEAST_GROWTH) & (pl.col(a) > 0) & (pl.col(b) > 0))
        .then((pl.col(b) / pl.col(a)).log() / longer.log())
        .alias(name)
        for name, (a, b) in GROWTH.items()
    ]
    said = [
        pl.Series(name, [_said(label, what) for label in rows["compressor"]], pl.String) for name, what in SAID.items()
    ]
    found = rows.with_columns(exponents).with_columns(said)
    found = found.filter(pl.any_horizontal(pl.col(name).is_not_null() for name in (*SAID, *GROWTH)))
    return found.select(*HEAD, *SAID, "measured_history", "measured_history_long", *GROWTH)


def _said(label: str, what: str) -> str | None:
    """The leading terms that a method names (`compressors.base.grows`); of a chain its first step's."""
    first = first_step(label)
    term = find("compressors", first).growth.get(what, "") if first in names("compressors") else ""
    return term.replace("^2", "²").replace("^3", "³") or None


SAID = {f"said {what}": what for what in ("memory", "compress", "read")}
READ = ("read_flops", "read_flops_long")
#: name -> columns of the shorter and the longer history
GROWTH = {
    "memory": ("measured_bytes", "measured_bytes_long"),
    **{f"{step} FLOPs": (f"{step}_flops", f"{step}_flops_long") for step in STEPS},
    "read FLOPs beyond none": ("own_read_flops", "own_read_flops_long"),
    **{f"{step} ms": (f"{step}_ms_p50", f"{step}_ms_p50_long") for step in STEPS},
}

PAPER = {
    "paper": Table(paper, blocks=paper_blocks),
    "pareto": Table(
        pareto,
        (
            *LABELS,
            significant("bytes_mean", "state (KB/user)", scale=1e-3),
            number("smaller_x", "× smaller", ".1f"),
            significant("read_ms", "read (ms)"),
            number("read_ratio", "read (× full)", ".2f"),
            significant("read_mflops", "read (MFLOPs)"),
            number("fidelity", "fidelity", ".3f"),
            number("alike", "overlap@10 or agreement", ".3f"),
            *(
                Column(header, lambda row, name=name: "✓" if row[name] else "")  # type: ignore[misc]
                for name, header in (("by_bytes", "for its bytes"), ("by_read", "for its read"), ("by_all", "for both"))
            ),
        ),
        notes=(
            "Read (ms): over the full state's, round by round, times the full state's median, as `recommend` has it; "
            "FLOPs stand in where no read was timed. Of states that are kept: raw ids are rebuilt for every read.",
        ),
    ),
    "significance": Table(
        significance,
        (
            *LABELS,
            words("metric", "metric"),
            interval("delta", "Δ to the full state [95 % interval]", "+z.4f"),
            number("pooled", "users, trainings pooled", ",.0f"),
            p_value("p_holm", "p (Holm)"),
            p_value("p_lossless", "p of a loss of 1 % (Holm)"),
            Column("lossless", lambda row: "" if row["lossless"] is None else "yes" if row["lossless"] else "no"),
            words("best", "best of the budget"),
            interval("apart", "Δ overlap or agreement to it [95 % interval]", "+z.3f"),
            p_value("p_best", "p to it (Holm)"),
        ),
        by_user=True,
        notes=(
            "Intervals are each row's own, at 95 %; p are corrected (Holm) for all of a table's rows, and to the best "
            "for those of a budget: an interval may leave out 0 where p is 1. Trainings pooled: of each user's mean "
            "over them; elsewhere the ends of their intervals are averaged, and p is twice the mean of theirs.",
        ),
    ),
    "complexity": Table(
        complexity,
        (
            *LABELS,
            *(words(name, f"{what}: O(.)") for name, what in SAID.items()),
            number("measured_history", "n: from (events)", ",.0f"),
            number("measured_history_long", "n: to (events)", ",.0f"),
            *(number(name, f"{name}: e of n^e", ".2f") for name in GROWTH),
        ),
        notes=(
            "O(.): leading terms of n events, L layers, d channels, a share b of them kept, and the method's "
            "parameters; of a chain its first step's.",
            "e: slope between both lengths, in logarithms. What does not grow lowers it, and so does noise of times "
            "below a millisecond: an e of ms near 0 or below says that no growth was seen between these lengths. O(.) "
            "is of long histories: where n is below d, p or m other parts of the work lead.",
        ),
    ),
}
