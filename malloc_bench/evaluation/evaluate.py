"""prefill -> compress -> read -> judge: one prefill per chunk of users and backbone serves every method and budget."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from malloc_bench.backbones import Backbone
from malloc_bench.compressors import Budget, Compressor, get_compressor
from malloc_bench.data.tasks.batches import by_length
from malloc_bench.data.tasks.impressions import Impressions
from malloc_bench.data.tasks.splits import Split
from malloc_bench.evaluation.requests import Asked, Candidates, NextItem, Values
from malloc_bench.state import Prefill, Stats, UserState

PACKED_USERS = 32  # users a cell whose packed length is compared with the bytes that are reported
_USERS = 256  # a chunk
_SCORES = 1 << 24  # catalogue scores of a chunk, at most

#: What is kept of a request beside the task's own columns: name -> dtype.
SIZES = {"bytes": np.int64, "at_floor": np.bool_}


class OverBudget(RuntimeError):
    """A compressor broke its promise: more bytes than the budget, or other bytes than it packs."""


@dataclass(frozen=True)
class Job:
    """One method at one budget; `id` names its results.

    backbone: trained as the structural part of the compressor has adapted it; None: the one that is evaluated.
    """

    id: str
    compressor: Compressor
    budget: Budget | None = None
    backbone: Backbone | None = None


class Store(Protocol):
    """Where finished chunks are kept, so that a killed run goes on where it was."""

    def load(self, chunk: int) -> Mapping[str, Values]: ...

    def save(self, chunk: int, done: Mapping[str, Values]) -> None: ...


@dataclass
class Evaluation:
    """users: row of the dataset per request, [N]; length: events in the state; bytes_full [N]; values per job id.

    failed: job id -> traceback. A failed job has no values. items (0: none), labels: of the candidates, [N, M], in
    ranking only.
    """

    users: np.ndarray
    length: np.ndarray
    bytes_full: np.ndarray
    values: dict[str, Values]
    failed: dict[str, str] = field(default_factory=dict)
    items: np.ndarray | None = None
    labels: np.ndarray | None = None


REFERENCE = "reference"


def chunks(backbone: Backbone, split: Split | Impressions) -> list[np.ndarray]:
    """Rows of split.test in chunks of users of like length; the same for every run of the same cell."""
    scores = split.width**2 if isinstance(split, Impressions) else split.dataset.n_items
    size = max(16, min(_USERS, _SCORES // max(scores, 1)))
    return list(by_length(split.test, split.dataset, backbone.max_length, size))


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    split: Split | Impressions,
    jobs: list[Job],
    *,
    seed: int = 0,
    filter_seen: bool = True,
    store: Store | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Every job on every test target or request; the full state is always read too, as the reference of fidelity.

    Jobs with a backbone of their own are held against the same reference, and their budgets are shares of its bytes.
    A job that raises is left out from there on, with its traceback in `failed`; the others go on. Only what is not in
    `store` yet is computed; each chunk is saved as it is done. report(done, total) is called after each chunk.
    """
    for model in {backbone, *(job.backbone or backbone for job in jobs)}:
        model.eval()
    parts = chunks(backbone, split)
    everything = [Job(REFERENCE, get_compressor("full")), *jobs]
    columns = {**(Candidates if isinstance(split, Impressions) else NextItem).columns, **SIZES}
    failed: dict[str, str] = {}
    kept: list[dict[str, Values]] = []
    for number, rows in enumerate(parts):
        saved = store.load(number) if store else {}
        have = {name: values for name, values in saved.items() if values.keys() == columns.keys()}
        todo = [job for job in everything if job.id not in have and job.id not in failed]
        if todo:
            packed = _packed_rows(number, parts, seed)
            ids = torch.from_numpy(split.dataset.user_ids[split.test.users[rows]])
            have |= _chunk(backbone, _asked(backbone, split, rows, filter_seen), ids, todo, seed, failed, packed)
            if store:
                store.save(number, have)
        kept.append(have)
        report(number + 1, len(parts))
    values = {
        job.id: {name: np.concatenate([chunk[job.id][name] for chunk in kept]) for name in columns}
        for job in everything
        if kept and job.id not in failed and all(job.id in chunk for chunk in kept)
    }
    order = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    users = split.test.users[order]
    length = np.minimum(split.test.at[order] - split.dataset.offsets[users], backbone.max_length)
    full = values[REFERENCE]["bytes"] if kept else np.zeros(0, dtype=np.int64)
    if isinstance(split, Impressions):
        items, labels, _ = split.candidates(split.test.rows(order))
        return Evaluation(users, length, full, values, failed, items, labels)
    return Evaluation(users, length - 1, full, values, failed)  # the newest event reads


