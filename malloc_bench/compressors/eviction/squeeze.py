"""Layers that change little keep little."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.division import Divided
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats


@register("squeeze")
@dataclass(frozen=True)
class Squeeze(Divided):
    """Takes from the layers whose output is most like their input, user by user, and gives it to the others.

    inner: the method that scores, a name or {name: {parameter: value}}. p: what such a layer keeps of an equal share;
    the paper's is 0.3 to 0.4. Ours: layers fall into two groups at the widest gap between their cosines (the paper's
    k-means has three, of which two are treated alike), and likeness is of the whole layer, not its attention alone.
    """

    inner: Any = "snapkv"
    p: float = 0.4

    growth = grows(compress="w n L d")
    paper = "SqueezeAttention, Wang et al., ICLR 2025, arXiv 2404.04793"
    formula = "a layer with high mean cos(input, output) keeps p of an equal share, the others what that sets free"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.p <= 1:
            raise ValueError(f"squeeze: 0 <= p <= 1 is needed, not {self.p}")

    @property
    def needs(self) -> Stats:
        return self.inner.needs | Stats(alike=True)

    def shares(self, prefill: Prefill) -> Tensor:
        count = prefill.rows(0)[:, None]
        cosines = [torch.where(prefill.mask(i)[:, 0], prefill.likeness(i).double(), 0.0).sum(1) for i in prefill.layers]
        mean = torch.stack(cosines, 1) / count.clamp(min=1)  # [B, L]
        if mean.shape[1] < 2:
            return torch.ones_like(mean).unsqueeze(-1)
        ordered = mean.sort(1).values
        gap, at = ordered.diff(dim=1).max(1, keepdim=True)
        still = (mean > ordered.gather(1, at)) & (gap > 0)  # above the widest gap; of equals none
        few, rest = still.sum(1, keepdim=True), (~still).sum(1, keepdim=True)
        return torch.where(still, self.p, 1 + (1 - self.p) * few / rest.clamp(min=1)).unsqueeze(-1)
