"""Keep ids for the lowest layer, whose keys and values need no attention to be made."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from malloc_bench.compressors.base import Compressor, Sources, as_compressor, grows
from malloc_bench.compressors.recompute.inputs import refusal
from malloc_bench.compressors.sizing import COUNT_BYTES, Budget
from malloc_bench.registry import register
from malloc_bench.state import Embedded, Layer, MissingStatistic, Normed, Prefill, Stats, UserState

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("ids_below")
@dataclass(frozen=True)
class IdsBelow(Compressor):
    """The lowest layer's keys and values follow from an event and its position alone, so that four bytes an event
    stand for them, exactly. The layers above are kept whole, or as an `inner` method keeps them.

    inner: a name, {name: {parameter: value}} or a compressor, which gets what the budget leaves; None: float32.
    """

    inner: Any = None

    family = "recompute"
    paper = "none: a shallow layer's state is a function of its event"
    formula = "k = act(W_k norm(E[item] + P[position])) in the lowest layer, v likewise; above, what `inner` reads"
    growth = grows(memory="n + n L d", read="n L d")
    stores = "an item id (int32) of every event, and the upper layers; tables and maps are the backbone's own"

    def __post_init__(self) -> None:
        if self.inner is not None:
            object.__setattr__(self, "inner", as_compressor(self.inner))
            if self.inner.structural or self.inner.fit_parts() or self.inner.family in ("recompute", "chain"):
                raise ValueError(f"ids_below: inner keeps or writes slots and is not fitted, not {self.inner.name}")

    @property
    def needs(self) -> Stats:
        return Stats(projections=True, events=True) | (self.inner.needs if self.inner else Stats())

    @property
    def takes_budget(self) -> bool:
        return self.inner is not None and self.inner.takes_budget

    def accepts(self, budget: Budget) -> str | None:
        whole = "ids_below keeps every event in the lowest layer: give its budget as a fraction or in bytes"
        return whole if budget.slots is not None else self.inner and self.inner.accepts(budget)

    def supports(self, backbone: "Backbone") -> str | None:
        return refusal(self.name, backbone) or (self.inner and self.inner.supports(backbone))

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        if budget is not None and budget.fraction is not None and budget.fraction >= 1:
            return prefill.state
        above, below = _upper(prefill), self._lowest(prefill)
        state = above.state
        if self.takes_budget and len(above.layers):
            target = None if budget is None else budget.target(prefill.full_bytes())
            if target is None:
                raise ValueError("ids_below needs a budget" if budget is None else self.accepts(budget))
            left = (target - below.nbytes() + COUNT_BYTES).clamp(min=0)  # one length for both
            state = self.inner.compress(replace(above, whole=2 * left), Budget(0.5))
        elif self.inner is not None:
            state = self.inner.compress(above)
        lower, upper, depth = iter(below.layers), iter(state.layers), len(prefill.layers) // prefill.stacks
        layers = tuple(next(upper if layer % depth else lower) for layer in prefill.layers)
        return UserState(layers, prefill.state.length)

    def floor(self, prefill: Prefill) -> Tensor:
        above = _upper(prefill)
        least = self.inner.floor(above) if self.inner is not None and len(above.layers) else 0
        return self._lowest(prefill).nbytes() - COUNT_BYTES + least

    def _lowest(self, prefill: Prefill) -> UserState:
        """The lowest layer of every stack."""
        if prefill.tables is None:
            raise MissingStatistic("nobody knows what the lowest layer's input is made of")
        layers = []
        for layer in _lowest(prefill):
            slots, projection = prefill.slots(layer), prefill.projection(layer)
            places = None if slots.positions is None else slots.positions.unsqueeze(-1)
            ids = Embedded(prefill.slot_items(layer).int().unsqueeze(-1), places, prefill.tables)
            layers.append((projection.rebuilt(prefill.segment(layer), Normed(ids, projection)),))
        return UserState(tuple(layers), prefill.state.length)

    def flops(self, state: UserState, of: Sources) -> int:
        """What the inner method costs above the lowest layers."""
        above = [i for i, layer in enumerate(state.layers) if not _from_ids(layer)]
        upper = replace(state, layers=tuple(state.layers[i] for i in above))
        return super().flops(upper, [of[i] for i in above])


def _from_ids(layer: Layer) -> bool:
    return any(isinstance(getattr(v, "base", None), Normed) for segment in layer for v in segment.fields.values())


def _lowest(prefill: Prefill) -> range:
    return range(0, len(prefill.layers), len(prefill.layers) // prefill.stacks)


def _upper(prefill: Prefill) -> Prefill:
    """All layers but the lowest of every stack."""
    return prefill.only([layer for layer in prefill.layers if layer not in _lowest(prefill)], prefill.stacks)