def _asked(backbone: Backbone, split: Split | Impressions, rows: np.ndarray, filter_seen: bool) -> Asked:
    if isinstance(split, Impressions):
        return Candidates(backbone, split, rows)
    return NextItem(backbone, split, rows, filter_seen)


def _chunk(
    backbone: Backbone, asked: Asked, ids: Tensor, jobs: list[Job], seed: int, failed: dict[str, str], packed: Tensor
) -> dict[str, Values]:
    """Values of the jobs for the users of one chunk: backbone by backbone, the one that is evaluated first."""
    done: list[tuple[Job, Tensor]] = []
    outputs: list[tuple[Backbone, Tensor]] = []
    reference = Job(REFERENCE, get_compressor("full"))
    others = [job for job in jobs if job.id != REFERENCE]
    whole = None  # bytes of the full state
    for model in dict.fromkeys([backbone, *(job.backbone or backbone for job in others)]):
        own = [job for job in others if (job.backbone or backbone) is model]
        needs = reduce(Stats.__or__, (job.compressor.needs for job in own), Stats())
        prefill = replace(model.prefill(asked.history, ids, needs, seed), whole=whole)
        full = asked.read(model, prefill.state)
        found = []
        if model is backbone:
            whole = prefill.full_bytes()
            found, done = [full], [(reference, whole)]
        for job in own:
            try:
                state = job.compressor.compress(prefill, job.budget)
                size = checked_bytes(job, prefill, state, packed)
                out = full if state is prefill.state else asked.read(model, state)
                if not bool(out.isfinite().all()):
                    raise ValueError("outputs read from the compressed state are not finite")
            except Exception:  # a failing cell is a failed row; the others go on
                failed[job.id] = traceback.format_exc()
                continue
            found.append(out)
            done.append((job, size))
        if found:
            outputs.append((model, torch.stack(found)))
    assert whole is not None
    return {
        job.id: {
            **values,
            "bytes": size.cpu().numpy().astype(np.int64),
            "at_floor": _at_floor(job, whole, size),
        }
        for (job, size), values in zip(done, asked.judge(outputs))
    }


def checked_bytes(job: Job, prefill: Prefill, state: UserState, packed: Tensor) -> Tensor:
    """Bytes [B] of each user's state, held against the budget and, for the users `packed`, against packed lengths.

    Raises OverBudget.
    """
    size = state.nbytes()
    for user in packed.tolist():
        if len(state.pack(user)) != int(size[user]):
            raise OverBudget(f"user {user} packs to {len(state.pack(user))} bytes, nbytes() says {int(size[user])}")
    target = None if job.budget is None else job.budget.target(prefill.full_bytes())
    if target is not None:
        allowed = target.maximum(job.compressor.floor(prefill).to(target.device))
        if bool((size > allowed).any()):
            user = int((size - allowed).argmax())
            raise OverBudget(f"user {user} takes {int(size[user])} bytes, the budget allows {int(allowed[user])}")
    return size


def _at_floor(job: Job, full: Tensor, size: Tensor) -> np.ndarray:
    """Users whose budget lies below the smallest state the method can make."""
    target = None if job.budget is None else job.budget.target(full)
    if target is None:
        return np.zeros(len(size), dtype=bool)
    return (size > target).cpu().numpy()


def _packed_rows(number: int, parts: list[np.ndarray], seed: int) -> Tensor:
    """Rows of a chunk that are packed: its share, by users, of 32 over the whole test set, drawn from the seed."""
    users, before, total = len(parts[number]), sum(map(len, parts[:number])), sum(map(len, parts))
    count = PACKED_USERS * (before + users) // total - PACKED_USERS * before // total
    return torch.from_numpy(np.random.default_rng([seed, number]).choice(users, min(users, count), replace=False))
