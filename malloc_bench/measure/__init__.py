"""What a state costs beside its bytes: time, FLOPs, peak memory, and where that was measured."""

from malloc_bench.measure.environment import environment, load
from malloc_bench.measure.flops import closed_form, count_flops
from malloc_bench.measure.latency import Method, Models, Timing, latency, prefilled
from malloc_bench.measure.memory import peak_memory
from malloc_bench.measure.sampling import Ratio, Samples, in_rounds, interleaved, ratio, summary, threads
from malloc_bench.measure.serving import Served, requests
from malloc_bench.measure.stores import STORES, Store, StoreError
from malloc_bench.measure.workload import Workload, some_facts

__all__ = [
    "STORES", "Method", "Models", "Ratio", "Samples", "Served", "Store", "StoreError", "Timing", "Workload",
    "closed_form", "count_flops", "environment", "in_rounds", "interleaved", "latency", "load", "peak_memory",
    "prefilled", "ratio", "requests", "some_facts", "summary", "threads",
]  # fmt: skip
