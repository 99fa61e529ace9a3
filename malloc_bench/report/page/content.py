"""What a run's page shows, as plain values: the rows of the leaderboard with their cells, and what did not end well."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from malloc_bench.report.board import GROUP, newest, title
from malloc_bench.report.figures import REBUILT
from malloc_bench.report.leaderboard import CEILINGS, NOTES, unfinished
from malloc_bench.report.page.columns import COLUMNS
from malloc_bench.report.recommend import best_per_budget
from malloc_bench.report.tables import SLICES, sliced
from malloc_bench.results import complete

ENVIRONMENT = ("hardware", "device", "amp", "threads", "versions", "git_commit")
SLICE = ("n_users", "ndcg@10", "overlap@10", "agreement")
#: fields of a row that charts and comparisons calculate with, beside those that columns are sorted by
NUMBERS = (
    "ratio", "delta_ndcg@10_lo", "delta_ndcg@10_hi", "delta_gauc_lo", "delta_gauc_hi", "bytes_full", "seeds_total",
    *(f"{value} {part}" for part in SLICES for value in SLICE),
)  # fmt: skip


def content(frame: pl.DataFrame, folder: Path | None = None) -> dict[str, Any]:
    """All that the page knows, of lists, texts and numbers only; folder: of the run, where values by user are."""
    frame = newest(complete(frame))
    board = sliced(frame).with_columns(_size().alias("size"))
    rows = list(board.iter_rows(named=True))
    groups = [dict(zip(GROUP, names)) for names in board.select(GROUP).unique(maintain_order=True).iter_rows()]
    known = {tuple(group.values()): i for i, group in enumerate(groups)}
    of = [known[tuple(row[name] for name in GROUP)] for row in rows]
    firsts = dict(reversed(list(zip(of, rows))))
    for i, group in enumerate(groups):
        group |= {"title": title(firsts[i]), "note": firsts[i]["note"], "headroom": firsts[i]["headroom"]}
    texts = [[shown.column.text(row) for row in rows] for shown in COLUMNS]
    kept = [(shown, text) for shown, text in zip(COLUMNS, texts) if any(text)]
    numbers = dict.fromkeys(NUMBERS) | dict.fromkeys(shown.field for shown, _ in kept)
    return {
        "groups": groups,
        "group": of,
        "columns": [
            {"header": s.column.header, "field": s.field, "part": s.part, "left": s.column.left} for s, _ in kept
        ],
        "texts": [text for _, text in kept],
        "fields": {name: [_brief(row[name]) for row in rows] for name in numbers},
        "method": [row["method"] for row in rows],
        "kind": [_kind(row) for row in rows],
        "slices": list(SLICES),
        "best": _best(frame, folder, rows),
        **_cells(frame, rows),
        "problems": _problems(frame),
        "notes": [*NOTES, CEILINGS] if board["ceiling_full_hr@10"].is_not_null().any() else list(NOTES),
        "statuses": {status: int((frame["status"] == status).sum()) for status in ("ok", "skipped", "failed")},
        "dates": [str(day)[:10] for day in (frame["created_at"].min(), frame["created_at"].max()) if day],
    }


def _best(frame: pl.DataFrame, folder: Path | None, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best row of each table and budget, and which methods tie with it, null where that was not tested."""
    known = {row["cell_ids"]: i for i, row in enumerate(rows)}
    return [
        {name: best[name] for name in ("within", "limit")}
        | {"row": known[best["cell_ids"]], "ties": best["ties"] if best["tested"] else None}
        for best in best_per_budget(frame, folder).iter_rows(named=True)
    ]


def _size() -> pl.Expr:
    """A budget as a number to sort by; of several the largest, where there is none what was reached."""
    return pl.coalesce(pl.col("budget").str.extract(r"^([\d.]+).*%$").cast(pl.Float64) / 100, "ratio")


def _kind(row: dict[str, Any]) -> str:
    """What must be said beside a method's name, or nothing."""
    if row["method"] in ("none", "fit_constant", "random"):
        return "floor"
    return row["family"] if row["family"] in ("ceiling", REBUILT) else "full" if row["method"] == "full" else ""


def _brief(value: Any) -> Any:
    """Six digits do to sort and draw by; what is printed is printed from the whole number."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if abs(value) < float("inf") else None


def _cells(frame: pl.DataFrame, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`cells`: of each row, by seed, [id, seed, environment, date, overlap or agreement, NDCG@10 or GAUC]; and

    `parameters`: of each row [compressor's, backbone's], with environments and parameters each told once.
    """
    names = ("cell_id", "seed", "created_at", "overlap@10", "agreement", "ndcg@10", "gauc", "budget")
    columns = (*names, "backbone_params", "compressor_params", *ENVIRONMENT)
    known = {row["cell_id"]: row for row in frame.select(columns).iter_rows(named=True)}
    environments: dict[tuple, int] = {}
    parameters: dict[tuple, int] = {}
    cells, of = [], []
    for row in rows:
        own = [known[each] for each in row["cell_ids"].split()]
        cells.append(
            [
                [
                    each["cell_id"], each["seed"],
                    environments.setdefault(tuple(each[name] for name in ENVIRONMENT), len(environments)),
                    (each["created_at"] or "")[:19],
                    _brief(each["overlap@10"] if each["agreement"] is None else each["agreement"]),
                    _brief(each["ndcg@10"] if each["gauc"] is None else each["gauc"]),
                ]
                for each in own
            ]
        )  # fmt: skip
        first = tuple(own[0][name] for name in ("compressor_params", "backbone_params")) if own else (None, None)
        of.append(parameters.setdefault(first, len(parameters)))
    told = [dict(zip(ENVIRONMENT, map(_read, each))) for each in environments]
    return {
        "cells": cells,
        "environments": told,
        "parameter": of,
        "parameters": [[_read(each) for each in pair] for pair in parameters],
    }


def _read(text: Any) -> Any:
    """A nested value from its JSON; other values as they are."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _problems(frame: pl.DataFrame) -> list[dict[str, Any]]:
    names = (*GROUP, "budget", "seed", "status", "reason", "traceback", "cell_id")
    rows = unfinished(frame).select(pl.col("compressor_params").alias("compressor"), *names)
    return list(rows.iter_rows(named=True))
