"""Partitions of events: which of Climber's blocks an event belongs to, and which scenario a request."""

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


def _times(events: Events) -> Tensor:
    assert events.times is not None, "refused before"
    return events.times


def _kinds(events: Events) -> Tensor:
    if events.kinds is None:
        raise ValueError(
            "climber with strategy feedback reads what users did, but the data has no ratings and no behaviours"
        )
    return events.kinds.long()


def balanced(categories: Tensor, n: int) -> Tensor:
    """[n_items + 1] int64, the block of each item from its category [n_items] (and 0 for no item, first).

    The categories from the largest down, in items, each into the block that has the fewest by then.
    """
    sizes = torch.bincount(categories)
    several = int((sizes > 0).sum())
    if several < n:
        raise ValueError(
            f"climber with strategy category keeps whole categories together: {n} blocks, and {several} of them"
        )
    blocks, load = torch.zeros_like(sizes), [0] * n
    for category in sizes.argsort(descending=True, stable=True).tolist():
        blocks[category] = least = load.index(min(load))
        load[least] += int(sizes[category])
    return torch.cat([categories.new_zeros(1), blocks[categories]])


#: name -> block 0..n-1 of events, of their positions [B or 1, S] in the kept history and of n: [B, S]. Looks at nothing
#: but the event itself, so that an event never changes its block
STRATEGIES: dict[str, Callable[[Events, Tensor, int], Tensor]] = {
    "item_hash": lambda events, positions, n: (events.items.long() * 2_654_435_761 >> 16) % n,
    "part_of_day": lambda events, positions, n: _part_of_day(_times(events), n),
    "day_of_week": lambda events, positions, n: _day_of_week(_times(events)) * n // 7,
    "feedback": lambda events, positions, n: _kinds(events) * n // 256,
    "stride": lambda events, positions, n: (positions % n).expand_as(events.items),
}
TIMED = ("part_of_day", "day_of_week")  # strategies that read times
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
