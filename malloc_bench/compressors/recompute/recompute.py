"""Keep the raw events and rebuild the state when it is asked for."""

from dataclasses import dataclass
from typing import Any

from malloc_bench.compressors.base import Budget, Compressor
from malloc_bench.registry import register
from malloc_bench.state import Events, MissingStatistic, Prefill, UserState


def raw_events(prefill: Prefill) -> Events:
    """The history's ids, and its times where the backbone reads them; raises MissingStatistic where unknown."""
    if prefill.events is None:
        raise MissingStatistic("the raw events are not known: this Prefill was made of tensors")
    slots = prefill.segment(0).slots
    timed = slots is not None and slots.timestamps is not None
    return Events(prefill.events.items, prefill.events.count, prefill.events.times if timed else None)


@register("recompute")
@dataclass(frozen=True)
class Recompute(Compressor):
    """No state, only ids: half a percent of the bytes, nothing lost, and every request pays for the whole prefill."""

    family = "recompute"
    paper = "none: what caching is meant to save"
    formula = "read = prefill of all events, then read"
    stores = "item ids (int32), and times (int64) where the backbone reads them"

    @property
    def takes_budget(self) -> bool:
        return False

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        events = raw_events(prefill)
        return UserState((), events.count, events)
