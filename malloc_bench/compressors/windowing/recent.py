"""The newest events."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.selection import TokenMethod, gather, kept_slots
from malloc_bench.compressors.sizing import Layout, dense_layout
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Slots, UserState


class Window(TokenMethod):
    """Keeps the same slots in every layer and head; a subclass names them."""

    consecutive = False

    def index(self, count: Tensor, k: Tensor) -> Tensor:
        """Kept slots in time order, [B, max k]; count, k [B]."""
        raise TypeError(f"{type(self).__name__} must define index(count, k)")

    def chosen(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        """As `index`, for what depends on more than counts."""
        return self.index(prefill.slots(layer).count[:, 0].long(), k)

    def layout(self, prefill: Prefill) -> Layout:
        return dense_layout(prefill, "state", consecutive=self.consecutive)

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        made: dict[int, tuple[Tensor, Slots]] = {}  # layers that share their slots go on sharing them
        layers = []
        for layer in prefill.layers:
            segment, old = prefill.segment(layer), prefill.slots(layer)
            if id(old) not in made:
                implied = self.consecutive and old.positions is None
                positions = prefill.uses_positions and not implied
                kept = k.minimum(old.count[:, 0])
                index = self.chosen(prefill, layer, kept)[:, None]
                made[id(old)] = index, kept_slots(old, index, kept, prefill.state.length if positions else None)
            layers.append((gather(segment, *made[id(old)]),))
        return UserState(tuple(layers), prefill.state.length)


@register("recent")
@dataclass(frozen=True)
class Recent(Window):
    """Keeps the newest k events: a sliding window over the history (Longformer without global tokens)."""

    family = "windowing"
    paper = "Longformer's sliding window, Beltagy et al., arXiv 2004.05150"
    formula = "keep slots n-k ... n-1"
    stores = "keys and values of the newest k events; their positions follow from the length"
    consecutive = True

    def index(self, count: Tensor, k: Tensor) -> Tensor:
        newest = (count - k)[:, None] + torch.arange(int(k.max()) if len(k) else 0, device=k.device)
        return newest.minimum((count - 1).clamp(min=0)[:, None])
