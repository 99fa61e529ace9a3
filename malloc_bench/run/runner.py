"""Run a suite: plan its cells, leave out what is done, train once, compress many, keep whatever is finished."""

from __future__ import annotations

import logging
import math
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from malloc_bench.data import DataError, Dataset, get_dataset
from malloc_bench.files import ResultsError
from malloc_bench.measure import STORES
from malloc_bench.measure.environment import cores
from malloc_bench.registry import load_part, suggest
from malloc_bench.report import get_ready, write_report
from malloc_bench.results import COLUMNS, Row, differing, read_rows, rows_of
from malloc_bench.run.estimate import probed
from malloc_bench.run.executors.cluster import Cluster
from malloc_bench.run.executors.local import Local
from malloc_bench.run.executors.promises import broken_within
from malloc_bench.run.folder import Chunks, LockedError, kept_whole, locked, read_manifest, remove_dead, remove_partial
from malloc_bench.run.progress import watching
from malloc_bench.run.rows import ask_again
from malloc_bench.run.session import Session
from malloc_bench.suite import suite as suites
from malloc_bench.suite.cells import Cell, Part
from malloc_bench.suite.plan import RunResult, groups, make_plan, partial_name
from malloc_bench.suite.suite import Suite, load_suite
from malloc_bench.suite.tuning import Tuned

log = logging.getLogger(__name__)

EXECUTORS = ("local", "ray")

__all__ = ["LockedError", "RunResult", "compare", "one_row", "reproduce", "run_suite"]


def run_suite(
    suite: Suite | str | Path,
    out: str | Path | None = None,
    *,
    only: Mapping[str, str | Sequence[str]] | None = None,
    dry_run: bool = False,
    fresh: bool = False,
    offline: bool = False,
    device: str = "auto",
    quiet: bool = False,
    tuned: str | Path | None = None,
    shard: tuple[int, int] | None = None,
    workers: int = 1,
    executor: str = "local",
    address: str | None = None,
) -> RunResult:
    """Run the cells of a suite that have no finished row in `out` (default `runs/<name>`); failed ones run again.

    only: restricts the cells (`suite.only`). dry_run: plan and estimate, write nothing. fresh: forget rows and
    unfinished chunks (checkpoints are kept). Cells whose data cannot be had, or do not fit the split or the task, are
    skipped with the reason, which is also a warning; every run tries them again. tuned: a file of parameters that
    `tune` chose, in place of the suite's `tuned`; the default folder is then `runs/<name>-tuned`. shard: (i, n), only
    the i-th of n parts of the cells, from 1; `merge` makes one run of the parts. workers: processes that share the
    cells, after which one measures times; executor: local, or ray: groups are tasks of the cluster at `address` (None:
    as Ray finds it), `workers` of them at a time. Raises SuiteError, LockedError, ResultsError, WorkerError, StoreError
    where the store that requests are to be measured with is not installed.
    """
    suite = suite if isinstance(suite, Suite) else load_suite(suite)
    suite = suite if tuned is None else replace(suite, tuned=Path(tuned))
    return _run(
        suite, out, only or {}, dry_run, fresh, offline, device, quiet, not only and not shard, shard, workers,
        executor, address,
    )  # fmt: skip


