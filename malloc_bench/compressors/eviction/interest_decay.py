"""What a user likes most, and lately."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats


@register("interest_decay")
@dataclass(frozen=True)
class InterestDecay(Eviction):
    """Keeps events by their category's share of the history, halved with every `half_life` events that came after."""

    half_life: float = 50.0

    grid = {"half_life": (10.0, 25.0, 50.0, 100.0, 200.0, 400.0)}
    family = "eviction"
    per_head = False
    paper = "none: interest with exponential forgetting"
    note = (
        "overlap@10 at 1/4 on ML-100K, SASRec / HSTU: .724 / .681, slots by lot .785 / .758: "
        "it looks at no weight, and favours the newest"
    )
    formula = "score = log2(the category's share of the user's events) - age in events / half_life"
    stores = "keys and values of k events per layer, and their positions where the backbone reads them"

    def __post_init__(self) -> None:
        if not self.half_life > 0:
            raise ValueError(f"interest_decay: half_life must be above 0, not {self.half_life}")

    @property
    def needs(self) -> Stats:
        return Stats(categories=True)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        category, slots = prefill.slot_categories(layer), prefill.slots(layer)
        kinds = int(category.max()) + 2 if category.numel() else 1
        count = torch.zeros(*category.shape[:2], kinds, device=category.device)
        count = count.scatter_add(-1, category + 1, torch.ones_like(category, dtype=count.dtype))
        share = count.gather(-1, category + 1) / slots.count.clamp(min=1).unsqueeze(-1)
        place = torch.arange(category.shape[-1], device=category.device)
        return share.log2() - (slots.count.unsqueeze(-1) - 1 - place) / self.half_life
