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
    ranking. Not deployable: nobody knows them when the state is made. What attention scores fall short of it is bad
    guessing; what it falls short of the full state, no choice by weight alone can have.

    SiLU weights can be negative: absolute values are averaged. It is a ceiling of attention scores, not of eviction: it
    looks at no values, and what is left weighs more in a softmax.
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