def _run(
    suite: Suite,
    out: str | Path | None,
    only: Mapping[str, str | Sequence[str]],
    dry_run: bool,
    fresh: bool,
    offline: bool,
    device: str,
    quiet: bool,
    whole: bool,
    shard: tuple[int, int] | None = None,
    workers: int = 1,
    executor: str = "local",
    address: str | None = None,
) -> RunResult:
    """As `run_suite`; whole: these are all cells that the folder's suite has, so no other group's chunks are needed."""
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, not {workers}")
    if executor == "local" and workers > (most := max(16, 4 * cores())):  # each is a process, started whatever is left
        raise ValueError(f"workers {workers}: this machine has {cores()} cores, expected at most {most}")
    if executor not in EXECUTORS:
        raise ValueError(f"executor '{executor}' is not there.{suggest(executor, EXECUTORS)}")
    if address is not None and executor != "ray":
        raise ValueError(f"address {address} is of a Ray cluster: expected executor ray beside it")
    if address == "":
        raise ValueError("address: expected HOST:PORT of a Ray cluster, not nothing")
    cells = suites.only(suite.cells(), only)
    if shard is not None:
        i, n = shard
        if not 1 <= i <= n:
            raise ValueError(f"shard {i}/{n}: expected I/N with 1 <= I <= N, such as 3/16")
        if n > len(cells):
            raise ValueError(f"shard {i}/{n}: there are {len(cells)} cells, expected at most as many parts")
        cells = cells[len(cells) * (i - 1) // n : len(cells) * i // n]  # neighbours share a backbone and its prefills
    on = device_of(device)
    chosen = Tuned(suite.tuned) if suite.tuned else None
    usual = suite.name + "-tuned" * bool(chosen) + ("" if shard is None else f"-{shard[0]}of{shard[1]}")
    folder = Path(out) if out is not None else Path("runs") / usual
    kept_whole(folder)
    datasets, why = had(suite, cells, offline, quiet)
    asked, cells = cells, [settled(cell, datasets, why, on) for cell in cells]
    known = [cell for cell, now in zip(asked, cells) if now.data is not None]
    if chosen:  # what is chosen may depend on more than what it stands for
        cells = [settled(cell, datasets, why, on) for cell in chosen.applied(cells)]
    if chosen and not any(cell.tuned for cell in cells):
        log.warning("%s has nothing for any cell that was asked for", chosen.path)
    for reason, n in Counter(each.impossible for each in cells if each.data is None).items():
        log.warning("%d cells are skipped: %s", n, reason)
    if dry_run:
        rows = [] if fresh else read_rows(folder / "rows", quarantine=False)
        result = make_plan(cells, datasets, folder, rows, suite)
        result.probe = probed(result, datasets, on, suite.measure)
        return result
    if suite.measure.store is not None:
        STORES[suite.measure.store].check()  # before hours of training
    started = time.perf_counter()
    with locked(folder):
        remove_dead(folder)
        rows = read_rows(folder / "rows")
        _say_of_another(folder, suite)
        _forget(folder, rows, known)
        result = make_plan(cells, datasets, folder, [] if fresh else rows, suite)
        ask_again(folder / "rows", rows, {each.id for each in result.plan if each.done})
        undone = [cell for cell, _ in groups(result.plan) if cell.data]
        if fresh:
            for cell in undone:
                Chunks(folder / "partial" / partial_name(cell)).drop()
        if whole:
            remove_partial(folder, {partial_name(cell) for cell in undone})
        with watching(quiet, result.estimate) as watch:
            run = Session(suite, folder, datasets, on, watch, result)
            try:
                if executor == "local" and workers == 1 and suite.limits is None:
                    run.all()
                else:
                    threading.Thread(target=get_ready, daemon=True).start()
                    other = Cluster(run, watch, workers, address) if executor == "ray" else Local(run, watch, workers)
                    other.all()
            finally:
                result.seconds, result.times = time.perf_counter() - started, watch.track.times()
                run.finish()
        _check_there(folder, result)
        write_report(folder)
    return result


def _say_of_another(folder: Path, suite: Suite) -> None:
    """In a word where a folder holds a run of another suite: tables will have the rows of both."""
    known = (read_manifest(folder).get("suite") or {}).get("name")
    if known not in (None, suite.name):
        log.warning(
            "%s holds a run of %s: rows of %s go beside its own (--out chooses another)", folder, known, suite.name
        )


def _check_there(folder: Path, result: RunResult) -> None:
    """Raises ResultsError where rows are gone again, as of a folder that was moved away while the run went on."""
    had = {each.id for each in result.plan if each.done} | set(result.written)
    if gone := [each for each in had if not (folder / "rows" / f"{each}.json").exists()]:
        raise ResultsError(f"{folder}: {len(gone)} of {len(had)} rows are gone again: was it moved? Run again for them")


def had(
    suite: Suite, cells: Sequence[Cell], offline: bool, quiet: bool
) -> tuple[dict[str, Dataset], dict[str, DataError]]:
    """The data sets of some cells that can be had, and why the others cannot, by name."""
    datasets, why = {}, {}
    for name in dict.fromkeys(cell.dataset for cell in cells):
        try:
            datasets[name] = get_dataset(suite.cards.get(name, name), offline=offline, progress=not quiet)
        except DataError as error:
            why[name] = error
    return datasets, why


def settled(cell: Cell, datasets: Mapping[str, Dataset], why: Mapping[str, DataError], on: torch.device) -> Cell:
    """The cell, settled; as it is, and `impossible`, where its data cannot be had or do not fit it."""
    try:
        if cell.dataset in why:
            raise why[cell.dataset]
        return cell.settled(datasets[cell.dataset], on)
    except DataError as error:
        return replace(cell, impossible=str(error))


def _forget(folder: Path, rows: Sequence[Row], cells: Sequence[Cell]) -> None:
    """Delete the rows that these cells were skipped with while their data could not be had."""
    skipped = {row["cell_id"] for row in rows if (row["cell"] or {}).get("data", 0) is None}
    for each in skipped and skipped & {cell.id for cell in cells}:
        (folder / "rows" / f"{each}.json").unlink(missing_ok=True)


def compare(
    method: str,
    suite: str | Path,
    against: Sequence[str] = (),
    out: str | Path | None = None,
    *,
    only: Mapping[str, str | Sequence[str]] | None = None,
    dry_run: bool = False,
    fresh: bool = False,
    device: str = "auto",
) -> RunResult:
    """Run a user's class (`file.py:Class`) beside the full state, no history and the named baselines on a suite's grid.

    Uses the suite's own run folder, checkpoints and rows: only what is new is computed. A changed file is new. The
    method is checked first; where it breaks a promise of compressors, a warning and its rows' `reason` say so. only,
    dry_run, fresh, device: as in `run_suite`, all of these cells are run again with `fresh`.
    """
    name = load_part(method, "compressors")
    base = load_suite(suite)
    wanted = dict.fromkeys(["full", "none", name, *against])  # without its floor a table says nothing of headroom
    parts = [each for n in wanted for each in ([p for p in base.compressors if p.name == n] or [Part(n)])]
    for part in parts:
        part.checked()  # an unknown name is an error before anything runs
    broken = [] if dry_run else broken_within([part for part in parts if part.name == name], base.limits)
    remarks = {}
    if broken:
        remarks[name] = f"breaks {len(broken)} of the promises that `malloc-bench check` tries, such as {broken[0]}"
        log.warning("%s %s", name, remarks[name])
    asked = replace(base, compressors=tuple(parts), remarks=remarks)
    return _run(asked, out, only or {}, dry_run, fresh, False, device, False, whole=False)


def reproduce(run: str | Path, which: str | Mapping[str, Sequence[str]]) -> list[str]:
    """Compute a cell of a run (as `one_row` finds it) again; the columns of accuracy and bytes that differ, as lines

    (empty: reproduced). Accuracy agrees where it differs by less than one user's worth: the rounding of other cells in
    a batch may turn a near tie. A warning names what did. Raises ValueError.
    """
    row = one_row(run, which)
    cell = Cell.of_row(row)
    card = read_manifest(Path(run)).get("datasets", {}).get(cell.dataset, {}).get("card", cell.dataset)
    with tempfile.TemporaryDirectory() as folder:
        run_cells([cell], Path(folder), {cell.dataset: card})
        (again,) = read_rows(Path(folder) / "rows")
    if again["cell"]["data"] is None and row["cell"]["data"] is not None:
        raise DataError(again["reason"])
    if again["cell_id"] != row["cell_id"]:
        other = [f"{name}: {a} then, {b} now" for name, (a, b) in differing(row["cell"], again["cell"]).items()]
        return [f"it is another cell today: {', '.join(other)}"]
    then, now = ((each["hashes"] or {}).get("weights") for each in (row, again))
    if then and now and then != now:  # sums of another number of threads round elsewhere
        log.warning(
            "other weights, %s then, %s now: they were trained apart, on another machine or by another number of "
            "threads (OMP_NUM_THREADS), so numbers may differ by more than rounding",
            then[:12], now[:12],
        )  # fmt: skip
    numbers = ("hr@", "ndcg@", "mrr", "auc", "gauc", "logloss", "recall@", "overlap", "agreement", "logit_error")
    same = [name for name in row if name.startswith((*numbers, "delta", "bytes_", "ratio", "status"))]
    same = [name for name in same if COLUMNS[name] != "json"]  # older rows have none
    return differing_values(row, again, same)


def differing_values(row: Row, again: Row, same: Sequence[str]) -> list[str]:
    """Of some columns those that differ by more than one user's near tie, as lines; a warning names the others."""
    differs = {
        name: f"{name}: {row[name]} then, {again[name]} now" for name in same if not _equal(row[name], again[name])
    }
    exact, one = ("bytes_", "ratio", "status", "logit"), 1 / max(int(row["n_users"] or 1), 1)
    judged = [name for name in differs if not name.startswith(exact) and None not in (row[name], again[name])]
    if near := [name for name in judged if abs(row[name] - again[name]) < one]:
        log.warning("a near tie was turned by rounding: %s", "; ".join(differs.pop(name) for name in near))
    return list(differs.values())


def one_row(run: str | Path, which: str | Mapping[str, Sequence[str]]) -> Row:
    """The row of a run that is meant by the start of its id, or by what only it has, as `--only` names it.

    Raises ValueError where no row, or more than one, is meant.
    """
    try:
        every = rows_of(run)
    except FileNotFoundError as error:
        raise ValueError(f"{run} holds no rows, which say how to compute a cell again: run its suite first") from error
    if isinstance(which, str):
        rows = [row for row in every if row["cell_id"].startswith(which)]
        said = f"have an id that begins with '{which}'"
    else:
        cells = [Cell.of_row(row) for row in every]
        wanted = suites.only(cells, which)
        rows = [row for row, cell in zip(every, cells) if cell in wanted]
        said = "have " + ", ".join(f"{key}={value}" for key, values in which.items() for value in values)
    if len(rows) != 1:
        some = "".join(f"; {row['cell_id'][:12]} is {Cell.of_row(row)}" for row in rows[:3])
        raise ValueError(f"{run}: {len(rows)} rows {said}; give what is unique{some}")
    return rows[0]


def _equal(a: object, b: object) -> bool:
    """Equal, numbers to rounding: sums over users depend on how many cells were summed beside them."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return a == b


def run_cells(cells: Sequence[Cell], folder: Path, cards: Mapping[str, str] | None = None) -> RunResult:
    """Cells by themselves, without latency; used to reproduce rows. cards: as a suite has them."""
    first = cells[0]
    suite = Suite(
        name=first.suite,
        path=Path(first.suite),
        datasets=tuple(dict.fromkeys(cell.dataset for cell in cells)),
        tasks=tuple(dict.fromkeys(cell.task for cell in cells)),
        splits=tuple(dict.fromkeys(cell.split for cell in cells)),
        backbones=tuple(dict.fromkeys(cell.backbone for cell in cells)),
        compressors=tuple(dict.fromkeys(cell.compressor for cell in cells)),
        budgets=tuple(dict.fromkeys(cell.budget for cell in cells if cell.budget)),
        seeds=tuple(dict.fromkeys(cell.seed for cell in cells)),
        training=suites.Training(**first.training),
        measure=suites.Measure(latency=False, flops=False),
        filter_seen=first.filter_seen,
        cards=cards or {},
        evaluate=first.evaluate,
    )
    return run_suite(suite, folder, quiet=True)


def device_of(name: str) -> torch.device:
    """What auto, cpu or cuda stands for here; raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device '{name}' is not there; expected auto, cpu{', cuda' * torch.cuda.is_available()}")
    return torch.device(name)
