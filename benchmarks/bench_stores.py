"""What packed states take at rest in each store, against their own bytes. `make bench`, or by itself:

    python benchmarks/bench_stores.py [--cap-gb 4] [--stores lmdb redis dict] [--out results/benchmarks/stores.md]

States of SASRec (2 layers, width 64, fresh weights) over 256 made-up histories of 10 to 200 events: raw ids, 2 bits a
number, and full, some hundred, some thousand and some ten thousand bytes. Users come in random order, 10^3 of them,
then twice as many again and again until their packed bytes reach the cap; then the store's own count of its bytes is
read: LMDB's file, what Redis's allocator gave, the sizes of Python's objects. One method and store at a time; nothing
is left. Slope: bytes at rest to a packed byte, by least squares over the sizes, with its standard error. Overhead:
least squares of bytes at rest on users and packed bytes over all methods of a store.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import get_compressor
from malloc_bench.measure import STORES, Store, Workload, load
from malloc_bench.state import Events

METHODS = {"recompute": {}, "kivi": {"bits": 2}, "full": {}}
ITEMS, LONGEST, SHORTEST, OWN = 3706, 200, 10, 256  # of histories whose states are made; others have the same ones
FIRST, STEP, AT_ONCE = 1000, 2, 1 << 20  # bytes of a transaction: in one of many LMDB cannot use freed pages again
GB = 1e9


class Size(NamedTuple):
    store: str
    method: str
    users: int
    packed: int
    rest: int
    seconds: float


@torch.inference_mode()
def states(own: int = OWN) -> dict[str, list[bytes]]:
    """Packed states of `own` users by method."""
    torch.manual_seed(0)
    work = Workload(own, LONGEST)
    backbone = get_backbone("sasrec", ITEMS, layers=2, dim=64, max_length=work.max_length).eval()
    history, _, _ = work.events(ITEMS)
    lengths = np.random.default_rng(0).lognormal(np.log(60), 0.8, own).clip(SHORTEST, LONGEST)
    full = backbone.prepare(Events(history.items, torch.from_numpy(lengths).int(), history.times, history.next_times))
    return {name: get_compressor(name, **params).compress(full).packed(range(own)) for name, params in METHODS.items()}


def filled(store: Store, method: str, blobs: Sequence[bytes], cap: float, first: int = FIRST) -> Iterator[Size]:
    """Sizes while a store fills, until the packed bytes reach the cap."""
    most, per_user = int(cap), sum(map(len, blobs)) / len(blobs)
    total = max(first, int(most / per_user))
    order = iter(np.random.default_rng(0).permutation(total).tolist())
    users = packed = 0
    began = time.perf_counter()
    wanted = first
    while users < total:
        while users < min(wanted, total):
            some, size = {}, 0
            for user in islice(order, min(wanted, total) - users):
                some[b"user/%d" % user] = blob = blobs[user % len(blobs)]
                size += len(blob)
                if size > AT_ONCE:
                    break
            store.put_many(some)
            users, packed = users + len(some), packed + size
        yield Size(store.name, method, users, packed, store.at_rest(), time.perf_counter() - began)
        wanted *= STEP


def fitted(y: Sequence[float], *x: Sequence[float]) -> list[tuple[float, float]]:
    """Least squares of y on the columns x: each coefficient and its standard error (NaN where nothing is left over)."""
    a, b = np.stack([np.asarray(each, float) for each in x], 1), np.asarray(y, float)
    found, *_ = np.linalg.lstsq(a, b, rcond=None)
    free = len(b) - a.shape[1]
    spread = ((b - a @ found) ** 2).sum() / free if free > 0 else np.nan
    solved = np.linalg.pinv(a)  # of a'a, whose condition is squared, the intercept would be lost
    return list(zip(found.tolist(), np.sqrt((solved**2).sum(1) * spread).tolist()))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> None:
    for cells in (heads, [":--"] * words + ["--:"] * (len(heads) - words), *rows):
        print(f"| {' | '.join(cells)} |")
    print()


def report(cap: float, stores: Sequence[str] = tuple(STORES), own: int = OWN, first: int = FIRST) -> None:
    blobs, found = states(own), list[Size]()
    for name in stores:
        STORES[name].check()
        for method, each in blobs.items():
            with STORES[name]() as store:
                found += filled(store, method, each, cap, first)
            print(found[-1], file=sys.stderr, flush=True)
    print(f"Up to {cap / GB:g} GB of packed states a method and store; load {load():.1f}.\n")
    print("## As they fill\n")
    lines = [
        [s.store, s.method, f"{s.users:,}", f"{s.packed / s.users:,.0f}", f"{s.packed / 1e6:,.2f}",
         f"{s.rest / 1e6:,.2f}", f"{s.rest / s.packed:.3f}", f"{(s.rest - s.packed) / s.users:,.0f}"]
        for s in found
    ]  # fmt: skip
    heads = ["store", "method", "users", "bytes a user", "packed (MB)", "at rest (MB)", "× packed", "overhead a user"]
    table(heads, lines, 2)
    print("## Slopes: bytes at rest to a packed byte\n")
    lines = []
    for name in stores:
        for method in blobs:
            own_sizes = [s for s in found if (s.store, s.method) == (name, method)]
            ones = [1.0] * len(own_sizes)
            (slope, error), _ = fitted([s.rest for s in own_sizes], [s.packed for s in own_sizes], ones)
            lines.append([name, method, f"{slope:.4f}", f"{error:.4f}", f"{own_sizes[-1].users:,}"])
    table(["store", "method", "slope", "standard error", "users, most"], lines, 2)
    print("## A store's own, over all methods\n")
    lines = []
    for name in stores:
        sizes = [s for s in found if s.store == name]
        (user, user_error), (byte, byte_error) = fitted(
            [s.rest for s in sizes], [s.users for s in sizes], [s.packed for s in sizes]
        )
        lines.append([name, f"{user:,.0f} ± {user_error:,.0f}", f"{byte - 1:+.4f} ± {byte_error:.4f}"])
    table(["store", "bytes a user", "bytes a packed byte"], lines, 1)


def test_stores(benchmark) -> None:
    benchmark.pedantic(report, (4 * GB,), rounds=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cap-gb", type=float, default=4.0)
    parser.add_argument("--stores", nargs="+", choices=list(STORES), default=list(STORES))
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    text, command = io.StringIO(), " ".join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]])
    with redirect_stdout(text):
        print(f"# What packed states take in a store, by `{command}`\n")
        report(chosen.cap_gb * GB, chosen.stores)
    if chosen.out is not None:
        chosen.out.write_text(text.getvalue().rstrip() + "\n")
    print(text.getvalue(), end="")
