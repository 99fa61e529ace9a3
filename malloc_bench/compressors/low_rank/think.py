"""Channels that queries hardly use are dropped."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from malloc_bench.compressors.base import Compressor, grows
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import Channels, Prefill, Segment, Stats, UserState, Vectors

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("think")
@dataclass(frozen=True)
class ThinK(Compressor):
    """Of each head's key channels the `keep` share stays that matters most to the newest queries, and is all that is
    stored; the paper drops 40 to 60 % of 128 channels.

    values: their channels too, by mean square alone, which the paper's main method leaves whole. window: newest
    queries, the paper's 32. Query heads that share a stored head count together.
    """

    keep: float = 0.5
    values: bool = False
    window: int = 32

    family = "low-rank"
    paper = "ThinK, Xu et al., ICLR 2025, arXiv 2407.21018"
    formula = "channel j of keys: mean over the window of q_j^2, times mean over slots of k_j^2, the highest stay"
    growth = grows(read="n L d")
    stores = "kept channels of every slot in the state's dtype, the list of them (uint8) for each layer and head"

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1 or self.window < 1:
            raise ValueError(f"think: keep above 0 and below 1, window >= 1 are needed, not {self}")

    @property
    def needs(self) -> Stats:
        return Stats(queries=self.window)

    @property
    def takes_budget(self) -> bool:
        return False

    def supports(self, backbone: "Backbone") -> str | None:
        both = {"keys", "values"} <= set(backbone.fields)
        return None if both else f"think drops channels of keys, {backbone.name} stores {backbone.fields[0]}"

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        layers = []
        for layer in prefill.layers:
            segment, keys = prefill.segment(layer), prefill.keys(layer)
            fields = {**segment.fields, "keys": self._kept(keys, self._scores(prefill, layer))}
            if self.values:
                values = prefill.values(layer)
                fields["values"] = self._kept(values, _square(values, prefill.mask(layer)))
            layers.append((Segment(fields, segment.slots),))
        return UserState(tuple(layers), prefill.state.length)

    def _scores(self, prefill: Prefill, layer: int) -> Tensor:
        """[B, H, D] float64, whatever batch it is worked out in."""
        keys = prefill.keys(layer)
        queries, there = prefill.newest_queries(layer, self.window)
        asked = _square(queries, there).unflatten(1, (keys.shape[1], -1)).sum(2)
        return asked * _square(keys, prefill.mask(layer))

    def _kept(self, x: Tensor, scores: Tensor) -> Vectors:
        order = scores.argsort(dim=-1, descending=True, stable=True)
        return Channels.of(x, order[..., : max(1, round(self.keep * x.shape[3]))])


def _square(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of squares over real rows, [B, H, S, D] -> [B, H, D]: means in another unit."""
    return x.masked_fill(~mask.unsqueeze(-1), 0).double().square().sum(2)
