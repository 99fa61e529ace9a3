"""Slots by a lot that another method's score loads, each standing for those that might have been drawn instead."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import as_compressor, grows
from malloc_bench.compressors.eviction.random import drawn, hashed, proportional
from malloc_bench.compressors.selection import Eviction, TokenMethod, gather, kept_slots
from malloc_bench.compressors.sizing import Layout, dense_layout
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats, UserState, take

_LEAST = 0.01  # of the mean score: every slot has a chance, so no mass is huge


@register("sampled")
@dataclass(frozen=True)
class Sampled(TokenMethod):
    """Draws k slots, each with a chance p in proportion to another method's score, and lets it count 1 / p times.

    So the sum over slots that attention takes is right on average, whatever the query (Horvitz and Thompson): of SiLU
    attention the mixture itself, of a softmax its numerator and denominator. Chances stop at 1; one number from (seed,
    user, layer, head) draws all of a head's slots, evenly along the history (systematic sampling). inner: the method
    that scores, a name or {name: {parameter: value}}; scores must not be negative, and what it forces is not.
    Top-k by the same scores keeps large weights alone, and small ones are many: see `oracle_evict`. But one lot is one
    lot: on ML-100K it keeps more of the full top 10 at a quarter of the bytes (overlap .835 / .795 on SASRec / HSTU,
    `tova` .762 / .773, slots by lot .785 / .758); at a sixteenth few slots stand for many and NDCG@10 falls below that
    of top-k (.071 / .077 to .083 / .092). To keep the newest slots for certain did not help.
    """

    inner: Any = "tova"

    grid = {"inner": ("tova", "h2o", "snapkv", "vatp")}
    family = "eviction"
    paper = "Horvitz and Thompson, JASA 1952; for attention MagicPIG, Chen et al., ICLR 2025, arXiv 2410.16179"
    formula = "keep i with chance p_i = min(1, c s_i), sum of p = k, s the inner score; mass = 1 / p_i"
    growth = grows(compress="w n L d")
    stores = "keys, values and a float32 mass of k events per layer and head, positions where the backbone reads them"

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", as_compressor(self.inner))
        if not isinstance(self.inner, Eviction) or not self.inner.even:
            raise ValueError(f"sampled: an inner method that scores slots is needed, not {self.inner}")

    @property
    def needs(self) -> Stats:
        return self.inner.needs

    def supports(self, backbone: Any) -> str | None:
        return self.inner.supports(backbone)

    def layout(self, prefill: Prefill) -> Layout:
        return dense_layout(prefill, "head" if self.inner.per_head else "layer", mass=True)

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        layers = []
        for layer in prefill.layers:
            segment, own = prefill.segment(layer), prefill.slots(layer)
            kept = k[:, None].minimum(own.count)
            chance = self.chances(prefill, layer, kept)
            head = torch.arange(chance.shape[1], device=chance.device)[None, :, None]
            index = drawn(chance, hashed(prefill, layer, head), int(kept.max()) if len(k) else 0)
            slots = kept_slots(own, index, kept, prefill.state.length if prefill.uses_positions else None)
            mass = 1 / take(chance, index).clamp(min=1e-12)
            slots = replace(slots, mass=(mass if slots.mass is None else mass * slots.mass).float())
            layers.append((gather(segment, index, slots),))
        return UserState(tuple(layers), prefill.state.length)

    def chances(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        """Of each slot to be kept, [B, H or 1, S] float64, k [B, H or 1] in all; 0 for padding."""
        return proportional(prefill.remember(("sampled", self, layer), lambda: self._scores(prefill, layer)), k)

    def _scores(self, prefill: Prefill, layer: int) -> Tensor:
        heads = next(iter(prefill.segment(layer).fields.values())).shape[1] if self.inner.per_head else 1
        scores, real = self.inner.scores(prefill, layer).double(), prefill.mask(layer)
        if bool((real & (scores < 0)).any()):
            raise ValueError(f"sampled: {self.inner.name} scores below 0, which is no chance")
        scores = torch.where(real, scores, 0.0).expand(-1, heads, -1)
        mean = scores.sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(real, scores.maximum(_LEAST * mean).clamp(min=1e-30), 0.0)
