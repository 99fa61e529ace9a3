"""Training speed beside the loop anybody writes first. `make bench`, or by itself:

    python benchmarks/bench_training.py [sasrec|hstu] [ml-1m|ml-100k] [batch size] [rounds]

The naive loop trains the same model: batches of 128 users in random order, padded to max length; cross_entropy over
the full logits; F.dropout, and dropout inside the attention kernel; stock indexing for HSTU's time bias; Adam, not
fused; the system's malloc. malloc cannot be untuned, so it lives in a process of its own; both run in turn.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.backbones import Backbone, attention, block, get_backbone, hstu, items, sasrec
from malloc_bench.data import get_dataset
from malloc_bench.data.tasks.batches import training_batches, window
from malloc_bench.data.tasks.splits import Split, get_split
from malloc_bench.state import Batch
from malloc_bench.training.fit import tune_malloc, validation_ndcg

BATCHES = 15
NAIVE_USERS = 128
MAX_LENGTH = 200


def prepare(name: str, data: str) -> tuple[Backbone, Split]:
    split = get_split("leave_one_out", get_dataset(data))
    torch.manual_seed(0)
    return get_backbone(name, split.dataset.n_items, split.dataset.has_time, max_length=MAX_LENGTH), split


def train(
    backbone: Backbone, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], count: int
) -> tuple[float, float]:
    """Targets per second and per CPU second over the next `count` batches, the making of them included."""
    targets, started, worked = 0, time.perf_counter(), time.process_time()
    backbone.train()
    for _ in range(count):
        batch = next(batches)
        loss = backbone.loss(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        targets += int((batch.targets > 0).sum())
    return targets / (time.perf_counter() - started), targets / (time.process_time() - worked)


def our_batches(split: Split, size: int) -> Iterator[Batch]:
    for epoch in range(10**6):
        yield from training_batches(split, MAX_LENGTH, size, 0, epoch)


def naive_batches(split: Split) -> Iterator[Batch]:
    dataset, rng = split.dataset, np.random.default_rng(0)
    while True:
        order = rng.permutation(np.flatnonzero(split.train_end - dataset.offsets[:-1] > 1))
        for start in range(0, len(order), NAIVE_USERS):
            users = order[start : start + NAIVE_USERS]
            events = window(dataset, users, split.train_end[users] - 1, MAX_LENGTH)
            following = window(dataset, users, split.train_end[users], MAX_LENGTH + 1)
            wide = MAX_LENGTH - events.items.shape[1]
            targets = torch.zeros_like(events.items)
            for row, n in enumerate(events.count.tolist()):
                targets[row, :n] = following.items[row, int(following.count[row]) - n : int(following.count[row])]
            padded = [
                None if x is None else F.pad(x, (0, wide)) for x in (events.items, events.times, events.next_times)
            ]
            yield Batch(type(events)(padded[0], events.count, *padded[1:]), F.pad(targets, (0, wide)))


def make_naive() -> None:
    """Undo in this process what the package does for speed; the model stays the same."""

    def dropped(x: Tensor, p: float, training: bool) -> Tensor:
        return F.dropout(x, p, training)

    def loss(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ table.T, targets)

    def causal(self, q, own, places, asked) -> Tensor:
        rate = self.rate if self.training else 0.0
        return F.scaled_dot_product_attention(q, own["keys"], own["values"], dropout_p=rate, is_causal=True, scale=1.0)

    for module in (attention, sasrec, hstu):
        module.dropout = dropped
    items.next_item_loss = loss
    sasrec.SASRecBlock.causal = causal
    hstu.HSTUBlock.causal = block.Block.causal
    hstu._TimeBias.apply = lambda table, buckets: table[buckets]


def serve_naive(name: str, data: str) -> None:
    """Trains as many batches as each line that comes in says, and answers with its speed."""
    make_naive()
    backbone, split = prepare(name, data)
    optimizer, batches = torch.optim.Adam(backbone.parameters(), 1e-3, foreach=False, fused=False), naive_batches(split)
    print("ready", flush=True)
    for line in sys.stdin:
        print(*train(backbone, optimizer, batches, int(line)), flush=True)


def measure(name: str, data: str = "ml-1m", size: int = 64, rounds: int = 3) -> dict[str, float]:
    """Speeds of both loops by wall and by CPU time, their ratios, seconds of an evaluation: medians over rounds."""
    tune_malloc()
    backbone, split = prepare(name, data)
    optimizer = torch.optim.AdamW(backbone.parameters(), 1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    batches = our_batches(split, size)
    naive = subprocess.Popen(
        [sys.executable, __file__, "--naive", name, data], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert naive.stdin is not None and naive.stdout is not None
    found: dict[str, list[float]] = defaultdict(list)
    with naive:
        naive.stdout.readline()
        for turn in range(rounds + 1):
            ours = train(backbone, optimizer, batches, BATCHES)
            naive.stdin.write(f"{BATCHES}\n")
            naive.stdin.flush()
            theirs = tuple(map(float, naive.stdout.readline().split()))
            started = time.perf_counter()
            validation_ndcg(backbone, split, split.test)
            if turn:  # the first warms up
                for label, speed in (("ours", ours), ("naive", theirs)):
                    found[label].append(speed[0])
                    found[f"{label}, CPU"].append(speed[1])
                found["evaluation"].append(time.perf_counter() - started)
        naive.stdin.close()
    result = {label: float(np.median(each)) for label, each in found.items()}
    for clock in ("", ", CPU"):
        result[f"ratio{clock}"] = float(np.median(np.array(found[f"ours{clock}"]) / np.array(found[f"naive{clock}"])))
    result["targets"] = float(np.minimum(split.train_end - split.dataset.offsets[:-1] - 1, MAX_LENGTH).clip(0).sum())
    return result


def report(name: str, data: str = "ml-1m", size: int = 64, rounds: int = 3) -> None:
    before = os.getloadavg()[0]
    result = measure(name, data, size, rounds)
    load = f"load {before:.1f} before and {os.getloadavg()[0]:.1f} after"
    print(f"\n{name} on {data}, {torch.get_num_threads()} threads, {load}: {result['ratio']:.1f} times the naive loop")
    for clock, unit in (("", "s"), (", CPU", "CPU s")):  # on a busy machine the second says more
        for label, users in (("ours", size), ("naive", NAIVE_USERS)):
            speed = result[f"{label}{clock}"]
            epoch = result["targets"] / speed
            print(f"  {label:6s} batches of {users:3d} {speed:8,.0f} targets/{unit:6s} {epoch:6.1f} {unit} an epoch")
    print(
        f"  by CPU time {result['ratio, CPU']:.1f} times; one evaluation of all test users {result['evaluation']:.2f} s"
    )


def test_training_beside_the_naive_loop(benchmark) -> None:
    benchmark.pedantic(lambda: [report(name) for name in ("sasrec", "hstu")], rounds=1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--naive"]:
        serve_naive(*sys.argv[2:4])
    else:
        name, data, size, rounds = (*sys.argv[1:5], *("sasrec", "ml-1m", "64", "3")[len(sys.argv) - 1 :])
        report(name, data, int(size), int(rounds))
