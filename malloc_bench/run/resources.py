"""What the cells of a group cost beside their bytes: latency, FLOPs and peak memory, as columns of their rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from malloc_bench import measure
from malloc_bench.backbones import Backbone
from malloc_bench.evaluation.evaluate import Job
from malloc_bench.results import atomic_write
from malloc_bench.state import Prefill, UserState
from malloc_bench.suite.file import Measure


def resources(
    settings: Measure,
    jobs: Sequence[Job],
    longer: Callable[[int], Backbone],
    device: torch.device,
    folder: Path,
    report: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    """Latency, FLOPs and peak memory on the suite's fixed workload, row columns by job id.

    longer: max_length -> a backbone that keeps so many events. Raw samples go to `folder`; report(cells) is called
    before anything is measured.
    """
    if not jobs or not (settings.latency or settings.flops):
        return {}
    report(len(jobs))
    workload = measure.Workload(users=settings.users, history=settings.history, candidates=settings.candidates)
    rows: dict[str, dict[str, Any]] = {job.id: {} for job in jobs}
    if settings.latency:
        methods = {job.id: (job.compressor, job.budget) for job in jobs}
        for each, timing in measure.latency(longer, methods, workload, device, seconds=settings.seconds).items():
            rows[each] |= {**timing.columns(), "threads": timing.threads, "load": timing.load}
            atomic_write(folder / f"{each}.json", json.dumps(asdict(timing)).encode())
    if settings.flops:
        backbone = longer(workload.max_length).to(device).eval()
        rows = {each: {**rows[each], **costs} for each, costs in _costs(backbone, jobs, workload)}
    return rows


@torch.inference_mode()
def _costs(backbone: Backbone, jobs: Sequence[Job], workload: measure.Workload) -> Iterator[tuple[str, dict[str, Any]]]:
    """By job id: FLOPs per user by formula, and the peak of what compressing and reading a batch allocates."""
    device = next(backbone.parameters()).device
    models = measure.adapted(backbone, [job.compressor for job in jobs], workload)
    _, tokens, _ = workload.events(backbone.n_items, device)
    for job in jobs:
        own, prefill = models[job.compressor.structural]

        def work(job: Job = job, own: Backbone = own, prefill: Prefill = prefill) -> UserState:
            state = job.compressor.compress(replace(prefill, memo={}), job.budget)
            own.read(tokens, state)
            return state

        state, peak = measure.peak_memory(work, device)
        yield job.id, {**measure.closed_form(own, job.compressor, state, workload), "peak_bytes": peak}
