"""How long a plan will take on this machine: a few steps of training and a few users of some methods, timed."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from malloc_bench.backbones import Backbone
from malloc_bench.data import Dataset
from malloc_bench.data.tasks.impressions import Impressions, Requests
from malloc_bench.data.tasks.known import lengths
from malloc_bench.data.tasks.splits import Split, Targets
from malloc_bench.data.tasks.trained import sampled
from malloc_bench.evaluation.evaluate import Job, evaluate
from malloc_bench.evaluation.guard import undisturbed
from malloc_bench.measure.sampling import ENOUGH as ENOUGH_SAMPLES
from malloc_bench.measure.workload import Workload
from malloc_bench.run.fits import Fits
from malloc_bench.run.models import fresh
from malloc_bench.suite.cells import Cell
from malloc_bench.suite.file import Measure
from malloc_bench.suite.plan import Planned, RunResult, group_key, groups, request_seconds
from malloc_bench.training.fit import Progress, Training, fit, validation_auc, validation_ndcg

log = logging.getLogger(__name__)

ENOUGH = 120.0  # seconds of a plan's rough estimate below which it is not worth a probe
PROBE = 6.0  # seconds after which nothing more is begun
GROUPS = 4  # probed at most; others are scaled by them
STEPS = 4  # of training, the first not counted
FEW, SOME = 32, 96  # users: what is spent on each is told from what is spent once a cell, its 32 packed users included
REQUESTS = 2.5 * ENOUGH_SAMPLES  # times a read and an append: of the method and of the full state, packing and all
FITTED = 4, 8, 32  # users that methods are fitted to, the first time not counted


class _Enough(Exception):
    """The steps that were to be timed are over."""


def probed(result: RunResult, datasets: Mapping[str, Dataset], device: torch.device, asked: Measure) -> float | None:
    """Put what a short probe of this machine says in place of the plan's rough costs; the seconds that it took.

    None where the plan is short, or nothing could be timed: the costs are then as they were. asked: what the suite
    measures.
    """
    if result.estimate < ENOUGH:
        return None
    started = time.perf_counter()
    first: dict[Any, tuple[Cell, list[Planned]]] = {}  # seeds cost alike: the one with most to train
    todo = groups([each for each in result.plan if not each.cell.impossible])
    for cell, members in sorted(todo, key=lambda each: -result.costs[group_key(each[0])].train):
        first.setdefault(group_key(cell)[:-1], (cell, members))
    found: dict[Any, tuple[float, float, float]] = {}
    largest = sorted(first.items(), key=lambda item: -result.costs[group_key(item[1][0])].total)[:GROUPS]
    for n, (key, (cell, members)) in enumerate(largest):
        cost, until = result.costs[group_key(cell)], started + PROBE * (n + 1) / len(largest)
        if n and time.perf_counter() > until:
            continue
        try:
            with undisturbed():
                train, judge, served = _group(cell, members, datasets[cell.dataset], device, until, asked)
        except Exception:  # whatever it is, the run will say it
            log.debug("no probe of %s", cell, exc_info=True)
            continue
        rough = served / request_seconds(asked) if asked.store else 1.0
        training = train * cost.epochs / cost.train if cost.train else np.nan
        found[key] = training, judge / max(cost.evaluate, 1e-9), rough
    if not found:
        return None
    usual = [float(np.median([x for x in each if x == x] or [1.0])) for each in zip(*found.values())]
    for key, cost in result.costs.items():
        train, judge, served = (x if x == x else usual[i] for i, x in enumerate(found.get(key[:-1], usual)))
        result.costs[key] = replace(
            cost,
            train=cost.train * train,
            evaluate=cost.evaluate * judge,
            drift=cost.drift * judge,
            measure=cost.measure * served,
        )
    return time.perf_counter() - started


def _group(
    cell: Cell, members: Sequence[Planned], data: Dataset, device: torch.device, until: float, asked: Measure
) -> tuple[float, float, float]:
    """Seconds of an epoch of training (NaN: unknown), of the evaluation of all members, and of one cell's requests."""
    assert cell.split is not None, "settled"
    split = cell.task.cut(data, cell.split)
    backbone = fresh(cell, split.dataset).to(device)
    with tempfile.TemporaryDirectory() as folder:
        train = _epoch(backbone, split, Training(**cell.training), Path(folder), until)
        judge = _evaluation(backbone, split, cell, members, Path(folder), until)
    return train, judge, _requests(backbone, int(np.median(_lengths(backbone, split))), asked) if asked.store else 0.0


def _epoch(backbone: Backbone, split: Split | Impressions, settings: Training, folder: Path, until: float) -> float:
    times, steps = [], 1

    def report(step: Progress) -> None:
        nonlocal steps
        steps = step.steps
        times.append(time.perf_counter())
        if len(times) > (STEPS if times[-1] < until else 1):
            raise _Enough

    with contextlib.suppress(_Enough):
        fit(backbone, split, settings, 0, folder / "fit", report)
    if len(times) < 2:
        return np.nan
    seconds = float(np.median(np.diff(times))) * steps
    if len(split.valid):
        seconds += _validation(backbone, split)
    return seconds


