"""The slots that queries pivot on stay as they are; another method writes the rest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import Compressor, Encoder, Sources, as_compressor, grows, map_layers, together
from malloc_bench.compressors.selection import Eviction, ranked
from malloc_bench.compressors.sizing import Layout
from malloc_bench.registry import register
from malloc_bench.state import Dense, Intact, Prefill, Segment, Stats, UserState, Vectors, intact, under

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("intactkv")
@dataclass(frozen=True)
class IntactKV(Encoder):
    """Keeps the pivots of each layer and head in 16-bit floats, as the paper does, and encodes all else.

    share: of a user's slots that are pivots, rounded up. score: the method whose score names them, highest first; the
    paper takes the first tokens, on which language models pivot. inner: the encoder of the rest. Pivots are
    taken out before it looks: the mean of the other slots stands in their place, so that they widen no range. Behind
    another token method nobody knows of attention: choose a score of the state itself, such as knorm.
    """

    share: float = 0.05
    score: Any = "h2o"
    inner: Any = "int4_token"

    family = "quantization"
    paper = "IntactKV, Liu et al., ACL Findings 2024, arXiv 2403.01241"
    formula = "slots of the highest score in float16, all others by the inner encoder"
    growth = grows(compress="h n^2 L", read="n L d")
    by_field = False
    stores = "what the inner encoder stores of every slot, a bit a slot and head that marks pivots, their float16 rows"

    def __post_init__(self) -> None:
        object.__setattr__(self, "score", as_compressor(self.score))
        object.__setattr__(self, "inner", as_compressor(self.inner))
        if not isinstance(self.score, Eviction) or not isinstance(self.inner, Encoder) or self.inner.takes_budget:
            raise ValueError(f"intactkv: a score that ranks slots and an inner encoder are needed, not {self}")
        if not 0 < self.share < 1:
            raise ValueError(f"intactkv: a share within 0 and 1 is needed, not {self.share}")

    @property
    def needs(self) -> Stats:
        return self.score.needs | self.inner.needs

    def supports(self, backbone: "Backbone") -> str | None:
        return self.score.supports(backbone) or self.inner.supports(backbone)

    def fit_parts(self) -> Mapping[str, Compressor]:
        return self.inner.fit_parts()

    def fit(self, sample: Any, budget: Any = None) -> Any:
        return self.inner.fit(sample, budget)

    def write(self, prefill: Prefill) -> UserState:
        marks = {layer: self._pivots(prefill, layer) for layer in prefill.layers}

        def others(layer: int, name: str, segment: Segment) -> Dense:
            x = segment.fields[name].dense()
            rest = (segment.real(x) & ~marks[layer]).unsqueeze(-1)
            mean = torch.where(rest, x, 0.0).sum(2, keepdim=True) / rest.sum(2, keepdim=True).clamp(min=1)
            return Dense(torch.where(marks[layer].unsqueeze(-1), mean.to(x.dtype), x))

        def whole(layer: int, name: str, segment: Segment) -> Vectors:
            x = prefill.segment(layer).fields[name].dense()
            return intact(segment.fields[name], x, marks[layer].expand(-1, x.shape[1], -1))

        return map_layers(together(self.inner.write(prefill.over(map_layers(prefill.state, others)))), whole)

    def _pivots(self, prefill: Prefill, layer: int) -> Tensor:
        """True for the pivots among the slots, [B, H or 1, S]."""
        count = prefill.slots(layer).count.long()
        order = prefill.remember(("order", self.score, layer), lambda: ranked(self.score.scores(prefill, layer), count))
        first = torch.arange(order.shape[2], device=order.device) < self._many(count).unsqueeze(-1)
        return torch.zeros_like(order, dtype=torch.bool).scatter_(2, order, first.expand_as(order))

    def _many(self, n: Tensor) -> Tensor:
        return (n.double() * self.share).ceil().long()

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        beside = sum(heads * ((n + 7) // 8 + 2 * width * self._many(n)) for _, heads, width in layout.vectors)
        return self.inner.cost(layout, n, length) + beside

    def flops(self, state: UserState, of: Sources) -> int:
        """Those of its two parts."""
        coded = map_layers(state, lambda layer, name, s: under(s.fields[name], Intact))
        return super().flops(coded, of)
