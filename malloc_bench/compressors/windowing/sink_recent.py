"""A few oldest events and the newest ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.windowing.recent import Window
from malloc_bench.registry import register


@register("sink_recent")
@dataclass(frozen=True)
class SinkRecent(Window):
    """Keeps a few oldest events (attention sinks) and the newest ones: StreamingLLM (Xiao et al., ICLR 2024)."""

    sinks: int = 4

    grid = {"sinks": (1, 2, 4, 8, 16)}
    family = "windowing"
    paper = "StreamingLLM, Xiao et al., ICLR 2024, arXiv 2309.17453"
    formula = "keep the min(sinks, k/2) oldest slots and the newest rest"
    stores = "keys and values of k events, and their positions where the backbone reads them"

    def index(self, count: Tensor, k: Tensor) -> Tensor:
        slot = torch.arange(int(k.max()) if len(k) else 0, device=k.device)
        oldest = (k // 2).clamp(max=self.sinks)[:, None]
        newest = slot + (count - k)[:, None]
        return torch.where(slot < oldest, slot, newest).minimum((count - 1).clamp(min=0)[:, None])
