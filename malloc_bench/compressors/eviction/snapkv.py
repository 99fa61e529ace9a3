"""What the newest queries attend to, smoothed over neighbours."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(Eviction):
    """Keeps what the newest queries attend to, on average and pooled over neighbours (Li et al., NeurIPS 2024).

    The window itself stays as far as half the budget goes, the rest of it by its pool; its slots do not leak into the
    pool of those before it. SiLU weights can be negative: absolute values are averaged. On ML-100K, at a quarter of
    the bytes though not at a sixteenth, slots by lot keep the top 10 better: see `oracle_evict`.
    """

    window: int = 16
    kernel: int = 5

    grid = {"window": (8, 16, 32, 64), "kernel": (1, 5)}
    family = "eviction"
    paper = "SnapKV, Li et al., NeurIPS 2024, arXiv 2404.14469"
    formula = "score = pool_5(mean over the newest `window` queries of |attention weight|); the window stays"
    growth = grows(compress="w n L d")
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(
                f"snapkv: window >= 1 and an odd kernel >= 1 are needed, not {self.window} and {self.kernel}"
            )

    @property
    def needs(self) -> Stats:
        return Stats(window=self.window)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        count = prefill.slots(layer).count.unsqueeze(-1)  # [B, 1, 1]
        observed = prefill.newest_received(layer, self.window) / count.clamp(1, self.window)
        outside = torch.arange(observed.shape[-1], device=observed.device) < count - self.window
        return torch.where(outside, self._pool(observed * outside), self._pool(observed))

    def _pool(self, x: Tensor) -> Tensor:
        """Mean of each `kernel` neighbours, zeros beyond the ends; a few sums take a tenth of avg_pool1d's time."""
        near = F.pad(x, (self.kernel // 2, self.kernel // 2))
        return sum((near[..., i : i + x.shape[-1]] for i in range(self.kernel)), torch.zeros_like(x)) / self.kernel

    def forced(self, k: Tensor) -> tuple[int, Tensor]:
        return 0, (k // 2).clamp(max=self.window)
