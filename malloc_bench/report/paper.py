"""The tables that a paper prints: methods by data sets and backbones, fronts, tests and growth. Knows results only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from malloc_bench.report.board import GROUP, REST, aggregate, groups_of, labelled, newest, reason_of
from malloc_bench.report.judge import CONSTANT, REBUILT, alike, deployable, of_most_trainings
from malloc_bench.report.render import Block, Column, digits, words
from malloc_bench.results import budget_labels, complete

REFERENCES = ("full", "none", CONSTANT)  # on top of every block, and never the best of it
WHAT = (
    "Bold: the best of its column; underlined: the second; the full state, the floors, ids, methods that know the "
    "reader, columns without headroom, and means over fewer trainings (1/3) apart. Methods without a budget "
    "stand where their state is small enough. Fidelity: (overlap or agreement - no history's) / (1 - no history's)."
)


# ---- blocks of one budget each


def at_budgets(board: pl.DataFrame) -> pl.DataFrame:
    """The board's rows, each once for every budget that it stands for: its label is `within`, larger shares first.

    A method without a budget stands for every share that its state fits in; references stand everywhere.
    """
    asked = [budget_labels(label) for label in board["budget"]]
    labels = sorted({label for each in asked for label in each}, key=_order)
    shares = {label: float(label.split()[0]) / 100 for label in labels if label.endswith(" %")}
    homes = [
        own or [label for label, share in shares.items() if ratio is not None and ratio <= share * (1 + 1e-9)] or [REST]
        for own, ratio in zip(asked, board["ratio"])
    ]
    reference = [method in REFERENCES for method in board["method"]]
    rest = not labels or any(REST in home for home, own in zip(homes, reference) if not own)
    everywhere = [*labels, *([REST] if rest else [])]
    homes = [everywhere if own else home for own, home in zip(reference, homes)]
    rows = board.with_columns(
        pl.Series("within", homes, pl.List(pl.String)), pl.Series("reference", reference, pl.Boolean)
    ).explode("within", empty_as_null=True)
    order = pl.col("within").replace_strict({each: i for i, each in enumerate(everywhere)}, return_dtype=pl.Int64)
    return rows.sort(order, maintain_order=True)


def _order(label: str) -> tuple[str, float]:
    """Shares first, larger ones first."""
    size, _, unit = label.partition(" ")
    return unit, -float(size)


def competes() -> pl.Expr:
    """Ids, which are rebuilt for every read, are no kept state's rival: `recommend` has them apart too."""
    return deployable() & ~pl.col("reference") & (pl.col("family") != REBUILT)


# ---- the table of accuracy


def paper(frame: pl.DataFrame) -> pl.DataFrame:
    """What each method scores and keeps at each budget, with its ranks in each group; and cells that have no result,

    with their `reason`. `value` is of `metric`: NDCG@10, or GAUC; `kept` is `kept_as`: fidelity where it is known.
    Methods whose printed numbers are the same share a rank.
    """
    known = pl.col("fidelity").is_not_null().any().over(GROUP)
    rivals = of_most_trainings(competes()).over(*GROUP, "within")
    score = pl.when(competes() & rivals & pl.col("headroom").fill_null(True))
    rows = (
        at_budgets(aggregate(frame))
        .with_columns(
            pl.col("lossless_of").alias("metric"),
            pl.coalesce("gauc", "ndcg@10").alias("value"),
            pl.when(known).then(pl.lit("fidelity"))
            .when(pl.col("agreement").is_not_null().any().over(GROUP)).then(pl.lit("agreement"))
            .otherwise(pl.lit("overlap@10")).alias("kept_as"),
            pl.when(known).then("fidelity").otherwise(alike()).alias("kept"),
        )
        .with_columns(
            score.then(pl.col(name).round(places)).rank("dense", descending=True).over(*GROUP, "within")
            .cast(pl.Int64).alias(f"{name}_rank")
            for name, places in (("value", 4), ("kept", 3))
        )
    )  # fmt: skip
    names = ("metric", "value", "value_rank", "kept_as", "kept", "kept_rank", "seeds", "seeds_total")
    shown = rows.select("within", *GROUP, "n_users", "note", "reference", "family", "method", "compressor", *names)
    missing = _missing(frame, shown)
    return pl.concat([shown, missing], how="diagonal").with_columns(pl.col("reason").cast(pl.String))


