"""Run a suite: plan its cells, leave out what is done, train once, compress many, keep whatever is finished."""

from __future__ import annotations

import datetime
import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from malloc_bench import measure
from malloc_bench import suite as suites
from malloc_bench.backbones import Backbone, get_backbone
from malloc_bench.cells import Cell, Part
from malloc_bench.data import Dataset, get_dataset
from malloc_bench.data.splits import Split, get_split
from malloc_bench.evaluation import Evaluation, Job, evaluate
from malloc_bench.paths import home
from malloc_bench.progress import Watch, bars
from malloc_bench.registry import load_part
from malloc_bench.results import (
    ResultsError,
    Row,
    atomic_write,
    cell_id,
    read_rows,
    remove_leftovers,
    to_parquet,
    write_per_user,
    write_row,
)
from malloc_bench.rows import accuracy, per_user
from malloc_bench.run_folder import Chunks, LockedError, locked, write_manifest
from malloc_bench.suite import Suite, load_suite
from malloc_bench.training import Fit, fit, tune_malloc

__all__ = ["LockedError", "RunResult", "compare", "reproduce", "run_suite"]


@dataclass(frozen=True)
class Planned:
    """A cell, its id, and whether a finished row of it is there."""

    cell: Cell
    id: str
    done: bool


@dataclass
class RunResult:
    """What a run came to. plan: all cells in order; estimate: seconds that the undone ones will take, roughly."""

    folder: Path
    plan: list[Planned] = field(default_factory=list)
    ok: int = 0
    skipped: int = 0
    failed: int = 0
    reused: int = 0
    seconds: float = 0.0
    estimate: float = 0.0

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0


def run_suite(
    suite: Suite | str | Path,
    out: str | Path | None = None,
    *,
    only: Mapping[str, str] | None = None,
    dry_run: bool = False,
    fresh: bool = False,
    offline: bool = False,
    device: str = "auto",
    quiet: bool = False,
) -> RunResult:
    """Run the cells of a suite that have no finished row in `out` (default `runs/<name>`); failed ones run again.

    only: restricts the cells (`suite.only`). dry_run: plan and estimate, write nothing. fresh: forget rows and
    unfinished chunks (checkpoints are kept). Raises SuiteError, DataError, LockedError, ResultsError.
    """
    suite = suite if isinstance(suite, Suite) else load_suite(suite)
    cells = suites.only(suite.cells(), only or {})
    folder = Path(out) if out is not None else Path("runs") / suite.name
    datasets = {name: get_dataset(name, offline=offline, progress=not quiet) for name in suite.datasets}
    if dry_run:
        return _plan(cells, datasets, folder, [] if fresh else read_rows(folder / "rows", quarantine=False), suite)
    started = time.perf_counter()
    with locked(folder), bars(quiet) as watch:
        remove_leftovers(folder / "rows")
        result = _plan(cells, datasets, folder, [] if fresh else read_rows(folder / "rows"), suite)
        run = _Run(suite, folder, datasets, _device(device), watch, result, fresh)
        try:
            run.all()
        finally:
            result.seconds = time.perf_counter() - started
            run.finish()
    return result


def compare(method: str, suite: str | Path, against: Sequence[str] = (), out: str | Path | None = None) -> RunResult:
    """Run a user's class (`file.py:Class`) beside the full state and the named baselines on a suite's grid.

    Uses the suite's own run folder, checkpoints and rows: only what is new is computed. A changed file is new.
    """
    name = load_part(method)
    base = load_suite(suite)
    wanted = ["full", name, *(each for each in against if each not in ("full", name))]
    parts = [each for n in wanted for each in ([p for p in base.compressors if p.name == n] or [Part(n)])]
    for part in parts:
        part.build()  # an unknown name is an error before anything runs
    return run_suite(replace(base, compressors=tuple(parts)), out)


