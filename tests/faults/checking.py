"""What a hurt run has left: rows lost, changed or silently wrong, tracebacks, hangs, leftovers."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hurting import Fault
from trial import Ended, Trial, processes

from malloc_bench.results import read_row

#: columns of time, where and when: all that may differ, but not whether there is a value
TIMES = (
    "git_commit", "_ms_", "read_ratio", "request", "timing", "created_at", "digest", "seconds", "load", "hardware",
    "versions", "peak_bytes",
)  # fmt: skip

ELSEWHERE = ("second/", "run.away/", "home.away/")  # what a fault itself has put beside the run
Rows = dict[str, dict[str, Any]]


def rows(run: Path) -> Rows:
    """The sound rows of a run folder."""
    found = {path.name: read_row(path) for path in sorted((run / "rows").glob("*.json"))}
    return {name: row for name, (row, fault) in found.items() if not fault}


def judged(row: dict[str, Any], costs: tuple[str, ...]) -> dict[str, Any]:
    """What a row says; of times, whether it has them."""
    hashes = {key: value for key, value in (row["hashes"] or {}).items() if key != "files"}
    depends = "_ms_p95", "_ms_p99"  # there only with enough samples
    kept = {name: value for name, value in row.items() if not name.startswith(costs) and not name.endswith(depends)}
    return {
        name: value is not None if any(word in name for word in TIMES) else value for name, value in kept.items()
    } | {"hashes": hashes}


def unmeasured(row: dict[str, Any]) -> bool:
    """Whether it says that its requests could not be measured: the next run tries again."""
    return str(row["request_timing"]).startswith("failed: ")


def same(one: Any, other: Any) -> bool:
    """Numbers to rounding: sums over users depend on how many cells were summed beside them."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    return bool(one == other)


def differing(found: Rows, want: Rows, renamed: bool = False) -> Iterator[str]:
    """renamed: the suite that made a row may have had another name."""
    for name in found.keys() & want.keys():
        costs = ("request",) * unmeasured(found[name]) + ("suite",) * renamed
        one, other = judged(found[name], costs), judged(want[name], costs)
        if not same(one, other):
            yield f"{name[:12]}: " + ", ".join(
                f"{key} {str(one.get(key))[:300]} for {str(other.get(key))[:80]}"
                for key in sorted(one.keys() | other.keys())
                if not same(one.get(key), other.get(key))
            )


def names(folder: Path) -> set[str]:
    """Files below a folder, but for what a run sets aside, and locks."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if path.name != "lock" and "quarantine" not in path.parts}


def after_the_hurt(fault: Fault, trial: Trial, ended: Ended, want: Rows) -> Iterator[tuple[str, str]]:
    """(kind, what) of all that a hurt run did wrong."""
    if ended.code is None:
        yield "hung", ended.said[-500:]
    if "Traceback" in ended.said or "Exception ignored" in ended.said:
        yield "traceback", ended.said[-3000:]
    if (ended.code or 0) < 0 and ended.code not in (-signal.SIGKILL, -signal.SIGTERM):
        yield "crashed", f"{ended.code}: {ended.said[-500:]}"
    if ended.code == 2 and not ended.said.strip().rpartition("\n")[2].startswith("malloc-bench: "):
        yield "not one line", ended.said[-500:]
    if fault.heals and ended.code != 0:
        yield "given up", f"{ended.code}: {ended.said[-1000:]}"
    if fault.another:
        return
    found = rows(trial.folder / ended.run)
    for line in differing({n: r for n, r in found.items() if r["status"] == "ok"}, want):
        yield "silently wrong", line
    said = " cells are skipped: " in ended.said  # as data cannot be had; the next run tries again
    if ended.code == 0 and found.keys() != want.keys() and not said:
        yield "silently lost", f"exit code 0 with {len(found)} of {len(want)} rows: {ended.said[-500:]}"


def kept(trial: Trial) -> dict[str, bytes]:
    """The sound rows that lie there, byte for byte."""
    return {name: (trial.folder / "run" / "rows" / name).read_bytes() for name in rows(trial.folder / "run")}


def after_the_next(
    fault: Fault, trial: Trial, ended: Ended, before: dict[str, bytes], want: Rows, spoilt: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """(kind, what) of all that is not as if nobody had hurt the run. spoilt: names, one of which is told where finished
    rows are computed again."""
    if ended.code != 0:
        kind = "hung" if ended.code is None else "traceback" if "Traceback" in ended.said else "not mended"
        yield kind, f"{ended.code}: {ended.said[-3000:]}"
        return
    if "Traceback" in ended.said or "Exception ignored" in ended.said:
        yield "traceback", ended.said[-3000:]
    assert trial.whole is not None
    found = rows(trial.folder / "run")
    if missing := want.keys() - found.keys():
        yield "lost", f"{len(missing)} rows"
    if (more := found.keys() - want.keys()) and not fault.another:
        yield "leftovers", f"{len(more)} rows of no cell"
    for line in differing(found, want, renamed=fault.another):
        yield "changed", line
    if failed := [str(row["request_timing"]) for row in found.values() if unmeasured(row)]:
        yield "lost", f"requests are not measured: {failed[0]}"
    anew = [each for each, data in before.items() if each in want and _made_anew(trial, each, data)]
    if anew and (fault.lasting or not any(name in ended.said for name in spoilt)):
        yield "lost", f"{len(anew)} finished rows were computed again, {spoilt}: {ended.said[-1500:]}"
    left = {each for each in names(trial.folder) - names(trial.whole) if not each.startswith(ELSEWHERE)}
    left -= {each for each in left if _of_python(trial.folder, each)}
    if left and not fault.another:
        yield "leftovers", ", ".join(sorted(left)[:5])
    gone = {each for each in names(trial.whole) - names(trial.folder) if each.startswith("run/")}
    if not fault.lasting:  # it may have taken the weights of rows that are all there
        gone = {each for each in gone if not each.startswith("run/checkpoints/")}
    if gone:
        yield "lost", f"{len(gone)} files: {', '.join(sorted(gone)[:5])}"
    if still := _alive(trial.folder):
        yield "leftovers", f"{len(still)} processes"


def _of_python(folder: Path, name: str) -> bool:
    """Whether it is what `tempfile` tries the system's folder by as it is first asked for it: torch does, of itself."""
    return bool(re.fullmatch("tmp/[a-z0-9_]{8}", name)) and (folder / name).stat().st_size <= len("blat")


def _made_anew(trial: Trial, name: str, data: bytes) -> bool:
    row = json.loads(data)
    if row["status"] != "ok" or unmeasured(row):  # these are tried again
        return False
    return (trial.folder / "run" / "rows" / name).read_bytes() != data


def _alive(folder: Path, patience: float = 10.0) -> list[int]:
    """Processes that outlive their run; they are ended."""
    until = time.monotonic() + patience
    while (found := processes(folder)) and time.monotonic() < until:
        time.sleep(0.05)
    for each in found:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    return found
