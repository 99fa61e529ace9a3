"""What drew attention, of those that are large where the layer reads them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats, unhalved


@register("rastp")
@dataclass(frozen=True)
class RASTP(Eviction):
    """Keeps slots by the size of an event's representation times the attention it drew, summed over heads.

    The paper drops tokens while a recommender of semantic ids trains, a third stays; here slots of a state are dropped.
    Representations are what a layer gets in. Sums run over |weights|, which for softmax are the weights. normalise:
    divide by the queries that see the slot, as `h2o` does, since old slots are seen by more; the paper has the sum.
    """

    normalise: bool = True

    family = "eviction"
    per_head = False
    paper = "RASTP, Representation-Aware Semantic Token Pruning, arXiv 2511.16943"
    formula = "score = |x|_1 (sum over heads, mean over the queries that see it, of |weight|), x the layer's input"
    growth = grows(compress="h n^2 L")
    stores = "keys and values of k events per layer, and their positions where the backbone reads them"

    @property
    def needs(self) -> Stats:
        return Stats(column_sum=True, inputs=True)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        size = unhalved(prefill.layer_input(layer)).norm(p=1, dim=-1)  # [B, S]
        score = size[:, None] * prefill.attention_received(layer).sum(1, keepdim=True)
        if not self.normalise:
            return score
        queries = prefill.slots(layer).count.unsqueeze(-1) - torch.arange(size.shape[1], device=size.device)
        return score / queries.clamp(min=1)
