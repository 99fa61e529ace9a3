"""What the reading token itself will attend to: a ceiling."""

from dataclasses import dataclass

from torch import Tensor

from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats


@register("oracle_evict")
@dataclass(frozen=True)
class OracleEvict(Eviction):
    """Keeps what the tokens that read the full state weigh most: the newest event in retrieval, all candidates in
    ranking. Not deployable: nobody knows them when the state is made.

    SiLU weights can be negative: absolute values are averaged. A ceiling of attention scores, not of eviction: on
    ML-100K at a quarter of the bytes (overlap with the full top 10, SASRec / HSTU) it has .80 / .77, slots by lot
    .78 / .79, evenly spaced ones .79 / .80. The top quarter holds only .29 to .62 of a query's weight there, and to
    scale up what is kept mends nothing (.81 / .78); slots drawn in proportion to the same weights, evenly over time,
    each counted 1 / its chance, have .89 / .85: small weights are many, and together they count.
    """

    family = "ceiling"
    paper = "none: the exact form of what TOVA, SnapKV and H2O estimate"
    formula = "score = mean over the tokens that will read of |attention weight|; not deployable"
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"

    @property
    def needs(self) -> Stats:
        return Stats(reader=True)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        return prefill.reading_attention(layer)
