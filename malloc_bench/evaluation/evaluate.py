"""prefill -> compress -> read -> judge: one prefill per chunk of users and backbone serves every method and budget."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from malloc_bench.backbones import Backbone
from malloc_bench.compressors import Compressor, get_compressor
from malloc_bench.compressors.base import ours
from malloc_bench.data.tasks.batches import by_length
from malloc_bench.data.tasks.impressions import Impressions
from malloc_bench.data.tasks.known import heard, lengths
from malloc_bench.data.tasks.splits import Split
from malloc_bench.data.tasks.trained import facts
from malloc_bench.evaluation.guard import Failure, InputChanged, failure, fingerprint, undisturbed, unwritten
from malloc_bench.evaluation.popularity import about_items
from malloc_bench.evaluation.requests import Asked, Candidates, NextItem, Values
from malloc_bench.evaluation.trajectory import Trajectory
from malloc_bench.evaluation.trial import Begin, Job, Read, Witnesses, attempt, check_model, nobody, total
from malloc_bench.state import Named, Stats

__all__ = ["Evaluation", "Job", "Store", "chunks", "evaluate"]

PACKED_USERS = 32  # users a cell whose state is packed: its length is compared with the bytes that are reported, and
# what is read from it, unpacked, with what was judged
_PACKED_CHUNKS = 3  # they are drawn from so many chunks: each costs a small compress and read more
_PACKED_OF_OTHERS = 2  # users of every other chunk that are packed where the method is not one of ours
_USERS = 256  # a chunk, and where there are many, _MANY: what each call costs by itself is shared by more
_MANY, _CHUNKS = 1024, 8  # but so many chunks there are then at least, for a kill costs one
_STATES = 1 << 28  # bytes of full states in a chunk of more than _USERS, at most
_SCORES = 1 << 24  # catalogue scores of a chunk, at most

#: What is kept of a request beside the task's own columns: name -> dtype.
SIZES = {"bytes": np.int64, "at_floor": np.bool_}
PARTS = "parts"  # and of a chunk the bytes of each part of a state, a structured array


class BadNeeds(RuntimeError):
    """No prefill can be made with what the methods need."""


class Store(Protocol):
    """Where finished chunks are kept, so that a killed run goes on where it was."""

    def load(self, chunk: int) -> Mapping[str, Values]: ...

    def save(self, chunk: int, done: Mapping[str, Values]) -> None: ...


@dataclass
class Evaluation:
    """users: row of the dataset per request, [N]; length: events in the state; bytes_full [N]; values per job id.

    failed: by job id, why. A failed job has no values. items (0: none), labels: of the candidates, [N, M], in
    ranking only. parts: per job id, what of "bytes" is of which part of the state, [N] each. about: of each target, in
    retrieval: its `quarter` by popularity, and of joined data its `domain`, [N] each.
    """

    users: np.ndarray
    length: np.ndarray
    bytes_full: np.ndarray
    values: dict[str, Values]
    failed: dict[str, Failure] = field(default_factory=dict)
    items: np.ndarray | None = None
    labels: np.ndarray | None = None
    parts: dict[str, Values] = field(default_factory=dict)
    about: Values = field(default_factory=dict)


REFERENCE = "reference"


def chunks(backbone: Backbone, split: Split | Impressions) -> list[np.ndarray]:
    """Rows of split.test in chunks of users of like length; the same for every run of the same cell."""
    scores = split.width**2 if isinstance(split, Impressions) else split.dataset.n_items
    users = min(_MANY, len(split.test) // _CHUNKS)
    if users > _USERS:
        users = max(_USERS, min(users, _STATES // _state_bytes(backbone, split)))
    size = max(16, min(max(users, _USERS), _SCORES // max(scores, 1)))
    data, ends, most = heard(split, backbone.max_length)
    return list(by_length(ends, data, most, size))


def _state_bytes(backbone: Backbone, split: Split | Impressions) -> int:
    """Of the full state of the user of the longest history."""
    length = lengths(split, backbone.max_length)
    return int(
        backbone.prefill(asked_of(backbone, split, np.array([length.argmax()]), False).history).state.nbytes()[0]
    )


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    split: Split | Impressions,
    jobs: list[Job],
    *,
    seed: int = 0,
    filter_seen: bool = True,
    loss: bool = False,
    store: Store | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
    begin: Begin = nobody,
    share: tuple[int, int] = (0, 1),
) -> Evaluation:
    """Every job on every test target or request; the full state is always read too, as the reference of fidelity.

    Jobs with a backbone of their own are held against the same reference, and their budgets are shares of its bytes.
    A job that raises is left out from there on, with the reason in `failed`; the others go on. Only what is not in
    `store` yet is computed; each chunk is saved as it is done. report(done, total) is called after each chunk,
    begin(what, job id) before a method does its own work. share: (i, n), from the i-th chunk on every n-th only. loss:
    in retrieval the cross-entropy of each target too.
    """
    for model in {backbone, *(job.backbone or backbone for job in jobs)}:
        model.eval()
    parts = chunks(backbone, split)
    needs = Stats()
    for job in jobs:
        with _noting({}, job):  # what fails here fails again where it is noted
            needs |= job.compressor.needs
    items = facts(split, needs)
    everything = [Job(REFERENCE, get_compressor("full")), *jobs]
    columns = {**_kind(split).columns, **SIZES, **(NextItem.loss if loss and isinstance(split, Split) else {})}
    failed: dict[str, Failure] = {}
    kept: list[dict[str, Values]] = []
    mine = list(enumerate(parts))[share[0] :: share[1]]
    for number, rows in mine:
        saved = store.load(number) if store else {}
        have = {  # of another version chunks may be of other users
            name: values
            for name, values in saved.items()
            if values.keys() == {*columns, PARTS} and {len(x) for x in values.values()} == {len(rows)}
        }
        todo = [job for job in everything if job.id not in have and job.id not in failed]
        if todo:
            packed = _packed_rows(number, parts, seed)
            ids = torch.from_numpy(split.dataset.user_ids[split.test.users[rows]])
            ask = partial(asked_of, backbone, split, rows, filter_seen, loss)
            others = [job for job in todo if job.id != REFERENCE]
            told = partial(begin, f"chunk {number + 1} of {len(parts)}")
            have |= _chunk(backbone, ask, ids, others, seed, failed, packed, items, told)
            if store:
                store.save(number, have)
        kept.append(have)
        report(len(kept), len(mine))
    whole = {
        job.id: [chunk[job.id] for chunk in kept]
        for job in everything
        if kept and job.id not in failed and all(job.id in chunk for chunk in kept)
    }
    values = {each: {name: np.concatenate([x[name] for x in own]) for name in columns} for each, own in whole.items()}
    of = {each: _side_by_side([x[PARTS] for x in own]) for each, own in whole.items()}
    order = np.concatenate([rows for _, rows in mine]) if mine else np.zeros(0, dtype=np.int64)
    users = split.test.users[order]
    length = lengths(split, backbone.max_length)[order]
    full = values[REFERENCE]["bytes"] if kept else np.zeros(0, dtype=np.int64)
    if isinstance(split, Impressions):
        shown, labels, _ = split.candidates(split.test.rows(order))
        return Evaluation(users, length, full, values, failed, shown, labels, of)
    about = about_items(split, order)
    return Evaluation(users, length - 1, full, values, failed, parts=of, about=about)  # the newest event reads


def _kind(split: Split | Impressions) -> type[NextItem] | type[Candidates]:
    """What its requests are."""
    return Candidates if isinstance(split, Impressions) else Trajectory if split.steps > 1 else NextItem


def _side_by_side(chunks: list[np.ndarray]) -> Values:
    """Bytes of all parts that some chunk has, 0 where another has none."""
    names = dict.fromkeys(name for chunk in chunks for name in chunk.dtype.names or ())
    return {
        name: np.concatenate([x[name] if name in (x.dtype.names or ()) else np.zeros(len(x), np.int64) for x in chunks])
        for name in names
    }


def asked_of(
    backbone: Backbone, split: Split | Impressions, rows: np.ndarray, filter_seen: bool, loss: bool = False
) -> Asked:
    """The requests of rows of split.test."""
    if isinstance(split, Impressions):
        return Candidates(backbone, split, rows)
    return (Trajectory if split.steps > 1 else NextItem)(backbone, split, rows, filter_seen, loss)


def _chunk(
    backbone: Backbone,
    ask: Callable[[], Asked],
    ids: Tensor,
    jobs: list[Job],
    seed: int,
    failed: dict[str, Failure],
    packed: Tensor,
    items: Named | None,
    begin: Callable[[str], None],
) -> dict[str, Values]:
    """Values of the reference and of the jobs for the users of one chunk.

    All jobs share what is made for them; where one has changed it, or needs what cannot be had, nothing of them counts,
    and each half of the jobs gets its own, until the one that does it is alone.
    """
    try:
        values, broken = _together(backbone, ask(), ids, jobs, seed, packed, items, begin)
    except (InputChanged, BadNeeds) as error:
        if not jobs:
            raise  # the backbone itself
        if len(jobs) == 1:
            failed[jobs[0].id] = failure(error)
            return _chunk(backbone, ask, ids, [], seed, failed, packed, items, begin)
        half = len(jobs) // 2
        some = _chunk(backbone, ask, ids, jobs[:half], seed, failed, packed, items, begin)
        return some | _chunk(backbone, ask, ids, jobs[half:], seed, failed, packed, items, begin)
    failed |= broken
    return values


def _together(
    backbone: Backbone,
    asked: Asked,
    ids: Tensor,
    jobs: list[Job],
    seed: int,
    packed: Tensor,
    items: Named | None,
    begin: Callable[[str], None],
) -> tuple[dict[str, Values], dict[str, Failure]]:
    """Values by job, backbone by backbone, the one that is evaluated first; and why others failed.

    Raises InputChanged where something is not as it was when the jobs began.
    """
    done: list[tuple[Job, dict[str, Tensor]]] = []
    outputs: list[tuple[Backbone, Tensor]] = []
    broken: dict[str, Failure] = {}
    whole = None  # bytes of the full state
    for model in dict.fromkeys([backbone, *(job.backbone or backbone for job in jobs)]):
        own = [job for job in jobs if (job.backbone or backbone) is model]
        needs = Stats()
        for job in own:
            with _noting(broken, job):
                needs |= job.compressor.needs
        with _noting(broken, *own) if model is not backbone else contextlib.nullcontext(), undisturbed():
            try:
                prefill = model.prepare(asked.history, ids, needs, seed, items, asked.tokens)
            except Exception as error:
                if needs == Stats():
                    raise
                raise BadNeeds(f"{model.name} cannot give {needs}: {error}") from error
            full = asked.read(model, prefill.state)
            if not bool(full.isfinite().all()):
                raise ValueError("outputs read from the full state are not finite")
            check_model(model, asked, prefill, full, packed)
        own = [job for job in own if job.id not in broken]
        found = []
        if model is backbone:
            whole = prefill.full_bytes()
            asked.walk(model, prefill.state, full)
            found, done = [full], [(Job(REFERENCE, get_compressor("full")), prefill.state.nbytes_by_part())]
        elif not own:
            continue
        prefill = replace(prefill, whole=whole, memo={})
        witnesses = Witnesses.of(prefill, packed)
        some = packed if len(packed) else torch.arange(min(_PACKED_OF_OTHERS, len(ids)))
        watched = Witnesses.of(prefill, some) if any(_remembers(job.compressor) for job in own) else witnesses
        shared = [*prefill.shared(), *(list(job.fitted.values()) for job in own if job.fitted is not None)]
        given = prefill, witnesses, watched, asked.history, asked.tokens, shared
        before = fingerprint(given)
        memos: dict[Any, dict[Any, Any]] = defaultdict(dict)
        whole_read = read = Read(prefill.state, full)
        with unwritten(model):
            for job in own:
                begin(job.id)
                with _noting(broken, job):
                    apart = _remembers(job.compressor)
                    mine = replace(prefill, memo=memos[apart])
                    reads = [whole_read] if apart else [whole_read, read]  # nobody else's state is the same as it was
                    with undisturbed():
                        read, parts = attempt(job, model, mine, asked, reads, watched if apart else witnesses)
                        asked.walk(model, read.state, read.out)
                    found.append(read.out)
                    done.append((job, parts))
            begin("")
            if fingerprint(given) != before:
                what = "a method changed the state, statistics or events that it was given"
                raise InputChanged(f"{what}: it must copy first")
        if found:
            outputs.append((model, torch.stack(found)))
    assert whole is not None
    return {
        job.id: {
            **values,
            "bytes": total(parts).cpu().numpy().astype(np.int64),
            "at_floor": _at_floor(job, whole, total(parts)),
            PARTS: _structured(parts),
        }
        for (job, parts), values in zip(done, asked.judge(outputs))
    }, broken


def _structured(parts: Mapping[str, Tensor]) -> np.ndarray:
    """[B] of as many int64 as there are parts, by name: one array a job and chunk, however many parts."""
    numbers = torch.stack([*parts.values()], 1).cpu().numpy().astype(np.int64)
    return numbers.view([(name, np.int64) for name in parts])[:, 0]


@contextlib.contextmanager
def _noting(broken: dict[str, Failure], *jobs: Job) -> Iterator[None]:
    """What fails inside, were it by sys.exit, is the failure of the jobs; the others go on. An interrupt is one."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        broken.update(dict.fromkeys((job.id for job in jobs), failure(error)))


