"""Cache merging: values of evicted slots are added, by lot, to those of the kept slots that follow."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.compressors.base import as_compressor, grows
from malloc_bench.compressors.eviction.random import hashed
from malloc_bench.compressors.selection import Eviction, TokenMethod, gather, kept_slots
from malloc_bench.compressors.sizing import Layout, dense_layout
from malloc_bench.registry import register
from malloc_bench.state import Dense, Prefill, Segment, Stats, UserState, take


@register("cam")
@dataclass(frozen=True)
class CaM(TokenMethod):
    """Another method chooses k slots; an evicted value goes to the `merge` next kept ones, an equal share to each.

    With chance p, so that what draws little attention is dropped, as before; keys stay. inner: the method that scores,
    a name or {name: {parameter: value}}. From the paper: the lot, by attention, and equal shares. Ours: all in one go
    rather than at each step; attention is the mean over the queries that see a slot; the lot is a number from (seed,
    user, layer, head, position); behind the last kept slot nothing is left to merge into. The paper merges
    into the whole recent window, 32 or more.
    mass: a kept slot counts for what it took in and holds the mean. The paper adds values alone (mass = False), which
    SiLU attention reads just so; but a softmax that has lost most slots then mixes values several times too large.
    """

    inner: Any = "h2o"
    merge: int = 1
    mass: bool = True

    grid = {"inner": ("h2o", "snapkv", "tova", "knorm"), "merge": (1, 4)}
    family = "merging"
    paper = "CaM: Cache Merging, Zhang et al., ICML 2024"
    formula = "v_j += b v_i / m for the m kept j that follow evicted i; b = 1 with chance min(1, a_i / mean of a_j), "
    formula += "a: attention received; mass_j = 1 + sum of b / m, v_j / mass_j"
    growth = grows(compress="h n^2 L")
    stores = "keys, merged values and masses of k events per layer and head, positions where the backbone reads them"

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", as_compressor(self.inner))
        if not isinstance(self.inner, Eviction) or not self.inner.even:
            raise ValueError(f"cam: an inner method that scores slots is needed, not {self.inner}")
        if self.merge < 1:
            raise ValueError(f"cam: merge must be at least 1, not {self.merge}")

    @property
    def needs(self) -> Stats:
        return self.inner.needs | Stats(column_sum=True)

    def supports(self, backbone: Any) -> str | None:
        why = None if "values" in backbone.fields else f"cam merges values, {backbone.name} stores {backbone.fields[0]}"
        return why or self.inner.supports(backbone)

    def layout(self, prefill: Prefill) -> Layout:
        layout = self.inner.layout(prefill)
        return replace(layout, mass=dense_layout(prefill, "head", mass=True).mass) if self.mass else layout

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        layers = []
        for layer in prefill.layers:
            segment, own = prefill.segment(layer), prefill.slots(layer)
            kept = k[:, None].minimum(own.count)
            index = self.inner.index(prefill, layer, kept)
            slots = kept_slots(own, index, kept, prefill.state.length if prefill.uses_positions else None)
            fields = gather(segment, index, slots).fields
            values, more = fields["values"].dense(), self._merged(prefill, layer, index, slots.mask(index.shape[2]))
            merged = values + more[..., :-1]
            if self.mass:
                had = 1.0 if slots.mass is None else slots.mass.unsqueeze(-1)
                total = had + more[..., -1:]
                merged, slots = (had * values + more[..., :-1]) / total, replace(slots, mass=total[..., 0].float())
            layers.append((Segment({**fields, "values": Dense(merged.to(values.dtype))}, slots),))
        return UserState(tuple(layers), prefill.state.length)

    def _merged(self, prefill: Prefill, layer: int, index: Tensor, real: Tensor) -> Tensor:
        """Values that kept slots take in, and last their mass, [B, H, K, D + 1].

        index: [B, H or 1, K] slots in time order, `real` or not.
        """
        stored, size = prefill.values(layer), index.shape[2]
        values = F.pad(stored.to(torch.promote_types(stored.dtype, torch.float32)), (0, 1), value=1.0)
        b, h, s, _ = values.shape
        own, index, real = prefill.slots(layer), index.expand(-1, h, -1), real.expand(-1, h, -1)
        seen = (own.count.unsqueeze(-1) - torch.arange(s, device=index.device)).clamp(min=1)
        drawn = prefill.attention_received(layer).to(values.dtype) / seen
        stays = torch.zeros(b, h, s + 1, dtype=torch.bool, device=index.device)
        stays = stays.scatter_(2, index.masked_fill(~real, s), True)[..., :s]
        first = stays.cumsum(-1)  # the kept slot that follows, by its rank; of evicted slots
        last = (first + self.merge).minimum(real.sum(-1, keepdim=True))
        sums = F.pad((take(drawn, index) * real).cumsum(-1), (1, 0))
        share = (last - first).clamp(min=1)
        mean = (sums.gather(2, last) - sums.gather(2, first.minimum(last))) / share
        place = own.places(s, prefill.state.length[:, None]) * h + torch.arange(h, device=index.device)[:, None]
        merges = prefill.mask(layer) & ~stays & (first < last) & (hashed(prefill, layer, place) * mean < drawn)
        held = 1.0 if own.mass is None or not self.mass else own.mass
        part = torch.where(merges, held / share, 0.0).double().unsqueeze(-1)  # of large sums little may be left
        given = part * values.masked_fill(~merges.unsqueeze(-1), 0.0)
        steps = given.new_zeros(b, h, size + 1, given.shape[3])  # where merging begins and ends
        for at, x in ((first, given), (last, -given)):
            steps.scatter_add_(2, at.clamp(max=size).unsqueeze(-1).expand_as(x), x)
        return steps.cumsum(2)[:, :, :size].to(values.dtype)
