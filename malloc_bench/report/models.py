"""Backbones side by side, by their full states: the tables of papers on models, such as Climber's and LSRM's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from malloc_bench.report.board import aggregate
from malloc_bench.report.render import Block, Column, Table, digits, number, significant, words

KEY = ("dataset", "task", "split")
METRICS = ("hr@5", "hr@10", "hr@50", "ndcg@5", "ndcg@10", "ndcg@50", "auc", "gauc", "logloss")
SIZES = ("params", "bytes_full", "prefill_mflops", "read_mflops", "train_seconds")


def models(frame: pl.DataFrame) -> pl.DataFrame:
    """What the full state of each backbone scores and costs, smallest model first; `<metric>_rank` is among the

    backbones of one data set, task and split, as printed. params: all of them, item embeddings too.
    """
    rows = aggregate(frame, also=("params",)).filter(pl.col("method") == "full")
    flops = [(pl.col(f"{step}_flops") / 1e6).alias(f"{step}_mflops") for step in ("prefill", "read")]
    ranks = [
        pl.col(name).round(4).rank("dense", descending=name != "logloss").over(KEY).cast(pl.Int64).alias(f"{name}_rank")
        for name in METRICS
    ]
    shown = (*KEY, "backbone", "n_users", "seeds", *SIZES, "measured_history", *METRICS)
    whole = rows.with_columns(flops).select(*shown).with_columns(ranks)
    return whole.sort(*KEY, "params", "backbone", nulls_last=True, maintain_order=True)


def _blocks(data: pl.DataFrame) -> Iterator[Block]:
    """One a data set, task and split."""
    for key, rows in data.group_by(*KEY, maintain_order=True):
        known = [name for name in METRICS if rows[name].is_not_null().any()]
        columns = [
            words("backbone", "backbone"),
            number("seeds", "seeds", ".0f"),
            significant("params", "parameters (M)", scale=1e-6),
            significant("bytes_full", "full state (KB/user)", scale=1e-3),
            significant("prefill_mflops", "prefill (MFLOPs)"),
            significant("read_mflops", "read (MFLOPs)"),
            number("train_seconds", "training (s)", ",.0f"),
            *map(_metric, known),
        ]
        notes = ["Bold: the best of its column; underlined: the second. Parameters: all, item embeddings too."]
        users, history = (max(rows[name].drop_nulls().to_list(), default=0) for name in ("n_users", "measured_history"))
        if history:
            notes.append(f"FLOPs: of one user with {history:,} events.")
        yield Block(f"{key[0]} · {key[1]} ({key[2]}, {users:,} users)", rows, columns, notes=notes)


def _metric(name: str) -> Column:
    def mark(row: Mapping[str, Any]) -> str:
        return {1: "best", 2: "second"}.get(row[f"{name}_rank"], "")

    said = {"logloss": "LogLoss"}.get(name, name.upper())
    return Column(said, lambda row: digits(row[name], ".4f"), mark=mark)


TABLE = Table(models, blocks=_blocks)