def _remembers(compressor: Compressor) -> Any:
    """Whose memory a method shares: ours all have one, which saves time; anybody else's spoils none but its own."""
    return None if ours(compressor) else (type(compressor), repr(compressor))


def _at_floor(job: Job, full: Tensor, size: Tensor) -> np.ndarray:
    """Users whose budget lies below the smallest state the method can make."""
    target = None if job.budget is None else job.budget.target(full)
    if target is None:
        return np.zeros(len(size), dtype=bool)
    return (size > target).cpu().numpy()


def _packed_rows(number: int, parts: list[np.ndarray], seed: int) -> Tensor:
    """Rows of a chunk that are packed, drawn from the seed: its share of the 32 of the test set, in a few chunks."""
    chosen = np.unique(np.linspace(0, len(parts) - 1, _PACKED_CHUNKS).round().astype(int)).tolist()
    left = PACKED_USERS
    for rank, chunk in enumerate(sorted(chosen, key=lambda c: len(parts[c]))):  # what small ones lack, large ones have
        count = min(len(parts[chunk]), -(-left // (len(chosen) - rank)))
        if chunk == number:
            drawn = np.random.default_rng([seed, number]).choice(len(parts[chunk]), count, replace=False)
            return torch.from_numpy(drawn)
        left -= count
    return torch.zeros(0, dtype=torch.long)
