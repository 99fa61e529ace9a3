"""How long calls take: taken in turns, round after round, so that what else the machine does falls on all alike."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import NamedTuple, TypeVar

import numpy as np
import torch

K = TypeVar("K", bound=Hashable)
N = TypeVar("N", bound=Hashable)
Call = Callable[[], object]

log = logging.getLogger(__name__)

MOST = 1000  # rounds
ENOUGH = 500  # samples below which a 99th percentile says nothing


@dataclass(frozen=True)
class Samples:
    """Seconds per call, in the order in which they were taken: on the wall, and CPU time of the whole process."""

    wall: list[float]
    cpu: list[float]

    def __len__(self) -> int:
        return len(self.wall)


def summary(seconds: Sequence[float], users: int = 1) -> dict[str, float | None]:
    """p50, p95 and p99 in milliseconds per user: a batch's seconds divided by its users.

    So it is what one user's request costs a machine that serves `users` at a time, not how long a user waits; the
    percentiles are over batches. p99 is None below 500 samples, all are None without any.
    """
    if not len(seconds):
        return {"p50": None, "p95": None, "p99": None}
    p50, p95, p99 = (float(x) * 1000 / users for x in np.percentile(seconds, (50, 95, 99)))
    return {"p50": p50, "p95": p95, "p99": p99 if len(seconds) >= ENOUGH else None}


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """torch with n threads inside, with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Ratio(NamedTuple):
    """Median of what one call took over what another took in the same round, and its 95 % interval."""

    value: float
    lo: float
    hi: float

    @property
    def tight(self) -> bool:
        """Known to 10 % either way."""
        return self.hi - self.lo < 0.2 * self.value


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of two calls' seconds, round by round; N > 0 rounds.

    The interval is a pair of order statistics, which holds the median whatever the distribution; below 6 rounds the
    extremes, which hold it less often.
    """
    ordered = np.sort(np.asarray(ours) / np.maximum(theirs, 1e-12))
    drop = _dropped(len(ordered))
    return Ratio(float(np.median(ordered)), float(ordered[drop]), float(ordered[-1 - drop]))


@lru_cache(maxsize=2 * MOST)
def _dropped(n: int) -> int:
    """How many of n ordered values to leave out at either end: the most that n coin tosses fall short of in 2.5 %."""
    drop, below = 0, comb(n, 0)
    while (below + comb(n, drop + 1)) * 40 <= 2**n:
        drop, below = drop + 1, below + comb(n, drop + 1)
    return drop


def interleaved(
    calls: Mapping[K, Call],
    device: str | torch.device = "cpu",
    seconds: float = 0.5,
    repeats: int = 5,
    most: int = MOST,
) -> dict[K, Samples]:
    """Times of several calls taken in turns: at least `repeats` rounds, then until they have taken `seconds`, at most

    `most` rounds (or `repeats`, if that is more). A call that raises ends it.
    """

    def enough(_: None, samples: Mapping[K, Samples], spent: float) -> bool:
        return spent >= seconds or len(next(iter(samples.values()))) >= most

    return in_rounds({None: calls}, enough, device, repeats)[None] if calls else {}


def in_rounds(
    groups: Mapping[K, Mapping[N, Call]],
    enough: Callable[[K, Mapping[N, Samples], float], bool],
    device: str | torch.device = "cpu",
    repeats: int = 5,
    failed: Callable[[K], None] | None = None,
    visit: Callable[[K], None] = lambda key: None,
) -> dict[K, dict[N, Samples]]:
    """Times of groups of calls: each round visits every group that has not had `repeats` rounds and `enough` of them.

    In a visit each call is made once, each time beginning with another, so that calls of one group are neighbours in
    time and every group is spread over the whole of it; a group's first visit is not counted. enough: (group, samples,
    seconds that they took in all). failed: told of a group of which a call raises (within the handler); it is left
    out. None: the exception goes on. visit: told of a group before its calls. The garbage collector rests meanwhile.
    Waits for a CUDA device around each call.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing
    samples: dict[K, dict[N, Samples]] = {key: {n: Samples([], []) for n in g} for key, g in groups.items()}
    spent = dict.fromkeys(groups, 0.0)
    left = {key: list(calls) for key, calls in groups.items()}
    for key in list(left):
        visit(key)
        with _failing(key, left, samples, failed):
            for call in groups[key].values():
                call()
    collecting = gc.isenabled()
    gc.disable()
    try:
        rounds = 0
        while left:
            for key, names in list(left.items()):
                visit(key)
                with _failing(key, left, samples, failed):
                    first = rounds % max(len(names), 1)
                    for name in names[first:] + names[:first]:
                        call = groups[key][name]
                        wait()
                        cpu, wall = time.process_time(), time.perf_counter()
                        result = call()
                        wait()
                        samples[key][name].wall.append(time.perf_counter() - wall)
                        samples[key][name].cpu.append(time.process_time() - cpu)
                        del result  # freeing is not timed
                        spent[key] += samples[key][name].wall[-1]
            rounds += 1
            for key in [key for key in left if rounds >= repeats and enough(key, samples[key], spent[key])]:
                del left[key]
    finally:
        if collecting:
            gc.enable()
    return samples


@contextlib.contextmanager
def _failing(
    key: K, left: dict[K, list[N]], samples: dict[K, dict[N, Samples]], failed: Callable[[K], None] | None
) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit):
        if failed is None:
            raise
        failed(key)
        left.pop(key, None)
        samples.pop(key, None)


def _nothing() -> None:
    return None
