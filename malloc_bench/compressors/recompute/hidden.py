"""Keep each layer's input and make keys and values of it when they are read."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from malloc_bench.compressors.base import Compressor, grows
from malloc_bench.compressors.recompute.inputs import normed, refusal
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import Dense, Prefill, Stats, UserState

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("hidden")
@dataclass(frozen=True)
class Hidden(Compressor):
    """A layer's input instead of its keys and values: exact, and half of the bytes where each of the three is as wide.

    The input is kept as the map takes it, behind the layer norm. A linear map (softmax backbones) is absorbed: few
    tokens read the input itself, and neither keys nor values are made. HSTU's goes through a SiLU, so every read makes
    keys and values of all slots anew.
    """

    family = "recompute"
    paper = "KV-Direct, arXiv 2603.19664; HCache, Gao et al., EuroSys 2025, arXiv 2410.05004"
    formula = "k = act(W_k x), v = act(W_v x); without act, q.k is read as (W_k' q).x and sum w v as W_v (sum w x)"
    growth = grows(memory="n L d", read="n L d")
    stores = "one float32 vector a slot and layer; the maps are the backbone's own"

    @property
    def needs(self) -> Stats:
        return Stats(inputs=True, projections=True)

    @property
    def takes_budget(self) -> bool:
        return False

    def supports(self, backbone: "Backbone") -> str | None:
        return refusal(self.name, backbone)

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        layers = []
        for layer in prefill.layers:
            base = Dense(normed(prefill, layer))
            layers.append((prefill.projection(layer).rebuilt(prefill.segment(layer), base),))
        return UserState(tuple(layers), prefill.state.length)
