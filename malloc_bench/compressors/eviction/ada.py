"""Heads compete for a layer's budget."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.division import Divided
from malloc_bench.compressors.selection import ranked
from malloc_bench.registry import register
from malloc_bench.state import Prefill


@register("ada")
@dataclass(frozen=True)
class Ada(Divided):
    """A layer keeps the slots of the highest inner scores over all its heads; each head is sure of a floor.

    inner: the method that scores, head by head, a name or {name: {parameter: value}}. least: the floor, a share of an
    equal one; the paper's 0.2. Layers keep equally much. The paper cuts the floor from each budget anew; here its slots
    are bought as the budget grows, so that budgets nest. With one head a layer this is the inner method.
    """

    inner: Any = "snapkv"
    least: float = 0.2

    heads = True
    growth = grows(compress="w n L d")
    paper = "Ada-KV, Feng et al., NeurIPS 2025, arXiv 2407.11550"
    formula = "of a layer's H k slots a head keeps those among the best of all heads, and at least a fifth of k"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.least < 1:
            raise ValueError(f"ada: a least of at least 0 and below 1 is needed, not {self.least}")

    def order(self, prefill: Prefill) -> Tensor:
        layers = [self._of_layer(prefill, layer) for layer in prefill.layers]
        heads = max(x.shape[1] for x in layers), max(x.shape[2] for x in layers)
        wide = [torch.nn.functional.pad(x, (0, heads[1] - x.shape[2], 0, heads[0] - x.shape[1])) for x in layers]
        return torch.stack(wide, 1)

    def _of_layer(self, prefill: Prefill, layer: int) -> Tensor:
        """The layer's total at which a head's first, second ... slot is bought, [B, H, S] float64."""
        count, scores = prefill.slots(layer).count.long(), self.inner.scores(prefill, layer)
        prefill.remember(("order", self.inner, layer), lambda: ranked(scores, count))
        real = prefill.mask(layer).expand_as(scores)
        heads, width = scores.shape[1:]
        flat = scores.masked_fill(~real, -torch.inf).flip(2).mT.flatten(1)  # the newest first, where scores tie
        place = flat.argsort(dim=1, descending=True, stable=True).argsort(dim=1).view(len(flat), width, heads).mT
        bought = place.sort(-1).values.double() + 1
        if self.least > 0:  # a floor's slots fall due at this pace of the competition's
            due = torch.arange(1, width + 1, device=bought.device) * heads * (1 / self.least - 1)
            bought = bought.minimum(due)
        real = torch.arange(width, device=bought.device) < count.expand(-1, heads).unsqueeze(-1)
        bought = bought.masked_fill(~real, torch.inf).flatten(1)
        return bought.argsort(dim=1, stable=True).argsort(dim=1).view(len(flat), heads, width).double()
