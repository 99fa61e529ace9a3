"""Keys per channel, values per token, in 8, 4, 3, 2 or 1 bits."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from malloc_bench.compressors.base import Encoder, map_vectors
from malloc_bench.compressors.sizing import COUNT_BYTES, Layout
from malloc_bench.registry import register
from malloc_bench.state import Dense, Segment, Slots, UserState, Vectors, quantize

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("kivi")
@dataclass(frozen=True)
class KIVI(Encoder):
    """Asymmetric quantization, keys along slots and values along channels (Liu et al., ICML 2024, arXiv 2402.02750).

    bits: 8, 4, 3, 2 or 1. group: numbers that share a scale and a zero point, None for as many as a vector is wide: the
    paper's 32 would leave most of the second group of a vector of 50 empty, and pay for it. tail: newest slots kept in
    full precision; the paper keeps 32 to 128 in language models (`kivi_tail`), the default here is 0. Fields that are
    not values are treated as keys. Scales are float16, float32 for a user and head where float16 would overflow or,
    below 2^-14, lose digits.
    """

    bits: int = 4
    group: int | None = None
    tail: int = 0

    grid = {"group": (None, 16, 32, 64)}
    family = "quantization"
    paper = "KIVI, Liu et al., ICML 2024, arXiv 2402.02750"
    formula = "code = round((x - min) / scale), scale = (max - min) / (2^bits - 1) per group"
    stores = "bit-packed codes, a scale and a zero point per group, and the newest `tail` slots in float32"
    version = 2

    def __post_init__(self) -> None:
        if self.bits not in (8, 4, 3, 2, 1) or (self.group is not None and self.group < 1) or self.tail < 0:
            raise ValueError(f"{self.name}: bits 8, 4, 3, 2 or 1, group >= 1, tail >= 0 are needed, not {self}")

    def supports(self, backbone: "Backbone") -> str | None:
        tail = self.tail and not backbone.has_slots
        return f"{self.name} keeps the newest {self.tail} slots apart, {backbone.name} has none" if tail else None

    def encode(self, state: UserState) -> UserState:
        return map_vectors(_split_tail(state, self.tail) if self.tail else state, self._vectors)

    def _vectors(self, name: str, segment: Segment) -> Vectors:
        vectors = segment.fields[name]
        if isinstance(segment.slots, _Tail):
            return vectors
        x = vectors.dense()
        return quantize(
            x, segment.real(x), self.bits, self.group or x.shape[3], "width" if name == "values" else "slots"
        )

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        tail = n.clamp(max=self.tail)
        body = n - tail
        split = (tail > 0) & (body > 0)  # two segments: neither holds every event, so positions are stored for both
        total = layout.beside(n, length + split) + (COUNT_BYTES * layout.counts if self.tail else 0)
        for name, heads, width in layout.vectors:
            codes = body * -(-width * self.bits // 8)
            group = self.group or width
            groups = body * -(-width // group) if name == "values" else -(-body // group) * width
            total = total + heads * (1 + codes + 4 * groups + layout.number * width * tail)
        return total


class _Tail(Slots):
    """Slots that stay in full precision."""


def _split_tail(state: UserState, tail: int) -> UserState:
    """Every layer's last segment as a body and its newest `tail` slots."""
    made: dict[int, tuple[Slots, _Tail]] = {}
    layers = []
    for layer in state.layers:
        if not layer:
            layers.append(layer)
            continue
        *rest, last = layer
        old = last.slots
        assert old is not None
        if id(old) not in made:
            made[id(old)] = _cut(old, tail)
        body, end = made[id(old)]
        fields = {name: Dense(_newest(v.dense(), old.count, tail)) for name, v in last.fields.items()}
        layers.append((*rest, Segment(last.fields, body), Segment(fields, end)))
    return UserState(tuple(layers), state.length, state.events)


def _cut(slots: Slots, tail: int) -> tuple[Slots, _Tail]:
    newest = slots.count.clamp(max=tail)
    end = slots.each(lambda x: _newest(x.unsqueeze(-1), slots.count, tail).squeeze(-1), newest)
    return replace(slots, count=slots.count - newest), _Tail(**vars(end))


def _newest(x: Tensor, count: Tensor, tail: int) -> Tensor:
    """The newest min(tail, count) rows of x [B, H, S, D], left-aligned: [B, H, tail, D]."""
    first = (count.long() - tail).clamp(min=0)
    if x.shape[2] == 0:
        return x
    rows = (first.unsqueeze(-1) + torch.arange(tail, device=x.device)).clamp(max=max(x.shape[2] - 1, 0))
    return x.gather(2, rows.expand(-1, x.shape[1], -1).unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))
