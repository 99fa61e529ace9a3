"""What a run will do: its cells, which of them are done, which share a trained backbone, and how long it may take."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from malloc_bench.data import Dataset
from malloc_bench.evaluation.drift import UPDATES, USERS
from malloc_bench.paths import home
from malloc_bench.results import Row, cell_id, digest, spoilt
from malloc_bench.suite.cells import Cell
from malloc_bench.suite.file import Measure
from malloc_bench.suite.suite import Suite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A cell, its id, and whether a finished row of it is there."""

    cell: Cell
    id: str
    done: bool


@dataclass(frozen=True)
class Cost:
    """Seconds that a group of cells will take, roughly; epochs: of training that are still to be run."""

    train: float
    evaluate: float
    measure: float
    epochs: int = 0
    drift: float = 0.0

    @property
    def total(self) -> float:
        return self.train + self.evaluate + self.drift + self.measure


@dataclass
class RunResult:
    """What a run came to. plan: all cells in order; costs: of each group of undone ones that can be run, by

    `group_key`; probe: seconds that this machine was probed for them, None: they are rough; times: wall-clock seconds
    of training, evaluation and measuring; written: the status of each row of this run, by cell id.
    """

    folder: Path
    plan: list[Planned] = field(default_factory=list)
    ok: int = 0
    skipped: int = 0
    failed: int = 0
    reused: int = 0
    seconds: float = 0.0
    costs: dict[Any, Cost] = field(default_factory=dict)
    probe: float | None = None
    times: dict[str, float] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)

    def add(self, cell_id: str, status: str) -> None:
        """A row has been written, or written again."""
        if was := self.written.get(cell_id):
            setattr(self, was, getattr(self, was) - 1)
        self.written[cell_id] = status
        setattr(self, status, getattr(self, status) + 1)

    @property
    def estimate(self) -> float:
        """Seconds that all undone cells will take."""
        return sum(each.total for each in self.costs.values())

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0


def make_plan(
    cells: Sequence[Cell], datasets: Mapping[str, Dataset], folder: Path, rows: list[Row], suite: Suite
) -> RunResult:
    """Cells, settled, with which of them have a finished row in `folder`, whose files are still what was written."""
    known = {row["cell_id"]: row for row in rows}
    plan = [
        Planned(cell, each := cell.id, cell.data is not None and _finished(known.get(each), folder, suite, cell))
        for cell in cells
    ]
    result = RunResult(folder, plan, reused=sum(each.done for each in plan))
    counted: set[Path] = set()  # several groups may share a checkpoint: the first of them trains it
    for cell, group in groups([each for each in plan if not each.cell.impossible]):
        data = datasets[cell.dataset]
        needed = {checkpoint_folder(each): _epochs(each) for each in (cell.plain, *(member.cell for member in group))}
        left = {each: n for each, n in needed.items() if each not in counted and not (each / "fit.json").exists()}
        counted |= left.keys()
        epochs = sum(left.values())
        timed = sum(suite.measure.covers(member.cell.budget) for member in group)
        passes = cell.split.passes if cell.split else 1
        train = epochs * passes * data.n_events / 20_000  # targets a second
        judge = 2 + len(group) * data.n_users * 5e-4
        asked = request_seconds(suite.measure) * (suite.measure.store is not None)
        measured = timed * (2 * suite.measure.seconds * suite.measure.latency + asked)
        # a state is compressed twice, then updated by one event or block of events after another
        updates = sum(min(n, UPDATES) + 2 for n in suite.measure.drift) * min(USERS, data.n_users)
        result.costs[group_key(cell)] = Cost(train, judge, measured, epochs, timed * updates * 5e-4)
    return result


def request_seconds(measure: Measure, sampling: float = 15.0) -> float:
    """Of one cell's requests, by each number of candidates; sampling: until enough were taken for a p99."""
    taken = max(measure.seconds, min(30 * measure.seconds, sampling))
    return len(measure.candidates) * (taken + 2 * measure.seconds + 1)  # then at 1 and 2 clients


def _epochs(cell: Cell) -> int:
    """Of the training that a cell needs."""
    part = cell.compressor.build().structural
    return part.finetune if part and part.finetune else int(cell.training["epochs"])


def _finished(row: Row | None, folder: Path, suite: Suite, cell: Cell) -> bool:
    if row is None or row["status"] == "skipped":
        return row is not None
    if not _complete(row, suite, cell):
        return False
    if bad := spoilt(folder, row):
        log.warning("%s is not what was written: its cell is computed again", folder / bad)
    return not bad


def _complete(row: Row, suite: Suite, cell: Cell) -> bool:
    """Whether an ok row also has what the suite wants measured: that may have been off, or done on another workload."""
    measure = suite.measure
    lacks_drift = any(row.get(f"drift_users@{n}") is None for n in measure.drift)
    if row["status"] == "ok" and lacks_drift and measure.covers(cell.budget):
        return False
    if row["status"] == "ok" and measure.loss and cell.task.name == "retrieval" and row.get("loss") is None:
        return False
    wanted = ["read_ms_p50"] * measure.latency + ["peak_bytes"] * measure.flops
    wanted += ["request_ms_p50"] * (measure.store is not None)
    if row["status"] != "ok" or not wanted or not measure.covers(cell.budget):
        return row["status"] == "ok"
    same = row.get("measured_users") == measure.users and row.get("measured_candidates") == measure.candidates[0]
    if measure.store is not None:
        asked = {str(c) for c in measure.candidates}
        same = same and row.get("store") == measure.store and (row.get("requests") or {}).keys() >= asked
    same = same and row.get("measured_history") is not None and measure.history in (None, row["measured_history"])
    return same and all(row.get(name) is not None for name in wanted)


def groups(plan: Sequence[Planned]) -> list[tuple[Cell, list[Planned]]]:
    """Undone cells that share a trained backbone, with the first of them."""
    todo = [each for each in plan if not each.done]
    parts = (list(group) for _, group in groupby(todo, lambda each: group_key(each.cell)))
    return [(members[0].cell, members) for members in parts]


def group_key(cell: Cell) -> Any:
    """What cells of one group have in common."""
    return cell.dataset, cell.task, cell.split, cell.backbone, cell.seed


def partial_name(cell: Cell) -> str:
    """Of the folder of unfinished chunks of a cell's group."""
    asked = "" if cell.task == cell.task.trained else f"-{digest(cell.task.value())[:8]}"
    return checkpoint_folder(cell.plain).name + ("" if cell.evaluate == "test" else f"-{cell.evaluate}") + asked


def checkpoint_folder(cell: Cell) -> Path:
    """Where the trained backbone of a settled cell, adapted or not, is kept: named by all its weights depend on."""
    assert cell.data is not None, "settled when the run began"
    parts: dict[str, Any] = {
        "data": cell.data,
        "split": cell.split and cell.split.trained.value(),
        "task": cell.task.trained.value(),
        "backbone": cell.backbone.content,
    }
    if not cell.filter_seen:  # the best epoch was chosen so
        parts["filter_seen"] = False
    structural = cell.compressor.structural
    key = cell_id({**parts, "structural": structural, "training": cell.training, "seed": cell.seed})
    return home() / "checkpoints" / f"{cell.dataset}-{cell.backbone.name}-{key[:16]}"
