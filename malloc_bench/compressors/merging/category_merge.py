"""One slot a category."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.eviction.dedup import newer_alike
from malloc_bench.compressors.merging.clusters import Clusters
from malloc_bench.compressors.selection import chosen, ranked
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats


@register("category_merge")
@dataclass(frozen=True)
class CategoryMerge(Clusters):
    """Folds the events of each item category into one slot, the mean of their keys and values.

    The paper has as many slots as categories. For a budget of k, the k events that `category_cover` would keep (the
    newest of each category, then the second newest of each) lead a slot: an event joins the oldest leader of its
    category that is newer; where more categories than slots are left, those unseen for longest share the oldest.
    """

    family = "merging"
    per_head = False
    paper = "CAUSE, arXiv 2601.19158"
    formula = "key and value = mean over a category's events, mass = events in it"
    stores = "k mean keys and values a layer, their counts, and mean positions where the backbone reads them"

    @property
    def needs(self) -> Stats:
        return Stats(categories=True)

    def owners(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        category, count = prefill.slot_categories(layer), prefill.slots(layer).count.long()
        size = int(k.max()) if len(k) else 0
        if not size:
            return torch.zeros_like(category, dtype=torch.long)
        leaders = chosen(ranked(-newer_alike(category).float(), count), count, k, 0, 0)  # [B, 1, K]
        spare = torch.arange(size, device=k.device) >= k.view(-1, 1, 1)
        slot = torch.arange(category.shape[2], device=k.device)
        same = category.unsqueeze(-1) == category.gather(2, leaders).unsqueeze(2)  # [B, 1, S, K]
        newer = same & (leaders.unsqueeze(2) >= slot[:, None]) & ~spare.unsqueeze(2)
        return newer.int().argmax(-1)  # leaders lie in time order: the first is the oldest; where none is: slot 0
