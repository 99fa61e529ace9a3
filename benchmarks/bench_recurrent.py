"""A state of constant size beside one that grows: bytes, and what steps cost, by length of history. Or by itself:

    python benchmarks/bench_recurrent.py [candidates]

SASRec and the gated delta rule of equal size, one thread, the steps of both taken in turns. The ratios are of medians
of CPU time: below 1 is faster than SASRec. Weights do not matter to time, so none are trained.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.measure import Workload, interleaved, load, summary, threads
from malloc_bench.training.fit import tune_malloc

MODELS = ("sasrec", "gated_delta")
SIZE = {"layers": 2, "heads": 2, "dim": 64}
LENGTHS = (200, 1000, 4000)
STEPS = ("prefill", "append", "read")


def measure(length: int, candidates: int, seconds: float = 2.0) -> list[str]:
    """A line for each model: bytes of a user's state, and CPU milliseconds a user of each step with its ratio."""
    work = Workload(users=4, history=length, candidates=candidates)
    calls, size = {}, {}
    with torch.inference_mode():
        for name in MODELS:
            backbone = get_backbone(name, 3706, max_length=work.max_length, **SIZE).eval()
            state = work.prefill(backbone).state
            _, tokens, new = work.events(backbone.n_items)
            size[name] = int(state.nbytes()[0])
            calls[f"{name} prefill"] = partial(work.prefill, backbone)
            calls[f"{name} append"] = partial(backbone.append, state, new)
            calls[f"{name} read"] = partial(backbone.read, tokens, state)
        found = interleaved(calls, seconds=seconds, repeats=9)
    time = {call: summary(samples.cpu, work.users)["p50"] or 0.0 for call, samples in found.items()}
    return [
        f"n {length:5d}  {name:11s} {size[name]:10,} bytes"
        + "".join(
            f"  {s} {time[f'{name} {s}']:8.3f} ms x{time[f'{name} {s}'] / time[f'{MODELS[0]} {s}']:5.2f}" for s in STEPS
        )
        for name in MODELS
    ]


def report(candidates: int) -> None:
    tune_malloc()
    with threads(1):
        lines = [line for length in LENGTHS for line in measure(length, candidates)]
    print(f"\nper user, {candidates} candidates, 1 thread, load {load():.1f}; x: of {MODELS[0]}, CPU time")
    print("\n".join(f"  {line}" for line in lines))


def test_steps(benchmark) -> None:
    benchmark.pedantic(report, (100,), rounds=1)


if __name__ == "__main__":
    report(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
