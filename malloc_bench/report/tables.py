"""The paper's tables by name, each a pure function of the results frame, and their rendering."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl

from malloc_bench.evaluation.metrics import slices as length_slices
from malloc_bench.registry import suggest
from malloc_bench.report.board import EMPTY, GROUP, aggregate, narrowed, newest, of_seeds, sections, share_of
from malloc_bench.report.evidence import HEAD, LABELS, PAPER
from malloc_bench.report.judge import deployable, full, main, remark
from malloc_bench.report.leaderboard import BUDGET_OF, without_data
from malloc_bench.report.models import TABLE as MODELS
from malloc_bench.report.parts import TABLE as PARTS
from malloc_bench.report.render import (
    FORMATS,
    Block,
    Column,
    Table,
    csv,
    filled,
    inline,
    latex,
    markdown,
    number,
    significant,
    words,
)
from malloc_bench.report.tasks import TABLES as TASKS
from malloc_bench.results import AFTER, CLIENTS, KNOWN, REQUEST_STEPS, STEPS
from malloc_bench.results.labels import bare

ACCURACY = (
    *("hr@5", "hr@10", "hr@50", "ndcg@5", "ndcg@10", "ndcg@50", "mrr", "auc", "gauc", "users_one_class", "logloss"),
    *("recall@5", "recall@10", "recall@50", "overlap@10", "agreement", "fidelity", "above_constant", "logit_error"),
    *(f"delta_{name}{end}" for name in ("ndcg@10", "gauc", "auc") for end in ("", "_lo", "_hi")),
    *("p_holm", "p_auc_holm", "p_lossless"),
)
NOTHING = "Nothing here applies to these results."
# a shipped suite with rows for a table that most runs have nothing for
SUITES = {name: name for name in ("requests", "trajectory", "transfer")} | {
    "ceilings": "synthetic",
    "drift": "fitted",
    "popularity": "tasks",
    "robustness": "tasks",
}
HITS = ("hr@5", "hr@10", "hr@50")
SIZES = ("bytes_full", "bytes_mean", "bytes_p50", "bytes_p99", "bytes_fixed")
TIMES = tuple(f"{step}_ms_p{p}" for step in STEPS for p in (50, 95, 99))
CPU_TIMES = tuple(f"{step}_cpu_ms_p50" for step in STEPS)
LONG_TIMES = tuple(f"{step}_ms_p50_long" for step in STEPS)
RATIOS = tuple(f"read_ratio{part}{long}" for long in ("", "_long") for part in ("", "_lo", "_hi"))
DRIFT = tuple(f"{name}@{n}" for name in ("appended", "drift", "drift_users") for n in AFTER)
REQUESTS = tuple(f"request_{step}ms_p{p}" for step in ("", *(f"{s}_" for s in REQUEST_STEPS)) for p in (50, 95, 99))
REQUEST_RATIO = ("request_ratio", "request_ratio_lo", "request_ratio_hi")
RATES = tuple(f"requests_per_s_{n}" for n in CLIENTS)
SLICES = tuple(length_slices([]))
SLICE_VALUES = ("n_users", "ndcg@10", "hr@10", "overlap@10", "agreement")
SLICED = tuple(f"{value} {part}" for part in SLICES for value in SLICE_VALUES)


def accuracy(frame: pl.DataFrame) -> pl.DataFrame:
    """Every accuracy metric of every method and budget."""
    return aggregate(frame).select(*HEAD, *ACCURACY)


def resources(frame: pl.DataFrame) -> pl.DataFrame:
    """Bytes, milliseconds, FLOPs and peak memory of every method and budget, at the median and the longest history."""
    flops = [
        (pl.col(f"{step}_flops{long}") / 1e6).alias(f"{step}_mflops{long}") for long in ("", "_long") for step in STEPS
    ]
    sizes = (*SIZES, "budget_unit", "smaller_x", "smaller_f16_x", "share_at_floor")
    measured = (
        "measured_history",
        "measured_history_long",
        "measured_weights",
        *TIMES,
        *CPU_TIMES,
        *LONG_TIMES,
        *RATIOS,
        "timing",
        "fit_seconds",
    )
    return aggregate(frame).select(*HEAD, *sizes, *measured, *flops, "peak_bytes", "peak_bytes_long")


def taxonomy(frame: pl.DataFrame) -> pl.DataFrame:
    """How small each method gets: its smallest lossless state, its smallest state, and what is kept there.

    What knows the tokens that will read is left out.
    """
    measured = aggregate(frame).with_columns(
        pl.when(full() > 0).then(main() / full()).alias("kept"),
        pl.col("compressor").map_elements(bare, pl.String).alias("method"),
    )
    smallest = pl.col("bytes_mean").arg_min()
    lossless = pl.col("lossless").fill_null(False)
    return (
        measured.filter(deployable() & (pl.col("method") != "full"))
        .group_by(*GROUP, "family", "method", maintain_order=True)
        .agg(
            pl.col("n_users").max(),
            pl.col("note").first(),
            pl.len().cast(pl.Int64).alias("states"),
            pl.col("smaller_x").filter(lossless).max().alias("lossless_smaller_x"),
            pl.col("bytes_mean").filter(lossless).min().alias("lossless_bytes"),
            pl.col("bytes_mean").get(smallest).alias("smallest_bytes"),
            pl.col("smaller_x").get(smallest).alias("smallest_smaller_x"),
            pl.col("kept").get(smallest).alias("smallest_kept"),
        )
        .sort(*GROUP, "family", "method")
    )


def slices(frame: pl.DataFrame) -> pl.DataFrame:
    """Users, accuracy and fidelity by history length in events, means over seeds."""
    return sliced(frame).select(*HEAD, *SLICED)


def sliced(frame: pl.DataFrame, also: Sequence[str] = ()) -> pl.DataFrame:
    """The rows of `board.aggregate`, with `also`, and SLICED: each value of each slice, averaged as a metric is."""
    rows = newest(frame)
    values = [_by_length(text) for text in rows["slices"]]
    wide = rows.with_columns(pl.Series(name, [v.get(name) for v in values], pl.Float64) for name in SLICED)
    return aggregate(wide, also=(*SLICED, *also))


def ceilings(frame: pl.DataFrame) -> pl.DataFrame:
    """HR@k beside the best possible without an event, with all, with a window of as many bytes, and as shares of them.

    Only of generated data is the best possible known; other rows are left out.
    """
    shares = [share_of(known, m).alias(f"{m} of {known}") for m in HITS for known in ("full", "window")]
    numbers = [name for m in HITS for name in (m, *(f"ceiling_{known}_{m}" for known in KNOWN))]
    known = aggregate(frame).filter(pl.col("ceiling_full_hr@10").is_not_null())
    return known.select(*HEAD, *numbers, *shares)


def drifts(frame: pl.DataFrame) -> pl.DataFrame:
    """What states keep of the full state's order that go on with their users: N events appended and nothing more, or
    updated after each and held against compressing all again."""
    measured = [pl.col(name).is_not_null() for name in DRIFT if not name.startswith("drift_users")]
    return aggregate(frame).filter(pl.any_horizontal(measured)).select(*HEAD, "overlap@10", "agreement", *DRIFT)


def requests(frame: pl.DataFrame) -> pl.DataFrame:
    """What a request costs that loads a state from a store and writes it back, by how many candidates it has."""
    about = ("store", "measured_history", "measured_candidates", "bytes_mean")
    numbers = (*REQUESTS, *REQUEST_RATIO, *RATES)
    found = [json.loads(text or "{}") for text in frame["requests"]]
    many = sorted({int(c) for each in found for c in each})
    parts = []
    for c in many:
        own = [each.get(str(c), {}) for each in found]
        rows = frame.with_columns(
            *(pl.Series(name, [each.get(name) for each in own], pl.Float64) for name in numbers),
            pl.Series("request_timing", [each.get("request_timing") for each in own], pl.String),
            pl.lit(c, pl.Int64).alias("measured_candidates"),
        )
        parts.append(aggregate(rows).filter(pl.col("request_ms_p50").is_not_null()))
    whole = pl.concat(parts) if parts else aggregate(frame).clear()
    return whole.select(*HEAD, *about, *REQUESTS, *REQUEST_RATIO, "request_timing", *RATES)


def _by_length(text: str | None) -> dict[str, float | None]:
    return {
        f"{value} {part}": values.get(value)
        for part, values in json.loads(text or "{}").items()
        for value in SLICE_VALUES
    }


TABLES = {
    "accuracy": Table(accuracy, (*LABELS, *(number(name, name.replace("_", " "), ".4f") for name in ACCURACY))),
    "resources": Table(
        resources,
        (
            *LABELS,
            *(significant(name, f"{name.replace('_', ' ')} (KB)", scale=1e-3) for name in SIZES),
            BUDGET_OF,
            number("smaller_x", "× smaller", ".1f"),
            number("smaller_f16_x", "× smaller than float16", ".1f"),
            number("share_at_floor", "at floor (% users)", ".0f", scale=100),
            number("measured_history", "measured at (events)", ",.0f"),
            Column("on weights", lambda row: "fresh" if row["measured_weights"] == "fresh" else ""),
            *(significant(name, name.replace("_ms_", " ") + " (ms)") for name in TIMES),
            *(significant(name, name.removesuffix("_cpu_ms_p50") + " p50 (CPU ms)") for name in CPU_TIMES),
            *(number(name, f"read (× full){end}", ".2f") for name, end in zip(RATIOS[:3], ("", " from", " to"))),
            words("timing", "timing"),
            significant("fit_seconds", "fit (s, once)"),
            *(significant(f"{step}_mflops", f"{step} (MFLOPs)") for step in STEPS),
            significant("peak_bytes", "peak memory (MB)", scale=1e-6),
            number("measured_history_long", "longest (events)", ",.0f"),
            *(significant(name, f"longest: {name.removesuffix('_ms_p50_long')} p50 (ms)") for name in LONG_TIMES),
            *(number(n, f"longest: read (× full){end}", ".2f") for n, end in zip(RATIOS[3:], ("", " from", " to"))),
            *(significant(f"{step}_mflops_long", f"longest: {step} (MFLOPs)") for step in STEPS),
            significant("peak_bytes_long", "longest: peak memory (MB)", scale=1e-6),
        ),
    ),
    "taxonomy": Table(
        taxonomy,
        (
            words("family", "family"),
            words("method", "compressor"),
            number("states", "states", ".0f"),
            number("lossless_smaller_x", "lossless up to (× smaller)", ".1f"),
            significant("lossless_bytes", "lossless down to (KB/user)", scale=1e-3),
            significant("smallest_bytes", "smallest state (KB/user)", scale=1e-3),
            number("smallest_smaller_x", "smallest (× smaller)", ".1f"),
            number("smallest_kept", "NDCG@10, or GAUC above 0.5, kept there (%)", ".1f", scale=100),
        ),
    ),
    "ceilings": Table(
        ceilings,
        (
            *LABELS,
            *(
                column
                for m in HITS
                for column in (
                    number(m, m.upper(), ".4f"),
                    number(f"ceiling_none_{m}", f"{m.upper()} without events", ".4f"),
                    number(f"ceiling_window_{m}", "with a window of these bytes, at most", ".4f"),
                    number(f"ceiling_full_{m}", "with the whole history", ".4f"),
                    number(f"{m} of window", "of a window's (%)", ".1f", scale=100),
                    number(f"{m} of full", "of the whole's (%)", ".1f", scale=100),
                )
            ),
        ),
    ),
    "drift": Table(
        drifts,
        (
            *LABELS,
            number("overlap@10", "overlap@10", ".3f"),
            number("agreement", "agreement", ".3f"),
            *(number(f"appended@{n}", f"{n} appended", ".3f") for n in AFTER),
            *(number(f"drift@{n}", f"lost by {n} updates", "+.3f") for n in AFTER),
            *(number(f"drift_users@{n}", f"users of {n}", ",.0f") for n in AFTER),
        ),
    ),
    "requests": Table(
        requests,
        (
            *LABELS,
            words("store", "store"),
            number("measured_history", "events", ",.0f"),
            number("measured_candidates", "candidates", ",.0f"),
            significant("bytes_mean", "state (KB)", scale=1e-3),
            *(significant(name, name.replace("_ms_", " ").replace("_", " ") + " (ms)") for name in REQUESTS),
            *(number(name, f"request (× full){end}", ".2f") for name, end in zip(REQUEST_RATIO, ("", " from", " to"))),
            words("request_timing", "timing"),
            *(number(name, f"a second, {n} client{'s' * (n > 1)}", ",.0f") for name, n in zip(RATES, CLIENTS)),
        ),
    ),
    "slices": Table(
        slices,
        (
            *LABELS,
            *(
                number(f"{value} {part}", f"{header}, {part} events", spec)
                for value, header, spec in (
                    ("n_users", "users", ",.0f"),
                    ("ndcg@10", "NDCG@10", ".4f"),
                    ("hr@10", "HR@10", ".4f"),
                    ("overlap@10", "overlap@10", ".3f"),
                    ("agreement", "agreement", ".3f"),
                )
                for part in SLICES
            ),
        ),
    ),
    "parts": PARTS,
    "models": MODELS,
    **TASKS,
    **PAPER,
}


def table(frame: pl.DataFrame, name: str, folder: str | Path | None = None) -> pl.DataFrame:
    """A table as numbers; raises ValueError with the nearest of TABLES for an unknown name.

    folder: of the run, whose values by user `significance` compares methods by.
    """
    chosen = _named(name)
    return chosen.make(frame, folder) if chosen.by_user else chosen.make(frame)


def render_table(
    frame: pl.DataFrame,
    name: str,
    format: str = "md",
    folder: str | Path | None = None,
    only: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """A table as text in one of FORMATS; columns that are blank throughout are left out (not in CSV).

    only: the lines shown, as `board.select` takes it; methods are judged among all of the run.
    Raises ValueError for an unknown name or format, or what no row has.
    """
    if format not in FORMATS:
        raise ValueError(f"no format is named '{format}'.{suggest(format, FORMATS)}")
    data = table(of_seeds(frame, only or {}), name, folder)
    if only:
        data = narrowed(data, name, frame, only)
    if format == "csv":
        return csv(data)
    made = f" Rows for it come of `malloc-bench run {SUITES[name]}`." if name in SUITES else ""
    nothing = EMPTY if frame.is_empty() else NOTHING + made
    blocks = list(_blocks(data, name))
    lines = without_data(frame)
    if format == "latex":
        parts = [latex(b.rows, b.columns, f"{name}: {_said(b)}", b.apart, b.notes) for b in blocks]
        return "\n".join([*(parts or [f"% {nothing}\n"]), *(f"% {line}\n" for line in lines)])
    said = [f"{inline(line)}\n" for line in lines]
    return "\n".join([f"# {name.capitalize()}\n", *said, *(map(_section, blocks) if blocks else [f"{nothing}\n"])])


def _blocks(data: pl.DataFrame, name: str) -> Iterator[Block]:
    chosen = _named(name)
    if chosen.blocks is not None:
        yield from chosen.blocks(data)
        return
    found = list(sections(data))
    for n, (head, group) in enumerate(found, 1):
        notes = chosen.notes if n == len(found) else ()
        yield Block(head, group, filled(group, chosen.columns), remark(group), notes)


def _said(block: Block) -> str:
    return f"{block.title}. {block.said}" if block.said else block.title


def _section(block: Block) -> str:
    said = f"> **{inline(block.said)}**\n\n" if block.said else ""
    notes = "".join(f"- {inline(note)}\n" for note in block.notes)
    return f"## {inline(block.title)}\n\n{said}{markdown(block.rows, block.columns)}" + (f"\n{notes}" if notes else "")


def _named(name: str) -> Table:
    if name not in TABLES:
        raise ValueError(f"no table is named '{name}'.{suggest(name, TABLES)}")
    return TABLES[name]