def _validation(backbone: Backbone, split: Split | Impressions) -> float:
    valid = split.valid
    length = np.minimum(valid.at - split.dataset.offsets[valid.users], backbone.max_length)
    few = replace(split, valid=_rows(valid, _typical(length)[:256]))  # type: ignore[arg-type]

    def validated(n: int) -> float:
        if isinstance(few, Impressions):
            return _timed(lambda: validation_auc(backbone, few, n))
        return _timed(lambda: validation_ndcg(backbone, few, few.valid, n))

    validated(1)  # what is slow the first time only
    return validated(len(few.valid)) * min(len(valid), 20_000) / len(few.valid)


def _evaluation(
    backbone: Backbone, split: Split | Impressions, cell: Cell, members: Sequence[Planned], folder: Path, until: float
) -> float:
    """Seconds of all members' evaluation, by that of some methods at some budgets, for few users and for some more."""
    by_method: dict[Any, list[Planned]] = {}
    adapted = set()
    for each in members:
        if part := each.cell.compressor.build().structural:
            adapted.add(part)
        else:
            by_method.setdefault(each.cell.compressor, []).append(each)
    tests, rng = len(split.test), np.random.default_rng(zlib.crc32(str(cell).encode()))  # other methods of each group
    order, sizes = _typical(_lengths(backbone, split)), [min(n, tests) for n in (FEW, SOME)]
    fits = Fits(backbone, backbone, split, folder, "probe", cell.seed)

    def taken(jobs: list[Job], sizes: Sequence[int] = sizes) -> np.ndarray:
        parts = (replace(split, test=_rows(split.test, order[:n])) for n in sizes)  # type: ignore[arg-type]
        return np.array([_timed(lambda cut=cut: evaluate(backbone, cut, jobs)) for cut in parts])  # type: ignore[misc]

    taken([], sizes[:1])
    base = taken([])
    total, covered = 0.0, 0
    for n, place in enumerate(rng.permutation(len(by_method))):
        if n and time.perf_counter() > until:
            break
        own = list(by_method.values())[place]
        try:
            job, fitting = _job(fits, own[len(own) // 2])  # the budget in the middle
        except Exception:  # the run will say it
            continue
        taken([job], sizes[:1])  # what is slow the first time only
        total += _grown((taken([job]) - base).clip(min=0), sizes, tests) * len(own) + fitting
        covered += len(own)
    # whoever reads an adapted backbone needs a prefill of it
    return _grown(base, sizes, tests) * (1 + len(adapted)) + total * len(members) / max(covered, 1)


def _grown(seconds: Sequence[float] | np.ndarray, sizes: Sequence[int], n: int) -> float:
    """Seconds for n users, by those for few and for some more: what is spent once is not spent on each."""
    each = max(seconds[1] - seconds[0], 0.0) / max(sizes[1] - sizes[0], 1)
    return float(max(seconds[0] - sizes[0] * each, 0.0) + n * each)


def _typical(length: np.ndarray) -> np.ndarray:
    """Rows, first those as long as costs what all do on average, between a line and a square."""
    # who is computed together is of like length
    return np.argsort(np.abs(length - np.sqrt(np.square(length).mean())), kind="stable")


def _lengths(backbone: Backbone, split: Split | Impressions) -> np.ndarray:
    """Events of each test request's history, as far as the backbone reads."""
    return lengths(split, backbone.max_length).clip(1)


@torch.no_grad()
def _requests(backbone: Backbone, history: int, asked: Measure) -> float:
    """Seconds of one cell's requests: by what the full state's take without a store."""
    total = 0.0
    for candidates in asked.candidates:
        work = Workload(1, min(asked.history or history, backbone.max_length - 1), candidates)
        events, tokens, new = work.events(backbone.n_items, next(backbone.parameters()).device)
        state = backbone.eval().prefill(events).state
        one = min(_timed(lambda: (backbone.read(tokens, state), backbone.append(state, new))) for _ in range(3))  # noqa: B023
        total += request_seconds(replace(asked, candidates=(candidates,)), REQUESTS * one)
    return total


def _job(fits: Fits, each: Planned) -> tuple[Job, float]:
    """To be evaluated, by a fit to few users; seconds that one to all takes."""
    compressor, times = each.cell.compressor.build(), []
    for n in FITTED:
        fit, seconds = replace(fits, users=n).of(compressor, each.cell.budget)
        times.append(seconds or 0.0)
        if times[0] > PROBE:  # of so few users: by steps, and not by users
            break
    job = Job(each.id, compressor, each.cell.budget, None, fit)
    users = len(sampled(fits.split, fits.users))
    return job, times[0] if len(times) == 1 else _grown(times[1:], FITTED[1:], users)


def _rows(targets: Targets, rows: np.ndarray) -> Targets:
    return targets.rows(rows) if isinstance(targets, Requests) else Targets(targets.users[rows], targets.at[rows])


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
