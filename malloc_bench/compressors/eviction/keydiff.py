"""Keys unlike the others stay."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, by_heads, unhalved


@register("keydiff")
@dataclass(frozen=True)
class KeyDiff(Eviction):
    """Keeps slots whose keys point away from the mean direction: they are the hardest to stand in for."""

    family = "eviction"
    paper = "KeyDiff, Park et al., NeurIPS 2025, arXiv 2504.15364"
    note = (
        "overlap@10 at 1/4 on ML-100K, SASRec / HSTU: .578 / .520, slots by lot .785 / .758: "
        "it keeps what stands apart, and nothing stands for what most keys share"
    )
    formula = "score = -cos(k_i, mean over j of k_j / |k_j|)"
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"
    reads = ("keys",)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        keys = unhalved(prefill.keys(layer))
        return by_heads(apart, keys, prefill.mask(layer).expand(keys.shape[:3]))


def apart(keys: Tensor, real: Tensor) -> Tensor:
    """keys [n, S, D] and which are real [n, S] -> scores [n, S]."""
    unit = normalize(keys, dim=-1)
    anchor = (unit * real.unsqueeze(-1)).sum(1, keepdim=True)
    return -unit.mul_(normalize(anchor, dim=-1)).sum(-1)
