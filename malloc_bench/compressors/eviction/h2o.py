"""Heavy hitters: slots that drew most attention, and the newest."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats


@register("h2o")
@dataclass(frozen=True)
class H2O(Eviction):
    """Keeps the newest slots (half the budget) and, of the rest, those that drew most attention.

    The sum runs over all queries of the history (the paper's statistic at the end of the prompt, without its greedy
    evictions on the way). SiLU weights can be negative: their absolute values are summed.
    normalise: divide by the number of queries that could see the slot, since old slots are seen by more. The paper has
    the plain sum. recent: the share of k that goes to the newest slots; the paper has half.
    On ML-100K, at a quarter of the bytes though not at a sixteenth, slots by lot keep the top 10 as well
    (`oracle_evict`), and the newest half moves little: overlap .781 on SASRec and .766 on HSTU, .794 and .749
    with recent = 0 (in another training .778 and .736, .795 and .757), with a lower NDCG@10. Drawn by lot in proportion
    to the same score (`sampled`) slots have .838 and .783.
    """

    normalise: bool = True
    recent: float = field(default=0.5, metadata={"unsaid": 0.5})

    grid = {"normalise": (True, False), "recent": (0.5, 0.25, 0.125, 0.0)}
    family = "eviction"
    paper = "H2O: Heavy-Hitter Oracle, Zhang et al., NeurIPS 2023, arXiv 2306.14048"
    formula = "score = mean over the queries that see a slot of |attention weight|; the newest k/2 stay (recent x k)"
    growth = grows(compress="h n^2 L")
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"
    version = 2

    def __post_init__(self) -> None:
        if not 0 <= self.recent <= 0.5:
            raise ValueError(f"h2o: recent must be from 0 to 0.5, not {self.recent}")

    @property
    def needs(self) -> Stats:
        return Stats(column_sum=True)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        received = prefill.attention_received(layer)
        if not self.normalise:
            return received
        slots = torch.arange(received.shape[2], device=received.device)
        queries = prefill.slots(layer).count.unsqueeze(-1) - slots  # slot i is seen by queries i and later
        return received / queries.clamp(min=1)

    def forced(self, k: Tensor) -> tuple[int, Tensor]:
        return 0, (k * self.recent).long()
