"""A parent that has imported what runs import, and what is done in forks of it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trial import FAULT, Trial


def reporting(wanted: bool) -> None:
    """Whether runs write their reports, which take longer than all else."""
    from malloc_bench.report import write_report
    from malloc_bench.run import runner

    runner.write_report = write_report if wanted else lambda folder: []


def preload(trials: Iterable[Trial]) -> None:
    """Have imported what these trials import, so that forks need not.

    In the forks nothing is read in a fresh process, a store's silence is told after half a second, and what hurts a run
    goes along to the nodes of a cluster.
    """
    from malloc_bench.measure.stores import redis
    from malloc_bench.run import session
    from malloc_bench.run.executors import cluster
    from malloc_bench.run.executors.base import Executor

    whole = Executor.all

    def trusting(self: Executor) -> None:
        self.session.alone |= {each.cell.compressor for each in self.session.result.plan}
        whole(self)

    Executor.all = trusting
    session.read_alone = lambda method: None
    redis.SECONDS, redis.STARTS = 0.5, 2.0  # the latter for a busy machine
    cluster._PASSED += FAULT
    for trial in trials:
        listed = trial.base / "modules"
        exits, os._exit = os._exit, _telling(listed, os._exit)
        try:
            assert trial.run().code == 0, trial.said()
        finally:
            os._exit = exits
        for name in json.loads(listed.read_text()):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    warm()


def _telling(listed: Path, leave: Callable[[int], Any]) -> Callable[[int], Any]:
    def left(code: int) -> None:
        listed.write_text(json.dumps([name for name in sys.modules if name != "__main__"]))
        leave(code)

    return left


def warm() -> None:
    """Have compiled kernels loaded, which takes a second in each fork."""
    import torch

    from malloc_bench.backbones import get_backbone
    from malloc_bench.compressors import Budget, get_compressor
    from malloc_bench.testing import World

    world = World("sasrec", get_backbone("sasrec", 60, True, heads=2, dim=8, layers=1, max_length=64).eval())
    with torch.no_grad():
        for name in ("full", "recent", "int8", "svd", "none"):
            method = get_compressor(name)
            world.read(
                method.compress(world.prefill(method.needs), Budget.parse(0.25) if method.takes_budget else None)
            )


def forked(work: Callable[..., Any], *given: Any) -> Callable[[], Any]:
    """work(*given) in a fork; what waits for its result: an Exception where it raised or crashed."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    if not (pid := os.fork()):
        try:
            found = work(*given)
        except BaseException as error:
            found = RuntimeError(f"{type(error).__name__}: {error}")
        with os.fdopen(theirs, "wb") as file:
            pickle.dump(found, file)
        sys.stdout.flush()
        os._exit(0)
    os.close(theirs)

    def result() -> Any:
        with os.fdopen(ours, "rb") as file:
            told = file.read()
        os.waitpid(pid, 0)
        return pickle.loads(told) if told else RuntimeError("crash")

    return result
