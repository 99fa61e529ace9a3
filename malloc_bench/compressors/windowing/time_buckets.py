"""The newest event of every span of time, spans that grow with age."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill

LEVELS = 12  # 2^11 buckets a doubling of age: finer than any history


@register("time_buckets")
@dataclass(frozen=True)
class TimeBuckets(Eviction):
    """Keeps the newest event of each exponential bucket of age; a larger budget buys finer buckets.

    Level 0 has a bucket for each doubling of age, every further level halves the buckets in log age. An event's score
    is the coarsest level at which it is the newest of its bucket, so budgets nest. For a backbone that does not
    read times age counts events.
    """

    family = "windowing"
    per_head = False
    paper = "none: exponential ageing, as exponential histograms keep it (Datar et al., SODA 2002)"
    formula = "score = -(coarsest level l at which no newer event has the same floor(2^l log2(1 + age)))"
    stores = "keys and values of k events per layer, and their positions where the backbone reads them"

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        age = self._age(prefill, layer)  # [B, 1, S], falling
        if age.shape[-1] == 0:
            return age.float()
        depth = (1 + age).log2()
        score = torch.full_like(age, -float(LEVELS))
        for level in reversed(range(LEVELS)):
            bucket = (depth * 2**level).floor()
            newest = torch.ones_like(bucket, dtype=torch.bool)
            newest[..., :-1] = bucket[..., :-1] != bucket[..., 1:]
            newest |= age == 0
            score = torch.where(newest, -float(level), score)
        return score.float()

    def _age(self, prefill: Prefill, layer: int) -> Tensor:
        """Seconds or events between each slot and the newest, [B, 1, S] float64; padding is as old as nothing, -1/2."""
        slots, width = prefill.slots(layer), prefill.segment(layer).width
        last = (slots.count.long() - 1).clamp(min=0)[..., None]  # [B, H', 1]
        if slots.timestamps is not None:
            moments = slots.timestamps.double()
        else:
            moments = slots.places(width, prefill.state.length[:, None]).double()
        age = (moments.gather(2, last.clamp(max=max(width - 1, 0))) - moments).clamp(min=0) if width else moments
        real = torch.arange(width, device=age.device) < slots.count.unsqueeze(-1)
        return torch.where(real, age, -0.5)[:, :1]
