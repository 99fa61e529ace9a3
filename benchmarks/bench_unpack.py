"""What unpacking states costs beside a copy of their packed bytes, in one process. `make bench`, or by itself:

    python benchmarks/bench_unpack.py [--users 16] [--lengths 200 2000] [--seconds 2]

SASRec (2 layers, 2 heads x 64, fresh weights), one thread; `UserState.unpack` of all users at once, which dequantizes
nothing, and one memcpy of as many bytes take turns. Goal: two copies, and an overhead a user, which is what is left
of the time. Ratios are of CPU times of the same round.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.measure import Workload, interleaved, load, ratio, summary, threads
from malloc_bench.training.fit import tune_malloc

ITEMS, SIZE = 3706, {"layers": 2, "heads": 2, "dim": 128}
METHODS = (("full", {}), ("h2o", {}), ("int8", {}), ("int4_token", {}), ("kivi", {"bits": 2}), ("mxint", {}))


@torch.inference_mode()
def report(users: int = 16, lengths: Sequence[int] = (200, 2000), seconds: float = 2.0) -> None:
    tune_malloc()
    print("# Unpacking states beside a copy of their bytes, by `python benchmarks/bench_unpack.py`\n")
    print(
        f"{users} users, 2 layers, 2 heads x 64, CPU time, one thread, load {load():.1f}; torch {torch.__version__}.\n"
    )
    print("| method | events | bytes a user | memcpy, ms | unpack, ms | copies [95 %] | beyond two, us a user |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    with threads(1):
        for length in lengths:
            torch.manual_seed(0)
            work = Workload(users, length)
            backbone = get_backbone("sasrec", ITEMS, False, max_length=work.max_length, **SIZE).eval()
            for name, params in METHODS:
                method = get_compressor(name, **params)
                state = method.compress(work.prefill(backbone, method.needs), Budget(0.25))
                blobs = state.packed(range(users))
                whole = np.frombuffer(b"".join(blobs), np.uint8)
                to = np.empty_like(whole)
                calls = {"copy": lambda: np.copyto(to, whole), "unpack": lambda: state.unpack(blobs)}  # noqa: B023
                found = interleaved(calls, seconds=seconds, repeats=20)  # type: ignore[arg-type]
                copy, took = (summary(found[each].cpu)["p50"] or 0.0 for each in ("copy", "unpack"))
                times = ratio(found["unpack"].cpu, found["copy"].cpu)
                left = 1000 * (took - 2 * copy) / users
                print(
                    f"| {name} | {length:,} | {len(whole) // users:,} | {copy:.3f} | {took:.3f} | "
                    f"{times.value:.1f} [{times.lo:.1f}, {times.hi:.1f}] | {left:.0f} |",
                    flush=True,
                )


def test_unpack(benchmark) -> None:
    benchmark.pedantic(report, rounds=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--seconds", type=float, default=2.0)
    report(**vars(parser.parse_args()))
