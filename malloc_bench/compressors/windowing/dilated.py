"""Dense near the end, ever sparser towards the start."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.windowing.recent import Window
from malloc_bench.registry import register


@register("dilated")
@dataclass(frozen=True)
class Dilated(Window):
    """Keeps events whose distances from the end grow geometrically, from the newest to the oldest (LogSparse)."""

    family = "windowing"
    paper = "LogSparse attention, Li et al., NeurIPS 2019, arXiv 1907.00235"
    formula = "keep slots n - 1 - d_j, d_j = max(j, floor(n^(j / (k - 1))) - 1) for j = 0 ... k - 1"
    stores = "keys and values of k events, and their positions where the backbone reads them"

    def index(self, count: Tensor, k: Tensor) -> Tensor:
        place = torch.arange(int(k.max()) if len(k) else 0, device=k.device)  # from the oldest kept to the newest
        count, k = count[:, None], k[:, None]
        j = (k - 1 - place).clamp(min=0)
        power = count.clamp(min=1).double() ** (j / (k - 1).clamp(min=1))
        distance = ((power + 1e-9).floor().long() - 1).maximum(j)
        return (count - 1 - distance).clamp(min=0)
