"""What different backbones reach at equal cost: an iso-FLOPs table, over every shape that was run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import polars as pl

from malloc_bench.report.laws.laws import LOSSES, Found
from malloc_bench.report.render import Column, number, words

COLUMNS: tuple[Column, ...] = (
    words("cost", "MFLOPs"),
    words("group", "backbone"),
    number("shapes", "shapes", ".0f"),
    number("mean", "mean", ".4f"),
    number("lowest", "lowest", ".4f"),
    number("highest", "highest", ".4f"),
    words("shape", "best shape"),
)
SCHEMA = {
    "cost": pl.String, "group": pl.String, "shapes": pl.Int64, "mean": pl.Float64, "lowest": pl.Float64,
    "highest": pl.Float64, "shape": pl.String,
}  # fmt: skip


def equal(found: Sequence[Found]) -> pl.DataFrame:
    """A row for each doubling of what grows and each group that has shapes there; seeds of a shape are averaged."""
    seen: defaultdict[tuple[int, str], defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for group in found:
        if group.points is not None:
            loss = group.metric in LOSSES
            for shape, x, y in zip(group.shapes, group.points.x[:, 0], group.points.y):
                seen[math.floor(math.log2(x)), group.group][shape].append(y if loss else 1 - y)
    rows = []
    for (power, name), by_shape in sorted(seen.items()):
        means = {shape: float(np.mean(values)) for shape, values in by_shape.items()}
        group = next(each for each in found if each.group == name)
        best = (min if group.metric in LOSSES else max)(means, key=means.__getitem__)
        rows.append({
            "cost": f"{2.0**power / 1e6:.3g} to {2.0 ** (power + 1) / 1e6:.3g}", "group": name, "shapes": len(means),
            "mean": float(np.mean(list(means.values()))), "lowest": min(means.values()),
            "highest": max(means.values()), "shape": best,
        })  # fmt: skip
    return pl.DataFrame(rows, schema=SCHEMA)
