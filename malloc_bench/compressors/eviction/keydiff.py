"""Keys unlike the others stay."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, UserState


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
        keys = prefill.keys(layer)
        shrink = keys.norm(dim=-1, keepdim=True).clamp(min=1e-12).reciprocal()  # [B, H, S, 1]
        real = torch.where(prefill.mask(layer).unsqueeze(-1), shrink, 0)
        anchor = normalize(real.mT @ keys, dim=-1)  # of the sum of unit vectors, [B, H, 1, D]
        return -(keys @ anchor.mT * shrink).squeeze(-1)

    def flops(self, state: UserState, history: int) -> int:
        """Each key into the mean and with it."""
        keys = [layer[0].fields["keys"].shape for layer in state.layers]
        return sum(2 * 2 * history * h * d for _, h, _, d in keys)
