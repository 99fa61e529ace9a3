"""What fitted slots cost to make and to read, and what their bytes hold. `make bench`, or by itself:

    python benchmarks/bench_fitted.py [--lengths 200 2000] [--slots 8] [--probes 64] [--users 16]

SASRec (2 layers, width 64) and HSTU (4 layers, 2 heads, width 50, with times), fresh weights, one thread; CPU time,
medians of calls in turns (the machine may be busy). Made: a method's column is probes + compress over prefill. Goals at
8 slots and 64 probes: fit_omp 1.5 at 200 events and 0.4 at 2,000, fit_recent 1. Read: what reading fitted slots costs
beyond reading an empty state, as a share of what reading the full state costs beyond it. Goals: .25 at 200 events, .05
at 2,000. FLOPs: of reading fit_omp's slots, of those of rebuilding the state from raw ids and reading it; goal 1/20 for
one token from 1,000 events on. About three minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, Compressor, get_compressor
from malloc_bench.measure import Workload, closed_form, load, some_facts, threads
from malloc_bench.state import Stats

ITEMS = 3706
SIZES = {"sasrec": {"layers": 2, "dim": 64}, "hstu": {"layers": 4, "heads": 2, "dim": 50}}
METHODS = ("fit_constant", "fit_recent", "fit_top", "fit_omp")
READ = {"fit_omp": ("fit_omp",), "fit_omp + mxint": ("fit_omp", "mxint"), "fit_constant": ("fit_constant",)}
CANDIDATES = (1, 100)
HELD = ("keys", "values", "scales", "masses", "positions", "times", "counts")
FRACTIONS = {"1/32": 1 / 32, "1/64": 1 / 64, "1/256": 1 / 256}
SECONDS = 4.0  # of all calls of a row


def medians(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Milliseconds of CPU time of each call, made in turns until the seconds are over, three times at least.

    Each is made twice and the second is timed: the turn before it leaves another call's numbers in the caches.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    began = time.perf_counter()
    while len(next(iter(found.values()))) < 3 or time.perf_counter() - began < seconds:
        for name, call in calls.items():
            call()
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


def chain(names: Sequence[str], probes: int) -> Compressor:
    first, *rest = names
    fit = get_compressor(first, probes=probes)
    return get_compressor("compose", steps=[fit, *rest]) if rest else fit


@torch.inference_mode()
def reads(name: str, history: int, slots: int, probes: int, users: int, seconds: float) -> Iterator[list[str]]:
    for candidates in CANDIDATES:
        torch.manual_seed(0)
        work = Workload(users, history, candidates=candidates)
        backbone = get_backbone(name, ITEMS, name == "hstu", max_length=work.max_length, **SIZES[name]).eval()
        full, tokens = work.prefill(backbone, Stats(probes=probes)), work.events(ITEMS)[1]
        methods = {"full": get_compressor("full"), "none": get_compressor("none")}
        methods |= {label: chain(names, probes) for label, names in READ.items()}
        states = {
            label: method.compress(full, Budget(slots=slots) if method.takes_budget else None)
            for label, method in methods.items()
        }
        ids = get_compressor("recompute")
        rebuilt = closed_form(backbone, ids, ids.compress(work.prefill(backbone, ids.needs)), work)["read_flops"]
        fitted = closed_form(backbone, methods["fit_omp"], states["fit_omp"], work)["read_flops"]
        assert rebuilt and fitted
        found = medians({label: partial(backbone.read, tokens, state) for label, state in states.items()}, seconds)
        rest, whole = found["none"], found["full"]
        yield (
            [name, f"{history}", f"{candidates}", f"{whole:.2f}", f"{rest:.2f}"]
            + [f"{(found[label] - rest) / (whole - rest):.2f}" for label in READ]
            + [f"1/{rebuilt / fitted:.0f}"]
        )


@torch.inference_mode()
def parts(name: str, history: int, probes: int, users: int) -> Iterator[list[str]]:
    torch.manual_seed(0)
    work = Workload(users, history)
    backbone = get_backbone(name, ITEMS, name == "hstu", max_length=work.max_length, **SIZES[name]).eval()
    full = work.prefill(backbone, Stats(probes=probes))
    for share, fraction in FRACTIONS.items():
        found = chain(READ["fit_omp + mxint"], probes).compress(full, Budget(fraction)).nbytes_by_part()
        held = {what: int(each.sum()) // users for what, each in found.items()}
        scales = held.get("keys scales", 0) + held.get("values scales", 0)
        named = [held["keys"], held["values"], scales, *(held.get(x, 0) for x in ("masses", "positions", "times"))]
        rest = str(held["counts"] + held["length"])
        yield [name, f"{history}", share, f"{sum(held.values())}", *map(str, named), rest]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> None:
    for cells in (heads, ["---"] * words + ["--:"] * (len(heads) - words)):
        print(f"| {' | '.join(cells)} |")
    for cells in rows:
        print(f"| {' | '.join(cells)} |", flush=True)
    print()


def report(
    lengths: Sequence[int] = (200, 2000), slots: int = 8, probes: int = 64, users: int = 16, seconds: float = SECONDS
) -> None:
    each = [(name, history) for name in SIZES for history in lengths]
    print("# What fitted slots cost to make and to read, by `python benchmarks/bench_fitted.py`\n")
    about = f"{users} users, {slots} slots a layer and head, {probes} probes"
    print(f"{about}; CPU time, one thread, load {load():.1f}\n")
    with threads(1):
        print("## To make, in prefills\n")
        made = (row(*one, slots, probes, users, seconds) for one in each)
        table(["backbone", "events", "prefill, ms", "probes", *METHODS], made)
        print("## To read, beyond an empty state, as a share of the full state's\n")
        found = (cells for one in each for cells in reads(*one, slots, probes, users, seconds))
        table(["backbone", "events", "candidates", "full, ms", "none, ms", *READ, "FLOPs"], found)
        print("## Bytes of a user that fit_omp + mxint keeps, by what they hold\n")
        sizes = (cells for one in each for cells in parts(*one, probes, users))
        table(["backbone", "events", "share", "bytes", *HELD], sizes)


def test_fitted(benchmark) -> None:
    benchmark.pedantic(report, rounds=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 2000])
    for flag, default in (("--slots", 8), ("--probes", 64), ("--users", 16)):
        parser.add_argument(flag, type=int, default=default)
    chosen = parser.parse_args()
    report(chosen.lengths, chosen.slots, chosen.probes, chosen.users)
