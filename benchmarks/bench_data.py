"""How fast and in how much memory a KuaiRand-sized log becomes a data set. `make bench`, or by itself:

    python benchmarks/bench_data.py [events] [folder]

A log of `events` rows (5 million unless said; KuaiRand-27K has 322 million) is generated in KuaiRand's format, in three
parts, with 27,285 users in the order of time, which is the worst order for a reader that wants them by user. Then, each
in a process of its own whose peak resident memory is told: the csv is read and checked, the whole set is prepared, and
the prepared set is loaded. `folder` keeps the generated log for the next time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

USERS, ITEMS, CHUNK, PARTS = 27_285, 32_038_725, 1_000_000, 3
COLUMNS = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
KEEP = ["is_click", "is_like", "long_view", "play_time_ms", "is_rand"]
START, SPAN = 1_649_346_288_000, 2_600_000_000  # milliseconds


def generate(folder: Path, events: int) -> list[Path]:
    """The parts of the log, made where they are not there yet."""
    import numpy as np
    import polars as pl

    paths = [folder / f"log-{events}-{part}.csv" for part in range(PARTS)]
    if all(path.is_file() for path in paths):
        return paths
    rng = np.random.default_rng(0)
    activity = rng.pareto(1.5, USERS) + 0.3
    made = 0
    for part, path in enumerate(paths):
        with path.open("wb") as file:
            file.write(f"{COLUMNS}\n".encode())
            while made < events * (part + 1) // PARTS:
                n = min(CHUNK, events * (part + 1) // PARTS - made)
                times = START + SPAN * (made + np.arange(n)) // events
                play = rng.integers(0, 60_000, n)
                zero = np.zeros(n, np.int64)
                frame = {
                    "user_id": rng.choice(USERS, n, p=activity / activity.sum()),
                    "video_id": (ITEMS * rng.random(n) ** 3).astype(np.int64),
                    "date": np.full(n, 20220408),
                    "hourmin": times // 3_600_000 % 24 * 100,
                    "time_ms": times,
                    "is_click": play > 7000,
                    "is_like": play > 55_000,
                    **dict.fromkeys(("is_follow", "is_comment", "is_forward", "is_hate"), zero),
                    "long_view": play > 18_000,
                    "play_time_ms": play,
                    "duration_ms": rng.integers(1000, 300_000, n),
                    **dict.fromkeys(("profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand"), zero),
                    "tab": rng.integers(0, 15, n),
                }
                table = pl.DataFrame(frame).with_columns(pl.col(pl.Boolean).cast(pl.Int8))
                table.write_csv(file, include_header=False)
                made += n
    return paths


def work(step: str, folder: str, paths: list[str]) -> None:
    """One step, in a process of its own: prints its seconds, events and peak resident memory."""
    import resource

    import polars as pl
    import pyarrow.parquet  # noqa: F401

    from malloc_bench.data.cache import make, read
    from malloc_bench.data.formats.formats import LAYOUTS
    from malloc_bench.data.formats.parse import Reader
    from malloc_bench.data.formats.policies import Judge
    from malloc_bench.data.prepare import prepare
    from malloc_bench.data.sources.archive import open_parts
    from malloc_bench.data.sources.cards import Card

    words = dict.fromkeys(("title", "description", "licence", "citation", "homepage"), "-")
    card = Card(name="bench", family="bench", format="kuairand-log", sources=[{"local": "log.csv"}], **words)  # type: ignore[list-item]
    target = Path(folder) / "prepared"
    reader = Reader(LAYOUTS["kuairand-log"], Judge({}), KEEP)
    pl.scan_csv(b"1,2\n", has_header=False).collect()  # what importing and starting costs is no rate
    begun = time.perf_counter()
    with open_parts([Path(path) for path in paths]) as parts:
        if step == "read":
            events = sum(len(frame) for frame in reader.frames(parts))
        elif step == "prepare":
            events = make(card, target, "bench", lambda to: prepare(reader.frames(parts), reader, to)).n_events
        else:
            events = read(card, target, target, "bench").n_events
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    print(json.dumps({"events": events, "seconds": seconds, "cpu": cpu, "peak": peak}))


def report(events: int, folder: Path) -> None:
    paths = [str(path) for path in generate(folder, events)]
    size = sum(Path(path).stat().st_size for path in paths)
    print(f"\n{events:,} events in KuaiRand's format, {size / 1e9:.2f} GB of csv, {len(KEEP)} feedback columns kept")
    for step in ("read", "prepare", "load"):
        command = [sys.executable, __file__, "--step", step, str(folder), *paths]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        told = json.loads(done.stdout)
        rate = told["events"] / told["seconds"] / 1e6
        print(
            f"  {step:8s} {told['seconds']:7.1f} s ({told['cpu']:.1f} s of CPU)  {rate:6.2f} million events/s"
            f"  peak {told['peak'] / 1e9:.2f} GB"
        )


def test_data(benchmark, tmp_path: Path) -> None:
    benchmark.pedantic(report, (5_000_000, tmp_path), rounds=1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        work(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            where = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(temporary)
            report(int(sys.argv[1]) if len(sys.argv) > 1 else 5_000_000, where)
