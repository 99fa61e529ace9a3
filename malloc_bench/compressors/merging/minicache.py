"""Neighbouring layers share the directions of their vectors."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.compressors.base import Compressor, grows
from malloc_bench.compressors.selection import filled, gather, kept_slots, ranked
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import Dense, Layer, Prefill, Segment, Sized, UserState, narrowed, take, unhalved

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("minicache")
@dataclass(frozen=True)
class MiniCache(Compressor):
    """Two layers at a time: a slot's keys (values) get one direction on the arc between theirs and keep their norms.

    t: where on the arc, 0 the lower layer's (the paper: 0.6). retain: share of slots, those whose directions are
    furthest apart, that both layers keep whole (the paper: what lies in the lowest 5 % of the range of similarities).
    first: the lowest layer that is merged; the paper begins in the middle of 32 or more, where neighbours are alike. In
    shallow recommenders layers are not, so that it does worse than its bytes promise.
    """

    t: float = 0.6
    retain: float = 0.05
    first: int = 0

    family = "merging"
    paper = "MiniCache, Liu et al., NeurIPS 2024, arXiv 2405.14366"
    formula = "e = (sin((1 - t) w) e_1 + sin(t w) e_2) / sin w, w the angle between e_1 and e_2; x_l is read as |x_l| e"
    growth = grows(read="n L d")
    stores = "one direction for two layers, a norm a layer, slot and head; retained slots whole, with their positions"

    def __post_init__(self) -> None:
        if not (0 <= self.t <= 1 and 0 <= self.retain < 1 and self.first >= 0):
            raise ValueError(f"minicache: t 0 to 1, retain from 0 below 1, first >= 0 are needed, not {self}")

    @property
    def takes_budget(self) -> bool:
        return False

    def supports(self, backbone: "Backbone") -> str | None:
        if not backbone.has_slots:
            return f"{backbone.name} keeps a memory of constant size: it has no slots"
        deep = len(getattr(backbone, "blocks", ())) // getattr(getattr(backbone, "config", None), "blocks", 1)
        return None if deep >= self.first + 2 else f"minicache merges two layers, from {self.first}; there are {deep}"

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        layers: list[Layer] = []
        for view in prefill.apart():
            lowers = range(self.first, len(view.layers) - 1, 2)
            merged = [layer for lower in lowers for layer in self._merged(view, lower)]
            layers += [*view.state.layers[: self.first], *merged, *view.state.layers[self.first + len(merged) :]]
        return UserState(tuple(layers), prefill.state.length)

    def _merged(self, prefill: Prefill, lower: int) -> list[Layer]:
        """Of a layer and the next: what shares directions, then what is retained."""
        pair, old = [prefill.segment(lower), prefill.segment(lower + 1)], prefill.slots(lower)
        shapes = [{name: v.shape for name, v in segment.fields.items()} for segment in pair]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"minicache merges layers of one shape; {lower} and {lower + 1} have {shapes[0]}, {shapes[1]}"
            )
        count = old.count[:, 0].long()
        units = {name: [_unit(s.fields[name].dense()) for s in pair] for name in pair[0].fields}
        alike = [(a.double() * b.double()).sum(-1).mean(1, keepdim=True) for a, b in units.values()]
        apart = -torch.stack(alike).sum(0)  # [B, 1, S]
        order = ranked(apart, old.count.long())
        k = (count.double() * self.retain).long()
        place = torch.arange(order.shape[2], device=order.device)
        rest = filled(order, ((place >= k[:, None]) & (place < count[:, None]))[:, None], count - k)
        length = prefill.state.length if prefill.uses_positions else None
        whole, slots = filled(order, None, k), kept_slots(old, rest, count - k, length)
        retained = kept_slots(old, whole, k, length)
        shared = {name: Dense(take(_arc(a, b, self.t), rest)) for name, (a, b) in units.items()}
        made: list[Layer] = []
        for segment in pair:
            fields = {}
            for name, direction in shared.items():
                x = take(segment.fields[name].dense(), rest)
                fields[name] = Sized(narrowed(unhalved(x).norm(dim=-1, keepdim=True), x.dtype), direction)
            made.append((Segment(fields, slots), gather(segment, whole, retained)))
        return made


def _unit(x: Tensor) -> Tensor:
    return F.normalize(unhalved(x), dim=-1).to(x.dtype)


def _arc(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Unit vectors on the arc from a to b; where that is no arc, on the line between."""
    x, y = unhalved(a), unhalved(b)
    angle = (x * y).sum(-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    flat = sine < 1e-3
    by = torch.where(flat, 1.0, sine)
    left, right = (torch.where(flat, part, (part * angle).sin() / by) for part in (1 - t, t))
    return (left * x + right * y).to(a.dtype)