def reproduce(run: str | Path, prefix: str) -> list[str]:
    """Compute a cell of a run again; the columns of accuracy and bytes that differ, as lines (empty: reproduced).

    Raises ValueError where no row, or more than one, has an id that begins with `prefix`.
    """
    rows = [row for row in read_rows(Path(run) / "rows", quarantine=False) if row["cell_id"].startswith(prefix)]
    if len(rows) != 1:
        raise ValueError(f"{run}: {len(rows)} rows have an id that begins with '{prefix}'; give one that is unique")
    (row,) = rows
    cell = Cell.of_row(row)
    with tempfile.TemporaryDirectory() as folder:
        run_cells([cell], Path(folder))
        (again,) = read_rows(Path(folder) / "rows")
    same = [
        name for name in row if name.startswith(("hr@", "ndcg@", "mrr", "overlap", "delta", "bytes", "ratio", "status"))
    ]
    return [f"{name}: {row[name]} then, {again[name]} now" for name in same if row[name] != again[name]]


def run_cells(cells: Sequence[Cell], folder: Path) -> RunResult:
    """Cells by themselves, without latency; used to reproduce rows."""
    first = cells[0]
    suite = Suite(
        name=first.suite,
        path=Path(first.suite),
        datasets=tuple(dict.fromkeys(cell.dataset for cell in cells)),
        tasks=tuple(dict.fromkeys(cell.task for cell in cells)),
        split=first.split,
        backbones=tuple(dict.fromkeys(cell.backbone for cell in cells)),
        compressors=tuple(dict.fromkeys(cell.compressor for cell in cells)),
        budgets=tuple(dict.fromkeys(cell.budget for cell in cells if cell.budget)),
        seeds=tuple(dict.fromkeys(cell.seed for cell in cells)),
        training=suites.Training(**first.training),
        measure=suites.Measure(latency=False, flops=False),
        filter_seen=first.filter_seen,
    )
    return run_suite(suite, folder, quiet=True)


def _plan(
    cells: Sequence[Cell], datasets: Mapping[str, Dataset], folder: Path, rows: list[Row], suite: Suite
) -> RunResult:
    finished = {row["cell_id"] for row in rows if row["status"] != "failed"}
    ids = [cell.id(datasets[cell.dataset].hash) for cell in cells]
    plan = [Planned(cell, each, each in finished) for cell, each in zip(cells, ids)]
    result = RunResult(folder, plan, reused=sum(each.done for each in plan))
    for cell, group in _groups(plan):
        data = datasets[cell.dataset]
        if not (_checkpoint(cell, data) / "fit.json").exists():
            result.estimate += data.n_events * suite.training.epochs / 20_000  # targets a second
        result.estimate += len(group) * (data.n_users * 1e-4 + suite.measure.seconds * suite.measure.latency)
    return result


def _groups(plan: Sequence[Planned]) -> list[tuple[Cell, list[Planned]]]:
    """Undone cells that share a trained backbone, with the first of them."""
    todo = [each for each in plan if not each.done]

    def key(each: Planned) -> Any:
        cell = each.cell
        return cell.dataset, cell.task, cell.split, cell.backbone, cell.seed

    return [((members := list(group))[0].cell, members) for _, group in groupby(todo, key)]


def _checkpoint(cell: Cell, dataset: Dataset) -> Path:
    """Where the trained backbone of a cell is kept, named by all that its weights depend on."""
    parts = {"data": dataset.hash, "split": cell.split, "task": cell.task, "backbone": cell.backbone.content}
    key = cell_id({**parts, "structural": None, "training": cell.training, "seed": cell.seed})
    return home() / "checkpoints" / f"{cell.dataset}-{cell.backbone.name}-{key[:16]}"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device '{name}' is not there; expected auto, cpu{', cuda' * torch.cuda.is_available()}")
    return torch.device(name)


