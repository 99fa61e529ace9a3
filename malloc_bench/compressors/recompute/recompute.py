"""Keep the raw events and rebuild the state when it is asked for."""

from dataclasses import dataclass
from typing import Any

from malloc_bench.compressors.base import Compressor, grows
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import Events, MissingStatistic, Prefill, UserState


def raw_events(prefill: Prefill) -> Events:
    """The history's ids, times and kinds, the latter where the backbone reads them; raises MissingStatistic."""
    if prefill.events is None:
        raise MissingStatistic("the raw events are not known: this Prefill was made of tensors")
    slots = prefill.segment(0).slots
    timed = slots is not None and slots.timestamps is not None
    known = prefill.events
    times, kinds = known.times if timed else None, known.kinds if prefill.uses_kinds else None
    return Events(known.items, known.count, times, kinds=kinds)


@register("recompute")
@dataclass(frozen=True)
class Recompute(Compressor):
    """No state, only ids: half a percent of the bytes, nothing lost, and every request pays for the whole prefill."""

    family = "recompute"
    paper = "none: what caching is meant to save"
    formula = "read = prefill of all events, then read"
    growth = grows(memory="n", read="n^2 L d + n L d^2")
    stores = "item ids (int32), times (int64) and kinds (uint8) where the backbone reads them"

    @property
    def takes_budget(self) -> bool:
        return False

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        events = raw_events(prefill)
        return UserState((), events.count, events)
