"""A page of memory that a worker writes and its parent reads: whose method works at what, and since when.

It costs a worker no call of the system, wakes nobody, and is there when the worker is not.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import mmap
import os
import struct
import time
from pathlib import Path
from typing import NamedTuple

from malloc_bench.evaluation.trial import MEASURING
from malloc_bench.run.session import ALONE, TRAINING

_LAYOUT = struct.Struct("<Qdd64s64sQ")
SIZE = mmap.PAGESIZE
#: not among the seconds of a cell but each turn by itself -> seconds that it may take beyond the limit
APART = {MEASURING: 0.0, ALONE: 300.0, TRAINING: math.inf}


class Now(NamedTuple):
    """turn: how many came before; cell: its id, "" none; since: on the clock, infinity: nobody asks how long it takes;

    spent: seconds of the cell before; memory: bytes that the process had then.
    """

    turn: int
    since: float
    spent: float
    cell: str
    what: str
    memory: int


class Page:
    """The page behind a file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.map = mmap.mmap(descriptor, SIZE)

    def write(self, now: Now) -> None:
        fields = now.turn, now.since, now.spent, now.cell.encode(), now.what.encode(), now.memory
        _LAYOUT.pack_into(self.map, 8, *fields)
        self.map[:8] = self.map[8:16]  # the turn again: who reads half of two turns sees it

    def read(self) -> Now | None:
        """None while it is being written."""
        turn, since, spent, cell, what, memory = _LAYOUT.unpack_from(self.map, 8)
        if self.map[:8] != turn.to_bytes(8, "little"):
            return None
        return Now(turn, since, spent, _text(cell), _text(what), memory)


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")


class Notes:
    """A worker's: told by a session whose method works at what (`begin`), it notes that on the page.

    limit: bytes of memory; beyond three quarters of it, what others no longer use is given back before a method begins.
    """

    def __init__(self, page: Page, limit: float | None = None) -> None:
        self.page, self.turn, self.since = page, 0, 0.0
        self.limit, self.much = limit, math.inf if limit is None else 0.75 * limit
        self.cell = self.what = ""
        self.spent: dict[str, float] = {}

    def begin(self, what: str, cell: str) -> None:
        now = time.monotonic()
        if self.cell and self.what not in APART:
            self.spent[self.cell] = self.spent.get(self.cell, 0.0) + now - self.since
        self.turn, self.since, self.cell, self.what = self.turn + 1, now, cell, what
        spent = 0.0 if what in APART else self.spent.get(cell, 0.0)
        since = now + APART.get(what, 0.0) if cell else math.inf
        memory = memory_of(os.getpid())
        if self.limit is not None and cell and memory > self.much:
            give_back()
            memory = memory_of(os.getpid())
            self.much = max(self.much, memory + self.limit / 10)
        self.page.write(Now(self.turn, since, spent, cell, what, memory))


def give_back() -> None:
    """Let the system have the memory that this process holds and does not use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def memory_of(process: int) -> int:
    """Bytes of a process's own in memory: not of files that it has mapped. 0 where it is gone, or nobody says."""
    try:
        resident, shared = Path(f"/proc/{process}/statm").read_bytes().split()[1:3]
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * mmap.PAGESIZE
