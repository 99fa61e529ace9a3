"""Neighbours become one slot that counts for all of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.base import Layout, dense_layout
from malloc_bench.compressors.selection import TokenMethod
from malloc_bench.registry import register
from malloc_bench.state import Dense, Prefill, Segment, Slots, UserState


@register("merge_adjacent")
@dataclass(frozen=True)
class MergeAdjacent(TokenMethod):
    """Runs of neighbouring events are averaged (as LONGER's token merge, arXiv 2505.04421, but weighted by counts).

    A slot's count enters the attention: + log count for softmax, x count for SiLU. Its position and time are the
    rounded means of its events'.
    """

    family = "merging"
    paper = "adjacent token merging as in LONGER, Chai et al., RecSys 2025, arXiv 2505.04421; count term ours"
    formula = "k runs of nearly equal length; key and value = mean over the run, mass = events in it"
    stores = "k mean keys and values, their counts, and mean positions where the backbone reads them"

    def layout(self, prefill: Prefill) -> Layout:
        return dense_layout(prefill, shared=True, mass=True)

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        old = prefill.slots(0)
        if old.count.shape[1] > 1:
            raise ValueError("merge_adjacent needs the same slots in every head: put it first in the chain")
        width, size = prefill.segment(0).width, int(k.max()) if len(k) else 0
        n, k = old.count.long(), k[:, None]  # [B, 1]
        slot = torch.arange(width, device=n.device)
        run = torch.where(slot < n, slot * k // n.clamp(min=1), size)  # [B, S], padding to a row that is cut off
        mass = torch.ones_like(run, dtype=torch.float32) if old.mass is None else old.mass[:, 0]
        total = _sum(mass[:, None, :, None], run, size)  # [B, 1, K, 1]
        share = mass / total[:, 0, :, 0].gather(1, run.clamp(max=max(size - 1, 0))) if size else mass  # [B, S]

        def mean(x: Tensor) -> Tensor:  # [B, 1, S] integers -> [B, 1, K]
            return _sum((x * share[:, None]).unsqueeze(-1).double(), run, size).squeeze(-1).round().to(x.dtype)

        places = old.places(width, prefill.state.length[:, None])
        positions = mean(places.to(torch.int32)) if prefill.uses_positions else None
        times = None if old.timestamps is None else mean(old.timestamps)
        slots = Slots(k.to(torch.int32), positions, times, total[..., 0])
        layers = tuple(
            (
                Segment(
                    {f: Dense(_sum(v.dense() * share[:, None, :, None], run, size)) for f, v in s.fields.items()}, slots
                ),
            )
            for (s,) in prefill.state.layers
        )
        return UserState(layers, prefill.state.length)


def _sum(x: Tensor, run: Tensor, size: int) -> Tensor:
    """Sums of x [B, H, S, D] over the runs [B, S] of neighbours: [B, H, size, D]."""
    b, h, s, d = x.shape
    row = run[:, None] + torch.arange(b * h, device=x.device).view(b, h, 1) * (size + 1)
    out = x.new_zeros(b * h * (size + 1), d)
    return out.index_add_(0, row.reshape(-1), x.reshape(-1, d)).view(b, h, size + 1, d)[:, :, :size]
