"""What a table may say of its methods: is there anything to lose, what is lost, is that sure. Knows results only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import polars as pl

from malloc_bench.evaluation.metrics import holm, upper_tail

LOSSLESS = -0.01  # the most that a lossless method may lose, relative: of NDCG@10, or of GAUC above guessing's 0.5
REBUILT = "recompute"  # the family that keeps ids and rebuilds the state for every read
KNOWS = r"which=candidates|\boracle_"  # in a label, of a chain too: what knows the tokens that will read
CONSTANT = "fit_constant"  # the floor that reads without a query
LEVEL = 0.025  # one-sided: that of a 95 % interval's lower end
CORRECTED = {"p_value": "p_holm", "p_auc": "p_auc_holm", "p_noninferior": "p_lossless"}

#: rows of one method that agree in all of these hold one state, whatever their budgets
SAME = (
    *("hr@10", "ndcg@10", "mrr", "auc", "gauc", "logloss", "overlap@10", "agreement", "logit_error"),
    *("bytes_mean", "bytes_p50", "bytes_p99", "bytes_fixed", "ratio"),
)


def main() -> pl.Expr:
    """What a task is judged by: GAUC above guessing's 0.5 where there is one, else NDCG@10."""
    return pl.coalesce(pl.col("gauc") - 0.5, "ndcg@10")


def delta(end: str = "") -> pl.Expr:
    """The difference in `main` to the full state, or an end of its interval."""
    return pl.when(pl.col("gauc").is_not_null()).then(f"delta_gauc{end}").otherwise(f"delta_ndcg@10{end}")


def full() -> pl.Expr:
    """The full state's `main`."""
    return main() - delta()


def alike() -> pl.Expr:
    """What is kept of the full state's order: overlap@10, or agreement in ranking."""
    return pl.coalesce("agreement", "overlap@10")


def deployable() -> pl.Expr:
    """Whether a method can be used: ceilings know the tokens that will read."""
    return (pl.col("family") != "ceiling") & ~pl.col("compressor").str.contains(KNOWS)


def of_most_trainings(among: pl.Expr | None = None) -> pl.Expr:
    """Whether a row's means cover as many trainings as any method's (of `among`); the full state and floors pass.

    Over fewer they are of other trainings, and say nothing of which of two methods is better.
    """
    method = ~pl.col("method").is_in(["full", "none", CONSTANT])
    most = pl.when(method if among is None else method & among).then("seeds").max()
    return ~method | (pl.col("seeds") == most)


def one_line_a_state(means: pl.DataFrame, group: Sequence[str]) -> pl.DataFrame:
    """Rows of one method whose states and results are the same under several budgets, as one row that names them.

    So are chains whose encoder alone meets every budget: they are one state, and one test.
    """
    keys = [*group, "family", "method", "compressor", "seeds", "seeds_total", "digests", *SAME]
    alone = pl.col("budget").is_null() | pl.col("bytes_mean").is_null()
    rows = means.with_row_index("row").with_columns(pl.when(alone).then("row").alias("alone"))
    found = (
        rows.group_by(*keys, "alone", maintain_order=True)
        .agg(
            pl.col("budget").alias("budgets"),
            pl.col("share_at_floor").max(),
            pl.all().exclude(*keys, "alone", "share_at_floor").first(),
        )
        .with_columns(pl.col("budgets").map_elements(_joined, pl.String).alias("budget"))
    )
    return found.select(means.columns)


def _joined(budgets: Sequence[str | None]) -> str | None:
    """`50, 25, 12.5 %` of `25 %`, `50 %` and `12.5 %`."""
    labels = sorted((each for each in budgets if each), key=lambda each: -float(each.split()[0]))
    units = {each.split(" ", 1)[1] for each in labels}
    if len(units) != 1:
        return ", ".join(labels) or None
    return f"{', '.join(each.split()[0] for each in labels)} {units.pop()}"


def tested(means: pl.DataFrame, noisy: pl.Expr) -> pl.DataFrame:
    """With p of each row: null for the full state and where `noisy`; over several seeds twice the mean of theirs.

    `p_noninferior` of rows that have none (older ones) follows from the lower end of their interval. Structural rows,
    each of weights of its own, have no p of a seed: theirs follow from that interval and `delta_spread`, the standard
    deviation over the seeds.
    """
    judged = ~noisy & (pl.col("method") != "full")
    luck = pl.when("structural").then(pl.col("delta_spread").pow(2) / pl.col("seeds")).otherwise(0.0)
    error = (((delta() - delta("_lo")) / 1.959964).pow(2) + luck).sqrt().alias("error")

    def follows(mean: pl.Expr, tail: Callable[[float, float], float]) -> pl.Expr:
        def of(row: dict[str, float | None]) -> float | None:
            mean, error = row["mean"], row["error"]
            return None if mean is None or error is None else tail(mean, error)

        return pl.struct(mean.alias("mean"), error).map_elements(of, pl.Float64)

    either = pl.when("structural").then(
        follows(delta(), lambda mean, error: min(2 * upper_tail(abs(mean), error), 1.0))
    )
    sure = judged & (full() > 0)
    return means.with_columns(
        pl.when(judged).then(pl.coalesce(_several("p_value"), either)).alias("p_value"),
        pl.when(judged).then(_several("p_auc")).alias("p_auc"),
        pl.when(sure)
        .then(pl.coalesce(_several("p_noninferior"), follows(delta() - LOSSLESS * full(), upper_tail)))
        .alias("p_noninferior"),
    )


