"""Rows of large norm stay, relative to their neighbours."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill


@register("cur")
@dataclass(frozen=True)
class CUR(Eviction):
    """Keeps the rows that a CUR decomposition would sample: by squared norms of key and value, each as a share of the

    sums over its window of `window` neighbours. The `sinks` oldest slots stay.
    """

    window: int = 16
    sinks: int = 4

    grid = {"window": (4, 8, 16, 32), "sinks": (0, 4)}
    family = "eviction"
    paper = "CurDKV, Sengupta et al., arXiv 2509.15038"
    note = "overlap@10 at 1/4 on ML-100K, SASRec / HSTU: .761 / .736, slots by lot .785 / .758: it looks at no weight"
    formula = "score = |k_i|^2 |v_i|^2 / (sum of |k|^2 over i's window x sum of |v|^2 over it)"
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"
    reads = ("keys", "values")

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            raise ValueError(f"cur: window >= 1 and sinks >= 0 are needed, not {self.window} and {self.sinks}")

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        real = prefill.mask(layer)
        return self._share(prefill.keys(layer), real) * self._share(prefill.values(layer), real)

    def _share(self, x: Tensor, real: Tensor) -> Tensor:
        size = torch.where(real, x.double().square().sum(-1), 0.0)
        width = size.shape[-1]
        sums = F.pad(size, (0, -width % self.window)).unflatten(-1, (-1, self.window)).sum(-1)
        return (size / sums.repeat_interleave(self.window, -1)[..., :width].clamp(min=1e-300)).to(x.dtype)

    def forced(self, k: Tensor) -> tuple[Tensor, int]:
        return (k // 2).clamp(max=self.sinks), 0
