"""What many recent queries found important stays."""

from dataclasses import dataclass

from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats


@register("scissorhands")
@dataclass(frozen=True)
class Scissorhands(Eviction):
    """Keeps slots that most of the newest queries weigh above average: importance is taken to persist.

    The newest `recent` slots stay, half of the budget at most. Counts tie often: the newer stays.
    """

    window: int = 32
    recent: int = 16

    grid = {"window": (8, 16, 32, 64), "recent": (4, 16)}
    family = "eviction"
    paper = "Scissorhands, Liu et al., NeurIPS 2023, arXiv 2305.17118"
    formula = "score = number of the newest `window` queries whose |weight| on i exceeds their mean |weight|"
    growth = grows(compress="w n L d")
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"

    def __post_init__(self) -> None:
        if self.window < 1 or self.recent < 0:
            raise ValueError(
                f"scissorhands: window >= 1 and recent >= 0 are needed, not {self.window} and {self.recent}"
            )

    @property
    def needs(self) -> Stats:
        return Stats(window=self.window)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        weights = prefill.newest_attention(layer, self.window).abs()  # [B, H, W, S], 0 where a query sees nothing
        seen = (weights > 0).sum(-1, keepdim=True).clamp(min=1)
        return (weights > weights.sum(-1, keepdim=True) / seen).sum(2).to(weights.dtype)

    def forced(self, k: Tensor) -> tuple[int, Tensor]:
        return 0, (k // 2).clamp(max=self.recent)
