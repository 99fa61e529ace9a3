"""What 48 and 96 cells cost, in plain evaluations of the same backbone. `make bench`, or by itself:

    python benchmarks/bench_evaluation.py [sasrec|hstu] [ml-1m|long] [--rounds 3] [--shares]

The yardstick is the loop anybody writes first: forward, scores, seen items off, rank. Both run in turn, one process.
Weights do not matter to time, so none are trained; `long` is 400 generated users of 2,000 events.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import numpy as np
import pytest
import torch

from malloc_bench.backbones import Backbone, get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.data import Dataset, get_dataset
from malloc_bench.data.tasks.batches import window
from malloc_bench.data.tasks.splits import Split, get_split
from malloc_bench.evaluation.evaluate import Job, evaluate
from malloc_bench.measure import load
from malloc_bench.training.fit import tune_malloc

METHODS: list[tuple[str, dict]] = [
    ("recent", {}),
    ("sink_recent", {}),
    ("sink_recent", {"sinks": 1}),
    ("random", {}),
    ("knorm", {}),
    ("h2o", {}),
    ("tova", {}),
    ("snapkv", {}),
    ("snapkv", {"window": 8}),
    ("snapkv", {"kernel": 1}),
    ("merge_adjacent", {}),
    ("compose", {"steps": ("recent", "merge_adjacent")}),
]
MORE: list[tuple[str, dict]] = [  # to 24 methods
    ("strided", {}),
    ("value_norm", {}),
    ("vatp", {}),
    ("keydiff", {}),
    ("lagkv", {}),
    ("expected_attention", {}),
    ("scissorhands", {}),
    ("leverage", {}),
    ("sampled", {}),
    ("tome", {}),
    ("compose", {"steps": ("h2o", {"kivi": {"bits": 4}})}),
    ("compose", {"steps": ("merge_adjacent", {"kivi": {"bits": 2}})}),
]
BUDGETS = (0.5, 0.25, 0.125, 0.0625)


@torch.no_grad()
def plain(backbone: Backbone, split: Split, size: int = 128) -> np.ndarray:
    """Ranks of the test targets, [N]: the 15 lines."""
    backbone.eval()
    dataset, table, ranks = split.dataset, backbone.catalogue(), []
    for start in range(0, len(split.test), size):
        users, at = split.test.users[start : start + size], split.test.at[start : start + size]
        events = window(dataset, users, at, backbone.max_length)
        last = (events.count.long() - 1)[:, None, None].expand(-1, 1, table.shape[1])
        scores = backbone(events).gather(1, last)[:, 0] @ table.T
        target = torch.from_numpy(dataset.items[at].astype(np.int64) - 1)[:, None]
        best = scores.gather(1, target)
        for row, (user, end) in enumerate(zip(users, at)):
            scores[row, dataset.items[dataset.offsets[user] : end] - 1] = -torch.inf
        ranks.append((scores >= best).sum(1).numpy() - 1 + 0 * best[:, 0].numpy())
    return np.concatenate(ranks)


def long_histories(users: int = 400, events: int = 2000, items: int = 3706) -> Dataset:
    """Generated users of equal, long histories."""
    rng = np.random.default_rng(0)
    return Dataset(
        name="long",
        card=None,  # type: ignore[arg-type]
        source="generated",
        user_ids=np.arange(users),
        item_ids=np.arange(items),
        offsets=np.arange(users + 1) * events,
        items=rng.integers(1, items + 1, users * events).astype(np.int32),
        times=None,
        feedback={},
        hash="",
    )


def jobs(methods: list[tuple[str, dict]] = METHODS) -> list[Job]:
    return [
        Job(f"{name}{params or ''}@{budget}", get_compressor(name, **params), Budget.parse(budget))
        for name, params in methods
        for budget in BUDGETS
    ]


def measure(name: str, data: str, rounds: int = 3, shares: bool = True) -> dict[str, float]:
    """Seconds of a plain evaluation, of 48 cells and of 96, and their ratios: medians over rounds."""
    split = get_split("leave_one_out", long_histories() if data == "long" else get_dataset(data))
    length = 2000 if data == "long" else 200
    torch.manual_seed(0)
    backbone = get_backbone(name, split.dataset.n_items, max_length=length).eval()
    seconds: dict[str, list[float]] = defaultdict(list)

    def clock(label: str, call) -> None:
        started = time.process_time()  # other processes may take turns with this one
        call()
        seconds[label].append(time.process_time() - started)

    evaluate(backbone, split, jobs([*METHODS, *MORE]))  # what is compiled, is compiled here
    for _ in range(rounds):
        clock("plain", lambda: plain(backbone, split))
        clock("48 cells", lambda: evaluate(backbone, split, jobs()))
        clock("96 cells", lambda: evaluate(backbone, split, jobs([*METHODS, *MORE])))
    if shares:
        for method in [*METHODS, *MORE]:
            clock(
                f"{method[0]} {method[1] or ''}".strip(),
                lambda method=method: evaluate(backbone, split, jobs([method])),
            )
        clock("reference only", lambda: evaluate(backbone, split, []))
    result = {label: float(np.median(each)) for label, each in seconds.items()}
    for cells in ("48 cells", "96 cells"):
        result[f"ratio of {cells}"] = float(np.median(np.array(seconds[cells]) / np.array(seconds["plain"])))
    return result


@pytest.mark.parametrize("data", ["ml-1m", "long"])
@pytest.mark.parametrize("name", ["sasrec", "hstu"])
def test_cells(benchmark, name: str, data: str) -> None:
    benchmark.pedantic(report, (name, data), rounds=1)


def report(name: str, data: str, **options) -> None:
    tune_malloc()
    result = measure(name, data, **options)
    print(
        f"\n{name} on {data}: 48 cells cost {result['ratio of 48 cells']:.1f} plain evaluations, "
        f"96 {result['ratio of 96 cells']:.1f}; {torch.get_num_threads()} threads, load {load():.1f}"
    )
    for label, value in result.items():
        if not label.startswith("ratio"):
            print(f"  {label:44s} {value:7.2f} s  {value / result['plain']:6.2f} plain")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="sasrec")
    parser.add_argument("data", nargs="?", default="ml-1m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shares", action="store_true", help="each method's cells alone too")
    report(**vars(parser.parse_args()))
