"""What a run's page shows, as plain values: the rows of the leaderboard with their cells, and what did not end well."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import polars as pl

from malloc_bench.report.board import GROUP, title
from malloc_bench.report.judge import KNOWS, REBUILT
from malloc_bench.report.leaderboard import CEILINGS, NOTES, unfinished
from malloc_bench.report.page.columns import COLUMNS
from malloc_bench.report.parts import PREFIX, colour, told_apart
from malloc_bench.report.render import digits
from malloc_bench.report.tables import SLICES, sliced

ENVIRONMENT = ("hardware", "device", "amp", "threads", "versions", "git_commit")
SLICE = ("n_users", "ndcg@10", "overlap@10", "agreement")
#: fields of a row that charts and comparisons calculate with, beside those that columns are sorted by
NUMBERS = (
    "ratio", "delta_ndcg@10_lo", "delta_ndcg@10_hi", "delta_gauc_lo", "delta_gauc_hi", "bytes_full", "seeds_total",
    *(f"{value} {part}" for part in SLICES for value in SLICE),
)  # fmt: skip


def content(frame: pl.DataFrame, best: pl.DataFrame) -> dict[str, Any]:
    """All that the page knows, of lists, texts and numbers only; best: of `recommend.best_per_budget`."""
    frame, parts = told_apart(frame)
    board = sliced(frame, parts).with_columns(_size().alias("size"))
    rows = list(board.iter_rows(named=True))
    groups = [dict(zip(GROUP, names)) for names in board.select(GROUP).unique(maintain_order=True).iter_rows()]
    known = {tuple(group.values()): i for i, group in enumerate(groups)}
    of = [known[tuple(row[name] for name in GROUP)] for row in rows]
    firsts = dict(reversed(list(zip(of, rows))))
    for i, group in enumerate(groups):
        group |= {"title": title(firsts[i]), "note": firsts[i]["note"], "headroom": firsts[i]["headroom"]}
    texts = [[shown.column.text(row) for row in rows] for shown in COLUMNS]
    kept = [(shown, text) for shown, text in zip(COLUMNS, texts) if any(text)]
    sorted_by = [shown.field for shown, _ in kept if shown.part == "table"]
    numbers = [name for name in dict.fromkeys([*NUMBERS, *sorted_by]) if board[name].is_not_null().any()]
    return {
        "groups": groups,
        "group": of,
        "columns": [
            {"header": s.column.header, "field": s.field, "part": s.part, "left": s.column.left} for s, _ in kept
        ],
        "texts": [text for _, text in kept],
        "fields": {name: _brief(board[name]) for name in numbers},
        "method": [row["method"] for row in rows],
        "kind": [_kind(row) for row in rows],
        "slices": list(SLICES),
        "parts": [
            {"name": (part := name.removeprefix(PREFIX)), "colour": colour(part), "bytes": _brief(board[name])}
            for name in parts
        ],
        "best": _best(best, rows),
        **_cells(frame, rows),
        "problems": _problems(frame),
        "notes": [*NOTES, CEILINGS] if board["ceiling_full_hr@10"].is_not_null().any() else list(NOTES),
        "statuses": {status: int((frame["status"] == status).sum()) for status in ("ok", "skipped", "failed")},
        "dates": [str(day)[:10] for day in (frame["created_at"].min(), frame["created_at"].max()) if day],
    }


def _best(best: pl.DataFrame, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best row of each table and budget, and which methods tie with it, null where that was not tested."""
    known = {row["cell_ids"]: i for i, row in enumerate(rows)}
    return [
        {name: each[name] for name in ("within", "limit")}
        | {"row": known[each["cell_ids"]], "ties": each["ties"] if each["tested"] else None}
        for each in best.iter_rows(named=True)
    ]


def _size() -> pl.Expr:
    """A budget as a number to sort by; of several the largest, where there is none what was reached."""
    return pl.coalesce(pl.col("budget").str.extract(r"^([\d.]+).*%$").cast(pl.Float64) / 100, "ratio")


def _kind(row: dict[str, Any]) -> str:
    """What must be said beside a method's name, or nothing."""
    if row["method"] in ("none", "fit_constant", "random"):
        return "floor"
    if row["family"] == "ceiling" or re.search(KNOWS, row["compressor"]):
        return "ceiling"
    return REBUILT if row["family"] == REBUILT else "full" if row["method"] == "full" else ""


def _brief(values: pl.Series) -> list[Any]:
    """Six digits do to sort and draw by; what is printed is printed from the whole number."""
    if not values.dtype.is_float():
        return values.to_list()
    finite = pl.when(pl.col(values.name).is_finite()).then(pl.col(values.name))
    return values.to_frame().select(finite.round_sig_figs(6)).to_series().to_list()


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
                    _told(each["agreement"], each["overlap@10"], ".3f"),
                    _told(each["gauc"], each["ndcg@10"], ".4f"),
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


def _told(value: float | None, other: float | None, spec: str) -> str:
    return digits(other if value is None else value, spec)


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
