"""For whom fitted slots fail: overlap@10 by history, by what reads, by what was looked for. Of a run's users.

    python examples/where.py RUN [--budget 1/16] [--seed 0] [--only fit_omp ...]     RUN: a folder of a retrieval suite

Users in thirds: `history`, events before the one that reads, fewest first; `reader`, training events of the item that
reads, and `target`, those of the one that came next, rarest first. probe / none: users whose reader is one of the 128
probes that are drawn by default, and is not, as no item is that comes to the catalogue later.
below .7: percent of users with less than 7 of 10 items kept.
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import polars as pl

from malloc_bench.data import get_dataset
from malloc_bench.data.tasks.splits import Split
from malloc_bench.data.tasks.trained import ends, facts
from malloc_bench.results import label, read_rows
from malloc_bench.run.folder import read_manifest
from malloc_bench.state import Stats
from malloc_bench.suite.cells import Cell

GROUPS, PROBES = ("history", "reader", "target"), 128


def thirds(x: np.ndarray) -> np.ndarray:
    """0, 1 or 2 of each number; ties together."""
    return np.searchsorted(np.quantile(x, [1 / 3, 2 / 3]), x, side="left")


def users(split: Split) -> pl.DataFrame:
    """Of each test target: user; history, reader and target as thirds; whether its reader is one of PROBES drawn."""
    data, targets = split.dataset, split.test
    trained = np.arange(data.n_events) < np.repeat(ends(split), np.diff(data.offsets))
    seen = np.bincount(data.items[trained], minlength=data.n_items + 1)
    reader, target = data.items[targets.at - 1], data.items[targets.at]
    items = facts(split, Stats(probes=PROBES))
    drawn = np.zeros(0) if items is None else items["probes"].numpy()
    return pl.DataFrame({
        "user": data.original_user(targets.users),
        "history": thirds(targets.at - data.offsets[targets.users]),
        "reader": thirds(seen[reader]),
        "target": thirds(seen[target]),
        "probe": np.isin(reader, drawn),
    })  # fmt: skip


def means(kept: pl.DataFrame) -> list[str]:
    """kept: `users` with an `overlap`."""
    groups = (dict(kept.group_by(name).agg(pl.col("overlap").mean()).iter_rows()) for name in GROUPS)
    by_third = [" / ".join(f"{group[i]:.3f}" if i in group else "-" for i in range(3)) for group in groups]
    sides = [kept.filter(pl.col("probe") == side)["overlap"].mean() for side in (True, False)]
    probed = " / ".join("-" if x is None else f"{x:.3f}" for x in sides)
    return [f"{kept['overlap'].mean():.3f}", *by_third, probed, f"{100 * (kept['overlap'] < 0.65).mean():.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--budget", type=Fraction, default=Fraction(1, 16))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[""], help="methods with any of these in their names")
    asked = parser.parse_args()
    some = [
        (label(row["compressor"], json.dumps(row["compressor_params"])), row)
        for row in read_rows(asked.run / "rows", quarantine=False)
        if row["compressor"] not in ("full", "recompute")
        and row["status"] == "ok"
        and row["seed"] == asked.seed
        and row["budget"] in (None, str(float(asked.budget)))
    ]
    some = [(name, row) for name, row in some if any(part in name for part in asked.only)]
    if all(row["budget"] is None for _, row in some):
        raise SystemExit(f"{asked.run}: no row of seed {asked.seed} at {asked.budget}: see `malloc-bench report`")
    row = some[0][1]
    cell = Cell.of_row(row)
    assert cell.split is not None, "a row has it"
    card = read_manifest(asked.run).get("datasets", {}).get(cell.dataset, {}).get("card", cell.dataset)
    split = cell.task.cut(get_dataset(card), cell.split)
    if not isinstance(split, Split):
        raise SystemExit(f"{asked.run}: rows of {row['task']}; overlap is kept of retrieval")
    known = users(split)
    print("| backbone | method | all | history | reader | target | probe / none | below .7 |")
    print("|---|---|" + "--:|" * 6)
    for name, row in sorted(some, key=lambda one: (one[1]["backbone"], one[0])):
        kept = pl.read_parquet(asked.run / row["per_user"], columns=["user", "overlap"]).join(known, on="user")
        print(f"| {row['backbone']} | {name} | " + " | ".join(means(kept)) + " |")


if __name__ == "__main__":
    main()
