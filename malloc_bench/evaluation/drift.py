"""Drift: what a state that went on with its user has lost against compressing the whole history again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from malloc_bench.backbones import Backbone
from malloc_bench.data.dataset import mixed
from malloc_bench.data.tasks.impressions import Impressions
from malloc_bench.data.tasks.known import lengths
from malloc_bench.data.tasks.splits import Split
from malloc_bench.data.tasks.trained import facts
from malloc_bench.evaluation.evaluate import asked_of
from malloc_bench.evaluation.guard import Failure, InputChanged, failure, fingerprint, undisturbed, unwritten
from malloc_bench.evaluation.requests import Asked
from malloc_bench.evaluation.trial import Begin, Job, check_read, checked_bytes, nobody, of_users
from malloc_bench.state import Events, MissingStatistic, Named, Prefill, Stats, UserState

USERS = 256  # at most, whose hashes come first
_CHUNK = 64  # users
UPDATES = 10  # at most: more events than that come in blocks of equal size


@torch.no_grad()
def drift(
    backbone: Backbone,
    split: Split | Impressions,
    jobs: Sequence[Job],
    steps: Sequence[int],
    *,
    seed: int = 0,
    filter_seen: bool = True,
    report: Callable[[int, int], None] = lambda done, total: None,
    begin: Begin = nobody,
) -> tuple[dict[str, dict[str, float | int]], dict[str, Failure]]:
    """Columns `drift@N`, `appended@N` and `drift_users@N` by job id, and why jobs failed.

    Of each N in steps: the history less its newest N events is compressed, these are appended, one at a time or in
    blocks, each followed by `update`; then the overlap (ranking: agreement) with the full state that compressing the
    whole history keeps, less what the updated state keeps: the drift. appended: what a state keeps that is left as it
    was made, the N events behind it as they come. Users with more than N events. Jobs that keep raw events, or need
    what nobody can tell of a compressed state, have no drift, of 0 users. report: told how much of all is done;
    filter_seen, begin: as in `evaluate`.
    """
    found: dict[str, dict[str, float | int]] = {job.id: {} for job in jobs}
    failed: dict[str, Failure] = {}
    split = replace(split, steps=1) if isinstance(split, Split) else split
    if not jobs or not steps:
        return found, failed
    needs = Stats()
    for job in jobs:
        needs |= job.compressor.needs
    items = facts(split, needs)
    parts = {n: _chunks(backbone, split, n) for n in steps}
    done, total = 0, sum(map(len, parts.values())) * len(jobs)
    for n, chunks in parts.items():
        lost: dict[str, list[np.ndarray]] = {job.id: [] for job in jobs}
        silent: set[str] = set()
        for rows in chunks:
            make = partial(_Stream, backbone, split, n=n, needs=needs, seed=seed, items=items, filter_seen=filter_seen)
            stream, other = make(rows), make(rows[-1:])
            for job in jobs:
                report(done, total)
                done += 1
                if job.id in failed or job.id in silent:
                    continue
                begin(f"drift, part {done} of {total}", job.id)
                try:
                    with undisturbed(), unwritten(backbone, job.backbone or backbone):
                        lost[job.id].append(stream.kept(job, other))
                except MissingStatistic:
                    silent.add(job.id)
                except KeyboardInterrupt:
                    raise
                except BaseException as error:  # also sys.exit
                    failed[job.id] = failure(error)
                    stream, other = make(rows), make(rows[-1:])  # of which it may have spoilt something
            begin("", "")
        for each, values in lost.items():
            if each in failed:
                continue
            found[each] |= {f"drift_users@{n}": 0}
            if values and each not in silent:
                again, updated, left = np.concatenate(values, 1)
                found[each] |= {f"drift@{n}": float(np.nanmean(again - updated))}
                found[each] |= {f"appended@{n}": float(np.nanmean(left)), f"drift_users@{n}": len(left)}
    return found, failed


def _chunks(backbone: Backbone, split: Split | Impressions, n: int) -> list[np.ndarray]:
    """Rows of split.test, of users with more than n events in their state: one request a user, by hash."""
    test, data = split.test, split.dataset
    length = lengths(split, backbone.max_length)
    rows = np.flatnonzero(length > n + 1)  # in retrieval one more: the token that reads
    _, first = np.unique(test.users[rows], return_index=True)
    rows = rows[np.sort(first)]
    rows = rows[np.argsort(mixed(data.user_ids[test.users[rows]].astype(np.uint64)), kind="stable")[:USERS]]
    rows = rows[np.argsort(length[rows], kind="stable")]
    return [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]


class _Stream:
    """Some users, whose newest n events come after all before them were compressed; what jobs share is made once."""

    def __init__(
        self,
        backbone: Backbone,
        split: Split | Impressions,
        rows: np.ndarray,
        n: int,
        needs: Stats,
        seed: int,
        items: Named | None,
        filter_seen: bool,
    ) -> None:
        self.backbone, self.needs, self.seed, self.items = backbone, needs, seed, items
        self.asked: Asked = asked_of(backbone, split, rows, filter_seen)
        self.ids = torch.from_numpy(split.dataset.user_ids[split.test.users[rows]])
        history = self.asked.history
        self.before = history.each(lambda x: x, history.count - n)
        step = -(-n // UPDATES)
        self.blocks = [_part(history, left, min(step, left)) for left in range(n, 0, -step)]
        full = backbone.prefill(self.before).state
        self.sizes = [full.nbytes()]  # of the full state, before and after each block
        for block in self.blocks:
            full = backbone.append(full, block)
            self.sizes.append(full.nbytes())
        self.full = self.asked.read(backbone, backbone.prefill(history).state)
        self.made: dict[tuple[Backbone, bool], Prefill] = {}

    def _prefill(self, model: Backbone, whole: bool) -> Prefill:
        if (model, whole) not in self.made:
            events = self.asked.history if whole else self.before
            made = model.prepare(events, self.ids, self.needs, self.seed, self.items)
            self.made[model, whole] = replace(made, whole=self.sizes[-1 if whole else 0])
        return replace(self.made[model, whole], memo={})

    def kept(self, job: Job, other: _Stream) -> np.ndarray:
        """What each user keeps of the full state's order, [3, B]: compressed again, updated, and appended to only.

        other: of the last user alone. Raises MissingStatistic for a state of raw events, and whatever the method does.
        """
        model, before = job.backbone or self.backbone, self._fingerprint(job)
        scratch = self._compressed(job, whole=True)
        if scratch.events is not None:
            raise MissingStatistic("raw events go on by themselves")
        state, left = self._gone_on(job)
        outputs = torch.stack([self.asked.read(model, each) for each in (scratch, state, left)])
        if not bool(outputs.isfinite().all()):
            raise ValueError("outputs read from a state that has gone on are not finite")
        if some := list(range(len(state) - 1)):  # the last user is the other one, of whom the template is
            again = other._gone_on(job)[0].unpack(state.packed(some))
            check_read(outputs[1, : len(some)], self.asked.read(model, again, torch.tensor(some)))
        if self._fingerprint(job) != before:
            raise InputChanged("a method changed the state, statistics or events that it was given: it must copy first")
        _, *found = self.asked.judge([(self.backbone, self.full[None]), (model, outputs)])
        alike = "overlap" if "overlap" in found[0] else "agreement"
        return np.stack([each[alike] for each in found])

    def _fingerprint(self, job: Job) -> list[tuple[object, ...]]:
        """Of all that jobs share."""
        made = [self._prefill(job.backbone or self.backbone, whole) for whole in (True, False)]
        own = self.asked.history, self.asked.tokens, self.before, self.blocks, self.sizes, self.full
        return fingerprint(made, [each.shared() for each in made], own)

    def _compressed(self, job: Job, whole: bool) -> UserState:
        prefill = self._prefill(job.backbone or self.backbone, whole).given(job.fitted)
        return of_users(job.compressor.compress(prefill, job.budget, job.fitted), prefill)

    def _gone_on(self, job: Job) -> tuple[UserState, UserState]:
        """The state with all new events, updated after each block, and appended to only."""
        model, method = job.backbone or self.backbone, job.compressor
        prefill = self._prefill(model, False).given(job.fitted)
        state = left = self._compressed(job, whole=False)
        for block, size in zip(self.blocks, self.sizes[1:]):
            seen = replace(model.go_on(prefill, state, block, method.needs), whole=size, memo={})
            state = of_users(method.update(seen, job.budget, job.fitted), seen)
            checked_bytes(job, seen, state)
            left = model.append(left, block)
        return state, left


def _part(history: Events, left: int, step: int) -> Events:
    """Of each user's newest `left` events the first `step`."""
    newest = history.last(torch.full_like(history.count, left))
    return newest.each(lambda x: x[:, :step], torch.full_like(newest.count, step))
