"""Whether kernels run, how they are compiled, and on how many threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

Loop = Callable[[int, int], object]  # over rows, of users and heads, from one to another
After = Callable[[], object] | None  # what is left to do when all rows are done
_SMALL = 1 << 16  # numbers that one thread reads faster than two can be woken
_off = 0


@contextmanager
def eager() -> Iterator[None]:
    """Plain torch alone: for counters of FLOPs, which see nothing else, and to compare."""
    global _off
    _off += 1
    try:
        yield
    finally:
        _off -= 1


def stopped() -> bool:
    """Whether this is within `eager()`."""
    return _off > 0


@cache
def compiled() -> bool:
    """Whether there is a compiler for CPUs here, and it is wanted."""
    return os.environ.get("MALLOC_BENCH_KERNELS", "") != "eager" and find_spec("numba") is not None


def fits(*given: Tensor) -> bool:
    """Whether a loop for CPUs may read these."""
    if _off or not compiled():
        return False
    grad = torch.is_grad_enabled()
    return not any([not x.is_cpu or (grad and x.requires_grad) for x in given])  # noqa: C419 - half its time


def array(x: Tensor) -> np.ndarray:
    """The numbers, in one piece."""
    return (x.detach() if x.requires_grad else x).contiguous().numpy()


@cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "malloc-bench-kernel")


def spread(call: Loop, rows: int, numbers: int) -> None:
    """call(start, stop) over all rows, on as many threads as torch has, where there is enough to do for them."""
    workers = min(torch.get_num_threads(), rows)
    if workers < 2 or numbers < _SMALL:
        call(0, rows)
        return
    edges = [rows * i // workers for i in range(workers + 1)]
    list(_pool(os.getpid(), torch.get_num_threads()).map(call, edges, edges[1:]))
