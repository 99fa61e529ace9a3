"""What two workers gain, and what limits cost, by the command as a user types it. `make bench`, or by itself:

    python benchmarks/bench_workers.py [--data ml-1m] [--rounds 3]

One suite, its two trainings done before: SASRec and HSTU, METHODS at four budgets on ml-1m, latency off. Run whole by
one worker, by two, and by one under `limits`, in turn, into new folders; each process has one thread. Wall seconds from
the start of the command to its end, loading and reporting among them, and their ratios: medians over rounds, and [the
least, the most]. Goals: two workers at least 1.6 times as fast as one, limits at most 2 %. Nothing else may run beside
it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import yaml

from malloc_bench.measure import load

METHODS = [
    "full", "none", "recent", "random", "knorm", "keydiff", "lagkv", "h2o", "tova", "snapkv", "scissorhands", "vatp",
    "expected_attention", "leverage", "merge_adjacent", "tome", "kmeans", "kvmerger", "d2o", "fit_constant", "svd",
]  # fmt: skip
WAYS = {
    "1 worker": ({}, 1),
    "2 workers": ({}, 2),
    "1 worker, limits": ({"limits": {"seconds": 600, "memory": "8GB"}}, 1),
}


def suite(data: str) -> dict:
    return {
        "name": "workers",
        "datasets": [data],
        "tasks": ["retrieval"],
        "split": "leave_one_out",
        "backbones": [{name: {"layers": 2, "dim": 50, "max_length": 200}} for name in ("sasrec", "hstu")],
        "compressors": [*METHODS, {"compose": [["recent", "h2o", "merge_adjacent", "kmeans"], "kivi"]}],
        "budgets": [0.5, 0.25, 0.125, 0.0625],
        "seeds": [0],
        "training": {"epochs": 1, "amp": "fp32"},
        "measure": {"latency": False, "flops": False},
    }


def seconds(folder: Path, given: dict, workers: int, name: str) -> float:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(given))
    command = [sys.executable, "-m", "malloc_bench.cli", "run", str(path), "--out", str(folder / name)]
    began = time.perf_counter()
    done = subprocess.run([*command, "--workers", str(workers)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - began


def report(data: str = "ml-1m", rounds: int = 3) -> None:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"), "1")
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as place:
        os.environ |= {**threads, "MALLOC_BENCH_HOME": str(Path(place) / "home")}
        seconds(Path(place), suite(data), 1, "first")  # trains, and compiles what is compiled
        for turn in range(rounds):
            for way, (more, workers) in WAYS.items():
                found[way].append(seconds(Path(place), suite(data) | more, workers, f"{way} {turn}".replace(" ", "-")))
    one = found["1 worker"]
    print("# Two workers, and what limits cost, by `python benchmarks/bench_workers.py`\n")
    print(f"{os.cpu_count()} cores, one thread a process, load {load():.1f}; wall seconds, medians of {rounds} runs")
    print("and of the ratios of each round [the least, the most]\n")
    for way, each in found.items():
        shares = [a / b for a, b in zip(one, each)]
        spread = f"[{min(shares):.2f}, {max(shares):.2f}]"
        print(f"- {way:18s} {median(each):7.1f} s   {median(shares):.2f} x as fast as one {spread}")


def test_workers(benchmark) -> None:
    benchmark.pedantic(report, rounds=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="ml-1m")
    parser.add_argument("--rounds", type=int, default=3)
    report(**vars(parser.parse_args()))
