"""A worker: a process that does the groups it is given, one after another, and says what becomes of them."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from malloc_bench import registry
from malloc_bench.data import Dataset
from malloc_bench.registry import told
from malloc_bench.run.executors import shared
from malloc_bench.run.executors.page import Notes, Page
from malloc_bench.run.session import Session
from malloc_bench.suite.cells import Cell, Part
from malloc_bench.suite.plan import Cost, Planned, RunResult
from malloc_bench.suite.suite import Suite
from malloc_bench.training.fit import Progress

_PAUSE = 0.1  # seconds between two steps of training that are told


@dataclass(frozen=True)
class SetUp:
    """What workers of a run have in common. classes: `registry.foreign`; threads: of each."""

    suite: Suite
    folder: Path
    datasets: Mapping[str, Dataset]
    device: torch.device
    threads: int
    classes: list[tuple[str, str, str, str, str | None]]


@dataclass
class Task:
    """Cells of one group, and what they cost; share, later: as in `Session.group`; again: how many have died of it."""

    members: list[Planned]
    cost: Cost
    share: tuple[int, int] = (0, 1)
    later: bool = False
    again: int = 0

    @property
    def cell(self) -> Cell:
        return self.members[0].cell


class _Result(RunResult):
    """Tells the parent what is written."""

    def __init__(self, folder: Path, parent: Connection) -> None:
        super().__init__(folder)
        self.parent = parent

    def add(self, cell_id: str, status: str) -> None:
        self.parent.send(("row", cell_id, status))


class _Alone(set[Part]):
    """Tells the parent which methods have been read in a fresh process, for the worker after this one."""

    def __init__(self, parent: Connection) -> None:
        super().__init__()
        self.parent = parent

    def add(self, part: Part) -> None:
        super().add(part)
        self.parent.send(("alone", part))


class _Watch:
    """Tells the parent how far it is."""

    def __init__(self, parent: Connection) -> None:
        self.parent, self.last = parent, 0.0

    def group(self, text: str, cost: Cost | None) -> None:
        raise AssertionError("the parent knows")

    def fit(self, step: Progress) -> None:
        if (now := time.monotonic()) - self.last >= _PAUSE or step.step == step.steps:
            self.last = now
            self.parent.send(("watch", "fit", step))

    def chunk(self, done: int, total: int) -> None:
        self.parent.send(("watch", "chunk", done, total))

    def drift(self, done: int, total: int) -> None:
        self.parent.send(("watch", "drift", done, total))

    def measure(self, cells: int) -> None:
        self.parent.send(("watch", "measure", cells))


class _Warnings(logging.Handler):
    """What is logged here is logged by the parent."""

    def __init__(self, parent: Connection) -> None:
        super().__init__(logging.WARNING)
        self.parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self.parent.send(("log", record.name, record.levelno, record.getMessage()))


def _main(parent: Connection, set_up: int, page: int) -> None:
    tasks: queue.SimpleQueue[tuple[Task, set[Part]]] = queue.SimpleQueue()
    listen(parent, tasks)
    log = logging.getLogger("malloc_bench")
    log.addHandler(_Warnings(parent))
    log.propagate = False
    try:
        given: SetUp = shared.load(set_up)
        torch.set_num_threads(given.threads)
        registry.adopt(given.classes)
        limits = given.suite.limits
        notes = Notes(Page(page), None if limits is None else limits.memory)
        result = _Result(given.folder, parent)
        session = Session(given.suite, given.folder, given.datasets, given.device, _Watch(parent), result, notes.begin)
        session.alone = _Alone(parent)
        while True:
            task, alone = tasks.get()
            session.alone |= alone
            session.group(task.members, task.share, task.later)
            notes.begin("", "")
            parent.send(("done", session.fits, session.ceilings))
    except BaseException as error:
        parent.send(("error", told(error), portable_error(error)))


def listen(parent: Connection, tasks: queue.SimpleQueue[Any]) -> None:
    """What the parent gives, from now on; when it is gone this process is gone too, with all that it has started."""

    def hear() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                tasks.put(parent.recv())
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=hear, daemon=True).start()


def enter(main: Callable[[Connection, int, int], None]) -> None:
    """Run a worker's process: descriptors that are its own, of a pipe, of what it is given, and of a page."""
    for descriptor in (ours := [int(word) for word in sys.argv[1:]]):
        os.set_inheritable(descriptor, False)
    main(Connection(ours[0]), *ours[1:])


def portable_error(error: BaseException) -> BaseException | None:
    """An error of ours as it is, which the parent raises; None for any other."""
    return error if type(error).__module__.startswith("malloc_bench.") else None


if __name__ == "__main__":
    enter(_main)
