"""What fitted slots cost to make, in prefills: probes, and compressing with them. `make bench`, or by itself:

    python benchmarks/bench_fitted.py [--lengths 200 2000] [--slots 8] [--probes 64] [--users 16]

SASRec (2 layers, width 64) and HSTU (4 layers, 2 heads, width 50, with times), fresh weights, one thread. A method's
column is probes + compress over prefill: CPU time, medians of calls in turns (the machine may be busy). Goals at 8
slots and 64 probes: fit_omp 1.5 at 200 events and 0.4 at 2,000, fit_recent 1. About two minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.measure import Workload, load, some_facts, threads
from malloc_bench.state import Stats

ITEMS = 3706
SIZES = {"sasrec": {"layers": 2, "dim": 64}, "hstu": {"layers": 4, "heads": 2, "dim": 50}}
METHODS = ("fit_constant", "fit_recent", "fit_top", "fit_omp")
SECONDS = 4.0  # of all calls of a row


def medians(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Milliseconds of CPU time of each call, made in turns until the seconds are over, three times at least."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    began = time.perf_counter()
    while len(next(iter(found.values()))) < 3 or time.perf_counter() - began < seconds:
        for name, call in calls.items():
            start = time.process_time()
            call()
            found[name].append(time.process_time() - start)
    return {name: 1e3 * median(times) for name, times in found.items()}


@torch.inference_mode()
def row(name: str, history: int, slots: int, probes: int, users: int, seconds: float) -> list[str]:
    torch.manual_seed(0)
    work = Workload(users, history)
    backbone = get_backbone(name, ITEMS, name == "hstu", max_length=work.max_length, **SIZES[name]).eval()
    stats, items = Stats(probes=probes), some_facts(ITEMS)
    full, events = work.prefill(backbone, stats), work.events(ITEMS)[0]
    methods = {each: get_compressor(each, probes=probes) for each in METHODS}
    calls: dict[str, Callable[[], object]] = {
        "prefill": lambda: work.prefill(backbone),
        "probes": lambda: backbone.probe(full.state, events, stats, items),
    }
    for each, method in methods.items():
        budget = Budget(slots=slots) if method.takes_budget else None
        calls[each] = lambda method=method, budget=budget: method.compress(replace(full, memo={}), budget)
    found = medians(calls, seconds)
    prefill, sent = found["prefill"], found["probes"]
    return [name, f"{history}", f"{prefill:.1f}", f"{sent / prefill:.2f}"] + [
        f"{(sent + found[each]) / prefill:.2f}" for each in METHODS
    ]


def report(
    lengths: Sequence[int] = (200, 2000), slots: int = 8, probes: int = 64, users: int = 16, seconds: float = SECONDS
) -> None:
    print("# What fitted slots cost to make, in prefills, by `python benchmarks/bench_fitted.py`\n")
    about = f"{users} users, {slots} slots a layer and head, {probes} probes"
    print(f"{about}; CPU time, one thread, load {load():.1f}\n")
    for cells in (["backbone", "events", "prefill, ms", "probes", *METHODS], ["---", *["--:"] * (3 + len(METHODS))]):
        print(f"| {' | '.join(cells)} |")
    with threads(1):
        for name in SIZES:
            for history in lengths:
                print(f"| {' | '.join(row(name, history, slots, probes, users, seconds))} |", flush=True)


def test_fitted(benchmark) -> None:
    benchmark.pedantic(report, rounds=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 2000])
    for flag, default in (("--slots", 8), ("--probes", 64), ("--users", 16)):
        parser.add_argument(flag, type=int, default=default)
    chosen = parser.parse_args()
    report(chosen.lengths, chosen.slots, chosen.probes, chosen.users)
