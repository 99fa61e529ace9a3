"""What a state costs beside its bytes: time, FLOPs, peak memory, and where that was measured."""

from malloc_bench.measure.environment import environment, load
from malloc_bench.measure.flops import closed_form, count_flops
from malloc_bench.measure.latency import Samples, Timing, Workload, adapted, interleaved, latency, summary, threads
from malloc_bench.measure.memory import peak_memory

__all__ = [
    "Samples", "Timing", "Workload", "adapted", "closed_form", "count_flops", "environment", "interleaved", "latency",
    "load", "peak_memory", "summary", "threads",
]  # fmt: skip
