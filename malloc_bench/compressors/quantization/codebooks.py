"""Entries of codebooks from training users' vectors: k-means, seeded."""

from __future__ import annotations

import torch
from torch import Tensor

from malloc_bench.state import closest


def entries(x: Tensor, count: int, rounds: int = 10) -> Tensor:
    """[H, count, w]: Lloyd's k-means over x [H, N, w] from `count` rows drawn by lot, the same for the same x.

    Entries that nothing is nearest to stay where they were; where there are fewer rows than entries, some are alike.
    """
    heads, rows, width = x.shape
    if not rows:
        return x.new_zeros(heads, count, width)
    lot = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(x.device)
    found = x[:, lot[torch.arange(count, device=x.device) % rows]]
    for _ in range(rounds):
        near = closest(x, found)  # [H, N]
        total = torch.zeros_like(found).scatter_add_(1, near.unsqueeze(-1).expand(-1, -1, width), x)
        size = x.new_zeros(heads, count).scatter_add_(1, near, torch.ones_like(near, dtype=x.dtype)).unsqueeze(-1)
        found = torch.where(size > 0, total / size.clamp(min=1), found)
    return found
