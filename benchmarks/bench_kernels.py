"""What attention over packed states costs beside float32, in one process. `make bench`, or by itself:

    python benchmarks/bench_kernels.py [--users 16] [--seconds 3]

2 heads of width 64, one thread: products with keys, a softmax, weighted sums of values. Float32 is read in four ways:
ours (as SASRec's layer reads, the token itself too), softmax(qK')V in torch, SDPA, and loops of one pass. They take
turns with a packed state, read by the same layer; the ratio is of CPU times in the same round, to the fastest of the
four. Each is made twice and the second is timed: the four read the same numbers, and would find them in the caches.
`eager` is the packed read without kernels. Goals: one query .45 at 4,096 slots (codebooks .5) and .9 at 200; 128
candidates 1.05 and 1.1; 16 candidates at 200 slots 1.2.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numba
import numpy as np
import torch
from llvmlite.binding import get_host_cpu_name
from torch import Tensor
from torch.nn import functional as F

from malloc_bench import kernels
from malloc_bench.backbones.attention import _attend
from malloc_bench.backbones.block import Places
from malloc_bench.backbones.sasrec import SASRecBlock
from malloc_bench.measure import interleaved, load, ratio, summary, threads
from malloc_bench.state import Dense, Segment, Slots
from malloc_bench.state.codebook import Codebook, FromCodebook
from malloc_bench.state.microscaled import microscaled
from malloc_bench.state.quantized import quantize
from malloc_bench.state.vectors import Vectors
from malloc_bench.training.fit import tune_malloc

HEADS, WIDTH = 2, 64
ASKED = ((1, 4096), (1, 200), (16, 200), (128, 4096), (128, 200))


@numba.njit(fastmath=True, error_model="numpy")
def one_pass(q, keys, values, logits, out):  # type: ignore[no-untyped-def]
    """Rows [N], q [N, M, D], keys and values [N, S, D], out [N, M, D]; logits [S] is room to work in."""
    for n in range(q.shape[0]):
        for m in range(q.shape[1]):
            most = np.float32(-np.inf)
            for s in range(keys.shape[1]):
                total = np.float32(0)
                for d in range(keys.shape[2]):
                    total += q[n, m, d] * keys[n, s, d]
                logits[s] = total
                most = max(most, total)
            whole = np.float32(0)
            for s in range(keys.shape[1]):
                logits[s] = np.exp(logits[s] - most)
                whole += logits[s]
            out[n, m, :] = np.float32(0)
            for s in range(keys.shape[1]):
                weight = logits[s] / whole
                for d in range(keys.shape[2]):
                    out[n, m, d] += weight * values[n, s, d]


def read(q: Tensor, keys: Vectors, values: Vectors) -> Callable[[], Tensor]:
    """As a backbone reads: each token sees the slots and itself."""
    b, _, m, _ = q.shape
    block, length = SASRecBlock(HEADS * WIDTH, HEADS, 0.0), torch.full((b,), keys.shape[2], dtype=torch.int32)
    layer = (Segment({"keys": keys, "values": values}, Slots(length[:, None])),)
    own, places = {"keys": q, "values": q}, Places(length[:, None, None].expand(b, 1, m), None)
    return lambda: _attend(block, q, own, None, layer, length, places, places)


def plainly(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def without() -> Tensor:
        with kernels.eager():
            return call()

    return without


def float32(q: Tensor, keys: Tensor, values: Tensor) -> dict[str, Callable[[], object]]:
    arrays = [x.flatten(0, 1).numpy() for x in (q, keys, values)]
    room, out = np.empty(keys.shape[2], np.float32), np.empty_like(arrays[0])
    return {
        "ours": read(q, Dense(keys), Dense(values)),
        "torch": lambda: (q @ keys.mT).softmax(-1) @ values,
        "SDPA": lambda: F.scaled_dot_product_attention(q, keys, values, scale=1.0),
        "loops": lambda: one_pass(*arrays, room, out),
    }


def packed(keys: Tensor, values: Tensor) -> dict[str, tuple[Vectors, Vectors]]:
    real = torch.ones(len(keys), 1, keys.shape[2], dtype=torch.bool)
    made: dict[str, tuple[Vectors, Vectors]] = {
        f"{bits} bits, keys by channel, values by slot": (
            quantize(keys, real, bits, 32, "slots"), quantize(values, real, bits, 32, "width"),
        )
        for bits in (8, 4, 3, 2)
    }  # fmt: skip
    made |= {
        f"{bits} bits, one scale a slot": tuple(quantize(x, real, bits, WIDTH, "width") for x in (keys, values))
        for bits in (4, 2)
    }  # type: ignore[misc]
    made["4 bits, microscaled"] = microscaled(keys, real, 4), microscaled(values, real, 4)
    for name, parts, wide, added in (("8 codes side by side", 8, WIDTH // 8, False), ("4 codes added", 4, WIDTH, True)):
        book = Codebook(torch.randn(HEADS, parts, 256, wide), 8, WIDTH, added)
        codes = [torch.randint(0, 256, (*keys.shape[:3], parts), dtype=torch.uint8) for _ in range(2)]
        made[name] = FromCodebook(codes[0], book), FromCodebook(codes[1], book)
    return made


@torch.inference_mode()
def report(users: int = 16, seconds: float = 3.0) -> None:
    tune_malloc()
    torch.manual_seed(0)
    print("# Reading packed states beside float32, by `python benchmarks/bench_kernels.py`\n")
    cpu, software = get_host_cpu_name(), f"torch {torch.__version__}, numba {numba.__version__}"
    print(f"{users} users x {HEADS} heads x {WIDTH}, CPU time, one thread of a {cpu}, load {load():.1f}; {software}.")
    print("ms, and x the fastest float32 read of the four [95 %].\n")
    print("| queries | slots | float32 | ms | state | ms | x float32 | without kernels |")
    print("|--:|--:|---|--:|---|--:|--:|--:|")
    with threads(1):
        for m, slots in ASKED:
            keys, values = (torch.randn(users, HEADS, slots, WIDTH) for _ in range(2))
            q = torch.randn(users, HEADS, m, WIDTH) / WIDTH**0.5
            for label, vectors in packed(keys, values).items():
                packed_read = read(q, *vectors)
                calls = {**float32(q, keys, values), "packed": packed_read, "eager": plainly(packed_read)}
                turns = {(name, turn): call for name, call in calls.items() for turn in (1, 2)}
                taken = interleaved(turns, seconds=2 * seconds, repeats=5)
                found = {name: taken[name, 2] for name in calls}
                ms = {name: summary(each.cpu)["p50"] or 0.0 for name, each in found.items()}
                best = min(("ours", "torch", "SDPA", "loops"), key=ms.__getitem__)
                to, plain = (ratio(found[name].cpu, found[best].cpu) for name in ("packed", "eager"))
                print(
                    f"| {m} | {slots:,} | {best} | {ms[best]:.2f} | {label} | {ms['packed']:.2f} | "
                    f"{to.value:.2f} [{to.lo:.2f}, {to.hi:.2f}] | {plain.value:.2f} |",
                    flush=True,
                )


def test_kernels(benchmark) -> None:
    benchmark.pedantic(report, rounds=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3.0)
    report(**vars(parser.parse_args()))
