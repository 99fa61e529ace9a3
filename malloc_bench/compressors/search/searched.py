"""States that are kept whole and read in part."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from malloc_bench.compressors.base import Compressor
from malloc_bench.compressors.sizing import Budget
from malloc_bench.state import Lookup, Prefill, Segment, UserState

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


class Search(Compressor):
    """Keeps every slot; each token and head then attends to the `top` slots alone that `lookup` finds for it.

    The weights are those of the backbone's own attention over the slots found and the token itself. Events appended
    later are read in full, the short-term history beside the long-term one, until `update` takes them in.
    """

    top: int

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"{self.name}: top must be at least 1, not {self.top}")

    @property
    def takes_budget(self) -> bool:
        return False

    def supports(self, backbone: Backbone) -> str | None:
        if backbone.has_slots and {"keys", "values"} <= set(backbone.fields):
            if all(block.heads == block.stored_heads for block in getattr(backbone, "blocks", ())):
                return None
            return f"{self.name} searches head by head, and query heads of {backbone.name} share what is stored"
        return f"{self.name} searches keys for values, {backbone.name} stores {', '.join(backbone.fields)}"

    @abstractmethod
    def lookup(self, prefill: Prefill, layer: int) -> Lookup:
        """How a token finds its slots in a layer."""

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        layers = []
        for layer in prefill.layers:
            segment = prefill.segment(layer)
            layers.append((Segment(segment.fields, segment.slots, self.lookup(prefill, layer)),))
        return UserState(tuple(layers), prefill.state.length)
