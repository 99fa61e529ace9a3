"""Fewer bits for older slots."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from malloc_bench.compressors.base import Encoder, map_vectors
from malloc_bench.compressors.sizing import COUNT_BYTES, Layout
from malloc_bench.registry import register
from malloc_bench.state import Dense, Quantized, Segment, Slots, UserState, quantize, take

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("by_age")
@dataclass(frozen=True)
class ByAge(Encoder):
    """Writes the newest slots in `bits` and the older ones in `old_bits`, one scale and zero point a vector.

    newest: the share of a user's slots that counts as new, rounded up.
    """

    bits: int = 8
    old_bits: int = 2
    newest: float = 0.25

    grid = {"bits": (8, 4), "newest": (0.0625, 0.125, 0.25, 0.5)}
    family = "quantization"
    paper = "none: recency, which windowing makes absolute, as a choice of precision"
    formula = "code = round((2^b - 1) (x - min) / (max - min)), b = bits for the newest share of slots, else old_bits"
    stores = "codes in two widths, a float16 scale and zero point per vector (float32 where that loses digits)"

    def __post_init__(self) -> None:
        if not {self.bits, self.old_bits} <= {1, 2, 3, 4, 8} or not 0 < self.newest < 1:
            raise ValueError(f"by_age: bits 8, 4, 3, 2 or 1 and a newest share within 0 and 1 are needed, not {self}")

    def supports(self, backbone: "Backbone") -> str | None:
        return None if backbone.has_slots else f"by_age tells slots by their age, {backbone.name} has none"

    def _new(self, count: Tensor) -> Tensor:
        return (count.double() * self.newest).ceil().to(count.dtype)

    def encode(self, state: UserState) -> UserState:
        made: dict[int, tuple[Slots, Slots]] = {}
        split = UserState(
            tuple(tuple(part for s in layer for part in self._split(s, made)) for layer in state.layers),
            state.length,
            state.events,
        )
        young = {id(new) for _, new in made.values()}

        def vectors(name: str, segment: Segment) -> Quantized:
            x = segment.fields[name].dense()
            bits = self.bits if id(segment.slots) in young else self.old_bits
            return quantize(x, segment.real(x), bits, x.shape[3], "width")

        return map_vectors(split, vectors)

    def _split(self, segment: Segment, made: dict[int, tuple[Slots, Slots]]) -> tuple[Segment, Segment]:
        """The older slots, and the newest."""
        slots = segment.slots
        assert slots is not None
        new = self._new(slots.count)
        old, wide = slots.count - new, int(new.max()) if new.numel() else 0
        index = old.long().unsqueeze(-1) + torch.arange(wide, device=new.device)
        index = index.clamp(max=max(segment.width - 1, 0))

        def rows(x: Tensor) -> Tensor:
            return take(x, index.expand(-1, max(x.shape[1], index.shape[1]), -1))

        if id(slots) not in made:
            made[id(slots)] = replace(slots, count=old), slots.each(rows, new)
        older, newer = made[id(slots)]
        fields = {name: Dense(take(v.dense(), index.expand(-1, v.shape[1], -1))) for name, v in segment.fields.items()}
        return Segment({name: Dense(v.dense()) for name, v in segment.fields.items()}, older), Segment(fields, newer)

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        new = self._new(n)
        split = (new > 0) & (new < n)  # two segments: neither holds every event, so positions are stored for both
        total = layout.beside(n, length + split) + COUNT_BYTES * layout.counts
        for _, heads, width in layout.vectors:
            for rows, bits in ((new, self.bits), (n - new, self.old_bits)):
                total = total + heads * (1 + rows * (-(-width * bits // 8) + 4))
        return total