def _missing(frame: pl.DataFrame, shown: pl.DataFrame) -> pl.DataFrame:
    """Rows for cells that were skipped or failed, where their method would stand."""
    there: dict[tuple, list[str]] = {}  # method -> blocks that it is in, in any group
    for family, compressor, block in shown.select("family", "compressor", "within").iter_rows():
        there.setdefault((family, compressor), []).append(block)
    has = set(shown.select(*GROUP, "family", "compressor", "within").iter_rows())
    some = set(shown.select(*GROUP, "family", "compressor").iter_rows())
    everywhere = shown["within"].unique(maintain_order=True).to_list() or [REST]
    rows: dict[tuple, dict[str, Any]] = {}
    for row in labelled(newest(complete(frame))).filter(pl.col("status") != "ok").iter_rows(named=True):
        method, own = (row["family"], row["compressor_params"]), tuple(row[name] for name in GROUP)
        usual = everywhere if row["compressor"] in REFERENCES else sorted(set(there.get(method, [REST])))
        for block in [row["budget"]] if row["budget"] else [] if (*own, *method) in some else usual:
            rows.setdefault((*own, *method, block), {
                "within": block, **dict(zip(GROUP, own)), "reference": row["compressor"] in REFERENCES,
                "family": row["family"], "method": row["compressor"], "compressor": row["compressor_params"],
                "reason": f"{row['status']}: {reason_of(row)}",
            })  # fmt: skip
    schema: dict[str, Any] = {**{name: shown.schema[name] for name in ("within", *GROUP)}, "reference": pl.Boolean,
              **dict.fromkeys(("family", "method", "compressor", "reason"), pl.String)}  # fmt: skip
    return pl.DataFrame([each for key, each in rows.items() if key not in has], schema=schema)


def paper_blocks(data: pl.DataFrame) -> Iterator[Block]:
    """One block a budget: a line a method, two columns for every data set and backbone that has results in it."""
    for within in data["within"].unique(maintain_order=True):
        block = data.filter(pl.col("within") == within)
        groups = {key: rows for key, rows in groups_of(block) if rows["metric"].is_not_null().any()}
        if not groups:
            continue
        told: dict[str, int] = {}  # reason -> its number below the table
        columns = [words("family", "family"), words("compressor", "compressor")]
        lines: dict[tuple, dict[str, Any]] = {}
        varied = [i for i, name in enumerate(GROUP) if name in ("dataset", "backbone") or block[name].n_unique() > 1]
        remarks = []
        for i, (key, rows) in enumerate(groups.items()):
            over = " · ".join(key[j] for j in varied)
            metric, kept_as = rows.drop_nulls("metric").select("metric", "kept_as").row(0)
            columns += [_score(f"{i}", "value", metric, ".4f", over), _score(f"{i}", "kept", kept_as, ".3f", over)]
            remarks += [f"{over}: {note}" for note in rows["note"].drop_nulls().unique()]
            for row in rows.iter_rows(named=True):
                first = REFERENCES.index(row["method"]) if row["reference"] else len(REFERENCES)
                at = (first, row["family"] or "", row["compressor"])
                line = lines.setdefault(at, {"part": at[1] if not row["reference"] else "", "family": row["family"],
                                             "compressor": row["compressor"]})  # fmt: skip
                said = "" if row["reason"] is None else f"–[{told.setdefault(row['reason'], len(told) + 1)}]"
                line[f"{i}"] = {**row, "said": said}
        gone = block.filter(~pl.struct(GROUP).is_in([dict(zip(GROUP, key)) for key in groups])).drop_nulls("reason")
        notes = [
            *(f"[{number}] {reason}" for reason, number in told.items()),
            *(f"{', '.join(key)}: {reason}" for *key, reason in sorted(set(gone.select(*GROUP, "reason").rows()))),
            *remarks,
            WHAT,
        ]  # fmt: skip
        whole = [{**dict.fromkeys(map(str, range(len(groups)))), **lines[at]} for at in sorted(lines)]
        title = "Of any size" if within == REST else f"Budget {within}"
        yield Block(title, pl.DataFrame(whole, infer_schema_length=None), columns, None, notes, "part")


def _score(key: str, name: str, header: str, spec: str, over: str) -> Column:
    """A column of `value` or `kept` of one group, with its best and second."""

    def text(row: Mapping[str, Any]) -> str:
        cell = row[key] or {}
        fewer = name == "value" and (cell.get("seeds") or 0) < (cell.get("seeds_total") or 0)
        found = digits(cell.get(name), spec) if cell else ""
        return cell.get("said") or (f"{found} ({cell['seeds']}/{cell['seeds_total']})" if found and fewer else found)

    def mark(row: Mapping[str, Any]) -> str:
        rank = (row[key] or {}).get(f"{name}_rank")
        return "best" if rank == 1 else "second" if rank == 2 else ""

    return Column(header, text, over=over, mark=mark)
