"""What a read costs over a full state of 4,000 events and over smaller ones. `make bench`, or by itself:

    python benchmarks/bench_read.py [sasrec|hstu] [candidates]

Each method's read is timed in turns with a read of the full state, one thread, and the ratio is of those two medians:
below 1 is faster than full. FLOPs are the closed form's. Weights do not matter to time, so none are trained.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.measure import Workload, closed_form, interleaved, load, summary, threads
from malloc_bench.training.fit import tune_malloc

CELLS = [
    ("full", {}, None),
    ("recent", {}, 0.25),
    ("kivi", {"bits": 4}, None),
    ("kivi", {"bits": 2}, None),
    ("svd", {}, 0.25),
]
WORK = Workload(users=4, history=4000)


def measure(name: str, candidates: int, seconds: float = 2.0) -> list[str]:
    """A table: milliseconds a user of a read, its ratio to full in wall and CPU time, in FLOPs and in bytes."""
    tune_malloc()
    work, lines = replace(WORK, candidates=candidates), []
    with threads(1), torch.no_grad():  # not inference mode: methods may fit by gradient
        backbone = get_backbone(name, 3706, max_length=work.max_length).eval()
        _, tokens, _ = work.events(backbone.n_items)
        full = work.prefill(backbone)
        for method, params, fraction in CELLS:
            compressor = get_compressor(method, **params)
            state = compressor.compress(full, Budget(fraction) if fraction else None)
            reads = {
                "full": lambda: backbone.read(tokens, full.state),
                "cell": lambda state=state: backbone.read(tokens, state),
            }
            found = interleaved(reads, seconds=seconds, repeats=20)
            wall = {key: summary(each.wall, work.users)["p50"] or 0 for key, each in found.items()}
            cpu = {key: summary(each.cpu, work.users)["p50"] or 0 for key, each in found.items()}
            flops = [closed_form(backbone, compressor, s, work)["read_flops"] or 0 for s in (state, full.state)]
            size = int(state.nbytes().sum()) / int(full.state.nbytes().sum())
            label = " ".join([method, *(f"{k}={v}" for k, v in params.items()), f"{fraction:.0%}" if fraction else ""])
            lines.append(
                f"{label:14s} {wall['cell']:8.3f} ms  x{wall['cell'] / wall['full']:5.2f} wall"
                f"  x{cpu['cell'] / cpu['full']:5.2f} CPU  x{flops[0] / flops[1]:5.2f} FLOPs"
                f"  x{size:5.2f} bytes  ({len(found['cell'])} samples)"
            )
    return lines


def report(name: str, candidates: int) -> None:
    lines = measure(name, candidates)
    print(
        f"\nread of {candidates} candidates over {WORK.history} events, {name}, per user; 1 thread, load {load():.1f}"
    )
    print("\n".join(f"  {line}" for line in lines))


@pytest.mark.parametrize("candidates", [1, 100])
@pytest.mark.parametrize("name", ["sasrec", "hstu"])
def test_read(benchmark, name: str, candidates: int) -> None:
    benchmark.pedantic(report, (name, candidates), rounds=1)


if __name__ == "__main__":
    report(sys.argv[1] if len(sys.argv) > 1 else "sasrec", int(sys.argv[2]) if len(sys.argv) > 2 else 1)
