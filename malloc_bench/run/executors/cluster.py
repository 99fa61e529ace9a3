"""A Ray cluster: groups are its tasks, on a run folder that every node sees under the same path."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from malloc_bench import registry
from malloc_bench.registry import in_a_line, told
from malloc_bench.results import read_rows
from malloc_bench.run.executors import shared
from malloc_bench.run.executors.base import Executor, WorkerError, threads
from malloc_bench.run.executors.local import Local
from malloc_bench.run.executors.worker import SetUp, Task, portable_error
from malloc_bench.run.folder import FOR_NODES
from malloc_bench.run.progress import Shown, watching
from malloc_bench.run.session import Session, titled
from malloc_bench.suite.cells import Part
from malloc_bench.suite.plan import RunResult

log = logging.getLogger(__name__)

RETRIES = 3  # of a group whose nodes die
_PASSED = ("MALLOC_BENCH_HOME", "MALLOC_BENCH_DATA", "MALLOC_BENCH_KERNELS")
_LOOK, _PATIENCE = 1.0, 10.0  # seconds


class Cluster(Executor):
    """Groups as tasks of a Ray cluster, n at a time at most; address: of its head, None: as Ray finds it.

    A task asks for its threads as CPUs, and for a GPU where the run is on one. When its node dies what is left of it is
    run again where there is room, behind the chunks that are there; when this process dies, so do its tasks.
    """

    shares = False  # each node would train for its share

    def __init__(self, session: Session, watch: Shown, n: int, address: str | None = None) -> None:
        super().__init__(session, watch, n)
        try:
            import ray
        except ImportError:
            raise WorkerError("ray is not installed: pip install 'malloc-bench[ray]'") from None
        self.ray, self.address = ray, address
        self.needs = {"CPU": threads(n), **({"GPU": 1} if session.device.type == "cuda" else {})}
        self.before = {row["cell_id"]: row["digest"] for row in read_rows(session.folder / "rows")}

    def all(self) -> None:
        with self._connected():
            super().all()

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        ray, ending = self.ray, signal.getsignal(signal.SIGTERM)
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        variables = {"PYTHONPATH": path, **{name: os.environ[name] for name in _PASSED if name in os.environ}}
        try:
            if self.address and (found := re.fullmatch(r"([^:/]+):(\d+)", self.address)):
                socket.create_connection((found[1], int(found[2])), _PATIENCE).close()  # Ray would ask for minutes
            ray.init(
                self.address or "auto", runtime_env={"env_vars": variables}, logging_level=logging.ERROR,
                log_to_driver=False,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            where = self.address or "this machine"
            raise WorkerError(
                f"no Ray cluster answers at {where} (`ray start --head` begins one): {in_a_line(error)}"
            ) from None
        try:
            with contextlib.suppress(ValueError):  # only the main thread may; Ray has put its own there
                signal.signal(signal.SIGTERM, ending)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            if not any(all(node.get(name, 0) >= n for name, n in self.needs.items()) for node in nodes):
                asked = ", ".join(f"{n} {name}" for name, n in self.needs.items())
                raise WorkerError(f"no node of the Ray cluster has {asked}, which a group needs (OMP_NUM_THREADS)")
            yield
        finally:
            ray.shutdown()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        path = self.session.folder.resolve() / FOR_NODES
        try:
            with path.open("w+b") as file:
                yield file
        finally:
            path.unlink(missing_ok=True)

    def _end_all(self) -> None:
        self.ray.shutdown()

    def _do(self, tasks: Iterable[Task], n: int, set_up: BinaryIO) -> None:
        remote = self.ray.remote(_done).options(
            num_cpus=self.needs["CPU"], num_gpus=self.needs.get("GPU", 0), max_retries=0
        )
        queue, running = deque(tasks), dict[Any, tuple[Task, Shown]]()
        while queue or running:
            while queue and len(running) < n:
                task = queue.popleft()
                if members := self._left(task.members):
                    task = replace(task, members=members)
                    running[remote.remote(set_up.name, task, self.session.alone)] = task, self._lane(task)
            for ready in self.ray.wait(list(running), timeout=_LOOK)[0] if running else ():
                task, lane = running.pop(ready)
                try:
                    self._hear(*self.ray.get(ready))
                except self.ray.exceptions.RayTaskError as error:
                    raise portable_error(error.cause) or WorkerError(
                        f"a node failed: {told(error.cause)}; the run folder, this package and methods' files must lie "
                        "under the same path on every node"
                    ) from None
                except self.ray.exceptions.RayError as error:  # its node is gone, or Ray's process there
                    queue.extendleft(self._again(task, str(error).splitlines()[0]))
                lane.end()

    def _hear(self, written: dict[str, str], fits: Any, ceilings: Any, alone: set[Part], warnings: list[Any]) -> None:
        for name, level, text in warnings:
            logging.getLogger(name).log(level, "%s", text)
        for each in written.items():
            self.session.result.add(*each)
        self.session.fits |= fits
        self.session.ceilings |= ceilings
        self.session.alone |= alone

    def _again(self, task: Task, why: str) -> list[Task]:
        """What is left of a task whose node has died, beyond the rows that it has written; nothing: it is given up."""
        ids = {each.id for each in task.members}
        for row in read_rows(self.session.folder / "rows", quarantine=False):
            if row["cell_id"] in ids and row["digest"] != self.before.get(row["cell_id"]):
                self.session.result.add(row["cell_id"], row["status"])
        if task.again < RETRIES:
            log.warning("%s; its group is run again: %s", why, titled(task.members))
            return [replace(task, again=task.again + 1)]
        for each in self._left(task.members):
            self.session.fail(each, f"its group was given up: {RETRIES + 1} nodes died of it, the last: {why}")
        return []


class _Kept(logging.Handler):
    """What is logged on a node, for the process that waits."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.name, record.levelno, record.getMessage()))


def _done(set_up: str, task: Task, alone: set[Part]) -> tuple[Any, ...]:
    """On a node: one task by a worker that is watched there. Rows by status, what a session knows, and warnings."""
    kept = _Kept()
    logging.getLogger("malloc_bench").addHandler(kept)
    try:
        with Path(set_up).open("rb") as file, watching(True, 0.0) as watch:
            given: SetUp = shared.load(file.fileno())
            registry.adopt(given.classes)
            session = Session(given.suite, given.folder, given.datasets, given.device, watch, RunResult(given.folder))
            session.alone |= alone
            Local(session, watch, 1).run(task, file)
    finally:
        logging.getLogger("malloc_bench").removeHandler(kept)
    return session.result.written, session.fits, session.ceilings, session.alone, kept.records
