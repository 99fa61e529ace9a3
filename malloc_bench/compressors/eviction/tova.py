"""What the newest query attends to."""

from dataclasses import dataclass

from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats


@register("tova")
@dataclass(frozen=True)
class TOVA(Eviction):
    """Keeps what the newest query attends to, mean over heads: token omission via attention (Oren et al., EMNLP 2024).

    The newest slot stays. SiLU weights can be negative: absolute values are taken before the mean. On ML-100K, at a
    quarter of the bytes, slots by lot keep the top 10 better: see `oracle_evict`.
    """

    family = "eviction"
    per_head = False
    paper = "TOVA, Oren et al., Transformers are Multi-State RNNs, EMNLP 2024, arXiv 2401.06104"
    formula = "score = mean over heads of |weight of the newest query|; the newest slot stays"
    growth = grows(compress="w n L d")
    stores = "keys and values of k events per layer, and their positions where the backbone reads them"

    @property
    def needs(self) -> Stats:
        return Stats(window=1)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        return prefill.newest_attention(layer, 1).abs().sum(dim=2).mean(dim=1, keepdim=True)  # [B, 1, S]

    def forced(self, k: Tensor) -> tuple[int, Tensor]:
        return 0, (k // 2).clamp(max=1)
