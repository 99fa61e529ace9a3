"""Every category has a say before any has a second one."""

from dataclasses import dataclass

from torch import Tensor

from malloc_bench.compressors.eviction.dedup import newer_alike
from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats


@register("category_cover")
@dataclass(frozen=True)
class CategoryCover(Eviction):
    """Keeps the newest event of each item category, then the second newest of each, and so on.

    That is what the greedy rule picks for any objective that adds up, over categories, a concave function of how many
    of its events stay; of equal gains it takes the newest.
    """

    family = "eviction"
    per_head = False
    paper = "none: greedy submodular cover"
    note = "overlap@10 at 1/4 on ML-100K, SASRec / HSTU: .742 / .730, slots by lot .785 / .758: it looks at no weight"
    formula = "score = - how many newer events of the same category the user has"
    stores = "keys and values of k events per layer, and their positions where the backbone reads them"

    @property
    def needs(self) -> Stats:
        return Stats(categories=True)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        return -newer_alike(prefill.slot_categories(layer)).float()
