"""Heavy hitters: slots that drew most attention, and the newest."""

from dataclasses import dataclass

from torch import Tensor

from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats


@register("h2o")
@dataclass(frozen=True)
class H2O(Eviction):
    """Keeps the newest slots (half the budget) and, of the rest, those that drew most attention.

    The sum runs over all queries of the history (the paper's statistic at the end of the prompt, without its greedy
    evictions on the way). SiLU weights can be negative: their absolute values are summed.
    """

    family = "eviction"
    paper = "H2O: Heavy-Hitter Oracle, Zhang et al., NeurIPS 2023, arXiv 2306.14048"
    formula = "score = sum over queries of |attention weight|; the newest k/2 stay"
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"

    @property
    def needs(self) -> Stats:
        return Stats(column_sum=True)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        return prefill.attention_received(layer)

    def forced(self, k: Tensor) -> tuple[int, Tensor]:
        return 0, k // 2
