"""What executors share: rounds of tasks over the groups of a session, and what becomes of them."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import BinaryIO

import torch

from malloc_bench import registry
from malloc_bench.measure.environment import cores
from malloc_bench.run.executors import shared
from malloc_bench.run.executors.page import memory_of
from malloc_bench.run.executors.worker import SetUp, Task
from malloc_bench.run.folder import Chunks, remove_dead
from malloc_bench.run.progress import Shown
from malloc_bench.run.session import Session, titled
from malloc_bench.suite.plan import Cost, Planned, group_key, groups, partial_name
from malloc_bench.testing import portable

_NOTHING = Cost(0.0, 0.0, 0.0)


class WorkerError(RuntimeError):
    """A worker could not do its work; the message is one line."""


class Executor(ABC):
    """The groups of a session, done by other processes, n at a time; watch shows them all.

    Each has its share of this machine's cores as threads, unless the environment says how many (OMP_NUM_THREADS).
    """

    #: where groups are few, whether their chunks are shared
    shares = True

    def __init__(self, session: Session, watch: Shown, n: int) -> None:
        limits = session.suite.limits
        if limits is not None and limits.memory is not None and not memory_of(os.getpid()):
            raise ValueError("limits.memory: this system does not say what a process has in memory (no /proc)")
        self.session, self.watch, self.n = session, watch, n

    def all(self) -> None:
        """Raises WorkerError, ResultsError, and ValueError where a method cannot be sent to another process."""
        session, plan = self.session, self.session.result.plan
        _check_portable(plan)
        whole, asked = [group for _, group in groups(plan)], session.suite.measure
        measured = bool(asked.latency or asked.flops or asked.store)
        if not whole:
            return
        with self._opened() as file:
            given = SetUp(
                session.suite, session.folder.resolve(), session.datasets, session.device, threads(self.n),
                registry.foreign(),
            )  # fmt: skip
            shared.dump(given, file)
            try:
                self._do(self._tasks(whole, measured), self.n, file)
                self._do(self._rest(whole), 1 if measured else self.n, file)  # what is timed is timed alone
            finally:
                self._end_all()
                remove_dead(session.folder)
        for group in whole:
            if group[0].cell.data:
                Chunks(session.folder / "partial" / partial_name(group[0].cell)).drop()

    @abstractmethod
    def _opened(self) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file to write into, for what all processes are given."""

    @abstractmethod
    def _do(self, tasks: Iterable[Task], n: int, set_up: BinaryIO) -> None:
        """Until all is done, by n at a time."""

    @abstractmethod
    def _end_all(self) -> None:
        """Nothing of ours goes on."""

    def _tasks(self, whole: Sequence[list[Planned]], measured: bool) -> list[Task]:
        """The longest groups first, each in shares of its chunks where there are less than four groups a worker: the
        first shares of all, which train, then the others, so that no worker is long without work at the end."""
        known = self.session.result.costs
        costs = [known.get(group_key(group[0].cell), _NOTHING) for group in whole]
        if self.n == 1:
            return [Task(group, cost) for group, cost in zip(whole, costs)]
        parts = -(-4 * self.n // len(whole)) if self.shares else 1
        later, tasks = measured or parts > 1, []
        for part in range(parts):
            for group, cost in sorted(zip(whole, costs), key=lambda each: -each[1].total):
                if later:
                    cost = replace(cost, evaluate=cost.evaluate / parts, drift=0.0, measure=0.0)
                tasks.append(Task(group, replace(cost, train=cost.train * (part == 0)), (part, parts), later))
        return tasks

    def _rest(self, whole: Sequence[list[Planned]]) -> list[Task]:
        """What is left when all chunks are there."""
        costs = self.session.result.costs
        left = [rest for group in whole if (rest := self._left(group))]
        ahead = [replace(costs[key], train=0.0, evaluate=0.0) if (key := group_key(rest[0].cell)) in costs else _NOTHING
                 for rest in left]  # fmt: skip
        return [Task(*each) for each in zip(left, ahead)]

    def _left(self, members: Iterable[Planned]) -> list[Planned]:
        return [each for each in members if each.id not in self.session.result.written]

    def _lane(self, task: Task) -> Shown:
        part, parts = task.share
        of = "" if parts == 1 else f", part {part + 1} of {parts}"
        return self.watch.lane((group_key(task.cell), task.share, task.later), titled(task.members) + of, task.cost)


def _check_portable(plan: Sequence[Planned]) -> None:
    for part in {each.cell.compressor for each in plan if not each.done}:
        with contextlib.suppress(Exception, SystemExit):  # a part that fails is for its own rows to say
            method = part.build()
            if not portable(method):
                break
    else:
        return
    raise ValueError(
        f"{part.label} cannot be imported by another process, which limits and workers need: it needs a file"
    )


def threads(workers: int) -> int:
    """Of each of so many workers."""
    alone = workers == 1 or "OMP_NUM_THREADS" in os.environ
    return torch.get_num_threads() if alone else max(1, cores() // workers)
