"""Neighbours become one slot that counts for all of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.selection import TokenMethod
from malloc_bench.compressors.sizing import Layout, dense_layout
from malloc_bench.registry import register
from malloc_bench.state import Dense, Prefill, Segment, Slots, UserState, grouped


@register("merge_adjacent")
@dataclass(frozen=True)
class MergeAdjacent(TokenMethod):
    """Averages runs of neighbouring events into one slot each, weighted by counts (LONGER's token merge is unweighted).

    A slot's count enters the attention: + log count for softmax, x count for SiLU. Its position and time are the
    rounded means of its events'.
    """

    family = "merging"
    paper = "adjacent token merging as in LONGER, Chai et al., RecSys 2025, arXiv 2505.04421; count term ours"
    formula = "event i of n is in run floor(i k / n) of k; key and value = mean over the run, mass = events in it"
    stores = "k mean keys and values, their counts, and mean positions where the backbone reads them"

    def layout(self, prefill: Prefill) -> Layout:
        return dense_layout(prefill, "state", mass=True)

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        made: dict[int, tuple[Slots, Tensor, Tensor]] = {}  # layers that share their slots go on sharing them
        layers = []
        for layer in prefill.layers:
            segment, old = prefill.segment(layer), prefill.slots(layer)
            if id(old) not in made:
                n = old.count.long()
                kept = k[:, None].minimum(n)  # [B, 1]
                slot, size = torch.arange(segment.width, device=n.device), int(kept.max()) if len(k) else 0
                run = torch.where(slot < n, slot * kept // n.clamp(min=1), size)  # [B, S], padding: a row to cut off
                made[id(old)] = *_merged(old, run, kept, prefill.state.length, prefill.uses_positions), run
            slots, share, run = made[id(old)]
            size = int(slots.count.max()) if len(k) else 0
            whole = {f: v.dense() for f, v in segment.fields.items()}
            fields = {f: Dense(grouped(x, run[:, None], size, share).to(x.dtype)) for f, x in whole.items()}
            layers.append((Segment(fields, slots),))
        return UserState(tuple(layers), prefill.state.length)


def _merged(old: Slots, run: Tensor, k: Tensor, length: Tensor, uses_positions: bool) -> tuple[Slots, Tensor]:
    """One slot for each of the k [B, 1] runs [B, S], and the share of each old slot in its run, [B, H', S]."""
    size = int(k.max()) if len(k) else 0
    mass = torch.ones_like(run, dtype=torch.float32)[:, None] if old.mass is None else old.mass
    total = grouped(mass.unsqueeze(-1), run[:, None], size).squeeze(-1)  # [B, H', K]
    at = run.clamp(max=max(size - 1, 0))[:, None].expand_as(mass)
    share = mass / total.clamp(min=1e-30).gather(2, at) if size else mass  # a fitted slot may count for less than 1

    def mean(x: Tensor) -> Tensor:  # [B, H', S] integers -> [B, H', K]; float32 would round seconds to minutes
        sums = grouped(x.double().unsqueeze(-1), run[:, None], size, mass.double()).squeeze(-1)
        return (sums / total.double().clamp(min=1e-30)).round().to(x.dtype)

    places = old.places(run.shape[1], length[:, None]).to(torch.int32)
    times = None if old.timestamps is None else mean(old.timestamps)
    return Slots(k.to(torch.int32), mean(places) if uses_positions else None, times, total), share
