"""The start of the history and its end."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.windowing.recent import Window
from malloc_bench.registry import register


@register("ends")
@dataclass(frozen=True)
class Ends(Window):
    """Keeps the oldest events (a share of the budget) and the newest: ULTRA-HSTU's semi-local attention.

    Unlike `sink_recent`, whose few sinks are there to hold attention that goes nowhere, the start gets a share.
    """

    oldest: float = 0.25

    grid = {"oldest": (0.1, 0.25, 0.5, 0.75)}
    family = "windowing"
    paper = "semi-local attention of ULTRA-HSTU, arXiv 2602.16986"
    formula = "keep slots 0 ... round(oldest k) - 1 and the newest rest"
    stores = "keys and values of k events, and their positions where the backbone reads them"

    def __post_init__(self) -> None:
        if not 0 < self.oldest < 1:
            raise ValueError(f"ends: 0 < oldest < 1 is needed, not {self.oldest}")

    def index(self, count: Tensor, k: Tensor) -> Tensor:
        slot = torch.arange(int(k.max()) if len(k) else 0, device=k.device)
        oldest = (k * self.oldest).round().long().minimum((k - 1).clamp(min=0))[:, None]
        newest = slot + (count - k)[:, None]
        return torch.where(slot < oldest, slot, newest).minimum((count - 1).clamp(min=0)[:, None])
