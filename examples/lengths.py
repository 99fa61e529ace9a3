"""How many slots does a history of n events need? Overlap@10 by slots kept and by length, of a run's users.

    python examples/lengths.py RUN [--edges 300 500] [--enough .95]     RUN: of a suite with budgets in slots

A table for each data set, task, split and backbone, a row for each method and number of slots, a column for users by
events, as the state holds them and with the newest, which reads: histories longer than a backbone takes are as long as
it takes. The second table says how many slots would keep `enough`, in line between those that were tried.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl

from malloc_bench.results import label, load_results


def by_length(run: Path, edges: Sequence[int]) -> pl.DataFrame:
    """table, method, slots (None: no budget), group (by length), users, overlap: means over users, then over seeds."""
    rows = load_results(run).filter(pl.col("overlap@10").is_not_null(), status="ok")  # ranking has none
    parts = []
    for row in rows.iter_rows(named=True):
        budget = None if row["budget"] is None else json.loads(row["budget"])
        if row["per_user"] is None or not (budget is None or (isinstance(budget, dict) and "slots" in budget)):
            continue
        try:
            own = pl.read_parquet(run / row["per_user"], columns=["user", "length", "overlap"])
        except (OSError, pl.exceptions.PolarsError) as error:
            raise SystemExit(f"{run / row['per_user']}: the values by user of a row cannot be read ({error})") from None
        group = np.searchsorted(edges, own["length"].to_numpy() + 1, side="right")
        means = own.with_columns(group=group).group_by("group", "user").agg(pl.col("overlap").mean())
        means = means.group_by("group").agg(users=pl.len(), overlap=pl.col("overlap").mean())
        where = (row["dataset"], row["task"], row["split"], label(row["backbone"], row["backbone_params"]))
        named = {"table": " · ".join(where), "method": label(row["compressor"], row["compressor_params"])}
        slots = None if budget is None else budget["slots"]
        parts.append(means.with_columns(**{k: pl.lit(v) for k, v in named.items()}, slots=pl.lit(slots, pl.Int64)))
    if all(part["slots"].is_null().all() for part in parts):
        raise SystemExit(f"{run}: no values by user of rows with budgets in slots, such as `longhistory` has")
    keys = ("table", "method", "slots", "group")
    return pl.concat(parts).group_by(*keys).agg(pl.col("users", "overlap").mean()).sort(*keys, nulls_last=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--edges", type=int, nargs="+", default=[300, 500])
    parser.add_argument("--enough", type=float, default=0.95)
    asked = parser.parse_args()
    edges = sorted(set(asked.edges))
    if edges[0] < 1:
        parser.error(f"--edges {edges[0]}: expected numbers of events, 1 and more")
    if not 0 < asked.enough <= 1:
        parser.error(f"--enough {asked.enough}: expected a share of the lists above 0 and at most 1, such as .95")
    found = by_length(asked.run, edges)
    for (table,), own in found.group_by("table", maintain_order=True):
        users = dict(own.group_by("group").agg(pl.col("users").max()).iter_rows())
        bounds = [f"below {edges[0]}", *(f"{a} to {b - 1}" for a, b in pairwise(edges)), f"{edges[-1]} and more"]
        groups = sorted(users)
        heads = [f"{bounds[i]} ({users[i]:.0f} users)" for i in groups]
        print(f"\n**{table}**, overlap@10\n\n| method | slots | {' | '.join(heads)} |")
        print("|---|--:|" + "--:|" * len(heads))
        for (method, slots), rows in own.group_by("method", "slots", maintain_order=True):
            known = dict(rows.select("group", "overlap").iter_rows())
            cells = (f"{known[i]:.3f}" if i in known else "" for i in groups)
            print(f"| {method} | {'' if slots is None else slots} | {' | '.join(cells)} |")
        print(f"\n| slots that keep {asked.enough} | {' | '.join(heads)} |\n|---|{'--:|' * len(heads)}")
        for (method,), rows in own.filter(pl.col("slots").is_not_null()).group_by("method", maintain_order=True):
            curves = (list(rows.filter(group=i).select("slots", "overlap").iter_rows()) for i in groups)
            print(f"| {method} | {' | '.join(needed(curve, asked.enough) for curve in curves)} |")


def needed(curve: Sequence[tuple[int, float]], enough: float) -> str:
    """Slots at which a curve of (slots, overlap) is as high, in line with the logarithm of slots between two tried."""
    if not curve:
        return ""
    if curve[0][1] >= enough:
        return f"{curve[0][0]} or fewer"
    for (fewer, low), (more, high) in pairwise(curve):
        if high >= enough:
            return f"{fewer * math.exp(math.log(more / fewer) * (enough - low) / (high - low)):.0f}"
    return f"above {curve[-1][0]}"


if __name__ == "__main__":
    main()
