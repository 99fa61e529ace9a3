"""Every backbone beside SASRec of equal size: a training epoch, and a read at full state. `make bench`, or by itself:

    python benchmarks/bench_backbones.py [backbone ...]

All of them live in one process, on one thread, and take turns: with the same batches of training users, then with
states of the same users and candidates. Ratios are medians over rounds, by wall and by CPU time (on a busy machine the
second says more): 1 is SASRec, above it is slower. A backbone takes of SIZE what its config has; weights do not matter
to the time of a read, so none are trained for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from itertools import chain, count, islice
from typing import Any

import numpy as np
import torch

from malloc_bench.backbones import Backbone, get_backbone
from malloc_bench.data import get_dataset
from malloc_bench.data.tasks.batches import training_batches
from malloc_bench.data.tasks.splits import Split, get_split
from malloc_bench.measure import Samples, Workload, interleaved, load, threads
from malloc_bench.registry import find, names
from malloc_bench.training.fit import tune_malloc

YARDSTICK = "sasrec"
SIZE = {"layers": 2, "heads": 2, "dim": 64, "max_length": 200}
BATCH, BATCHES, ROUNDS = 64, 5, 5
WORK = Workload(users=4, history=1000, candidates=100)


def make(name: str, n_items: int, has_time: bool, **size: Any) -> Backbone:
    torch.manual_seed(0)
    known = {f.name for f in fields(find("backbones", name).Config)}
    return get_backbone(name, n_items, has_time, **{key: value for key, value in size.items() if key in known})


def stretch(name: str, split: Split) -> Callable[[], None]:
    """A call that trains on the next BATCHES; for every backbone they are the same."""
    backbone = make(name, split.dataset.n_items, split.dataset.has_time, **SIZE).train()
    optimizer = torch.optim.AdamW(backbone.parameters(), 1e-3, fused=True)
    batches = chain.from_iterable(training_batches(split, SIZE["max_length"], BATCH, 0, epoch) for epoch in count())

    def train() -> None:
        for batch in islice(batches, BATCHES):
            optimizer.zero_grad(set_to_none=True)
            backbone.loss(batch).backward()
            optimizer.step()

    return train


def training(labels: Sequence[str], data: str) -> tuple[dict[str, Samples], float]:
    """Times of so many stretches, and how many of them are an epoch."""
    split = get_split("leave_one_out", get_dataset(data))
    share = sum(1 for _ in training_batches(split, SIZE["max_length"], BATCH, 0, 0)) / BATCHES
    return interleaved({name: stretch(name, split) for name in labels}, seconds=0, repeats=ROUNDS), share


def reading(labels: Sequence[str], seconds: float = 2.0) -> tuple[dict[str, Samples], float]:
    """Times of reads of all users, and how many of them are a user's, in milliseconds."""
    reads = {}
    with torch.inference_mode():
        for name in labels:
            backbone = make(name, 3706, True, **{**SIZE, "max_length": WORK.max_length}).eval()
            reads[name] = partial(backbone.read, WORK.events(3706)[1], WORK.prefill(backbone).state)
        return interleaved(reads, seconds=seconds * len(reads), repeats=20), 1000 / WORK.users


def report(chosen: Sequence[str] = (), data: str = "ml-1m") -> None:
    labels = list(dict.fromkeys([YARDSTICK, *(chosen or names("backbones"))]))
    tune_malloc()
    with threads(1):
        before = load()
        tables = {"epoch, s": training(labels, data), "read, ms": reading(labels)}
    size = ", ".join(f"{key} {value}" for key, value in SIZE.items())
    print(f"\nbeside {YARDSTICK}: {size}; 1 thread, load {before:.1f} before and {load():.1f} after")
    print(f"epoch: batches of {BATCH} on {data}; read: {WORK.candidates} candidates, {WORK.history:,} events, per user")
    for what, (found, factor) in tables.items():
        for name in labels:
            line = f"  {what:9s} {name:10s}"
            for clock in ("wall", "cpu"):
                mine, theirs = (np.array(getattr(found[each], clock)) for each in (name, YARDSTICK))
                line += f"  {np.median(mine) * factor:8.2f} x{np.median(mine / theirs):5.2f} {clock}"
            print(line)


def test_backbones_beside_the_yardstick(benchmark) -> None:
    benchmark.pedantic(report, rounds=1)


if __name__ == "__main__":
    report(sys.argv[1:])
