"""Keep the last raw events and rebuild a short state from them."""

from dataclasses import dataclass

from torch import Tensor

from malloc_bench.compressors.recompute.recompute import raw_events
from malloc_bench.compressors.windowing.recent import Recent
from malloc_bench.registry import register
from malloc_bench.state import Prefill, UserState


@register("truncate")
@dataclass(frozen=True)
class Truncate(Recent):
    """The model of a shorter history: as many events as `recent` could keep slots in the same budget, as raw ids.

    So it stays far below its bytes; what the budget buys here is the cost of a read.
    """

    family = "recompute"
    paper = "none: the history cut short, as most deployed models do"
    formula = "read = prefill of the newest k events, then read"
    stores = "k item ids (int32), and times (int64) where the backbone reads them"

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        events = raw_events(prefill).last(k)
        return UserState((), events.count, events)