def _several(p: str) -> pl.Expr:
    """p over the seeds: twice the mean of theirs, valid however they depend; null where no seed has one."""
    return pl.when(pl.col("seeds") > 1).then((2 * pl.col(p)).clip(upper_bound=1.0)).otherwise(pl.col(p))


def judged(group: pl.DataFrame) -> pl.DataFrame:
    """One table's rows with Holm's corrections, `headroom`, `lossless` and what of, `fidelity`, `above_constant`, and a
    `note` or null.

    headroom: the full state beats no history (the interval of their difference); null without a `none` row. Without
    headroom nothing is called lossless. fidelity: (overlap - none's) / (1 - none's), of agreement in ranking.
    query_headroom, above_constant: the same over `fit_constant`, which gives all that reads the same: what is above it
    depends on the query.
    """
    none, constant = (group.filter(pl.col("method") == name) for name in ("none", CONSTANT))
    headroom, query_headroom = _beaten(none), _beaten(constant)
    of = "GAUC" if group["gauc"].is_not_null().any() else "NDCG@10"
    note = _note(of, none) if headroom is False else _constant_note(of, constant) if query_headroom is False else None
    note = " ".join(filter(None, (note, _popular_note(group)))) or None
    return group.with_columns(
        *(pl.Series(new, holm(group[p]), nan_to_null=True) for p, new in CORRECTED.items()),
        pl.lit(headroom, pl.Boolean).alias("headroom"),
        pl.lit(note, pl.String).alias("note"),
        pl.lit(query_headroom, pl.Boolean).alias("query_headroom"),
        _fidelity(none).alias("fidelity"),
        _fidelity(constant).alias("above_constant"),
    ).with_columns(
        pl.when(pl.lit(headroom is not False)).then(pl.col("p_lossless") < LEVEL).alias("lossless"),
        pl.lit(of).alias("lossless_of"),
    )


def _beaten(floor: pl.DataFrame) -> bool | None:
    """Whether the full state surely beats all rows of a floor; None without one."""
    worst = floor.select(delta("_hi")).to_series().max()
    return None if worst is None else bool(worst < 0)  # type: ignore[operator]


def _fidelity(floor: pl.DataFrame) -> pl.Expr:
    """What a row keeps of the full state's order, 0 at the floor's best row; null without one, or without room."""
    least = floor.select(alike()).to_series().max()
    room = None if least is None else 1.0 - float(least)  # type: ignore[arg-type]
    return 1 - (1 - alike()) / room if room else pl.lit(None, pl.Float64)


def _note(of: str, none: pl.DataFrame) -> str:
    here, whole = _both(of, none)
    return (
        f"No headroom: the full state's {of} ({whole}) is not significantly above that of no history ({here}), so this "
        f"table cannot judge methods by it: {_order(of)} says who keeps the full state's order, not that it is good."
    )


def _constant_note(of: str, constant: pl.DataFrame) -> str:
    here, whole = _both(of, constant)
    return (
        f"No headroom above a constant: the full state's {of} ({whole}) is not significantly above that of {CONSTANT} "
        f"({here}), one vector a layer and head whatever reads: judge by {_order(of)}."
    )


def _order(of: str) -> str:
    """What says how much of the full state's order is kept, where a metric says nothing."""
    return "agreement" if of == "GAUC" else "overlap"


POPULAR = {"popular": "of all training events", "popular_7d": "of their last 7 days"}


def _popular_note(group: pl.DataFrame) -> str | None:
    """Where popularity alone is no worse than the full state."""
    whole = group.filter(pl.col("method") == "full")["ndcg@10"].drop_nulls().to_list()
    for said, here in _popular(group).items():
        if whole and here >= max(whole):
            return f"Popularity {said} reaches an NDCG@10 of {here:.4f}, the full state {max(whole):.4f}."
    return None


def popular(group: pl.DataFrame) -> str | None:
    """What popularity alone reaches, in a line; None where nobody knows."""
    found = [f"{here:.4f} ({said})" for said, here in _popular(group).items()]
    return f"Popularity alone: NDCG@10 {', '.join(found)}." if found else None


def _popular(group: pl.DataFrame) -> dict[str, float]:
    known = {said: group[f"{floor}_ndcg@10"].drop_nulls().to_list() for floor, said in POPULAR.items()}
    return {said: max(values) for said, values in known.items() if values}


def _both(of: str, floor: pl.DataFrame) -> tuple[str, str]:
    """A floor's metric, and the full state's."""
    here, gone = floor.select(main(), delta()).drop_nulls().row(0)
    base = 0.5 if of == "GAUC" else 0.0
    return f"{base + here:.4f}", f"{base + here - gone:.4f}"


def remark(group: pl.DataFrame) -> str | None:
    """What must be said on top of a table, if anything."""
    notes = group["note"].drop_nulls()
    return notes[0] if len(notes) else None
