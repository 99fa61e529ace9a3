"""The laws of a run: what grows, what falls with it, and what each group of rows says of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from malloc_bench.registry import UnknownName, suggest
from malloc_bench.report.board import having, newest
from malloc_bench.report.laws.forms import Array
from malloc_bench.report.laws.judged import Judged, Points, judged
from malloc_bench.report.lineage import APART
from malloc_bench.results import COLUMNS, budget_label, complete, label

LOSSES = ("loss", "logloss", "logit_error")  # what falls; of all else 1 - the value does
METRICS = [name for name in COLUMNS if re.fullmatch(
    r"(hr|ndcg|recall)@\d+|mrr|loss|logloss|g?auc|overlap@10|agreement|logit_error", name
)]  # fmt: skip
_LEAST = 1e-6


@dataclass(frozen=True)
class Law:
    """What a law is about: `x`, columns made of a row's, in words; `of`: the columns that a group is alike in; rows:
    which count. metric: what falls where nothing else is asked for."""

    x: Mapping[str, pl.Expr]
    of: tuple[str, ...]
    rows: pl.Expr
    metric: str
    fallback: str
    needs: tuple[str, ...]
    paper: str


def _longest(step: str) -> pl.Expr:
    """Its FLOPs for the longest history evaluated: a median one is no longer where a model reads more of them."""
    return pl.coalesce(f"{step}_flops_long", f"{step}_flops")


_FULL = pl.col("compressor") == "full"
_SAME = ("dataset", "task", "split", "bare")  # of the backbone its kind: sizes differ
_DENSE = pl.col("params") - pl.col("params_embedding")
LAWS = {
    "model": Law(
        {"parameters beside the embeddings": _DENSE}, _SAME, _FULL, "loss", "ndcg@10",
        ("params", "params_embedding"), "LSRM, arXiv 2311.11351: L(N) = E + (N0 / N)^a",
    ),
    "data": Law(
        {"training events": pl.col("train_events"), "parameters beside the embeddings": _DENSE},
        ("dataset", "task", "bare"), _FULL, "loss", "ndcg@10", ("train_events", "params_embedding"),
        "Hoffmann et al., arXiv 2203.15556: L(N, D) = E + (N0 / N)^a + (D0 / D)^b",
    ),
    "cache": Law(
        {"bytes of the full state": pl.col("bytes_full")}, _SAME, _FULL, "gauc", "ndcg@10", ("bytes_full",),
        "MARM, arXiv 2411.09425: GAUC against the size of the cache, L n d",
    ),
    "flops": Law(
        {"FLOPs of a request from scratch over the longest history": _longest("prefill") + _longest("read")}, _SAME,
        _FULL, "auc", "ndcg@10", ("prefill_flops", "read_flops"), "Climber, arXiv 2502.09888: AUC against FLOPs",
    ),
    "compression": Law(
        {"bytes of a state": pl.col("bytes_mean")},
        ("dataset", "task", "split", "backbone", "family", "compressor"),
        pl.col("budget").is_not_null() & (pl.col("share_at_floor") <= 0.1), "overlap@10", "agreement",
        ("bytes_mean",), "What is lost of the full state's lists against bytes; no paper has it",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A group, what falls in it (`metric`) over what grows, and the forms that it was fitted with, the best first; none
    and `why` where there is too little. shapes: of each point what tells its backbone from the others."""

    group: str
    columns: Mapping[str, str | None]
    metric: str
    points: Points | None
    forms: Sequence[Judged]
    why: str = ""
    shapes: Sequence[str] = ()


def law(name: str) -> Law:
    """Raises UnknownName."""
    if name not in LAWS:
        raise UnknownName(f"no law is named '{name}'; there are {', '.join(LAWS)}.{suggest(name, LAWS)}")
    return LAWS[name]


