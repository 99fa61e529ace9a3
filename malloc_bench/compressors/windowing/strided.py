"""Every m-th event."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.windowing.recent import Window
from malloc_bench.registry import register


@register("strided")
@dataclass(frozen=True)
class Strided(Window):
    """Keeps k events evenly spaced over the history, the newest always: strided sparse attention."""

    family = "windowing"
    paper = "Sparse Transformer's strided attention, Child et al., arXiv 1904.10509"
    formula = "keep slots ceil((j + 1) n / k) - 1 for j = 0 ... k - 1"
    stores = "keys and values of k events, and their positions where the backbone reads them"

    def index(self, count: Tensor, k: Tensor) -> Tensor:
        step = torch.arange(1, 1 + (int(k.max()) if len(k) else 0), device=k.device)
        count, k = count[:, None], k[:, None]
        return ((step * count + k - 1) // k.clamp(min=1) - 1).clamp(min=0).minimum((count - 1).clamp(min=0))
