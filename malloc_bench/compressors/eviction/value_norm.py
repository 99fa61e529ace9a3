"""Values of large norm stay."""

from dataclasses import dataclass

from torch import Tensor

from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, unhalved


@register("value_norm")
@dataclass(frozen=True)
class ValueNorm(Eviction):
    """Keeps slots whose values are long: whatever weight they get, they move the output most."""

    family = "eviction"
    paper = "the value factor of VATP, Guo et al., EMNLP 2024, arXiv 2406.12335, alone"
    note = "overlap@10 at 1/4 on ML-100K, SASRec / HSTU: .707 / .646, slots by lot .785 / .758: it looks at no weight"
    formula = "score = |v|_2"
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"
    reads = ("values",)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        return unhalved(prefill.values(layer)).norm(dim=-1)
