"""Rare items stay: what everybody has says little of anybody."""

from dataclasses import dataclass

from torch import Tensor

from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats


@register("popularity")
@dataclass(frozen=True)
class Popularity(Eviction):
    """Keeps the events whose items have the fewest training events, the newer of equals."""

    family = "eviction"
    per_head = False
    paper = "none: inverse document frequency, for histories"
    note = "overlap@10 at 1/4 on ML-100K, SASRec / HSTU: .640 / .659, slots by lot .785 / .758: it looks at no weight"
    formula = "score = - training events of the item"
    stores = "keys and values of k events per layer, and their positions where the backbone reads them"

    @property
    def needs(self) -> Stats:
        return Stats(popularity=True)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        return -prefill.slot_popularity(layer).float()
