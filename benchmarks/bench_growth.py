"""What `plan` says of histories that nobody measured, held against measuring them. `make bench`, or by itself:

    python benchmarks/bench_growth.py [--near 94 199] [--far 500 1000 2000] [--out results/benchmarks/growth.md]

SASRec and HSTU of fresh weights, on made-up histories. Wall times and FLOPs of every step at two near lengths are what
a run's row holds; from these `measure.fleet.times` tells the times at lengths far beyond, which are then measured on
the same machine. Printed for each step and method: told / measured milliseconds a user, and their ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from malloc_bench.backbones import Backbone, get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.measure import Workload, latency
from malloc_bench.measure.fleet.times import pace, times
from malloc_bench.measure.flops import closed_form

BACKBONES = {"sasrec": {"layers": 2, "heads": 1, "dim": 50}, "hstu": {"layers": 4, "heads": 2, "dim": 50}}
METHODS: dict[str, tuple[str, Budget | None]] = {
    "full": ("full", None), "none": ("none", None), "recompute": ("recompute", None),
    "int4_token": ("int4_token", None), "snapkv at 12.5 %": ("snapkv", Budget(0.125)),
    "recent at 12.5 %": ("recent", Budget(0.125)), "svd at 12.5 %": ("svd", Budget(0.125)),
}  # fmt: skip
ITEMS, STEPS, USERS = 3706, ("prefill", "compress", "append", "read"), 8
LEAST = 0.01  # milliseconds; less is nothing to be told
SHARED = {("prefill", method) for method in METHODS if method != "full"}


class Told(NamedTuple):
    backbone: str
    method: str
    step: str
    events: int
    told: float
    measured: float


def rows(backbone: Backbone, events: int, seconds: float) -> dict[str, dict[str, Any]]:
    """By method: milliseconds a user, FLOPs and bytes of a state, under the names that rows of results have."""
    work = Workload(USERS, events)
    methods = {name: (get_compressor(plain), budget, None) for name, (plain, budget) in METHODS.items()}
    timed, found = latency({None: backbone}, methods, work, seconds=seconds), {}
    for name, (compressor, budget, _) in methods.items():
        state = compressor.compress(work.prefill(backbone, compressor.needs), budget)
        found[name] = {**timed[name].columns(), **closed_form(backbone, compressor, state, work)}
        found[name]["bytes"] = float(state.nbytes().float().mean())
    return found


@torch.no_grad()
def told(near: Sequence[int], far: Sequence[int], seconds: float) -> Iterator[Told]:
    for name, params in BACKBONES.items():
        torch.manual_seed(0)
        backbone = get_backbone(name, ITEMS, max_length=max(far) + 1, **params).eval()
        first, last = (rows(backbone, n, seconds) for n in near)
        joined = {
            method: {
                "measured_history": near[0], "measured_history_long": near[1], **one,
                **{f"{key}_long": value for key, value in last[method].items()},
            }
            for method, one in first.items()
        }  # fmt: skip
        for events in far:
            for method, measured in rows(backbone, events, seconds).items():
                row, raw = joined[method], method == "recompute"
                slope = (row["bytes_long"] - row["bytes"]) / (near[1] - near[0])

                def grown(n: float, row: Any = row, slope: float = slope) -> float:
                    return 1 + slope * (n - near[0]) / row["bytes"] if row["bytes"] else 1.0

                for step in STEPS:
                    if not row[f"{step}_ms_p50"] or row[f"{step}_ms_p50"] < LEAST or (step, method) in SHARED:
                        continue
                    kept = step in ("append", "read")
                    bends = "n^2" in get_compressor(METHODS[method][0]).growth.get("compress", "") or step != "compress"
                    least = pace(joined["full"], joined["none"], step) if kept else 0.0
                    factor = times(row, step, events, grown if kept and not raw else None, least, bends)
                    yield Told(name, method, step, events, factor * row[f"{step}_ms_p50"], measured[f"{step}_ms_p50"])


def table(found: Sequence[Told], near: Sequence[int]) -> str:
    lines = [
        f"Told from {near[0]} and {near[1]} events / measured (ms a user) = ratio.",
        "",
        "| backbone | method | step | " + " | ".join(f"{n:,} events" for n in sorted({x.events for x in found})) + " |",
        "| :-- | :-- | :-- |" + " --: |" * len({x.events for x in found}),
    ]
    by: dict[tuple[str, str, str], list[Told]] = {}
    for each in found:
        by.setdefault(each[:3], []).append(each)
    for key, every in by.items():
        cells = [f"{x.told:.3g} / {x.measured:.3g} = {x.told / x.measured:.2f}" for x in every]
        lines.append(f"| {' | '.join(key)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--near", type=int, nargs=2, default=(94, 199))
    parser.add_argument("--far", type=int, nargs="+", default=(500, 1000, 2000))
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(given)
    text = table(list(told(asked.near, asked.far, asked.seconds)), asked.near)
    print(text)
    if asked.out:
        asked.out.write_text(text)


def test_far_times_are_told_from_near_ones() -> None:
    main(["--far", "400", "--seconds", "0.05"])


if __name__ == "__main__":
    main()
