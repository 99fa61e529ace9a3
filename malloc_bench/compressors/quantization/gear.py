"""Bits, the low-rank part of what they leave, and the oddest numbers apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import Compressor, Encoder, Sources, as_compressor, grows, map_layers, together
from malloc_bench.compressors.low_rank.svd import SVD
from malloc_bench.compressors.sizing import Layout
from malloc_bench.registry import register
from malloc_bench.state import Dense, Outliers, Prefill, Segment, Sum, UserState, Vectors, outliers, under

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("gear")
@dataclass(frozen=True)
class GEAR(Encoder):
    """Another encoder's error is made up for by a product of two thin factors, and by a few numbers kept as they are.

    inner: the encoder. rank: of the factors, which all layers and fields share as in `svd`, in float16; the paper has
    factors of rank 4 a head. every: of so many consecutive numbers the one furthest from the mean of its channel (of
    values: of its slot) is taken out beforehand and stored, 3 bytes; 0: none. The paper takes out 2 % a vector, which
    pays where a few channels are huge.
    """

    inner: Any = None
    rank: int = 4
    every: int = 0

    family = "quantization"
    paper = "GEAR, Kang et al., arXiv 2403.05527"
    formula = "x ~ bits(x - s) + L R + s: s the oddest numbers, L R the truncated SVD of what the bits leave of x - s"
    growth = grows(compress="n L^2 d^2 + L^3 d^3", read="n L d")
    by_field = False
    stores = "the inner encoder's bytes, two float16 factors, and of each run of numbers one and its place (3 bytes)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", as_compressor(self.inner or {"kivi": {"bits": 2}}))
        if not isinstance(self.inner, Encoder) or self.inner.takes_budget or self.rank < 1:
            raise ValueError(f"gear: an inner encoder and rank >= 1 are needed, not {self}")
        if not (self.every == 0 or 2 <= self.every <= 256):
            raise ValueError(f"gear: every 0 or 2 to 256 is needed, not {self.every}")

    @property
    def _low_rank(self) -> SVD:
        return SVD(rank=self.rank)

    def supports(self, backbone: "Backbone") -> str | None:
        return self.inner.supports(backbone)

    def fit_parts(self) -> Mapping[str, Compressor]:
        return self.inner.fit_parts()

    def fit(self, sample: Any, budget: Any = None) -> Any:
        return self.inner.fit(sample, budget)

    def write(self, prefill: Prefill) -> UserState:
        apart: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

        def plain(layer: int, name: str, segment: Segment) -> Dense:
            x = segment.fields[name].dense()
            if not self.every:
                return Dense(x)
            real, axis = segment.real(x).unsqueeze(-1), 3 if name == "values" else 2
            count = real.expand_as(x).sum(axis, keepdim=True).clamp(min=1)
            mean = torch.where(real, x, 0.0).sum(axis, keepdim=True) / count
            place, what, odd = outliers(x, (x - mean).abs(), real.squeeze(-1), self.every)
            apart[layer, name] = place, what
            return Dense(torch.where(odd, mean.to(x.dtype), x))

        def patched(layer: int, name: str, segment: Segment) -> Vectors:
            coded = segment.fields[name]
            return Outliers(coded, *apart[layer, name], self.every) if self.every else coded

        def left(layer: int, name: str, segment: Segment) -> Dense:
            return Dense(prefill.segment(layer).fields[name].dense() - segment.fields[name].dense())

        coded = together(self.inner.write(prefill.over(map_layers(prefill.state, plain))))
        near = map_layers(coded, patched)
        rest = self._low_rank.encode(map_layers(near, left))
        return map_layers(rest, lambda layer, name, s: Sum(near.layers[layer][0].fields[name], s.fields[name]))

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        total = self.inner.cost(layout, n, length) + self._low_rank.cost(layout, n, length) - layout.beside(n, length)
        runs = sum(heads * -(-n * width // self.every) for _, heads, width in layout.vectors) if self.every else 0
        return total + 3 * runs

    def flops(self, state: UserState, of: Sources) -> int:
        """The inner encoder's, its vectors multiplied out, and the factors of what they leave."""
        near = map_layers(state, lambda layer, name, s: under(s.fields[name], Sum))
        coded = map_layers(near, lambda layer, name, s: under(s.fields[name], Outliers))
        rest = map_layers(state, lambda layer, name, s: s.fields[name].shared()[-1])
        multiplied = sum(
            v.dense_flops() for v in {id(v): v for s in near.segments() for v in s.fields.values()}.values()
        )
        inner = super().flops(coded, of)
        return inner + multiplied + self._low_rank.flops(rest, of)
