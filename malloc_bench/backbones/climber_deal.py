"""How Climber deals events out: which block an event belongs to, which scenario a request."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from malloc_bench.state import Events

_DAY = 86_400


def _part_of_day(times: Tensor, parts: int) -> Tensor:
    return times % _DAY * parts // _DAY


def _day_of_week(times: Tensor) -> Tensor:
    return (times // _DAY + 3) % 7  # 0 is Monday: the epoch began on a Thursday


#: name -> block 0..n-1 of events from their items, times and n alone, so that an event never changes its block
STRATEGIES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "item_hash": lambda items, times, n: (items.long() * 2_654_435_761 >> 16) % n,
    "part_of_day": lambda items, times, n: _part_of_day(times, n),
    "day_of_week": lambda items, times, n: _day_of_week(times) * n // 7,
}
#: name -> (how many scenarios, which one a request at these times belongs to)
SCENARIOS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "one": (1, torch.zeros_like),
    "part_of_day": (4, lambda times: _part_of_day(times, 4)),
    "weekend": (2, lambda times: (_day_of_week(times) >= 5).long()),
}


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where mask [B, S] is true, in order: [B, K] int64, of which the first [B] int32 count; the rest is padding."""
    count = mask.sum(1, dtype=torch.int32)
    width = int(count.max()) if len(count) else 0
    return (~mask).int().argsort(dim=1, stable=True)[:, :width], count


def pick(events: Events, index: Tensor, count: Tensor) -> Events:
    """The events at index [B, K], of which the first count [B] are real."""

    def at(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.gather(1, index)

    return Events(events.items.gather(1, index), count, at(events.times), at(events.next_times))
