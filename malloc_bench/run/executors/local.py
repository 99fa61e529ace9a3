"""Workers on this machine: groups are given to them, rows and chunks come back, and who goes too far is ended."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO

from malloc_bench.run.executors.base import Executor, WorkerError, threads
from malloc_bench.run.executors.page import SIZE, Now, Page, memory_of
from malloc_bench.run.executors.worker import Task
from malloc_bench.run.progress import Shown
from malloc_bench.run.session import TRAINING, Session, titled
from malloc_bench.suite.cells import Part
from malloc_bench.suite.file import Limits

log = logging.getLogger(__name__)

LOOK = 0.05  # seconds between two looks at what has limits
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS", "NUMBA_NUM_THREADS")
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # no method's own end


class Worker:
    """A process, and what it is at. task, lane: None while it waits; module: what it runs."""

    def __init__(self, set_up: BinaryIO, threads: int, module: str = "malloc_bench.run.executors.worker") -> None:
        self.pipe, theirs = Pipe()
        with theirs, tempfile.TemporaryFile() as page:
            page.truncate(SIZE)
            self.page = Page(page.fileno())
            passed = theirs.fileno(), set_up.fileno(), page.fileno()
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)}
            environment |= {name: environment.get(name, str(threads)) for name in _THREADS}
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, passed)],
                pass_fds=passed, stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
            )  # fmt: skip
        self.task: Task | None = None
        self.lane: Shown | None = None

    def give(self, task: Task, alone: set[Part], lane: Shown) -> None:
        self.task, self.lane = task, lane
        with contextlib.suppress(BrokenPipeError):  # it is dead, which shows
            self.pipe.send((task, alone))

    def done(self) -> None:
        assert self.lane is not None
        self.lane.end()
        self.task, self.lane = None, None

    def said(self) -> Iterator[tuple[Any, ...]]:
        """Messages that are there; what a process that was killed has said by half is not."""
        with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
            while self.pipe.poll():
                yield self.pipe.recv()

    def ended(self) -> bool:
        return self.process.poll() is not None

    def how(self) -> str:
        """It ended."""
        code = self.process.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def kill(self) -> None:
        """With all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self.pipe.close()


def too_long(most: Limits, now: Now) -> str | None:
    """Why what a worker is at takes too long, if it does."""
    seconds = now.spent + time.monotonic() - now.since
    if most.seconds is None or seconds <= most.seconds:
        return None
    return f"it took {seconds:.0f} s, the limit is {most.seconds:g} s"


def too_much(most: Limits, now: Now, process: int) -> tuple[str, bool] | None:
    """Why a worker's process has too much in memory, if it has, and whether it is most of all its present method's."""
    if most.memory is None or (memory := memory_of(process)) <= most.memory:
        return None
    sizes = [f"{size / 1e9:.1f} GB" for size in (memory, now.memory, most.memory)]
    why = "its process had {} in memory, {} of them before it began; the limit is {}".format(*sizes)
    return why, memory - now.memory > most.memory / 2


class Local(Executor):
    """Workers on this machine, n at a time."""

    def __init__(self, session: Session, watch: Shown, n: int) -> None:
        super().__init__(session, watch, n)
        self.limits = session.suite.limits or Limits()
        self.workers: list[Worker] = []
        self.queue: deque[Task] = deque()
        self.again: set[str] = set()  # cells that began anew, as most of the memory was not theirs

    def run(self, task: Task, set_up: BinaryIO) -> None:
        """One task, in another's name; raises as `all`."""
        try:
            self._do([task], 1, set_up)
        finally:
            self._end_all()

    def _opened(self) -> contextlib.AbstractContextManager[BinaryIO]:
        return tempfile.TemporaryFile(dir=self.session.folder)

    def _end_all(self) -> None:
        while self.workers:
            self.workers.pop().close()

    def _do(self, tasks: Iterable[Task], n: int, set_up: BinaryIO) -> None:
        self.queue.extend(tasks)
        while True:
            busy = sum(worker.task is not None for worker in self.workers)
            while self.queue and busy < n:
                task = self.queue.popleft()
                if members := self._left(task.members):
                    self._idle(set_up).give(replace(task, members=members), self.session.alone, self._lane(task))
                    busy += 1
            if not busy:
                return
            limited = self.limits.seconds or self.limits.memory
            wait([worker.pipe for worker in self.workers], timeout=LOOK if limited else 10 * LOOK)
            for worker in list(self.workers):
                gone = worker.ended()  # asked before it is heard: what it said last counts
                for message in worker.said():
                    self._hear(worker, *message)
                if gone:
                    self._dead(worker)
                elif limited and worker.task is not None:
                    self._look(worker)

    def _idle(self, set_up: BinaryIO) -> Worker:
        found = next((worker for worker in self.workers if worker.task is None), None)
        if found is None:
            self.workers.append(found := Worker(set_up, threads(self.n)))
        return found

    def _hear(self, worker: Worker, kind: str, *said: Any) -> None:
        if kind == "row":
            self.session.result.add(*said)
        elif kind == "alone":
            self.session.alone.add(*said)
        elif kind == "watch" and worker.lane is not None:
            getattr(worker.lane, said[0])(*said[1:])
        elif kind == "log":
            logging.getLogger(said[0]).log(said[1], "%s", said[2])
        elif kind == "done":
            self.session.fits |= said[0]
            self.session.ceilings |= said[1]
            worker.done()
        elif kind == "error":
            raise said[1] or WorkerError(f"a worker failed: {said[0]}")

    # ---- who goes too far

    def _look(self, worker: Worker) -> None:
        """End a worker whose method is beyond a limit; who had most of its memory from others tries again, first."""
        now = worker.page.read()
        if now is None or not now.cell or now.what == TRAINING:
            return
        if (why := too_long(self.limits, now)) is not None:
            self._end(worker, now, why)
        elif (found := too_much(self.limits, now, worker.process.pid)) is not None:
            why, own = found
            own = own or now.cell in self.again
            self.again.add(now.cell)
            self._end(worker, now, why if own else None)

    def _dead(self, worker: Worker) -> None:
        """What a worker that has died was at is tried again once; what its own method has killed is not."""
        now, task, code = worker.page.read(), worker.task, worker.process.returncode
        how = worker.how()
        own = now is not None and now.cell and task is not None and (task.again or -code not in _FROM_OUTSIDE)
        left = self._end(worker, now if own else None, f"its process was {how}" if own else None)
        if left is None or own:
            return
        if not left.again:
            log.warning("a worker was %s; its group is run again: %s", how, titled(left.members))
            left.again = 1
            return
        for each in self._left(left.members):
            self.session.fail(each, f"its group was given up: two workers died of it, the last was {how}")

    def _end(self, worker: Worker, now: Now | None, why: str | None) -> Task | None:
        """Kill a worker. What is left of its task is the next, without the cell that fails, where there is a reason."""
        worker.kill()
        for message in worker.said():
            self._hear(worker, *message)
        worker.pipe.close()
        self.workers.remove(worker)
        if (task := worker.task) is None:
            return None
        own = [each for each in self._left(task.members) if now is not None and each.id == now.cell]
        if why is not None and now is not None:
            for each in own:
                self.session.fail(each, f"{why} ({now.what})")
        task.members = own + [each for each in task.members if each not in own]
        self.queue.appendleft(task)
        return task
