"""How the cost of making a state grows with the history: Climber against the plain transformer. Or by itself:

    python benchmarks/bench_climber.py [longest history]

One user, one thread. Climber of one block is the plain transformer with the same layers, and SASRec stands beside it
(its fused kernel has no bias). FLOPs are those of the blocks as the item hash fills them. Weights do not matter.
"""

from __future__ import annotations

import sys

import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.measure import Workload, interleaved, load, summary, threads

MODELS = [("sasrec", {}), *(("climber", {"blocks": n}) for n in (1, 2, 4, 8))]


def measure(longest: int, seconds: float = 0.3) -> list[str]:
    """A line for each length and model: milliseconds and MFLOPs of a prefill, as shares of Climber with one block."""
    lines, length = [], 256
    while length <= longest:
        work = Workload(users=1, history=length)
        with threads(1), torch.inference_mode():
            makers = {
                "-".join([name, *map(str, params.values())]): get_backbone(name, 3706, max_length=length + 1, **params)
                for name, params in MODELS
            }
            full = {label: work.prefill(backbone.eval()).state for label, backbone in makers.items()}
            steps = {label: lambda work=work, backbone=b: work.prefill(backbone) for label, b in makers.items()}
            flops = {
                label: b.flops("prefill", length, full[label] if b.name == "climber" else None) or 0
                for label, b in makers.items()
            }
            found = interleaved(steps, seconds=seconds, repeats=3)
        time = {label: summary(samples.cpu, 1)["p50"] or 0.0 for label, samples in found.items()}
        for label in makers:
            lines.append(
                f"n {length:5d}  {label:10s} {time[label]:9.2f} ms CPU  x{time[label] / time['climber-1']:5.2f}"
                f"  {flops[label] / 1e6:9.1f} MFLOPs  x{flops[label] / flops['climber-1']:5.2f}"
            )
        length *= 2
    return lines


def report(longest: int) -> None:
    lines = measure(longest)
    print(f"\nprefill of one user, 1 thread, load {load():.1f}; x: of Climber with one block")
    print("\n".join(f"  {line}" for line in lines))


def test_prefill(benchmark) -> None:
    benchmark.pedantic(report, (4096,), rounds=1)


if __name__ == "__main__":
    report(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
