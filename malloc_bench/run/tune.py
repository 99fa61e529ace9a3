"""Choose the parameters of every method of a suite on validation targets, each over as many settings at most."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from malloc_bench.files import canonical_json
from malloc_bench.registry import suggest
from malloc_bench.results import read_rows
from malloc_bench.run.runner import run_suite
from malloc_bench.suite.cells import Part
from malloc_bench.suite.plan import RunResult
from malloc_bench.suite.suite import SuiteError, load_suite
from malloc_bench.suite.tuning import Choice, derived, trials, write

log = logging.getLogger(__name__)

METRICS = ("overlap@10", "ndcg@10", "hr@10", "mrr", "agreement", "auc", "gauc")


@dataclass
class Tuning:
    """What tuning came to: the run of all trials, the choices, and the file that has them (None: a dry run)."""

    result: RunResult
    chosen: list[Choice]
    path: Path | None


def tune(
    suite: str | Path,
    out: str | Path | None = None,
    *,
    metric: str | None = None,
    per_budget: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> Tuning:
    """Run every method's trials on validation targets and write `<out>/tuned.yaml`; out: default `runs/<name>-tune`.

    The setting with the best mean of the metric over budgets and seeds (per_budget: over seeds, for each budget by
    itself) is chosen for each data set, task, split and backbone; at a tie, what the suite has. metric: overlap@10, or
    agreement in ranking, unless named. A method whose size follows from its parameters may not grow: its trials count
    where they are no larger than it is. options: as `run_suite` has them. Raises as `run_suite`, and SuiteError where
    no trial has a result: what was chosen before stays.
    """
    if metric is not None and metric not in METRICS:
        raise SuiteError(f"--metric {metric}: nothing is tuned by it.{suggest(metric, METRICS)}")
    base = load_suite(suite)
    asked = derived(base)
    result = run_suite(asked, out, dry_run=dry_run, **options)
    if dry_run:
        return Tuning(result, [], None)
    rows = {row["cell_id"]: row for row in read_rows(result.folder / "rows", quarantine=False)}
    tried = [rows[each.id] for each in result.plan if each.id in rows]
    if tried and all(row["status"] != "ok" for row in tried):
        raise SuiteError(f"{suite}: nothing is tuned, for no trial has a result: {tried[0]['reason']}")
    chosen = [each for part in base.compressors for each in _chosen(part, result, rows, metric, per_budget)]
    path = result.folder / "tuned.yaml"
    write(path, str(suite), metric or "overlap@10, agreement in ranking", chosen)
    return Tuning(result, chosen, path)


def _chosen(
    part: Part, result: RunResult, rows: Mapping[str, Mapping[str, Any]], metric: str | None, per_budget: bool
) -> list[Choice]:
    """The best trial of a compressor wherever it was tried."""
    found = trials(part)
    tried = {canonical_json(each.content): place for place, each in enumerate(found)}
    if len(found) < 2:
        return []
    places: dict[Any, dict[int, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for each in result.plan:
        cell, place = each.cell, tried.get(canonical_json(each.cell.compressor.content))
        if place is not None and each.id in rows:
            where = cell.dataset, cell.task.label, cell.split and cell.split.label, cell.backbone.label
            places[where, cell.budget_text if per_budget else None][place].append(rows[each.id])
    choices = []
    for (names, budget), by_trial in places.items():
        at = dict(zip(("dataset", "task", "split", "backbone"), names))
        scores = {place: score for place in by_trial if (score := _score(by_trial[place], metric)) is not None}
        if not part.build().takes_budget:
            most = _size(by_trial[0])
            scores = {place: score for place, score in scores.items() if _size(by_trial[place]) <= most}
        if 0 not in scores:  # skipped here, or failed: there is nothing to be better than
            continue
        best = max(sorted(scores), key=scores.__getitem__)
        score, default = (round(scores[place], 6) for place in (best, 0))
        about = {"compressor": part.label, "budget": budget, "use": {found[best].name: found[best].params}}
        choices.append(Choice(**at, **about, score=score, default=default, trials=len(scores)))
    return choices


def _score(rows: Sequence[Mapping[str, Any]], metric: str | None) -> float | None:
    """The mean over budgets and seeds; None where some cell has no value, for a mean of others would not compare."""
    values = [row[metric or ("overlap@10" if row["overlap@10"] is not None else "agreement")] for row in rows]
    return None if None in values else sum(values) / len(values)


def _size(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(row["bytes_mean"] or 0.0 for row in rows)
