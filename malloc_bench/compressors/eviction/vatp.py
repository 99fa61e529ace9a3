"""What drew attention and has something to say."""

from dataclasses import dataclass

from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats, unhalved


@register("vatp")
@dataclass(frozen=True)
class VATP(Eviction):
    """Keeps slots by the attention they drew times the size of their values (value-aware token pruning).

    As in the paper's variant over H2O, half of the budget goes to the newest slots. Sums run over |weights|, which for
    softmax are the weights. On ML-100K, at a quarter of the bytes, slots by lot do as well: see `oracle_evict`.
    """

    family = "eviction"
    paper = "VATP, Guo et al., Attention Score is not All You Need, EMNLP 2024, arXiv 2406.12335"
    formula = "score = (sum over queries of |attention weight|) |v|_1; the newest k/2 stay"
    growth = grows(compress="h n^2 L")
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"
    reads = ("values",)

    @property
    def needs(self) -> Stats:
        return Stats(column_sum=True)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        return prefill.attention_received(layer) * unhalved(prefill.values(layer)).norm(p=1, dim=-1)

    def forced(self, k: Tensor) -> tuple[int, Tensor]:
        return 0, k // 2
