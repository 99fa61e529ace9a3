"""Slurm: a suite as an array of shards, handed in by submitit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from malloc_bench.registry import in_a_line
from malloc_bench.run.executors.base import WorkerError
from malloc_bench.suite.suite import load_suite


@dataclass(frozen=True)
class Shard:
    """A command as a job; whose time is over, or whose machine is taken, goes on when it is queued again."""

    words: tuple[str, ...]

    def __call__(self) -> None:
        subprocess.run(self.words, check=True)

    def checkpoint(self) -> Any:
        """What submitit queues again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    suite: str,
    n: int,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    options: Sequence[str] = (),
    cluster: str = "slurm",
) -> tuple[list[Any], list[Path]]:
    """The jobs, of submitit, and the run folders of `n` shards: `run SUITE --shard i/n` with more options each.

    out: folders are named after it, OUT-iofN (default: runs/NAME), and logs are in OUT-jobs. settings: of
    `submitit.AutoExecutor`, as timeout_min or slurm_partition. cluster: slurm, or local: processes of this machine.
    Raises SuiteError, ValueError, and WorkerError where submitit is missing or there is no such cluster.
    """
    found = load_suite(suite)
    try:
        import submitit
    except ImportError:
        raise WorkerError("submitit is not installed: pip install 'malloc-bench[slurm]'") from None
    if not 1 <= n <= (most := len(found.cells())):
        raise ValueError(f"tasks {n}: {found.name} has {most} cells, expected from 1 to as many tasks")
    base = Path("runs") / found.name if out is None else Path(out)
    if base.is_file():
        raise ValueError(f"--out {base}: is a file; expected the name of a folder: choose another")
    parts = [Path(f"{base}-{i}of{n}") for i in range(1, n + 1)]
    words = [sys.executable, "-m", "malloc_bench.cli", "run", suite, "--quiet", *options]
    try:
        executor = submitit.AutoExecutor(f"{base}-jobs", cluster)
        executor.update_parameters(**{"name": found.name, **(settings or {})})
    except (RuntimeError, NameError, AssertionError, ValueError) as error:
        raise WorkerError(in_a_line(error)) from None
    with executor.batch():
        jobs = [
            executor.submit(Shard((*words, "--shard", f"{i}/{n}", "--out", str(part))))
            for i, part in enumerate(parts, 1)
        ]
    return jobs, parts
