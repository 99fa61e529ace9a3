"""Cache merging: values of evicted slots are added, by lot, to those of the kept slots that follow."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import as_compressor
from malloc_bench.compressors.eviction.random import hashed
from malloc_bench.compressors.selection import Eviction, TokenMethod, gather, kept_slots
from malloc_bench.compressors.sizing import Layout
from malloc_bench.registry import register
from malloc_bench.state import Dense, Prefill, Segment, Stats, UserState, take


@register("cam")
@dataclass(frozen=True)
class CaM(TokenMethod):
    """Another method chooses k slots; an evicted value goes to the `merge` next kept ones, an equal share to each.

    With chance p, so that what draws little attention is dropped, as before; keys stay. inner: the method that scores,
    a name or {name: {parameter: value}}. From the paper: the lot, by attention, and equal shares. Ours: all in one go
    rather than at each step; attention is the mean over the queries that see a slot; the lot is a number from (seed,
    user, layer, head, position); behind the last kept slot nothing is left to merge into. The paper merges into the
    whole recent window, 32 or more; 4 here, as few slots are kept.
    """

    inner: Any = "h2o"
    merge: int = 4

    grid = {"inner": ("h2o", "snapkv", "tova", "knorm"), "merge": (4, 16)}
    family = "merging"
    paper = "CaM: Cache Merging, Zhang et al., ICML 2024"
    formula = (
        "v_j += b v_i / m for the m kept j that follow evicted i; b = 1 with chance min(1, a_i / mean of a_j), a: "
    )
    formula += "attention received"
    stores = "keys and merged values of k events per layer and head, and their positions where the backbone reads them"

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
        return self.inner.layout(prefill)

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        layers = []
        for layer in prefill.layers:
            segment, own = prefill.segment(layer), prefill.slots(layer)
            kept = k[:, None].minimum(own.count)
            index = self.inner.index(prefill, layer, kept)
            slots = kept_slots(own, index, kept, prefill.state.length if prefill.uses_positions else None)
            made = gather(segment, index, slots)
            values = Dense(
                made.fields["values"].dense() + self._merged(prefill, layer, index, slots.mask(index.shape[2]))
            )
            layers.append((Segment({**made.fields, "values": values}, slots),))
        return UserState(tuple(layers), prefill.state.length)

    def _merged(self, prefill: Prefill, layer: int, index: Tensor, real: Tensor) -> Tensor:
        """What is added to the kept values, [B, H, K, D]; index [B, H or 1, K] slots in time order, `real` or not."""
        stored, size = prefill.values(layer), index.shape[2]
        values = stored.to(torch.promote_types(stored.dtype, torch.float32))
        b, h, s, _ = values.shape
        own, index, real = prefill.slots(layer), index.expand(-1, h, -1), real.expand(-1, h, -1)
        seen = (own.count.unsqueeze(-1) - torch.arange(s, device=index.device)).clamp(min=1)
        drawn = prefill.attention_received(layer).to(values.dtype) / seen
        stays = torch.zeros(b, h, s + 1, dtype=torch.bool, device=index.device)
        stays = stays.scatter_(2, index.masked_fill(~real, s), True)[..., :s]
        first = stays.cumsum(-1)  # the kept slot that follows, by its rank; of evicted slots
        last = (first + self.merge).minimum(real.sum(-1, keepdim=True))
        sums = torch.nn.functional.pad((take(drawn, index) * real).cumsum(-1), (1, 0))
        share = (last - first).clamp(min=1)
        mean = (sums.gather(2, last) - sums.gather(2, first.minimum(last))) / share
        place = own.places(s, prefill.state.length[:, None]) * h + torch.arange(h, device=index.device)[:, None]
        merges = prefill.mask(layer) & ~stays & (first < last) & (hashed(prefill, layer, place) * mean < drawn)
        given = torch.where(merges, 1.0 / share, 0.0).to(values.dtype).unsqueeze(-1) * values.masked_fill(
            ~merges.unsqueeze(-1), 0.0
        )
        steps = values.new_zeros(b, h, size + 1, values.shape[3])  # where merging begins and ends
        for at, x in ((first, given), (last, -given)):
            steps.scatter_add_(2, at.clamp(max=size).unsqueeze(-1).expand_as(x), x)
        return steps.cumsum(2)[:, :, :size].to(stored.dtype)

    def flops(self, state: UserState, history: int) -> int:
        """Of the inner method."""
        return self.inner.flops(state, history)
