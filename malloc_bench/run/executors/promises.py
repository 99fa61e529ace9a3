"""The promises of a user's method, tried in a process of its own that is ended beyond the limits of a cell."""

from __future__ import annotations

import queue
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from malloc_bench import registry
from malloc_bench.run.executors import shared
from malloc_bench.run.executors.local import LOOK, Worker, too_long, too_much
from malloc_bench.run.executors.page import Notes, Page
from malloc_bench.run.executors.worker import enter, listen
from malloc_bench.run.session import ALONE
from malloc_bench.suite.cells import Part
from malloc_bench.suite.file import Limits
from malloc_bench.testing import Check, broken_promises

_FIRST = "a first compression"


def broken_within(parts: Sequence[Part], limits: Limits | None) -> list[str]:
    """The lines of `broken_promises` (quick) of methods. Each check may take what a cell may; after one that takes more

    none is tried. limits: None: they are tried in this process. Raises ValueError as `broken_promises` does.
    """
    if limits is None or not parts:
        return [line for part in parts for line in broken_promises(part.checked(), quick=True)]
    with tempfile.TemporaryFile() as file:
        threads = torch.get_num_threads()
        shared.dump((registry.foreign(), list(parts), limits, threads), file)
        worker = Worker(file, threads, __name__)
        try:
            return _heard(worker, limits)
        finally:
            worker.close()


def _heard(worker: Worker, limits: Limits) -> list[str]:
    broken: list[str] = []
    while True:
        worker.pipe.poll(LOOK)
        gone, now = worker.ended(), worker.page.read()
        for kind, said in worker.said():
            if kind == "done":
                return broken
            if kind == "error":
                raise ValueError(said)
            broken += said
        why = f"its process was {worker.how()}" if gone else None
        if not gone and now is not None and now.cell:
            why = too_long(limits, now) or (too_much(limits, now, worker.process.pid) or (None,))[0]
        if why is not None:
            return [f"{now.cell if now and now.cell else _FIRST}: {why}; nothing after it was tried", *broken]


def _main(parent: Connection, given: int, page: int) -> None:
    listen(parent, queue.SimpleQueue())
    classes, parts, limits, threads = shared.load(given)
    torch.set_num_threads(threads)
    registry.adopt(classes)
    notes = Notes(Page(page), limits.memory)

    def trying(check: Check) -> None:
        notes.begin(ALONE if check.label == "fresh process" else "", str(check))

    try:
        for part in parts:
            notes.begin("", _FIRST)
            parent.send(("broken", broken_promises(part.checked(), quick=True, trying=trying)))
        notes.begin("", "")
        parent.send(("done", None))
    except ValueError as error:
        parent.send(("error", str(error)))


if __name__ == "__main__":
    enter(_main)
