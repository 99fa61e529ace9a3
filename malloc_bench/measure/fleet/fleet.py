"""Bytes, cores, machines, money and power of a fleet, and at which rate of requests a kept state pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations, pairwise

from malloc_bench.measure.fleet.costs import Costs
from malloc_bench.measure.fleet.prices import Prices

GB = 1e9
MOST = 1e15  # of any number that is asked for
HOURS = 730.0  # of a month
DAY = 86_400.0

#: what is paid at x requests per user and day: the largest of a + b x
Lines = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Fleet:
    """What is to be served, and what it is served on. Raises ValueError that names a number out of range.

    users, each of so many `events`; requests and appended events a second of all users together. A machine has so many
    cores and GB (1e9 bytes) of RAM, or of SSD, for states. utilisation: the share of a core's time that is work.
    rebuild_every: appended events of a user after which a state is compressed again.
    """

    users: float
    events: float
    requests_per_second: float
    appends_per_second: float
    cores_per_machine: float = 64.0
    ram_gb_per_machine: float = 512.0
    ssd_gb_per_machine: float = 8_000.0
    utilisation: float = 0.5
    rebuild_every: float = 100.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value, least = getattr(self, each.name), each.name in ("requests_per_second", "appends_per_second")
            if not (value == 0 and least) and not 1 / MOST <= value <= MOST:
                low = "a number of at least 0" if least else "a number above 0"
                word = f"at most {MOST:g}" if value > MOST else low
                raise ValueError(f"--{each.name.replace('_', '-')}: expected {word}, not {value:g}")
        if self.utilisation > 1:
            raise ValueError(f"--utilisation: expected a share of at most 1, not {self.utilisation:g}")


@dataclass(frozen=True)
class Plan:
    """What a fleet needs with one method. Bytes and cores are of the whole fleet; memory is `ram` or `ssd`."""

    fleet: Fleet
    costs: Costs

    @property
    def bytes(self) -> float:
        return self.fleet.users * self.costs.bytes

    @property
    def cores(self) -> float:
        """In use."""
        return self._idle + self.fleet.requests_per_second * self._request

    @property
    def build_core_hours(self) -> float:
        """Once, to make every user's state."""
        return self.fleet.users * self.costs.build / 1000 / 3600 / self.fleet.utilisation

    def machines(self, memory: str) -> int:
        """Whole ones, as many as memory or cores need, whichever is more."""
        return math.ceil(at(self.in_machines(memory), self._asked) - 1e-9)

    def usd_month(self, prices: Prices, memory: str) -> float:
        return at(self.in_usd(prices, memory), self._asked)

    def kwh_month(self, prices: Prices, memory: str) -> float | None:
        """None without watts of the cores, while they work, and of the memory."""
        per_gb, per_core = getattr(prices, f"watts_per_gb_{memory}"), prices.watts_per_core
        if per_gb is None or per_core is None:
            return None
        return (self.bytes / GB * per_gb + self.cores * self.fleet.utilisation * per_core) * HOURS / 1000

    def in_machines(self, memory: str) -> Lines:
        """Machines, parts of them too: those of memory, and those of cores."""
        size, cores = getattr(self.fleet, f"{memory}_gb_per_machine") * GB, self.fleet.cores_per_machine
        return (self.bytes / size, 0.0), (self._idle / cores, self._daily / cores)

    def in_usd(self, prices: Prices, memory: str) -> Lines:
        """USD a month: memory and cores in use add up."""
        core = prices.usd_per_core_hour * HOURS
        held = self.bytes / GB * getattr(prices, f"usd_per_gb_month_{memory}")
        return ((held + self._idle * core, self._daily * core),)

    @property
    def _asked(self) -> float:
        """Requests per user and day."""
        return self.fleet.requests_per_second * DAY / self.fleet.users

    @property
    def _request(self) -> float:
        """Cores for one request a second."""
        return self.costs.read / 1000 / self.fleet.utilisation

    @property
    def _daily(self) -> float:
        """Cores for one request per user and day."""
        return self._request * self.fleet.users / DAY

    @property
    def _idle(self) -> float:
        """Cores that appends alone take."""
        one = self.costs.append + self.costs.rebuild / self.fleet.rebuild_every
        return self.fleet.appends_per_second * one / 1000 / self.fleet.utilisation


def at(lines: Lines, x: float) -> float:
    """What is paid at x."""
    return max(a + b * x for a, b in lines)


def break_even(kept: Lines, rebuilt: Lines) -> float | None:
    """Requests per user and day from which on `kept` is never dearer than `rebuilt`; None: it stays dearer."""
    pairs = combinations([*kept, *rebuilt], 2)
    points = sorted({0.0, *(x for (a, b), (c, d) in pairs if b != d and (x := (c - a) / (b - d)) > 0)})
    between = [(x + y) / 2 for x, y in pairwise(points)]
    *dearer, last = (at(kept, x) > at(rebuilt, x) * (1 + 1e-12) for x in [*between, 2 * points[-1] + 1])
    return None if last else max((end for end, worse in zip(points[1:], dearer) if worse), default=0.0)
