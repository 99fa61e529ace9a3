"""What the cells of a group cost beside their bytes: latency, FLOPs and peak memory, as columns of their rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from malloc_bench import measure
from malloc_bench.backbones import Backbone
from malloc_bench.compressors.base import said
from malloc_bench.evaluation.evaluate import Job
from malloc_bench.evaluation.trial import MEASURING, Begin, nobody
from malloc_bench.registry import told
from malloc_bench.results import COLUMNS
from malloc_bench.state import UserState
from malloc_bench.suite.file import Measure

log = logging.getLogger(__name__)


def resources(
    settings: Measure,
    jobs: Sequence[Job],
    models: measure.Models,
    fresh: Callable[[int], Backbone],
    lengths: np.ndarray,
    keep: Callable[[str, dict[str, Any]], None],
    report: Callable[[int], None],
    begin: Begin = nobody,
) -> dict[str, dict[str, Any]]:
    """Latency, FLOPs and peak memory of every job, row columns by job id, on generated histories of two lengths:

    the median and the longest of those evaluated, `lengths` [N] events in a state, or one that the suite names; where
    it names a store, also requests, at the first of these.

    models: the trained backbone under None, and as structural parts have adapted it. They serve unless the suite's
    length is beyond them: then fresh(max_length) makes one that keeps so many events. keep(job id, raw samples) is
    called with what was timed, report(cells) before anything is measured, begin
    as in `evaluate`.
    """
    if not jobs or not (settings.latency or settings.flops or settings.store):
        return {}
    report(len(jobs))
    parts = {job.compressor.structural for job in jobs} | {None}
    models = {part: models[part] for part in models if part in parts}
    works = [
        measure.Workload(settings.users, n, settings.candidates[0]) for n in histories(settings, lengths, models[None])
    ]
    trained = works[-1].max_length <= models[None].max_length
    if not trained:
        plain, device = fresh(works[-1].max_length), next(models[None].parameters()).device
        models = {part: (part.adapted(plain) if part else plain).to(device) for part in models}
    for model in models.values():
        model.eval()
    rows: dict[str, dict[str, Any]] = {job.id: {} for job in jobs}
    taken: dict[str, list[dict[str, Any]]] = {job.id: [] for job in jobs}
    for work in works:
        try:
            found = dict(_measured(settings, jobs, models, work, taken, begin))
        except (RuntimeError, MemoryError):  # no reason to lose what is known of accuracy
            log.warning(
                "%d users of %d events could not be measured (measure: users, history)",
                work.users, work.history, exc_info=True,
            )  # fmt: skip
            break
        for each, columns in found.items():
            rows[each] = _both(rows[each], {"measured_history": work.history, **columns})
    raw: dict[str, dict[str, Any]] = {}
    served = settings.store and "measured_history" in rows[jobs[0].id]
    for each, columns in (_requests(settings, jobs, models, works[0], raw, begin) if served else {}).items():
        rows[each] |= columns
    for each, samples in taken.items():
        requests = {"requests": raw[each]} if each in raw else {}
        if samples:
            longest = samples[1] if len(samples) > 1 else None
            keep(each, {**samples[0], "longest": longest, **requests})
        elif requests:
            keep(each, requests)
    weights = {
        "measured_weights": "trained" if trained else "fresh",
        "measured_users": settings.users,
        "measured_candidates": settings.candidates[0],
    }
    return {each: (_both(row, row) if len(works) == 1 else row) | weights for each, row in rows.items() if row}


def histories(settings: Measure, lengths: np.ndarray, backbone: Backbone) -> list[int]:
    """Lengths to be measured at: the suite's own, or the median and the longest where a history was evaluated.

    One event at least, and room for the one that is appended.
    """
    if settings.history is not None:
        return [settings.history]
    most = max(1, backbone.max_length - measure.Workload.appended)
    some = lengths[lengths > 0] if (lengths > 0).any() else np.ones(1)
    return sorted({int(min(most, x)) for x in (np.median(some), some.max())})


def _both(median: dict[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
    """The columns of the median length, or with those of the longest beside them."""
    return {**median, **{f"{k}_long": v for k, v in columns.items() if f"{k}_long" in COLUMNS}} if median else columns


def _requests(
    settings: Measure,
    jobs: Sequence[Job],
    models: measure.Models,
    workload: measure.Workload,
    raw: dict[str, dict[str, Any]],
    begin: Begin,
) -> dict[str, dict[str, Any]]:
    """Columns by job id, of a job that could not be served why; seconds of each step are put into `raw`."""
    assert settings.store is not None
    methods: dict[str, measure.Method] = {job.id: (job.compressor, job.budget, job.fitted) for job in jobs}
    found, failed = measure.requests(
        models, methods, workload, settings.candidates, settings.store, seconds=settings.seconds, begin=begin
    )
    rows: dict[str, dict[str, Any]] = {}
    for each, served in found.items():
        columns = {c: one.columns() for c, one in served.items()}
        rows[each] = {**columns[settings.candidates[0]], "requests": columns}
        raw[each] = {str(c): {"steps": one.taken, "full": one.full} for c, one in served.items()}
    rows |= {each: {"request_timing": f"failed: {reason}"} for each, reason in failed.items()}
    return {each: {"store": settings.store, **columns} for each, columns in rows.items()}


def _measured(
    settings: Measure,
    jobs: Sequence[Job],
    models: measure.Models,
    workload: measure.Workload,
    taken: dict[str, list[dict[str, Any]]],
    begin: Begin,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Columns by job id; raw times are added to `taken`."""
    timings: dict[str, measure.Timing] = {}
    if settings.latency:
        methods: dict[str, measure.Method] = {job.id: (job.compressor, job.budget, job.fitted) for job in jobs}
        timings = measure.latency(models, methods, workload, seconds=settings.seconds, begin=begin)
    costs = dict(_costs(models, jobs, workload, begin)) if settings.flops else {}
    for job in jobs:
        columns: dict[str, Any] = {}
        if job.id in timings:
            columns |= timings[job.id].columns()
            taken[job.id].append(asdict(timings[job.id]))
        yield job.id, columns | costs.get(job.id, {})


@torch.no_grad()
def _costs(
    models: measure.Models, jobs: Sequence[Job], workload: measure.Workload, begin: Begin
) -> Iterator[tuple[str, dict[str, Any]]]:
    """By job id: FLOPs per user by formula, bytes of a state, the peak of what making and reading a batch allocates.

    A job that raises is logged and left out.
    """
    device = next(models[None].parameters()).device
    prefills = measure.prefilled(models, [job.compressor for job in jobs], workload)
    _, tokens, _ = workload.events(models[None].n_items, device)
    for job in jobs:
        own = models[job.compressor.structural]

        def make(job: Job = job) -> UserState:
            prefill = replace(prefills[job.compressor.structural], memo={})
            return job.compressor.compress(prefill, job.budget, job.fitted)

        def work(own: Backbone = own, make: Callable[[], UserState] = make) -> UserState:
            state = make()
            own.read(tokens, state)
            return state

        begin(MEASURING, job.id)
        try:
            state, peak = measure.peak_memory(work, device)
            full = prefills[job.compressor.structural].state
            found = measure.closed_form(own, job.compressor, state, workload, full, make)
        except (Exception, SystemExit) as error:
            what = said(job.compressor), job.budget or "no budget", job.id[:12], told(error)
            log.warning("FLOPs and memory of %s at %s (%s) could not be measured: %s", *what, exc_info=True)
            continue
        yield job.id, {**found, "peak_bytes": peak, "measured_bytes": float(state.nbytes().double().mean())}
    begin("", "")