class _Run:
    """One sitting of a suite in its folder."""

    def __init__(
        self,
        suite: Suite,
        folder: Path,
        datasets: Mapping[str, Dataset],
        device: torch.device,
        watch: Watch,
        result: RunResult,
        fresh: bool,
    ) -> None:
        self.suite, self.folder, self.datasets, self.device = suite, folder, datasets, device
        self.watch, self.result, self.fresh = watch, result, fresh
        self.environment = measure.environment()
        self.fits: dict[str, Any] = {}
        tune_malloc()

    def all(self) -> None:
        for cell, group in _groups(self.result.plan):
            self.watch.group(f"{cell.dataset}, {cell.backbone.label}, seed {cell.seed}: {len(group)} cells")
            todo = [each for each in group if not self._skip(each)]
            if not todo:
                continue
            try:
                self._group(cell, todo)
            except (ResultsError, LockedError):
                raise
            except Exception:  # a group that cannot be trained is failed rows; the other groups go on
                for each in todo:
                    self._write(each, {"status": "failed", "reason": _last_line(), "traceback": traceback.format_exc()})

    def _skip(self, each: Planned) -> bool:
        why = each.cell.impossible
        if why is None:
            backbone = self._backbone(each.cell)
            why = each.cell.compressor.build().supports(backbone)
        if why is not None:
            self._write(each, {"status": "skipped", "reason": why})
        return why is not None

    def _backbone(self, cell: Cell, **changes: Any) -> Backbone:
        """Fresh weights, the same for the same seed."""
        torch.manual_seed(cell.seed)
        data = self.datasets[cell.dataset]
        return get_backbone(cell.backbone.name, data.n_items, data.has_time, **{**cell.backbone.params, **changes})

    def _group(self, cell: Cell, todo: list[Planned]) -> None:
        data = self.datasets[cell.dataset]
        split = get_split(cell.split, data)
        backbone, fitted, key = self._trained(cell, split)
        store = Chunks(self.folder / "partial" / key)
        if self.fresh:
            store.drop()
        jobs = [Job(each.id, each.cell.compressor.build(), each.cell.budget) for each in todo]
        evaluation = evaluate(
            backbone, split, jobs, seed=cell.seed, filter_seen=cell.filter_seen, store=store, report=self.watch.chunk
        )
        columns = accuracy(evaluation, [each.id for each in todo])
        resources = self._resources(cell, [job for job in jobs if job.id in columns])
        shared = {
            "params": sum(p.numel() for p in backbone.parameters()),
            "train_seconds": fitted.seconds,
            "device": str(self.device),
            "hashes": {"data": data.hash, "checkpoint": key},
        }
        for each in todo:
            self._write(
                each, {**shared, **self._outcome(each, evaluation, columns, data), **resources.get(each.id, {})}
            )
        store.drop()

    def _outcome(
        self, each: Planned, evaluation: Evaluation, columns: dict[str, dict[str, Any]], data: Dataset
    ) -> dict[str, Any]:
        if each.id in evaluation.failed:
            trace = evaluation.failed[each.id]
            return {"status": "failed", "reason": trace.strip().splitlines()[-1], "traceback": trace}
        path = f"per_user/{each.id}.parquet"
        write_per_user(self.folder / path, per_user(evaluation, each.id, data.user_ids))
        return {"status": "ok", "per_user": path, **columns[each.id]}

    def _trained(self, cell: Cell, split: Split) -> tuple[Backbone, Fit, str]:
        """The backbone of a group, trained now or before; a copy of its weights lies in the run folder."""
        folder = _checkpoint(cell, split.dataset)
        backbone = self._backbone(cell).to(self.device)
        with locked(folder, wait=True):  # two runs that need the same weights train them once
            fitted = fit(backbone, split, self.suite.training, cell.seed, folder, self.watch.fit)
        copy = self.folder / "checkpoints" / folder.name
        if not (copy / "fit.json").exists():
            copy.mkdir(parents=True, exist_ok=True)
            for name in ("model.safetensors", "fit.json"):
                shutil.copyfile(folder / name, copy / name)
        self.fits[folder.name] = asdict(fitted)
        return backbone, fitted, folder.name

    def _resources(self, cell: Cell, jobs: list[Job]) -> dict[str, dict[str, Any]]:
        """Latency, FLOPs and peak memory on the suite's fixed workload, by job id."""
        settings = self.suite.measure
        if not jobs or not (settings.latency or settings.flops):
            return {}
        self.watch.measure(len(jobs))
        workload = measure.Workload(users=settings.users, history=settings.history, candidates=settings.candidates)
        rows: dict[str, dict[str, Any]] = {job.id: {} for job in jobs}

        def longer(max_length: int) -> Backbone:
            return self._backbone(cell, max_length=max_length)

        if settings.latency:
            methods = {job.id: (job.compressor, job.budget) for job in jobs}
            for each, timing in measure.latency(
                longer, methods, workload, self.device, seconds=settings.seconds
            ).items():
                rows[each] |= {**timing.columns(), "threads": timing.threads, "load": timing.load}
                atomic_write(self.folder / "latency" / f"{each}.json", json.dumps(asdict(timing)).encode())
        if settings.flops:
            backbone = longer(workload.max_length).to(self.device).eval()
            for job in jobs:
                rows[job.id] |= _costs(backbone, job, workload)
        return rows

    def _write(self, each: Planned, columns: Mapping[str, Any]) -> None:
        cell = each.cell
        environment = self.environment
        row: Row = {
            "cell_id": each.id,
            "suite": cell.suite,
            "dataset": cell.dataset,
            "task": cell.task,
            "split": cell.split,
            "backbone": cell.backbone.name,
            "backbone_params": cell.backbone.params,
            "family": cell.compressor.family,
            "compressor": cell.compressor.name,
            "compressor_params": cell.compressor.params,
            "structural": False,
            "budget": cell.budget_text,
            "seed": cell.seed,
            "git_commit": environment.get("git_commit"),
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "cell": cell.payload(),
            "versions": {name: environment.get(name) for name in ("malloc_bench", "python", "torch", "numpy")},
            "hardware": {name: environment.get(name) for name in ("cpu", "cores", "memory_bytes", "gpu")},
            **columns,
        }
        write_row(self.folder / "rows", row)
        count = str(columns["status"])
        setattr(self.result, count, getattr(self.result, count) + 1)

    def finish(self) -> None:
        """The derived table and the manifest, also after an interrupt."""
        if any((self.folder / "rows").glob("*.json")):
            to_parquet(self.folder)
        before = _read_json(self.folder / "manifest.json")
        sets = {
            name: {"hash": data.hash, "source": data.source, "has_time": data.has_time, "users": data.n_users,
                   "items": data.n_items, "events": data.n_events}
            for name, data in self.datasets.items()
        }  # fmt: skip
        sitting = {
            "seconds": round(self.result.seconds, 1),
            **{name: getattr(self.result, name) for name in ("ok", "skipped", "failed", "reused")},
            "environment": self.environment,
        }
        manifest = {
            "suite": {"name": self.suite.name, "text": _text(self.suite.path)},
            "datasets": {**before.get("datasets", {}), **sets},
            "checkpoints": {**before.get("checkpoints", {}), **self.fits},
            "sittings": [*before.get("sittings", []), sitting],
        }
        write_manifest(self.folder, manifest)


@torch.inference_mode()
def _costs(backbone: Backbone, job: Job, workload: measure.Workload) -> dict[str, Any]:
    """FLOPs per user by formula, and the peak of what compressing and reading a batch allocates."""
    prefill = workload.prefill(backbone, job.compressor.needs)
    _, tokens, _ = workload.events(backbone.n_items, next(backbone.parameters()).device)

    def work() -> Any:
        state = job.compressor.compress(prefill, job.budget)
        backbone.read(tokens, state)
        return state

    state, peak = measure.peak_memory(work, next(backbone.parameters()).device)
    return {**measure.closed_form(backbone, job.compressor, state, workload), "peak_bytes": peak}


def _last_line() -> str:
    return traceback.format_exc().strip().splitlines()[-1]


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
