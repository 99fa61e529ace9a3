"""What H2O's column sums cost beside a plain prefill, in one process. `make bench`, or by itself:

    python benchmarks/bench_sums.py [--users 4] [--lengths 200 1000 4096] [--seconds 10]

2 heads of width 64, one thread, fresh weights (they do not matter to time). `attention` is a layer's causal attention
alone, with sums over without; `prefill` the whole of two layers: SASRec's, and HSTU's with times and without.
Calls take turns; a ratio is the median of CPU times of the same round. Goal: at most 1.2.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.backbones.statistics import observed
from malloc_bench.measure import Ratio, Workload, interleaved, load, ratio, summary, threads
from malloc_bench.state import Stats
from malloc_bench.training.fit import tune_malloc

ITEMS, SIZE = 3706, {"layers": 2, "heads": 2, "dim": 128}
BACKBONES = (("sasrec", False), ("hstu", False), ("hstu", True))


def row(name: str, has_time: bool, users: int, length: int, seconds: float) -> list[str]:
    torch.manual_seed(0)
    work = Workload(users, length)
    backbone = get_backbone(name, ITEMS, has_time, max_length=work.max_length, **SIZE).eval()
    events, positions = work.events(ITEMS)[0], torch.arange(length)[None]
    places, asked = backbone._places(events, positions)
    block = backbone.blocks[0]
    q, own, _ = block.project(backbone._embed(events, positions))
    calls = {
        "attention": lambda: block.causal(q, own, places, asked),
        "attention, sums": partial(observed, block, q, own, places, asked, events.mask()),
        "prefill": lambda: work.prefill(backbone),
        "prefill, sums": lambda: work.prefill(backbone, Stats(column_sum=True)),
    }
    found = interleaved(calls, seconds=seconds, repeats=5)
    cells = [name + " with times" * has_time, f"{length:,}"]
    for what in ("attention", "prefill"):
        middle: Ratio = ratio(found[f"{what}, sums"].cpu, found[what].cpu)
        cells += [f"{summary(found[what].cpu)['p50']:.1f}", f"{middle.value:.2f} ({middle.lo:.2f} - {middle.hi:.2f})"]
    return cells


@torch.inference_mode()
def report(users: int = 4, lengths: Sequence[int] = (200, 1000, 4096), seconds: float = 10.0) -> None:
    tune_malloc()
    print("# Column sums beside plain attention, by `python benchmarks/bench_sums.py`\n")
    print(f"{users} users, 2 heads x 64, CPU time, one thread, load {load():.1f}; torch {torch.__version__}.\n")
    heads = ["backbone", "events", "attention, ms", "with sums", "prefill, ms", "with sums"]
    for cells in (heads, ["---", *["--:"] * 5]):
        print(f"| {' | '.join(cells)} |")
    with threads(1):
        for name, has_time in BACKBONES:
            for length in lengths:
                print(f"| {' | '.join(row(name, has_time, users, length, seconds))} |", flush=True)


def test_sums(benchmark) -> None:
    benchmark.pedantic(report, rounds=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 1000, 4096])
    parser.add_argument("--seconds", type=float, default=10.0)
    report(**vars(parser.parse_args()))
