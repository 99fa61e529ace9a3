"""Keep the last raw events and rebuild a short state from them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.recompute.recompute import raw_events
from malloc_bench.compressors.sizing import COUNT_BYTES, Budget, slots_within
from malloc_bench.compressors.windowing.recent import Recent
from malloc_bench.registry import register
from malloc_bench.state import Prefill, UserState

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("truncate")
@dataclass(frozen=True)
class Truncate(Recent):
    """The model of a shorter history: as many events as `recent` could keep slots in the same budget, as raw ids.

    So it stays far below its bytes; what the budget buys here is the cost of a read. Of a memory without slots each
    event is charged an equal share, so a fraction of its bytes is that fraction of the events.
    """

    family = "recompute"
    paper = "none: the history cut short, as most deployed models do"
    formula = "read = prefill of the newest k events, then read"
    growth = grows(memory="k", read="k^2 L d + k L d^2")
    stores = "k item ids (int32), times (int64) and kinds (uint8) where the backbone reads them"

    def budget_unit(self, budget: Budget) -> str:
        return "events"  # of raw ids, as many as slots would fit

    def supports(self, backbone: "Backbone") -> str | None:
        return None  # any state can be rebuilt from ids

    def slots(self, prefill: Prefill, budget: Budget) -> Tensor:
        if prefill.segment(0).slots is not None:
            return super().slots(prefill, budget)
        length, target = prefill.state.length.long(), budget.target(prefill.state.nbytes())
        return length.clamp(max=budget.slots) if target is None else slots_within(target, length, self.sizes(prefill))

    def sizes(self, prefill: Prefill) -> Callable[[Tensor], Tensor]:
        if prefill.segment(0).slots is not None:
            return super().sizes(prefill)
        length, full = prefill.state.length.long(), prefill.state.nbytes()
        return lambda n: (full * n // length.clamp(min=1)).maximum(COUNT_BYTES * (1 + n))

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        events = raw_events(prefill).last(k)
        return UserState((), events.count, events)
