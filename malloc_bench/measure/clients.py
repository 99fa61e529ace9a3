"""Requests a second of several client processes, which end when they should, or are ended."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch

from malloc_bench.measure.stores import StoreError
from malloc_bench.registry import in_a_line

if TYPE_CHECKING:
    from malloc_bench.measure.serving import Request

_WITH_PARENT = 1  # PR_SET_PDEATHSIG
PATIENCE = 30.0  # seconds beyond those of measuring, after which a client is ended


def rate(request: Request, clients: int, seconds: float) -> float:
    """Requests a second of `clients` forked processes together, each with its own connection and every n-th user.

    All begin at once and go on for `seconds`, one request at least. Raises StoreError where a client fails, ends or
    hangs; none outlives the call.
    """
    fork: Any = multiprocessing.get_context("fork")  # what is read, weights and templates, is there without a copy
    started: list[tuple[Any, Connection]] = []
    try:
        for first in range(clients):
            ours, theirs = fork.Pipe()
            process = fork.Process(
                target=_serve, args=(theirs, request, first, clients, seconds, os.getpid()), daemon=True
            )
            started.append((process, ours))
            process.start()
            theirs.close()  # so that its end is the pipe's
        for _, pipe in started:
            _said(pipe, PATIENCE)
        for _, pipe in started:
            pipe.send(None)
        return sum(n / spent for n, spent in (_said(pipe, PATIENCE + seconds) for _, pipe in started))
    finally:
        for process, pipe in started:
            if process.pid is not None:
                process.kill()
                process.join()
            pipe.close()


def _said(pipe: Connection, seconds: float) -> Any:
    try:
        if pipe.poll(seconds):
            found = pipe.recv()
            if isinstance(found, str):
                raise StoreError(found)
            return found
    except (EOFError, OSError):
        raise StoreError("a client process ended before it was done") from None
    raise StoreError(f"a client process did not answer within {seconds:.0f} s")


def _end_with(parent: int) -> None:
    """Be killed when the parent is, whose lock on the run folder this process holds too (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def _serve(pipe: Connection, request: Request, first: int, step: int, seconds: float, parent: int) -> None:
    """In the client: says when it is warm, begins when it is told to, says (requests, seconds)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _end_with(parent)
    try:
        torch.set_num_threads(1)
        request.store, request.taken = request.store.client(), []
        users = request.users

        def once(n: int) -> None:
            request.at = (first + n * step) % users
            request()

        once(0)
        pipe.send(())
        if not pipe.poll(PATIENCE):
            return
        pipe.recv()
        began, n = time.perf_counter(), 0
        while n == 0 or time.perf_counter() - began < seconds:
            n += 1
            once(n)
        pipe.send((n, time.perf_counter() - began))
    except Exception as error:
        pipe.send(in_a_line(error))
