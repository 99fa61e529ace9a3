"""Keys of small norm stay."""

from dataclasses import dataclass

from torch import Tensor

from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, unhalved


@register("knorm")
@dataclass(frozen=True)
class KNorm(Eviction):
    """Keeps slots whose keys are short: in language models keys of low L2 norm draw attention (Devoto et al.).

    The score does not look at weights, so it is the same for softmax and SiLU attention.
    """

    family = "eviction"
    paper = "Devoto et al., A Simple and Effective L2 Norm-Based Strategy, EMNLP 2024, arXiv 2406.11430"
    note = "overlap@10 at 1/4 on ML-100K, SASRec / HSTU: .623 / .570, slots by lot .785 / .758: it looks at no weight"
    formula = "score = -|k|"
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"
    reads = ("keys",)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        return -unhalved(prefill.keys(layer)).norm(dim=-1)