def fitted(
    frame: pl.DataFrame,
    name: str,
    metric: str | None = None,
    hold: int | None = None,
    bootstraps: int = 200,
    narrowed: Mapping[str, Sequence[str]] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Found]:
    """The law of every group of rows that are ok, of one protocol and the newest version of each method.

    Raises UnknownName for a law or a metric that is none; ValueError where no row has what the law is about.
    """
    what = law(name)
    rows = _labelled(newest(complete(frame)))
    rows = rows.filter(pl.all_horizontal(pl.lit(True), *(having(rows, *each) for each in (narrowed or {}).items())))
    rows = rows.filter((pl.col("status") == "ok") & what.rows)
    if metric is not None and metric not in frame.columns:
        raise UnknownName(f"--metric: no column is named '{metric}'.{suggest(metric, frame.columns)}")
    if metric is not None and metric not in METRICS:
        raise ValueError(f"--metric {metric}: is no measure of accuracy or fidelity; expected {', '.join(METRICS)}")
    x = [made.cast(pl.Float64).alias(f"x{i}") for i, made in enumerate(what.x.values())]
    rows = rows.with_columns(x).filter(pl.all_horizontal(pl.col(f"x{i}") > 0 for i in range(len(x))))
    if not len(rows):
        raise ValueError(
            f"no row says its {' and '.join(what.x)} ({', '.join(what.needs)}), which the law '{name}' is about: "
            "run the suite again with this version, or look at another run"
        )
    groups = list(rows.group_by(*what.of, APART, maintain_order=True))
    found: list[Found] = []
    report(0, len(groups))  # one may take minutes
    for number, (_, group) in enumerate(groups):
        found.append(_one(group, what, metric, hold, bootstraps))
        report(number + 1, len(groups))
    return sorted(found, key=lambda each: (not each.forms, each.group))


def _labelled(frame: pl.DataFrame) -> pl.DataFrame:
    """With labels for names, as tables have them, and as `bare` the backbone's without its numbers, which are sizes."""

    def named(name: str) -> pl.Expr:
        both = pl.struct(name, f"{name}_params")
        return both.map_elements(lambda row: label(*row.values()), pl.String).alias(name)

    def kind(row: Mapping[str, str | None]) -> str:
        params = json.loads(row["backbone_params"] or "{}")
        words = {key: value for key, value in params.items() if isinstance(value, bool | str)}
        return label(str(row["backbone"]), json.dumps(words))

    bare = pl.struct("backbone", "backbone_params").map_elements(kind, pl.String).alias("bare")
    budget = pl.col("budget").map_elements(budget_label, pl.String)
    return frame.with_columns(bare).with_columns(named("backbone"), named("compressor"), budget)


def _one(group: pl.DataFrame, what: Law, metric: str | None, hold: int | None, bootstraps: int) -> Found:
    asked = metric or next(
        (each for each in (what.metric, what.fallback) if group[each].is_not_null().all()), what.fallback
    )
    columns = {key: group[key][0] for key in what.of}
    said = " · ".join(str(value) for key, value in columns.items() if key != "family")
    said += f" [{protocol}]" if (protocol := group[APART][0]) else ""
    y = group[asked].to_numpy().astype(np.float64)
    y = y if asked in LOSSES else 1 - y
    x: Array = np.stack([group[f"x{i}"].to_numpy() for i in range(len(what.x))], 1)
    if "budget" in group.columns and "compressor" in what.of:  # seeds differ by a few bytes: one place a budget
        own = group.with_columns(pl.col("x0").mean().over("budget").alias("place"))
        x = own["place"].to_numpy()[:, None]
    if x.shape[1] > 1 and len(np.unique(x[:, 1])) == 1:
        x = x[:, :1]  # one size of model: no joint law
    good = np.isfinite(y) & (y > _LEAST)
    if not good.any():
        why = f"no {asked} that is short of the best" if np.isfinite(y).any() else f"no row has {asked}"
        return Found(said, columns, asked, None, [], why)
    points, sizes = Points.of(x[good], y[good], hold), _shapes(group.filter(pl.Series(good))["backbone_params"])
    try:
        return Found(said, columns, asked, points, judged(points, bootstraps), shapes=sizes)
    except ValueError as error:
        return Found(said, columns, asked, points, [], str(error), sizes)


def _shapes(params: Iterable[str | None]) -> list[str]:
    """Of the parameters of each of several backbones what tells them from the others."""
    known = [json.loads(each or "{}") for each in params]
    keys = dict.fromkeys(key for each in known for key in each)
    apart = [key for key in keys if len({json.dumps(each.get(key)) for each in known}) > 1]
    return [", ".join(f"{key} {each[key]}" for key in apart if key in each) for each in known]
